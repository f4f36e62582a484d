#!/usr/bin/env python3
"""Speaking in batches against one sentence after the other: what is gained, and where the time goes.

    python tests/bench/synthesis.py                      # a tiny base, sentences of the demo: half a minute
    python tests/bench/synthesis.py --size released      # random weights of the released sizes: minutes, 5 GB
    python tests/bench/synthesis.py --model_dir exp/NAME/model --device cuda

Every sentence is spoken to the same number of tokens in both ways, and the tokens must be the same: that is checked.
Each way runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from train_step import build

from cosyvoice_ft import audio, cli, conf, device
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.hift import HiFTGenerator
from cosyvoice_ft.synthesis import PHASES, Sentence, Synthesizer, Voice, bounded

ROOT = Path(__file__).resolve().parent.parent.parent


def speak(model_dir: str, size: str, number: int, tokens: int, batch: int, where: str) -> dict:
    """Speak `number` sentences of the demo to about `tokens` tokens each; return seconds by phase, rate, the tokens."""
    place = device.torch_device(where)
    settings = conf.read_base(conf.CONF_DIR / "cosyvoice2.yaml")
    networks = {}
    if size == "released":
        networks = {part: build(part, layers=24) for part in ("llm", "flow")} | {"hift": HiFTGenerator()}
        networks["hift"].fold_weight_norm()
    synthesizer = Synthesizer(model_dir, settings, place, networks)
    vector = torch.randn(1, 192, generator=torch.Generator().manual_seed(0))
    voice = next(iter(synthesizer.voices.values()), Voice(vector))
    lines = (ROOT / "local/demo/metadata.csv").read_text(encoding="utf-8").splitlines()[:number]
    sentences = [Sentence(f"s{i}", line.split("|")[1], voice, seed=i) for i, line in enumerate(lines)]
    parts = [part for sentence in sentences for part in synthesizer.segments(sentence)]
    ids = sum(len(part.ids) for part in parts)
    ratio = tokens * len(parts) / ids
    settings["llm"] |= {"min_token_text_ratio": ratio, "max_token_text_ratio": ratio}
    parts.sort(key=lambda part: len(part.ids))
    start = time.monotonic()
    with torch.inference_mode():
        for first in range(0, len(parts), batch):
            group = parts[first : first + batch]
            synthesizer.decode(group)
            for some in bounded([part for part in group if part.tokens]):
                synthesizer.add_waves(some)
    total = time.monotonic() - start
    spoken = sum(len(part.wav) for part in parts) / audio.SAMPLE_RATE
    count = sum(len(part.tokens) for part in parts)
    return synthesizer.spent | {
        "total": total,
        "tokens": {part.sentence.utt: part.tokens for part in parts},
        "tokens_per_s": count / max(synthesizer.spent["llm"], 1e-9),
        "real_time_factor": total / spoken,
        "memory": device.peak_memory(place) / 1e9,
    }


def apart(*args) -> dict:
    """Run `speak` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(speak, *args).result()


def compare(model_dir: str, args: argparse.Namespace) -> None:
    """Print batch 1 and the larger batch side by side."""
    options = (args.sentences, args.tokens)
    found = {n: apart(model_dir, args.size, *options, n, args.device) for n in (1, args.batch)}
    for batch, facts in found.items():
        phases = "  ".join(f"{phase} {facts[phase]:6.2f} s" for phase in PHASES)
        print(
            f"batch {batch}: {facts['total']:6.1f} s  {phases}  {facts['tokens_per_s']:6.1f} tokens/s in the llm  "
            f"real-time factor {facts['real_time_factor']:.2f}  peak {facts['memory']:.1f} GB"
        )
    one, many = found[1], found[args.batch]
    ratios = "  ".join(f"{phase} {one[phase] / many[phase]:.2f}" for phase in PHASES if many[phase] > 0.01)
    print(f"batch {args.batch} is {one['total'] / many['total']:.2f} times as fast  ({ratios})")
    if differ := [utt for utt, tokens in one["tokens"].items() if tokens != many["tokens"][utt]]:
        raise BadInput(f"{', '.join(differ)}: other tokens in a batch than alone")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model_dir", help="a model directory; default: a tiny base made for this")
    parser.add_argument("--size", choices=["own", "released"], default="own", help="released: random weights, 0.5 B")
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60, help="speech tokens a sentence, on average; 25 are a second")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(device.describe(device.torch_device(args.device)))
    if args.model_dir:
        compare(args.model_dir, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "local/make_tiny_base.py", f"{folder}/base"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        compare(f"{folder}/base", args)


if __name__ == "__main__":
    cli.run(main)
