"""Files that are whole or not there, and known by what is in them."""

import hashlib
import os
from pathlib import Path


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
