"""What is tuned: each kernel at each key that the benchmarks' shapes launch it with, and a call that launches it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels import _tuned
from gdl_kernels._tuned import Tiles
from gdl_kernels.layouts import Layout
from gdl_kernels.ops.minibatch_self_attention.triton import launch as minibatch
from gdl_kernels.ops.sparse_attention.triton import launch as sparse

from ..cases import short
from ..correctness import Outputs
from ..ops.minibatch_self_attention import SIZES
from ..ops.sparse_attention import SIZE, WINDOW
from ..ops.sparse_attention.patterns import local_and_every_fourth_block

#: The derivative that each kernel is of: 0 is the output.
ORDERS = dict(zip(_tuned.KERNELS, (0, 1, 1, 2, 2)))

#: Called with the inputs, which are differentiated, and a backend.
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One row of the table to fill.

    Attributes:
        key: the values of ``_tuned.KEYS[op]``.
        shape: for people.
        built_in: what the launcher chooses by itself.
        allows: whether a configuration is one that the launcher could use.
    """

    op: str
    kernel: str
    key: tuple[int, ...]
    shape: str
    built_in: Tiles
    allows: Callable[[Tiles], bool]
    function: Function
    inputs: Callable[[], list[Tensor]]

    def __str__(self) -> str:
        return f"{self.op}, {self.kernel}, {self.shape}"

    def prepared(self) -> tuple[Callable[[], Outputs], Outputs, Outputs]:
        """The pass that launches the kernel, and what plain PyTorch gives for it in the same dtype and in float64."""
        inputs, order = self.inputs(), ORDERS[self.kernel]
        seed = int(torch.randint(2**31, ()))

        def of(backend: str, dtype: torch.dtype) -> Callable[[], Outputs]:
            generator = torch.Generator(inputs[0].device).manual_seed(seed)
            function = functools.partial(self.function, backend=backend)
            return derivative(function, [x.to(dtype) for x in inputs], order, generator)

        dtype = inputs[0].dtype
        return of("triton", dtype), of("reference", dtype)(), of("reference", torch.float64)()


def derivative(
    function: Function, inputs: list[Tensor], order: int, generator: torch.Generator
) -> Callable[[], Outputs]:
    """A call of the function, or of the pass that gives its first or second derivatives, their graph built beforehand.

    What derivatives are multiplied by is drawn from ``generator``.
    """
    if order == 0:
        return lambda: function(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = [function(*leaves)]
    if order == 2:
        cotangents = [_drawn_like(x, generator).requires_grad_() for x in results]
        results = list(torch.autograd.grad(results, leaves, cotangents, create_graph=True))
        leaves += cotangents
    last = [_drawn_like(x, generator) for x in results]
    return lambda: torch.autograd.grad(results, leaves, last, retain_graph=True)


def _drawn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers in every dtype: those that half precision has."""
    return torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)


def problems(device: torch.device) -> Iterator[Problem]:
    """All, the most used first: 16-bit before float32, and the double backward of each last."""
    layouts = [local_and_every_fourth_block(WINDOW, size).layout(SIZE.positions, size).to(device) for size in (64, 128)]
    for dtype in (torch.bfloat16, torch.float32):
        for kernels in (_tuned.KERNELS[:3], _tuned.KERNELS[3:]):
            for head_dim in (64, 128):
                for layout in layouts:
                    shape = SIZE.batch, SIZE.heads, SIZE.positions, head_dim
                    yield from sparse_problems(kernels, shape, layout, dtype, device)
            for name in ("BigGAN-128 G", "SAGAN D"):
                yield from minibatch_problems(kernels, SIZES[name], dtype, device)


def sparse_problems(
    kernels: tuple[str, ...], shape: tuple[int, int, int, int], layout: Layout, dtype: torch.dtype, device: torch.device
) -> Iterator[Problem]:
    head_dim, block_size, itemsize = sparse.padded(shape[-1]), layout.block_size, dtype.itemsize
    batch, heads, positions, features = shape
    for kernel in kernels:
        built_in = sparse.built_in_tiles(kernel, sparse.capability(device), head_dim, block_size, itemsize, False)
        yield Problem(
            "sparse_attention",
            kernel,
            (head_dim, block_size, itemsize, 0),
            f"B{batch} H{heads} n{positions} d{features}, {layout.density:.0%} kept, blocks of {block_size}, "
            f"{short(dtype)}",
            built_in,
            lambda tiles: _usable(tiles) and tiles.own <= block_size,
            lambda q, k, v, backend: gdl_kernels.sparse_attention(q, k, v, layout, backend=backend),
            lambda: [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)],
        )


def minibatch_problems(
    kernels: tuple[str, ...], size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Problem]:
    batch, channels, value_channels, side = size
    widest = max(sparse.padded(channels), sparse.padded(value_channels))
    shapes = [(batch, c, side, side) for c in (channels, channels, value_channels)]
    for kernel in kernels:
        yield Problem(
            "minibatch_self_attention",
            kernel,
            (widest, dtype.itemsize),
            f"{batch} maps of {side}×{side}, {channels} and {value_channels} channels, pooled, {short(dtype)}",
            minibatch.built_in_tiles(kernel, widest, dtype.itemsize),
            _usable,
            lambda q, k, v, backend: gdl_kernels.minibatch_self_attention(q, k, v, pool=2, backend=backend),
            lambda: [torch.randn(shape, device=device, dtype=dtype) for shape in shapes],
        )


def _usable(tiles: Tiles) -> bool:
    """Sizes that a tensor core instruction takes, and no more of anything than a multiprocessor has for a program."""
    sizes = 16 <= tiles.own <= 128 and 16 <= tiles.step <= 128
    return sizes and 1 <= tiles.num_stages <= 7 and 2 <= tiles.num_warps <= 8
