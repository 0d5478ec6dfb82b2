"""Models: targets and heads of each architecture, state as named tensors, and an export that others load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import check_state
from lichen.common.model.base import resolve_base
from lichen.common.model.export import save_model
from lichen.common.plan import Plan, parse_plan
from lichen.common.privacy.statement import Statement
from lichen.common.tasks import make_task

Models = Callable[[str], Path]
UNTOLD = Statement(private=False, summary="Nothing is said.")
LABELS = ["crop", "metal", "money"]
TEXTS = ["wheat corn harvest the of", "gold", "bank rate dollar in a today and the mine copper"]
# what LoRA is put on, and the parameters of a head over mean-pooled features and of the architecture's own
ARCHITECTURES = {
    "bert": ({"query", "value"}, {"classifier"}, {"classifier"}),
    "roberta": ({"query", "value"}, {"classifier"}, {"classifier.dense", "classifier.out_proj"}),
    "distilbert": ({"q_lin", "v_lin"}, {"classifier"}, {"pre_classifier", "classifier"}),
    "gpt2": ({"c_attn"}, {"classifier"}, {"score"}),
    "llama": ({"q_proj", "v_proj"}, {"score"}, {"score"}),
}


def plan_for(base: Path | str, kind: str = "lora", pooling: str = "mean", init: str = "random", **adapter: Any) -> Plan:
    return parse_plan(
        {
            "rounds": 1,
            "task": {"labels": LABELS, "max_length": 32},
            "model": {
                "base": str(base),
                "adapter": {"kind": kind, "rank": 2, **adapter},
                "head": {"pooling": pooling, "init": init},
            },
            "local": {"steps": 1},
        }
    )


def perturb(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_targets_and_heads_are_found_by_architecture(tiny_models: Models, kind: str, pooling: str) -> None:
    targets, *heads = ARCHITECTURES[kind]
    head = heads[pooling == "pooler"]
    model = make_task(plan_for(tiny_models(kind), pooling=pooling)).build()
    adapters = {name for name in model.trainable if "lora_" in name}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters} == targets
    assert len(adapters) == 2 * 2 * len(targets), "A and B in each of two layers"
    assert model.head == set(model.trainable) - adapters
    assert {name.removeprefix("base_model.model.").rsplit(".", 1)[0] for name in model.head} == head
    assert all(parameter.requires_grad for parameter in model.trainable.values())
    trained = {id(parameter) for parameter in model.trainable.values()}
    assert all(id(parameter) in trained for parameter in model.network.parameters() if parameter.requires_grad)
    # a frozen base and a head alone
    alone = make_task(plan_for(tiny_models(kind), "head", pooling)).build()
    assert {name.rsplit(".", 1)[0] for name in alone.trainable} == head
    assert alone.head == set(alone.trainable)
    whole = make_task(plan_for(tiny_models(kind), "full", pooling)).build()
    assert {id(p) for p in whole.trainable.values()} == {id(p) for p in whole.network.parameters()}
    assert {name.rsplit(".", 1)[0] for name in whole.head} == head


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_states_bear_the_names_of_pefts_own_file(tiny_models: Models, tmp_path: Path, kind: str) -> None:
    plan = plan_for(tiny_models(kind), pooling="pooler")
    task = make_task(plan)
    model = task.build()
    model.load(perturb(model.state()))
    save_model(tmp_path, plan, model, task.tokenizer, UNTOLD)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    state = model.state()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_all_linear_leaves_the_head_whole(tiny_models: Models, kind: str) -> None:
    model = make_task(plan_for(tiny_models(kind), targets=["all-linear"])).build()
    assert len({name.split(".lora_")[0] for name in model.trainable if "lora_" in name}) == {"bert": 12, "gpt2": 8}[kind]
    assert not any("lora_" in name for name in model.head)
    # the known failure of DistilBERT: its first head layer is linear too
    other = make_task(plan_for(tiny_models("distilbert"), pooling="pooler", targets=["all-linear"])).build()
    assert not any("lora_" in name for name in other.head)
    assert any("pre_classifier" in name for name in other.head)


def test_named_targets_and_their_refusal(tiny_models: Models) -> None:
    model = make_task(plan_for(tiny_models("bert"), targets=["dense"])).build()
    assert all(".dense.lora_" in name for name in model.trainable if name not in model.head)
    with pytest.raises(LichenError) as caught:
        make_task(plan_for(tiny_models("bert"), targets=["nonsense"])).build()
    assert caught.value.code is Code.MODEL_UNSUPPORTED
    assert caught.value.where == "model.adapter.targets"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_dropout_is_left(tiny_models: Models, kind: str) -> None:
    """A step is a function of its batch: some heads have a dropout that no entry of the configuration rules."""
    task = make_task(plan_for(tiny_models(kind)))
    model = task.build()
    assert model.network.training
    rows = task.made_up(3)
    batch = task.collate(rows, [0, 1, 2])
    assert torch.equal(task.losses(model.network, batch), task.losses(model.network, batch))


def test_building_repeats_and_follows_the_seed(tiny_models: Models) -> None:
    plan = plan_for(tiny_models("bert"))
    first, second = (make_task(plan).build().state() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_task(plan.model_copy(update={"seed": 1})).build().state()
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name or name.endswith("classifier.weight"))


# --- state ------------------------------------------------------------------------------------------------------------------------


def test_load_and_state_are_copies(tiny_models: Models) -> None:
    model = make_task(plan_for(tiny_models("bert"))).build()
    before = model.state()
    changed = perturb(before)
    model.load(changed)
    now = model.state()
    assert all(torch.equal(now[name], changed[name]) for name in now)
    next(iter(now.values())).zero_()
    next(iter(changed.values())).zero_()
    assert next(iter(model.trainable.values())).abs().sum() > 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state, name: state.pop(name),
        lambda state, name: state.update(stranger=torch.zeros(1)),
        lambda state, name: state.update({name: state[name].T.contiguous()}),
        lambda state, name: state.update({name: state[name].double()}),
        lambda state, name: state.update({name: state[name] * float("nan")}),
        lambda state, name: state.update({name: state[name] + float("inf")}),
    ],
    ids=["missing", "stranger", "shape", "type", "nan", "inf"],
)
def test_tensors_that_do_not_fit_are_refused_whole(tiny_models: Models, spoil: Callable[..., Any]) -> None:
    model = make_task(plan_for(tiny_models("bert"))).build()
    before = model.state()
    state = perturb(before)
    spoil(state, list(state)[-3])
    with pytest.raises(LichenError) as caught:
        model.load(state)
    assert caught.value.code is Code.STATE_MISMATCH
    after = model.state()
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing is set"
    with pytest.raises(LichenError):
        check_state(state, before)


# --- finding ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["package:no-such-distribution/x", "package:pytest/nothing-here", "/no/such/path", "no-such/model"])
def test_models_that_are_not_there(base: str) -> None:
    with pytest.raises(LichenError) as caught:
        make_task(plan_for(base)).build()
    assert caught.value.code is Code.MODEL_NOT_FOUND
    assert caught.value.where == "model.base"


@pytest.mark.parametrize("inner", ["", "task"])
def test_a_base_that_is_an_adapter_is_named_as_such(tmp_path: Path, inner: str) -> None:
    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / "adapter_config.json").write_text("{}")
    with pytest.raises(LichenError, match="has adapters, and no whole model") as caught:
        make_task(plan_for(tmp_path)).build()
    assert caught.value.code is Code.MODEL_NOT_FOUND
    assert "--format merged" in str(caught.value)


def test_a_package_names_its_folder(monkeypatch: pytest.MonkeyPatch, tiny_models: Models) -> None:
    from lichen.common.model import base

    class Found:
        @staticmethod
        def locate_file(inner: str) -> Path:
            return tiny_models("bert") / inner

    monkeypatch.setattr(base, "distribution", lambda name: Found)
    assert resolve_base("package:some-weights/.") == str(tiny_models("bert"))


def test_pickled_weights_are_not_read(tiny_models: Models, tmp_path: Path) -> None:
    for file in tiny_models("bert").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tiny_models("bert") / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(LichenError) as caught:
        make_task(plan_for(tmp_path)).build()
    assert caught.value.code is Code.MODEL_NOT_FOUND


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    """A made-up frozen pooler would differ from process to process, and be in no exported adapter."""
    for file in tiny_models("bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in weights.items() if "pooler" not in name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LichenError) as caught:
        make_task(plan_for(tmp_path, pooling="pooler")).build()
    assert caught.value.code is Code.MODEL_UNSUPPORTED
    assert "pooler" in caught.value.what
    make_task(plan_for(tmp_path, pooling="mean")).build()


def test_a_text_longer_than_the_model_takes_is_refused_before_there_is_one(tiny_models: Models) -> None:
    plan = parse_plan({**plan_for(tiny_models("bert")).model_dump(mode="json"), "task": {"labels": LABELS, "max_length": 41}})
    with pytest.raises(LichenError) as caught:
        make_task(plan).build()
    assert caught.value.code is Code.MODEL_UNSUPPORTED
    assert "40 tokens" in caught.value.what


# --- export -----------------------------------------------------------------------------------------------------------------------


def scores_here(plan: Plan, model: Any, task: Any) -> torch.Tensor:
    model.network.eval()
    rows = task.encode({"text": TEXTS, "label": LABELS})
    with torch.no_grad():
        found: torch.Tensor = task.logits(model.network, task.collate(rows, range(len(TEXTS))))
    return found


@pytest.mark.parametrize(
    ("kind", "adapter", "pooling"),
    [
        ("bert", "lora", "mean"),
        ("bert", "lora", "pooler"),
        ("bert", "full", "mean"),
        ("bert", "head", "pooler"),
        ("distilbert", "lora", "pooler"),
        ("gpt2", "lora", "mean"),
        ("roberta", "full", "pooler"),
        ("llama", "lora", "pooler"),
    ],
)
def test_the_cards_snippet_runs_as_it_stands_and_gives_the_same_scores(
    tiny_models: Models, tmp_path: Path, kind: str, adapter: str, pooling: str
) -> None:
    plan = plan_for(tiny_models(kind), adapter, pooling)
    task = make_task(plan)
    model = task.build()
    model.load(perturb(model.state()))
    expected = scores_here(plan, model, task)
    save_model(tmp_path / "model", plan, model, task.tokenizer, UNTOLD)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "lichen" not in snippet
    assert card.endswith("## Privacy\n\nNothing is said.\n")
    found = run_in(tmp_path, snippet)
    assert found["labels"] == LABELS
    if adapter != "lora":
        assert list(found["model"].config.id2label.values()) == LABELS
    # the same on texts of different lengths, padded
    batch = found["tokenizer"](TEXTS, truncation=True, max_length=32, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = found["model"](**batch).logits
    if pooling == "mean":
        mask = batch["attention_mask"].unsqueeze(-1)
        logits = (logits * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def run_in(directory: Path, code: str) -> dict[str, Any]:
    """Execute a snippet in this process (a fresh one takes seconds to import torch), in its directory."""
    names: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(directory)
    try:
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - the snippet that we print for readers
    finally:
        os.chdir(here)
    return names


def test_the_snippet_needs_nothing_of_this_process(tiny_models: Models, tmp_path: Path) -> None:
    plan = plan_for(tiny_models("bert"))
    task = make_task(plan)
    model = task.build()
    save_model(tmp_path / "model", plan, model, task.tokenizer, UNTOLD)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {f"['{label}']" for label in LABELS}
