"""Files that only their owner may read: private keys and what holds them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from lichen.common.disk import sync
from lichen.common.errors import Code, LichenError


def write_private(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write a file that only its owner may read: complete or not at all, and on the disk when this returns, unless it need not be."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        # Created with its final mode: no moment at which another user could open it.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def read_private(path: Path) -> bytes:
    """Read a private file, unless others may read it too.

    Raises:
        LichenError: CERTIFICATE_MISSING if it is not there; KEY_EXPOSED if its group or others have any access.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise LichenError(
                    Code.KEY_EXPOSED,
                    f"a private key is open to other users of this machine (mode {mode:04o})",
                    where=str(path),
                    fix=f"If none of them may have read it: chmod 600 {path}. Otherwise enrol again.",
                )
            return file.read()
    except FileNotFoundError as error:
        raise LichenError(Code.CERTIFICATE_MISSING, "no private key here", where=str(path)) from error
