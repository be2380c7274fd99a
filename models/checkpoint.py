"""Checkpoints: one safetensors file with tensors and, as its metadata, what they belong to."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import replacing


def save(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a checkpoint; ``path`` is the old one or the whole new one, never less.

    Args:
        kind: what program it is for, and the version of what it writes: ``"gdl_kernels.musenet.2"``. :func:`load` asks
            for the same.
        about: anything that JSON can say.
    """
    metadata = {"kind": kind, "about": json.dumps(about)}
    with replacing(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


def load(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and what was said about them.

    Raises:
        ValueError: if the file is missing, cut off, no safetensors file, or of another kind. The message names it.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.get("kind") != kind:
        found = repr(metadata["kind"]) if "kind" in metadata else "none"
        if metadata.get("kind", "").rpartition(".")[0] == kind.rpartition(".")[0]:
            raise ValueError(f"{path}: written by another version, as {found}; this one reads {kind!r}: train anew")
        raise ValueError(f"{path}: not a checkpoint of this model: its kind must be {kind!r}, got {found}")
    try:
        about = json.loads(metadata["about"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its description is damaged ({error})") from error
    return tensors, about


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose names begin with ``prefix.``, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def load_weights(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put weights into a model, if they are exactly its own.

    Raises:
        ValueError: naming the file and the first weights that are missing, foreign, or of another shape.
    """
    expected = model.state_dict()
    if wrong := sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{path}: its weights are not this model's: missing or foreign are {', '.join(wrong[:3])}")
    for name, weight in expected.items():
        if tensors[name].shape != weight.shape:
            got, want = tuple(tensors[name].shape), tuple(weight.shape)
            raise ValueError(f"{path}: {name} must have shape {want}, got {got}")
    model.load_state_dict(tensors)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state by the names of the parameters: ``<parameter>.<state>``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    *,
    unused: Collection[str] = (),
) -> None:
    """Give a new optimiser the state of :func:`optimizer_tensors`.

    Args:
        unused: parameters that had no state, for they had no gradient yet.

    Raises:
        ValueError: naming the file, if another parameter of the model has no state there.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    states: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
    index_of = {name: index for index, name in enumerate(names)}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        if parameter in index_of:
            states[index_of[parameter]][key] = _laid_out_like(parameters[parameter], tensor)
    if empty := [name for name in names if not states[index_of[name]] and name not in unused]:
        raise ValueError(f"{path}: the optimiser's state is missing for {', '.join(empty[:3])}")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(parameter: Tensor, state: Tensor) -> Tensor:
    """A state with its numbers where the parameter has its own: a fused optimiser walks both by address."""
    if state.shape != parameter.shape:  # a count of steps
        return state
    return torch.empty_like(parameter, dtype=state.dtype, device=state.device).copy_(state)
