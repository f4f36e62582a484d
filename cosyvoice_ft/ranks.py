"""The processes of one training: how they find each other, and how they end together.

torchrun starts them and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. On one machine it also ends
the others when one dies. On several nobody does, and who waits for a dead process may wait for half an hour. Therefore
every process counts aloud in a store that all can read; one that fails says why, and the others end with its words;
one that has been silent for 40 s is given up. This goes on beside the training, which never waits for it.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from cosyvoice_ft.files import BadInput

POLL = 4.0  # seconds between two looks at the others
SILENCE = 10  # looks without a sign of life after which a process is given up


def world() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def joined(device: torch.device, *, alone_too: bool = False) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and yield this one's device.

    alone_too: make a group of one where there is no torchrun, for DeepSpeed. Raises BadInput with the words of the
    process that failed first when that was another one.
    """
    launched = {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    if not (launched or alone_too):
        yield device
        return
    if launched and device.type == "cuda":
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise BadInput(
                f"{local + 1} processes or more on {socket.gethostname()}, which has {cards} cards: lower --nproc"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
    if launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Watch(*world()) if launched else contextlib.nullcontext():
            yield device
            dist.barrier()  # the store may live in one of us: nobody leaves before all are done
    finally:
        dist.destroy_process_group()


class Watch(contextlib.AbstractContextManager):
    """While it is open: ends this process soon after another one failed or fell silent."""

    def __init__(self, rank: int, world_size: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))
        self.store = dist.PrefixStore("watch", store)
        self.name = f"rank {rank} on {socket.gethostname()}"
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self.heard: dict[int, bytes] = {}
        self.silent = dict.fromkeys(self.others, 0)
        self.looks = self.unanswered = 0
        self.closed = threading.Event()

    def __enter__(self) -> "Watch":
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.closed.set()
        if error is None:
            return
        words = f"{self.name}: {str(error) or kind.__name__}".split("\n")[0]
        with contextlib.suppress(dist.DistError):  # the store died with the machine that held it
            first = self.store.compare_set("failed", "", words).decode()
            if first != words:
                raise BadInput(f"{self.name} ends because another process failed: {first}") from error

    def run(self) -> None:
        while not self.closed.wait(POLL):
            reason = self.look()
            if reason and not self.closed.is_set():
                print(f"ERROR {self.name} ends because another process failed: {reason}", file=sys.stderr, flush=True)
                os._exit(1)  # the training itself hangs in an exchange with the dead

    def look(self) -> str | None:
        """Give a sign of life and look at the others; return why this process must end."""
        self.looks += 1
        try:
            self.store.set(f"beat_{self.rank}", str(self.looks))
            if self.store.check(["failed"]):
                return self.store.get("failed").decode()
            for other in self.others:
                key = f"beat_{other}"
                beat = self.store.get(key) if self.store.check([key]) else b""
                self.silent[other] = self.silent[other] + 1 if beat == self.heard.get(other) else 0
                self.heard[other] = beat
        except dist.DistError as error:
            self.unanswered += 1
            return f"the machine of rank 0 does not answer ({error})" if self.unanswered >= 3 else None
        self.unanswered = 0
        dead = [str(other) for other, looks in self.silent.items() if looks >= SILENCE]
        return f"rank {', '.join(dead)} gave no sign of life for {POLL * SILENCE:.0f} s" if dead else None
