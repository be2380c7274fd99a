"""What was measured, and what is derived from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["timed", "unavailable", "wrong", "failed"]


@dataclass
class Row:
    """One contestant in one case.

    Attributes:
        backend: which of ours served the call; empty for rivals.
        status: ``unavailable`` is a rival that raises at once, and ours where no kernel serves; ``failed`` is what has
            no time for any other exception, in the row's own code or in what it is checked against.
        reason: why the row has no time.
        error: the largest error against float64, as a share of what is allowed.
        samples_ms: milliseconds a call, one sample a round. Empty unless the status is ``timed``.
        replayed: whether the samples are of a CUDA graph's replays: of what the GPU does, without the host's part.
        as_called_ms: where they are, milliseconds of a call by Python, as soon after the one before as the host can.
        peak_bytes: growth of memory over one call, at its highest; None where it can't be measured.
        launches: kernels that one call starts on a GPU; None on a CPU.
    """

    contestant: str
    flops: float
    bytes: float
    ours: bool = False
    yardstick: bool = False
    backend: str = ""
    status: Status = "timed"
    reason: str = ""
    error: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    replayed: bool = False
    as_called_ms: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def quartiles_ms(self) -> tuple[float, float] | None:
        if len(self.samples_ms) < 2:
            return None
        low, _, high = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return low, high

    @property
    def flops_per_s(self) -> float | None:
        return None if self.median_ms is None else self.flops / self.median_ms * 1e3

    @property
    def bytes_per_s(self) -> float | None:
        return None if self.median_ms is None else self.bytes / self.median_ms * 1e3


@dataclass
class Result:
    """One case of an op or a model, measured. ``ceiling`` took turns with ``rows``.

    Attributes:
        failure: the exception that left the case without rows.
    """

    op: str
    case: str
    shape: str
    dtype: str
    growth: tuple[str, int] | None
    seed: int
    ceiling: Row
    rows: list[Row]
    failure: str = ""

    @classmethod
    def failed(cls, op: str, case: str, failure: str) -> Result:
        return cls(op, case, "", "", None, 0, Row("none", 0.0, 0.0), [], failure)

    def row(self, contestant: str) -> Row | None:
        return next((row for row in self.rows if row.contestant == contestant), None)

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.ours), None)

    def speed_up(self, over: Row | None) -> float | None:
        """How many times as fast as ``over`` ours is."""
        ours = self.ours
        return _median_ratio(over.samples_ms, ours.samples_ms) if over and ours else None

    @property
    def bound_by_bytes(self) -> bool:
        """Whether the ceiling, and with it every rate, is one of memory traffic, not of arithmetic."""
        return self.ceiling.bytes > 0

    def share_of_ceiling(self, row: Row | None) -> float | None:
        """The rate of ``row`` as a share of the ceiling's."""
        if row is None:
            return None
        ratio = _median_ratio(self.ceiling.samples_ms, row.samples_ms)
        if ratio is None:
            return None
        if self.bound_by_bytes:
            return ratio * row.bytes / self.ceiling.bytes
        return ratio * row.flops / self.ceiling.flops


@dataclass(frozen=True)
class Bar:
    """What is asked of an op or a model: ``measured`` is to be at least ``asked``, or at most. None was not measured.

    Attributes:
        claim: unique within the op or model, whose name the command puts before it.
    """

    claim: str
    asked: float
    measured: float | None
    unit: Literal["×", "%", ""] = "×"
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.at_most else self.measured >= self.asked


def geometric_mean(values: Sequence[float]) -> float | None:
    """None without values."""
    return statistics.geometric_mean(values) if values else None


def exponent(points: Iterable[tuple[float, float | None]]) -> float | None:
    """``p`` of the least-squares fit ``y = c * x**p``; None with fewer than two measured points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs)).slope


def curve(results: Sequence[Result], name: str) -> list[tuple[int, Result]]:
    """The results of one growth curve, by size."""
    return sorted(
        ((result.growth[1], result) for result in results if result.growth and result.growth[0] == name),
        key=lambda point: point[0],
    )


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float | None:
    """Of the ratios within each round: what slows the machine for a while slows both turns of a round.

    The last samples are of the same round; a fast call has none of the first round.
    """
    ratios = [a / b for a, b in zip(reversed(numerators), reversed(denominators))]
    return statistics.median(ratios) if ratios else None
