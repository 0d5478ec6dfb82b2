"""Play a plan's federation: deal the data to simulated clients, then run the two apps over an engine."""

from __future__ import annotations

import functools
import gc
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Context, RecordDict

from lichen.common.continual.stream import fields_of, rows_of
from lichen.common.device import device
from lichen.common.errors import Code, LichenError
from lichen.common.plan import digest_of
from lichen.common.result import Result, read_result, write_atomically
from lichen.coordinator.cohort import note_on_draws
from lichen.coordinator.run_directory import COHORT, RunDirectory, open_for
from lichen.simulations.datasets import hold_out, load_spec
from lichen.simulations.engine import InProcessGrid, Progress, Together
from lichen.simulations.homes import NodeHomes
from lichen.simulations.partition import partition
from lichen.simulations.rows import Groups, StoredRows, numbered
from lichen.simulations.workers import Work, Workers, layout

if TYPE_CHECKING:
    from lichen.common.plan import Plan

log = logging.getLogger(__name__)


def run(plan: Plan, out: Path, engine: str, *, resume: bool = False, progress: Progress | None = None, workers: int | None = 1) -> Result:
    """Simulate a plan.

    Args:
        plan: what to run.
        out: the run directory.
        engine: ``inprocess`` or ``ray``.
        resume: go on with the run in ``out``.
        progress: told of each client that is done (in-process only).
        workers: processes that serve the clients (in-process, on the CPU only); None: one a core. One serves them in this process.

    Returns:
        The run's result, as in `result.json`.

    Raises:
        LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE, DEVICE_MISSING, DATA_…, PARTITION_INVALID, MODEL_…, or what stopped the run.
    """
    open_for(out, resume=resume)
    made = not out.exists() or not any(out.iterdir())
    try:
        return _run(plan, out, engine, resume, progress, workers)
    except LichenError:
        if made and not (out / COHORT).exists():  # nobody was asked: nothing that another try could go on from, or that it would lose
            shutil.rmtree(out, ignore_errors=True)
        raise


def _run(plan: Plan, out: Path, engine: str, resume: bool, progress: Progress | None, workers: int | None) -> Result:
    from lichen.client.app import app as client_app
    from lichen.client.app import clients_at_once, train_together
    from lichen.client.data import CACHE
    from lichen.coordinator.app import app as server_app

    text = plan.canonical_json()
    if resume:
        # refuses another plan before its data are dealt over this one's; the same cohort is drawn again, and Ray's node ids are new
        directory = RunDirectory(out, plan)
        directory.forget_cohort()
        text = directory.text  # which may be an older lichen's, and the run's id, by which ledgers know it, is the same then
    homes, splits = deal(plan, out / "simulation")
    run_id = int(digest_of(text)[:15], 16)
    config: dict[str, Any] = {"plan": text, "directory": str(out), "engine": engine} | splits
    if engine == "ray":
        if plan.simulation.speeds:
            raise LichenError(
                Code.PLAN_UNSOUND, "Ray keeps no virtual time", where="simulation.speeds", fix="Leave --engine out, or simulation.speeds."
            )
        from lichen.simulations.ray import run_on_ray

        run_on_ray(server_app, client_app, homes.write_all(), config, threads=1)
    else:
        with _forking(plan, *_layout(plan.cohort.size, workers)) as fork, _spool(out / "simulation") as spool:
            together = Together(functools.partial(clients_at_once, plan), train_together)
            grid = InProcessGrid(client_app, homes, run_id, progress, fork, together, homes.open, spool, plan.simulation.speeds)
            config["spool"] = str(spool)
            try:
                server_app(grid, Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config=config))
            finally:
                grid.close()
    for cache in (out / "simulation").glob(f"*/{CACHE}"):
        shutil.rmtree(cache, ignore_errors=True)
    return read_result(out)


def _layout(cohort: int, workers: int | None) -> tuple[int, int]:
    """`layout` on the CPU. A GPU is one process's, which trains several clients at once: what has called it can't be forked."""
    if device().type == "cpu":
        return layout(cohort, workers)
    if workers and workers > 1:
        log.warning("%d workers were asked for, but with a GPU one process trains all clients", workers)
    return 1, 1


@contextmanager
def _spool(folder: Path) -> Iterator[Path]:
    """An empty folder for payloads, which goes at the end, as does one that a killed run has left."""
    spool = folder / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(mode=0o700)
    try:
        yield spool
    finally:
        shutil.rmtree(spool, ignore_errors=True)


@contextmanager
def _forking(plan: Plan, count: int, threads: int) -> Iterator[Callable[[Work], Workers] | None]:
    """What forks the workers, or None for one process; torch's threads are afterwards what they were.

    Until the fork torch may have one thread only: a process that is forked while others exist waits for them for ever.
    """
    if count == 1:
        yield None
        return
    import torch

    from lichen.client.app import trainer_of

    before = torch.get_num_threads()

    def fork(work: Work) -> Workers:
        with suppress(LichenError):  # then every client's own reply tells
            trainer_of(plan)
        gc.collect()
        gc.freeze()  # else a full collection would write to each page that the processes share, and so copy it
        workers = Workers(count, threads, work)
        torch.set_num_threads(before)  # the coordinator's scores, which are made beside the workers, are the same whatever their number
        return workers

    torch.set_num_threads(1)
    try:
        yield fork
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def deal(plan: Plan, root: Path) -> tuple[NodeHomes, dict[str, str]]:
    """Deal the rows to the clients, whose homes are written when they are asked for, and write the coordinator's splits.

    The same for the same plan. Homes that are there already are written again.

    Args:
        plan: its `simulation` section says which data, and how it is dealt.
        root: where to write.

    Returns:
        The homes, and the files of the splits ``validation`` and ``test``, where there are any.

    Raises:
        LichenError: PLAN_INVALID without data; DATA_…, PARTITION_INVALID, OUTPUT_UNUSABLE.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if plan.simulation.data is None:
        raise LichenError(
            Code.PLAN_INVALID, "a simulation needs data", where="simulation.data", fix="Name a data set (r8), or a path and fields."
        )
    train, test = load_spec(plan.simulation.data, root / "train.arrow")
    splits = {"test": pa.Table.from_pylist(test)} if test else {}
    label = plan.task.label_field
    if plan.evaluation.test_fraction:
        if splits:
            raise LichenError(
                Code.PLAN_INVALID, "the data has test rows of its own", where="evaluation.test_fraction", fix="Leave the key out."
            )
        kept, held = hold_out(train, plan.evaluation.test_fraction, label=label)
        splits["test"] = train.take(held)
        train = train.choose(kept)
    if plan.evaluation.validation_fraction:
        kept, held = hold_out(train, plan.evaluation.validation_fraction, plan.seed, label=label)
        if len(held):
            splits["validation"] = train.take(held)
        train = train.choose(kept)
    _check_rows(plan, train)
    clients = None if plan.simulation.partition.startswith("by:") else plan.simulation.clients
    parts = partition(train, plan.simulation.partition, clients, plan.seed, label=label)
    if len(parts) < plan.cohort.size:  # no other node will ever connect
        raise LichenError(
            Code.PARTITION_INVALID,
            f"cohort.size is {plan.cohort.size}, but only {len(parts)} clients are simulated",
            where="simulation.clients",
            fix=f"Simulate more, or set cohort.size to at most {len(parts)} (and cohort.minimum).",
        )
    if note := note_on_draws(plan, len(parts)):
        log.warning("%s", note)
    if plan.cohort.population is not None and plan.cohort.population != len(parts):
        raise LichenError(
            Code.PARTITION_INVALID,
            f"cohort.population is {plan.cohort.population}, but {len(parts)} clients are simulated",
            where="simulation.clients",
            fix=f"Set cohort.population to {len(parts)}, and cohort.size to the number expected in a round.",
        )
    # without federated evaluation a hold-out would only take rows from training
    holdout = 0.1 if plan.evaluation.federated_every else 0.0
    if entity := plan.privacy.unit_field:
        _tell_split_entities(train, parts, entity)
    homes = NodeHomes(root, train, parts, holdout=holdout, seed=plan.seed)
    homes.write_again()
    for name, table in splits.items():
        pq.write_table(table, root / f"{name}.parquet")
    sizes = {home.name: size for home, size in zip(homes, parts.sizes.tolist(), strict=True)}
    rows = {name: splits[name].num_rows if name in splits else 0 for name in ("validation", "test")}
    write_atomically(root.parent / "simulation.json", _facts(plan, sizes, **rows))
    return homes, {name: str(root / f"{name}.parquet") for name in splits}


def _check_rows(plan: Plan, rows: StoredRows) -> None:
    """Refuse rows that no client could read, and a task of which there is no row, before the tasks before it are trained.

    Raises:
        LichenError: DATA_FIELD, DATA_LABEL, DATA_EMPTY.
    """
    has, label, asked = rows.columns, plan.task.label_field, fields_of(plan)
    if missing := [field for field in asked if field not in has]:
        raise LichenError(
            Code.DATA_FIELD,
            f"the data have no {missing[0]!r}, which continual.stream asks for",
            where="simulation.data",
            fix=f"Map it to a column of theirs: fields: {{{missing[0]}: COLUMN}}, beside the task's.",
        )
    columns = {field: list(rows.column(field)) for field in {label, *asked} if field in has} if plan.continual.stream else {}
    of_tasks: set[int] = set()
    for task in plan.continual.stream:
        if not (own := rows_of(plan, task, columns)):
            raise LichenError(
                Code.DATA_EMPTY,
                f"no training row is of task {task.name!r}",
                where="continual.stream",
                fix="Hold its labels, where and between against the values that the data have.",
            )
        of_tasks.update(own)
    if plan.task.labels and label in has and not plan.private:  # else nodes leave them out
        found = (columns[label][row] for row in of_tasks) if plan.continual.stream else rows.column(label)
        if strangers := sorted(set(map(str, found)).difference(plan.task.labels)):
            raise LichenError(
                Code.DATA_LABEL,
                f"rows have labels that the plan has not: {', '.join(strangers[:5])}",
                where="simulation.data",
                fix="Add them to task.labels, or take those rows out.",
            )


def _tell_split_entities(rows: StoredRows, parts: Groups, entity: str) -> None:
    """Warn where an entity has rows at several clients: each client's ε is for its part of them only."""
    from lichen.client.data import said

    numbers, names = numbered(map(said, rows.column(entity)))
    pairs = np.unique(numbers * len(parts) + parts.each())
    if several := np.count_nonzero(np.bincount(pairs // len(parts)) > 1):
        log.warning(
            "%d of %d entities (%s) have rows at several clients, and each client's ε is for its own rows of them: "
            "simulation.partition by:FIELD deals by a natural field",
            several,
            len(names),
            entity,
        )


def _facts(plan: Plan, sizes: dict[str, int], validation: int, test: int) -> str:
    """What only the simulator can see."""
    import json

    facts = {"format": 1, "partition": plan.simulation.partition, "examples": sizes, "validation": validation, "test": test}
    return json.dumps(facts, indent=2) + "\n"
