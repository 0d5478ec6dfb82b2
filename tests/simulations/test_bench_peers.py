"""`lichen bench simulate` beside other simulators: who is missing is named, ratios are what they say, memory is that of all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan
from lichen.common.privacy.accounting import Segment
from lichen.simulations import datasets
from lichen.simulations.benchmarks import peers, simulate
from lichen.simulations.benchmarks.cli import app
from lichen.simulations.benchmarks.peers import PEERS, Peer, beside, run_peer
from lichen.simulations.benchmarks.runs import Layout, run
from lichen.simulations.datasets import NamedSplits

OURS = {"what": "lichen, lean", "layout": "2×1", "updates_per_s": 4.0, "startup_s": 5.0, "memory_mb": 900.0, "startup_target": 5}
THEIRS = {"what": "Flower on Ray", "layout": "2×1", "updates_per_s": 2.0, "startup_s": 10.0, "memory_mb": 2000.0, "apart": 3e-7}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The peers that a bench was asked for; all of them are installed, and every bench gives two rows."""
    found: list[str] = []

    def bench(rounds: int, chosen: Sequence[Peer], *, tiny: bool, device: str) -> Iterator[dict[str, Any]]:
        found.extend(peer.name for peer in chosen)
        yield {"what": "import, and load", "layout": "2×1", "startup_s": 4.0}
        yield OURS | {
            "startup_over_load": 1.25,
            "startup_over_load_target": 1.3,
            "over": 1.5,
            "over_best": 1.4,
            "target": 1.3,
            "apart": 1e-7,
        }
        yield THEIRS | beside(OURS, THEIRS, PEERS[1])

    monkeypatch.setattr(simulate, "bench_simulate", bench)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    return found


def test_a_peer_that_is_not_installed_is_named_with_the_command_and_the_others_run(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "pfl" else name)
    told = CliRunner().invoke(app, ["simulate", "--json"])
    assert told.exit_code == 0, told.output
    assert told.stderr == "pfl-research is not installed, and left out: pip install 'lichen[peers]'\n"
    assert asked == ["Flower on Ray", "Flower on Ray, Opacus"]
    assert [row["what"] for row in json.loads(told.stdout)] == ["import, and load", "lichen, lean", "Flower on Ray"]


def test_peers_run_unless_they_are_not_asked_for(asked: list[str]) -> None:
    assert CliRunner().invoke(app, ["simulate"]).exit_code == 0
    assert asked == ["pfl-research", "Flower on Ray", "Flower on Ray, Opacus"]
    asked.clear()
    told = CliRunner().invoke(app, ["simulate", "--no-peers"])
    assert (told.exit_code, told.stderr, asked) == (0, "", [])


def test_the_tables_show_each_figure_beside_its_target(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    lines = CliRunner().invoke(app, ["simulate"]).stdout.splitlines()
    ours, theirs = (
        [cell.strip() for cell in next(line for line in lines if line.startswith(f"│ {row['what']}")).split("│")[1:-1]]
        for row in (OURS, THEIRS)
    )
    assert ours == ["lichen, lean", "2×1", "4.000", "1.500", "1.400", "1.3", "1.0e-07", "5.0 (5)", "1.25 (1.3)", "900"]
    assert theirs == [
        "Flower on Ray",
        "2×1",
        "2.000",
        "10.0",
        "2000",
        "3.0e-07",
        "lichen, lean",
        "2.00 (1.3)",
        "2.00",
        "2.00",
        "0.45 (0.5)",
    ]


@pytest.mark.parametrize(("chosen", "private"), [((), 0), (PEERS[:2], 0), (PEERS, 1)])
def test_a_peer_is_held_against_our_default_at_its_best_layout(
    monkeypatch: pytest.MonkeyPatch, chosen: tuple[Peer, ...], private: int
) -> None:
    def lichen(plan: Plan, layout: Layout, folder: Path, load: dict[str, Any], device: str) -> dict[str, Any]:
        assert Path(plan.simulation.data.path).read_text().count("text") == 3
        speed = 9.0 if plan.local.compute == "plain" else float(layout.processes)
        return OURS | {"what": f"{plan.name}, {layout}", "layout": str(layout), "updates_per_s": speed}

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    monkeypatch.setattr(datasets, "load_named", lambda name: NamedSplits(name, [{"text": "a", "label": "acq"}] * 3, None, None))
    monkeypatch.setattr(simulate, "_prepare", lambda *given: Segment(1.0, 1.0, 1))
    monkeypatch.setattr(simulate, "_load", lambda *given: {"startup_s": 4.0})
    monkeypatch.setattr(simulate, "_plain_loop", lambda layout, padding, *_: OURS | {"what": padding})
    monkeypatch.setattr(simulate, "_lichen", lichen)
    monkeypatch.setattr(simulate, "_apart", lambda *given: 1e-7)
    monkeypatch.setattr(simulate, "run_peer", lambda peer, folder, cores: (dict(THEIRS), {"steps": 1.0, "sample-rate": 1.0}))
    rows = list(simulate.bench_simulate(2, chosen))
    assert len(rows) == 1 + 4 + 4 + private + len(chosen)
    expected = ["bench-lean, 2×1", "bench-lean, 2×1", "bench-private, 2×1"]
    assert [row["beside"] for row in rows if "beside" in row] == expected[: len(chosen)]


def test_ratios_say_how_many_times_better_ours_is() -> None:
    found = beside(OURS, THEIRS, PEERS[0])
    assert found["ours_over"] == 2
    assert found["ours_target"] == 1.3
    assert found["startup_over"] == 2
    assert found["memory_share"] == 0.45
    assert found["ten_rounds_over"] == (10 + 100 / 2) / (5 + 100 / 4)
    assert "memory_target" not in found


def test_memory_is_that_of_all_processes_and_what_they_share_counts_once() -> None:
    megabytes = 200
    program = (
        f"import os, time; held = bytearray(b'x') * ({megabytes} << 20)\n"
        "if os.fork() == 0: other = bytearray(b'x') * (100 << 20)\n"
        "time.sleep(2)"
    )
    ran = run([sys.executable, "-c", program], Layout(1, 1))
    assert 300 < ran.memory / 2**20 < 400


def test_what_fails_says_why_and_ends_the_others() -> None:
    program = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit('what went wrong')"
    began = time.monotonic()
    with pytest.raises(LichenError, match="what went wrong") as raised:
        run([sys.executable, "-c", program], Layout(1, 1), [{"RANK": "0"}, {"RANK": "1"}])
    assert raised.value.code is Code.CHECK_FAILED
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("name", "cores", "ranks"), [("pfl-research", 4, 2), ("pfl-research", 1, 1), ("Flower on Ray", 4, 1)])
def test_a_peer_has_a_process_a_core_as_far_as_it_can_deal_the_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cores: int, ranks: int
) -> None:
    peer = next(peer for peer in PEERS if peer.name == name)
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, os, time\n"
        "said = os.environ.get('PFL_WORKER_ADDRESSES', '').split(','), os.environ.get('PFL_WORKER_RANK')\n"
        "print('a line before')\nprint(json.dumps({'seconds': [9, 2, 3], 'first': time.time(), 'said': said}))\nprint('and after')\n"
    )
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "peers.py"))
    row, told = run_peer(peer._replace(script="peer.py"), tmp_path, cores)
    assert row["updates_per_s"] == 4  # 20 clients in the last two rounds' 5 s
    assert row["layout"] == f"{ranks if peer.module == 'pfl' else cores}×1"
    assert len(set(told["said"][0])) == ranks
    assert told["said"][1] == ("0" if ranks > 1 else None)
    assert 0 < row["startup_s"] < 20


def test_other_weights_or_other_private_steps_fail_the_check(tmp_path: Path) -> None:
    for name, value in (("plain", 1.0), ("near", 1.0 + 5e-6), ("far", 1.001), ("odd", float("nan"))):
        save_file({"weight": np.full(3, value, dtype=np.float32)}, tmp_path / f"{name}.safetensors")
    assert 0 < simulate._apart(tmp_path / "near.safetensors", tmp_path, THEIRS) < 1e-5
    for name in ("far", "odd"):
        with pytest.raises(LichenError, match="from the plain loop's"):
            simulate._apart(tmp_path / f"{name}.safetensors", tmp_path, THEIRS)
    simulate._check_steps({"steps": 4.0, "sample-rate": 0.25}, Segment(1.0, 0.25, 4), "peer")
    with pytest.raises(LichenError, match=r"ours are 4 at 0\.25"):
        simulate._check_steps({"steps": 3.0, "sample-rate": 0.25}, Segment(1.0, 0.25, 4), "peer")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_peers_that_are_installed_do_the_same_work() -> None:
    chosen = [peer for peer in PEERS if peer.installed]
    rows = list(simulate.bench_simulate(2, chosen, clients=400))
    theirs = rows[-len(chosen) :]
    assert [row["what"] for row in theirs] == [peer.name for peer in chosen]
    for row, peer in zip(theirs, chosen, strict=True):
        assert row["beside"] == ("lichen, lean, private" if peer.private else "lichen, lean")
        assert peer.private or row["apart"] <= 1e-5
        assert row["startup_s"] > 0
        assert row["ours_over"] > 0.1  # clients of 13 rows are no measurement
        assert row["memory_mb"] > 300
