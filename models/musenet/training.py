"""Trains MuseNet, and goes on after an interruption as if there had been none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checkpoint
from ..training import Progress, check_finite
from . import statistics
from .bigram import Bigram
from .data import Piece, encoded
from .excerpts import KEYS, Excerpts, held_out
from .model import Config, MuseNet, bits_per_token
from .recipe import Recipe
from .statistics import Statistics
from .tokens import Vocabulary

KIND = "gdl_kernels.musenet.2"


class Training:
    """A run: model, optimiser, averaged weights and randomness, all of which a checkpoint keeps.

    Attributes:
        average: the model whose weights are an exponential moving average of ``model``'s; what is measured and sampled.
        corpus: the statistics of the pieces to train on.
    """

    def __init__(
        self, config: Config, recipe: Recipe, vocabulary: Vocabulary, pieces: Iterable[Piece], *, device: str = "cpu"
    ) -> None:
        """A run from its beginning. ``pieces`` are read once, and only their tokens kept.

        Raises:
            ValueError: if excerpts are longer than the context, or no piece, or no held-out piece, is among ``pieces``.
        """
        if recipe.length > config.context:
            raise ValueError(f"length must be at most the context, {config.context}, got {recipe.length}")
        if config.vocabulary != len(vocabulary):
            raise ValueError(f"vocabulary must have the model's {config.vocabulary} tokens, got {len(vocabulary)}")
        self.config, self.recipe, self.vocabulary, self.device = config, recipe, vocabulary, torch.device(device)
        kept = self._read(pieces)
        torch.manual_seed(recipe.seed)
        self.model = MuseNet(config).to(device).train()
        self.average = AveragedModel(self.model, multi_avg_fn=_averaging(recipe.ema)).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.excerpts = iter(
            Excerpts(
                self.pieces, vocabulary, recipe.length, recipe.batch, self.generator,
                transpose=recipe.transpose, drop=recipe.drop,
            )
        )  # fmt: skip
        self.held_out = held_out(kept, vocabulary, recipe.length, recipe.held_out)
        self.step = 0
        self.last_held_out: float | None = None

    def _read(self, pieces: Iterable[Piece]) -> list[Tensor]:
        """Take in the pieces to train on, and return those held out."""
        self.pieces: list[Tensor] = []
        kept: list[Tensor] = []
        measured, digest = [], hashlib.sha256()
        for piece in pieces:
            tokens = encoded(piece, self.vocabulary)
            digest.update(bytes([piece.held_out]) + tokens.numpy().tobytes())
            (kept if piece.held_out else self.pieces).append(tokens)
            if not piece.held_out and statistics.has_pitch(piece.notes):
                measured.append(statistics.measure(piece.notes))
        if not self.pieces or not kept:
            counts = f"{len(self.pieces)} and {len(kept)}"
            raise ValueError(f"pieces must be some to train on and some to hold out, got {counts}")
        self.corpus = statistics.mean(measured) if measured else None
        self.fingerprint = digest.hexdigest()
        return kept

    @classmethod
    def resumed(cls, path: Path, read: Callable[[Recipe], Iterable[Piece]], *, device: str = "cpu") -> Training:
        """The run that :meth:`save` wrote.

        Args:
            read: reads the pieces of a recipe, the same as for the run's beginning.

        Raises:
            ValueError: naming the file, if it is not a whole checkpoint of a run, or the pieces are others.
        """
        tensors, about = checkpoint.load(path, KIND)
        config, vocabulary, recipe = description(path, about)
        run = cls(config, recipe, vocabulary, read(recipe), device=device)
        if about.get("fingerprint") != run.fingerprint:
            raise ValueError(f"{path}: was trained on other pieces than those that are there now")
        checkpoint.load_weights(path, run.model, checkpoint.part(tensors, "model"))
        checkpoint.load_weights(path, run.average, checkpoint.part(tensors, "average"))
        checkpoint.load_optimizer(path, run.model, run.optimizer, checkpoint.part(tensors, "optimizer"))
        try:
            torch.set_rng_state(tensors["random.torch"])
            run.generator.set_state(tensors["random.data"])
            if run.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], run.device)
            run.step = int(about["step"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: its random state or step is damaged ({error})") from error
        return run

    def save(self, path: Path) -> None:
        tensors = {
            **checkpoint.prefixed(self.model.state_dict(), "model"),
            **checkpoint.prefixed(self.average.state_dict(), "average"),
            **checkpoint.prefixed(checkpoint.optimizer_tensors(self.model, self.optimizer), "optimizer"),
            "random.torch": torch.get_rng_state(),
            "random.data": self.generator.get_state(),
        }
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        about = {
            "step": self.step,
            "config": asdict(self.config),
            "vocabulary": asdict(self.vocabulary),
            "recipe": asdict(self.recipe),
            "fingerprint": self.fingerprint,
            "corpus": None if self.corpus is None else asdict(self.corpus),
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
            loss = self.accumulate()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            check_finite("norm of the gradients", norm.item(), self.step)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.step += 1
            held_out = None
            if self.step % self.recipe.evaluate == 0 or self.step == steps:
                held_out = self.evaluate()
                check_finite("held-out loss", held_out, self.step)
            yield self._progress(loss, rate, held_out)

    def accumulate(self) -> float:
        """Add up the gradients of a step, a part of its batch at a time; the mean of their losses."""
        parts, total = self.recipe.accumulate, 0.0
        for part in next(self.excerpts).chunks(self.recipe.batch // parts):
            tokens, places = part.to(self.device)
            with self._precision():
                loss = bits_per_token(self.model, tokens, places) / parts
            check_finite("loss", loss.item(), self.step)
            loss.backward()
            total += loss.item()
        return total

    def _precision(self) -> torch.autocast:
        """Weights stay float32; what is computed with them is in the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _progress(self, loss: float, rate: float, held_out: float | None) -> Progress:
        scalars = {"bits per token/training": loss, "learning rate": rate}
        said = None
        if held_out is not None:
            self.last_held_out = scalars["bits per token/held out"] = held_out
            scalars["bits per token/held out, bigrams"] = self.bigram_held_out
            bigrams = f"bigrams {self.bigram_held_out:.3f}"
            said = f"step {self.step}: {loss:.3f} bits per token, held out {held_out:.3f} ({bigrams})"
        shown = "" if self.last_held_out is None else f", held out {self.last_held_out:.3f}"
        return Progress(self.step, scalars, f"{loss:.3f} bits per token{shown}", said)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per token of the held-out pieces, by the averaged weights."""
        total = 0.0
        for part in self.held_out.chunks(self.recipe.batch // self.recipe.accumulate):
            tokens, places = part.to(self.device)
            with self._precision():
                total += bits_per_token(self.average, tokens, places).item() * len(tokens)
        return total / len(self.held_out.tokens)

    @cached_property
    def bigram_held_out(self) -> float:
        """Bits per token of the same held-out excerpts by bigrams of the pieces to train on, in the same keys."""
        keys = KEYS if self.recipe.transpose else range(1)
        return Bigram(self.pieces, self.vocabulary, keys).bits_per_token(self.held_out.tokens)


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential moving average that looks back no further than training goes: early on its decay is smaller."""

    def update(averages: Any, weights: Any, updates: Any) -> None:
        done = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, weights, updates)

    return update


class Trained(NamedTuple):
    """A trained model, ready to sample from, and the statistics of what it learned from; None if that is all drums."""

    model: MuseNet
    vocabulary: Vocabulary
    corpus: Statistics | None


def load_model(path: Path) -> Trained:
    """A checkpoint's model, with its averaged weights.

    Raises:
        ValueError: naming the file, if it is not a whole checkpoint of a MuseNet.
    """
    tensors, about = checkpoint.load(path, KIND)
    config, vocabulary, _ = description(path, about)
    try:
        corpus = about["corpus"] and Statistics(**about["corpus"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its description is not one of a MuseNet ({error})") from error
    model = MuseNet(config)
    checkpoint.load_weights(path, model, checkpoint.part(tensors, "average.module"))
    return Trained(model.eval(), vocabulary, corpus)


def description(path: Path, about: dict[str, Any]) -> tuple[Config, Vocabulary, Recipe]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: naming the file, if that is not what this version of the program writes.
    """
    try:
        words: dict[str, Any] = about["vocabulary"]
        words = {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
        config, vocabulary, recipe = Config(**about["config"]), Vocabulary(**words), Recipe(**about["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its description is not one of a MuseNet ({error})") from error
    if config.vocabulary != len(vocabulary):
        raise ValueError(f"{path}: its model has {config.vocabulary} tokens and its vocabulary {len(vocabulary)}")
    return config, vocabulary, recipe
