"""What a measured table may set of the Triton kernels, compiled for GPUs that need not be here: memory, spills.

Not of the attentions' tiles, of which many fit no GPU: there what doesn't fit shows when it is tuned, and is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gdl_kernels import _tuned, layouts
from gdl_kernels._tuned import Config, Key
from tests.build.triton_target import SHARED_MEMORY, compiled_for, resource_usage

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Extreme(dict[Key, Config]):
    """The rows of a table that has one for every key: in each the largest tiles, with the fewest warps or the most."""

    def __init__(self, many_warps: bool) -> None:
        super().__init__()
        self.step = -1 if many_warps else 1
        self.given: list[Config] = []

    def get(self, key: Key, default: Any = None) -> Any:
        op, kernel, values = key
        tunable = _tuned.tunables()[op][kernel]
        named, choices = dict(zip(tunable.keys, values)), dict(tunable.choices)
        warps = choices.pop("num_warps")[:: self.step]
        configs = (
            dict(zip((*choices, "num_warps"), made)) for made in product(*map(reversed, choices.values()), warps)
        )
        self.given.append(next(config for config in configs if not tunable.fault(named, config)))
        return self.given[-1]


def decode(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.sparse_attention import triton as kernels

    layout = layouts.causal(4096, block_size=128)
    query, out = (torch.empty(1, 4, 1, 128, dtype=dtype) for _ in range(2))
    key, value = (torch.empty(1, 4, 4096, 128, dtype=dtype) for _ in range(2))
    lse = torch.empty(1, 4, 1)
    call = None, layout.tensors(), layout.sizes(), 0.125, 4095, None, 0.0, None, "triton"
    kernels.forward((out, lse), query, key, value, *call)


def pool(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.minibatch_self_attention.triton.launch import Call

    for lying in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, 128, 16, 16, dtype=dtype).to(memory_format=lying)
        Call(x, x, 1.0, 2, "dot", "triton").walked(x, x)


def conditional_batch_norm(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.conditional_batch_norm.triton import passes

    shape = 2, 192, 64, 64
    lying = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    x, v, grad, out, second_out = (torch.empty(shape, dtype=dtype).to(memory_format=lying) for _ in range(5))
    gain, statistics = torch.empty(shape[:2]), torch.empty(3, shape[1])
    passes.forward((out, statistics), x, gain, gain, None, None, 1e-5, "", "triton")
    end = True, 1e-5, "", "triton"
    passes.backward((out, gain, gain), grad, x, gain, statistics, *end)
    passes.double_backward((out, second_out, gain), v, gain, gain, grad, x, gain, statistics, *end)


def minibatch_stddev(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.minibatch_stddev import triton as kernels

    lying = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    x, y = (torch.empty(16, c, 64, 64, dtype=dtype).to(memory_format=lying) for c in (64, 65))
    kernels.forward(y, x, 4, 1, 1e-8, "triton")
    kernels.backward(torch.empty_like(x), y, x, 4, 1, 1e-8, "triton")


def positional_embedding(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.positional_embedding import triton as kernels

    columns = 512 if dtype == torch.float32 else 300
    weight, tokens = torch.empty(1000, columns, dtype=dtype), torch.zeros(2, 128, dtype=torch.int64)
    out = torch.empty(*tokens.shape, columns, dtype=dtype)
    kernels.forward(out, tokens, weight, 0.5, 0, "triton")
    kernels.backward(torch.empty_like(weight), out, tokens, 1000, 0.5, "triton")


def spectral_normalize(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.spectral_normalize import op
    from gdl_kernels.ops.spectral_normalize import triton as kernels

    weights = [torch.empty(shape, dtype=dtype) for shape in ((64, 512), (64, 16))]
    us, vs = [torch.empty(64) for _ in weights], [torch.empty(w.shape[1]) for w in weights]
    outputs = op._outputs(weights, us, vs)
    kernels.forward(outputs, weights, us, vs, 1, 1e-12, "torch", "triton")
    kernels.backward(weights, weights, weights, outputs[1], "triton")


def orthogonal_regularization(dtype: torch.dtype) -> None:
    from gdl_kernels.ops.orthogonal_regularization import op
    from gdl_kernels.ops.orthogonal_regularization import triton as kernels

    if dtype == torch.float32:  # whose products take the compiler longest; those of float16 need more memory
        dtype = torch.float16
    weights = [torch.empty(64, 128, dtype=dtype)]
    outputs = op._outputs(weights, 1e-4, True, True, "triton")
    kernels.forward(outputs, weights, 1e-4, True, True, "triton")
    kernels.backward([torch.empty_like(w) for w in weights], outputs[0], weights, outputs[1], 1e-4, True, "triton")


#: Launches all that may be set of an op, but for attentions' tiles.
LAUNCHES = {
    "sparse_attention": decode,
    "minibatch_self_attention": pool,
    "conditional_batch_norm": conditional_batch_norm,
    "minibatch_stddev": minibatch_stddev,
    "positional_embedding": positional_embedding,
    "spectral_normalize": spectral_normalize,
    "orthogonal_regularization": orthogonal_regularization,
}

#: Kernels of next to no work.
NOT_TUNED = ("_write_addresses", "_weights")

#: GPU, dtype, and whether there are many warps.
TARGETS = [(80, torch.bfloat16, False), (90, torch.float32, False), (100, torch.bfloat16, True)]


@pytest.mark.parametrize(("arch", "dtype", "many_warps"), TARGETS, ids=str)
@pytest.mark.parametrize("op", _tuned.tunables())
def test_the_largest_tiles_fit(
    op: str, arch: int, dtype: torch.dtype, many_warps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch: Callable[[torch.dtype], None] = LAUNCHES[op]
    rows = Extreme(many_warps)
    with compiled_for(arch, monkeypatch) as compiled, _tuned.using(_tuned.Table({}, rows)):
        launch(dtype)
    launched = {kernel.metadata.num_warps for name, kernel in compiled if name not in NOT_TUNED}
    assert launched == {config["num_warps"] for config in rows.given}
    for name, kernel in compiled:
        usage = resource_usage(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert kernel.metadata.shared <= SHARED_MEMORY[arch], f"{name}: {kernel.metadata.shared} bytes of shared memory"
