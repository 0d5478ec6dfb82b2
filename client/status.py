"""What the agent does now, as a small file in its home: `lichen client status` needs no socket, and works when the agent is down."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lichen.client.locks import agent_runs
from lichen.common.errors import Code, LichenError

FORMAT = 1
STATUS = "status.json"
CLOCK_OFF = 60.0  # seconds beyond which a clock is wrong, and its owner told
PAUSED = "paused"

State = Literal["stopped", "connecting", "idle", "paused", "waiting", "preparing", "training", "evaluating"]


@dataclass(frozen=True)
class AgentStatus:
    """For the owner's eyes."""

    state: State
    """`waiting`: a plan waits for a person (`lichen client pending`). `paused`: connected or not, no work is taken."""
    since: float
    """Unix time of the last change of ``state``."""
    name: str = ""
    coordinator: str = ""
    """Its address."""
    connected: bool = False
    clock_off: int = 0
    """Seconds by which this machine's clock is ahead of the coordinator's."""
    run: str | None = None
    """The run whose message was handled last."""
    round: int | None = None
    last_error: str | None = None
    """The last error of the connection or of a message, in full: it may quote what only the owner may read."""
    last_error_at: float | None = None
    pid: int | None = None
    worker_pid: int | None = None
    """Of the process that holds the model; None before the first message."""
    rows: int | None = None
    """Rows that pass through the model at once, after memory was not enough for more."""
    new_rows: int | None = None
    """The declared size of what is new for the online run, as the coordinator is told; None where there was no such run."""
    not_counted: str | None = None
    """Why nothing is told to be new, where data could not be read or the policy forbids it; None if that went well."""


class StatusFile:
    """The agent's side of the file: each change replaces it.

    Args:
        home: the node's home.
        name: the node's name.
        coordinator: its address.
    """

    def __init__(self, home: Path, name: str, coordinator: str) -> None:
        self._path = home / STATUS
        self._status = AgentStatus("connecting", time.time(), name, coordinator, pid=os.getpid())
        self._write()

    @property
    def state(self) -> State:
        """As last set."""
        return self._status.state

    def change(self, **changes: Any) -> None:
        """Set some fields; a new state sets ``since``, a new error ``last_error_at``."""
        if changes.get("state", self._status.state) != self._status.state:
            changes["since"] = time.time()
        if changes.get("last_error") is not None:
            changes["last_error_at"] = time.time()
        changed = replace(self._status, **changes)
        if changed != self._status:
            self._status = changed
            self._write()

    def _write(self) -> None:
        # Not pushed to the disk: after a power cut no agent runs, and the file says nothing that is true.
        temporary = self._path.with_name(f".{STATUS}.new")
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(self._status)}), encoding="utf-8")
        temporary.chmod(0o600)
        temporary.replace(self._path)


def read_status(home: Path) -> AgentStatus:
    """What the agent of this home does now; ``stopped`` if none runs.

    Raises:
        LichenError: STORE_VERSION, if the file is damaged or of a newer lichen.
    """
    path = home / STATUS
    running = agent_runs(home)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != FORMAT:
            raise ValueError("of a newer format")
        status = AgentStatus(**document)
    except FileNotFoundError:
        return AgentStatus("connecting" if running else "stopped", time.time())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LichenError(
            Code.STORE_VERSION, f"the status can't be read: {error}", where=str(path), fix="Start the agent again: it writes a new one."
        ) from None
    if not running:
        return replace(status, state="stopped", connected=False, pid=None, worker_pid=None)
    if status.state in {"idle", "connecting"} and is_paused(home):
        return replace(status, state="paused")
    return status


def is_paused(home: Path) -> bool:
    """Whether the owner has paused this node."""
    return (home / PAUSED).exists()


def pause(home: Path, *, resume: bool = False) -> None:
    """Take no more work from the next message on, or take it again; it outlives restarts."""
    if resume:
        (home / PAUSED).unlink(missing_ok=True)
    else:
        (home / PAUSED).touch(mode=0o600)
