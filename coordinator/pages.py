"""Self-contained pages for people: templates with one look, and values in words."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.statement import bound_text
from lichen.common.result import metric_title, write_atomically
from lichen.coordinator import charts

NONE = "–"


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder, every value escaped, and write it whole.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if it can't be written.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files("lichen.coordinator").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: NONE if value is None else f"{value:,}",
        "metric": metric,
        "epsilon": epsilon,
        "bits": lambda value: NONE if value is None else f"{value:.3g}",
        "delta": delta,
        "bytes": size,
        "duration": duration,
        "title": metric_title,
    }
    page = environment.get_template(template).render(size=charts, **values)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(path)) from None


# --- values in words ---


def metric(value: object) -> str:
    """A score or a loss, to four places."""
    if isinstance(value, float | int):
        return f"{value:.4f}" if math.isfinite(value) else NONE
    return NONE if value is None else str(value)


def epsilon(value: float | None) -> str:
    """An ε to three places, rounded up: a bound must not read lower than it is."""
    return NONE if value is None else bound_text(value)


def delta(value: float | None) -> str:
    """A δ, such as 1e-5."""
    return NONE if value is None else re.sub(r"e-0*", "e-", f"{value:g}")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return NONE
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if (scaled := value / 10**power) >= 0.9995:
            return f"{scaled:,.0f} {unit}" if scaled >= 999.5 else f"{scaled:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds in hours, minutes and seconds."""
    if seconds is None:
        return NONE
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
