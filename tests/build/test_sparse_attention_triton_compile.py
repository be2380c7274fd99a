"""The Triton kernels of sparse_attention, compiled for GPUs that need not be here: memory, tensor cores, spills."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdl_kernels import layouts

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import PRODUCT, SHARED_MEMORY, Compiled, compiled_for, resource_usage, variants

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture
def compiled(target: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """What the launchers would have launched, by their own choices for a GPU."""
    from gdl_kernels.ops.sparse_attention.triton import launch

    monkeypatch.setattr(launch, "capability", lambda device: target)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    with compiled_for(target, monkeypatch) as launched:
        yield launched


def launch_all(
    n_q: int, n_k: int, head_dim: int, dtype: torch.dtype, call: tuple[Any, ...], *, heads: int = 4, kv_heads: int = 4
) -> None:
    """Forward, backward and double backward of one call."""
    from gdl_kernels.ops.sparse_attention import triton as kernels

    query, out, grad_out, grad_grad_query = (torch.empty(2, heads, n_q, head_dim, dtype=dtype) for _ in range(4))
    key, value, grad_grad_key, grad_grad_value = (
        torch.empty(2, kv_heads, n_k, head_dim, dtype=dtype) for _ in range(4)
    )
    lse, grad_lse = (torch.empty(2, heads, n_q) for _ in range(2))
    kernels.forward((out, lse), query, key, value, *call)
    saved = grad_out, grad_lse, query, key, value, out, lse
    kernels.backward((query, key, value), *saved, *call)
    outputs = grad_out, lse, query, key, value
    kernels.double_backward(outputs, grad_grad_query, grad_grad_key, grad_grad_value, *saved, *call)


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "block_size", "dropout_p"),
    [
        (80, torch.bfloat16, 64, 64, 0.0),
        (80, torch.float16, 128, 128, 0.0),
        (90, torch.bfloat16, 64, 128, 0.0),
        (90, torch.bfloat16, 64, 64, 0.1),
        (90, torch.bfloat16, 128, 64, 0.0),
        (90, torch.float16, 128, 128, 0.0),
        (100, torch.bfloat16, 64, 64, 0.0),
    ],
    ids=str,
)
def test_resources(
    target: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    dropout_p: float,
    compiled: Compiled,
    tmp_path: Path,
) -> None:
    seed = torch.randint(2**63 - 1, ()) if dropout_p else None
    for n_q in (256, 1):
        layout = layouts.causal(256, block_size=block_size)
        launch_all(
            n_q, 256, head_dim, dtype,
            (None, layout.tensors(), layout.sizes(), 0.125, 256 - n_q, None, dropout_p, seed, "triton"),
        )  # fmt: skip

    products = {"_forward", "_grad_query", "_grad_key_value", "_double_rows", "_double_columns", "_decode"}
    found = variants(compiled)
    assert set(found) == products | {"_row_terms", "_merge"}
    for name, kernels in found.items():
        for kernel in kernels.values():
            shared = kernel.metadata.shared
            assert shared <= SHARED_MEMORY[target], f"{name}: {shared} bytes of shared memory"
            usage = resource_usage(kernel, tmp_path)
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
            if name in products:
                # Tiles of few rows, of the query heads of a group or where many tiles are held, are for mma.sync.
                few_rows = name == "_decode" or (name.startswith("_double") and head_dim == 128)
                instruction = PRODUCT[80 if few_rows else target]
                assert instruction in kernel.asm["ptx"], f"{name} does not use {instruction}"
                assert "cp.async" in kernel.asm["ptx"], f"{name} is not pipelined"
            if name in ("_forward", "_grad_query", "_grad_key_value"):
                by_copy_engine = "cp.async.bulk.tensor" in kernel.asm["ptx"]
                assert by_copy_engine == (target >= 90), f"{name} loads its tiles the other way"


@pytest.mark.parametrize("target", [80, 90])
def test_no_term_is_added_twice(target: int, compiled: Compiled) -> None:
    """A lane holds so many terms of a factor that four lanes hold them all: with more, Triton would add some twice."""
    layout, seed = layouts.causal(64, block_size=16), torch.randint(2**63 - 1, ())
    padding = torch.rand(2, 64) < 0.3
    call = (padding, layout.tensors(), layout.sizes(), 0.25, 0, None, 0.2, seed, "triton")
    launch_all(64, 64, 16, torch.float16, call)
    factor = re.compile(r"tensor<(\d+)x(\d+)xf16, #ttg.dot_op<{opIdx = (\d), parent = #mma\d*, kWidth = (\d+)}>>")
    found = {name: factor.findall(kernel.asm["ttgir"]) for name, kernel in compiled}
    assert {"_forward", "_grad_query", "_grad_key_value", "_double_rows", "_double_columns"} <= {
        n for n in found if found[n]
    }
    for name, factors in found.items():
        for rows, columns, which, in_a_lane in factors:
            terms = int(rows if which == "1" else columns)
            assert 4 * int(in_a_lane) <= terms, f"{name}: {in_a_lane} terms in each of four lanes, of {terms}"


def start_of(value: int) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("target", [90])
@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda n: layouts.causal(n, block_size=64), int),
        (lambda n: layouts.local(n, n // 3 + 1, block_size=64) | layouts.fixed(n, 32, 8, block_size=64), start_of),
        (lambda n: layouts.strided(n, 7, block_size=64), start_of),
    ],
    ids=["causal", "union", "strided"],
)
@pytest.mark.parametrize("decoding", [False, True], ids=["many queries", "decode"])
def test_a_new_length_compiles_nothing(
    make: Callable[[int], layouts.Layout], start: Callable[[int], int | Tensor], decoding: bool, compiled: Compiled
) -> None:
    """A hundred lengths, starts, caches, scales, rates of dropout: data, all of them."""
    torch.manual_seed(0)
    before: dict[str, set[str]] = {}
    for i in range(100):
        n = 40 + i * 7 if i else 64  # the first has only numbers that a compiler might take for special
        layout = make(n)
        n_q = 1 if decoding else n if i % 2 else n - i % 16
        first = start(0 if i == 0 else n - n_q)
        start_tensor = first if isinstance(first, Tensor) else None
        call = (
            None, layout.tensors(), layout.sizes(), 1 / (i + 1), 0 if start_tensor is not None else first, start_tensor,
            (i + 1) / 200, torch.randint(2**63 - 1, ()), "triton",
        )  # fmt: skip
        launch_all(n_q, n, 64, torch.bfloat16, call)
        after = {name: set(kernels) for name, kernels in variants(compiled).items()}
        assert not before or after == before, f"{n} positions, {n_q} queries compiled anew"
        before = after
