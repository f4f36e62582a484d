#!/usr/bin/env python3
"""Stages 0 to 3 on very many utterances: is time per utterance, and is memory, independent of how many there are?

    python tests/bench/corpus_100k.py --utterances 100000

Cuts the shipped recordings into 300 short clips, lists them under as many ids as asked for, and walks stages 0 to 3
with a tiny base (or --pretrained_dir DIR), once with a tenth and once with all; every stage is a process of its own.
Prints seconds, milliseconds an utterance and peak memory side by side, then what follows for 10,000 hours. With fewer
than 20,000 it measures little but how the tools start.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile

from cosyvoice_ft import cli

ROOT = Path(__file__).resolve().parent.parent.parent
PIECES = 3  # clips that a recording is cut into
TOOLS = ("extract_embedding", "extract_speech_token", "make_parquet")
STAGES = ("recordings, texts", "speaker vectors", "speech tokens", "pack")
HOURS = 10_000
UTTERANCE = 5.0  # seconds, in a usual corpus
MEL_BYTES = 50 * 80 * 2  # a second: frames, bands, float16


@dataclass
class Cost:
    """What one stage took: seconds of wall clock, peak memory in bytes."""

    seconds: float
    peak: int


def make_corpus(folder: Path, utterances: int) -> float:
    """Write wavs/ and metadata.csv of `utterances` ids; return how many seconds they last."""
    (folder / "wavs").mkdir(parents=True)
    clips, lines, seconds = [], [], 0.0
    for line in (ROOT / "local/demo/metadata.csv").read_text(encoding="utf-8").splitlines():
        utt, *_, text = line.split("|")
        wav, rate = soundfile.read(ROOT / f"local/demo/wavs/{utt}.flac")
        words, step = text.split(), len(wav) // PIECES
        for i in range(PIECES):
            path = folder / f"{utt}_{i}.wav"
            soundfile.write(path, wav[i * step : (i + 1) * step], rate)
            share = slice(i * len(words) // PIECES, (i + 1) * len(words) // PIECES)
            clips.append((path, " ".join(words[share]), step / rate))
    for number in range(utterances):
        path, text, length = clips[number % len(clips)]
        os.link(path, folder / f"wavs/u{number:07d}.wav")
        lines.append(f"u{number:07d}|{text}\n")
        seconds += length
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return seconds


def measured(*command: object) -> Cost:
    """Run a tool to its end and return what it took."""
    start = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"ERROR {' '.join(map(str, command))}: status {child.returncode}")
    return Cost(time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


@dataclass
class Walk:
    """Stages 0 to 3 on so many utterances: what they took, and the bytes they wrote, of shards and of all else."""

    utterances: int
    audio: float  # seconds
    costs: list[Cost]
    shards: int
    others: int


def walk(folder: Path, base: Path, utterances: int) -> Walk:
    """Run the stages, each as a process of its own."""
    seconds, data = make_corpus(folder / "corpus", utterances), folder / "data"
    words = ["--conf", "conf/tiny.yaml", "--corpus.dir", folder / "corpus", "--pretrained_dir", base]
    costs = [measured("local/prepare_table.py", data, *words, "--corpus.same_audio", "keep")]
    costs += [measured(f"tools/{tool}.py", data / "train", data / "dev", *words) for tool in TOOLS]
    sizes = {path: path.stat().st_size for path in data.rglob("*") if path.is_file()}
    shards = sum(size for path, size in sizes.items() if path.suffix == ".parquet")
    return Walk(utterances, seconds, costs, shards, sum(sizes.values()) - shards)


def table(few: Walk, many: Walk) -> list[str]:
    """Seconds, milliseconds an utterance and peak memory of each stage, side by side."""
    lines = [f"{'stage':24}" + "".join(f"{f'{walk.utterances:,} utterances':>34}" for walk in (few, many))]
    for number, stage in enumerate(STAGES):
        cells = ""
        for walk in (few, many):
            cost = walk.costs[number]
            cells += f"{cost.seconds:10.1f} s {cost.seconds / walk.utterances * 1e3:7.2f} ms {cost.peak / 1e6:8.0f} MB"
        lines.append(f"{number} {stage:22}{cells}")
    return lines


def forecast(few: Walk, many: Walk) -> list[str]:
    """What the growth from `few` to `many` makes of 10,000 hours of utterances of a usual length."""
    total, utts = HOURS * 3600, HOURS * 3600 / UTTERANCE
    mel = MEL_BYTES * total + (many.shards - MEL_BYTES * many.audio) / many.utterances * utts
    lines = [
        f"{HOURS:,} hours in {utts:,.0f} utterances of {UTTERANCE:.0f} s, on {len(os.sched_getaffinity(0))} cores:",
        f"  disk: shards {mel / 1e9:,.0f} GB = {MEL_BYTES:,} bytes x seconds + what lies above that x utterances; "
        f"tables and archives {many.others / many.utterances * utts / 1e9:,.0f} GB",
    ]
    for number, stage in enumerate(STAGES):
        small, large = few.costs[number], many.costs[number]
        hours = (large.seconds - small.seconds) / (many.audio - few.audio) * HOURS
        growth = (large.peak - small.peak) / (many.utterances - few.utterances)
        time_ = f"{hours:,.1f} h = {hours / HOURS:.5f} x hours of audio"
        memory = (
            f"{(large.peak + growth * utts) / 1e9:,.1f} GB = {large.peak / 1e6:,.0f} MB + {growth:,.0f} B x utterances"
        )
        lines.append(f"  stage {number}, {stage}: {time_}; {memory}")
    return [*lines, "  stages 1 and 2: divide the hours by the machines (RANK, WORLD_SIZE); 0 and 3 run on one"]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--utterances", type=int, default=100_000)
    parser.add_argument("--pretrained_dir", type=Path, help="a model directory; default: a tiny one made for this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary), args.pretrained_dir or Path(temporary) / "base"
        if not args.pretrained_dir:
            measured("local/make_tiny_base.py", base)
        few, many = (walk(folder / str(n), base, n) for n in (args.utterances // 10, args.utterances))
    print("\n".join([*table(few, many), "", *forecast(few, many)]))


if __name__ == "__main__":
    cli.run(main)
