"""`lichen bench reload`: a run's `model/`, loaded by plain transformers and peft, scores what the run reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lichen.common.errors import Code, LichenError
from lichen.common.result import read_result

BATCH = 64


def bench_reload(directory: Path) -> dict[str, Any]:
    """Load and score the final model without any of lichen's model code.

    Args:
        directory: of a finished simulation or demo, whose test split lies in it.

    Returns:
        Test ``accuracy`` and ``macro_f1`` by scikit-learn, and the ``reported_accuracy``.

    Raises:
        LichenError: OUTPUT_UNUSABLE, if the run has no model or no test split; CHECK_FAILED, if the accuracies differ.
    """
    import pyarrow.parquet as pq
    import torch
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoConfig, AutoTokenizer

    result = read_result(directory)
    plan = yaml.safe_load((directory / "plan.yaml").read_text(encoding="utf-8"))
    split = next((path for folder in ("simulation", "nodes") if (path := directory / folder / "test.parquet").exists()), None)
    if split is None or not result.final or result.final["split"] != "test" or not (directory / "model" / "config.json").exists():
        raise LichenError(Code.OUTPUT_UNUSABLE, "no finished run of one model with a test split", where=str(directory))
    task, known = plan["task"], AutoConfig.from_pretrained(directory / "model").id2label
    labels = [known[number] for number in sorted(known)]
    model = _load(directory / "model", len(labels), plan["model"])
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    table = pq.read_table(split)
    texts, truth = (table.column(task[field]).to_pylist() for field in ("text_field", "label_field"))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    guesses: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        batch = tokenizer([texts[i] for i in part], truncation=True, max_length=task["max_length"], padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(**batch).logits
        if plan["model"]["head"]["pooling"] == "mean":
            mask = batch["attention_mask"].unsqueeze(-1)
            scores = (scores * mask).sum(1) / mask.sum(1)
        guesses |= {index: labels[guess] for index, guess in zip(part, scores.argmax(-1).tolist(), strict=True)}
    predicted = [guesses[index] for index in range(len(texts))]
    accuracy = float(accuracy_score(truth, predicted))
    figures = {
        "accuracy": accuracy,
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "reported_accuracy": result.final["accuracy"],
    }
    # one text whose two best classes tie may fall either way in another batch
    if abs(accuracy - result.final["accuracy"]) > 1.5 / len(texts):
        raise LichenError(
            Code.CHECK_FAILED, f"accuracy {accuracy:.4f}, the run reported {result.final['accuracy']:.4f}", where=str(directory)
        )
    return figures


def _load(directory: Path, labels: int, model: dict[str, Any]) -> Any:
    import peft
    import transformers

    kind = "TokenClassification" if model["head"]["pooling"] == "mean" else "SequenceClassification"
    if (directory / "adapter_config.json").exists():
        return getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(directory, num_labels=labels, ignore_mismatched_sizes=True).eval()
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(directory).eval()
