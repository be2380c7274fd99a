"""What ``sample`` draws of StyleGAN besides what it draws of all: mixed styles, and what noise alone changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gans.model import Gan
from ..gans.pictures import Request
from .model import Generator, Stylegan, layers_at, mix

#: Where the paper's coarse (4×4 and 8×8), middle (16×16 and 32×32) and fine styles begin.
PAPER_BANDS = (0, 4, 8)


def bands(resolution: int) -> list[tuple[int, int]]:
    """First layer and end of coarse, middle and fine styles; below 64×64, every resolution's two layers."""
    layers = layers_at(resolution)
    starts = PAPER_BANDS if resolution >= 64 else range(0, layers, 2)
    return list(zip(starts, [*starts[1:], layers]))


@torch.no_grad()
def style_mixing(gan: Gan, request: Request) -> tuple[Tensor, int]:
    """Styles of one sample in another. The first row has the samples that give styles, the first column those that take
    them; there are ``rows`` of these for coarse styles given, then as many for middle and for fine ones."""
    generator, styles = _settled(gan, request, request.columns + request.rows)
    resolution, alpha = gan.stage.resolution, gan.stage.alpha
    noise = generator.noise(1, resolution, generator=torch.Generator().manual_seed(request.seed))

    def images(styles: Tensor) -> Tensor:
        return generator.synthesis(styles, alpha, noise).float().cpu()

    given, taking = styles.split([request.columns, request.rows])
    blank = torch.full((1, gan.config.channels, resolution, resolution), -1.0)
    found = [blank, images(given)]
    for first, end in bands(resolution):
        for taker in taking:
            takers = taker.expand_as(given)
            found += [images(taker[None]), images(mix(takers, given, first, end))]
    return torch.cat(found), request.columns + 1


@torch.no_grad()
def noise(gan: Gan, request: Request) -> tuple[Tensor, int]:
    """In each row one style with other noise in every column; the last shows where they differ, white the most."""
    generator, styles = _settled(gan, request, request.rows)
    found = []
    for row in styles:
        varied = generator.synthesis(row.expand(request.columns, -1, -1), gan.stage.alpha).float().cpu()
        deviation = varied.std(0, correction=0, keepdim=True)
        found += [varied, 2 * deviation / deviation.max().clamp_min(1e-6) - 1]
    return torch.cat(found), request.columns + 1


def _settled(gan: Gan, request: Request, count: int) -> tuple[Generator, Tensor]:
    """The generator, and the styles of random latents, truncated as was asked."""
    assert isinstance(gan, Stylegan)
    generator = gan.generator.eval()
    latents = gan.latents(count, generator=torch.Generator().manual_seed(request.seed))
    styles = generator.styles(latents.to(generator.mean_style), gan.stage.resolution)
    return generator, styles if request.truncation is None else generator.truncated(styles, request.truncation)
