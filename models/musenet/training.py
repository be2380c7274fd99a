"""Trains MuseNet on the chorales, and goes on after an interruption as if there had been none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..training import Progress, check_finite
from .data import Excerpts, Piece, stream, windows
from .model import Config, MuseNet, bits_per_token
from .tokens import Vocabulary

KIND = "gdl_kernels.musenet.1"


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's losses depend on, besides the model and how many steps there are.

    Attributes:
        pieces: how many chorales; None is all.
        length, batch: positions in an excerpt, excerpts in a step.
        rate: the highest learning rate, after ``warmup`` steps; from there it falls with the root of the step. So a run
            can be made longer after it has begun.
        held_out: how many excerpts of held-out pieces measure what was learnt.
        evaluate: every how many steps they do.
    """

    pieces: int | None = None
    length: int = 512
    batch: int = 4
    rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    held_out: int = 8
    evaluate: int = 50
    transpose: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pieces", "length", "batch", "warmup", "held_out", "evaluate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("rate", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")

    def rate_at(self, step: int) -> float:
        return self.rate * min((step + 1) / self.warmup, math.sqrt(self.warmup / (step + 1)))


class Training:
    """A run: model, optimiser and randomness, all of which a checkpoint keeps."""

    def __init__(self, config: Config, recipe: Recipe, vocabulary: Vocabulary, pieces: list[Piece]) -> None:
        """A run from its beginning.

        Raises:
            ValueError: if excerpts are longer than the context, or no piece, or no held-out piece, is among ``pieces``.
        """
        if recipe.length > config.context:
            raise ValueError(f"length must be at most the context, {config.context}, got {recipe.length}")
        if config.vocabulary != len(vocabulary):
            raise ValueError(f"vocabulary must have the model's {config.vocabulary} tokens, got {len(vocabulary)}")
        training = [piece for piece in pieces if not piece.held_out]
        held_out = [piece for piece in pieces if piece.held_out]
        if not training or not held_out:
            counts = f"{len(training)} and {len(held_out)}"
            raise ValueError(f"pieces must be some to train on and some to hold out, got {counts}")
        self.config, self.recipe, self.vocabulary = config, recipe, vocabulary
        torch.manual_seed(recipe.seed)
        self.model = MuseNet(config).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.excerpts = iter(
            Excerpts(training, vocabulary, recipe.length, recipe.batch, self.generator, transpose=recipe.transpose)
        )
        self.held_out = windows(stream(held_out, vocabulary), recipe.length, recipe.held_out)
        self.step = 0
        self.last_held_out: float | None = None

    @classmethod
    def resumed(cls, path: Path, pieces: Any) -> Training:
        """The run that :meth:`save` wrote. ``pieces(recipe.pieces)`` reads the chorales."""
        tensors, about = checkpoint.load(path, KIND)
        config, vocabulary, recipe = description(path, about)
        run = cls(config, recipe, vocabulary, pieces(recipe.pieces))
        checkpoint.load_weights(path, run.model, checkpoint.part(tensors, "model"))
        checkpoint.load_optimizer(path, run.model, run.optimizer, checkpoint.part(tensors, "optimizer"))
        try:
            torch.set_rng_state(tensors["random.torch"])
            run.generator.set_state(tensors["random.data"])
            run.step = int(about["step"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: its random state or step is damaged ({error})") from error
        return run

    def save(self, path: Path) -> None:
        tensors = {
            **checkpoint.prefixed(self.model.state_dict(), "model"),
            **checkpoint.prefixed(checkpoint.optimizer_tensors(self.model, self.optimizer), "optimizer"),
            "random.torch": torch.get_rng_state(),
            "random.data": self.generator.get_state(),
        }
        about = {
            "step": self.step,
            "config": asdict(self.config),
            "vocabulary": asdict(self.vocabulary),
            "recipe": asdict(self.recipe),
        }
        checkpoint.save(path, KIND, tensors, about)

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until ``steps`` steps are done in all.

        Raises:
            ValueError: if a loss or gradient is not finite. The step it is from is not given out, so nobody saves it.
        """
        while self.step < steps:
            rate = self.recipe.rate_at(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            loss = bits_per_token(self.model, next(self.excerpts))
            check_finite("loss", loss.item(), self.step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            check_finite("norm of the gradients", norm.item(), self.step)
            self.optimizer.step()
            self.step += 1
            held_out = None
            if self.step % self.recipe.evaluate == 0 or self.step == steps:
                held_out = self.evaluate()
                check_finite("held-out loss", held_out, self.step)
            yield self._progress(loss.item(), rate, held_out)

    def _progress(self, loss: float, rate: float, held_out: float | None) -> Progress:
        scalars = {"bits per token/training": loss, "learning rate": rate}
        said = None
        if held_out is not None:
            self.last_held_out = scalars["bits per token/held out"] = held_out
            said = f"step {self.step}: {loss:.3f} bits per token, held out {held_out:.3f}"
        shown = "" if self.last_held_out is None else f", held out {self.last_held_out:.3f}"
        return Progress(self.step, scalars, f"{loss:.3f} bits per token{shown}", said)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per token of the held-out pieces."""
        self.model.eval()
        losses = [bits_per_token(self.model, excerpt[None]).item() for excerpt in self.held_out]
        self.model.train()
        return sum(losses) / len(losses)


def description(path: Path, about: dict[str, Any]) -> tuple[Config, Vocabulary, Recipe]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: naming the file, if that is not what this version of the program writes.
    """
    try:
        words = about["vocabulary"]
        vocabulary = Vocabulary(tuple(words["instruments"]), tuple(words["velocities"]), words["longest_wait"])
        return Config(**about["config"]), vocabulary, Recipe(**about["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its description is not one of a MuseNet ({error})") from error


def load_model(path: Path) -> tuple[MuseNet, Vocabulary]:
    """A checkpoint's model, ready to sample from.

    Raises:
        ValueError: naming the file, if it is not a whole checkpoint of a MuseNet.
    """
    tensors, about = checkpoint.load(path, KIND)
    config, vocabulary, _ = description(path, about)
    if config.vocabulary != len(vocabulary):
        raise ValueError(f"{path}: its model has {config.vocabulary} tokens and its vocabulary {len(vocabulary)}")
    model = MuseNet(config)
    checkpoint.load_weights(path, model, checkpoint.part(tensors, "model"))
    return model.eval(), vocabulary
