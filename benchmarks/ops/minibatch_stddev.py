"""Minibatch standard deviation where ProGAN has it and on larger images, against the formula in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

import gdl_kernels
from gdl_kernels.ops.minibatch_stddev import reference

from ..cases import COMPILED, EAGER, Case, dtypes
from ..images import BACKWARD, FORWARD, TRAINING, ImageOp, case, copies, is_of, over
from ..results import Bar, Result

#: Forward: the mean of a group (+), and the squares of what is left (- * +). Backward: these again, for what they give
#: is as long as a quarter of the image, and the gradient and a multiple of what is left (* +).
OPERATIONS = (4, 6)
OP = ImageOp(
    "minibatch_stddev",
    gdl_kernels.minibatch_stddev,
    functools.partial(reference.minibatch_stddev, group_size=4, num_features=1, eps=1e-8),
    OPERATIONS,
    added_channels=1,
)

#: Images in a minibatch, channels, and how many pixels wide. ProGAN's is the first.
SIZES = ((16, 512, 4), (32, 512, 8), (16, 512, 16), (32, 256, 32), (16, 64, 64))
#: On a CPU, and on a GPU, which the first would leave idle.
QUICK_SIZES = {"cpu": SIZES[:1], "cuda": SIZES[3:4]}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for passes in (FORWARD, TRAINING) if quick else (FORWARD, BACKWARD, TRAINING):
        for dtype in dtypes(device, quick):
            for images, channels, width in QUICK_SIZES[device.type] if quick else SIZES:
                yield case(OP, [(images, channels, width, width)], dtype, device, passes, quick=quick)
    if not quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield case(OP, [(32, 256, 32, 32)], dtype, device, FORWARD, channels_last=True)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if is_of(result, FORWARD):
            asked += [over(result, COMPILED, 3.0), copies(result, 2.5)]
        elif is_of(result, BACKWARD):
            asked.append(over(result, EAGER, 5.0))
    return asked
