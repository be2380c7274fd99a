"""Progressive growing (ProGAN, arXiv 1710.10196, section 2): what resolution is trained when, and how it fades in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

#: Images in a step, by resolution, on one GPU: those of the published code.
BATCHES = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4, 1024: 4}


def check_resolution(name: str, resolution: int, *, least: int = 4, most: int | None = None) -> None:
    """Raise a ValueError if a resolution is not a power of two, too small or too large."""
    allowed = f"a power of two of at least {least}" + ("" if most is None else f" and at most {most}")
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not whole or resolution < least or resolution & (resolution - 1) or (most is not None and resolution > most):
        raise ValueError(f"{name} must be {allowed}, got {resolution!r}")


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")


def resolutions(first: int, last: int) -> list[int]:
    """Powers of two, both ends included."""
    return [2**power for power in range(first.bit_length() - 1, last.bit_length())]


def channels(resolution: int, *, capacity: int, widest: int) -> int:
    """Of a layer: ``capacity / resolution``, but no more than ``widest``. As published, these are 16384 and 512."""
    return min(widest, capacity // resolution)


@dataclass(frozen=True)
class Phase:
    """Where a growing network stands.

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
    for ``stable`` images, the last one without end. A step takes ``batches[resolution]`` images.

    Attributes:
        batches: by resolution; one that is not there takes that of the next smaller one.
    """

    first: int
    last: int
    fade: int = 600_000
    stable: int = 600_000
    batches: Mapping[int, int] = field(default_factory=lambda: dict(BATCHES))

    def __post_init__(self) -> None:
        check_resolution("first", self.first)
        check_resolution("last", self.last, least=self.first)
        for name in ("fade", "stable"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for resolution, batch in self.batches.items():
            check_resolution("batches", resolution)
            if not isinstance(batch, int) or batch < 1:
                raise ValueError(f"batches must be whole numbers of at least 1, got {batch!r} at {resolution}")
        if not any(resolution <= self.first for resolution in self.batches):
            raise ValueError(f"batches must have one for {self.first} or less, got {dict(self.batches)}")

    def phase(self, images: int) -> Phase:
        """The phase of the step that begins after ``images``."""
        if images < self.stable or self.first == self.last:
            return Phase(self.first)
        grown, into = divmod(images - self.stable, self.fade + self.stable)
        steps_up = (self.last // self.first).bit_length() - 1
        if grown >= steps_up:
            return Phase(self.last)
        return Phase(self.first << (grown + 1), min(1.0, into / self.fade))

    def batch(self, resolution: int) -> int:
        return self.batches[max(known for known in self.batches if known <= resolution)]

    def steps(self) -> int:
        """Until the last resolution has had its share of images too."""
        steps = images = 0
        while images < self.images():
            images += self.batch(self.phase(images).resolution)
            steps += 1
        return steps

    def images(self) -> int:
        """Images of all phases."""
        return self.stable + (len(resolutions(self.first, self.last)) - 1) * (self.fade + self.stable)


def upsample(x: Tensor) -> Tensor:
    """Each pixel becomes four."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """The mean of each four pixels."""
    return F.avg_pool2d(x, 2)


def at_phase(images: Tensor, phase: Phase) -> Tensor:
    """Real images as large as those that are generated, and while a resolution fades in as sharp.

    Pixels are means of squares; while fading in, ``alpha`` times these and ``1 - alpha`` times those of half the
    resolution.
    """
    images = F.avg_pool2d(images, images.shape[-1] // phase.resolution)
    return images if phase.alpha == 1 else upsample(downsample(images)).lerp(images, phase.alpha)


def image_resolution(images: Tensor, *, image_channels: int, least: int, most: int) -> int:
    """The side of square images.

    Raises:
        ValueError: if they are not ``(N, image_channels, R, R)`` with a power of two from ``least`` to ``most``.
    """
    side = images.shape[-1] if images.dim() == 4 else 0
    square = images.shape[1:] == (image_channels, side, side)
    if not square or not least <= side <= most or side & (side - 1):
        raise ValueError(
            f"images must be (N, {image_channels}, R, R) with R a power of two from {least} to {most}, "
            f"got shape {tuple(images.shape)}"
        )
    return side
