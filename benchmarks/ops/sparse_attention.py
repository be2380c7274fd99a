"""Block-sparse attention, against PyTorch's ways to the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gdl_kernels
from gdl_kernels import layouts
from gdl_kernels._backends import Explanation

from ..cases import Case, Contestant, Function, Inputs, Task
from ..results import Bar, Result, curve, exponent

#: ``keep(i, j)``: whether query ``i`` sees key ``j``, for index tensors that broadcast.
Keep = Callable[[Tensor, Tensor], Tensor]
#: From query, key and value to the output.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

HEADS, POSITIONS, HEAD_DIM = 8, 4096, 64
WINDOW = 512

OURS, FLEX, EAGER = "gdl_kernels", "FlexAttention", "eager, masked"
GROWTH = "local"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All of it takes some minutes; quick is what the bars ask about, at one block size."""
    block_sizes = (64,) if quick else (64, 128)
    for block_size in block_sizes:
        for dtype in (torch.float32, torch.bfloat16):
            yield case(device, dtype, block_size, training=False, quick=quick)
    for block_size in block_sizes:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            yield case(device, dtype, block_size, training=True, quick=quick)
    for positions in (4096, 8192, 16_384) if quick else (4096, 8192, 16_384, 32_768):
        yield growth_case(device, positions)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if result.growth is not None:
            continue
        if result.case.startswith("forward,"):
            over_flex = 5.0 if result.dtype == "bfloat16" else 3.0
            asked += [
                Bar(f"{result.case}: over {FLEX}", over_flex, result.speed_up(result.row(FLEX))),
                Bar(f"{result.case}: of the matrix rate", 0.65, result.share_of_ceiling(result.ours), "%"),
            ]
        else:
            asked.append(Bar(f"{result.case}: over {EAGER}", 4.0, result.speed_up(result.row(EAGER))))
    # "Linear" leaves room for what a fit through page-sized steps of resident memory is off by.
    memory = exponent((n, row.peak_bytes) for n, result in curve(results, GROWTH) if (row := result.ours))
    return [*asked, Bar("forward, local: memory grows as positions to the power", 1.1, memory, "", at_most=True)]


def case(device: torch.device, dtype: torch.dtype, block_size: int, *, training: bool, quick: bool) -> Case:
    """One pattern, dtype and block size; ``training`` is forward and backward."""
    keep = local_and_every_fourth_block(WINDOW, block_size)
    kept = _positions(keep, POSITIONS, device)
    layout = layouts.from_mask(kept, block_size=block_size)
    kept_blocks = len(layout.rows.blocks)
    mode = _trained if training else _same
    truth, eager = mode(in_chunks(keep)), mode(masked(kept))

    # A kept block takes block² multiply-adds for each feature in a product of matrices, a multiply-add being two
    # operations: two products forward (scores, output), five backward (scores again, and the gradients of output's
    # weights, query, key and value). A partial block counts as a whole one, for every contestant alike.
    products = 7 if training else 2
    task = Task(truth, eager, products * 2 * block_size**2 * HEAD_DIM * kept_blocks * HEADS, _bytes(dtype, training))

    # Dense causal attention needs no mask and has the fastest kernel in torch: what it costs to keep everything.
    pairs = POSITIONS * (POSITIONS + 1) / 2
    dense = mode(in_chunks(_causal))
    dense_task = Task(dense, dense, products * 2 * pairs * HEAD_DIM * HEADS, _bytes(dtype, training))

    sdpa = F.scaled_dot_product_attention
    contestants = []
    if training or not quick:
        contestants.append(Contestant(EAGER, eager))
    if not training or device.type == "cuda":  # on the CPU it has no backward pass
        contestants.append(Contestant(FLEX, mode(_compiled_flex(keep, block_size, device))))
    if not quick:
        contestants.append(Contestant("SDPA, masked", mode(functools.partial(sdpa, attn_mask=kept))))
    if not (training and quick):
        contestants.append(Contestant("SDPA, dense causal", mode(functools.partial(sdpa, is_causal=True)), dense_task))
    contestants.append(_ours(layout, mode))
    return Case(
        name=f"{'forward+backward' if training else 'forward'}, {_short(dtype)}, blocks of {block_size}",
        shape=f"B1 H{HEADS} n{POSITIONS} d{HEAD_DIM}, local {WINDOW} ∪ every fourth block: "
        f"{kept_blocks / (layout.q_blocks * layout.k_blocks):.1%} of blocks kept",
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, POSITIONS, dtype, training),
        task=task,
        contestants=contestants,
    )


def growth_case(device: torch.device, positions: int) -> Case:
    """One point of the curve that shows how ours grows with the number of positions."""
    block_size, dtype = 64, torch.float32
    keep = local(WINDOW)
    layout = layouts.local(positions, WINDOW, block_size=block_size).to(device)
    plain = in_chunks(keep)  # the whole score matrix would not fit
    flops = 2 * 2 * block_size**2 * HEAD_DIM * len(layout.rows.blocks) * HEADS
    return Case(
        name=f"forward, local, n {positions}",
        shape=f"B1 H{HEADS} n{positions} d{HEAD_DIM}, local {WINDOW}, {_short(dtype)}, blocks of {block_size}",
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, positions, dtype, False),
        task=Task(plain, plain, flops, _bytes(dtype, False, positions)),
        contestants=[_ours(layout, _same)],
        growth=(GROWTH, positions),
    )


def local_and_every_fourth_block(window: int, block_size: int) -> Keep:
    """Causal: the last ``window`` keys, and of the earlier blocks every fourth, counted from the query's own."""

    def keep(i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i - j < window) | ((i // block_size - j // block_size) % 4 == 0))

    return keep


def local(window: int) -> Keep:
    def keep(i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    return keep


def _causal(i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _positions(keep: Keep, n: int, device: torch.device) -> Tensor:
    i = torch.arange(n, device=device, dtype=torch.int32)
    return keep(i[:, None], i[None, :])


def masked(kept: Tensor) -> Attention:
    """Attention as it is written in plain PyTorch: every score computed, then most of them masked."""
    dropped = ~kept

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, H, n, n]
        return scores.masked_fill(dropped, -torch.inf).softmax(-1) @ value

    return attention


def in_chunks(keep: Keep, chunk: int = 128) -> Attention:
    """``masked``, a chunk of queries at a time, over the keys that any of them sees: float64 fits, at any length."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        j = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
        chunks = []
        for part, i in zip(query.split(chunk, dim=2), j.split(chunk)):
            kept = keep(i[:, None], j[None, :])
            seen = kept.any(0).nonzero().squeeze(1)
            chunks.append(masked(kept[:, seen])(part, key[:, :, seen], value[:, :, seen]))
        return torch.cat(chunks, dim=2)

    return attention


def _ours(layout: layouts.Layout, mode: Callable[[Attention], Function]) -> Contestant:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return gdl_kernels.sparse_attention(query, key, value, layout)

    def explain(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Explanation:
        return gdl_kernels.explain("sparse_attention", query, key, value, layout)

    return Contestant(OURS, mode(attention), explain=explain)


def _compiled_flex(keep: Keep, block_size: int, device: torch.device) -> Attention:
    mask = create_block_mask(
        lambda b, h, i, j: keep(i, j), None, None, POSITIONS, POSITIONS, device=device.type, BLOCK_SIZE=block_size
    )
    # Its CPU template has nothing to tune.
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return functools.partial(torch.compile(flex_attention, dynamic=False, mode=mode), block_mask=mask)


def _same(forward: Attention) -> Function:
    return forward


def _trained(forward: Attention) -> Function:
    """Forward and backward: output and the gradients of query, key and value."""

    def step(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out = forward(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return step


def _inputs(positions: int, dtype: torch.dtype, training: bool, generator: torch.Generator) -> Inputs:
    shape = 1, HEADS, positions, HEAD_DIM
    count = 4 if training else 3  # query, key, value, and the gradient of the output
    return tuple(torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) for _ in range(count))


def _bytes(dtype: torch.dtype, training: bool, positions: int = POSITIONS) -> float:
    # Forward: query, key, value, output. Backward: these and the output's gradient are read, three gradients written.
    return (12 if training else 4) * HEADS * positions * HEAD_DIM * dtype.itemsize


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
