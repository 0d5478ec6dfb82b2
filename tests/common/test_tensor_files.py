"""Tensors in files: the same bytes as safetensors' own writer makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from lichen.common.tensor_files import in_a_file, write_tensors

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(TYPES), shapes), max_size=6))
@settings(max_examples=60, deadline=None)
def test_it_writes_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory,
    about: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {name: (100 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in about.items() if name != "__metadata__"}
    path = tmp_path_factory.mktemp("file") / "tensors"
    write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors)


def test_what_lies_in_no_order_is_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "a", {"a": tensor, "b": torch.tensor([True, False])}, {"lichen": 'x"é\n'})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"lichen": 'x"é\n'}
        assert torch.equal(file.get_tensor("a"), tensor)
        assert file.get_tensor("b").tolist() == [True, False]


def test_a_copy_in_a_file_is_one() -> None:
    tensor = torch.randn(50, 3)
    found = in_a_file({"a": tensor})["a"]
    before = tensor.clone()
    tensor.zero_()
    assert torch.equal(found, before)
