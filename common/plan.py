"""The plan: one document that describes a federation, the same for a simulation, a deployment and stock Flower."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from lichen.common.aggregation import RULES
from lichen.common.errors import Code, LichenError

FORMAT = 1


def _whole(value: object) -> object:
    # YAML reads 1e-5 as text and `--set x=1` gives an int where a float is meant; both are harmless to accept
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_whole)]
Precision = Literal["float32", "bfloat16", "int8"]


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads the word as false


class Section(BaseModel):
    """A part of the plan: unknown keys are refused, and nothing changes after it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Task(Section):
    """What is learned."""

    kind: Literal["text-classification"] = "text-classification"
    """The kind of task."""
    labels: tuple[str, ...] = Field(min_length=2)
    """The class names, in the order of the model's outputs. They are public."""
    label_descriptions: dict[str, str] = Field(default_factory=dict)
    """A few words on each label, for `model.head.init: label-descriptions`. They are public: never take them from private rows."""
    max_length: int = Field(default=128, ge=4, le=8192)
    """Tokens kept of each text."""
    text_field: str = "text"
    """The data field that holds the text."""
    label_field: str = "label"
    """The data field that holds the label's name."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if strangers := set(self.label_descriptions) - set(self.labels):
            raise ValueError(f"label_descriptions names labels that task.labels does not: {sorted(strangers)}")
        return self


class Adapter(Section):
    """Which weights are trained, and travel."""

    kind: Literal["lora", "full", "head"] = "lora"
    """`lora`: low-rank updates of the targets, and the head. `full`: every weight. `head`: the head alone, on a frozen base."""
    rank: int = Field(default=8, ge=1, le=512)
    """LoRA's r (Hu et al. 2021)."""
    alpha: Number = Field(default=16.0, gt=0)
    """LoRA's α; the update is scaled by α / r."""
    targets: tuple[str, ...] = ()
    """Names of the linear modules that get an adapter; empty: query and value projections, found by architecture."""
    last_layers: int | None = Field(default=None, ge=1)
    """LoRA on so many of the last layers only; left out: on all. What lies below is the same in every step, and computed once (`lean`). Not
    with `targets: [all-linear]`."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Head(Section):
    """How the classifier reads the model."""

    pooling: Literal["mean", "pooler"] = "mean"
    """`mean`: a linear head over the mean of all real tokens' features. `pooler`: the architecture's own (BERT's pooler, a last token)."""
    init: Literal["label-descriptions", "zeros", "random"] = "zeros"
    """The head's start. `label-descriptions`: the base model's own embedding of each label's description (mean pooling only)."""
    scale: Number = Field(default=1.0, gt=0)
    """With `init: label-descriptions`, the factor on the unit embeddings (less their mean) that the head starts from."""


class Model(Section):
    """The Transformer that is tuned."""

    base: str = Field(min_length=1)
    """A hub name, a local path, or `package:DISTRIBUTION/PATH` for weights that an installed package carries."""
    revision: str | None = None
    """The hub revision (a commit); ignored for a path."""
    base_precision: Precision = "float32"
    """How nodes keep the frozen base's weights; they compute in 32 bits whatever it is. `int8` takes a quarter of the memory: each row of
    a weight, and each token of an embedding, has a scale of its own. `bfloat16` takes half. The coordinator scores with 32 bits, as those
    who use the model will."""
    adapter: Adapter = Adapter()
    head: Head = Head()


class Cohort(Section):
    """Who takes part in a round."""

    size: int = Field(default=4, ge=1)
    """Clients asked in each round. It waits for so many until the deadline, then goes on with those that are connected. Under
    `privacy.unit: client` the expected number."""
    population: int | None = Field(default=None, ge=1)
    """Clients in the federation, a public constant, for `privacy.unit: client`: each is in a round with chance size / population."""
    minimum: int = Field(default=1, ge=1)
    """A round with fewer usable updates fails. Under `privacy.unit: client` no round does, since that would tell who took part."""
    deadline_s: Number = Field(default=600.0, gt=0)
    """Seconds from asking a round's clients until it ends without those that are later. All other times follow from this one."""
    oversample: Number = Field(default=1.0, ge=1, le=10)
    """Asks so many times `size` clients (rounded up; 1.3 is a good start) and goes on with the first `size` usable updates: the rest are
    called off. For `mode: synchronous`; not under `privacy.unit: client`, whose guarantee rests on who is drawn."""
    mode: Literal["synchronous", "buffered"] = "synchronous"
    """`synchronous`: a round ends when all asked clients have answered or the deadline has passed. `buffered`: FedBuff (Nguyen et al.
    2022), where each of `size` clients trains on the newest model as soon as it is free, and a round is a step of the server, made of
    `buffer` updates; those that come later go into the next step, counted less."""
    buffer: int | None = Field(default=None, ge=1)
    """Updates in a step of `mode: buffered`, at most `size`; left out: 10, or `size` if that is less. The deadline is a step's: when it
    passes, `minimum` updates are enough."""
    assign: tuple[Literal["max_physical_batch_size", "checkpointing", "steps", "rank", "max_length", "precision"], ...] = (
        "max_physical_batch_size",
        "checkpointing",
    )
    """What the coordinator may lower for a node whose hardware needs it. The two of the default change no update but for rounding; the
    others give an update of fewer steps, a smaller rank, shorter texts or a coarser base."""

    @property
    def asked(self) -> int:
        """Clients that a synchronous round asks."""
        return math.ceil(round(self.size * self.oversample, 6))  # 1.1 · 100 is a little above 110

    @property
    def step_updates(self) -> int:
        """Updates in a step of `mode: buffered`."""
        return self.buffer or min(10, self.size)

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.minimum > self.size:
            raise ValueError(f"minimum ({self.minimum}) is above size ({self.size})")
        if len(set(self.assign)) != len(self.assign):
            raise ValueError("assign names a thing twice")
        if self.mode == "buffered":
            if self.oversample > 1:
                raise ValueError("oversample goes with mode: synchronous: a buffered step waits for nobody in particular")
            if self.step_updates > self.size:
                raise ValueError(f"buffer ({self.buffer}) is above size ({self.size})")
            if self.minimum > self.step_updates:
                raise ValueError(f"minimum ({self.minimum}) is above buffer ({self.step_updates})")
        elif self.buffer is not None:
            raise ValueError("buffer goes with mode: buffered, and only with it")
        return self


class Local(Section):
    """What a client does in a round."""

    epochs: Number | None = Field(default=None, gt=0)
    """Passes over the local data; give this or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    partial: bool = False
    """A client that sees that it will not be done by `cohort.deadline_s` sends what it has, and says how many steps that are; updates
    are then normalised by steps (FedNova, Wang et al. 2020). Without privacy only: how far a client comes depends on its rows."""
    batch_size: int = Field(default=16, ge=1)
    """Examples in a step; under differential privacy the expected number, unless `privacy.sample_rate` is given."""
    max_physical_batch_size: int = Field(default=32, ge=1)
    """Rows that pass through the model at once; larger batches are accumulated."""
    compute: Literal["lean", "plain"] = "lean"
    """`lean`: no padding (or rows of about one length together), nothing that the head does not read, LoRA fused with its layer.
    `plain`: batches as they are drawn, padded to `task.max_length`, by PEFT's own passes. Sums are the same but for rounding."""
    checkpointing: bool = False
    """Gradient checkpointing (Chen et al. 2016): what a layer computes is not kept for the backward pass, but computed again in it."""
    prefix_cache: Annotated[Literal["float32", "float16", "off"], BeforeValidator(_off)] = "float32"
    """How a client keeps what the layers below the lowest trained one give for each row, under `compute: lean`. `float32` changes
    nothing; `float16` takes half the disk and changes updates by some 1e-5 of their size."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The local optimizer; its state starts afresh each round, so clients are stateless."""
    learning_rate: Number = Field(default=1e-3, gt=0)
    """Of the adapter, or of all weights."""
    head_learning_rate: Number | None = Field(default=None, gt=0)
    """Of the head; by default the same."""
    learning_rate_decay: Literal["none", "linear", "cosine"] = "none"
    """Falls from the full rate in the first round towards zero after the last."""
    betas: tuple[Number, Number] = (0.9, 0.999)
    """AdamW's; of SGD the first is the momentum."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    proximal_mu: Number = Field(default=0.0, ge=0)
    """FedProx' μ (Li et al. 2020): μ/2 ‖w − w_round‖² is added to the loss. It depends on no example: it is not clipped, nor noised."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


class Audit(Section):
    """Canaries: made-up rows, wrong on purpose, by which `lichen audit` looks for a leak after the run."""

    canaries: int = Field(default=0, ge=0, le=100_000)
    """For each client. A coin of the node's own decides of each whether it is trained on; they cost accuracy, like other wrong rows."""
    baseline: bool = False
    """Permits canaries without privacy (`unit: none`), to see what the audit finds where nothing is protected."""


class AdaptiveClip(Section):
    """A clip that follows a quantile of the updates' norms (Andrew et al. 2021), of which only a noised count is used."""

    quantile: Number = Field(default=0.5, gt=0, lt=1)
    """Share of the updates that the clip is to leave as they are."""
    learning_rate: Number = Field(default=0.2, gt=0, le=2)
    """η in C ← C·exp(−η(b − quantile))."""


class Privacy(Section):
    """Differential privacy. Adjacency is add/remove of one unit.

    Under `noise: local` each client's ε holds against everyone, the coordinator included; under `noise: central` it is the coordinator
    that promises it.
    """

    unit: Literal["none", "example", "entity", "client"] = "none"
    """What is protected: nothing, one row, all rows with one value of `unit_field`, or all that one client has."""
    unit_field: str | None = None
    """The data field that names the entity (a patient, a customer)."""
    epsilon: Number = Field(default=8.0, gt=0)
    """ε for each unit over all rounds, at most."""
    delta: Number = Field(default=1e-5, gt=0, lt=0.1)
    """δ; below 1 / (number of units)."""
    clip: Number = Field(default=1.0, gt=0)
    """ℓ2 bound on each unit's gradient; under `unit: client` on a client's whole update, of the first round if it adapts."""
    adaptive_clip: AdaptiveClip | None = None
    """Under `unit: client`: lets the clip follow the updates' norms; `{}` takes the defaults, left out it stays as it is."""
    noise: Literal["local", "central"] = "local"
    """`local`: each client adds the noise that its own guarantee needs. `central`: the coordinator does, for `unit: client`."""
    sample_rate: Number | None = Field(default=None, gt=0, le=1)
    """Poisson sampling rate of a step; by default `local.batch_size` / the declared size."""
    gradients: Literal["single-backward", "hooks"] = "single-backward"
    """How units' gradients are clipped: in one ordinary backward pass, or by Opacus' hooks, which are slower. The sums are the same."""
    audit: Audit = Audit()

    @model_validator(mode="after")
    def _entity_is_named(self) -> Self:
        if (self.unit == "entity") != (self.unit_field is not None):
            raise ValueError("unit_field goes with unit: entity, and only with it")
        return self


def _server_rate(given: dict[str, Any]) -> float:
    return 1e-2 if given.get("optimizer") in {"fedadam", "fedyogi"} else 1.0


class Aggregation(Section):
    """What the coordinator does with the updates."""

    rule: Literal["fedavg", "ffa", "rolora", "nested", "flora", "fedex", "zero-padding"] = "fedavg"
    """`fedavg`: the weighted mean (McMahan et al. 2017); by true size without privacy, by declared size with it, `unit: client` flat. The
    others are for LoRA. `ffa`: A is fixed, B alone is trained (Sun et al. 2024). `rolora`: one factor a round, B first (Chen et al.
    2024). `nested`: the same for clients of several ranks, of which each trains its first columns. `flora`: what all have learned is
    merged into the base exactly, and adapters start afresh each round (Wang et al. 2024). `fedex`: `fedavg`, and what it leaves out is
    merged into the base (Singhal et al. 2024). `zero-padding`: `fedavg` for several ranks; only to compare with."""
    secure: Literal[False] = False
    """Secure aggregation."""
    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    """How the mean update is applied: as it is, with server momentum (Hsu et al. 2019), or adaptively (Reddi et al. 2021)."""
    learning_rate: Number = Field(default_factory=_server_rate, gt=0)
    """The server's; left out, 1, and .01 for `fedadam` and `fedyogi`."""
    momentum: Number = Field(default=0.0, ge=0, lt=1)
    """The server's, for `fedavgm`."""
    betas: tuple[Number, Number] = (0.9, 0.99)
    """For `fedadam` and `fedyogi`: how much of the mean of updates, and of that of their squares, is kept from round to round."""
    tau: Number = Field(default=1e-3, gt=0)
    """For `fedadam` and `fedyogi`: added to the root of the mean square; the larger, the less adaptive."""
    average_last: int = Field(default=1, ge=1)
    """The final model is the mean over this many last rounds (post-processing: it costs no privacy)."""

    @model_validator(mode="after")
    def _betas_lie_below_one(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _momentum_belongs_to_fedavgm(self) -> Self:
        if (self.momentum > 0) != (self.optimizer == "fedavgm"):
            raise ValueError("momentum above 0 goes with optimizer: fedavgm, and only with it")
        return self


class Uplink(Section):
    """How updates travel to the coordinator."""

    codec: Literal["eden", "blockwise", "topk", "fp16", "none"] = "eden"
    """`eden`: rotated and quantised, unbiased (Vargaftik et al. 2022). `blockwise`: nearest integers. `topk`: the largest values alone.
    `fp16`: 16-bit floats. `none`: 32-bit floats."""
    bits: int | None = Field(default=None, ge=1, le=32)
    """Bits a parameter: of `eden` 1 to 8, 4 if left out; of `blockwise` 2 to 8, 8 if left out. The others have their own."""
    share: Number = Field(default=0.1, ge=0.0001, le=1)
    """Of the values, that `topk` sends."""
    error_feedback: bool = False
    """Adds what a round's codec lost to the client's next update (Karimireddy et al. 2019), of which the client keeps a copy as large as
    the model. For `blockwise`, `topk` and `fp16`, without privacy."""

    @model_validator(mode="after")
    def _bits_are_the_codecs(self) -> Self:
        least, most = {"eden": (1, 8), "blockwise": (2, 8), "fp16": (16, 16), "none": (32, 32), "topk": (32, 32)}[self.codec]
        if self.bits is not None and not least <= self.bits <= most:
            raise ValueError(f"codec {self.codec} has {least if least == most else f'{least} to {most}'} bits")
        return self


class Downlink(Section):
    """How the model travels to clients that have an older one; others get it whole, as 32-bit floats."""

    codec: Literal["blockwise", "none"] = "blockwise"
    """`blockwise`: what was added since, in nearest integers of 8 bits, and this is what the coordinator adds to its own model too: all
    hold the same. `none`: the whole model."""


class Transfer(Section):
    """How tensors travel."""

    uplink: Uplink = Uplink()
    downlink: Downlink = Downlink()


class Evaluation(Section):
    """How the model is scored."""

    batch_size: int = Field(default=64, ge=1)
    """Rows at once."""
    every: int = Field(default=1, ge=1)
    """Rounds between scores on the coordinator's validation split; the last round is always scored."""
    validation_fraction: Number = Field(default=0.1, ge=0, lt=0.5)
    """Share of the training split that a simulation keeps for validation."""
    test_fraction: Number = Field(default=0, ge=0, lt=0.5)
    """Share of the rows that a simulation keeps for the test, where the data has no test rows of its own; the same rows for every seed."""
    federated_every: int = Field(default=0, ge=0)
    """Every so many rounds the clients score the model on their hold-outs; 0: never. Under privacy the counts are noised and charged."""


class DataSource(Section):
    """Data for a simulation that lies in files."""

    path: str
    """Training rows: JSONL, CSV, Parquet or text."""
    test: str | None = None
    """Test rows."""
    fields: dict[str, str] = Field(default_factory=dict)
    """From field names (`text`, `label`, …) to the file's columns."""


class Simulation(Section):
    """How one machine plays the federation. Not used in a deployment."""

    clients: int = Field(default=4, ge=1)
    """Simulated clients."""
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """LoRA ranks that the clients have in turn; α / r stays what it is. The largest is `model.adapter.rank`; empty: all have that."""
    partition: str = "iid"
    """`iid`, `dirichlet:ALPHA` or `by:FIELD`."""
    speeds: tuple[Annotated[Number, Field(gt=0)], ...] = ()
    """Steps that clients take in a second of virtual time, dealt to them in turn, such as `[1, 1, 1, 0.25]`: answers then come in that
    order, and `cohort.deadline_s` is of virtual seconds. Empty: nobody is late. Not with `--engine ray`."""
    data: str | DataSource | None = None
    """A named data set, `made-up:ROWS` for tests of scale, or files."""


class Plan(Section):
    """A federation."""

    format: Literal[1] = 1
    """The version of this format."""
    name: str = Field(default="federation", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """A short name."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all that is random but the noise of a deployment."""
    rounds: int = Field(ge=1)
    """Rounds of training."""
    task: Task
    model: Model
    cohort: Cohort = Cohort()
    local: Local
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    transfer: Transfer = Transfer()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation = Simulation()

    @property
    def private(self) -> bool:
        """Whether differential privacy is on."""
        return self.privacy.unit != "none"

    @property
    def central(self) -> bool:
        """Whether the unit is a client and the coordinator adds the noise: clients train without it."""
        return self.privacy.unit == "client"

    def at_precision(self, precision: Precision) -> Plan:
        """The plan as a machine works by it that keeps the base's weights so."""
        return self.model_copy(update={"model": self.model.model_copy(update={"base_precision": precision})})

    def __hash__(self) -> int:
        """Equal plans hash alike; the mappings inside have no hash of their own."""
        return hash(self.canonical_json())

    def canonical_json(self) -> str:
        """The plan with all defaults, keys sorted: equal plans give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def sha256(self) -> str:
        """The hexadecimal digest of the canonical JSON, which names this plan to policies and people."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The plan with all defaults, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan from a YAML (or JSON) file.

    Args:
        path: the file.
        overrides: ``key.path=value`` settings that replace keys of the file; the value is YAML.

    Raises:
        LichenError: PLAN_UNREADABLE, PLAN_INVALID, PLAN_VERSION, PLAN_UNSOUND.
    """
    try:
        document = _SingleKeys(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(Code.PLAN_UNREADABLE, f"can't read the plan: {error}", where=str(path)) from None
    except yaml.YAMLError as error:
        raise LichenError(Code.PLAN_UNREADABLE, f"not YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if not isinstance(document, dict):
        raise LichenError(Code.PLAN_INVALID, "a plan is a mapping of keys", where=str(path), fix="Start from `lichen plan new`.")
    for override in overrides:
        _override(document, override)
    return parse_plan(document, where=" ".join([str(path), *(f"--set {override}" for override in overrides)]))


def find_plan(name: str) -> Path:
    """A plan file, or a scenario by name.

    Raises:
        LichenError: PLAN_UNREADABLE, if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    scenarios = {path.stem: path for path in sorted((Path(str(files("lichen.simulations"))) / "scenarios").glob("*.yaml"))}
    if (found := scenarios.get(name.removesuffix(".yaml"))) is not None:
        return found
    known = ", ".join(scenarios)
    raise LichenError(Code.PLAN_UNREADABLE, "no such file, and no scenario of that name", where=name, fix=f"Scenarios: {known}.")


_ASKS_FOR_PRIVACY = {"epsilon", "delta", "clip", "adaptive_clip", "noise", "sample_rate", "unit_field"}


def parse_plan(document: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """Validate a plan that was read already. Raises as `load_plan` does."""
    version = document.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise LichenError(Code.PLAN_VERSION, f"format {version} is newer than this lichen's {FORMAT}", where=where, fix="Upgrade lichen.")
    try:
        # JSON text, because strict validation of Python objects would refuse a list where the model holds a tuple
        text = json.dumps(document, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a date as a key, an alias inside what it names
        raise LichenError(Code.PLAN_INVALID, f"not a plan: {error}", where=where) from None
    try:
        plan = Plan.model_validate_json(text)
    except ValidationError as error:
        raise _explain(error, where) from None
    privacy = document.get("privacy")
    if isinstance(privacy, dict) and "unit" not in privacy and (asked := sorted(_ASKS_FOR_PRIVACY & privacy.keys())):
        raise LichenError(
            Code.PLAN_UNSOUND,
            f"privacy.{asked[0]} is given, but no privacy.unit, so nothing would be private",
            where=where,
            fix="Set privacy.unit to example, entity or client; or to none, if that is what is meant.",
        )
    check_sound(plan, where=where)
    return plan


def plan_from_json(text: str) -> Plan:
    """A plan that arrived in a message. Raises as `load_plan` does."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise LichenError(Code.PLAN_UNREADABLE, "the plan that arrived is not JSON") from None
    if not isinstance(document, dict):
        raise LichenError(Code.PLAN_INVALID, "the plan that arrived is not a mapping")
    return parse_plan(document, where="received plan")


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
    if plan.local.checkpointing and plan.private and not plan.central and plan.privacy.gradients == "hooks":
        refuse(
            "local.checkpointing runs layers twice, and privacy.gradients: hooks would count what they see twice",
            "Nearest valid: privacy.gradients: single-backward, or local.checkpointing: false.",
        )
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
    if rule == "nested" and plan.private and ranks and 4 * ranks.count(rank) < len(ranks):
        refuse(
            f"aggregation.rule: nested with privacy, and fewer than a quarter of simulation.ranks are {rank}: the last columns would be "
            "noise of few clients",
            "Give the largest rank to at least a quarter.",
        )
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
        why = "needs each update, and only their noised sum" if needs.single_updates else "counts who trained each column, which is secret"
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


def schema() -> dict[str, Any]:
    """The plan's JSON schema."""
    return Plan.model_json_schema()


class _SingleKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _override(document: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise LichenError(
            Code.PLAN_INVALID, f"{setting!r} is not KEY.PATH=VALUE", where="--set", fix="For example --set privacy.epsilon=2."
        )
    *parents, last = path.split(".")
    node = document
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise LichenError(Code.PLAN_INVALID, f"{part!r} holds a value, not keys", where=f"--set {path}")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LichenError(Code.PLAN_INVALID, f"{text!r} is not a YAML value", where=f"--set {path}") from None


def _explain(error: ValidationError, where: str) -> LichenError:
    """The first mistakes of a plan, each with its path, what was wrong and the nearest valid value."""
    told: list[str] = []
    for detail in error.errors(include_url=False):
        if detail["loc"][-1:] == ("str",) and isinstance(detail["input"], dict):
            continue  # it was meant as the other kind, of which the other lines tell
        if detail["type"] == "default_factory_not_called":
            continue  # it was left out, and follows from what the other lines tell of
        path = ".".join(_path(detail))
        line = f"{path or 'plan'}: {_complaint(detail)}"
        if hint := _hint(detail):
            line += f" (nearest valid: {hint})"
        if line not in told:
            told.append(line)
    shown = told[:8]
    more = f"\n  … and {len(told) - len(shown)} more" if len(told) > len(shown) else ""
    return LichenError(
        Code.PLAN_INVALID,
        shown[0] if len(told) == 1 else f"{len(told)} mistakes\n  " + "\n  ".join(shown) + more,
        where=where,
        fix="`lichen plan schema` describes every key.",
    )


def _path(detail: ErrorDetails) -> list[str]:
    """The key's path, without pydantic's names for the kinds that a value may be of."""
    return [str(part) for part in detail["loc"] if part not in {"str", "DataSource"} and not str(part).startswith("function-before[")]


def _complaint(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return "unknown key"
    if detail["type"] == "missing":
        return "required, but missing"
    value = detail["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f", not {value!r}"
    return detail["msg"].removeprefix("Value error, ") + shown


def _hint(detail: ErrorDetails) -> str | None:
    context = detail.get("ctx", {})
    if detail["type"] == "extra_forbidden":
        *parents, last = _path(detail)
        return _closest(last, _fields_at(parents))
    if detail["type"] == "literal_error":
        options = [option.strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return _closest(str(detail["input"]), options) or (
            None if "none" in options else options[0]
        )  # nobody should be led to less privacy
    for bound in ("ge", "le"):
        if bound in context:
            return str(context[bound])
    for bound, side in (("gt", "just above"), ("lt", "just below")):
        if bound in context:
            return f"{side} {context[bound]}"
    return None


def _fields_at(path: Iterable[str]) -> list[str]:
    model: type[BaseModel] = Plan
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return []
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not kinds:
            return []
        model = kinds[0]
    return list(model.model_fields)


def _closest(word: str, options: Sequence[str]) -> str | None:
    found = difflib.get_close_matches(word, options, n=1, cutoff=0.4)
    return found[0] if found else None
