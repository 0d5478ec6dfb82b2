"""Batches without padding: the same numbers as padded ones, for rows of any lengths, in every kind of pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.model.adapter import TunedModel
from lichen.common.model.lean import run_lean
from lichen.common.model.packing import Packed, Packing, Padded

HEADS, WIDTH = 2, 8
LENGTHS = st.lists(st.integers(1, 9), min_size=2, max_size=7)
SMALL = {
    "vocab_size": 29, "pad_token_id": 1, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
FAMILIES = {"Bert": t.BertConfig, "Roberta": t.RobertaConfig, "XLMRoberta": t.XLMRobertaConfig}


def real_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def build(family: str, head: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    network = getattr(t, f"{family}For{head}Classification")(FAMILIES[family](**SMALL, **more))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.train()


def losses(network: nn.Module, lengths: list[int]) -> torch.Tensor:
    """Of each row; over its real tokens, where the head gives each its logits."""
    real = real_of(lengths)
    ids = torch.where(real, 2 + torch.arange(real.numel()).view(real.shape) % 27, 1)
    logits = network(input_ids=ids, attention_mask=real.long()).logits
    if logits.dim() == 3:
        logits = (logits * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
    return F.cross_entropy(logits, torch.arange(len(lengths)) % 3, reduction="none")


def with_lora(network: nn.Module, dropout: float = 0.0) -> Any:
    found = get_peft_model(network, LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=dropout))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return found


def lean(network: nn.Module, *, pack: bool = True) -> Packing:
    return run_lean(TunedModel(network, {}, frozenset()), pack=pack)


@settings(deadline=None)
@given(LENGTHS)
def test_what_is_packed_comes_back_and_rows_are_kept_apart(lengths: list[int]) -> None:
    real = real_of(lengths)
    layout = Packed(real)
    hidden = torch.randn(*real.shape, HEADS * WIDTH)
    packed = layout.enter(hidden)
    assert packed.shape == (1, sum(lengths), HEADS * WIDTH)
    assert layout.enter(packed) is packed
    assert torch.equal(layout.leave(packed), hidden * real.unsqueeze(2))
    assert torch.equal(layout.first(packed), hidden[:, :1])
    assert torch.equal(layout.leave(hidden[:, :1]), hidden[:, :1])
    sums = layout.by_rows(lambda x, y: (x * y).sum(1), packed, packed)
    torch.testing.assert_close(sums, (hidden.square() * real.unsqueeze(2)).sum(1))
    assert torch.equal(layout.by_rows(lambda x: x.sum(1), hidden), hidden.sum(1))


@settings(deadline=None)
@given(LENGTHS)
def test_attention_is_each_rows_own(lengths: list[int]) -> None:
    real = real_of(lengths)
    values = [torch.randn(*real.shape, HEADS * WIDTH) for _ in range(3)]
    layout = Packed(real)
    query, key, value = (layout.enter(tensor) for tensor in values)
    expected = torch.zeros_like(values[0])
    for row, length in enumerate(lengths):
        q, k, v = (tensor[row, :length].view(length, HEADS, WIDTH).transpose(0, 1) for tensor in values)
        scores = torch.softmax(q @ k.mT / WIDTH**0.5, -1)
        expected[row, :length] = (scores @ v).transpose(0, 1).flatten(1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(layout.leave(layout.attention(query, key, value, HEADS)), expected, **close)
    torch.testing.assert_close(layout.attention(layout.first(query), key, value, HEADS), expected[:, :1], **close)
    padded = Padded(real[:, None, None].expand(-1, 1, real.shape[1], -1))
    torch.testing.assert_close(padded.attention(*values, HEADS)[real], expected[real], **close)
    torch.testing.assert_close(padded.attention(padded.first(values[0]), *values[1:], HEADS), expected[:, :1], **close)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("head", ["Sequence", "Token"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuned", ["all", "query and value"])
def test_losses_and_gradients_are_the_padded_models(tuned: str, family: str, head: str, pack: bool) -> None:
    network = build(family, head)
    if tuned != "all":
        network = with_lora(network)
    batches = [[9, 1, 4, 9, 30], [1, 2], [7, 7, 7], [5], [1], [3, 3, 12]]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    expected = [(found := losses(network, lengths), torch.autograd.grad(found.sum(), trained, allow_unused=True)) for lengths in batches]
    assert lean(network, pack=pack).on == pack
    for lengths, (right, gradients) in zip(batches, expected, strict=True):
        left = losses(network, lengths)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(left.sum(), trained, allow_unused=True), gradients, strict=True):
            if theirs is not None:
                assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-6
            else:
                assert ours is None


def test_no_padding_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("Bert", "Sequence")
    lean(network)
    shapes: list[list[tuple[int, ...]]] = []
    for layer in network.bert.encoder.layer:
        seen: list[tuple[int, ...]] = []
        shapes.append(seen)
        layer.output.register_forward_hook(lambda *found, seen=seen: seen.append(tuple(found[2].shape)))
    losses(network, [9, 1, 4])
    assert shapes == [[(1, 14, 16)], [(1, 14, 16)], [(3, 1, 16)]]


@pytest.mark.parametrize(("dropout", "shape"), [(0.0, (3, HEADS, 16)), (0.5, (1, 14, 16))])
def test_the_last_layer_makes_a_value_for_each_head_where_dropout_does_not_see_tokens(dropout: float, shape: tuple[int, ...]) -> None:
    network = build("Bert", "Sequence")
    tuned = with_lora(network, dropout).eval()
    lean(tuned)
    shapes: list[tuple[int, ...]] = []
    network.bert.encoder.layer[-1].attention.self.value.register_forward_hook(lambda *found: shapes.append(tuple(found[2].shape)))
    losses(tuned, [9, 1, 4])
    assert shapes == [shape]


def test_rows_padded_on_the_left_and_rows_of_nothing_are_left_padded() -> None:
    packing = Packing(on=True)
    real = real_of([3, 5]).flip(1)[:, None, None].expand(-1, 1, 5, -1)
    assert type(packing.of(real)) is Padded
    assert type(packing.of(real.flip(3))) is Packed
    assert type(packing.of(None)) is Padded
    assert type(packing.of(real_of([0, 4])[:, None, None].expand(-1, 1, 4, -1))) is Padded
    packing.of(real.flip(3))
    packing.forget()
    assert type(packing.layout) is Padded


def test_a_model_of_another_kind_is_left_as_it_was() -> None:
    other = t.DistilBertForSequenceClassification(t.DistilBertConfig(vocab_size=29, dim=16, hidden_dim=24, n_layers=2, n_heads=2))
    eager = build("Bert", "Sequence", attn_implementation="eager")
    decoder = build("Bert", "Sequence", is_decoder=True)  # what a token sees is not what the layers written out let it see
    for network in (other, eager, decoder):
        assert not lean(network).on
        assert not any("forward" in vars(module) for module in network.modules())
