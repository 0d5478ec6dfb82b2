"""Error feedback at a client: what the codec lost of its updates is in the next one, also where a round is done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from lichen.client.app import app
from lichen.client.data import add_source
from lichen.client.residual import load_residual, save_residual
from lichen.common import records
from lichen.common.codec.layout import Layout
from lichen.common.codec.registry import uplink_codec
from lichen.common.model.adapter import State
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def home(tmp_path: Path, tiny_rows: Rows) -> Path:
    folder = tmp_path / "clinic-a"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(40)))
    add_source(folder, folder / "rows.jsonl", fields={"text": "text", "label": "label"})
    return folder


def sent(home: Path, plan: Plan, round: int) -> State:
    """What the coordinator reads from the client's update in a round; each begins with the plan's first model."""
    start = workbench(plan).start
    assignment = records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round)
    content = RecordDict({"assignment": records.to_config(assignment)})
    records.put_tensors(content, start, None)
    about: dict[str, Any] = {"message_id": f"m{round}", "src_node_id": 1, "dst_node_id": 2, "message_type": records.TRAIN}
    message: Message = records.build_message(content, run_id=7, group_id=str(round), **about)
    config: dict[str, Any] = {"home": str(home), "name": home.name, "simulated": True}
    reply = app(message, Context(run_id=7, node_id=2, node_config=config, state=RecordDict(), run_config={}))
    assert not reply.has_error(), reply.error
    return records.get_update(reply.content, None, uplink_codec(plan.transfer.uplink), start).decoded(Layout.of(start))


def test_what_one_update_lost_is_in_the_next(home: Path, tiny_plan: dict[str, Any]) -> None:
    def plan_of(uplink: dict[str, Any]) -> Plan:
        return parse_plan(tiny_plan | {"rounds": 3, "transfer": {"uplink": uplink}})

    coarse = {"codec": "topk", "share": 0.1}
    with_feedback = plan_of(coarse | {"error_feedback": True})
    exact = [sent(home, plan_of({"codec": "none"}), round) for round in (1, 2)]
    without = [sent(home, plan_of(coarse | {"error_feedback": False}), round) for round in (1, 2)]
    found = [sent(home, with_feedback, round) for round in (1, 2)]
    for name in exact[0]:
        assert torch.equal(found[0][name], without[0][name]), "nothing was lost before"
    assert any(not torch.equal(found[1][name], without[1][name]) for name in exact[0])
    left = load_residual(home, "7", 3)
    assert left is not None
    for name, tensor in left.items():
        total = exact[0][name] + exact[1][name]
        torch.testing.assert_close(found[0][name] + found[1][name] + tensor, total, rtol=1e-4, atol=1e-7)

    again = sent(home, with_feedback, 2)
    assert all(torch.equal(again[name], tensor) for name, tensor in found[1].items()), "from what was lost before that round"


def test_the_last_two_rounds_are_kept_and_nothing_of_other_runs(tmp_path: Path) -> None:
    lost = [{"a": torch.full((3,), float(number))} for number in range(12)]
    save_residual(tmp_path, "6", 1, lost[1])
    assert load_residual(tmp_path, "7", 1) is None
    for number in range(8, 12):
        save_residual(tmp_path, "7", number, lost[number])
    assert load_residual(tmp_path, "6", 2) is None
    for before, number in ((12, 11), (11, 10)):
        found = load_residual(tmp_path, "7", before)
        assert found is not None
        assert torch.equal(found["a"], lost[number]["a"])
    assert load_residual(tmp_path, "7", 10) is None
    assert sorted(path.name for path in (tmp_path / "residuals").rglob("*") if path.is_file()) == ["10.safetensors", "11.safetensors"]
