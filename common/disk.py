"""What is on the disk, and what the disk did."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


def sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_failed(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is the disk's: full, over quota, read-only or broken."""
    import sqlite3

    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return True
        text = str(error)
        if isinstance(error, sqlite3.OperationalError) and ("disk is full" in text or "disk I/O" in text):
            return True
        if type(error).__name__ == "SafetensorError" and any(f"os error {number}" in text for number in _DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
