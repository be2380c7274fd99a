"""What a GAN is to the code that trains, samples and compares it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from typer import Option

from gdl_kernels.nn import ConditionalBatchNorm2d, standing_statistics

from .data import Batch, Images
from .losses import Loss, Terms

if TYPE_CHECKING:
    from .pictures import Picture
    from .training import Recipe

#: Forward passes, and images in each, of which the statistics to sample with are the mean (BigGAN, appendix A).
PASSES, STANDING = 16, 64


@dataclass(frozen=True)
class Config:
    """What makes a GAN's shapes; a model's own has more fields.

    Fields with an ``Option`` are options of the command line. Those without are what the data says.

    Attributes:
        channels: of the images, 1 or 3.
        classes: how many; 0 for a model that knows none.
    """

    size: Annotated[int, Option(help="Height and width of the images, a power of two.")] = 32
    latent: Annotated[int, Option(help="Length of the latent vector.")] = 128
    channels: int = 3
    classes: int = 0

    def __post_init__(self) -> None:
        if self.size < 4 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, at least 4, got {self.size}")
        if self.latent < 1:
            raise ValueError(f"latent must be at least 1, got {self.latent}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.classes < 0:
            raise ValueError(f"classes must not be negative, got {self.classes}")

    def check_data(self, images: Images, *, conditional: bool) -> None:
        """Raise a ValueError if data does not fit the model."""
        classes = len(images.classes) if conditional else 0
        if (images.channels, classes) != (self.channels, self.classes):
            raise ValueError(
                f"data must have the model's {self.channels} channels and {self.classes} classes, got "
                f"{images.channels} and {classes}"
            )


@dataclass(frozen=True)
class Stage:
    """How a step is done. Progressive growing changes it; other models have one from beginning to end.

    Attributes:
        resolution: height and width of the images.
        batch: real images in a step.
        rates: learning rates of generator and discriminator.
        alpha: how far the newest layers are faded in.
    """

    resolution: int
    batch: int
    rates: tuple[float, float]
    alpha: float = 1.0


class Gan(nn.Module):
    """A generator and a discriminator, and all that the adversarial loop asks of them.

    A model has a subclass, which is built from its configuration alone and overrides what is different with it.

    Class attributes:
        name, title: for the command line and for people.
        config_type: its :class:`Config`.
        recipe: how it is trained unless told otherwise.
        truncates: whether ``truncation`` means anything to it.

    Attributes:
        generator: latents ``(N, latent)`` and classes ``(N,)`` or None to images.
        discriminator: images and classes to scores ``(N,)``.
        loss: see :mod:`models.gans.losses`.
        stage: what the networks are at: with a new model the last one. The loop sets it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_type: ClassVar[type[Config]]
    recipe: ClassVar[Recipe]
    truncates: ClassVar[bool] = False

    generator: nn.Module
    discriminator: nn.Module
    loss: Loss
    stage: Stage

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.stage = self.stage_at(sys.maxsize, self.recipe)

    @classmethod
    def kind(cls) -> str:
        """Of its checkpoints."""
        return f"gdl_kernels.{cls.name}.1"

    def placed(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Gan:
        """On a device, its weights as :func:`memory_format` has them there."""
        there: Any = {"device": device, "dtype": dtype, "memory_format": memory_format(device)}
        return self.to(**there)

    def stage_at(self, shown: int, recipe: Recipe) -> Stage:
        """The stage of the step that comes after the discriminator was shown ``shown`` real images."""
        return Stage(self.config.size, recipe.batch, (recipe.generator_rate, recipe.discriminator_rate))

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise a ValueError if the model can't be trained so."""

    @classmethod
    def check_truncation(cls, truncation: float) -> None:
        """Raise a ValueError if that is none, as the command line asks before it draws."""
        if not cls.truncates:
            raise ValueError(f"truncation must not be given: {cls.title} has none")
        if not truncation > 0:
            raise ValueError(f"truncation must be positive, got {truncation}")

    def latents(
        self, count: int, *, truncation: float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Random latents ``(count, latent)``, on the CPU: the same on every device."""
        return torch.randn(count, self.config.latent, generator=generator)

    def labels(self, count: int, *, generator: torch.Generator | None = None) -> Tensor | None:
        """Random classes ``(count,)``, on the CPU; None where the model knows none."""
        if not self.config.classes:
            return None
        return torch.randint(self.config.classes, (count,), generator=generator)

    def generate(
        self, generator: nn.Module, latents: Tensor, labels: Tensor | None, *, truncation: float | None = None
    ) -> Tensor:
        """Images at :attr:`stage`, by the model's own generator or its smoothed copy."""
        return generator(latents, labels)

    def fakes(self, latents: Tensor, labels: Tensor | None) -> Batch:
        """What is shown to the discriminator in training: where it is not what :meth:`generate` gives, override it."""
        return Batch(self.generate(self.generator, latents, labels), labels)

    def score(self, batch: Batch) -> Tensor:
        """The discriminator's scores ``(N,)`` at :attr:`stage`."""
        return self.discriminator(batch.images, batch.labels)

    def reals(self, batch: Batch) -> Batch:
        """Real images as they are shown at :attr:`stage`, given at its resolution."""
        return batch

    def discriminator_terms(self, real: Batch, fake: Batch) -> Terms:
        return self.loss.discriminator(self.score, real, fake)

    def generator_terms(self, fake: Batch) -> Terms:
        """Regularisers of the generator are terms that a subclass adds."""
        return self.loss.generator(self.score(fake))

    def settle(self, generator: nn.Module, *, truncation: float | None = None, seed: int = 0) -> None:
        """Put a generator in eval mode, and give its batch norms the statistics of latents such as are to come."""
        generator.eval()
        if not any(isinstance(m, (ConditionalBatchNorm2d, nn.BatchNorm2d)) for m in generator.modules()):
            return
        device = next(generator.parameters()).device
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad(), standing_statistics(generator):
            for _ in range(PASSES):
                latents = self.latents(STANDING, truncation=truncation, generator=random)
                labels = self.labels(STANDING, generator=random)
                moved = None if labels is None else labels.to(device)
                self.generate(generator, latents.to(device), moved, truncation=truncation)

    @classmethod
    def pictures(cls) -> Mapping[str, Picture]:
        """What ``sample --picture`` can draw."""
        from .pictures import interpolation, samples, truncation_sweep  # which know this module

        found: dict[str, Picture] = {"samples": samples, "interpolation": interpolation}
        return found | ({"truncation": truncation_sweep} if cls.truncates else {})


def memory_format(device: torch.device | str) -> torch.memory_format:
    """How weights and images are to lie in memory on a device; to be given to their ``to``.

    On the CPU channels last: a convolution there sorts what lies otherwise on its way in and out.
    """
    return torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format


def check_images(images: Tensor, channels: int, resolution: int) -> None:
    """Raise a ValueError unless ``images`` are ``(N, channels, resolution, resolution)``."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (channels, resolution, resolution):
        raise ValueError(
            f"images must have shape (N, {channels}, {resolution}, {resolution}), got {tuple(images.shape)}"
        )


def check_latents(latents: Tensor, length: int) -> None:
    """Raise a ValueError unless ``latents`` are ``(N, length)``."""
    if latents.dim() != 2 or latents.shape[1] != length:
        raise ValueError(f"latents must have shape (N, {length}), got {tuple(latents.shape)}")


def check_labels(labels: Tensor | None, count: int, classes: int) -> None:
    """Raise a ValueError unless ``labels`` are ``count`` integers below ``classes``, or None where those are 0.

    On a GPU the range is not looked at: the CPU would have to wait for it.
    """
    if not classes:
        if labels is not None:
            raise ValueError("labels must be None for a model without classes")
        return
    if labels is None or tuple(labels.shape) != (count,) or labels.is_floating_point():
        got = "None" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be integers of shape ({count},) for a model with {classes} classes, got {got}")
    if labels.is_cpu and count:
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= classes:
            raise ValueError(f"labels must be from 0 to {classes - 1}, got {least} to {most}")
