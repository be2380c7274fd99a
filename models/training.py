"""What every training run is, seen from outside: it does steps, tells of each, and can be saved after any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """A step that is done.

    Attributes:
        step: how many are done.
        scalars: what TensorBoard logs, by tag: ``"bits per token/training"``.
        shown: what the progress bar says beside its bar, in a few words.
        said: a line that stays on the screen; None at most steps.
        images: pictures for TensorBoard by tag, ``(3, H, W)`` in 0 to 1.
    """

    step: int
    scalars: Mapping[str, float]
    shown: str
    said: str | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)


class Run(Protocol):
    """A run: models, optimisers, data and randomness, all of which a checkpoint keeps."""

    step: int

    def save(self, path: Path) -> None:
        """Write a checkpoint from which the run goes on exactly."""

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until ``steps`` steps are done in all.

        Raises:
            ValueError: if a loss or gradient is not finite. The step it is from is not given out, so nobody saves it.
        """


def check_finite(what: str, value: float, step: int) -> None:
    """Raise a ValueError if training has diverged: if ``value``, of ``what``, is not finite after ``step`` steps."""
    if not math.isfinite(value):
        raise ValueError(
            f"training has diverged: the {what} is {value} after {step} steps; "
            "the last checkpoint is as it was; try a lower rate"
        )
