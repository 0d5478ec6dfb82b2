"""`lichen bench fleet`: time to an accuracy with one agent of four at a quarter of the speed, by each way not to wait for it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.console import Console

from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan
from lichen.common.result import Result
from lichen.simulations.benchmarks.throttle import throttled

SPEEDS = (1.0, 1.0, 1.0, 0.25)
TARGET = 0.6
"""At most this share of plain synchronous rounds' time."""
USED = 0.75
"""Share of the machine's cores that the workers get together: the rest is for scoring, and for the agents themselves."""
DEADLINE = 0.35
"""Of a plain synchronous round, which takes as long as the slow agent; the others need a quarter of it, and some more."""
FASTEST = 3
"""Updates of a round of first come, and of a buffered step."""
MODES = ("synchronous", "deadline", "oversample", "buffered")


def bench_fleet(
    rounds: int, accuracy: float, modes: Sequence[str], plan: str = "r8-no-privacy", settings: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Run a plan with a coordinator and four agents as processes of their own, over mutual TLS, once for each mode.

    All modes do about as much work: the others than plain rounds, which leave out the slow agent's updates or some of their steps, have
    more rounds. Scores come every other round, so that scoring holds nobody up.

    Args:
        rounds: of the synchronous modes.
        accuracy: on the validation split, to be reached.
        modes: of `MODES`; plain synchronous rounds, which the others are held against, always run first.
        plan: a scenario, or a plan file with a simulation section of four clients.
        settings: of the plan, ``key.path=value``, for all modes; a mode's own come after them.

    Yields:
        For each mode its ``rounds`` and ``round_s`` (median), ``seconds`` until the accuracy was reached (None: never), the
        ``best`` accuracy, ``ratio`` to plain synchronous rounds' seconds, its ``target`` (None for those), how many ``updates`` were
        used, and how many clients ``failed`` or were ``unneeded``, over all rounds.

    Raises:
        LichenError: CHECK_FAILED, if a run did not finish.
    """
    plain: dict[str, Any] | None = None
    for mode in ("synchronous", *(mode for mode in MODES[1:] if mode in modes)):
        row = _row(mode, _run(plan, [*settings, *_settings(mode, rounds, plain)]), accuracy)
        if plain is None:
            plain = row
        elif row["seconds"] is not None and plain["seconds"]:
            row |= {"ratio": row["seconds"] / plain["seconds"], "target": TARGET}
        yield row


def _settings(mode: str, rounds: int, plain: dict[str, Any] | None) -> list[str]:
    count = rounds if mode == "synchronous" else -(-rounds * len(SPEEDS) // FASTEST)
    base = ["evaluation.every=2", "aggregation.average_last=1", f"rounds={count}"]
    round_s = plain["round_s"] if plain else 0.0
    own: dict[str, list[str]] = {
        "synchronous": [],
        "deadline": ["cohort.minimum=1", "local.partial=true", f"cohort.deadline_s={DEADLINE * round_s:.2f}"],
        "oversample": [f"cohort.size={FASTEST}", f"cohort.minimum={FASTEST}", "cohort.oversample=1.3"],
        "buffered": ["cohort.mode=buffered", f"cohort.buffer={FASTEST}", "cohort.minimum=1"],
    }
    return base + own[mode]


def _run(plan: str, settings: list[str]) -> Result:
    from lichen.simulations.demo import federate

    found = load_plan(find_plan(plan), settings)
    if found.simulation.clients != len(SPEEDS):
        raise LichenError(Code.CHECK_FAILED, f"{len(SPEEDS)} clients are due, not {found.simulation.clients}", where="simulation.clients")
    share = min(1.0, USED * (psutil.cpu_count() or 1) / sum(SPEEDS))
    with TemporaryDirectory(prefix="lichen-bench-") as name, ExitStack() as stack:

        def observe(state: str, agents: list[int]) -> None:
            if state == "idle":
                stack.enter_context(throttled({agent: share * speed for agent, speed in zip(agents, SPEEDS, strict=True)}))
            else:
                stack.close()

        result = federate(found, Path(name) / "run", Console(quiet=True), observe)
    if result.status != "finished":
        raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where="lichen bench fleet")
    return result


def _row(mode: str, result: Result, accuracy: float) -> dict[str, Any]:
    seconds, passed = None, 0.0
    for told in result.rounds:
        passed += told.seconds or 0.0
        if seconds is None and told.validation and (told.validation["accuracy"] or 0.0) >= accuracy:
            seconds = passed
    scores = [told.validation["accuracy"] or 0.0 for told in result.rounds if told.validation]
    return {
        "mode": mode,
        "rounds": len(result.rounds),
        "round_s": statistics.median(told.seconds or 0.0 for told in result.rounds),
        "seconds": seconds,
        "best": max(scores, default=None),
        "ratio": None,
        "target": None,
        "updates": sum(told.participants or 0 for told in result.rounds),
        "failed": sum(told.failed or 0 for told in result.rounds),
        "unneeded": sum(told.unneeded for told in result.rounds),
    }
