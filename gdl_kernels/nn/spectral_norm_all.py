"""Spectral normalisation of every layer of a network, all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..ops.spectral_normalize import NotFinite
from .spectral_norm import SpectralNorm, add_spectral_norm, normalize_all

RootT = TypeVar("RootT", bound=nn.Module)

#: The layers whose parameter ``weight`` is normalised.
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)

#: Modules to leave out, with all that is below them; or a function that is told a layer's name and the layer.
Skip = Iterable[nn.Module] | Callable[[str, nn.Module], bool]


def spectral_norm_all(
    root: RootT,
    *,
    semantics: str = "torch",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    skip: Skip = (),
) -> RootT:
    """Give every layer of a network spectral norm, and compute all of them together.

    Each ``Linear``, ``Conv1d`` to ``3d``, ``ConvTranspose1d`` to ``3d`` and ``Embedding`` at or below ``root`` gets
    what :func:`spectral_norm` gives it; BigGAN's shared class embedding is one to ``skip``. The state dict is the same.

    When ``root`` is called, before its ``forward``, one call of :func:`spectral_normalize` computes the weights of all
    layers below it that have our spectral norm at that moment: also of such as were put there since. They are kept
    until ``root`` returns. So a layer that is used twice in a forward pass takes one step of the power method, where
    torch's takes two, and a layer that is not used takes one as well. A weight that is read at any other time is
    computed by itself, as :func:`spectral_norm` does it, except that during a backward pass it takes no step: it is
    then activation checkpointing that computes the forward pass again.

    Args:
        root: the network. It is changed. ``DistributedDataParallel`` or ``torch.compile`` may be put around it.
        semantics: ``"torch"``: a step computes u, then v; in eval mode there is none. ``"biggan"``: v, then u; in eval
            mode each forward pass takes one step from the u that is stored, and does not store it.
        n_power_iterations: positive.
        eps: the smallest length that is divided by.
        skip: modules, left out with all that is below them; or ``skip(name, layer)``, true for a layer to leave out.

    Returns:
        ``root``. :func:`remove_spectral_norm_all` undoes it. A second call adds the layers that have none yet.

    Raises:
        ValueError: if a layer's weight is not a plain parameter: uninitialised, missing, or parametrized by something
            else; or an embedding has sparse gradients. On the CPU, in a forward pass outside of ``torch.compile``: if
            a weight is not finite; the message names its layer.
        TypeError: if ``root`` is not a module, or ``skip`` is neither modules nor a function.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"root must be a module, got {type(root).__name__}")
    if semantics not in ("torch", "biggan"):
        raise ValueError(f"semantics must be 'torch' or 'biggan', got {semantics!r}")
    if not isinstance(n_power_iterations, int) or n_power_iterations <= 0:
        raise ValueError(f"n_power_iterations must be a positive integer, got {n_power_iterations!r}")
    layers = list(_bare_layers(root, skip))
    for layer in layers:
        add_spectral_norm(layer, "weight", n_power_iterations, eps, None, semantics)
    if _hooks(root) is None:
        hooks = _Together()
        hooks.handles = [
            root.register_forward_pre_hook(hooks.before),
            root.register_forward_hook(hooks.after, always_call=True),
        ]
    return root


def remove_spectral_norm_all(root: RootT, *, leave_parametrized: bool = True) -> RootT:
    """Take our spectral norm from every layer at or below ``root``.

    Args:
        root: what :func:`spectral_norm_all` was given.
        leave_parametrized: the weights stay as they are read, normalised; in training mode by one last step, as with
            ``torch.nn.utils.parametrize.remove_parametrizations``. Otherwise they are again what is trained.

    Returns:
        ``root``.
    """
    for module in list(root.modules()):
        for name, parametrization in list(getattr(module, "parametrizations", {}).items()):
            if any(isinstance(p, SpectralNorm) for p in parametrization):
                # A deep copy shares the class that holds the weight's property, and would lose it with this module.
                own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
                module.__class__ = type(type(module).__name__, type(module).__bases__, own)
                parametrize.remove_parametrizations(module, name, leave_parametrized)
    hooks = _hooks(root)
    if hooks is not None:
        for handle in hooks.handles:
            handle.remove()
    return root


def _bare_layers(root: nn.Module, skip: Skip) -> Iterable[nn.Module]:
    """The layers to normalise that are not yet."""
    left_out = _left_out(skip)
    for name, layer in root.named_modules():
        if not isinstance(layer, LAYERS) or left_out(name, layer):
            continue
        what = f"layer {name!r}, {type(layer).__name__},"
        if parametrize.is_parametrized(layer, "weight"):
            if isinstance(layer.parametrizations.weight[0], SpectralNorm):  # type: ignore[union-attr, index]
                continue
            raise ValueError(f"{what} must have a plain weight, or be skipped: its weight is parametrized")
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{what} must have a parameter 'weight', or be skipped")
        if nn.parameter.is_lazy(weight):
            raise ValueError(f"{what} must be initialised, or be skipped: run the network once before")
        if isinstance(layer, nn.Embedding) and layer.sparse:
            raise ValueError(f"{what} must not have sparse gradients, or be skipped")
        yield layer


def _left_out(skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip) and not isinstance(skip, nn.Module):
        return skip
    modules = list(skip) if isinstance(skip, Iterable) and not isinstance(skip, nn.Module) else [skip]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"skip must be modules or a function of a name and a layer, got {type(module).__name__}")
    below = {id(m) for module in modules for m in module.modules()}
    return lambda _name, layer: id(layer) in below


def _hooks(root: nn.Module) -> _Together | None:
    owners = (getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, _Together)), None)


class _Together:
    """The hooks of a root. They know no module, so that copies of a root have hooks of their own.

    Attributes:
        open: for each call of the root that is under way, the layers whose weights it keeps.
    """

    def __init__(self) -> None:
        self.open: list[list[SpectralNorm]] = []
        self.handles: list[RemovableHandle] = []

    def before(self, root: nn.Module, args: Any) -> None:
        norms: list[SpectralNorm] = []
        originals: list[Tensor] = []
        _collect(root, set(), norms, originals)
        self.open.append(norms)
        if not norms:
            return
        try:
            weights = normalize_all(norms, originals)
        except NotFinite as error:
            name = _name(root, norms[error.index])
            raise NotFinite(error.index, error.sigma, f"the weight of layer {name!r}") from None
        for norm, weight in zip(norms, weights):
            norm.kept = weight

    def after(self, root: nn.Module, args: Any, output: Any) -> None:
        # It is called after an error too: also after one that came before our other hook.
        for norm in self.open.pop() if self.open else ():
            norm.kept = None


def _collect(module: nn.Module, seen: set[int], norms: list[SpectralNorm], originals: list[Tensor]) -> None:
    """The layers' parametrizations below a module that keep no weight. A root within a root finds them taken."""
    for child in module._modules.values():
        if child is None or id(child) in seen:
            continue
        seen.add(id(child))
        if isinstance(child, parametrize.ParametrizationList):
            norm = child[0]
            if isinstance(norm, SpectralNorm) and norm.kept is None and child.original.dim() > 1:
                norm.grouped = True
                norms.append(norm)
                originals.append(child.original)
        else:
            _collect(child, seen, norms, originals)


def _name(root: nn.Module, norm: SpectralNorm) -> str:
    name = next(name for name, module in root.named_modules() if module is norm)
    return name.partition(".parametrizations.")[0].removeprefix("parametrizations.")
