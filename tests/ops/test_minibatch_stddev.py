"""minibatch_stddev by every backend.

Tests with the argument ``kernel`` run for the C++ kernels, the Triton kernels on a GPU and, where TRITON_INTERPRET=1
is set, for the Triton kernels in their interpreter. That is settled when they are imported, so the interpreter has a
process of its own: this file again, as a test of the first process.
"""

from __future__ import annotations

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

import gdl_kernels
from gdl_kernels import _native, minibatch_stddev, nn
from gdl_kernels.ops.minibatch_stddev import op, reference
from tests.accuracy import assert_accurate
from tests.ops.minibatch_stddev_cases import (
    CASES,
    DTYPES,
    INTERPRETING,
    MEMORY,
    SIZES,
    Kernel,
    check,
    for_each_kernel,
    random,
    run,
    with_channels,
)

pytestmark = pytest.mark.usefixtures("nan_poison")

#: The interpreter takes tenths of a second a case: there these sizes have every case, the others two.
IN_EVERY_CASE = [SIZES[2][0], SIZES[7][0]]


@for_each_kernel
@pytest.mark.parametrize(("memory", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(("shape", "group_size", "num_features"), SIZES, ids=str)
def test_output_and_gradient(
    kernel: Kernel, shape: tuple[int, ...], group_size: int, num_features: int, dtype: torch.dtype, memory: str
) -> None:
    backend, device = kernel
    if INTERPRETING and (dtype != torch.bfloat16 or memory not in list(MEMORY)[:2]) and shape not in IN_EVERY_CASE:
        pytest.skip("in the interpreter a few sizes stand for all")
    x = MEMORY[memory](random(shape, dtype, device))
    assert x.shape == shape
    grad = MEMORY[memory](random(with_channels(shape, num_features), dtype, device))
    check(x, grad, backend, group_size=group_size, num_features=num_features)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("shape", "group_size", "num_features"), SIZES, ids=str)
def test_float64(shape: tuple[int, ...], group_size: int, num_features: int, memory: str) -> None:
    x = MEMORY[memory](random(shape, torch.float64))
    grad = random(with_channels(shape, num_features), torch.float64)
    call = {"group_size": group_size, "num_features": num_features}
    for ours, exact in zip(run(x, grad, "cpu", **call), run(x, grad, "reference", **call)):
        # Where all images are the same, what rounding leaves of their differences is over the root of eps.
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-11)


def test_reference_is_the_formula() -> None:
    x = random((6, 4, 2, 3), torch.float64)
    for group_size, num_features, group in ((3, 2, 3), (2, 4, 2), (6, 1, 6), (1, 2, 1), (9, 4, 6)):
        y = minibatch_stddev(x, group_size=group_size, num_features=num_features, backend="reference")
        assert torch.equal(y[:, :4], x)
        groups, width = 6 // group, 4 // num_features
        for m in range(groups):
            for f in range(num_features):
                deviations = []
                for c in range(f * width, f * width + width):
                    for h in range(2):
                        for w in range(3):
                            values = [x[g * groups + m, c, h, w].item() for g in range(group)]
                            mean = sum(values) / group
                            variance = sum((value - mean) ** 2 for value in values) / group
                            deviations.append((variance + 1e-8) ** 0.5)
                statistic = sum(deviations) / len(deviations)
                for g in range(group):
                    appended = y[g * groups + m, 4 + f]
                    torch.testing.assert_close(appended, torch.full_like(appended, statistic))


@for_each_kernel
def test_the_grouping_of_the_guide(kernel: Kernel) -> None:
    """The example of docs/minibatch_stddev.md."""
    backend, device = kernel
    x = torch.tensor([1.0, 10.0, 3.0, 10.0], device=device).view(4, 1, 1)
    y = minibatch_stddev(x, group_size=2, eps=1e-16, backend=backend)
    torch.testing.assert_close(y[:, 1, 0].cpu(), torch.tensor([1.0, 1e-8, 1.0, 1e-8]))


@st.composite
def images(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In memory the dimensions come in any order and with gaps."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    memory = random(tuple(shape[d] * steps[d] for d in order), dtype)
    x = memory.permute(*(order.index(d) for d in range(len(shape))))
    return x[tuple(slice(None, None, step) for step in steps)]


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    group, features = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    shape = (group * data.draw(st.integers(1, 3)), features * data.draw(st.integers(1, 12)))
    shape += tuple(data.draw(st.lists(st.integers(1, 9), max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, grad = data.draw(images(shape, dtype)), data.draw(images(with_channels(shape, features), dtype))
    # The mean of a handful of roots plain PyTorch often has exactly, by luck.
    check(x, grad, "cpu", ulps=8, group_size=group, num_features=features)


@for_each_kernel
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_is_laid_out_like_the_input(kernel: Kernel, memory_format: torch.memory_format) -> None:
    backend, device = kernel
    x = random((2, 6, 5, 4), torch.float32, device).to(memory_format=memory_format)
    y, dx = run(x, random((2, 7, 5, 4), torch.float32, device), backend)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@for_each_kernel
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variance_beside_a_large_mean(kernel: Kernel, dtype: torch.dtype, memory: str) -> None:
    """Of squares around 1e8, to which float32 gives steps of 8, nothing would be left."""
    backend, device = kernel
    shape, call = (8, 16, 8, 8), {"num_features": 2}
    deviation = random(shape, torch.float64).sign() if dtype == torch.float32 else 64 * random(shape, torch.float64)
    x = MEMORY[memory]((1e4 + deviation).to(device, dtype))
    check(x, random(with_channels(shape, 2), dtype, device), backend, **call)


@for_each_kernel
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_offsets_beyond_32_bits(kernel: Kernel, memory: str) -> None:
    backend, device = kernel
    apart, channels = 2**31 + 64, 3
    torch.use_deterministic_algorithms(False)  # poison would touch it
    storage = torch.empty(apart + 8 * channels, dtype=torch.bfloat16, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    strides = (apart, 8, 1) if memory == "contiguous" else (apart, 1, channels)
    x = storage.as_strided((2, channels, 8), strides)
    x.copy_(random(x.shape, torch.bfloat16, device))
    check(x, random((2, channels + 1, 8), torch.bfloat16, device), backend)


@for_each_kernel
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 6)], ids=str)
def test_empty_batch(kernel: Kernel, shape: tuple[int, ...]) -> None:
    for backend in (kernel[0], "reference"):
        x = torch.empty(shape, device=kernel[1])
        wanted = with_channels(shape, 3)
        y, dx = run(x, torch.empty(wanted, device=kernel[1]), backend, num_features=3)
        assert y.shape == wanted
        assert dx.shape == shape


@for_each_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_what_is_not_finite_stays_in_its_group_and_feature(kernel: Kernel, memory: str, bad: float) -> None:
    backend, device = kernel
    x = MEMORY[memory](random((8, 20, 6, 8), torch.float32, device))
    x[5, 13, 2, 5] = bad  # group 1 of 2, feature 1 of 2
    call = {"group_size": 4, "num_features": 2}
    grad = random((8, 22, 6, 8), torch.float32, device)
    (y, dx), (plain_y, plain_dx) = run(x, grad, backend, **call), run(x, grad, "reference", **call)
    torch.testing.assert_close(y, plain_y, equal_nan=True)
    torch.testing.assert_close(dx, plain_dx, equal_nan=True)
    hurt = y[:, 20:].isnan()
    assert hurt[1::2, 1].all()
    assert not hurt[::2].any()
    assert not hurt[:, 0].any()
    assert int((~dx.isfinite()).sum()) == 4


@for_each_kernel
def test_a_gradient_that_is_nan_reaches_its_group_and_feature(kernel: Kernel) -> None:
    backend, device = kernel
    x, grad = random((4, 4, 3, 3), torch.float32, device), random((4, 6, 3, 3), torch.float32, device)
    grad[2, 5, 1, 1] = torch.nan  # of group 0 of 2, feature 1 of 2
    _, dx = run(x, grad, backend, group_size=2, num_features=2)
    assert dx[::2, 2:].isnan().all()
    assert dx[1::2].isfinite().all()
    assert dx[:, :2].isfinite().all()


@for_each_kernel
def test_equal_samples(kernel: Kernel) -> None:
    """No deviation: the statistic is the root of eps, and nothing is divided by 0."""
    backend, device = kernel
    x = random((1, 8, 4, 4), torch.float32, device).expand(4, -1, -1, -1)
    grad = random((4, 9, 4, 4), torch.float32, device)
    y, dx = run(x, grad, backend, eps=1e-30)
    torch.testing.assert_close(y[:, 8], torch.full_like(y[:, 8], 1e-15), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, grad[:, :8])


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize(("group_size", "num_features"), [(2, 2), (4, 1), (1, 1)])
def test_gradients_of_both_orders(backend: str, memory: str, group_size: int, num_features: int) -> None:
    x = MEMORY[memory](random((4, 4, 3, 2), torch.float64)).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return minibatch_stddev(x, group_size=group_size, num_features=num_features, backend=backend)

    torch.autograd.gradcheck(function, x)
    torch.autograd.gradgradcheck(function, x)


@for_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_gradient_of_each_dtype(kernel: Kernel, dtype: torch.dtype) -> None:
    backend, device = kernel
    x, v = (random((8, 24, 4, 5), dtype, device) for _ in range(2))
    grad = random((8, 26, 4, 5), dtype, device)

    def second(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wanted = [x.to(dtype).requires_grad_(), grad.to(dtype).requires_grad_()]
        y = minibatch_stddev(wanted[0], num_features=2, backend=backend)
        (dx,) = torch.autograd.grad(y, wanted[0], wanted[1], create_graph=True)
        return torch.autograd.grad(dx, wanted, v.to(dtype))

    ours, plain, exact = second(backend, dtype), second("reference", dtype), second("reference", torch.float64)
    for what, *values in zip(("of x", "of grad"), ours, plain, exact):
        assert_accurate(*values, what=what)


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
def test_third_gradient() -> None:
    def third(backend: str) -> Tensor:
        x = random_x.clone().requires_grad_()
        value = minibatch_stddev(x, group_size=2, backend=backend).pow(2).mul(weight).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            last, value = value, value.pow(2).mul(weight[:, :3]).sum()
        return last

    random_x, weight = random((4, 3, 4), torch.float64), random((4, 4, 4), torch.float64)
    torch.testing.assert_close(third("cpu"), third("reference"))


@for_each_kernel
def test_gradient_penalty(kernel: Kernel) -> None:
    """As WGAN-GP differentiates ProGAN's discriminator, parameters before and after the op included."""
    backend, device = kernel

    def gradients(backend: str) -> tuple[Tensor, ...]:
        x = images.clone().requires_grad_()
        before, after = (w.clone().requires_grad_() for w in weights)
        h = torch.nn.functional.leaky_relu(torch.einsum("oc,nchw->nohw", before, x), 0.2)
        score = torch.einsum("oc,nchw->n", after, minibatch_stddev(h, backend=backend).square())
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(penalty, [before, after])

    images = random((8, 3, 4, 4), torch.float32, device)
    weights = random((6, 3), torch.float32, device), random((1, 7), torch.float32, device)
    for ours, plain in zip(gradients(backend), gradients("reference")):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.skipif(INTERPRETING, reason="as on the other backends")
@for_each_kernel
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_registration(kernel: Kernel, memory: str) -> None:
    backend, device = kernel
    x = MEMORY[memory](random((4, 4, 4, 5), torch.float32, device)).requires_grad_()
    grad = MEMORY[memory](random((4, 6, 4, 5), torch.float32, device)).requires_grad_()
    torch.library.opcheck(op.forward.dispatched, (x, 2, 2, 1e-8, backend))
    torch.library.opcheck(op.backward.dispatched, (grad, x, 2, 2, 1e-8, backend))


@pytest.mark.skipif(INTERPRETING, reason="as on the other backends")
@for_each_kernel
def test_compiles_into_one_graph(kernel: Kernel) -> None:
    backend, device = kernel
    compiled = torch.compile(
        lambda x: minibatch_stddev(2 * x, num_features=2, backend=backend) + 1, fullgraph=True, dynamic=True
    )
    for shape in ((4, 8, 4, 4), (8, 8, 5, 6)):
        x, grad = random(shape, torch.float32, device), random(with_channels(shape, 2), torch.float32, device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, eager = compiled(a), minibatch_stddev(2 * b, num_features=2, backend=backend) + 1
        ours.backward(grad)
        eager.backward(grad)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(a.grad, b.grad)


@for_each_kernel
def test_autocast_leaves_the_dtype(kernel: Kernel) -> None:
    for backend in (kernel[0], "reference"):
        for dtype in (torch.float32, torch.bfloat16):
            x = random((2, 3, 4), dtype, kernel[1])
            with torch.autocast(kernel[1], dtype=torch.bfloat16):
                y = minibatch_stddev(x, backend=backend)
            assert y.dtype == dtype
            assert torch.equal(y, minibatch_stddev(x, backend=backend))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    x = random((4, 64, 16, 16), torch.float32, "cuda")
    minibatch_stddev(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = minibatch_stddev(x)
    x.copy_(3 * x)
    graph.replay()
    assert torch.equal(captured, minibatch_stddev(x))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_on_a_gpu() -> None:
    x, grad = random((16, 64, 40, 40), torch.float32, "cuda"), random((16, 65, 40, 40), torch.float32, "cuda")
    assert all(map(torch.equal, run(x, grad, "triton"), run(x, grad, "triton")))


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_any_number_of_threads_gives_the_same_bits(memory: str) -> None:
    x = MEMORY[memory](random((8, 40, 50, 60), torch.float32))
    grad = MEMORY[memory](random((8, 42, 50, 60), torch.float32))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run(x, grad, "cpu", num_features=2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_output_and_gradient or test_gradients_of_both_orders or large_mean)"
    environment = {"ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    _tests_of_another_process(names, environment)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    passed = _tests_of_another_process("triton and not interpreter", environment)
    assert passed > 2 * len(SIZES) + 2 * len(CASES)


def _tests_of_another_process(names: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


@pytest.mark.skipif(INTERPRETING, reason="the interpreter makes other backends able")
def test_backend_is_chosen_and_explained() -> None:
    x = random((2, 3, 4), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(minibatch_stddev(x), minibatch_stddev(x, backend="cpu"))
    verdicts = gdl_kernels.explain(minibatch_stddev, x).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["reference"] == "can"
    assert "x is on cpu" in verdicts["triton"]
    assert verdicts["cuda"] == "minibatch_stddev has no cuda kernel"
    with pytest.raises(RuntimeError, match=r"backend 'triton' can't serve this minibatch_stddev.*x is on cpu"):
        minibatch_stddev(x, backend="triton")


def test_what_the_triton_kernels_refuse() -> None:
    x = torch.empty(4096, 1, dtype=torch.float64)
    verdict = gdl_kernels.explain(minibatch_stddev, x, group_size=2048).verdicts["triton"]
    assert "x is float64" in verdict
    assert "a group has more than 1024 samples" in verdict
    assert "a group" not in gdl_kernels.explain(minibatch_stddev, x).verdicts["triton"]


def test_module() -> None:
    x = random((4, 6, 4), torch.float32)
    module = nn.MinibatchStdDev(group_size=2, num_features=3, eps=0.5)
    assert torch.equal(module(x), minibatch_stddev(x, group_size=2, num_features=3, eps=0.5))
    assert module(x).shape == (4, 9, 4)
    assert torch.equal(nn.MinibatchStdDev()(x), minibatch_stddev(x))
    assert repr(module) == "MinibatchStdDev(group_size=2, num_features=3, eps=0.5)"


@pytest.mark.parametrize(
    ("x", "call", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, r"x must be \(N, C, \*spatial\), got shape \(3,\)"),
        (torch.ones(2, 3, dtype=torch.int64), {}, TypeError, "x must be float32.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), {}, TypeError, "x must be float32.*got torch.complex64"),
        ([[1.0]], {}, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 0, 3), {}, ValueError, r"x must have a channel and a pixel at least, got shape \(2, 0, 3\)"),
        (torch.ones(2, 3, 0), {}, ValueError, r"x must have a channel and a pixel at least, got shape \(2, 3, 0\)"),
        (torch.ones(6, 3), {}, ValueError, "must divide the batch of 6 samples, got 4: .* 3 is the largest that fits"),
        (torch.ones(7, 3), {"group_size": 5}, ValueError, "of 7 samples, got 5: .* 1 is the largest that fits"),
        (torch.ones(2, 3), {"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        (torch.ones(2, 3), {"group_size": None}, TypeError, "group_size must be an integer, got NoneType"),
        (torch.ones(2, 3), {"group_size": 2.0}, TypeError, "group_size must be an integer, got float"),
        (torch.ones(2, 3), {"num_features": 2}, ValueError, "num_features must divide x's 3 channels, got 2"),
        (torch.ones(2, 3), {"num_features": 6}, ValueError, "num_features must divide x's 3 channels, got 6"),
        (torch.ones(2, 3), {"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        (torch.ones(2, 3), {"num_features": "1"}, TypeError, "num_features must be an integer, got str"),
        (torch.ones(2, 3), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        (torch.ones(2, 3), {"eps": -1e-8}, ValueError, "eps must be positive and finite, got -1e-08"),
        (torch.ones(2, 3), {"eps": float("inf")}, ValueError, "eps must be positive and finite, got inf"),
        (torch.ones(2, 3), {"eps": float("nan")}, ValueError, "eps must be positive and finite, got nan"),
        (torch.ones(2, 3), {"eps": "small"}, TypeError, "eps must be a number, got str"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None, x: Tensor, call: dict[str, Any], error: type[Exception], message: str) -> None:
    minibatch_stddev(torch.ones(2, 3), backend=backend)  # what is remembered of it lets no bad call pass
    with pytest.raises(error, match=message):
        minibatch_stddev(x, backend=backend, **call)


def test_any_batch_up_to_the_group_is_one_group() -> None:
    x = random((3, 4, 5), torch.float32)
    whole = minibatch_stddev(x, group_size=3)
    assert torch.equal(minibatch_stddev(x), whole)
    expected = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
    torch.testing.assert_close(whole[:, 4], expected.expand(3, 5))
    assert torch.equal(reference.minibatch_stddev(x, 100, 1, 1e-8), reference.minibatch_stddev(x, 3, 1, 1e-8))
