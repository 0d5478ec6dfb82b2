"""`lichen bench agent`: resident memory of a real agent, idle and with the model of the scenario r8 loaded."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from rich.console import Console

from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan

SETTLE_S = 3.0
_MB = 1_000_000


def bench_agent() -> dict[str, float]:
    """Enrol one agent, let it train one round of r8, and read the memory of its processes.

    Returns:
        Megabytes (10^6 bytes) of resident memory: ``idle_mb`` before the first task, ``loaded_mb`` after a round of private training,
        the worker that holds the model included.

    Raises:
        LichenError: CHECK_FAILED, if the round did not succeed.
    """
    from lichen.simulations.demo import federate

    settings = ["rounds=1", "aggregation.average_last=1", "local.steps=2", "privacy.sample_rate=0.02", "cohort.size=1", "cohort.minimum=1"]
    plan = load_plan(find_plan("r8"), [*settings, "simulation.clients=1", "simulation.partition=iid"])
    figures: dict[str, float] = {}

    def observe(state: str, agents: list[int]) -> None:
        time.sleep(SETTLE_S)
        (agent,) = (psutil.Process(pid) for pid in agents)
        processes = [agent, *agent.children(recursive=True)]
        figures[f"{state}_mb"] = sum(process.memory_info().rss for process in processes) / _MB

    with TemporaryDirectory() as directory:
        result = federate(plan, Path(directory) / "run", Console(quiet=True), observe)
    if result.status != "finished":
        raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}", where="lichen bench agent")
    return figures
