"""One function over many utterances, several at a time; what fails is counted, named and limited, never lost."""

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from cosyvoice_ft.cli import progress
from cosyvoice_ft.files import BadInput

MAX_LOSS = 0.05  # share of utterances that may fail before a tool stops with nothing written
SERVER = """
import importlib, json, sys
function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
for line in sys.stdin:
    print(json.dumps(function(*json.loads(line))), flush=True)
"""
AHEAD = 4  # items a core that are worked on, or wait to be taken: what bounds the memory of any number of them


def cores() -> int:
    """Return the cores of this process, its part of them where torchrun started several on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], nj: int | None = None
) -> Iterator[tuple[Any, Any | BadInput]]:
    """Yield (item, function(item)) in the order of `items`; a BadInput that it raises stands for the result.

    Threads: soundfile, torch and onnxruntime release the interpreter lock, so `nj` of them use `nj` cores. Tell torch
    to use one thread itself. However slowly the results are taken, at most 4 items a thread are in memory.
    """
    items, nj = iter(items), nj or cores()

    def result(item: Any) -> Any | BadInput:
        try:
            return function(item)
        except BadInput as error:
            return error

    with ThreadPoolExecutor(nj) as pool:
        try:
            ahead = deque((item, pool.submit(result, item)) for item in islice(items, AHEAD * nj))
            while ahead:
                item, job = ahead.popleft()
                yield item, job.result()
                ahead.extend((item, pool.submit(result, item)) for item in islice(items, 1))
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def beside(function: Callable) -> Iterator[Callable]:
    """Yield `function` as one that a process of its own answers, one beside each thread that calls: for what keeps the
    interpreter lock. Arguments and results are what JSON knows; the processes end with this one, however it ends.
    """
    command = [sys.executable, "-c", SERVER, function.__module__, function.__name__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}  # no Ctrl-C
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    servers, idle = [], []

    def call(*args: Any) -> Any:
        try:
            server = idle.pop()
        except IndexError:
            server = subprocess.Popen(command, env=env, **pipes)
            servers.append(server)
        print(json.dumps(args), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        idle.append(server)
        return answer

    try:
        yield call
    finally:
        for server in servers:
            server.stdin.close()
            server.wait()
            server.stdout.close()


def for_each(
    function: Callable[[Any], Any], items: Mapping[str, Any], *, what: str, nj: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return ({utt: function(item)}, {utt: reason}) in the order of `items`; a BadInput fails only its utterance."""
    results, failed = {}, {}
    done = in_order(lambda utt: function(items[utt]), items, nj)
    for utt, result in progress(done, len(items), what):
        if isinstance(result, BadInput):
            failed[utt] = str(result)
        else:
            results[utt] = result
    return results, failed


def settle(failed: Mapping[str, str], total: int, out: object) -> None:
    """Name on stderr what failed. Raises BadInput above 5 % of `total`, or when nothing is left."""
    for utt, reason in failed.items():
        print(f"left out {utt}: {reason}", file=sys.stderr)
    if len(failed) > MAX_LOSS * total or len(failed) == total:
        raise BadInput(
            f"{out} not written: {len(failed)} of {total} utterances failed, more than {MAX_LOSS:.0%}; the lines above "
            "say why; mend or remove those recordings and run the stage again"
        )
