#!/usr/bin/env python3
"""Stages 4 and 5: fine-tune the language model (llm) or the flow-matching model (flow).

    python tools/train.py llm data/demo exp/demo/llm --conf conf/demo.yaml

reads   DATA/train/parquet, DATA/dev/parquet; the weights of pretrained_dir
writes  OUT/epoch_N.pt (weights only), OUT/epoch_N.yaml (losses), OUT/last.pt, OUT/conf.yaml, OUT/train.log,
        OUT/tensorboard

Goes on from OUT/last.pt when settings and data are still those of the run; says so when it is finished; else stops and
shows what differs. --fresh starts anew (OUT becomes OUT.1). --dry_run builds everything, computes one batch and says
what it takes. Several cards: torchrun --nproc_per_node 2 tools/train.py ...
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cosyvoice_ft import cli, conf, dataset, device, engine, listening, memory, training
from cosyvoice_ft.files import BadInput, fingerprint, whole
from cosyvoice_ft.models import flow, llm
from cosyvoice_ft.schedules import schedule
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.synthesis import load_model
from cosyvoice_ft.text import Tokenizer


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
        rank, world = engine.world()
        options = {"max_batch": self.options["max_batch"], "seed": self.seed, "world_size": world}
        return dataset.plan(self.costs, self.groups, epoch=epoch, shuffle=shuffle, **options)[rank::world]

    def batches(self, numbers: list[np.ndarray], epoch: int, streaming: bool | None = None) -> dataset.Batches:
        """Return planned batches; `streaming` fixes the mode of all rows."""
        collate = self.collate if streaming is None else partial(self.collate, **{self.mode: streaming})
        draws = {"with_mel": self.part == "flow", "seed": self.seed, "epoch": epoch}
        return dataset.Batches(self.shards, numbers, collate, self.costs, **draws)

    def train(self, epoch: int, skip: int) -> torch.utils.data.DataLoader:
        return self.load(self.batches(self.plan(epoch, shuffle=True)[skip:], epoch))

    def cv(self, streaming: bool) -> torch.utils.data.DataLoader:
        epoch = dataset.CV_EPOCH
        return self.load(self.batches(self.plan(epoch, shuffle=False), epoch, streaming))

    def load(self, batches: dataset.Batches) -> torch.utils.data.DataLoader:
        return dataset.load(batches, self.options["num_workers"], torch.cuda.is_available())


def identity(part: str, settings: Mapping, data: Data, base: Path) -> dict:
    """Return, flat, what makes this training this one; see training.resume."""
    own = {key: value for key, value in conf.training_settings(settings, part).items() if key not in training.FREE}
    return {
        **{f"train.{key}": value for key, value in own.items()},
        **{f"{part}.{key}": value for key, value in settings[part].items()},
        "model": settings["model"],
        "seed": settings["seed"],
        "data": data.shards.fingerprint(),
        "base": fingerprint(base),
        "processes": engine.world()[1],
    }


def start_processes(name: str) -> torch.device:
    """Return this rank's device, joined with the others when torchrun started several."""
    where = device.torch_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "RANK" in os.environ:
        if where.type == "cuda":
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return where


def logger(path: Path, rank: int) -> Callable[[str], None]:
    """Return log(line): to the screen and, with the time, to a file; rank 0 only."""

    def log(line: str) -> None:
        if rank == 0:
            print(line, flush=True)
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
    """Return a TensorBoard writer, mirrored to SwanLab when `project` names one."""
    from torch.utils.tensorboard import SummaryWriter

    if project:
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
    batches = data.batches(data.plan(1, shuffle=True)[:1], epoch=1)
    batch = batches[0]
    shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    log(f"dry run: {len(batch['utts'])} utterances, {shapes}")
    machine.module.train()
    out = machine.forward(batch)
    loss = out["loss"] / batch["count"]
    machine.backward(loss)
    without = [name for name, p in machine.module.named_parameters() if p.requires_grad and p.grad is None]
    log(f"dry run: loss {float(loss):.4f}, parameters without gradient: {' '.join(without) or 'none'}")
    if not torch.isfinite(loss):
        raise BadInput(f"dry run: the loss of {' '.join(batch['utts'])} is not finite")


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
    options |= {"part": args.part, "unit": {"llm": "tokens", "flow": "frames"}[args.part]}
    where = start_processes(settings["device"])
    rank, world = engine.world()
    if args.fresh and rank == 0 and not args.dry_run:
        step_aside(args.out)
    if world > 1:
        dist.barrier()
    args.out.mkdir(parents=True, exist_ok=True)
    log = logger(Path(os.devnull) if args.dry_run else args.out / "train.log", rank)
    log(device.describe(where) + f", {world} processes" * (world > 1))
    log(f"{' '.join(sys.argv)}   commit {commit()}   seed {settings['seed']}   {options}")

    base = Path(settings["pretrained_dir"])
    conf.check_model_yaml(settings, base)
    model = load_model(args.part, base, settings)
    frozen = engine.freeze(model, options["freeze"] or [])
    if options["checkpointing"]:
        memory.recompute(model.layers())
    train_data, dev_data = (Data(args.data / name, args.part, model, settings) for name in ("train", "dev"))
    machine = engine.make_engine(model, options, where)
    plan = train_data.plan(1, shuffle=True)
    count = sum(p.numel() for p in model.parameters())
    log(
        f"{args.part}: {count / 1e6:.1f} M parameters, {frozen / 1e6:.1f} M frozen; {len(train_data.shards)} + "
        f"{len(dev_data.shards)} utterances, {len(plan)} batches an epoch, "
        f"padding {dataset.padding_share(plan, train_data.costs):.1%}"
    )
    log(memory.report(machine, train_data.batches(plan[:1], epoch=1)[0], options["max_batch"]))
    if args.dry_run:
        dry_run(machine, train_data, log)
        return
    writer = summary_writer(args.out, options["swanlab"]) if rank == 0 else None
    if rank == 0:
        with whole(args.out / "conf.yaml") as part:
            part.write_text(conf.to_yaml(settings), encoding="utf-8")
    task = training.Task(
        settings=options,
        identity=identity(args.part, settings, train_data, base / f"{args.part}.pt"),
        batches=train_data.train,
        cv={"full": partial(dev_data.cv, False), "streaming": partial(dev_data.cv, True)},
        learning_rate=schedule(options),
        folder=args.out,
        seed=settings["seed"],
        log=log,
        writer=writer,
        split=train_data.batches([], epoch=0).split,
        listen=listening.Listener(args.part, machine, settings, args.data, args.out, writer, log).speak,
    )
    training.train(machine, task)
    if writer:
        writer.close()


def commit() -> str:
    """Return the commit of the recipe, "unknown" outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, capture_output=True)
    return done.stdout.strip() or "unknown"


def finish() -> None:
    """Leave the process group; a rank that failed is seen by the others when its process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
    finish()
