"""The profile of this node: measured here, kept in the home, and told to the coordinator unless the policy keeps it in.

None of it depends on the data: memory and threads are the machine's, the speed comes from a probe on made-up text, and payloads have
the sizes that the plan gives them. The agent imports no torch, so another process looks for accelerators, once.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml

from lichen.client.worker import Limits, least
from lichen.common.device import VARIABLE
from lichen.common.errors import LichenError
from lichen.common.hardware import Profile, rounded
from lichen.common.private_files import write_private
from lichen.common.yaml_files import read_yaml

FORMAT: Final = 1
FILE = "profile.json"
POLICY = "policy.yaml"
MOST_KEPT = 32
"""Trainings whose speed is kept."""
_LOOK = ("-P", "-m", "lichen.client.hardware")  # -P: a file in the working directory must not stand in for a library
_CGROUP = Path("/sys/fs/cgroup")

log = logging.getLogger(__name__)


@dataclass
class _Kept:
    """What the file holds."""

    machine: str = ""
    """Another machine, device or torch than this: measured anew."""
    device: str = "cpu"
    device_memory_mb: int | None = None
    """Of an accelerator."""
    tokens_per_s: dict[str, int] = field(default_factory=dict)
    """By `work_of` the plan and the threads."""
    told: dict[str, Any] | None = None
    """What the coordinator was told last."""


class Hardware:
    """What this node can do, and what was told of it.

    Args:
        home: the node's home, where it is kept.
        limits: what the owner gives now; may be set again.
    """

    def __init__(self, home: Path, limits: Limits) -> None:
        self.limits = limits
        self._path = home / FILE
        self._kept = _read(self._path)
        machine = f"{platform.node()} {platform.machine()} {os.cpu_count()} {os.environ.get(VARIABLE, '')} {version('torch')}"
        if self._kept.machine != machine:
            device, memory = _look(os.environ.get(VARIABLE) or "auto")
            self._kept = _Kept(machine, device, memory)
            self._write()

    def profile(
        self, work: str = "", rows_per_step: int | None = None, speeds: tuple[float | None, float | None] = (None, None), held_mb: float = 0
    ) -> Profile:
        """As it is told.

        Args:
            work: of the plan that is worked on; left out, the one that was told last.
            rows_per_step: of that plan.
            speeds: of the link in kbit/s, down and up; None where nothing large has passed yet.
            held_mb: memory that this node's own worker holds now.
        """
        before = self._kept.told or {}
        if not work:
            work, rows_per_step = before.get("work", ""), before.get("rows_per_step")
        known = {"down": speeds[0] or before.get("download_kbit_s"), "up": speeds[1] or before.get("upload_kbit_s")}
        link = {key: _power_of_two(value) if value else None for key, value in known.items()}
        free = self._kept.device_memory_mb or least(int(free_mb() + held_mb), self.limits.memory_mb) or 1
        return Profile(
            device=self._kept.device,
            memory_mb=rounded(free),
            threads=self.limits.threads or usable_threads(),
            work=work,
            tokens_per_s=self._kept.tokens_per_s.get(self._speed_key(work)),
            rows_per_step=rows_per_step,
            download_kbit_s=link["down"],
            upload_kbit_s=link["up"],
        )

    def told(self, profile: Profile | None) -> None:
        """Note what the coordinator is told."""
        told = profile.model_dump(mode="json") if profile else None
        if told != self._kept.told:
            self._kept.told = told
            self._write()

    def knows_speed(self, work: str) -> bool:
        """Whether such a training was probed here."""
        return self._speed_key(work) in self._kept.tokens_per_s

    def keep_speed(self, work: str, tokens_per_s: int) -> None:
        """Keep what a probe found."""
        kept, key = self._kept.tokens_per_s, self._speed_key(work)
        kept.pop(key, None)
        kept[key] = tokens_per_s
        while len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]
        self._write()

    def _speed_key(self, work: str) -> str:
        return f"{work} {self.limits.threads}"

    def _write(self) -> None:
        write_private(self._path, json.dumps({"format": FORMAT, **asdict(self._kept)}).encode(), durable=False)


def is_kept_in(home: Path) -> bool:
    """Whether the policy keeps the profile in; one that can't be understood does. Read without the schemas of policy and plan."""
    try:
        document = read_yaml((home / POLICY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True
    return not isinstance(document, dict) or document.get("profile", True) is not True


def told_profile(home: Path) -> dict[str, Any] | None:
    """What the coordinator of this home was told last; None if nothing."""
    return _read(home / FILE).told


def usable_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_mb() -> float:
    """Memory of the machine that is free, or of the control group if that is less, in MiB."""
    import psutil

    free = float(psutil.virtual_memory().available)
    try:  # of a container
        most, used = (float((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        free = min(free, most - used)
    except (OSError, ValueError):  # none, or no limit
        pass
    return max(1.0, free / 2**20)


def _look(name: str) -> tuple[str, int | None]:
    """The kind of device where this node trains, and an accelerator's free memory in MiB."""
    if name == "cpu":
        return "cpu", None
    found = subprocess.run([sys.executable, *_LOOK, name], capture_output=True, text=True, check=False)
    try:
        document = json.loads(found.stdout.splitlines()[-1])
        return str(document["device"]), document["memory_mb"]
    except (ValueError, KeyError, IndexError):
        log.warning("devices can't be looked at: %s", found.stderr.strip()[-200:])
        return "cpu", None


def _accelerator(name: str) -> dict[str, Any]:
    """What `_look` reads, in a process that may load torch."""
    import torch

    from lichen.common.device import find

    where = find(name)
    if where.type == "cpu":
        return {"device": "cpu", "memory_mb": None}
    if where.type == "mps":  # which shares the machine's memory
        return {"device": "mps", "memory_mb": int(torch.mps.recommended_max_memory()) >> 20}
    free, _ = getattr(torch, where.type).mem_get_info(where)  # cuda, xpu and other backends
    return {"device": where.type, "memory_mb": int(free) >> 20}


def _read(path: Path) -> _Kept:
    """What is kept; nothing where the file is damaged or of another format: all of it can be measured again."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _Kept(**document) if document.pop("format") == FORMAT else _Kept()
    except (OSError, ValueError, KeyError, TypeError):
        return _Kept()


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


if __name__ == "__main__":
    try:
        print(json.dumps(_accelerator(sys.argv[1])))
    except LichenError as error:
        print(error.what, file=sys.stderr)
        sys.exit(int(error.code))
