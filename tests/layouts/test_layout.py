"""The layout as an object: errors of its constructors, copies, devices, torch.compile, pictures."""

from __future__ import annotations

import builtins
import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout, _plot


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: layouts.causal(64, block_size=48), ValueError, "block_size must be one of 16, 32, 64, 128, got 48"),
        (lambda: layouts.from_mask(torch.ones(4, 4).bool(), block_size=8), ValueError, "block_size must be"),
        (lambda: layouts.from_blocks(torch.ones(4, 4).bool(), block_size=0), ValueError, "block_size must be"),
        (lambda: layouts.causal(0), ValueError, "n must be from 1 to 2147483647, got 0"),
        (lambda: layouts.local(-3, 2), ValueError, "n must be from 1 to"),
        (lambda: layouts.causal(2**31), ValueError, "n must be from 1 to 2147483647, got 2147483648"),
        (lambda: layouts.causal(64.0), TypeError, "n must be an integer, got 64.0"),
        (lambda: layouts.causal(True), TypeError, "n must be an integer, got True"),
        (lambda: layouts.full(0, 5), ValueError, "n_q must be from 1"),
        (lambda: layouts.full(5, 0), ValueError, "n_k must be from 1"),
        (lambda: layouts.local(64, 0), ValueError, "window must be at least 1, got 0"),
        (lambda: layouts.local(64, torch.tensor(3)), TypeError, r"window must be an integer, got tensor\(3\)"),
        (lambda: layouts.strided(64, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: layouts.fixed(64, 0, 1), ValueError, "stride must be at least 1, got 0"),
        (lambda: layouts.fixed(64, 8, 9), ValueError, "summary must be from 1 to 8, got 9"),
        (lambda: layouts.fixed(64, 8, 0), ValueError, "summary must be from 1 to 8, got 0"),
        (lambda: layouts.fixed(64, 8, 2, heads=0), ValueError, "heads must be at least 1, got 0"),
        (lambda: layouts.fixed(64, 8, 2, part="both"), ValueError, "part must be 'merged', 'local' or 'summary', got"),
        (lambda: layouts.sliding_with_sinks(64, 0, 4), ValueError, "window must be at least 1, got 0"),
        (lambda: layouts.sliding_with_sinks(64, 4, -1), ValueError, "sinks must be at least 0, got -1"),
        (lambda: layouts.from_mask(torch.ones(4, 4)), TypeError, "mask must be bool, .* got torch.float32"),
        (lambda: layouts.from_mask([[True]]), TypeError, "mask must be a tensor, got list"),
        (lambda: layouts.from_mask(torch.ones(4).bool()), ValueError, r"mask must be .* got shape \(4,\)"),
        (lambda: layouts.from_mask(torch.ones(2, 0, 4).bool()), ValueError, r"mask must be .* got shape \(2, 0, 4\)"),
        (lambda: layouts.from_blocks(torch.ones(1, 2, 3, 4).bool()), ValueError, r"blocks must be .* \(1, 2, 3, 4\)"),
        (lambda: layouts.from_blocks(torch.ones(4, 4)), TypeError, "blocks must be bool"),
        # 2**36 blocks: refused before anything of that size is allocated.
        (lambda: layouts.full(2**22, block_size=16), ValueError, "at most 2147483647 blocks; .* make it 68719476736"),
    ],
)
def test_bad_input(build: Callable[[], Layout], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_too_many_blocks_over_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts.causal(256)  # 10 blocks
    heads = layouts.per_head([layouts.local(256, 1)] * 3)
    monkeypatch.setattr("gdl_kernels.layouts._build.INT32_MAX", 39)
    with pytest.raises(ValueError, match=r"at most 39 blocks; .* 4 heads in blocks of 64 would make it 40"):
        layouts.per_head([layout] * 4)
    with pytest.raises(ValueError, match=r"3 heads in blocks of 64 would make it 42"):
        _ = layout | heads


@pytest.fixture
def layout() -> Layout:
    return layouts.per_head([layouts.fixed(300, 64, 16), layouts.strided(300, 9)])


def test_repr() -> None:
    shown = "Layout(128 x 128, block_size=64, heads=1, density=50.391%, kept_blocks=3, causal, cpu)"
    assert repr(layouts.causal(128)) == shown


def test_copies_leave_the_dense_mask_behind(layout: Layout) -> None:
    mask = layout.dense_mask()
    assert layout.dense_mask() is mask
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert "_dense" not in other.__dict__
        assert torch.equal(other.to_mask(), mask)
        assert (other.n_q, other.causal, other.heads) == (layout.n_q, layout.causal, layout.heads)


def test_to(layout: Layout) -> None:
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())
    assert (moved.n_q, moved.block_size, moved.causal) == (layout.n_q, layout.block_size, layout.causal)


def test_to_mask_is_the_callers_own(layout: Layout) -> None:
    kept = layout.to_mask()
    kept.zero_()
    assert layout.to_mask().any()


def test_a_compiled_function_takes_a_layout(layout: Layout) -> None:
    def read(x: torch.Tensor, layout: Layout) -> torch.Tensor:
        scale = 2.0 if layout.causal else 3.0
        return x * scale + layout.n_q + layout.q_blocks + sum(t.sum() for t in layout.tensors())

    x = torch.randn(5, dtype=torch.float64)
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, layout), read(x, layout))


@pytest.mark.parametrize("n", [50, 1000, 5000])
def test_cells_are_exact(n: int) -> None:
    mask = torch.stack([torch.rand(n, n + 9) < 0.4, torch.rand(n, n + 9) < 0.001])
    mask[:, : n // 2, : n // 2] = True
    share, blocks = _plot.cells(layouts.from_mask(mask, block_size=16), most=20)
    side = 16 * blocks
    assert max(share.shape[1:]) <= 20
    for head, row, column in ((0, 0, 0), (0, -1, -1), (1, -1, 0), (1, 0, -1), (1, share.shape[1] // 2, 1)):
        top, left = row % share.shape[1] * side, column % share.shape[2] * side
        assert share[head, row, column] == mask[head, top : top + side, left : left + side].double().mean()


def test_plot_writes_a_picture(layout: Layout, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "layout.png"
    figure = layout.plot(path)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["head 0", "head 1"]
    assert figure.axes[0].get_xlabel() == "key place"
    assert [p.name for p in tmp_path.iterdir()] == ["layout.png"]
    colours = {colour for _, colour in Image.open(path).convert("RGB").getcolors(2**24)}
    assert tuple(round(255 * part) for part in _plot._FULL) in colours


def test_plot_leaves_no_half_written_file(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layout.png"
    path.write_bytes(b"older")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        layout.plot(path)
    assert [p.name for p in tmp_path.iterdir()] == ["layout.png"]
    assert path.read_bytes() == b"older"


def test_plot_without_matplotlib(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        layout.plot()
