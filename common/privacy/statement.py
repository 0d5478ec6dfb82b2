"""The privacy statement of a run: what is protected, from whom, verified by whom, how far, on which assumptions, and what is not.

A pure function of the plan and the result. No number in it is called ε that is not an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from lichen.common.channel.rules import RULES
from lichen.common.continual import make_method
from lichen.common.continual.stream import is_online, tasks_of
from lichen.common.privacy.schedule import one_task_each
from lichen.common.records import CENTRAL_PAYLOAD_RULE, PAYLOAD_RULE, EvaluateReport, Rule, TrainReport

if TYPE_CHECKING:
    from lichen.common.plan import Plan
    from lichen.common.result import Result

Verified = Literal["the agent", "the coordinator (promised)", "both ends", "nobody"]
ACCOUNTANT = (
    "privacy loss distributions of the Poisson-subsampled Gaussian mechanism, by Google's dp-accounting, pessimistic (an upper bound): one "
    "accountant calibrates the noise, stops the training and reports"
)
GATED = "the plan's ε: work may have left that is not in the coordinator's account, but a client's own ledger stops it there"
EVERY = "every client"
"""Stands for a client's name where one bound is told for all."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Bound(_Section):
    """Upper bounds for one client, of this run alone: what other runs spent on the same rows adds to it."""

    epsilon: float
    """For one unit in one segment: the maximum over segments."""
    delta: float
    epsilon_sum: float
    """For a person with records in all segments: the sum."""
    delta_sum: float
    """The δ that goes with the sum."""
    how: str
    """What the bound rests on."""


class Claim(_Section):
    """One thing that is protected."""

    what: str
    against: str
    """Whom it holds against."""
    by: str
    """What enforces it."""
    verified_by: Verified
    """Who can tell that it is so."""


class Leaving(_Section):
    """One field of what a node sends."""

    field: str
    rule: str
    """Name of a `records.Rule`."""
    why: str


class Statement(_Section):
    """What a run protects, and what it does not."""

    private: bool
    """Whether anything of the training data is protected: differential privacy, by noise that nobody can take off."""
    summary: str
    unit: str | None = None
    """What is protected, in words."""
    adjacency: str | None = None
    accountant: str | None = None
    clients: dict[str, Bound] = Field(default_factory=dict)
    """Bounds by client; empty where no bound holds."""
    with_secret_noise: dict[str, Bound] = Field(default_factory=dict)
    """Of a simulation, whose noise is seeded: the bounds that would hold if it were secret. They protect nobody."""
    claims: list[Claim] = Field(default_factory=list)
    leaves: list[Leaving] = Field(default_factory=list)
    assumptions: list[str] = Field(default_factory=list)
    not_protected: list[str] = Field(default_factory=list)

    def bound(self, client: str) -> Bound | None:
        """One client's bounds; None where it sent nothing."""
        bounds = self.clients or self.with_secret_noise
        return bounds.get(client) or bounds.get(EVERY)

    @property
    def worst(self) -> Bound | None:
        """The largest bounds of all clients."""
        found = list((self.clients or self.with_secret_noise).values())
        return max(found, key=lambda bound: bound.epsilon, default=None)


def unit_in_words(plan: Plan) -> str:
    """What the plan protects."""
    units = {"example": "one row", "entity": f"all rows with one value of {plan.privacy.unit_field}", "client": "all rows of one client"}
    return units.get(plan.privacy.unit, "nothing")


def make_statement(plan: Plan, result: Result) -> Statement:
    """The statement of a run, so far as it has come.

    Args:
        plan: what was run.
        result: what came of it; its own statement is not read.
    """
    if not plan.private:
        return Statement(
            private=False,
            summary="No differential privacy. The updates and the model may reveal rows that they were trained on.",
            claims=_transport(result),
            leaves=list(_leaving(plan)),
            not_protected=[
                "The rows: whoever sees an update or the model may be able to tell which rows it was trained on, and what they say.",
                *_never_protected(),
            ],
        )
    seeded = result.privacy.noise == "seeded: not private"
    unit, bounds = unit_in_words(plan), _bounds(plan, result)
    adjacency = f"add/remove of {unit}"
    worst = max(bounds.values(), key=lambda bound: bound.epsilon, default=None)
    told = "no client has taken a step"
    if worst is not None:
        told = f"ε ≤ {bound_text(worst.epsilon)} at δ = {worst.delta:g} for {unit} ({adjacency})"
    central = plan.central
    against = "everyone who sees updates or the model, the coordinator included"
    if central:
        against = "whoever sees the model, but not against the coordinator"
    if seeded:
        summary = (
            "Not private: the noise was seeded so that the simulation repeats, and whoever knows the seed can take it off. "
            f"With secret noise, as in a deployment, the same steps would give: {told}."
        )
    else:
        summary = f"Differential privacy: {told}, for each client, against {against}."
    return Statement(
        private=not seeded,
        summary=summary,
        unit=unit,
        adjacency=adjacency,
        accountant=ACCOUNTANT,
        clients={} if seeded else bounds,
        with_secret_noise=bounds if seeded else {},
        claims=[*_claims(plan, result, unit), *_transport(result)],
        leaves=list(_leaving(plan)),
        assumptions=list(_assumptions(plan, central=central)),
        not_protected=[
            *(["Anything, in this run: its noise follows from the seed."] if seeded else []),
            *(["The rows from the coordinator, which sees each client's update before any noise."] if central else []),
            *_never_protected(),
            f"A person beyond {unit}: what their other rows, other clients' data or other runs tell of them.",
            "What tuning told: settings that were chosen by looking at results on these rows cost ε that is not in this account.",
        ],
    )


def _bounds(plan: Plan, result: Result) -> dict[str, Bound]:
    """Each client's bound: by its reports where these tell all, else the plan's ε, which its ledger does not let it pass."""
    privacy = plan.privacy
    if plan.central:  # one for all, that no name tells who took part
        spent = (result.privacy.max_epsilon or 0.0) if result.status == "finished" else privacy.epsilon
        how = "rounds, noise and cohorts as the coordinator accounts for them"
        bound = Bound(epsilon=spent, delta=privacy.delta, epsilon_sum=spent, delta_sum=privacy.delta, how=how)
        return {EVERY: bound}
    failed = {name for told in result.rounds for name in (*told.errors, *told.before_errors, *told.called_off)}
    whole = result.status == "finished" and result.engine != "flower"  # stock Flower may ask twice, and a round under way is not told yet
    segments = (len(tasks_of(plan)) if one_task_each(plan) else 1) + bool(plan.evaluation.federated_every)
    gated = Bound(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        epsilon_sum=segments * privacy.epsilon,
        delta_sum=segments * privacy.delta,
        how=GATED,
    )
    if not whole:
        return {EVERY: gated}
    found = dict.fromkeys(sorted(failed), gated)
    for name, client in result.privacy.clients.items():
        if name not in failed:
            found[name] = Bound(
                epsilon=client.epsilon,
                delta=privacy.delta,
                epsilon_sum=client.epsilon_sum,
                delta_sum=max(1, len(client.segments)) * privacy.delta,
                how=f"{client.steps} steps, noise multiplier {client.noise_multiplier:.4g}, sample rate {client.sample_rate:.4g}",
            )
    return dict(sorted(found.items()))


def _claims(plan: Plan, result: Result, unit: str) -> Iterator[Claim]:
    if plan.central:
        for what, by in (
            (f"{unit}: whether a client's data were used at all", "the coordinator clips each update and adds noise to their sum"),
            ("who takes part in a round", "the coordinator's secret draw"),
        ):
            yield Claim(what=what, against="whoever sees the models, clients too", by=by, verified_by="the coordinator (promised)")
        return
    everyone = "everyone, the coordinator included"
    agent: Verified = "the agent"
    yield Claim(
        what=f"{unit}: whether it was in the training data, and what it says",
        against=everyone,
        by="each step's gradient of each unit is clipped and the sum noised on the node, checked against a loop over single rows at start",
        verified_by=agent,
    )
    yield Claim(
        what="which rows a step draws",
        against=everyone,
        by="Poisson sampling on the node, from the operating system's generator; an empty draw takes a step of noise alone",
        verified_by=agent,
    )
    yield Claim(
        what="no step beyond the plan's ε and δ, nor beyond those that the owner permits for life",
        against="a coordinator that asks for more",
        by="the node's ledger, which reserves a round's steps on disk before the first is taken",
        verified_by=agent,
    )
    yield Claim(
        what="the true number of rows",
        against=everyone,
        by="noise, sample rate, denominator and weight follow from the size that the owner declared",
        verified_by=agent,
    )
    yield Claim(
        what="losses, counts and texts of errors",
        against=everyone,
        by="a rule on every field that may leave; without one, or against it, nothing is sent",
        verified_by=agent,
    )
    yield Claim(
        what="the ε and δ in this statement, of all clients",
        against="readers of this report",
        by="computed from what each client reported and held against the plan; a client's own ledger has its own account",
        verified_by="the coordinator (promised)",
    )


def _transport(result: Result) -> list[Claim]:
    if result.engine != "deployed":
        return []
    return [
        Claim(
            what="updates and model on their way",
            against="the network",
            by="TLS with certificates of the federation's own authority on both ends",
            verified_by="both ends",
        )
    ]


def _leaving(plan: Plan) -> Iterator[Leaving]:
    """Every field that a node may send under this plan, with the rule by which it may."""

    def told(field: str, rule: Rule) -> Leaving:
        return Leaving(field=field, rule=rule.name.lower(), why=rule.value)

    def leaves(rule: Rule) -> bool:
        return not (plan.private and rule is Rule.PLAIN) and (plan.central or rule is not Rule.SUMMED)

    payload = CENTRAL_PAYLOAD_RULE if plan.central else PAYLOAD_RULE if plan.private else Rule.PLAIN
    yield told("update (every trained tensor)", payload)
    if sums := make_method(plan).gathered_in_words:
        yield told(sums, payload)
    kinds: list[type[TrainReport | EvaluateReport]] = [TrainReport, *([EvaluateReport] if plan.evaluation.federated_every else [])]
    for kind in kinds:
        for name, info in kind.model_fields.items():
            for rule in info.metadata:
                if isinstance(rule, Rule) and leaves(rule):
                    yield told(f"{kind.__name__}.{name}", rule)
    for field, rule in RULES.items():
        if field.startswith("News.") and not is_online(plan):
            continue
        if rule is PAYLOAD_RULE:  # they carry the update
            yield told(field, payload)
        elif leaves(rule):
            yield told(field, rule)


def _assumptions(plan: Plan, *, central: bool) -> Iterator[str]:
    if central:
        yield "The coordinator runs lichen as it is, and does not look at single updates: no node can check its clipping, noise or draws."
        yield "The coordinator's noise and cohorts come from a generator that nobody can predict."
        return
    yield "The node runs lichen as it is installed there, on a machine that nobody else controls."
    yield "The declared size is a public constant of the owner's choice, and not taken from the true number of rows."
    yield "The noise and the draws of rows stay secret, and come from the operating system's generator."
    yield (
        "ε bounds the mechanism on real numbers. Floats are guarded, not proven: sums are noised in 64 bits and rounded to a grid that is "
        "coarse beside a float's own and fine beside the noise (Mironov 2012)."
    )
    of = "training rows of each task, held-out rows" if one_task_each(plan) else "training rows, held-out rows"
    yield f"A client's segments ({of}) are disjoint: one record is in one of them{_segments(plan)}."
    yield "This run alone: what earlier or later runs spend on the same rows adds to it, and is kept in the node's ledger."
    yield "Each client's data are its own: who has rows at several clients adds up their ε and δ."
    if plan.model.head.init == "base":
        yield (
            "Labels, their descriptions and the plan are public, and were not made from these rows. The base model may be an earlier "
            "run's: what that spent on a row adds to this run's ε and δ, and a node's ledger has both; if it trained without privacy, ε "
            "bounds nothing for the rows that it read."
        )
    else:
        yield "Labels, their descriptions, the base model and the plan are public, and were not made from these rows."
    if plan.privacy.audit.canaries:
        yield "Canaries were drawn, clipped and charged like rows; which of them were trained on is known to the node alone."


def _segments(plan: Plan) -> str:
    if one_task_each(plan):
        return ", since the node reads no record in two tasks of a run, whatever the plan says"
    return ", since rows are held out by a keyed hash of their content" if plan.evaluation.federated_every else ""


def _never_protected() -> Iterator[str]:
    yield "That a node takes part, when, and how long its work took."
    yield "How many files are in a folder that a node's owner watches, and when one came: the owner declares a size for each."
    yield "That a node failed, and by which error number."
    yield "The model itself, from anybody who is given it, and against other clients' bad updates."
    yield "What the model learns of all rows together: that is what it is for."


# --- words -------------------------------------------------------------------------------------------------------------------


def _bound_in_words(name: str, bound: Bound) -> str:
    line = f"{name}: ε ≤ {bound_text(bound.epsilon)} at δ = {bound.delta:g}"
    if bound.delta_sum != bound.delta:
        line += f"; for a person in all segments ε ≤ {bound_text(bound.epsilon_sum)} at δ = {bound.delta_sum:g}"
    return f"{line} ({bound.how})"


def bound_text(epsilon: float, places: int = 3) -> str:
    """An upper bound, rounded up: it must not read lower than it is."""
    scale = 10**places
    return f"{math.ceil(round(epsilon * scale, 6)) / scale:.{places}f}" if math.isfinite(epsilon) else "∞"


def in_words(statement: Statement, most: int = 20) -> list[tuple[str, list[str]]]:
    """The statement as headings with their sentences, for people.

    Args:
        statement: what to tell.
        most: clients that are named; the others have no larger ε.
    """
    parts: list[tuple[str, list[str]]] = [("In short", [statement.summary])]
    bounds = statement.clients or statement.with_secret_noise
    if bounds:
        title = "ε and δ of each client" if statement.clients else "ε and δ of each client, if the noise were secret"
        shown = sorted(bounds.items(), key=lambda found: -found[1].epsilon)[:most]
        lines = [_bound_in_words(name, bound) for name, bound in sorted(shown)]
        if len(bounds) > most:
            lines.append(f"and {len(bounds) - most:,} more, with no larger ε")
        parts.append((title, [*lines, f"Accountant: {statement.accountant}."]))
    if statement.claims:
        title = "Protected" if statement.private or not bounds else "What the same run would protect with secret noise"
        lines = [f"{claim.what}; from {claim.against}; by: {claim.by}; verified by: {claim.verified_by}" for claim in statement.claims]
        parts.append((title, lines))
    by_rule: dict[str, list[str]] = {}
    for field in statement.leaves:
        by_rule.setdefault(field.why, []).append(field.field)
    if by_rule:
        parts.append(("What leaves a node", [f"{', '.join(fields)}: {why}" for why, fields in by_rule.items()]))
    if statement.assumptions:
        parts.append(("Assumed", statement.assumptions))
    if statement.not_protected:
        parts.append(("Not protected", statement.not_protected))
    return parts


def as_markdown(statement: Statement) -> str:
    """The statement for a model card: it names no client, since a card travels with the model."""
    lines = ["## Privacy", "", statement.summary]
    if (worst := statement.worst) and worst.delta_sum != worst.delta:
        lines += [
            "",
            f"For a person with records in all segments of a client: ε ≤ {bound_text(worst.epsilon_sum)} at δ = {worst.delta_sum:g}.",
        ]
    for title, sentences in in_words(statement):
        if title in {"Protected", "Assumed", "Not protected", "What the same run would protect with secret noise"}:
            lines += ["", f"{title}:", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"
