"""sparse_attention where only a GPU can tell: graphs, streams, devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdl_kernels import layouts, sparse_attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, and the tensor that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize(
    "make",
    [
        lambda n: layouts.causal(n, block_size=64),
        lambda n: layouts.local(n, 100, block_size=32) | layouts.fixed(n, 64, 8, block_size=32),
        lambda n: layouts.strided(n, 7, block_size=64),
    ],
    ids=["causal", "union", "strided"],
)
def test_a_graph_decodes_into_a_cache(make: Callable[[int], layouts.Layout]) -> None:
    """The start is data: one graph serves every position."""
    n = 1000
    layout = make(n).to("cuda")
    query, key, value = random(2, 8, 1, 64), random(2, 2, n, 64), random(2, 2, n, 64)
    start = torch.zeros((), dtype=torch.int64, device="cuda")
    graph, out = captured(lambda: sparse_attention(query, key, value, layout, query_start=start, backend="triton"))
    for position in (0, 1, 63, 64, 500, n - 1):
        query.copy_(random(2, 8, 1, 64))
        start.fill_(position)
        graph.replay()
        eager = sparse_attention(query, key, value, layout, query_start=position, backend="triton")
        exact = sparse_attention(
            query.double(), key.double(), value.double(), layout, query_start=position, backend="reference"
        )
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_a_start_past_the_end_keeps_nothing() -> None:
    layout = layouts.causal(128).to("cuda")
    tensors = [random(1, 2, n, 64) for n in (4, 128, 128)]
    start = torch.tensor(126, device="cuda")
    out, lse = sparse_attention(*tensors, layout, query_start=start, return_lse=True, backend="triton")
    assert out[:, :, :2].any()
    assert lse[:, :, :2].isfinite().all()
    assert not out[:, :, 2:].any()
    assert (lse[:, :, 2:] == -torch.inf).all()


def test_replays_drop_anew() -> None:
    n, p = 128, 0.25
    layout = layouts.full(n).to("cuda")
    query = torch.zeros(1, 2, n, n, device="cuda", dtype=torch.bfloat16)  # all weights 1 / n: the output shows the mask
    value = torch.eye(n, device="cuda", dtype=torch.bfloat16).expand(1, 2, n, n)
    graph, out = captured(lambda: sparse_attention(query, query, value, layout, dropout_p=p, backend="triton"))
    kept = []
    for _ in range(3):
        graph.replay()
        kept.append(out != 0)
    for mask in kept:
        assert abs(mask.float().mean().item() - (1 - p)) < 0.02
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_a_graph_of_a_training_step() -> None:
    layout = layouts.local(300, 70, block_size=64).to("cuda")
    leaves = [random(1, 4, 300, 64).requires_grad_(), *(random(1, 2, 300, 64).requires_grad_() for _ in range(2))]
    weight = random(1, 4, 300, 64)

    def step() -> Tensor:
        out = sparse_attention(*leaves, layout, backend="triton")
        return torch.cat([g.flatten() for g in torch.autograd.grad((out * weight).sum(), leaves)])

    graph, gradients = captured(step)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    assert torch.equal(gradients, step())


def test_runs_on_the_current_stream() -> None:
    """Inputs are written late on a stream of their own: whoever runs on another reads what was there before."""
    layout = layouts.causal(256).to("cuda")
    tensors = [random(1, 4, 256, 64).requires_grad_() for _ in range(3)]
    fresh = [torch.randn_like(t) for t in tensors]
    sparse_attention(*tensors, layout, backend="triton").sum().backward()  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for tensor, late in zip(tensors, fresh):
                tensor.copy_(late)
        out = sparse_attention(*tensors, layout, backend="triton")
        gradients = torch.autograd.grad(out.sum(), tensors)
    torch.cuda.synchronize()
    expected = sparse_attention(*tensors, layout, backend="triton")
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), tensors)):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    layout = layouts.causal(200)
    tensors = [random(1, 4, 200, 64) for _ in range(3)]
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [t.to(device).detach().requires_grad_() for t in tensors]
        with torch.cuda.device(0):
            out = sparse_attention(*leaves, layout.to(device), backend="triton")
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for first, second in zip(*results):
        assert second.device.index == 1
        torch.testing.assert_close(first.cpu(), second.cpu())
