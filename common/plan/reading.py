"""From a file, settings or a message to a plan that is whole and sound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lichen.common.errors import Code, LichenError
from lichen.common.plan.checks import check_sound
from lichen.common.plan.mistakes import explain
from lichen.common.plan.plan import Plan, canonical
from lichen.common.yaml_files import read_yaml

FORMAT = 1


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan from a YAML (or JSON) file.

    Args:
        path: the file.
        overrides: ``key.path=value`` settings that replace keys of the file; the value is YAML.

    Raises:
        LichenError: PLAN_UNREADABLE, PLAN_INVALID, PLAN_VERSION, PLAN_UNSOUND.
    """
    document = _document(path)
    for override in overrides:
        _override(document, override)
    return parse_plan(document, where=" ".join([str(path), *(f"--set {override}" for override in overrides)]))


def text_of(path: Path) -> str:
    """A plan file's canonical JSON, without the defaults that it leaves out: the text, and its digest, of whoever wrote the file.

    Raises:
        LichenError: PLAN_UNREADABLE, PLAN_INVALID.
    """
    return canonical(_document(path))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(Code.PLAN_UNREADABLE, f"can't read the plan: {error}", where=str(path)) from None
    except yaml.YAMLError as error:
        raise LichenError(Code.PLAN_UNREADABLE, f"not YAML: {' '.join(str(error).split())}", where=str(path)) from None
    if not isinstance(document, dict):
        raise LichenError(Code.PLAN_INVALID, "a plan is a mapping of keys", where=str(path), fix="Start from `lichen plan new`.")
    return document


def find_plan(name: str) -> Path:
    """A plan file, or a scenario by name.

    Raises:
        LichenError: PLAN_UNREADABLE, if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    scenarios = {path.stem: path for path in sorted((Path(str(files("lichen.simulations"))) / "scenarios").glob("*.yaml"))}
    if (found := scenarios.get(name.removesuffix(".yaml"))) is not None:
        return found
    known = ", ".join(scenarios)
    raise LichenError(Code.PLAN_UNREADABLE, "no such file, and no scenario of that name", where=name, fix=f"Scenarios: {known}.")


_ASKS_FOR_PRIVACY = {"epsilon", "delta", "clip", "adaptive_clip", "noise", "sample_rate", "unit_field"}


def parse_plan(document: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """Validate a plan that was read already. Raises as `load_plan` does."""
    version = document.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise LichenError(Code.PLAN_VERSION, f"format {version} is newer than this lichen's {FORMAT}", where=where, fix="Upgrade lichen.")
    try:
        # JSON text, because strict validation of Python objects would refuse a list where the model holds a tuple
        text = json.dumps(document, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a date as a key, an alias inside what it names
        raise LichenError(Code.PLAN_INVALID, f"not a plan: {error}", where=where) from None
    try:
        plan = Plan.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, where) from None
    privacy = document.get("privacy")
    if isinstance(privacy, dict) and "unit" not in privacy and (asked := sorted(_ASKS_FOR_PRIVACY & privacy.keys())):
        raise LichenError(
            Code.PLAN_UNSOUND,
            f"privacy.{asked[0]} is given, but no privacy.unit, so nothing would be private",
            where=where,
            fix="Set privacy.unit to example, entity or client; or to none, if that is what is meant.",
        )
    continual = document.get("continual")
    if isinstance(continual, dict) and "online" in continual and "mode" not in continual:
        raise LichenError(
            Code.PLAN_UNSOUND,
            "continual.online is given, but no continual.mode, so no batch would ever begin",
            where=where,
            fix="Set continual.mode: online; or planned, if that is what is meant.",
        )
    check_sound(plan, where=where)
    return plan


def plan_from_json(text: str) -> Plan:
    """A plan that arrived in a message. Raises as `load_plan` does."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise LichenError(Code.PLAN_UNREADABLE, "the plan that arrived is not JSON") from None
    if not isinstance(document, dict):
        raise LichenError(Code.PLAN_INVALID, "the plan that arrived is not a mapping")
    return parse_plan(document, where="received plan")


def _override(document: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise LichenError(
            Code.PLAN_INVALID, f"{setting!r} is not KEY.PATH=VALUE", where="--set", fix="For example --set privacy.epsilon=2."
        )
    *parents, last = path.split(".")
    node = document
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise LichenError(Code.PLAN_INVALID, f"{part!r} holds a value, not keys", where=f"--set {path}")
        node = child
    try:
        node[last] = read_yaml(text)
    except yaml.YAMLError as error:
        what = f"{text!r} is not a YAML value: {' '.join(str(error).split())}"
        raise LichenError(Code.PLAN_INVALID, what, where=f"--set {path}") from None
