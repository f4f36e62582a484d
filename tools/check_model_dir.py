#!/usr/bin/env python3
"""Check a model directory, the base of stages 1 to 6 or the one that stage 6 makes, before hours go into it.

    python tools/check_model_dir.py pretrained_models/CosyVoice2-0.5B --conf conf/paimon.yaml

reads   MODEL_DIR: cosyvoice2.yaml llm.pt flow.pt hift.pt campplus.onnx speech_tokenizer_v2.onnx CosyVoice-BlankEN/
writes  nothing

Prints every file with its size and state: missing, an LFS pointer, cut off, or names and shapes of weights that do not
fit. Only names, shapes and headers are read, weights as tensors and nothing else. Exits 1 when anything is wrong.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from cosyvoice_ft import cli, conf, model_dir
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.synthesis import load_model

SUPPORTED = ("cosyvoice2",)
WRONG_WEIGHTS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def fit(path: Path, settings: Mapping) -> tuple[str, str]:
    """Return (problem or "", what it holds) of a whole file: weights by their network, the yaml by the conf."""
    try:
        if path.name in model_dir.WEIGHTS:
            model = load_model(path.stem, path.parent, settings)
            return "", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, they fit"
        if path.suffix == ".yaml":
            conf.check_model_yaml(settings, path.parent)
            return "", "agrees with the conf"
    except BadInput as error:
        return str(error).removeprefix(f"{path}: "), ""
    except WRONG_WEIGHTS as error:  # sizes are computed from the shapes; wrong ones fail in many ways
        return f"does not fit a {settings['model']} {path.stem}: {' '.join(str(error).split())[:300]}", ""
    return "", "whole"


def readable(size: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings, folder, start = conf.load_conf(args.conf, overrides), args.model_dir, time.monotonic()
    cure = f"bash run.sh --conf {args.conf} --stage -1 --stop_stage -1"
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such directory; fetch the model: {cure}")
    release = model_dir.release(folder)
    if release not in SUPPORTED:
        name = model_dir.RELEASES[release]
        raise BadInput(f"{folder}: {name} is recognised, not yet supported by this recipe; take CosyVoice2-0.5B")

    names = [*model_dir.needed(release), *(name for name in model_dir.OPTIONAL if (folder / name).exists())]
    width, total, wrong = max(map(len, names)), 0, {}
    print(f"{'file':{width}} {'size':>9}  state")
    for name in names:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        problem, holds = model_dir.problem(path), ""
        if not problem:
            problem, holds = fit(path, settings)
        if problem:
            wrong[name] = problem
        total += size or 0
        print(f"{name:{width}} {'-' if size is None else readable(size):>9}  {problem or holds}")
    if wrong:
        name, problem = next(iter(wrong.items()))
        raise BadInput(
            f"{folder}: {len(wrong)} of {len(names)} files cannot be used: {name}: {problem}"
            f"{'' if len(wrong) == 1 else '; the others: ' + ' '.join(list(wrong)[1:])}"
            f" (fix: mend what is named, or move {folder} away and fetch it anew: {cure})"
        )
    title = model_dir.RELEASES[release]
    print(f"{folder}: {title}, {len(names)} files, {readable(total)}: complete, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
