"""What is told of a document that is no plan: each mistake with its path, what was wrong and the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lichen.common.errors import Code, LichenError
from lichen.common.plan.plan import Plan


def explain(error: ValidationError, where: str) -> LichenError:
    """The first mistakes of a plan, each with its path, what was wrong and the nearest valid value."""
    told: list[str] = []
    for detail in error.errors(include_url=False):
        if detail["loc"][-1:] == ("str",) and isinstance(detail["input"], dict):
            continue  # it was meant as the other kind, of which the other lines tell
        if detail["type"] == "default_factory_not_called":
            continue  # it was left out, and follows from what the other lines tell of
        path = ".".join(_path(detail))
        line = f"{path or 'plan'}: {complaint(detail)}"
        if hint := _hint(detail):
            line += f" (nearest valid: {hint})"
        if line not in told:
            told.append(line)
    shown = told[:8]
    more = f"\n  … and {len(told) - len(shown)} more" if len(told) > len(shown) else ""
    return LichenError(
        Code.PLAN_INVALID,
        shown[0] if len(told) == 1 else f"{len(told)} mistakes\n  " + "\n  ".join(shown) + more,
        where=where,
        fix="`lichen plan schema` describes every key.",
    )


def _path(detail: ErrorDetails) -> list[str]:
    """The key's path, without pydantic's names for the kinds that a value may be of."""
    return [str(part) for part in detail["loc"] if part not in {"str", "DataSource"} and not str(part).startswith("function-before[")]


def complaint(detail: ErrorDetails) -> str:
    """What is wrong with a value, and the value."""
    if detail["type"] == "extra_forbidden":
        return "unknown key"
    if detail["type"] == "missing":
        return "required, but missing"
    value = detail["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f", not {value!r}"
    return detail["msg"].removeprefix("Value error, ") + shown


def _hint(detail: ErrorDetails) -> str | None:
    context = detail.get("ctx", {})
    if detail["type"] == "extra_forbidden":
        *parents, last = _path(detail)
        return closest(last, _fields_at(parents))
    if detail["type"] == "literal_error":
        options = [option.strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")]
        # the message lists them all: a far guess that is followed would be another plan, perhaps one with less privacy
        return options[0] if len(options) == 1 else closest(str(detail["input"]), options, cutoff=0.6)
    for bound in ("ge", "le"):
        if bound in context:
            return str(context[bound])
    for bound, side in (("gt", "just above"), ("lt", "just below")):
        if bound in context:
            return f"{side} {context[bound]}"
    return None


def _fields_at(path: Iterable[str]) -> list[str]:
    model: type[BaseModel] = Plan
    for part in path:
        if part.isdecimal():
            continue  # a place in a list, whose elements the field's kind tells
        field = model.model_fields.get(part)
        found = None if field is None else next(_sections_in(field.annotation), None)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _sections_in(kind: Any) -> Iterator[type[BaseModel]]:
    """What a value of this kind may be, or an element of it."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _sections_in(part)


def closest(word: str, options: Iterable[str], cutoff: float = 0.4) -> str | None:
    """The option that a word was perhaps meant as, whatever its case: the most alike, or the only one that begins so; None if none is."""
    lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    if not found and word:
        found = [option for option in lower if option.startswith(word.lower())]
    return lower[found[0]] if len(found) == 1 else None
