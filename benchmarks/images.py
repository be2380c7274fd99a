"""Cases for ops of images: ours against the formula in plain PyTorch, eager and compiled, and one copy of the image.

A benchmark of such an op names the op once, and then gets a case for each shape, dtype and passes:

    OP = ImageOp("adain", gdl_kernels.adain, reference.adain, operations=(6, 8))

    def cases(device, quick):
        for n, c, size in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                for passes in (FORWARD, TRAINING):
                    yield case(OP, [(n, c, size, size), (n, c), (n, c)], dtype, device, passes, quick=quick)

    def bars(results):
        for result in results:
            if is_of(result, FORWARD) and pixels(result) >= 64**2:
                asked += [over(result, COMPILED, 3.0), copies(result, 2.5)]

All inputs are drawn and differentiated. What is neither, such as running statistics, the two functions close over.
Where the public function is called with more than the inputs, ``explain`` is given as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import gdl_kernels
from gdl_kernels._backends import Explanation

from .cases import COMPILED, EAGER, OURS, Case, Function, Inputs, Task, short
from .ceilings import memory_copy
from .passes import Passes
from .results import Bar, Result

FORWARD = Passes("forward", forward=True, backward=False)
BACKWARD = Passes("backward", forward=False, backward=True)
TRAINING = Passes("forward+backward", forward=True, backward=True)

#: The points of a curve over the batch, and of one over the resolution: the side of a map.
BATCHES, SIDES = (1, 2, 4, 8, 16, 32), (16, 32, 64, 128, 256)
QUICK_BATCHES, QUICK_SIDES = (1, 4, 16), (16, 32, 64)

#: What the images of all input sets come to: more than a CPU's caches hold.
ROTATED_BYTES = 64e6

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImageOp:
    """An op whose first input is an image ``(N, C, *spatial)``.

    Attributes:
        name: of the public function.
        ours: the public function, or a call of it, of the inputs.
        reference: the same in plain PyTorch, of the same inputs in any dtype.
        operations: of a forward and of a backward pass for each element of the image: additions and subtractions,
            multiplications and comparisons, one each. Roots, divisions and what else is done once a plane, a pixel or a
            group are left out, and in the backward pass what the forward pass can keep of that kind.
        explain: of the inputs; ``gdl_kernels.explain(name, *inputs)`` unless it is given.
        added_channels: by how many the output has more than the image.
    """

    name: str
    ours: Function
    reference: Function
    operations: tuple[int, int]
    explain: Callable[..., Explanation] | None = None
    added_channels: int = 0


def case(
    op: ImageOp,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    passes: Passes,
    *,
    channels_last: bool = False,
    quick: bool = False,
) -> Case:
    """One case; its name begins with that of its passes. ``shapes`` are those of the inputs, the image's first.

    The backward pass alone has no compiled rival: compiled code forbids a second walk through its graph. Nor has a
    quick case with a backward pass, for compiling takes longer than all that is measured there.
    """
    n, channels, *spatial = shapes[0]
    output = (n, channels + op.added_channels, *spatial)
    drawn = [*shapes, output] if passes.backward else shapes
    read, written = math.fsum(map(math.prod, shapes)), math.prod(output)
    moved = passes.forward * (read + written) + passes.backward * (2 * read + written)
    operations = passes.forward * op.operations[0] + passes.backward * op.operations[1]
    image = math.prod(shapes[0]) * dtype.itemsize
    input_sets = max(2, math.ceil(ROTATED_BYTES / image))
    contestants = [passes.contestant(EAGER, op.reference)]
    if compiles(passes, quick):
        contestants.append(passes.contestant(COMPILED, torch.compile(op.reference, dynamic=False)))
    explain = op.explain or functools.partial(gdl_kernels.explain, op.name)
    contestants.append(
        replace(passes.contestant(OURS, op.ours), explain=lambda *inputs: explain(*inputs[: len(shapes)]))
    )
    size = "×".join(map(str, shapes[0]))
    function = passes.of(op.reference)
    return Case(
        name=f"{passes.name}, {size}, {short(dtype)}{', channels last' if channels_last else ''}",
        shape=f"{image / 1e6:.3g} MB; {input_sets} images in turn",
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, drawn, dtype, channels_last),
        task=Task(function, function, flops=operations * math.prod(shapes[0]), bytes=moved * dtype.itemsize),
        contestants=contestants,
        ceiling=memory_copy(image, input_sets),
        input_sets=input_sets,
    )


def _inputs(shapes: Sequence[Shape], dtype: torch.dtype, channels_last: bool, generator: torch.Generator) -> Inputs:
    drawn = (torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) for shape in shapes)
    if not channels_last:
        return tuple(drawn)
    return tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t for t in drawn)


def grown(point: Case, over: str, size: int) -> Case:
    """A case as a point of the curve over its batch or its resolution: eager and ours, with no bar."""
    kept = [contestant for contestant in point.contestants if contestant.name in (EAGER, OURS)]
    passes = point.name.partition(",")[0]
    return replace(
        point, name=f"growth over {over}, {point.name}", contestants=kept, growth=(f"{passes} over {over}", size)
    )


def compiles(passes: Passes, quick: bool) -> bool:
    """Whether torch.compile is among the contestants."""
    return passes.forward and not (quick and passes.backward)


def is_of(result: Result, passes: Passes) -> bool:
    return result.case.partition(", ")[0] == passes.name


def pixels(result: Result) -> int:
    """Of an image, by the name that :func:`case` gives."""
    _, _, *spatial = result.case.split(", ")[1].split("×")
    return math.prod(map(int, spatial))


def over(result: Result, rival: str, asked: float) -> Bar:
    """How many times as fast as a rival ours is."""
    return Bar(f"{result.case}: over {rival}", asked, result.speed_up(result.row(rival)))


def copies(result: Result, asked: float) -> Bar:
    """How much longer ours takes than a copy of as many bytes as it reads and writes: for a forward pass, the image."""
    share = result.share_of_ceiling(result.ours)
    return Bar(f"{result.case}: time over one copy", asked, None if share is None else 1 / share, at_most=True)
