#!/usr/bin/env python3
"""Stages 4 and 5: fine-tune the language model (llm) or the flow-matching model (flow).

    python tools/train.py llm data/demo exp/demo/llm --conf conf/demo.yaml

reads   DATA/train/parquet, DATA/dev/parquet; the weights of pretrained_dir
writes  OUT/epoch_N.pt (weights only), OUT/epoch_N.yaml (losses), OUT/last.pt, OUT/conf.yaml, OUT/train.log,
        OUT/tensorboard

Goes on from OUT/last.pt when settings and data are still those of the run; says so when it is finished; else stops and
shows what differs. --fresh starts anew (OUT becomes OUT.1). --dry_run builds everything, computes one batch, says what
it takes and writes nothing. Several cards: torchrun --nproc_per_node 2 tools/train.py ...
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from cosyvoice_ft import cli, conf, dataset, device, engine, listening, memory, ranks, training
from cosyvoice_ft.files import BadInput, fingerprint, lock, whole
from cosyvoice_ft.models import flow, llm
from cosyvoice_ft.schedules import schedule
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.synthesis import load_model
from cosyvoice_ft.text import Tokenizer

SPEAKING = ("sampling", "min_token_text_ratio", "max_token_text_ratio", "inference_cfg_rate", "n_timesteps")
TEXT_EMBEDDING = r"^llm\.model\.model\.embed_tokens\."  # 136 of the 506 M parameters


class Data:
    """The utterances of one parquet folder as batches of one model."""

    def __init__(self, folder: Path, part: str, model: nn.Module, settings: Mapping) -> None:
        self.shards = Shards(folder / "parquet" / "data.list")
        if self.shards.metadata.get("tokenizer") != Tokenizer(settings["pretrained_dir"]).fingerprint:
            base = settings["pretrained_dir"]
            raise BadInput(
                f"{folder}/parquet: its texts were read by another tokenizer than {base}'s; run stage 3 again"
            )
        self.part, self.seed = part, settings["seed"]
        self.options = conf.training_settings(settings, part)
        if part == "llm":
            self.costs = self.shards.text_token.lengths + self.shards.speech_token.lengths + 2  # sos and task
            self.collate, self.mode = partial(llm.collate, layout=model.layout), "bistream"
        else:
            self.costs = flow.FRAMES_PER_TOKEN * self.shards.speech_token.lengths
            rate = settings["flow"]["training_cfg_rate"]
            self.collate, self.mode = partial(flow.collate, training_cfg_rate=rate), "streaming"

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        return [(first, rows) for _, _, first, rows in self.shards.groups]

    def plan(self, epoch: int, shuffle: bool) -> list[np.ndarray]:
        """Return this rank's batches as utterance numbers."""
        rank, world = ranks.world()
        options = {"max_batch": self.options["max_batch"], "seed": self.seed, "world_size": world}
        return dataset.plan(self.costs, self.groups, epoch=epoch, shuffle=shuffle, **options)[rank::world]

    def batches(self, numbers: list[np.ndarray], epoch: int, streaming: bool | None = None) -> dataset.Batches:
        """Return planned batches; `streaming` fixes the mode of all rows."""
        collate = self.collate if streaming is None else partial(self.collate, **{self.mode: streaming})
        draws = {"with_mel": self.part == "flow", "seed": self.seed, "epoch": epoch}
        return dataset.Batches(self.shards, numbers, collate, self.costs, **draws)

    def train(self, epoch: int, skip: int) -> Iterable[dict]:
        """Return this rank's batches of an epoch after the first `skip`, under a bar."""
        batches = self.batches(self.plan(epoch, shuffle=True)[skip:], epoch)
        loader, rank = self.load(batches), ranks.world()[0]
        return loader if rank else cli.progress(loader, len(batches), f"epoch {epoch}", "batch")

    def split(self, batch: dict) -> list[dict]:
        """Read a batch again as two halves."""
        batches = self.batches([], batch["epoch"])
        return [batches.batch(half) for half in np.array_split(batch["rows"], 2)]

    def cv(self, streaming: bool) -> torch.utils.data.DataLoader:
        epoch = dataset.CV_EPOCH
        return self.load(self.batches(self.plan(epoch, shuffle=False), epoch, streaming))

    def load(self, batches: dataset.Batches) -> torch.utils.data.DataLoader:
        return dataset.load(batches, self.options["num_workers"], torch.cuda.is_available())


def identity(part: str, settings: Mapping, options: Mapping, train: Data, dev: Data, base: Path) -> dict:
    """Return, flat, what makes this training this one; see training.resume."""
    return {
        **{f"train.{key}": value for key, value in options.items() if key not in training.FREE},
        **{f"{part}.{key}": value for key, value in settings[part].items() if key not in SPEAKING},
        "model": settings["model"],
        "seed": settings["seed"],
        "the data of train": train.shards.fingerprint(),
        "the data of dev": dev.shards.fingerprint(),
        f"the base's {part}.pt": fingerprint(base / f"{part}.pt"),
        "processes": ranks.world()[1],
    }


def frozen_names(part: str, patterns: list[str] | None, where: torch.device) -> list[str]:
    """Return `train.freeze`; where it is not set, the text embedding on a card under 16 GB, which it would not fit."""
    if patterns is None:
        small = where.type == "cuda" and torch.cuda.get_device_properties(where).total_memory < 15 * 2**30
        return [TEXT_EMBEDDING] if small and part == "llm" else []
    return patterns


def repeatable() -> None:
    """Let CUDA use algorithms only whose result does not depend on the order of its threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)


def logger(path: Path, rank: int) -> Callable[[str], None]:
    """Return log(line): to the screen, above the bar, and, with the time, to a file; rank 0 only."""

    def log(line: str) -> None:
        if rank == 0:
            tqdm.write(line)
            sys.stdout.flush()
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%F %T} {line}\n")

    return log


def step_aside(out: Path) -> None:
    """Rename OUT to OUT.1, or the next number that is free."""
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    if out.exists():
        out.rename(aside)
        print(f"the earlier training is now {aside}")


def summary_writer(folder: Path, project: str | None):
    """Return a TensorBoard writer, mirrored to SwanLab when `project` names one. Raises BadInput without swanlab."""
    from torch.utils.tensorboard import SummaryWriter

    if project:
        if not isinstance(project, str):
            raise BadInput(
                "train.swanlab: the name of a project; the key comes from `swanlab login`, never from a conf"
            )
        try:
            import swanlab
        except ImportError as error:
            raise BadInput(
                "train.swanlab: the package is not installed; pip install swanlab, or unset the key"
            ) from error
        swanlab.sync_tensorboard_torch()
        swanlab.init(project=project)  # its key comes from SWANLAB_API_KEY or `swanlab login`
    return SummaryWriter(str(folder / "tensorboard"))


def dry_run(machine: engine.Engine, data: Data, log: Callable[[str], None]) -> None:
    """Compute one batch forward and backward. Raises BadInput for a loss that is not finite."""
    batch = data.batches(data.plan(1, shuffle=True)[:1], epoch=1)[0]
    shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    log(f"dry run: {len(batch['utts'])} utterances, {shapes}")
    machine.module.train()
    out = machine.forward(batch)
    loss = out["loss"] / batch["count"]
    if not torch.isfinite(loss):
        raise BadInput(f"dry run: the loss of {' '.join(batch['utts'])} is not finite")
    loss.backward()
    without = [name for name, p in machine.module.named_parameters() if p.requires_grad and p.grad is None]
    log(
        f"dry run: loss {loss.item():.4f}, parameters without gradient: {' '.join(without) or 'none'}, peak memory "
        f"{device.peak_memory(machine.device) / 1e9:.2f} GB"
    )


def describe(model: nn.Module, part: str, train: Data, dev: Data) -> str:
    """Return the sizes of model and data as a line."""
    parameters = list(model.parameters())
    count, frozen = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if not p.requires_grad)
    plan = train.plan(1, shuffle=True)
    return (
        f"{part}: {count / 1e6:.1f} M parameters, {frozen / 1e6:.1f} M frozen; {len(train.shards)} + {len(dev.shards)} "
        f"utterances, {len(plan)} batches an epoch, padding {dataset.padding_share(plan, train.costs):.1%}"
    )


def estimate(machine: engine.Engine, data: Data) -> tuple[str, float | None]:
    """Return what memory.report says of a full batch."""
    rows = data.plan(1, shuffle=True)[0][:2]
    batches = data.batches([], epoch=1)
    longer = max(rows, key=lambda row: data.costs[row])
    options = data.options
    return memory.report(
        machine,
        batches.batch(np.array([longer])),
        batches.batch(np.array([longer, longer])),
        options["max_batch"],
        options["optimizer"],
    )


def train(args: argparse.Namespace, settings: dict, where: torch.device) -> None:
    """Build everything and train, or try one batch of it."""
    rank, world = ranks.world()
    options = conf.training_settings(settings, args.part)
    options["freeze"] = frozen_names(args.part, options["freeze"], where)
    log = logger(Path(os.devnull) if args.dry_run else args.out / "train.log", rank)
    log(f"{' '.join(sys.argv)}   commit {commit()}   seed {settings['seed']}   {options}")
    log(f"{device.describe(where)}, python {sys.version.split()[0]}, numpy {np.__version__}, {world} processes")

    base = Path(settings["pretrained_dir"])
    conf.check_model_yaml(settings, base)
    model = load_model(args.part, base, settings)
    engine.freeze(model, options["freeze"])
    if options["checkpointing"]:
        memory.recompute(model.layers())
    train_data, dev_data = (Data(args.data / name, args.part, model, settings) for name in ("train", "dev"))
    learning_rate = schedule(options)
    machine = engine.make_engine(model, options, where)
    log(describe(model, args.part, train_data, dev_data))
    line, peak = estimate(machine, train_data)
    log(line)
    if args.dry_run:
        dry_run(machine, train_data, log)
        return
    task = training.Task(
        settings=options | {"part": args.part, "unit": {"llm": "tokens", "flow": "frames"}[args.part]},
        identity=identity(args.part, settings, options, train_data, dev_data, base),
        batches=train_data.train,
        cv={"full": partial(dev_data.cv, False), "streaming": partial(dev_data.cv, True)},
        learning_rate=learning_rate,
        folder=args.out,
        seed=settings["seed"],
        log=log,
        writer=summary_writer(args.out, options["swanlab"]) if rank == 0 else None,
        split=train_data.split,
        listen=listening.Listener(args.part, machine, settings, args.data, args.out, log).speak,
        peak=peak if machine.dtype == torch.bfloat16 else None,
        begun=partial(save_conf, args.out, settings),
    )
    training.train(machine, task)
    if task.writer:
        task.writer.close()


def save_conf(out: Path, settings: Mapping) -> None:
    """Write OUT/conf.yaml: all settings of the run, as stages 6 and 7 read them."""
    with whole(out / "conf.yaml") as part:
        part.write_text(conf.to_yaml(settings), encoding="utf-8")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=["llm", "flow"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier training is kept as OUT.1")
    parser.add_argument("--dry_run", action="store_true", help="build everything, compute one batch, write nothing")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    options = conf.training_settings(settings, args.part)
    if options["deterministic"]:
        repeatable()
    where = device.torch_device(settings["device"])
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(ranks.joined(where, alone_too=options["engine"] == "deepspeed"))
        rank, world = ranks.world()
        if rank == 0 and not args.dry_run:
            if args.fresh:
                step_aside(args.out)
            stack.enter_context(lock(args.out))
        if world > 1:
            dist.barrier()  # the folder is there
        train(args, settings, where)


def commit() -> str:
    """Return the commit of the recipe, "unknown" outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, capture_output=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    cli.run(main)
