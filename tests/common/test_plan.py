"""The plan: strict reading, what a mistake is told, unsound combinations, and the digest that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, Section, digest_of, load_plan, parse_plan, plan_from_json, schema, text_of

LEAST: dict[str, Any] = {
    "rounds": 3,
    "task": {"labels": ["yes", "no"]},
    "model": {"base": "some/model"},
    "local": {"steps": 5},
}


def with_(**changes: Any) -> dict[str, Any]:
    """The least plan, with `section__key=value` set."""
    document: dict[str, Any] = json.loads(json.dumps(LEAST))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = document
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return document


def refusal(document: dict[str, Any], code: Code = Code.PLAN_INVALID) -> str:
    with pytest.raises(LichenError) as caught:
        parse_plan(document)
    assert caught.value.code is code, str(caught.value)
    return str(caught.value)


def sections(kind: type[BaseModel] = Plan) -> Iterator[type[BaseModel]]:
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_the_least_plan_has_defaults_and_no_privacy() -> None:
    plan = parse_plan(LEAST)
    assert (plan.name, plan.seed, plan.private, plan.cohort.size, plan.local.learning_rate) == ("federation", 0, False, 4, 1e-3)
    assert parse_plan(with_(privacy__unit="example")).private


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("privcy", "privacy"),
        ("stream", None),
        ("strict", None),
        ("local__step", "steps"),
        ("local__learningrate", "learning_rate"),
        ("privacy__eps", "epsilon"),
        ("model__adapter__alfa", "alpha"),
        ("transfer__uplink__codecs", "codec"),
        ("task__label", "labels"),
    ],
)
def test_an_unknown_key_is_told_with_its_path_and_the_nearest(path: str, nearest: str | None) -> None:
    told = refusal(with_(**{path: 1}))
    assert f"{path.replace('__', '.')}: unknown key" in told
    if nearest:
        assert f"(nearest valid: {nearest})" in told


def test_a_data_source_is_told_as_one() -> None:
    told = refusal(with_(simulation__data={"path": "x.csv", "tests": "y.csv"}))
    assert "simulation.data.tests: unknown key (nearest valid: test)" in told
    assert "valid string" not in told
    assert parse_plan(with_(simulation__data={"path": "x.csv", "fields": {"text": "BODY"}})).simulation.data is not None
    assert parse_plan(with_(simulation__data="r8")).simulation.data == "r8"


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("rounds", 0, "1"),
        ("seed", -1, "0"),
        ("seed", 2**63, "just below"),
        ("task__max_length", 3, "4"),
        ("task__max_length", 8193, "8192"),
        ("model__adapter__rank", 0, "1"),
        ("model__adapter__rank", 513, "512"),
        ("model__adapter__alpha", 0, "just above 0"),
        ("model__adapter__dropout", 1, "just below 1"),
        ("cohort__size", 0, "1"),
        ("cohort__deadline_s", 0, "just above 0"),
        ("local__steps", 0, "1"),
        ("local__batch_size", 0, "1"),
        ("local__max_physical_batch_size", 0, "1"),
        ("local__learning_rate", 0, "just above 0"),
        ("privacy__epsilon", 0, "just above 0"),
        ("privacy__delta", 0, "just above 0"),
        ("privacy__delta", 0.1, "just below 0.1"),
        ("privacy__clip", -1.0, "1e-06"),
        ("privacy__clip", 1e-30, "1e-06"),
        ("privacy__clip", 1e7, "1000000"),
        ("privacy__sample_rate", 1.1, "1"),
        ("privacy__sample_rate", 0, "just above 0"),
        ("evaluation__validation_fraction", 0.5, "just below 0.5"),
        ("local__optimizer", "adam", "adamw"),
        ("privacy__unit", "examples", "example"),
        ("privacy__noise", "centrl", "central"),
        ("cohort__mode", "bufferd", "buffered"),
        ("aggregation__secure", True, "False"),
        ("task__kind", "text", "text-classification"),
        ("task__kind", "causal", "causal-lm"),
        ("continual__method", "EWC", "ewc"),
        ("continual__method", "Replay", "replay"),
    ],
)
def test_bounds_and_choices_name_the_nearest_valid_value(path: str, value: Any, hint: str) -> None:
    told = refusal(with_(**{path: value}))
    assert told.startswith(f"error 21 (plan-invalid): plan: {path.replace('__', '.')}: ")
    assert f"(nearest valid: {hint}" in told


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rounds", True),
        ("rounds", "3"),
        ("rounds", 3.0),
        ("rounds", None),
        ("seed", False),
        ("local__steps", True),
        ("local__learning_rate", True),
        ("local__learning_rate", "fast"),
        ("privacy__epsilon", [8]),
        ("privacy__delta", float("nan")),
        ("privacy__delta", "nan"),
        ("privacy__epsilon", float("inf")),
        ("privacy__epsilon", "inf"),
        ("name", 5),
        ("name", "Upper"),
        ("name", "../up"),
        ("name", ""),
        ("task__labels", "yes"),
        ("task__labels", ["one"]),
        ("task__labels", ["a", "a"]),
        ("task__text_field", "label"),
        ("task__labels", [1, 2]),
        ("model__base", ""),
        ("local", None),
        ("privacy", []),
        ("local__betas", [0.9]),
        ("local__betas", [0.9, 1.0]),
    ],
)
def test_wrong_types_and_values_are_refused(path: str, value: Any) -> None:
    assert path.split("__", maxsplit=1)[0] in refusal(with_(**{path: value}))


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(LEAST) + "privacy: {unit: example, delta: 1e-5, epsilon: 8}\n")
    plan = load_plan(file)
    assert plan.privacy.delta == 1e-5
    assert isinstance(plan.privacy.epsilon, float)
    assert load_plan(file, ["privacy.delta=1e-6"]).privacy.delta == 1e-6
    assert len({parse_plan(with_(privacy={"unit": "none", "epsilon": number})).sha256() for number in (8, 8.0)}) == 1


def test_all_mistakes_are_told_at_once() -> None:
    told = refusal(with_(rounds=0, privacy__delta=2.0, lcal=1))
    assert "3 mistakes" in told
    assert all(part in told for part in ("rounds:", "privacy.delta:", "lcal: unknown key (nearest valid: local)"))


def test_missing_keys_are_named() -> None:
    for key in LEAST:
        assert f"{key}: required, but missing" in refusal({name: value for name, value in LEAST.items() if name != key})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__head__init": "label-descriptions"}, "no description of"),
        (
            {
                "model__head": {"init": "label-descriptions", "pooling": "pooler"},
                "task__label_descriptions": {"yes": "assent", "no": "dissent"},
            },
            "needs mean pooling",
        ),
        ({"aggregation__average_last": 4}, "is above rounds"),
        ({"local": {"epochs": 1}, "privacy__unit": "example"}, "must not depend on true sizes"),
        ({"privacy": {"unit": "entity", "unit_field": "patient"}, "evaluation__federated_every": 1}, "an entity on both sides"),
        ({"privacy__audit": {"canaries": 5}}, "there is no claim to test"),
        ({"model__adapter": {"targets": ["all-linear"], "last_layers": 1}}, "among modules that are named"),
        ({"model__base_precision": "int8", "model__adapter": {"kind": "full"}}, "trains every weight"),
        ({"local__checkpointing": True, "privacy": {"unit": "example", "gradients": "hooks"}}, "runs layers twice"),
        ({"cohort": {"assign": ["rank"]}}, "adds updates of one rank only"),
        ({"cohort": {"assign": ["rank"]}, "model__adapter": {"kind": "head"}}, "a head adapter has none"),
        (
            {"cohort": {"assign": ["max_length"]}, "privacy": {"unit": "example", "audit": {"canaries": 5}}},
            "canaries again by the plan's own length",
        ),
        ({"local__partial": True, "privacy__unit": "example"}, "depends on what rows are drawn"),
        ({"cohort__mode": "buffered", "aggregation__rule": "rolora"}, "another factor is trained"),
        ({"local__partial": True, "aggregation__rule": "flora"}, "adds products and not updates"),
        ({"cohort__mode": "buffered", "evaluation__federated_every": 1}, "no moment at which a round's clients are free"),
    ],
)
def test_unsound_combinations_are_refused_with_the_reason(changes: dict[str, Any], what: str) -> None:
    assert what in refusal(with_(**changes), Code.PLAN_UNSOUND)


def test_canaries_without_privacy_are_a_baseline_that_must_be_wanted() -> None:
    plan = parse_plan(with_(privacy__audit={"canaries": 5, "baseline": True}))
    assert (plan.private, plan.privacy.audit.canaries) == (False, 5)
    assert parse_plan(with_(privacy={"unit": "example", "audit": {"canaries": 5}})).privacy.audit.canaries == 5


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"local": {"steps": 1, "epochs": 1}}, "either epochs or steps"),
        ({"local": {"batch_size": 4}}, "either epochs or steps"),
        ({"cohort": {"size": 2, "minimum": 3}}, "minimum (3) is above size (2)"),
        ({"cohort": {"assign": ["steps", "steps"]}}, "assign names a thing twice"),
        ({"cohort": {"size": 2, "buffer": 2}}, "buffer goes with mode: buffered"),
        ({"cohort": {"size": 2, "mode": "buffered", "buffer": 3}}, "buffer (3) is above size (2)"),
        ({"cohort": {"size": 3, "mode": "buffered", "buffer": 2, "minimum": 3}}, "minimum (3) is above buffer (2)"),
        ({"cohort": {"size": 2, "mode": "buffered", "oversample": 1.3}}, "oversample goes with mode: synchronous"),
        ({"privacy__unit": "entity"}, "unit_field goes with unit: entity"),
        ({"privacy__unit_field": "patient"}, "unit_field goes with unit: entity"),
        ({"aggregation__momentum": 0.9}, "momentum above 0 goes with"),
        ({"aggregation__optimizer": "fedavgm"}, "momentum above 0 goes with"),
        ({"task__label_descriptions": {"maybe": "?"}}, "labels that task.labels does not"),
    ],
)
def test_keys_that_need_each_other(changes: dict[str, Any], what: str) -> None:
    assert what in refusal(with_(**changes))


@pytest.mark.parametrize(("size", "oversample", "asked"), [(4, 1.0, 4), (10, 1.3, 13), (4, 1.3, 6), (100, 1.1, 110), (1, 1.01, 2)])
def test_a_round_asks_more_clients_than_it_waits_for(size: int, oversample: float, asked: int) -> None:
    assert parse_plan(with_(cohort={"size": size, "oversample": oversample})).cohort.asked == asked


@pytest.mark.parametrize(("cohort", "updates"), [({"size": 4}, 4), ({"size": 40}, 10), ({"size": 40, "buffer": 20}, 20)])
def test_a_buffered_step_takes_ten_updates_or_the_cohorts(cohort: dict[str, Any], updates: int) -> None:
    assert parse_plan(with_(cohort=cohort | {"mode": "buffered"})).cohort.step_updates == updates


def test_privacy_with_epochs_and_a_sample_rate_is_sound() -> None:
    assert parse_plan(with_(local={"epochs": 1}, privacy={"unit": "example", "sample_rate": 0.1})).local.epochs == 1


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("[1, 2]", Code.PLAN_INVALID, "a mapping"),
        ("", Code.PLAN_INVALID, "a mapping"),
        ("a: [1", Code.PLAN_UNREADABLE, "line 1"),
        ("format: 2\n", Code.PLAN_VERSION, "newer"),
        ("rounds: 1\nrounds: 2\n", Code.PLAN_UNREADABLE, "'rounds' is given twice"),
        ("privacy: {epsilon: 1}\nprivacy: {epsilon: 100}\n", Code.PLAN_UNREADABLE, "'privacy' is given twice"),
        ("task: {labels: [a, b], labels: [c, d]}\n", Code.PLAN_UNREADABLE, "'labels' is given twice"),
        ("2024-01-01: 1\n", Code.PLAN_INVALID, "keys must be"),
        ("a: &a [*a]\n", Code.PLAN_INVALID, "ircular"),
        ("!!python/object/apply:os.system ['true']\n", Code.PLAN_UNREADABLE, "python/object"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, code: Code, what: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(LichenError) as caught:
        load_plan(file)
    assert caught.value.code is code
    assert what in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "none.yaml", tmp_path / "binary", tmp_path):
        with pytest.raises(LichenError) as caught:
            load_plan(file)
        assert caught.value.code is Code.PLAN_UNREADABLE


@pytest.mark.parametrize("text", ["[", "[]", "3", '{"a":' * 100_000, '{"rounds": 1e999}', "{}"])
def test_what_arrives_and_is_no_plan(text: str) -> None:
    with pytest.raises(LichenError) as caught:
        plan_from_json(text)
    assert caught.value.code in {Code.PLAN_UNREADABLE, Code.PLAN_INVALID}


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("rounds", "KEY.PATH=VALUE"),
        ("=1", "KEY.PATH=VALUE"),
        ("rounds.of=1", "'rounds' holds a value"),
        ("local.steps=[1", "not a YAML value"),
        ("privacy={epsilon: 1, epsilon: 100}", "'epsilon' is given twice"),
        ("local.stepz=1", "local.stepz: unknown key (nearest valid: steps)"),
        ("rounds=true", "rounds:"),
    ],
)
def test_overrides_that_do_not_fit(tmp_path: Path, setting: str, what: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(LichenError) as caught:
        load_plan(file, [setting])
    assert caught.value.code is Code.PLAN_INVALID
    assert what in str(caught.value)


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    plan = load_plan(file, ["rounds=7", "privacy.unit=example", "simulation.partition=dirichlet:0.5", "task.labels=[x, y, z]"])
    assert (plan.rounds, plan.privacy.unit, plan.simulation.partition, plan.task.labels) == (7, "example", "dirichlet:0.5", ("x", "y", "z"))


def test_a_plan_does_not_change() -> None:
    plan = parse_plan(LEAST)
    for section, key in ((plan, "rounds"), (plan.local, "steps"), (plan.privacy, "epsilon")):
        with pytest.raises(ValidationError):
            setattr(section, key, 1)


def test_every_section_is_strict_and_every_key_described() -> None:
    for kind in sections():
        assert issubclass(kind, Section)
        assert kind.model_config["extra"] == "forbid"
        assert kind.model_config["strict"]
    definitions = schema()["$defs"]
    for name, definition in definitions.items():
        for key, entry in definition["properties"].items():
            assert entry.get("description") or "$ref" in entry or definitions.get(key.title(), {}).get("description"), f"{name}.{key}"


# --- round trips -----------------------------------------------------------------------------------------------------------------

texts = st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable())
numbers = st.floats(1e-9, 1e6)
documents = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 50),
        "task": st.fixed_dictionaries(
            {"labels": st.lists(texts, min_size=2, max_size=4, unique=True)},
            optional={"max_length": st.integers(4, 8192), "text_field": texts},
        ),
        "model": st.fixed_dictionaries(
            {"base": texts},
            optional={
                "adapter": st.fixed_dictionaries(
                    {}, optional={"kind": st.sampled_from(["lora", "full", "head"]), "alpha": numbers, "targets": st.lists(texts)}
                )
            },
        ),
        "local": st.fixed_dictionaries(
            {"steps": st.integers(1, 100)},
            optional={"learning_rate": numbers, "optimizer": st.sampled_from(["adamw", "sgd"]), "betas": st.just([0.5, 0.25])},
        ),
    },
    optional={
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1),
        "privacy": st.fixed_dictionaries(
            {"unit": st.sampled_from(["none", "example"])}, optional={"epsilon": numbers, "delta": st.floats(1e-12, 0.09)}
        ),
        "simulation": st.fixed_dictionaries({}, optional={"data": texts | st.fixed_dictionaries({"path": texts})}),
    },
)


@settings(max_examples=60, deadline=None)
@given(document=documents)
def test_round_trips_keep_the_plan_and_its_digest(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    plan = parse_plan(document)
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    for again in (plan_from_json(plan.canonical_json()), load_plan(file), parse_plan(plan.model_dump(mode="json"))):
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.sha256() == plan.sha256()
        assert again.canonical_json() == plan.canonical_json()
    assert text_of(file) == plan.canonical_json()
    assert digest_of(text_of(file)) == plan.sha256()


@settings(max_examples=30, deadline=None)
@given(document=documents, rounds=st.integers(1, 50))
def test_other_plans_have_other_digests(document: dict[str, Any], rounds: int) -> None:
    plan, other = parse_plan(document), parse_plan({**document, "rounds": rounds})
    assert (plan.sha256() == other.sha256()) == (plan.rounds == rounds)


def test_a_file_without_a_key_keeps_its_text(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
    assert json.loads(text_of(file)) == LEAST
    assert plan_from_json(text_of(file)) == load_plan(file)
    assert digest_of(text_of(file)) != load_plan(file).sha256()


def test_the_digest_does_not_depend_on_order_or_on_spelled_out_defaults() -> None:
    plan = parse_plan(LEAST)
    assert parse_plan(dict(reversed(LEAST.items()))).sha256() == plan.sha256()
    assert parse_plan(with_(format=1, seed=0, privacy__unit="none")).sha256() == plan.sha256()
    assert parse_plan(with_(format=True)).sha256() == plan.sha256()


def test_canonical_json_is_sorted_and_keeps_letters() -> None:
    text = parse_plan(with_(task__labels=["ä", "b"])).canonical_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert '"labels":["ä","b"]' in text


@pytest.mark.parametrize("key", ["epsilon", "delta", "clip", "sample_rate"])
def test_a_plan_that_asks_for_privacy_without_a_unit_is_refused(key: str) -> None:
    """It would train without any noise, under the ε that its author wrote down."""
    document: dict[str, Any] = {"task": {"labels": ["a", "b"]}, "model": {"base": "x"}, "local": {"steps": 4}, "rounds": 1}
    with pytest.raises(LichenError, match="nothing would be private") as caught:
        parse_plan(document | {"privacy": {key: 0.01}})
    assert caught.value.code is Code.PLAN_UNSOUND
    assert parse_plan(document | {"privacy": {"unit": "none", key: 0.01}}).privacy.unit == "none"  # said, and meant


def test_a_plan_that_asks_for_batches_but_not_for_online_mode_is_refused() -> None:
    document: dict[str, Any] = {"task": {"labels": ["a", "b"]}, "model": {"base": "x"}, "local": {"steps": 4}, "rounds": 2}
    with pytest.raises(LichenError, match="no batch would ever begin") as caught:
        parse_plan(document | {"continual": {"online": {"rounds": 2}}})
    assert caught.value.code is Code.PLAN_UNSOUND
    assert parse_plan(document | {"continual": {"mode": "planned", "online": {"rounds": 2}}}).continual.mode == "planned"


def test_what_is_near_nothing_gets_no_guess_but_what_is_valid() -> None:
    """A guess was followed, and the method dropped without a word."""
    for method in ("naive", "none", "DER", ""):
        told = refusal(with_(continual__method=method))
        assert "nearest valid" not in told
        assert all(repr(valid) in told for valid in ("sequential", "ewc", "replay"))


def test_an_unknown_key_of_an_element_is_told_with_the_nearest() -> None:
    told = refusal(with_(continual__stream=[{"name": "one", "labels": ["a"]}, {"name": "two", "label": ["b"], "When": {}}]))
    assert "continual.stream.1.label: unknown key (nearest valid: labels)" in told
    assert "continual.stream.1.When: unknown key (nearest valid: where)" in told


def test_no_hint_leads_to_less_privacy() -> None:
    document: dict[str, Any] = {"task": {"labels": ["a", "b"]}, "model": {"base": "x"}, "local": {"steps": 4}, "rounds": 1}
    with pytest.raises(LichenError) as caught:
        parse_plan(document | {"privacy": {"unit": "row"}})
    assert "nearest valid" not in str(caught.value)
