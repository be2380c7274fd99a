"""Under torch.compile, lengths, layouts and starts are data: what was compiled once serves all of them.

A few shapes are compiled before each test counts. torch.compile takes the first length it sees for a constant, and
sizes of 0 and 1 always: so layouts without partial blocks, with one mask, and with more have a graph each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gdl_kernels import layouts, sparse_attention
from gdl_kernels.layouts import Layout

PATTERNS: dict[str, Callable[[int], Layout]] = {
    "causal": lambda n: layouts.causal(n, block_size=16),
    "full": lambda n: layouts.full(n, block_size=16),
    "local": lambda n: layouts.local(n, 20, block_size=16),
    "a head each": lambda n: layouts.fixed(n, 16, 4, heads=2, block_size=16),
    "strided": lambda n: layouts.strided(n, 7, block_size=16),
    "scattered": lambda n: layouts.from_mask(torch.rand(n, n) < 0.3, block_size=16),
}
LENGTHS = torch.randperm(240, generator=torch.Generator().manual_seed(1))[:100].add(17).tolist()
#: Ragged, of whole blocks, and of whole blocks and strides.
WARM = (40, 33, 48, 112)

dynamics = pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # inputs as small as these are slower on several
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], dynamic: bool | None
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, dynamic=dynamic, fullgraph=True), counter


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, query_start: int | Tensor = 0) -> Tensor:
    return sparse_attention(query * 2, key, value, layout, query_start=query_start, backend="cpu")


def test_lengths_of_a_layout_in_parts_compile_nothing_new() -> None:
    call, counter = compiled(attention, None)

    def compare(n: int) -> None:
        layout = layouts.strided(n, 16, block_size=16) | layouts.local(n, 16, block_size=16)
        assert len(layout.parts()) == 2
        tensors = [torch.randn(1, 2, n, 8) for _ in range(3)]
        torch.testing.assert_close(call(*tensors, layout), attention(*tensors, layout))

    for n in (300, 333, 256):  # of whole blocks and strides, the strided part has a single mask
        compare(n)
    before = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (301, 512, 272, 415, 290, 368):
            compare(n)
    assert counter.frame_count == before


@pytest.mark.parametrize(("pattern", "dynamic"), [*((p, None) for p in PATTERNS), ("local", True), ("strided", True)])
def test_a_hundred_lengths_compile_nothing_new(pattern: str, dynamic: bool | None) -> None:
    call, counter = compiled(attention, dynamic)

    def check(n: int) -> None:
        layout = PATTERNS[pattern](n)
        tensors = [torch.randn(1, 2, n, 8) for _ in range(3)]
        torch.testing.assert_close(call(*tensors, layout), attention(*tensors, layout))

    for n in WARM:
        check(n)
    before = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in LENGTHS:
            check(n)
    assert counter.frame_count == before


@dynamics
def test_nor_do_their_gradients(dynamic: bool | None) -> None:
    call, counter = compiled(attention, dynamic)

    def check(n: int) -> None:
        layout = PATTERNS["local"](n)
        tensors = [torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3)]
        weight = torch.randn(1, 2, n, 8)
        ours, expected = (torch.autograd.grad(f(*tensors, layout), tensors, weight) for f in (call, attention))
        torch.testing.assert_close(ours, expected)

    for n in WARM:
        check(n)
    before, graphs = counter.frame_count, torch._dynamo.utils.counters["aot_autograd"]["total"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in LENGTHS:
            check(n)
    assert counter.frame_count == before
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == graphs > 0


@dynamics
@pytest.mark.parametrize("as_tensor", [False, True], ids=["an integer", "a tensor"])
def test_nor_do_a_hundred_starts(as_tensor: bool, dynamic: bool | None) -> None:
    """Decoding step after step: with an integer the keys grow too, with a tensor they are as many as the layout's."""
    call, counter = compiled(attention, dynamic)
    capacity = 140  # more than are decoded: views of a full cache are contiguous, and torch guards on that
    layout = layouts.local(capacity, 20, block_size=16)
    query, key, value = (torch.randn(1, 2, capacity, 8) for _ in range(3))
    whole = attention(query, key, value, layout)

    def step(i: int) -> None:
        end = capacity if as_tensor else i + 1
        row = call(
            query[:, :, i : i + 1], key[:, :, :end], value[:, :, :end], layout, torch.tensor(i) if as_tensor else i
        )
        torch.testing.assert_close(row, whole[:, :, i : i + 1])

    for i in range(27, 30):
        step(i)
    before = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(30, 130):
            step(i)
    assert counter.frame_count == before
