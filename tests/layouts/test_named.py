"""Layouts from plain data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout, _named


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_named, "_registered", {})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("entry", "build"),
    [
        ({"pattern": "local", "window": 9}, partial(layouts.local, 100, 9)),
        ({"pattern": "strided", "stride": 7, "block_size": 16}, partial(layouts.strided, 100, 7, block_size=16)),
        ({"pattern": "fixed", "stride": 9, "summary": 2, "heads": 3}, partial(layouts.fixed, 100, 9, 2, heads=3)),
        (None, lambda causal: layouts.causal(100) if causal else layouts.full(100)),
    ],
    ids=["local", "strided", "fixed", "no entry"],
)  # fmt: skip
def test_the_pattern_of_that_name(entry: dict[str, Any] | None, build: Callable[..., Layout], causal: bool) -> None:
    found = layouts.named(100, entry, causal=causal)
    assert torch.equal(found.to_mask(), build(causal=causal).to_mask())
    assert found.block_size == (entry or {}).get("block_size", 64)
    assert layouts.named(100, entry, causal=causal) is found
    assert layouts.named(99, entry, causal=causal) is not found


def test_sinks_are_causal() -> None:
    entry = {"pattern": "sliding_with_sinks", "window": 9, "sinks": 2}
    assert torch.equal(layouts.named(100, entry).to_mask(), layouts.sliding_with_sinks(100, 9, 2).to_mask())
    with pytest.raises(ValueError, match="'sliding_with_sinks' is causal, and this model's attention is not"):
        layouts.named(100, entry, causal=False)


def test_a_name_may_be_given_anew() -> None:
    entry = {"pattern": "mine", "window": 3}
    layouts.register_pattern("mine", lambda n, *, causal, window: layouts.local(n, window, causal=causal))
    assert torch.equal(layouts.named(50, entry).to_mask(), layouts.local(50, 3).to_mask())
    layouts.register_pattern("mine", lambda n, *, causal, window: layouts.causal(n))
    assert torch.equal(layouts.named(50, entry).to_mask(), layouts.causal(50).to_mask())


def test_layouts_are_built_on_the_cpu_whatever_the_default_device_is() -> None:
    _named._built.cache_clear()
    _named._dense.cache_clear()
    with torch.device("meta"):
        for entry in ({"pattern": "local", "window": 5}, {"pattern": "strided", "stride": 8}, None):
            assert layouts.named(70, entry).device == torch.device("cpu")


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: layouts.named(9, {"pattern": "diagonal"}), "entry must be .*one of local, strided, fixed, s"),
    "no mapping": (lambda: layouts.named(9, "local", argument="attention"), "^attention must be .* got 'local'"),  # type: ignore[arg-type]
    "causal": (lambda: layouts.named(9, {"pattern": "local", "causal": True}), "entry must not say 'causal'"),
    "argument": (lambda: layouts.named(9, {"pattern": "local", "window": 0}), "window must be at least 1, got 0"),
    "unknown": (lambda: layouts.named(9, {"pattern": "local", "window": 3, "size": 3}), "entry: the pattern 'local' has"
                " other arguments: got an unexpected keyword argument 'size'"),
    "missing": (lambda: layouts.named(9, {"pattern": "sliding_with_sinks", "window": 3}), "missing a required argument:"
                " 'sinks'"),
    "n": (lambda: layouts.named(0, None), "n must be at least 1|n must be from 1 to"),
    "future": (lambda: mine(layouts.full), "entry: the pattern 'mine' sees later positions, and this model's"),
    "length": (lambda: mine(lambda n: layouts.causal(n + 1)), "'mine' must give a layout of 9 positions"),
    "no layout": (lambda: mine(lambda n: None), "must give a layout of 9 positions, got None"),
    "own": (lambda: layouts.register_pattern("local", layouts.local), "must not be a pattern of gdl_kernels, local"),
}  # fmt: skip


def mine(build: Callable[[int], Any]) -> Any:
    layouts.register_pattern("mine", lambda n, causal: build(n))
    return layouts.named(9, {"pattern": "mine"})


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        call()


def test_types() -> None:
    with pytest.raises(TypeError, match="name must be a string, got int"):
        layouts.register_pattern(3, layouts.local)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="build must be callable, got str"):
        layouts.register_pattern("mine", "local")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="window must be an integer, got '3'"):
        layouts.named(9, {"pattern": "local", "window": "3"})
