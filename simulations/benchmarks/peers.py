"""The same work on other simulators, beside `lichen simulate`."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lichen.simulations.benchmarks.runs import COHORT, Layout, figures, run

INSTALL = "pip install 'lichen[peers]'"


class Peer(NamedTuple):
    """Another simulator."""

    name: str
    module: str
    """Without which it is not installed."""
    script: str
    faster: float
    """So many times its updates a second are ours to be, at least."""
    private: bool = False
    memory: float | None = None
    """So many times its memory is ours to be, at most."""

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return find_spec(self.module) is not None


PEERS = (
    Peer("pfl-research", "pfl", "peer_pfl.py", 1.3),
    Peer("Flower on Ray", "ray", "peer_flower.py", 1.3, memory=0.5),
    Peer("Flower on Ray, Opacus", "ray", "peer_flower.py", 1.4, private=True),
)


def run_peer(peer: Peer, folder: Path, cores: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the work in ``folder`` on a peer, which leaves its model there as ``peer.safetensors``.

    Args:
        peer: which.
        folder: has ``work.json`` and ``start.safetensors``.
        cores: one process each.

    Returns:
        The row of its figures, and what its script told.

    Raises:
        LichenError: CHECK_FAILED, if it fails.
    """
    script = Path(__file__).with_name(peer.script)
    files = [folder / name for name in ("work.json", "start.safetensors", "peer.safetensors")]
    ranks: list[dict[str, str]] = [{}]
    if peer.module == "pfl":
        # it deals a cohort's clients in turn, and would lose count of those that are over
        cores = max(count for count in range(1, cores + 1) if COHORT % count == 0)
        addresses = ",".join(f"127.0.0.1:{port}" for port in _free_ports(cores))
        if cores > 1:
            ranks = [{"PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)} for rank in range(cores)]
    layout = Layout(cores, 1)
    ran = run([sys.executable, script, *files, layout.threads, *(["private"] if peer.private else [])], layout, ranks)
    told = json.loads(next(line for line in reversed(ran.told.splitlines()) if line.startswith("{")))
    return figures(peer.name, layout, ran, told["seconds"], told["first"]), told


def beside(ours: dict[str, Any], theirs: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """What a peer's row says of ours: how many times faster, smaller and sooner ready we are, beside what we aim at."""
    found = {
        "beside": ours["what"],
        "ours_over": ours["updates_per_s"] / theirs["updates_per_s"],
        "ours_target": peer.faster,
        "ten_rounds_over": _ten_rounds(theirs) / _ten_rounds(ours),
        "startup_over": theirs["startup_s"] / ours["startup_s"],
        "memory_share": ours["memory_mb"] / theirs["memory_mb"],
    }
    return found | ({} if peer.memory is None else {"memory_target": peer.memory})


def _ten_rounds(row: dict[str, Any]) -> float:
    """Seconds from the command's start to the end of ten rounds."""
    return float(row["startup_s"] + 10 * COHORT / row["updates_per_s"])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]
