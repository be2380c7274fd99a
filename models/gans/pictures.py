"""What ``sample`` draws: samples, ways from one sample to another, and truncation from strong to none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .grids import between
from .model import Gan

#: Samples are made so many at a time.
AT_ONCE = 64

#: Of a truncation sweep, strongest first.
TRUNCATIONS = (0.1, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Request:
    """What was asked of ``sample``.

    Attributes:
        rows, columns: of the picture.
        label: the one class to draw; None draws all of them, a column each.
        truncation: None truncates nothing.
    """

    rows: int
    columns: int
    label: int | None
    truncation: float | None
    seed: int


#: Draws a request as images and how many there are to a row.
Picture = Callable[[Gan, Request], tuple[Tensor, int]]


@torch.no_grad()
def drawn(
    gan: Gan, generator: nn.Module, latents: Tensor, labels: Tensor | None, *, truncation: float | None = None
) -> Tensor:
    """Images ``(N, C, H, W)``, on the CPU, of a settled generator."""
    device = next(generator.parameters()).device
    found = []
    for start in range(0, len(latents), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        classes = None if labels is None else labels[part].to(device)
        found.append(gan.generate(generator, latents[part].to(device), classes, truncation=truncation).float().cpu())
    return torch.cat(found)


def samples_shape(classes: int) -> tuple[int, int]:
    """How many samples a grid has, and how many to a row: a column for each of the first ten classes."""
    columns = min(classes, 10) if classes else 8
    return 8 * columns, columns


def ordered(count: int, classes: int, columns: int | None = None) -> Tensor | None:
    """Classes ``(count,)`` for a grid, a column each; None where a model knows none."""
    if not classes:
        return None
    return torch.arange(count) % (columns or min(classes, 10)) % classes


def samples(gan: Gan, request: Request) -> tuple[Tensor, int]:
    """Random samples."""
    random = torch.Generator().manual_seed(request.seed)
    count = request.rows * request.columns
    latents = gan.latents(count, truncation=request.truncation, generator=random)
    gan.settle(gan.generator, truncation=request.truncation, seed=request.seed)
    labels = _labels(gan, request, torch.arange(count) % request.columns)
    return drawn(gan, gan.generator, latents, labels, truncation=request.truncation), request.columns


def interpolation(gan: Gan, request: Request) -> tuple[Tensor, int]:
    """In each row the way from one latent to another, of one class."""
    random = torch.Generator().manual_seed(request.seed)
    ends = gan.latents(2 * request.rows, truncation=request.truncation, generator=random)
    latents = between(ends[: request.rows], ends[request.rows :], request.columns)
    gan.settle(gan.generator, truncation=request.truncation, seed=request.seed)
    labels = _labels(gan, request, torch.arange(request.rows).repeat_interleave(request.columns))
    return drawn(gan, gan.generator, latents, labels, truncation=request.truncation), request.columns


def truncation_sweep(gan: Gan, request: Request, *, truncations: Sequence[float] = TRUNCATIONS) -> tuple[Tensor, int]:
    """A row for each of ``truncations``, each of the same seed."""
    rows = []
    for truncation in truncations:
        random = torch.Generator().manual_seed(request.seed)
        latents = gan.latents(request.columns, truncation=truncation, generator=random)
        gan.settle(gan.generator, truncation=truncation, seed=request.seed)
        labels = _labels(gan, request, torch.arange(request.columns))
        rows.append(drawn(gan, gan.generator, latents, labels, truncation=truncation))
    return torch.cat(rows), request.columns


def _labels(gan: Gan, request: Request, places: Tensor) -> Tensor | None:
    """The asked class everywhere, or the classes in turn by ``places``."""
    if not gan.config.classes:
        return None
    return places % gan.config.classes if request.label is None else torch.full_like(places, request.label)
