"""sparse_attention by every backend.

Tests with the argument ``kernel`` run for the C++ kernels, the Triton kernels on a GPU and, where TRITON_INTERPRET=1
is set, for the Triton kernels in their interpreter. That is settled when they are imported, so the interpreter has a
process of its own: this file again, as a test of the first process.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gdl_kernels
from gdl_kernels import _backends, _native, layouts, sparse_attention
from gdl_kernels.ops.sparse_attention import op
from tests.accuracy import assert_accurate
from tests.ops.sparse_attention_cases import CASES, Case, check, check_second, inputs, outputs_and_gradients, scattered

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

#: (backend, device)
Kernel = tuple[str, str]
KERNELS = (
    [pytest.param(("triton", "cpu"), id="triton")]
    if INTERPRETING
    else [
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    ]
)
for_each_kernel = pytest.mark.parametrize("kernel", KERNELS)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

#: The interpreter takes seconds a case: there float16, whose tiles bfloat16 shares, has every case, the others these.
IN_EVERY_DTYPE = ("blocks of 16", "grouped key heads", "any order")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@for_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("nan_poison")
def test_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype, kernel: Kernel) -> None:
    backend, device = kernel
    if backend == "triton" and dtype == torch.float64:
        tensors, kwargs = inputs(case, dtype, device)
        with pytest.raises(RuntimeError, match="query is float64"):
            sparse_attention(*tensors, backend=backend, **kwargs)
        return
    if INTERPRETING and dtype != torch.float16 and case.reason not in IN_EVERY_DTYPE:
        pytest.skip("in the interpreter float16 stands for all, but for a few cases")
    # A GPU's float32 products add one term after another, plain PyTorch's add parts of a sum.
    check(case, dtype, backend, device, ulps=8 if backend == "triton" and dtype == torch.float32 else 2)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    # A process uses one core: second derivatives, which take about as long as all else, have their own.
    processes = [
        subprocess.Popen(
            [*pytest_here, "-k", f"triton and not interpreter and {which}"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for which in ("not second_derivatives", "second_derivatives")
    ]
    outputs = [process.communicate()[0] for process in processes]
    print(*outputs, sep="\n")
    assert not any(process.returncode for process in processes), "under TRITON_INTERPRET=1 cases failed, as told above"
    passed, passed_twice = (int(re.findall(r"(\d+) passed", output)[0]) for output in outputs)
    assert passed > 2 * len(CASES)  # all in float16, all refused in float64
    assert passed_twice >= 2 * len(CASES)


@given(
    block_size=st.sampled_from([16, 32, 64, 128]),
    n_q=st.integers(1, 140),
    n_k=st.integers(1, 140),
    head_dim=st.integers(1, 70),
    value_dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(
    block_size: int, n_q: int, n_k: int, head_dim: int, value_dim: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    kv_heads, group = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 5]))
    start = data.draw(st.integers(0, n_q - 1))
    case = Case(
        "drawn",
        lambda: scattered(n_q, n_k, block_size),
        batch=data.draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        n_q=data.draw(st.integers(1, n_q - start)),
        head_dim=head_dim,
        value_dim=value_dim,
        query_start=start,
        padding=data.draw(st.booleans()),
        transposed=data.draw(st.booleans()),
    )
    # On a handful of numbers plain PyTorch is often exact by luck: more ulps than for the cases above.
    check(case, dtype, "cpu", ulps=16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_to_second_order(backend: str, dropout_p: float) -> None:
    layout = layouts.from_mask(torch.rand(18, 20) < 0.4, block_size=16)
    padding = torch.rand(1, 20) < 0.2
    tensors = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (18, 20, 20)]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        kwargs = {"dropout_p": dropout_p, "key_padding_mask": padding, "backend": backend}
        out, lse = sparse_attention(*tensors, layout, return_lse=True, **kwargs)
        return torch.cat([out, lse.masked_fill(lse == -torch.inf, 0)[..., None]], -1)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@for_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("nan_poison")
def test_second_derivatives_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype, kernel: Kernel) -> None:
    backend, device = kernel
    if backend == "triton" and dtype == torch.float64:
        return  # refused, as the forward pass has shown
    if INTERPRETING and dtype != torch.float16:
        pytest.skip("in the interpreter float16 stands for all")
    check_second(case, dtype, backend, device)


def test_two_derivatives_without_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million positions, whose score matrix would take 4 TB; the third derivative says what it costs."""
    monkeypatch.setattr(_backends, "_warned", set())
    n = 1 << 20
    layout = layouts.local(n, 32, block_size=32)
    tensors = [torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = sparse_attention(*tensors, layout, backend="cpu")
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    few = [t[:, :, :200].detach().double().requires_grad_() for t in tensors]
    out = sparse_attention(*few, layouts.local(200, 32, block_size=32), backend="reference")
    first = torch.autograd.grad(out.square().sum(), few, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), few)
    for ours, exact in zip(second, expected):  # later queries reach back 31 keys, and they as far again
        torch.testing.assert_close(ours[:, :, :130].double(), exact[:, :, :130], rtol=1e-3, atol=1e-3)


def test_a_third_derivative_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_warned", set())
    tensors = [torch.randn(1, 1, 32, 4, requires_grad=True) for _ in range(3)]
    out = sparse_attention(*tensors, layouts.causal(32), backend="cpu")
    for _ in range(2):
        (out,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.warns(UserWarning, match=r"third derivatives from the reference, in O\(Nq \* Nk\) memory"):
        out.square().sum().backward()


def test_third_derivatives_are_the_references() -> None:
    layout = layouts.causal(20, block_size=16)
    tensors = [torch.randn(1, 2, 20, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    third = []
    for backend in ("cpu", "reference"):
        out = sparse_attention(*tensors, layout, backend=backend)
        (first,) = torch.autograd.grad(out.pow(3).sum(), tensors[:1], create_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (second,) = torch.autograd.grad(first.pow(2).sum(), tensors[1:2], create_graph=True)
            third.append(torch.autograd.grad(second.pow(2).sum(), tensors))
    for ours, theirs in zip(*third):
        torch.testing.assert_close(ours, theirs)


def test_lse_of_other_strides() -> None:
    """Saved tensors may come back with other strides, as from a hook that moves them away and back."""
    tensors, kwargs = inputs(Case("any", lambda: scattered(60, 60, 32)), torch.float32)
    layout = kwargs["layout"]
    rest = (None, layout.tensors(), layout.sizes(), 0.25, 0, None, 0.0, None, "cpu")
    out, lse = op.forward(*tensors, *rest)
    strided = torch.stack([lse, lse], -1)[..., 0]
    for ours, theirs in zip(*(op.backward(out, None, *tensors, out, saved, *rest) for saved in (strided, lse))):
        assert torch.equal(ours, theirs)


def test_offsets_beyond_32_bits() -> None:
    """Heads more than 2^31 elements apart."""
    base = torch.empty(2**31 + 200_000, dtype=torch.float16)
    far = base.as_strided((1, 2, 64, 16), (0, 2**31 + 64, 16, 1))
    near = torch.randn(1, 2, 64, 16).half()
    far.copy_(near)
    layout = layouts.causal(64, block_size=32)
    assert torch.equal(*(sparse_attention(t, t, t, layout, backend="cpu") for t in (far, near)))


def test_the_gradient_of_one_query_costs_one_row() -> None:
    """Of a layout of 2^18 rows, whose packed queries and gradients would take gigabytes."""
    n, heads = 1 << 18, 8
    query = torch.randn(1, heads, 1, 64, requires_grad=True)
    key, value = (torch.randn(1, 1, n, 64) for _ in range(2))
    layout = layouts.local(n, 100)
    out = sparse_attention(query, key, value, layout, query_start=n - 1, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (gradient,) = torch.autograd.grad(out.sum(), query)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 5 * key.nbytes, f"{grown / 2**20:.0f} MiB"  # gradients of all keys and values are twice that
    few = [t[:, :, -100:].double() for t in (key, value)]
    exact = query.detach().double().requires_grad_()
    expected = sparse_attention(exact, *few, layouts.full(1, 100), backend="reference")
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0].float(), rtol=1e-4, atol=1e-5)


def test_agrees_with_torchs_own_attention() -> None:
    """The reference is checked by a peer, not by itself."""
    query, key, value = (torch.randn(2, 4, 100, 24, dtype=torch.float64) for _ in range(3))
    layout = layouts.local(100, 30, block_size=32)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.to_mask(), scale=0.3)
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(sparse_attention(query, key, value, layout, scale=0.3, backend=backend), theirs)


def test_agrees_with_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    layout = layouts.fixed(256, 64, 8, block_size=64)
    mask = layout.to_mask()
    block_mask = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, 256, 256, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled, which is no concern here
        theirs, theirs_lse = flex_attention(query, key, value, block_mask=block_mask, return_lse=True)
    ours, lse = sparse_attention(query, key, value, layout, return_lse=True, backend="cpu")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(lse, theirs_lse)


@for_each_kernel
def test_two_runs_are_equal_to_the_bit(kernel: Kernel) -> None:
    backend, device = kernel
    case = Case("any", lambda: scattered(90, 90, 16, heads=4), heads=4, kv_heads=2)
    tensors, kwargs = inputs(case, torch.float32, device)
    first, second = (outputs_and_gradients(tensors, kwargs, backend, seed=1) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@for_each_kernel
@pytest.mark.parametrize("shape", [(0, 2, 20), (1, 2, 0)], ids=["no batch", "no queries"])
def test_empty(shape: tuple[int, int, int], kernel: Kernel) -> None:
    backend, device = kernel
    batch, heads, n_q = shape
    query = torch.randn(batch, heads, n_q, 16, device=device, requires_grad=True)
    key, value = (torch.randn(batch, heads, 20, 16, device=device, requires_grad=True) for _ in range(2))
    out = sparse_attention(query, key, value, scattered(20, 20, 16).to(device), backend=backend)
    assert out.shape == query.shape
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (query, key, value)), (query, key, value)):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@for_each_kernel
def test_what_lies_in_padded_keys_goes_nowhere(kernel: Kernel) -> None:
    backend, device = kernel
    layout = scattered(70, 70, 32).to(device)
    query, key, value = (torch.randn(1, 2, 70, 16, device=device, requires_grad=True) for _ in range(3))
    padding = torch.zeros(1, 70, dtype=torch.bool, device=device)
    padding[0, 40:] = True
    clean = sparse_attention(query, key, value, layout, key_padding_mask=padding, backend=backend)
    with torch.no_grad():
        key[:, :, 40:], value[:, :, 40:] = torch.nan, torch.inf
    out = sparse_attention(query, key, value, layout, key_padding_mask=padding, backend=backend)
    assert torch.equal(out, clean)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients)
    assert not any(g[:, :, 40:].any() for g in gradients[1:])


@for_each_kernel
@pytest.mark.usefixtures("nan_poison")
def test_gradients_of_expanded_tensors(kernel: Kernel) -> None:
    """Gradients have memory of their own where the inputs have not, and every element of it is written."""
    backend, device = kernel
    query = torch.randn(2, 40, 2, 16, device=device).transpose(1, 2)
    key, value = (torch.randn(1, 2, 40, 16, device=device).expand(2, -1, -1, -1) for _ in range(2))
    layout = scattered(40, 40, 16).to(device)
    rest = (None, layout.tensors(), layout.sizes(), 0.25, 0, None, 0.0, None, backend)
    out, lse = op.forward(query, key, value, *rest)
    grad_out = torch.ones(1, 1, 1, 16, device=device).expand_as(out)
    gradients = op.backward(grad_out, None, query, key, value, out, lse, *rest)
    assert all(g.isfinite().all() for g in gradients)


def test_more_threads_than_key_heads() -> None:
    """The backward pass then splits the columns of a head and adds up copies of the gradient of the queries."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        check(Case("one head", lambda: scattered(300, 300, 32), heads=1, kv_heads=1), torch.float32, "cpu")
    finally:
        torch.set_num_threads(threads)


def test_nan_reaches_the_rows_that_see_it_and_no_other() -> None:
    layout = layouts.local(64, 8, block_size=16)
    query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
    key[0, 0, 20] = torch.nan
    out = sparse_attention(query, key, value, layout, backend="cpu")
    sees = layout.to_mask()[:, 20]
    assert out[0, 0, sees].isnan().all()
    assert out[0, 0, ~sees].isfinite().all()


@for_each_kernel
def test_scores_far_apart_and_a_negative_scale(kernel: Kernel) -> None:
    """Differences beyond what exp2 can hold give weights of 0 and 1, not NaN."""
    backend, device = kernel
    query, key, value = (torch.randn(1, 1, 40, 16, device=device) * 30 for _ in range(3))
    layout = scattered(40, 40, 16).to(device)
    ours, plain = (sparse_attention(query, key, value, layout, scale=-0.7, backend=b) for b in (backend, "reference"))
    exact = sparse_attention(*(t.double() for t in (query, key, value)), layout, scale=-0.7, backend="reference")
    assert_accurate(ours, plain, exact)


def test_one_query_at_a_time_is_the_whole() -> None:
    layout = layouts.fixed(70, 16, 4, block_size=16)
    query, key, value = (torch.randn(2, 3, 70, 8) for _ in range(3))
    whole = sparse_attention(query, key, value, layout, backend="cpu")
    for i in range(70):
        row = sparse_attention(
            query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], layout, query_start=i, backend="cpu"
        )
        torch.testing.assert_close(row[:, :, 0], whole[:, :, i])


def test_opcheck() -> None:
    layout = scattered(40, 40, 16)
    tensors = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    rest = (None, layout.tensors(), layout.sizes(), 0.3, 0, torch.tensor(0), 0.25, torch.tensor(5), "cpu")
    torch.library.opcheck(op.forward.dispatched, (*tensors, *rest))
    out, lse = op.forward(*(t.detach() for t in tensors), *rest)
    grads = torch.randn_like(out).requires_grad_(), torch.randn_like(lse).requires_grad_()
    torch.library.opcheck(op.backward.dispatched, (*grads, *tensors, out, lse, *rest))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    layout = layouts.causal(96, block_size=32)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sparse_attention(query * 2, key, value, layout)

    tensors = [torch.randn(1, 2, 96, 16, requires_grad=True) for _ in range(3)]
    out = compiled(*tensors)
    expected = sparse_attention(tensors[0] * 2, *tensors[1:], layout, backend="reference")
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, tensors, weight) for o in (out, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_autocast_runs_in_its_dtype() -> None:
    layout = layouts.causal(40, block_size=16)
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_attention(query, key, value, layout)
        double = sparse_attention(query.double(), key.double(), value.double(), layout)
        with pytest.raises(TypeError, match=r"query must be float32.*int64"):
            sparse_attention(query.long(), key.long(), value.long(), layout)
    low = [t.bfloat16() for t in (query, key, value)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sparse_attention(*low, layout))
    assert double.dtype == torch.float64  # as PyTorch's own attention has it


def test_under_the_reference_backend_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a registered op ran")

    monkeypatch.setattr(op, "forward", forbidden)
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    with gdl_kernels.backend("reference"):
        sparse_attention(query, key, value, layouts.causal(40))


def test_memory_grows_with_the_kept_blocks() -> None:
    """No N x N anywhere: a million positions, whose score matrix would take 4 TB."""
    n = 1 << 20
    layout = layouts.local(n, 64)
    query, key, value = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    out = sparse_attention(query, key, value, layout, backend="cpu")
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    tail = slice(n - 200, n)
    small = [t[:, :, n - 264 :].detach().double().requires_grad_() for t in (query, key, value)]
    expected = sparse_attention(*small, layouts.local(264, 64), backend="reference")[:, :, 64:]
    torch.testing.assert_close(out[:, :, tail].double(), expected, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients)


def call(**changes: Any) -> Any:
    """A good call, with some of its arguments replaced."""
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 4, 64, 16),
        "key": torch.randn(2, 2, 64, 16),
        "value": torch.randn(2, 2, 64, 16),
        "layout": layouts.causal(64, block_size=32),
    }
    return sparse_attention(**{**arguments, **changes})


def test_the_good_call_is_good() -> None:
    assert call().shape == (2, 4, 64, 16)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"query": torch.randn(4, 64, 16)}, ValueError, r"query must be \(batch, heads.*\(4, 64, 16\)"),
        ({"query": [1, 2]}, TypeError, "query must be a tensor, got list"),
        ({"query": torch.ones(2, 4, 64, 16, dtype=torch.int64)}, TypeError, "query must be float32.*int64"),
        ({"key": torch.randn(2, 2, 64, 16).bfloat16()}, TypeError, "key must have the dtype of query.*bfloat16"),
        ({"value": torch.empty(2, 2, 64, 16, device="meta")}, ValueError, "value must be on the device of query, cpu"),
        ({"key": torch.randn(3, 2, 64, 16)}, ValueError, "batch size of query, 2, got 3"),
        ({n: torch.randn(2, 3, 64, 16) for n in ("key", "value")}, ValueError, "heads of key, 3, must divide.*4"),
        ({"value": torch.randn(2, 2, 63, 16)}, ValueError, r"value must have the heads and positions of key"),
        ({"key": torch.randn(2, 2, 64, 8)}, ValueError, "key must have the features of query, 16, got 8"),
        ({"layout": torch.ones(64, 64)}, TypeError, "layout must be a gdl_kernels.layouts.Layout, got Tensor"),
        ({"layout": layouts.causal(60)}, ValueError, "layout is for 60 keys, got 64"),
        ({"layout": layouts.full(64, 70)}, ValueError, "layout is for 70 keys, got 64"),
        ({"layout": scattered(64, 64, 32, heads=3)}, ValueError, "1 head or as many as query, 4, got 3"),
        ({"query_start": 1}, ValueError, "query_start=1 with 64 queries"),
        ({"query_start": -1}, ValueError, "query_start=-1"),
        ({"query_start": 0.0}, TypeError, "query_start must be an integer or a tensor of one, got float"),
        ({"query_start": torch.tensor(0.0)}, TypeError, "query_start must be of an integer dtype, got torch.float32"),
        ({"query_start": torch.tensor([0, 0])}, ValueError, r"query_start must have one element, got shape \(2,\)"),
        ({"query_start": torch.tensor(0, device="meta")}, ValueError, "query_start must be on the device of query"),
        ({"query_start": torch.tensor(1)}, ValueError, "query_start=1 with 64 queries"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be from 0 up to, not including, 1, got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be .* got -0.1"),
        ({"dropout_p": "0"}, TypeError, "dropout_p must be a number, got str"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number, got Tensor"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"key_padding_mask": [1]}, TypeError, "key_padding_mask must be a tensor, got list"),
        ({"key_padding_mask": torch.zeros(2, 64)}, TypeError, "key_padding_mask must be bool"),
        ({"key_padding_mask": torch.zeros(2, 63, dtype=torch.bool)}, ValueError, r"must be \(2, 64\), got \(2, 63\)"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'auto'"),
        ({"backend": "cuda"}, RuntimeError, "sparse_attention has no cuda kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    for _ in range(2):  # nor is it taken for the good one, which is remembered
        assert call().shape == (2, 4, 64, 16)
        with pytest.raises(error, match=says):
            call(**changes)


def decoded(cache: dict[str, torch.Tensor], layout: layouts.Layout, n_k: int, **changes: Any) -> torch.Tensor:
    """A token, from as many keys as there are by then."""
    arguments = {name: tensor[:, :, :n_k] for name, tensor in cache.items()}
    arguments["query"] = cache["query"][:, :, n_k - 1 : n_k]
    arguments["key_padding_mask"] = torch.zeros(2, n_k, dtype=torch.bool)
    return sparse_attention(**{**arguments, "layout": layout, "query_start": n_k - 1, **changes})


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="no C++ kernels, no calls remembered")
def test_decoding_is_one_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each token would be checked anew, and remembered. What grows is checked all the same."""
    monkeypatch.setattr(_backends, "_served", {})
    layout = layouts.causal(64, block_size=16)
    cache = {name: torch.randn(2, 2, 64, 8) for name in ("query", "key", "value")}
    dense = {name: tensor[:, :, :40].clone() for name, tensor in cache.items()}  # strides grow as those of torch.cat do
    whole = sparse_attention(**cache, layout=layout)
    for n_k in range(2, 64):
        for where in (cache, {name: tensor[:, :, :n_k].clone() for name, tensor in cache.items()}):
            torch.testing.assert_close(decoded(where, layout, n_k)[:, :, 0], whole[:, :, n_k - 1])
    assert len(_backends._served) == 2  # with the whole's
    for n_k in (39, 40):
        with pytest.raises(ValueError, match=rf"needs between {n_k + 1} and 64 keys, got {n_k}"):
            decoded(dense, layout, n_k, query_start=n_k)
        with pytest.raises(ValueError, match=rf"value must have the heads .*\(2, {n_k}\), got \(2, {n_k - 1}\)"):
            decoded(dense, layout, n_k, value=dense["value"][:, :, : n_k - 1])
        with pytest.raises(ValueError, match=rf"key_padding_mask must be \(2, {n_k}\), got \(2, {n_k - 1}\)"):
            decoded(dense, layout, n_k, key_padding_mask=torch.zeros(2, n_k - 1, dtype=torch.bool))
        with pytest.raises(ValueError, match="query_start=64 with 1 queries asks for 64 to 64"):
            decoded(dense, layout, n_k, query_start=64)
        with pytest.raises(ValueError, match=f"layout is for 32 keys, got {n_k}"):
            decoded(dense, layouts.causal(32, block_size=16), n_k, query_start=0)
        with pytest.raises(ValueError, match=f"layout is for 64 keys, got {n_k}"):
            decoded(dense, layouts.full(64, block_size=16), n_k)


def test_a_layout_whose_memory_has_moved() -> None:
    """As torch moves what is sent to another process, in place."""
    layout = scattered(70, 70, 16)
    tensors = [torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3)]
    before = sparse_attention(*tensors, layout, backend="cpu")
    addresses = [t.data_ptr() for t in layout.tensors()]
    ForkingPickler.dumps(layout)
    assert any(t.data_ptr() != address for t, address in zip(layout.tensors(), addresses))
    after = sparse_attention(*tensors, layout, backend="cpu")
    assert torch.equal(before, after)
    weight = torch.randn_like(before)
    for ours, theirs in zip(*(torch.autograd.grad(out, tensors, weight) for out in (after, before))):
        assert torch.equal(ours, theirs)


def test_a_padding_mask_of_any_strides() -> None:
    """Of a causal layout's keys those past the last query are not read, nor is their part of the mask."""
    query, key, value = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 60, 8), torch.randn(3, 2, 60, 8)
    padding = torch.rand(3, 60) < 0.4
    masks = (padding, padding.t().contiguous().t(), F.pad(padding, (1, 2))[:, 1:-2])
    outs = [
        sparse_attention(query, key, value, layouts.causal(60), query_start=30, key_padding_mask=mask, backend=backend)
        for mask in masks
        for backend in ("cpu", "reference")
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_a_cache_shorter_than_the_queries_reach() -> None:
    layout = layouts.causal(64)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 30, 8)
    with pytest.raises(ValueError, match="needs between 41 and 64 keys, got 30"):
        sparse_attention(query, key, key, layout, query_start=40)


@pytest.mark.parametrize("n_q", [1, 3])
def test_decoding_reads_no_key_that_it_does_not_keep(n_q: int) -> None:
    """What else lies in a partial block goes nowhere, NaN too."""
    layout = scattered(130, 100, 32)
    query, key, value = torch.randn(1, 2, n_q, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    expected = sparse_attention(query, key, value, layout, query_start=77, backend="cpu")
    kept = layout.to_mask()[..., 77 : 77 + n_q, :].any(-2).expand(2, -1)
    assert not kept.all()
    key[:, ~kept] = value[:, ~kept] = torch.nan
    out = sparse_attention(query, key, value, layout, query_start=77, backend="cpu")
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
