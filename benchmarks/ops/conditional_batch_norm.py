"""Conditional batch norm in training, at the shapes of BigGAN's generator, against F.batch_norm, gain and bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation

from ..cases import Case, dtypes
from ..images import BACKWARD, FORWARD, TRAINING, ImageOp, case, copies, is_of, pixels
from ..results import Bar, Result
from . import adain


def ours(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return gdl_kernels.conditional_batch_norm(x, gain, bias, None, None, training=True)


def explain(x: Tensor, gain: Tensor, bias: Tensor) -> Explanation:
    return gdl_kernels.explain("conditional_batch_norm", x, gain, bias, None, None, training=True)


def batch_norm_then_gain_and_bias(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    y = F.batch_norm(x, None, None, training=True)
    return y * gain[..., None, None] + bias[..., None, None]


#: Adain's operations, with the statistics of a channel of all images.
OP = ImageOp("conditional_batch_norm", ours, batch_norm_then_gain_and_bias, adain.OPERATIONS, explain)

#: Images in a minibatch, channels, and how many pixels wide: BigGAN-128's generator at width 96, with as many images as
#: fit in about 100 MB.
SIZES = (
    (32, 1536, 4),
    (32, 1536, 8),
    (32, 768, 16),
    (32, 384, 32),
    (16, 192, 64),
    (8, 96, 128),
)
QUICK_SIZES = (SIZES[4],)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for passes in (FORWARD, TRAINING) if quick else (FORWARD, BACKWARD, TRAINING):
        for dtype in dtypes(device, quick):
            for images, channels, width in QUICK_SIZES if quick else SIZES:
                yield case(OP, _shapes(images, channels, width), dtype, device, passes, quick=quick)
    if not quick:
        for passes in (FORWARD, TRAINING):
            for dtype in (torch.float32, torch.bfloat16):
                yield case(OP, _shapes(16, 192, 64), dtype, device, passes, channels_last=True)


def _shapes(images: int, channels: int, width: int) -> list[tuple[int, ...]]:
    return [(images, channels, width, width), (images, channels), (images, channels)]


def bars(results: Sequence[Result]) -> list[Bar]:
    # Two walks through the image at least: all rivals wait for the same memory, so it is what is measured against.
    large = (result for result in results if is_of(result, FORWARD) and pixels(result) >= 64**2)
    return [copies(result, 2.5) for result in large]
