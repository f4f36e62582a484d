"""The training loop, one for llm and flow.

A batch is a dict of tensors plus "utts" (ids) and "count" (valid positions, known before the forward pass). The model's
forward(**batch) returns "loss", the sum over valid positions, and may return further sums ("hits"). An update minimises

    sum of losses over all batches of the update and all ranks / number of valid positions of the same

so it is the same update however it is split over ranks and micro-batches, and this mean is what is logged.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosyvoice_ft import checkpoint
from cosyvoice_ft.files import BadInput


@dataclass
class State:
    """Where a training stands. `step` counts updates, `epoch` finished epochs."""

    epoch: int = 0
    step: int = 0
    bad_steps: int = 0  # non-finite updates in a row


def world() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class TorchEngine:
    """One process, or one rank of DistributedDataParallel under torchrun."""

    def __init__(self, model: nn.Module, settings: Mapping, device: torch.device) -> None:
        self.rank, self.world_size = world()
        self.device, self.module = device, model.to(device)
        self.clip, self.dtype = settings["grad_clip"], autocast_dtype(settings["dtype"], device)
        self.model = model
        if self.world_size > 1:
            self.model = nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings["lr"], weight_decay=settings["weight_decay"], fused=device.type == "cuda"
        )

    def forward(self, batch: Mapping[str, Tensor], *, last: bool = True) -> dict[str, Tensor]:
        """Run the model under autocast; the ranks exchange gradients in the `last` batch of an update."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        waiting = contextlib.nullcontext() if last or self.world_size == 1 else self.model.no_sync()
        with waiting, torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.model(**batch)

    def update(self, lr: float) -> Tensor:
        """Clip, step, clear; return the gradient's norm. A gradient that is not finite is dropped."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def state(self) -> dict:
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of `train.dtype`; None is float32 throughout. Masters and losses are float32 always."""
    if name not in ("auto", "bf16", "fp32"):
        raise BadInput(f"train.dtype: '{name}' is unknown; one of: auto, bf16, fp32")
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def updates(batches: Iterable[dict], accum_grad: int) -> Iterator[list[dict]]:
    """Group batches into updates; what is left at the end of an epoch is a smaller update of its own."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == accum_grad:
            yield group
            group = []
    if group:
        yield group


def train(
    engine: TorchEngine,
    *,
    settings: Mapping,
    train_batches: Callable[[int], Iterable[dict]],
    cv_batches: Mapping[str, Callable[[], Iterable[dict]]],
    learning_rate: Callable[[int], float],
    folder: Path,
    seed: int,
    log: Callable[[str], None],
    writer,
) -> State:
    """Train until `max_epoch`, going on from last.pt when there is one; write epoch_N.pt, epoch_N.yaml, last.pt.

    train_batches(epoch) and each cv_batches[name]() give this rank's batches. `writer` is a SummaryWriter or None.
    """
    state, last = State(), folder / "last.pt"
    if last.is_file():
        saved = checkpoint.load(last)
        engine.load_state(saved)
        state = State(**saved["state"])
        log(f"goes on from {last}: epoch {state.epoch} of {settings['max_epoch']} done, {state.step} updates")
    else:
        say_cv(validate(engine, cv_batches), state, log, writer)
    while state.epoch < settings["max_epoch"]:
        meter = Meter(engine, settings["log_every"], learning_rate, log, writer)
        for group in updates(train_batches(state.epoch + 1), settings["accum_grad"]):
            torch.manual_seed(seed + state.step)  # dropout repeats from here on, wherever the run was resumed
            sums = one_update(engine, group, learning_rate(state.step))
            state.step += 1
            check_finite(state, sums, group, settings["max_bad_steps"])
            meter.add(state, sums)
        state.epoch += 1
        train_facts = meter.close(state)
        cv = validate(engine, cv_batches)
        say_cv(cv, state, log, writer)
        if engine.rank == 0:
            facts = {"step": state.step, "cv": cv, "train": train_facts}
            checkpoint.save_epoch(folder, state.epoch, engine.module.state_dict(), facts)
            checkpoint.save(last, engine.state() | {"state": asdict(state)})
    return state


def one_update(engine: TorchEngine, group: list[dict], lr: float) -> dict[str, float]:
    """Forward and backward over the batches of one update, then the optimizer; return sums, gradient norm, count."""
    engine.module.train()
    group = [{key: value for key, value in batch.items() if key != "utts"} for batch in group]
    counts = [batch.pop("count") for batch in group]
    total = float(engine.total(torch.tensor(sum(counts), dtype=torch.float64)))
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(group):
        last = i == len(group) - 1
        out = engine.forward(batch, last=last)
        (out["loss"] * (engine.world_size / total)).backward()  # DDP averages over ranks
        for key, value in out.items():
            sums[key] = sums.get(key, 0) + value.detach().double()
    values = engine.total(torch.stack([value.double() for value in sums.values()]))
    norm = engine.update(lr)
    return dict(zip(sums, values.tolist(), strict=True)) | {"count": total, "grad_norm": float(norm)}


def check_finite(state: State, sums: Mapping, group: list[dict], max_bad_steps: int) -> None:
    """Count updates whose gradient is not finite (they changed nothing). Raises BadInput after too many in a row."""
    if math.isfinite(sums["grad_norm"]):
        state.bad_steps = 0
        return
    state.bad_steps += 1
    if state.bad_steps >= max_bad_steps:
        utts = " ".join(utt for batch in group for utt in batch["utts"])
        raise BadInput(
            f"step {state.step}: gradient is not finite {state.bad_steps} times in a row, last with {utts}; lower "
            "train.lr, or listen to these recordings"
        )


@torch.no_grad()
def validate(engine: TorchEngine, cv_batches: Mapping[str, Callable[[], Iterable[dict]]]) -> dict[str, float]:
    """Return the mean loss ("loss") over all CV sets, and of each by its name ("loss_streaming", "acc_streaming")."""
    engine.module.eval()
    facts: dict[str, float] = {}
    for name, batches in cv_batches.items():
        sums: dict[str, float] = {"count": 0.0}
        for batch in batches():
            sums["count"] += batch["count"]
            out = engine.forward({key: value for key, value in batch.items() if key not in ("utts", "count")})
            for key, value in out.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        values = engine.total(torch.tensor(list(sums.values()), dtype=torch.float64))
        sums = dict(zip(sums, values.tolist(), strict=True))
        facts |= {f"{key}_{name}": value for key, value in means(sums).items()}
    losses = [facts[f"loss_{name}"] for name in cv_batches]
    return {"loss": sum(losses) / len(losses)} | facts


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn sums over positions into means: loss, and acc when hits were counted."""
    facts = {"loss": sums["loss"] / sums["count"]}
    return facts | {"acc": sums["hits"] / sums["count"]} if "hits" in sums else facts


def say_cv(cv: Mapping[str, float], state: State, log: Callable[[str], None], writer) -> None:
    log(f"epoch {state.epoch} CV " + " ".join(f"{key} {value:.4f}" for key, value in cv.items()))
    if writer:
        for key, value in cv.items():
            writer.add_scalar(f"cv/{key}", value, state.step)


class Meter:
    """Gathers the sums of updates and says their means every `log_every` updates and at the end of the epoch."""

    def __init__(self, engine: TorchEngine, log_every: int, learning_rate: Callable, log: Callable, writer) -> None:
        self.log_every, self.learning_rate, self.log, self.writer = log_every, learning_rate, log, writer
        self.window: dict[str, float] = {}
        self.epoch: dict[str, float] = {}
        self.updates = self.norm = 0
        self.start = time.monotonic()

    def add(self, state: State, sums: Mapping[str, float]) -> None:
        for store in (self.window, self.epoch):
            for key, value in sums.items():
                store[key] = store.get(key, 0.0) + value
        self.updates += 1
        if self.updates == self.log_every:
            self.say(state)

    def say(self, state: State) -> None:
        """Log and clear the window."""
        seconds, facts = time.monotonic() - self.start, means(self.window)
        facts |= {
            "grad_norm": self.window["grad_norm"] / self.updates,
            "lr": self.learning_rate(state.step - 1),
            "positions_per_second": self.window["count"] / seconds,
        }
        self.log(f"epoch {state.epoch + 1} step {state.step} " + " ".join(f"{k} {v:.4g}" for k, v in facts.items()))
        if self.writer:
            for key, value in facts.items():
                self.writer.add_scalar(f"train/{key}", value, state.step)
        self.window, self.updates, self.start = {}, 0, time.monotonic()

    def close(self, state: State) -> dict[str, float]:
        """Return the means of the whole epoch."""
        if self.updates:
            state_of_epoch = State(state.epoch - 1, state.step)
            self.say(state_of_epoch)
        return means(self.epoch)
