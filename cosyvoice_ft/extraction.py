"""Stages 1 and 2 for any number of utterances: what is finished stays, whatever ends the run.

    wav.scp --share of RANK--> what is not done --threads--> NAME.parts/RANK/NNNNN.pt --all settled--> NAME.pt

Beside the array of an utterance an archive keeps two fingerprints: of the content of the wav and of the model that it
was made from. An utterance is done when NAME.pt or a part holds its array for the wav and the model of now; the rest is
worked on, and goes to another part every 20 s or 1,000 utterances. A recording that fails is settled, too: this run
goes on without it, the next one tries it again. The process that finds everything settled, the shares of the others
included, joins: NAME.pt in the order of wav.scp, and the parts vanish. So its bytes depend on wavs and model alone.

NAME.fingerprints (`utt stamp content`) spares reading all audio to see that nothing changed: the stamp is made of path,
size and time of change, and only a wav with another one is read.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import jobs
from cosyvoice_ft.cli import progress
from cosyvoice_ft.extractors import OnnxModel, load_for_extraction, read_archive, save_archive
from cosyvoice_ft.files import BadInput, fingerprint, lock
from cosyvoice_ft.table import read_table, write_table

PART_SECONDS, PART_UTTERANCES = 20.0, 1000  # whichever comes first: what a kill costs at most
LOOKED_AT = 1000  # files that a thread looks at in one go


def extract(
    folders: Sequence[Path], name: str, model: OnnxModel, weights: Path, nj: int | None = None
) -> "list[Extraction] | None":
    """Make NAME.pt in every data directory; return what they hold, or None when other ranks are still at work.

    RANK and WORLD_SIZE of the environment say which share is this process' own. `weights` is the file whose content
    stands for the model. Raises BadInput when more than 5 % of all utterances fail; what is done stays in the parts.
    """
    rank, world_size = place()
    made_by = fingerprint(weights)
    works = [Extraction(folder, name, made_by, rank, world_size) for folder in folders]
    with contextlib.ExitStack() as stack:
        for work in works:
            stack.enter_context(lock(work.mine))
        for work in works:
            work.run(model, nj)
        total, open_ = sum(len(work.wavs) for work in works), sum(work.unsettled() for work in works)
        if open_:
            print(f"rank {rank} of {world_size} is through; {open_} of {total} utterances are with others")
            return None
        failed = {utt: reason for work in works for utt, reason in work.failed.items()}
        jobs.settle(failed, total, f"{name}.pt")
        try:
            for work in works:
                stack.enter_context(lock(work.parts / "join"))
        except BadInput:
            print(f"rank {rank} of {world_size} is through; another one just joins the parts")
            return None
        for work in works:
            work.join()
    for work in works:
        work.clear()
    return works


def summary(works: "Sequence[Extraction]") -> str:
    """Say where the archives are and how much they hold."""
    done, total = sum(len(work.done) for work in works), sum(len(work.wavs) for work in works)
    return f"in {' '.join(str(work.folder) for work in works)}: {done} of {total} utterances"


def place() -> tuple[int, int]:
    """Return RANK and WORLD_SIZE of the environment; 0 and 1 where there are none."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise BadInput(f"RANK={rank} WORLD_SIZE={world_size}: ranks go from 0 to WORLD_SIZE - 1; mend the environment")
    return int(rank), int(world_size)


def card(where: torch.device) -> int:
    """Return the number of the CUDA device: the one that was named, else one for each process that torchrun started."""
    return int(os.environ.get("LOCAL_RANK", "0")) if where.index is None else where.index


def look(path: str, known: str = "") -> str:
    """Return `stamp content` of a file; `known`, from an earlier look, spares reading it when the stamp is the same.

    Raises BadInput for a file that cannot be read.
    """
    try:
        facts = os.stat(path)
        stamp = blake2b(f"{path} {facts.st_size} {facts.st_mtime_ns}".encode(), digest_size=8).hexdigest()
        return known if known.startswith(f"{stamp} ") else f"{stamp} {fingerprint(path)}"
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error


def has_changed(path: str, known: str | None) -> bool:
    """Return whether a file's content is another one than that of `known`, from an earlier look (None: no look)."""
    return known is not None and look(path, known).split()[1] != known.split()[1]


class Extraction:
    """One archive of one data directory in the making.

    found: arrays on disk that this model made, by utterance and content; done: those of the wavs of now; failed:
    {utt: reason}; prints: {utt: "stamp content"}, of the wavs of now where done.
    """

    def __init__(self, folder: Path, name: str, made_by: str, rank: int, world_size: int) -> None:
        self.folder, self.out, self.parts = folder, folder / f"{name}.pt", folder / f"{name}.parts"
        self.wavs = read_table(folder / "wav.scp")
        self.share, self.mine = list(self.wavs)[rank::world_size], self.parts / str(rank)
        self.made_by = made_by
        self.prints = {}
        for path in sorted(folder.glob("*.fingerprints")):
            self.prints |= read_table(path)
        self.found: dict[tuple[str, str], np.ndarray] = {}
        self.done: dict[str, np.ndarray] = {}
        self.failed: dict[str, str] = {}
        self.unsaved: list[str] = []
        self.seen: set[tuple[Path, int]] = set()

    def run(self, model: OnnxModel, nj: int | None) -> None:
        """Do what is left of this rank's share; say first what was done before."""
        self.gather()
        sweep(self.mine / "*")
        self.compare(self.share)
        todo = [utt for utt in self.share if utt not in self.done]
        for utt in todo:
            self.failed.pop(utt, None)
        self.say(todo)
        written = time.monotonic()
        try:
            for utt, print_, result in progress(self.results(todo, model, nj), len(todo), str(self.out)):
                if isinstance(result, BadInput):
                    self.failed[utt] = str(result)
                else:
                    self.done[utt], self.prints[utt] = result, print_
                self.unsaved.append(utt)
                if time.monotonic() - written >= PART_SECONDS or len(self.unsaved) == PART_UTTERANCES:
                    self.save()
                    written = time.monotonic()
        finally:
            self.save()

    def say(self, todo: Sequence[str]) -> None:
        """Tell what this run finds done, and why not more of it."""
        ready, total = len(self.share) - len(todo), len(self.share)
        known = {utt for utt, _ in self.found}
        changed = sum(utt in known for utt in todo)
        state = "starts" if not ready else "goes on" if todo else "was finished"
        notes = [f"{changed} recordings have changed"] * bool(changed)
        notes += ["another model made what is there"] * (not known and self.out.exists())
        notes += [f"the share of {self.mine.name}, of {len(self.wavs)} in all"] * (total < len(self.wavs))
        print(f"{self.out}: {state}: {ready} of {total} utterances are done" + "".join(f"; {note}" for note in notes))

    def results(
        self, todo: Sequence[str], model: OnnxModel, nj: int | None
    ) -> Iterator[tuple[str, str, np.ndarray | BadInput]]:
        """Yield (utt, print, array or why there is none), in order."""

        def work(utts: Sequence[str]) -> list[tuple[str, str, np.ndarray | BadInput]]:
            inputs, outputs = {}, {}
            for utt in utts:
                with caught(outputs, utt):
                    print_ = look(self.wavs[utt], self.prints.get(utt, ""))  # before it is loaded: it may change
                    inputs[utt] = print_, model.features(load_for_extraction(self.wavs[utt])[1])
            raw = model.infer([features for _, features in inputs.values()]) if inputs else []
            for (utt, (print_, features)), output in zip(inputs.items(), raw, strict=True):
                with caught(outputs, utt):
                    outputs[utt] = print_, model.checked(output, features)
            return [(utt, *outputs[utt]) for utt in utts]

        groups = (todo[start : start + model.group] for start in range(0, len(todo), model.group))
        for _, results in jobs.in_order(work, groups, nj):
            yield from results

    def gather(self) -> None:
        """Read what is new of the finished work on disk: parts first, since who joins deletes them last."""
        for path in [*sorted(self.parts.glob("*/*.pt")), self.out]:
            try:
                version = path, path.stat().st_mtime_ns
                arrays, more = ({}, {}) if version in self.seen else read_archive(path)
            except (FileNotFoundError, BadInput):
                if path.exists():
                    raise
                continue  # joined meanwhile, or not made yet
            self.seen.add(version)
            if more.get("made_by") == self.made_by:
                contents, stamps = more["contents"].split(), more.get("stamps", "").split()
                self.found |= {(utt, content): arrays[utt] for utt, content in zip(arrays, contents, strict=True)}
                self.prints |= dict(zip(arrays, map(" ".join, zip(stamps, contents, strict=False)), strict=False))
                self.failed |= {utt: reason for utt, reason in more.get("failed", {}).items() if utt in self.wavs}

    def compare(self, utts: Sequence[str]) -> None:
        """Move what was found for the wavs of now to `done`."""

        def looked_at(some: Sequence[str]) -> list[tuple[str, str]]:
            prints = []
            for utt in some:
                with contextlib.suppress(BadInput):  # it will fail where it is loaded
                    prints.append((utt, look(self.wavs[utt], self.prints.get(utt, ""))))
            return prints

        known = {utt for utt, _ in self.found}
        known = [utt for utt in utts if utt in known and utt not in self.done]
        chunks = (known[start : start + LOOKED_AT] for start in range(0, len(known), LOOKED_AT))
        for _, prints in jobs.in_order(looked_at, chunks):
            for utt, print_ in prints:
                array = self.found.get((utt, print_.split()[1]))
                if array is not None:
                    self.done[utt], self.prints[utt] = array, print_

    def save(self) -> None:
        """Write what was finished since the last part."""
        if self.unsaved:
            arrays = {utt: self.done[utt] for utt in self.unsaved if utt in self.done}
            failed = {utt: self.failed[utt] for utt in self.unsaved if utt in self.failed}
            stamps, contents = self.columns(arrays)
            path = self.mine / f"{1 + max((int(path.stem) for path in self.mine.glob('*.pt')), default=0):05d}.pt"
            more = {"made_by": self.made_by, "contents": contents, "stamps": stamps, "failed": failed}
            self.done |= save_archive(path, arrays, **more)  # one block: as many small ones would hold memory apart
            self.seen.add((path, path.stat().st_mtime_ns))
            self.unsaved.clear()

    def columns(self, utts: Sequence[str]) -> list[str]:
        """Return the stamps and the contents of `utts`, each as one text."""
        return [" ".join(self.prints[utt].split()[column] for utt in utts) for column in (0, 1)]

    def unsettled(self) -> int:
        """Return how many utterances neither have an array nor failed, those of other ranks included."""
        self.gather()
        self.compare(list(self.wavs))
        self.failed = {utt: reason for utt, reason in self.failed.items() if utt not in self.done}
        return len(self.wavs) - len(self.done) - len(self.failed)

    def join(self) -> None:
        """Write the archive, in the order of wav.scp, and the fingerprints."""
        self.done = {utt: self.done[utt] for utt in self.wavs if utt in self.done}
        table = self.out.with_suffix(".fingerprints")
        for path in (self.out, table):
            sweep(path)
        save_archive(self.out, self.done, made_by=self.made_by, contents=self.columns(self.done)[1])
        write_table(table, {utt: self.prints[utt] for utt in self.done})

    def clear(self) -> None:
        """Delete the parts, but not those of a rank that is at work: it will join again, with the same bytes."""
        for rank in self.parts.glob("*"):
            with contextlib.suppress(BadInput), lock(rank):
                shutil.rmtree(rank, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.parts.rmdir()


def sweep(path: Path) -> None:
    """Delete what killed runs left of `path`, half-written."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def caught(outputs: dict, utt: str) -> Iterator[None]:
    """Let a BadInput be the output of this utterance."""
    try:
        yield
    except BadInput as error:
        outputs[utt] = "", error
