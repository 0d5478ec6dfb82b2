"""`lichen bench transfer --large`: the coordinator's memory while two agents tune every weight of a model of a gigabyte.

A real federation of processes, on made-up rows. What the coordinator needs whatever the model (torch, transformers, its service) is
taken off: that is the same run's peak with a model of a million parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.simulations.benchmarks.memory import resident
from lichen.simulations.benchmarks.small_model import make_small_model

ROUNDS = 3
LAYERS, WIDTH = 20, 1024
"""Of the large model: 256 million parameters, 1.02 GB."""
SPARE_MB = 100
"""What the coordinator may take beside one model, in 10^6 bytes."""
_MB = 1e6
_EVERY_S = 0.02


def bench_large_update(uplink: str = "eden", layers: int = LAYERS, width: int = WIDTH) -> Iterator[dict[str, Any]]:
    """Run both federations.

    Args:
        uplink: the codec of updates.
        layers: of the large model.
        width: the same.

    Yields:
        For the small and the large model: ``model_mb`` (its 32-bit floats), ``own_mb`` (the coordinator's memory at its peak, without
        mapped files, which the system takes back when it needs them), ``peak_mb`` (with them), ``seconds`` and bits a parameter up and down
        (``up_bits``, ``down_bits``, of an update and of a model sent after the first round). For the large one also ``over_mb``, its
        ``own_mb`` less the small one's, and the ``target`` of that: one model and `SPARE_MB`.

    Raises:
        LichenError: CHECK_FAILED, if a run did not finish.
    """
    with TemporaryDirectory(prefix="lichen-bench-") as name:
        small = _run(make_small_model(Path(name) / "small"), Path(name) / "a", uplink)
        yield {"what": "small", **small}
        large = _run(make_small_model(Path(name) / "large", layers, width), Path(name) / "b", uplink)
        over = large["own_mb"] - small["own_mb"]
        yield {"what": "large", **large, "over_mb": over, "target": large["model_mb"] + SPARE_MB}


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    line = (
        f"a model of {row['model_mb']:.0f} MB tuned whole by 2 agents, {ROUNDS} rounds, {row['seconds']:.0f} s: the coordinator's memory at"
        f" its peak {row['own_mb']:.0f} MB, with mapped files {row['peak_mb']:.0f} MB; bits a parameter {row['up_bits']:.2f} up,"
        f" {row['down_bits']:.2f} down"
    )
    return line + (f"; {row['over_mb']:.0f} MB over the small one (at most {row['target']:.0f})" if "over_mb" in row else "")


def _plan(base: Path, uplink: str) -> Plan:
    return parse_plan(
        {
            "name": "bench-large",
            "rounds": ROUNDS,
            "task": {"labels": ["crop", "metal", "money"], "max_length": 16},
            "model": {"base": str(base), "adapter": {"kind": "full"}},
            "cohort": {"size": 2, "minimum": 2, "deadline_s": 1800},
            "local": {"steps": 1, "batch_size": 1, "optimizer": "sgd", "betas": [0.0, 0.999], "learning_rate": 1e-3},
            "transfer": {"uplink": {"codec": uplink}},
            "evaluation": {"validation_fraction": 0},
            "simulation": {"clients": 2, "data": "made-up:40"},
        }
    )


def _run(base: Path, out: Path, uplink: str) -> dict[str, Any]:
    from lichen.simulations.demo import federate

    own: list[int] = []
    done = threading.Event()
    found: dict[str, Any] = {}
    watch: list[threading.Thread] = []

    def observe(state: str, agents: list[int]) -> None:
        coordinator = _coordinator(agents)
        if state == "idle":
            watch.append(threading.Thread(target=_sample, args=(coordinator, own, done), daemon=True))
            watch[0].start()
        else:
            done.set()
            found["peak_mb"] = resident("VmHWM", coordinator) / _MB

    try:
        result = federate(_plan(base, uplink), out, Console(quiet=True), observe)
    finally:
        done.set()
    if result.status != "finished":
        raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where="lichen bench transfer --large")
    parameters = result.parameters or 0
    down = [told.downlink_bytes or 0 for told in result.rounds[1:]]
    return {
        "model_mb": 4 * parameters / _MB,
        "own_mb": max(own) / _MB,
        **found,
        "seconds": result.seconds,
        "up_bits": result.transfer.bits_per_parameter,
        "down_bits": 8 * sum(down) / len(down) / 2 / parameters,
    }


def _coordinator(agents: list[int]) -> int:
    """The process that serves, among this one's children."""
    return next(
        child.pid for child in psutil.Process().children() if child.pid not in agents and {"coordinator", "serve"} <= set(child.cmdline())
    )


def _sample(pid: int, own: list[int], done: threading.Event) -> None:
    while not done.wait(_EVERY_S):
        own.append(resident("RssAnon", pid))
