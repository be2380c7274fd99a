"""spectral_normalize: numbers, gradients, layouts in memory, errors.

Tests with the argument ``kernel`` run for the C++ kernels, the Triton kernels on a GPU and, where TRITON_INTERPRET=1
is set, for the Triton kernels in their interpreter: this file again, as a test of the first process.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gdl_kernels
from gdl_kernels import _native, spectral_normalize
from gdl_kernels.ops.spectral_normalize import op, reference
from tests.accuracy import assert_accurate

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("nan_poison")

#: (backend, device)
Kernel = tuple[str, str]
for_each_kernel = pytest.mark.parametrize(
    "kernel",
    [pytest.param(("triton", "cpu"), id="triton")]
    if INTERPRETING
    else [
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    ],
)
not_interpreting = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = [
    (40, 300),  # several groups of rows, not a whole number of vectors
    (700, 20),  # BigGAN's first layer: tall, more than one block of rows
    (5, 1100),  # wide: a group and a row
    (1, 37),  # one row
    (53, 1),  # one column
    (1, 1),
    (3, 2, 3, 3),  # a convolution
    (6, 4, 1, 1),
]

MEMORY = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.movedim(0, 1).contiguous().movedim(0, 1),
    "rows last": lambda w: w.movedim(0, -1).contiguous().movedim(-1, 0),
    "row's dimensions last first": lambda w: w.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other row and column": lambda w: w.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "not aligned": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
    "one row for all": lambda w: w[:1].expand(w.shape),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def unit(length: int, device: str = "cpu") -> Tensor:
    return torch.nn.functional.normalize(torch.randn(length, dtype=torch.float64), dim=0).float().to(device)


def matrices(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def vectors(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    us = [unit(w.shape[0], str(w.device)) for w in weights]
    return us, [unit(math.prod(w.shape[1:]), str(w.device)) for w in weights]


def run(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], grads: list[Tensor], backend: str, **options: Any
) -> dict[str, list[Tensor]]:
    """Outputs, the vectors after the call and gradients."""
    weights = [w.detach().requires_grad_() for w in weights]
    us, vs = ([x.clone() for x in vectors] for vectors in (us, vs))
    out = spectral_normalize(weights, us, vs, backend=backend, **options)
    grad_weights = torch.autograd.grad(out, weights, grads)
    return {"out": [y.detach() for y in out], "u": us, "v": vs, "dW": list(grad_weights)}


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def check(weights: list[Tensor], backend: str, ulps: int = 2, **options: Any) -> None:
    us, vs = vectors(weights)
    grads = [torch.randn(w.shape, dtype=torch.float64).to(w.device, w.dtype) for w in weights]
    ours, plain = (run(weights, us, vs, grads, b, **options) for b in (backend, "reference"))
    exact = run(wide(weights), wide(us), wide(vs), wide(grads), "reference", **options)
    for what, expected in exact.items():
        for i, (mine, its, right) in enumerate(zip(ours[what], plain[what], expected)):
            # dW is G / sigma less its part along u v', which is all of it in a matrix of one element.
            terms = None
            if what == "dW":
                sigma = (wide(weights)[i].flatten(1) @ exact["v"][i]) @ exact["u"][i]
                terms = torch.stack([right, grads[i].double() / sigma, grads[i].double() * weights[i] / sigma**2])
            name = f"{what} of {tuple(weights[i].shape)}"
            assert_accurate(mine, its, right, name, terms=terms, ulps=ulps)


# In every dtype as they mostly are; in other memory one dtype that is narrower than its sums.
CASES = [("contiguous", dtype) for dtype in DTYPES] + [(memory, torch.bfloat16) for memory in list(MEMORY)[1:]]

INTERPRETED = [
    ("contiguous", torch.float32), ("contiguous", torch.float16), ("transposed", torch.bfloat16),
    ("row's dimensions last first", torch.bfloat16), ("not aligned", torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("memory", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("semantics", op.SEMANTICS)
@for_each_kernel
def test_as_accurate_as_plain_pytorch(kernel: Kernel, semantics: str, memory: str, dtype: torch.dtype) -> None:
    backend, device = kernel
    if INTERPRETING and (memory, dtype) not in INTERPRETED:
        pytest.skip("the interpreter takes seconds a case")
    weights = [MEMORY[memory](w) for w in matrices(SHAPES, dtype, device)]
    for n_power_iterations in (2, 0) if INTERPRETING else (1, 3, 0):
        # With a few elements plain PyTorch is exact by luck; a sigma of random vectors is a sum that cancels.
        ulps = 64 if n_power_iterations == 0 else 8
        check(weights, backend, ulps, semantics=semantics, n_power_iterations=n_power_iterations)


@not_interpreting
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton and not interpreter"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 2 * len(INTERPRETED)


@for_each_kernel
def test_outputs_and_gradients_lie_as_the_weights_do(kernel: Kernel) -> None:
    backend, device = kernel
    (weight,) = matrices([(6, 4, 3, 5)], torch.float32, device)
    for memory in ("contiguous", "transposed", "rows last", "row's dimensions last first"):
        w = MEMORY[memory](weight)
        results = run([w], *vectors([w]), [torch.ones_like(weight)], backend)
        assert results["out"][0].stride() == results["dW"][0].stride() == w.stride(), memory


@pytest.mark.parametrize("semantics", op.SEMANTICS)
@pytest.mark.parametrize("memory", MEMORY)
@not_interpreting
def test_float64(memory: str, semantics: str) -> None:
    weights = [MEMORY[memory](w) for w in matrices(SHAPES, torch.float64)]
    us, vs = vectors(weights)
    grads = matrices(SHAPES, torch.float64)
    for n in (0, 2):
        ours, exact = (
            run(weights, us, vs, grads, backend, semantics=semantics, n_power_iterations=n)
            for backend in ("cpu", "reference")
        )
        for what in ours:
            torch.testing.assert_close(ours[what], exact[what], rtol=1e-10, atol=1e-9)


@not_interpreting
def test_sigma_is_the_largest_singular_value() -> None:
    weights = matrices(SHAPES, torch.float64)
    for semantics in op.SEMANTICS:
        out = spectral_normalize(weights, *map(wide, vectors(weights)), n_power_iterations=500, semantics=semantics)
        largest = torch.stack([torch.linalg.svdvals(y.flatten(1))[0] for y in out])
        torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-6, atol=0)


@for_each_kernel
def test_a_matrix_of_rank_one_takes_one_step(kernel: Kernel) -> None:
    backend, device = kernel
    left, right = unit(33, device), unit(270, device)
    (y,) = spectral_normalize([5 * torch.outer(left, right)], [unit(33, device)], [unit(270, device)], backend=backend)
    torch.testing.assert_close(y, torch.outer(left, right))


@for_each_kernel
def test_zeros_are_what_they_are_in_torch(kernel: Kernel) -> None:
    """0 / 0, in one matrix only."""
    backend, device = kernel
    weights = [torch.zeros(4, 5, device=device), torch.randn(3, 6, device=device)]
    us, vs = vectors(weights)
    zeros, others = spectral_normalize(weights, us, vs, backend=backend)
    layer = torch.nn.Linear(5, 4)
    torch.nn.init.zeros_(layer.weight)
    assert torch.nn.utils.parametrizations.spectral_norm(layer).weight.isnan().all()
    assert zeros.isnan().all()
    assert others.isfinite().all()
    assert not us[0].any()
    assert not vs[0].any()


@for_each_kernel
def test_small_and_large_weights(kernel: Kernel) -> None:
    """As long as torch's own vectors are sound."""
    backend, device = kernel
    weights = [torch.randn(20, 30, device=device) * scale for scale in (1e-9, 1e-3, 1e6, 1e15)]
    check(weights, backend, ulps=8)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@not_interpreting
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    weights = [torch.randn(shape), torch.randn(4, 5)]
    for y, w in zip(spectral_normalize(weights, *vectors(weights), backend=backend), weights):
        assert y.shape == w.shape
    assert spectral_normalize([], [], [], backend=backend) == []


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
@not_interpreting
def test_any_shapes_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from([*DTYPES, torch.float64]))
    weights = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
        order = data.draw(st.permutations(range(len(shape))))
        steps = [data.draw(st.integers(1, 2)) for _ in shape]
        memory = torch.randn([shape[d] * steps[d] for d in order], dtype=torch.float64).to(dtype)
        weight = memory.permute(*(order.index(d) for d in range(len(shape))))
        weights.append(weight[tuple(slice(None, None, step) for step in steps)])
    check(
        weights, "cpu", ulps=64,
        n_power_iterations=data.draw(st.integers(1, 3)), semantics=data.draw(st.sampled_from(op.SEMANTICS)),
    )  # fmt: skip


@not_interpreting
def test_offsets_beyond_32_bits() -> None:
    # A row so far from the first that it lies beyond 2^31 elements, in the memory that is copied from.
    torch.use_deterministic_algorithms(False)  # poison would touch all of it
    storage = torch.empty(2**31 + 200, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    weight = storage.as_strided((2, 64), (2**31 + 64, 1))
    weight.copy_(torch.randn(2, 64))
    check([weight], "cpu", ulps=8)


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    weight = torch.randn(2**15 + 8, 2**16, device="cuda", dtype=torch.bfloat16)
    us, vs = vectors([weight])
    (y,) = spectral_normalize([weight], us, vs, backend="triton")
    sigma = us[0] @ (weight.float() @ vs[0])
    torch.testing.assert_close(y[-8:].float(), weight[-8:].float() / sigma, rtol=1e-2, atol=0)


@for_each_kernel
def test_vectors_are_updated_in_place_on_request(kernel: Kernel) -> None:
    backend, device = kernel
    weights = matrices([(4, 5), (6, 7)], torch.float32, device)
    us, vs = vectors(weights)
    before = [x.clone() for x in us + vs]
    first = spectral_normalize(weights, us, vs, update=False, backend=backend)
    assert all(map(torch.equal, us + vs, before))
    second = spectral_normalize(tuple(weights), tuple(us), tuple(vs), backend=backend)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, us + vs, before))
    halves = [u.bfloat16() for u in us]
    spectral_normalize(weights, halves, vs, update=True, n_power_iterations=0, backend=backend)
    assert halves[0].dtype == torch.bfloat16


VECTORS = {
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "every third": lambda x: x.repeat_interleave(3)[::3],
    "every other, bfloat16": lambda x: x.bfloat16().repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vector", VECTORS)
@for_each_kernel
@not_interpreting
def test_vectors_of_any_stride_and_dtype(kernel: Kernel, vector: str, dtype: torch.dtype, gradient: bool) -> None:
    """They are widened to be read, and rounded to be written, where they lie."""
    backend, device = kernel
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("Triton has no kernels for float64")
    weights = matrices([(5, 70), (3, 4, 2, 2), (3, 4, 2, 2)], dtype, device)
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    given = [x for side in vectors(weights) for x in side]
    results = []
    for chosen in (backend, "reference"):
        moved = [VECTORS[vector](x) for x in given]
        leaves = [w.requires_grad_(gradient) for w in weights]
        out = spectral_normalize(leaves, moved[:3], moved[3:], backend=chosen)
        results.append([*out, *moved])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)
    for new, old in zip(results[0][3:], given):
        assert not torch.allclose(new.float(), old, rtol=0.1)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@not_interpreting
def test_autograd_sees_that_vectors_have_changed(backend: str, gradient: bool) -> None:
    weights = [w.requires_grad_(gradient) for w in matrices([(4, 5), (6, 7)], torch.float32)]
    us, vs = vectors(weights)
    factor = torch.ones(6, requires_grad=True)
    costs = []
    for options in ({"update": False}, {"n_power_iterations": 0}, {}):
        costs.append((us[1] * factor).sum())  # saves us[1]
        spectral_normalize(weights, us, vs, backend=backend, **options)
    for cost in costs[:2]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            cost.backward()
    versions = [x._version for x in us + vs]
    spectral_normalize(weights, us, vs, update=False, backend=backend)
    assert [x._version for x in us + vs] == versions
    spectral_normalize(weights, us, vs, backend=backend)
    assert all(x._version > version for x, version in zip(us + vs, versions))


@not_interpreting
def test_vectors_change_through_the_dispatcher_as_past_it() -> None:
    weights = matrices([(4, 5), (3, 2, 2)], torch.float32)
    us, vs = vectors(weights)
    past, through = ([x.clone() for x in us + vs] for _ in range(2))
    expected = spectral_normalize(weights, past[:2], past[2:], backend="cpu")
    with torch.profiler.profile() as profile:
        found = spectral_normalize(weights, through[:2], through[2:], backend="cpu")
    assert "gdl_kernels::spectral_normalize" in {event.name for event in profile.events()}
    assert all(map(torch.equal, [*found, *through], [*expected, *past]))


@for_each_kernel
def test_two_forwards_before_a_backward(kernel: Kernel) -> None:
    """The first pass's gradient is by the vectors of the first pass."""
    backend, device = kernel
    weights = [w.requires_grad_() for w in matrices([(9, 20), (8, 3, 3)], torch.float32, device)]
    us, vs = vectors(weights)
    cotangents = matrices([(9, 20), (8, 3, 3)], torch.float32, device)
    alone = torch.autograd.grad(spectral_normalize(weights, us, vs, update=False, backend=backend), weights, cotangents)
    first = spectral_normalize(weights, us, vs, backend=backend)
    spectral_normalize(weights, us, vs, backend=backend)
    assert all(map(torch.equal, torch.autograd.grad(first, weights, cotangents), alone))


@for_each_kernel
def test_only_what_is_asked_for_has_a_gradient(kernel: Kernel) -> None:
    backend, device = kernel
    weights = matrices([(4, 5), (6, 7), (3, 2)], torch.float32, device)
    weights[0].requires_grad_()
    weights[2].requires_grad_()
    out = spectral_normalize(weights, *vectors(weights), backend=backend)
    out[0].square().sum().backward(retain_graph=True)
    assert weights[1].grad is None
    assert weights[2].grad is None
    first, weights[0].grad = weights[0].grad, None
    torch.stack([y.square().sum() for y in out]).sum().backward()
    assert torch.equal(first, weights[0].grad)
    assert weights[2].grad is not None


@for_each_kernel
def test_a_weight_twice(kernel: Kernel) -> None:
    backend, device = kernel
    (weight,) = matrices([(4, 5)], torch.float32, device)
    us, vs = vectors([weight, weight])
    grads = []
    for chosen in (backend, "reference"):
        leaf = weight.clone().requires_grad_()
        a, b = spectral_normalize([leaf, leaf], us, vs, update=False, backend=chosen)
        (a.square() + b.sin()).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("semantics", op.SEMANTICS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@not_interpreting
def test_gradients_of_both_orders(backend: str, semantics: str) -> None:
    """With vectors that are not moved: the gradient takes them for constants, finite differences would not."""
    weights = [*matrices([(4, 3), (2, 3, 2)], torch.float64), *(w.T for w in matrices([(3, 5)], torch.float64))]
    us, vs = map(wide, vectors(weights))
    leaves = [w.requires_grad_() for w in weights]

    def call(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(spectral_normalize(weights, us, vs, n_power_iterations=0, semantics=semantics, backend=backend))

    torch.autograd.gradcheck(call, leaves)
    torch.autograd.gradgradcheck(call, leaves)


@for_each_kernel
def test_second_gradient_through_a_checkpoint(kernel: Kernel) -> None:
    backend, device = kernel
    weights = matrices([(4, 5), (6, 7)], torch.float32, device)
    given = vectors(weights)

    def penalty(*leaves: Tensor) -> Tensor:
        out = spectral_normalize(list(leaves), *given, update=False, backend=backend)
        grads = torch.autograd.grad([y.square().sum() for y in out], leaves, create_graph=True)
        return sum((grad.square().sum() for grad in grads), torch.zeros((), device=device))

    leaves = [w.requires_grad_() for w in weights]
    expected = torch.autograd.grad(penalty(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(penalty, *leaves, use_reentrant=False), leaves)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_kernel
def test_second_gradient_of_each_dtype(kernel: Kernel, dtype: torch.dtype) -> None:
    backend, device = kernel
    shapes = [(12, 50), (7, 3, 3)]
    weights, grads, cotangents = (matrices(shapes, dtype, device) for _ in range(3))
    us, vs = vectors(weights)

    def second(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in weights + grads]
        out = spectral_normalize(leaves[:2], us, vs, update=False, n_power_iterations=5, backend=backend)
        first = torch.autograd.grad(out, leaves[:2], leaves[2:], create_graph=True)
        return torch.autograd.grad(first, leaves, [c.to(dtype) for c in cotangents])

    runs = (backend, dtype), ("reference", dtype), ("reference", torch.float64)
    for ours, plain, exact in zip(*(second(*run) for run in runs)):
        assert_accurate(ours, plain, exact, ulps=16)


@not_interpreting
def test_third_gradient() -> None:
    (weight,), (factor,) = matrices([(3, 4)], torch.float64), matrices([(3, 4)], torch.float64)
    us, vs = map(wide, vectors([weight]))

    def third(backend: str) -> Tensor:
        leaf = weight.clone().requires_grad_()
        value = spectral_normalize([leaf], us, vs, n_power_iterations=0, backend=backend)[0].pow(2).mul(factor).sum()
        for _ in range(3):
            (last,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = last.pow(2).mul(factor).sum()
        return last

    torch.testing.assert_close(third("cpu"), third("reference"))


@for_each_kernel
def test_registration(kernel: Kernel) -> None:
    backend, device = kernel
    weights = [w.requires_grad_() for w in matrices([(4, 5), (3, 2, 2)], torch.float32, device)]
    us, vs = vectors(weights)
    for semantics in op.SEMANTICS:
        torch.library.opcheck(op.forward.dispatched, (weights, us, vs, 1, 1e-12, semantics, backend))
    grads = [torch.randn_like(w).requires_grad_() for w in weights]
    found = torch.cat([torch.rand(2, device=device) + 1, *us, *vs])
    torch.library.opcheck(op.backward.dispatched, (grads, weights, found, backend))


@not_interpreting
def test_compiles_into_one_graph() -> None:
    def call(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> Tensor:
        return torch.stack([y.square().mean() * (i + 1) for i, y in enumerate(spectral_normalize(weights, us, vs))])

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for shapes in ([(4, 5), (6, 7)], [(5, 9), (2, 40)]):
        weights = matrices(shapes, torch.float32)
        results = []
        us, vs = vectors(weights)
        for function in (compiled, call):
            leaves = [w.clone().requires_grad_() for w in weights]
            moved = [u.clone() for u in us], [v.clone() for v in vs]
            y = function(leaves, *moved)
            y.sum().backward()
            results.append([y, *moved[0], *moved[1], *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(*results)


@for_each_kernel
def test_autocast_leaves_the_dtype(kernel: Kernel) -> None:
    backend, device = kernel
    for dtype in (torch.float32, torch.bfloat16):
        weights = matrices([(4, 5)], dtype, device)
        us, vs = vectors(weights)
        with torch.autocast(device, dtype=torch.bfloat16):
            (y,) = spectral_normalize(weights, us, vs, update=False, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, spectral_normalize(weights, us, vs, backend=backend)[0])


@pytest.mark.gpu
def test_runs_in_a_graph() -> None:
    weights = matrices([(64, 300), (7, 5)], torch.float32, "cuda")
    us, vs = vectors(weights)
    eager = spectral_normalize(weights, us, vs, update=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = spectral_normalize(weights, us, vs, update=False)
    for w in weights:
        w.mul_(3)
    graph.replay()
    torch.testing.assert_close(captured, eager)


@not_interpreting
def test_threads_agree() -> None:
    weights = matrices([(130, 9000), (700, 20), (24, 12, 3, 3)], torch.float32)
    us, vs = vectors(weights)
    grads = matrices([(130, 9000), (700, 20), (24, 12, 3, 3)], torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(weights, us, vs, grads, "cpu")
        torch.set_num_threads(4)
        together = run(weights, us, vs, grads, "cpu")
    finally:
        torch.set_num_threads(threads)
    for what in alone:
        assert all(map(torch.equal, alone[what], together[what])), what


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
@not_interpreting
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_as_accurate or test_gradients_of_both_orders)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@not_interpreting
def test_a_weight_that_is_not_finite_is_named(backend: str, gradient: bool, bad: float) -> None:
    weights = matrices([(4, 5), (3, 7), (2, 2)], torch.float32)
    weights[1][1, 6] = bad
    weights = [w.requires_grad_(gradient) for w in weights]
    us, vs = vectors(weights)
    before = [x.clone() for x in us + vs]
    with pytest.raises(ValueError, match=r"weights\[1\] must be finite, and so must its spectral norm, which is nan"):
        spectral_normalize(weights, us, vs, backend=backend)
    assert all(map(torch.equal, us + vs, before))


@not_interpreting
def test_backend_is_chosen_and_explained() -> None:
    weights = matrices([(4, 5)], torch.float32)
    us, vs = vectors(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = spectral_normalize(weights, us, vs, update=False)
    assert torch.equal(y[0], spectral_normalize(weights, us, vs, update=False, backend="cpu")[0])
    verdicts = gdl_kernels.explain(spectral_normalize, weights, us, vs).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["reference"] == "can"
    assert verdicts["cuda"] == "spectral_normalize has no cuda kernel"
    assert "weights are on cpu" in verdicts["triton"]
    with pytest.raises(RuntimeError, match=r"backend 'triton' can't serve this.*weights are float64"):
        spectral_normalize(matrices([(4, 5)], torch.float64), us, vs, backend="triton")


def test_reference_is_the_formula() -> None:
    (weight,) = matrices([(3, 2, 2)], torch.float64)
    u, v = unit(3).double(), unit(4).double()
    matrix = weight.flatten(1)
    new_u = matrix @ v / (matrix @ v).norm()
    new_v = matrix.T @ new_u / (matrix.T @ new_u).norm()
    (y,), _, _, sigmas = reference.spectral_normalize([weight], [u], [v], 1, 1e-12, "torch")
    torch.testing.assert_close(y, weight / (new_u @ matrix @ new_v))
    torch.testing.assert_close(sigmas[0], new_u @ matrix @ new_v)
    new_v = matrix.T @ u / (matrix.T @ u).norm()
    new_u = matrix @ new_v / (matrix @ new_v).norm()
    (y,), _, _, _ = reference.spectral_normalize([weight], [u], [v], 1, 1e-12, "biggan")
    torch.testing.assert_close(y, weight / (new_u @ matrix @ new_v))


ONES, LEFT, RIGHT = torch.ones(2, 3), torch.ones(2), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((ONES, [LEFT], [RIGHT]), {}, TypeError, "weights must be a list of tensors, got Tensor"),
        (([ONES], None, [RIGHT]), {}, TypeError, "us must be a list of tensors, got NoneType"),
        (([ONES], [LEFT], [3]), {}, TypeError, r"vs\[0\] must be a tensor, got int"),
        (([ONES.int()], [LEFT], [RIGHT]), {}, TypeError, r"weights\[0\] must be float32.*got torch.int32"),
        (([ONES], [LEFT.to(torch.complex64)], [RIGHT]), {}, TypeError, r"us\[0\] must be float32.*got torch.complex64"),
        (([ONES], [], [RIGHT]), {}, ValueError, "us must be as many as weights, 1, got 0"),
        (([LEFT], [LEFT], [RIGHT]), {}, ValueError, r"weights\[0\] must have two dimensions or more, got shape \(2,\)"),
        (([ONES], [RIGHT], [RIGHT]), {}, ValueError, r"us\[0\] must have shape \(2,\) for weights\[0\].*got \(3,\)"),
        (([ONES], [LEFT], [LEFT]), {}, ValueError, r"vs\[0\] must have shape \(3,\) for weights\[0\].*got \(2,\)"),
        (
            ([ONES, ONES.double()], [LEFT] * 2, [RIGHT] * 2), {},
            TypeError, "weights must have one dtype, got torch.float32 and, at 1, torch.float64",
        ),
        (
            ([ONES, ONES.to("meta")], [LEFT] * 2, [RIGHT] * 2), {},
            ValueError, "weights must be on one device, got cpu and, at 1, meta",
        ),
        (([ONES], [LEFT.to("meta")], [RIGHT]), {}, ValueError, r"us\[0\] must be on cpu, where.*got meta"),
        (([ONES], [LEFT], [ONES[0, :1].expand(3)]), {}, ValueError, r"vs\[0\] is written to and must not be expanded"),
        (([ONES], [LEFT], [RIGHT]), {"n_power_iterations": -1}, ValueError, "n_power_iterations must not be negative"),
        (([ONES], [LEFT], [RIGHT]), {"n_power_iterations": 1.0}, TypeError, "n_power_iterations must be an integer"),
        (([ONES], [LEFT], [RIGHT]), {"eps": -1e-9}, ValueError, "eps must be finite and not negative, got -1e-09"),
        (([ONES], [LEFT], [RIGHT]), {"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
        (([ONES], [LEFT], [RIGHT]), {"eps": "x"}, TypeError, "eps must be a number, got str"),
        (([ONES], [LEFT], [RIGHT]), {"semantics": "sagan"}, ValueError, "semantics must be 'torch' or 'biggan'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@not_interpreting
def test_bad_input(
    backend: str | None, args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spectral_normalize(*args, **options, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@not_interpreting
def test_a_bad_call_after_a_good_one(backend: str | None) -> None:
    """What is remembered of calls takes none for another."""
    good = [[ONES], [LEFT.clone()], [RIGHT.clone()]]
    for _ in range(2):
        spectral_normalize(*good, backend=backend)
        for place, bad, message in (
            (0, [ONES.int()], "must be float32"),
            (1, [RIGHT], r"must have shape \(2,\)"),
            (2, [RIGHT] * 2, "must be as many as weights"),
            (2, [ONES[0, :1].expand(3)], "must not be expanded"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                spectral_normalize(*good[:place], bad, *good[place + 1 :], backend=backend)
        with pytest.raises(ValueError, match="must not be negative"):
            spectral_normalize(*good, n_power_iterations=-1, backend=backend)
        spectral_normalize(*good[:2], [ONES[0, :1].expand(3)], update=False, backend=backend)
