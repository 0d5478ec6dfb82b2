"""A run as it goes on: a live table on a terminal, one plain line a round elsewhere. Reads only the run directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lichen.common.errors import LichenError
from lichen.common.privacy.statement import bound_text
from lichen.common.result import Result, Round, metric_title, read_result

POLL_S = 0.25
_BORDER_LINES = 8


def follow(
    directory: Path,
    *,
    stop: Callable[[], bool] | threading.Event,
    console: Console | None = None,
    within: Callable[[], str] | None = None,
) -> None:
    """Show the rounds of a run until ``stop``, then once more what is there, and return.

    Args:
        directory: the run directory; it may not be there yet.
        stop: true, or set, when nothing more will come (`ended` tells it of a run in another process).
        console: where to show them; standard output if None. A live table if it is a terminal, else one line a round.
        within: what the round under way is about, for the live table.
    """
    console = console or Console()
    stopped = stop.is_set if isinstance(stop, threading.Event) else stop
    began, told_so_far = time.monotonic(), _Told(directory)
    rounds, told = _total(directory), 0
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            while True:
                last = stopped()
                rounds = rounds or _total(directory)
                done = told_so_far.rounds()
                seconds = None if last else time.monotonic() - began
                live.update(_live(done, rounds, seconds, console.height, within() if within else ""))
                if last:
                    return
                time.sleep(POLL_S)
    while True:
        last = stopped()
        rounds = rounds or _total(directory)
        for round in told_so_far.rounds():
            if round.round > told:
                console.print(line(round, rounds), soft_wrap=True, markup=False, highlight=False)
                told = round.round
        if last:
            return
        time.sleep(POLL_S)


def ended(directory: Path) -> bool:
    """Whether the run directory's result says that the run is over."""
    try:
        return read_result(directory).status != "running"
    except LichenError:
        return False


def read_rounds(directory: Path) -> list[Round]:
    """The rounds that `metrics.jsonl` tells of so far."""
    return _Told(directory).rounds()


class _Told:
    """What `metrics.jsonl` tells, for who asks again and again: of 10,000 rounds none is parsed twice."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "metrics.jsonl"
        self._seen: tuple[int, int, int] | None = None
        self._text = ""
        self._rounds: list[Round] = []

    def rounds(self) -> list[Round]:
        """Those so far."""
        try:
            about = self._path.stat()
            seen = about.st_ino, about.st_mtime_ns, about.st_size
            if seen != self._seen:
                self._read(self._path.read_text(encoding="utf-8"))
                self._seen = seen
        except (OSError, ValidationError):
            return []
        return self._rounds

    def _read(self, text: str) -> None:
        known = len(self._text) if text.startswith(self._text) else 0  # a run that was resumed may tell its last rounds anew
        added = [Round.model_validate_json(line) for line in text[known:].splitlines()]
        self._text, self._rounds = text, [*(self._rounds if known else []), *added]


def table(rounds: list[Round], total: int | None = None, *, title: str | None = None) -> Table:
    """Rounds as a table: participants, failures, validation metrics, ε, bytes and seconds.

    Args:
        rounds: those to show.
        total: of the plan, for the caption of the first column.
        title: above the table.
    """
    shown = Table(title=title, header_style="bold")
    for name in ("round", "participants", "failed", "accuracy", "macro-F1", "loss", "ε", "up", "down", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    for round in rounds:
        scores = round.validation or {}
        shown.add_row(
            f"{round.round}/{total}" if total else str(round.round),
            "–" if round.participants is None else str(round.participants),
            Text("–" if round.failed is None else str(round.failed), style="red" if round.failed else ""),
            _number(scores.get("accuracy"), ".4f"),
            _number(scores.get("macro_f1"), ".4f"),
            _number(scores.get("loss"), ".3f"),
            _number(round.epsilon, ".2f"),
            bytes_text(round.uplink_bytes),
            bytes_text(round.downlink_bytes),
            _number(round.seconds, ".1f"),
        )
    return shown


def line(round: Round, total: int | None = None) -> str:
    """A round as one line of text."""
    parts = [f"round {round.round}" + (f"/{total}" if total else "")]
    if round.participants is not None:  # under unit: client nothing that tells of the cohort is shown
        parts += [f"{round.participants} participants", f"{round.failed} failed"]
    scores = round.validation or {}
    parts += [f"{metric_title(key)} {scores[key]:.4f}" for key in ("accuracy", "macro_f1") if key in scores]
    if round.epsilon is not None:
        parts.append(f"ε {bound_text(round.epsilon, 2)}")
    if round.seconds is not None:
        parts += [f"up {bytes_text(round.uplink_bytes)}", f"down {bytes_text(round.downlink_bytes)}", f"{round.seconds:.1f} s"]
    return ", ".join(parts)


def conclusion(result: Result) -> str:
    """How a run ended, in one line."""
    told: str = result.status
    if result.final:
        scores = (f"{key} {value:.4f}" for key, value in result.final.items() if isinstance(value, float))
        told += f": {result.final['split']} {', '.join(scores)}"
    if result.continual and (withheld := result.continual.not_given_out()):
        told += f"; {withheld}"
    if result.privacy.unit == "none":
        told += "; no differential privacy"
    elif result.privacy.max_epsilon is not None:
        told += f"; ε at most {bound_text(result.privacy.max_epsilon, 2)}"
    return f"{told}: {result.error}" if result.error else told


def bytes_text(count: int | None) -> str:
    """Bytes for people: `512 B`, `1.4 MB`."""
    if count is None:
        return "–"
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _live(rounds: list[Round], total: int | None, seconds: float | None, height: int, within: str) -> RenderableType:
    shown = table(rounds[-max(3, height - _BORDER_LINES) :], total)
    if seconds is None:
        return shown
    number = rounds[-1].round + 1 if rounds else 1
    what = "finishing" if total and number > total else f"round {number}" + (f" of {total}" if total else "")
    return Group(shown, Spinner("dots", text=f"{what}{': ' if within else ''}{within} … {seconds:.0f} s"))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _total(directory: Path) -> int | None:
    try:
        found = yaml.safe_load((directory / "plan.yaml").read_text(encoding="utf-8"))
        return int(found["rounds"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
