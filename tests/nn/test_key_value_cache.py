"""KeyValueCache: what it holds, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdl_kernels.nn import KeyValueCache


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def filled(lengths: tuple[int, ...] = (3, 1, 2), batch: int = 2) -> tuple[KeyValueCache, Tensor, Tensor]:
    cache = KeyValueCache(batch, 3, 8, 4)
    keys, values = (torch.randn(batch, 3, sum(lengths), 4) for _ in range(2))
    for key, value in zip(keys.split(lengths, 2), values.split(lengths, 2)):
        cache.extend(key, value)
    return cache, keys, values


def test_it_holds_what_it_was_given_where_it_was_put() -> None:
    cache, keys, values = filled()
    key, value = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    all_keys, all_values = cache.extend(key, value)
    assert torch.equal(all_keys, torch.cat([keys, key], 2))
    assert torch.equal(all_values, torch.cat([values, value], 2))
    assert all_keys.data_ptr() == cache.keys.data_ptr()  # views: the old are not copied
    assert all_values.data_ptr() == cache.values.data_ptr()
    assert cache.length == cache.capacity == 8


def test_reset_forgets_all_or_the_last() -> None:
    cache, keys, _ = filled()
    cache.reset(4)
    new = torch.randn(2, 3, 1, 4)
    assert torch.equal(cache.extend(new, new)[0], torch.cat([keys[:, :, :4], new], 2))
    cache.reset()
    assert cache.length == 0
    for length in (-1, 1):
        with pytest.raises(ValueError, match=f"length must be from 0 to 0, what the cache holds, got {length}"):
            cache.reset(length)


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0, 0, 1, 1, 1], [0], []], ids=str)
def test_select_goes_on_with_some_sequences(index: list[int]) -> None:
    cache, keys, values = filled()
    cache.select(torch.tensor(index, dtype=torch.int64))
    new = torch.randn(len(index), 3, 1, 4)
    all_keys, all_values = cache.extend(new, new)
    assert torch.equal(all_keys, torch.cat([keys[index], new], 2))
    assert torch.equal(all_values, torch.cat([values[index], new], 2))
    assert cache.capacity == 8


def test_its_repr_says_what_it_is() -> None:
    cache, _, _ = filled()
    expected = "KeyValueCache(batch=2, heads=3, capacity=8, head_dim=4, length=6, dtype=torch.float32, device='cpu')"
    assert repr(cache) == expected


KEY = torch.randn(2, 3, 1, 4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: KeyValueCache(1, 0, 8, 4), ValueError, "heads must be at least 1, got 0"),
        (lambda c: KeyValueCache(-1, 1, 8, 4), ValueError, "batch must be at least 0, got -1"),
        (lambda c: KeyValueCache(1, 1, 8.0, 4), TypeError, "capacity must be an integer, got 8.0"),
        (lambda c: c.extend(KEY[0], KEY), ValueError, r"key must be \(batch, heads, .* got shape \(3, 1, 4\)"),
        (lambda c: c.extend(KEY[:1], KEY[:1]), ValueError, r"key must be .* batch of 2, .* got shape \(1, 3, 1, 4\)"),
        (lambda c: c.extend(KEY, KEY[:, :2]), ValueError, r"value must be .* 3 heads .* got shape \(2, 2, 1, 4\)"),
        (lambda c: c.extend(KEY, KEY[:, :, :0]), ValueError, r"value must have the shape of key, \(2, 3, 1, 4\), got"),
        (
            lambda c: c.extend(KEY.double(), KEY),
            TypeError,
            "key must have the cache's dtype, torch.float32, got torch.f",
        ),
        (lambda c: c.extend(KEY, KEY.to("meta")), ValueError, "value must be on the cache's device, cpu, got meta"),
        (lambda c: c.extend(KEY.clone().requires_grad_(), KEY), RuntimeError, "key requires a gradient"),
        (lambda c: c.extend(*[KEY.expand(2, 3, 3, 4)] * 2), ValueError, "cache has room for 8 .* 6, got 3 more"),
        (lambda c: c.select(torch.tensor([0.0])), TypeError, "index must be int64, got torch.float32"),
        (lambda c: c.select(torch.tensor(0)), ValueError, r"index must be \(new batch,\), got shape \(\)"),
        (lambda c: c.select(torch.tensor([0], device="meta")), ValueError, "index must be on the cache's device, cpu"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(
    call: Callable[[KeyValueCache], Any], error: type[Exception], says: str
) -> None:
    cache, keys, values = filled()
    with pytest.raises(error, match=f"^{says}"):
        call(cache)
    assert cache.length == 6
    assert torch.equal(cache.keys[:, :, :6], keys)
    assert torch.equal(cache.values[:, :, :6], values)
