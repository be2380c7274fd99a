"""Which backends serve it: it is made of the ops of :mod:`gdl_kernels.ops.adain`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import _backends, _images


def _examples() -> Iterator[_backends.Example]:
    """Both ways to lay out an image, and styles of another size."""
    for name, shape, size in (("a tile", (2, 32, 32, 32), (16, 16)), ("odd sizes", (3, 19, 7, 9), (80, 90))):
        content, style = torch.randn(shape), torch.randn(*shape[:2], *size)
        yield _backends.Example(name, (content.clone().requires_grad_(), style.clone().requires_grad_()))
        last = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in (content, style)]
        yield _backends.Example(f"{name}, channels last", tuple(last))


choices = _backends.add_op(
    "adain_from_style", {"cpu": _images.cpu_reasons, "cuda": _images.cuda_reasons}, _examples
)
