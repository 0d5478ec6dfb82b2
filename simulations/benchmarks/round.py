"""`lichen bench round`: the demo's federation as it is deployed, and what of its rounds is neither training nor evaluation."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, find_plan, load_plan
from lichen.simulations.benchmarks.timed import AGENT, COORDINATOR, MODULE, WORKER, Span, read

TARGET = 0.03
"""At most this share of a round without training or evaluation."""
BUSY = frozenset({"train", "evaluate"})
ROLES = {"coordinator": COORDINATOR, "agent": AGENT, "worker": WORKER}
FEWEST = 3
"""Rounds: the first warms up, and the last has no next one whose begin would end it."""

Interval = tuple[float, float]


def bench_round(rounds: int, plan: str = "r8") -> Iterator[dict[str, Any]]:
    """Run a plan with a coordinator and its agents as processes of their own, over mutual TLS, as `lichen demo` does.

    Args:
        rounds: of the run; all but the first and the last are measured, each until the next begins.
        plan: a scenario, or a plan file with a simulation section.

    Yields:
        First the round: medians of its ``seconds``, of what of it is ``not_training_or_evaluating`` as a share (``rest_s`` in seconds),
        with its ``target``, and of what is ``not_training``. Then each part: ``seconds`` a round in which it ran in one process or more,
        ``of_the_rest`` those without training or evaluation, and ``cpu_s`` of the coordinator, or of one agent; in the first round
        ``first_cpu_s``. Parts may lie in others, or beside them.

    Raises:
        LichenError: CHECK_FAILED, if the run did not finish or too few rounds were asked for.
    """
    if rounds < FEWEST:
        raise LichenError(Code.CHECK_FAILED, f"{rounds} rounds: only those between the first and the last are measured", where="--rounds")
    spans = _run(load_plan(find_plan(plan), [f"rounds={rounds}", "aggregation.average_last=1"]))
    begins = sorted(span.began for span in spans if span.part == "round")
    measured = list(itertools.pairwise(begins))[1:]
    rests = _rests(spans, BUSY, measured)
    shares = _shares(rests, measured)
    yield {
        "what": "round",
        "rounds": len(measured),
        "seconds": statistics.median(end - begin for begin, end in measured),
        "not_training_or_evaluating": statistics.median(shares),
        "most": max(shares),
        "rest_s": statistics.median(length(rest) for rest in rests),
        "target": TARGET,
        "not_training": statistics.median(_shares(_rests(spans, frozenset({"train"}), measured), measured)),
    }
    for role, parts in ROLES.items():
        ours = [span for span in spans if span.process.startswith(f"{role} ")]
        yield {"what": f"{role}: all", "cpu_s": statistics.median(_cpu(ours, whole) for whole in measured)}
        for part in parts:
            own = [span for span in ours if span.part == part]
            if own and part != "round":
                yield {"what": f"{role}: {part}", **_figures(own, begins[0], measured, rests)}


def _run(plan: Plan) -> list[Span]:
    from lichen.simulations.demo import federate

    with TemporaryDirectory(prefix="lichen-bench-") as name:
        folder = Path(name) / "times"
        folder.mkdir()
        result = federate(plan, Path(name) / "run", Console(quiet=True), command=(sys.executable, "-m", MODULE, str(folder)))
        if result.status != "finished":
            raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where="lichen bench round")
        return list(read(folder))


def _rests(spans: list[Span], busy: frozenset[str], measured: list[Interval]) -> list[list[Interval]]:
    """What of each round no part that is ``busy`` fills, in any process."""
    filled = union((span.began, span.ended) for span in spans if span.part in busy)
    return [without(whole, filled) for whole in measured]


def _shares(rests: list[list[Interval]], measured: list[Interval]) -> list[float]:
    return [length(rest) / (end - begin) for rest, (begin, end) in zip(rests, measured, strict=True)]


def _cpu(spans: list[Span], whole: Interval) -> float:
    """CPU time of all threads of a process of one kind, between its first parts after two moments."""
    found = []
    for process in {span.process for span in spans}:
        own = sorted((span.began, span.process_cpu) for span in spans if span.process == process)
        before, after = (next((cpu for began, cpu in own if began >= at), None) for at in whole)
        if before is not None and after is not None:
            found.append(after - before)
    return statistics.fmean(found)


def _figures(own: list[Span], start: float, measured: list[Interval], rests: list[list[Interval]]) -> dict[str, Any]:
    """Medians over rounds of one part's figures."""
    ran = union((span.began, span.ended) for span in own)
    figures: dict[str, Any] = {
        "seconds": statistics.median(length(common([whole], ran)) for whole in measured),
        "of_the_rest": statistics.median(length(common(rest, ran)) for rest in rests),
    }
    if all(span.cpu is not None for span in own):
        processes = len({span.process for span in own})
        first, *cpu = (
            sum(span.cpu or 0 for span in own if begin <= span.began < end) / processes
            for begin, end in [(start, measured[0][0]), *measured]
        )
        figures |= {"cpu_s": statistics.median(cpu), "first_cpu_s": first}
    return figures


def told(rows: Sequence[dict[str, Any]]) -> tuple[str, Table]:
    """The figures for people."""
    whole, *parts = rows
    share = whole["not_training_or_evaluating"]
    verdict = "ok" if share <= whole["target"] else "short"
    line = (
        f"a round takes {whole['seconds']:.2f} s (median of {whole['rounds']}); not training or evaluating: {share:.4f} of it, "
        f"{whole['rest_s']:.3f} s (at most {whole['target']:g}: {verdict}); not training: {whole['not_training']:.4f}"
    )
    table = Table(title="where it goes, seconds a round; parts may lie in others, or beside them")
    for column in ("part", "in any process", "not training or evaluating", "CPU, one process", "CPU, first round"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in parts:
        table.add_row(row["what"], *(f"{row[key]:.3f}" if key in row else "" for key in ("seconds", "of_the_rest", "cpu_s", "first_cpu_s")))
    return line, table


# --- intervals ---------------------------------------------------------------------------------------------------------------


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments, in intervals that are apart and in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def common(some: Iterable[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The moments of both."""
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return [(begin, end) for begin, end in pairs if begin < end]


def without(whole: Interval, taken: Sequence[Interval]) -> list[Interval]:
    """The moments of an interval that are in none of ``taken``, which are apart and in order."""
    found, at = [], whole[0]
    for begin, end in common([whole], taken):
        if at < begin:
            found.append((at, begin))
        at = end
    return [*found, (at, whole[1])] if at < whole[1] else found


def length(intervals: Iterable[Interval]) -> float:
    """Seconds of intervals that are apart."""
    return sum(end - begin for begin, end in intervals)
