"""Pixel norm at the shapes of ProGAN's generator, against the formula in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

import gdl_kernels
from gdl_kernels.ops.pixel_norm import reference

from ..cases import COMPILED, EAGER, Case, dtypes
from ..images import BACKWARD, FORWARD, TRAINING, ImageOp, case, copies, is_of, over, pixels
from ..results import Bar, Result

#: Forward: the sum of squares (* +), and the scaling (*). Backward: the sum of the gradient's product with x (* +), and
#: multiples of both (* * +).
OPERATIONS = (3, 5)
OP = ImageOp("pixel_norm", gdl_kernels.pixel_norm, functools.partial(reference.pixel_norm, eps=1e-8), OPERATIONS)

#: Images in a minibatch, channels, and how many pixels wide: after every convolution of the generator.
SIZES = (
    (16, 512, 4),
    (16, 512, 8),
    (16, 512, 16),
    (16, 512, 32),
    (8, 256, 64),
    (8, 128, 128),
    (4, 64, 256),
    (4, 32, 512),
    (4, 16, 1024),
)
#: On a CPU, and on a GPU, which the first would leave idle.
QUICK_SIZES = {"cpu": SIZES[4:5], "cuda": SIZES[5:6]}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for passes in (FORWARD, TRAINING) if quick else (FORWARD, BACKWARD, TRAINING):
        for dtype in dtypes(device, quick):
            for images, channels, width in QUICK_SIZES[device.type] if quick else SIZES:
                yield case(OP, [(images, channels, width, width)], dtype, device, passes, quick=quick)
    if not quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield case(OP, [(8, 256, 64, 64)], dtype, device, FORWARD, channels_last=True)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if pixels(result) < 64**2:
            continue  # layers so small are a matter of microseconds
        if is_of(result, FORWARD):
            asked += [over(result, COMPILED, 3.0), copies(result, 2.5)]
        elif is_of(result, BACKWARD):
            asked.append(over(result, EAGER, 5.0))
    return asked
