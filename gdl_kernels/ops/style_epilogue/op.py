"""The epilogue as torch knows it: the op of :mod:`gdl_kernels.ops.adain` with what comes before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import _backends, _images
from ..adain.op import forward, parameters

__all__ = ["choices", "forward", "parameters"]


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, planes of one piece and of several, noise that is given and shared.

    Noise that is drawn is float32's on every backend, which float64 would tell apart. Large planes are many: a bias's
    gradient is a sum over a plane that cancels, and of three such plain PyTorch may hit all by luck.
    """
    for name, shape in (("a tile", (2, 32, 32, 32)), ("odd sizes", (3, 19, 7, 9)), ("large planes", (1, 24, 80, 70))):
        images, channels, height, width = shape
        x, scale, bias = torch.randn(shape), torch.randn(images, channels), torch.randn(images, channels)
        noise, weights = torch.randn(images, 1, height, width), torch.randn(2, channels)
        given = {"noise": noise, "noise_weight": weights[0], "channel_bias": weights[1]}
        for what, kwargs in (
            ("", given),
            (", shared noise", {**given, "noise": noise[:1]}),
        ):
            leaves = {key: value.clone().requires_grad_() for key, value in kwargs.items()}
            args = tuple(t.clone().requires_grad_() for t in (x, scale, bias))
            yield _backends.Example(name + what, args, leaves)
        last = x.clone(memory_format=torch.channels_last).requires_grad_()
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
        yield _backends.Example(f"{name}, channels last", (last, scale.requires_grad_(), bias.requires_grad_()), leaves)


choices = _backends.add_op("style_epilogue", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples)
