"""One agent a home, and one home at a time on the same data: advisory locks that the kernel lets go of when a process dies.

Two ledgers on one set of rows would each know half of what was spent, so a source's path is locked for all homes of this user: itself
exclusively and the folders above it shared, hence a folder conflicts with what lies in it, and two files of a folder do not.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

from lichen.client.data import MANIFEST, read_manifest
from lichen.common.errors import Code, LichenError

HOME_LOCK = "agent.lock"
_PATIENCE = 1.0  # seconds: a restarted agent may meet the last moments of the one before, or a `status` that looks


class HomeLocks:
    """The locks of one agent; `close`, or the process's end, gives them back.

    Args:
        home: the node's home, which is locked at once.

    Raises:
        LichenError: AGENT_IN_USE, if another agent runs on it; AGENT_HOME_MISSING, if there is no such directory.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._data: dict[Path, tuple[int, int]] = {}
        try:
            self._own = os.open(home / HOME_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            fix = "Run `lichen client join INVITE` first."
            raise LichenError(Code.AGENT_HOME_MISSING, f"not a usable home: {error.strerror}", where=str(home), fix=fix) from None
        if not _lock(self._own, fcntl.LOCK_EX):
            os.close(self._own)
            raise LichenError(Code.AGENT_IN_USE, "another agent runs on this home", where=str(home), fix="Stop it first.")

    def hold_data(self) -> None:
        """Lock what `data.yaml` names now, and let go of what it names no longer.

        Raises:
            LichenError: AGENT_IN_USE, if another home's agent uses some of it; errors as `read_manifest`, but none if there is no data.
        """
        if not (self._home / MANIFEST).exists():
            return
        wanted: dict[Path, int] = {}
        sources = [(self._home / source.path).resolve() for source in read_manifest(self._home).sources]
        for place in sources:
            wanted.update(dict.fromkeys(place.parents, fcntl.LOCK_SH))
        wanted.update(dict.fromkeys(sources, fcntl.LOCK_EX))
        for place, (descriptor, kind) in list(self._data.items()):
            if wanted.get(place) != kind:
                os.close(descriptor)
                del self._data[place]
        for place, kind in wanted.items():
            if place not in self._data:
                self._data[place] = (self._take(place, kind), kind)

    def _take(self, place: Path, kind: int) -> int:
        # Named by a digest, so that the folder of locks does not list what this user's data is called.
        path = _folder() / hashlib.sha256(os.fsencode(place)).hexdigest()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"no place for locks: {error.strerror}", where=str(path.parent)) from None
        if _lock(descriptor, kind):
            return descriptor
        os.close(descriptor)
        raise LichenError(
            Code.AGENT_IN_USE,
            "the agent of another home uses this data, or a folder that holds it",
            where=str(place),
            fix="One home for one set of rows: its ledger must know all that was spent. Stop the other agent, or give each its own data.",
        )

    def close(self) -> None:
        """Give all locks back."""
        for descriptor, _ in self._data.values():
            os.close(descriptor)
        self._data.clear()
        os.close(self._own)


def agent_runs(home: Path) -> bool:
    """Whether an agent runs on this home now."""
    try:
        descriptor = os.open(home / HOME_LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _folder() -> Path:
    """One for all homes of this user, wherever they lie."""
    return Path.home() / ".lichen" / "locks"


def _lock(descriptor: int, kind: int) -> bool:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
