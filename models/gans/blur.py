"""The filter [1, 2, 1] of StyleGAN (arXiv 1812.04948, section 2): it replaces nearest neighbours by linear slopes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Blur(nn.Module):
    """``[1, 2, 1] / 4`` along both sides of every plane, with zeros around it; images keep their size.

    A depthwise convolution, so it can be differentiated without limit.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", line[:, None] * line, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), padding=1, groups=channels)
