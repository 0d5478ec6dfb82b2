"""Take a run's model out: as peft's files, or merged into its base as a plain transformers model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from lichen.common.errors import Code, LichenError
from lichen.common.model.export import card
from lichen.common.plan import load_plan
from lichen.common.privacy.statement import make_statement
from lichen.common.result import read_result

Format = Literal["peft", "merged"]


def export_model(run: Path, out: Path, form: Format = "peft") -> None:
    """Write a run's final model.

    Args:
        run: the run directory.
        out: a directory, made here; it may exist only if it is empty.
        form: ``peft`` copies `model/` as it is; ``merged`` adds a LoRA adapter into its base's weights.

    Raises:
        LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE, NO_MODEL; MODEL_NOT_FOUND if the base is not here.
    """
    model = run / "model"
    if not (model / "config.json").is_file():
        raise LichenError(Code.NO_MODEL, "this run has no model yet", where=str(run), fix="Wait until it has finished.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LichenError(Code.OUTPUT_EXISTS, "the directory is not empty", where=str(out), fix="Choose another --out.")
    try:
        if form == "merged" and (model / "adapter_config.json").exists():
            _merge(run, model, out)
        else:
            shutil.copytree(model, out, dirs_exist_ok=True)
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(out)) from None


def _merge(run: Path, model: Path, out: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification
    from transformers import AutoTokenizer
    from transformers.utils import logging

    plan = load_plan(run / "plan.yaml")
    labels = plan.task.labels
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base lacks the head is no news: the adapter brings it
    kind = AutoPeftModelForTokenClassification if plan.model.head.pooling == "mean" else AutoPeftModelForSequenceClassification
    try:
        tuned = kind.from_pretrained(
            model, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)}
        )
        tuned.merge_and_unload().save_pretrained(out)
    except (OSError, ValueError) as error:
        raise LichenError(
            Code.MODEL_NOT_FOUND, f"can't load the base model: {str(error).splitlines()[0]}", where="model.base", fix="Export as peft."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    statement = make_statement(plan, read_result(run))
    (out / "README.md").write_text(card(plan, statement, merged=True), encoding="utf-8")
