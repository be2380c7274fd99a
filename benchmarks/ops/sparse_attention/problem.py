"""One attention to compute: its size and work, its truth, and the contestants that compute it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation
from gdl_kernels.layouts import Layout

from ...cases import OURS, Case, Contestant, Deferred, Inputs, Task, short
from ...passes import Passes
from ...sdpa import by_kernel
from .attention import compiled_flex, in_chunks, masked
from .patterns import Pattern, causal

FLEX, EAGER, SDPA = "FlexAttention", "eager, masked", "SDPA, dense causal"

_causal_sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)


@dataclass(frozen=True)
class Mode(Passes):
    """Which passes are timed, and their work.

    Attributes:
        products: of matrices, for each kept block: two forward (scores, output), five backward (scores again, and the
            gradients of output's weights, query, key and value).
        tensors: of the size of ``query``, that are read or written.
    """

    products: int
    tensors: int


FORWARD = Mode("forward", True, False, 2, 4)  # query, key, value; output
BACKWARD = Mode("backward", False, True, 5, 8)  # these and the output's gradient; gradients of query, key and value
TRAINING = Mode("forward+backward", True, True, 7, 12)


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    positions: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} n{self.positions} d{self.head_dim}"


@dataclass(frozen=True)
class Problem:
    """Attention of one size over one pattern.

    Attributes:
        checked_rows: how many query rows of the output are compared with the truth; None for all.
    """

    pattern: Pattern
    size: Size
    dtype: torch.dtype
    block_size: int
    device: torch.device
    mode: Mode = FORWARD
    checked_rows: int | None = None

    @functools.cached_property
    def layout(self) -> Layout:
        return self.pattern.layout(self.size.positions, self.block_size).to(self.device)

    def case(
        self, part: str, contestants: Callable[[], Sequence[Contestant]], growth: tuple[str, int] | None = None
    ) -> Deferred:
        name = f"{part}, {short(self.dtype)}, blocks of {self.block_size}"
        return Deferred(name, lambda: self._case(name, contestants(), growth))

    def _case(self, name: str, contestants: Sequence[Contestant], growth: tuple[str, int] | None) -> Case:
        kept = self.layout.kept_blocks / (self.layout.q_blocks * self.layout.k_blocks)
        checked = "" if self.checked_rows is None else f"; {self.checked_rows} rows checked"
        return Case(
            name=name,
            shape=f"{self.size}, {self.pattern.name}: {kept:.1%} of blocks kept{checked}",
            dtype=self.dtype,
            device=self.device,
            inputs=self._inputs,
            task=self._task(),
            contestants=contestants,
            growth=growth,
        )

    def ours(self) -> Contestant:
        return ours(self.layout, self.mode)

    def flex(self, tuned: bool = True) -> Contestant:
        """``tuned`` for the GPU that is there, which takes a minute."""
        attention = compiled_flex(self.pattern.keep, self.layout, tuned)
        return self.mode.contestant(FLEX if tuned or self.device.type == "cpu" else f"{FLEX}, not tuned", attention)

    def eager(self) -> Contestant:
        return self.mode.contestant(EAGER, masked(self._kept_pairs()))

    def sdpa_masked(self) -> list[Contestant]:
        """With the pattern as a mask: by the kernel that torch takes, then by each."""
        attention = functools.partial(F.scaled_dot_product_attention, attn_mask=self._kept_pairs())
        kernels = by_kernel("SDPA, masked", attention, self.device)
        return [self.mode.contestant(name, function) for name, function in kernels]

    def sdpa_dense(self) -> list[Contestant]:
        """Without a mask, where all earlier keys are kept: by the kernel that torch takes, then by each."""
        kernels = by_kernel(SDPA, _causal_sdpa, self.device)
        return [self.mode.contestant(name, function) for name, function in kernels]

    def sdpa_yardstick(self) -> Contestant:
        """Dense causal attention where the pattern is another: what torch's fastest kernel takes to keep everything.

        Its work is counted over the pairs that it keeps.
        """
        dense, n = self.mode.of(in_chunks(causal().keep)), self.size.positions
        task = Task(dense, dense, self._flops(n * (n + 1) / 2), self._bytes())
        return self.mode.contestant(SDPA, _causal_sdpa, task)

    def _inputs(self, generator: torch.Generator) -> Inputs:
        shape = self.size.batch, self.size.heads, self.size.positions, self.size.head_dim
        drawn = functools.partial(torch.randn, shape, generator=generator, device=self.device, dtype=self.dtype)
        # Query, key, value, and the gradient of the output.
        return tuple(drawn() for _ in range(3 if self.mode is FORWARD else 4))

    def _task(self) -> Task:
        # A partial block counts as a whole one, for every contestant alike.
        flops, keep = self._flops(self.layout.kept_blocks * self.block_size**2), self.pattern.keep
        if self.checked_rows is None:
            truth = self.mode.of(in_chunks(keep))
            # Rows don't mind being computed in chunks. Gradients of keys and values summed chunk by chunk are rounded
            # less than plain PyTorch rounds them.
            plain = truth if self.mode is FORWARD else self.mode.of(masked(self._kept_pairs()))
            return Task(truth, plain, flops, self._bytes())
        rows = sampled(self.size.positions, self.checked_rows).to(self.device)

        def some(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return in_chunks(keep, rows)(query[:, :, rows], key, value)

        return Task(some, some, flops, self._bytes(), compared=lambda out: out[:, :, rows])

    def _kept_pairs(self) -> Tensor:
        return self.pattern.positions(self.size.positions, self.device)

    def _flops(self, pairs: float) -> float:
        """A kept pair takes a multiply-add, two operations, for each feature in a product of matrices."""
        return self.mode.products * 2 * pairs * self.size.head_dim * self.size.batch * self.size.heads

    def _bytes(self) -> float:
        size = self.size
        return self.mode.tensors * size.batch * size.heads * size.positions * size.head_dim * self.dtype.itemsize


def ours(layout: Layout, mode: Mode = FORWARD, query_start: int = 0) -> Contestant:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return gdl_kernels.sparse_attention(query, key, value, layout, query_start=query_start)

    def explain(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Explanation:
        return gdl_kernels.explain("sparse_attention", query, key, value, layout, query_start=query_start)

    return replace(mode.contestant(OURS, attention), explain=explain)


def sampled(positions: int, count: int) -> Tensor:
    """``count`` of the positions, ascending: one drawn from each of as many equal stretches."""
    edges = torch.linspace(0, positions, count + 1, dtype=torch.float64).long()
    return edges[:-1] + (torch.rand(count) * edges.diff()).long()
