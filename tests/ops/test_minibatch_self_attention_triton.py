"""The Triton kernels of minibatch_self_attention: in their interpreter, and on a GPU where there is one.

TRITON_INTERPRET=1 is settled when kernels are imported, so the interpreter has a process of its own: this file again,
as a test of the first process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels
from gdl_kernels import minibatch_self_attention
from tests.accuracy import assert_accurate

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"

pytestmark = pytest.mark.usefixtures("nan_poison")

#: For tests of the kernels themselves.
on_triton = [pytest.mark.gpu] if not INTERPRETING else []


def kernel_test(function: Any) -> Any:
    for mark in on_triton:
        function = mark(function)
    return function


#: Batch, channels of query and key, of value, height and width, the call.
CASES = [
    (
        (2, 12, 48, 6, 10),
        {"pool": 2, "scale": 0.3},
    ),  # BigGAN-128 D's channels; tiles of queries and keys that are not full
    ((1, 4, 17, 5, 7), {"scale": 0.6}),  # fewer channels than a tile, maps of odd size
    ((2, 5, 20, 8, 10), {"pool": 2, "score": "l2", "scale": 0.3}),
    ((1, 3, 1, 9, 15), {"score": "l2", "scale": 0.5}),  # one channel: memory can't say that it is last
    ((2, 24, 66, 6, 8), {"pool": 2, "scale": 0.2}),  # wide: tiles as for BigGAN-256
    ((1, 1, 2, 2, 2), {"pool": 2}),  # one key: its weight is 1 and no gradient is left
]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


MEMORY = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "a crop": lambda x: F.pad(x, (1, 2))[..., 1:-2],
}
#: The first two in every dtype; the others need no more than one.
LAYOUTS = [(m, d) for m in list(MEMORY)[:2] for d in (torch.float32, torch.float16, torch.bfloat16)]
LAYOUTS += [(m, torch.float32) for m in list(MEMORY)[2:]]


def all_orders(maps: list[Tensor], backend: str, dtype: torch.dtype, call: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradients and second gradients; maps: query, key, value, grad and what is given for each gradient."""
    query, key, value, grad = (t.detach().to(dtype).requires_grad_() for t in maps[:4])
    out = minibatch_self_attention(query, key, value, backend=backend, **call)
    first = torch.autograd.grad(out, [query, key, value], grad, create_graph=True)
    given = [t.to(dtype) for t in maps[4:]]
    second = torch.autograd.grad(first, [query, key, value, grad], given)
    names = ["out"] + [f"{order} of {m}" for order in ("first", "second") for m in ("query", "key", "value")]
    return dict(zip([*names, "second of grad"], (t.detach() for t in (out, *first, *second))))


def check(maps: list[Tensor], call: dict[str, Any]) -> None:
    dtype = maps[0].dtype
    ours, plain = (all_orders(maps, backend, dtype, call) for backend in ("triton", "reference"))
    exact = all_orders(maps, "reference", torch.float64, call)
    for name in ours:
        # Weights and gradients of scores enter products in 16 bit, where the reference has float32; and what second
        # gradients are sums of cancels several times over.
        ulps = 16 if name.startswith("second") else 4
        # A gradient through one key's softmax is 0, and with few it nearly cancels: against what it is summed from.
        terms = None if name == "out" else torch.cat([exact[name].flatten(), exact["out"].flatten()])
        assert_accurate(ours[name], plain[name], exact[name], name, ulps=ulps, terms=terms)


@kernel_test
@pytest.mark.parametrize(("memory", "dtype"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "call"), CASES, ids=str)
def test_output_and_two_gradients(
    shape: tuple[int, ...], call: dict[str, Any], memory: str, dtype: torch.dtype
) -> None:
    if INTERPRETING and shape != CASES[0][0] and (memory, dtype) not in (LAYOUTS[0], LAYOUTS[4]):
        pytest.skip("in the interpreter one size stands for all")
    batch, channels, value_channels, *size = shape
    maps = [(batch, c, *size) for c in (channels, channels, value_channels, value_channels)]
    maps += maps[:3]
    check([MEMORY[memory](random(m, dtype)) for m in maps], call)


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_go_to_the_winners_of_max_pool2d(dtype: torch.dtype) -> None:
    """Of equals to the first, of NaN to the last; zeros, none forgotten, to the others."""
    value = torch.tensor(
        [[1.0, 1, 0, 2, -torch.inf, -torch.inf], [1, 0, 2, 2, -torch.inf, -torch.inf]], device=DEVICE, dtype=dtype
    ).view(1, 1, 2, 6)
    value = value.repeat(1, 2, 1, 1)
    value[0, 1] = torch.tensor([[torch.nan, 1, 3, torch.nan, 5, 4], [0, torch.nan, 7, 7, 6, 6]])
    query, key, grad = (random((1, 2, 2, 6), dtype) for _ in range(3))

    def gradient(backend: str) -> Tensor:
        own = value.clone().requires_grad_()
        out = minibatch_self_attention(query, key, own, pool=2, backend=backend)
        return torch.autograd.grad(out, own, grad)[0]

    assert torch.equal(gradient("triton") != 0, gradient("reference") != 0)


@kernel_test
def test_what_is_not_finite_stays_in_its_image() -> None:
    query, key, value = (random((3, 4, 4, 6), torch.float32) for _ in range(3))
    expected = minibatch_self_attention(query, key, value, pool=2, backend="triton")
    key[1, 2, 0, 0] = torch.nan
    found = minibatch_self_attention(query, key, value, pool=2, backend="triton")
    assert found[1].isnan().all()
    assert torch.equal(found[::2], expected[::2])


@kernel_test
def test_large_scores_do_not_overflow() -> None:
    query, key, value = (40 * random((1, 8, 5, 6), torch.float32) for _ in range(3))
    found = minibatch_self_attention(query, key, value, backend="triton")
    plain = minibatch_self_attention(query, key, value, backend="reference")
    exact = minibatch_self_attention(query.double(), key.double(), value.double(), backend="reference")
    assert_accurate(found, plain, exact)


@kernel_test
def test_an_empty_batch() -> None:
    query, value = (torch.empty(0, c, 4, 4, device=DEVICE, requires_grad=True) for c in (4, 8))
    out = minibatch_self_attention(query, query, value, pool=2, backend="triton")
    assert out.shape == value.shape
    out.sum().backward()
    assert query.grad.shape == query.shape


@kernel_test
def test_two_runs_give_the_same_bits() -> None:
    maps = [random((2, c, 6, 10), torch.float32) for c in (12, 12, 20, 20, 12, 12, 20)]
    runs = [all_orders(maps, "triton", torch.float32, {"pool": 2}) for _ in range(2)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    query, value = (random((2, c, 32, 32), torch.bfloat16) for c in (24, 96))
    minibatch_self_attention(query, query, value, pool=2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = minibatch_self_attention(query, query, value, pool=2)
    value.copy_(3 * value)
    graph.replay()
    assert torch.equal(captured, minibatch_self_attention(query, query, value, pool=2))


@pytest.mark.gpu
def test_memory_of_two_gradients_is_linear() -> None:
    """BigGAN-256's shape, whose map of all pairs is 8 GB at this batch."""
    query, value = (random((32, c, 128, 128), torch.bfloat16).requires_grad_() for c in (24, 96))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = minibatch_self_attention(query, query, value, pool=2)
    grads = torch.autograd.grad(out.square().sum(), [query, value], create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), [query, value])
    assert torch.cuda.max_memory_allocated() - before < 40 * value.nbytes


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not interpreter"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= len(LAYOUTS) + 2 * (len(CASES) - 1) + 6


def test_what_the_triton_kernels_refuse() -> None:
    query, value = torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.randn(1, 300, 4, 4, dtype=torch.float64)
    verdict = gdl_kernels.explain(minibatch_self_attention, query, query, value).verdicts["triton"]
    assert "query is float64" in verdict
    assert "a map has more than 256 channels" in verdict
