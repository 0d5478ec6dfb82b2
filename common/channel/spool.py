"""The spool: payloads as files named by their SHA-256, and partial files that a broken transfer goes on from.

A file appears under its digest only when all of it is there, verified and on the disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO

from lichen.common.disk import sync
from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef

_DIGEST = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_SYNC_EVERY = 32 << 20  # bytes between two calls that push a growing file to the disk, so that the last one is short


class Spool:
    """A directory of payloads, each a file named by the hexadecimal SHA-256 of its bytes.

    Args:
        directory: made if it is not there. It must lie on one file system: payloads arrive in it by renaming.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the payload of that digest lies, or would lie.

        Raises:
            LichenError: FRAME_INVALID, if it is not 64 lower-case hexadecimal digits (a digest can come from a peer).
        """
        if not _DIGEST.fullmatch(digest):
            raise LichenError(Code.FRAME_INVALID, "a payload's digest is not a SHA-256 in hexadecimal")
        return self.directory / digest

    def has(self, digest: str) -> bool:
        """Whether the payload is here, complete."""
        return self.path(digest).exists()

    def length(self, digest: str) -> int | None:
        """The payload's length in bytes; None if it is not here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def add_file(self, source: str | Path) -> PayloadRef:
        """Move a file into the spool (it must lie on the same file system; `temporary` makes such files)."""
        with Path(source).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            length = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        os.replace(source, self.path(digest))
        sync(self.directory)
        return PayloadRef(digest, length)

    def add_bytes(self, data: bytes) -> PayloadRef:
        """Keep these bytes as a payload."""
        with self.temporary() as file:
            file.write(data)
        return self.add_file(file.name)

    def temporary(self) -> BinaryIO:
        """A new file inside the spool's directory for `add_file`; `collect` removes one left behind by a crash."""
        return NamedTemporaryFile(dir=self.directory, suffix=".tmp", delete=False)  # type: ignore[return-value]

    def partial(self, digest: str, length: int) -> Partial:
        """Open the payload's partial file, to go on where a broken transfer ended.

        What is there already is read once, to go on with its hash: call this in a thread.
        """
        return Partial(self.path(digest), length)

    def collect(self, keep: Iterable[str], *, min_age: float = 600.0, partial_age: float = 86400.0) -> int:
        """Remove all payloads but those in ``keep``, and leftovers; returns the number of bytes freed.

        Args:
            keep: digests in hexadecimal.
            min_age: payloads changed in the last so many seconds stay: they may be on their way into a message.
            partial_age: the same for what is not complete: its sender may come back.
        """
        kept, freed, now = set(keep), 0, time.time()
        for entry in os.scandir(self.directory):
            digest = entry.name.removesuffix(".part")
            known = _DIGEST.fullmatch(digest) or entry.name.endswith(".tmp")
            limit = now - (min_age if entry.name == digest and not entry.name.endswith(".tmp") else partial_age)
            try:
                status = entry.stat(follow_symlinks=False)
                if known and digest not in kept and entry.is_file(follow_symlinks=False) and status.st_mtime <= limit:
                    os.unlink(entry.path)
                    freed += status.st_size
            except FileNotFoundError:
                continue  # completed or removed meanwhile
        return freed


class Partial:
    """A payload that is arriving: ``<digest>.part`` beside its final place.

    Not thread-safe: one call at a time.

    Attributes:
        offset: the number of bytes that are here.
        length: the number of bytes that there will be.
    """

    def __init__(self, target: Path, length: int) -> None:
        self.length = length
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._file = self._part.open("a+b")
        if self._file.seek(0, os.SEEK_END) > length:
            self._file.truncate(0)
        self._hash = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            self._hash.update(block)
        self.offset = self._synced = self._file.tell()

    def write(self, blocks: list[bytes]) -> None:
        """Append blocks, in order.

        Raises:
            LichenError: FRAME_INVALID, if that is more than ``length``.
        """
        if self.offset + sum(map(len, blocks)) > self.length:
            raise LichenError(Code.FRAME_INVALID, f"more than the {self.length} bytes of payload {self._target.name}")
        for block in blocks:
            self._hash.update(block)
            self._file.write(block)
            self.offset += len(block)
        self._file.flush()  # a process that is killed leaves what has come
        if self.offset - self._synced >= _SYNC_EVERY:
            self._sync()

    def finish(self) -> None:
        """Verify the digest and put the payload in its place, on the disk.

        Raises:
            LichenError: PAYLOAD_CORRUPT, if the bytes are not those of the digest; the partial file is gone then.
        """
        if self.offset != self.length or self._hash.hexdigest() != self._target.name:
            self._file.close()
            self._part.unlink()
            raise LichenError(
                Code.PAYLOAD_CORRUPT,
                f"{self.offset} of {self.length} bytes came whose SHA-256 is {self._hash.hexdigest()}",
                where=f"payload {self._target.name}",
                fix="It is fetched again from its start; if this repeats, check the sender's disk.",
            )
        self._sync()
        self._file.close()
        os.replace(self._part, self._target)
        sync(self._target.parent)

    def close(self) -> None:
        """Leave the partial file for later; harmless after `finish`."""
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._synced = self.offset
