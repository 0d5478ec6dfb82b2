"""The page of a run is whole and honest for every state of a run, and safe whatever others called themselves."""

from __future__ import annotations

import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.result import ClientPrivacy, Continual, Privacy, Result, Round, Transfer
from lichen.coordinator.charts import HEIGHT, WIDTH, chart
from lichen.coordinator.pages import duration, epsilon, metric, size
from lichen.coordinator.report import app, write_report

LABELS = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]
PARAMETERS = 78_344
CARD = '---\nlibrary_name: peft\n---\n\n# r8\n\n```python\nlabels = ["acq", "<earn>"]\nprint(labels)\n```\n'
VOID = {"meta", "line", "br", "link", "img"}


def plan_of(rounds: int, clients: int, *, private: bool, **more: Any) -> Plan:
    return parse_plan(
        {
            "name": "r8",
            "seed": 7,
            "rounds": rounds,
            "task": {"labels": LABELS},
            "model": {"base": "sentence-transformers/all-MiniLM-L6-v2", "adapter": {"kind": "lora", "rank": 8}},
            "cohort": {"size": clients, "minimum": 1},
            "local": {"steps": 30, "batch_size": 32, "learning_rate": 1e-3},
            "privacy": {"unit": "example", "epsilon": 8, "delta": 1e-5, "sample_rate": 0.05} if private else {},
            "simulation": {"clients": clients, "partition": "dirichlet:0.5", "data": "r8"},
        }
        | more
    )


def rounds_of(count: int, clients: int, *, private: bool, validation: bool = True) -> list[Round]:
    found = []
    for number in range(1, count + 1):
        progress = 1 - math.exp(-4 * number / count)
        errors: dict[str, int | None] = {"client-2": 103, "client-3": None} if number == 2 and clients > 3 else {}
        scores = {"accuracy": 0.5 + 0.46 * progress, "macro_f1": 0.1 + 0.8 * progress, "loss": 1.9 - 1.7 * progress}
        used = clients - len(errors)
        found.append(
            Round(
                round=number,
                participants=used,
                failed=len(errors),
                errors=errors,
                train_loss=None if private else 2.0 - 1.85 * progress,
                validation=scores if validation else None,
                epsilon=7.9873 * math.sqrt(number / count) if private else None,
                uplink_bytes=used * PARAMETERS * 4,
                downlink_bytes=clients * PARAMETERS * 4,
                seconds=21.337 + number % 3,
            )
        )
    return found


def make(
    directory: Path,
    *,
    rounds: int = 5,
    done: int | None = None,
    clients: int = 4,
    private: bool = True,
    validation: bool = True,
    **more: Any,
) -> Result:
    """A run directory as a run leaves it, with figures like those of R8 with MiniLM."""
    plan = plan_of(rounds, clients, private=private, **more.pop("plan", {}))
    told = rounds_of(rounds if done is None else done, clients, private=private, validation=validation)
    spent = {
        f"client-{index}": ClientPrivacy(
            epsilon=7.9873 - index / 1000,
            epsilon_sum=7.9873 - index / 1000,
            steps=30 * len(told),
            noise_multiplier=0.8731,
            sample_rate=0.05,
            segments={"train": 7.9873 - index / 1000},
        )
        for index in range(clients)
    }
    finished = len(told) == rounds
    values = {
        "run_id": "8123",
        "status": "finished" if finished else "running",
        "plan_sha256": plan.sha256(),
        "engine": "deployed",
        "seed": plan.seed,
        "versions": {"python": "3.11.2", "lichen": "0.1.0", "flwr": "1.42.0", "torch": "2.13.0", "opacus": "1.6.0"},
        "seconds": sum(line.seconds for line in told),
        "parameters": PARAMETERS,
        "rounds": told,
        "final": {"split": "test", "accuracy": 0.9461, "macro_f1": 0.7218, "loss": 0.2107} if finished and validation else None,
        "privacy": Privacy(
            unit="example",
            adjacency="add/remove",
            delta=1e-5,
            max_epsilon=told[-1].epsilon if told else 0.0,
            noise="secret",
            clients=spent if told else {},
        )
        if private
        else Privacy(unit="none"),
        "transfer": Transfer(
            uplink_bytes=sum(line.uplink_bytes for line in told),
            downlink_bytes=sum(line.downlink_bytes for line in told),
            bits_per_parameter=32.02 if told else None,
            ratio_to_fp32=1.0007 if told else None,
        ),
    } | more
    result = Result.model_validate(values)
    directory.mkdir(exist_ok=True)
    (directory / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    (directory / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if finished:
        (directory / "model").mkdir(exist_ok=True)
        (directory / "model" / "README.md").write_text(CARD, encoding="utf-8")
    return result


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text, the tags and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.attributes: set[str] = set()
        self.told: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.told.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.told).split())


def page_of(directory: Path) -> Page:
    assert write_report(directory) == directory / "report.html"
    assert not list(directory.glob("*.tmp"))
    text = (directory / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    return page


def test_a_finished_private_run(tmp_path: Path) -> None:
    result = make(tmp_path)
    page = page_of(tmp_path)
    for said in (
        *("r8", "sentence-transformers/all-MiniLM-L6-v2", "LoRA, rank 8, α 16", "finished, 5 of 5 rounds in", "mutual TLS", "torch 2.13.0"),
        *(
            "4 asked in each round",
            result.plan_sha256,
            "Seed 7",
            "test split, final model",
            "0.9461",
            "0.7218",
            "7.988",
            "δ = 1e-5",
            "one row",
            "30 steps of adamw, sample rate 0.05, learning rate 0.001",
        ),
        *("add/remove", "bits per parameter, up 32", "client-2 (103), client-3 (no answer)", "error 103 (worker-deadline) × 1"),
        *("no answer within the deadline × 1", "0.8731", "Training loss: not known (private)", 'labels = ["acq", "<earn>"]', "format: 1"),
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 4  # rates, loss, ε, bytes
    assert "not private" not in page.text


def test_a_simulation_says_that_its_noise_protects_nobody(tmp_path: Path) -> None:
    make(
        tmp_path, engine="inprocess", privacy={"unit": "example", "adjacency": "add/remove", "delta": 1e-5, "noise": "seeded: not private"}
    )
    text = page_of(tmp_path).text
    assert "Noise was seeded so that the run repeats: these weights are not private." in text
    assert "4 simulated (dirichlet:0.5)" in text
    assert "ε, largest client 8.000" in text  # two failed: what they spent is known to their ledgers alone


def test_a_run_without_privacy(tmp_path: Path) -> None:
    make(tmp_path, private=False)
    page = page_of(tmp_path)
    assert "No differential privacy" in page.text
    assert "not known" not in page.text
    assert "30 steps of adamw, batch 32," in page.text
    assert page.tags.count("svg") == 3
    assert "training, mean over clients 0.18" in page.text


def test_a_run_without_validation(tmp_path: Path) -> None:
    make(tmp_path, validation=False)
    page = page_of(tmp_path)
    assert "not scored" in page.text
    assert page.tags.count("svg") == 2  # ε and bytes


def test_hold_outs_are_drawn_in_the_rounds_that_have_them(tmp_path: Path) -> None:
    rounds = rounds_of(4, 4, private=True, validation=False)
    rounds[1].federated = {"accuracy": 0.81, "macro_f1": 0.52}
    rounds[3].federated = {"accuracy": 0.93, "macro_f1": 0.66}
    result = make(tmp_path, rounds=4)
    result.rounds = rounds
    (tmp_path / "result.json").write_text(result.model_dump_json())
    page = page_of(tmp_path)
    assert "accuracy 0.9300" in page.text
    assert "hold-outs macro-F1" in page.text


@pytest.mark.parametrize(
    ("status", "done", "error"),
    [
        ("running", 0, None),
        ("running", 3, None),
        ("stopped", 3, "error 88 (run-stopped): stopped"),
        ("failed", 1, "error 85 (cohort-too-small): round 2: 0 <usable> updates\n  Errors by client: {'client-0': 50}"),
        ("failed", 0, "RuntimeError: boom"),
    ],
)
def test_a_run_that_has_not_ended_well(tmp_path: Path, status: str, done: int, error: str | None) -> None:
    make(tmp_path, done=done, status=status, error=error)
    page = page_of(tmp_path)
    assert f"{status} , {done} of 5 rounds" in page.text
    assert "None was written" in page.text
    assert (f"validation split, round {done}" if done else "not scored") in page.text
    if error:
        assert " ".join(error.split()) in page.text
    if not done:
        assert "svg" not in page.tags
        assert "No round was finished." in page.text


def test_a_stream_shows_r_and_what_was_held_back(tmp_path: Path) -> None:
    tasks = Continual(
        tasks=["<one>", "two"],
        split="test",
        matrix=[[0.9, 0.25], [0.5, None]],
        start=[0.1, 0.2],
        acc=0.5,
        bwt=-0.4,
        fwt=0.05,
        forgetting=0.4,
        drift=[None, 0.65],
        held_back={"2-two": "accuracy on <one> has fallen from 0.900 to 0.500"},
    )
    make(tmp_path, private=False, continual=tasks)
    page = page_of(tmp_path)
    assert page.tags.count("svg") == 4
    for told in (
        "ACC 0.5000",
        "<one>",
        "the start 0.1000 0.2000",
        "<one> 0.9000 0.2500",
        "two 0.5000 –",
        "drift: worse when new than the tasks before – 0.6500",
        "Version 2-two is held back: accuracy on <one> has fallen",
        "Accuracy after each task",
    ):
        assert told in " ".join(page.text.split()), told
    assert "var(--series1) 54%, transparent)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    command = " ".join(CliRunner().invoke(app, [str(tmp_path)]).output.split())
    assert "ACC 0.5000, BWT -0.4000, FWT 0.0500, forgetting 0.4000" in command
    assert "Held back: 2-two accuracy on <one> has fallen" in command


def test_a_stream_that_nothing_scored_says_so(tmp_path: Path) -> None:
    held_back = {f"{number}-batch-{number}": "rolled back to 1-batch-1" for number in range(2, 203)}
    names = [f"batch-{number}" for number in range(1, 203)]
    tasks = Continual(tasks=names, split=None, matrix=[], given_out="1-batch-1", held_back=held_back)
    make(tmp_path, private=False, continual=tasks)
    page = " ".join(page_of(tmp_path).text.split())
    for told in ("Tasks (not scored)", "there is no R", "Version 1-batch-1 is given out.", "The last 100 of 201; all are in result.json"):
        assert told in page, told
    assert page.count("is held back") == 100
    command = " ".join(CliRunner().invoke(app, [str(tmp_path)]).output.split())
    assert "Tasks not scored, so what was forgotten is not known" in command
    assert "Given out 1-batch-1" in command


def test_one_round(tmp_path: Path) -> None:
    make(tmp_path, rounds=1, private=False)
    assert page_of(tmp_path).tags.count("circle") == 6


def test_a_thousand_rounds_and_clients_are_cut_with_a_note(tmp_path: Path) -> None:
    result = make(tmp_path, rounds=1000, clients=1000)
    result.rounds[-1].errors = {f"client-{index}": 103 for index in range(900)}
    (tmp_path / "result.json").write_text(result.model_dump_json())
    page = page_of(tmp_path)
    assert "The last 100 of 1,000" in page.text
    assert "Those with the largest ε, 100 of 1,000" in page.text
    assert "and 895 more" in page.text
    assert page.tags.count("tr") == 202 + 8  # and the privacy statement's
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_names_of_others_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}</pre></svg>"
    result = make(tmp_path, error=evil, plan={"task": {"labels": ["a", evil]}, "model": {"base": evil}})
    result.rounds[0].errors = {evil: 103}
    result.rounds[0].validation = {evil: 0.5, "accuracy": 0.5}
    result.privacy.clients[evil] = result.privacy.clients["client-0"].model_copy(update={"segments": {evil: 1.0}})
    result.versions[evil] = evil
    result.final = {"split": evil, evil: evil}
    (tmp_path / "result.json").write_text(result.model_dump_json())
    (tmp_path / "model" / "README.md").write_text(f"```python\n{evil}\n```\n")
    page = page_of(tmp_path)
    assert not {"img", "script"} & set(page.tags)
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.text.count("{{ 7 * 7 }}") >= 8


def test_a_directory_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LichenError) as caught:
        write_report(tmp_path)
    assert caught.value.code is Code.OUTPUT_UNUSABLE


def test_the_old_page_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    make(tmp_path)
    page = write_report(tmp_path)
    before = page.read_bytes()
    os.utime(tmp_path / "result.json", (0, 0))
    reader = page.open("rb")  # holds the old file open over the replacement
    write_report(tmp_path)
    assert reader.read() == before != page.read_bytes()
    reader.close()
    assert b"1970-01-01 00:00 UTC" in page.read_bytes()


def test_values_in_words() -> None:
    assert [epsilon(value) for value in (None, 0.0, 2.0, 1.1, 7.9871, 7.98999)] == ["–", "0.000", "2.000", "1.100", "7.988", "7.990"]
    assert [metric(value) for value in (None, 0, 0.96711, math.nan)] == ["–", "0.0000", "0.9671", "–"]
    assert [size(value) for value in (None, 0, 999, 1500, 12_345_678, 999_999, 5e9, 2.5e12)] == [
        *("–", "0 B", "999 B", "1.5 kB", "12.3 MB", "1 MB", "5 GB", "2,500 GB"),
    ]
    assert [duration(value) for value in (0.25, 59.96, 60, 3599.7, 3723)] == [
        "0.2 s",
        "1 min 00 s",
        "1 min 00 s",
        "1 h 00 min",
        "1 h 02 min",
    ]


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=70),
    from_zero=st.booleans(),
    limit=st.none() | st.floats(0.01, 1e6),
)
def test_whatever_is_drawn_lies_in_the_drawing(values: list[float], from_zero: bool, limit: float | None) -> None:
    points = list(enumerate(values, start=1))
    found = chart("x", {"a": points, "b": []}, str, from_zero=from_zero, limit=None if limit is None else (limit, "limit"))
    finite = [value for value in values if math.isfinite(value)]
    if found is None:
        assert not finite
        return
    (line,) = found.lines
    drawn = [tuple(map(float, point.split(","))) for point in line.path.split()]
    assert len(drawn) == len(finite)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn)
    assert 2 <= len(found.y_ticks) <= 8
    assert 1 <= len(found.x_ticks) <= 9
    order = sorted(range(len(finite)), key=lambda index: finite[index])
    heights = [drawn[index][1] for index in order]
    assert heights == sorted(heights, reverse=True)  # larger is higher


def test_the_command(tmp_path: Path) -> None:
    result = make(tmp_path, error="[red]not markup[/red] \x1b[2J")
    run = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert (tmp_path / "report.html").exists()
    for said in (
        "finished, 5 of 5 rounds",
        "accuracy 0.9461, macro-F1 0.7218",
        "7.988",
        "up 5.64 MB, down 6.27 MB, 32 bits",
        "[red]not markup[/red] \N{REPLACEMENT CHARACTER}[2J",
    ):
        assert said in run.output, said
    (tmp_path / "report.html").unlink()
    run = CliRunner().invoke(app, [str(tmp_path), "--json"])
    assert Result.model_validate_json(run.output) == result
    assert not (tmp_path / "report.html").exists()


def test_the_schema_needs_no_directory() -> None:
    run = CliRunner().invoke(app, ["--schema"])
    assert json.loads(run.output)["title"] == "Result"
    assert CliRunner().invoke(app, []).exit_code == 2
