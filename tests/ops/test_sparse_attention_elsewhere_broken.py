"""What broke other block-sparse attentions, by name: each test is a report about one of them.

Two reports have their tests elsewhere: new lengths that compile anew until a dense fallback takes over, in
test_sparse_attention_compiled.py; masks that take N x N memory to make, in tests/layouts/test_cost.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdl_kernels import layouts, sparse_attention
from tests.accuracy import assert_accurate
from tests.ops.sparse_attention_cases import Case, check, inputs, outputs_and_gradients, scattered

KERNELS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
for_each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@for_each_kernel
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("nan_poison")
def test_backward_at_64_features_silently_wrong(block_size: int, dtype: torch.dtype, kernel: tuple[str, str]) -> None:
    case = Case("64", lambda: scattered(400, 390, block_size), heads=4, kv_heads=2, head_dim=64, value_dim=64)
    check(case, dtype, *kernel)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "heads between positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every other position": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "part of a larger projection": lambda t: torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]],
}


@for_each_kernel
@pytest.mark.parametrize("strided", STRIDES.values(), ids=[name.replace(" ", "-") for name in STRIDES])
@pytest.mark.usefixtures("nan_poison")
def test_compiled_gradients_of_key_and_value_wrong_or_nan_for_some_strides(
    strided: Callable[[Tensor], Tensor], kernel: tuple[str, str]
) -> None:
    backend, device = kernel
    torch._dynamo.reset()
    layout = scattered(100, 100, 32).to(device)
    tensors = [strided(torch.randn(2, 3, 100, 16, device=device)).requires_grad_() for _ in range(3)]
    weight = strided(torch.randn(2, 3, 100, 16, device=device))

    def gradients(backend: str, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        cast = [t.to(dtype) for t in tensors]
        out = sparse_attention(*cast, layout, backend=backend)
        return torch.autograd.grad((out * weight.to(dtype)).sum(), cast)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (sparse_attention(query, key, value, layout, backend=backend) * weight).sum()

    ours = torch.autograd.grad(compiled(*tensors), tensors)
    plain, exact = (gradients("reference", dtype, *tensors) for dtype in (torch.float32, torch.float64))
    for name, a, b, c in zip(("query", "key", "value"), ours, plain, exact):
        assert_accurate(a, b, c, name, ulps=16)


@for_each_kernel
@pytest.mark.usefixtures("nan_poison")
def test_a_mask_that_keeps_nothing_in_a_row(kernel: tuple[str, str]) -> None:
    backend, device = kernel
    mask = torch.rand(80, 90) < 0.3
    mask[[0, 17, 40, 79]] = False
    case = Case("empty rows", lambda: layouts.from_mask(mask, block_size=16))
    tensors, kwargs = inputs(case, torch.float32, device)
    found = outputs_and_gradients(tensors, kwargs, backend, seed=1)
    rows = [0, 17, 40, 79]
    assert not found["out"][:, :, rows].any()
    assert (found["lse"][:, :, rows] == -torch.inf).all()
    assert not found["gradient of query"][:, :, rows].any()
    assert all(found[name].isfinite().all() for name in found if name != "lse")


@for_each_kernel
def test_decoding_with_a_query_count_other_than_1_or_128(kernel: tuple[str, str]) -> None:
    backend, device = kernel
    layout = layouts.fixed(300, 32, 8, block_size=32).to(device)
    query, key, value = (torch.randn(1, 4, 300, 32, device=device) for _ in range(3))
    whole = sparse_attention(query, key, value, layout, backend="reference")
    for count in (1, 2, 3, 5, 8, 9, 16, 17, 100, 127, 128, 129):
        start = 300 - 131
        part = slice(start, start + count)
        out = sparse_attention(
            query[:, :, part], key[:, :, : part.stop], value[:, :, : part.stop], layout, query_start=start,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, :, part], msg=lambda text, n=count: f"{n} queries: {text}")


@for_each_kernel
@pytest.mark.parametrize("group", [3, 5, 6, 7, 12])
def test_group_counts_that_are_no_power_of_two(group: int, kernel: tuple[str, str]) -> None:
    check(Case("groups", lambda: scattered(90, 90, 32), heads=2 * group, kv_heads=2), torch.float32, *kernel)
    one = Case("groups", lambda: layouts.causal(90, block_size=32), heads=group, kv_heads=1, n_q=1, query_start=80)
    check(one, torch.float32, *kernel, ulps=16)  # sums of so few terms that plain PyTorch may be exact by luck
