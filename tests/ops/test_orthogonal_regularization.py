"""orthogonal_regularization: numbers, gradients, both Gram matrices, cancellation, errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdl_kernels
from gdl_kernels import orthogonal_regularization
from gdl_kernels.ops.orthogonal_regularization import op
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.usefixtures("nan_poison")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("triton", "cpu"), id="triton")
    if INTERPRETING
    else pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRAMS = ["columns", "rows"]

LISTS = {
    "of every kind": [
        (24, 8, 3, 3),  # a convolution, wide
        (148, 20),  # high
        (33, 33),  # square: either side is the smaller
        (17, 9), (9, 17), (12, 11),  # small: padded into stacks
        (1, 50), (50, 1), (1, 1),  # one side has nothing off the diagonal
        (96, 104), (96, 104),  # of one shape; rows of 16 bytes
        (130, 150),  # more tiles than one on the GPU, divides nothing
        (5, 1100),  # more terms than the GPU adds at once
    ],
    "many": [(5, 7)] * 37,  # more than a launch takes addresses
    "large": [(400, 700), (3, 90_001)],  # on half its tiles; too large for a stack
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices as small as these are slower on several
    yield
    torch.set_num_threads(threads)


def random(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64).to(device, dtype)


def run(weights: Sequence[Tensor], backend: str, scale: float = 3.0, **call: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [weight.detach().requires_grad_() for weight in weights]
    penalty = orthogonal_regularization(leaves, backend=backend, **call)
    return penalty.detach(), list(torch.autograd.grad(scale * penalty, leaves))


def direct(weight: Tensor, gram: str) -> tuple[Tensor, Tensor]:
    """The penalty of one weight for beta = 1, and its gradient times 3, a band of a large Gram matrix at a time."""
    w = weight.flatten(1) if gram == "rows" else weight.flatten(1).T
    penalty, grad = w.new_zeros((), dtype=torch.promote_types(w.dtype, torch.float32)), []
    for start in range(0, w.shape[0], 1000):
        g = w[start : start + 1000] @ w.T
        g.diagonal(start).zero_()
        penalty = penalty + g.square().sum()
        grad.append(12 * g @ w)
    full = torch.cat(grad)
    return penalty, (full if gram == "rows" else full.T).reshape(weight.shape)


def check(weights: Sequence[Tensor], backend: str, **call: Any) -> None:
    ours, plain = run(weights, backend, **call), run(weights, "reference", **call)
    exact = run([w.double() for w in weights], "reference", **call)
    # One number, which plain PyTorch may have by luck. Tensor cores cut sums off, which is not made good over a sum.
    tensor_cores = backend == "triton" and not INTERPRETING and weights[0].dtype in (torch.float16, torch.bfloat16)
    assert_accurate(ours[0], plain[0], exact[0], "penalty", ulps=32 if tensor_cores else 8)
    for weight, *grads in zip(weights, ours[1], plain[1], exact[1]):
        # Of many small matrices plain PyTorch has some by luck to the last place.
        assert_accurate(*grads, what=f"gradient of {tuple(weight.shape)}", ulps=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("weights", ["of every kind", "many"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_penalty_and_gradient(kernel: tuple[str, str], weights: str, gram: str, dtype: torch.dtype) -> None:
    backend, device = kernel
    check([random(shape, dtype, device) for shape in LISTS[weights]], backend, gram=gram, beta=1e-3)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton and not interpr"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 2 * len(DTYPES) * len(GRAMS)


@pytest.mark.parametrize("gram", GRAMS)
def test_large_matrices(gram: str) -> None:
    """Each against the Gram matrix that was asked for, in bands, where plain PyTorch would need 32 GB for it."""
    for shape in LISTS["large"]:
        weight = random(shape, torch.float32)
        if shape[1] > 1000 and gram == "columns":
            weight = weight[:, :5003]
        penalty, (grad,) = run([weight], "cpu", gram=gram, beta=1.0)
        plain, exact = direct(weight, gram), direct(weight.double(), gram)
        assert_accurate(penalty, plain[0], exact[0], f"penalty of {shape}", ulps=8)
        assert_accurate(grad, plain[1], exact[1], f"gradient of {shape}")


@pytest.mark.parametrize("gram", GRAMS)
def test_reference_is_the_formula(gram: str) -> None:
    weight, beta = random((3, 2, 2), torch.float64).requires_grad_(), 0.3
    w = weight.detach().view(3, 4)
    lines = w.T if gram == "columns" else w
    terms = [(a @ b) ** 2 for i, a in enumerate(lines) for j, b in enumerate(lines) if i != j]
    penalty = orthogonal_regularization([weight], beta=beta, gram=gram, backend="reference")
    torch.testing.assert_close(penalty, beta * sum(terms))
    off = 1 - torch.eye(len(lines), dtype=torch.float64)
    expected = 4 * beta * (w @ (w.T @ w * off) if gram == "columns" else (w @ w.T * off) @ w)
    torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], expected.view(3, 2, 2))


def test_the_two_sides_differ_and_columns_are_the_default() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]])  # rows are orthogonal, columns are not
    assert orthogonal_regularization([weight], beta=1.0, gram="rows") == 0
    assert orthogonal_regularization([weight], beta=1.0) == orthogonal_regularization([weight.T], beta=1.0, gram="rows")
    assert orthogonal_regularization([weight], beta=1.0) == 8


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (19, 25), (400, 500)], ids=str)
@pytest.mark.parametrize("gram", GRAMS)
def test_where_the_difference_cancels(gram: str, shape: tuple[int, int]) -> None:
    """Nearly orthogonal vectors: the penalty of the larger side is a small part of what it is the difference of."""
    short, long = sorted(shape)
    weight = torch.eye(short, long, dtype=torch.float64) + 1e-4 * random((short, long), torch.float64)
    weight = (weight if shape == (short, long) else weight.T).float()
    check([weight], "cpu", gram=gram, beta=1.0)
    check([weight, random(shape, torch.float32)], "cpu", gram=gram, beta=1.0)  # in one stack with one that does not


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_any_shapes_and_strides(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    dtype, gram = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(GRAMS))
    weights = []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
        order = data.draw(st.permutations(range(len(shape))))
        memory = random([shape[d] * 2 for d in order], dtype)[tuple(slice(None, None, 2) for _ in order)]
        weights.append(memory.permute([order.index(d) for d in range(len(shape))]))
    check(weights, "cpu", gram=gram)


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_weights(kernel: tuple[str, str], gram: str) -> None:
    """Channels last, transposed, a slice, not aligned, one for all."""
    backend, device = kernel
    base = random((24, 16, 3, 3), torch.float16, device)
    last = base.to(memory_format=torch.channels_last)
    odd = torch.cat([base.new_zeros(1), base.flatten()])[1:].view(base.shape)
    weights = [last, base.flatten(1).T, base[::2, 1::3], odd, base[:1].expand_as(base)]
    check(weights, backend, gram=gram)
    _, (grad, *_) = run(weights, backend, gram=gram)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gram", GRAMS)
def test_zero_rank_one_and_empty(gram: str, kernel: tuple[str, str]) -> None:
    backend, device = kernel
    rank_one = random((6, 1), torch.float32, device) @ random((1, 9), torch.float32, device)
    empty = [torch.empty(shape, device=device) for shape in ((0, 4), (4, 0), (3, 0, 2))]
    weights = [torch.zeros(6, 9, device=device), rank_one, *empty]
    check(weights[:2], backend, gram=gram)
    penalty, grads = run(weights, backend, gram=gram)
    torch.testing.assert_close(penalty, run([rank_one], backend, gram=gram)[0])
    assert torch.equal(grads[0], weights[0])
    assert [g.shape for g in grads] == [w.shape for w in weights]
    assert run(empty, backend, gram=gram)[0] == 0


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e4, 1e8])
@pytest.mark.parametrize("gram", GRAMS)
def test_scales(gram: str, scale: float) -> None:
    """From where squares vanish to where they are more than float32 holds."""
    check([scale * random((20, 30), torch.float32)], "cpu", gram=gram, beta=1.0)


SMALL = [(3, 4), (4, 2), (2, 3, 2), (1, 3), (3, 3)]


@pytest.mark.parametrize("gram", GRAMS)
def test_gradients_of_both_orders(gram: str) -> None:
    weights = [random(shape, torch.float64).requires_grad_() for shape in SMALL]

    def function(*weights: Tensor) -> Tensor:
        return orthogonal_regularization(weights, beta=0.1, gram=gram, backend="cpu")

    torch.autograd.gradcheck(function, weights)
    torch.autograd.gradgradcheck(function, weights)


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_second_gradient(kernel: tuple[str, str], gram: str) -> None:
    backend, device = kernel
    start = [random(shape, torch.float32, device) for shape in LISTS["of every kind"]]
    along = [random(w.shape, torch.float32, device) for w in start]

    def second(backend: str, dtype: torch.dtype) -> list[Tensor]:
        weights = [w.to(dtype).requires_grad_() for w in start]
        grad = torch.tensor(0.7, dtype=dtype, device=device, requires_grad=True)
        penalty = orthogonal_regularization(weights, gram=gram, backend=backend)
        first = torch.autograd.grad(penalty, weights, grad, create_graph=True)
        return list(torch.autograd.grad(first, [grad, *weights], [v.to(dtype) for v in along]))

    ours, plain, exact = (
        second(backend, torch.float32),
        second("reference", torch.float32),
        second("reference", torch.float64),
    )
    gradients = run([w.double() for w in start], "reference", 1.0, gram=gram)[1]
    products = torch.cat([(v.double() * g).flatten() for v, g in zip(along, gradients)]).norm()
    for what, *values in zip(["grad", *map(str, LISTS["of every kind"])], ours, plain, exact):
        # That of grad is one number: a sum over all weights, which cancels.
        assert_accurate(*values, what=what, ulps=16, terms=products if what == "grad" else None)


def test_third_gradient() -> None:
    start = [random(shape, torch.float64) for shape in SMALL]

    def third(backend: str) -> list[Tensor]:
        weights = [w.clone().requires_grad_() for w in start]
        value = orthogonal_regularization(weights, beta=0.1, backend=backend)
        for _ in range(3):
            grads = torch.autograd.grad(value, weights, create_graph=True)
            value = sum(g.pow(2).sum() for g in grads)
        return list(grads)

    torch.testing.assert_close(third("cpu"), third("reference"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_twice_and_frozen_weights(kernel: tuple[str, str]) -> None:
    backend, device = kernel
    free, frozen = random((5, 7), torch.float32, device).requires_grad_(), random((7, 5), torch.float32, device)
    penalty = orthogonal_regularization([frozen, free], backend=backend)
    first, again = (torch.autograd.grad(penalty, free, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, run([free], backend, scale=1.0)[1][0])
    with torch.no_grad():
        torch.testing.assert_close(orthogonal_regularization([frozen, free], backend=backend), penalty.detach())


@pytest.mark.parametrize("gram", GRAMS)
def test_registration(gram: str) -> None:
    weights = [random(shape, torch.float32).requires_grad_() for shape in SMALL[:3]]
    columns = gram == "columns"
    torch.library.opcheck(op.forward.dispatched, (weights, 0.1, columns, True, "cpu"))
    torch.library.opcheck(op.forward.dispatched, ([w.detach() for w in weights], 0.1, columns, False, "cpu"))
    _, kept = op.forward([w.detach() for w in weights], 0.1, columns, True, "cpu")
    torch.library.opcheck(op.backward.dispatched, (torch.tensor(2.0), weights, kept, 0.1, columns, "cpu"))


def test_compiles_into_one_graph() -> None:
    def function(weights: list[Tensor]) -> Tensor:
        return 2 * orthogonal_regularization(weights, backend="cpu")

    compiled = torch.compile(function, fullgraph=True)
    weights = [random(shape, torch.float32).requires_grad_() for shape in SMALL]
    ours, eager = compiled(weights), function(weights)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(torch.autograd.grad(ours, weights), torch.autograd.grad(eager, weights))


@pytest.mark.gpu
def test_a_graph_takes_new_weights() -> None:
    weights = [random(shape, torch.float32, "cuda") for shape in LISTS["of every kind"]]
    expected = orthogonal_regularization([2 * w for w in weights])
    orthogonal_regularization(weights)  # compiles, and puts the tables on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = orthogonal_regularization(weights)
    for weight in weights:
        weight *= 2
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_backend_is_chosen_and_explained() -> None:
    weights = [random((3, 4), torch.float32)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(orthogonal_regularization(weights), orthogonal_regularization(weights, backend="cpu"))
    verdicts = gdl_kernels.explain(orthogonal_regularization, weights).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["cuda"] == "orthogonal_regularization has no cuda kernel"
    if not INTERPRETING:
        with pytest.raises(RuntimeError, match=r"backend 'triton' can't serve this.*weights are on cpu"):
            orthogonal_regularization(weights, backend="triton")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("shape", [(3, 4), (300, 1000)], ids=str)
def test_a_weight_that_is_not_finite_is_named(shape: tuple[int, int], gram: str, bad: float) -> None:
    weights = [random(shape, torch.float32) for _ in range(3)]
    weights[1][2, 3] = bad
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite, got infinite values or NaN"):
        orthogonal_regularization(weights, gram=gram, backend="cpu")


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("weights", "call", "error", "message"),
    [
        (ONES, {}, TypeError, "weights must be a sequence of tensors, got Tensor"),
        ([], {}, ValueError, "weights must hold at least one tensor, got none"),
        ([ONES, 1.0], {}, TypeError, r"weights\[1\] must be a tensor, got float"),
        ([ONES, torch.ones(3)], {}, ValueError, r"weights\[1\] must have two dimensions or more, got shape \(3,\)"),
        ([ONES.long()], {}, TypeError, r"weights\[0\] must be float32, .* got torch.int64"),
        (
            [ONES, ONES.half()],
            {},
            TypeError,
            r"weights\[1\] must have the dtype of weights\[0\], torch.float32, got tor",
        ),
        ([ONES, ONES.to("meta")], {}, ValueError, r"weights\[1\] must be on the device of weights\[0\], cpu, got meta"),
        ([ONES], {"beta": -1.0}, ValueError, "beta must be finite and not negative, got -1.0"),
        ([ONES], {"beta": float("inf")}, ValueError, "beta must be finite and not negative, got inf"),
        ([ONES], {"beta": "much"}, TypeError, "beta must be a number, got str"),
        ([ONES], {"gram": "both"}, ValueError, "gram must be 'columns' or 'rows', got 'both'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None, weights: Any, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonal_regularization(weights, backend=backend, **call)


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_a_bad_call_after_a_good_one(backend: str | None) -> None:
    """What is remembered of calls takes none for another."""
    for _ in range(2):
        orthogonal_regularization([ONES, ONES], backend=backend)
        with pytest.raises(TypeError, match=r"weights\[1\] must be float32"):
            orthogonal_regularization([ONES, ONES.int()], backend=backend)
        with pytest.raises(ValueError, match=r"weights\[1\] must have two dimensions or more"):
            orthogonal_regularization([ONES, ONES[0]], backend=backend)
        with pytest.raises(ValueError, match="beta must"):
            orthogonal_regularization([ONES, ONES], beta=-1, backend=backend)


def test_weights_may_come_one_by_one() -> None:
    weights = [torch.randn(3, 4), torch.randn(4, 3)]
    torch.testing.assert_close(orthogonal_regularization(w for w in weights), orthogonal_regularization(weights))
