"""Conditional batch norm as a module, and standing statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.conditional_batch_norm import conditional_batch_norm


class ConditionalBatchNorm2d(nn.Module):
    """:func:`gdl_kernels.conditional_batch_norm` with the layers that make gain and bias of a condition.

    The condition is a vector, from which ``gain`` and ``bias`` are linear layers without biases (BigGAN), or a class,
    which they are embeddings of (SAGAN). The factor is ``1 + gain(condition)``. Both are ordinary layers: initialise
    them, or put a spectral norm on them, as any other. Embeddings start at 0: the module starts as a batch norm.

    Running statistics, ``momentum``, ``track_running_stats``, evaluation and the state dict's ``running_mean``,
    ``running_var`` and ``num_batches_tracked`` are those of ``torch.nn.BatchNorm2d``.

    Args:
        num_features: channels of the images.
        cond_features: the length of the condition's vector; or
        num_classes: how many classes there are.
        momentum: None takes the mean over all batches.
        process_group: a ``torch.distributed.ProcessGroup``, such as ``torch.distributed.group.WORLD``, over whose ranks
            the statistics of a batch are taken. None for this process alone.

    Shapes: images ``(N, C, H, W)`` and conditions ``(N, cond_features)``, or integers ``(N,)``, to ``(N, C, H, W)``.

    Raises:
        ValueError: if not one of ``cond_features`` and ``num_classes`` is given, or a size is less than 1; of the
            images, if their dimensions are others.
        TypeError: if a size is no integer.
    """

    spatial: tuple[int, ...] = (2,)
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        cond_features: int | None = None,
        *,
        num_classes: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (cond_features is None) == (num_classes is None):
            raise ValueError(
                f"one of cond_features and num_classes must be given, got {cond_features} and {num_classes}"
            )
        sizes = {"num_features": num_features, "cond_features": cond_features, "num_classes": num_classes}
        for name, size in sizes.items():
            if size is not None and not isinstance(size, int):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        if cond_features is not None:
            self.gain: nn.Module = nn.Linear(cond_features, num_features, bias=False, device=device, dtype=dtype)
            self.bias: nn.Module = nn.Linear(cond_features, num_features, bias=False, device=device, dtype=dtype)
        elif num_classes is not None:
            zeros = torch.zeros(2, num_classes, num_features, device=device, dtype=dtype)
            self.gain, self.bias = (nn.Embedding.from_pretrained(table, freeze=False) for table in zeros.clone())
        if track_running_stats:
            wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=wide))
            self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=wide))
            self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)

    def reset_running_stats(self) -> None:
        """Forget every batch."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self._check(x)  # before the products for gain and bias
        return self.normalize(x, 1 + self.gain(condition), self.bias(condition))

    def normalize(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """What ``forward`` does, with ``gain``, the whole factor, and ``bias`` computed elsewhere: both ``(N, C)``.

        For networks that compute those of many layers in one product of their concatenated weights.
        """
        self._check(x)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = self.num_batches_tracked.float().reciprocal()  # on its device: nothing waits for it
        return conditional_batch_norm(
            x,
            gain,
            bias,
            self.running_mean,
            self.running_var,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            process_group=self.process_group,
        )

    def _check(self, x: Tensor) -> None:
        if x.dim() - 2 not in self.spatial or x.shape[1] != self.num_features:
            dimensions = " or ".join(str(s + 2) for s in self.spatial)
            raise ValueError(
                f"x must have {dimensions} dimensions and {self.num_features} channels, got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"track_running_stats={self.track_running_stats}"
        )


class ConditionalBatchNorm1d(ConditionalBatchNorm2d):
    """:class:`ConditionalBatchNorm2d` for ``(N, C)`` and ``(N, C, L)``."""

    spatial = (0, 1)


class ConditionalBatchNorm3d(ConditionalBatchNorm2d):
    """:class:`ConditionalBatchNorm2d` for ``(N, C, D, H, W)``."""

    spatial = (3,)


@contextmanager
def standing_statistics(root: nn.Module) -> Iterator[None]:
    """Take the statistics to sample with from the batches of a region (BigGAN, arXiv 1809.11096, appendix A).

    Inside it every conditional batch norm at or below ``root``, and every batch norm of torch's, is in training mode
    and gathers the mean of its batches' statistics from scratch. Afterwards each is in the mode it was in, and has them
    as its running statistics, which evaluation uses. One that saw no batch keeps those that it had; all do where the
    region raises. Other modules are left in the mode that they are in::

        generator.eval()
        with torch.no_grad(), gdl_kernels.nn.standing_statistics(generator):
            for _ in range(16):
                generator(torch.randn(256, 120), labels())

    Raises:
        ValueError: if there is no module that tracks statistics.
    """
    kinds = (ConditionalBatchNorm2d, _BatchNorm)
    # Any: what these two have in common has no name.
    norms: list[Any] = [m for m in root.modules() if isinstance(m, kinds) and m.num_batches_tracked is not None]
    if not norms:
        raise ValueError("root must have a batch norm that tracks running statistics, got none")
    before = [(m.training, m.momentum, _statistics(m)) for m in norms]
    done = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True  # not norm.train(): a spectral norm on its layers is another module
        yield
        done = True
    finally:
        for norm, (training, momentum, old) in zip(norms, before):
            norm.momentum = momentum
            norm.training = training
            with torch.no_grad():
                # Whether it saw a batch is asked where the answer is: nothing waits for the device.
                seen = (norm.num_batches_tracked > 0) & done
                for name, value in old.items():
                    getattr(norm, name).copy_(torch.where(seen, getattr(norm, name), value))


def _statistics(norm: Any) -> dict[str, Tensor]:
    return {name: getattr(norm, name).clone() for name in ("running_mean", "running_var", "num_batches_tracked")}
