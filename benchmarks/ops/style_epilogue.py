"""StyleGAN's epilogue at the shapes of StyleGAN-1024's generator, with noise that is given, as its rivals need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation
from gdl_kernels.ops.style_epilogue import reference

from ..cases import Case
from ..images import BACKWARD, COMPILED, EAGER, FORWARD, ImageOp, case, is_of, over, pixels
from ..results import Bar, Result
from .adain import IMAGES, sizes


def _plain(x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    return reference.style_epilogue(x, scale, bias, noise, weight, channel, 0.2, 1e-8)


def _ours(x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    return gdl_kernels.style_epilogue(x, scale, bias, noise=noise, noise_weight=weight, channel_bias=channel)


def _explain(x: Tensor, scale: Tensor, bias: Tensor, *_: Tensor) -> Explanation:
    return gdl_kernels.explain("style_epilogue", x, scale, bias)


OP = ImageOp("style_epilogue", _ours, _plain, explain=_explain)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for size, channels in sizes(quick).items():
        planes = IMAGES, channels
        shapes = [(*planes, size, size), planes, planes, (IMAGES, 1, size, size), (channels,), (channels,)]
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            for passes in (FORWARD, BACKWARD):
                yield case(OP, shapes, dtype, device, passes)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if is_of(result, BACKWARD):
            asked.append(over(result, EAGER, 5.0))
        elif pixels(result) >= 64**2:
            asked += [over(result, EAGER, 15.0), over(result, COMPILED, 3.0)]
    return asked
