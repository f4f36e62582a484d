"""Files on disk: whole or absent, known by their fingerprint, and wrong in a way that one line explains."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


class BadInput(Exception):
    """Something the user gave is wrong. The message is one line: where, what, the rule, what to type next."""


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it becomes `path` when the block ends, and vanishes when the block fails.

    A reader, a killed job or a full disk therefore never shows a half-written `path`.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be written ({error.strerror or error}); free space or fix permissions"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep `folder` to this process while the block runs, however the process ends; folders are made.

    Raises BadInput at once when another process holds it.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{folder}: another run is at work in it; wait for its end, or give a --name") from error
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written ({error.strerror}); free space or fix permissions") from error
        yield


def fingerprint(path: str | Path) -> str:
    """Return 16 hex digits (BLAKE2b) of a file's content; equal content means equal fingerprint, wherever it lies."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
