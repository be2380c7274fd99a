"""Minibatch standard deviation as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.minibatch_stddev import minibatch_stddev


class MinibatchStdDev(nn.Module):
    """:func:`gdl_kernels.minibatch_stddev` as a layer: ``(N, C, *spatial)`` to ``(N, C + num_features, *spatial)``.

    No parameters. In ProGAN it stands before the discriminator's last block.
    """

    def __init__(self, group_size: int = 4, num_features: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.group_size, self.num_features, self.eps = group_size, num_features, eps

    def forward(self, x: Tensor) -> Tensor:
        return minibatch_stddev(x, group_size=self.group_size, num_features=self.num_features, eps=self.eps)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_features={self.num_features}, eps={self.eps}"
