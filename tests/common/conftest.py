"""Tiny randomly initialised models of several architectures, on disk with a tokenizer, as a hub would hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "llama")


def make_architecture(kind: str, directory: Path, words: list[str]) -> Path:
    """Write a base model (no head) of 2 layers and width 16 with a word-level tokenizer; GPT-2 and Llama have no padding token."""
    import torch
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    decoder = kind in {"gpt2", "llama"}
    special = ["<s>", "</s>", "<unk>"] if decoder else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if not decoder:
        raw.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({} if decoder else {"pad_token": "<pad>"})
    t.PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(directory)
    size: dict[str, Any] = {"vocab_size": len(vocabulary)}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    made: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertModel(t.BertConfig(**size, **wide, pad_token_id=1)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**size, **wide, type_vocab_size=1), add_pooling_layer=False),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(**size, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=40, pad_token_id=1)
        ),
        "gpt2": lambda: t.GPT2Model(t.GPT2Config(**size, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=1)),
        "llama": lambda: t.LlamaModel(t.LlamaConfig(**size, **wide, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = made[kind]()
        with torch.no_grad():
            for parameter in model.parameters():  # off their start, where some outputs are all alike
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_models("gpt2")`: the folder of a tiny model of that architecture; see `ARCHITECTURES`."""
    root = tmp_path_factory.mktemp("models")
    words = ["wheat", "corn", "harvest", "gold", "copper", "mine", "bank", "rate", "dollar", "the", "a", "of", "in", "and", "today"]

    def find(kind: str) -> Path:
        return root / kind if (root / kind).exists() else make_architecture(kind, root / kind, words)

    return find
