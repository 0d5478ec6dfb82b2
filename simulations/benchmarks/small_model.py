"""A model of one million parameters, with random weights: of the size that phones train, where calling layers takes longer than they do."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 4096


def make_small_model(folder: Path, layers: int = 2, width: int = 128) -> Path:
    """Write BERT-tiny's two layers of width 128 (Turc et al. 2019) over a WordPiece vocabulary of R8's training texts.

    Args:
        folder: made if it is not there.
        layers: for a larger one.
        width: the same; a multiple of 64.

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
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
