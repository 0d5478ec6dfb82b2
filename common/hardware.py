"""What a node's machine can do: its profile, as it is rounded and sent, and the tiers that stand for machines nobody has measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lichen.common.channel import fleet_pb2
from lichen.common.channel.framing import WORK_BYTES
from lichen.common.errors import Code, LichenError
from lichen.common.yaml_files import read_yaml

if TYPE_CHECKING:
    from lichen.common.plan import Plan

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Profile(BaseModel):
    """One machine, as it is told to a coordinator: every number rounded, so that they are no fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: Literal[1] = 1
    """The version of this format."""
    device: str = Field(default="cpu", pattern=r"^[a-z]{1,16}$")
    """Where it trains, as torch calls that kind of device: cpu, cuda, mps."""
    memory_mb: Count
    """Memory that training may take there, in MiB: what is free, or what the owner gives if that is less."""
    threads: Count = 1
    """Threads that training may take."""
    work: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")
    """Of which training the next two tell: `work_of` the plan."""
    tokens_per_s: Count | None = None
    """Tokens that pass forward and backward in a second, by a probe on made-up text."""
    rows_per_step: Count | None = None
    """Rows of a step of that training: the expected ones, by the plan and the declared size."""
    download_kbit_s: Count | None = None
    """Of the last large payload that came, in kbit/s."""
    upload_kbit_s: Count | None = None
    """Of the last large payload that was sent."""


TIERS: Mapping[str, Profile] = {
    "cpu-4gb": Profile(memory_mb=2048, threads=2),
    "laptop-16gb": Profile(memory_mb=8192, threads=4),
    "gpu-24gb": Profile(device="cuda", memory_mb=22 * 1024, threads=8),
    "gpu-80gb": Profile(device="cuda", memory_mb=76 * 1024, threads=16),
}
"""Machines by name, for `lichen plan show --for`: the memory that is left beside the owner's own programs, or of the GPU; no speed."""


def find_profile(name: str) -> Profile:
    """A tier by its name, or a file as `lichen client profile --json` writes it.

    Raises:
        LichenError: DATA_NOT_FOUND, if there is neither; PLAN_INVALID, if the file is no profile.
    """
    if name in TIERS:
        return TIERS[name]
    try:
        document = read_yaml(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        fix = f"Tiers: {', '.join(TIERS)}; or write a file by `lichen client profile --json`."
        raise LichenError(Code.DATA_NOT_FOUND, "no such file, and no tier of that name", where=name, fix=fix) from None
    except yaml.YAMLError as error:
        raise LichenError(Code.PLAN_INVALID, f"not YAML: {' '.join(str(error).split())}", where=name) from None
    try:
        return Profile.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise LichenError(
            Code.PLAN_INVALID, f"{key}: {first['msg']}", where=name, fix="Write it by `lichen client profile --json`."
        ) from None


def work_of(plan: Plan) -> str:
    """What tells one training's speed from another's: a digest of the parts of a plan that it depends on, 16 hexadecimal digits."""
    local = plan.local.model_dump(mode="json", include={"compute", "optimizer", "batch_size", "max_physical_batch_size"})
    parts = [plan.model.model_dump(mode="json"), plan.task.kind, len(plan.task.labels), plan.task.max_length, local, plan.privacy.unit]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:WORK_BYTES].hex()


def rows_per_step(plan: Plan, declared_size: int | None) -> int | None:
    """Rows of one optimizer step, the expected ones under privacy; None where they follow from a size that nobody has declared."""
    if plan.privacy.sample_rate is None:
        return plan.local.batch_size
    return None if declared_size is None else max(1, round(plan.privacy.sample_rate * declared_size))


def rounded(value: float) -> int:
    """To two significant digits, downwards, and at least 1: what is promised is there."""
    whole = max(1, int(value))
    unit = int(10 ** max(0, math.floor(math.log10(whole)) - 1))
    return whole // unit * unit


# --- as it travels -----------------------------------------------------------------------------------------------------------


def to_frame(profile: Profile | None) -> fleet_pb2.Profile:
    """A profile as protobuf; an empty one where the owner keeps it in."""
    if profile is None:
        return fleet_pb2.Profile()
    known: dict[str, Any] = profile.model_dump(exclude={"format", "work"}, exclude_none=True)
    return fleet_pb2.Profile(**known, work=bytes.fromhex(profile.work))


def from_frame(frame: fleet_pb2.Profile) -> Profile | None:
    """The profile that a node sent; None where it told nothing.

    Raises:
        LichenError: FRAME_INVALID, if a part of it is missing or no such number.
    """
    known = {field.name: value for field, value in frame.ListFields()}
    if not known:
        return None
    try:
        return Profile(**known | {"work": frame.work.hex()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise LichenError(Code.FRAME_INVALID, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where="Profile") from None
