"""Attach what is trained to a base model, and read and write it as named tensors: only these travel."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lichen.common.aggregation import HELD_A, HELD_B, KEPT, MERGED, A, B, beside, is_trained, part_of, properties
from lichen.common.continual import make_method
from lichen.common.errors import Code, LichenError
from lichen.common.model.base import HEADS
from lichen.common.model.held import can_hold, hold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lichen.common.plan import Plan

State = dict[str, torch.Tensor]
"""Trainable tensors by name, in the order of the model's parameters; after them, where the rule has it, what was merged into the base, or
what a client of a smaller rank holds; then what a continual method keeps."""

TARGETS = {"distilbert": ("q_lin", "v_lin")}
"""Query and value projections of architectures that PEFT has no table entry for."""


@dataclass(frozen=True)
class Merging:
    """A frozen weight of the base that rounds add to: W = W0 + what was merged."""

    weight: nn.Parameter
    start: torch.Tensor
    """W0, on the CPU."""
    transposed: bool
    """Whether the layer is a `Conv1D`, whose weight is (k, d)."""

    @property
    def merged(self) -> torch.Tensor:
        """What was added: (d, k)."""
        added = self.weight.detach().cpu() - self.start
        return added.t() if self.transposed else added

    def set(self, merged: torch.Tensor) -> None:
        """Set it to W0 plus ``merged``, (d, k)."""
        self.weight.copy_(self.start + (merged.t() if self.transposed else merged))


@dataclass(frozen=True)
class TunedModel:
    """A Transformer of which some parameters are trained."""

    network: nn.Module
    """What is called: a PEFT model for `lora`, else the transformers model."""
    trainable: dict[str, nn.Parameter]
    """The trained parameters. For `lora` the names are those of PEFT's own adapter files."""
    head: frozenset[str]
    """The names among them that belong to the head."""
    merging: dict[str, Merging] = field(default_factory=dict)
    """By name the frozen weights that rounds add to; most aggregation rules have none."""
    rank: int = 0
    """LoRA's r as the plan has it, the largest that a state can be loaded at; 0 without LoRA."""
    holding: dict[str, nn.Module] = field(default_factory=dict)
    """By the name of its A the base of each adapted layer, where a state of a smaller rank says what the other columns are."""
    scaling: float = 1.0
    """s = α / r."""
    kept: State = field(default_factory=dict)
    """By name what a continual method keeps for clients, on the CPU: it travels with the model, and no pass reads it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    @property
    def active(self) -> dict[str, nn.Parameter]:
        """The parameters that the phase of `train_only` trains; at first all."""
        return {name: parameter for name, parameter in self.trainable.items() if parameter.requires_grad}

    def train_only(self, phase: frozenset[str] = frozenset({A, B})) -> None:
        """Freeze the factors of LoRA that are not trained in a phase; see `aggregation.phase_of`."""
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(is_trained(name, phase))

    def tensors(self) -> State:
        """The trainable tensors, what was merged, and what is kept."""
        return {**self.trainable, **{name: merging.merged for name, merging in self.merging.items()}, **self.kept}

    def state(self) -> State:
        """A copy of these, on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set all of these to some of the CPU. LoRA's may have a smaller rank: then the model has it, too.

        Raises:
            LichenError: STATE_MISMATCH, if names, shapes or types differ, or a value is not finite; nothing is set then.
        """
        rank = self._rank_of(state)
        check_state(state, self._like(rank))
        for name, parameter in self.trainable.items():
            if parameter.shape != state[name].shape:
                # of another rank: the parameter itself stays, which layers and hooks know
                parameter.grad, parameter.data = None, parameter.data.new_empty(state[name].shape)
            parameter.copy_(state[name])
        self._add_fixed(state)

    def _add_fixed(self, state: Mapping[str, torch.Tensor]) -> None:
        """What of a state is not trained."""
        self.kept.update({name: state[name] for name in self.kept})
        for name, merging in self.merging.items():
            merging.set(state[name])
        for name, base in self.holding.items():
            a, b = (state.get(beside(name, part), state.get(f"{KEPT}.{beside(name, part)}")) for part in (HELD_A, HELD_B))
            hold(base, None if a is None or b is None else (a.to(self.device), (self.scaling * b).to(self.device)))

    def _rank_of(self, state: Mapping[str, torch.Tensor]) -> int:
        """The rank of a state's first factor, within the model's."""
        for name, tensor in state.items():
            if self.rank and name in self.trainable and tensor.dim() == 2 and (part := part_of(name)) is not None:
                return max(1, min(self.rank, tensor.shape[0 if part == A else 1]))
        return self.rank

    def _like(self, rank: int) -> State:
        """Tensors without values, of the names, shapes and types that a state of such a rank has."""
        like: State = {}
        for name, parameter in self.trainable.items():
            part, shape = part_of(name), list(parameter.shape)
            if self.rank and part is not None:
                shape[0 if part == A else 1] = rank
            like[name] = torch.empty(shape, dtype=parameter.dtype, device="meta")
        for name, merging in self.merging.items():
            shape = list(merging.start.shape)
            like[name] = torch.empty(shape[::-1] if merging.transposed else shape, dtype=merging.start.dtype, device="meta")
        for name in self.holding if rank < self.rank else ():
            for part, held, axis in ((A, HELD_A, 0), (B, HELD_B, 1)):
                shape = list(like[beside(name, part)].shape)
                shape[axis] = self.rank - rank
                like[beside(name, held)] = like[name].new_empty(shape)
        return like | self.kept

    @torch.no_grad()
    def show(self, state: Mapping[str, torch.Tensor]) -> None:
        """As `load`, but for computing without training: on a CPU the network has these tensors themselves, and nothing is copied.

        Raises:
            LichenError: as `load`.
        """
        if self.device.type != "cpu":
            self.load(state)
            return
        check_state(state, self._like(self._rank_of(state)))
        for name, parameter in self.trainable.items():
            parameter.data = state[name]
        self._add_fixed(state)


def check_state(state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that do not fit, or hold values that are not finite.

    Raises:
        LichenError: STATE_MISMATCH.
    """
    check_fits(state, like)
    check_finite(state)


def check_fits(state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose names, shapes or types differ; no value is read.

    Raises:
        LichenError: STATE_MISMATCH.
    """
    if state.keys() != like.keys():
        strangers = sorted(state.keys() ^ like.keys())
        raise LichenError(Code.STATE_MISMATCH, f"{len(strangers)} names differ, the first is {strangers[0]!r}", fix="Compare the plans.")
    for name, tensor in state.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise LichenError(
                Code.STATE_MISMATCH,
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {like[name].dtype} {tuple(like[name].shape)}",
                fix="Compare the plans and the base models.",
            )


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors with a value that is not finite.

    Raises:
        LichenError: STATE_MISMATCH.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise LichenError(Code.STATE_MISMATCH, f"{name!r} holds values that are not finite")


def attach(base: PreTrainedModel, plan: Plan, task_type: str) -> TunedModel:
    """Freeze the base, and add what the plan trains.

    Args:
        base: as loaded.
        plan: its `model.adapter` says what is trained; its seed fixes LoRA's start.
        task_type: PEFT's name of the task, such as ``TOKEN_CLS``.

    Raises:
        LichenError: MODEL_UNSUPPORTED, if the adapter's targets are not found, or no head.
    """
    adapter = plan.model.adapter
    head_names = [name for name, _ in base.named_children() if name in HEADS]
    if not head_names and plan.task.labels:
        raise LichenError(Code.MODEL_UNSUPPORTED, f"{type(base).__name__} has no head called {' or '.join(HEADS)}", where="model.base")
    network: nn.Module
    if adapter.kind == "lora":
        network = _attach_lora(base, plan, task_type)
    else:
        network = base
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(adapter.kind == "full" or name.split(".")[0] in head_names)
    trainable = {_public_name(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    head = frozenset(name for name in trainable if any(part in HEADS for part in name.split(".")))
    kept = make_method(plan).kept_like(trainable)
    if adapter.kind != "lora":
        return TunedModel(network, trainable, head, kept=kept)
    needs = properties(plan)
    merging = _merging(network) if needs.changes_base else {}
    holds = needs.holds_rest or make_method(plan).holds
    holding = {_public_name(name): base for name, base in _adapted(network)} if holds else {}
    for layer in holding.values():
        can_hold(layer)
    return TunedModel(network, trainable, head, merging, adapter.rank, holding, adapter.alpha / adapter.rank, kept)


def _attach_lora(base: PreTrainedModel, plan: Plan, task_type: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapter = plan.model.adapter
    targets: Any = list(adapter.targets or TARGETS.get(base.config.model_type, ())) or None
    if adapter.targets == ("all-linear",):
        targets = "all-linear"
    layers = None
    if adapter.last_layers is not None:
        count = int(base.config.get_text_config().num_hidden_layers)
        layers = list(range(max(0, count - adapter.last_layers), count))
    config = LoraConfig(
        layers_to_transform=layers,
        task_type=task_type,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=list(HEADS),  # the head is trained whole
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # PEFT warns of Conv1D's fan_in_fan_out, which it then sets itself
        torch.manual_seed(plan.seed)
        try:
            network: nn.Module = get_peft_model(base, config)
        except ValueError as error:
            raise LichenError(
                Code.MODEL_UNSUPPORTED,
                str(error).strip().splitlines()[0],
                where="model.adapter.targets",
                fix="Name linear modules of this architecture, or use [all-linear].",
            ) from None
    if not any(A in phase for phase in properties(plan).phases):
        _fix_a(network, plan)
    return network


@torch.no_grad()
def _fix_a(network: nn.Module, plan: Plan) -> None:
    """Set every A to orthonormal rows that follow from the plan's seed, so that it need not travel, and freeze it (Sun et al. 2024)."""
    for name, parameter in network.named_parameters():
        if part_of(name) != A:
            continue
        rank, width = parameter.shape
        if rank > width:
            raise LichenError(
                Code.MODEL_UNSUPPORTED,
                f"{_public_name(name)} has {rank} rows of {width}, which can't be orthonormal",
                where="model.adapter.rank",
                fix=f"Set it to at most {width}, or choose another aggregation.rule.",
            )
        digest = hashlib.sha256(f"{plan.seed}|{_public_name(name)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        parameter.copy_(torch.linalg.qr(drawn).Q.t())
        parameter.requires_grad_(False)


def _merging(network: nn.Module) -> dict[str, Merging]:
    """The frozen weights under LoRA's layers, by the names of what is merged into them."""
    from transformers.pytorch_utils import Conv1D

    return {
        beside(_public_name(name), MERGED): Merging(base.weight, base.weight.detach().to("cpu", copy=True), isinstance(base, Conv1D))
        for name, base in _adapted(network)
    }


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    """The frozen layers under LoRA, each with the name of its A."""
    return [
        (name, network.get_submodule(name.split(f".{A}.")[0]).get_base_layer())  # type: ignore[operator]
        for name, _ in network.named_parameters()
        if part_of(name) == A
    ]


def _public_name(name: str) -> str:
    # PEFT's files leave out the adapter's name and the wrapper around a saved module
    return name.replace(".modules_to_save.default", "").replace(".default", "")
