"""adain, style_epilogue and adain_from_style: numbers, gradients, layouts in memory, errors.

They are one op with more or less before it, so they go through the same tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gdl_kernels
from gdl_kernels import _backends, _native, adain, adain_from_style, nn, style_epilogue
from gdl_kernels.ops.adain import op
from gdl_kernels.ops.adain_from_style import op as from_style
from gdl_kernels.ops.style_epilogue import reference
from tests.accuracy import assert_accurate
from tests.ops.images import DTYPES, GPU, MEMORY, channels_last, images, random

pytestmark = pytest.mark.usefixtures("nan_poison")

KERNELS = ["cpu", GPU]
BACKENDS = ["reference", *KERNELS]
Memory = Callable[[Tensor], Tensor]

SHAPES = [
    (4, 64, 4, 4),  # StyleGAN's first layer, with fewer channels: many planes in a tile
    (2, 19, 40, 24),  # channels that fill no vector
    (3, 5, 7, 9),  # divides nothing
    (2, 24, 1, 1),  # planes of one pixel, which are all mean
    (3, 1, 50),  # one channel: the line of a channels-last tensor has one element
    (2, 3, 2, 3, 4),  # volumes
    (1, 2, 9000),  # pieces that are not full, planes that threads share
    (1, 600, 33, 8),  # more channels than a row of vectors, rows in more than one part
    (1, 1, 130, 140),  # one plane alone
]

# Each by what it is called with; (N, C) parameters have the dtype of the sums.
CALLS = {
    "adain": lambda x, p, backend: adain(x, p["scale"], p["bias"], backend=backend),
    "epilogue": lambda x, p, backend: style_epilogue(x, **p, backend=backend),
    "shared noise": lambda x, p, backend: style_epilogue(x, **{**p, "noise": p["noise"][:1]}, backend=backend),
    "no noise": lambda x, p, backend: style_epilogue(
        x, p["scale"], p["bias"], channel_bias=p["channel_bias"], backend=backend
    ),
    "noise, no bias": lambda x, p, backend: style_epilogue(
        x, p["scale"], p["bias"], noise=p["noise"], noise_weight=p["noise_weight"], negative_slope=1.0, eps=1e-3,
        backend=backend,
    ),
    "from style": lambda x, p, backend: adain_from_style(x, p["style"], backend=backend),
}  # fmt: skip
USED = {
    "adain": ("scale", "bias"),
    "epilogue": ("scale", "bias", "noise", "noise_weight", "channel_bias"),
    "shared noise": ("scale", "bias", "noise", "noise_weight", "channel_bias"),
    "no noise": ("scale", "bias", "channel_bias"),
    "noise, no bias": ("scale", "bias", "noise", "noise_weight"),
    "from style": ("style",),
}


def parameters(call: str, x: Tensor) -> dict[str, Tensor]:
    count, channels, *pixels = x.shape
    shapes = {
        "scale": (count, channels),
        "bias": (count, channels),
        "noise": (count, 1, *pixels),
        "noise_weight": (channels,),
        "channel_bias": (channels,),
        "style": (count, channels, 6, 5),
    }
    return {name: random(shapes[name], x.dtype, x.device.type) for name in USED[call]}


def run(call: str, x: Tensor, p: dict[str, Tensor], grad: Tensor, backend: str) -> dict[str, Tensor]:
    x, p = x.detach().requires_grad_(), {name: t.detach().requires_grad_() for name, t in p.items()}
    y = CALLS[call](x, p, backend)
    gradients = torch.autograd.grad(y, [x, *p.values()], grad)
    return {"y": y.detach(), **dict(zip(["dx", *(f"d{name}" for name in p)], gradients))}


def steps(call: str, x: Tensor, p: dict[str, Tensor], grad: Tensor) -> Tensor:
    """``scale rstd grad``, which dx is what is left of; of the numbers themselves, what y is left of."""
    h = x.double().flatten(2)
    if "noise_weight" in p:
        noise = p["noise"][:1] if call == "shared noise" else p["noise"]
        h = h + p["noise_weight"].double()[:, None] * noise.double().flatten(2)
    if "channel_bias" in p:
        h = h + p["channel_bias"].double()[:, None]
    if call not in ("adain", "from style", "noise, no bias"):
        h = F.leaky_relu(h, 0.2)
    eps = {"adain": 1e-5, "from style": 1e-5, "noise, no bias": 1e-3}.get(call, 1e-8)
    scale = p["style"].double().flatten(2).std(2) if call == "from style" else p["scale"].double()
    return (scale * (h.var(2, correction=0) + eps).rsqrt()).abs()[..., None] * grad.double().flatten(2).abs()


def check(
    call: str, x: Tensor, grad: Tensor, backend: str, p: dict[str, Tensor] | None = None, *, sums: float = 1
) -> None:
    """``sums``: how far the rounding of x itself is felt in the sums that are the gradients of parameters."""
    p = parameters(call, x) if p is None else p
    ours, plain = run(call, x, p, grad, backend), run(call, x, p, grad, "reference")
    exact = run(call, x.double(), {name: t.double() for name, t in p.items()}, grad.double(), "reference")
    rounded = steps(call, x, p, x.abs() + 1).flatten()
    assert_accurate(ours["y"], plain["y"], exact["y"], "y", terms=torch.cat([exact["y"].flatten(), rounded]))
    # dx is what is left of scale rstd g without its mean and its part along h; the others are sums of dx, or of g,
    # whose rounding errors add up as a random walk does.
    step = torch.cat([steps(call, x, p, grad).flatten(), grad.double().abs().flatten()])
    for name in list(ours)[1:]:
        walk = 1 if name == "dx" else sums * (x.numel() / max(1, exact[name].numel())) ** 0.5
        terms = torch.cat([exact[name].abs().flatten(), walk * step])
        assert_accurate(ours[name], plain[name], exact[name], name, terms=terms, ulps=2 if name == "dx" else 4)


# Every dtype in the first two, and in the others one that is narrower than its sums; every call in the first shapes.
CASES = [("epilogue", memory, dtype, shape) for memory in list(MEMORY)[:2] for dtype in DTYPES for shape in SHAPES]
CASES += [("epilogue", memory, torch.bfloat16, shape) for memory in list(MEMORY)[2:] for shape in SHAPES[:3]]
CASES += [
    (call, memory, torch.float32, shape)
    for call in CALLS
    for memory in list(MEMORY)[:2]
    for shape in (SHAPES[1], SHAPES[2], SHAPES[6])
    if call != "epilogue"
]


@pytest.mark.parametrize(("call", "memory", "dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_output_and_gradients(backend: str, call: str, memory: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x = MEMORY[memory](random(shape, dtype, device))
    assert x.shape == shape
    check(call, x, random(shape, dtype, device), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_noise_in_float32_beside_bfloat16(backend: str) -> None:
    # Its gradient is a sum over the channels of dx, and more exact than dx is stored.
    device = "cuda" if backend == "cuda" else "cpu"
    x, grad = (random((2, 9, 20, 21), torch.bfloat16, device) for _ in range(2))
    p = {name: t.float() for name, t in parameters("epilogue", x).items()}
    check("epilogue", x, grad, backend, p)
    v = [random(t.shape, t.dtype, device) for t in (x, *p.values())]
    ours, plain = second("epilogue", x, p, grad, v, backend), second("epilogue", x, p, grad, v, "reference")
    wide = {name: t.double() for name, t in p.items()}
    exact = second("epilogue", x.double(), wide, grad.double(), [t.double() for t in v], "reference")
    for i, values in enumerate(zip(ours, plain, exact)):
        assert_accurate(*values, what=f"second gradient {i}", ulps=16)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_style_anywhere_in_memory(backend: str, memory: str) -> None:
    # The content in the other of the two ways to lay out an image.
    device = "cuda" if backend == "cuda" else "cpu"
    content, grad = (random((3, 5, 7, 9), torch.float32, device) for _ in range(2))
    style = MEMORY[memory](random((3, 5, 6, 4), torch.float32, device))
    if memory != "channels last":
        content = channels_last(content)
    check("from style", content, grad, backend, {"style": style})


# As StyleGAN's under autocast, and more images than a warp has threads to add up their gradients.
@pytest.mark.parametrize("memory", ["contiguous", "channels last", "not aligned"])
@pytest.mark.parametrize("shape", [(2, 24, 9, 8), (70, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_parameters_in_a_dtype_of_their_own(
    backend: str, dtype: torch.dtype, given: torch.dtype, shape: tuple[int, ...], memory: str
) -> None:
    """They are what they would be in the dtype of the sums, and their gradients are rounded once."""
    device = "cuda" if backend == "cuda" else "cpu"
    x, grad = (MEMORY[memory](random(shape, dtype, device)) for _ in range(2))
    p = {name: t.to(given) for name, t in parameters("epilogue", x).items()}
    narrow = run("epilogue", x, p, grad, backend)
    wide = run("epilogue", x, {name: t.float() for name, t in p.items()}, grad, backend)
    assert torch.equal(narrow["y"], wide["y"])
    for name in list(narrow)[1:]:
        assert narrow[name].dtype == (dtype if name == "dx" else given)
        assert torch.equal(narrow[name], wide[name].to(narrow[name].dtype)), name


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_parameters_with_gaps(backend: str, memory: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x, grad = (MEMORY[memory](random((2, 5, 7, 6), torch.float32, device)) for _ in range(2))
    p = parameters("epilogue", x)
    with_gaps = {name: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for name, t in p.items()}
    v = [torch.randn_like(t) for t in (x, *p.values())]
    dense, found = (
        [*run("epilogue", x, values, grad, backend).values(), *second("epilogue", x, values, grad, v, backend)]
        for values in (p, with_gaps)
    )
    torch.testing.assert_close(found, dense)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape: tuple[int, ...], memory: str) -> None:
    x = MEMORY[memory](random(shape, torch.float64))
    p, grad = parameters("epilogue", x), random(shape, torch.float64)
    ours, exact = run("epilogue", x, p, grad, "cpu"), run("epilogue", x, p, grad, "reference")
    for name in ours:
        # The gradient of a plane of one pixel is what rounding leaves of g - g, times 1 / sqrt(eps).
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", list(MEMORY)[:2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_statistics_do_not_cancel(backend: str, call: str, memory: str) -> None:
    # Mean 1e4 and deviation 1: the mean of the squares has no digit left for the variance.
    device = "cuda" if backend == "cuda" else "cpu"
    x = MEMORY[memory](1e4 + random((2, 6, 40, 41), torch.float32, device))
    y = CALLS[call](x, parameters(call, x), "reference")
    # x itself is rounded to 1 / 2048, which adds up in sums over a plane.
    check(call, x, random(y.shape, torch.float32, device), backend, sums=2500)


def test_reference_is_the_formula() -> None:
    x, scale, bias = random((2, 3, 4, 5), torch.float64), *random((2, 2, 3), torch.float64)
    noise, weight, channel = random((2, 1, 4, 5), torch.float64), *random((2, 3), torch.float64)
    y, z = torch.empty_like(x), torch.empty_like(x)
    for n in range(2):
        for c in range(3):
            plane = x[n, c]
            mean = sum(plane.flatten().tolist()) / 20
            var = sum((v - mean) ** 2 for v in plane.flatten().tolist()) / 20
            y[n, c] = scale[n, c] * (plane - mean) / (var + 1e-5) ** 0.5 + bias[n, c]
            u = plane + weight[c] * noise[n, 0] + channel[c]
            h = torch.where(u > 0, u, 0.2 * u)
            mean = sum(h.flatten().tolist()) / 20
            var = sum((v - mean) ** 2 for v in h.flatten().tolist()) / 20
            z[n, c] = scale[n, c] * (h - mean) / (var + 1e-8) ** 0.5 + bias[n, c]
    torch.testing.assert_close(adain(x, scale, bias, backend="reference"), y)
    given = {"noise": noise, "noise_weight": weight, "channel_bias": channel}
    torch.testing.assert_close(style_epilogue(x, scale, bias, **given, backend="reference"), z)
    styled = adain_from_style(y, x, backend="reference")
    torch.testing.assert_close(styled.mean((2, 3)), x.mean((2, 3)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_peers(backend: str) -> None:
    x, scale, bias = random((3, 6, 8, 9), torch.float64), *random((2, 3, 6), torch.float64)
    noise, weight, channel = random((3, 1, 8, 9), torch.float64), *random((2, 6), torch.float64)
    y = adain(x, scale, bias, backend=backend)
    planes = (3, 6, 1, 1)
    torch.testing.assert_close(y, scale.view(planes) * F.instance_norm(x) + bias.view(planes))
    # A group of one channel has the plane's statistics, and so has a batch of one image's planes.
    torch.testing.assert_close(y, scale.view(planes) * F.group_norm(x, 6) + bias.view(planes))
    batch = F.batch_norm(x.view(1, 18, 8, 9), None, None, scale.flatten(), bias.flatten(), training=True)
    torch.testing.assert_close(y, batch.view_as(x))
    h = F.leaky_relu(x + weight.view(1, 6, 1, 1) * noise + channel.view(1, 6, 1, 1), 0.2)
    given = {"noise": noise, "noise_weight": weight, "channel_bias": channel}
    torch.testing.assert_close(
        style_epilogue(x, scale, bias, **given, backend=backend),
        scale.view(planes) * F.instance_norm(h, eps=1e-8) + bias.view(planes),
    )
    style = random((3, 6, 5, 4), torch.float64)
    deviation, mean = (style.var((2, 3), correction=0) + 1e-5).sqrt(), style.mean((2, 3))
    torch.testing.assert_close(
        adain_from_style(x, style, backend=backend), deviation.view(planes) * F.instance_norm(x) + mean.view(planes)
    )


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    shape = [data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))]
    shape += data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    if shape[2:] == [1] * len(shape[2:]):
        shape.append(2)
    dtype, call = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(list(CALLS)))
    if 0 in shape and call == "shared noise":
        call = "epilogue"
    x = data.draw(images(shape, dtype))
    check(call, x, data.draw(images(shape, dtype)), "cpu")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", KERNELS)
def test_output_is_laid_out_like_the_input(backend: str, memory_format: torch.memory_format) -> None:
    x = random((2, 6, 5, 4), torch.float32, "cuda" if backend == "cuda" else "cpu").to(memory_format=memory_format)
    found = run("epilogue", x, parameters("epilogue", x), torch.ones_like(x), backend)
    assert found["y"].is_contiguous(memory_format=memory_format)
    assert found["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_offsets_beyond_32_bits(memory: str) -> None:
    # Two images so far apart that the second lies beyond 2^31 elements. Memory between them is never touched.
    apart = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # poison would touch it
    storage = torch.empty(apart + 40, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    strides = (apart, 8, 1) if memory == "contiguous" else (apart, 1, 5)
    x = storage.as_strided((2, 5, 8), strides)
    x.copy_(random(x.shape, torch.bfloat16))
    check("epilogue", x, random(x.shape, torch.bfloat16), "cpu")


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("call", ["adain", "epilogue", "from style"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, call: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="cuda" if backend == "cuda" else "cpu")
    found = run(call, x, parameters(call, x), torch.empty_like(x), backend)
    assert found["y"].shape == found["dx"].shape == shape
    assert not any(found[name].any() for name in ("dnoise_weight", "dchannel_bias") if name in found)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_not_finite_stays_in_its_plane(backend: str, memory: str, bad: float) -> None:
    x = MEMORY[memory](random((2, 20, 6, 8), torch.float32, "cuda" if backend == "cuda" else "cpu"))
    x[1, 3, 2, 5] = bad
    for call in ("adain", "epilogue"):
        p, grad = parameters(call, x), torch.randn_like(x)
        ours, plain = run(call, x, p, grad, backend), run(call, x, p, grad, "reference")
        for name in ("y", "dx"):
            bad_planes = plain[name].isnan().flatten(2).any(2)
            assert torch.equal(ours[name].isnan().flatten(2).any(2), bad_planes)
            assert bad_planes.nonzero().tolist() == [[1, 3]]
            torch.testing.assert_close(ours[name][~bad_planes], plain[name][~bad_planes], rtol=1e-4, atol=1e-4)


# ---- derivatives


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_both_orders(backend: str, call: str, memory: str) -> None:
    x = MEMORY[memory](random((2, 3, 3, 2), torch.float64)).requires_grad_()
    p = {name: t.requires_grad_() for name, t in parameters(call, x).items()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return CALLS[call](x, dict(zip(p, values)), backend)

    torch.autograd.gradcheck(function, (x, *p.values()))
    torch.autograd.gradgradcheck(function, (x, *p.values()))


@pytest.mark.parametrize("wanted", ["content", "style"])
def test_gradients_of_content_or_style_alone(wanted: str) -> None:
    images = {"content": random((2, 3, 3, 2), torch.float64), "style": random((2, 3, 5), torch.float64)}

    def function(x: Tensor) -> Tensor:
        return adain_from_style(**{**images, wanted: x}, backend="cpu")

    x = images[wanted].clone().requires_grad_()
    torch.autograd.gradcheck(function, x)
    torch.autograd.gradgradcheck(function, x)


@pytest.mark.filterwarnings("ignore:.*third derivatives")
def test_third_gradients_of_content_and_style() -> None:
    weight = random((2, 3, 3, 2), torch.float64)
    leaves = [random(shape, torch.float64).requires_grad_() for shape in ((2, 3, 3, 2), (2, 3, 5))]

    def third(backend: str) -> Sequence[Tensor]:
        value = adain_from_style(*leaves, backend=backend).square().mul(weight).sum()
        for _ in range(3):
            found = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.square().sum() for g in found)
        return found

    torch.testing.assert_close(third("cpu"), third("reference"))


class ThroughTheDispatcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_second_gradients_through_the_dispatcher_are_the_same() -> None:
    # The statistics of the style are an output with a gradient of its own, which torch wires up in its own way there.
    x, grad = random((2, 3, 4, 5), torch.float32), random((2, 3, 4, 5), torch.float32)
    p = parameters("from style", x)
    v = [torch.randn_like(t) for t in (x, *p.values())]
    directly = second("from style", x, p, grad, v, "cpu")
    with ThroughTheDispatcher():
        assert all(map(torch.equal, directly, second("from style", x, p, grad, v, "cpu")))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_with_drawn_noise(backend: str) -> None:
    x, scale, bias = random((2, 3, 3, 3), torch.float64), *random((2, 2, 3), torch.float64)
    inputs = [t.requires_grad_() for t in (x, scale, bias, *random((2, 3), torch.float64))]

    def function(x: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
        torch.manual_seed(0)
        return style_epilogue(x, scale, bias, noise_weight=weight, channel_bias=channel, backend=backend)

    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


def second(call: str, x: Tensor, p: dict[str, Tensor], grad: Tensor, v: Sequence[Tensor], backend: str) -> list[Tensor]:
    x, grad = x.detach().requires_grad_(), grad.detach().requires_grad_()
    p = {name: t.detach().requires_grad_() for name, t in p.items()}
    wanted = [x, *p.values()]
    first = torch.autograd.grad(CALLS[call](x, p, backend), wanted, grad, create_graph=True)
    linear = (*wanted, grad) if call == "from style" else tuple(t for t in (*wanted, grad) if t is not p.get("bias"))
    return list(torch.autograd.grad(first, linear, v))


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 10, 12, 13), (1, 3, 97, 90)], ids=str)
@pytest.mark.parametrize("call", ["adain", "epilogue", "from style"])
@pytest.mark.parametrize("backend", KERNELS)
def test_second_gradients_of_each_dtype(
    backend: str, call: str, shape: tuple[int, ...], dtype: torch.dtype, memory: str
) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x, grad = (MEMORY[memory](random(shape, dtype, device)) for _ in range(2))
    p = parameters(call, x)
    v = [random(t.shape, dtype, device) for t in (x, *p.values())]
    ours, plain = second(call, x, p, grad, v, backend), second(call, x, p, grad, v, "reference")
    wide = {name: t.double() for name, t in p.items()}
    exact = second(call, x.double(), wide, grad.double(), [t.double() for t in v], "reference")
    for i, values in enumerate(zip(ours, plain, exact)):
        assert_accurate(*values, what=f"second gradient {i}", ulps=16)  # its terms cancel several times over


# Which of the gradients is differentiated again: a penalty takes that of x alone.
FIRST = ["dx", "dscale", "dbias", "dnoise", "dnoise_weight", "dchannel_bias"]


@pytest.mark.parametrize("which", range(6), ids=FIRST)
@pytest.mark.parametrize("backend", KERNELS)
def test_second_gradients_of_one_of_the_first(backend: str, which: int) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x = random((3, 5, 7, 9), torch.float32, device)
    p, grad = parameters("epilogue", x), random(x.shape, torch.float32, device)
    v = random(([x, *p.values()][which]).shape, torch.float32, device)

    def found(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *p.values(), grad)]
        y = CALLS["epilogue"](leaves[0], dict(zip(p, leaves[1:-1])), backend)
        first = torch.autograd.grad(y, leaves[:-1], leaves[-1], create_graph=True)[which]
        second = torch.autograd.grad(first, leaves, v.to(dtype), allow_unused=True)
        return [t.new_zeros(t.shape) if g is None else g for t, g in zip(leaves, second)]

    plain, exact = (found("reference", dtype) for dtype in (torch.float32, torch.float64))
    for i, values in enumerate(zip(found(backend, torch.float32), plain, exact)):
        assert_accurate(*values, what=f"second gradient {i}", ulps=16)


@pytest.mark.filterwarnings("ignore:gdl_kernels. adain takes third derivatives")
def test_third_gradient_of_a_penalty() -> None:
    leaves = [t.requires_grad_() for t in (random((2, 3, 4), torch.float64), *random((2, 2, 3), torch.float64))]

    def third(backend: str) -> list[Tensor]:
        value = adain(*leaves, backend=backend).pow(3).sum()
        for _ in range(2):
            (dx,) = torch.autograd.grad(value, leaves[0], create_graph=True)
            value = dx.square().sum()
        return list(torch.autograd.grad(value, leaves[:2]))

    for ours, plain in zip(third("cpu"), third("reference")):
        torch.testing.assert_close(ours, plain)


def test_third_gradient_comes_from_the_reference() -> None:
    x, scale, bias = random((2, 3, 4), torch.float64), *random((2, 2, 3), torch.float64)
    weight, weights = random((2, 3, 4), torch.float64), random((2, 3), torch.float64)

    def third(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, scale, bias, *weights)]
        torch.manual_seed(1)
        y = style_epilogue(*leaves[:3], noise_weight=leaves[3], channel_bias=leaves[4], backend=backend)
        value = y.pow(2).mul(weight).sum()
        for _ in range(3):
            found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            value = sum(g.pow(2).sum() for g in found if g is not None)
        return [g for g in found if g is not None]

    _backends._warned.clear()
    with pytest.warns(UserWarning, match="adain takes third derivatives from the reference"):
        ours = third("cpu")
    # The noise of the two differs by what float32 leaves of it.
    for a, b in zip(ours, third("reference")):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---- noise


@pytest.mark.parametrize("pixels", [1, 2, 3, 5, 64, 4099])
@pytest.mark.parametrize("backend", KERNELS)
def test_drawn_noise_is_the_same_on_every_backend(backend: str, pixels: int) -> None:
    # Through an epilogue that changes nothing else than to normalise it.
    device = "cuda" if backend == "cuda" else "cpu"
    x = torch.zeros(3, 2, pixels, device=device)
    one, zero, weight = torch.ones(3, 2, device=device), torch.zeros(3, 2, device=device), torch.ones(2, device=device)

    def drawn(backend: str) -> Tensor:
        torch.manual_seed(3)
        return style_epilogue(x, one, zero, noise_weight=weight, negative_slope=1.0, eps=1.0, backend=backend)

    torch.testing.assert_close(drawn(backend), drawn("reference"), rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(backend), drawn(backend))


def test_drawn_noise_is_standard_normal_and_new_every_time() -> None:
    noise = reference.drawn_noise(torch.tensor(1234567890123), torch.empty(2, 1, 300, 300))
    assert noise.shape == (2, 1, 300, 300)
    values = noise.double().flatten().sort().values
    expected = torch.special.ndtri((torch.arange(len(values)).double() + 0.5) / len(values))
    # Kolmogorov and Smirnov: the distance of the distributions passes 2 / sqrt(n) once in a thousand.
    distance = (torch.special.ndtr(values) - torch.special.ndtr(expected)).abs().max()
    assert distance < 2 / len(values) ** 0.5
    assert torch.corrcoef(noise.flatten(1))[0, 1].abs() < 0.02  # images have noise of their own
    neighbours = torch.stack([noise[0, 0, :, :-1].flatten(), noise[0, 0, :, 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.02
    x, one = torch.zeros(1, 1, 64), torch.ones(1, 1)
    first, other = (style_epilogue(x, one, one, noise_weight=torch.ones(1)) for _ in range(2))
    assert not torch.allclose(first, other)


def test_backward_draws_the_same_noise_again() -> None:
    x, scale, bias = random((2, 3, 20, 20), torch.float64), *random((2, 2, 3), torch.float64)
    weight, grad = random((3,), torch.float64), random((2, 3, 20, 20), torch.float64)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (x, scale, bias, weight)]
        y = style_epilogue(*leaves[:3], noise_weight=leaves[3], backend=backend)
        torch.manual_seed(6)  # what is drawn meanwhile is no matter
        return torch.autograd.grad(y, leaves, grad)

    for ours, plain in zip(gradients("cpu"), gradients("reference")):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def kept_bytes(call: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """Of what the graph of a call keeps besides what it was given."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    addresses = {t.untyped_storage().data_ptr() for t in given}
    return sum(size for address, size in kept.items() if address not in addresses)


def test_the_graph_keeps_x_and_two_numbers_a_plane() -> None:
    x, scale, bias = random((2, 8, 64, 64), torch.float32).requires_grad_(), *random((2, 2, 8), torch.float32)
    weight = random((8,), torch.float32)
    numbers = 4 * 2 * 2 * 8
    assert kept_bytes(lambda: adain(x, scale, bias), (x, scale, bias)) == numbers
    assert kept_bytes(lambda: adain_from_style(x, 2 * x.detach()[..., ::2, :]), (x,)) == 2 * numbers + x.nbytes // 2
    drawn = kept_bytes(lambda: style_epilogue(x, scale, bias, noise_weight=weight), (x, scale, bias, weight))
    assert drawn == numbers + 8  # and the seed


# ---- torch


class Calls(TorchDispatchMode):
    """Names of the ops that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if not op.is_view and "empty" not in op.name():
            self.names.append(op.name())
        return out


@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "drawn noise"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_pass_is_one_op(backend: str, drawn: bool) -> None:
    """On a GPU every other would be a launch, which takes longer than such a pass."""
    device = "cuda" if backend == "cuda" else "cpu"
    # The CPU's kernels read parameters in the dtype of the sums.
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    x = random((2, 3, 4, 5), dtype, device).requires_grad_()
    p = {name: t.requires_grad_(name != "noise") for name, t in parameters("epilogue", x).items()}
    if drawn:
        del p["noise"]
    leaves = [t for t in (x, *p.values()) if t.requires_grad]
    with Calls() as forward:
        y = style_epilogue(x, **p, backend=backend)
    with Calls() as backward:
        first = torch.autograd.grad(y, leaves, x.detach(), create_graph=True)
    with Calls() as penalty:
        torch.autograd.grad(first[0], leaves, x.detach(), allow_unused=True)
    assert forward.names == ["aten::randint"] * drawn + ["gdl_kernels::adain"]
    assert backward.names == ["gdl_kernels::adain_backward"]
    assert penalty.names == ["gdl_kernels::adain_double_backward"]


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_registration(backend: str, memory: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    x = MEMORY[memory](random((2, 3, 4, 5), torch.float32, device)).requires_grad_()
    scale, bias = (t.requires_grad_() for t in random((2, 2, 3), torch.float32, device).unbind())
    noise = random((2, 1, 4, 5), torch.float32, device)
    weight, channel = (t.requires_grad_() for t in random((2, 3), torch.float32, device).unbind())
    seed = torch.tensor(7, device=device)
    given, drawn = (noise, None, weight, channel, 0.2), (None, seed, weight, None, 0.2)
    for prologue in ((None, None, None, None, 1.0), given, drawn):
        call = (*prologue, 1e-5, backend)
        torch.library.opcheck(op.forward.dispatched, (x, scale, bias, *call))
        y, statistics = op.forward(x.detach(), scale.detach(), bias.detach(), *call)
        arguments = (torch.randn_like(y).requires_grad_(), x, scale, statistics, *call)
        torch.library.opcheck(op.backward.dispatched, arguments)
        v = torch.randn_like(y), *torch.randn(4, 2, 3, device=device)
        inference = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(op.double_backward.dispatched, (*v, *inference))
    if backend == "cuda":
        for shared in (noise, noise[:1]):
            arguments = (x, weight, shared, backend)
            torch.library.opcheck(op.noise_gradient.dispatched, arguments)
    style = random((2, 3, 7), torch.float32, device).requires_grad_()
    torch.library.opcheck(from_style.forward.dispatched, (x, style, 1e-5, backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_into_one_graph(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"

    def function(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        y = style_epilogue(2 * x, scale, scale, noise_weight=weight, backend=backend)
        return adain_from_style(adain(y, scale, scale, backend=backend), x, backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 4, 4), (3, 8, 5, 6)):
        x, grad = random(shape, torch.float32, device), random(shape, torch.float32, device)
        scale, weight = random(shape[:2], torch.float32, device), torch.zeros(8, device=device)
        results = []
        for call in (compiled, function):
            leaves = [t.clone().requires_grad_() for t in (x, scale, weight)]
            y = call(*leaves)
            # The noise has weight 0: a compiled call draws it from another place in the generator's stream.
            results.append([y, *torch.autograd.grad(y, leaves[:2], grad)])
        for ours, eager in zip(*results):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    linear = torch.nn.Linear(4, 6, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = random((2, 3, 40), dtype, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            scale, bias = linear(torch.ones(2, 4, device=device)).chunk(2, 1)
            assert scale.dtype == torch.bfloat16
            y = adain(x, scale, bias, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, adain(x, scale, bias, backend=backend))


@pytest.mark.parametrize("memory", list(MEMORY)[:2])
@pytest.mark.parametrize("shape", [(3, 40, 50, 60), (1, 2, 130, 140)], ids=str)
def test_threads_agree(shape: tuple[int, ...], memory: str) -> None:
    x, grad = MEMORY[memory](random(shape, torch.float32)), random(shape, torch.float32)
    p = parameters("epilogue", x)
    # The noise's gradient is a sum of PyTorch's over dx: so no direction along it either.
    v = [torch.zeros_like(t) if t is p["noise"] else torch.randn_like(t) for t in (x, *p.values())]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append([*run("epilogue", x, p, grad, "cpu").values(), *second("epilogue", x, p, grad, v, "cpu")])
    finally:
        torch.set_num_threads(threads)
    for alone, together in zip(*found):
        if alone.shape != p["noise"].shape:
            assert torch.equal(alone, together)


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_output_and_gradients or test_gradients_of_both_orders or test_drawn_noise_is_the_same)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_backend_is_chosen_and_explained() -> None:
    x, scale, bias = random((2, 3, 4), torch.float32), *random((2, 2, 3), torch.float32)
    for function, arguments in (
        (adain, (x, scale, bias)), (style_epilogue, (x, scale, bias)), (adain_from_style, (x, x)),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(function(*arguments), function(*arguments, backend="cpu"))
        verdicts = gdl_kernels.explain(function, *arguments).verdicts
        assert verdicts["cpu"] == "chosen"
        assert verdicts["reference"] == "can"
        assert "x is on cpu" in verdicts["cuda"]
        assert verdicts["triton"] == f"{function.__name__} has no triton kernel"
        with pytest.raises(RuntimeError, match=rf"backend 'cuda' can't serve this {function.__name__}.*x is on cpu"):
            function(*arguments, backend="cuda")


# ---- modules


def test_modules() -> None:
    x, style = random((2, 3, 4, 5), torch.float32), random((2, 7), torch.float32)
    layer = nn.AdaIN(7, 3, eps=0.5)
    scale, bias = layer.affine(style).chunk(2, 1)
    assert torch.equal(layer(x, style), adain(x, 1 + scale, bias, eps=0.5))
    assert "eps=0.5" in repr(layer)
    assert torch.equal(nn.AdaINFromStyle(eps=0.5)(x, 2 * x), adain_from_style(x, 2 * x, eps=0.5))
    assert repr(nn.AdaINFromStyle()) == "AdaINFromStyle(eps=1e-05)"

    epilogue = nn.StyleEpilogue(7, 3)
    torch.nn.init.normal_(epilogue.noise_weight)
    torch.nn.init.normal_(epilogue.channel_bias)
    scale, bias = epilogue.affine(style).chunk(2, 1)
    noise = random((1, 1, 4, 5), torch.float32)
    given = {"noise_weight": epilogue.noise_weight, "channel_bias": epilogue.channel_bias}
    assert torch.equal(epilogue(x, style, noise), style_epilogue(x, 1 + scale, bias, noise=noise, **given))
    torch.manual_seed(0)
    drawn = epilogue(x, style)
    torch.manual_seed(0)
    assert torch.equal(drawn, style_epilogue(x, 1 + scale, bias, **given))
    drawn.sum().backward()
    assert all(parameter.grad is not None for parameter in epilogue.parameters())
    assert "noise=True, negative_slope=0.2, eps=1e-08" in repr(epilogue)

    silent = nn.StyleEpilogue(7, 3, noise=False)
    assert set(silent.state_dict()) == {"affine.weight", "affine.bias", "channel_bias"}
    assert torch.equal(silent(x, style), silent(x, style))
    with pytest.raises(ValueError, match=r"noise must be None in a StyleEpilogue\(noise=False\), got shape"):
        silent(x, style, noise)


# ---- errors

X, P, C = torch.ones(2, 3, 4, 5), torch.ones(2, 3), torch.ones(3)
BAD_PLANES = [
    (torch.ones(2, 3), ValueError, r"must be \(N, C, \*spatial\) with one spatial dimension or more, got \(2, 3\)"),
    (torch.ones(2, 3, 0, 4), ValueError, r"must have planes of at least one pixel, got shape \(2, 3, 0, 4\)"),
    (X.long(), TypeError, "must be float32.*got torch.int64"),
    (X.to(torch.complex64), TypeError, "must be float32.*got torch.complex64"),
    ([[1.0]], TypeError, "must be a tensor, got list"),
]
BAD_EPS = [
    (0.0, ValueError, "eps must be positive and finite, got 0.0"),
    (-1e-8, ValueError, "eps must be positive and finite, got -1e-08"),
    (float("nan"), ValueError, "eps must be positive and finite, got nan"),
    ("small", TypeError, "eps must be a number, got str"),
]
BAD_PARAMETERS = [
    (torch.ones(3, 2), ValueError, r"must be \(2, 3\), got shape \(3, 2\)"),
    (P.double(), TypeError, "must be float32, float16 or bfloat16 beside torch.float32 images, got torch.float64"),
    (P.long(), TypeError, "must be float32.*got torch.int64"),
    (P.to("meta"), ValueError, "must be on the device of the images, cpu, got meta"),
    (1.0, TypeError, "must be a tensor, got float"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_bad_input(backend: str | None) -> None:
    def refused(error: type[Exception], message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match=message):
            function(*args, **kwargs, backend=backend)

    # What is remembered of a good call lets no bad one pass that has the same shapes.
    adain(X, P, P, backend=backend)
    style_epilogue(X, P, P, noise=X[:, :1], noise_weight=C, channel_bias=C, backend=backend)
    adain_from_style(X, X, backend=backend)
    for x, error, message in BAD_PLANES:
        refused(error, f"^x {message}", adain, x, P, P)
        refused(error, f"^x {message}", style_epilogue, x, P, P)
        refused(error, f"^content {message}", adain_from_style, x, X)
        refused(error, f"^style {message}", adain_from_style, X, x)
    for eps, error, message in BAD_EPS:
        refused(error, message, adain, X, P, P, eps=eps)
        refused(error, message, style_epilogue, X, P, P, eps=eps)
        refused(error, message, adain_from_style, X, X, eps=eps)
    for parameter, error, message in BAD_PARAMETERS:
        for function in (adain, style_epilogue):
            refused(error, f"^scale {message}", function, X, parameter, P)
            refused(error, f"^bias {message}", function, X, P, parameter)
    noise = torch.ones(2, 1, 4, 5)
    refused(
        ValueError, r"^noise must be \(2, 1, 4, 5\) or \(1, 1, 4, 5\), got shape \(2, 3, 4, 5\)",
        style_epilogue, X, P, P, noise=X, noise_weight=C,
    )  # fmt: skip
    refused(ValueError, "^noise needs noise_weight", style_epilogue, X, P, P, noise=noise)
    for name in ("noise_weight", "channel_bias"):
        refused(ValueError, rf"^{name} must be \(3,\), got shape \(2,\)", style_epilogue, X, P, P, **{name: C[:2]})
    refused(ValueError, "^negative_slope must be finite, got inf", style_epilogue, X, P, P, negative_slope=torch.inf)
    refused(TypeError, "^negative_slope must be a number", style_epilogue, X, P, P, negative_slope="0.2")
    refused(TypeError, "^style must have the dtype of content", adain_from_style, X, X.double())
    refused(
        ValueError, r"^style must have the images and channels of content, \(2, 3\), got \(2, 2\)",
        adain_from_style, X, X[:, :2],
    )  # fmt: skip
    refused(ValueError, "^style must be on the device of content, cpu, got meta", adain_from_style, X, X.to("meta"))
