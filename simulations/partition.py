"""Rows dealt to simulated clients: IID, Dirichlet, or by a natural field; and the node homes that hold each client's share."""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lichen.common.errors import Code, LichenError

Row = Mapping[str, Any]
_TRIES = 100
_EXAMPLES = "Use iid, dirichlet:0.5 or by:FIELD."


def partition(
    rows: Sequence[Row], kind: str, clients: int | None, seed: int, *, label: str = "label", minimum: int = 10
) -> list[list[int]]:
    """Deal every row to exactly one client, deterministically for a seed.

    Args:
        rows: the training rows.
        kind: ``iid``: shuffled, in shares of equal size. ``dirichlet:ALPHA``: label skew; for each label the shares of the clients are
            one draw of a symmetric Dirichlet(ALPHA) (Hsu et al. 2019, arXiv:1909.06335, in the per-label form of Yurochkin et al. 2019,
            arXiv:1905.12022, as in Flower Datasets); drawn again, up to 100 times, until each client has ``minimum`` rows.
            ``by:FIELD``: one client a value of FIELD, in sorted order.
        clients: how many; for ``by:FIELD`` the number of values, or None.
        seed: of the draw.
        label: the column that ``dirichlet`` skews.
        minimum: fewest rows of a client under ``dirichlet``.

    Returns:
        For each client the indices of its rows, ascending.

    Raises:
        LichenError: PARTITION_INVALID for an unknown kind, an ALPHA that is no positive number, an absent column, a number of clients
            that does not fit, or shares that stay too small.
    """
    if not rows:
        raise _invalid("there are no rows to deal")
    name, _, argument = kind.partition(":")
    if name == "by" and argument:
        parts = _by_field(rows, argument)
        if clients is not None and clients != len(parts):
            raise _invalid(
                f"{argument!r} has {len(parts)} values, but {clients} clients were asked for", "Leave the number of clients out."
            )
        return parts
    if name not in {"iid", "dirichlet"} or (name == "iid" and argument):
        raise _invalid(f"no partition is named {kind!r}", _EXAMPLES)
    if clients is None or not 1 <= clients <= len(rows):
        raise _invalid(f"{len(rows)} rows cannot be dealt to {clients} clients", "Give a number from 1 to the number of rows.")
    generator = np.random.default_rng(seed)
    if name == "iid":
        return [sorted(share.tolist()) for share in np.array_split(generator.permutation(len(rows)), clients)]
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise _invalid(f"{argument!r} is no positive number", _EXAMPLES)
    return _dirichlet(_values(rows, label), alpha, clients, minimum, generator)


def _dirichlet(labels: list[Any], alpha: float, clients: int, minimum: int, generator: np.random.Generator) -> list[list[int]]:
    if clients * minimum > len(labels):
        raise _invalid(f"{len(labels)} rows are too few for {clients} clients of at least {minimum}", "Use fewer clients.")
    members: dict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(labels):
        members[str(value)].append(index)
    for _ in range(_TRIES):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for value in sorted(members):
            shares = generator.dirichlet(np.full(clients, alpha))
            if not np.isfinite(shares).all():  # a tiny α underflows to 0/0: all of the label goes to one client
                shares = np.eye(clients)[generator.integers(clients)]
            shuffled = generator.permutation(members[value])
            cuts = np.floor(np.cumsum(shares)[:-1] * len(shuffled) + 0.5).astype(int)
            for part, piece in zip(parts, np.split(shuffled, cuts), strict=True):
                part.extend(piece.tolist())
        if min(len(part) for part in parts) >= minimum:
            return [sorted(part) for part in parts]
    raise _invalid(
        f"in {_TRIES} draws of dirichlet:{alpha:g} some of the {clients} clients got fewer than {minimum} rows",
        "Use fewer clients or a larger α.",
    )


def _by_field(rows: Sequence[Row], field: str) -> list[list[int]]:
    parts: dict[Any, list[int]] = defaultdict(list)
    for index, value in enumerate(_values(rows, field)):
        parts[value].append(index)
    return [parts[value] for value in sorted(parts, key=lambda value: (isinstance(value, str), value))]


def _values(rows: Sequence[Row], field: str) -> list[Any]:
    values = [row.get(field) for row in rows]
    if any(value is None for value in values):
        has = sorted(rows[0])
        raise _invalid(f"row {values.index(None)} has no {field!r}", f"Its columns: {', '.join(has)}.")
    return values


def _invalid(what: str, fix: str = "") -> LichenError:
    return LichenError(Code.PARTITION_INVALID, what, where="simulation.partition", fix=fix)


def nearest_power_of_two(count: int) -> int:
    """The power of two that is nearest to ``count`` (the larger of two equally near); 1 for less than 1."""
    if count <= 1:
        return 1
    below = 1 << (count.bit_length() - 1)
    return below if count - below < 2 * below - count else 2 * below


def write_node_homes(
    parts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    root: Path,
    *,
    fields: Mapping[str, str] | None = None,
    declared_size: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> list[Path]:
    """Write each client's rows as a node home: ``root/client-0/`` with ``data.parquet`` and ``data.yaml``, and so on.

    Writing again replaces these two files and nothing else in the homes (the accountant's history stays).

    Args:
        parts: the rows of each client, as :func:`partition` deals them.
        rows: all rows; a column is written if the first row has it.
        root: the folder of the homes.
        fields: task field → column; every column under its own name if None.
        declared_size: what every client declares. None: the power of two nearest to its true number of training rows. That choice is
            the simulator's, which sees all data; in a deployment the owner declares a public constant, and lichen never derives it.
        holdout: share (below 1) or number of rows that each client keeps for evaluation; a client that it would leave nothing to train
            on keeps none.
        seed: of the keys that choose the held-out rows, so that a simulation repeats.

    Returns:
        The homes, in the order of ``parts``.

    Raises:
        LichenError: PARTITION_INVALID for a client without rows; OUTPUT_UNUSABLE if the homes cannot be written; DATA_* as
            :func:`lichen.client.data.add_source`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lichen.client.data import Manifest, Source, write_manifest

    homes: list[Path] = []
    columns = {name: name for name in rows[0]} if fields is None else dict(fields)
    for number, part in enumerate(parts):
        if not part:
            raise _invalid(f"client {number} has no rows")
        home = root / f"client-{number}"
        table = pa.Table.from_pylist([dict(rows[index]) for index in part], schema=None)
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            pq.write_table(table, home / "data.parquet.new")
            os.replace(home / "data.parquet.new", home / "data.parquet")
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"cannot write: {error.strerror}", where=str(home)) from None
        key = hashlib.sha256(f"lichen simulation {seed} {number}".encode()).hexdigest()[:32]
        source = Source(path="data.parquet", fields=columns, declared_size=1, holdout=holdout, added_at="1970-01-01T00:00:00+00:00")
        write_manifest(home, Manifest(holdout_key=key, sources=(source,)))
        kept = _training_rows(home)
        if not kept:
            source, kept = source.model_copy(update={"holdout": 0.0}), len(part)
        source = source.model_copy(update={"declared_size": declared_size or nearest_power_of_two(kept)})
        write_manifest(home, Manifest(holdout_key=key, sources=(source,)))
        homes.append(home)
    return homes


def _training_rows(home: Path) -> int:
    from lichen.client.data import check
    from lichen.client.readers import refuse

    report = check(home, limit=1).sources[0]
    if report.bad:
        refuse(report.bad[0])
    return report.train
