"""minibatch_self_attention: numbers, gradients, layouts in memory, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import gdl_kernels
from benchmarks.memory import peak_growth
from gdl_kernels import _backends, minibatch_self_attention
from gdl_kernels.ops.minibatch_self_attention import op
from tests.accuracy import assert_accurate
from tests.ops.images import DTYPES, MEMORY, images, random

pytestmark = pytest.mark.usefixtures("nan_poison")

#: (batch, channels of query and key, of value, height, width)
SHAPES = [
    (2, 32, 128, 16, 16),  # SAGAN's generator: whole tiles
    (2, 12, 48, 18, 14),  # BigGAN's discriminator: channels that fill no vector, a tile that is not full
    (1, 24, 96, 30, 34),  # BigGAN's generator: several tiles of queries and of keys, the last ones not full
    (3, 4, 7, 6, 10),  # less than a tile, channels that divide nothing
    (1, 5, 3, 40, 42),  # more keys than stay resident, with queries wider than values
    (2, 1, 1, 2, 2),  # one key where pooled; one channel, whose pixels are next to each other in either format
    (5, 8, 16, 2, 64),  # a window high
]
CALLS: list[dict[str, Any]] = [
    {"pool": 2},
    {"pool": 1, "scale": 0.4},
    {"pool": 2, "score": "l2", "scale": 0.2},
    {"pool": 1, "score": "l2", "scale": -0.05},
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, memory: str = "contiguous") -> list[Tensor]:
    """Query, key, value, and the gradient of the output."""
    batch, channels, value_channels, *size = shape
    counts = (channels, channels, value_channels, value_channels)
    return [MEMORY[memory](random((batch, c, *size), dtype)) for c in counts]


def directions(maps: list[Tensor]) -> list[Tensor]:
    """Functions of places alone: the same in every dtype and on every backend."""
    return [torch.arange(t.numel(), dtype=torch.float64).mul(1.7).sin().view(t.shape).to(t.dtype) for t in maps]


def run(tensors: list[Tensor], call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The output, its gradients, and the gradients of a product of those with fixed directions."""
    *maps, grad = (t.detach().requires_grad_() for t in tensors)
    out = minibatch_self_attention(*maps, **call, backend=backend)
    first = torch.autograd.grad(out, maps, grad, create_graph=True)
    second = torch.autograd.grad(first, [*maps, grad], directions(maps))
    found = dict(zip(("out", "dq", "dk", "dv", "ddq", "ddk", "ddv", "ddo"), (out, *first, *second)))
    return {name: t.detach() for name, t in found.items()}


def check(tensors: list[Tensor], call: dict[str, Any], backend: str = "cpu") -> None:
    ours, plain = run(tensors, call, backend), run(tensors, call, "reference")
    exact = run([t.double() for t in tensors], call, "reference")
    sizes = sizes_of(tensors, call)
    for name in ours:
        terms = torch.cat([exact[name].flatten(), sizes[name].expand(exact[name].numel())])
        # lse is kept rounded, and delta is made of an output that was: plain PyTorch keeps the weights themselves.
        assert_accurate(ours[name], plain[name], exact[name], name, terms=terms, ulps=4 if name[:2] == "dd" else 2)


def sizes_of(tensors: list[Tensor], call: dict[str, Any]) -> dict[str, Tensor]:
    """How large the numbers are that a gradient is what is left of.

    Gradients of scores are differences, ``p (<dO, v> - <dO, out>)``, and those of these are differences again. Weights
    are as wrong as scores and lse are rounded: relatively by their size.
    """
    query, key, value, grad = (t.double() for t in tensors)
    a, b, c = (t.double() for t in directions(tensors[:3]))
    factor = abs(call.get("scale", 1.0)) * (2 if call.get("score") == "l2" else 1)

    def rms(x: Tensor) -> Tensor:
        return x.square().mean().sqrt() if x.numel() else x.sum()

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return rms(x) * rms(y) * x.shape[1] ** 0.5

    scores = factor * query.flatten(2).transpose(1, 2) @ key.flatten(2)
    wrong = 1 + (scores.abs().max() if scores.numel() else scores.sum())
    t, u, w = dot(grad, value), factor * (dot(a, key) + dot(query, b)), dot(grad, c)
    e = t * u + w
    return {
        "out": wrong * rms(value),
        "dq": wrong * factor * t * rms(key),
        "dk": wrong * factor * t * rms(query),
        "dv": wrong * rms(grad),
        "ddq": wrong * factor * (e * rms(key) + t * rms(b)),
        "ddk": wrong * factor * (e * rms(query) + t * rms(a)),
        "ddv": wrong * u * rms(grad),
        "ddo": wrong * (u * rms(value) + rms(c)),
    }


CASES = [("contiguous", dtype, shape, call) for dtype in DTYPES for shape in SHAPES for call in CALLS[::2]]
CASES += [("channels last", dtype, shape, call) for dtype in DTYPES for shape in SHAPES[1:4] for call in CALLS]
CASES += [(memory, torch.float32, SHAPES[1], CALLS[2]) for memory in list(MEMORY)[2:]]


@pytest.mark.parametrize(("memory", "dtype", "shape", "call"), CASES, ids=str)
def test_output_and_gradients(memory: str, dtype: torch.dtype, shape: tuple[int, ...], call: dict[str, Any]) -> None:
    check(inputs(shape, dtype, memory), call)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape: tuple[int, ...], call: dict[str, Any]) -> None:
    tensors = inputs(shape, torch.float64)
    ours, exact = run(tensors, call, "cpu"), run(tensors, call, "reference")
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-10, atol=1e-10)


def sagan(query: Tensor, key: Tensor, value: Tensor, pool: bool) -> Tensor:
    """As public implementations write it."""
    batch, channels, height, width = query.shape
    if pool:
        key, value = F.max_pool2d(key, [2, 2]), F.max_pool2d(value, [2, 2])
    theta, phi = query.view(batch, channels, -1), key.reshape(batch, channels, -1)
    beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
    return torch.bmm(value.flatten(2), beta.transpose(1, 2)).view(batch, -1, height, width)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_peers(backend: str) -> None:
    query, key, value, _ = inputs((3, 6, 11, 8, 10), torch.float64)
    for pool in (1, 2):
        ours = minibatch_self_attention(query, key, value, pool=pool, backend=backend)
        torch.testing.assert_close(ours, sagan(query, key, value, pool == 2))
    ours = minibatch_self_attention(query, key, value, scale=0.3, backend=backend)
    q, k, v = (t.flatten(2).transpose(1, 2) for t in (query, key, value))
    peer = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).view_as(value)
    torch.testing.assert_close(ours, peer)
    ours = minibatch_self_attention(query, key, value, scale=0.3, score="l2", backend=backend)
    weights = (-0.3 * torch.cdist(q, k) ** 2).softmax(-1)
    torch.testing.assert_close(ours, (weights @ v).transpose(1, 2).view_as(value))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_pooling_takes_the_position_that_max_pool2d_takes(dtype: torch.dtype) -> None:
    # A few values, many equal, most negative: gradients go to the first of equals. One window is NaN in part.
    query, _, _, grad = inputs((1, 3, 4, 8, 12), dtype)
    key, value = (torch.randint(-3, 1, (1, c, 8, 12)).to(dtype) for c in (3, 4))
    check([query, key, value, grad], {"pool": 2})
    found = run([query, key, value, grad], {"pool": 2}, "cpu")
    for name, pooled in (("dk", key), ("dv", value)):
        _, places = F.max_pool2d(pooled.double(), 2, return_indices=True)
        chosen = torch.zeros(pooled.shape, dtype=torch.bool).flatten(2).scatter(2, places.flatten(2), True)
        assert (found[name].flatten(2)[~chosen] == 0).all()


@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    pool = data.draw(st.sampled_from([1, 2]))
    size = [pool * data.draw(st.integers(1, 9)) for _ in range(2)]
    batch, channels, value_channels = (data.draw(st.integers(low, 20)) for low in (0, 1, 1))
    dtype, score = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["dot", "l2"]))
    counts = (channels, channels, value_channels, value_channels)
    tensors = [data.draw(images([batch % 4, c, *size], dtype)) for c in counts]
    check(tensors, {"pool": pool, "score": score, "scale": 0.5 / channels})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gradcheck(call: dict[str, Any], backend: str) -> None:
    *maps, _ = inputs((2, 2, 3, 2, 4), torch.float64)
    maps = [t.requires_grad_() for t in maps]

    def f(*maps: Tensor) -> Tensor:
        return minibatch_self_attention(*maps, **call, backend=backend)

    assert torch.autograd.gradcheck(f, maps)
    assert torch.autograd.gradgradcheck(f, maps, fast_mode=True)


def test_third_derivatives_are_those_of_the_reference() -> None:
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        *maps, _ = inputs((1, 2, 3, 4, 4), torch.float64)
        maps = [t.requires_grad_() for t in maps]
        x = minibatch_self_attention(*maps, pool=2, backend=backend).square().sum()
        for _ in range(3):
            first = torch.autograd.grad(x, maps, create_graph=True)
            x = torch.stack([g.square().sum() for g in first]).sum()
        found.append(x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("call", CALLS[1:3], ids=str)
def test_opcheck(call: dict[str, Any]) -> None:
    query, key, value, grad = inputs((2, 3, 5, 4, 6), torch.float32)
    arguments = (call.get("scale", 1.0), call["pool"], call.get("score", "dot"), "cpu")
    ops = torch.ops.gdl_kernels
    maps = [t.requires_grad_() for t in (query, key, value)]
    torch.library.opcheck(ops.minibatch_self_attention.default, (*maps, *arguments))
    out, lse = (t.detach() for t in ops.minibatch_self_attention(*maps, *arguments))
    saved = (grad.requires_grad_(), *maps, out, lse)
    torch.library.opcheck(ops.minibatch_self_attention_backward.default, (*saved, *arguments))
    directions = [torch.randn_like(t) for t in maps]
    torch.library.opcheck(ops.minibatch_self_attention_double_backward.default, (*directions, *saved, *arguments))


def test_compiles_without_a_graph_break() -> None:
    *maps, grad = inputs((2, 4, 6, 8, 8), torch.float32)
    maps = [t.requires_grad_() for t in maps]

    def f(*maps: Tensor) -> Tensor:
        return minibatch_self_attention(*maps, pool=2, score="l2") + 1

    ours, compiled = f(*maps), torch.compile(f, fullgraph=True)(*maps)
    torch.testing.assert_close(compiled, ours)
    for a, b in zip(*(torch.autograd.grad(y, maps, grad) for y in (compiled, ours))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_are_laid_out_like_what_they_belong_to(memory_format: torch.memory_format) -> None:
    tensors = [t.to(memory_format=memory_format) for t in inputs((2, 4, 6, 4, 6), torch.float32)]
    for name, t in run(tensors, {"pool": 2}, "cpu").items():
        assert t.is_contiguous(memory_format=memory_format), name


def test_memory_formats_may_differ() -> None:
    query, key, value, grad = inputs((2, 4, 6, 8, 6), torch.float32)
    check([query, MEMORY["channels last"](key), value, MEMORY["channels last"](grad)], {"pool": 2})


def test_lse_of_other_strides() -> None:
    """Saved tensors may come back with other strides, as from a hook that moves them away and back."""
    query, key, value, grad = inputs((2, 3, 5, 4, 6), torch.float32)
    out, lse = op.forward(query, key, value, 1.0, 1, "dot", "cpu")
    apart = torch.stack([lse, lse], -1)[..., 0]
    ours, expected = (op.backward(grad, query, key, value, out, t, 1.0, 1, "dot", "cpu") for t in (apart, lse))
    assert all(map(torch.equal, ours, expected))


def test_empty_batch() -> None:
    for found in (run(inputs((0, 3, 5, 4, 4), torch.float32), call, "cpu") for call in CALLS):
        assert found["out"].shape == (0, 5, 4, 4)
        assert all(t.numel() == 0 for t in found.values())


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_is_not_finite_stays_in_its_image(call: dict[str, Any]) -> None:
    tensors = inputs((3, 4, 6, 10, 8), torch.float32)
    clean = run(tensors, call, "cpu")
    for which in range(4):
        for bad in (math.nan, math.inf):
            spoilt = [t.clone() for t in tensors]
            spoilt[which][1, 2, 3, 3] = bad
            found = run(spoilt, call, "cpu")
            for name in found:
                assert torch.equal(found[name][::2], clean[name][::2]), name
            if which < 3 and math.isnan(bad):
                assert found["out"][1].isnan().any()


def test_large_scores_do_not_overflow() -> None:
    tensors = inputs((1, 4, 6, 12, 12), torch.float32)
    tensors[0] *= 1e3
    found = run(tensors, {"pool": 2}, "cpu")
    assert all(t.isfinite().all() for t in found.values())
    exact = run([t.double() for t in tensors], {"pool": 2}, "reference")["out"]
    torch.testing.assert_close(found["out"].double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    tensors, before = inputs(shape, torch.float32), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(tensors, CALLS[2], "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_no_map_of_pairs_in_memory() -> None:
    # 96 x 96 pixels: a map of all pairs is 340 MB, a quarter of that where keys are pooled.
    tensors = inputs((1, 4, 8, 96, 96), torch.float32)
    growth = peak_growth(lambda: run(tensors, {"pool": 2}, "cpu"), torch.device("cpu"))
    if growth is None:
        pytest.skip("this system doesn't say how much memory a process used at most")
    assert growth < 30e6


def test_autocast() -> None:
    *maps, _ = inputs((1, 4, 6, 4, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert minibatch_self_attention(*maps).dtype == torch.bfloat16
        assert minibatch_self_attention(*(t.double() for t in maps)).dtype == torch.float64


def bad(**changed: Any) -> dict[str, Any]:
    query, key, value, _ = inputs((2, 3, 5, 4, 6), torch.float32)
    return {"query": query, "key": key, "value": value, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"key": torch.ones(2, 3, 4, 6, dtype=torch.int64)}, TypeError, "key must be float32, .*, got torch.int64"),
        ({"value": torch.ones(2, 5, 24)}, ValueError, r"value must be \(batch, .*, got shape \(2, 5, 24\)"),
        ({"key": torch.ones(2, 3, 4, 6).half()}, TypeError, "key must have the dtype of query, torch.float32, got"),
        ({"key": torch.ones(2, 3, 4, 6, device="meta")}, ValueError, "key must be on the device of query, cpu, got"),
        ({"value": torch.ones(3, 5, 4, 6)}, ValueError, "value must have the batch size of query, 2, got 3"),
        ({"value": torch.ones(2, 5, 4, 5)}, ValueError, r"value must have the height .*\(4, 6\), got \(4, 5\)"),
        ({"key": torch.ones(2, 4, 4, 6)}, ValueError, "key must have the channels of query, 3, got 4"),
        ({"value": torch.ones(2, 0, 4, 6)}, ValueError, r"value must have a channel .* got shape \(2, 0, 4, 6\)"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"pool": 3}, ValueError, "pool must be 1 or 2, got 3"),
        ({"pool": 2.0}, ValueError, "pool must be 1 or 2, got 2.0"),
        ({"score": "cosine"}, ValueError, "score must be one of 'dot', 'l2', got 'cosine'"),
    ],
    ids=str,
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    for _ in range(2):  # nor is it taken for the good one, which is remembered
        assert minibatch_self_attention(**bad()).shape == (2, 5, 4, 6)
        with pytest.raises(error, match=message):
            minibatch_self_attention(**bad(**changed))


def test_odd_maps_are_not_pooled() -> None:
    query, key, value, _ = inputs((2, 3, 5, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"pool=2 needs maps of even height and width, got \(4, 5\)"):
        minibatch_self_attention(query, key, value, pool=2)


def test_backends() -> None:
    *maps, _ = inputs((1, 3, 5, 4, 4), torch.float32)
    assert "chosen" in str(gdl_kernels.explain("minibatch_self_attention", *maps))
    with pytest.raises(RuntimeError, match="minibatch_self_attention has no cuda kernel"):
        minibatch_self_attention(*maps, backend="cuda")
    assert set(_backends.ops()["minibatch_self_attention"].reasons) == {"cpu", "triton"}
