"""One function over many utterances, several at a time; what fails is counted, named and limited, never lost."""

import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from cosyvoice_ft.cli import progress
from cosyvoice_ft.files import BadInput

MAX_LOSS = 0.05  # share of utterances that may fail before a tool stops with nothing written


def for_each(
    function: Callable[[Any], Any], items: Mapping[str, Any], *, what: str, nj: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return ({utt: function(item)}, {utt: reason}) in the order of `items`; a BadInput fails only its utterance.

    Threads: soundfile, torch and onnxruntime release the interpreter lock, so `nj` of them use `nj` cores.
    """
    results, failed = {}, {}
    with ThreadPoolExecutor(nj or os.cpu_count()) as pool:
        jobs = {pool.submit(function, item): utt for utt, item in items.items()}
        try:
            for job in progress(as_completed(jobs), len(jobs), what):
                try:
                    results[jobs[job]] = job.result()
                except BadInput as error:
                    failed[jobs[job]] = str(error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {utt: results[utt] for utt in items if utt in results}, failed


def settle(failed: Mapping[str, str], total: int, out: object) -> None:
    """Name on stderr what failed. Raises BadInput above 5 % of `total`, or when nothing is left."""
    for utt, reason in failed.items():
        print(f"left out {utt}: {reason}", file=sys.stderr)
    if len(failed) > MAX_LOSS * total or len(failed) == total:
        raise BadInput(
            f"{out} not written: {len(failed)} of {total} utterances failed, more than {MAX_LOSS:.0%}; the lines above "
            "say why; mend or remove those recordings and run the stage again"
        )
