"""How well a model harmonises melodies that it has not learnt from, beside rules that need no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .decoding import beam_search, greedy
from .harmony import END, PAD, START, Baseline, Batch, Harmony, begins, padded, pitches
from .model import Transformer

#: Lines that a model sees side by side: they are sorted by length, so that little of it is padding.
_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Agreement:
    """How often pitches are those of Bach's bass, as shares.

    Attributes:
        sounding: of the steps at which his bass sounds.
        begun: of those at which a note of it begins.
    """

    sounding: float
    begun: float

    @classmethod
    def of(cls, found: Sequence[Tensor], harmonies: Sequence[Harmony]) -> Agreement:
        """``found`` are pitches, int64 ``(steps,)`` each; where one is too short its last steps are wrong."""
        right, total = torch.zeros(2), torch.zeros(2)
        for line, harmony in zip(found, harmonies):
            bach = pitches(harmony.bass)
            same = F.pad(line, (0, len(bach) - len(line))) == bach
            for measure, counted in enumerate((bach > 0, begins(harmony.bass))):
                right[measure] += (same & counted).sum()
                total[measure] += counted.sum()
        return cls(*(right / total).tolist())


@dataclass(frozen=True)
class NextTokens:
    """How well each token of Bach's bass is foretold, given the melody and Bach's own bass before it.

    Attributes:
        bits: mean of -log2 p.
        right: share of tokens that are the likeliest, the one that ends a line included.
        pitches: of each bass, those of the likeliest tokens.
    """

    bits: float
    right: float
    pitches: list[Tensor]


@torch.no_grad()
def next_tokens(model: Transformer, harmonies: Sequence[Harmony]) -> NextTokens:
    """``model`` is in evaluation mode."""
    nats, right, total = 0.0, 0, 0
    likeliest: dict[int, Tensor] = {}
    for part in _by_length([harmony.melody for harmony in harmonies]):
        batch = Batch.of([harmonies[place] for place in part])
        logits = model(batch.source, batch.target, batch.padding)
        nats += float(F.cross_entropy(logits.mT, batch.following, ignore_index=PAD, reduction="sum"))
        found, counted = logits.argmax(-1), batch.following != PAD
        right += int(((found == batch.following) & counted).sum())
        total += int(counted.sum())
        likeliest |= {place: pitches(line[: len(harmonies[place].bass)]) for place, line in zip(part, found)}
    return NextTokens(nats / math.log(2) / total, right / total, [likeliest[place] for place in range(len(harmonies))])


@torch.no_grad()
def harmonise(model: Transformer, melodies: Sequence[Tensor], *, beams: int, alpha: float) -> list[Tensor]:
    """A bass for each melody, written by the model alone: int64 tokens, at most as many as the melody's.

    Args:
        melodies: int64 ``(steps,)`` each, at least one step.
        beams, alpha: of :func:`~.decoding.beam_search`; one beam takes the likeliest token each time.

    Raises:
        ValueError: as :func:`~.decoding.beam_search` does.
    """
    basses: dict[int, Tensor] = {}
    for part in _by_length(melodies):
        source = padded([melodies[place] for place in part])
        longest = source.shape[1] + 1
        found: list[list[int]]
        if beams == 1:
            found = greedy(
                model, source, start=START, end=END, max_length=longest, padding=source == PAD, forbidden=(PAD, START)
            )
        else:
            searched = beam_search(
                model, source, start=START, end=END, max_length=longest, padding=source == PAD, forbidden=(PAD, START),
                beams=beams, alpha=alpha,
            )  # fmt: skip
            found = [hypotheses[0].tokens for hypotheses in searched]
        for place, tokens in zip(part, found):
            basses[place] = torch.tensor(tokens[: len(melodies[place])], dtype=torch.int64)
    return [basses[place] for place in range(len(melodies))]


def measure(
    model: Transformer, training: Sequence[Harmony], held_out: Sequence[Harmony], *, beams: int, alpha: float
) -> tuple[NextTokens, dict[str, Agreement]]:
    """A model on held-out harmonies, beside baselines that are fit on those for training.

    The model writes alone, from the melody and what it has written itself; the last two rows are given Bach's bass up
    to the step in question. ``model`` is in evaluation mode.
    """
    melodies, basses = [harmony.melody for harmony in held_out], [pitches(harmony.bass) for harmony in held_out]
    forced = next_tokens(model, held_out)
    rows: dict[str, list[Tensor]] = {}
    rows["the most frequent bass note, always"] = list(map(Baseline(training, given_melody=False), melodies))
    rows["the most frequent under each melody note"] = list(map(Baseline(training, given_melody=True), melodies))
    for count in (1, beams):
        found = harmonise(model, melodies, beams=count, alpha=alpha)
        rows[f"the model alone, {'greedy' if count == 1 else f'{count} beams'}"] = list(map(pitches, found))
    rows["given Bach's bass so far: it stays as it was"] = [F.pad(bass, (1, -1)) for bass in basses]
    rows["given Bach's bass so far: the model"] = forced.pitches
    return forced, {name: Agreement.of(found, held_out) for name, found in rows.items()}


def _by_length(lines: Sequence[Tensor]) -> list[list[int]]:
    """Places of the lines, those of like length together."""
    order = sorted(range(len(lines)), key=lambda place: len(lines[place]))
    return [order[first : first + _SIDE_BY_SIDE] for first in range(0, len(order), _SIDE_BY_SIDE)]
