"""Statistics over the ranks of a process group. Ops know a group by its name; "" is this process alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..._arguments import to_dtype


def check(group: Any) -> None:
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


def name(group: Any) -> str:
    return "" if group is None else group.group_name


def size(group: Any) -> int:
    return 1 if group is None else group.size()


def _resolve(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]  # a str to everyone


def merge_moments(count: int, moments: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Values a channel, and ``(2, C)``: their mean and their sum of squares about it, over all ranks, in float64.

    Args:
        count: this rank's values a channel.
        moments: the same of this rank, 0 where there are no values.
    """
    moments = to_dtype(moments, torch.float64)
    process_group = _resolve(group)
    mine = torch.cat([moments.flatten(), moments.new_full((1,), count)])
    parts = [torch.empty_like(mine) for _ in range(process_group.size())]
    dist.all_gather(parts, mine, group=process_group)
    gathered = torch.stack(parts)  # (ranks, 2 C + 1)
    counts, (means, squares) = gathered[:, -1:], gathered[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    return total, torch.stack([mean, (squares + counts * (means - mean).square()).sum(0)])


def sum_up(count: int, sums: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Values a channel, of which this rank has ``count``, and the sums over them, over all ranks, in float64."""
    packed = torch.cat([sums.flatten().double(), sums.new_full((1,), count, dtype=torch.float64)])
    dist.all_reduce(packed, group=_resolve(group))
    return packed[-1], packed[:-1].view_as(sums)


def mean(means: Tensor, count: int, group: str) -> Tensor:
    """The means over the values of all ranks, of those over the values of each, of which this rank has ``count``."""
    total, sums = sum_up(count, means.double() * count, group)
    return (sums / total.clamp(min=1)).to(means.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Each rank adds its part to what all of them get, so the gradient of a part is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=_resolve(group))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grads[0], ctx.group), None


def differentiable_sum(part: Tensor, group: str) -> Tensor:
    """The sum over all ranks, differentiable without limit."""
    return _SumOverRanks.apply(part, group) if group else part
