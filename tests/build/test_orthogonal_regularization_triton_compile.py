"""The Triton kernels of orthogonal_regularization, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.jit import JITFunction  # noqa: E402

from tests.build.test_sparse_attention_triton_compile import (  # noqa: E402
    PRODUCT,
    SHARED_MEMORY,
    resource_usage,
    target,
)

__all__ = ["target"]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def launch_all(shapes: list[tuple[int, ...]], dtype: torch.dtype, columns: bool) -> None:
    """Value and gradient of a list."""
    from gdl_kernels.ops.orthogonal_regularization import op
    from gdl_kernels.ops.orthogonal_regularization import triton as kernels

    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    outputs = op._outputs(weights, 1e-4, columns, True, "triton")
    kernels.forward(outputs, weights, 1e-4, columns, True, "triton")
    kernels.forward((outputs[0], []), weights, 1e-4, columns, False, "triton")
    grads = [torch.empty_like(weight) for weight in weights]
    kernels.backward(grads, outputs[0], weights, outputs[1], 1e-4, columns, "triton")


@pytest.fixture
def compiled(target: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The launchers run as they are, up to the launch: what they would have launched, by kernel and Triton's key."""
    kernels: dict[str, dict[str, Any]] = defaultdict(dict)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert grid[0] > 0
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[self.fn.__name__][kernel.hash] = kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


#: Wide, high, and with rows that are not 16 bytes apart: each a kernel of its own.
SHAPES = [(64, 128), (128, 64), (64, 129), (129, 63)]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (100, torch.bfloat16)],
    indirect=["target"],
    ids=str,
)
def test_resources(target: int, dtype: torch.dtype, compiled: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    launch_all(SHAPES, dtype, columns=True)
    assert {name: len(variants) for name, variants in compiled.items()} == {
        "_write_addresses": 1, "_gram": 8, "_norms": 2, "_gradient": 4,
    }  # fmt: skip
    for name, variants in compiled.items():
        for kernel in variants.values():
            shared = kernel.metadata.shared
            assert shared <= SHARED_MEMORY[target], f"{name}: {shared} bytes of shared memory"
            usage = resource_usage(kernel.asm["cubin"], tmp_path / f"{name}.cubin")
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
            if name in ("_gram", "_gradient") and dtype != torch.float32:
                assert PRODUCT[target] in kernel.asm["ptx"], f"{name} does not use {PRODUCT[target]}"


@pytest.mark.parametrize("target", [90], indirect=True)
def test_other_lists_compile_nothing(target: int, compiled: dict[str, dict[str, Any]]) -> None:
    """Shapes, counts and scales are data."""
    generator = torch.Generator().manual_seed(0)
    before: dict[str, set[str]] = {}
    for i in range(20):
        more = torch.randint(1, 300, (i, 2), generator=generator).tolist()
        launch_all([*SHAPES, *map(tuple, more)], torch.bfloat16, columns=True)
        after = {name: set(variants) for name, variants in compiled.items()}
        assert not before or after == before, f"{len(more)} weights more compiled anew"
        before = after
