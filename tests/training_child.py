"""A small training as a process of its own, to be killed or watched: python training_child.py FOLDER [KEY=VALUE ...]

A line with dropout, learnt from batches of different sizes. One update takes a few milliseconds.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import nn

from cosyvoice_ft import cli, engine, ranks, training
from cosyvoice_ft.schedules import schedule

SETTINGS = {
    "engine": "torch_ddp", "optimizer": "adamw", "lr": 1e-2, "betas": [0.9, 0.999], "weight_decay": 0.01,
    "grad_clip": 1.0, "schedule": "warmup_constant", "warmup_updates": 4, "dtype": "fp32", "compile": False,
    "accum_grad": 2, "max_epoch": 3, "max_batch": 100, "auto_batch": False, "max_bad_steps": 3, "patience": 0,
    "log_every": 2, "save_minutes": 1e-5, "keep_best": 3, "keep_last": 2, "part": "llm", "unit": "tokens",
}  # fmt: skip


class Line(nn.Module):
    """y = w x + b with dropout on x; the loss is a sum of squares."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.linear, self.dropout = nn.Linear(4, 64), nn.Linear(64, 1), nn.Dropout(dropout)

    def forward(self, x, y):
        return {"loss": ((self.linear(self.wide(self.dropout(x)))[:, 0] - y) ** 2).sum()}


def batches(epoch: int, skip: int = 0, sizes=(3, 5, 2, 4, 1, 6, 3)):
    """Batches of different sizes, the same for the same epoch."""
    rng = np.random.default_rng(epoch)
    for number, n in enumerate(sizes):
        x = torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32))
        facts = {"count": float(n), "utts": [f"u{number}_{i}" for i in range(n)], "positions": n, "padded": n}
        if number >= skip:
            yield {"x": x, "y": x.sum(1)} | facts


def make_task(folder: Path, log=print, make_batches=batches, **changes) -> training.Task:
    settings = SETTINGS | changes
    return training.Task(
        settings=settings,
        identity={f"train.{key}": value for key, value in settings.items() if key not in training.FREE}
        | {"processes": 1},
        batches=make_batches,
        cv={"full": lambda: batches(99), "streaming": lambda: batches(98)},
        learning_rate=schedule(settings),
        folder=folder,
        seed=7,
        log=log,
    )


def run(folder: Path, model: nn.Module | None = None, **options) -> tuple[engine.Engine, training.Progress]:
    folder.mkdir(parents=True, exist_ok=True)
    task = make_task(folder, **options)
    machine = engine.make_engine(model or Line(), task.settings, torch.device("cpu"))
    return machine, training.train(machine, task)


def slow(epoch: int, skip: int = 0):
    for batch in batches(epoch, skip):
        time.sleep(0.03)
        yield batch


def broken(epoch: int, skip: int = 0):
    """The fifth batch of an epoch holds a NaN: an update of each epoch fails."""
    for number, batch in enumerate(batches(epoch), 1):
        if number > skip:
            yield batch | {"x": batch["x"] * (math.nan if number == 5 else 1)}


def main() -> None:
    changes = dict(word.split("=", 1) for word in sys.argv[2:])
    make = {"slow": slow, "broken": broken}[changes.pop("batches", "slow")]
    changes = {key: YAML(typ="safe").load(value) for key, value in changes.items()}
    ranks.POLL = changes.pop("poll", ranks.POLL)
    with ranks.joined(torch.device("cpu"), alone_too=changes.get("engine") == "deepspeed"):
        machine, progress = run(
            Path(sys.argv[1]), make_batches=make, log=lambda line: print(line, flush=True), **changes
        )
    print(f"{progress.step} steps, finite {all(w.isfinite().all() for w in machine.weights().values())}")


if __name__ == "__main__":
    cli.run(main)
