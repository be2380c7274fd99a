"""GPT-2 against itself: sizes, patterns, the cache, errors. test_gpt2_huggingface.py has its peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peers import shake
from torch import Tensor

import gdl_kernels
from models.gpt2.model import GPT2, PRESETS, Config, next_token_loss, preset

CONFIG = Config(
    vocabulary=50, context=48, layers=2, heads=4, width=32, hidden=40, dropout=0.0, attention_dropout=0.0
)  # fmt: skip
ENTRIES: dict[str, Any] = {
    "dense": None,
    "local": {"pattern": "local", "window": 5},
    "strided": {"pattern": "strided", "stride": 6},
    "fixed": {"pattern": "fixed", "stride": 8, "summary": 2, "heads": 4, "block_size": 16},
    "sinks": {"pattern": "sliding_with_sinks", "window": 5, "sinks": 2},
    "each": [{"pattern": "local", "window": 5}, None],
}


def build(entry: Any = None, **changes: Any) -> GPT2:
    model = GPT2(replace(CONFIG, attention=entry, **changes)).double()
    shake(model)
    return model


def tokens(batch: int = 2, n: int = 40) -> Tensor:
    return torch.randint(50, (batch, n))


#: Parameters of the published weights.
PUBLISHED = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = GPT2(preset(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert model.attention[0].layout is model.attention[-1].layout


def test_presets_change_and_are_known() -> None:
    assert set(PRESETS) == {"tiny", *PUBLISHED}
    assert preset("xl", layers=3, context=None).layers == 3
    with pytest.raises(ValueError, match="preset must be one of tiny, small, medium, large, xl, got 'huge'"):
        preset("huge")


@pytest.mark.parametrize("n", [40, 48, 7])
@pytest.mark.parametrize("entry", ENTRIES)
def test_our_kernels_and_the_reference_agree(entry: str, n: int) -> None:
    model, given = build(ENTRIES[entry]), tokens(n=n)
    results = []
    for backend in ("auto", "reference"):
        with gdl_kernels.backend(backend):
            loss = next_token_loss(model, given)
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for name, ours, reference in zip(["loss", *dict(model.named_parameters())], *results):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("entry", ENTRIES)
def test_cached_decoding_is_the_full_forward(entry: str) -> None:
    model, given = build(ENTRIES[entry]), tokens(n=48)
    padding = torch.zeros_like(given, dtype=torch.bool)
    padding[1, :3] = True
    with torch.no_grad():
        full, cache, parts, end = model(given, key_padding_mask=padding), model.cache(batch=2), [], 0
        for part in given.split((20, 1, 7, *[1] * 20), 1):
            end += part.shape[1]
            parts.append(model(part, cache=cache, key_padding_mask=padding[:, :end]))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"tokens must end within the 48 positions .* end at 49"):
        model(given[:, :1], cache=cache)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_token_sees_a_later_one(entry: str) -> None:
    model, given = build(ENTRIES[entry]), tokens()
    other = torch.cat([given[:, :25], tokens()[:, 25:]], 1)
    first, second = model(given), model(other)
    torch.testing.assert_close(first[:, :25], second[:, :25], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first[:, 25:], second[:, 25:], atol=1e-3)


def test_begins_as_published() -> None:
    model = GPT2(replace(CONFIG, width=256, hidden=512, vocabulary=300, layers=8))
    deviations = {"embedding": 0.02, "attention.qkv": 0.02, "attention.out": 0.005, "mlp.0": 0.02, "mlp.2": 0.005}
    for name, expected in deviations.items():
        weight = model.get_parameter(f"{'blocks.7.' * (name != 'embedding')}{name}.weight")
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_dropout_is_of_training_only() -> None:
    model = GPT2(replace(CONFIG, attention_dropout=0.5)).eval()
    given = tokens()
    assert torch.equal(model(given), model(given))
    model.train()
    assert not torch.equal(model(given), model(given))


def configured(**changes: Any) -> Callable[[], Any]:
    return lambda: GPT2(replace(CONFIG, **changes))


def called(*arguments: Any, **named: Any) -> Callable[[], Any]:
    return lambda: build()(*arguments, **named)


ONES = torch.ones(2, 9, dtype=torch.long)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "width": (configured(width=30), "width must be a multiple of the 4 heads, got 30"),
    "pattern": (configured(attention={"pattern": "diagonal"}), "attention must be .*one of local, strided, fixed, sl"),
    "argument": (configured(attention={"pattern": "fixed", "stride": 8, "summary": 9}), "summary must be from 1 to 8"),
    "too large": (called(torch.tensor([[3, 50]])), "tokens must be from 0 to 49, got 50"),
    "negative": (called(torch.tensor([[3, -1]])), "tokens must be from 0 to 49, got -1"),
    "shape": (called(torch.ones(3, dtype=torch.long)), r"tokens must be \(batch, positions\).* got shape \(3,\)"),
    "dtype": (called(torch.ones(2, 9)), "tokens must be an int64 tensor, got torch.float32"),
    "length": (called(torch.ones(1, 49, dtype=torch.long)), "tokens must end within the 48 positions .* end at 49"),
    "mask": (called(ONES, key_padding_mask=ONES[:, :8] > 1), r"key_padding_mask must be \(2, 9\), got shape \(2, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        call()
