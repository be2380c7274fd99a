"""truncated_normal and its module: the distribution, by scipy's."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from scipy import stats

from gdl_kernels import truncated_normal
from gdl_kernels.nn import TruncatedNormal

#: On both sides of sqrt(pi / 2), where the proposal changes, close to it, and far away.
THRESHOLDS = [1e-30, 1e-3, 0.1, 0.5, 1.0, 1.2533, 1.2534, 2.0, 4.0, 100.0]


def peer(threshold: float) -> Any:
    """scipy's. It divides 0 by 0 where the density is all but constant: there it is the uniform distribution."""
    if threshold < 1e-6:
        return stats.uniform(-threshold, 2 * threshold)
    return stats.truncnorm(-threshold, threshold)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_distribution_is_scipys(threshold: float) -> None:
    """Kolmogorov and Smirnov's distance of 200,000 numbers: 0.0044 has a probability of 0.001."""
    generator = torch.Generator().manual_seed(0)
    drawn = truncated_normal((200, 1000), threshold, generator=generator, dtype=torch.float64)
    assert drawn.shape == (200, 1000)
    assert drawn.abs().max() <= threshold
    assert stats.kstest(drawn.flatten().numpy(), peer(threshold).cdf).statistic < 0.0044


def test_a_wrong_distribution_would_show() -> None:
    """Clipping, which is what truncation is not."""
    clipped = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert stats.kstest(clipped.numpy(), stats.truncnorm(-1, 1).cdf).statistic > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [1e-9, 0.1, 0.7, 1.3])
def test_rounding_stays_within_the_threshold(dtype: torch.dtype, threshold: float) -> None:
    drawn = truncated_normal((50_000,), threshold, dtype=dtype)
    assert drawn.dtype == dtype
    assert drawn.double().abs().max() <= threshold  # 0.7 itself is 0.70019… in float16
    expected = 0.0 if threshold == 1e-9 and dtype == torch.float16 else peer(threshold).std()  # 6e-8 is its least
    assert math.isclose(drawn.double().std().item(), expected, rel_tol=0.03)


def test_no_threshold_takes_long() -> None:
    """Drawing from a normal distribution until all are within 1e-6 would take some hours."""
    begin = time.perf_counter()
    truncated_normal((1000, 100), 1e-6)
    assert time.perf_counter() - begin < 5


def test_infinity_truncates_nothing() -> None:
    drawn = truncated_normal((200_000,), math.inf, generator=torch.Generator().manual_seed(0))
    assert stats.kstest(drawn.numpy(), stats.norm.cdf).statistic < 0.0044


def test_the_generator_decides() -> None:
    first, second = (truncated_normal(100, 0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, truncated_normal(100, 0.5, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(("shape", "expected"), [(3, (3,)), ((), ()), ((0, 4), (0, 4)), (torch.Size([2, 3]), (2, 3))])
def test_shapes(shape: Any, expected: tuple[int, ...]) -> None:
    assert truncated_normal(shape, 0.5).shape == expected


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, 0.0), {}, ValueError, "threshold must be positive, got 0.0"),
        ((3, -1), {}, ValueError, "threshold must be positive, got -1"),
        ((3, math.nan), {}, ValueError, "threshold must be positive, got nan"),
        ((3, "1"), {}, TypeError, "threshold must be a number, got str"),
        ((3, 1.0), {"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
    ],
)
def test_bad_input(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        truncated_normal(*arguments, **options)


def test_the_module_draws_where_it_is() -> None:
    noise = TruncatedNormal(4, 5, threshold=0.5)
    generator = torch.Generator().manual_seed(1)
    drawn = noise(3, generator=generator)
    expected = truncated_normal((3, 4, 5), 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, expected)
    assert noise.to(torch.bfloat16)(2).dtype == torch.bfloat16
    assert noise.to("meta")._where.device.type == "meta"
    assert not noise.state_dict()
    assert repr(noise) == "TruncatedNormal(4, 5, threshold=0.5)"
    noise = TruncatedNormal(7, threshold=0.5)
    noise.threshold = 1e-3
    assert noise(100).abs().max() <= 1e-3
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        TruncatedNormal(7, threshold=0)
