"""One model trained by several processes, each with its share of every batch: ``torchrun --nproc-per-node 8 -m ...``.

All ranks begin alike, draw the same latents and take their own part of them, and average their gradients. So they stay
alike, and a step is that of one process with the whole batch, to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's default process group; one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, whole: Tensor) -> Tensor:
        """This rank's part of a batch, which must be a multiple of their count."""
        return whole.chunk(self.count)[self.rank]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors the mean of all ranks', in one message."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, (flat / self.count).split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def synchronize(self, root: nn.Module) -> None:
        """Let batch norms take their statistics over the whole batch.

        Raises:
            ValueError: if there are several ranks, and a batch norm can't.
        """
        if self.count > 1:
            for name, module in root.named_modules():
                if hasattr(module, "process_group"):
                    module.process_group = dist.group.WORLD
                elif isinstance(module, _BatchNorm):
                    raise ValueError(
                        f"one process must train this model, got {self.count}: {name!r} takes its statistics over "
                        "a process's own images"
                    )


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the other processes where ``torchrun`` has started this one. Gives out its own device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    options: dict[str, Any] = {}
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        options["device_id"] = torch.device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", **options)
    try:
        yield device
    finally:
        dist.destroy_process_group()
