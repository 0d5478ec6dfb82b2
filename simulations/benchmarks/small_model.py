"""A model of one million parameters, with random weights: of the size that phones train, where calling layers takes longer than they do."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 4096


def make_small_model(folder: Path) -> Path:
    """Write BERT-tiny's two layers of width 128 (Turc et al. 2019) over a WordPiece vocabulary of R8's training texts.

    Returns:
        ``folder``, as `model.base` names it; always the same weights.
    """
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils import logging

    from lichen.simulations.datasets import load_named

    logging.disable_progress_bar()
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator((row["text"] for row in load_named("r8").train), vocab_size=VOCABULARY, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    pieces.save_model(str(folder))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
