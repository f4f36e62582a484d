"""The training loop, one for llm and flow.

A batch holds the model's tensors and, beside them, `utts` (ids), `count` (valid positions, known before the forward
pass), `positions` (what a reader counts: tokens or frames) and `padded` (the same with padding). The model returns
`loss`, the sum over the valid positions, and may return further sums (`hits`). An update minimises

    sum of the losses of all batches of the update and of all ranks / number of their valid positions

so it is the same update however it is split over ranks and batches; this mean is also what is logged. Dropout is seeded
by (seed, epoch, update, rank) and all other draws come in the batch, so a run that was killed and goes on from last.pt
ends with the weights of one that never stopped.

Nothing is read back from the device between two lines of the log: losses, norms and whether an update was finite are
gathered there. An update whose gradient is not finite changes nothing and does not count as a step.
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

from cosyvoice_ft import checkpoint, device
from cosyvoice_ft.engine import Engine
from cosyvoice_ft.files import BadInput

# Settings of a training that may differ when it goes on: they do not change what an update is.
FREE = ("max_epoch", "patience", "log_every", "save_minutes", "num_workers", "keep_best", "keep_last", "swanlab")
FREE += ("listen_seconds", "listen_sentences", "auto_batch", "max_bad_steps", "deepspeed", "checkpointing", "compile")
FREE += ("deterministic",)


@dataclass
class Progress:
    """Where a training stands; `step` counts updates."""

    epoch: int = 0  # finished
    done: int = 0  # updates of the epoch under way, those included that were skipped
    step: int = 0  # updates in all, without those
    bad: int = 0  # updates skipped in a row
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way
    cv: list[float] = field(default_factory=list)  # loss after each epoch


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
    begun: Callable[[], None] | None = None  # called when it is clear that the folder holds no other training
    peak: float | None = None  # positions a second if the card did nothing but multiply
    too_large: float = math.inf  # padded positions for which memory was too small


def train(engine: Engine, task: Task) -> Progress:
    """Train to the end, from last.pt when there is one; write epoch_N.pt, epoch_N.yaml and last.pt.

    Raises BadInput when last.pt belongs to a training with other settings or data, when too many gradients in a row
    are not finite, when memory or disk is too small.
    """
    last, progress = task.folder / "last.pt", Progress()
    if last.is_file():
        progress = resume(engine, task, last)
    if reason := finished(progress, task):
        task.log(f"finished already: {reason}")
        return progress
    check_disk(engine, task.folder)
    if task.begun and engine.rank == 0:
        task.begun()
    if progress.epoch == progress.done == 0:
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
        key = [task.seed, epoch, progress.done, engine.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        sums = one_update(engine, group, task.learning_rate(progress.step), task)
        progress.step += 1
        progress.done += 1
        if meter.add(sums, group) and task.settings["save_minutes"]:
            due = engine.rank == 0 and time.monotonic() - saved > 60 * task.settings["save_minutes"]
            if engine.anywhere(due):
                check_disk(engine, task.folder)
                save(engine, task, progress, last)
                saved = time.monotonic()
    meter.settle()


def end_of_epoch(engine: Engine, task: Task, progress: Progress, last: Path) -> None:
    """Validate, save the epoch and where the run stands, then speak. Epoch 0, the base model, is not saved."""
    trained = progress.done > 0
    cv = validate(engine, task.cv)
    progress.epoch += trained
    task.log(f"epoch {progress.epoch} CV " + " ".join(f"{key} {value:.4f}" for key, value in cv.items()))
    if task.writer:
        for key, value in cv.items():
            task.writer.add_scalar(f"cv/{key}", value, progress.step)
    if trained:
        facts = {"step": progress.step, "cv": cv, "train": means(progress.sums)}
        progress.cv, progress.sums, progress.done = [*progress.cv, cv["loss"]], {}, 0
        check_disk(engine, task.folder)
        weights = engine.weights()
        if engine.rank == 0:
            checkpoint.save_epoch(task.folder, progress.epoch, weights, facts)
        save(engine, task, progress, last)
        prune(engine, task)
    if task.listen:
        try:
            task.listen(progress.epoch)
        except Exception:  # what is only heard must not end what is learnt; the log holds all of it
            task.log(f"speaking after epoch {progress.epoch} failed, training goes on:\n{traceback.format_exc()}")


def save(engine: Engine, task: Task, progress: Progress, last: Path) -> None:
    """Write last.pt: everything that going on needs."""
    engine.save(last, dataclasses.asdict(progress) | {"identity": dict(task.identity)})


def finished(progress: Progress, task: Task) -> str | None:
    """Return why a training ends here, or None."""
    best = 1 + min(range(len(progress.cv)), key=progress.cv.__getitem__, default=-1)
    if progress.epoch >= task.settings["max_epoch"]:
        return f"{progress.epoch} epochs, {progress.step} updates; lowest CV loss after epoch {best}"
    patience = task.settings["patience"]
    if patience and progress.done == 0 and progress.cv and progress.epoch - best >= patience:
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
    are halved and the same update is computed again, on all ranks.
    """
    engine.module.train()
    count = sum(batch["count"] for batch in group)
    total = engine.total(torch.full((), count, dtype=torch.float32, device=engine.device))
    batches = halved(group, task) if task.too_large < math.inf else group
    while True:
        sums, short = {}, None
        try:
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                out = engine.forward(batch, last=last)
                engine.backward(out["loss"] * (engine.world_size / total), last=last)  # ranks are averaged
                for key, value in out.items():
                    sums[key] = sums.get(key, 0) + value.detach()
        except torch.OutOfMemoryError as error:
            short = batch["padded"]
            check_memory(task, batch, error)
        if not (task.settings["auto_batch"] and engine.anywhere(short is not None)):
            return sums | {"grad_norm": engine.update(lr)}
        out = None  # what failed must be gone before memory is given back
        engine.clear()
        if short is not None:
            task.too_large = min(task.too_large, short)
            task.log(f"out of memory at {short} positions: such batches are halved from now on; lower max_batch")
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        batches = halved(group, task)


def check_memory(task: Task, batch: dict, error: torch.OutOfMemoryError) -> None:
    """Raise BadInput with the key to change, unless auto_batch goes on with less."""
    part, limit = task.settings["part"], task.settings["max_batch"]
    if not task.settings["auto_batch"]:
        key, least = f"train.{part}.max_batch", min(limit, batch["padded"])
        say = f"lower {key} from {limit} to {least * 2 // 3}, or set train.auto_batch or train.checkpointing"
    elif len(batch["utts"]) < 2:
        say = f"for {batch['utts'][0]} alone, of {batch['padded']} positions; leave it out, or set train.checkpointing"
    else:
        return
    raise BadInput(f"out of memory: {say}") from error


def halved(group: list[dict], task: Task) -> list[dict]:
    """Return the batches with those that memory was too small for cut in halves until it is not."""
    small, queue = [], list(group)
    while queue:
        batch = queue.pop(0)
        if batch["padded"] < task.too_large or len(batch["utts"]) < 2:
            small.append(batch)
        else:
            queue = task.split(batch) + queue
    return small


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
        self.window.append((sums, group))
        if len(self.window) < self.task.settings["log_every"]:
            return False
        self.settle()
        return True

    def settle(self) -> None:
        """Read, check and tell what has been gathered. Raises BadInput after too many bad gradients in a row."""
        if not self.window:
            return
        norms = torch.stack([sums.pop("grad_norm").float() for sums, _ in self.window]).tolist()
        good = [pair for pair, norm in zip(self.window, norms, strict=True) if math.isfinite(norm)]
        self.progress.step -= len(norms) - len(good)
        if good:
            self.tell(self.totals(good), [norm for norm in norms if math.isfinite(norm)])
        self.check(norms)
        self.window, self.start = [], time.monotonic()

    def totals(self, good: list[tuple[dict, list[dict]]]) -> dict[str, float]:
        """Return the sums of these updates over all ranks."""
        keys, facts = list(good[0][0]), ("count", "positions", "padded")
        sums = [sum(sums[key].double() for sums, _ in good).cpu() for key in keys]
        counts = [float(sum(batch[key] for _, group in good for batch in group)) for key in facts]
        values = torch.cat([torch.stack(sums), torch.tensor(counts, dtype=torch.double)])
        return dict(zip([*keys, *facts], self.engine.total(values).tolist(), strict=True))

    def tell(self, totals: Mapping[str, float], norms: list[float]) -> None:
        progress, task = self.progress, self.task
        for key, value in totals.items():
            progress.sums[key] = progress.sums.get(key, 0.0) + value
        rate = totals["positions"] / (time.monotonic() - self.start)
        facts = means(totals) | {
            "grad_norm": sum(norms) / len(norms),
            "lr": task.learning_rate(progress.step - 1),
            f"{task.settings['unit']}_per_s": rate,
            "padding": 1 - totals["positions"] / totals["padded"],
            "memory_gb": device.peak_memory(self.engine.device) / 1e9,
        }
        if task.peak:
            facts["mfu"] = rate / (task.peak * self.engine.world_size)
        said = " ".join(f"{key} {value:.4g}" for key, value in facts.items())
        task.log(f"epoch {progress.epoch + 1} step {progress.step} {said}")
        if task.writer:
            for key, value in facts.items():
                task.writer.add_scalar(f"train/{key}", value, progress.step)

    def check(self, norms: list[float]) -> None:
        """Count the updates that were skipped; stop at too many in a row, with the last one's batches on disk."""
        limit, progress, rank = self.task.settings["max_bad_steps"], self.progress, self.engine.rank
        if bad := sum(not math.isfinite(norm) for norm in norms):
            self.task.log(f"{bad} of the last {len(norms)} updates skipped: their gradient was not finite")
        for norm, (_, group) in zip(norms, self.window, strict=True):
            progress.bad = 0 if math.isfinite(norm) else progress.bad + 1
            if progress.bad >= limit:
                path = self.task.folder / ("bad_batch.pt" if rank == 0 else f"bad_batch_rank{rank}.pt")
                checkpoint.save(path, {"step": progress.step, "batches": group})
                utts = " ".join(utt for batch in group for utt in batch["utts"])
                raise BadInput(
                    f"the gradient was not finite {limit} times in a row, last with {utts} (kept in {path}); lower "
                    "train.lr, or listen to these recordings"
                )


def resume(engine: Engine, task: Task, last: Path) -> Progress:
    """Load last.pt and return where it stands. Raises BadInput, naming what differs, when it is another training's."""
    facts = checkpoint.load(last)["facts"]
    theirs, ours = facts.pop("identity"), task.identity
    keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    if keys == ["processes"] and facts["done"] == 0 and not engine.saves_parts:
        keys = []  # between two epochs another number of processes may take over
    if keys:
        changes = "; ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in sorted(keys))
        raise BadInput(
            f"{task.folder} holds another training: {changes}. Set it back, or start anew: run.sh --fresh true keeps "
            f"the old one as {task.folder}.1"
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
    last = found[max(len(found) - task.settings["keep_last"], 0) :]
    for epoch in set(found) - {*last, *checkpoint.best_epochs(task.folder, task.settings["keep_best"])}:
        (task.folder / f"epoch_{epoch}.pt").unlink()


def check_disk(engine: Engine, folder: Path) -> None:
    """Raise BadInput when the disk has no room for the next checkpoint: the weights, and last.pt with the optimizer."""
    size = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 2) for p in engine.module.parameters())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise BadInput(
            f"{folder}: a checkpoint takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space"
        )
