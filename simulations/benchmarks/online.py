"""`lichen bench online`: an online run of a deployed federation, to whose agents files come: how soon batches begin, and what is in two."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lichen.client.ledger import Ledger
from lichen.common.errors import Code, LichenError
from lichen.common.plan import find_plan, load_plan
from lichen.simulations.deliveries import Deliveries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lichen.common.plan import Plan

TARGET_S = 5.0
"""At most, from the file that makes enough until a batch begins."""


def bench_online(batches: int, plan: str = "r8-online", settings: Sequence[str] = ()) -> dict[str, Any]:
    """Run a plan as `lichen demo` does, and let files come to as many agents as it waits for, each time to others; old ones are renamed.

    Args:
        batches: how many.
        plan: a scenario, or a plan file, with `privacy.unit: example`, whose ledger tells what was read.
        settings: of the plan, ``key.path=value``.

    Returns:
        ``seconds`` by batch until it began, with their ``target``; ``by_renamed``: batches that began though files were only renamed;
        ``segments`` of the agents' ledgers, and those ``in_two`` batches; ``participants`` by round; the test ``accuracy``.

    Raises:
        LichenError: CHECK_FAILED, if the run did not finish.
    """
    from lichen.simulations.demo import federate

    loaded = load_plan(find_plan(plan), settings)
    each = loaded.continual.online.rounds
    loaded = load_plan(find_plan(plan), [*settings, f"rounds={batches * each}"])
    made: list[Deliveries] = []

    def deliver(asked: Plan, homes: Sequence[Path]) -> Deliveries:
        made.append(Deliveries(asked, homes))
        return made[0]

    with TemporaryDirectory(prefix="lichen-bench-") as name:
        result = federate(loaded, Path(name) / "run", Console(quiet=True), deliver=deliver)
        if result.status != "finished":
            raise LichenError(Code.CHECK_FAILED, f"the run ended as {result.status}: {result.error}", where="lichen bench online")
        read = [batches for home in sorted((Path(name) / "run" / "nodes").glob("client-*")) for batches in _batches_of_segments(home, each)]
    return {
        "seconds": [begin.seconds for begin in made[0].begun],
        "target": TARGET_S,
        "by_renamed": made[0].early,
        "segments": len(read),
        "in_two": sum(len(batches) > 1 for batches in read),
        "participants": [told.participants for told in result.rounds],
        "accuracy": (result.final or {}).get("accuracy"),
    }


def _batches_of_segments(home: Path, each: int) -> list[set[int]]:
    """The batches in which each data segment of a home's ledger was read."""
    with Ledger(home) as ledger:
        found: dict[int, set[int]] = {}
        for entry in ledger.entries():
            for number in entry.charged:
                found.setdefault(number, set()).add((entry.round - 1) // each)
    return list(found.values())


def told(figures: dict[str, Any]) -> str:
    """The figures for people."""
    verdict = "ok" if max(figures["seconds"]) <= figures["target"] else "short"
    seconds = ", ".join(f"{value:.2f}" for value in figures["seconds"])
    return "\n".join(
        [
            f"batches began {seconds} s after the file that made enough (at most {figures['target']:g}: {verdict})",
            f"began by renamed files: {figures['by_renamed']}; segments read: {figures['segments']}, in two batches: {figures['in_two']}",
            f"participants by round: {', '.join(map(str, figures['participants']))}; test accuracy {figures['accuracy']:.4f}",
        ]
    )
