"""Memory of processes, as Linux tells it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def resident(field: str, process: int | str = "self") -> int:
    """Resident memory of a process in bytes: ``VmRSS`` now, of which ``RssAnon`` is no file's; ``VmHWM`` at its largest."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let this process's ``VmHWM`` be the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def of_trees(roots: Iterable[int]) -> int:
    """Bytes of processes and all that descend from them, however many other programs share their libraries (Linux only).

    Memory of their own counts by proportion (PSS), so that what a fork shares counts once; mapped files as in the process that has most
    of them, because their proportion falls with every program on the machine that has mapped the same.
    """
    own, mapped = 0, 0
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            for number in (root, *(child.pid for child in psutil.Process(root).children(recursive=True))):
                with suppress(OSError):  # it has ended
                    lines = Path(f"/proc/{number}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
                    sizes = {field: 1024 * int(size) for field, size, *_ in map(str.split, lines)}
                    own += sizes["Pss_Anon:"]
                    mapped = max(mapped, sizes["Rss:"] - sizes["Anonymous:"])
    return own + mapped
