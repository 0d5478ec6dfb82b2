"""The versions of a stream's model: what it was at each task's end, where it came from, how it scores, and whether it may be used."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lichen.common.continual.measures import drift, measures
from lichen.common.continual.stream import Stage, is_online, rounds_of_tasks, tasks_of
from lichen.common.disk import sync
from lichen.common.errors import Code, LichenError
from lichen.common.result import Continual, Metrics, write_atomically

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan

FOLDER = "versions"
PINNED = "pinned"
"""In it, the number of the version that an operator has rolled back to; without the file the newest that is not held back is given out."""
FORMAT: Final = 1
START = "start"
"""The task of version 0, the model before the first round."""
EVERY = "all rows"
"""In place of a task: all the coordinator's rows, which are of no batch of an online run."""
MEASURED = "accuracy"
"""The metric that R is made of, and `continual.tolerance` is about."""
_TOLD, _STATE, _SHOWN = "version.json", "state.safetensors", 10


class Version(BaseModel):
    """One version, as `versions/NUMBER-TASK/version.json` has it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = FORMAT
    number: int = Field(ge=0)
    """From 1, as tasks end; 0 is the model before the first round, of which no tensors are kept: it follows from the plan."""
    task: str
    """The task of the stream that it was made by."""
    round: int
    """The round that it was made in."""
    parent: int | None
    """The version that training began from."""
    plan_sha256: str
    epsilon: float | None = None
    """The largest client's ε until then; null without differential privacy."""
    validation: dict[str, Metrics | None] = Field(default_factory=dict)
    """By task of the stream, of the coordinator's validation rows, or of the clients' hold-outs; empty where neither was scored."""
    split: Literal["validation", "hold-outs"] = "validation"
    """Which of the two."""
    before: Metrics | None = None
    """Of an online run how its parent scored on the hold-outs of its batch, before that was trained on."""
    held_back: str | None = None
    """Why it is not what is exported; null for one that may be. In the file without what a rollback does."""
    at: float
    """When it was made, in seconds of the epoch."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.number}-{self.task}"


class Versions:
    """Those of one run. The run alone writes them, each once; an operator writes the pin, at any time.

    Args:
        directory: the run's.
        plan: the run's.
        plan_sha256: its digest, which new ones tell.
    """

    def __init__(self, directory: Path, plan: Plan, plan_sha256: str = "") -> None:
        self._folder, self._plan, self._plan_sha256 = directory / FOLDER, plan, plan_sha256
        self._known: dict[Path, Version] = {}

    def all(self) -> list[Version]:
        """Every version, in order. A rollback holds those back that came after the pinned one, whenever they did.

        Raises:
            LichenError: OUTPUT_UNUSABLE, if one, or the pin, can't be understood.
        """
        found, pinned = self._written(), self._pinned()
        if pinned is None:
            return found
        why = f"rolled back to {next((version.name for version in found if version.number == pinned), pinned)}"

        def seen(version: Version) -> Version:
            if version.number < pinned:
                return version
            return version.model_copy(update={"held_back": None if version.number == pinned else version.held_back or why})

        return list(map(seen, found))

    def add_start(self, validation: dict[str, Metrics | None]) -> None:
        """Keep how the model scores before the first round."""
        digest = self._plan_sha256
        self._write(Version(number=0, task=START, round=0, parent=None, plan_sha256=digest, validation=validation, at=time.time()))

    def add(
        self,
        stage: Stage,
        model: State,
        validation: dict[str, Metrics | None],
        epsilon: float | None,
        split: Literal["validation", "hold-outs"] = "validation",
        before: Metrics | None = None,
    ) -> None:
        """Keep the model as it is at a stage's end, and let go of what `continual.keep` does not ask for.

        One that was kept already, before a crash, is replaced.

        Args:
            stage: that has ended.
            model: after its last round.
            validation: by task of the stream.
            epsilon: the largest client's so far.
            split: what was scored.
            before: how its parent scored on the hold-outs of a batch.
        """
        from lichen.common.tensor_files import write_tensors

        number = stage.number + 1
        earlier = [version for version in self._written() if 0 < version.number < number]
        version = Version(
            number=number,
            task=tasks_of(self._plan)[stage.number].name,
            round=stage.last,
            parent=number - 1,
            plan_sha256=self._plan_sha256,
            epsilon=epsilon,
            validation=validation,
            split=split,
            before=before,
            # a cohort's hold-outs are others each time, and under privacy noised: a fall of theirs says little of the model
            held_back=self._fault(earlier, validation) if split == "validation" or EVERY in validation else None,
            at=time.time(),
        )
        folder = self._folder / version.name
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "state.tmp"
        write_tensors(temporary, model, {})
        sync(temporary)
        temporary.replace(folder / _STATE)
        sync(folder)
        self._write(version)  # last: a version that is told of is whole
        self._let_go()

    def state(self, version: Version) -> State:
        """The tensors of a version.

        Raises:
            LichenError: NO_MODEL, if they were let go of; OUTPUT_UNUSABLE, if they are damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._folder / version.name / _STATE
        try:
            found: State = load_file(path)
        except FileNotFoundError:
            raise self._gone(version) from None
        except (SafetensorError, OSError) as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"a damaged version: {error}", where=str(path)) from None
        return found

    def has_state(self, version: Version) -> bool:
        """Whether its tensors are still there."""
        return (self._folder / version.name / _STATE).exists()

    def find(self, number: int) -> Version:
        """A version that has a model.

        Raises:
            LichenError: NO_MODEL, if there is none of this number, or its tensors were let go of.
        """
        found = next((version for version in self._written() if version.number == number and number), None)
        if found is None:
            raise LichenError(Code.NO_MODEL, f"no version {number}", where=str(self._folder), fix=self._what_there_is())
        if not self.has_state(found):
            raise self._gone(found)
        return found

    def current(self) -> Version:
        """What is given out: the pinned one, or the newest that is not held back.

        Raises:
            LichenError: NO_MODEL before the first task's end; the first version is never held back.
        """
        return self._need(_newest(self.all()))

    def newest(self) -> Version:
        """What is given out without a pin. Raises as `current`."""
        return self._need(_newest(self._written()))

    def given_out(self) -> str | None:
        """The name of the current one; None before the first task's end."""
        return _name(_newest(self.all()))

    def choose(self, number: int | None) -> None:
        """Let a version be the current one, also when others come: those after it are held back, whatever held it back is over.

        Args:
            number: the version's; None: from now on the newest is current that is not held back.

        Raises:
            LichenError: NO_MODEL, if there is none of this number, or its tensors were let go of.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with held(self._folder.parent):
            self.pin(number)

    def pin(self, number: int | None) -> None:
        """As `choose`, for who holds the run already."""
        if number is None:
            (self._folder / PINNED).unlink(missing_ok=True)
        else:
            write_atomically(self._folder / PINNED, f"{self.find(number).number}\n")

    def summary(self) -> Continual | None:
        """What they tell on the validation rows, of an online run on the hold-outs; None before the first.

        Where nothing was scored there is no R, but what there is and what is given out is told all the same.
        """
        found = self.all()
        made = [version for version in found if version.number]
        if is_online(self._plan):
            tasks, rows = [version.task for version in made], _rows_of_batches(made)
        else:
            tasks = [task.name for task in self._plan.continual.stream]
            scored = any(version.validation for version in found)
            rows = {version.number: [measured(version.validation.get(task)) for task in tasks] for version in found} if scored else {}
        return summary_of(tasks, found[-1].split, rows, found) if made or rows else None

    def _fault(self, before: list[Version], validation: dict[str, Metrics | None]) -> str | None:
        """Why a version with these scores is held back: how much it lacks, on an earlier task, of the best version before."""
        tolerance = self._plan.continual.tolerance
        for task in [EVERY] if is_online(self._plan) else [version.task for version in before]:
            now = measured(validation.get(task))
            best = max((score for version in before if (score := measured(version.validation.get(task))) is not None), default=None)
            if now is not None and best is not None and best - now > tolerance:
                return f"{MEASURED} on {task} has fallen from {best:.3f} to {now:.3f}, by more than continual.tolerance ({tolerance:g})"
        return None

    def _written(self) -> list[Version]:
        """Every version as its file has it, in order."""
        paths = list(self._folder.glob(f"*/{_TOLD}"))
        for path in paths:
            if path in self._known:  # of 10,000 none is read twice
                continue
            try:
                self._known[path] = Version.model_validate_json(path.read_text(encoding="utf-8"))
            except (OSError, ValidationError, UnicodeDecodeError) as error:
                raise LichenError(Code.OUTPUT_UNUSABLE, f"no readable version: {str(error).splitlines()[0]}", where=str(path)) from None
        return sorted((self._known[path] for path in paths), key=lambda version: version.number)

    def _write(self, version: Version) -> None:
        path = self._folder / version.name / _TOLD
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, version.model_dump_json(indent=2) + "\n")
        for folder in (path.parent, self._folder):  # before its round is told, which is not made again then
            sync(folder)
        self._known[path] = version

    def _pinned(self) -> int | None:
        path = self._folder / PINNED
        try:
            return int(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            fix = "Say again what is given out: lichen coordinator rollback."
            raise LichenError(Code.OUTPUT_UNUSABLE, f"no version's number: {error}", where=str(path), fix=fix) from None

    def _let_go(self) -> None:
        """Of versions that need not be kept leave what they tell alone; what an earlier attempt has left goes too."""
        if (keep := self._plan.continual.keep) is None:
            return
        with held(self._folder.parent):
            made = [version for version in self._written() if version.number]
            given_out = {self._pinned(), self.newest().number}  # the second too: a rollback may be over at any time
            for version in made[:-keep]:
                if version.number not in given_out:
                    for path in (self._folder / version.name).iterdir():
                        if path.is_dir():
                            shutil.rmtree(path, ignore_errors=True)
                        elif path.name != _TOLD:
                            path.unlink(missing_ok=True)

    def _need(self, version: Version | None) -> Version:
        if version is None:
            raise LichenError(Code.NO_MODEL, "no task has ended yet", where=str(self._folder), fix="Wait until one has.")
        return version

    def _gone(self, version: Version) -> LichenError:
        what = f"of version {version.name} the scores alone are left: the plan has continual.keep: {self._plan.continual.keep}"
        return LichenError(Code.NO_MODEL, what, where=str(self._folder), fix=self._what_there_is())

    def _what_there_is(self) -> str:
        there = [version.name for version in self._written() if version.number and self.has_state(version)]
        more = f", and {len(there) - _SHOWN:,} before" if len(there) > _SHOWN else ""
        return f"Versions that have a model: {', '.join(there[-_SHOWN:]) or 'none yet'}{more}."


@contextmanager
def held(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the models of a run of a stream, against other processes too: none is chosen, let go of, written or replaced by another.

    Not twice by one thread, which would wait for itself. A run without a stream has nothing to hold.

    Args:
        directory: the run's.
        shared: with others that only read.
    """
    if not (directory / FOLDER).is_dir():
        yield
        return
    descriptor = os.open(directory / FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def scored_tasks(plan: Plan) -> list[str]:
    """By what names a version's scores are kept: its plan's tasks, or `EVERY`."""
    return [EVERY] if is_online(plan) else [task.name for task in plan.continual.stream]


def scores_hold_outs(plan: Plan) -> bool:
    """Whether clients' hold-outs are scored as a task of its stream ends."""
    every = plan.evaluation.federated_every
    return bool(every) and any(not end % every for end in accumulate(rounds_of_tasks(plan)))


def summary_of(
    tasks: list[str], split: Literal["test", "validation", "hold-outs"], rows: dict[int, list[float | None]], versions: Sequence[Version]
) -> Continual:
    """The result's section.

    Args:
        tasks: of the stream.
        split: that was scored.
        rows: by version the scores on each task; empty, where nothing was scored.
        versions: all, as `Versions.all` has them.
    """
    matrix = [rows[number] for number in sorted(rows) if number]
    found = measures(matrix, rows.get(0))
    return Continual(
        tasks=tasks,
        split=split if rows else None,
        matrix=matrix,
        start=rows.get(0),
        held_back={version.name: version.held_back for version in versions if version.held_back},
        given_out=_name(_newest(versions)),
        drift=drift(matrix),
        **found._asdict(),
    )


def measured(metrics: Metrics | None) -> float | None:
    """What R has of these."""
    return None if metrics is None else metrics.get(MEASURED)


def _rows_of_batches(found: Sequence[Version]) -> dict[int, list[float | None]]:
    """R without the columns of batches that are yet to come, but for the next one's before it began; empty without hold-outs."""
    scores = [metrics for version in found for task, metrics in [("", version.before), *version.validation.items()] if task != EVERY]
    if all(measured(metrics) is None for metrics in scores):
        return {}
    names, rows = [version.task for version in found], {}
    for version, after in zip_longest(found, found[1:]):
        row = [measured(version.validation.get(name)) for name in names]
        if after is not None:
            row[after.number - 1] = measured(after.before)
        rows[version.number] = row
    return rows


def _newest(versions: Sequence[Version]) -> Version | None:
    """The newest with a model that is not held back."""
    return next((version for version in reversed(versions) if version.number and version.held_back is None), None)


def _name(version: Version | None) -> str | None:
    return None if version is None else version.name
