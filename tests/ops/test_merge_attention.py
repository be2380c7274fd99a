"""merge_attention: parts of the keys, each attended to alone, give the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gdl_kernels import layouts, merge_attention, sparse_attention
from tests.accuracy import assert_accurate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mask_with_gaps(n_q: int, n_k: int, bounds: list[int]) -> Tensor:
    """Rows that all parts, some parts and no part keep anything of."""
    mask = torch.rand(n_q, n_k) < 0.4
    mask[: n_q // 2, : bounds[1]] = False
    mask[n_q // 3, bounds[1] : bounds[2]] = False
    mask[n_q // 4] = False
    return mask


def by_parts(
    tensors: list[Tensor], mask: Tensor, bounds: list[int], **kwargs: Any
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    query, key, value = tensors
    parts = []
    for start, end in pairwise(bounds):
        layout = layouts.from_mask(mask[:, start:end], block_size=16)
        keys, values = key[:, :, start:end], value[:, :, start:end]
        parts.append(sparse_attention(query, keys, values, layout, return_lse=True, **kwargs))
    return merge_attention(*zip(*parts)), parts


def outputs_and_gradients(tensors: list[Tensor], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight, lse_weight = (torch.randn(t.shape, generator=generator).to(t) for t in (out, lse))
    loss = (out * weight).sum() + (lse.masked_fill(lse == -torch.inf, 0) * lse_weight).sum()
    gradients = torch.autograd.grad(loss, tensors)
    names = (f"gradient of {name}" for name in ("query", "key", "value"))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bounds", [[0, 90], [0, 40, 90], [0, 7, 33, 90]], ids=["one part", "two", "three"])
def test_parts_of_the_keys_are_the_whole(bounds: list[int], backend: str, dtype: torch.dtype) -> None:
    n_q, n_k = 50, 90
    mask = mask_with_gaps(n_q, n_k, bounds if len(bounds) > 2 else [0, 1, 2])
    layout = layouts.from_mask(mask, block_size=16)
    base = [torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, n_q), (2, n_k), (2, n_k))]

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype).clone().requires_grad_() for t in base]

    ours, plain, exact = leaves(dtype), leaves(dtype), leaves(torch.float64)
    merged, _ = by_parts(ours, mask, bounds, backend=backend)
    found = outputs_and_gradients(ours, *merged)
    expected, precise = (
        outputs_and_gradients(t, *sparse_attention(*t, layout, return_lse=True, backend="reference"))
        for t in (plain, exact)
    )
    for name, value in found.items():
        assert_accurate(value, expected[name], precise[name], name, ulps=8)  # each part rounds once more
    assert not found["out"][:, :, n_q // 4].any()
    assert (found["lse"][:, :, n_q // 4] == -torch.inf).all()
    assert not found["gradient of query"][:, :, n_q // 4].any()


def test_gradients_to_second_order() -> None:
    parts, rows = 3, 4
    outs = torch.randn(parts, 1, 2, rows, 3, dtype=torch.float64)
    lses = torch.randn(parts, 1, 2, rows, dtype=torch.float64)
    lses[0, :, :, 1] = -torch.inf  # one part keeps nothing of row 1, and none keeps anything of row 2
    lses[:, :, :, 2] = -torch.inf
    outs = outs.masked_fill(lses[..., None] == -torch.inf, 0)

    def call(outs: Tensor, lses: Tensor) -> Tensor:
        out, lse = merge_attention(outs.unbind(), lses.unbind())
        return torch.cat([out, lse.masked_fill(lse == -torch.inf, 0)[..., None]], -1)

    inputs = (outs.requires_grad_(), lses.requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_rows_that_no_part_keeps_have_no_gradient() -> None:
    """Not even where the gradient comes through a lse of -inf."""
    outs = [torch.zeros(1, 1, 2, 3, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor([[[-torch.inf, 0.5]]], requires_grad=True) for _ in range(2)]
    out, lse = merge_attention(outs, lses)
    assert out[0, 0, 0].tolist() == [0, 0, 0]
    assert lse[0, 0, 0] == -torch.inf
    gradients = torch.autograd.grad((out, lse), (*outs, *lses), (torch.randn_like(out), torch.ones_like(lse)))
    assert all(g.isfinite().all() for g in gradients)
    assert not any(g[0, 0, 0].any() for g in gradients)


def test_lses_far_apart() -> None:
    """exp of neither can be held; their difference decides."""
    outs = [torch.full((1, 1, 1, 2), x) for x in (3.0, 5.0)]
    out, lse = merge_attention(outs, [torch.full((1, 1, 1), x) for x in (900.0, 899.0)])
    weight = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(out, (3 * weight + 5 * (1 - weight)).expand(1, 1, 1, 2))
    torch.testing.assert_close(lse, torch.logaddexp(torch.tensor(900.0), torch.tensor(899.0)).expand(1, 1, 1))


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    bounds = [0, 20, 50]
    mask = mask_with_gaps(40, 50, bounds)
    split = [layouts.from_mask(mask[:, a:b], block_size=16) for a, b in pairwise(bounds)]

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            sparse_attention(query, key[:, :, a:b], value[:, :, a:b], layout, return_lse=True)
            for (a, b), layout in zip(pairwise(bounds), split)
        ]
        return merge_attention([out for out, _ in parts], [lse for _, lse in parts])

    tensors = [torch.randn(1, 2, n, 8, requires_grad=True) for n in (40, 50, 50)]
    ours, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours[0])
    for a, b in zip(*(torch.autograd.grad(out, tensors, weight) for out, _ in (ours, expected))):
        torch.testing.assert_close(a, b)


OUT, LSE = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "says"),
    [
        ([], [], ValueError, "outs must have at least one part, got none"),
        (OUT[None], [LSE], TypeError, "outs must be a list or tuple of tensors, got Tensor"),
        ([OUT, OUT], [LSE], ValueError, "lses must be as many as outs, 2, got 1"),
        ([OUT, 1.0], [LSE, LSE], TypeError, r"outs\[1\] must be a tensor, got float"),
        ([LSE], [LSE], ValueError, r"outs\[0\] must be \(batch, heads, positions, features\), got shape \(1, 2, 3\)"),
        ([OUT.long()], [LSE], TypeError, r"outs\[0\] must be of a floating point dtype, got torch.int64"),
        ([OUT, OUT[..., :3]], [LSE, LSE], ValueError, r"outs\[1\] must be \(1, 2, 3, 4\), got shape \(1, 2, 3, 3\)"),
        ([OUT], [OUT], ValueError, r"lses\[0\] must be \(1, 2, 3\), got shape \(1, 2, 3, 4\)"),
        ([OUT, OUT.double()], [LSE, LSE], TypeError, r"outs\[1\] must be torch.float32.*got torch.float64"),
        ([OUT.bfloat16()], [LSE.bfloat16()], TypeError, r"lses\[0\] must be torch.float32 where outs\[0\] is torch.b"),
        ([OUT.double()], [LSE], TypeError, r"lses\[0\] must be torch.float64"),
        ([OUT], [LSE.to("meta")], ValueError, r"lses\[0\] must be on the device of outs\[0\], cpu, got meta"),
    ],
)
def test_bad_input_is_named(outs: Any, lses: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^{says}"):
        merge_attention(outs, lses)
