"""The directory of a run: plan, checkpoints, metrics, result, model. Every write is atomic, so a killed run goes on from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from lichen.common.disk import sync
from lichen.common.errors import Code, LichenError
from lichen.common.plan import digest_of, load_plan, text_of
from lichen.common.privacy.accounting import Segment
from lichen.common.privacy.statement import make_statement
from lichen.common.private_files import write_private
from lichen.common.records import ChainLink, PayloadRef
from lichen.common.result import Metrics, Result, Round, write_atomically

if TYPE_CHECKING:
    from lichen.common.model.adapter import State
    from lichen.common.plan import Plan

FORMAT = 1
KEPT = 2
DIGEST = Path("checkpoints", "plan.sha256")
COHORT = Path("checkpoints", "cohort.json")
RELEASE = Path("checkpoints", "release.safetensors")
RESTORED = Path("checkpoints", "restored")
"""Marks a run that came back from a backup: rounds that it does not know of may have been released."""
OPERATOR = "operator.jsonl"
"""What under `unit: client` only the operator may see: rounds with all that tells of their cohorts."""


class Before(BaseModel):
    """What is known of a batch of an online run that has not begun."""

    round: int
    """Its first one."""
    attempts: int = 0
    """How often hold-outs were scored for it."""
    least: int = 0
    """New rows that are waited for, since there was too little drift in fewer."""
    by_task: dict[str, Metrics | None] = Field(default_factory=dict)
    """The last scores."""
    drift: float | None = None
    enough: bool = False
    """Whether that was enough to begin: then nothing is scored again after a crash."""
    errors: dict[str, int | None] = Field(default_factory=dict)
    """Of clients that failed in any of them, their error's number; null for no answer."""


@dataclass
class ServerState:
    """All that a run's next round depends on."""

    round: int
    """Rounds finished."""
    model: State
    velocity: State
    """The server optimizer's momentum; may be empty."""
    average: State
    """Sum of the models of the last rounds that the final model is the mean of; may be empty."""
    squares: State = field(default_factory=dict)
    """The mean square that an adaptive server optimizer keeps; may be empty."""
    memory: State = field(default_factory=dict)
    """What the continual method keeps at the coordinator alone; all names begin with `MEMORY`."""
    spent: dict[str, list[Segment]] = field(default_factory=dict)
    """Training steps by client, of the task that is under way."""
    spent_before: dict[str, dict[str, list[Segment]]] = field(default_factory=dict)
    """Those of earlier tasks of the stream, by client and the task's name."""
    evaluated: dict[str, list[Segment]] = field(default_factory=dict)
    """Noised hold-out evaluations by client."""
    exhausted: dict[str, list[str]] = field(default_factory=dict)
    """By kind of message the clients that have no privacy budget left for it: they are not asked again."""
    rowless: list[str] = field(default_factory=list)
    """Without privacy the clients that have answered that they have no rows of the stream's task under way."""
    clip: float | None = None
    """Under `unit: client`: of the next round."""
    chain: list[ChainLink] = field(default_factory=list)
    """What was added to the model in the last rounds, oldest first, as far as it is kept."""
    held: dict[str, str] = field(default_factory=dict)
    """By client the digest of the model that it had last; under `unit: client` not kept in the checkpoint."""
    batch: list[str] = field(default_factory=list)
    """Of an online run the clients whose new data the batch under way is."""
    before: Before | None = None
    """Of the batch that was waited for last, if its hold-outs were scored."""
    learned: bool = False
    """Whether the task that is under way has changed anything yet."""
    trained: dict[str, int] = field(default_factory=dict)
    """Under `mode: buffered` by client the trainings that are settled: used, failed or called off."""
    told: Round | None = None
    """The last round's line, which is told only when its model is scored; None under `unit: client`, where the operator's has it."""

    @property
    def whole(self) -> State:
        """The model, with all that the continual method keeps: what is scored, and what a version is."""
        return self.model | self.memory


@dataclass(frozen=True)
class Release:
    """What one round of client-level privacy lets out of its sum."""

    update: State
    """The noised mean."""
    clip: float
    """Of the next round."""


class RunDirectory:
    """One run's directory.

    Args:
        path: the directory.
        plan: the run's plan; it must be the one that the directory was made for, in whichever lichen's words.

    Attributes:
        text: the plan's, as it was when the run was submitted: what nodes get, so that its digest stays the one that people approved.
        plan_sha256: that digest.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if it belongs to another plan or can't be written; as `load_plan`.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            stored, digest = path / "plan.yaml", path / DIGEST
            if not stored.exists() and not digest.exists():
                write_atomically(stored, plan.to_yaml())
            elif load_plan(stored) != plan:
                raise _other_plan(path)
            self.text = text_of(stored)
            self.plan_sha256 = digest_of(self.text)
            if not digest.exists():
                write_atomically(digest, self.plan_sha256)
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(path)) from None

    # --- the cohort of the round that is under way ---

    def save_cohort(self, round: int, nodes: Iterable[int]) -> None:
        """Keep who was asked in a round, before anyone is: after a crash the same nodes are asked the same."""
        write_private(self.path / COHORT, json.dumps({"round": round, "nodes": list(nodes)}).encode())

    def load_cohort(self, round: int) -> list[int] | None:
        """Who was asked in ``round``, if it was begun before a crash."""
        try:
            found = json.loads((self.path / COHORT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return [int(node) for node in found["nodes"]] if found["round"] == round else None

    def forget_cohort(self) -> None:
        """Let the round that is under way draw its cohort again: for a simulation, which asks nobody twice."""
        (self.path / COHORT).unlink(missing_ok=True)

    # --- the noised sum of the round that is under way ---

    def check_not_restored(self) -> None:
        """Refuse to go on where a round that was released already would be noised a second time.

        Raises:
            LichenError: OUTPUT_UNUSABLE.
        """
        if (self.path / RESTORED).exists():
            raise LichenError(
                Code.OUTPUT_UNUSABLE,
                "restored from a backup: under unit: client rounds after it may have been released, and may not be again",
                where=str(self.path),
                fix="Submit the plan as a new run, which every node's ledger counts anew.",
            )

    def save_release(self, round: int, release: Release) -> None:
        """Keep a round's noised sum, on the disk before anything that follows from it: after a crash none is drawn again."""
        from safetensors.torch import save

        about = {"format": FORMAT, "round": round, "clip": release.clip}
        write_private(self.path / RELEASE, save(release.update, metadata={"lichen": json.dumps(about)}))

    def load_release(self, round: int) -> Release | None:
        """The noised sum of ``round``, if it was drawn before a crash.

        Raises:
            LichenError: OUTPUT_UNUSABLE, if it is damaged: another may not be drawn then.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path / RELEASE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["lichen"])
                if about["round"] != round:
                    return None
                return Release({name: file.get_tensor(name) for name in file.keys()}, float(about["clip"]))  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"a damaged release: {error}", where=str(path)) from None

    # --- checkpoints ---

    def save_state(self, state: ServerState) -> None:
        """Write a checkpoint, and drop those that are no longer needed."""
        from lichen.common.tensor_files import write_tensors

        tensors = {
            f"{part}/{name}": tensor
            for part, tensors in (
                ("model", state.model),
                ("velocity", state.velocity),
                ("average", state.average),
                ("squares", state.squares),
                ("memory", state.memory),
            )
            for name, tensor in tensors.items()
        }
        about = {
            "format": FORMAT,
            "round": state.round,
            "plan_sha256": self.plan_sha256,
            "spent": state.spent,
            "spent_before": state.spent_before,
            "evaluated": state.evaluated,
            "exhausted": state.exhausted,
            "rowless": state.rowless,
            "clip": state.clip,
            "chain": [[link.before, link.added.digest, link.added.length] for link in state.chain],
            "held": {} if self.plan.central else state.held,
            "batch": state.batch,
            "before": state.before.model_dump() if state.before else None,
            "learned": state.learned,
            "trained": state.trained,
            "told": state.told.model_dump_json() if state.told else None,
        }
        final = self._checkpoint(state.round)
        temporary = final.with_suffix(".tmp")
        write_tensors(temporary, tensors, {"lichen": json.dumps(about)})
        sync(temporary)
        temporary.replace(final)
        sync(final.parent)  # on the disk now: what the round was made of may be let go of
        for old in self._checkpoints()[:-KEPT]:
            old.unlink()

    def load_state(self) -> ServerState | None:
        """The newest checkpoint; None before the first.

        Raises:
            LichenError: OUTPUT_UNUSABLE, if it is from a newer lichen, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not (found := self._checkpoints()):
            return None
        parts: dict[str, State] = {"model": {}, "velocity": {}, "average": {}, "squares": {}, "memory": {}}
        try:
            with safe_open(found[-1], framework="pt") as file:
                about = json.loads((file.metadata() or {})["lichen"])
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    part, name = key.split("/", 1)
                    parts.setdefault(part, {})[name] = file.get_tensor(key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"a damaged checkpoint: {error}", where=str(found[-1])) from None
        if about["format"] != FORMAT:
            raise LichenError(
                Code.OUTPUT_UNUSABLE, f"a checkpoint of format {about['format']}", where=str(found[-1]), fix="Upgrade lichen."
            )

        def history(found: dict[str, list[list[float]]]) -> dict[str, list[Segment]]:
            return {name: [Segment(noise, rate, int(steps)) for noise, rate, steps in rows] for name, rows in found.items()}

        return ServerState(
            about["round"],
            **parts,
            spent=history(about["spent"]),
            spent_before={name: history(tasks) for name, tasks in about.get("spent_before", {}).items()},
            evaluated=history(about["evaluated"]),
            exhausted=about.get("exhausted", {}),
            rowless=about.get("rowless", []),
            clip=about.get("clip"),
            chain=[ChainLink(before, PayloadRef(digest, length)) for before, digest, length in about.get("chain", [])],
            held=about.get("held", {}),
            batch=about.get("batch", []),
            before=Before.model_validate(before) if (before := about.get("before")) else None,
            learned=about.get("learned", True),  # an older lichen took it for granted
            trained=about.get("trained", {}),
            told=Round.model_validate_json(told) if (told := about.get("told")) else None,
        )

    def _checkpoint(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:05d}.safetensors"

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), key=lambda path: int(path.stem.removeprefix("round-")))

    # --- what is told ---

    def save_result(self, result: Result, *, metrics: bool = True) -> None:
        """Write `result.json` with the privacy statement as it now is, and `metrics.jsonl` with its rounds.

        Args:
            result: what to write.
            metrics: False if its rounds are those that `metrics.jsonl` has.
        """
        result.privacy.statement = make_statement(self.plan, result)
        if metrics:
            write_atomically(self.path / "metrics.jsonl", "".join(line.model_dump_json() + "\n" for line in result.rounds))
        write_atomically(self.path / "result.json", result.model_dump_json(indent=2) + "\n")

    def save_for_operator(self, told: Round) -> None:
        """Add a round, with its cohort's figures, to what only the operator may see; one that is told again replaces its line."""
        kept = [line for line in self._for_operator() if line.round < told.round]
        write_private(self.path / OPERATOR, "".join(f"{line.model_dump_json()}\n" for line in [*kept, told]).encode())

    def load_for_operator(self, round: int) -> Round | None:
        """What only the operator may see of a round."""
        return next((line for line in self._for_operator() if line.round == round), None)

    def _for_operator(self) -> list[Round]:
        try:
            lines = (self.path / OPERATOR).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Round.model_validate_json(line) for line in lines]

    def load_rounds(self, until: int) -> list[Round]:
        """The rounds up to ``until`` that were told already."""
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [told for told in map(Round.model_validate_json, lines) if told.round <= until]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("lichen", "flwr", "torch", "opacus", "transformers", "peft", "dp-accounting")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def open_for(out: Path, *, resume: bool, plan: Plan | None = None) -> None:
    """Refuse a directory that holds something else, a run of another plan than ``plan``, or a run that was not asked to go on.

    Raises:
        LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE; as `load_plan`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DIGEST).exists():
        raise LichenError(Code.OUTPUT_UNUSABLE, "not empty, and not a run directory", where=str(out), fix="Choose another --out.")
    if not resume:
        raise LichenError(Code.OUTPUT_EXISTS, "holds a run", where=str(out), fix="Choose another --out, or go on with it: --resume.")
    if plan is not None and load_plan(out / "plan.yaml") != plan:
        raise _other_plan(out)


def _other_plan(path: Path) -> LichenError:
    return LichenError(
        Code.OUTPUT_UNUSABLE,
        "it holds a run of another plan",
        where=str(path),
        fix="Choose another directory, or go on with the plan as it was (plan.yaml in there).",
    )
