"""Files that are whole or not there, and known by what is in them."""

import hashlib
import marshal
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT = 100  # files


def write(path: Path, text: str) -> None:
    """Write a file at once: who reads it, also after a loss of power, sees what was there before, or all of this."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """See to it that what was written to a file is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return what tells whether files are as they were, without reading them: path, size and time."""
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def kept(file: Path, about: Any, make: Callable[[], Any]) -> Any:
    """Return plain data from a file that is named after what it follows from, or make it and keep it there.

    Of the files of one name the hundred that were read last stay.

    Args:
        file: Its name gets a digest.
        about: All that the data follows from; its ``repr`` tells.
        make: Makes the data: numbers, texts and collections of them.
    """
    name, known = file.name, hashlib.sha256(repr((sys.version, about)).encode()).hexdigest()
    file = file.with_name(f"{name}-{known[:12]}")
    with suppress(OSError, ValueError, EOFError, TypeError, MemoryError):
        found = marshal.loads(file.read_bytes())
        with suppress(OSError):  # it is somebody else's
            os.utime(file)
        return found
    found = make()
    with suppress(OSError, ValueError):
        file.parent.mkdir(parents=True, exist_ok=True)
        (scratch := file.with_name(f"{file.name}.{os.getpid()}")).write_bytes(marshal.dumps(found))
        scratch.replace(file)
        for old in sorted(file.parent.glob(f"{name}-*"), key=lambda one: one.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return found
