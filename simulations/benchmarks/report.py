"""`BENCHMARKS.md`: a short form of every bench, each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.common.result import write_atomically

SHORT = (
    ("privacy", "--repeats", "3", "--lengths", "64", "--no-hooks"),
    ("step", "--rows", "96", "--repeats", "1"),
    ("base", "--rows", "64", "--repeats", "1"),
    ("simulate", "--rounds", "3"),
    ("simulate", "--small", "--rounds", "3"),
    ("scale",),
    ("aggregate",),  # smaller updates would fit in a cache
    ("transfer", "--parameters", "4000000", "--repeats", "2"),
    ("channel", "--rounds", "100", "--megabytes", "50"),
    ("agent",),
    ("profile", "--adapter", "lora,full", "--sizes", "16x128"),
    ("round", "--rounds", "4"),
    ("online", "--batches", "2"),
)
"""Each bench with the options that make it short."""
NOTE = """\
Written by `make bench`: a short form of every bench, one after another, of which single figures swing by several parts in a hundred on a
machine that others use too. What a figure is, `lichen bench NAME --help` and docs/design.md say; README.md has those of the long forms.
"""


def bench_report(file: Path, tell: Callable[[str], None]) -> None:
    """Run every bench in short, and write what they found.

    Args:
        file: what to write; it is replaced when all have run.
        tell: called with each command before it runs.

    Raises:
        LichenError: CHECK_FAILED, if one fails; OUTPUT_UNUSABLE, if the file can't be written.
    """
    parts = [f"# Benchmarks\n\n{NOTE}\n{_machine()}\n"]
    for options in SHORT:
        command = " ".join(["lichen bench", *options])
        tell(command)
        parts.append(f"## `{command}`\n\n{table(_run(options))}")
    try:
        write_atomically(file, "\n".join(parts))
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error.strerror}", where=str(file)) from None


def table(found: Any) -> str:
    """Rows, or one of them, as a table in Markdown; a column for each key that a row has."""
    rows = found if isinstance(found, list) else [found]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _run(options: tuple[str, ...]) -> Any:
    command = [sys.executable, "-m", "lichen.common.cli", "bench", *options, "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    if found.returncode:
        raise LichenError(Code.CHECK_FAILED, f"ended with {found.returncode}", where=" ".join(["lichen bench", *options]))
    return json.loads(found.stdout)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, torch {version('torch')}, lichen {version('lichen')}"
    return f"{date.today()}, {cores} cores ({model}), {versions}."
