"""The policy: what each limit refuses and how it is told, hours, approvals, and that its defaults let nothing out without noise."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lichen.client.policy import (
    APPROVALS,
    POLICY,
    Policy,
    PrivacyPolicy,
    approve,
    enforce,
    load_policy,
    pending,
    reject,
    schema,
    write_default,
)
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, digest_of, load_plan, parse_plan

NOON = datetime(2026, 1, 5, 12, 0)
DIGEST = "ab" * 32


def plan(**sections: Any) -> Plan:
    document: dict[str, Any] = {
        "rounds": 5,
        "task": {"labels": ["a", "b"]},
        "model": {"base": "some/model"},
        "cohort": {"size": 4, "minimum": 2},
        "local": {"steps": 3},
        "privacy": {"unit": "example"},
    }
    return parse_plan(document | sections)


def policy(home: Path, **keys: Any) -> Policy:
    (home / POLICY).write_text(yaml.safe_dump({"format": 1} | keys))
    return load_policy(home)


def told(owner: Policy, asked: Plan, **spent: Any) -> str:
    with pytest.raises(LichenError) as caught:
        owner.check(asked, asked.sha256(), NOON, **spent)
    assert caught.value.code is Code.POLICY_REFUSED
    return caught.value.what


def permits(owner: Policy, asked: Plan, **spent: Any) -> None:
    owner.check(asked, asked.sha256(), NOON, **spent)


def test_without_a_file_the_defaults_hold_and_nothing_is_written(tmp_path: Path) -> None:
    owner = load_policy(tmp_path)
    assert list(tmp_path.iterdir()) == []
    permits(owner, plan())
    permits(owner, plan(privacy={"unit": "entity", "unit_field": "patient", "epsilon": 8, "delta": "1e-5"}))
    assert told(owner, plan(privacy={"unit": "none"})) == "privacy.unit asks none; unnoised_updates_to_coordinator permits never"
    assert told(owner, plan(privacy={"unit": "example", "epsilon": 9})) == "privacy.epsilon asks 9; privacy.max_epsilon permits 8"


def test_the_written_default_is_the_default_and_documents_each_key(tmp_path: Path) -> None:
    path = write_default(tmp_path)
    assert load_policy(tmp_path).model_dump() == Policy().model_dump()
    text = path.read_text()
    for key, field in [*Policy.model_fields.items(), *PrivacyPolicy.model_fields.items()]:
        assert f"{key}:" in text
        assert key == "privacy" or (field.description and field.description in text)
    with pytest.raises(LichenError, match=r"output-exists"):
        write_default(tmp_path)
    assert set(schema()["properties"]) == set(Policy.model_fields)


LIMITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"models": ["other"]}, {}, "model.base asks some/model; models permits other"),
    ({"models": []}, {}, "model.base asks some/model; models permits none"),
    ({"tasks": ["causal-lm"]}, {}, "task.kind asks text-classification; tasks permits causal-lm"),
    ({"privacy": {"require": ["entity"]}}, {}, "privacy.unit asks example; privacy.require permits entity"),
    (
        {"privacy": {"max_epsilon": 2}},
        {"privacy": {"unit": "example", "epsilon": 3.5}},
        "privacy.epsilon asks 3.5; privacy.max_epsilon permits 2",
    ),
    ({"privacy": {"max_delta": "1e-6"}}, {}, "privacy.delta asks 1e-05; privacy.max_delta permits 1e-06"),
    (
        {"privacy": {"text_field": "note"}},
        {"task": {"labels": ["yes", "no"], "text_field": "patient"}},
        "task.text_field asks patient; privacy.text_field permits note",
    ),
    *(
        (
            {"privacy": {"require": ["entity"]} | fields},
            {"privacy": {"unit": "entity", "unit_field": "text"}},
            f"privacy.unit_field asks text; privacy.unit_fields permits {permitted}",
        )
        for fields, permitted in (({}, "none"), ({"unit_fields": ["patient", "ward"]}, "patient, ward"))
    ),
    ({"min_cohort": 3}, {}, "cohort.minimum asks 2; min_cohort permits 3 or more"),
    ({"secure_aggregation": "required"}, {}, "aggregation.secure asks False; secure_aggregation permits required"),
    ({"max_rounds": 4}, {}, "rounds asks 5; max_rounds permits 4"),
    ({"max_rank": 4}, {}, "model.adapter.rank asks 8; max_rank permits 4"),
    (
        {"full_tuning": False},
        {"model": {"base": "some/model", "adapter": {"kind": "full"}}},
        "model.adapter.kind asks full; full_tuning permits False",
    ),
    ({"evaluation": False}, {"evaluation": {"federated_every": 2}}, "evaluation.federated_every asks 2; evaluation permits False"),
    (
        {"canaries": False},
        {"privacy": {"unit": "example", "epsilon": 3.5, "audit": {"canaries": 9}}},
        "privacy.audit.canaries asks 9; canaries permits False",
    ),
    ({"online": False}, {"continual": {"mode": "online"}}, "continual.mode asks online; online permits False"),
    ({"hours": "22:00-06:00"}, {}, "the time is 12:00; hours permits 22:00-06:00"),
]


@pytest.mark.parametrize(("keys", "sections", "words"), LIMITS, ids=[next(iter(keys)) for keys, _, _ in LIMITS])
def test_each_limit_refuses_with_both_keys_and_values(tmp_path: Path, keys: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    assert told(policy(tmp_path, **keys), plan(**sections)) == words


def test_every_limit_that_a_plan_can_break_has_a_case() -> None:
    not_refusals = {"format", "unnoised_updates_to_coordinator", "approval", "threads", "memory_mb", "profile"}
    assert {key for keys, _, _ in LIMITS for key in keys} == set(Policy.model_fields) - not_refusals


def test_all_refusals_are_told_at_once(tmp_path: Path) -> None:
    text = told(policy(tmp_path, max_rounds=1, max_rank=1), plan(privacy={"unit": "none"}))
    assert text.startswith("3 refusals")
    assert all(key in text for key in ("max_rounds", "max_rank", "unnoised_updates_to_coordinator"))


def test_unnoised_updates_only_where_the_owner_allows_them(tmp_path: Path) -> None:
    permits(policy(tmp_path, unnoised_updates_to_coordinator="allow"), plan(privacy={"unit": "none"}))


def test_models_by_digest_fail_closed(tmp_path: Path) -> None:
    owner = policy(tmp_path, models=[f"sha256:{DIGEST}", "known/name"])
    permits(owner, plan(model={"base": "known/name"}))
    permits(owner, plan(), weights_sha256=lambda: DIGEST)
    assert told(owner, plan(), weights_sha256=lambda: "00" * 32)
    assert told(owner, plan())  # nobody could tell the digest
    assert told(owner, plan(model={"base": f"sha256:{DIGEST}"[:-1] + "0"}))


def test_a_base_that_is_permitted_by_its_digest_may_not_be_changed(tmp_path: Path) -> None:
    owner = policy(tmp_path, models=[f"sha256:{DIGEST}", "known/name"])
    sections = {"local": {"steps": 3}, "aggregation": {"rule": "flora"}}
    assert "by its digest" in told(owner, plan(**sections), weights_sha256=lambda: DIGEST)
    permits(owner, plan(**sections, model={"base": "known/name"}))
    permits(owner, plan(**sections | {"aggregation": {"rule": "rolora"}}), weights_sha256=lambda: DIGEST)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_hours_cover_the_span_from_begin_to_end(begin: int, end: int, now: int) -> None:
    span = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    moment = NOON.replace(hour=now // 60, minute=now % 60)
    if begin == end:
        with pytest.raises(ValueError, match="span"):
            Policy(hours=span)
        return
    inside = {(begin + step) % 1440 for step in range((end - begin) % 1440)}
    assert Policy(hours=span).open_at(moment) == (now in inside)


def test_hours_are_local() -> None:
    moment = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)
    local = moment.astimezone()
    span = f"{local.hour:02}:00-{(local.hour + 1) % 24:02}:00"
    assert Policy(hours=span).open_at(moment)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_round: 3\n", r"max_round: unknown key \(nearest known: max_rounds\)"),
        ("privacy: {max_eps: 3}\n", r"privacy\.max_eps: unknown key \(nearest known: privacy\.max_epsilon, "),
        ("max_epsilon: 4\n", r"max_epsilon: unknown key \(nearest known: privacy\.max_epsilon, written as privacy: {max_epsilon: …}\)"),
        ("privacy: {max_rank: 4}\n", r"privacy\.max_rank: unknown key \(nearest known: max_rank\)"),
        ("max_rounds: 3.5\n", "max_rounds: "),
        ("max_rounds: '3'\n", "max_rounds: .*, not '3'"),
        ("full_tuning: 1\n", "full_tuning: "),
        ("hours: 25:00-06:00\n", "hours: must be a span .*, not '25:00-06:00'"),
        ("models: [sha256:abc]\n", "64 hexadecimal digits, not .*sha256:abc"),
        ("approval: perhaps\n", "approval: .*, not 'perhaps'"),
        ("privacy: {max_epsilon: .inf}\n", "not YAML|max_epsilon"),
        ("privacy: {require: []}\n", r"privacy\.require"),
        ("privacy: {require: [none]}\n", r"privacy\.require"),
        ("format: 2\n", "newer"),
        ("[1]\n", "mapping"),
        ("", "mapping"),
        ("a: [\n", "not YAML"),
        ("privacy: {max_epsilon: 1}\nprivacy: {max_epsilon: 100}\n", "'privacy' is given twice"),
        ("privacy: {max_epsilon: 1, max_epsilon: 100}\n", "'max_epsilon' is given twice"),
    ],
)
def test_a_bad_policy_permits_nothing(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / POLICY).write_text(text)
    with pytest.raises(LichenError, match=words) as caught:
        enforce(tmp_path, plan(), plan().sha256(), NOON)
    assert caught.value.code is Code.POLICY_INVALID


def test_a_person_approves_or_rejects_each_plan(tmp_path: Path) -> None:
    policy(tmp_path, approval="ask", max_rounds=9)
    first, second, excessive = plan(), plan(rounds=6), plan(rounds=10)
    for asked in (first, second, first):
        with pytest.raises(LichenError) as caught:
            enforce(tmp_path, asked, asked.sha256(), NOON)
        assert caught.value.code is Code.POLICY_APPROVAL
    with pytest.raises(LichenError, match=r"policy-refused"):
        enforce(tmp_path, excessive, excessive.sha256(), NOON)  # the limits come first: nobody is asked
    assert {approval.plan_sha256 for approval in pending(tmp_path)} == {first.sha256(), second.sha256()}
    waiting = next(approval for approval in pending(tmp_path) if approval.plan_sha256 == first.sha256())
    assert yaml.safe_load(waiting.plan.read_text())["rounds"] == 5
    assert approve(tmp_path, first.sha256()[:12]).state == "approved"
    assert reject(tmp_path, second.sha256()).state == "rejected"
    assert pending(tmp_path) == []
    assert enforce(tmp_path, first, first.sha256(), NOON).max_rounds == 9
    with pytest.raises(LichenError, match=r"a person rejected this plan"):
        enforce(tmp_path, second, second.sha256(), NOON)
    approve(tmp_path, second.sha256())  # a person may change their mind
    enforce(tmp_path, second, second.sha256(), NOON)
    with pytest.raises(LichenError, match=r"policy-approval"):
        enforce(tmp_path, plan(rounds=7), plan(rounds=7).sha256(), NOON)  # an approval is for one plan


def test_an_approval_holds_in_a_lichen_with_more_keys_but_not_for_another_plan(tmp_path: Path, older_text: Callable[[Plan], str]) -> None:
    policy(tmp_path, approval="ask")
    asked, digest = plan(), digest_of(older_text(plan()))
    with pytest.raises(LichenError, match=r"policy-approval"):
        enforce(tmp_path, asked, digest, NOON)
    shown = pending(tmp_path)[0].plan
    document = yaml.safe_load(shown.read_text())
    del document["transfer"]  # as a lichen without that key has shown it
    shown.write_text(yaml.safe_dump(document))
    approve(tmp_path, digest)
    enforce(tmp_path, asked, digest, NOON)
    changed = plan(local={"steps": 4})  # as where a default that the text leaves out has changed
    for _ in range(2):
        with pytest.raises(LichenError, match=r"policy-approval"):
            enforce(tmp_path, changed, digest, NOON)
        assert [(found.plan_sha256, load_plan(found.plan)) for found in pending(tmp_path)] == [(digest, changed)]
    approve(tmp_path, digest)
    enforce(tmp_path, changed, digest, NOON)
    (tmp_path / APPROVALS / f"{digest}.plan.yaml").unlink()  # nobody can tell any more what was approved
    with pytest.raises(LichenError, match=r"policy-approval"):
        enforce(tmp_path, changed, digest, NOON)


def test_approvals_of_no_plan_and_damaged_ones(tmp_path: Path) -> None:
    policy(tmp_path, approval="ask")
    for digest in ("", first_digits := plan().sha256()[:8], "../../x", "ab"):
        with pytest.raises(LichenError) as caught:
            approve(tmp_path, digest)
        assert caught.value.code is Code.POLICY_APPROVAL
    with pytest.raises(LichenError):
        enforce(tmp_path, plan(), plan().sha256(), NOON)
    approve(tmp_path, first_digits)
    (tmp_path / APPROVALS / f"{plan().sha256()}.json").write_text('{"format": 1, "state": "appr')
    with pytest.raises(LichenError, match=r"policy-invalid"):
        enforce(tmp_path, plan(), plan().sha256(), NOON)


def test_a_policy_that_was_not_loaded_from_a_home_cannot_know_of_approvals() -> None:
    with pytest.raises(LichenError, match=r"policy-approval"):
        permits(Policy(approval="ask"), plan())
