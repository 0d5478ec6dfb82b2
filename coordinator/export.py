"""Take a run's model out: as peft's files, or merged into its base as a plain transformers model; and `lichen export`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lichen.common.continual.stream import is_stream
from lichen.common.errors import Code, LichenError
from lichen.common.model.export import card
from lichen.common.plan import load_plan
from lichen.common.privacy.statement import make_statement
from lichen.common.result import read_result, write_atomically

if TYPE_CHECKING:
    from lichen.coordinator.versions import Versions

Format = Literal["peft", "merged"]
ARCHIVE = "model.tar"
"""Beside a model, the same as nodes fetch it; made when one does."""
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


class ExportFormat(StrEnum):
    """What `--format` takes."""

    PEFT = "peft"
    MERGED = "merged"


OutOption = Annotated[Path, typer.Option(help="The directory to write.", show_default=False)]
FormatOption = Annotated[
    ExportFormat, typer.Option("--format", help="peft: as it was trained. merged: a LoRA adapter added into its base's weights.")
]
VersionOption = Annotated[
    int | None, typer.Option(min=1, help="Of a stream of tasks: the model after so many; left out, what is given out.")
]


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The run directory.", show_default=False)],
    out: OutOption,
    form: FormatOption = ExportFormat.PEFT,
    version: VersionOption = None,
) -> None:
    """Write a run's model, for transformers and peft. Example: lichen export runs/mine --out model --format merged."""
    export_model(directory, out, form.value, version)
    typer.echo(f"wrote {out}")


def export_model(run: Path, out: Path, form: Format = "peft", version: int | None = None) -> None:
    """Write a run's final model.

    Args:
        run: the run directory.
        out: a directory, made here; it may exist only if it is empty.
        form: ``peft`` copies `model/` as it is; ``merged`` adds a LoRA adapter into its base's weights.
        version: of a stream of tasks, in place of what is given out.

    Raises:
        LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE, NO_MODEL; MODEL_NOT_FOUND if the base is not here.
    """
    if not (run / "plan.yaml").is_file():
        fix = "Give the --out of lichen simulate, or runs/RUN of a coordinator's home."
        raise LichenError(Code.OUTPUT_UNUSABLE, "no run directory", where=str(run), fix=fix)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LichenError(Code.OUTPUT_EXISTS, "the directory is not empty", where=str(out), fix="Choose another --out.")
    with ExitStack() as stack:
        model = run / "model"
        if version is not None:
            versions_of(run).find(version)  # before anything is loaded
            model = Path(stack.enter_context(TemporaryDirectory())) / "model"
            _write_version(run, version, model)
        else:
            model = stack.enter_context(given_out(run))
        if not (model / "README.md").is_file():
            raise LichenError(Code.NO_MODEL, "this run has no model yet", where=str(run), fix="Wait until it has finished.")
        try:
            merged = {file.parent for file in model.rglob("adapter_config.json")} if form == "merged" else set[Path]()
            for adapter in merged:  # of tasks there may be several
                _merge(run, adapter, out / adapter.relative_to(model))
            shutil.copytree(model, out, dirs_exist_ok=True, ignore=lambda folder, names: names if Path(folder) in merged else [])
        except OSError as error:
            raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(out)) from None


def give_out(run: Path, number: int | None) -> None:
    """Make a version of a stream the model of a run that is over, or with None the newest that is not held back.

    A crash on the way leaves what was given out before, or once the version is pinned what is given out from then on (`given_out`).

    Raises:
        LichenError: NO_MODEL; MODEL_NOT_FOUND, if the base is not here; OUTPUT_UNUSABLE.
    """
    from lichen.coordinator.versions import held

    try:
        with held(run):
            _replace_model(run, number)
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(run)) from None


def _replace_model(run: Path, number: int | None) -> None:
    from lichen.coordinator.report import write_report
    from lichen.coordinator.versions import Versions

    new, old = run / "model.new", run / "model.old"
    if old.exists() and not (run / "model").exists():  # an attempt was killed
        old.rename(run / "model")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    versions = Versions(run, load_plan(run / "plan.yaml"))
    has_model = (run / "model").exists()
    if has_model:  # else what is given out is written when it is asked for
        _write_version(run, versions.newest().number if number is None else number, new)
    versions.pin(number)
    if has_model:
        (run / "model").rename(old)
        new.rename(run / "model")
    (run / ARCHIVE).unlink(missing_ok=True)  # nodes fetched the other
    result, told = read_result(run), versions.summary()
    if result.continual is not None and told is not None:
        update = {"held_back": told.held_back, "given_out": told.given_out}
        result.continual = result.continual.model_copy(update=update)
        write_atomically(run / "result.json", result.model_dump_json(indent=2) + "\n")
        write_report(run)
    shutil.rmtree(old, ignore_errors=True)


def versions_of(run: Path) -> Versions:
    """Those of a run.

    Raises:
        LichenError: NO_MODEL, if its plan has no stream; PLAN_….
    """
    from lichen.coordinator.versions import Versions

    plan = load_plan(run / "plan.yaml")
    if not is_stream(plan):
        raise LichenError(Code.NO_MODEL, "the run's plan has no stream of tasks, so its model has no versions", where=str(run))
    return Versions(run, plan)


def has_version(run: Path) -> bool:
    """Whether a run of a stream gives out a version."""
    from lichen.coordinator.versions import FOLDER, Versions

    return (run / FOLDER).is_dir() and Versions(run, load_plan(run / "plan.yaml")).given_out() is not None


@contextmanager
def given_out(run: Path) -> Iterator[Path]:
    """Where the model lies that a run gives out: `model/`, or of a stream beside a version's tensors, written when it is first asked for.

    `model/` is of the version that `result.json` of a finished run names; an operator may have chosen another as it was made.
    It stays what it is until the context ends: who gives out another waits, in whichever process; who only reads does not.

    Raises:
        LichenError: MODEL_NOT_FOUND, if the base is not here; OUTPUT_UNUSABLE.
    """
    from lichen.coordinator.versions import held

    while True:
        with held(run, shared=True):
            folder, missing = _place(run)
            if missing is None:
                yield folder
                return
        with held(run):
            folder, missing = _place(run)
            if missing is not None:  # nobody else has written it meanwhile
                _write_beside(run, missing, folder)


def _place(run: Path) -> tuple[Path, int | None]:
    """The folder of the model that a run gives out, and the number of the version that is to be written there first, if one is."""
    from lichen.coordinator.versions import FOLDER, Versions

    if not (run / FOLDER).is_dir() or (versions := Versions(run, load_plan(run / "plan.yaml"))).given_out() is None:
        return run / "model", None
    version = versions.current()
    if (run / "model" / "README.md").is_file():
        result = read_result(run)
        if result.status == "finished" and result.continual and result.continual.given_out == version.name:
            return run / "model", None
    folder = run / FOLDER / version.name / "model"
    return folder, None if folder.exists() else version.number


def _write_beside(run: Path, number: int, folder: Path) -> None:
    new = folder.with_name("model.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        _write_version(run, number, new)
        new.rename(folder)
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(folder)) from None


def _write_version(run: Path, number: int, folder: Path) -> None:
    """A version of a stream's model, as `model/` has the final one."""
    from lichen.common.model.export import save_models
    from lichen.common.tasks import workbench
    from lichen.coordinator.versions import Versions

    plan = load_plan(run / "plan.yaml")
    versions = Versions(run, plan)
    version = versions.find(number)
    task, model, _ = workbench(plan.at_precision("float32"))
    statement = make_statement(plan, read_result(run))
    save_models(folder, plan, model, task.tokenizer, statement, versions.state(version), number - 1, model.load)


def _merge(run: Path, model: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    plan = load_plan(run / "plan.yaml")
    config = AutoConfig.from_pretrained(model)
    labels = tuple(config.id2label[number] for number in sorted(config.id2label)) if plan.task.labels else ()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base lacks the head is no news: the adapter brings it
    kind = AutoPeftModelForTokenClassification if plan.model.head.pooling == "mean" else AutoPeftModelForSequenceClassification
    settings = {
        "num_labels": len(labels),
        "id2label": config.id2label,
        "label2id": config.label2id,
    }
    if plan.task.kind == "causal-lm":
        kind, settings = AutoPeftModelForCausalLM, {}
    try:
        # a base's own head, of other classes, is not the one that was trained
        tuned = kind.from_pretrained(model, ignore_mismatched_sizes=True, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned.merge_and_unload().save_pretrained(out)
    except (OSError, ValueError) as error:
        raise LichenError(
            Code.MODEL_NOT_FOUND, f"can't load the base model: {str(error).splitlines()[0]}", where="model.base", fix="Export as peft."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    statement = make_statement(plan, read_result(run))
    (out / "README.md").write_text(card(plan, statement, labels, merged=True), encoding="utf-8")
