"""Pictures of images: grids, and ways from one latent to another."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..atomic import replacing

#: Images are enlarged by a whole factor to about this many pixels, so that 16×16 can be looked at.
LEGIBLE = 64

#: Pixels of grey between images, before they are enlarged: else strokes run from one image into the next.
GAP = 1


def tiled(images: Tensor, columns: int) -> Tensor:
    """``(N, C, H, W)`` in [-1, 1] as one uint8 image, row by row, with :data:`GAP` between; what is left over is black.

    Returns:
        ``(C, rows * (H + GAP) - GAP, columns * (W + GAP) - GAP)``.

    Raises:
        ValueError: if ``images`` are not ``(N, 1 or 3, H, W)`` with at least one, or ``columns`` is less than 1.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (N, 1 or 3, H, W), at least one, got shape {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    pixels = images.new_zeros(rows * columns, channels, height + GAP, width + GAP)
    pixels[:, :, :height, :width] = -1
    pixels[:count, :, :height, :width] = images
    pixels = pixels.view(rows, columns, channels, height + GAP, width + GAP).permute(2, 0, 3, 1, 4)
    pixels = pixels.reshape(channels, rows * (height + GAP), columns * (width + GAP))[:, :-GAP, :-GAP]
    return (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu()


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """A PNG of images, ``columns`` to a row, enlarged to be legible. ``path`` is the old file or the whole new one."""
    write_pixels(path, tiled(images, columns), max(1, LEGIBLE // images.shape[-1]))


def write_pixels(path: Path, pixels: Tensor, factor: int) -> None:
    """A PNG of uint8 ``(1 or 3, H, W)``, each pixel a square of ``factor``."""
    channels, height, width = pixels.shape
    data = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    picture = Image.frombytes("L" if channels == 1 else "RGB", (width, height), data)
    with replacing(path) as temporary:
        picture.resize((width * factor, height * factor), Image.Resampling.NEAREST).save(temporary, "PNG")


def between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Latents on the great circle from each of ``first`` to its partner in ``last``, both ``(N, Z)``.

    ``(N * steps, Z)``, those of a pair together, with both ends. A straight line would leave the shell on which nearly
    all normal vectors lie; the length goes evenly from one end's to the other's.
    """
    a, b = (latents / latents.norm(dim=1, keepdim=True) for latents in (first, last))
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos().clamp_min(1e-6)[:, None]  # [N, 1, 1]
    t = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype)[:, None]  # [steps, 1]
    directions = (((1 - t) * angle).sin() * a[:, None] + (t * angle).sin() * b[:, None]) / angle.sin()
    lengths = torch.lerp(first.norm(dim=1)[:, None, None], last.norm(dim=1)[:, None, None], t)
    return (directions * lengths).flatten(0, 1)
