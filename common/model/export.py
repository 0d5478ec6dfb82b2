"""Write a tuned model so that plain transformers and peft load it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.common.aggregation import HELD_A, HELD_B, KEPT, MERGED, A, B, beside, part_of
from lichen.common.disk import sync
from lichen.common.errors import Code, LichenError
from lichen.common.model.base import WRAPPER, resolve_base, rows_by_class
from lichen.common.privacy.statement import as_markdown

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lichen.common.model.adapter import State, TunedModel
    from lichen.common.plan import Plan
    from lichen.common.privacy.statement import Statement

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_LANGUAGE = ("AutoPeftModelForCausalLM", "AutoModelForCausalLM")
_LOAD = {
    ("lora", "mean"): "AutoPeftModelForTokenClassification",
    ("lora", "pooler"): "AutoPeftModelForSequenceClassification",
    ("full", "mean"): "AutoModelForTokenClassification",
    ("full", "pooler"): "AutoModelForSequenceClassification",
}


ROUTER = "router.safetensors"


def save_models(
    directory: Path,
    plan: Plan,
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    statement: Statement,
    state: State,
    learned: int,
    show: Callable[[State], None],
) -> None:
    """Save what a run has made: one model, or one for each task of a stream in a folder of its name, with what tells a text's task.

    Args:
        directory: made if it is not there.
        plan: what was trained.
        model: of the plan.
        tokenizer: the base model's.
        statement: of the run's privacy, for the cards.
        state: with all that the continual method keeps.
        learned: the number (from 0) of the last task of a stream that it has learned.
        show: gives the model a state.
    """
    from lichen.common.continual import make_method
    from lichen.common.tensor_files import write_tensors

    method = make_method(plan)
    for name, own in method.models(state, learned).items():
        show(own.state)
        save_model(directory / name, plan, model, tokenizer, statement, own.labels)
    if router := method.router(state):
        write_tensors(directory / ROUTER, router, {})
        (directory / "README.md").write_text(_router_card(plan, statement), encoding="utf-8")
    for path in (*directory.rglob("*"), directory):  # what is there is taken for whole, after a power cut too
        sync(path)


def save_model(
    directory: Path,
    plan: Plan,
    model: TunedModel,
    tokenizer: PreTrainedTokenizerBase,
    statement: Statement,
    labels: tuple[str, ...] | None = None,
) -> None:
    """Save the adapter (`lora`) or the whole model, the configuration, the tokenizer, and a card that says how to load them.

    Where rounds have added to the base, or the layers hold earlier adapters, the whole model is saved, with all that in it.

    Args:
        directory: made if it is not there.
        plan: what was trained.
        model: the model, with its final tensors loaded.
        tokenizer: the base model's.
        statement: of the run's privacy, for the card.
        labels: those that it has learned to tell apart, in the plan's order: the head has no row for others; None: all.

    Raises:
        LichenError: INTERNAL, if it is a whole model whose base was quantised: nobody else would load it.
    """
    from lichen.common.model.quantized import is_quantized

    network: Any = model.network
    if plan.model.adapter.kind != "lora" and is_quantized(network):
        raise LichenError(Code.INTERNAL, "a model over a quantised base was to be saved whole")
    whole = bool(model.merging) or any(base.held is not None for base in model.holding.values())
    inner = network.base_model.model if plan.model.adapter.kind == "lora" else network
    known = labels or plan.task.labels
    with warnings.catch_warnings(), _with_classes(model, [plan.task.labels.index(label) for label in known], len(plan.task.labels)):
        warnings.simplefilter("ignore")
        if whole:
            inner.save_pretrained(directory, state_dict=_whole(inner, model))
        else:
            network.save_pretrained(directory)
    config = copy.deepcopy(inner.config)
    if known:
        config.id2label, config.label2id = dict(enumerate(known)), {label: number for number, label in enumerate(known)}
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card(plan, statement, known, merged=whole), encoding="utf-8")


@contextmanager
def _with_classes(model: TunedModel, classes: Sequence[int], count: int) -> Iterator[None]:
    """The head has rows for some of the classes within, of so many."""
    whole = {name: model.trainable[name].data for name in rows_by_class(model.trainable, count)}
    try:
        for name, tensor in whole.items():
            model.trainable[name].data = tensor[list(classes)]
        yield
    finally:
        for name, tensor in whole.items():
            model.trainable[name].data = tensor


def _whole(inner: nn.Module, model: TunedModel) -> dict[str, torch.Tensor]:
    """The tensors of the model without adapters, which are added to the weights that they lie on, in 32 bits."""
    from transformers.pytorch_utils import Conv1D

    found = {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in inner.state_dict().items()
        if part_of(name) is None and ".original_module." not in name  # the head as it was before it was trained
    }
    for path in {name.removeprefix(WRAPPER).split(f".{part_of(name)}.")[0] for name in (*model.merging, *model.holding)}:
        layer: Any = inner.get_submodule(path)
        base = layer.get_base_layer()
        weight = base.weight.detach() + layer.get_delta_weight(layer.active_adapters[0]).detach()
        if (held := getattr(base, "held", None)) is not None:
            added = held[1] @ held[0]
            weight = weight + (added.t() if isinstance(base, Conv1D) else added)
        found[f"{path}.weight"] = weight
    return found


def load_saved(directory: Path, model: TunedModel) -> tuple[str, ...]:
    """Set a model's trainable tensors to those that `save_model` wrote; what a continual method keeps stays.

    Of labels that it has not learned the head's rows stay, too.

    Returns:
        The labels that it has learned to tell apart; none for a task without labels.

    Raises:
        LichenError: STATE_MISMATCH, if there is no safetensors file, or it is of another plan.
    """
    from safetensors.torch import load_file

    path = next((directory / name for name in _WEIGHTS if (directory / name).exists()), None)
    if path is None:
        fix = "Of continual.method: adapters each task has a folder of its own there; the README beside them says how to use them."
        raise LichenError(Code.STATE_MISMATCH, "the model holds no safetensors file", where=str(directory), fix=fix)
    tensors = load_file(path)
    labels = _with_all_classes(directory, tensors, model)
    if model.merging:
        model.load(_state_of(tensors, model))
    elif model.holding and path.name == "model.safetensors":
        model.load(_state_with_held(tensors, model))
    else:
        model.load({name: tensor for name, tensor in tensors.items() if name in model.trainable} | model.kept)
    return labels


def _with_all_classes(directory: Path, tensors: State, model: TunedModel) -> tuple[str, ...]:
    """Give the head that was saved the model's rows for what it lacks; the labels that it has."""
    import torch

    network: Any = model.network
    places = network.config.label2id
    try:
        known = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("id2label", {})
        labels = tuple(known[number] for number in sorted(known, key=int))
        if not labels or len(labels) == len(places):
            return labels
        rows = torch.tensor([places[label] for label in labels])
        for name in rows_by_class(model.trainable, len(places)):
            saved = name if name in tensors else name.removeprefix(WRAPPER)
            tensors[saved] = model.trainable[name].detach().cpu().clone().index_copy_(0, rows, tensors[saved])
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise LichenError(Code.STATE_MISMATCH, f"the model's labels are not the plan's: {error}", where=str(directory)) from None
    return labels


def _state_of(tensors: Mapping[str, torch.Tensor], model: TunedModel) -> State:
    """The state of a whole model: all that differs from the base is merged, and the adapter does nothing.

    Raises:
        LichenError: STATE_MISMATCH, if a tensor is missing.
    """
    state = model.state()
    try:
        for name in state:
            if part_of(name) == B:
                state[name].zero_()
            elif part_of(name) not in {A, KEPT}:
                merging = model.merging.get(name)
                saved = tensors[name.removeprefix(WRAPPER).replace(f".{MERGED}.", ".")]
                if merging is not None:
                    saved = saved - merging.start
                    saved = saved.t().contiguous() if merging.transposed else saved
                state[name] = saved
    except KeyError as missing:
        raise LichenError(Code.STATE_MISMATCH, f"the model's file has no {missing}") from None
    return state


def _state_with_held(tensors: Mapping[str, torch.Tensor], model: TunedModel) -> State:
    """The state of a whole model whose layers hold earlier adapters: what differs from the base, by singular values among them all.

    Raises:
        LichenError: STATE_MISMATCH, if a tensor is missing.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    state = model.state()
    try:
        for name in state.keys() - model.kept.keys():
            if part_of(name) is None:
                state[name] = tensors[name.removeprefix(WRAPPER)]
            elif part_of(name) == A:
                layer: Any = model.holding[name]
                added = tensors[f"{name.removeprefix(WRAPPER).split(f'.{A}.')[0]}.weight"] - layer.weight.detach().cpu()
                u, s, v = torch.linalg.svd(added.t() if isinstance(layer, Conv1D) else added, full_matrices=False)
                held_a, held_b = (f"{KEPT}.{beside(name, part)}" for part in (HELD_A, HELD_B))
                rank = len(state[held_a])
                state[held_a], state[name] = v[:rank], v[rank : rank + model.rank]
                state[held_b], state[beside(name, B)] = (u * s / model.scaling)[:, : rank + model.rank].split([rank, model.rank], dim=1)
    except KeyError as missing:
        raise LichenError(Code.STATE_MISMATCH, f"the model's file has no {missing}") from None
    return state


def card(plan: Plan, statement: Statement, labels: tuple[str, ...], *, merged: bool = False) -> str:
    """A README that says how to load a model, as it was trained or ``merged`` into its base, and what of its rows is protected.

    ``labels`` are those that it knows.
    """
    lora = plan.model.adapter.kind == "lora" and not merged
    if plan.task.kind == "causal-lm":
        return _language_card(plan, statement, lora=lora)
    loader = _LOAD["lora" if lora else "full", plan.model.head.pooling]
    pooled = "(logits * mask).sum(1) / mask.sum(1)" if plan.model.head.pooling == "mean" else "logits"
    note = (
        "The class scores of a text are the mean of its tokens' logits, which is a linear head on mean-pooled features."
        if plan.model.head.pooling == "mean"
        else "The class scores are the model's logits."
    )
    later = f" It knows no other of the plan's {len(plan.task.labels)}." if len(labels) < len(plan.task.labels) else ""
    # some bases have none, and then know the last token of one text only
    padding = "model.config.pad_token_id = tokenizer.pad_token_id\n" if lora and plan.model.head.pooling == "pooler" else ""
    base = f", num_labels={len(labels)}, ignore_mismatched_sizes=True" if lora else ""  # the base may have a head of its own
    return f"""---
library_name: {"peft" if lora else "transformers"}
---

# {plan.name}

Fine-tuned by lichen from `{plan.model.base}`: {plan.task.kind}, labels {", ".join(labels)}.{later} {note}

```python
import torch
from {"peft" if lora else "transformers"} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("model"{base}).eval()
tokenizer = AutoTokenizer.from_pretrained("model")
{padding}labels = {list(labels)!r}
batch = tokenizer(["a text"], truncation=True, max_length={plan.task.max_length}, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
mask = batch["attention_mask"].unsqueeze(-1)
scores = {pooled}
print([labels[index] for index in scores.argmax(-1)])
```

{as_markdown(statement)}"""


def _language_card(plan: Plan, statement: Statement, *, lora: bool) -> str:
    loader = _LANGUAGE[0 if lora else 1]
    return f"""---
library_name: {"peft" if lora else "transformers"}
---

# {plan.name}

Fine-tuned by lichen from `{plan.model.base}`: {plan.task.kind}, on texts of up to {plan.task.max_length} tokens.

```python
import torch
from {"peft" if lora else "transformers"} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("model").eval()
tokenizer = AutoTokenizer.from_pretrained("model")
batch = tokenizer("A text that", return_tensors="pt")
with torch.no_grad():
    tokens = model.generate(**batch, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

{as_markdown(statement)}"""


def _router_card(plan: Plan, statement: Statement) -> str:
    """A README that says how to find a text's task, and with it the model."""
    return f"""# {plan.name}

Fine-tuned by lichen from `{plan.model.base}`, task after task: each folder is the model of one, and its README says how to load
it. A model chooses among its own task's labels. Where a text's task is not known, the class with the best score tells it, in the feature
space of the base:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

where = {resolve_base(plan.model.base)!r}  # {plan.model.base}: elsewhere it may have another place
base = AutoModel.from_pretrained(where).eval()
tokenizer = AutoTokenizer.from_pretrained(where)
router = load_file("model/{ROUTER}")
batch = tokenizer(["a text"], truncation=True, max_length={plan.task.max_length}, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = base(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1)
features = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
scores = {{task: float((features @ classes.T).max()) for task, classes in router.items()}}
print(max(scores, key=scores.get))
```

Of the tasks and their labels: {_tasks(plan)}.

{as_markdown(statement)}"""


def _tasks(plan: Plan) -> str:
    return "; ".join(f"{task.name}: {', '.join(task.labels or plan.task.labels)}" for task in plan.continual.stream)
