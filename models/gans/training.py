"""The adversarial loop: a generator and a discriminator against each other, and exactly on after an interruption.

A step is :attr:`Recipe.discriminator_steps` updates of the discriminator, each on a fresh batch, and one of the generator.
What a run does next is a function of its checkpoint: weights, smoothed weights, optimisers, random states and how many
images were taken from the data. Measuring draws from generators of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typer import Option

from gdl_kernels.nn.spectral_norm import SpectralNorm

from .. import checkpoint
from ..training import Progress, check_finite
from .data import Batch, Batches, Images, open_images
from .frechet import DigitsJudge, Scores
from .grids import tiled
from .losses import Terms
from .model import Config, Gan
from .pictures import drawn

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Of the noise of grids and scores, which is the same at every measurement.
FIXED = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, besides the model and how many steps there are.

    Attributes:
        batch: images in an update, in ``accumulate`` equal parts. Where no statistics of a batch are involved the
            gradient is exactly that of the whole.
        ema: decay of the smoothed generator, which is what samples come from.
        evaluate: every how many steps there is a grid and, with digits, a score of ``scored`` samples.
    """

    data: Annotated[str, Option(help="digits, a folder of images, or the folder of an LSUN LMDB.")] = "digits"
    grey: Annotated[bool, Option(help="Read images in one channel. Digits have no other.")] = False
    conditional: Annotated[bool, Option(help="Let the model know the classes of the data.")] = True
    flip: Annotated[bool, Option(help="Mirror images at random. Digits never are.")] = True
    workers: Annotated[int, Option(help="Processes that read images; 0 reads between the steps.")] = 0
    on_error: Annotated[str, Option(help="raise or skip: what to do about a broken image.")] = "raise"
    batch: Annotated[int, Option(help="Images in an update.")] = 64
    accumulate: Annotated[int, Option(help="Parts that a batch is computed in, to need less memory.")] = 1
    generator_rate: Annotated[float, Option(help="Learning rate of the generator.")] = 1e-4
    discriminator_rate: Annotated[float, Option(help="Learning rate of the discriminator.")] = 4e-4
    beta1: Annotated[float, Option(help="Adam's.")] = 0.0
    beta2: Annotated[float, Option(help="Adam's.")] = 0.9
    discriminator_steps: Annotated[int, Option(help="Updates of the discriminator for each of the generator.")] = 1
    ema: Annotated[float, Option(help="Decay of the smoothed generator.")] = 0.999
    precision: Annotated[str, Option(help="float32, bfloat16, or float16 on a GPU: what autocast computes in.")] = (
        "float32"
    )
    evaluate: Annotated[int, Option(help="Steps between grids, and scores with digits.")] = 250
    scored: Annotated[int, Option(help="Samples that are scored.")] = 1000
    seed: Annotated[int, Option(min=0, max=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "discriminator_steps", "evaluate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide the batch of {self.batch}, got {self.accumulate}")
        for name in ("generator_rate", "discriminator_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {self.on_error!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.scored < 2:
            raise ValueError(f"scored must be at least 2, got {self.scored}")


class Training:
    """A run: two networks, two optimisers, data and randomness.

    Args:
        gan: a new model, built after ``torch.manual_seed(recipe.seed)``; it is trained.
        recipe: see there.
        device: where.

    Raises:
        ValueError: if the data has other channels or classes than the model, or ``precision`` is none of the device's.
    """

    def __init__(self, gan: Gan, recipe: Recipe, device: str = "cpu") -> None:
        if recipe.precision == "float16" and not device.startswith("cuda"):
            raise ValueError(f"precision must not be float16 on {device}: its loss scaling is for CUDA")
        self.gan, self.recipe, self.device = gan.to(device).train(), recipe, device
        self.ema = AveragedModel(gan.generator, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).requires_grad_(False)
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "float16")
        self.step = self.shown = 0
        self.untrained: Scores | None = None
        self._judge: DigitsJudge | None = None
        self._enter()

    @classmethod
    def begun(cls, gan: type[Gan], config: Config, recipe: Recipe, device: str = "cpu") -> Training:
        """A run from its beginning."""
        torch.manual_seed(recipe.seed)
        return cls(gan(config), recipe, device)

    @classmethod
    def resumed(cls, gan: type[Gan], path: Path, device: str = "cpu") -> Training:
        """The run that :meth:`save` wrote."""
        tensors, about = checkpoint.load(path, gan.kind())
        config, recipe = description(gan, path, about)
        run = cls.begun(gan, config, recipe, device)
        try:
            run.step, run.shown = int(about["step"]), int(about["shown"])
            run.untrained = None if about["untrained"] is None else Scores(**about["untrained"])
            run.gan.stage = run.gan.stage_at(int(about["entered"]), recipe)
            unused = about["unused"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its description is damaged ({error})") from error
        run._enter()
        checkpoint.load_weights(path, run.gan, checkpoint.part(tensors, "gan"))
        checkpoint.load_weights(path, run.ema, checkpoint.part(tensors, "ema"))
        for name, optimizer in run.optimizers.items():
            states = checkpoint.part(tensors, f"optimizer.{name}")
            checkpoint.load_optimizer(path, getattr(run.gan, name), optimizer, states, unused=unused[name])
        try:
            run.scaler.load_state_dict(about["scaler"])
            torch.set_rng_state(tensors["random.torch"])
            if device.startswith("cuda") and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: its random state is damaged ({error})") from error
        return run

    def save(self, path: Path) -> None:
        unused = {
            name: [n for n, p in getattr(self.gan, name).named_parameters() if not optimizer.state[p]]
            for name, optimizer in self.optimizers.items()
        }
        tensors = {
            **checkpoint.prefixed(self.gan.state_dict(), "gan"),
            **checkpoint.prefixed(self.ema.state_dict(), "ema"),
            "random.torch": torch.get_rng_state(),
        }
        for name, optimizer in self.optimizers.items():
            states = checkpoint.optimizer_tensors(getattr(self.gan, name), optimizer)
            tensors |= checkpoint.prefixed(states, f"optimizer.{name}")
        if self.device.startswith("cuda"):
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        about = {
            "step": self.step,
            "shown": self.shown,
            "entered": self._entered,
            "config": asdict(self.gan.config),
            "recipe": asdict(self.recipe),
            "unused": unused,
            "scaler": self.scaler.state_dict(),
            "untrained": None if self.untrained is None else asdict(self.untrained),
        }
        checkpoint.save(path, self.gan.kind(), tensors, about)

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until ``steps`` steps are done in all.

        Raises:
            ValueError: if a loss or gradient is not finite. The step it is from is not given out, so nobody saves it.
        """
        said: list[str] = []
        if self.step == 0 and self.judge is not None:
            self.untrained = self.score()
            said.append(f"untrained: {self.untrained} (seed {self.recipe.seed})")
        skipped = len(self.batches.skipped)
        while self.step < steps:
            begin, shown = time.perf_counter(), self.shown
            scalars = self._train()
            speed = (self.shown - shown) / (time.perf_counter() - begin)
            images = {}
            if self.step % self.recipe.evaluate == 0 or self.step == steps:
                images["samples"] = self.grid()
                if self.judge is not None:
                    scores = self.score()
                    scalars["scores/Fréchet distance"] = scores.frechet
                    if scores.hits is not None:
                        scalars["scores/asked class hit"] = scores.hits
                    said.append(f"step {self.step}: {scores} (seed {self.recipe.seed})")
            for message in sorted(self.batches.skipped)[skipped:]:
                said.append(f"skipped {message}")
            skipped = len(self.batches.skipped)
            scalars["speed/images a second"] = speed
            losses = ", ".join(f"{name} {scalars[f'loss/{name}']:.3f}" for name in ("discriminator", "generator"))
            shown_text = f"{losses}, {speed:.0f} images/s"
            yield Progress(self.step, scalars, shown_text, "\n".join(said) or None, images)
            said = []
