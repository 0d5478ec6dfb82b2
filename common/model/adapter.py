"""Attach what is trained to a base model, and read and write it as named tensors: only these travel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lichen.common.errors import Code, LichenError
from lichen.common.model.base import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lichen.common.plan import Plan

State = dict[str, torch.Tensor]
"""Trainable tensors by name, in the order of the model's parameters."""

TARGETS = {"distilbert": ("q_lin", "v_lin")}
"""Query and value projections of architectures that PEFT has no table entry for."""


@dataclass(frozen=True)
class TunedModel:
    """A Transformer of which some parameters are trained."""

    network: nn.Module
    """What is called: a PEFT model for `lora`, else the transformers model."""
    trainable: dict[str, nn.Parameter]
    """The trained parameters. For `lora` the names are those of PEFT's own adapter files."""
    head: frozenset[str]
    """The names among them that belong to the head."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    def state(self) -> State:
        """A copy of the trainable tensors, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trainable.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set the trainable tensors, to some of the CPU.

        Raises:
            LichenError: STATE_MISMATCH, if names, shapes or types differ, or a value is not finite; nothing is set then.
        """
        check_state(state, self.trainable)
        for name, parameter in self.trainable.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def show(self, state: Mapping[str, torch.Tensor]) -> None:
        """As `load`, but for computing without training: on a CPU the network has these tensors themselves, and nothing is copied.

        Raises:
            LichenError: as `load`.
        """
        if self.device.type != "cpu":
            self.load(state)
            return
        check_state(state, self.trainable)
        for name, parameter in self.trainable.items():
            parameter.data = state[name]


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
    if not head_names:
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
    return TunedModel(network, trainable, head)


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
    return network


def _public_name(name: str) -> str:
    # PEFT's files leave out the adapter's name and the wrapper around a saved module
    return name.replace(".modules_to_save.default", "").replace(".default", "")
