"""The Flower ServerApp: the same in a simulation, on stock Flower and in the coordinator service.

Its context's run config holds ``plan`` (JSON), ``directory`` (the run directory), ``engine``, and where there are any ``validation``
and ``test`` (Parquet files) and ``spool``.
"""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from lichen.common import records
from lichen.common.aggregation import MEMORY, part_of
from lichen.common.continual import make_method
from lichen.common.continual.method import Part, Scored, together
from lichen.common.continual.stream import (
    Stage,
    fields_of,
    is_online,
    is_stream,
    labels_until,
    rows_by_task,
    rows_of,
    stage_of,
    stages,
    tasks_of,
)
from lichen.common.errors import Code, LichenError
from lichen.common.model.export import save_models
from lichen.common.plan import Plan, plan_from_json
from lichen.common.privacy.statement import make_statement
from lichen.common.result import Continual, Metrics, Result, Transfer, read_result
from lichen.common.tasks import workbench
from lichen.coordinator.assigning import Assigner
from lichen.coordinator.buffered import BufferedStrategy
from lichen.coordinator.report import write_report
from lichen.coordinator.run_directory import RunDirectory, versions
from lichen.coordinator.strategy import FederatedStrategy
from lichen.coordinator.telling import privacy_of
from lichen.coordinator.versions import Versions, measured, scored_tasks, summary_of

if TYPE_CHECKING:
    from lichen.common.model.adapter import State

log = logging.getLogger(__name__)
app = ServerApp()
_CACHE = "cache"
"""Of a run's directory, while it goes on: what frozen layers give for the rows that are scored in each round."""


class _Split(NamedTuple):
    encoded: Any
    by_task: list[list[int]]
    """The numbers of the rows of each task of the stream; of all rows without a stream, and in an online run."""
    apart: list[list[int]]
    """The same, but a row that is of several tasks is of the first alone."""


class OwnData:
    """The coordinator's own validation and test rows, scored with the run's model.

    Args:
        plan: the run's.
        validation: a Parquet file of rows; None if there are none.
        test: the same.
        shared: whether clients train on the same model in this process: then a model that is scored is copied into it.
        cache: a folder where what frozen layers give for the rows may be kept; None: nothing is kept.
    """

    def __init__(self, plan: Plan, validation: Path | None, test: Path | None, *, shared: bool = False, cache: Path | None = None) -> None:
        from lichen.common.batches import ready

        self.plan = plan
        self._shared = shared
        self.task, self.model, self.start = workbench(plan.at_precision("float32"))
        self._batches, self._cache = ready(plan, self.task, self.model).batches, cache
        self._rows = {path: self._read(path) for path in (validation, test) if path is not None}
        self._validation = validation
        self._test = test

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self._validation is not None

    def validation(self, state: State, stage: Stage) -> Metrics | None:
        """Metrics on the validation split, of a stream on the rows of its tasks until this one; None if there is none."""
        return self._score(state, self._validation, stage)

    def validation_by_task(self, state: State, stage: Stage | None) -> dict[str, Metrics | None]:
        """The same on the rows of each task of the stream, after a stage or before the first; empty if there is no split."""
        return self._score_by_task(state, self._validation, stage)

    def final(self, state: State, learned: int) -> dict[str, Any] | None:
        """`split` and metrics of the test split, or if there is none of the validation split; None without either.

        A model chooses among the labels of the tasks until ``learned``, and misses the rows of others.
        """
        for name, split in (("test", self._test), ("validation", self._validation)):
            if (found := self._score(state, split, stage_of(self.plan, self.plan.rounds), learned)) is not None:
                return {"split": name, **found}
        return None

    def test_by_task(self, state: State, stage: Stage | None) -> dict[str, Metrics | None]:
        """By task of the stream, as `validation_by_task`."""
        return self._score_by_task(state, self._test, stage)

    def add_counts(self, reports: list[records.EvaluateReport], stage: Stage) -> tuple[Metrics, dict[str, Metrics | None]]:
        """Metrics of the clients' hold-outs together, and by task of the stream until the stage.

        None for a task of which these clients have no rows, and under privacy where the noise could be all that there is.
        """
        sizes = {len(report.counts) for report in reports}
        if len(sizes) != 1 or 0 in sizes or len(reports[0].counts) % (stage.number + 1):
            raise LichenError(Code.FRAME_INVALID, f"{len(reports[0].counts)} counts are not those of {stage.number + 1} tasks")
        counts = [sum(column) for column in zip(*(report.counts for report in reports), strict=True)]
        losses = [report.loss_sum for report in reports if report.loss_sum is not None]
        each = len(counts) // (stage.number + 1)
        by_task = [counts[start : start + each] for start in range(0, len(counts), each)]
        whole = [sum(column) for column in zip(*by_task, strict=True)]
        names = [task.name for task in tasks_of(self.plan)[: stage.number + 1]]
        # two standard deviations of a sum of that many noised counts
        least = 2 * math.sqrt(each * sum((report.noise_multiplier or 0.0) ** 2 for report in reports))
        return (
            self.task.scores_from(whole, sum(losses) if len(losses) == len(reports) else None).metrics(),
            {
                name: self.task.scores_from(own, None).metrics() if sum(own) > least else None
                for name, own in zip(names, by_task, strict=False)
            },
        )

    def show(self, state: State) -> None:
        """Let the network have these tensors."""
        model = {name: tensor for name, tensor in state.items() if part_of(name) != MEMORY}
        if self._shared:
            self.model.load(model)
        else:
            self.model.show(model)

    def _score(self, state: State, split: Path | None, stage: Stage, learned: int | None = None) -> Metrics | None:
        if split is None:
            return None
        sets = self._rows[split].apart[: stage.number + 1]
        choices = labels_until(self.plan, stage.number if learned is None else learned)
        if not (found := self._scored(state, split, sets, [choices] * len(sets))):
            return None
        metrics = together(self.task, [one.scores for one in found.values()]).metrics()
        for key in next(iter(found.values())).shares:
            shares = [(share, len(sets[number])) for number, one in found.items() if (share := one.shares[key]) is not None]
            metrics[key] = sum(share * rows for share, rows in shares) / sum(rows for _, rows in shares) if shares else None
        return metrics

    def _score_by_task(self, state: State, split: Path | None, stage: Stage | None) -> dict[str, Metrics | None]:
        """The model chooses among the labels of all tasks until the stage, and until the task that is scored."""
        if split is None:
            return {}
        sets, last = self._rows[split].by_task, -1 if stage is None else stage.number
        found = self._scored(state, split, sets, [labels_until(self.plan, max(last, number)) for number in range(len(sets))])
        names = enumerate(scored_tasks(self.plan))
        return {name: found[number].metrics() if number in found else None for number, name in names}

    def _scored(self, state: State, split: Path, sets: list[list[int]], choices: list[tuple[str, ...]]) -> dict[int, Scored]:
        """By number those of the tasks' rows of which there are any; for each what to choose among."""
        data = self._rows[split].encoded
        with self._batches.of(data, self._cache and self._cache / split.stem) as collate:
            parts = [Part(data, rows, number, choices[number], collate) for number, rows in enumerate(sets) if rows]
            found = make_method(self.plan).score(self.task, self.model, state, parts, self.show)
        return {part.number: scored for part, scored in zip(parts, found, strict=True)}

    def _read(self, path: Path) -> _Split:
        import pyarrow.parquet as pq

        table, fields = pq.read_table(path), [*self.task.fields, *fields_of(self.plan)]
        if missing := set(fields) - set(table.column_names):
            raise LichenError(
                Code.DATA_FIELD,
                f"no column {sorted(missing)[0]!r}",
                where=str(path),
                fix="Map the task's fields to the data's columns, as in fields: {text: BODY, label: TOPIC}.",
            )
        columns = {field: table.column(field).to_pylist() for field in dict.fromkeys(fields)}
        if not self.plan.continual.stream:
            every = [list(range(table.num_rows))]
            return _Split(self.task.encode(columns), every, every)
        stream = self.plan.continual.stream
        kept, apart = rows_by_task(self.plan, len(stream) - 1, columns)  # what is of no task may bear labels that the plan has not
        columns = {field: [values[row] for row in kept] for field, values in columns.items()}
        encoded = self.task.encode({field: columns[field] for field in self.task.fields})
        return _Split(encoded, [rows_of(self.plan, task, columns) for task in stream], apart)


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the plan, and write the run directory; a run that was begun there goes on.

    Raises:
        LichenError: as `FederatedStrategy.start`; the result then says failed or stopped, and why.
    """
    config = context.run_config
    plan = plan_from_json(str(config["plan"]))
    directory = RunDirectory(Path(str(config["directory"])), plan)
    engine: Any = str(config["engine"])
    _check_engine(plan, engine)
    spool = Path(str(config["spool"])) if "spool" in config else None
    result = Result(
        run_id=str(context.run_id),
        status="running",
        plan_sha256=directory.plan_sha256,
        engine=engine,
        seed=plan.seed,
        versions=versions(),
        seconds=0.0,
        privacy=privacy_of(plan, simulated=engine in {"inprocess", "ray"}),
        transfer=Transfer(uplink_bytes=0, downlink_bytes=0),
    )
    result.rounds = directory.load_rounds(plan.rounds)
    with suppress(LichenError):  # what was spent stays so if the run fails before its next round
        result.privacy.max_epsilon = read_result(directory.path).privacy.max_epsilon
    try:
        beside = not getattr(grid, "works_here", False)
        validation, test = (Path(str(config[key])) if key in config else None for key in ("validation", "test"))
        own = OwnData(plan, validation, test, shared=not beside, cache=directory.path / _CACHE)
        profiles = getattr(grid, "profile_of", None)  # other grids carry none
        assign = Assigner(plan, own.model, profiles, grid.name_of).of if profiles else None
        kind = BufferedStrategy if plan.cohort.mode == "buffered" else FederatedStrategy
        strategy = kind(
            plan, directory, result, own, spool, getattr(grid, "name_of", None), beside=beside, assign=assign, prepare=bool(profiles)
        )
        content = RecordDict()
        records.put_tensors(content, own.start, spool)
        strategy.start(grid, content.array_records["payload"], num_rounds=plan.rounds, timeout=plan.cohort.deadline_s)
        learned = _save_final(strategy, result, own)
        if is_stream(plan):
            result.continual = _told_of_tasks(Versions(directory.path, plan), own, learned)
        result.status = "finished"
    except LichenError as error:
        if error.code is not Code.INTERRUPTED:  # an interrupted run goes on later: it is not over
            result.status = "stopped" if error.code is Code.RUN_STOPPED else "failed"
            result.error = str(error)
        raise
    except KeyboardInterrupt:
        result.status, result.error = "stopped", "interrupted"
        raise
    except BaseException as error:
        result.status = "failed"
        result.error = f"{type(error).__name__}: {error}"
        raise
    finally:
        if is_stream(plan) and result.status != "finished":
            with suppress(LichenError):  # an operator may have chosen another version since the last was made
                result.continual = Versions(directory.path, plan).summary()
        directory.save_result(result)
        shutil.rmtree(directory.path / _CACHE, ignore_errors=True)
        try:
            write_report(directory.path)
        except Exception:
            log.exception("report.html was not written")  # the run stands without it


def _check_engine(plan: Plan, engine: str) -> None:
    """Refuse what an engine can't do."""
    if engine == "flower" and is_online(plan):
        raise LichenError(
            Code.PLAN_UNSOUND,
            "continual.mode: online, and stock Flower's nodes can't tell that new data came",
            where="plan",
            fix="Submit the plan to a lichen coordinator.",
        )


def _save_final(strategy: FederatedStrategy, result: Result, own: OwnData) -> int:
    """Save the final model, and score it; the number of the last task that it has learned."""
    plan, model = strategy.plan, strategy.directory.path / "model"
    statement = make_statement(plan, result.model_copy(update={"status": "finished"}))
    while True:
        final, learned = strategy.final_model()
        shutil.rmtree(model, ignore_errors=True)
        save_models(model, plan, own.model, own.task.tokenizer, statement, final, learned, own.show)
        result.final = own.final(final, learned)
        if strategy.final_model()[1] == learned:  # else an operator has chosen another version meanwhile
            return learned


def _told_of_tasks(versions: Versions, own: OwnData, learned: int) -> Continual | None:
    """R on the test rows, each version that has its model scored once, or if there are none on the validation rows.

    What is given out is told of the model that was saved: an operator may have chosen another since.
    """
    found, scores = versions.all(), {0: own.test_by_task(own.start, None)}
    if not scores[0] or is_online(own.plan):
        summary = versions.summary()
    else:
        tasks, every = [task.name for task in own.plan.continual.stream], stages(own.plan)
        scores |= {
            version.number: own.test_by_task(versions.state(version), every[version.number - 1]) if versions.has_state(version) else {}
            for version in found
            if version.number
        }
        rows = {number: [measured(by_task.get(task)) for task in tasks] for number, by_task in scores.items()}
        summary = summary_of(tasks, "test", rows, found)
    saved = next(version.name for version in found if version.number == learned + 1)
    return summary and summary.model_copy(update={"given_out": saved})
