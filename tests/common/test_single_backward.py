"""The single backward pass against the loop over single units, for every family: LoRA and full, padded rows, one unit of several rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from lichen.common.errors import Code, LichenError
from lichen.common.model.adapter import TunedModel
from lichen.common.model.checkpointing import checkpoint_layers
from lichen.common.model.lean import run_lean
from lichen.common.privacy.hooks import HooksModule
from lichen.common.privacy.single_backward.module import SingleBackwardModule

Loss = Callable[[nn.Module], torch.Tensor]
Losses = Callable[[nn.Module, slice], torch.Tensor]
ROWS, LENGTH, VOCABULARY = 6, 9, 29
SINGLES, ENTITIES = [1] * ROWS, [2, 1, 3]
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
ROOT = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DECODER = {**ROOT, **WIDE, "num_key_value_heads": 1, "head_dim": 8}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
T5 = {**ROOT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 1}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**ROOT, **WIDE, **QUIET, num_labels=3)),
    "bert-tokens": lambda: t.BertForTokenClassification(t.BertConfig(**ROOT, **WIDE, **QUIET, num_labels=3)),
    "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**ROOT, **WIDE, **QUIET)),  # tied, with a bias of two names
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**ROOT, **WIDE, **QUIET, type_vocab_size=1, num_labels=3)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0, attention_dropout=0.0,
            seq_classif_dropout=0.0, max_position_embeddings=32, pad_token_id=1, num_labels=3,
        )
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(gpt2()),
    "gpt2-classes": lambda: t.GPT2ForSequenceClassification(gpt2(num_labels=3)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, **UNTIED)),
    "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, **TIED)),
    "llama-classes": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**DECODER, num_labels=3)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER, **UNTIED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**ROOT, **WIDE, num_key_value_heads=1, **TIED)),
    "qwen3": lambda: t.Qwen3ForTokenClassification(t.Qwen3Config(**DECODER, num_labels=3)),  # norms inside attention
    "qwen3-tied": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, **TIED)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**DECODER)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
    "t5-untied": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, **UNTIED, feed_forward_proj="gated-gelu")),
}  # fmt: skip


def gpt2(**more: Any) -> Any:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return t.GPT2Config(**ROOT, n_embd=16, n_layer=2, n_head=2, n_positions=32, **quiet, **more)


def build(family: str, adapter: str, dropout: float = 0.0) -> nn.Module:
    """A tiny random model, off its start, where outputs are all alike and half of LoRA's gradients are zero."""
    torch.manual_seed(len(family))
    network: Any = FAMILIES[family]()
    for module in network.modules():
        if isinstance(module, nn.Dropout):  # some heads have one that no entry of the configuration rules
            module.p = 0.0
    if adapter != "full":
        targets: Any = {"distilbert": ["q_lin", "v_lin"]}.get(family) if adapter == "lora" else None
        if adapter == "all-linear":
            targets = [n.rpartition(".")[2] for n, m in network.named_modules() if type(m).__name__ in {"Linear", "Conv1D"} and ".0." in n]
        network = get_peft_model(network, LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=targets))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.train()


def losses_for(family: str) -> Losses:
    """The loss of each row, a mean over its own tokens, of padded rows of several lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([LENGTH, 4, 7, 2, 9, 5])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator), 1)
    targets = torch.randint(3, VOCABULARY, (ROWS, 5), generator=generator)
    classes = torch.randint(3, (ROWS,), generator=generator)

    def token_means(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none") * weights
        return each.sum(1) / weights.sum(1)

    def losses(network: nn.Module, rows: slice) -> torch.Tensor:
        batch = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        if family.startswith("t5"):
            starts = F.pad(targets[rows, :-1], (1, 0), value=1)
            return token_means(network(**batch, decoder_input_ids=starts).logits, targets[rows], torch.ones(targets[rows].shape))
        logits = network(**batch).logits
        if logits.dim() == 2:
            return F.cross_entropy(logits.float(), classes[rows], reduction="none")
        if logits.shape[2] == 3:
            return token_means(logits, ids[rows] % 3, mask[rows])
        return token_means(logits[:, :-1], ids[rows, 1:], mask[rows, 1:])

    return losses


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def by_loop(network: nn.Module, losses: Losses, sizes: Sequence[int], clip: float | None = None) -> tuple[list[torch.Tensor], float]:
    """The clipped sum by one autograd call a unit, in 64 bits from the gradients on, and the clip: by default the units' median norm."""
    gradients, start = [], 0
    for size in sizes:
        loss = sum((losses(network, slice(row, row + 1)).sum() for row in range(start, start + size)), torch.zeros(())) / size
        found = torch.autograd.grad(loss, trained(network), allow_unused=True)
        gradients.append([torch.zeros(p.shape).double() if g is None else g.double() for g, p in zip(found, trained(network), strict=True)])
        start += size
    norms = [math.sqrt(sum(float(part.square().sum()) for part in unit)) for unit in gradients]
    clip = sorted(norms)[len(norms) // 2] if clip is None else clip
    factors = [min(1.0, clip / norm) if norm else 1.0 for norm in norms]
    return [sum(f * g for f, g in zip(factors, parts, strict=True)) for parts in zip(*gradients, strict=True)], clip  # type: ignore[misc]


def in_one(module: Any, losses: Losses, sizes: Sequence[int], clip: float) -> list[torch.Tensor]:
    weights = torch.tensor([1 / size for size in sizes for _ in range(size)])
    found = module.clipped_sum(sizes, lambda network: (losses(network, slice(0, sum(sizes))) * weights).sum(), clip)
    return list(found.values())


def distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Relative, over all parameters."""
    gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(left, right, strict=True))
    return math.sqrt(gap / sum(float(b.double().square().sum()) for b in right))


@pytest.mark.parametrize("adapter", ["lora", "all-linear", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_clipped_sum_is_the_loops(family: str, adapter: str) -> None:
    network, losses = build(family, adapter), losses_for(family)
    expected = [(sizes, *by_loop(network, losses, sizes)) for sizes in (SINGLES, ENTITIES, [ROWS])]
    module = SingleBackwardModule(network)
    for sizes, right, clip in expected:
        assert distance(in_one(module, losses, sizes, clip), right) <= 2e-6
        assert all(parameter.grad is None for parameter in network.parameters())
    # a bound that nobody reaches: every tensor has its whole gradient, so none is left out
    right, _ = by_loop(network, losses, SINGLES, math.inf)
    for ours, theirs in zip(in_one(module, losses, SINGLES, math.inf), right, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5)  # of numbers of 1 to 4, in 32 bits, by any processor


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("adapter", ["lora", "all-linear", "full"])
@pytest.mark.parametrize("family", ["bert", "bert-tokens", "roberta"])
def test_packed_batches(family: str, adapter: str, reentrant: bool | None) -> None:
    """Where the layers compute no padding, with gradient checkpointing too."""
    network: Any = build(family, adapter)
    losses = losses_for(family)
    expected = [(sizes, *by_loop(network, losses, sizes)) for sizes in (SINGLES, ENTITIES, [ROWS])]
    packing = run_lean(TunedModel(network, {}, frozenset()), pack=True)
    assert packing.on
    if reentrant is not None:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        network.enable_input_require_grads()
    module = SingleBackwardModule(network, packing)
    for sizes, right, clip in expected:
        assert distance(in_one(module, losses, sizes, clip), right) <= 2e-6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("family", "adapter"), [("bert", "all-linear"), ("bert", "full"), ("llama-tied", "full"), ("gpt2", "lora"), ("t5", "full")]
)
def test_gradient_checkpointing(family: str, adapter: str, reentrant: bool) -> None:
    network: Any = build(family, adapter)
    losses = losses_for(family)
    right, clip = by_loop(network, losses, ENTITIES)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    network.enable_input_require_grads()
    module = SingleBackwardModule(network)
    assert distance(in_one(module, losses, ENTITIES, clip), right) <= 2e-6


@pytest.mark.parametrize("adapter", ["lora", "all-linear", "full"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("t5")])
def test_layers_that_run_again(family: str, adapter: str) -> None:
    """By our own checkpointing, which goes with every layer's own arguments: caches, masks, position embeddings."""
    network, losses = build(family, adapter), losses_for(family)
    right, clip = by_loop(network, losses, ENTITIES)
    checkpoint_layers(TunedModel(network, {}, frozenset()))
    assert distance(in_one(SingleBackwardModule(network), losses, ENTITIES, clip), right) <= 2e-6


@pytest.mark.parametrize("adapter", ["all-linear", "full"])
@pytest.mark.parametrize("family", ["bert", "llama-tied", "gemma", "gpt2"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_sixteen_bits(family: str, adapter: str, how: str) -> None:
    """Sums and norms are as near to the 32-bit ones as autograd's own 16-bit gradients are, and each unit's bound holds in 32 bits."""
    network, losses = build(family, adapter), losses_for(family)
    right, clip = by_loop(network, losses, SINGLES)
    if how == "bfloat16":
        network = network.to(torch.bfloat16)
        inside: Losses = losses
    else:

        def inside(network: nn.Module, rows: slice) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return losses(network, rows)

    theirs = distance(by_loop(network, inside, SINGLES, clip)[0], right)
    module = SingleBackwardModule(network)
    found = in_one(module, inside, SINGLES, clip)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert distance(found, right) <= max(2 * theirs, 0.02)
    tight = clip / 100
    for row in range(ROWS):
        alone = module.clipped_sum([1], lambda network, row=row: inside(network, slice(row, row + 1)).sum(), tight)
        assert math.sqrt(sum(float(part.square().sum()) for part in alone.values())) == pytest.approx(tight, rel=1e-5)


def test_dropout_of_the_adapter_is_drawn_once_a_row() -> None:
    """The same masks as autograd's from the same seed: Opacus' hooks, on the same batch, agree."""
    found = []
    for kind in (SingleBackwardModule, HooksModule):
        network, losses = build("bert", "all-linear", dropout=0.4), losses_for("bert")
        module = kind(network)
        torch.manual_seed(11)
        found.append(in_one(module, losses, ENTITIES, 0.1))
        module.remove_hooks()
    assert distance(*found) <= 2e-6


@pytest.mark.parametrize("sizes", [SINGLES, ENTITIES], ids=["singles", "entities"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("family", "adapter"), [("llama-tied", "full"), ("bert", "all-linear")])
def test_a_unit_that_is_not_finite_counts_as_zero_and_touches_no_other(family: str, adapter: str, bad: float, sizes: list[int]) -> None:
    network, losses = build(family, adapter), losses_for(family)
    first = slice(0, sizes[0])
    module = SingleBackwardModule(network)

    def spoilt(factor: float) -> dict[nn.Parameter, torch.Tensor]:
        factors = torch.ones(ROWS)
        factors[first] = factor
        return module.clipped_sum(sizes, lambda network: (losses(network, slice(0, ROWS)) * factors).sum(), 0.5)

    found, without = spoilt(bad), spoilt(0.0)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert distance(list(found.values()), list(without.values())) <= 1e-6


@pytest.mark.parametrize("adapter", ["all-linear", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_step_in_flight_nothing_has_changed(family: str, adapter: str) -> None:
    network, losses = build(family, adapter), losses_for(family)

    def observed() -> list[torch.Tensor]:
        """Losses with and without gradients, and plain gradients, bit for bit."""
        network.zero_grad()
        value = losses(network, slice(0, ROWS))
        torch.autograd.backward(value.sum())
        with torch.no_grad():
            blind = losses(network.eval(), slice(0, ROWS))
        network.train()
        return [value.detach(), blind, *(p.grad.clone() for p in trained(network) if p.grad is not None)]

    before = observed()
    methods = [set(layer.__dict__) for layer in network.modules()]
    module = SingleBackwardModule(network)
    in_one(module, losses, SINGLES, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, observed(), strict=True))
    module.remove_hooks()
    assert [set(layer.__dict__) for layer in network.modules()] == methods
    assert all(torch.equal(a, b) for a, b in zip(before, observed(), strict=True))


# --- what the families do not show: odd uses of a weight -----------------------------------------------------------------------------


class Small(nn.Module):
    """Layers to be put together in odd ways by a test's own forward pass."""

    def __init__(self, way: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(VOCABULARY, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self._way = way

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._way(self, ids)


def small_losses(network: nn.Module, rows: slice) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (ROWS, 4), generator=torch.Generator().manual_seed(1))[rows]
    found: torch.Tensor = (network(ids) ** 2).flatten(1).mean(1)
    return found


ODD = {
    "one layer three times": lambda m, ids: m.head(m.inner(m.inner(m.norm(m.inner(m.norm(m.table(ids))))))),
    "one table twice": lambda m, ids: m.head(m.table(ids) * m.table(ids.flip(1))),
    "a row of one vector": lambda m, ids: m.head(m.inner(m.table(ids).sum(1))),
    "a detached path": lambda m, ids: m.head(m.norm(m.inner(m.table(ids)).detach() + m.table(ids))),
    "all detached but the head": lambda m, ids: m.head(m.inner(m.table(ids)).detach()),
    "what comes once for all rows": lambda m, ids: m.head(m.norm(m.table(ids) + m.inner(m.table(torch.arange(4).unsqueeze(0))))),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ODD)
@pytest.mark.parametrize("sizes", [SINGLES, ENTITIES], ids=["singles", "entities"])
def test_odd_uses_of_a_weight(way: str, tied: bool, sizes: list[int]) -> None:
    network = Small(ODD[way])
    if tied:
        network.head.weight = network.table.weight
    right, clip = by_loop(network, small_losses, sizes)
    assert distance(in_one(SingleBackwardModule(network), small_losses, sizes, clip), right) <= 2e-6


@pytest.mark.parametrize("long", [4, 40])
@pytest.mark.parametrize("whole", [0.0, 1e9])
def test_each_way_to_a_norm_gives_the_same(whole: float, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients made at once, norms by Gram matrices, and norms of long rows one at a time; tied with an embedding and not."""
    monkeypatch.setattr("lichen.common.privacy.single_backward.book.WHOLE_BELOW", whole)

    def losses(network: nn.Module, rows: slice) -> torch.Tensor:
        ids = torch.randint(VOCABULARY, (ROWS, long), generator=torch.Generator().manual_seed(1))[rows]
        found: torch.Tensor = (network(ids) ** 2).flatten(1).mean(1)
        return found

    for tied in (False, True):
        network = Small(ODD["one layer three times"])
        if tied:
            network.head.weight = network.table.weight
        for sizes in (SINGLES, ENTITIES):
            right, clip = by_loop(network, losses, sizes)
            assert distance(in_one(SingleBackwardModule(network), losses, sizes, clip), right) <= 2e-6


@pytest.mark.parametrize("tokens", [8, 400])  # norms by Gram matrices, and of long rows
def test_tokens_that_cancel_pass_for_no_less_than_they_are(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they cancel to a 10,000th, a Gram matrix in 32 bits has lost the norm, and with it the bound."""
    monkeypatch.setattr("lichen.common.privacy.single_backward.book.WHOLE_BELOW", 0.0)
    network, clip = Small(lambda m, ids: m.head(m.table(ids))), 1e-3
    signs = torch.tensor([-1.0, 1.0002]).repeat(ROWS, tokens // 2).unsqueeze(2)
    ids = torch.randint(VOCABULARY, (ROWS, tokens // 2), generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)

    def losses(network: nn.Module, rows: slice) -> torch.Tensor:
        found: torch.Tensor = (network(ids[rows]) * signs[rows]).sum((1, 2))
        return found

    module = SingleBackwardModule(network)
    for sizes in (SINGLES, ENTITIES):
        right, _ = by_loop(network, losses, sizes, clip)
        assert distance(in_one(module, losses, sizes, clip), right) < 0.1
    for row in range(ROWS):
        alone = module.clipped_sum([1], lambda network, row=row: losses(network, slice(row, row + 1)).sum(), clip)
        assert math.sqrt(sum(float(part.double().square().sum()) for part in alone.values())) <= clip * (1 + 1e-6)


LEAKS = {
    "past its layer": lambda m, ids: F.linear(m.norm(m.table(ids)), m.head.weight),
    "beside its layer": lambda m, ids: m.head(m.table(ids)) + 1e-3 * m.table(ids) @ m.head.weight.t(),
    "a penalty on the weight": lambda m, ids: m.head(m.table(ids)) + m.inner.weight.square().sum(),
}


@pytest.mark.parametrize("way", LEAKS)
def test_a_use_that_nobody_booked_cannot_leak(way: str) -> None:
    """Without the check the last two would train on, their gradient never clipped or left out in silence."""
    network = Small(LEAKS[way])
    module = SingleBackwardModule(network)
    assert "used outside its own layer" in refused(lambda: in_one(module, small_losses, SINGLES, 1.0))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_layers_gradient_never_reaches_grad() -> None:
    """The weights go into the pass detached: even with the check taken out there is nothing to leak."""
    network = Small(ODD["one layer three times"])
    seen: list[Any] = []

    class Watching(SingleBackwardModule):
        def _refuse_leaks(self) -> None:
            seen.extend(parameter.grad for parameter in network.parameters())

    in_one(Watching(network), small_losses, SINGLES, 1.0)
    assert seen
    assert all(gradient is None for gradient in seen)


def test_rows_that_are_folded_into_tokens_are_refused() -> None:
    """As OPT does: a unit's part can't be told apart by the first axis."""
    network = Small(lambda m, ids: m.head(m.inner(m.table(ids).flatten(0, 1))).unflatten(0, ids.shape))
    assert "inner gets a tensor of (24, 6)" in refused(lambda: in_one(SingleBackwardModule(network), small_losses, SINGLES, 1.0))


def test_a_step_that_failed_leaves_the_model_as_it_was() -> None:
    network = Small(ODD["one layer three times"])
    right, clip = by_loop(network, small_losses, SINGLES)
    module = SingleBackwardModule(network)

    def failing(network: nn.Module) -> torch.Tensor:
        torch.autograd.backward(small_losses(network, slice(0, ROWS)).sum())
        raise KeyError("in mid-step")

    with pytest.raises(KeyError):
        module.clipped_sum(SINGLES, failing, clip)
    assert distance(in_one(module, small_losses, SINGLES, clip), right) <= 2e-6


def test_a_backward_after_its_step_is_refused() -> None:
    network = Small(ODD["a row of one vector"])
    module = SingleBackwardModule(network)
    kept: list[torch.Tensor] = []

    def keeping(network: nn.Module) -> torch.Tensor:
        kept.append(small_losses(network, slice(0, ROWS)).sum())
        return small_losses(network, slice(0, ROWS)).sum()

    module.clipped_sum(SINGLES, keeping, 1.0)
    with pytest.raises(LichenError, match="after its private step"):
        torch.autograd.backward(kept[0])


def adapted(**config: Any) -> nn.Module:
    return get_peft_model(FAMILIES["bert"](), LoraConfig(r=2, **{"target_modules": ["query", "value"], **config}))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: adapted(use_dora=True), "query is LoRA as DoraLinearVariant"),
        (lambda: adapted(lora_bias=True), "adapter"),
        (lambda: adapted(bias="lora_only"), "trains its base layer"),
        (lambda: adapted(target_modules=["word_embeddings"]), "word_embeddings is a LoRA Embedding"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4)), "0 is a batch norm"),
        (lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), "0 is a Conv1d"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "0 is a Embedding"),
        (lambda: nn.Sequential(nn.Embedding(4, 4, scale_grad_by_freq=True)), "0 is a Embedding"),
        (lambda: t.BartModel(t.BartConfig(**ROOT, d_model=16, encoder_layers=1, decoder_layers=1)), "BartLearnedPositionalEmbedding"),
        (lambda: nn.Sequential(type("StrangeRMSNorm", (nn.RMSNorm,), {"forward": lambda self, x: x + self.weight})(4)), "StrangeRMSNorm"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(network: Callable[[], nn.Module], named: str) -> None:
    assert named in refused(lambda: SingleBackwardModule(network()))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(LichenError) as caught:
        call()
    assert caught.value.code is Code.MODEL_DP_UNSUPPORTED
    return caught.value.what
