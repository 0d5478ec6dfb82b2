"""A run's rounds as they appear: on a terminal, in a pipe, and from a directory that is not there yet."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from lichen.common.result import Privacy, Result, Round, Transfer, write_atomically
from lichen.coordinator.watch import bytes_text, conclusion, ended, follow, read_rounds


def rounds(count: int, epsilon: float | None = None) -> list[Round]:
    validation = {"accuracy": 0.5, "macro_f1": 0.25, "loss": 1.0}
    return [
        Round(
            round=n, participants=2, failed=1, validation=validation, epsilon=epsilon, uplink_bytes=1_500, downlink_bytes=10, seconds=1.25
        )
        for n in range(1, count + 1)
    ]


def write(directory: Path, count: int, **more: float) -> None:
    directory.mkdir(exist_ok=True)
    write_atomically(directory / "plan.yaml", "rounds: 3\n")
    write_atomically(directory / "metrics.jsonl", "".join(line.model_dump_json() + "\n" for line in rounds(count, **more)))


def result(status: str) -> Result:
    return Result(
        run_id="7",
        status=status,
        plan_sha256="",
        engine="inprocess",
        seed=0,
        versions={},
        seconds=0,
        final={"split": "test", "accuracy": 0.75},
        privacy=Privacy(unit="none"),
        transfer=Transfer(uplink_bytes=0, downlink_bytes=0),
    )


def test_plain_lines_come_once_each_as_rounds_appear(tmp_path: Path) -> None:
    out, stop = io.StringIO(), threading.Event()
    watcher = threading.Thread(target=follow, args=(tmp_path / "run",), kwargs={"stop": stop, "console": Console(file=out)})
    watcher.start()
    for count in (1, 2):
        write(tmp_path / "run", count)
        until = time.monotonic() + 10
        while f"round {count}" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.02)
    write(tmp_path / "run", 3, epsilon=2.0)
    stop.set()  # the last round was written just before: it is shown nevertheless
    watcher.join(10)
    lines = out.getvalue().splitlines()
    assert lines[0] == "round 1/3, 2 participants, 1 failed, accuracy 0.5000, macro-F1 0.2500, up 1.5 kB, down 10 B, 1.2 s"
    assert [text.split(",")[0] for text in lines] == ["round 1/3", "round 2/3", "round 3/3"]
    assert "ε 2.00" in lines[2]


def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    write(tmp_path, 2)
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    follow(tmp_path, stop=lambda: True, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "macro-F1" in shown
    assert "2/3" in shown


def test_ended(tmp_path: Path) -> None:
    assert not ended(tmp_path)
    for status, over in (("running", False), ("finished", True), ("failed", True), ("stopped", True)):
        write_atomically(tmp_path / "result.json", result(status).model_dump_json())
        assert ended(tmp_path) is over


def test_texts() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 1_500_000, 2_000_000_000)] == ["0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB"]
    assert conclusion(result("finished")) == "finished: test accuracy 0.7500; no differential privacy"


@pytest.mark.parametrize("terminal", [False, True])
def test_of_a_long_run_no_round_is_parsed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    parsed, parse = list[int](), Round.model_validate_json

    def counted(text: str) -> Round:
        parsed.append(1)
        return parse(text)

    looks = iter(range(1, 7))

    def stop() -> bool:
        if (look := next(looks)) == 4:
            write(tmp_path, 301)
        return look == 6

    monkeypatch.setattr(Round, "model_validate_json", counted)
    monkeypatch.setattr("lichen.coordinator.watch.POLL_S", 0.0)
    write(tmp_path, 300)
    out = io.StringIO()
    follow(tmp_path, stop=stop, console=Console(file=out, force_terminal=terminal, width=120, height=40))
    assert len(parsed) == 301
    assert "301/3" in out.getvalue()


def test_rounds_that_are_told_anew_are_shown_as_they_are_now(tmp_path: Path) -> None:
    out, counts = io.StringIO(), iter((3, 2, 4))

    def stop() -> bool:
        write(tmp_path, count := next(counts), epsilon=float(count))
        return count == 4

    follow(tmp_path, stop=stop, console=Console(file=out))
    assert [text.split(",")[0] for text in out.getvalue().splitlines()] == [f"round {number}/3" for number in range(1, 5)]
    assert [round.epsilon for round in read_rounds(tmp_path)] == [4.0] * 4
