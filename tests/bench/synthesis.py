#!/usr/bin/env python3
"""Speaking side by side: what batches of 8 gain over one by one, and where the time goes.

    python tests/bench/synthesis.py                                  # a tiny base, made for this
    python tests/bench/synthesis.py --size released --sentences 8    # random weights of CosyVoice2-0.5B's sizes
    python tests/bench/synthesis.py --model_dir exp/NAME/model --conf conf/NAME.yaml

Has tools/synthesize.py speak sentences of the shipped demo with each batch size, a process each, and prints what their
synth.json say, side by side; loading is not in it. Random weights know no end: in a base made for this, eos is likely
and comes as soon as it may, after as many tokens a letter as English has.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

from cosyvoice_ft import checkpoint, cli
from cosyvoice_ft.models.llm import Layout

ROOT = Path(__file__).resolve().parent.parent.parent
BATCHES = (1, 8)
TOKENS_PER_LETTER = 1.6  # 25 tokens a second, 15 to 16 letters a second
EOS_LOGIT = 12.0  # the others lie around 0, and their sum at 9
ROWS = (  # title, where in `total` of synth.json, digits
    ("text front end, s", ("phases", "text"), 2),
    ("language model, s", ("phases", "llm"), 2),
    ("flow, s", ("phases", "flow"), 2),
    ("vocoder, s", ("phases", "vocoder"), 2),
    ("all, s", ("seconds_spent",), 2),
    ("speech, s", ("seconds",), 2),
    ("real-time factor", ("real_time_factor",), 3),
    ("tokens a second", ("tokens_per_second",), 1),
    ("peak memory, GB", ("memory_gb",), 2),
)


def run(*command: object) -> None:
    """Run a tool to its end."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{done.stderr}ERROR {' '.join(map(str, command))}: status {done.returncode}")


def make_base(folder: Path, size: str) -> list[str]:
    """Make a random base that ends and knows one speaker; return the settings it is to be spoken with."""
    run("local/make_tiny_base.py", folder, "--size", size)
    weights = checkpoint.load_weights(folder / "llm.pt")
    bias = weights["llm_decoder.bias"].clone()
    bias[Layout().eos] = EOS_LOGIT
    checkpoint.save(folder / "llm.pt", weights | {"llm_decoder.bias": bias})
    checkpoint.save(folder / "spk2info.pt", {"somebody": {"embedding": torch.ones(1, 192)}})
    return [f"--llm.min_token_text_ratio={TOKENS_PER_LETTER}"]


def spoken(out: Path) -> dict[str, np.ndarray]:
    """Return the waves of a run."""
    return {path.name: soundfile.read(path)[0] for path in sorted((out / "wav").iterdir())}


def look_up(total: dict, keys: tuple[str, ...]) -> float:
    for key in keys:
        total = total[key]
    return total


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model_dir", type=Path, help="default: a random one, made for this")
    parser.add_argument("--size", default="tiny", help="of the random one, see local/make_tiny_base.py")
    parser.add_argument("--sentences", type=int, default=16)
    args, words = cli.parse_with_conf(parser)
    words += ["--conf", args.conf]
    lines = (ROOT / "local/demo/metadata.csv").read_text(encoding="utf-8").splitlines()[: args.sentences]
    with tempfile.TemporaryDirectory() as temporary:
        folder, model_dir = Path(temporary), args.model_dir or Path(temporary) / "base"
        if not args.model_dir:
            words = [*make_base(model_dir, args.size), *words]
        (folder / "texts.txt").write_text("\n".join(line.split("|")[1] for line in lines), encoding="utf-8")
        totals, waves = [], []
        for batch in BATCHES:
            out = folder / f"batch_{batch}"
            run("tools/synthesize.py", model_dir, folder / "texts.txt", out, *words, "--synth.batch", batch)
            totals.append(json.loads((out / "synth.json").read_text(encoding="utf-8"))["total"])
            waves.append(spoken(out))
    head = "".join(f"{name:>11}" for name in (*(f"batch {batch}" for batch in BATCHES), "ratio"))
    print(f"{f'{len(lines)} sentences':20}{head}")
    for title, keys, digits in ROWS:
        one, many = (look_up(total, keys) for total in totals)
        ratio = f"{many / one:11.2f}" if one else ""
        print(f"{title:20}{one:11.{digits}f}{many:11.{digits}f}{ratio}")
    alike = waves[0].keys() == waves[1].keys() and all(len(waves[0][utt]) == len(waves[1][utt]) for utt in waves[0])
    if not alike:
        sys.exit("ERROR the two did not speak the same tokens: waves of other lengths")
    far = max(np.abs(wave - waves[1][utt]).max() for utt, wave in waves[0].items())
    print(f"waves differ by {far:.1e} at most, of {max(np.abs(wave).max() for wave in waves[0].values()):.2f}")


if __name__ == "__main__":
    cli.run(main)
