#!/usr/bin/env python3
"""Make the demo recordings: flite's voice slt reads every sentence of metadata.csv.

    python local/demo/make_recordings.py            # flite 2.2 on PATH (apt-get install flite)
    python local/demo/make_recordings.py --check    # write nothing; compare with wavs/, count the phones

reads   FOLDER/metadata.csv    id|text|text, UTF-8, no header (the layout of LJSpeech)
writes  FOLDER/wavs/ID.flac    16 kHz, mono, 16 bit, each of 3 to 7 s; nothing when any of them is not

flite 2.2 gives the same samples every time on one kind of machine; the shipped ones were made on x86-64.
--check exits 1 when a recording is missing or differs, or when a phone of slt occurs fewer than 5 times.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile

from cosyvoice_ft.files import BadInput, whole

RATE = 16000  # Hz, what slt speaks at
SHORTEST, LONGEST = 3.0, 7.0  # s
FEWEST = 5  # occurrences of every phone
PHONES = (  # of slt: the CMU set with the schwa
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="default: the script's own")
    parser.add_argument("--check", action="store_true", help="compare and count only")
    return parser.parse_args()


def read_sentences(path: Path) -> dict[str, str]:
    """Return the text of every id; BadInput names the line that is not `id|text|text`."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; name a folder that has a metadata.csv")
    sentences = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("|")
        if len(fields) != 3 or fields[0] in sentences:
            raise BadInput(f"{path}:{number}: every line must be `id|text|text` with an id of its own; correct it")
        sentences[fields[0]] = fields[2]
    return sentences


def speak(text: str, wav: Path) -> tuple[np.ndarray, list[str]]:
    """Let flite write `wav`; return its samples (T,) int16 and the phones spoken, pauses left out."""
    command = ["flite", "-voice", "slt", "-ps", "-t", text, "-o", str(wav)]
    try:
        phones = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        raise BadInput("flite is not on PATH; type `apt-get install flite`, then run this again") from None
    samples, rate = soundfile.read(wav, dtype="int16")
    if rate != RATE:  # flite takes its default voice, and says nothing, when it has no slt
        raise BadInput(f"flite spoke at {rate} Hz, not slt's {RATE}; install a flite that lists slt in `flite -lv`")
    return samples, [phone for phone in phones if phone != "pau"]


def same(path: Path, samples: np.ndarray) -> bool:
    return path.is_file() and np.array_equal(soundfile.read(path, dtype="int16")[0], samples)


def main() -> None:
    args = get_args()
    recordings, counts = {}, Counter(dict.fromkeys(PHONES.split(), 0))
    with tempfile.TemporaryDirectory() as scratch:
        for utt, text in read_sentences(args.folder / "metadata.csv").items():
            recordings[utt], phones = speak(text, Path(scratch) / f"{utt}.wav")
            counts.update(phones)
            seconds = len(recordings[utt]) / RATE
            if not SHORTEST <= seconds <= LONGEST:
                raise BadInput(f"{utt}: {seconds:.2f} s, must be {SHORTEST} to {LONGEST} s; reword it: {text}")
    paths = {utt: args.folder / "wavs" / f"{utt}.flac" for utt in recordings}
    rarest, fewest = min(counts.items(), key=lambda item: item[1])
    if args.check:
        print(" ".join(f"{phone}:{count}" for phone, count in counts.most_common()))
        changed = [utt for utt, path in paths.items() if not same(path, recordings[utt])]
        if changed:
            raise BadInput(f"{paths[changed[0]]}: not what flite says ({len(changed)} such); run without --check")
        if fewest < FEWEST:
            raise BadInput(f"phone {rarest} occurs {fewest} times, must be {FEWEST}; add sentences that have it")
    else:
        for utt, path in paths.items():
            with whole(path) as part:
                soundfile.write(part, recordings[utt], RATE, format="FLAC", subtype="PCM_16")
    minutes = sum(map(len, recordings.values())) / RATE / 60
    did = "checked" if args.check else "wrote"
    print(f"{did} {args.folder / 'wavs'}: {len(paths)} recordings, {minutes:.1f} min, rarest phone {rarest} x {fewest}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"make_recordings.py: {error}")
