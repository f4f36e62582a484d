#!/usr/bin/env python3
"""What one training step costs at the released sizes (random weights), and against the naive way of computing it.

    python tests/bench/train_step.py                     # llm and flow, fp32 and bf16: ten minutes on two cores
    python tests/bench/train_step.py --parts feed --data data/ljspeech/train

naive   llm: padded rows, softmax attention written out, logits of text and of all positions; flow: batches in random
        order, attention written out. Same weights, same rows, and the same loss, which is checked
ours    attention as in models/attention.py; llm: rows packed into one sequence, cross entropy at target positions
        only; flow: sorted batches
feed    (of a packed data directory, or the demo's when it is there) all batches of an epoch without a model: tokens for
        the llm, tokens and stored mel for the flow, against decoding the audio and computing the mel on the way

Utterances of 3 to 10 s, drawn with --seed: how much of the naive way's batches is padding, and so the ratio, is a
matter of that draw. Every case runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import contextlib
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from cosyvoice_ft import audio, cli, conf, dataset, device, engine
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models import conformer, flow, llm, unet
from cosyvoice_ft.models.cfm import CausalConditionalCFM
from cosyvoice_ft.models.qwen2 import Qwen2ForCausalLM
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.table import read_table

VOCAB, TEXT_RATE = 151_000, 6.0  # text ids; text tokens a second
UNITS = {"llm": "tokens", "flow": "frames"}
PHASES = ("data", "forward", "backward", "optimizer")


class Padded:
    """Context of Qwen2 for padded rows, with attention written out; see models/qwen2.py."""

    def __init__(self, length: int) -> None:
        self.position = torch.arange(length)
        self.hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        scores = scores.masked_fill(self.hidden.to(q.device), -math.inf).float().softmax(-1)
        return (scores.to(v.dtype) @ v).transpose(1, 2)


def naive_llm(model: llm.Qwen2LM, kind, index, pack, target, target_position) -> dict[str, torch.Tensor]:
    """The llm's loss with everything computed everywhere."""
    context = Padded(kind.shape[1])
    context.position = context.position.to(kind.device)
    states = model.llm.model.model(model.embed(kind, index), context)
    model.llm.model.lm_head(states)  # logits of text, which nobody needs
    targets = torch.full((kind.numel(),), llm.NO_TARGET, device=kind.device)
    targets[target_position] = target
    logits = model.llm_decoder(states).flatten(0, 1).float()
    return {"loss": F.cross_entropy(logits, targets, ignore_index=llm.NO_TARGET, reduction="sum")}


def naive_attention(q, k, v, mask, dropout=0.0):
    """Softmax attention, written out as one does."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v


def utterances(number: int, seed: int) -> list[dict]:
    """Random rows of 3 to 10 s, as the shards hold them."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, seconds in enumerate(rng.uniform(3, 10, number)):
        tokens = int(25 * seconds)
        rows.append(
            {
                "utt": f"u{i}",
                "text_token": rng.integers(0, VOCAB, int(TEXT_RATE * seconds)),
                "speech_token": rng.integers(0, 6561, tokens).astype(np.int16),
                "embedding": rng.standard_normal(192).astype(np.float32),
                "speech_feat": rng.standard_normal((2 * tokens, 80)).astype(np.float16),
            }
        )
    return rows


def build(part: str, layers: int) -> torch.nn.Module:
    """The network at the released sizes; fewer layers of the llm are for small machines."""
    torch.manual_seed(0)
    if part == "llm":
        model = llm.Qwen2LM(qwen=Qwen2ForCausalLM(num_hidden_layers=layers))
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)
        return model
    decoder = CausalConditionalCFM(estimator=unet.CausalConditionalDecoder())
    encoder = conformer.UpsampleConformerEncoder(dropout=0.0, positional_dropout=0.0, attention_dropout=0.0)
    return flow.CausalMaskedDiffWithXvec(encoder=encoder, decoder=decoder)


def batches(part: str, way: str, size: int, seed: int) -> list[list[dict]]:
    """Two batches of `size` rows for the flow, sorted by length our way; one of the llm, whose padding is free."""
    rows = utterances(size if part == "llm" else 2 * size, seed)
    if part == "llm":
        return [rows]
    if way == "ours":
        rows = sorted(rows, key=lambda row: len(row["speech_token"]))
    return [rows[:size], rows[size:]]


def case(
    part: str, way: str, dtype: str, layers: int, size: int, seed: int, updates: int, where: str
) -> dict[str, float]:
    """Time `updates` updates after one to warm up.

    Returns seconds of each phase and of a step, loss, positions a second, share of padding in the grid, memory.
    """
    place, model = device.torch_device(where), build(part, layers)
    settings = conf.training_settings(conf.read_base(conf.CONF_DIR / "cosyvoice2.yaml"), part) | {"dtype": dtype}
    machine = engine.make_engine(model, settings, place)
    if part == "llm":
        collate, positions = partial(llm.collate, layout=model.layout), lambda batch: float(len(batch["pack"]))
        if way == "naive":
            model.forward = partial(naive_llm, model)
    else:
        collate, positions = flow.collate, lambda batch: float(batch["speech_feat_len"].sum())
    patches = contextlib.ExitStack()
    if part == "flow" and way == "naive":
        for module in (conformer, unet):
            patches.enter_context(mock.patch.object(module, "attend", naive_attention))
    seconds, done, grid, first_loss = dict.fromkeys(PHASES, 0.0), 0.0, 0, None
    groups = batches(part, way, size, seed)
    key = {"llm": "kind", "flow": "speech_feat"}[part]  # (rows, longest row, ...)
    with patches:
        for update in range(updates + 1):
            clock, spent, loss_sum, terms = Clock(place), dict.fromkeys(PHASES, 0.0), 0.0, 0.0
            for rows in groups:
                rngs = [np.random.default_rng([1, int(row["utt"][1:])]) for row in rows]
                batch = collate(rows, rngs)
                spent["data"] += clock()
                grid += math.prod(batch[key].shape[:2]) if update else 0
                out = machine.forward(batch)
                spent["forward"] += clock()
                machine.backward(out["loss"] / batch["count"] / len(groups))
                spent["backward"] += clock()
                loss_sum, terms = loss_sum + float(out["loss"].detach()), terms + batch["count"]
                done += positions(batch) if update else 0
            machine.update(settings["lr"])
            spent["optimizer"] += clock()
            first_loss = loss_sum / terms if first_loss is None else first_loss
            if update:
                seconds = {phase: seconds[phase] + spent[phase] for phase in PHASES}
    return seconds | {
        "loss": first_loss,
        "step": sum(seconds.values()) / updates,
        "rate": done / sum(seconds.values()),
        "padding": 1 - done / grid,
        "memory": device.peak_memory(place) / 1e9,
    }


class Clock:
    """clock(): seconds since it was asked last, when the device has done all of it."""

    def __init__(self, where: torch.device) -> None:
        self.where, self.last = where, 0.0
        self()

    def __call__(self) -> float:
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)
        before, self.last = self.last, time.monotonic()
        return self.last - before


def apart(function, *args):
    """Run a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def compare(part: str, dtype: str, args: argparse.Namespace) -> None:
    """Print both ways of one part side by side."""
    options = (dtype, args.layers, args.rows, args.seed, args.updates, args.device)
    found = {way: apart(case, part, way, *options) for way in ("naive", "ours")}
    for way, facts in found.items():
        total = sum(facts[phase] for phase in PHASES)
        shares = "  ".join(f"{phase} {facts[phase] / total:4.0%}" for phase in PHASES)
        say = f"{part:4} {dtype} {way:5}  {facts['step']:6.2f} s a step  {facts['rate']:7.0f} {UNITS[part]}/s"
        print(f"{say}  {shares}  peak {facts['memory']:.1f} GB  loss {facts['loss']:.4f}", flush=True)
    close = 1e-4 if dtype == "fp32" else 1e-2
    if abs(found["ours"]["loss"] / found["naive"]["loss"] - 1) > close:
        raise BadInput(f"{part} {dtype}: the two ways do not give the same loss")
    ratio, padding = found["ours"]["rate"] / found["naive"]["rate"], found["naive"]["padding"]
    print(f"{part:4} {dtype} ours is {ratio:.2f} times as fast; {padding:.0%} of the naive grid is padding", flush=True)


def feed(folder: Path) -> None:
    """Print how long an epoch's batches take without a model, the median of five times."""
    shards = Shards(folder / "parquet" / "data.list")
    groups = [(first, rows) for _, _, first, rows in shards.groups]

    def from_shards(part: str) -> None:
        costs = flow.FRAMES_PER_TOKEN * shards.speech_token.lengths
        if part == "llm":
            costs = shards.text_token.lengths + shards.speech_token.lengths + 2
        collate = partial(llm.collate, layout=llm.Layout()) if part == "llm" else flow.collate
        plan = dataset.plan(costs, groups, epoch=1, shuffle=True, max_batch=4000, seed=0, world_size=1)
        for _ in dataset.Batches(shards, plan, collate, costs, with_mel=part == "flow", seed=0, epoch=1):
            pass
        shards.cache.clear()

    def from_audio() -> None:
        for path in read_table(folder / "wav.scp").values():
            audio.log_mel(audio.load_wav(path, audio.SAMPLE_RATE))

    ways = {"llm from the shards": partial(from_shards, "llm"), "flow from the shards": partial(from_shards, "flow")}
    ways["decoding and computing the mel"] = from_audio
    said = []
    for way, read in ways.items():
        clock = Clock(torch.device("cpu"))
        times = [(read(), clock())[1] for _ in range(5)]
        said.append(f"{way} {1000 * statistics.median(times):.0f} ms")
    print(f"feed: {len(shards)} utterances; {', '.join(said)}")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["llm", "flow", "feed"], default=["llm", "flow", "feed"])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=24, help="of the llm")
    parser.add_argument("--rows", type=int, default=8, help="utterances a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the utterances' lengths")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=Path("data/demo/train"), help="packed data directory, for feed")
    args = parser.parse_args()
    print(device.describe(device.torch_device(args.device)))
    for part in args.parts:
        if part != "feed":
            for dtype in args.dtypes:
                compare(part, dtype, args)
        elif (args.data / "parquet" / "data.list").is_file():
            feed(args.data)
        else:
            print(f"feed: left out, {args.data} holds no parquet; --data DIR")


if __name__ == "__main__":
    cli.run(main)
