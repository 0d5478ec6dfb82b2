"""Text classification: what pooling computes, losses that depend on their own example alone, metrics, and the head's start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from lichen.common.errors import Code, LichenError
from lichen.common.plan import parse_plan
from lichen.common.tasks import make_task
from lichen.common.tasks.text_classification import ClassificationScores, TextClassification
from lichen.common.tasks.texts import CHARACTERS

Models = Callable[[str], Path]
LABELS = ["crop", "metal", "money"]
WORDS = ["wheat", "corn", "harvest", "gold", "copper", "mine", "bank", "rate", "dollar", "the", "a", "of", "in", "and", "today"]


def built(base: Path, *, pooling: str = "mean", init: str = "random", kind: str = "lora", **task: Any) -> tuple[TextClassification, Any]:
    plan = parse_plan(
        {
            "rounds": 1,
            "task": {"labels": LABELS, "max_length": 32, **task},
            "model": {"base": str(base), "adapter": {"kind": kind, "rank": 2}, "head": {"pooling": pooling, "init": init}},
            "local": {"steps": 1},
        }
    )
    found = make_task(plan)
    assert isinstance(found, TextClassification)
    model = found.build()
    return found, model


@functools.cache
def built_once(base: Path) -> tuple[TextClassification, Any]:
    return built(base)


def rows(task: TextClassification, count: int, seed: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(1, 25))) for _ in range(count)]
    return task.encode({"text": texts, "label": [LABELS[index % 3] for index in range(count)]})


@torch.no_grad()
def test_mean_pooling_is_the_head_on_mean_pooled_features(tiny_models: Models) -> None:
    task, model = built(tiny_models("bert"), kind="head")
    network = model.network.double().eval()
    data = rows(task, 12)
    batch = task.collate(data, range(12))
    assert len(set(data.lengths.tolist())) > 3
    found = task.logits(network, batch)
    for index, ids in enumerate(data.tokens):  # one text at a time, without padding
        features = network.bert(input_ids=torch.from_numpy(ids).long()[None]).last_hidden_state[0].mean(0)
        expected = network.classifier.weight @ features + network.classifier.bias
        assert torch.allclose(found[index], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_padding_and_batch_mates_do_not_change_a_loss(tiny_models: Models, kind: str, pooling: str) -> None:
    task, model = built(tiny_models(kind), pooling=pooling)
    data = rows(task, 9)
    with torch.no_grad():
        together = task.losses(model.network, task.collate(data, range(9)))
        alone = torch.cat([task.losses(model.network, task.collate(data, [index])) for index in range(9)])
        backwards = task.losses(model.network, task.collate(data, range(8, -1, -1))).flip(0)
    assert together.shape == (9,)
    assert float(together.std()) > 0
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(together, backwards, atol=2e-6, rtol=2e-6)


def test_a_loss_has_a_gradient_of_its_own_example_only(tiny_models: Models) -> None:
    task, model = built(tiny_models("bert"))
    data = rows(task, 4)
    parameters = list(model.trainable.values())
    for index in range(4):
        of_batch = torch.autograd.grad(task.losses(model.network, task.collate(data, range(4)))[index], parameters)
        alone = torch.autograd.grad(task.losses(model.network, task.collate(data, [index]))[0], parameters)
        assert all(torch.allclose(left, right, atol=1e-6) for left, right in zip(of_batch, alone, strict=True))


def test_losses_are_cross_entropy(tiny_models: Models) -> None:
    task, model = built(tiny_models("bert"))
    batch = task.collate(rows(task, 5), range(5))
    with torch.no_grad():
        logits = task.logits(model.network, batch).double()
        losses = task.losses(model.network, batch).double()
    expected = torch.logsumexp(logits, 1) - logits[torch.arange(5), batch["labels"]]
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)


def test_encoding(tiny_models: Models) -> None:
    task, _ = built(tiny_models("bert"), max_length=8, text_field="body", label_field="topic")
    assert task.fields == ("body", "topic")
    data = task.encode({"body": ["gold " * 50, "wheat", ""], "topic": ["metal", "crop", "money"]})
    assert data.lengths.tolist() == [8, 3, 2]
    assert data.labels.tolist() == [1, 0, 2]
    assert len(task.encode({"body": [], "topic": []})) == 0
    batch = task.collate(data, [1, 0])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [3, 8]
    assert (batch["input_ids"][0, 3:] == task.tokenizer.pad_token_id).all()
    assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_empty_texts_are_scored_like_any_other(tiny_models: Models, kind: str) -> None:
    task, model = built(tiny_models(kind))
    data = task.encode({"text": ["", "gold bank", ""], "label": ["crop", "metal", "crop"]})
    with torch.no_grad():
        together = task.losses(model.network, task.collate(data, [0, 1, 2]))
        alone = task.losses(model.network, task.collate(data, [0, 2]))
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[[0, 2]], alone, atol=1e-6, rtol=1e-6)


ODD = [
    "gold",
    "[SEP]",
    "e\u0301te\u0301",
    " \u0301",
    "\u4e2d\u6587",
    "a-b.c",
    "\u200d",
    "\t",
    "\n",
    "  ",
    "x" * 230,
    "\U0001f33e",
    "\u00a0",
    "###",
    "1999",
]


@pytest.mark.parametrize("by_words", [True, False])
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=12)), max_size=90), joint=st.sampled_from(["", " "]))
def test_long_texts_are_tokenised_as_if_they_were_read_whole(
    tiny_model: Path, tiny_models: Models, by_words: bool, parts: list[str], joint: str
) -> None:
    task, _ = built_once(tiny_model if by_words else tiny_models("bert"))
    text = joint.join(parts)
    (found,) = task.encode({"text": [text], "label": ["crop"]}).tokens
    assert found.tolist() == task.tokenizer(text, truncation=True, max_length=32)["input_ids"]


def test_what_can_give_no_token_is_not_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built_once(tiny_model)
    read: list[str] = []
    cut = TextClassification._cut

    def seen(self: TextClassification, texts: list[str]) -> list[np.ndarray]:
        read.extend(texts)
        return cut(self, texts)

    monkeypatch.setattr(TextClassification, "_cut", seen)
    few, many = "gold " + "x" * 500 + " mine", "the gold mine " * 100
    assert list(map(len, task.encode({"text": [few, many], "label": ["crop", "crop"]}).tokens))[1] == 32
    assert [few.startswith(text) for text in read] == [True, False, True]  # too few tokens in its first words: read again
    assert len(read[1]) <= CHARACTERS * 32 < len(many)
    assert read[2] == few


def test_a_word_is_read_whole_or_not_at_all(tiny_model: Path) -> None:
    task, _ = built_once(tiny_model)
    text = "gold " * 29 + " " * 43 + "harvest " * 9
    assert text[: CHARACTERS * 32].endswith("harv")
    (found,) = task.encode({"text": [text], "label": ["crop"]}).tokens
    assert found.tolist() == task.tokenizer(text, truncation=True, max_length=32)["input_ids"]


@pytest.mark.parametrize("change", ["left", "added"])
def test_the_end_of_a_text_counts_where_it_is_kept_or_a_token_holds_a_space(tiny_model: Path, change: str) -> None:
    task, _ = built(tiny_model)
    if change == "left":
        task.tokenizer.truncation_side = "left"
    else:
        task.tokenizer.add_tokens(["gold  mine"])
    # cut at six characters a token the last word would be «gold», and the token with a space in it lost
    text = "gold " * 29 + " " * 41 + "gold  mine " + "wheat " * 40
    (found,) = task.encode({"text": [text], "label": ["crop"]}).tokens
    assert found.tolist() == task.tokenizer(text, truncation=True, max_length=32)["input_ids"]


def test_texts_are_read_whole_where_words_may_not_be_tokenised_one_by_one(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built_once(tiny_models("bert"))
    cut, read = TextClassification._cut, list[str]()
    monkeypatch.setattr(TextClassification, "_cut", lambda self, texts: read.extend(texts) or cut(self, texts))
    text = "the gold mine " * 100
    assert len(task.encode({"text": [text], "label": ["crop"]}).tokens[0]) == 32
    assert read == [text]


def test_labels_that_the_plan_does_not_know(tiny_models: Models) -> None:
    task, _ = built(tiny_models("bert"))
    with pytest.raises(LichenError) as caught:
        task.encode({"text": ["x", "y"], "label": ["crop", "Crop"]})
    assert caught.value.code is Code.DATA_LABEL
    assert "Crop" in caught.value.what
    with pytest.raises(LichenError):
        make_task(task.plan).tokenizer  # noqa: B018 - not built yet


def test_made_up_rows_are_like_real_ones_and_nobodys(tiny_models: Models) -> None:
    task, _ = built(tiny_models("gpt2"))
    first, second = task.made_up(6), task.made_up(6)
    assert [ids.tolist() for ids in first.tokens] == [ids.tolist() for ids in second.tokens]
    assert all(3 <= length <= 24 for length in first.lengths)
    assert not {token for row in first.tokens for token in row.tolist()} & set(task.tokenizer.all_special_ids)
    assert set(first.labels.tolist()) <= {0, 1, 2}
    other, again = task.made_up(6, "canaries|1|a"), task.made_up(9, "canaries|1|a")
    assert [ids.tolist() for ids in other.tokens] != [ids.tolist() for ids in first.tokens]
    assert [ids.tolist() for ids in other.tokens] == [ids.tolist() for ids in task.made_up(6, "canaries|1|a").tokens]
    both = task.join(first, again)
    assert [ids.tolist() for ids in both.tokens] == [ids.tolist() for ids in [*first.tokens, *again.tokens]]
    assert both.labels.tolist() == [*first.labels.tolist(), *again.labels.tolist()]


# --- metrics ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_metrics_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, guess = zip(*pairs, strict=True)
    counts = np.zeros((4, 4))
    np.add.at(counts, (list(truth), list(guess)), 1)
    found = ClassificationScores(counts, 2.5 * len(pairs)).metrics()
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
    assert found["loss"] == pytest.approx(2.5)


def test_noised_counts_give_finite_metrics_and_no_loss() -> None:
    found = ClassificationScores(np.array([[-3.0, 1.0], [-2.0, -9.0]]), None).metrics()
    assert set(found) == {"accuracy", "macro_f1"}
    assert all(0 <= value <= 1 for value in found.values())
    assert all(math.isfinite(value) for value in ClassificationScores(np.zeros((2, 2)), 0.0).metrics().values())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_the_same_however_they_are_batched(tiny_models: Models, batch_size: int) -> None:
    task, model = built(tiny_models("bert"))
    data = rows(task, 11)
    scores = task.score(model.network, data, batch_size)
    assert model.network.training
    with torch.no_grad():
        batch = task.collate(data, range(11))
        guess = task.logits(model.network, batch).argmax(1).tolist()
        loss = float(task.losses(model.network, batch).sum())
    assert scores.metrics()["accuracy"] == pytest.approx(accuracy_score(data.labels.tolist(), guess))
    assert scores.loss_sum == pytest.approx(loss, rel=1e-5)
    assert scores.counts.sum() == 11
    # one row changes one entry by one: what the noise is made for
    fewer = task.score(model.network, type(data)(data.tokens[1:], data.labels[1:]), batch_size)
    difference = scores.counts - fewer.counts
    assert (np.abs(difference).sum(), difference.max()) == (1, 1)
    again = task.scores_from(scores.counts.flatten().tolist(), scores.loss_sum)
    assert again.metrics() == scores.metrics()


@pytest.mark.parametrize("counts", [[1.0] * 8, [1.0] * 10, [], [1.0] * 8 + [math.nan], [1.0] * 8 + [math.inf]])
def test_counts_that_are_no_confusion_matrix(tiny_models: Models, counts: list[float]) -> None:
    task, _ = built(tiny_models("bert"))
    with pytest.raises(LichenError) as caught:
        task.scores_from(counts, None)
    assert caught.value.code is Code.FRAME_INVALID


# --- the head's start ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("bert", "pooler"), ("roberta", "pooler"), ("distilbert", "pooler")])
def test_a_head_of_zeros_is_impartial_and_can_learn(tiny_models: Models, kind: str, pooling: str) -> None:
    """Zeros in each layer of a head of several would pass no gradient on, for ever."""
    task, model = built(tiny_models(kind), pooling=pooling, init="zeros")
    batch = task.collate(rows(task, 6), range(6))
    losses = task.losses(model.network, batch)
    torch.testing.assert_close(losses, torch.full((6,), math.log(3)))
    optimizer = torch.optim.SGD(model.trainable.values(), lr=1.0)
    start = model.state()
    for _ in range(3):
        optimizer.zero_grad()
        task.losses(model.network, batch).sum().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state().items() if not torch.equal(tensor, start[name])}
    assert moved == set(model.trainable)


def test_a_head_from_descriptions_knows_them(tiny_models: Models) -> None:
    descriptions = {"crop": "wheat corn harvest", "metal": "gold copper mine", "money": "bank rate dollar"}
    task, model = built(tiny_models("bert"), init="label-descriptions", label_descriptions=descriptions)
    found = task.encode({"text": list(descriptions.values()), "label": LABELS})
    assert task.score(model.network, found, 3).metrics()["accuracy"] == 1.0
    (weight,) = (model.trainable[name] for name in model.head if name.endswith("weight"))
    torch.testing.assert_close(weight.sum(0), torch.zeros(16), atol=1e-6, rtol=0)  # what all descriptions share is left out
    assert float(weight.detach().norm()) > 0.01


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("roberta", "pooler")])
def test_a_head_of_the_base_keeps_what_it_knows_and_takes_new_labels(tiny_models: Models, tmp_path: Path, kind: str, pooling: str) -> None:
    before, old = built(tiny_models(kind), pooling=pooling, kind="head")
    old.network.save_pretrained(tmp_path / "old")
    before.tokenizer.save_pretrained(tmp_path / "old")
    names = ["money", "stocks", "crop", "metal"]  # in another order, and one more
    task, model = built(tmp_path / "old", pooling=pooling, init="base", labels=names)
    texts = {"text": ["gold and copper", "the harvest today"], "label": ["metal", "crop"]}
    with torch.no_grad():
        was = before.logits(old.network, before.collate(before.encode(texts), range(2)))
        now = task.logits(model.network, task.collate(task.encode(texts), range(2)))
    kept = [names.index(label) for label in LABELS]
    torch.testing.assert_close(now[:, kept], was, atol=1e-6, rtol=0)
    assert torch.equal(now[:, names.index("stocks")], torch.zeros(2))
    assert float(was.abs().min()) > 0


def test_a_head_is_taken_from_no_base_that_has_none_of_the_labels(tiny_models: Models, tmp_path: Path) -> None:
    with pytest.raises(LichenError) as caught:
        built(tiny_models("bert"), init="base")
    assert (caught.value.code, caught.value.where) == (Code.MODEL_UNSUPPORTED, "model.head.init")
    before, old = built(tiny_models("bert"), kind="head")
    old.network.save_pretrained(tmp_path / "old")
    before.tokenizer.save_pretrained(tmp_path / "old")
    with pytest.raises(LichenError) as caught:
        built(tmp_path / "old", init="base", labels=["wind", "rain"])
    assert "crop" in caught.value.what
    # the same name and shape, but it reads the pooler's output
    before, old = built(tiny_models("bert"), pooling="pooler", kind="head")
    old.network.save_pretrained(tmp_path / "pooled")
    before.tokenizer.save_pretrained(tmp_path / "pooled")
    with pytest.raises(LichenError) as caught:
        built(tmp_path / "pooled", init="base")
    assert caught.value.where == "model.head.init"
    # a head that starts anew may be for other classes than the base's was
    _, model = built(tmp_path / "old", init="zeros", labels=["wind", "rain"])
    assert {tuple(model.trainable[name].shape) for name in model.head} == {(2, 16), (2,)}
