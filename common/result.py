"""`result.json`: what a run did, in keys that scripts rely on. Extend it; don't change it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lichen.common.errors import Code, LichenError
from lichen.common.privacy.statement import Statement

Status = Literal["running", "finished", "failed", "stopped"]


Metrics = dict[str, float | None]
"""Metrics by name; null where a value is not finite, which JSON can't hold."""


def metric_title(key: str) -> str:
    """What a metric is called before people."""
    return {"macro_f1": "macro-F1"}.get(key, key.replace("_", " "))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Round(_Section):
    """One round; also a line of `metrics.jsonl`."""

    round: int
    """From 1."""
    task: str | None = None
    """Of the stream; null without one."""
    participants: int | None
    """Clients whose update was used; null under `unit: client`, as all that tells of the cohort: that is in `operator.jsonl`."""
    failed: int | None
    """Clients that were asked and gave no usable update; null under `unit: client`."""
    errors: dict[str, int | None] = Field(default_factory=dict)
    """Error number of each failed client, also of one that failed in evaluation alone; null for one that did not answer in time."""
    unneeded: int = 0
    """Clients that were asked beyond `cohort.size` and called off when enough updates were there."""
    called_off: list[str] = Field(default_factory=list)
    """Their names: what they had done by then is in no report. Empty under `unit: client`."""
    staleness: float | None = None
    """Under `mode: buffered`: mean over the updates used, in steps of the server since the models that they were made from."""
    train_loss: float | None = None
    """Mean over participants; null under differential privacy."""
    validation: Metrics | None = None
    """Metrics on the coordinator's validation split."""
    by_task: dict[str, Metrics | None] = Field(default_factory=dict)
    """The same by task of the stream, after the last round of a task; without such a split on the clients' hold-outs, if these are scored
    then."""
    federated: Metrics | None = None
    """Metrics on the clients' hold-outs, where the plan asks for them; noised under differential privacy."""
    federated_by_task: dict[str, Metrics | None] = Field(default_factory=dict)
    """The same by task of the stream until then."""
    before_by_task: dict[str, Metrics | None] = Field(default_factory=dict)
    """Of an online run the same just before a batch begins, on its hold-outs too."""
    before_errors: dict[str, int | None] = Field(default_factory=dict)
    """Error number of each client that failed in that; null for one that did not answer in time."""
    drift: float | None = None
    """How much lower accuracy was then on that batch's hold-outs than, in the mean, on those of the batches before."""
    epsilon: float | None = None
    """The largest client's ε so far."""
    uplink_bytes: int | None
    """Payload bytes from all clients; null under `unit: client`."""
    downlink_bytes: int | None
    """Payload bytes to all clients; null under `unit: client`."""
    seconds: float | None
    """The round without its validation, which runs beside the next one; null under `unit: client`."""

    def without_cohort(self) -> Round:
        """The round without all that tells who, or how many, took part."""
        secret = dict.fromkeys(("participants", "failed", "uplink_bytes", "downlink_bytes", "seconds", "train_loss", "federated"))
        return self.model_copy(update={**secret, "errors": {}, "called_off": [], "federated_by_task": {}})


class ClientPrivacy(_Section):
    """What a client's data paid."""

    epsilon: float
    """For one record: the maximum over segments."""
    epsilon_sum: float
    """For a person with records in all segments: the sum."""
    steps: int
    """Noised training steps."""
    noise_multiplier: float
    sample_rate: float
    segments: dict[str, float] = Field(default_factory=dict)
    """ε of each segment: disjoint sets of records."""


class CentralPrivacy(_Section):
    """What every client paid under `unit: client`: one account for the federation, as the coordinator promises."""

    epsilon: float
    """By privacy loss distributions (dp-accounting): what is promised."""
    epsilon_prv: float | None = None
    """The same by privacy random variables (Opacus): a second, independent account, once the run has ended."""
    releases: int
    """Noised sums, one a round."""
    noise_multiplier: float
    """Of a whole round: σ over sensitivity."""
    sample_rate: float
    """Each client's chance to be in a round."""
    update_noise_multiplier: float
    """Of the sum of updates alone, over the clip."""
    count_noise: float | None = None
    """σ of the count that the adaptive clip follows, in clients; null with a fixed clip."""


class Privacy(_Section):
    """The run's differential privacy."""

    unit: Literal["none", "example", "entity", "client"]
    adjacency: Literal["add/remove"] | None = None
    delta: float | None = None
    max_epsilon: float | None = None
    """Over all clients."""
    noise: Literal["secret", "seeded: not private"] | None = None
    """Where the noise came from. A simulation's repeats, so it protects nobody."""
    clients: dict[str, ClientPrivacy] = Field(default_factory=dict)
    """Empty under `unit: client`: who was drawn is secret, and all pay the same."""
    central: CentralPrivacy | None = None
    """Under `unit: client`."""
    statement: Statement | None = None
    """What is protected, from whom, verified by whom, how far, and what is not; null in a result of an older lichen."""


class Transfer(_Section):
    """Bytes over the whole run."""

    uplink_bytes: int | None
    """Null under `unit: client`, as `downlink_bytes`."""
    downlink_bytes: int | None
    bits_per_parameter: float | None = None
    """Uplink, of each update."""
    ratio_to_fp32: float | None = None
    """Uplink, against 32-bit floats."""


class Continual(_Section):
    """How a stream of tasks was learned: R[t][i] is the accuracy on task i after task t (Lopez-Paz and Ranzato 2017)."""

    tasks: list[str]
    """In the order of the stream."""
    split: Literal["test", "validation", "hold-outs"] | None
    """What R is of: while the run goes on the coordinator's validation rows, in the end its test rows if it has any; without both, and in
    an online run, the clients' hold-outs, if the plan has them scored as each task ends (`evaluation.federated_every`); null where nothing
    was scored."""
    matrix: list[list[float | None]]
    """R, a row for each task that was learned, and empty where nothing was scored; null where a task has no rows in the split, or the test
    rows came when the version's model was let go of (`continual.keep`)."""
    start: list[float | None] | None = None
    """The same of the model before the first round; null in an online run, and so is `fwt`."""
    acc: float | None = None
    """Mean over tasks of the last row."""
    bwt: float | None = None
    """Backward transfer: mean over earlier tasks of R[T][i] - R[i][i]."""
    fwt: float | None = None
    """Forward transfer: mean over later tasks of R[i-1][i] - start[i]."""
    forgetting: float | None = None
    """Mean over earlier tasks of their best score before the end, less the last."""
    drift: list[float | None] = Field(default_factory=list)
    """By task: how much worse its rows were scored before they were trained on than those of the tasks before; null for the first."""
    held_back: dict[str, str] = Field(default_factory=dict)
    """By version why it is not what is exported."""
    given_out: str | None = None
    """The version that `export` takes, and once the run has finished the one that `model/` is; `final` is of the one that it was then."""

    def not_given_out(self) -> str:
        """That what is given out is not what the last task made, in words; nothing where it is."""
        last, why = next(reversed(self.held_back.items()), ("", ""))
        if not self.given_out or not last or int(last.partition("-")[0]) < int(self.given_out.partition("-")[0]):
            return ""
        return f"{last} is held back ({why}); {self.given_out} is given out"


class Result(_Section):
    """The document `result.json`."""

    format: Literal[1] = 1
    run_id: str
    status: Status
    error: str | None = None
    plan_sha256: str
    engine: Literal["inprocess", "ray", "deployed", "flower"]
    seed: int
    versions: dict[str, str]
    seconds: float | None
    """Of all rounds; null under `unit: client`."""
    parameters: int | None = None
    """Trained parameters."""
    rounds: list[Round] = Field(default_factory=list)
    final: dict[str, Any] | None = None
    """`split` and its metrics; the test split is scored once, at the end."""
    privacy: Privacy
    transfer: Transfer
    continual: Continual | None = None
    """Of a stream of tasks; null without one."""


def read_result(directory: Path) -> Result:
    """The result of a run directory.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if it is not there or can't be understood.
    """
    path = directory / "result.json"
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"no readable result.json: {str(error).splitlines()[0]}", where=str(directory)) from None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new, and never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def schema() -> str:
    """The JSON schema of `result.json`."""
    return json.dumps(Result.model_json_schema(), indent=2, ensure_ascii=False)
