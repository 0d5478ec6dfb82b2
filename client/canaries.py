"""Which canaries of a run this node trained on: a secret of its home, made by coins of its own, that is never sent.

A canary is a made-up row of the run's task, with a random target; see `privacy.audit` in the plan. Everybody can make them again by their
key. What an auditor of a finished run must tell is which of them were in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lichen.common.errors import Code, LichenError
from lichen.common.private_files import write_private

if TYPE_CHECKING:
    from lichen.common.plan import Plan
    from lichen.common.privacy.randomness import RandomSource

FOLDER = "canaries"
FORMAT: Final = 1


@dataclass(frozen=True)
class Canaries:
    """What is kept of a run's canaries."""

    client: str
    """The node's name in that run."""
    count: int
    included: tuple[int, ...]
    """Indices of those that were trained on."""


def key(plan: Plan, client: str) -> str:
    """What the canaries of a client are made from; public."""
    return f"canaries|{plan.seed}|{client}"


def keep(home: Path, plan: Plan, run: str, client: str, source: RandomSource) -> Canaries:
    """The canaries of a run: as they were drawn in its first round, or drawn now, and on the disk before one of them is used.

    Args:
        home: the node's home.
        plan: says how many.
        run: the run's name.
        client: the node's name.
        source: of the coins; secret but in a simulation.

    Raises:
        LichenError: PRIVACY_HISTORY, if the file is damaged or tells of others.
    """
    found = read(home, run)
    if found is None:
        coins = (source.uniform(plan.privacy.audit.canaries) < 0.5).tolist()
        found = Canaries(client, len(coins), tuple(index for index, heads in enumerate(coins) if heads))
        document = {"format": FORMAT, "run": run, "client": client, "count": found.count, "included": found.included}
        write_private(_path(home, run), json.dumps(document).encode())
    if (found.client, found.count) != (client, plan.privacy.audit.canaries):
        raise LichenError(Code.PRIVACY_HISTORY, f"it tells of {found.count} canaries of {found.client!r}", where=str(_path(home, run)))
    return found


def read(home: Path, run: str) -> Canaries | None:
    """What is kept of a run's canaries; None where this home has none.

    Raises:
        LichenError: PRIVACY_HISTORY, if the file is damaged or of a newer lichen.
    """
    path = _path(home, run)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or not all(0 <= index < document["count"] for index in document["included"]):
            raise ValueError("of another format")
        return Canaries(document["client"], document["count"], tuple(document["included"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LichenError(Code.PRIVACY_HISTORY, f"can't be read: {error}", where=str(path), fix="The canaries can't be audited.") from None


def _path(home: Path, run: str) -> Path:
    return home / FOLDER / f"{run}.json"
