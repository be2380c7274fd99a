"""orthogonalize: numbers, gradients, rank, shapes, errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdl_kernels
from gdl_kernels import orthogonalize
from gdl_kernels.ops.orthogonalize import op
from gdl_kernels.ops.orthogonalize.schedule import METHODS, QUINTIC, TUNED
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.usefixtures("nan_poison")

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
KERNELS = ["cpu", GPU]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = [
    (24, 8, 3, 3),  # a convolution, wide: steps go in rounds
    (148, 20),  # high
    (33, 40),  # nearly square: a round is one step
    (17, 9), (9, 17), (12, 11),  # small: padded into one stack
    (1, 50),  # one row
    (50, 1),  # one column
    (96, 192), (96, 192),  # of one shape: a stack
]  # fmt: skip
LARGE = [
    (390, 800),  # on half its tiles
    (3, 90_001),  # too large for a stack, divides nothing
]
CALLS: list[dict[str, Any]] = [
    {},
    {"steps": 5},
    {"steps": 7},
    {"method": "bjorck"},
    {"method": "bjorck", "steps": 4},
]


def random(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64).to(device, dtype)


def polar(weight: Tensor) -> Tensor:
    """By the singular value decomposition, in float64."""
    u, _, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    return (u @ v).view(weight.shape)


def small_gram(weight: Tensor) -> Tensor:
    matrix = weight.double().flatten(1)
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def run(weights: Sequence[Tensor], grads: Sequence[Tensor], backend: str, **call: Any) -> tuple[list[Tensor], ...]:
    leaves = [weight.detach().requires_grad_() for weight in weights]
    out = orthogonalize(leaves, backend=backend, **call)
    return [o.detach() for o in out], list(torch.autograd.grad(out, leaves, grads))


def plain_at_its_worst(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exact: tuple[list[Tensor], ...], **call: Any
) -> tuple[list[Tensor], ...]:
    """Plain PyTorch, for each result the worst of several runs on the same matrix, its columns mixed and scaled.

    The result is then the same, with its columns mixed. But the iteration lifts rounding errors as it lifts small
    singular values, so that one run's error is many times another's.
    """
    worst: tuple[list[Tensor], ...] = ([], [])
    for i, (weight, grad) in enumerate(zip(weights, grads)):
        runs = []
        for _ in range(10):
            order = torch.randperm(weight[0].numel(), device=weight.device)
            scale = 1 + torch.rand(()).item()
            mixed = [t.float().flatten(1)[:, order] for t in (weight, grad)]
            out, of_weight = run([mixed[0] * scale], [mixed[1]], "reference", **call)
            runs.append(
                [r[:, order.argsort()].view(weight.shape).to(weight.dtype) for r in (*out, of_weight[0] * scale)]
            )
        for kept, right, found in zip(worst, exact, zip(*runs)):
            kept.append(max(found, key=lambda r: (r.double() - right[i]).abs().max().nan_to_num(0).item()))
    return worst


def check(weights: Sequence[Tensor], grads: Sequence[Tensor], backend: str, **call: Any) -> None:
    ours = run(weights, grads, backend, **call)
    exact = run([w.double() for w in weights], [g.double() for g in grads], "reference", **call)
    plain = plain_at_its_worst(weights, grads, exact, **call)
    for what, *kinds in zip(("output", "gradient"), ours, plain, exact):
        for weight, grad, o, p, e in zip(weights, grads, *kinds):
            # A vector's gradient is what is left of this where nothing is left along the vector.
            terms = grad.double() / weight.double().norm() if what == "gradient" and 1 in weight.shape else None
            # and has one singular value, whose error no other averages.
            ulps = 16 if 1 in weight.shape else 2
            assert_accurate(o, p, e, f"{what} for {tuple(weight.shape)}", terms=terms, ulps=ulps)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices as small as these are slower on several
    yield
    torch.set_num_threads(threads)


# Narrow dtypes differ by how they are rounded before and after: one call shows it.
CASES = [(SHAPES, call, torch.float32) for call in CALLS]
CASES += [(SHAPES, {}, torch.float16), (SHAPES, {}, torch.bfloat16), (LARGE, {"steps": 5}, torch.float32)]


@pytest.mark.parametrize(("shapes", "call", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_output_and_gradient(
    backend: str, shapes: list[tuple[int, ...]], call: dict[str, Any], dtype: torch.dtype
) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    check([random(s, dtype, device) for s in shapes], [random(s, dtype, device) for s in shapes], backend, **call)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_the_result_is_the_polar_factor(backend: str, method: Any) -> None:
    weights = [random(shape, torch.float32, "cuda" if backend == "cuda" else "cpu") for shape in SHAPES]
    for weight, out in zip(weights, orthogonalize(weights, method=method, backend=backend)):
        gram = small_gram(out).cpu()
        identity = torch.eye(len(gram), dtype=torch.float64)
        assert (gram - identity).norm() < 4e-7 * (1 + len(gram) ** 0.5)
        singular = torch.linalg.svdvals(weight.double().flatten(1))
        condition = (singular[0] / singular[-1]).item()
        torch.testing.assert_close(out.double(), polar(weight), rtol=0, atol=1e-6 * condition)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_one_element_becomes_its_sign(backend: str) -> None:
    weight = torch.tensor([[-3.0]], device="cuda" if backend == "cuda" else "cpu")
    (out,), (grad,) = run([weight], [torch.ones_like(weight)], backend)
    torch.testing.assert_close(out, weight.sign(), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, torch.zeros_like(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 30), (30, 31), (30, 90)], ids=str)
def test_ill_conditioned(shape: tuple[int, int], method: Any) -> None:
    """Singular values down to a millionth: as they are is what steps=None goes on for."""
    u, v = (torch.linalg.qr(random((n, 30), torch.float64))[0] for n in shape)
    weight = (u * torch.logspace(0, -6, 30, dtype=torch.float64)) @ v.mT
    (out,) = orthogonalize([weight.float()], method=method, backend="cpu")
    assert (small_gram(out) - torch.eye(30)).norm() < 3e-6
    (exact,) = orthogonalize([weight], method=method, backend="cpu")
    torch.testing.assert_close(exact, polar(weight), rtol=0, atol=1e-8)


def test_five_steps_of_small_values() -> None:
    """What the docstring promises of singular values from 0.001 to 1 times the bound."""
    s = torch.logspace(-3, 0, 10_000, dtype=torch.float64) / 1.02
    for a, b, c in TUNED:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.7
    assert s.max() < 1.2
    a, b, c = QUINTIC
    assert a + b + c == 1


def test_reference_is_the_formula() -> None:
    weight = random((3, 5), torch.float64)
    gram = weight @ weight.T
    x = weight / gram.abs().sum(1).max().sqrt()
    x = 1.5 * x - 0.5 * x @ x.T @ x
    torch.testing.assert_close(orthogonalize([weight], steps=1, method="bjorck", backend="reference")[0], x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_scale(backend: str, scale: float) -> None:
    """Squares of these leave float32."""
    weight = random((8, 20), torch.float32, "cuda" if backend == "cuda" else "cpu")
    (out,) = orthogonalize([weight * scale], backend=backend)
    torch.testing.assert_close(out.double(), polar(weight), rtol=0, atol=2e-6)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_zero_and_rank_one(backend: str, call: dict[str, Any]) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    zero = torch.zeros(6, 20, device=device)
    u, v = random((6, 1), torch.float32, device), random((1, 20), torch.float32, device)
    weights = [zero, u @ v, zero.T]
    out, grads = run(weights, [torch.ones_like(w) for w in weights], backend, **call)
    assert torch.equal(out[0], zero)
    assert torch.equal(out[2], zero.T)
    assert all(g.isfinite().all() for g in (out[1], *grads[::2]))
    singular = torch.linalg.svdvals(out[1].double())
    assert singular.max() < 1.25
    if "steps" not in call:
        # Along u and v it is what it must be; elsewhere it is anything that is no longer than 1.
        along = (u / u.norm()).T.double() @ out[1].double() @ (v / v.norm()).T.double()
        torch.testing.assert_close(along.item(), 1.0, rtol=0, atol=2e-6)
        assert singular.max() < 1 + 1e-5


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_any_shapes_and_strides(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    dtype, call = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(CALLS))
    weights = []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
        if shape[0] == torch.Size(shape[1:]).numel():
            shape[0] += 3  # a random square matrix may be next to singular, and then nothing is accurate
        order = data.draw(st.permutations(range(len(shape))))
        memory = random([shape[d] * 2 for d in order], dtype)[tuple(slice(None, None, 2) for _ in order)]
        weights.append(memory.permute([order.index(d) for d in range(len(shape))]))
    ours, exact = (orthogonalize(ws, backend=b, **call) for ws, b in (
        (weights, "cpu"), ([w.double() for w in weights], "reference")
    ))  # fmt: skip
    for weight, o, e in zip(weights, ours, exact):
        assert o.shape == weight.shape
        assert o.dtype == dtype
        singular = torch.linalg.svdvals(weight.double().flatten(1))
        tolerance = torch.finfo(dtype).eps + 2e-5 * (singular[0] / singular[-1]).item()
        torch.testing.assert_close(o.double(), e, rtol=0, atol=tolerance)


def test_memory_format_stays() -> None:
    weight = random((24, 6, 3, 3), torch.float32).to(memory_format=torch.channels_last)
    (out,), (grad,) = run([weight], [torch.randn_like(weight)], "cpu")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, orthogonalize([weight.contiguous()], backend="cpu")[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_empty(backend: str) -> None:
    weights = [torch.empty(shape, device="cuda" if backend == "cuda" else "cpu") for shape in ((0, 4), (4, 0), (2, 3))]
    weights[2].normal_()
    out, grads = run(weights, [torch.ones_like(w) for w in weights], backend)
    assert [o.shape for o in out] == [g.shape for g in grads] == [w.shape for w in weights]


SMALL = [(3, 4), (4, 2), (2, 3, 2), (1, 3), (2, 7)]


@pytest.mark.parametrize("call", [{"steps": 5}, {}, {"method": "bjorck", "steps": 4}], ids=str)
def test_gradients_of_both_orders(call: dict[str, Any]) -> None:
    weights = [random(shape, torch.float64).requires_grad_() for shape in SMALL]

    def function(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(orthogonalize(weights, backend="cpu", **call))

    torch.autograd.gradcheck(function, weights, fast_mode=True)
    torch.autograd.gradgradcheck(function, weights, fast_mode=True)


def test_third_gradient() -> None:
    start = [random((2, 3), torch.float64), random((4, 3), torch.float64)]

    def third(backend: str) -> list[Tensor]:
        weights = [w.clone().requires_grad_() for w in start]
        value = sum(o.pow(3).sum() for o in orthogonalize(weights, steps=3, backend=backend))
        for _ in range(3):
            grads = torch.autograd.grad(value, weights, create_graph=True)
            value = sum(g.pow(2).sum() for g in grads)
        return list(grads)

    torch.testing.assert_close(third("cpu"), third("reference"))


def test_frozen_weights_cost_no_gradient() -> None:
    free, frozen = random((3, 5), torch.float32).requires_grad_(), random((3, 5), torch.float32)
    out = orthogonalize([frozen, free], backend="cpu")
    (grad,) = torch.autograd.grad(out[1].sum() + out[0].sum(), free)
    torch.testing.assert_close(grad, torch.autograd.grad(orthogonalize([free], backend="cpu")[0].sum(), free)[0])


def test_each_result_is_its_own() -> None:
    """What stands beside a weight in the list changes no more than rounding."""
    weights = [random(shape, torch.float32) for shape in SHAPES[:7]]
    together = orthogonalize(weights, backend="cpu")
    for weight, out in zip(weights, together):
        torch.testing.assert_close(out, orthogonalize([weight], backend="cpu")[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [3, None])
def test_registration(steps: int | None) -> None:
    # In float64: compiled code adds up in another order, and in float32 a gradient may cancel to few digits.
    weights = [random(shape, torch.float64).requires_grad_() for shape in SMALL[:3]]
    torch.library.opcheck(op.forward.dispatched, (weights, steps, "polar", "cpu"))
    grads = [torch.randn_like(w).requires_grad_() for w in weights]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if steps is not None:  # without, the second derivative looks at numbers, which torch.compile can't trace
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op.backward.dispatched, (grads, weights, steps, "polar", "cpu"), test_utils=checks)


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(lambda ws: [o + 1 for o in orthogonalize(ws, backend="cpu")], fullgraph=True)
    weights = [random(shape, torch.float32).requires_grad_() for shape in SMALL]
    ours, eager = compiled(weights), [o + 1 for o in orthogonalize(weights, backend="cpu")]
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(
        torch.autograd.grad([o.sum() for o in ours], weights), torch.autograd.grad([o.sum() for o in eager], weights)
    )


@pytest.mark.gpu
def test_a_number_of_steps_can_be_captured() -> None:
    weights = [random(shape, torch.float32, "cuda") for shape in SHAPES[:8]]
    expected = orthogonalize([2 * w for w in weights], steps=6)
    orthogonalize(weights, steps=6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = orthogonalize(weights, steps=6)
    for weight in weights:
        weight *= 2
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_backend_is_chosen_and_explained() -> None:
    weights = [random((3, 4), torch.float32)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(orthogonalize(weights)[0], orthogonalize(weights, backend="cpu")[0])
    verdicts = gdl_kernels.explain(orthogonalize, weights).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["cuda"] == "weights are on cpu"
    with pytest.raises(RuntimeError, match="backend 'cuda' can't serve this orthogonalize: weights are on cpu"):
        orthogonalize(weights, backend="cuda")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(3, 4), (300, 1000)], ids=str)
def test_a_weight_that_is_not_finite_is_named(shape: tuple[int, int], bad: float) -> None:
    weights = [random(shape, torch.float32) for _ in range(3)]
    weights[1][2, 3] = bad
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite, got infinite values or NaN"):
        orthogonalize(weights, backend="cpu")


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("weights", "call", "error", "message"),
    [
        (ONES, {}, TypeError, "weights must be a sequence of tensors, got Tensor"),
        (3, {}, TypeError, "weights must be a sequence of tensors, got int"),
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
        ([ONES], {"steps": 0}, ValueError, "steps must be positive, got 0"),
        ([ONES], {"steps": 2.0}, TypeError, "steps must be an integer or None, got float"),
        ([ONES], {"steps": True}, TypeError, "steps must be an integer or None, got bool"),
        ([ONES], {"method": "qr"}, ValueError, "method must be one of 'polar', 'bjorck', got 'qr'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None, weights: Any, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonalize(weights, backend=backend, **call)


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_a_bad_call_after_a_good_one(backend: str | None) -> None:
    """What is remembered of calls takes none for another."""
    for _ in range(2):
        orthogonalize([ONES, ONES], backend=backend)
        with pytest.raises(TypeError, match=r"weights\[1\] must be float32"):
            orthogonalize([ONES, ONES.int()], backend=backend)
        with pytest.raises(ValueError, match=r"weights\[1\] must have two dimensions or more"):
            orthogonalize([ONES, ONES[0]], backend=backend)
        with pytest.raises(ValueError, match="steps must"):
            orthogonalize([ONES, ONES], steps=-1, backend=backend)


def test_weights_may_come_one_by_one() -> None:
    weights = [torch.randn(3, 4), torch.randn(4, 3)]
    torch.testing.assert_close(orthogonalize(w for w in weights), orthogonalize(weights))
