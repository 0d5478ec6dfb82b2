"""Rows dealt to simulated clients: IID, Dirichlet, or by a natural field."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from lichen.common.errors import Code, LichenError
from lichen.simulations.rows import Groups, Indices, Rows, numbered, values_of

T = TypeVar("T")
_TRIES = 100
_EXAMPLES = "Use iid, dirichlet:0.5 or by:FIELD."


def partition(rows: Rows, kind: str, clients: int | None, seed: int, *, label: str = "label", minimum: int = 10) -> Groups:
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
    if len(rows) == 0:
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
        of = np.empty(len(rows), np.int64)
        share, more = divmod(len(rows), clients)
        _deal(generator.permutation(len(rows)), share + (np.arange(clients) < more), of)
        return Groups(of, clients)
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise _invalid(f"{argument!r} is no positive number", _EXAMPLES)
    return _dirichlet(rows, label, alpha, clients, minimum, generator)


def _dirichlet(rows: Rows, label: str, alpha: float, clients: int, minimum: int, generator: np.random.Generator) -> Groups:
    numbers, labels = numbered(None if value is None else str(value) for value in values_of(rows, label))
    names = _all_there(rows, label, numbers, labels)
    if clients * minimum > len(rows):
        raise _invalid(f"{len(rows)} rows are too few for {clients} clients of at least {minimum}", "Use fewer clients.")
    members = Groups(numbers, len(names))
    of = np.empty(len(rows), np.int64)
    for _ in range(_TRIES):
        for number in sorted(range(len(names)), key=names.__getitem__):
            shares = generator.dirichlet(np.full(clients, alpha))
            if not np.isfinite(shares).all():  # a tiny α underflows to 0/0: all of the label goes to one client
                shares = np.eye(clients)[generator.integers(clients)]
            shuffled = generator.permutation(members[number])
            cuts = np.floor(np.cumsum(shares)[:-1] * len(shuffled) + 0.5).astype(int)
            _deal(shuffled, np.diff(cuts, prepend=0, append=len(shuffled)), of)
        if np.bincount(of, minlength=clients).min() >= minimum:
            return Groups(of, clients)
    raise _invalid(
        f"in {_TRIES} draws of dirichlet:{alpha:g} some of the {clients} clients got fewer than {minimum} rows",
        "Use fewer clients or a larger α.",
    )


def _deal(shuffled: Indices, sizes: Indices, of: Indices) -> None:
    """Give each client its number of the shuffled rows, in turn."""
    of[shuffled] = np.repeat(np.arange(len(sizes)), sizes)


def _by_field(rows: Rows, field: str) -> Groups:
    numbers, found = numbered(values_of(rows, field))
    values = _all_there(rows, field, numbers, found)
    order = sorted(range(len(values)), key=lambda number: (isinstance(values[number], str), values[number]))
    clients = np.empty(len(values), np.int64)
    clients[order] = np.arange(len(values))
    return Groups(clients[numbers], len(values))


def _all_there(rows: Rows, field: str, numbers: Indices, values: list[T | None]) -> list[T]:
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        has = ", ".join(sorted(rows[0]))
        raise _invalid(f"row {np.argmax(numbers == values.index(None))} has no {field!r}", f"Its columns: {has}.")
    return there


def _invalid(what: str, fix: str = "") -> LichenError:
    return LichenError(Code.PARTITION_INVALID, what, where="simulation.partition", fix=fix)
