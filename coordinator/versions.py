"""The versions of a stream's model: what it was at each task's end, where it came from, how it scores, and whether it may be used."""

from __future__ import annotations

import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lichen.common.continual.measures import drift, measures
from lichen.common.continual.stream import Stage, is_online, tasks_of
from lichen.common.errors import Code, LichenError
from lichen.common.result import Continual, Metrics, write_atomically

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan

FOLDER = "versions"
FORMAT: Final = 1
START = "start"
"""The task of version 0, the model before the first round."""
EVERY = "all rows"
"""In place of a task: all the coordinator's rows, which are of no batch of an online run."""
MEASURED = "accuracy"
"""The metric that R is made of, and `continual.tolerance` is about."""


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
    """Why it is not what is exported; null for one that is."""
    at: float
    """When it was made, in seconds of the epoch."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.number}-{self.task}"


class Versions:
    """Those of one run.

    Args:
        directory: the run's.
        plan: the run's.
        plan_sha256: its digest, which new ones tell.
    """

    def __init__(self, directory: Path, plan: Plan, plan_sha256: str = "") -> None:
        self._folder, self._plan, self._plan_sha256 = directory / FOLDER, plan, plan_sha256

    def all(self) -> list[Version]:
        """Every version, in order.

        Raises:
            LichenError: OUTPUT_UNUSABLE, if one can't be understood.
        """
        found = []
        for path in self._folder.glob("*/version.json"):
            try:
                found.append(Version.model_validate_json(path.read_text(encoding="utf-8")))
            except (OSError, ValidationError, UnicodeDecodeError) as error:
                raise LichenError(Code.OUTPUT_UNUSABLE, f"no readable version: {str(error).splitlines()[0]}", where=str(path)) from None
        return sorted(found, key=lambda version: version.number)

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
        """Keep the model as it is at a stage's end; one that was kept already, before a crash, is replaced.

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
        earlier = [version for version in self.all() if 0 < version.number < number]
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
        temporary.replace(folder / "state.safetensors")
        self._write(version)  # last: a version that is told of is whole

    def state(self, version: Version) -> State:
        """The tensors of a version.

        Raises:
            LichenError: OUTPUT_UNUSABLE, if they are not there, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._folder / version.name / "state.safetensors"
        try:
            found: State = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"a damaged version: {error}", where=str(path)) from None
        return found

    def find(self, number: int) -> Version:
        """A version that has a model.

        Raises:
            LichenError: NO_MODEL, if there is none of this number.
        """
        found = {version.number: version for version in self.all() if version.number}
        if number in found:
            return found[number]
        there = ", ".join(version.name for version in found.values()) or "none yet"
        raise LichenError(Code.NO_MODEL, f"no version {number}", where=str(self._folder), fix=f"Versions: {there}.")

    def current(self) -> Version:
        """The newest that is not held back.

        Raises:
            LichenError: NO_MODEL before the first task's end; the first version is never held back.
        """
        for version in reversed(self.all()):
            if version.number and version.held_back is None:
                return version
        raise LichenError(Code.NO_MODEL, "no task has ended yet", where=str(self._folder), fix="Wait until one has.")

    def given_out(self) -> str | None:
        """The name of the current one; None before the first task's end."""
        return next((version.name for version in reversed(self.all()) if version.number and version.held_back is None), None)

    def held_back(self) -> dict[str, str]:
        """By name why."""
        return {version.name: version.held_back for version in self.all() if version.held_back}

    def choose(self, number: int) -> None:
        """Let a version be the current one: those after it are held back, whatever held it back is over.

        Raises:
            LichenError: NO_MODEL, if there is none of this number.
        """
        chosen = self.find(number)
        for version in self.all():
            if version.number > number and version.held_back is None:
                self._write(version.model_copy(update={"held_back": f"rolled back to {chosen.name}"}))
        if chosen.held_back is not None:
            self._write(chosen.model_copy(update={"held_back": None}))

    def summary(self) -> Continual | None:
        """What they tell on the validation rows, of an online run on the hold-outs; None before the first."""
        found = self.all()
        if is_online(self._plan):
            return self._summary_of_batches([version for version in found if version.number])
        if not any(version.validation for version in found):
            return None
        tasks = [task.name for task in self._plan.continual.stream]
        rows = {version.number: [measured(version.validation.get(task)) for task in tasks] for version in found}
        return summary_of(tasks, found[-1].split, rows, self.held_back())

    def _summary_of_batches(self, found: list[Version]) -> Continual | None:
        """R without the rows of batches that are yet to come, but for the next one's before it began; empty without hold-outs."""
        names = [version.task for version in found]
        rows: dict[int, list[float | None]] = {}
        for version, after in zip_longest(found, found[1:]):
            scores = [measured(version.validation.get(name)) for name in names]
            if after is not None:
                scores[after.number - 1] = measured(after.before)
            rows[version.number] = scores
        told = any(score is not None for scores in rows.values() for score in scores)
        return summary_of(names, "hold-outs", rows if told else {}, self.held_back()) if names else None

    def _fault(self, before: list[Version], validation: dict[str, Metrics | None]) -> str | None:
        """Why a version with these scores is held back: how much it lacks, on an earlier task, of the best version before."""
        tolerance = self._plan.continual.tolerance
        for task in [EVERY] if is_online(self._plan) else [version.task for version in before]:
            now = measured(validation.get(task))
            best = max((score for version in before if (score := measured(version.validation.get(task))) is not None), default=None)
            if now is not None and best is not None and best - now > tolerance:
                return f"{MEASURED} on {task} has fallen from {best:.3f} to {now:.3f}, by more than continual.tolerance ({tolerance:g})"
        return None

    def _write(self, version: Version) -> None:
        folder = self._folder / version.name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "version.json", version.model_dump_json(indent=2) + "\n")


def scored_tasks(plan: Plan) -> list[str]:
    """By what names a version's scores are kept: its plan's tasks, or `EVERY`."""
    return [EVERY] if is_online(plan) else [task.name for task in plan.continual.stream]


def summary_of(
    tasks: list[str], split: Literal["test", "validation", "hold-outs"], rows: dict[int, list[float | None]], held_back: dict[str, str]
) -> Continual:
    """The result's section.

    Args:
        tasks: of the stream.
        split: that was scored.
        rows: by version the scores on each task.
        held_back: by version's name why.
    """
    matrix = [rows[number] for number in sorted(rows) if number]
    found = measures(matrix, rows.get(0))
    return Continual(
        tasks=tasks, split=split, matrix=matrix, start=rows.get(0), held_back=held_back, drift=drift(matrix), **found._asdict()
    )


def measured(metrics: Metrics | None) -> float | None:
    """What R has of these."""
    return None if metrics is None else metrics.get(MEASURED)
