"""What this node's owner permits: `policy.yaml`, its check against a plan, and a person's approvals.

The policy is enforced before anything of a plan is loaded; the tighter of plan and policy holds. Without a file the defaults hold:
nothing leaves without differential privacy, ε ≤ 8 and δ ≤ 1e-5 over the node's life.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from lichen.common.aggregation import properties
from lichen.common.continual.stream import is_online
from lichen.common.errors import Code, LichenError
from lichen.common.model.base import resolve_base
from lichen.common.plan import Number, Plan, load_plan
from lichen.common.plan.mistakes import closest, complaint
from lichen.common.private_files import write_private
from lichen.common.yaml_files import read_yaml

POLICY = "policy.yaml"
APPROVALS = "approvals"
FORMAT: Final = 1
_HOURS = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Decision = Literal["pending", "approved", "rejected"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PrivacyPolicy(_Section):
    """What privacy a plan must give."""

    require: tuple[Literal["example", "entity", "client"], ...] = Field(default=("example", "entity"), min_length=1)
    """Units of privacy (privacy.unit) that are enough; client is promised by the coordinator. For none: unnoised_updates_to_coordinator."""
    max_epsilon: Number = Field(default=8.0, gt=0)
    """Largest ε of a plan, and of all runs together over the life of each of this node's records, which the ledger keeps to."""
    max_delta: Number = Field(default=1e-5, gt=0, lt=1)
    """Largest δ of a plan. Over several runs the bound holds at twice this (docs/design.md: two accountants)."""
    text_field: str = "text"
    """The data field that plans read texts from (task.text_field). A row is known by it: by another it would be a new one, with a new ε."""
    unit_fields: tuple[str, ...] | None = None
    """Data fields that name entities (privacy.unit_field), such as a patient's number. Left out: any, if require has example; else none."""


class Policy(_Section):
    """The document `policy.yaml`: limits on any plan. Every key may be left out."""

    format: Literal[1] = FORMAT
    """The version of this format."""
    models: tuple[str, ...] | None = None
    """Base models that may be loaded: a plan's model.base, word for word, or sha256:DIGEST of model.safetensors. Left out: any."""
    tasks: tuple[str, ...] | None = None
    """Kinds of task (the plan's task.kind). Left out: any."""
    unnoised_updates_to_coordinator: Literal["never", "allow"] = "never"
    """Whether updates without noise of this node's own may leave it (privacy.unit: none or client). An update can reveal rows."""
    privacy: PrivacyPolicy = PrivacyPolicy()
    min_cohort: int = Field(default=1, ge=1)
    """Smallest cohort.minimum of a plan: an update is never averaged with fewer others than that."""
    secure_aggregation: Literal["required", "optional"] = "optional"
    """Whether the plan's aggregation.secure must be on."""
    max_rounds: int | None = Field(default=None, ge=1)
    """Most rounds of a plan."""
    max_rank: int | None = Field(default=None, ge=1)
    """Largest rank of an adapter."""
    full_tuning: bool = True
    """Whether all weights may be tuned (model.adapter.kind: full)."""
    evaluation: bool = True
    """Whether models may be scored on this node's held-out rows for the coordinator (evaluation.federated_every)."""
    online: bool = True
    """Whether the coordinator may be told that new data came, and its declared size (continual.mode: online)."""
    canaries: bool = False
    """Whether a plan may add made-up, wrong rows to those trained on here (privacy.audit), to test its privacy. They cost accuracy."""
    threads: int | None = Field(default=None, ge=1)
    """Most threads of the worker that trains."""
    memory_mb: int | None = Field(default=None, ge=256)
    """Most memory of the worker that trains, in MiB."""
    profile: bool = True
    """Whether the coordinator is told what this machine can do, rounded: device, free memory, threads, speeds (lichen client profile)."""
    hours: str | None = None
    """When the node may train, in local time, such as "22:00-06:00". Outside it takes no work."""
    approval: Literal["automatic", "ask"] = "automatic"
    """ask: a person must approve each plan, once for all its runs (lichen client pending, approve, reject)."""

    _home: Path | None = PrivateAttr(default=None)

    @field_validator("hours")
    @classmethod
    def _hours_are_a_span(cls, value: str | None) -> str | None:
        if value is not None and (not _HOURS.fullmatch(value) or len(set(_minutes(value))) == 1):
            raise ValueError('must be a span of time such as "22:00-06:00"')
        return value

    @field_validator("models")
    @classmethod
    def _digests_are_whole(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name.startswith("sha256:") and not _SHA256.fullmatch(name.removeprefix("sha256:")):
                raise ValueError("sha256: must be followed by 64 hexadecimal digits")
        return value

    def open_at(self, now: datetime) -> bool:
        """Whether ``now`` lies in `hours`; a time with a zone is converted to local time."""
        if self.hours is None:
            return True
        local = now.astimezone() if now.tzinfo else now
        begin, end = _minutes(self.hours)
        minute = local.hour * 60 + local.minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def check(
        self,
        plan: Plan,
        plan_sha256: str,
        now: datetime,
        *,
        weights_sha256: Callable[[], str] | None = None,
    ) -> None:
        """Refuse a plan that asks for more than is permitted.

        Args:
            plan: what arrived.
            plan_sha256: the digest that a person approves: of the text that it came as (`Assignment.read_plan`).
            now: for `hours`.
            weights_sha256: finds the digest of the base model's weights; called only where `models` lists digests. Without it such a
                model counts as not permitted.

        Raises:
            LichenError: POLICY_REFUSED with each offending key, what the plan asks and what is permitted; POLICY_APPROVAL if a person
                has yet to decide.
        """
        refusals = [*self._refusals(plan, weights_sha256)]
        if not self.open_at(now):
            refusals.append(f"the time is {now:%H:%M}; hours permits {self.hours}")
        if refusals:
            raise _refused(plan, refusals)
        if self.approval == "ask":
            decided = decision(self._home, plan, plan_sha256) if self._home else "pending"
            if decided == "rejected":
                raise _refused(plan, ["a person rejected this plan; approval is ask"])
            if decided == "pending":
                fix = f"lichen client approve {plan_sha256[:12]}, or reject."
                raise LichenError(Code.POLICY_APPROVAL, "a person must approve this plan first", where=plan.name, fix=fix)

    def check_model(self, base: str) -> None:
        """Refuse a base model that may not be loaded, as a fetched model's plan names it.

        Raises:
            LichenError: POLICY_REFUSED.
        """
        for refusal in self._model_refusals(base, lambda: weights_sha256(base)):
            raise LichenError(Code.POLICY_REFUSED, refusal, where=base, fix=f"The data owner may change {POLICY}.")

    def _model_refusals(self, base: str, weights: Callable[[], str] | None) -> Iterator[str]:
        if self.models is not None and base not in self.models:
            digests = [name for name in self.models if name.startswith("sha256:")]
            own = f"sha256:{weights()}" if digests and weights else None
            if own not in digests:
                yield _told("model.base", base + (f" ({own})" if own else ""), "models", ", ".join(self.models) or "none")

    def _refusals(self, plan: Plan, weights: Callable[[], str] | None) -> Iterator[str]:
        yield from self._model_refusals(plan.model.base, weights)
        if properties(plan).changes_base and self.models is not None and plan.model.base not in self.models:
            yield _told("aggregation.rule", plan.aggregation.rule, "models", "a base by its digest, which this rule changes")
        if self.tasks is not None and plan.task.kind not in self.tasks:
            yield _told("task.kind", plan.task.kind, "tasks", ", ".join(self.tasks) or "none")
        if plan.private:
            yield from self._privacy_refusals(plan)
        elif self.unnoised_updates_to_coordinator == "never":
            yield _told("privacy.unit", "none", "unnoised_updates_to_coordinator", "never")
        if plan.cohort.minimum < self.min_cohort:
            yield _told("cohort.minimum", plan.cohort.minimum, "min_cohort", f"{self.min_cohort} or more")
        if self.secure_aggregation == "required" and not plan.aggregation.secure:
            yield _told("aggregation.secure", False, "secure_aggregation", "required")
        if self.max_rounds is not None and plan.rounds > self.max_rounds:
            yield _told("rounds", plan.rounds, "max_rounds", self.max_rounds)
        if plan.model.adapter.kind == "full":
            if not self.full_tuning:
                yield _told("model.adapter.kind", "full", "full_tuning", False)
        elif self.max_rank is not None and plan.model.adapter.rank > self.max_rank:
            yield _told("model.adapter.rank", plan.model.adapter.rank, "max_rank", self.max_rank)
        yield from self._reading_refusals(plan)

    def _reading_refusals(self, plan: Plan) -> Iterator[str]:
        if plan.privacy.audit.canaries and not self.canaries:
            yield _told("privacy.audit.canaries", plan.privacy.audit.canaries, "canaries", False)
        if plan.evaluation.federated_every and not self.evaluation:
            yield _told("evaluation.federated_every", plan.evaluation.federated_every, "evaluation", False)
        if is_online(plan) and not self.online:
            yield _told("continual.mode", "online", "online", False)

    def _privacy_refusals(self, plan: Plan) -> Iterator[str]:
        asked, permitted = plan.privacy, self.privacy
        if asked.unit not in permitted.require:
            yield _told("privacy.unit", asked.unit, "privacy.require", ", ".join(permitted.require))
        fields = permitted.unit_fields
        if fields is None and "example" not in permitted.require:
            fields = ()  # a plan would choose, and each text is an entity of its own
        if asked.unit_field is not None and fields is not None and asked.unit_field not in fields:
            yield _told("privacy.unit_field", asked.unit_field, "privacy.unit_fields", ", ".join(fields) or "none")
        if plan.task.text_field != permitted.text_field:
            yield _told("task.text_field", plan.task.text_field, "privacy.text_field", permitted.text_field)
        # Noise that is added elsewhere leaves this node's own update bare.
        if str(asked.noise) != "local" and self.unnoised_updates_to_coordinator == "never":
            yield _told("privacy.noise", asked.noise, "unnoised_updates_to_coordinator", "never")
        for key, wanted, most in (("epsilon", asked.epsilon, permitted.max_epsilon), ("delta", asked.delta, permitted.max_delta)):
            if wanted > most:
                yield _told(f"privacy.{key}", f"{wanted:g}", f"privacy.max_{key}", f"{most:g}")

    @classmethod
    def _of(cls, home: Path, policy: Self) -> Self:
        policy._home = home
        return policy


def load_policy(home: Path) -> Policy:
    """The node's policy; the default one if it has no `policy.yaml`. Writes nothing.

    Raises:
        LichenError: POLICY_INVALID if the file can't be understood, with the key.
    """
    path = home / POLICY
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Policy._of(home, Policy())
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(Code.POLICY_INVALID, f"can't be read: {error}", where=str(path)) from None
    try:
        document = read_yaml(text)
    except yaml.YAMLError as error:
        raise LichenError(Code.POLICY_INVALID, f"not YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if not isinstance(document, dict):
        raise LichenError(Code.POLICY_INVALID, "a policy is a mapping of keys", where=str(path), fix="Delete the file for the defaults.")
    version = document.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise LichenError(
            Code.POLICY_INVALID, f"format {version} is newer than this lichen's {FORMAT}", where=str(path), fix="Upgrade lichen."
        )
    try:
        # Through JSON, whose arrays are tuples to a strict model as well.
        return Policy._of(home, Policy.model_validate_json(json.dumps(document, default=str)))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"])
        what = f"{key}: {complaint(detail)}"
        if detail["type"] == "extra_forbidden" and (near := _nearest(key)):
            what += f" (nearest known: {near})"
        raise LichenError(Code.POLICY_INVALID, what, where=str(path), fix="`lichen client policy` describes every key.") from None


def _nearest(key: str) -> str | None:
    """The path of the key that an unknown one was perhaps meant as, in whichever section it was written."""
    near = closest(key.rpartition(".")[2], [*Policy.model_fields, *PrivacyPolicy.model_fields], cutoff=0.6)
    return f"privacy.{near}, written as privacy: {{{near}: …}}" if near in PrivacyPolicy.model_fields else near


def write_default(home: Path) -> Path:
    """Write the default policy, each key with what it means, and return its path.

    Raises:
        LichenError: OUTPUT_EXISTS if there is one already: an owner's limits are never overwritten.
    """
    path = home / POLICY
    if path.exists():
        raise LichenError(Code.OUTPUT_EXISTS, "there is a policy already", where=str(path))
    write_private(path, documented(Policy()).encode())
    return path


def schema() -> dict[str, Any]:
    """The policy's JSON schema."""
    return Policy.model_json_schema()


def documented(policy: Policy) -> str:
    """A policy as `policy.yaml` would say it, each key with what it means."""
    return "".join(_documented(policy, ""))


def _documented(section: BaseModel, indent: str) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if field.description:
            yield f"{indent}# {field.description}\n"
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:\n"
            yield from _documented(value, indent + "  ")
        else:
            shown = json.dumps(value) if not isinstance(value, str) else value
            yield f"{indent}{'# ' if value is None else ''}{key}: {'…' if value is None else shown}\n"


@dataclass(frozen=True)
class Approval:
    """A plan that waits, or waited, for a person.

    Attributes:
        plan_sha256: its digest, by which it is approved.
        name: the plan's name.
        state: the decision.
        at: when it was asked for or decided (ISO 8601).
        plan: a file with the whole plan, to read before deciding.
    """

    plan_sha256: str
    name: str
    state: Decision
    at: str
    plan: Path


def enforce(home: Path, plan: Plan, plan_sha256: str, now: datetime) -> Policy:
    """Load the policy and check a plan against it; a plan that needs a person is put before them.

    Args:
        home: the node's home.
        plan: what arrived.
        plan_sha256: the digest of the text that it came as.
        now: for `hours`.

    Returns:
        The policy, whose `threads` and `memory_mb` bind the worker.

    Raises:
        LichenError: POLICY_INVALID, POLICY_REFUSED, POLICY_APPROVAL.
    """
    policy = load_policy(home)
    try:
        policy.check(plan, plan_sha256, now, weights_sha256=lambda: weights_sha256(plan.model.base))
    except LichenError as error:
        if error.code is Code.POLICY_APPROVAL:
            request(home, plan, plan_sha256)
        raise
    return policy


def weights_sha256(base: str) -> str:
    """The digest of a base model's weights, without loading them: of `model.safetensors` in a folder or an installed package.

    A hub name has none here (what it stands for may change until it is loaded), nor has a model in several files: empty then.
    """
    try:
        path = Path(resolve_base(base)) / "model.safetensors"
        found = path.stat()
    except (OSError, LichenError):
        return ""
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: Path, size: int, changed: int) -> str:
    """Cached by ``size`` and ``changed``, so that a round does not read the weights again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def promise(plan: Plan) -> str:
    """What privacy a plan gives this node's data, and by whom, in words for who decides."""
    if not plan.private:
        return "no differential privacy: un-noised updates leave this node"
    if plan.central:
        return f"ε ≤ {plan.privacy.epsilon:g} for all that this node has, promised by the coordinator: un-noised updates leave this node"
    unit = f"value of {plan.privacy.unit_field}" if plan.privacy.unit_field else plan.privacy.unit
    return f"ε ≤ {plan.privacy.epsilon:g} for each {unit}, by noise that this node adds"


def request(home: Path, plan: Plan, plan_sha256: str) -> None:
    """Put a plan before the node's owner; nothing changes if it is there already."""
    record = _record(home, plan_sha256)
    if not record.exists() or _is_of_another(_read(home, plan_sha256), plan):
        record.unlink(missing_ok=True)  # first: what is written now nobody has approved
        write_private(home / APPROVALS / f"{plan_sha256}.plan.yaml", plan.to_yaml().encode())
        _write(home, plan_sha256, plan.name, "pending")


def decision(home: Path, plan: Plan, plan_sha256: str) -> Decision:
    """What a person decided on a plan; ``pending`` also if they were never asked, or had another before them."""
    if not _record(home, plan_sha256).exists() or _is_of_another(found := _read(home, plan_sha256), plan):
        return "pending"
    return found.state


def _is_of_another(approval: Approval, plan: Plan) -> bool:
    """Whether what was approved was not this plan: the same text is another to a lichen in which a default has changed."""
    if approval.state != "approved":
        return False
    try:
        return load_plan(approval.plan) != plan
    except LichenError:
        return True


def approvals(home: Path) -> list[Approval]:
    """All plans that a person was asked about, the oldest first."""
    found = [_read(home, path.stem) for path in (home / APPROVALS).glob("*.json") if _SHA256.fullmatch(path.stem)]
    return sorted(found, key=lambda approval: (approval.at, approval.plan_sha256))


def pending(home: Path) -> list[Approval]:
    """The plans that wait for a person, the oldest first."""
    return [approval for approval in approvals(home) if approval.state == "pending"]


def approve(home: Path, plan_sha256: str) -> Approval:
    """Permit a plan; the digest may be shortened to what is unique (at least 8 digits).

    Raises:
        LichenError: POLICY_APPROVAL if no plan, or more than one, has that digest.
    """
    return _decide(home, plan_sha256, "approved")


def reject(home: Path, plan_sha256: str) -> Approval:
    """Forbid a plan. Arguments and errors as :func:`approve`."""
    return _decide(home, plan_sha256, "rejected")


def _decide(home: Path, digest: str, state: Decision) -> Approval:
    found = [approval for approval in approvals(home) if approval.plan_sha256.startswith(digest)] if len(digest) >= 8 else []
    if len(found) != 1:
        what = f"{len(found)} plans have a digest that begins with {digest!r}" if len(digest) >= 8 else f"{digest!r} is too short"
        raise LichenError(Code.POLICY_APPROVAL, what, where=str(home), fix="lichen client pending")
    _write(home, found[0].plan_sha256, found[0].name, state)
    return _read(home, found[0].plan_sha256)


def _record(home: Path, digest: str) -> Path:
    # The digest comes from elsewhere and becomes a file's name.
    if not _SHA256.fullmatch(digest):
        raise LichenError(Code.POLICY_APPROVAL, f"{digest!r} is no SHA-256")
    return home / APPROVALS / f"{digest}.json"


def _write(home: Path, digest: str, name: str, state: Decision) -> None:
    document = {"format": FORMAT, "name": name, "state": state, "at": datetime.now(UTC).isoformat(timespec="milliseconds")}
    write_private(_record(home, digest), json.dumps(document).encode())


def _read(home: Path, digest: str) -> Approval:
    path = _record(home, digest)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["state"] not in ("pending", "approved", "rejected"):
            raise ValueError
        return Approval(digest, str(document["name"]), document["state"], str(document["at"]), path.with_name(f"{digest}.plan.yaml"))
    except (OSError, ValueError, KeyError, TypeError):
        raise LichenError(
            Code.POLICY_INVALID, "a damaged approval, or of a newer lichen", where=str(path), fix="Delete it to be asked again."
        ) from None


def _minutes(hours: str) -> tuple[int, int]:
    match = _HOURS.fullmatch(hours)
    if match is None:
        raise ValueError(hours)
    begin_hour, begin_minute, end_hour, end_minute = map(int, match.groups())
    return begin_hour * 60 + begin_minute, end_hour * 60 + end_minute


def _told(plan_key: str, asked: object, policy_key: str, permitted: object) -> str:
    return f"{plan_key} asks {asked}; {policy_key} permits {permitted}"


def _refused(plan: Plan, refusals: list[str]) -> LichenError:
    what = refusals[0] if len(refusals) == 1 else f"{len(refusals)} refusals\n  " + "\n  ".join(refusals)
    return LichenError(Code.POLICY_REFUSED, what, where=f"plan {plan.name}", fix=f"The data owner may change {POLICY}.")
