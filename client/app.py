"""The Flower ClientApp: the same in a simulation, on stock Flower and in the agent's worker.

It reads two things of its context's node config: ``home``, the node's home directory, and ``name``; ``simulated`` is set by the
simulator alone, and makes noise repeatable, hence not private. Whatever fails leaves as a number; under privacy, without a text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lichen.client import arrivals, canaries
from lichen.client.chain import bring_up
from lichen.client.data import CACHE, Split, declared_size, fingerprints, load, said, stamp
from lichen.client.gate import Gate
from lichen.client.jobs import Job, Private
from lichen.client.ledger import Ledger, open_ledger
from lichen.client.ledger_book import Grant, Limit, Limits
from lichen.client.memory import is_out_of_memory
from lichen.client.pace import Stop, Until, at_speed
from lichen.client.policy import enforce, load_policy
from lichen.client.probe import tokens_per_s
from lichen.client.residual import load_residual, save_residual
from lichen.common import records
from lichen.common.aggregation import cut, properties, rank_of
from lichen.common.assignment import capped_steps, own_plan
from lichen.common.codec.feedback import corrected, lost
from lichen.common.codec.registry import downlink_codec, update_seed, uplink_codec
from lichen.common.continual import make_method
from lichen.common.continual.stream import fields_read, is_online, is_stream, labels_until, rows_by_task, stage_of, stage_size, stages
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import rounded
from lichen.common.plan import Plan
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.clipping import clipped
from lichen.common.privacy.randomness import RandomSource, SecretSource, SeededSource
from lichen.common.privacy.schedule import evaluations, one_task_each, planned_central, planned_evaluation, planned_steps, reads_apart

if TYPE_CHECKING:
    import numpy as np

    from lichen.client.trainer import Trained, Trainer
    from lichen.common.model.adapter import State
    from lichen.common.tasks.task import Encoded

    Work = tuple[Trainer, Job]
    T = TypeVar("T")
    Serving = Generator[Work, Trained, T]
    """What asks for training on its way to a result."""
    Serve = Callable[["Node", Plan, "Asked", Message], Serving[RecordDict]]

log = logging.getLogger(__name__)
app = ClientApp()


class Node:
    """What the context says of the node that runs this app."""

    def __init__(self, context: Context) -> None:
        config = context.node_config
        try:
            self.home = Path(str(config["home"]))
            self.name = str(config["name"])
        except KeyError as missing:
            raise LichenError(Code.AGENT_HOME_MISSING, f"the node config has no {missing}") from None
        self.cache = self.home / CACHE
        self.simulated = bool(config.get("simulated", False))
        self.spool = Path(str(config["spool"])) if "spool" in config else None
        self.rows = int(str(config["rows"])) if "rows" in config else None
        self.retried = bool(config.get("retried", False))
        """Whether a work for which memory was not enough is asked for again with fewer rows at once, and so nothing of it is told."""
        self.speed = float(config["speed"]) if "speed" in config else None


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Fine-tune on the node's rows; the reply holds the update and a `TrainReport`."""
    return train_together([message], [context])[0]


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Score the model on the node's hold-out; the reply holds an `EvaluateReport`."""
    return _serve_alone(message, context, _evaluate)


@app.query("prepare")  # type: ignore[untyped-decorator]
def prepare(message: Message, context: Context) -> Message:
    """Load the plan's model and the node's rows, so that no round's time goes for it; the reply holds nothing."""
    return _serve_alone(message, context, _prepare)


@app.query("probe")  # type: ignore[untyped-decorator]
def probe(message: Message, context: Context) -> Message:
    """Time the plan's training on made-up text; the reply holds a `ProbeReport`."""
    return _serve_alone(message, context, _probe)


def train_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """`train` for several simulated clients of one round and plan at once; replies are those of one after another, but for rounding."""
    servings = [_serve(message, context, _train) for message, context in zip(messages, contexts, strict=True)]
    replies: dict[int, Message] = {}
    waiting: dict[int, Work] = {}

    def go_on(number: int, call: Callable[[], Work]) -> None:
        try:
            waiting[number] = call()
        except StopIteration as done:
            replies[number] = done.value

    for number, serving in enumerate(servings):
        go_on(number, functools.partial(next, serving))
    jobs, waiting = waiting, {}
    by_trainer: dict[Trainer, dict[int, Job]] = {}  # assignments may give some another model
    for number, (trainer, job) in jobs.items():
        by_trainer.setdefault(trainer, {})[number] = job
    try:
        for trainer, own in by_trainer.items():
            for number, trained in zip(own, trainer.run_together([*own.values()]), strict=True):
                serving = servings[number]
                go_on(number, functools.partial(serving.throw if isinstance(trained, Exception) else serving.send, trained))  # type: ignore[arg-type]
    finally:
        for serving in servings:  # where an interrupt ends the training, each lets go of its ledger now
            serving.close()
    return [replies[number] for number in range(len(messages))]


def clients_at_once(plan: Plan) -> int:
    """How many clients `train_together` should get: more than one where a model is so small that calling it takes longest.

    Raises:
        LichenError: PRIVACY_SELF_CHECK, if together they would get other clipped sums.
    """
    try:
        trainer = trainer_of(plan)
    except LichenError:
        return 1  # each client's own reply tells
    return trainer.at_once


def _serve_alone(message: Message, context: Context, work: Serve) -> Message:
    """Serve a message that asks for no training of the caller."""
    serving = _serve(message, context, work)
    try:
        next(serving)
    except StopIteration as done:
        return cast("Message", done.value)
    raise LichenError(Code.INTERNAL, "it asked for training")


def _serve(message: Message, context: Context, work: Serve) -> Serving[Message]:
    """Serve a message, and let the caller do what training it asks for: its `Job` is yielded, what came of it sent or thrown in."""
    private = True  # until the plan says otherwise
    try:
        assignment = records.from_config(records.Assignment, message.content.config_records["assignment"])
        plan = assignment.read_plan()
        private = plan.private
        node = Node(context)
        asked = Asked.of(assignment, plan, node)
        if not node.simulated:
            enforce(node.home, plan, assignment.plan_sha256, datetime.now().astimezone())
        return records.reply(message, (yield from work(node, plan, asked, message)))
    except LichenError as error:
        log.error("%s", error)
        return records.error_reply(message, int(error.code), "" if private else error.what)
    except Exception as error:
        if is_out_of_memory(error):
            log.error("memory ran out: %s", error)
            return records.error_reply(message, int(Code.WORKER_FAILED), "" if private else "memory ran out")
        log.exception("unexpected failure")
        return records.error_reply(message, int(Code.INTERNAL), "" if private else type(error).__name__)


@dataclass(frozen=True)
class Asked:
    """What an assignment says of time and order."""

    round: int
    """Of the plan: the learning rate follows it, and the report repeats it."""
    number: int
    """Of this node's trainings in the run: draws, noise and what the ledger leaves for later ones follow it."""
    stop: Stop | None
    """Ends the training in time, in a plan that permits it; a simulated node is late in virtual time only."""
    assignment: records.Assignment

    @classmethod
    def of(cls, assignment: records.Assignment, plan: Plan, node: Node) -> Asked:
        """What is asked of a node, checked against the plan.

        Raises:
            LichenError: FRAME_INVALID; WORKER_DEADLINE, if no time is left.
        """
        records.check_round(assignment.round, plan.rounds)
        if (assignment.training is None) == (plan.cohort.mode == "buffered"):
            raise LichenError(Code.FRAME_INVALID, f"training {assignment.training} of mode: {plan.cohort.mode}", where="Assignment")
        if plan.private:  # the noise is calibrated for so many
            records.check_round(assignment.number, plan.rounds)
        stop: Stop | None = None
        if plan.local.partial and assignment.seconds is not None:
            if not node.simulated:
                stop = Until(assignment.seconds)
            elif node.speed is not None:
                stop = at_speed(assignment.seconds, node.speed)
        return cls(assignment.round, assignment.number, stop, assignment)


def _train(node: Node, plan: Plan, asked: Asked, message: Message) -> Serving[RecordDict]:
    own = own_plan(plan, asked.assignment, node.rows)
    trainer = trainer_of(own)
    start = _cut(node, plan, asked.assignment, _model(node, plan, message))
    trainer.model.load(start)  # what does not fit is refused before it is charged
    rows = _rows(node, own, "train", trainer, asked.round, str(message.metadata.run_id))
    known = rows
    if not plan.private:
        _begin_batch(node, plan, asked.round, str(message.metadata.run_id), rows)
    if plan.privacy.audit.canaries:
        rows = _with_canaries(node, plan, str(message.metadata.run_id), trainer, rows)
    if not plan.private:
        source = SeededSource("order", plan.seed, node.name, asked.number)
        job = Job(start, rows.encoded, asked.round, source, node.cache, most_steps=asked.assignment.steps, stop=asked.stop)
        trained = yield trainer, job
        report = records.TrainReport(
            client=node.name, round=asked.round, steps=trained.steps, examples=len(rows.encoded), train_loss=trained.loss
        )
    elif plan.central:
        trained, report = yield from _train_central(node, plan, asked, message, trainer, start, rows)
    else:
        trained, report = yield from _train_private(node, plan, asked, message, trainer, start, rows)
    if not node.simulated:
        _note_read(node.home, str(message.metadata.run_id), known)
    if (rank := _rank(node, plan, asked.assignment)) != plan.model.adapter.rank:
        report = report.model_copy(update={"rank": rank})
    records.check_release(report, private=plan.private, central=plan.central)
    content = RecordDict({"report": records.to_config(report)})
    if make_method(plan).gathers(asked.round):  # sums, which no codec rounds
        records.put_update(content, trained.delta, None, 0, node.spool, durable=not node.simulated)
    else:
        _put_update(content, node, plan, asked.number, str(message.metadata.run_id), trained.delta)
    return content


def _model(node: Node, plan: Plan, message: Message) -> State:
    """The model that a message is about."""
    if node.spool:
        bring_up(node.spool, message, downlink_codec(plan.transfer.downlink))
    return records.get_tensors(message.content, node.spool)


def _cut(node: Node, plan: Plan, assignment: records.Assignment, model: State) -> State:
    """The model, as far as this node's rank has it."""
    return cut(model, _rank(node, plan, assignment), hold=properties(plan).holds_rest)


def _rank(node: Node, plan: Plan, assignment: records.Assignment) -> int:
    """Of the adapter that this node trains."""
    return assignment.rank or rank_of(plan, node.name, simulated=node.simulated)


def _put_update(content: RecordDict, node: Node, plan: Plan, number: int, run: str, update: State) -> None:
    """Add the update to a reply, by the plan's codec: under privacy it is noised, or clipped, already."""
    codec, seed = uplink_codec(plan.transfer.uplink), update_seed(plan, node.name, number)
    durable = not node.simulated  # a simulation asks nobody for it again
    if not plan.transfer.uplink.error_feedback:
        records.put_update(content, update, codec, seed, node.spool, durable=durable)
        return
    update = corrected(update, load_residual(node.home, run, number))
    records.put_update(content, update, codec, seed, node.spool, durable=durable)
    save_residual(node.home, run, number, lost(update, records.get_update(content, node.spool, codec, update)))


def _train_private(
    node: Node, plan: Plan, asked: Asked, message: Message, trainer: Trainer, start: State, rows: Rows
) -> Serving[tuple[Trained, records.TrainReport]]:
    if rows.declared_size is None:
        raise LichenError(
            Code.DATA_DECLARED_SIZE,
            "no declared size, and the true one may not be used",
            where=str(node.home / "data.yaml"),
            fix="Add the source again with --declared-size N.",
        )
    stage = stage_of(plan, asked.round)
    planned = planned_steps(plan, rows.declared_size, stage)
    run, message_id = str(message.metadata.run_id), message.metadata.message_id
    _begin_batch(node, plan, asked.round, run, rows)
    with open_ledger(node.home, own=node.simulated) as ledger:
        reads = rows.segments
        if one_task_each(plan):
            reads -= ledger.read_outside(run, "train", stage.first, stage.last)
            if rows.segments and not reads:
                log.warning(
                    "all rows of this task were read in other tasks of the run, for which alone there is noise: it gets noise alone"
                )
        ahead = planned.steps * ((stage.last if one_task_each(plan) else plan.rounds) - asked.number)
        wanted = planned._replace(steps=capped_steps(planned.steps, asked.assignment))
        grant = _reserve(ledger, "train", plan, run, message_id, asked.number, wanted, _limits(node, plan), reads, rows.as_of, ahead)
        segment = grant.segment
        source = _source(node, "train", plan.seed, node.name, asked.number)
        units = rows.readable_units(grant.readable)
        begun_again = False
        try:
            private = Private(units, segment, rows.declared_size, Gate(segment))
            trained = yield trainer, Job(start, rows.encoded, asked.round, source, node.cache, private)
        except Exception as error:
            # by the agent, under this reservation, as after a crash
            begun_again = node.retried and trainer.plan.local.max_physical_batch_size > 1 and is_out_of_memory(error)
            raise
        finally:
            if not begun_again:  # after a failure too: its number tells of the noised steps
                ledger.released("train", run, message_id, again=node.simulated)
        report = records.TrainReport(
            client=node.name,
            round=asked.round,
            steps=segment.steps,
            declared_size=rows.declared_size,
            noise_multiplier=segment.noise_multiplier,
            sample_rate=segment.sample_rate,
        )
    return trained, report


def _reserve(
    ledger: Ledger,
    split: Split,
    plan: Plan,
    run: str,
    message_id: str,
    round: int,
    steps: Segment,
    limits: Limits,
    reads: AbstractSet[int],
    as_of: int,
    ahead: int,
) -> Grant:
    """`Ledger.reserve`; in a stream a node whose rows of a task have not all that is asked for left sends noise alone, free of charge.

    Which rows are of a task is what the plan says: a refusal, fewer steps or more noise would tell exactly whether there is one of them.
    So they would in any run that comes after a stream, of whether that had any to charge.
    """
    chosen = is_stream(plan)
    if not chosen and not ledger.chosen():
        return ledger.reserve(split, run, message_id, round, steps, limits, reads, as_of=as_of, ahead=ahead)
    for later in dict.fromkeys((ahead, 0)):  # with all that is ahead the accountant mostly knows the answer already
        try:
            return ledger.reserve(split, run, message_id, round, steps, limits, reads, as_of=as_of, ahead=later, whole=True, chosen=chosen)
        except LichenError as error:
            if error.code is not Code.PRIVACY_BUDGET:
                raise
            spent = error
    log.warning("noise alone is sent, since to refuse, or to add to the planned noise, would tell which rows are here: %s", spent)
    return ledger.reserve(split, run, message_id, round, steps, limits, frozenset(), as_of=as_of, chosen=chosen)


def _train_central(
    node: Node, plan: Plan, asked: Asked, message: Message, trainer: Trainer, start: State, rows: Rows
) -> Serving[tuple[Trained, records.TrainReport]]:
    """Train without noise, and clip: the coordinator promises the noise, and the policy has permitted to believe it.

    The first message that reads a record pays for the whole run, since ε counts the rounds in which this node is not drawn as well.
    """
    # a run's name is the coordinator's to choose, and another plan under it is not paid for
    run, whole = str(message.metadata.run_id), f"all rounds of {asked.assignment.plan_sha256}"
    with open_ledger(node.home, own=node.simulated) as ledger:
        planned, paid = planned_central(plan).segment, ledger.paid(run, "train", whole, rows.as_of)
        readable = rows.segments & paid
        if (rest := rows.segments - paid) or not readable:
            try:
                limits = _limits(node, plan)
                readable |= ledger.reserve(
                    "train", run, whole, asked.round, planned, limits, rest, as_of=rows.as_of, whole=True, chosen=is_stream(plan)
                ).readable
            except LichenError as error:  # what is paid for goes on without the others
                if error.code is not Code.PRIVACY_BUDGET or not readable:
                    raise
    log.info("un-noised: unit client, ε ≤ %g, promised by the coordinator", plan.privacy.epsilon)
    readable_rows = [row for unit in rows.readable_units(readable) for row in unit]
    if not readable_rows:
        raise LichenError(Code.DATA_EMPTY, "no rows to train on", where=str(node.home / "data.yaml"))
    source = SeededSource("order", plan.seed, node.name, asked.round)
    trained = yield trainer, Job(start, rows.encoded.select(readable_rows), asked.round, source, most_steps=asked.assignment.steps)
    clip = asked.assignment.clip or plan.privacy.clip
    delta, norm = clipped(trained.delta, clip)
    report = records.TrainReport(
        client=node.name,
        round=asked.round,
        steps=capped_steps(plan.local.steps or 0, asked.assignment),
        within_clip=norm <= clip if plan.privacy.adaptive_clip else None,
    )
    return replace(trained, delta={name: tensor.float() for name, tensor in delta.items()}), report


def _evaluate(node: Node, plan: Plan, asked: Asked, message: Message) -> Serving[RecordDict]:
    yield from ()  # it asks for no training
    round, own = asked.round, own_plan(plan, asked.assignment, node.rows)
    every, before = plan.evaluation.federated_every, asked.assignment.before  # what the policy has permitted
    begins = is_online(plan) and round == stage_of(plan, round).first
    if not every or (not begins if before else round % every):
        raise LichenError(Code.FRAME_INVALID, f"the plan asks for no evaluation in round {round}")
    trainer = trainer_of(own)
    trainer.model.load(_model(node, plan, message))
    rows = _rows(node, own, "holdout", trainer, round, str(message.metadata.run_id), before=before)
    if not plan.private:
        counts, loss = _scored(trainer, own, rows, range(len(rows.encoded)), round)
        report = records.EvaluateReport(client=node.name, round=round, counts=counts.tolist(), loss_sum=loss)
    else:
        segment = planned_evaluation(plan)
        run, message_id = str(message.metadata.run_id), message.metadata.message_id
        with open_ledger(node.home, own=node.simulated) as ledger:
            ahead = evaluations(plan, after=round)
            if before:  # a batch may be looked at again: what was paid for such looks is not ahead any more
                made = {entry.message_id for entry in ledger.entries() if (entry.run, entry.split, entry.round) == (run, "holdout", round)}
                ahead = max(ahead, evaluations(plan, after=round - 1) - len(made | {message_id}))
            limits = _limits(node, plan)
            grant = _reserve(ledger, "holdout", plan, run, message_id, round, segment, limits, rows.segments, rows.as_of, ahead)
            segment = grant.segment
            Gate(segment).step(segment)
            readable = [row for unit in rows.readable_units(grant.readable) for row in unit]
            exact, _ = _scored(trainer, own, rows, readable, round)
            noise = _source(node, "holdout", plan.seed, node.name, round, *(["before"] if before else [])).normal(
                exact.shape, segment.noise_multiplier
            )
            ledger.released("holdout", run, message_id, again=node.simulated)
        # whole noise: the fraction of a sum of a count and a float would tell the count (Mironov 2012)
        counts = exact + noise.round().numpy()
        report = records.EvaluateReport(client=node.name, round=round, counts=counts.tolist(), noise_multiplier=segment.noise_multiplier)
    records.check_release(report, private=plan.private)
    return RecordDict({"report": records.to_config(report)})


def _scored(trainer: Trainer, plan: Plan, rows: Rows, readable: Iterable[int], round: int) -> tuple[np.ndarray, float | None]:
    """The counts of each task until the round's, one after another, and the loss of all; a row counts once, in its first task."""
    import numpy as np

    trainer.task.choose_among(labels_until(plan, stage_of(plan, round).number))
    found, allowed = [], set(readable)
    for of_task in rows.by_task:
        own = [row for row in of_task if row in allowed]
        found.append(trainer.task.score(trainer.model.network, rows.encoded, plan.evaluation.batch_size, own))
    losses = [scores.loss_sum for scores in found]
    whole = None if None in losses else sum((loss for loss in losses if loss is not None), 0.0)
    return np.concatenate([scores.counts.flatten() for scores in found]), whole


def _prepare(node: Node, plan: Plan, asked: Asked, message: Message) -> Serving[RecordDict]:
    yield from ()  # it asks for no training
    own = own_plan(plan, asked.assignment, node.rows)
    trainer = trainer_of(own)
    if not is_online(plan):  # whose batch begins with its first training
        _rows(node, own, "train", trainer, asked.round, str(message.metadata.run_id))
    return RecordDict()


def _probe(node: Node, plan: Plan, asked: Asked, message: Message) -> Serving[RecordDict]:
    yield from ()  # it asks for no training
    if not node.simulated and not load_policy(node.home).profile:
        raise LichenError(Code.POLICY_REFUSED, "the policy keeps in what this machine can do", where="profile")
    speed = tokens_per_s(trainer_of(own_plan(plan, asked.assignment, node.rows)))
    return RecordDict({"report": records.to_config(records.ProbeReport(tokens_per_s=rounded(speed)))})


@dataclass(frozen=True, eq=False)
class Rows:
    """A split's rows, encoded."""

    encoded: Encoded
    units: list[list[int]]
    """The rows of each unit of privacy."""
    read_from: list[frozenset[int]]
    """The ledger's data segments of each unit; empty without privacy."""
    segments: frozenset[int]
    """All that to read the units is charged to."""
    declared_size: int | None
    by_task: list[list[int]]
    """Of held-out rows those of each task until the stage, each in its first; all in one without a stream."""
    known_by: list[int]
    """Fingerprints of the rows to train on, by which a later online run knows that they are not new; of a simulated node none."""
    batches: arrivals.Batches | None = None
    """Of an online run."""
    as_of: int = 0
    """When the data segments were looked up; see `Ledger.reserve`."""

    def readable_units(self, readable: frozenset[int]) -> list[list[int]]:
        """The units that lie in permitted data segments only."""
        return [unit for unit, own in zip(self.units, self.read_from, strict=True) if own <= readable]


def _rows(node: Node, plan: Plan, split: Split, trainer: Trainer, round: int, run: str, *, before: bool = False) -> Rows:
    """Those of a round's stage; of a batch that is about to begin, ``before`` it has."""
    number = stage_of(plan, round).number
    batches = None
    if is_online(plan):
        if node.simulated:
            batches = arrivals.dealt(declared_size(node.home), len(stages(plan)))
        elif split == "train":
            batches = arrivals.take(node.home, plan, run, number)
        else:
            batches = arrivals.until(node.home, plan, run, number, new=before)
    changed: tuple[object, ...] = (stamp(node.home),)
    if plan.private:
        with open_ledger(node.home, own=node.simulated) as ledger:  # another ledger knows nothing of this one's data segments
            changed += (ledger.id, ledger.split_at)
    read = _rows_of_many if node.simulated else _rows_of_one
    return read(node.home, plan, split, trainer, number, changed, node.simulated, batches)


def _read_rows(
    home: Path, plan: Plan, split: Split, trainer: Trainer, number: int, changed: object, simulated: bool, batches: arrivals.Batches | None
) -> Rows:
    """Those of a stage, by its number. ``changed`` is the state of the files."""
    entity = plan.privacy.unit_field
    arrivals.check_split(home, plan, split)
    data = load(home, split, fields_read(plan), lenient=plan.private)
    columns = {field: data.column(field) for field in data.fields}
    count, size, stage, every = len(data), data.declared_size, stages(plan)[number], columns
    if plan.private and (faults := [trainer.task.fault({field: values[row] for field, values in columns.items()}) for row in range(count)]):
        columns, count = _without(columns, faults)
    by_task = [list(range(count))]
    wanted = batches or (split == "train" and not simulated)
    known_by = _known_by(home, plan, columns, batches.key if batches else None) if wanted else []
    if stage.task is not None:
        if batches is not None:
            kept, by_task = _rows_by_batch(batches.of(known_by), number, alone=split == "train")
            size = batches.declared_size
        elif split == "holdout":
            kept, by_task = rows_by_task(plan, number, columns)
        else:
            kept = make_method(plan).rows(stage, columns)
        if not kept and split == "train" and not plan.private:
            raise LichenError(Code.DATA_EMPTY, f"no rows of task {stage.task.name}", where=str(home / "data.yaml"))
        columns = {field: [values[row] for row in kept] for field, values in columns.items()}
        known_by = [known_by[row] for row in kept] if known_by else []
        count, size = len(kept), None if size is None else stage_size(plan, stage, size)
    encoded = trainer.task.encode({field: columns[field] for field in trainer.task.fields})
    owners: dict[object, list[int]] = {}
    # by the name that the ledger knows: a patient who is written in two ways is one, and clipped as one
    for row, owner in enumerate(map(said, columns[entity]) if entity else range(count)):
        owners.setdefault(owner, []).append(row)
    units = list(owners.values())
    if not plan.private:
        return Rows(encoded, units, [], frozenset(), size, by_task, known_by, batches)
    with open_ledger(home, own=simulated) as ledger:

        def known(columns: Mapping[str, Sequence[object]], owners: Iterable[object]) -> list[int]:
            # A row is known by what it says: with another label, or another entity's name on it, it is the same row.
            found = fingerprints(ledger.fingerprint_key, "row", [columns[plan.task.text_field]])
            return found + (fingerprints(ledger.fingerprint_key, f"entity:{entity}", [list(owners)]) if entity else [])

        # the plan says which labels it can use, and what is charged must not tell which are here; a stream's rows are paid for by task
        others = [] if is_stream(plan) else known(every, dict.fromkeys(map(said, every[entity])) if entity else ())
        found = known(columns, owners)
        of = ledger.assign(split, [*found, *others], apart=reads_apart(plan))
        as_of = ledger.split_at
    together = {unit: frozenset([*(of[row] for row in rows), *([of[count + unit]] if entity else [])]) for unit, rows in enumerate(units)}
    shared: dict[frozenset[int], frozenset[int]] = {}  # few different ones: kept once
    read_from = [shared.setdefault(own, own) for own in together.values()]
    return Rows(encoded, units, read_from, frozenset(of), size, by_task, known_by, batches, as_of)


# a round does not tokenise again; of a node's own process the last training and hold-out, since an online run's batches are other rows each
_rows_of_one = functools.lru_cache(maxsize=2)(_read_rows)
_rows_of_many = functools.lru_cache(maxsize=64)(_read_rows)


def _without(columns: dict[str, list[Any]], faults: Sequence[str | None]) -> tuple[dict[str, list[Any]], int]:
    """The rows that have no fault, and how many; of the others this node's log tells alone."""
    kept = [row for row, fault in enumerate(faults) if fault is None]
    if len(kept) < len(faults):
        first = next(filter(None, faults))
        log.warning("%d rows can't be used and were left out, the first: %s (lichen client data check)", len(faults) - len(kept), first)
    return {field: [values[row] for row in kept] for field, values in columns.items()}, len(kept)


def _rows_by_batch(batch_of: Sequence[int | None], number: int, *, alone: bool) -> tuple[list[int], list[list[int]]]:
    """The rows of a batch, ``alone`` or with those before it, and for each batch the places among them of its own."""
    kept = [row for row, batch in enumerate(batch_of) if batch is not None and (batch == number if alone else batch <= number)]
    by_batch: list[list[int]] = [[] for _ in range(number + 1)]
    for place, row in enumerate(kept):
        by_batch[batch_of[row] or 0].append(place)
    return kept, by_batch


def _known_by(home: Path, plan: Plan, columns: Mapping[str, Sequence[object]], key: bytes | None) -> list[int]:
    """The fingerprints of rows under a key, or the home's own."""
    if key is None:
        with arrivals.Arrivals(home) as kept:
            key = kept.key
    return fingerprints(key, "row", arrivals.says(plan, columns))


def _begin_batch(node: Node, plan: Plan, round: int, run: str, rows: Rows) -> None:
    """Of an online run: the rows are of the round's batch from now on."""
    if rows.batches is not None and not node.simulated:
        arrivals.begin(node.home, run, stage_of(plan, round).number, rows.batches)


@functools.lru_cache(maxsize=1)
def _note_read(home: Path, run: str, rows: Rows) -> None:
    """Keep that a run trains on rows, once; those of an online run's batch are kept already. What was trained is not lost for it."""
    try:
        with arrivals.Arrivals(home) as kept:
            kept.note(run, rows.known_by)
    except LichenError as error:
        log.warning("a later online run will take these rows as new: %s", error)


def _with_canaries(node: Node, plan: Plan, run: str, trainer: Trainer, rows: Rows) -> Rows:
    """Rows and the canaries that the node's coin lets in: each a unit of its own, drawn, clipped and charged like any other.

    The declared size stays what it is: it is a constant, and the denominator follows it.
    """
    kept = canaries.keep(node.home, plan, run, node.name, _source(node, "canaries", plan.seed, node.name))
    made = trainer.task.made_up(kept.count, canaries.key(plan, node.name)).select(kept.included)
    first = len(rows.encoded)
    added = [[first + index] for index in range(len(made))]
    read_from = [*rows.read_from, *(frozenset[int]() for _ in added)] if plan.private else []  # canaries are nobody's records
    return replace(rows, encoded=trainer.task.join(rows.encoded, made), units=[*rows.units, *added], read_from=read_from)


@functools.lru_cache(maxsize=1)
def trainer_of(plan: Plan) -> Trainer:
    """One model a process, made ready at the first call; imported here, so that an idle agent does not load torch."""
    from lichen.client.trainer import Trainer

    return Trainer(plan)


def _source(node: Node, *key: object) -> RandomSource:
    return SeededSource(*key) if node.simulated else SecretSource()


def _limits(node: Node, plan: Plan) -> Limits:
    life = None if node.simulated else load_policy(node.home).privacy
    return Limits(
        unit=f"entity:{plan.privacy.unit_field}" if plan.privacy.unit_field else plan.privacy.unit,
        run=Limit(plan.privacy.epsilon, plan.privacy.delta),
        life=Limit(life.max_epsilon, life.max_delta) if life else None,
        repeats=node.simulated,
    )
