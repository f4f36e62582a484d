#!/usr/bin/env python3
"""Stage 6, second half: a complete model directory from the base and the tuned weights.

    python tools/make_model_dir.py exp/demo/model --llm exp/demo/llm/average.pt --flow exp/demo/flow/average.pt \\
        --embedding data/demo/train/spk2embedding.pt --conf conf/demo.yaml

reads   pretrained_dir, the tuned weights, the speaker vectors
writes  MODEL_DIR: llm.pt flow.pt hift.pt spk2info.pt, and the base's yaml, ONNX models and CosyVoice-BlankEN (linked)

The official CosyVoice code and tools/synthesize.py both take it as it is. What is not given comes from the base.
"""

import os
import shutil
from pathlib import Path

import torch

from cosyvoice_ft import checkpoint, cli, conf
from cosyvoice_ft.extractors import load_archive
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.synthesis import load_model
from cosyvoice_ft.text import TOKENIZER_DIR

LINKED = ("hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "speech_tokenizer_v2.batch.onnx")
REQUIRED = ("llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx")


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system cannot link; the target stays when the source is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def fill(part: Path, base: Path, tuned: dict[str, Path], settings: dict) -> None:
    """Put all files but spk2info.pt into `part`."""
    for name in LINKED:
        if (base / name).is_file():
            link(base / name, part / name)
    for path in (base / TOKENIZER_DIR).iterdir():
        link(path, part / TOKENIZER_DIR / path.name)
    link(base / f"{settings['model']}.yaml", part / f"{settings['model']}.yaml")
    for name, weights in tuned.items():
        load_model(name, base, settings, weights)  # names and shapes fit, or this raises
        link(weights, part / f"{name}.pt")


def speakers(base: Path, embedding: Path) -> dict[str, dict]:
    """Return the speakers of the base and those of the corpus, each with its vector (1, 192)."""
    known = checkpoint.load(base / "spk2info.pt") if (base / "spk2info.pt").is_file() else {}
    for spk, vector in load_archive(embedding).items():
        known[spk] = {"embedding": torch.from_numpy(vector.copy())[None]}
    return known


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--llm", type=Path, metavar="PT", help="tuned language model")
    parser.add_argument("--flow", type=Path, metavar="PT", help="tuned flow-matching model")
    parser.add_argument("--embedding", type=Path, required=True, metavar="PT", help="spk2embedding.pt of the corpus")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    base, out = Path(settings["pretrained_dir"]), args.model_dir
    missing = [name for name in (*REQUIRED, f"{settings['model']}.yaml", TOKENIZER_DIR) if not (base / name).exists()]
    if missing:
        raise BadInput(f"{base}: lacks {', '.join(missing)}; fetch the pretrained model again")
    tuned = {"llm": args.llm or base / "llm.pt", "flow": args.flow or base / "flow.pt"}

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part, base, tuned, settings)
    known = speakers(base, args.embedding)
    checkpoint.save(part / "spk2info.pt", known)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    parts = ", ".join(f"{name} from {path}" for name, path in tuned.items())
    print(f"wrote {out}: {parts}; speakers {', '.join(known)}")


if __name__ == "__main__":
    cli.run(main)
