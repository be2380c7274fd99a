"""conditional_batch_norm: numbers, gradients, running statistics, layouts in memory, errors. Not here: several ranks.

Tests with the argument ``kernel`` run for the C++ kernels, the Triton kernels on a GPU and, where TRITON_INTERPRET=1 is
set, for the Triton kernels in their interpreter: this file again, in a process of its own.
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
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gdl_kernels
from gdl_kernels import _backends, _native, conditional_batch_norm
from gdl_kernels.ops.conditional_batch_norm import op, reference
from tests.accuracy import assert_accurate
from tests.ops.images import DTYPES, MEMORY, channels_last, images, random

pytestmark = pytest.mark.usefixtures("nan_poison")

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
for_each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

SHAPES = [
    (4, 24, 4, 4),  # BigGAN's first layer: a task has several planes
    (3, 5, 7, 9),  # divides nothing
    (2, 3, 70, 65),  # more than a tile, planar and with channels last; the last is not full
    (2, 480, 3, 3),  # more channels than a task has planes, or a strip has
    (3, 6, 1, 1),  # 1x1 maps
    (12, 17),  # no pixels
    (3, 1, 50),  # one channel: the line of a channels-last tensor has one element
    (2, 3, 2, 3, 4),  # volumes
]


def case(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", parameters: torch.dtype | None = None
) -> list[Tensor]:
    """x, gain, bias, running mean and variance; channels differ in mean and deviation."""
    channel = (1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape, dtype=torch.float64)
    x = x * torch.rand(shape[1], dtype=torch.float64).add(0.5).view(channel) + torch.randn(shape[1]).view(channel)
    gain, bias = (random(shape[:2], parameters or dtype, device) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    running = random(shape[1:2], wide, device), random(shape[1:2], wide, device).abs() + 0.5
    return [x.to(device, dtype), gain, bias, *running]


def run(tensors: list[Tensor], grad: Tensor, backend: str, training: bool = True, **kwargs: Any) -> list[Tensor]:
    """The output, the gradients of x, gain and bias, and the running statistics after."""
    *wanted, mean, var = (t.detach().clone(memory_format=torch.preserve_format) for t in tensors)
    wanted[0] = tensors[0].detach()  # whose memory is what some tests are about
    for t in wanted:
        t.requires_grad_()
    y = conditional_batch_norm(*wanted, mean, var, training=training, backend=backend, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad), mean, var]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def check(tensors: list[Tensor], grad: Tensor, backend: str, training: bool = True) -> None:
    ours, plain = run(tensors, grad, backend, training), run(tensors, grad, "reference", training)
    exact = run(double(tensors), grad.double(), "reference", training)
    x, gain = (t.double() for t in tensors[:2])
    each, plane = [0, *range(2, x.dim())], [*x.shape[:2], *[1] * (x.dim() - 2)]
    var = x.var(each, correction=0) if training else tensors[4].double()
    rstd = (var + 1e-5).rsqrt().view(1, -1, *plane[2:])
    # What the results are differences of: x and the mean; grad and its parts along 1 and x.
    uncentred, grads = (x * rstd).abs(), grad.double().abs()
    terms = {
        "y": uncentred * gain.view(plane),
        "of x": grads * rstd * gain.view(plane) * (1 + uncentred),
        "of gain": (grads * (1 + uncentred)).reshape(*x.shape[:2], -1).norm(dim=2),
        "of bias": grads.reshape(*x.shape[:2], -1).norm(dim=2),
        "running mean": exact[4],
        "running var": exact[5],
    }
    for (what, scale), *values in zip(terms.items(), ours, plain, exact):
        assert_accurate(*values, what=what, terms=scale)


# The first two in every dtype; the others need no more than one that is narrower than its sums. The interpreter takes a
# tenth of a second a case, and strides are no business of the kernels.
CASES = [(memory, dtype) for memory in list(MEMORY)[:2] for dtype in (DTYPES[::2] if INTERPRETING else DTYPES)]
CASES += [] if INTERPRETING else [(memory, torch.bfloat16) for memory in list(MEMORY)[2:]]


@for_each_mode
@pytest.mark.parametrize(("memory", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_each_kernel
def test_output_gradients_and_running_statistics(
    kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, memory: str, training: bool
) -> None:
    backend, device = kernel
    tensors = case(shape, dtype, device)
    tensors[0] = MEMORY[memory](tensors[0])
    if memory == "one image for all" and len(shape) == 2 and training:
        pytest.skip("every channel is constant: all of y is rounding")
    if INTERPRETING and shape not in SHAPES[:2] and (dtype != torch.float32 or not training):
        pytest.skip("in the interpreter two shapes stand for all, but for training in float32")
    check(tensors, random(shape, dtype, device), backend, training)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "triton and not interpreter",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, "under TRITON_INTERPRET=1 cases failed, as told above"
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 4 * len(SHAPES)


@for_each_mode
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY)
def test_float64(shape: tuple[int, ...], memory: str, training: bool) -> None:
    tensors, grad = case(shape, torch.float64), random(shape, torch.float64)
    if memory == "one image for all" and len(shape) == 2:
        pytest.skip("every channel is constant: all of y is rounding")
    tensors[0] = MEMORY[memory](tensors[0])
    for ours, exact in zip(run(tensors, grad, "cpu", training), run(tensors, grad, "reference", training)):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@for_each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_gains_are_torchs_batch_norm(backend: str, dtype: torch.dtype, training: bool) -> None:
    x, gain, bias, mean, var = case((4, 6, 5, 7), dtype)
    gain, bias = gain[:1].expand(4, 6), bias[:1].expand(4, 6)
    grad = torch.randn_like(x)
    ours = run([x, gain, bias, mean, var], grad, backend, training, momentum=0.3, eps=1e-3)
    wanted = [t.clone().requires_grad_() for t in (x, gain[0], bias[0])]
    y = F.batch_norm(wanted[0], mean, var, *wanted[1:], training=training, momentum=0.3, eps=1e-3)
    theirs = [y, *torch.autograd.grad(y, wanted, grad), mean, var]
    ours[2], ours[3] = ours[2].sum(0), ours[3].sum(0)
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_row_is_batch_norm_with_its_own_gain(backend: str) -> None:
    x, gain, bias, _, _ = case((4, 6, 5, 7), torch.float64)
    y = conditional_batch_norm(x, gain, bias, None, None, training=True, backend=backend)
    for n in range(4):
        row = F.batch_norm(x, None, None, gain[n], bias[n], training=True)[n]
        torch.testing.assert_close(y[n], row)


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(4, 5, 24, 24), (2, 9, 70, 65)], ids=str)
@for_each_kernel
def test_statistics_do_not_cancel(kernel: Kernel, shape: tuple[int, ...], memory: str) -> None:
    if INTERPRETING and shape[1] == 9:
        pytest.skip("in the interpreter one shape stands for both")
    backend, device = kernel
    tensors = case(shape, torch.float32, device)
    tensors[0] = MEMORY[memory](torch.randn(shape, device=device) + 1e4)
    check(tensors, random(shape, torch.float32, device), backend)
    x, gain, bias, _, var = tensors
    conditional_batch_norm(x, gain, bias, torch.zeros_like(var), var, training=True, momentum=1.0, backend=backend)
    expected = x.double().var([0, 2, 3]).float()
    torch.testing.assert_close(var, expected, rtol=2e-6, atol=0)


@for_each_kernel
def test_a_first_pixel_far_from_the_rest(kernel: Kernel) -> None:
    # Sums shifted by a channel's first number would cancel.
    backend, device = kernel
    shape = (2, 24, 20, 20)
    tensors = case(shape, torch.float32, device)
    tensors[0][0, :, 0, 0] = 3e4
    check(tensors, random(shape, torch.float32, device), backend)


@pytest.mark.skipif(INTERPRETING, reason="the C++ kernels have had it")
@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    shape = [data.draw(st.integers(2, 4)), data.draw(st.integers(1, 40))]
    shape += data.draw(st.lists(st.integers(2, 9), max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = case(tuple(shape), dtype, parameters=data.draw(st.sampled_from([dtype, torch.float32])))
    tensors[0] = data.draw(images(shape, dtype))
    for i in (1, 2):
        tensors[i] = data.draw(images(shape[:2], tensors[i].dtype))
    check(tensors, data.draw(images(shape, dtype)), "cpu", data.draw(st.booleans()))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@for_each_kernel
def test_gains_in_another_dtype(kernel: Kernel, parameters: torch.dtype) -> None:
    backend, device = kernel
    tensors = case((3, 5, 4, 4), torch.float16, device, parameters)
    check(tensors, random((3, 5, 4, 4), torch.float16, device), backend)


@for_each_mode
@for_each_kernel
def test_gains_and_biases_lie_anywhere(kernel: Kernel, training: bool) -> None:
    """As columns of one product, as one row for all samples, and with samples next to each other."""
    backend, device = kernel
    shape = (3, 5, 4, 4)
    x, _, _, mean, var = case(shape, torch.float32, device)
    product = random((3, 20), torch.float32, device)
    grad, v = (random(shape, torch.float32, device) for _ in range(2))
    row = random((1, 5), torch.float32, device)

    def gradients(gain: Tensor, bias: Tensor, v_gain: Tensor, v_bias: Tensor) -> list[Tensor]:
        y, statistics = op.forward(x, gain, bias, *(() if training else (mean, var)) or (None, None), 1e-5, "", backend)
        call = grad, x, gain, statistics, training, 1e-5, "", backend
        return [y, *op.backward(*call), *op.double_backward(v, v_gain, v_bias, *call)]

    given = [product[:, 5:10], row.expand(3, 5), product[:, 10:15], product[:, 15:].T.contiguous().T]
    for found, expected in zip(gradients(*given), gradients(*(t.contiguous() for t in given))):
        assert torch.equal(found, expected)


@for_each_kernel
def test_evaluation_with_statistics_of_another_dtype_and_strides(kernel: Kernel) -> None:
    backend, device = kernel
    tensors = case((3, 5, 4, 4), torch.float32, device)
    mean, var = torch.stack(tensors[3:]).bfloat16().T.contiguous().T  # strides of 2
    grad = random((3, 5, 4, 4), torch.float32, device)
    x, gain, bias, *_ = tensors
    found = []
    for statistics in ((mean, var), (mean.float().contiguous(), var.float().contiguous())):
        wanted = [t.clone().requires_grad_() for t in (x, gain, bias)]
        y = conditional_batch_norm(*wanted, *statistics, training=False, backend=backend)
        found.append([y.detach(), *torch.autograd.grad(y, wanted, grad)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@for_each_kernel
def test_output_is_laid_out_like_the_input(kernel: Kernel, memory_format: torch.memory_format) -> None:
    backend, device = kernel
    tensors = case((2, 6, 5, 4), torch.float32, device)
    tensors[0] = tensors[0].to(memory_format=memory_format)
    y, dx, *_ = run(tensors, torch.ones_like(tensors[0]), backend)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@for_each_kernel
def test_output_may_be_changed_in_place(kernel: Kernel, memory_format: torch.memory_format) -> None:
    """As by a ReLU after it."""
    backend, device = kernel
    x, gain, bias, *_ = case((2, 6, 5, 4), torch.float32, device)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    found = []
    for relu in (F.relu, F.relu_):
        y = relu(conditional_batch_norm(x, gain, bias, None, None, training=True, backend=backend))
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, expected in zip(*found):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter computes addresses with Python's integers")
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_offsets_beyond_32_bits(memory: str) -> None:
    # Two images so far apart that the second lies beyond 2^31 elements. Memory between them is never touched.
    apart, channels = 2**31 + 64, 5
    torch.use_deterministic_algorithms(False)  # poison would touch it
    storage = torch.empty(apart + 8 * channels, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    strides = (apart, 8, 1) if memory == "contiguous" else (apart, 1, channels)
    tensors = case((2, channels, 8), torch.bfloat16)
    tensors[0] = storage.as_strided((2, channels, 8), strides).copy_(tensors[0])
    check(tensors, random((2, channels, 8), torch.bfloat16), "cpu")


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_more_than_2_to_the_31_elements(memory: str) -> None:
    shape = (2, 8, 2**27 + 8)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    _, gain, bias, mean, var = case((2, 8), torch.float32, "cuda")
    x = channels_last(x) if memory == "channels last" else x
    y = conditional_batch_norm(x, gain, bias, mean, var, training=True, momentum=1.0, backend="triton")
    for part in (slice(0, 100), slice(-100, None)):
        few = x[..., part]
        plain, exact = (
            reference.conditional_batch_norm(*(t.to(dtype) for t in (few, gain, bias, mean, var)), 1e-5, "")[0]
            for dtype in (torch.float32, torch.float64)
        )
        assert_accurate(y[..., part], plain.to(y.dtype), exact)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0), (0, 0)], ids=str)
@for_each_mode
@pytest.mark.parametrize("kernel", [*KERNELS, pytest.param(("reference", "cpu"), id="reference")])
def test_empty(kernel: Kernel, shape: tuple[int, ...], training: bool) -> None:
    backend, device = kernel
    tensors = case(shape, torch.float32, device)
    y, dx, dgain, dbias, mean, var = run(tensors, tensors[0], backend, training)
    assert y.shape == dx.shape == shape
    assert not dgain.any()
    assert not dbias.any()
    assert torch.equal(mean, tensors[3])  # as torch's batch norm leaves them
    assert torch.equal(var, tensors[4])
    cotangents = [random(s, torch.float32, device) for s in (shape, shape, shape[:2], shape[:2])]
    assert not second(tensors, cotangents, backend, training)["of gain"].any()


@for_each_mode
@for_each_kernel
def test_statistics_of_empty_batches(kernel: Kernel, training: bool) -> None:
    backend, device = kernel
    x, gain, bias, mean, var = case((0, 3, 4, 4), torch.float32, device)
    given = (None, None) if training else (mean, var)
    for ours, plain in zip(
        op.forward(x, gain, bias, *given, 1e-5, "", backend),
        reference.conditional_batch_norm(x, gain, bias, *given, 1e-5, ""),
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("bad", [torch.inf] if INTERPRETING else [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@for_each_mode
@for_each_kernel
def test_what_is_not_finite_stays_in_its_channel(kernel: Kernel, memory: str, bad: float, training: bool) -> None:
    backend, device = kernel
    tensors = case((2, 20, 6, 8), torch.float32, device)
    tensors[0][1, 3, 2, 5] = bad
    tensors[0] = MEMORY[memory](tensors[0])
    grad = random((2, 20, 6, 8), torch.float32, device)
    ours, plain = run(tensors, grad, backend, training), run(tensors, grad, "reference", training)
    for found, expected in zip(ours[:4], plain):
        torch.testing.assert_close(found, expected, equal_nan=True)
    other = torch.arange(20, device=device) != 3
    assert ours[0][:, other].isfinite().all()
    assert ours[1][:, other].isfinite().all()
    if training:
        assert ours[0][:, 3].isnan().all()


@for_each_kernel
def test_a_constant_channel(kernel: Kernel) -> None:
    # Its variance is 0; 1 / sqrt(eps) is 1e15, whose cube is more than float32 holds.
    backend, device = kernel
    _, gain, bias, _, _ = case((2, 3, 4, 4), torch.float32, device)
    x = torch.full((2, 3, 4, 4), 0.25, device=device, requires_grad=True)
    y = conditional_batch_norm(x, gain, bias, None, None, training=True, eps=1e-30, backend=backend)
    assert torch.equal(y, bias.view(2, 3, 1, 1).expand_as(y))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()


def second(tensors: list[Tensor], cotangents: list[Tensor], backend: str, training: bool) -> dict[str, Tensor]:
    x, gain, bias, mean, var = (t.clone(memory_format=torch.preserve_format) for t in tensors)
    grad, *v = cotangents
    grad = grad.clone().requires_grad_()
    wanted = [x.requires_grad_(), gain.requires_grad_(), bias.requires_grad_()]
    y = conditional_batch_norm(*wanted, mean, var, training=training, backend=backend)
    first = torch.autograd.grad(y, wanted, grad, create_graph=True)
    found = torch.autograd.grad(first, [grad, x, gain], v)
    return dict(zip(("of grad", "of x", "of gain"), found))


@for_each_mode
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES[::2] if INTERPRETING else DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 24, 5, 4), (2, 3, 50, 65)], ids=str)
@for_each_kernel
def test_second_gradients_of_each_dtype(
    kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, memory: str, training: bool
) -> None:
    backend, device = kernel
    if INTERPRETING and (dtype == torch.float32) == (shape[1] == 24):
        pytest.skip("in the interpreter a dtype for each shape")
    tensors = case(shape, dtype, device)
    tensors[0] = MEMORY[memory](tensors[0])
    cotangents = [random(s, dtype, device) for s in (shape, shape, shape[:2], shape[:2])]
    ours, plain = (second(tensors, cotangents, b, training) for b in (backend, "reference"))
    exact = second(double(tensors), double(cotangents), "reference", training)
    for what in ours:
        assert_accurate(ours[what], plain[what], exact[what], what=what, ulps=16)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.id == "triton"])
def test_parts_that_are_added_one_at_a_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many more would be by as many at a time as there are by default."""
    from gdl_kernels.ops.conditional_batch_norm.triton import kernels

    monkeypatch.setitem(kernels.CONFIGS, "merge", {"parts": 1, "channels": 2, "num_warps": 4})
    backend, device = kernel
    shape = (2, 3, 70, 65)
    tensors = case(shape, torch.float32, device)
    tensors[0] = channels_last(tensors[0])  # whose pixels more programs share
    cotangents = [random(s, torch.float32, device) for s in (shape, shape, shape[:2], shape[:2])]
    check(tensors, cotangents[0], backend)
    ours, plain = (second(tensors, cotangents, b, True) for b in (backend, "reference"))
    exact = second(double(tensors), double(cotangents), "reference", True)
    for what in ours:
        assert_accurate(ours[what], plain[what], exact[what], what=what, ulps=16)


@for_each_kernel
def test_a_backward_that_is_differentiated_runs_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics went to it, through which the forward pass hears of a gradient: of nothing."""
    backend, device = kernel
    tensors = case((2, 3, 4, 4), torch.float32, device)
    x, gain, bias = (t.requires_grad_() for t in tensors[:3])
    y = conditional_batch_norm(x, gain, bias, None, None, training=True, backend=backend)
    calls: list[tuple[Any, ...]] = []
    run_backward = op.backward
    monkeypatch.setattr(op, "backward", lambda *args: calls.append(args) or run_backward(*args))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    torch.autograd.grad(dx.square().sum(), [x, gain])
    assert len(calls) == 1


@pytest.mark.skipif(INTERPRETING, reason="the C++ kernels read numbers of planes by themselves")
@for_each_mode
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_second_gradients_of_planes_with_any_strides(parameters: torch.dtype, training: bool) -> None:
    def strided(t: Tensor) -> Tensor:
        """In memory with NaN between its numbers, and channels before samples."""
        apart = t.new_full((t.shape[1], 2 * t.shape[0]), torch.nan)
        return apart[:, ::2].copy_(t.T).T

    shape = (3, 5, 4, 4)
    tensors = case(shape, torch.float32, parameters=parameters)
    cotangents = [random(shape, torch.float32) for _ in range(2)] + [random(shape[:2], parameters) for _ in range(2)]
    expected = second(tensors, cotangents, "cpu", training)
    tensors[1:3] = [strided(t) for t in tensors[1:3]]
    cotangents[2:] = [strided(t) for t in cotangents[2:]]
    found = second(tensors, cotangents, "cpu", training)
    assert all(torch.equal(found[what], expected[what]) for what in expected)


@pytest.mark.skipif(INTERPRETING, reason="the Triton kernels have no float64")
@for_each_mode
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_gradients_of_both_orders(backend: str, memory: str, training: bool) -> None:
    x, gain, bias, mean, var = case((2, 3, 3, 2), torch.float64)
    wanted = [t.requires_grad_() for t in (MEMORY[memory](x), gain, bias)]

    def call(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        running = (None, None) if training else (mean, var)
        return conditional_batch_norm(x, gain, bias, *running, training=training, backend=backend)

    torch.autograd.gradcheck(call, wanted)
    torch.autograd.gradgradcheck(call, wanted)


@for_each_mode
def test_third_and_fourth_gradients(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_warned", set())
    tensors = case((3, 2, 4), torch.float64)
    weight = random((3, 2, 4), torch.float64)

    def gradients(backend: str) -> list[Tensor]:
        x, gain, bias = (t.clone().requires_grad_() for t in tensors[:3])
        mean, var = (t.clone() for t in tensors[3:])
        value = conditional_batch_norm(x, gain, bias, mean, var, training=training, backend=backend).pow(2).mul(weight)
        for _ in range(4):
            *found, _ = torch.autograd.grad(value.sum(), [x, gain, bias], create_graph=True)
            value = found[0].pow(2).sum() + found[1].pow(2).sum()
        return found

    with pytest.warns(UserWarning, match="conditional_batch_norm takes third derivatives from the reference") as told:
        ours = gradients("cpu")
    assert len(told) == 1
    for found, expected in zip(ours, gradients("reference")):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_two_steps_before_a_backward(backend: str) -> None:
    # What the gradient needs is its own: the running statistics have moved on.
    x, gain, bias, mean, var = case((3, 4, 5, 5), torch.float64)
    x.requires_grad_()
    y = conditional_batch_norm(x, gain, bias, mean, var, training=False, backend=backend)
    (expected,) = torch.autograd.grad(y.sum(), x)
    y = conditional_batch_norm(x, gain, bias, mean, var, training=False, backend=backend)
    conditional_batch_norm(x, gain, bias, mean, var, training=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_momentum_as_a_tensor() -> None:
    x, gain, bias, mean, var = case((3, 4, 5, 5), torch.float32)
    expected = mean.clone(), var.clone()
    conditional_batch_norm(x, gain, bias, *expected, training=True, momentum=0.25)
    conditional_batch_norm(x, gain, bias, mean, var, training=True, momentum=torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close((mean, var), expected)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("momentum", [0, 0.1, 0.7, 1.0])
def test_running_statistics_of_any_dtype_and_strides(momentum: float, dtype: torch.dtype) -> None:
    x, gain, bias, *running = case((3, 5, 4, 4), torch.float64 if dtype == torch.float64 else torch.float32)
    memory = torch.full((2, 15), torch.nan, dtype=dtype)
    mean, var = memory[:, ::3].copy_(torch.stack(running))
    exact = [t.double() for t in (mean, var)]
    conditional_batch_norm(x.double(), gain.double(), bias.double(), *exact, training=True, momentum=momentum)
    plain = [t.clone() for t in (mean, var)]
    conditional_batch_norm(x, gain, bias, *plain, training=True, momentum=momentum, backend="reference")
    conditional_batch_norm(x, gain, bias, mean, var, training=True, momentum=momentum, backend="cpu")
    for ours, *others in zip((mean, var), plain, exact):
        assert_accurate(ours, *others)
    between = memory.unflatten(1, (5, 3))[..., 1:]
    assert between.isnan().all()  # nothing was written there


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autograd_sees_that_running_statistics_have_moved(backend: str) -> None:
    x, gain, bias, mean, var = case((3, 4, 5, 5), torch.float32)
    for running in (mean, var):
        factor = torch.ones(4, requires_grad=True)
        product = factor * running  # whose gradient needs it as it was
        conditional_batch_norm(x, gain, bias, mean, var, training=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_running_statistics_of_inference_mode_move_in_it_alone(backend: str) -> None:
    x, gain, bias, *expected = case((3, 4, 5, 5), torch.float32)
    with torch.inference_mode():
        mean, var = (t.clone() for t in expected)
        conditional_batch_norm(x, gain, bias, mean, var, training=True, backend=backend)
    conditional_batch_norm(x, gain, bias, *expected, training=True, backend=backend)
    torch.testing.assert_close([mean, var], expected)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        conditional_batch_norm(x, gain, bias, mean, var, training=True, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_mode_sees_that_running_statistics_move(backend: str) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(argument.is_write for argument in func._schema.arguments[:1]):
                changed.update(map(id, tree_leaves(args[0])))
            return func(*args, **(kwargs or {}))

    x, gain, bias, mean, var = case((3, 4, 5, 5), torch.float32)
    expected, changed = [mean.clone(), var.clone()], set[int]()
    conditional_batch_norm(x, gain, bias, *expected, training=True, backend=backend)
    with Seen():
        conditional_batch_norm(x, gain, bias, mean, var, training=True, backend=backend)
    assert {id(mean), id(var)} <= changed
    torch.testing.assert_close([mean, var], expected)


@for_each_mode
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@for_each_kernel
def test_registration(kernel: Kernel, memory: str, training: bool) -> None:
    backend, device = kernel
    x, gain, bias, mean, var = case((2, 3, 4, 5), torch.float32, device)
    wanted = [t.requires_grad_() for t in (MEMORY[memory](x), gain, bias)]
    given = (None, None) if training else (mean, var)
    utilities = ("test_schema", "test_faketensor") if INTERPRETING else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(op.forward.dispatched, (*wanted, *given, 1e-5, "", backend), test_utils=utilities)
    _, statistics = op.forward(*wanted, *given, 1e-5, "", backend)
    statistics = statistics.detach()
    grad = torch.randn_like(x).requires_grad_()
    call = (grad, *wanted[:2], statistics, training, 1e-5, "", backend)
    torch.library.opcheck(op.backward.dispatched, call, test_utils=utilities)
    v = [torch.randn_like(t).requires_grad_() for t in (x, gain, bias)]
    torch.library.opcheck(op.double_backward.dispatched, (*v, *call), test_utils=utilities)


@pytest.mark.skipif(INTERPRETING, reason="an interpreter runs in no compiled graph")
@for_each_mode
@for_each_kernel
def test_compiles_into_one_graph(kernel: Kernel, training: bool) -> None:
    backend, device = kernel

    def call(x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return conditional_batch_norm(2 * x, 1 + gain, bias, mean, var, training=training, backend=backend) + 1

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 4, 4), (3, 8, 5, 6)):
        tensors, grad = case(shape, torch.float32, device), random(shape, torch.float32, device)
        results = []
        for function in (compiled, call):
            *wanted, mean, var = (t.clone() for t in tensors)
            y = function(*(t.requires_grad_() for t in wanted), mean, var)
            results.append([y.detach(), *torch.autograd.grad(y, wanted, grad), mean, var])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_leaves_the_dtype(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, gain, bias, mean, var = case((2, 3, 4), dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conditional_batch_norm(x, gain, bias, mean, var, training=False, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, conditional_batch_norm(x, gain, bias, mean, var, training=False, backend=backend))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    tensors = case((4, 64, 16, 16), torch.float32, "cuda")
    x, gain, bias, mean, var = tensors

    def call() -> Tensor:
        return conditional_batch_norm(x, gain, bias, mean, var, training=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, call())


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(3, 40, 50, 60), (1, 2, 200, 300), (32, 64, 4, 4)], ids=str)
def test_threads_agree(shape: tuple[int, ...], memory: str) -> None:
    tensors, grad = case(shape, torch.float32), random(shape, torch.float32)
    tensors[0] = MEMORY[memory](tensors[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(tensors, grad, "cpu")
        torch.set_num_threads(4)
        together = run(tensors, grad, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_output_gradients or test_gradients_of_both_orders or test_second_gradients)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETING, reason="the interpreter makes triton available on the CPU")
def test_backend_is_chosen_and_explained() -> None:
    tensors = case((2, 3, 4), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = conditional_batch_norm(*tensors, training=False)
        assert torch.equal(y, conditional_batch_norm(*tensors, training=False, backend="cpu"))
    verdicts = gdl_kernels.explain(conditional_batch_norm, *tensors, training=True).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["reference"] == "can"
    assert "x is on cpu" in verdicts["triton"]
    assert verdicts["cuda"] == "conditional_batch_norm has no cuda kernel"
    with pytest.raises(RuntimeError, match=r"backend 'triton' can't serve this conditional_batch_norm.*x is on cpu"):
        conditional_batch_norm(*tensors, training=True, backend="triton")


def given_arguments(**changes: Any) -> dict[str, Any]:
    x, gain, bias, mean, var = case((2, 3, 4, 4), torch.float32)
    names = {"x": x, "gain": gain, "bias": bias, "running_mean": mean, "running_var": var, "training": True}
    return names | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
        ({"x": torch.ones(3)}, ValueError, r"x must be \(N, C, \*spatial\), got shape \(3,\)"),
        ({"gain": None}, TypeError, "gain must be a tensor, got NoneType"),
        ({"gain": torch.ones(3)}, ValueError, r"gain must be \(2, 3\), got shape \(3,\)"),
        ({"bias": torch.ones(2, 4)}, ValueError, r"bias must be \(2, 3\), got shape \(2, 4\)"),
        ({"bias": torch.ones(2, 3).double()}, TypeError, "bias must be float32.*got torch.float64"),
        ({"bias": torch.ones(2, 3).half()}, TypeError, "gain and bias must have one dtype, got .*32 and .*16"),
        ({"gain": torch.ones(2, 3, device="meta")}, ValueError, "gain must be on .*cpu, got meta"),
        ({"running_mean": None}, ValueError, "running_mean must be given where running_var is, got None"),
        ({"running_var": None}, ValueError, "running_var must be given where running_mean is, got None"),
        (
            {"running_mean": None, "running_var": None, "training": False},
            ValueError,
            "running_mean and running_var must be given when training is False, got None",
        ),
        ({"running_var": torch.ones(4)}, ValueError, r"running_var must be \(3,\), got shape \(4,\)"),
        ({"running_mean": torch.ones(3).double()}, TypeError, "running_mean must be float32.*got torch.float64"),
        ({"running_mean": torch.ones(3).requires_grad_()}, ValueError, "running_mean must not require a gradient"),
        (
            {"running_var": torch.ones(1).expand(3)},
            ValueError,
            r"running_var must have memory for each .*strides \(0,\)",
        ),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number, got str"),
        ({"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
        ({"momentum": 1.5}, ValueError, "momentum must be from 0 to 1, got 1.5"),
        ({"momentum": float("nan")}, ValueError, "momentum must be from 0 to 1, got nan"),
        ({"momentum": torch.ones(1)}, ValueError, r"momentum must be a number or .* shape \(\), got .*32 \(1,\)"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
        (
            {"x": torch.ones(1, 3, 1, 1), "gain": torch.ones(1, 3), "bias": torch.ones(1, 3)},
            ValueError,
            r"x must have more than one value per channel in training, got shape \(1, 3, 1, 1\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    # A good call before it, and the same again: what is remembered of calls must not let it pass.
    conditional_batch_norm(**given_arguments(), backend=backend)
    for _ in range(2):
        with pytest.raises(error, match=message):
            conditional_batch_norm(**given_arguments(**changes), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_evaluation_takes_expanded_running_statistics(backend: str) -> None:
    x, gain, bias, *_ = case((2, 3, 4, 4), torch.float32)
    one = torch.ones(1)
    y = conditional_batch_norm(x, gain, bias, one.expand(3), one.expand(3), training=False, backend=backend)
    dense = conditional_batch_norm(x, gain, bias, torch.ones(3), torch.ones(3), training=False, backend=backend)
    assert torch.equal(y, dense)
