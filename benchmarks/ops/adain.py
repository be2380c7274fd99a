"""AdaIN at the shapes of StyleGAN-1024's generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import gdl_kernels
from gdl_kernels.ops.adain import reference

from ..cases import COMPILED, EAGER, Case, dtypes
from ..images import (
    BACKWARD,
    BATCHES,
    FORWARD,
    QUICK_BATCHES,
    QUICK_SIDES,
    SIDES,
    ImageOp,
    case,
    copies,
    grown,
    is_of,
    over,
    pixels,
)
from ..results import Bar, Result

#: Forward: the mean (+), the squares of what is left (- * +), scale and bias (* +). Backward: the sum of the gradient
#: (+), that of its product with what is left (- * +), and multiples of the gradient, of x and of 1 (* * + +).
OPERATIONS = (6, 8)
OP = ImageOp("adain", gdl_kernels.adain, lambda x, scale, bias: reference.adain(x, scale, bias, 1e-5), OPERATIONS)

#: Images a GPU, and the channels at each size. An early layer is smaller than a cache, and measures what a call costs.
IMAGES = 4
CHANNELS = {16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


def sizes(device: torch.device, quick: bool) -> dict[int, int]:
    some = (64, 1024) if device.type == "cuda" else (64,)
    return {size: CHANNELS[size] for size in some} if quick else CHANNELS


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for size, channels in sizes(device, quick).items():
        image, planes = (IMAGES, channels, size, size), (IMAGES, channels)
        for dtype in dtypes(device, quick):
            for passes in (FORWARD, BACKWARD):
                yield case(OP, [image, planes, planes], dtype, device, passes, quick=quick)
        if not quick:
            yield case(OP, [image, planes, planes], torch.float32, device, FORWARD, channels_last=True)
    for batch in QUICK_BATCHES if quick else BATCHES:
        yield grown(_point(batch, 64, device), "batch", batch)
    for side in QUICK_SIDES if quick else SIDES:
        yield grown(_point(IMAGES, side, device), "pixels", side**2)


def _point(batch: int, side: int, device: torch.device) -> Case:
    channels = 64
    planes = (batch, channels)
    return case(OP, [(batch, channels, side, side), planes, planes], torch.float32, device, FORWARD)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if is_of(result, BACKWARD):
            asked.append(over(result, EAGER, 5.0))
        elif is_of(result, FORWARD) and pixels(result) >= 64**2:
            asked += [over(result, EAGER, 10.0), over(result, COMPILED, 3.0), copies(result, 2.5)]
    return asked
