"""pixel_norm: numbers, gradients, layouts in memory, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdl_kernels
from gdl_kernels import _native, nn, pixel_norm
from gdl_kernels.ops.pixel_norm import op, reference
from tests.accuracy import assert_accurate
from tests.ops.images import DTYPES, GPU, MEMORY, channels_last, images, random

pytestmark = pytest.mark.usefixtures("nan_poison")

KERNELS = ["cpu", GPU]
BACKENDS = ["reference", *KERNELS]

SHAPES = [
    (4, 512, 4, 4),  # ProGAN's first layer: less than a tile of pixels
    (2, 32, 40, 24),  # few channels, more than one tile
    (3, 5, 7, 9),  # divides nothing
    (2, 24, 1, 1),  # 1x1 maps
    (33, 17),  # no pixels: a mapping network's latents
    (3, 1, 50),  # one channel: the line of a channels-last tensor has one element
    (2, 3, 2, 3, 4),  # volumes
    (1, 9001, 3),  # more channels than a buffer, or than a block keeps in registers
    (1, 2, 3000),  # a last tile that is not full
    (1, 640, 33, 8),  # a block's channels are not all kept, pixels in vectors
]


def run(x: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = pixel_norm(x, backend=backend)
    (dx,) = torch.autograd.grad(y, x, grad)
    return y.detach(), dx


def check(x: Tensor, grad: Tensor, backend: str) -> None:
    ours, plain = run(x, grad, backend), run(x, grad, "reference")
    exact = run(x.double(), grad.double(), "reference")
    assert_accurate(ours[0], plain[0], exact[0], "y")
    # dx is the difference of r g and its part along x, which is all of it where there is one channel.
    r = (x.double().square().mean(1, keepdim=True) + 1e-8).rsqrt()
    assert_accurate(ours[1], plain[1], exact[1], "dx", terms=r * grad.double())


# The first two in every dtype; the others need no more than one that is narrower than its sums.
CASES = [(memory, dtype) for memory in list(MEMORY)[:2] for dtype in DTYPES]
CASES += [(memory, torch.bfloat16) for memory in list(MEMORY)[2:]]


@pytest.mark.parametrize(("memory", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_output_and_gradient(backend: str, shape: tuple[int, ...], dtype: torch.dtype, memory: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x = MEMORY[memory](random(shape, dtype, device))
    assert x.shape == shape
    check(x, random(shape, dtype, device), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY)
def test_float64(shape: tuple[int, ...], memory: str) -> None:
    x, grad = MEMORY[memory](random(shape, torch.float64)), random(shape, torch.float64)
    for ours, exact in zip(run(x, grad, "cpu"), run(x, grad, "reference")):
        # With one channel y is +-1 and dx only what rounding leaves of g - g.
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-11 if shape[1] == 1 else 1e-12)


def test_reference_is_the_formula() -> None:
    x = random((2, 3, 4, 5), torch.float64)
    y = torch.empty_like(x)
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        y[n, c, h, w] = x[n, c, h, w] / (sum(v**2 for v in x[n, :, h, w].tolist()) / 3 + 1e-8) ** 0.5
    torch.testing.assert_close(pixel_norm(x, backend="reference"), y)


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    shape = [data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))]
    shape += data.draw(st.lists(st.integers(1, 9), max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(data.draw(images(shape, dtype)), data.draw(images(shape, dtype)), "cpu")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", KERNELS)
def test_output_is_laid_out_like_the_input(backend: str, memory_format: torch.memory_format) -> None:
    x = random((2, 6, 5, 4), torch.float32, "cuda" if backend == "cuda" else "cpu").to(memory_format=memory_format)
    y, dx = run(x, torch.ones_like(x), backend)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_offsets_beyond_32_bits(memory: str, channels: int) -> None:
    # Two images so far apart that the second lies beyond 2^31 elements. Memory between them is never touched.
    apart = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # poison would touch it
    storage = torch.empty(apart + 8 * channels, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    strides = (apart, 8, 1) if memory == "contiguous" else (apart, 1, channels)
    x = storage.as_strided((2, channels, 8), strides)
    x.copy_(random(x.shape, torch.bfloat16))
    check(x, random(x.shape, torch.bfloat16), "cpu")


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_more_than_2_to_the_31_elements(memory: str) -> None:
    shape = (2, 8, 2**27 + 8)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    y = pixel_norm(channels_last(x) if memory == "channels last" else x, backend="cuda")
    for part in (slice(0, 100), slice(-100, None)):
        assert_accurate(
            y[..., part], reference.pixel_norm(x[..., part], 1e-8), reference.pixel_norm(x[..., part].double(), 1e-8)
        )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="cuda" if backend == "cuda" else "cpu")
    y, dx = run(x, torch.empty_like(x), backend)
    assert y.shape == dx.shape == shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_not_finite_stays_in_its_pixel(backend: str, memory: str, bad: float) -> None:
    x = MEMORY[memory](random((2, 20, 6, 8), torch.float32, "cuda" if backend == "cuda" else "cpu"))
    x[1, 3, 2, 5] = bad
    y = pixel_norm(x, backend=backend)
    torch.testing.assert_close(y, reference.pixel_norm(x, 1e-8), equal_nan=True)
    pixel = torch.zeros(2, 6, 8, dtype=torch.bool, device=x.device)
    pixel[1, 2, 5] = True
    assert y.movedim(1, -1)[~pixel].isfinite().all()
    assert y[1, 3, 2, 5].isnan()


@pytest.mark.parametrize("backend", KERNELS)
def test_dark_pixels(backend: str) -> None:
    # r is 1e15: its cube, as the gradient is usually written, is more than float32 holds.
    x = torch.zeros(1, 4, 1, 2, device="cuda" if backend == "cuda" else "cpu")
    x[..., 1] = random((1, 4, 1), torch.float32) * 1e-15
    for values in (x, channels_last(x)):
        v = values.clone().requires_grad_()
        y = pixel_norm(v, eps=1e-30, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), v, create_graph=True)
        assert y.isfinite().all()
        assert dx.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_gradients_of_both_orders(backend: str, memory: str) -> None:
    x = MEMORY[memory](random((2, 5, 3, 2), torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda x: pixel_norm(x, backend=backend), x)
    torch.autograd.gradgradcheck(lambda x: pixel_norm(x, backend=backend), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_second_gradient_of_each_dtype(backend: str, dtype: torch.dtype) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x, grad, v = (random((2, 24, 4, 5), dtype, device) for _ in range(3))

    def second(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wanted = [x.to(dtype).requires_grad_(), grad.to(dtype).requires_grad_()]
        y = pixel_norm(wanted[0], backend=backend)
        (dx,) = torch.autograd.grad(y, wanted[0], wanted[1], create_graph=True)
        return torch.autograd.grad(dx, wanted, v.to(dtype))

    ours, plain, exact = second(backend, dtype), second("reference", dtype), second("reference", torch.float64)
    for what, *values in zip(("of x", "of grad"), ours, plain, exact):
        assert_accurate(*values, what=what)


def test_third_gradient() -> None:
    def third(backend: str) -> Tensor:
        value = x = random_x.clone().requires_grad_()
        value = pixel_norm(x, backend=backend).pow(2).mul(weight).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            last, value = value, value.pow(2).mul(weight).sum()
        return last

    random_x, weight = random((2, 3, 4), torch.float64), random((2, 3, 4), torch.float64)
    torch.testing.assert_close(third("cpu"), third("reference"))


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_registration(backend: str, memory: str) -> None:
    x = MEMORY[memory](random((2, 3, 4, 5), torch.float32, "cuda" if backend == "cuda" else "cpu")).requires_grad_()
    torch.library.opcheck(op.forward.dispatched, (x, 1e-8, backend))
    torch.library.opcheck(op.backward.dispatched, (torch.randn_like(x).requires_grad_(), x, 1e-8, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_into_one_graph(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    compiled = torch.compile(lambda x: pixel_norm(2 * x, backend=backend) + 1, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 4, 4), (3, 8, 5, 6)):
        x, grad = random(shape, torch.float32, device), random(shape, torch.float32, device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, eager = compiled(a), pixel_norm(2 * b, backend=backend) + 1
        ours.backward(grad)
        eager.backward(grad)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        x = random((2, 3, 4), dtype, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = pixel_norm(x, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, pixel_norm(x, backend=backend))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    x = random((4, 64, 16, 16), torch.float32, "cuda")
    y = pixel_norm(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pixel_norm(x)
    x.copy_(3 * x)
    graph.replay()
    torch.testing.assert_close(captured, y)


def test_threads_agree() -> None:
    x, grad = random((3, 40, 50, 60), torch.float32), random((3, 40, 50, 60), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(x, grad, "cpu")
        torch.set_num_threads(4)
        together = run(x, grad, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_output_and_gradient or test_gradients_of_both_orders)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_backend_is_chosen_and_explained() -> None:
    x = random((2, 3, 4), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixel_norm(x), pixel_norm(x, backend="cpu"))
    verdicts = gdl_kernels.explain(pixel_norm, x).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["reference"] == "can"
    assert "x is on cpu" in verdicts["cuda"]
    assert verdicts["triton"] == "pixel_norm has no triton kernel"
    with pytest.raises(RuntimeError, match=r"backend 'cuda' can't serve this pixel_norm.*x is on cpu"):
        pixel_norm(x, backend="cuda")


def test_module() -> None:
    x = random((2, 3, 4), torch.float32)
    module = nn.PixelNorm(eps=0.5)
    assert torch.equal(module(x), pixel_norm(x, eps=0.5))
    assert not torch.equal(module(x), pixel_norm(x))
    assert repr(module) == "PixelNorm(eps=0.5)"


@pytest.mark.parametrize(
    ("x", "eps", "error", "message"),
    [
        (torch.ones(3), 1e-8, ValueError, r"x must be \(N, C, \*spatial\), got shape \(3,\)"),
        (torch.ones(2, 3, dtype=torch.int64), 1e-8, TypeError, "x must be float32.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), 1e-8, TypeError, "x must be float32.*got torch.complex64"),
        ([[1.0]], 1e-8, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 3), 0.0, ValueError, "eps must be positive and finite, got 0.0"),
        (torch.ones(2, 3), -1e-8, ValueError, "eps must be positive and finite, got -1e-08"),
        (torch.ones(2, 3), float("nan"), ValueError, "eps must be positive and finite, got nan"),
        (torch.ones(2, 3), "small", TypeError, "eps must be a number, got str"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None, x: Tensor, eps: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pixel_norm(x, eps=eps, backend=backend)
