"""adain and style_epilogue where only a GPU can tell: graphs, streams, devices, and how planes are shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.launches import launches
from gdl_kernels import adain, style_epilogue
from gdl_kernels.ops.adain import op
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


MEMORY = {"contiguous": lambda x: x, "channels last": channels_last}


def leaves_of(x: Tensor, device: str = "cuda") -> list[Tensor]:
    """x, scale, bias, noise, noise_weight, channel_bias, all in the dtype of x."""
    count, channels, *pixels = x.shape
    shapes = [(count, channels), (count, channels), (count, 1, *pixels), (channels,), (channels,)]
    return [
        x.detach().requires_grad_(),
        *(random(*shape, dtype=x.dtype, device=device).requires_grad_() for shape in shapes),
    ]


def epilogue(leaves: Sequence[Tensor], backend: str = "cuda") -> Tensor:
    x, scale, bias, noise, weight, channel = leaves
    return style_epilogue(x, scale, bias, noise=noise, noise_weight=weight, channel_bias=channel, backend=backend)


def two_gradients(leaves: Sequence[Tensor], grad: Tensor, v: Sequence[Tensor], backend: str = "cuda") -> list[Tensor]:
    """The output, the gradients of all leaves, and those of <gradients, v>."""
    y = epilogue(leaves, backend)
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    x, scale, _bias, *others = leaves  # the bias is in none of them
    return [y, *first, *torch.autograd.grad(first, [x, scale, *others, grad], v)]


NAMES = ["y", "dx", "dscale", "dbias", "dnoise", "dnoise_weight", "dchannel_bias"]
NAMES += [f"second {name}" for name in (*NAMES[1:3], *NAMES[4:], "dy")]


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one call, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


# What a plane is shared among changes with its pixels: threads of a warp, of a block, blocks of a cluster, blocks of
# two launches. These are the limits of each pass on an H100 or H200, the last that fits and the next.
PLANES = [
    (2, 600, 64),  # several planes in a warp
    (3, 700, 1024),  # one warp to a plane
    (2, 140, 16384),  # one block to a plane, forward
    (2, 140, 16392),  # two
    (1, 2, 16384),  # as many blocks as a cluster has, because there are few planes
    (1, 2, 131072),  # the last in a cluster, double backward
    (1, 2, 131080),
    (1, 2, 196608),  # the last in a cluster, backward
    (1, 2, 196616),
    (1, 2, 393216),  # the last in a cluster, forward
    (1, 2, 393224),
    (1, 2, 393225),  # which no vector divides
    (1, 1, 2_200_000),  # more than its blocks load at a time
]
# With channels last a block has 128 bytes of channels: fewer pixels fit.
LAST_PLANES = [
    (3, 70, 16),  # a group of channels in two images
    (2, 512, 256),
    (1, 64, 2048),  # the last in a cluster, double backward in 16 bit
    (1, 64, 2056),
    (1, 64, 3328),  # backward in 16 bit
    (1, 64, 3336),
    (1, 64, 4608),  # double backward in float32
    (1, 64, 4616),
    (1, 64, 6144),  # forward in 16 bit
    (1, 64, 6152),
    (1, 64, 6656),  # backward in float32
    (1, 64, 6664),
    (1, 64, 12288),  # forward in float32
    (1, 64, 12296),
    (1, 3, 40000),  # which no vector divides
    (1, 8, 600_000),  # more than its blocks load at a time
]
CASES = [("contiguous", shape) for shape in PLANES] + [("channels last", shape) for shape in LAST_PLANES]


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("memory", "shape"), CASES, ids=str)
def test_however_a_plane_is_shared_out(memory: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves = leaves_of(MEMORY[memory](random(*shape, dtype=dtype)))
    grad = MEMORY[memory](random(*shape, dtype=dtype)).requires_grad_()
    v = [torch.randn_like(leaf) for leaf in leaves]
    ours, plain = two_gradients(leaves, grad, v), two_gradients(leaves, grad, v, "reference")
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = grad.detach().double().requires_grad_()
    exact = two_gradients(exact_leaves, wide, [t.double() for t in v], "reference")
    size = exact[0].square().mean().sqrt()
    for name, *values in zip(NAMES, ours, plain, exact):
        # A gradient is what is left of scale rstd g without its mean and its part along h. A sum over planes is of the
        # size of as many random steps, and is rounded at every doubling of their number.
        steps = torch.cat([size * wide, exact[NAMES.index("second dx" if "second" in name else "dx")]])
        images = values[2].dim() > 2
        steps = steps if images else steps.flatten(2).norm(dim=2)
        terms = torch.cat([values[2].abs().flatten(), steps.abs().flatten()])
        assert_accurate(*values, name, terms=None if name == "y" else terms, ulps=2 if images else 4)
    for first, again in zip(ours, two_gradients(leaves, grad, v)):
        assert torch.equal(first, again)


def test_noise_that_is_not_aligned() -> None:
    leaves = leaves_of(random(2, 3, 32, 32))
    with torch.no_grad():
        leaves[3] = torch.cat([leaves[3].new_zeros(1), leaves[3].flatten()])[1:].view_as(leaves[3])
    torch.testing.assert_close(epilogue(leaves), epilogue(leaves, "reference"), rtol=1e-4, atol=1e-4)


# The first two are one launch each; the gradients of the last are three, with memory between them.
GRAPH_PLANES = [(4, 64, 16, 16), (1, 2, 256, 256), (1, 2, 600, 600)]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", GRAPH_PLANES, ids=str)
def test_a_graph_of_two_gradients(shape: tuple[int, ...], memory: str) -> None:
    leaves = leaves_of(MEMORY[memory](random(*shape)))
    grad = random(*shape).requires_grad_()
    v = [torch.randn_like(leaf) for leaf in leaves]
    graph, out = captured(lambda: two_gradients(leaves, grad, v))
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for replayed, eager in zip(out, two_gradients(leaves, grad, v)):
        assert torch.equal(replayed, eager)


# One launch a pass, two where planes do not fit on chip; one more for drawn noise, and for gradients of channels.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "passes"), [((4, 64, 16, 16), 1), ((1, 2, 1024, 1024), 2)], ids=str)
def test_launches(shape: tuple[int, ...], passes: int, dtype: torch.dtype) -> None:
    x, scale, bias, noise, weight, channel = leaves_of(random(*shape, dtype=dtype))
    grad, given = random(*shape, dtype=dtype), noise.detach()

    def count(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[int | None, int | None]:
        y = call()
        backward = launches(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True), x.device)
        return launches(call, x.device), backward

    assert count(lambda: adain(x, scale, bias), [x, scale, bias]) == (passes, passes)
    leaves = [x, scale, bias, weight, channel]
    assert count(lambda: epilogue([x, scale, bias, given, weight, channel]), leaves) == (passes, passes + 1)
    drawn = count(lambda: style_epilogue(x, scale, bias, noise_weight=weight, channel_bias=channel), leaves)
    assert drawn == (passes + 1, passes + 2)


def test_a_seed_is_the_same_wherever_it_is() -> None:
    x, numbers, weight = random(2, 3, 20, 20), random(2, 3), random(3)
    call = weight, None, 0.2, 1e-5, "cuda"
    drawn = [
        op.forward(x, numbers, numbers, None, torch.tensor(2**62 + 7, device=device), *call)[0]
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("shape", GRAPH_PLANES, ids=str)
def test_replays_draw_anew_and_the_backward_what_the_forward_drew(shape: tuple[int, ...]) -> None:
    # Of zeros and noise n of weight 1, with eps 1: y = (n - mean) / sqrt(var + 1), whose derivative by the weight is
    # y / (var + 1) = y (1 - mean(y^2)). So the gradient tells which noise the backward has drawn.
    x, one, zero = torch.zeros(shape, device="cuda"), *(torch.full(shape[:2], v, device="cuda") for v in (1.0, 0.0))
    weight, grad = torch.ones(shape[1], device="cuda", requires_grad=True), random(*shape)

    def step() -> list[Tensor]:
        y = style_epilogue(x, one, zero, noise_weight=weight, negative_slope=1.0, eps=1.0, backend="cuda")
        return [y, *torch.autograd.grad(y, weight, grad)]

    graph, (y, gradient) = captured(step)
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(y.detach().clone())
        terms = (grad * y * (1 - y.square().mean((2, 3), keepdim=True))).detach()
        scale = terms.abs().sum().item()
        torch.testing.assert_close(gradient, terms.sum((0, 2, 3)), rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("shape", GRAPH_PLANES, ids=str)
def test_runs_on_the_current_stream(shape: tuple[int, ...]) -> None:
    """Inputs are written late on a stream of their own: whoever runs on another reads what was there before."""
    leaves = leaves_of(random(*shape))
    fresh, grad = [torch.randn_like(leaf) for leaf in leaves], random(*shape).requires_grad_()
    v = [torch.randn_like(leaf) for leaf in leaves]
    two_gradients(leaves, grad, v)  # loads the kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for leaf, late in zip(leaves, fresh):
                leaf.copy_(late)
        found = two_gradients(leaves, grad, v)
    torch.cuda.synchronize()
    for ours, expected in zip(found, two_gradients(leaves, grad, v)):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    values = [t.detach() for t in leaves_of(random(2, 3, 40, 40, device="cpu"), device="cpu")]
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [t.to(device).requires_grad_() for t in values]
        with torch.cuda.device(0):
            y = epilogue(leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for first, second in zip(*results):
        assert second.device.index == 1
        torch.testing.assert_close(first.cpu(), second.cpu())


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(2, 8, 2**27 + 8), (1, 2, 2**30 + 64)], ids=str)
def test_more_than_2_to_the_31_elements(shape: tuple[int, ...], memory: str) -> None:
    x = MEMORY[memory](random(*shape, dtype=torch.bfloat16)).requires_grad_()
    scale, bias = random(*shape[:2]), random(*shape[:2])
    y = adain(x, scale, bias, backend="cuda")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    last = x.detach()[-1:, -1:].clone().requires_grad_()  # the last plane, which lies beyond
    expected = adain(last, scale[-1:, -1:], bias[-1:, -1:], backend="reference")
    torch.testing.assert_close(y[-1:, -1:], expected, rtol=2e-2, atol=2e-2)
    # x has hardly a part that is not along itself and the mean: dx is what rounding leaves.
    assert dx[-1, -1].isfinite().all()
    assert dx[-1, -1].float().abs().max() < 0.1
