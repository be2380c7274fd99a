"""The Triton kernels of minibatch_self_attention, compiled for GPUs that need not be here: memory, products, spills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import PRODUCT, Compiled, compiled_for, resource_usage

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: What a program may have on the smaller chips of each generation too, such as sm_86, sm_89 and sm_120.
SHARED_MEMORY = 99 * 1024

FORWARD = ["_forward"]
BACKWARD = ["_grad_query", "_grad_key_value"]
DOUBLE_BACKWARD = ["_double_rows", "_double_columns"]


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    with compiled_for(request.param, monkeypatch) as launched:
        yield launched


def launch_all(
    channels: int, value_channels: int, size: tuple[int, int], pool: int, score: str, dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:  # fmt: skip
    from gdl_kernels.ops.minibatch_self_attention import triton as kernels

    narrow, wide = (
        torch.empty(2, c, *size, dtype=dtype).to(memory_format=memory_format) for c in (channels, value_channels)
    )
    lse = torch.empty(2, *size)
    call = 1.0, pool, score, "triton"
    kernels.forward((wide, lse), narrow, narrow, wide, *call)
    saved = wide, narrow, narrow, wide, wide, lse
    kernels.backward((narrow, narrow, wide), *saved, *call)
    kernels.double_backward((wide, narrow, narrow, wide), narrow, narrow, wide, *saved, *call)


def names(pool: int) -> list[str]:
    pools = ["pool"] * 2 if pool == 2 else []
    return [*pools, *FORWARD, *pools, *BACKWARD, *pools, *DOUBLE_BACKWARD]


#: What each changes in the code that is compiled: padded channels, pooling, the score, the dtype.
CASES = [
    (90, 12, 48, (64, 64), 2, "dot", torch.bfloat16),  # BigGAN-128 D
    (90, 24, 96, (64, 64), 2, "dot", torch.bfloat16),  # BigGAN G
    (90, 16, 64, (32, 32), 2, "dot", torch.float32),  # SAGAN D
    (90, 32, 128, (32, 32), 2, "dot", torch.float32),  # SAGAN G
    (90, 32, 128, (32, 32), 2, "l2", torch.bfloat16),
    (90, 12, 48, (64, 64), 1, "dot", torch.float32),
    (90, 16, 64, (32, 32), 1, "l2", torch.bfloat16),
    (90, 24, 96, (64, 64), 1, "l2", torch.float32),
    (90, 4, 17, (9, 13), 1, "dot", torch.float16),  # divides nothing
    (80, 24, 96, (64, 64), 2, "dot", torch.float32),
    (80, 32, 128, (32, 32), 2, "dot", torch.bfloat16),
    (80, 16, 64, (32, 32), 2, "dot", torch.bfloat16),
    (100, 12, 48, (64, 64), 2, "dot", torch.float32),
    (100, 32, 128, (32, 32), 2, "dot", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("compiled", "channels", "value_channels", "size", "pool", "score", "dtype"), CASES, indirect=["compiled"], ids=str
)
def test_resources(
    request: pytest.FixtureRequest,
    compiled: Compiled,
    channels: int,
    value_channels: int,
    size: tuple[int, int],
    pool: int,
    score: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    # As convolutions on tensor cores give their outputs, and as others do.
    memory_format = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    launch_all(channels, value_channels, size, pool, score, dtype, memory_format)
    arch = request.node.callspec.params["compiled"]
    assert [name for name, _ in compiled] == names(pool)
    for name, kernel in compiled:
        usage = resource_usage(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert kernel.metadata.shared <= SHARED_MEMORY, f"{name}: {kernel.metadata.shared} bytes of shared memory"
        if dtype != torch.float32 and name != "pool":
            narrow = name == "_double_rows" and value_channels > 64  # as the launcher says
            assert PRODUCT[80 if narrow else arch] in kernel.asm["ptx"], f"{name} has no such product"
