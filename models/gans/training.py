"""The adversarial loop: a generator and a discriminator against each other, and exactly on after an interruption.

A step is :attr:`Recipe.discriminator_steps` updates of the discriminator, each on a fresh batch, and one of the
generator. What a run does next is a function of its checkpoint: weights, smoothed weights, optimisers, random states,
and how many images were taken from the data. Measuring leaves all of them as they are.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
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
from .data import Batch, Batches, open_images
from .frechet import DigitsJudge, Scores
from .grids import LEGIBLE, tiled, write_pixels
from .losses import Terms
from .model import Config, Gan, Stage, memory_format
from .pictures import drawn, ordered, samples_shape
from .ranks import Ranks

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

    Attributes:
        pictures: a folder for a PNG of each grid, which have the same latents all along; None for no pictures.
        untrained: the scores before the first step, if there are any.

    Raises:
        ValueError: if the data has other channels or classes than the model, ``precision`` is none of the device's, or
            several processes can't share a batch.

    Where torch has a default process group, its ranks train together; they must be given the same.
    """

    def __init__(self, gan: Gan, recipe: Recipe, device: str = "cpu") -> None:
        if recipe.precision == "float16" and not device.startswith("cuda"):
            raise ValueError(f"precision must not be float16 on {device}: its loss scaling is for CUDA")
        self.gan, self.recipe, self.device = gan.placed(device).train(), recipe, torch.device(device)
        self.ema = AveragedModel(gan.generator, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        self.ema.requires_grad_(False).eval()
        self.ranks = Ranks.current()
        self.ranks.synchronize(gan)  # not the smoothed generator: each rank samples for itself
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        gan.check_recipe(recipe)
        gan.stage = gan.stage_at(0, recipe)
        self.step = self.shown = 0
        self.pictures: Path | None = None
        self.untrained: Scores | None = None
        self.optimizers = self._new_optimizers()
        gan.stage = gan.stage_at(0, recipe)
        self.batches = self._opened(gan.stage)
        self._judge = DigitsJudge() if recipe.data == "digits" else None

    @classmethod
    def begun(cls, gan: type[Gan], config: Config, recipe: Recipe, device: str = "cpu") -> Training:
        """A run from its beginning."""
        torch.manual_seed(recipe.seed)
        return cls(gan(config), recipe, device)

    @classmethod
    def resumed(cls, gan: type[Gan], path: Path, device: str = "cpu") -> Training:
        """The run that :meth:`save` wrote.

        Raises:
            ValueError: naming the file, if it is not the whole checkpoint of such a model.
        """
        tensors, about = checkpoint.load(path, gan.kind())
        config, recipe = description(gan, path, about)
        run = cls.begun(gan, config, recipe, device)
        checkpoint.load_weights(path, run.gan, checkpoint.part(tensors, "gan"))
        checkpoint.load_weights(path, run.ema, checkpoint.part(tensors, "ema"))
        try:
            run.step, run.shown = int(about["step"]), int(about["shown"])
            run.untrained = None if about["untrained"] is None else Scores(**about["untrained"])
            run.gan.stage = Stage(**about["stage"])
            for name, network in run.networks.items():
                states = checkpoint.part(tensors, f"optimizer.{name}")
                unused = about["unused"][name]
                checkpoint.load_optimizer(path, network, run.optimizers[name], states, unused=unused)
            if run.scaler.is_enabled():
                run.scaler.load_state_dict(about["scaler"])
            torch.set_rng_state(tensors["random.torch"])
            if run.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], run.device)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: its state of training is damaged ({error})") from error
        run.batches = run._opened(run.gan.stage)
        return run

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.gan.generator, "discriminator": self.gan.discriminator}

    def save(self, path: Path) -> None:
        if self.ranks.rank:
            return  # all ranks hold the same
        tensors = {
            **checkpoint.prefixed(self.gan.state_dict(), "gan"),
            **checkpoint.prefixed(self.ema.state_dict(), "ema"),
            "random.torch": torch.get_rng_state(),
        }
        unused = {}  # parameters that had no gradient yet, as those of resolutions to come
        for name, network in self.networks.items():
            state = self.optimizers[name].state
            unused[name] = [n for n, parameter in network.named_parameters() if not state[parameter]]
            states = checkpoint.optimizer_tensors(network, self.optimizers[name])
            tensors |= checkpoint.prefixed(states, f"optimizer.{name}")
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        about = {
            "step": self.step,
            "shown": self.shown,
            "config": asdict(self.gan.config),
            "recipe": asdict(self.recipe),
            "stage": asdict(self.gan.stage),
            "unused": unused,
            "scaler": self.scaler.state_dict(),
            "untrained": None if self.untrained is None else asdict(self.untrained),
        }
        checkpoint.save(path, self.gan.kind(), tensors, about)

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until ``steps`` steps are done in all.

        Raises:
            ValueError: if a loss or gradient is not finite. The step it is from is not given out, so nobody saves it.
                :class:`~models.gans.data.BrokenImage`, where the recipe says ``raise``.
        """
        told: set[str] = set()
        while self.step < steps:
            said = []
            if self.step == 0 and self._judge is not None:
                stage, self.gan.stage = self.gan.stage, self.gan.stage_at(sys.maxsize, self.recipe)  # of its full size
                self.untrained = self._scored(self._judge)
                self.gan.stage = stage
                said.append(f"untrained: {self.untrained}; seed {self.recipe.seed}")
                said.append(f"digits held out: Fréchet distance {self._judge.unseen:.2f}, the classifier is right on "
                            f"{self._judge.classifier.accuracy:.1%} of them")  # fmt: skip
            begin, shown, before = time.perf_counter(), self.shown, self.gan.stage.resolution
            scalars = self._train()
            speed = (self.shown - shown) / (time.perf_counter() - begin)
            scalars["speed/images a second"] = speed
            stage = self.gan.stage
            scalars |= {"stage/resolution": stage.resolution, "stage/alpha": stage.alpha}
            if stage.resolution != before:
                said.append(f"step {self.step}: grown to {stage.resolution}×{stage.resolution}")
            losses = ", ".join(f"{name} {scalars[f'loss/{name}']:.3f}" for name in self.networks)
            images = {}
            if self.step % self.recipe.evaluate == 0 or self.step == steps:
                pixels = self.grid()
                images["samples"] = (pixels.float() / 255).expand(3, -1, -1)
                if self.pictures is not None:
                    factor = max(1, LEGIBLE // self.gan.stage.resolution)
                    write_pixels(self.pictures / f"{self.step:07}.png", pixels, factor)
                if self._judge is not None:
                    scores = self._scored(self._judge)
                    scalars |= scores.scalars()
                    said.append(f"step {self.step}: {scores}; {self._origin()}")
            said += [f"skipped {message}" for message in sorted(self.batches.skipped - told)]
            told |= self.batches.skipped
            yield Progress(self.step, scalars, f"{losses}, {speed:.0f} images/s", "\n".join(said) or None, images)

    def _origin(self) -> str:
        begun = "" if self.untrained is None else f"untrained {self.untrained.frechet:.2f}; "
        return f"{begun}seed {self.recipe.seed}"

    def _train(self) -> dict[str, float]:
        """One step. Returns its scalars."""
        before, self.gan.stage = self.gan.stage, self.gan.stage_at(self.shown, self.recipe)
        stage = self.gan.stage
        if stage.resolution != before.resolution:
            self.optimizers = self._new_optimizers()  # what they remember is of other images
        if (stage.resolution, stage.batch) != (before.resolution, before.batch):
            self.batches = self._opened(stage)
        for optimizer, rate in zip(self.optimizers.values(), stage.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
        for _ in range(self.recipe.discriminator_steps):
            scalars = self._update("discriminator", self._discriminator_terms)
            self.shown += stage.batch
        discriminator = self.gan.discriminator.requires_grad_(False)  # whose gradients nobody would use
        try:
            scalars |= self._update("generator", self._generator_terms)
        finally:
            discriminator.requires_grad_(True)
        self.ema.update_parameters(self.gan.generator)
        self.step += 1
        return scalars

    def _update(self, name: str, terms: Callable[[Tensor, Tensor | None], Terms]) -> dict[str, float]:
        """Descend a network's loss once, its batch in parts. Returns loss, terms and gradient norm."""
        network, optimizer, parts = self.networks[name], self.optimizers[name], self.recipe.accumulate
        latents, labels = self.gan.latents(self.gan.stage.batch), self.gan.labels(self.gan.stage.batch)
        optimizer.zero_grad()
        sums: dict[str, float] = {}
        for part, some in enumerate(latents.chunk(parts)):
            of_part = None if labels is None else self.ranks.share(labels.chunk(parts)[part]).to(self.device)
            with _power_method_held(self.gan, part > 0):
                found = terms(self.ranks.share(some).to(self.device), of_part)
                self.scaler.scale(torch.stack(list(found.values())).sum() / parts).backward()
            values = torch.stack(list(found.values())).detach()
            self.ranks.average([values])
            for term, value in zip(found, values.tolist()):
                sums[term] = sums.get(term, 0.0) + value / parts
        loss = sum(sums.values())
        check_finite(f"loss of the {name}", loss, self.step)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        self.ranks.average(gradients)
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not self.scaler.is_enabled():  # which leaves out a step whose gradients are not finite
            check_finite(f"norm of the gradients of the {name}", norm, self.step)
        self.scaler.step(optimizer)
        self.scaler.update()
        return {
            f"loss/{name}": loss,
            f"gradient norm/{name}": norm,
            **{f"{name}/{term}": value for term, value in sums.items()},
        }

    def _discriminator_terms(self, latents: Tensor, labels: Tensor | None) -> Terms:
        images, classes = next(self.batches)
        images = images.to(self.device, memory_format=memory_format(self.device))
        real = Batch(images, classes.to(self.device) if self.gan.config.classes else None)
        with self._autocast():
            with torch.no_grad():
                fake = self.gan.fakes(latents, labels)
            return self.gan.discriminator_terms(self.gan.reals(real), fake)

    def _generator_terms(self, latents: Tensor, labels: Tensor | None) -> Terms:
        with self._autocast():
            return self.gan.generator_terms(self.gan.fakes(latents, labels))

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.recipe.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _new_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        betas = (self.recipe.beta1, self.recipe.beta2)
        return {
            name: torch.optim.Adam(network.parameters(), betas=betas, fused=True)
            for name, network in self.networks.items()
        }

    def _opened(self, stage: Stage) -> Batches:
        recipe = self.recipe
        if stage.batch % (recipe.accumulate * self.ranks.count):
            raise ValueError(
                f"batch must be a multiple of {recipe.accumulate} parts times {self.ranks.count} processes, "
                f"got {stage.batch}"
            )
        images = open_images(recipe.data, stage.resolution, grey=recipe.grey)
        self.gan.config.check_data(images, conditional=recipe.conditional)
        return Batches(
            images, stage.batch // recipe.accumulate, recipe.seed, taken=self.shown, flip=recipe.flip,
            workers=recipe.workers, on_error=recipe.on_error, ranks=self.ranks,
        )  # fmt: skip

    def grid(self) -> Tensor:
        """Samples of the smoothed generator from the same latents every time: uint8 ``(C, H, W)``."""
        with self._sampling() as random:
            count, columns = samples_shape(self.gan.config.classes)
            latents, labels = self.gan.latents(count, generator=random), ordered(count, self.gan.config.classes)
            return tiled(drawn(self.gan, self.ema.module, latents, labels), columns)

    def _scored(self, judge: DigitsJudge) -> Scores:
        with self._sampling() as random:
            count = self.recipe.scored
            latents, labels = self.gan.latents(count, generator=random), self.gan.labels(count, generator=random)
            return judge.scores(drawn(self.gan, self.ema.module, latents, labels), labels)

    @contextmanager
    def _sampling(self) -> Iterator[torch.Generator]:
        """A settled smoothed generator, and the same randomness every time; the run's own is as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(FIXED)
            self.gan.settle(self.ema.module)
            yield torch.Generator().manual_seed(FIXED)


@contextmanager
def _power_method_held(root: nn.Module, held: bool) -> Iterator[None]:
    """Keeps spectral norms as the first part of a batch has left them: all its parts meet the same weights."""
    norms = [m for m in root.modules() if isinstance(m, SpectralNorm) and m.training] if held else []
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def description(gan: type[Gan], path: Path, about: dict[str, Any]) -> tuple[Config, Recipe]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: naming the file, if that is not what this version of the program writes.
    """
    try:
        return gan.config_type(**about["config"]), type(gan.recipe)(**about["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description is not one of a {gan.title} ({error})") from error


def load_model(gan: type[Gan], path: Path, device: str = "cpu") -> Gan:
    """A checkpoint's model to sample from: its generator is the smoothed one.

    Raises:
        ValueError: naming the file, if it is not a whole checkpoint of this model.
    """
    tensors, about = checkpoint.load(path, gan.kind())
    config, _ = description(gan, path, about)
    model = gan(config)
    checkpoint.load_weights(path, model, checkpoint.part(tensors, "gan"))
    checkpoint.load_weights(path, model.generator, checkpoint.part(checkpoint.part(tensors, "ema"), "module"))
    try:
        model.stage = Stage(**about["stage"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its stage is damaged ({error})") from error
    return model.placed(device).requires_grad_(False).eval()
