"""Trains a Transformer to harmonise chorales, and goes on after an interruption as if there had been none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..musenet.data import Piece
from ..training import Progress, check_finite
from .accuracy import next_tokens
from .harmony import PAD, START, VOCABULARY, Batches, harmonies
from .model import Config, Transformer
from .objective import smoothed_cross_entropy, warmed_up_rate

KIND = "gdl_kernels.transformer.1"


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's losses depend on, besides the model and how many steps there are.

    Attributes:
        pieces: how many chorales; None is all.
        length: the most eighth notes of a piece that are learnt from at once.
        batch: pieces in a step.
        rate: what the paper's learning rate is multiplied by.
        warmup: steps until that is highest; from there it falls with the root of the step.
        smoothing: of the labels.
        forget: share of Bach's own bass that the decoder does not get to see in training. It has to listen to the
            melody then, and to go on when it has gone astray, as when it writes alone ("word dropout", arXiv
            1511.06349, section 3.1).
        evaluate: every how many steps the held-out pieces measure what was learnt.
        transpose: whether each piece is in a random key.
    """

    pieces: int | None = None
    length: int = 128
    batch: int = 16
    rate: float = 0.5
    warmup: int = 200
    smoothing: float = 0.1
    forget: float = 0.4
    evaluate: int = 200
    transpose: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pieces", "length", "batch", "warmup", "evaluate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate must be positive and finite, got {self.rate}")
        for name in ("smoothing", "forget"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 up to, not including, 1, got {getattr(self, name)}")


class Training:
    """A run: model, optimiser and randomness, all of which a checkpoint keeps."""

    def __init__(self, config: Config, recipe: Recipe, pieces: list[Piece]) -> None:
        """A run from its beginning.

        Raises:
            ValueError: if the model's vocabularies are not those of harmony, or no piece, or no held-out piece, is
                among ``pieces``.
        """
        check_vocabulary(config)
        found = harmonies(pieces)
        self.training = [harmony for harmony in found if not harmony.held_out]
        self.held_out = [harmony for harmony in found if harmony.held_out]
        if not self.training or not self.held_out:
            counts = f"{len(self.training)} and {len(self.held_out)}"
            raise ValueError(f"pieces must be some to train on and some to hold out, got {counts}")
        self.config, self.recipe = config, recipe
        torch.manual_seed(recipe.seed)
        self.model = Transformer(config).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.98), eps=1e-9)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.batches = iter(
            Batches(self.training, recipe.length, recipe.batch, self.generator, transpose=recipe.transpose)
        )
        self.step = 0

    @classmethod
    def resumed(cls, path: Path, pieces: Callable[[int | None], list[Piece]]) -> Training:
        """The run that :meth:`save` wrote. ``pieces(recipe.pieces)`` reads the chorales."""
        tensors, about = checkpoint.load(path, KIND)
        config, recipe = description(path, about)
        run = cls(config, recipe, pieces(recipe.pieces))
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
        about = {"step": self.step, "config": asdict(self.config), "recipe": asdict(self.recipe)}
        checkpoint.save(path, KIND, tensors, about)

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until ``steps`` steps are done in all.

        Raises:
            ValueError: if a loss or gradient is not finite. The step it is from is not given out, so nobody saves it.
        """
        learnt = ""
        while self.step < steps:
            rate = self.recipe.rate * warmed_up_rate(
                self.step + 1, width=self.config.width, warmup=self.recipe.warmup
            )  # fmt: skip
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = next(self.batches)
            self.optimizer.zero_grad()
            logits = self.model(batch.source, self._partly_forgotten(batch.target), batch.padding)
            loss = smoothed_cross_entropy(logits, batch.following, self.recipe.smoothing, PAD)
            check_finite("loss", loss.item(), self.step)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            check_finite("norm of the gradients", norm.item(), self.step)
            self.optimizer.step()
            self.step += 1
            scalars = {"loss/training": loss.item(), "learning rate": rate}
            said = None
            if self.step % self.recipe.evaluate == 0 or self.step == steps:
                self.model.eval()
                held_out = next_tokens(self.model, self.held_out)
                self.model.train()
                check_finite("held-out loss", held_out.bits, self.step)
                scalars |= {"bits per token/held out": held_out.bits, "tokens foretold/held out": held_out.right}
                learnt = f", held out {held_out.bits:.3f} bits per token, {held_out.right:.1%} of tokens foretold"
                said = f"step {self.step}: loss {loss.item():.3f}{learnt}"
            yield Progress(self.step, scalars, f"loss {loss.item():.3f}{learnt}", said)

    def _partly_forgotten(self, target: Tensor) -> Tensor:
        """A target with ``PAD``, which it never sees otherwise, for some of its tokens; not for its ``START``."""
        gone = torch.rand(target.shape, generator=self.generator) < self.recipe.forget
        return torch.where(gone & (target != START), PAD, target)


def check_vocabulary(config: Config) -> None:
    """Raise a ValueError if a model is for other tokens than those of :mod:`.harmony`."""
    sizes = (config.source_vocabulary, config.target_vocabulary)
    if sizes != (VOCABULARY, VOCABULARY):
        raise ValueError(f"the vocabularies must have harmony's {VOCABULARY} tokens, got {sizes[0]} and {sizes[1]}")


def description(path: Path, about: dict[str, Any]) -> tuple[Config, Recipe]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: naming the file, if that is not what this version of the program writes.
    """
    try:
        config, recipe = Config(**about["config"]), Recipe(**about["recipe"])
        check_vocabulary(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description is not one of a Transformer ({error})") from error
    return config, recipe


def load_model(path: Path) -> Transformer:
    """A checkpoint's model, ready to harmonise.

    Raises:
        ValueError: naming the file, if it is not a whole checkpoint of a Transformer.
    """
    tensors, about = checkpoint.load(path, KIND)
    config, _ = description(path, about)
    model = Transformer(config)
    checkpoint.load_weights(path, model, checkpoint.part(tensors, "model"))
    return model.eval()
