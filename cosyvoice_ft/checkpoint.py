"""Weights on disk: flat dicts name -> tensor, as published; loaded with `weights_only` and strict names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice_ft.conf import read_yaml, to_yaml
from cosyvoice_ft.files import BadInput, whole


def load(path: str | Path) -> Any:
    """Load what torch.save wrote, tensors and plain containers only, to the CPU. Raises BadInput when it cannot."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        reason = str(error).split("\n")[0][:120]
        raise BadInput(f"{path}: not a complete weights file ({reason}); fetch or make it again") from error
    except Exception as error:  # pickle.UnpicklingError: something other than tensors is inside
        raise BadInput(f"{path}: refused, it holds more than tensors; only plain weights files are loaded") from error


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a flat dict of tensors. Raises BadInput for anything else."""
    weights = load(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadInput(
            f"{path}: not a flat dict of tensors; a training state (last.pt)? take epoch_N.pt or the model's"
        )
    return weights


def save(path: str | Path, content: Any) -> None:
    """Save tensors and plain containers, whole or not at all."""
    with whole(path) as part, open(part, "wb") as file:  # a file without a name: the bytes depend on content only
        torch.save(content, file)


def save_epoch(folder: str | Path, epoch: int, weights: Mapping[str, Tensor], facts: Mapping) -> None:
    """Write epoch_N.pt (weights only) and epoch_N.yaml (what is known of them; `cv` holds the losses)."""
    folder = Path(folder)
    save(folder / f"epoch_{epoch}.pt", dict(weights))
    with whole(folder / f"epoch_{epoch}.yaml") as part:
        part.write_text(to_yaml({"epoch": epoch, **facts}), encoding="utf-8")


def facts(folder: str | Path) -> dict[int, dict]:
    """Return {epoch: facts} of all epochs of a training, of those too whose weights were deleted."""
    paths = {path.stem.removeprefix("epoch_"): path for path in Path(folder).glob("epoch_*.yaml")}
    return {int(epoch): read_yaml(paths[epoch]) for epoch in sorted(filter(str.isdigit, paths), key=int)}


def epochs(folder: str | Path) -> dict[int, dict]:
    """Return {epoch: facts} of the epochs whose weights are there."""
    return {n: known for n, known in facts(folder).items() if (Path(folder) / f"epoch_{n}.pt").is_file()}


def best_epochs(folder: str | Path, num: int) -> list[int]:
    """Return the `num` epochs of lowest CV loss, best first (all of them when there are fewer).

    Raises BadInput when there is none.
    """
    found = epochs(folder)
    if not found:
        raise BadInput(f"{folder}: no epoch_N.pt with its epoch_N.yaml; run the training stage first")
    return sorted(found, key=lambda epoch: (found[epoch]["cv"]["loss"], epoch))[:num]


def average(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the mean of each tensor over the files, in its own dtype; integer tensors keep the first file's value.

    Tied tensors stay tied. Raises BadInput when names differ.
    """
    files = [load_weights(path) for path in paths]
    for path, weights in zip(paths, files, strict=True):
        if weights.keys() != files[0].keys():
            raise BadInput(f"{path}: other parameters than {paths[0]}; average checkpoints of one training")
    means, done = {}, {}
    for name, first in files[0].items():
        storage = (first.data_ptr(), first.shape)
        if storage not in done:
            done[storage] = first
            if first.is_floating_point():
                done[storage] = sum(weights[name] for weights in files) / len(files)
        means[name] = done[storage]
    return means
