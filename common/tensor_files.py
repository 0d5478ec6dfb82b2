"""Named tensors in safetensors files, written one at a time: safetensors' own writer copies all of them first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order in which safetensors writes them."""
_ALIGNED = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: for given tensors and metadata always the same bytes, which are those of `safetensors.torch.save`.

    Args:
        path: the file.
        tensors: on any device, of the types that models have.
        metadata: kept in the header.
    """
    types = list(_NAMES)
    order = sorted(tensors, key=lambda name: (types.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def in_a_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of tensors that lies in a file without a name, mapped: memory that the system may take back."""
    with TemporaryDirectory(prefix="lichen-") as folder:
        path = Path(folder) / "tensors"
        write_tensors(path, tensors)
        return dict(load_file(path))
