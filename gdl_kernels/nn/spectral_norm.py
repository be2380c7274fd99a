"""Spectral normalisation of one layer, as a parametrization: torch's, on our kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.spectral_normalize import NotFinite, spectral_normalize

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: Steps of the power method that a new layer's vectors begin with.
FIRST_STEPS = 15


def spectral_norm(
    module: ModuleT, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> ModuleT:
    """Normalise a weight by its largest singular value: ``torch.nn.utils.parametrizations.spectral_norm``.

    The same signature, numbers to rounding, random numbers drawn, and names in the state dict. Each read of the weight
    takes ``n_power_iterations`` steps of the power method if the layer is in training mode, none in eval mode. A weight
    of one dimension is divided by its length.

    ``load_state_dict`` also reads the form of ``torch.nn.utils.spectral_norm`` (``weight_orig``, ``weight_u``,
    ``weight_v``) and that of BigGAN-PyTorch (``weight``, ``u0``, ``sv0``).

    Args:
        module: the layer. It is changed.
        name: of the parameter.
        n_power_iterations: positive.
        eps: the smallest length that is divided by.
        dim: the dimension of the outputs; by default 1 for transposed convolutions, else 0.

    Returns:
        ``module``. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` undoes it.

    Raises:
        ValueError: if there is no such parameter, or ``n_power_iterations`` is not positive; when the weight is read on
            the CPU, outside of ``torch.compile``: if it is not finite.
        IndexError: if the weight has no dimension ``dim``.
    """
    return add_spectral_norm(module, name, n_power_iterations, eps, dim, "torch")


def add_spectral_norm(
    module: ModuleT, name: str, n_power_iterations: int, eps: float, dim: int | None, semantics: str
) -> ModuleT:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be that of a parameter or buffer of {module}, got {name!r}")
    if dim is None:
        dim = int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    norm = SpectralNorm(weight, n_power_iterations, dim, eps, semantics)
    parametrize.register_parametrization(module, name, norm)
    module.register_load_state_dict_pre_hook(_read_other_forms)
    return module


class SpectralNorm(nn.Module):
    """The parametrization: ``W`` to ``W / sigma``.

    Attributes:
        semantics: ``"torch"``, or ``"biggan"``: steps compute v first, and in eval mode each read takes one step that
            is not kept.
        kept: the weight of the forward pass that is under way, where it was computed with those of other layers.
        grouped: whether it ever was.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12, semantics: str = "torch"
    ) -> None:
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(f"dim must be in [{-weight.dim()}, {weight.dim() - 1}] for this weight, got {dim}")
        if n_power_iterations <= 0:
            raise ValueError(f"n_power_iterations must be positive, got {n_power_iterations}")
        self.n_power_iterations = n_power_iterations
        self.dim = dim % weight.dim()
        self.eps = eps
        self.semantics = semantics
        self.kept: Tensor | None = None
        self.grouped = False
        if weight.dim() > 1:
            with torch.no_grad():
                matrix = self.as_matrix(weight)
                for vector, length in (("_u", matrix.shape[0]), ("_v", matrix[:1].numel())):
                    start = matrix.new_empty(length).normal_()
                    self.register_buffer(vector, F.normalize(start, dim=0, eps=eps))
                spectral_normalize(
                    [matrix], [self._u], [self._v], n_power_iterations=FIRST_STEPS, eps=eps, semantics=semantics
                )

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The outputs' dimension first."""
        return weight if self.dim == 0 else weight.movedim(self.dim, 0)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        if self.kept is None:
            return normalize_all([self], [weight])[0]
        if torch.is_grad_enabled() and weight.requires_grad and not self.kept.requires_grad:
            # It was computed under no_grad. A second step would give another weight within one forward pass.
            return normalize_all([self], [weight], step=False)[0]
        return self.kept

    def steps(self) -> tuple[int, bool]:
        """How many steps of the power method a read takes, and whether they are kept."""
        if not self.training:
            return (1, False) if self.semantics == "biggan" else (0, False)
        if self.grouped and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return 0, False  # activation checkpointing computes a forward pass again: its weight had its steps
        return self.n_power_iterations, True

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made during a forward pass is not in it.
        return {**self.__dict__, "kept": None}

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, semantics={self.semantics!r}"


def normalize_all(norms: Sequence[SpectralNorm], weights: Sequence[Tensor], *, step: bool = True) -> list[Tensor]:
    """Normalised weights: one call of the op for all that agree in device, dtype and settings.

    Raises:
        NotFinite: its index counts in ``norms``.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (norm, weight) in enumerate(zip(norms, weights)):
        steps, update = norm.steps() if step else (0, False)
        key = weight.device, weight.dtype, steps, update, norm.eps, norm.semantics
        groups.setdefault(key, []).append(i)
    normalized: dict[int, Tensor] = {}
    for (_, _, steps, update, eps, semantics), members in groups.items():
        chosen = [norms[i] for i in members]
        try:
            with _saved_as_they_are():
                outputs = spectral_normalize(
                    [norms[i].as_matrix(weights[i]) for i in members], [n._u for n in chosen], [n._v for n in chosen],
                    n_power_iterations=steps, eps=eps, update=update, semantics=semantics,
                )  # fmt: skip
        except NotFinite as error:
            raise NotFinite(members[error.index], error.sigma, "weight") from None
        for i, output in zip(members, outputs):
            normalized[i] = output if norms[i].dim == 0 else output.movedim(0, norms[i].dim)
    return [normalized[i] for i in range(len(norms))]


@contextlib.contextmanager
def _saved_as_they_are() -> Iterator[None]:
    """Keeps activation checkpointing from counting what is saved for the gradient of a weight.

    It takes a part of a forward pass twice and expects the same number of saved tensors. The first time the weight was
    there, the second time it is computed. What is saved are the parameter and vectors: little to gain.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, x._version), _unchanged):
        yield


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """What autograd itself looks after where it has no hooks."""
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} that the gradient of a spectral norm needs was changed in place after "
            "the forward pass"
        )
    return x


def _read_other_forms(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames what other implementations of spectral norm call their tensors."""
    for name, parametrization in getattr(module, "parametrizations", {}).items():
        place = next((i for i, p in enumerate(parametrization) if isinstance(p, SpectralNorm)), None)
        if place is None:
            continue
        old, new = f"{prefix}{name}", f"{prefix}parametrizations.{name}"
        if f"{old}_orig" in state_dict:
            original, u, v = (state_dict.pop(f"{old}_{part}", None) for part in ("orig", "u", "v"))
            state_dict.pop(old, None)  # the first version of torch's kept the normalised weight besides
        elif old in state_dict and f"{prefix}u0" in state_dict:
            original, u, v = state_dict.pop(old), state_dict.pop(f"{prefix}u0"), None
            state_dict.pop(f"{prefix}sv0", None)  # the last sigma, which nothing depends on
        else:
            continue
        state_dict[f"{new}.original"] = original
        if u is not None and original.dim() > 1:
            u = u.flatten()
            if v is None:
                matrix = parametrization[place].as_matrix(original).flatten(1)
                v = F.normalize(matrix.T @ u.to(matrix.dtype), dim=0, eps=parametrization[place].eps)
            state_dict[f"{new}.{place}._u"], state_dict[f"{new}.{place}._v"] = u, v
