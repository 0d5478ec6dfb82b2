"""Where this machine computes: on its GPU, or its CPU. A fact of the machine, and never of a plan.

What arrives, what leaves and what is written are tensors of the CPU: `TunedModel.load` and `state` are the border.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    import torch

VARIABLE = "LICHEN_DEVICE"
"""Names the device to this process and to those that it starts."""
AUTO = "auto"
HELP = "auto (a CUDA GPU where there is one), cpu, or another that torch names, such as cuda:1 or mps."


def choose(name: str) -> None:
    """Let this process, and those that it starts, compute there.

    Raises:
        LichenError: DEVICE_MISSING, if it is not there.
    """
    find(name)
    os.environ[VARIABLE] = name


def choose_unloaded(name: str) -> None:
    """`choose` for a process that is to stay without torch: another one looks, where there may be nothing.

    Raises:
        LichenError: DEVICE_MISSING, if it is not there.
    """
    if name not in {AUTO, "cpu"}:
        import subprocess

        found = subprocess.run([sys.executable, "-m", __name__, name], capture_output=True, text=True, check=False)
        if found.returncode:
            raise LichenError(Code.DEVICE_MISSING, found.stdout.strip() or found.stderr.strip()[-200:], where="--device", fix=_FIX)
    os.environ[VARIABLE] = name


def device() -> torch.device:
    """The device of this process.

    Raises:
        LichenError: DEVICE_MISSING, if the one that was chosen is not there.
    """
    return find(os.environ.get(VARIABLE) or AUTO)


def find(name: str) -> torch.device:
    """A device by its name; ``auto`` takes no other accelerator than CUDA's (and ROCm's), where all that is here was tried.

    Raises:
        LichenError: DEVICE_MISSING, if it is not there.
    """
    import torch

    if name == "cpu":  # asks no driver, so that a process may be forked afterwards
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == AUTO:
        return accelerator if accelerator and accelerator.type == "cuda" else torch.device("cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = None
    count = torch.accelerator.device_count() if accelerator else 0
    if wanted == torch.device("cpu"):
        return torch.device("cpu")
    if wanted is None or accelerator is None or wanted.type != accelerator.type or (wanted.index or 0) >= count:
        there = ", ".join(["cpu", *(f"{accelerator.type}:{number}" for number in range(count) if accelerator)])
        raise LichenError(Code.DEVICE_MISSING, f"no device {name!r} on this machine: {there}", where="--device", fix=_FIX)
    return wanted


_FIX = "Leave --device (and LICHEN_DEVICE) out, or install the torch that is built for it, and its driver."


def name_of(where: torch.device) -> str:
    """What people call a device."""
    import torch

    return torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)


def sent(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """A tensor on a device; itself if it is there. Nobody waits for it: what uses it there comes after it."""
    return tensor.to(where, non_blocking=True)


if __name__ == "__main__":
    try:
        find(sys.argv[1])
    except LichenError as error:
        print(error.what)
        sys.exit(int(error.code))
