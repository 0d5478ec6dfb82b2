"""What a client's codec lost of its updates in the run so far, for error feedback: one file a round in the node's home."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lichen.common.model.adapter import State

FOLDER = "residuals"
_KEPT = 2  # that of the last round, and the one before it, from which a round that is done again goes on


def load_residual(home: Path, run: str, round: int) -> State | None:
    """What was lost before ``round``; None, if this node has not sent an update of the run yet."""
    from safetensors.torch import load_file

    found = [path for path in _files(home, run) if int(path.stem) < round]
    return dict(load_file(found[-1])) if found else None


def save_residual(home: Path, run: str, round: int, residual: State) -> None:
    """Keep what was lost until after ``round``; of other runs nothing is kept."""
    from safetensors.torch import save_file

    folder = home / FOLDER / run
    folder.mkdir(parents=True, exist_ok=True)
    for other in (home / FOLDER).iterdir():
        if other != folder:
            shutil.rmtree(other)
    temporary = folder / f"{os.getpid()}.tmp"
    save_file(residual, temporary)
    temporary.replace(folder / f"{round}.safetensors")
    for old in _files(home, run)[:-_KEPT]:
        old.unlink()


def _files(home: Path, run: str) -> list[Path]:
    return sorted((home / FOLDER / run).glob("*.safetensors"), key=lambda path: int(path.stem))
