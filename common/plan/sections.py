"""The plan's sections: every key with its default, its bounds and what it means, as the JSON schema and `lichen plan` show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


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

    kind: Literal["text-classification", "causal-lm"] = "text-classification"
    """`text-classification`: a text's label. `causal-lm`: each token of a text from those before it; it has no labels, and no head."""
    labels: tuple[str, ...] = ()
    """The class names, in the order of the model's outputs: two or more for a classification. They are public."""
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
        if self.labels and self.text_field == self.label_field:
            raise ValueError("text_field and label_field are the same: a row is known by its text, and would say nothing")
        if self.kind == "text-classification" and len(self.labels) < 2:
            raise ValueError("labels: a classification needs two or more")
        if self.kind == "causal-lm" and self.labels:
            raise ValueError("labels: a language model has none")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if strangers := set(self.label_descriptions) - set(self.labels):
            raise ValueError(f"label_descriptions names labels that task.labels does not: {sorted(strangers)}")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The data fields that it reads."""
        return (self.text_field, self.label_field) if self.labels else (self.text_field,)

    def fault(self, row: Mapping[str, object]) -> str | None:
        """Why it can't use a row, by that row alone, and without quoting it; None if it can."""
        return (
            None if not self.labels or str(row[self.label_field]) in self.labels else f"{self.label_field!r} is none of the plan's labels"
        )


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
    init: Literal["label-descriptions", "zeros", "random", "base"] = "zeros"
    """The head's start. `label-descriptions`: the base model's own embedding of each label's description (mean pooling only). `base`: the
    base's own head, by its labels' names, such as an earlier run's exported model has; labels that are new to it start at zero."""
    scale: Number = Field(default=1.0, gt=0)
    """With `init: label-descriptions`, the factor on the unit embeddings (less their mean) that the head starts from."""


class Model(Section):
    """The Transformer that is tuned."""

    base: str = Field(min_length=1)
    """A hub name, a local path, or `package:DISTRIBUTION/PATH` for weights that an installed package carries. `random:llama` is a small one
    with random weights over bytes, for a first `causal-lm`."""
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the model's passes, in training and scoring. `bfloat16` is mixed precision: weights, updates and sums stay in 32 bits. A machine
    whose processor has no instructions for it computes in 32 bits all the same."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The local optimizer; its state starts afresh each round, so clients are stateless."""
    learning_rate: Number = Field(default=1e-3, gt=0)
    """Of the adapter, or of all weights."""
    head_learning_rate: Number | None = Field(default=None, gt=0)
    """Of the head; by default the same."""
    learning_rate_decay: Literal["none", "linear", "cosine"] = "none"
    """Falls from the full rate in the first round towards zero after the last, or in each task of a stream."""
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
    # a norm whose square is too small for 32 bits would pass for zero, and be clipped by no clip of its size
    clip: Number = Field(default=1.0, ge=1e-6, le=1e6)
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
    """`fedavg`: the weighted mean (McMahan et al. 2017); by true size without privacy, by declared size with it, `unit: client` flat.
    The others are for LoRA. `ffa`: A is fixed, B alone is trained (Sun et al. 2024). `rolora`: one factor a round, B first (Chen et
    al. 2024). `nested`: the same for clients of several ranks, of which each trains its first columns and holds the others.
    `flora`: what all have learned is kept exactly, in the adapter what it can hold, in the base the rest (after Wang et al. 2024).
    `fedex`: `fedavg`, and what it leaves out is merged into the base (Singhal et al. 2024). `zero-padding`: `fedavg` for several
    ranks; only to compare with."""
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
