"""A tiny randomly initialised BERT on disk, rows it can learn from, and a plan over it: real runs that take seconds."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lichen.common.plan import Plan

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too: the model is too small to share out
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("LICHEN_DEVICE", "cpu")  # a test of a GPU says so; what compares bits holds on the CPU
os.environ["LICHEN_LEDGER"] = "."  # each home its own: the tests' rows are alike, and the user's ledger is none of their business

ONE_AT_A_TIME = ("e2e", "faults", "client/test_worker.py")
"""Tests of processes that wait for each other, each of which wants a core."""

LABELS = ("crop", "metal", "money")
_TOPIC = {
    "crop": ("wheat", "corn", "harvest", "grain", "farm", "soy", "barley", "rain"),
    "metal": ("gold", "copper", "mine", "ore", "silver", "zinc", "smelter", "steel"),
    "money": ("bank", "rate", "dollar", "bond", "yen", "loan", "credit", "trade"),
}
_COMMON = ("the", "a", "of", "in", "and", "today", "said", "was", "price", "up", "down", "new", "year", "more")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side (`-n 2 --dist loadgroup`), a file's stay together, and those of processes follow one another."""
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here).as_posix()
        alone = file.startswith(ONE_AT_A_TIME)
        item.add_marker(pytest.mark.xdist_group("processes" if alone else file))


def make_model(directory: Path) -> Path:
    """Write a BERT of 2 layers and width 32 with a WordPiece tokenizer over the rows' words; always the same weights."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_COMMON, *(word for topic in _TOPIC.values() for word in topic)]
    words += [f"##{chr(letter)}" for letter in range(ord("a"), ord("z") + 1)]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(directory / "vocab.txt"), do_lower_case=True).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    return directory


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows of ``text`` and ``label``, the labels in turn; other seeds give other rows."""
    draw = random.Random(seed)
    rows = []
    for index in range(n):
        label = LABELS[index % len(LABELS)]
        words = draw.choices(_TOPIC[label], k=draw.randint(2, 4)) + draw.choices(_COMMON, k=draw.randint(2, 5))
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, as `model.base` names it."""
    return make_model(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def tiny_rows() -> Callable[..., list[dict[str, str]]]:
    """`tiny_rows(n, seed=0)`: rows of ``text`` and ``label``."""
    return make_rows


@pytest.fixture
def tiny_plan(tiny_model: Path) -> dict[str, Any]:
    """A valid plan without privacy over the tiny model, as a dict to change: two rounds of two clients."""
    return {
        "name": "tiny",
        "seed": 1,
        "rounds": 2,
        "task": {"labels": list(LABELS), "max_length": 32},
        "model": {"base": str(tiny_model), "adapter": {"kind": "lora", "rank": 2}},
        "cohort": {"size": 2, "minimum": 2, "deadline_s": 60},
        "local": {"steps": 4, "batch_size": 8, "learning_rate": 0.01},
    }


@pytest.fixture(scope="session")
def older_text() -> Callable[[Plan], str]:
    """`older_text(plan)`: the text of a plan without `simulation.speeds`, from a lichen that does not know that key."""

    def text(plan: Plan) -> str:
        document = json.loads(plan.canonical_json())
        del document["simulation"]["speeds"]
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    return text
