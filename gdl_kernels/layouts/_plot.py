"""Pictures of layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._algebra import natural_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._layout import Layout

#: Cells a side of one head's picture; larger layouts show several blocks in a cell.
_CELLS = 256
_HEADS_IN_A_ROW = 6

_EMPTY = (1.0, 1.0, 1.0)
_PARTIAL_LOW, _PARTIAL_HIGH = (0.99, 0.87, 0.70), (0.90, 0.42, 0.05)
_FULL = (0.13, 0.27, 0.53)


def cells(layout: Layout, most: int = _CELLS) -> tuple[Tensor, int]:
    """The share of pairs that each cell keeps, float64 ``(heads, rows, columns)``, and the blocks on a cell's side.

    Of a layout without ``rest``, in its order.
    0 is a cell that keeps nothing and 1 one that keeps everything, exactly; rows and columns are at most ``most``.
    """
    blocks = -(-max(layout.q_blocks, layout.k_blocks) // most)
    rows, columns = -(-layout.q_blocks // blocks), -(-layout.k_blocks // blocks)
    head, row = layout._rows_of_blocks()
    cell = (head * rows + row // blocks) * columns + layout.rows.blocks // blocks
    kept = torch.zeros(layout.heads * rows * columns, dtype=torch.int64, device=layout.device)
    kept.index_add_(0, cell, layout._pairs_of_blocks())
    side = blocks * layout.block_size
    queries = (layout.n_q - torch.arange(rows) * side).clamp(max=side)
    keys = (layout.n_k - torch.arange(columns) * side).clamp(max=side)
    return kept.view(layout.heads, rows, columns).cpu() / (queries[:, None] * keys).double(), blocks


def plot(layout: Layout, path: str | Path | None) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Layout.plot needs matplotlib: pip install matplotlib") from error

    if path is not None:
        path = Path(path)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"path must be a file in a folder that exists, got {str(path)!r}")
    if layout.rest is not None:
        layout = natural_order(layout)
    share, blocks = cells(layout)
    across = min(layout.heads, _HEADS_IN_A_ROW)
    down = -(-layout.heads // across)
    figure = Figure(figsize=(3.2 * across + 0.6, 3.2 * down + 1.1), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    low, high = torch.tensor(_PARTIAL_LOW, dtype=torch.float64), torch.tensor(_PARTIAL_HIGH, dtype=torch.float64)
    place = " place" if layout.order.numel() else ""
    for head, axis in enumerate(axes.flat):
        if head >= layout.heads:
            axis.set_axis_off()
            continue
        part = share[head][..., None]  # [rows, columns, 1]
        colour = low + (high - low) * part
        colour = torch.where(part == 0, torch.tensor(_EMPTY, dtype=torch.float64), colour)
        colour = torch.where(part == 1, torch.tensor(_FULL, dtype=torch.float64), colour)
        side = blocks * layout.block_size
        extent = (0, colour.shape[1] * side, colour.shape[0] * side, 0)
        flat = max(layout.n_q, layout.n_k) > 8 * min(layout.n_q, layout.n_k)  # too flat to read at its true shape
        axis.imshow(colour.numpy(), extent=extent, interpolation="nearest", aspect="auto" if flat else "equal")
        axis.set_xlim(0, layout.n_k)
        axis.set_ylim(layout.n_q, 0)
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 8, 10], integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 8, 10], integer=True))
        axis.set_xlabel(f"key{place}")
        axis.set_ylabel(f"query{place}")
        if layout.heads > 1:
            axis.set_title(f"head {head}", fontsize="medium")
    cell = (
        f"blocks of {layout.block_size}"
        if blocks == 1
        else f"cells of {blocks} x {blocks} blocks of {layout.block_size}"
    )
    figure.suptitle(f"{layout.density:.2%} of pairs kept, {cell}", fontsize="medium")
    figure.legend(
        handles=[
            Patch(facecolor=_FULL, label="all pairs kept"),
            Patch(facecolor=_PARTIAL_LOW, label="few kept"),
            Patch(facecolor=_PARTIAL_HIGH, label="most kept"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    if path is not None:
        _save(figure, path)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Write beside the file, then move: a picture that is there is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format=path.suffix[1:] or "png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
