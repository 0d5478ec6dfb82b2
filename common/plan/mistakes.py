"""What is told of a document that is no plan: each mistake with its path, what was wrong and the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import get_args

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
        line = f"{path or 'plan'}: {_complaint(detail)}"
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


def _complaint(detail: ErrorDetails) -> str:
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
        return _closest(last, _fields_at(parents))
    if detail["type"] == "literal_error":
        options = [option.strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return _closest(str(detail["input"]), options) or (
            None if "none" in options else options[0]
        )  # nobody should be led to less privacy
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
        field = model.model_fields.get(part)
        if field is None:
            return []
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not kinds:
            return []
        model = kinds[0]
    return list(model.model_fields)


def _closest(word: str, options: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(word, options, n=1, cutoff=0.4)
    return found[0] if found else None
