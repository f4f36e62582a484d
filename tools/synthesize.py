#!/usr/bin/env python3
"""Stage 7: speak texts with a model directory.

    python tools/synthesize.py exp/demo/model local/demo/speak.txt exp/demo/synth --conf conf/demo.yaml

reads   MODEL_DIR (stage 6), TEXTS: one sentence a line, or tts_text.json: {"speaker": ["sentence", ...]}
writes  OUT_DIR/wav/*.wav (24 kHz), and wav.scp text utt2spk spk2utt utt2dur: a data directory again
"""

import json
import sys
import time
from pathlib import Path

from cosyvoice_ft import audio, cli, conf, device
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.synthesis import Synthesizer
from cosyvoice_ft.table import write_data_dir


def read_texts(path: Path) -> list[tuple[str | None, str]]:
    """Return (speaker or None, sentence) of each line, or of each entry of a json.

    Raises BadInput naming file and line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a file with one sentence a line") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8") from error
    if path.suffix == ".json":
        pairs = from_json(path, content)
    else:
        pairs = [(None, line.strip()) for line in content.splitlines() if line.strip()]
    if not pairs:
        raise BadInput(f"{path}: no sentences; write one a line")
    return pairs


def from_json(path: Path, content: str) -> list[tuple[str, str]]:
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not valid json: {error.msg}") from error
    shape = 'a tts_text.json is {"speaker": ["sentence", ...], ...}'
    if not isinstance(data, dict):
        raise BadInput(f"{path}: {shape}")
    for spk, sentences in data.items():
        if not isinstance(sentences, list) or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise BadInput(f"{path}: '{spk}': {shape}")
    return [(spk, sentence) for spk, sentences in data.items() for sentence in sentences]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    where = device.torch_device(settings["device"])
    print(device.describe(where))
    pairs = read_texts(args.texts)
    synthesizer = Synthesizer(args.model_dir, settings, where)
    pairs = [(synthesizer.speaker(spk or settings["synth"]["speaker"]), sentence) for spk, sentence in pairs]

    rows, failed, unended, start = [], [], [], time.monotonic()
    for number, (spk, sentence) in enumerate(cli.progress(pairs, len(pairs), "speaking", "sentence"), 1):
        utt = f"{spk}_{number:03d}"
        try:
            spoken = synthesizer.speak(sentence, spk, settings["seed"])
            wav = args.out_dir / "wav" / f"{utt}.wav"
            audio.save_wav(wav, spoken.wav, audio.SAMPLE_RATE)
        except BadInput as error:
            failed.append(utt)
            print(f"left out {utt}: {error}", file=sys.stderr)
            continue
        unended += [] if spoken.ended else [utt]
        seconds = len(spoken.wav) / audio.SAMPLE_RATE
        rows.append({"utt": utt, "wav": wav, "text": sentence, "spk": spk, "seconds": seconds})
    spent = time.monotonic() - start
    if rows:
        write_data_dir(args.out_dir, rows)
    seconds = sum(row["seconds"] for row in rows)
    if unended:
        ratio = settings["llm"]["max_token_text_ratio"]
        print(f"did not end by themselves within {ratio:g} tokens a text token: {' '.join(unended)}")
    print(
        f"wrote {args.out_dir}: {len(rows)} of {len(pairs)} sentences, {seconds:.1f} s of speech in {spent:.1f} s, "
        f"real-time factor {spent / max(seconds, 1e-9):.2f}"
    )
    if failed:
        raise BadInput(f"{len(failed)} sentences could not be spoken: {' '.join(failed)}; the lines above say why")


if __name__ == "__main__":
    cli.run(main)
