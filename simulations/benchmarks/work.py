"""What the plain loop and its peers train on: the model, the rows of each client and their batches, all as WORK.json says."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Work:
    """One process's model and data.

    Args:
        path: of WORK.json.
        threads: of torch.
        device: where the model is, and what `encode` gives.
    """

    def __init__(self, path: str, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        told = json.loads(Path(path).read_text())
        self.rounds: list[list[dict[str, Any]]] = told["rounds"]
        """The clients of each round: their ``rows``, and the ``steps`` of an epoch, each a list of places in the rows."""
        self.rate: float = told["rate"]
        self.length: int = told["length"]
        self.batch: int = told["batch"]
        self.private: dict[str, float] = told["private"]
        """The noise multiplier and the clip of private steps."""
        self._texts, self._classes = told["texts"], torch.tensor(told["classes"])
        self._tokenizer = AutoTokenizer.from_pretrained(told["base"])
        zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = AutoModelForSequenceClassification.from_pretrained(told["base"], num_labels=told["labels"], **zero)
        lora = LoraConfig(task_type="SEQ_CLS", r=told["rank"], lora_alpha=told["alpha"], layers_to_transform=told["layers"])
        self.device = torch.device(device)
        self.model = get_peft_model(base, lora).train().to(self.device)
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def encode(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and mask, padded to the fixed length, and classes."""
        texts = [self._texts[row] for row in rows]
        found = self._tokenizer(texts, truncation=True, max_length=self.length, padding="max_length", return_tensors="pt")
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device), self._classes[rows].to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        """A client's own, new in each round."""
        return torch.optim.AdamW(self.weights, lr=self.rate, weight_decay=0.0)


@cache
def work_of(path: str, threads: int) -> Work:
    """One a process, also where functions of a script reach it by value, as on Ray."""
    return Work(path, threads)
