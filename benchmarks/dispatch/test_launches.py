"""Times the launchers of Triton kernels up to Triton's driver, on any machine: no GPU is asked for anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gdl_kernels import _triton, _tuned, layouts

from .driver import launching

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing")

Calls = dict[str, Callable[[], None]]


def sparse_attention() -> Calls:
    from gdl_kernels.ops.sparse_attention import triton as op

    layout = layouts.causal(4096, block_size=128)
    query, key, value, out, grad = (torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16) for _ in range(5))
    lse = torch.empty(1, 8, 4096)
    few, few_out, few_lse = query[:, :, :1], out[:, :, :1], lse[:, :, :1].contiguous()

    def rest(start: int) -> tuple[Any, ...]:
        return None, layout.tensors(), layout.sizes(), 0.125, start, None, 0.0, None, "triton"

    saved = grad, None, query, key, value, out, lse, *rest(0)
    return {
        "forward": lambda: op.forward((out, lse), query, key, value, *rest(0)),
        "decoding": lambda: op.forward((few_out, few_lse), few, key, value, *rest(4095)),
        "backward": lambda: op.backward((query, key, value), *saved),
        "double backward": lambda: op.double_backward((grad, lse, query, key, value), query, key, value, *saved),
    }


def conditional_batch_norm() -> Calls:
    from gdl_kernels.ops.conditional_batch_norm import triton as op

    x, v, grad, out, second_out = (torch.empty(16, 192, 64, 64) for _ in range(5))
    gain, statistics, running, rest = torch.empty(16, 192), torch.empty(3, 192), torch.empty(192), (1e-5, "", "triton")
    saved = grad, x, gain, statistics, True, *rest
    return {
        "forward": lambda: op.forward((out, statistics), x, gain, gain, None, None, *rest),
        "forward, evaluation": lambda: op.forward((out, statistics), x, gain, gain, running, running, *rest),
        "backward": lambda: op.backward((out, gain, gain), *saved),
        "double backward": lambda: op.double_backward((out, second_out, gain), v, gain, gain, *saved),
    }


def minibatch_self_attention() -> Calls:
    from gdl_kernels.ops.minibatch_self_attention import triton as op

    narrow, wide, lse = torch.empty(4, 12, 64, 64), torch.empty(4, 48, 64, 64), torch.empty(4, 64, 64)
    rest = 1.0, 2, "dot", "triton"
    saved = wide, narrow, narrow, wide, wide, lse, *rest
    return {
        "forward": lambda: op.forward((wide, lse), narrow, narrow, wide, *rest),
        "backward": lambda: op.backward((narrow, narrow, wide), *saved),
        "double backward": lambda: op.double_backward((wide, narrow, narrow, wide), narrow, narrow, wide, *saved),
    }


def minibatch_stddev() -> Calls:
    from gdl_kernels.ops.minibatch_stddev import triton as op

    x, y, rest = torch.empty(32, 256, 32, 32), torch.empty(32, 257, 32, 32), (4, 1, 1e-8, "triton")
    return {"forward": lambda: op.forward(y, x, *rest), "backward": lambda: op.backward(x, y, x, *rest)}


def positional_embedding() -> Calls:
    from gdl_kernels.ops.positional_embedding import triton as op

    tokens, weight, out = torch.zeros(8, 256, dtype=torch.int64), torch.empty(1000, 512), torch.empty(8, 256, 512)
    return {"forward": lambda: op.forward(out, tokens, weight, 22.6, 0, "triton")}


def spectral_normalize() -> Calls:
    from gdl_kernels.ops.spectral_normalize import triton as op
    from gdl_kernels.ops.spectral_normalize import vectors

    weights = [torch.empty(64, 27, 3, 3) for _ in range(41)]
    us, vs = [torch.empty(64) for _ in weights], [torch.empty(243) for _ in weights]
    normalized, found = [torch.empty_like(w) for w in weights], vectors.empty(weights, us, vs)
    return {
        "forward": lambda: op.forward((normalized, found), weights, us, vs, 1, 1e-12, "torch", "triton"),
        "backward": lambda: op.backward(normalized, weights, weights, found, "triton"),
    }


def orthogonal_regularization() -> Calls:
    from gdl_kernels.ops.orthogonal_regularization import triton as op

    weights, penalty = [torch.empty(64, 27, 3, 3) for _ in range(41)], torch.empty(())
    kept, grads = [torch.empty(n) for n in op.kept_sizes(weights, False)], [torch.empty_like(w) for w in weights]
    return {
        "forward": lambda: op.forward((penalty, kept), weights, 1e-4, False, True, "triton"),
        "backward": lambda: op.backward(grads, penalty, weights, kept, 1e-4, False, "triton"),
    }


PASSES = [
    *((sparse_attention, name) for name in ("forward", "decoding", "backward", "double backward")),
    *((conditional_batch_norm, name) for name in ("forward", "forward, evaluation", "backward", "double backward")),
    *((minibatch_self_attention, name) for name in ("forward", "backward", "double backward")),
    *((minibatch_stddev, name) for name in ("forward", "backward")),
    (positional_embedding, "forward"),
    *((spectral_normalize, name) for name in ("forward", "backward")),
    *((orthogonal_regularization, name) for name in ("forward", "backward")),
]


@pytest.mark.parametrize(("op", "name"), PASSES, ids=[f"{op.__name__} {name}" for op, name in PASSES])
def test_launches(op: Callable[[], Calls], name: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, launched = op()[name], list[Any]()
    monkeypatch.setattr(_triton, "_variants", {})  # what is warm on a GPU of this machine is not so here
    benchmark.group = "up to Triton's driver"
    with launching(lambda *_: None), _tuned.using(None):
        with monkeypatch.context() as patch:
            patch.setattr(_triton, "observers", [launched.append])
            run()
        assert launched
        benchmark.extra_info["launches"] = len(launched)
        benchmark(run)
