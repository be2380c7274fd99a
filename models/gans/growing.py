"""GANs that grow (ProGAN, arXiv 1710.10196): both networks begin with few pixels, and layers for more fade in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn
from typer import Option

from .data import Batch
from .model import Config, Gan, Stage
from .resampling import downsample, upsample
from .schedule import Schedule, check_resolution, resolutions
from .training import Recipe

#: The most images in a step, by resolution: those of the published code on one GPU.
BATCHES = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8}

#: Above the last of these.
LEAST_BATCH = 4


@dataclass(frozen=True)
class GrowingConfig(Config):
    """The shape of networks that grow; the defaults are the published ones.

    Attributes:
        size: of the images once all layers have grown.
        capacity, widest: a layer at resolution R has ``min(widest, capacity / R)`` channels.
        group_size: samples that the minibatch standard deviation compares.
    """

    size: Annotated[int, Option(help="Height and width of the images in the end, a power of two.")] = 1024
    latent: Annotated[int, Option(help="Length of the latent vector.")] = 512
    capacity: Annotated[int, Option(help="Channels of a layer, times its resolution.")] = 16384
    widest: Annotated[int, Option(help="Channels of a layer, at the most.")] = 512
    group_size: Annotated[int, Option(help="Samples that the minibatch standard deviation compares.")] = 4

    #: The resolution that growth begins with.
    FIRST: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_resolution("size", self.size, least=self.FIRST)
        for name in ("widest", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.capacity < self.size:
            raise ValueError(f"capacity must be at least the size, {self.size}, got {self.capacity}")
        if self.classes:
            raise ValueError(f"classes must be 0, for models that grow know none, got {self.classes}")

    @property
    def widths(self) -> list[int]:
        """Channels at every resolution from 4 to ``size``."""
        return [min(self.widest, self.capacity // resolution) for resolution in resolutions(4, self.size)]


@dataclass(frozen=True)
class GrowingRecipe(Recipe):
    """A recipe with phases. ``batch`` is the most; at high resolutions there are fewer, see ``BATCHES``.

    Attributes:
        fade, stable: images that each resolution fades in over, and those that it is then trained for.
    """

    conditional: bool = False
    batch: Annotated[int, Option(help="Images in an update, at the most: fewer above 16×16.")] = 128
    generator_rate: Annotated[float, Option(help="Learning rate of the generator at low resolutions.")] = 1e-3
    discriminator_rate: Annotated[float, Option(help="Learning rate of the discriminator there.")] = 1e-3
    beta2: Annotated[float, Option(help="Adam's.")] = 0.99
    fade: Annotated[int, Option(help="Images over which a resolution fades in.")] = 600_000
    stable: Annotated[int, Option(help="Images that it is then trained for.")] = 600_000

    def batches(self, config: GrowingConfig) -> dict[int, int]:
        """Images in a step, by resolution."""
        return {r: min(self.batch, BATCHES.get(r, LEAST_BATCH)) for r in resolutions(config.FIRST, config.size)}

    def schedule(self, config: GrowingConfig) -> Schedule:
        return Schedule(config.FIRST, config.size, self.fade, self.stable)

    def steps(self, config: GrowingConfig) -> int:
        """Of all phases."""
        return self.schedule(config).steps(self.batches(config))


#: Of small models that learn digits in minutes on a CPU.
DIGITS = GrowingRecipe(batch=32, fade=12_000, stable=24_000, ema=0.995)


class GrowingGan(Gan):
    """A GAN whose stage changes with the images it was shown.

    Its generator takes latents, a resolution and alpha; its discriminator images and alpha.

    Class attributes:
        rate_factors: what rates are multiplied by from a resolution on.
    """

    config: GrowingConfig
    rate_factors: ClassVar[Mapping[int, float]]

    def check_recipe(self, recipe: Recipe) -> None:
        """Every batch must have equal parts, and these must have equal groups for the minibatch standard deviation."""
        assert isinstance(recipe, GrowingRecipe)
        recipe.schedule(self.config)
        group = self.config.group_size
        for resolution, batch in recipe.batches(self.config).items():
            part, rest = divmod(batch, recipe.accumulate)
            if rest or (part > group and part % group):
                raise ValueError(
                    "batch must be a multiple of accumulate, and its parts of group_size or no larger, got "
                    f"{batch} at {resolution}×{resolution} in {recipe.accumulate} parts with a group_size of {group}"
                )

    def stage_at(self, shown: int, recipe: Recipe) -> Stage:
        assert isinstance(recipe, GrowingRecipe)
        phase = recipe.schedule(self.config).phase(shown)
        factor = self.rate_factors[max(r for r in self.rate_factors if r <= phase.resolution)]
        rates = recipe.generator_rate * factor, recipe.discriminator_rate * factor
        return Stage(phase.resolution, recipe.batches(self.config)[phase.resolution], rates, phase.alpha)

    def generate(
        self, generator: nn.Module, latents: Tensor, labels: Tensor | None, *, truncation: float | None = None
    ) -> Tensor:
        return generator(latents, self.stage.resolution, self.stage.alpha)

    def score(self, batch: Batch) -> Tensor:
        return self.discriminator(batch.images, self.stage.alpha)

    def reals(self, batch: Batch) -> Batch:
        return batch._replace(images=faded(batch.images, self.stage.alpha))


def faded(images: Tensor, alpha: float) -> Tensor:
    """Real images as sharp as generated ones while a resolution fades in: ``1 - alpha`` times those of half of it."""
    return images if alpha == 1 else upsample(downsample(images)).lerp(images, alpha)


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")


def check_growth(config: GrowingConfig, resolution: int | None, alpha: float) -> int:
    """The resolution that a generator is asked for, its full size by default; a ValueError where it has none such."""
    check_alpha(alpha)
    if resolution is None:
        return config.size
    check_resolution("resolution", resolution, least=config.FIRST, most=config.size)
    return resolution


def side_of(images: Tensor, config: GrowingConfig) -> int:
    """Height and width of images.

    Raises:
        ValueError: if they are not ``(N, channels, R, R)`` with a resolution that there are layers for.
    """
    side = images.shape[-1] if images.dim() == 4 else 0
    if images.shape[1:] != (config.channels, side, side) or side not in resolutions(config.FIRST, config.size):
        raise ValueError(
            f"images must be (N, {config.channels}, R, R) with R a power of two from {config.FIRST} to {config.size}, "
            f"got shape {tuple(images.shape)}"
        )
    return side
