"""BERT against itself: sizes, patterns, losses, errors. test_bert_huggingface.py has its peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peers import shake
from torch import Tensor
from torch.nn import functional as F

import gdl_kernels
from models.bert.model import IGNORED, PRESETS, Bert, BertForMaskedLM, Config, preset

CONFIG = Config(
    vocabulary=50, context=48, layers=2, heads=4, width=32, hidden=40, dropout=0.0, attention_dropout=0.0
)  # fmt: skip
ENTRIES: dict[str, Any] = {
    "dense": None,
    "local": {"pattern": "local", "window": 5},
    "strided": {"pattern": "strided", "stride": 6},
    "fixed": {"pattern": "fixed", "stride": 8, "summary": 2, "heads": 4, "block_size": 16},
    "each": [{"pattern": "local", "window": 5}, None],
}


def build(entry: Any = None, **changes: Any) -> BertForMaskedLM:
    model = BertForMaskedLM(replace(CONFIG, attention=entry, **changes)).double()
    shake(model)
    return model


def tokens(batch: int = 2, n: int = 40) -> Tensor:
    return torch.randint(1, 50, (batch, n))


#: Of BertModel, from the published weights; and, in millions and with the heads of pretraining, from arXiv 1908.08962.
PUBLISHED = {
    "tiny": (4_385_920, 4.4), "mini": (11_170_560, 11.3), "small": (28_763_648, 29.1), "medium": (41_373_184, 41.7),
    "base": (109_482_240, 110.1), "large": (335_141_888, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        encoder, masked_lm = Bert(preset(name)), BertForMaskedLM(preset(name))
    count, millions = PUBLISHED[name]
    assert sum(p.numel() for p in encoder.parameters()) == count
    with_pooler = sum(p.numel() for p in masked_lm.parameters()) + sum(p.numel() for p in encoder.pooler.parameters())
    next_sentence = 2 * (encoder.config.width + 1)
    assert millions is None or round((with_pooler + next_sentence) / 1e6, 1) == millions
    assert encoder.layers[0].attention.layout is encoder.layers[-1].attention.layout


def test_presets_change_and_are_known() -> None:
    assert preset("base", layers=3, context=None).layers == 3
    assert preset("base", context=None) == PRESETS["base"]
    with pytest.raises(ValueError, match="preset must be one of tiny, mini, small, medium, base, large, got 'huge'"):
        preset("huge")


@pytest.mark.parametrize("n", [40, 48, 7])
@pytest.mark.parametrize("entry", ENTRIES)
def test_our_kernels_and_the_reference_agree(entry: str, n: int) -> None:
    model, given = build(ENTRIES[entry]), tokens(n=n)
    labels = torch.where(torch.rand(given.shape) < 0.4, given, IGNORED)
    labels[:, 2] = given[:, 2]
    padding = torch.zeros_like(given, dtype=torch.bool)
    padding[1, n - 3 :] = True
    types = torch.randint(2, given.shape)
    results = []
    for backend in ("auto", "reference"):
        with gdl_kernels.backend(backend):
            loss = model.loss(given, labels, types, key_padding_mask=padding)
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, ours, reference in zip(["loss", *dict(model.named_parameters())], *results):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("entry", ["dense", "fixed"])
def test_padding_is_seen_by_none(entry: str) -> None:
    model, given = build(ENTRIES[entry]), tokens()
    padding = torch.zeros_like(given, dtype=torch.bool)
    padding[:, 30:] = True
    found = model(given, key_padding_mask=padding)[:, :30]
    other = torch.cat([given[:, :30], tokens()[:, 30:]], 1)
    torch.testing.assert_close(model(other, key_padding_mask=padding)[:, :30], found, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(other)[:, :30], found, atol=1e-3)


def test_the_loss_is_that_of_labelled_positions() -> None:
    model, given = build(), tokens()
    labels = torch.where(torch.rand(given.shape) < 0.4, tokens(), IGNORED)
    labels[0, 0] = 3
    expected = F.cross_entropy(model(given).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(model.loss(given, labels), expected, rtol=1e-12, atol=1e-12)


def test_begins_as_published() -> None:
    model = BertForMaskedLM(replace(CONFIG, width=256, hidden=512, vocabulary=300))
    assert (model.bert.embeddings.word.weight[0] == 0).all()
    inner = model.bert.layers[0].attention.qkv.weight
    for weight in (model.bert.embeddings.word.weight[1:], inner, model.transform.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_dropout_is_of_training_only() -> None:
    model = BertForMaskedLM(replace(CONFIG, attention_dropout=0.5)).eval()
    given = tokens()
    assert torch.equal(model(given), model(given))
    model.train()
    assert not torch.equal(model(given), model(given))


def configured(**changes: Any) -> Callable[[], Any]:
    return lambda: Bert(replace(CONFIG, **changes))


def called(*arguments: Any, **named: Any) -> Callable[[], Any]:
    return lambda: build()(*arguments, **named)


ONES = torch.ones(2, 9, dtype=torch.long)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "width": (configured(width=30), "width must be a multiple of the 4 heads, got 30"),
    "layers": (configured(layers=0), "layers must be a whole number of at least 1, got 0"),
    "heads": (configured(heads=True), "heads must be a whole number of at least 1, got True"),
    "dropout": (configured(dropout=1.0), "dropout must be from 0 up to, not including, 1, got 1.0"),
    "attention dropout": (configured(attention_dropout=-0.1), "attention_dropout must be from 0 .* got -0.1"),
    "eps": (configured(eps=0.0), "eps must be positive, got 0.0"),
    "token types": (configured(token_types=0), "token_types must be a whole number of at least 1, got 0"),
    "padding": (configured(padding=50), "padding must be a token from 0 to 49, got 50"),
    "pattern": (configured(attention={"pattern": "diagonal"}), "attention must be .*one of local, strided, fixed, sl"),
    "no pattern": (configured(attention="local"), "attention must be .* got 'local'"),
    "number": (configured(attention=5), "attention must be .* got 5"),
    "count": (configured(attention=[None] * 3), "attention must have an entry for each of the 2 layers, got .None, N"),
    "argument": (configured(attention={"pattern": "local", "window": 0}), "window must be at least 1, got 0"),
    "sinks": (configured(attention={"pattern": "sliding_with_sinks", "window": 5, "sinks": 1}), "is causal, and this"),
    "per head": (configured(attention={**ENTRIES["fixed"], "heads": 3}), "layout must have 1 head or as many .* 4"),
    "too large": (called(torch.tensor([[3, 50]])), "tokens must be from 0 to 49, got 50"),
    "negative": (called(torch.tensor([[3, -1]])), "tokens must be from 0 to 49, got -1"),
    "shape": (called(torch.ones(3, dtype=torch.long)), r"tokens must be \(batch, positions\).* got shape \(3,\)"),
    "none": (called(torch.ones(3, 0, dtype=torch.long)), r"at least one of these, got shape \(3, 0\)"),
    "dtype": (called(torch.ones(2, 9)), "tokens must be an int64 tensor, got torch.float32"),
    "list": (called([[1]]), "tokens must be an int64 tensor, got list"),
    "length": (called(torch.ones(1, 49, dtype=torch.long)), "tokens must end within the 48 positions .* end at 49"),
    "type": (called(ONES, ONES * 2), "token_types must be from 0 to 1, got 2"),
    "types": (called(ONES, ONES[:, :8]), r"token_types must have the shape of tokens, \(2, 9\), got \(2, 8\)"),
    "mask": (called(ONES, key_padding_mask=ONES[:, :8] > 1), r"key_padding_mask must be \(2, 9\), got shape \(2, 8\)"),
    "labels": (lambda: build().loss(ONES, ONES * 50), "labels must be from 0 to 49, got 50"),
    "no label": (lambda: build().loss(ONES, ONES * IGNORED), r"labels must .* label at least one position"),
    "labels' shape": (lambda: build().loss(ONES, ONES[:1]), r"labels must have the shape of .* got shape \(1, 9\)"),
    "pooler": (lambda: build().bert.pool(torch.zeros(1, 2, 32)), "has no pooler: it was made with pooler=False"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_of_transformers_is_not_ours() -> None:
    with pytest.raises(TypeError, match=r"key_padding_mask must be a bool tensor, True .*, got torch\.int64"):
        build()(ONES, key_padding_mask=ONES)
