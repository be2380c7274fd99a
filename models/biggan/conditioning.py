"""How classes and noise reach the batch norms of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from gdl_kernels.nn import ConditionalBatchNorm2d

#: Gain, which is the whole factor, and bias of a batch norm: ``(N, C)`` each.
Affine = tuple[Tensor, Tensor]


def affines(norms: Sequence[ConditionalBatchNorm2d], condition: Tensor) -> list[Affine]:
    """Gains and biases of all norms that have the same condition, in one product.

    Each norm keeps its own two weights, with a spectral norm of their own; the product is with all of them on end. To
    join them costs a copy of ``2 C x condition`` numbers a norm, 9 MB for all of BigGAN-128, and saves a product for
    each.
    """
    weights: list[Any] = [layer.weight for norm in norms for layer in (norm.gain, norm.bias)]
    found = F.linear(condition, torch.cat(weights)).split([len(weight) for weight in weights], dim=1)
    return [(1 + gain, bias) for gain, bias in zip(found[::2], found[1::2])]


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm on our kernel: gain and bias are the same for each sample.

    ``process_group`` is what it is in :class:`gdl_kernels.nn.ConditionalBatchNorm2d`.
    """

    process_group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = self.num_batches_tracked.float().reciprocal()
        gain, bias = (parameter.expand(len(x), -1) for parameter in (self.weight, self.bias))
        return gdl_kernels.conditional_batch_norm(
            x, gain, bias, self.running_mean, self.running_var, training=self.training, momentum=momentum,
            eps=self.eps, process_group=self.process_group,
        )  # fmt: skip
