"""What a bench starts, as processes of their own: what they say, when they began, and their memory at its peak."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks.memory import of_trees

COHORT = 10
"""Clients of a round."""
SAMPLE_S = 0.2
"""Between two looks at the memory, since no system tells the peak of a whole process tree."""
LOOK_SHARE = 0.05
"""Of a core, for these looks: what is timed needs it. Where they take more they are fewer."""


class Layout(NamedTuple):
    """Processes, and torch's threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}×{self.threads}"


class Ran(NamedTuple):
    """A command that has ended."""

    told: str
    """What its first process printed."""
    began: float
    """When it was started, in seconds of the epoch."""
    memory: int
    """Bytes of all its processes together, at their peak."""


def run(command: Sequence[object], layout: Layout, ranks: Sequence[dict[str, str]] = ({},)) -> Ran:
    """Run a command to its end.

    Args:
        command: a program and its arguments; the second names it in an error.
        layout: the threads that its libraries may take.
        ranks: started once for each, at once, with these variables in its environment.

    Raises:
        LichenError: CHECK_FAILED, if it fails.
    """
    words = [str(word) for word in command]
    sends_nothing = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = os.environ | sends_nothing | {"OMP_NUM_THREADS": str(layout.threads)}
    with ExitStack() as stack:
        # files, not pipes: nobody reads while it runs
        files = [[stack.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in ranks]
        began, memory = time.time(), 0
        started = [
            stack.enter_context(subprocess.Popen(words, env=environment | rank, stdout=out, stderr=err))
            for rank, (out, err) in zip(ranks, files, strict=True)
        ]
        codes: list[int | None] = [None]
        try:
            while None in codes and not any(codes):
                look = time.process_time()
                memory = max(memory, of_trees(process.pid for process in started))
                time.sleep(max(SAMPLE_S, (time.process_time() - look) / LOOK_SHARE))
                codes = [process.poll() for process in started]
        finally:
            for process in started:  # where one has failed, the others would wait for it
                process.terminate()
        for code, (_, err) in zip(codes, files, strict=True):
            if code:
                err.seek(0)
                raise LichenError(Code.CHECK_FAILED, f"{Path(words[1]).name} failed: {err.read()[-500:]}", where="lichen bench simulate")
        files[0][0].seek(0)
        return Ran(files[0][0].read(), began, memory)


def figures(what: str, layout: Layout, ran: Ran, seconds: Sequence[float], first: float) -> dict[str, Any]:
    """A row of a bench's table.

    Args:
        what: was run.
        layout: of its processes.
        ran: how.
        seconds: of each round; the first warms up, and is left out.
        first: when its first client began to train.
    """
    return {
        "what": what,
        "layout": str(layout),
        "updates_per_s": COHORT * len(seconds[1:]) / sum(seconds[1:]),
        "startup_s": first - ran.began,
        "memory_mb": ran.memory / 1e6,
    }
