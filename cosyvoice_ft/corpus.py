"""From clips, as a corpus lists them, to data directories: every clip is opened, then kept, or rejected by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput, whole
from cosyvoice_ft.jobs import MAX_LOSS, for_each
from cosyvoice_ft.table import write_data_dir

MIN_SECONDS, MAX_SECONDS = 0.5, 30.0
DEV_NAMES = ("dev", "valid", "test")  # folders that hold out utterances, as corpora call them


@dataclass
class Clip:
    """One recording as the corpus lists it. `part` is "train", "dev", or "" when the corpus does not say."""

    utt: str
    wav: Path
    text: str
    spk: str
    part: str = ""


def prepare(clips: Sequence[Clip], out: Path, settings: Mapping, seed: int, nj: int | None = None) -> str:
    """Check `clips`, split them, write out/train, out/dev and out/rejected.tsv; return the summary line.

    settings: the `corpus` section of the conf. Raises BadInput for an empty corpus, an id given twice, and when more
    than 5 % of the clips are rejected.
    """
    if not clips:
        raise BadInput(f"{settings['dir']}: no recordings with texts found; look at corpus.dir and corpus.format")
    twice = [utt for utt, count in Counter(clip.utt for clip in clips).items() if count > 1]
    if twice:
        paths = " and ".join(str(clip.wav) for clip in clips if clip.utt == twice[0])
        raise BadInput(
            f"{settings['dir']}: utterance id '{twice[0]}' is there twice ({paths}); ids are unique, rename one"
        )
    jobs = {clip.utt: clip for clip in clips}
    seconds, rejected = for_each(checked_seconds, jobs, what="checking", nj=nj)
    with whole(out / "rejected.tsv") as part:
        lines = (f"{utt}\t{reason}\n" for utt, reason in rejected.items())
        part.write_text("utt\treason\n" + "".join(lines), encoding="utf-8")
    if len(rejected) > MAX_LOSS * len(clips) or not seconds:
        first = next(iter(rejected.items()))
        raise BadInput(
            f"{settings['dir']}: {len(rejected)} of {len(clips)} clips cannot be used, more than {MAX_LOSS:.0%}; the "
            f"first: {first[0]}: {first[1]}; all of them are in {out / 'rejected.tsv'}"
        )
    rows = [vars(clip) | {"seconds": seconds[clip.utt]} for clip in clips if clip.utt in seconds]
    parts = split(rows, settings, seed)
    for name, members in parts.items():
        write_data_dir(out / name, members)
    sizes = ", ".join(
        f"{name} {len(rows)} ({sum(r['seconds'] for r in rows) / 60:.1f} min)" for name, rows in parts.items()
    )
    return f"wrote {out}: {len(rows)} of {len(clips)} utterances, {sizes}"


def checked_seconds(clip: Clip) -> float:
    """Decode a clip and return its length in seconds. Raises BadInput with the reason when it cannot be trained on."""
    if not any(character.isalnum() for character in clip.text):
        raise BadInput("no text, or only punctuation")
    if any(character.isspace() for character in clip.utt):
        raise BadInput("the id has a blank")
    seconds = len(audio.load_wav(clip.wav, audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    if seconds < MIN_SECONDS:
        raise BadInput(f"{seconds:.2f} s is shorter than {MIN_SECONDS} s")
    if seconds > MAX_SECONDS:
        raise BadInput(
            f"{seconds:.1f} s is longer than {MAX_SECONDS:.0f} s, the most the speech tokenizer takes; cut it"
        )
    return seconds


def split(rows: Sequence[Mapping], settings: Mapping, seed: int) -> dict[str, list[Mapping]]:
    """Return {"train": rows, "dev": rows}: the corpus' own parts, else a share drawn with `seed`.

    Raises BadInput when one of the two would be empty.
    """
    dev = {row["utt"] for row in rows if row["part"] == "dev"}
    if not dev:
        utts = sorted(row["utt"] for row in rows)
        count = min(settings["dev_max"], max(1, round(len(utts) * settings["dev_share"])))
        dev = set(np.random.default_rng(seed).permutation(utts)[:count].tolist())
    parts = {"train": [r for r in rows if r["utt"] not in dev], "dev": [r for r in rows if r["utt"] in dev]}
    for name, members in parts.items():
        if not members:
            raise BadInput(f"{settings['dir']}: no utterance left for {name}; at least 2 usable recordings are needed")
    return parts


def clip_id(path: Path) -> str:
    """Turn a path below the corpus into an utterance id: no suffix, no blanks."""
    return "_".join(path.with_suffix("").as_posix().replace("/", "_").split())


def one_line(text: str) -> str:
    """Return `text` with every run of blanks and line breaks as one blank."""
    return " ".join(text.split())


read_text = partial(Path.read_text, encoding="utf-8-sig")
