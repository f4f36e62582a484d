"""Files on disk: whole or absent, known by their fingerprint, and wrong in a way that one line explains."""

import contextlib
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be written ({error.strerror or error}); free space or fix permissions"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """Return 16 hex digits (BLAKE2b) of a file's content; equal content means equal fingerprint, wherever it lies."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
