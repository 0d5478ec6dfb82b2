"""Resident memory of a process, as Linux tells it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def resident(field: str, process: int | str = "self") -> int:
    """Resident memory of a process in bytes: ``VmRSS`` now, ``VmHWM`` at its largest."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let this process's ``VmHWM`` be the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def of_tree(process: int) -> int:
    """Memory of a process and of all that it has started, in bytes.

    Memory of their own counts by proportion (PSS), so that a page that a fork shares counts once. Of files that are mapped the process
    counts that has most of them: their proportion would fall with every other program of the machine that has mapped the same libraries.
    """
    found = list(_tree(process))
    return sum(own for own, _ in found) + max((mapped for _, mapped in found), default=0)


def _tree(process: int) -> Iterator[tuple[int, int]]:
    """Of each process its own memory and its mapped files."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        children = [child for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return
    sizes = {field: 1024 * int(size) for field, size, *_ in map(str.split, lines)}
    yield sizes["Pss_Anon:"], sizes["Rss:"] - sizes["Anonymous:"]
    for child in children:
        yield from _tree(int(child))
