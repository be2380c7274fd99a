"""StyleGAN's epilogue at the shapes of StyleGAN-1024's generator, with noise that is given, as its rivals need it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation
from gdl_kernels.ops.style_epilogue import reference

from ..cases import COMPILED, EAGER, OURS, Case, Contestant, Function, Inputs, Task, dtypes
from ..ceilings import memory_copy
from ..images import BACKWARD, FORWARD, ImageOp, case, is_of, over, pixels
from ..results import Bar, Result
from . import adain
from .adain import CHANNELS, IMAGES, sizes

#: All of StyleGAN-1024's layers: two at each size.
SYNTHESIS = "synthesis, 18 epilogues"
LAYERS = [(IMAGES, channels, size, size) for size, channels in {4: 512, 8: 512, **CHANNELS}.items()]


def _plain(x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    return reference.style_epilogue(x, scale, bias, noise, weight, channel, 0.2, 1e-8)


def _ours(x: Tensor, scale: Tensor, bias: Tensor, noise: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    return gdl_kernels.style_epilogue(x, scale, bias, noise=noise, noise_weight=weight, channel_bias=channel)


def _explain(x: Tensor, scale: Tensor, bias: Tensor, *_: Tensor) -> Explanation:
    return gdl_kernels.explain("style_epilogue", x, scale, bias)


#: Forward: noise (* +), bias (+), leaky ReLU (a comparison and *), then adain's. Backward: the first five again,
#: adain's, the leaky ReLU's (*), and the sums for the gradients of bias (+), noise (* +) and its weight (* +).
OPERATIONS = (5 + adain.OPERATIONS[0], 5 + adain.OPERATIONS[1] + 6)
OP = ImageOp("style_epilogue", _ours, _plain, OPERATIONS, explain=_explain)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for size, channels in sizes(device, quick).items():
        planes = IMAGES, channels
        shapes = [(*planes, size, size), planes, planes, (IMAGES, 1, size, size), (channels,), (channels,)]
        for dtype in dtypes(device, quick):
            for passes in (FORWARD, BACKWARD):
                drawn = case(OP, shapes, dtype, device, passes, quick=quick)
                yield replace(drawn, inputs=functools.partial(_exact, drawn.inputs))

    if not quick or device.type == "cuda":
        yield synthesis(device)


def _exact(inputs: Callable[[torch.Generator], Inputs], generator: torch.Generator) -> Inputs:
    """Rounded inputs, whose sum before the leaky ReLU is exact, and in float32 never 0.

    Its gradient jumps there. Of 67 million numbers some come so near that rounding would decide on which side they are,
    and whose rounding was luckier would decide which gradient is right.
    """
    x, scale, bias, noise, weight, channel, *grad = inputs(generator)
    odd = ((x.float() * 256).floor() + 0.5) / 256
    noise, weight = (((t.float() * 16).round() / 16).to(x.dtype) for t in (noise, weight))
    return odd.to(x.dtype), scale, bias, noise, weight, ((channel.float() * 256).round() / 256).to(x.dtype), *grad


def synthesis(device: torch.device) -> Case:
    """Every epilogue of one pass of the generator. The two of a size read the same image, which fills the caches."""
    image = sum(map(math.prod, LAYERS))
    function = _layers(_plain)
    task = Task(function, function, flops=2.0 * image * OPERATIONS[0], bytes=2.0 * 2 * image * 4)
    return Case(
        name=f"{SYNTHESIS}, fp32",
        shape=f"{IMAGES} images, 4² to 1024², {2 * image * 4 / 1e6:.0f} MB read",
        dtype=torch.float32,
        device=device,
        inputs=_layer_inputs,
        task=task,
        contestants=[
            Contestant(EAGER, function),
            Contestant(COMPILED, torch.compile(function, dynamic=False)),
            Contestant(OURS, _layers(_ours), explain=_explain),
        ],
        ceiling=memory_copy(2 * image * 4, 1),
        input_sets=1,
    )


def _layers(epilogue: Function) -> Function:
    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        layers = [tensors[i : i + 6] for i in range(0, len(tensors), 6)]
        return tuple(epilogue(*layer) for layer in layers for _ in range(2))  # type: ignore[misc]

    return outputs


def _layer_inputs(generator: torch.Generator) -> Inputs:
    shapes = []
    for images, channels, *size in LAYERS:
        planes = images, channels
        shapes += [(*planes, *size), planes, planes, (images, 1, *size), (channels,), (channels,)]
    return tuple(torch.randn(shape, generator=generator, device=generator.device) for shape in shapes)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if result.case.startswith(SYNTHESIS):
            asked.append(over(result, EAGER, 3.0))
        elif is_of(result, BACKWARD):
            asked.append(over(result, EAGER, 5.0))
        elif pixels(result) >= 64**2:
            asked += [over(result, EAGER, 15.0), over(result, COMPILED, 3.0)]
    return asked
