"""`lichen bench privacy`: what a private step costs beside the same step without privacy, in time and memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from lichen.common.errors import Code, LichenError
from lichen.simulations.benchmarks.memory import forget_peak, resident

WAYS = ("plain", "single-backward", "ahead", "hooks")
"""Without privacy; private, with noise made in the step; the same with noise drawn ahead; and by Opacus' hooks."""
ROWS = {64: 8, 256: 4}
"""Rows of a batch, by length."""
_PRELOADED = [
    __name__,
    "peft",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "lichen.common.privacy.per_unit",
    "lichen.common.privacy.single_backward",
]
LAYERS, HIDDEN, HEADS, INNER, VOCABULARY, RANK = 3, 384, 6, 1536, 30522, 8
TARGETS = {"lora": (1.05, 1.05, 1.08), "full": (1.45, 1.25, 1.4)}
"""At most so many times the plain step's CPU time, wall time and peak memory."""


@dataclass(frozen=True)
class Config:
    """What is measured."""

    family: str
    """``bert`` or ``llama``: 3 layers of width 384, random weights, a vocabulary of 30,522."""
    adapter: str
    """``lora`` (rank 8 on all linear layers) or ``full``."""
    length: int
    """Tokens of each row; `ROWS` says how many rows a batch has."""


def bench_privacy(repeats: int, lengths: Sequence[int], adapters: Sequence[str], hooks: bool = True) -> Iterator[dict[str, Any]]:
    """Time the steps of one batch in turn, in one process: without privacy by autograd and PEFT's own forward pass, and privately.

    A private step has secret noise. All end with AdamW: the plain one as PyTorch gives it, private ones fused, as clients have it. A ratio
    is the median over repeats of paired ratios.

    Args:
        repeats: steps of each kind.
        lengths: keys of `ROWS`.
        adapters: ``lora``, ``full``.
        hooks: whether Opacus' hooks run too, for comparison.

    Yields:
        The configuration, ``plain_ms`` (CPU), and ratios to it: ``cpu`` with noise made in the step, ``wall`` with noise drawn ahead
        (where a core is free), ``memory`` (the same, at its peak), ``hooks_cpu``, each beside its target.
    """
    for family, adapter, length in product(("bert", "llama"), adapters, lengths):
        config = Config(family, adapter, length)
        # Opacus has no rule for Llama's norms
        ways = WAYS if hooks and (family, adapter) != ("llama", "full") else WAYS[:-1]
        memory = {way: _peak_memory(config, way) for way in ("plain", "ahead")}
        times = _times(config, ways, repeats)
        cpu, wall, most = TARGETS[adapter]
        yield {
            "family": family,
            "adapter": adapter,
            "length": length,
            "rows": ROWS[length],
            "plain_ms": 1000 * median(cpu_s for cpu_s, _ in times["plain"]),
            "cpu": _ratio(times, "single-backward", 0),
            "wall": _ratio(times, "ahead", 1),
            "memory": memory["ahead"] / memory["plain"],
            "plain_mb": memory["plain"] / 1e6,
            "hooks_cpu": _ratio(times, "hooks", 0) if "hooks" in times else None,
            "targets": {"cpu": cpu, "wall": wall, "memory": most},
        }


def _ratio(times: dict[str, list[tuple[float, float]]], way: str, kind: int) -> float:
    return median(ours[kind] / plain[kind] for ours, plain in zip(times[way], times["plain"], strict=True))


def _times(config: Config, ways: Sequence[str], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each way's steps, which take turns; the first step of each is not counted."""
    steps = {way: make_step(config, way) for way in ways}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if repeat:
                times[way].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def make_step(config: Config, way: str) -> Callable[[], None]:
    """One optimizer step of a model of its own on a fixed batch."""
    import torch

    from lichen.common.model.adapter import TunedModel
    from lichen.common.privacy.per_unit import NoisyOptimizer, PerUnitGradients
    from lichen.common.privacy.randomness import SecretSource

    network = _network(config)
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    # the plain step is PyTorch's own, as people write it; the private one is a client's
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-4, fused=None if way == "plain" else True)
    generator = torch.Generator().manual_seed(1)
    rows = ROWS[config.length]
    ids = torch.randint(5, VOCABULARY, (rows, config.length), generator=generator)
    labels = torch.randint(8, (rows,), generator=generator)

    def losses(network: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = network(input_ids=batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    def plain() -> None:
        torch.autograd.backward(losses(network, {"input_ids": ids, "labels": labels}).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if way == "plain":
        return plain
    engine: Any = "hooks" if way == "hooks" else "single-backward"
    gradients = PerUnitGradients(TunedModel(network, trainable, frozenset()), losses, rows, engine)
    source = SecretSource()
    noisy = NoisyOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=rows, source=source)
    if way != "ahead":
        source.close()
    units = [[row] for row in range(rows)]
    return lambda: gradients.step(noisy, units, lambda indices: {"input_ids": ids[indices], "labels": labels[indices]})


def _network(config: Config) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    size |= {"intermediate_size": INNER, "num_labels": 8}
    torch.manual_seed(0)
    network: Any
    if config.family == "bert":
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        network = transformers.BertForSequenceClassification(transformers.BertConfig(**size, **quiet))
    else:
        network = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**size, pad_token_id=0))
    if config.adapter == "lora":
        network = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=RANK, target_modules="all-linear"))
    return network.train()


def _peak_memory(config: Config, way: str) -> int:
    """Bytes of resident memory that a model and three steps add at their peak, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(config, way, sender))
    child.start()
    sender.close()
    try:
        found: int = receiver.recv()
    except EOFError:
        raise LichenError(Code.CHECK_FAILED, "the process that measures memory ended early", where="lichen bench privacy") from None
    finally:
        child.join()
    return found


def _measure(config: Config, way: str, sender: Any) -> None:
    make_step(Config(config.family, config.adapter, 64), way)  # what a first model leaves behind, such as imports, counts for none
    start = resident("VmRSS")
    forget_peak()
    step = make_step(config, way)
    for _ in range(3):
        step()
    sender.send(resident("VmHWM") - start)
