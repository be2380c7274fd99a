"""What a growing GAN (ProGAN, arXiv 1710.10196, section 2) is trained on, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def check_resolution(name: str, resolution: int, *, least: int = 4, most: int | None = None) -> None:
    """Raise a ValueError if a resolution is not a power of two, too small or too large."""
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not whole or resolution < least or resolution & (resolution - 1) or (most is not None and resolution > most):
        allowed = f"a power of two of at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be {allowed}, got {resolution!r}")


def resolutions(first: int, last: int) -> list[int]:
    """Powers of two, both ends included."""
    return [2**power for power in range(first.bit_length() - 1, last.bit_length())]


@dataclass(frozen=True)
class Phase:
    """Where growth stands.

    Attributes:
        resolution: of the images made and judged.
        alpha: how far the newest layers are faded in: 0 is not at all, 1 that they alone count.
    """

    resolution: int
    alpha: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """The phase after so many images have been shown.

    Resolutions double from ``first`` to ``last``. Each but the first fades in over ``fade`` images, and is then trained
    for ``stable`` images, the last one without end.
    """

    first: int
    last: int
    fade: int
    stable: int

    def __post_init__(self) -> None:
        check_resolution("first", self.first)
        check_resolution("last", self.last, least=self.first)
        for name in ("fade", "stable"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    def phase(self, images: int) -> Phase:
        """The phase of the step that begins after ``images``."""
        if images < self.stable:
            return Phase(self.first)
        doublings, into = divmod(images - self.stable, self.fade + self.stable)
        resolution = self.first << min(doublings + 1, (self.last // self.first).bit_length())
        if resolution > self.last:
            return Phase(self.last)
        return Phase(resolution, min(1.0, into / self.fade))

    @property
    def images(self) -> int:
        """Of all phases."""
        return self.stable + (len(resolutions(self.first, self.last)) - 1) * (self.fade + self.stable)

    def steps(self, batches: Mapping[int, int]) -> int:
        """Until all phases have had their images, ``batches[resolution]`` of them in a step."""
        steps = shown = 0
        while shown < self.images:
            shown += batches[self.phase(shown).resolution]
            steps += 1
        return steps
