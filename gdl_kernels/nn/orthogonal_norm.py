"""Orthogonal weights: as a parametrization, and as what a network starts from."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.orthogonalize import orthogonalize
from ..ops.orthogonalize.schedule import METHODS

Module = TypeVar("Module", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OrthogonalNorm(nn.Module):
    """The parametrization of :func:`orthogonal_norm`: ``orthogonalize([weight])[0]`` with ``dim`` in front."""

    def __init__(self, steps: int | None, method: Literal["polar", "bjorck"], dim: int) -> None:
        super().__init__()
        self.steps, self.method, self.dim = steps, method, dim

    def forward(self, weight: Tensor) -> Tensor:
        (orthogonal,) = orthogonalize([weight.movedim(self.dim, 0)], steps=self.steps, method=self.method)
        return orthogonal.movedim(0, self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned is kept as it is, and read as the nearest orthogonal weight."""
        return weight

    def extra_repr(self) -> str:
        return f"steps={self.steps}, method={self.method!r}, dim={self.dim}"


def orthogonal_norm(
    module: Module,
    name: str = "weight",
    *,
    steps: int | None = None,
    method: Literal["polar", "bjorck"] = "polar",
    dim: int | None = None,
) -> Module:
    """Read a weight of a module as the nearest orthogonal one: :func:`gdl_kernels.orthogonalize` as a parametrization.

    As ``torch.nn.utils.parametrizations.orthogonal`` the module computes with orthogonal weights and trains free ones,
    ``parametrizations.<name>.original`` in its state dict. Other than there, a convolution's weight is one matrix,
    ``(out, in * kernel)``, not one for each place in the kernel, and there is no ``base`` in the state dict.

    Args:
        module: the layer, changed in place.
        name: of its weight.
        steps, method: as :func:`gdl_kernels.orthogonalize` takes them.
        dim: of the weight that counts outputs; default 1 for transposed convolutions, else 0.

    Returns:
        ``module``. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` undoes it.

    Raises:
        ValueError: if ``module`` has no tensor of that name, it has fewer than two dimensions, or ``dim``, ``steps`` or
            ``method`` is out of its range.
        TypeError: if ``module`` is no module, or ``steps`` no integer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be that of a tensor of {type(module).__name__}, got {name!r}")
    if weight.dim() < 2:
        raise ValueError(f"{name} must have two dimensions or more, got shape {tuple(weight.shape)}")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim must be from {-weight.dim()} to {weight.dim() - 1}, got {dim}")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise TypeError(f"steps must be an integer or None, got {type(steps).__name__}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    # unsafe: the check would orthogonalize once more, only to see that shape and dtype stay.
    parametrize.register_parametrization(module, name, OrthogonalNorm(steps, method, dim), unsafe=True)
    return module


@torch.no_grad()
def init_orthogonal_(root: Module, *, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Give every convolution, linear layer and embedding below ``root`` a random orthogonal weight, as BigGAN starts.

    Each becomes ``gain`` times an orthogonal matrix ``(first dimension, rest)``, drawn uniformly, as
    ``torch.nn.init.orthogonal_`` draws it; all of them together, by products rather than by QR. Biases stay. Where a
    weight is parametrized (spectral norm) or kept as ``weight_orig``, what it is computed from is what is drawn.

    Args:
        root: a module, changed in place.
        gain: times the orthogonal matrix.
        generator: to draw from, on the weights' device; default torch's own.

    Returns:
        ``root``.
    """
    kinds = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.Embedding)
    weights = {id(w): w for module in root.modules() if isinstance(module, kinds) for w in _trained(module)}
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights.values():
        alike.setdefault((weight.device, torch.promote_types(weight.dtype, torch.float32)), []).append(weight)
    for (device, dtype), group in alike.items():
        if device.type == "meta":
            continue
        drawn = [torch.randn(w.shape, generator=generator, device=device, dtype=dtype) for w in group]
        for weight, orthogonal in zip(group, orthogonalize(drawn)):
            weight.copy_(orthogonal * gain)
    return root


def _trained(module: nn.Module) -> list[Tensor]:
    """What the weight of a layer is computed from: itself, unless something is computed."""
    if parametrize.is_parametrized(module, "weight"):
        originals = module.get_submodule("parametrizations.weight").parameters(recurse=False)
        return [original for original in originals if original.dim() >= 2]
    return [getattr(module, "weight_orig" if hasattr(module, "weight_orig") else "weight")]
