"""Resident memory of a process, as Linux tells it."""

from __future__ import annotations

from pathlib import Path


def resident(field: str, process: int | str = "self") -> int:
    """Resident memory of a process in bytes: ``VmRSS`` now, ``VmHWM`` at its largest."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let this process's ``VmHWM`` be the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def shared_out(process: int) -> int:
    """Memory of a process and of all that it has started, in bytes; a page that several of them share counts once."""
    total = 0
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        total = 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        children = [child for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, StopIteration):  # it has ended
        return total
    return total + sum(shared_out(int(child)) for child in children)
