"""BERT and GPT-2 as :mod:`benchmarks.model_cases` wants them: a sequence of text as long as the table of positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from models.compare import Problem
from models.language import Shape

from .model_cases import Variant

ShapeT = TypeVar("ShapeT", bound=Shape)


def variant(build: Callable[[ShapeT, torch.dtype, str], Problem], config: ShapeT) -> Variant:
    """Without dropout: the sides would have to draw the same. Sparse attention is asked to need less memory."""
    config = replace(config, dropout=0.0, attention_dropout=0.0)
    n = config.context
    return Variant(
        f"{n} bytes, {config.patterns()}",
        f"{config.layers} layers, {config.heads} heads, width {config.width}, {config.patterns()} attention",
        partial(build, config),
        left_out=sum(
            (n**2 - layout.kept_pairs() // layout.heads) * config.width for layout in config.layouts(n)
        ),
        less_memory=config.attention is not None,
    )  # fmt: skip
