"""Combinations of keys that would not do, or not protect, what they seem to: each is refused when a plan is read, with the way out."""

from __future__ import annotations

from collections.abc import Callable

from lichen.common.aggregation import RULES
from lichen.common.continual import make_method, training_rounds
from lichen.common.continual.stream import is_online, is_stream, labels_until, stage_of, stages
from lichen.common.errors import Code, LichenError
from lichen.common.model.base import RANDOM
from lichen.common.plan.plan import Plan
from lichen.common.plan.sections import Local

MOST_BATCHES = 10_000
"""Of an online run: one a day for 27 years."""
MOST_SCORED = 100
"""Of one whose hold-outs are scored by batch."""


def check_sound(plan: Plan, *, where: str = "plan") -> None:
    """Refuse combinations that would not do, or not protect, what they seem to.

    Raises:
        LichenError: PLAN_UNSOUND, with the reason and the keys to change.
    """

    def refuse(what: str, fix: str) -> None:
        raise LichenError(Code.PLAN_UNSOUND, what, where=where, fix=fix)

    if plan.model.head.init == "label-descriptions":
        if plan.model.head.pooling != "mean":
            refuse("model.head.init: label-descriptions needs mean pooling", "Set model.head.pooling: mean.")
        if missing := [label for label in plan.task.labels if label not in plan.task.label_descriptions]:
            refuse(f"no description of {missing}", "Describe every label in task.label_descriptions, or set model.head.init: zeros.")
    if plan.aggregation.average_last > plan.rounds:
        refuse(
            f"aggregation.average_last ({plan.aggregation.average_last}) is above rounds ({plan.rounds})",
            f"Set it to at most {plan.rounds}.",
        )
    if plan.model.adapter.kind == "full" and plan.model.base_precision != "float32":
        refuse(
            f"model.base_precision: {plan.model.base_precision} keeps a frozen base, but adapter kind full trains every weight",
            "Nearest valid: model.base_precision: float32, or model.adapter.kind: lora.",
        )
    if plan.model.adapter.targets == ("all-linear",) and plan.model.adapter.last_layers is not None:
        refuse(
            "model.adapter.last_layers with targets: [all-linear]: layers are picked among modules that are named",
            "Name the linear modules in model.adapter.targets, or leave last_layers out.",
        )
    if plan.private and not plan.central and plan.privacy.gradients == "hooks":
        _check_hooks(plan.local, refuse)
    _check_language(plan, refuse)
    _check_stream(plan, refuse)
    make_method(plan).check(refuse)
    _check_rule(plan, refuse)
    _check_central(plan, refuse)
    _check_assign(plan, refuse)
    _check_asynchrony(plan, refuse)
    if plan.private and not plan.central and plan.local.epochs is not None and plan.privacy.sample_rate is None:
        refuse(
            "local.epochs under differential privacy needs privacy.sample_rate: the number of steps must not depend on true sizes",
            "Set privacy.sample_rate, or local.steps instead of local.epochs.",
        )
    _check_transfer(plan, refuse)
    if plan.privacy.audit.canaries and plan.privacy.unit not in {"example", "entity"}:
        if plan.private:
            refuse(f"privacy.audit has canaries that are rows, not a {plan.privacy.unit}", "Set privacy.audit.canaries: 0.")
        if not plan.privacy.audit.baseline:
            refuse(
                "privacy.audit.canaries without privacy: there is no claim to test",
                "Set privacy.unit, or privacy.audit.baseline: true to see what the audit finds without.",
            )
    if plan.privacy.unit == "entity" and plan.evaluation.federated_every:
        refuse(
            "federated evaluation under unit: entity would read an entity on both sides: hold-outs are drawn by row",
            "Set evaluation.federated_every: 0.",
        )


def _check_hooks(local: Local, refuse: Callable[[str, str], None]) -> None:
    """What Opacus' hooks can't go with."""
    if local.checkpointing:
        refuse(
            "local.checkpointing runs layers twice, and privacy.gradients: hooks would count what they see twice",
            "Nearest valid: privacy.gradients: single-backward, or local.checkpointing: false.",
        )
    if local.precision != "float32":
        refuse(
            f"local.precision: {local.precision} with privacy.gradients: hooks, which take gradients in 32 bits",
            "Nearest valid: privacy.gradients: single-backward, or local.precision: float32.",
        )


def _check_language(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What a task without labels can't go with, and a base without a file."""
    if plan.model.base == RANDOM and (plan.task.kind != "causal-lm" or plan.model.adapter.kind != "full"):
        refuse(
            f"model.base: {RANDOM} has random weights over bytes, all of which a language model must train",
            "Set task.kind: causal-lm and model.adapter.kind: full, or name another base.",
        )
    if plan.task.kind != "causal-lm":
        return
    if plan.model.adapter.kind == "head":
        refuse("model.adapter.kind: head with task.kind: causal-lm, which has no head of its own", "Nearest valid: lora or full.")
    if plan.continual.method in {"lwf", "analytic", "adapters"}:
        refuse(
            f"continual.method: {plan.continual.method} with task.kind: causal-lm, which has no labels to keep",
            "Nearest valid: continual.method: ewc, olora, replay or sequential.",
        )
    if plan.continual.method == "replay" and plan.continual.replay.rows is not None:
        refuse("continual.replay.rows with task.kind: causal-lm: they are so many of each label", "Set continual.replay.share.")
    if plan.privacy.audit.canaries:
        refuse("privacy.audit.canaries with task.kind: causal-lm: canaries are rows with wrong labels", "Set privacy.audit.canaries: 0.")
    if plan.simulation.partition.startswith("dirichlet"):
        refuse("simulation.partition: dirichlet skews labels, and task.kind: causal-lm has none", "Set it to iid or by:FIELD.")


def _check_stream(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What a stream of tasks must be, and what is not built for one."""
    if not is_stream(plan):
        return
    if is_online(plan):
        _check_online(plan, refuse)
    else:
        _check_planned(plan, refuse)
    alike = [stage_of(plan, 1)] if is_online(plan) else stages(plan)  # 10,000 batches are of one length
    if plan.aggregation.average_last > (shortest := min(len(training_rounds(plan, stage)) for stage in alike)):
        refuse(
            f"aggregation.average_last ({plan.aggregation.average_last}) is above the rounds of the shortest task that train ({shortest})",
            f"Set it to at most {shortest}.",
        )
    if plan.cohort.mode == "buffered":
        refuse(
            "cohort.mode: buffered with a stream of tasks: an update may come when another task is learned",
            "Nearest valid: cohort.mode: synchronous.",
        )
    if plan.privacy.audit.canaries:
        refuse("privacy.audit.canaries with a stream of tasks: they are of no task", "Set privacy.audit.canaries: 0.")


def _check_online(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What batches of new data must be, and what is not built for them."""
    online, method = plan.continual.online, plan.continual.method
    if plan.continual.stream:
        refuse("continual.mode: online with a continual.stream: a run has the one or the other", "Leave the stream out.")
    if plan.rounds % online.rounds or plan.rounds // online.rounds > MOST_BATCHES:
        refuse(
            f"rounds ({plan.rounds}) are not those of 1 to {MOST_BATCHES} batches of {online.rounds} (continual.online.rounds)",
            f"Set rounds: {online.rounds * min(MOST_BATCHES, max(1, plan.rounds // online.rounds))}.",
        )
    if online.clients < plan.cohort.minimum:
        refuse(
            f"continual.online.clients ({online.clients}) is below cohort.minimum ({plan.cohort.minimum}): a batch of so few would fail",
            f"Set it to {plan.cohort.minimum} or more.",
        )
    if method in {"adapters", "olora", "replay"}:
        refuse(
            f"continual.method: {method} with mode: online, which is not built: it keeps something of each batch for ever",
            "Nearest valid: continual.method: lwf, ewc, analytic or sequential.",
        )
    if plan.cohort.oversample > 1:
        refuse(
            "cohort.oversample with continual.mode: online: who is called off has read its new rows for nothing",
            "Leave cohort.oversample out.",
        )
    if plan.central:
        refuse(
            "continual.mode: online with unit: client: who is asked would tell who has new data, and cohorts are to stay secret",
            "Nearest valid: privacy.unit: example.",
        )
    if plan.evaluation.federated_every and plan.rounds // online.rounds > MOST_SCORED:
        refuse(
            f"evaluation.federated_every with {plan.rounds // online.rounds} batches: the hold-outs of at most {MOST_SCORED} are scored",
            f"Set rounds: {MOST_SCORED * online.rounds}, or evaluation.federated_every: 0.",
        )
    if online.drift is not None and not plan.evaluation.federated_every:
        refuse(
            "continual.online.drift without evaluation.federated_every: drift is measured on the clients' hold-outs",
            f"Set evaluation.federated_every: {online.rounds}.",
        )


def _check_planned(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What the tasks of a plan must be."""
    tasks = plan.continual.stream
    for task in tasks:
        if strangers := sorted(set(task.labels) - set(plan.task.labels)):
            refuse(f"continual.stream, {task.name}: {strangers} are not among task.labels", "Name labels of task.labels.")
    if plan.task.labels and len(labels_until(plan, 0)) < 2:
        refuse(f"the first task of continual.stream has one label, and so nothing to choose among: {tasks[0].labels}", "Give it two.")
    given = sum(task.rounds or 0 for task in tasks)
    left_out = sum(task.rounds is None for task in tasks)
    if given + left_out > plan.rounds or (not left_out and given != plan.rounds):
        least = f", and {left_out} leave theirs out" if left_out else ""
        refuse(
            f"the tasks of continual.stream have {given} rounds together{least}, and rounds is {plan.rounds}",
            f"Set rounds: {given + left_out}{' or more' if left_out else ''}.",
        )


def _check_assign(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What may vary from node to node only with other settings."""
    if "rank" in plan.cohort.assign:
        if plan.model.adapter.kind != "lora":
            refuse(f"cohort.assign: rank, but a {plan.model.adapter.kind} adapter has none", "Leave rank out of cohort.assign.")
        if not RULES[plan.aggregation.rule].mixed_ranks:
            refuse(
                f"cohort.assign: rank, but aggregation.rule: {plan.aggregation.rule} adds updates of one rank only",
                "Leave rank out of cohort.assign.",
            )
    if "max_length" in plan.cohort.assign and plan.privacy.audit.canaries:
        refuse(
            "cohort.assign: max_length, but an auditor makes canaries again by the plan's own length",
            "Leave max_length out of cohort.assign, or set privacy.audit.canaries: 0.",
        )


def _check_transfer(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What error feedback needs."""
    if plan.transfer.uplink.error_feedback:
        codec = plan.transfer.uplink.codec
        if codec in {"eden", "none"}:
            refuse(f"transfer.uplink.error_feedback with codec: {codec}, which has no lasting error", "Leave error_feedback out.")
        if plan.private:
            refuse(
                "transfer.uplink.error_feedback under differential privacy would carry one round's rows into another",
                "Leave it out, and use codec: eden, whose errors average out.",
            )


def _check_rule(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What an aggregation rule can't go with."""
    rule, needs, aggregation = plan.aggregation.rule, RULES[plan.aggregation.rule], plan.aggregation
    ranks, rank = plan.simulation.ranks, plan.model.adapter.rank
    if needs.lora and plan.model.adapter.kind != "lora":
        refuse(
            f"aggregation.rule: {rule} is for LoRA, and model.adapter.kind is {plan.model.adapter.kind}",
            "Nearest valid: aggregation.rule: fedavg.",
        )
    if ranks and not needs.mixed_ranks:
        mixed = ", ".join(name for name, other in RULES.items() if other.mixed_ranks)
        refuse(f"simulation.ranks with aggregation.rule: {rule}, which takes one rank", f"Leave it out, or choose a rule of {mixed}.")
    if ranks and max(ranks) != rank:
        refuse(f"the largest of simulation.ranks is {max(ranks)}, model.adapter.rank {rank}", f"Set model.adapter.rank: {max(ranks)}.")
    if needs.changes_base and (plan.model.base_precision != "float32" or "precision" in plan.cohort.assign):
        refuse(
            f"aggregation.rule: {rule} adds to the base's weights each round, and a base in fewer bits takes no additions",
            "Set model.base_precision: float32, and leave precision out of cohort.assign.",
        )
    if plan.transfer.uplink.error_feedback and (len(needs.phases) > 1 or needs.changes_base):
        refuse(
            f"transfer.uplink.error_feedback with aggregation.rule: {rule}, whose next round trains other tensors, or another adapter",
            "Leave it out, and use codec: eden, whose errors average out.",
        )
    if rule == "fedex" and (aggregation.optimizer, aggregation.learning_rate) != ("fedavg", 1.0):
        refuse(
            "aggregation.rule: fedex is exact only where the mean is applied as it is",
            "Set aggregation.optimizer: fedavg and learning_rate: 1, or choose aggregation.rule: fedavg.",
        )
    if plan.central and (needs.single_updates or needs.mixed_ranks):
        why = "needs each update, and only their noised sum" if needs.single_updates else "is for several ranks, which is not built"
        refuse(
            f"aggregation.rule: {rule} {why}{' leaves a round' if needs.single_updates else ''} under privacy.unit: client",
            "Nearest valid: aggregation.rule: rolora.",
        )


def _check_central(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What client-level privacy needs, and what belongs to it alone."""
    privacy, cohort = plan.privacy, plan.cohort
    if plan.central != (privacy.noise == "central"):
        nearest = "privacy.noise: central" if plan.central else "privacy.noise: local, or privacy.unit: client"
        refuse(
            f"privacy.unit: {privacy.unit} with noise: {privacy.noise}: unit: client goes with noise: central, and only with it",
            f"Nearest valid: {nearest}.",
        )
    if not plan.central:
        for key, value in (("privacy.adaptive_clip", privacy.adaptive_clip), ("cohort.population", cohort.population)):
            if value is not None:
                refuse(f"{key} goes with privacy.unit: client, and only with it", f"Leave {key} out.")
        return
    if privacy.sample_rate is not None:
        refuse(
            "privacy.sample_rate draws rows; under unit: client whole clients are drawn, with chance cohort.size / cohort.population",
            "Leave privacy.sample_rate out, and set cohort.size and cohort.population.",
        )
    if cohort.population is None:
        refuse(
            "unit: client needs cohort.population, a public constant: how many clients there are may not be read off those that come",
            f"Set cohort.population; nearest valid: {max(cohort.size, plan.simulation.clients)}.",
        )
    elif cohort.size > cohort.population:
        refuse(
            f"cohort.size ({cohort.size}) is above cohort.population ({cohort.population}): a chance above 1",
            f"Nearest valid: cohort.size: {cohort.population}.",
        )
    elif privacy.delta * cohort.population > 1:
        refuse(
            f"δ = {privacy.delta:g} is above one in cohort.population, {cohort.population}: it would permit to publish a client's data",
            f"Set privacy.delta below {1 / cohort.population:g}.",
        )
    if cohort.minimum > 1:
        refuse(
            f"cohort.minimum is {cohort.minimum}: a round that fails for want of clients tells how many were drawn, which is secret",
            "Nearest valid: cohort.minimum: 1; a round of nobody releases noise alone.",
        )
    if plan.evaluation.federated_every:
        refuse(
            "federated evaluation under unit: client would release counts of the cohort that no noise is planned for",
            "Set evaluation.federated_every: 0; the coordinator's own validation rows cost nothing.",
        )


def _check_asynchrony(plan: Plan, refuse: Callable[[str, str], None]) -> None:
    """What may not depend on which clients are fast, or on how long their rows take."""
    cohort = plan.cohort
    if plan.central and cohort.oversample > 1:
        refuse(
            f"cohort.oversample: {cohort.oversample:g} under unit: client: who is first is no secret Poisson draw, and ε rests on one",
            "Nearest valid: cohort.oversample: 1; who is later than the deadline counts as zero there.",
        )
    if plan.central and cohort.mode == "buffered":
        refuse(
            "cohort.mode: buffered under unit: client: each client takes part as often as it can, so that ε gains nothing by sampling",
            "Nearest valid: cohort.mode: synchronous.",
        )
    if plan.private and plan.local.partial:
        refuse(
            "local.partial under differential privacy: how many steps fit into a time depends on what rows are drawn and how long they are,"
            " and the number of steps is told",
            "Set local.partial: false, and local.steps so low that slow nodes are in time.",
        )
    rule, needs = plan.aggregation.rule, RULES[plan.aggregation.rule]
    if cohort.mode == "buffered" and (len(needs.phases) > 1 or needs.changes_base):
        refuse(
            f"cohort.mode: buffered with aggregation.rule: {rule}: an update may come when another factor is trained, or the base changed",
            "Nearest valid: aggregation.rule: ffa, or fedavg.",
        )
    if (plan.local.partial or ("steps" in cohort.assign and not plan.private)) and (needs.single_updates or needs.mixed_ranks):
        why = "adds products and not updates" if needs.single_updates else "has other clients in each column"
        refuse(
            f"updates of unequal steps with aggregation.rule: {rule}, which {why}",
            "Set local.partial: false, and leave steps out of cohort.assign; or choose aggregation.rule: rolora.",
        )
    if cohort.mode == "buffered" and plan.evaluation.federated_every:
        refuse(
            "federated evaluation with cohort.mode: buffered: there is no moment at which a round's clients are free",
            "Set evaluation.federated_every: 0; the coordinator's own validation rows are scored as ever.",
        )
