"""Processes that are killed, and machines that lose power, while they reserve and send: the ledger never knows less than what left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def kill(folder: Path, kills: int, environment: dict[str, str] | None = None) -> dict[str, Any]:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    (folder / "ledgers").mkdir()
    arguments = [
        sys.executable,
        str(HERE / "ledger_victim.py"),
        str(folder / "ledgers"),
        str(seed),
        str(kills),
        str(int(bool(environment))),
    ]
    done = subprocess.run(arguments, env=os.environ | (environment or {}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (seed, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    assert found["kills"] == kills
    assert found["left"] > kills / 4  # otherwise it was no test
    return found


@pytest.fixture(scope="module")
def no_sync(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose unsynced writes are known."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and Linux's LD_PRELOAD")
    folder = tmp_path_factory.mktemp("shim")
    library = folder / "unsynced.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "unsynced.c"), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "LICHEN_WRITES": str(folder / "writes")}


def test_killed_a_hundred_times_it_never_undercounts(tmp_path: Path) -> None:
    kill(tmp_path, 100)


def test_a_machine_that_loses_power_forgets_nothing_that_left(tmp_path: Path, no_sync: dict[str, str]) -> None:
    assert kill(tmp_path, 50, no_sync)["lost_writes"] > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_a_thousand_times(tmp_path: Path) -> None:
    kill(tmp_path, 1000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_machine_that_loses_power_five_hundred_times(tmp_path: Path, no_sync: dict[str, str]) -> None:
    assert kill(tmp_path, 500, no_sync)["lost_writes"] > 0
