#!/usr/bin/env python3
"""Stages 4 and 5: fine-tune the language model (llm) or the flow-matching model (flow).

    python tools/train.py llm data/demo exp/demo/llm --conf conf/demo.yaml

reads   DATA/train/parquet, DATA/dev/parquet; the weights of pretrained_dir
writes  OUT/epoch_N.pt (weights only), OUT/epoch_N.yaml (losses), OUT/last.pt, OUT/conf.yaml, OUT/train.log,
        OUT/tensorboard

Goes on from OUT/last.pt when there is one. Several cards: torchrun --nproc_per_node 2 tools/train.py ...
"""

import os
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from cosyvoice_ft import checkpoint, cli, conf, dataset, device, engine
from cosyvoice_ft.files import BadInput, whole
from cosyvoice_ft.models import flow, llm
from cosyvoice_ft.schedules import schedule
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.synthesis import load_model
from cosyvoice_ft.text import Tokenizer


def collate_and_costs(part: str, model: torch.nn.Module, settings: dict, shards: Shards):
    """Return collate(rows, rngs, mode=None) and the positions of each utterance, for llm or flow."""
    if part == "llm":
        lengths = shards.text_token.lengths + shards.speech_token.lengths + 2  # sos and task
        return partial(llm.collate, layout=model.layout), "bistream", lengths
    rate = settings["flow"]["training_cfg_rate"]
    return partial(flow.collate, training_cfg_rate=rate), "streaming", 2 * shards.speech_token.lengths


def batches(part: str, shards: Shards, collate, costs, options: dict, seed: int, epoch: int, shuffle: bool, pin: bool):
    """Plan an epoch and return this rank's batches."""
    rank, world = engine.world()
    groups = [(first, rows) for _, _, first, rows in shards.groups]
    plan = dataset.plan(
        costs, groups, max_batch=options["max_batch"], seed=seed, epoch=epoch, shuffle=shuffle, world_size=world
    )
    own = dataset.Batches(shards, plan[rank::world], collate, with_mel=part == "flow", seed=seed, epoch=epoch)
    return dataset.load(own, options["num_workers"], pin)


def open_shards(folder: Path, settings: dict) -> Shards:
    """Open a parquet folder. Raises BadInput when its text ids were made with another tokenizer or model."""
    shards = Shards(folder / "parquet" / "data.list")
    ours = Tokenizer(settings["pretrained_dir"]).fingerprint
    if shards.metadata.get("tokenizer") != ours:
        raise BadInput(
            f"{folder}/parquet: made with another tokenizer than {settings['pretrained_dir']}; run stage 3 again"
        )
    return shards


def logger(path: Path, rank: int):
    """Return log(line): to the screen and, with the time, to a file; rank 0 only."""

    def log(line: str) -> None:
        if rank == 0:
            print(line, flush=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%F %T} {line}\n")

    return log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("part", choices=["llm", "flow"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    options = conf.training_settings(settings, args.part)
    where = device.torch_device(settings["device"])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun
        if where.type == "cuda":
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    rank, world = engine.world()
    args.out.mkdir(parents=True, exist_ok=True)
    log = logger(args.out / "train.log", rank)
    log(device.describe(where) + (f", {world} processes" if world > 1 else ""))

    conf.check_model_yaml(settings, settings["pretrained_dir"])
    model = load_model(args.part, settings["pretrained_dir"], settings)
    train_shards, dev_shards = (open_shards(args.data / name, settings) for name in ("train", "dev"))
    make = {"pin": where.type == "cuda", "options": options, "seed": settings["seed"], "part": args.part}

    def train_batches(epoch: int):
        collate, _, costs = collate_and_costs(args.part, model, settings, train_shards)
        return batches(shards=train_shards, collate=collate, costs=costs, epoch=epoch, shuffle=True, **make)

    def cv_batches(streaming: bool):
        collate, mode, costs = collate_and_costs(args.part, model, settings, dev_shards)
        collate = partial(collate, **{mode: streaming})
        return batches(shards=dev_shards, collate=collate, costs=costs, epoch=dataset.CV_EPOCH, shuffle=False, **make)

    count = sum(p.numel() for p in model.parameters()) / 1e6
    log(f"{args.part}: {count:.1f} M parameters, {len(train_shards)} + {len(dev_shards)} utterances, {options}")
    writer = None
    if rank == 0:
        with whole(args.out / "conf.yaml") as part:
            part.write_text(conf.to_yaml(settings), encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.out / "tensorboard"))
    state = engine.train(
        engine.TorchEngine(model, options, where),
        settings=options,
        train_batches=train_batches,
        cv_batches={"full": partial(cv_batches, False), "streaming": partial(cv_batches, True)},
        learning_rate=schedule(options),
        folder=args.out,
        seed=settings["seed"],
        log=log,
        writer=writer,
    )
    if rank == 0:
        writer.close()
        best = checkpoint.best_epochs(args.out, 1)[0]
        log(f"wrote {args.out}: {state.epoch} epochs, {state.step} updates; lowest CV loss after epoch {best}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
