"""The patterns that are measured, each as a formula and as a layout of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout

#: ``keep(i, j)``: whether query ``i`` sees key ``j``, for index tensors that broadcast.
Keep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """A causal pattern, the same for all heads.

    Attributes:
        keep: what the truth, PyTorch's masks and FlexAttention go by. Written apart from the layout, so it checks that.
        layout: from the number of positions and the block size.
    """

    name: str
    keep: Keep
    layout: Callable[[int, int], Layout]

    def positions(self, n: int, device: torch.device) -> Tensor:
        """Bool ``(n, n)``."""
        i = torch.arange(n, device=device, dtype=torch.int32)
        return self.keep(i[:, None], i[None, :])

    def kept_keys(self, n: int, device: torch.device) -> Tensor:
        """The keys that the last of ``n`` queries sees, int64, ascending."""
        j = torch.arange(n, device=device)
        return self.keep(j[-1:], j).nonzero().squeeze(1)


def causal() -> Pattern:
    return Pattern("causal dense", lambda i, j: i >= j, lambda n, size: layouts.causal(n, block_size=size))


def local(window: int) -> Pattern:
    return Pattern(
        f"local {window}",
        lambda i, j: (i >= j) & (i - j < window),
        lambda n, size: layouts.local(n, window, block_size=size),
    )


def fixed(stride: int, summary: int) -> Pattern:
    """The Sparse Transformer's fixed attention, merged: a query's own run, and the last columns of every run."""
    return Pattern(
        f"fixed {stride}/{summary}",
        lambda i, j: (i >= j) & ((i // stride == j // stride) | (j % stride >= stride - summary)),
        lambda n, size: layouts.fixed(n, stride, summary, block_size=size),
    )


def strided(stride: int) -> Pattern:
    """The Sparse Transformer's strided attention, merged: the last ``stride`` keys, and every ``stride``-th."""
    return Pattern(
        f"strided {stride}",
        lambda i, j: (i >= j) & ((i - j < stride) | ((i - j) % stride == 0)),
        lambda n, size: layouts.local(n, stride, block_size=size) | layouts.strided(n, stride, block_size=size),
    )


def local_and_every_fourth_block(window: int, block_size: int) -> Pattern:
    """The last ``window`` keys, and of the earlier blocks every fourth, counted from the query's own."""

    def keep(i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i - j < window) | ((i // block_size - j // block_size) % 4 == 0))

    def layout(n: int, size: int) -> Layout:
        i = torch.arange(n)
        return layouts.from_mask(keep(i[:, None], i), block_size=size)

    return Pattern(f"local {window} ∪ every fourth block", keep, layout)
