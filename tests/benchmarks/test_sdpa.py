"""SDPA by each of its kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.sdpa import by_kernel


def test_each_kernel_is_the_one_that_runs() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    attentions = dict(by_kernel("SDPA", scaled_dot_product_attention, torch.device("cpu")))
    assert list(attentions) == ["SDPA", "SDPA, flash", "SDPA, math"]
    for name, operator in (("SDPA, flash", "flash_attention_for_cpu"), ("SDPA, math", "attention_math")):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            attentions[name](query, key, value)
        assert any(operator in event.key for event in profiled.key_averages()), name


def test_a_kernel_that_cannot_serve_a_call_raises() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 16, dtype=torch.float64).requires_grad_(True)
    _, flash, _ = (attention for _, attention in by_kernel("SDPA", scaled_dot_product_attention, torch.device("cpu")))
    with pytest.raises(RuntimeError, match="No available kernel"):
        flash(query, key, value.transpose(0, 1))
