"""A fresh process that loads a base once, and says what it takes. Run by `lichen bench base`.

python -m lichen.simulations.benchmarks.base_process BASE PRECISION TEXTS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForTokenClassification

from lichen.client.worker import trim
from lichen.common.model.base import load_base
from lichen.common.plan import Model
from lichen.simulations.benchmarks.memory import forget_peak, own_and_mapped, resident
from lichen.simulations.datasets import load_named

ROWS, LENGTH = 16, 64


def measure(model: Model, texts: int) -> dict[str, float]:
    """Load a base, run texts of R8 through it, read all that it holds, and let go of it.

    Returns:
        ``load_s``, seconds; of resident memory in bytes ``peak``, by how much it grew at most while the base was loaded, ``grown``, by
        how much when all was read, and what was free again without the base: ``used``, of that by the texts alone, and of all of it
        what is the process's ``own``, and what is ``mapped`` from the base's file.
    """
    said = [row["text"] for row in load_named("r8").train[:texts]]
    network, tokenizer = load_base(model, AutoModelForTokenClassification, num_labels=2)
    _run(network, tokenizer, said)
    del network  # what a first model leaves behind, such as imports and a larger heap, counts for none
    trim()
    before = own_and_mapped()
    forget_peak()
    start = resident("VmRSS")
    began = time.perf_counter()
    network = load_base(model, AutoModelForTokenClassification, num_labels=2)[0]
    loading = time.perf_counter() - began
    peak = resident("VmHWM") - start
    _run(network, tokenizer, said)
    trim()
    used = own_and_mapped()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.max()
    del tensor
    trim()
    read = own_and_mapped()
    del network
    trim()
    left = own_and_mapped()
    return {
        "load_s": loading,
        "peak": peak,
        "grown": sum(read) - sum(before),
        "used": sum(used) - sum(left),
        "own": read[0] - left[0],
        "mapped": read[1] - left[1],
    }


@torch.no_grad()
def _run(network: Any, tokenizer: Any, texts: list[str]) -> None:
    for first in range(0, len(texts), ROWS):
        network(**tokenizer(texts[first : first + ROWS], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"))


if __name__ == "__main__":
    named: Any = {"base": sys.argv[1], "base_precision": sys.argv[2]}
    print(json.dumps(measure(Model(**named), int(sys.argv[3]))))
