"""Calls of sparse_attention that every backend has to get right, each with the reason why it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels import layouts
from tests.accuracy import assert_accurate


def scattered(n_q: int, n_k: int, block_size: int, heads: int = 1, seed: int = 0) -> layouts.Layout:
    """Full, partial and missing blocks in one layout, and a row that keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(heads, n_q, n_k, generator=generator) < 0.3
    mask[:, :block_size, :block_size] = True
    mask[:, block_size : 2 * block_size, :block_size] = False
    mask[:, n_q // 2] = False
    return layouts.from_mask(mask if heads > 1 else mask[0], block_size=block_size)


def permuted(n: int, block_size: int) -> layouts.Layout:
    """Places in a random order: the kernels read through `order`, which here follows no pattern."""
    layout = scattered(n, n, block_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return dataclasses.replace(layout, order=order[None])


def mixed_orders(n: int) -> layouts.Layout:
    return layouts.per_head([layouts.strided(n, 7, block_size=32), layouts.local(n, 40, block_size=32)])


def merged(n: int, stride: int) -> layouts.Layout:
    """The Sparse Transformer's merged strided attention: two parts, each in its own order."""
    layout = layouts.strided(n, stride, block_size=16) | layouts.local(n, stride, block_size=16)
    assert len(layout.parts()) == 2
    return layout


def merged_both_ways(n: int) -> layouts.Layout:
    """One part is causal, the other, and so the whole, is not."""
    layout = layouts.strided(n, 16, causal=False, block_size=16) | layouts.local(n, 20, block_size=16)
    assert len(layout.parts()) == 2
    return layout


def merged_for_some(n: int) -> layouts.Layout:
    """Parts of which some heads keep nothing, and a part with an order for each head."""
    some = [layouts.strided(n, 12, block_size=16), layouts.strided(n, 16, block_size=16)]
    layout = layouts.per_head(some) | layouts.sliding_with_sinks(n, 9, 2, block_size=16)
    assert [len(part.order) for part in layout.parts()] == [0, 2]
    return layout


@dataclass(frozen=True)
class Case:
    """Why it is there, the layout, and the call's sizes."""

    reason: str
    layout: Callable[[], layouts.Layout]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    n_q: int | None = None
    n_k: int | None = None
    head_dim: int = 16
    value_dim: int = 16
    query_start: int = 0
    start_tensor: bool = False
    dropout_p: float = 0.0
    padding: bool = False
    transposed: bool = False

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")


CASES = [
    Case("lengths that no block divides", lambda: scattered(150, 170, 64), batch=2),
    Case("blocks of 16", lambda: scattered(70, 70, 16)),
    Case("blocks of 32", lambda: scattered(100, 80, 32)),
    Case("blocks of 128 are two tiles", lambda: scattered(200, 190, 128)),
    Case("fewer positions than a block", lambda: scattered(10, 11, 64)),
    Case("causal", lambda: layouts.causal(130, block_size=32)),
    Case("nothing kept", lambda: layouts.from_mask(torch.zeros(20, 30, dtype=torch.bool), block_size=16)),
    Case("everything kept", lambda: layouts.full(64, 100, block_size=32)),
    Case("grouped key heads", lambda: scattered(90, 90, 32), heads=6, kv_heads=2),
    Case("a head each with unequal counts", lambda: scattered(90, 90, 32, heads=3), heads=3, kv_heads=3),
    Case("a head each over shared key heads", lambda: scattered(90, 90, 32, heads=4), heads=4, kv_heads=2),
    Case("values of another size", lambda: scattered(60, 60, 32), head_dim=24, value_dim=40),
    # In Triton a tensor descriptor loads tiles whose features are a power of two, pointers load the others.
    Case("values alone of a power of two", lambda: scattered(150, 150, 64), head_dim=24, value_dim=32),
    Case("keys alone of a power of two", lambda: scattered(150, 150, 64), head_dim=32, value_dim=24),
    Case("head sizes that no vector divides", lambda: scattered(60, 60, 32), head_dim=7, value_dim=5),
    Case("head size 80", lambda: scattered(60, 60, 32), head_dim=80, value_dim=80),
    Case("the largest head of the GPU", lambda: scattered(40, 40, 16), head_dim=256, value_dim=256),
    Case("one feature", lambda: scattered(40, 40, 16), head_dim=1, value_dim=1),
    Case("features not contiguous", lambda: scattered(60, 60, 32), transposed=True),
    Case("padded keys", lambda: scattered(90, 90, 32), batch=3, padding=True),
    Case("strided order", lambda: layouts.strided(96, 7, block_size=32)),
    Case("padded keys in full blocks", lambda: layouts.full(50, 50, block_size=16), batch=2, padding=True),
    Case("any order", lambda: permuted(90, 32), batch=2, padding=True),
    Case("an order for each head", lambda: mixed_orders(90)),
    Case("an order for each head over one key head", lambda: mixed_orders(90), kv_heads=1),
    Case("one query of many", lambda: scattered(130, 100, 32), n_q=1, query_start=77),
    Case("three queries over a block's edge", lambda: scattered(130, 100, 32), n_q=3, query_start=63),
    Case("the last query", lambda: layouts.causal(130, block_size=64), n_q=1, query_start=129),
    Case("a cache that is still growing", lambda: layouts.causal(130, block_size=32), n_q=3, n_k=72, query_start=69),
    Case("a strided cache still growing", lambda: layouts.strided(96, 5, block_size=16), n_q=2, n_k=50, query_start=48),
    Case("local and summary columns", lambda: layouts.fixed(150, 32, 8, block_size=16)),
    Case("a window with sinks", lambda: layouts.sliding_with_sinks(150, 20, 3, block_size=32)),
    Case(
        "a start that is a tensor",
        lambda: layouts.causal(130, block_size=32),
        n_q=3,
        n_k=120,
        query_start=69,
        start_tensor=True,
    ),
    Case("many queries from a tensor on", lambda: scattered(150, 90, 32), n_q=70, query_start=45, start_tensor=True),
    Case(
        "a strided start that is a tensor",
        lambda: layouts.strided(96, 5, block_size=16),
        n_q=2,
        n_k=96,
        query_start=48,
        start_tensor=True,
    ),
    Case("dropout", lambda: scattered(150, 170, 64), batch=2, dropout_p=0.4),
    Case("dropout in small blocks", lambda: scattered(70, 70, 16), dropout_p=0.2, padding=True),
    Case("dropout in any order", lambda: permuted(90, 32), heads=4, batch=2, dropout_p=0.3),
    Case("dropout of late queries", lambda: scattered(130, 100, 32), n_q=37, query_start=63, dropout_p=0.6),
    Case("dropout of one query", lambda: layouts.causal(130), heads=6, n_q=1, query_start=101, dropout_p=0.5),
    Case("a strided pattern merged with a local one", lambda: merged(110, 16), batch=2, padding=True),
    Case("merged orders over shared key heads", lambda: merged(110, 16), heads=4, kv_heads=2),
    Case("merged orders of each head", lambda: merged_for_some(125)),
    Case("merged orders of each head over one key head", lambda: merged_for_some(125), kv_heads=1),
    Case("merged orders with dropout", lambda: merged(110, 16), dropout_p=0.3),
    Case("merged orders, one query", lambda: merged(110, 16), heads=4, kv_heads=1, n_q=1, query_start=93),
    Case(
        "merged orders, a growing cache and a start that is a tensor",
        lambda: merged(110, 16),
        n_q=3,
        n_k=100,
        query_start=97,
        start_tensor=True,
    ),
    Case("merged orders, later keys too", lambda: merged_both_ways(100)),
    Case("no batch", lambda: scattered(40, 40, 16), batch=0),
]

GRADIENTS = ("query", "key", "value")


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
    layout = case.layout()
    n_q = layout.n_q if case.n_q is None else case.n_q
    n_k = layout.n_k if case.n_k is None else case.n_k
    shapes = [
        (case.batch, case.heads, n_q, case.head_dim),
        (case.batch, case.kv_heads, n_k, case.head_dim),
        (case.batch, case.kv_heads, n_k, case.value_dim),
    ]
    tensors = []
    for shape in shapes:
        if case.transposed:
            tensors.append(torch.randn(*shape[:2], shape[3], shape[2], dtype=dtype, device=device).transpose(2, 3))
        else:
            batch, heads, positions, features = shape
            tensors.append(torch.randn(batch, positions, heads, features, dtype=dtype, device=device).transpose(1, 2))
    start = torch.tensor(case.query_start, device=device) if case.start_tensor else case.query_start
    kwargs: dict[str, Any] = {"layout": layout.to(device), "query_start": start, "dropout_p": case.dropout_p}
    if case.padding:
        kwargs["key_padding_mask"] = torch.rand(case.batch, n_k, device=device) < 0.3
    return tensors, kwargs


def outputs_and_gradients(tensors: list[Tensor], kwargs: dict[str, Any], backend: str, seed: int) -> dict[str, Tensor]:
    """The output, lse, and the gradients of a random function of both."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(seed)  # every backend drops the same
    out, lse = gdl_kernels.sparse_attention(*leaves, return_lse=True, backend=backend, **kwargs)
    # -inf, of rows that keep nothing, has no gradient to give.
    finite = lse.masked_fill(lse == -torch.inf, 0)
    loss = (out * weights_like(out, seed)).sum() + (finite * weights_like(lse, seed)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach(), **{f"gradient of {n}": g for n, g in zip(GRADIENTS, gradients)}}


def second_gradients(tensors: list[Tensor], kwargs: dict[str, Any], backend: str, seed: int) -> dict[str, Tensor]:
    """The gradients of a random function of the first gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(seed)
    out, lse = gdl_kernels.sparse_attention(*leaves, return_lse=True, backend=backend, **kwargs)
    cotangents = [weights_like(t, seed).requires_grad_() for t in (out, lse)]
    # A row that keeps nothing has a constant -inf as its lse.
    outputs = [out, torch.where(lse.detach() == -torch.inf, 0, lse)]
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    loss = sum((g * weights_like(g, seed + 1)).sum() for g in first)
    second = torch.autograd.grad(loss, [*cotangents, *leaves])
    return {f"second gradient of {n}": g for n, g in zip(("out", "lse", *GRADIENTS), second)}


def weights_like(tensor: Tensor, seed: int) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)


def cancelling_terms(tensors: list[Tensor], exact: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Gradients of query and key are sums of P * (dP - rowsum(P * dP) + dlse), which cancel."""
    query, key, value = (t.double() for t in tensors)
    group = query.shape[1] // key.shape[1]
    grad_weights = weights_like(exact["out"], seed) @ value.repeat_interleave(group, 1).transpose(-1, -2)  # dP
    grad_weights = torch.cat([grad_weights, weights_like(exact["lse"], seed)[..., None]], -1)
    scale = query.shape[-1] ** -0.5
    sizes = {"gradient of query": key.square().mean().sqrt(), "gradient of key": query.square().mean().sqrt()}
    return {name: scale * size * grad_weights for name, size in sizes.items()}


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", ulps: int = 2) -> None:
    """Output, lse and gradients within twice the error of plain PyTorch, or `ulps` of the largest value."""
    tensors, kwargs = inputs(case, dtype, device)
    seed = 7
    ours = outputs_and_gradients(tensors, kwargs, backend, seed)
    plain = outputs_and_gradients(tensors, kwargs, "reference", seed)
    exact = outputs_and_gradients([t.double() for t in tensors], kwargs, "reference", seed)
    terms = cancelling_terms(tensors, exact, seed)
    for name in ours:
        assert_accurate(ours[name], plain[name], exact[name], name, terms=terms.get(name), ulps=ulps)


def check_second(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The same for second derivatives."""
    tensors, kwargs = inputs(case, dtype, device)
    seed = 7
    ours, plain = (second_gradients(tensors, kwargs, b, seed) for b in (backend, "reference"))
    exact = second_gradients([t.double() for t in tensors], kwargs, "reference", seed)
    for name in ours:
        # The terms of these sums cancel several times over: the floor is that of their largest.
        assert_accurate(ours[name], plain[name], exact[name], name, ulps=16)
