"""What a training run is made of, besides its model."""

from __future__ import annotations

import math
from dataclasses import dataclass

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's losses depend on, besides the model and how many steps there are.

    Attributes:
        data: a folder of MIDI files; None is the chorales.
        pieces: how many chorales or files; None is all.
        length, batch: positions in an excerpt, excerpts in a step.
        accumulate: in how many parts a step goes through its batch: less memory, the same gradient.
        precision: of what is computed with the float32 weights: float32 or bfloat16.
        rate: the highest learning rate, after ``warmup`` steps; from there it falls with the root of the step. So a run
            can be made longer after it has begun.
        held_out: how many excerpts of held-out pieces measure what was learnt.
        evaluate: every how many steps they do.
        ema: decay of the exponential moving average of weights.
        drop: how probably a piece is met without its composer, its instrumentation, its length.
    """

    data: str | None = None
    pieces: int | None = None
    length: int = 512
    batch: int = 4
    accumulate: int = 1
    precision: str = "float32"
    rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    drop: float = 0.25
    held_out: int = 8
    evaluate: int = 50
    transpose: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pieces", "length", "batch", "accumulate", "warmup", "held_out", "evaluate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("rate", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide the batch, {self.batch}, got {self.accumulate}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be from 0 up to 1, got {self.ema}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be from 0 to 1, got {self.drop}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")

    def rate_at(self, step: int) -> float:
        return self.rate * min((step + 1) / self.warmup, math.sqrt(self.warmup / (step + 1)))
