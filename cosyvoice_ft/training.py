"""The training loop, one for llm and flow.

A batch holds the model's tensors and, beside them, `utts` (ids), `count` (valid positions, known before the forward
pass) and `positions` (what a reader counts: tokens or frames). The model returns `loss`, the sum over the valid
positions, and may return further sums (`hits`). An update minimises

    sum of the losses of all batches of the update and of all ranks / number of their valid positions

so it is the same update however it is split over ranks and batches; this mean is also what is logged. Dropout is seeded
by (seed, update, rank) and all other draws come in the batch, so a run that was killed and goes on from last.pt ends
with the weights of one that never stopped.
"""

import dataclasses
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import checkpoint
from cosyvoice_ft.engine import Engine
from cosyvoice_ft.files import BadInput

# Settings of a training that may differ when it goes on: they do not change what an update is.
FREE = ("max_epoch", "patience", "log_every", "save_minutes", "num_workers", "keep_best", "keep_last", "listen_seconds")
FREE += ("auto_batch", "max_bad_steps", "deepspeed")


@dataclass
class Progress:
    """Where a training stands; `step` counts updates."""

    epoch: int = 0  # finished
    done: int = 0  # updates of the epoch under way
    step: int = 0  # updates in all
    bad: int = 0  # updates in a row whose gradient was not finite
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way


@dataclass
class Task:
    """What is trained, on what, and where it is told."""

    settings: Mapping
    identity: Mapping  # flat; when it differs, the training on disk is another one
    batches: Callable[[int, int], Iterable[dict]]  # (epoch, batches to skip) -> this rank's batches
    cv: Mapping[str, Callable[[], Iterable[dict]]]
    learning_rate: Callable[[int], float]
    folder: Path
    seed: int
    log: Callable[[str], None]
    writer: object | None = None  # a SummaryWriter
    split: Callable[[dict], list[dict]] | None = None  # a batch -> two halves, for auto_batch
    listen: Callable[[int], None] | None = None  # (epoch): speak the conf's sentences


def train(engine: Engine, task: Task) -> Progress:
    """Train to the end, from last.pt when there is one; write epoch_N.pt, epoch_N.yaml and last.pt.

    Raises BadInput when last.pt belongs to a training with other settings or data, when too many gradients in a row
    are not finite, when memory or disk is too small.
    """
    last, progress = task.folder / "last.pt", Progress()
    check_disk(engine, task.folder)
    if last.is_file():
        progress = resume(engine, task, last)
    if reason := finished(progress, task):
        task.log(f"finished already: {reason}")
        return progress
    if progress.step == 0:
        end_of_epoch(engine, task, progress, last)  # epoch 0: the base model
    while not finished(progress, task):
        train_epoch(engine, task, progress, last)
        end_of_epoch(engine, task, progress, last)
    task.log(f"finished: {finished(progress, task)}")
    return progress


def train_epoch(engine: Engine, task: Task, progress: Progress, last: Path) -> None:
    """Do the updates of an epoch that are not done yet."""
    accum, epoch = task.settings["accum_grad"], progress.epoch + 1
    meter, saved = Meter(engine, task, progress), time.monotonic()
    for group in updates(task.batches(epoch, progress.done * accum), accum):
        torch.manual_seed(int(np.random.SeedSequence([task.seed, progress.step, engine.rank]).generate_state(1)[0]))
        sums = one_update(engine, group, task.learning_rate(progress.step), task)
        progress.step += 1
        progress.done += 1
        if meter.add(sums, group) and task.settings["save_minutes"]:
            due = float(engine.rank == 0 and time.monotonic() - saved > 60 * task.settings["save_minutes"])
            if engine.total(torch.tensor(due)) > 0:
                engine.save(last, facts_of(progress, task))
                saved = time.monotonic()
    meter.settle()


def end_of_epoch(engine: Engine, task: Task, progress: Progress, last: Path) -> None:
    """Validate, save the epoch and where the run stands, then speak. Epoch 0, the base model, is not saved."""
    trained, progress.sums, progress.done = progress.sums, {}, 0
    if progress.step:
        progress.epoch += 1
    cv = validate(engine, task.cv)
    task.log(f"epoch {progress.epoch} CV " + " ".join(f"{key} {value:.4f}" for key, value in cv.items()))
    if task.writer:
        for key, value in cv.items():
            task.writer.add_scalar(f"cv/{key}", value, progress.step)
    if progress.step:
        weights = engine.weights()
        if engine.rank == 0:
            facts = {"step": progress.step, "cv": cv, "train": means(trained)}
            checkpoint.save_epoch(task.folder, progress.epoch, weights, facts)
        engine.save(last, facts_of(progress, task))
        prune(engine, task)
    if task.listen:
        try:
            task.listen(progress.epoch)
        except Exception:  # what is only heard must not end what is learnt; the log holds all of it
            task.log(f"speaking after epoch {progress.epoch} failed, training goes on:\n{traceback.format_exc()}")


def finished(progress: Progress, task: Task) -> str | None:
    """Return why a training ends here, or None."""
    losses = {epoch: facts["cv"]["loss"] for epoch, facts in checkpoint.facts(task.folder).items()}
    losses = {epoch: loss for epoch, loss in losses.items() if epoch <= progress.epoch}
    best = min(losses, key=losses.get, default=0)
    if progress.epoch >= task.settings["max_epoch"]:
        return f"{progress.epoch} epochs, {progress.step} updates; lowest CV loss after epoch {best}"
    patience = task.settings["patience"]
    if patience and progress.done == 0 and progress.epoch - best >= patience and best:
        return f"CV loss has not fallen for {patience} epochs (train.patience); it was lowest after epoch {best}"
    return None


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


def one_update(engine: Engine, group: list[dict], lr: float, task: Task) -> dict[str, Tensor]:
    """Forward and backward over the batches of one update, then the optimizer.

    Returns this rank's sums and the gradient's norm, still on the device. Out of memory with auto_batch: the batches
    are halved and the same update is computed again.
    """
    engine.module.train()
    total = engine.total(torch.tensor(sum(batch["count"] for batch in group), device=engine.device))
    try:
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            out = engine.forward(batch, last=last)
            engine.backward(out["loss"] * (engine.world_size / total), last=last)  # ranks are averaged
            for key, value in out.items():
                sums[key] = sums.get(key, 0) + value.detach()
        return sums | {"grad_norm": engine.update(lr)}
    except torch.OutOfMemoryError as error:
        engine.clear()
        return one_update(engine, smaller(group, task, error), lr, task)


def smaller(group: list[dict], task: Task, error: torch.OutOfMemoryError) -> list[dict]:
    """Return the batches of an update halved. Raises BadInput with the key to lower where that is not to be done."""
    limit = task.settings["max_batch"]
    if not (task.settings["auto_batch"] and task.split) or max(len(batch["utts"]) for batch in group) < 2:
        part = task.settings["part"]
        raise BadInput(f"out of memory; lower train.{part}.max_batch from {limit} to {limit * 2 // 3}") from error
    torch.cuda.empty_cache()
    task.log(f"out of memory: this update again with batches of half the size; max_batch {limit} is too large")
    return [half for batch in group for half in (task.split(batch) if len(batch["utts"]) > 1 else [batch])]


def validate(engine: Engine, cv: Mapping[str, Callable[[], Iterable[dict]]]) -> dict[str, float]:
    """Return the mean loss over all CV sets ("loss"), and those of each by its name ("loss_streaming", ...)."""
    engine.module.eval()
    facts: dict[str, float] = {}
    for name, batches in cv.items():
        sums: dict[str, Tensor] = {}
        for batch in batches():
            out = engine.evaluate(batch)
            out["count"] = torch.tensor(batch["count"])
            for key, value in out.items():
                sums[key] = sums.get(key, 0) + value.double().to(engine.device)
        values = engine.total(torch.stack(list(sums.values()))).tolist()
        facts |= {f"{key}_{name}": value for key, value in means(dict(zip(sums, values, strict=True))).items()}
    losses = [facts[f"loss_{name}"] for name in cv]
    return {"loss": sum(losses) / len(losses)} | facts


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn sums over positions into means: loss, and acc where hits were counted."""
    if not sums:
        return {}
    facts = {"loss": sums["loss"] / sums["count"]}
    return facts | {"acc": sums["hits"] / sums["count"]} if "hits" in sums else facts


class Meter:
    """Gathers updates on the device; every `log_every` of them it reads, checks and tells them."""

    def __init__(self, engine: Engine, task: Task, progress: Progress) -> None:
        self.engine, self.task, self.progress = engine, task, progress
        self.window: list[tuple[dict, list[dict]]] = []
        self.start = time.monotonic()

    def add(self, sums: dict[str, Tensor], group: list[dict]) -> bool:
        """Take an update; return whether the window was full and has been told."""
        light = [{key: batch[key] for key in ("utts", "count", "positions", "padded")} for batch in group]
        self.window.append((sums, light))
        if len(self.window) < self.task.settings["log_every"]:
            return False
        self.settle()
        return True

    def settle(self) -> None:
        """Read, check and tell what has been gathered. Raises BadInput after too many bad gradients in a row."""
        if not self.window:
            return
        norms = torch.stack([sums.pop("grad_norm").float() for sums, _ in self.window]).tolist()
        good = [(sums, group) for (sums, group), norm in zip(self.window, norms, strict=True) if math.isfinite(norm)]
        keys = list(self.window[0][0])
        batches = [batch for _, group in good for batch in group]
        local = [sum(float(batch[key]) for batch in batches) for key in ("count", "positions", "padded")]
        sums = [sum((sums[key].double() for sums, _ in good), torch.zeros((), dtype=torch.double)) for key in keys]
        values = torch.cat([torch.stack([value.cpu() for value in sums]), torch.tensor(local, dtype=torch.double)])
        totals = dict(zip([*keys, "count", "positions", "padded"], self.engine.total(values).tolist(), strict=True))
        if good:
            self.tell(totals, norms)
        self.check(norms)
        self.window, self.start = [], time.monotonic()

    def tell(self, totals: Mapping[str, float], norms: list[float]) -> None:
        progress, store = self.progress, self.progress.sums
        for key, value in totals.items():
            store[key] = store.get(key, 0.0) + value
        finite = [norm for norm in norms if math.isfinite(norm)]
        facts = means(totals) | {
            "grad_norm": sum(finite) / len(finite),
            "lr": self.task.learning_rate(progress.step - 1),
            f"{self.task.settings['unit']}_per_s": totals["positions"] / (time.monotonic() - self.start),
            "padding": 1 - totals["positions"] / totals["padded"],
        }
        if self.engine.device.type == "cuda":
            facts["memory_gb"] = torch.cuda.max_memory_allocated(self.engine.device) / 1e9
        said = " ".join(f"{key} {value:.4g}" for key, value in facts.items())
        self.task.log(f"epoch {progress.epoch + 1} step {progress.step} {said}")
        if self.task.writer:
            for key, value in facts.items():
                self.task.writer.add_scalar(f"train/{key}", value, progress.step)

    def check(self, norms: list[float]) -> None:
        limit, progress = self.task.settings["max_bad_steps"], self.progress
        for norm, (_, group) in zip(norms, self.window, strict=True):
            progress.bad = 0 if math.isfinite(norm) else progress.bad + 1
            if progress.bad >= limit:
                utts = [utt for batch in group for utt in batch["utts"]]
                checkpoint.save(self.task.folder / "bad_batch.pt", {"step": progress.step, "utts": utts})
                raise BadInput(
                    f"the gradient was not finite {limit} times in a row, last with {' '.join(utts)} (bad_batch.pt); "
                    "lower train.lr, or listen to these recordings"
                )
        bad = sum(not math.isfinite(norm) for norm in norms)
        if bad:
            self.task.log(f"{bad} of the last {len(norms)} updates skipped: their gradient was not finite")


def facts_of(progress: Progress, task: Task) -> dict:
    """Return what last.pt says beside the tensors."""
    return dataclasses.asdict(progress) | {"identity": dict(task.identity)}


def resume(engine: Engine, task: Task, last: Path) -> Progress:
    """Load last.pt and return where it stands. Raises BadInput, naming what differs, when it is another training's."""
    facts = checkpoint.load(last)["facts"]
    theirs, ours = facts.pop("identity"), task.identity
    keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    if keys == ["processes"] and facts["done"] == 0:
        keys = []  # between two epochs another number of processes may take over
    if keys:
        changes = "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in sorted(keys))
        raise BadInput(
            f"{task.folder} holds another training: {changes}. Set it back, or start anew: --fresh keeps the old one "
            f"as {task.folder}.1"
        )
    engine.load(last)
    progress = Progress(**facts)
    task.log(
        f"goes on from {last}: {progress.epoch} of {task.settings['max_epoch']} epochs and {progress.done} updates done"
    )
    return progress


def prune(engine: Engine, task: Task) -> None:
    """Delete the weights of epochs that are neither among the best nor among the last; their yaml stays."""
    if engine.rank:
        return
    found = sorted(checkpoint.epochs(task.folder))
    keep = set(checkpoint.best_epochs(task.folder, task.settings["keep_best"])) | set(
        found[-task.settings["keep_last"] :]
    )
    for epoch in set(found) - keep:
        (task.folder / f"epoch_{epoch}.pt").unlink()


def check_disk(engine: Engine, folder: Path) -> None:
    """Raise BadInput when the disk has no room for the next checkpoint: the weights, and last.pt with the optimizer."""
    size = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 2) for p in engine.module.parameters())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise BadInput(
            f"{folder}: a checkpoint takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space"
        )
