"""Weights to and from Hugging Face transformers: what the conversions of all models share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gdl_kernels.integrations import transformers as hook

from .language import Entry, Shape


class Same(NamedTuple):
    """One of our weights, and what it is there.

    Attributes:
        theirs: names of the weights that ours is, one after the other along its first dimension.
        transposed: whether theirs are (in, out), as ``Conv1D`` has them, and ours (out, in).
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False


def both(ours: str, theirs: str, *, transposed: bool = False) -> list[Same]:
    """The weight and the bias of a linear layer, or of a norm."""
    return [
        Same(f"{ours}.weight", (f"{theirs}.weight",), transposed),
        Same(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


def to_ours(table: Iterable[Same], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from theirs, in memory of its own.

    Raises:
        ValueError: naming the first weights that are missing, and those that none of ours is.
    """
    table = list(table)
    expected = {name for same in table for name in same.theirs}
    wrong = {"missing": sorted(expected - set(state)), "foreign": sorted(set(state) - expected)}
    if any(wrong.values()):
        found_wrong = "; ".join(f"{kind} are {', '.join(names[:3])}" for kind, names in wrong.items() if names)
        raise ValueError(f"the weights must be exactly this model's: {found_wrong}")
    found = {}
    for ours, theirs, transposed in table:
        parts = [state[name].detach() for name in theirs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[ours] = (whole.T if transposed else whole).clone(memory_format=torch.contiguous_format)
    return found


def to_theirs(table: Iterable[Same], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours, in memory of its own."""
    found = {}
    for ours, theirs, transposed in table:
        whole = state[ours].detach().T if transposed else state[ours].detach()
        for name, part in zip(theirs, whole.chunk(len(theirs))):
            found[name] = part.clone(memory_format=torch.contiguous_format)
    return found


def give(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make weights a model's own, in their dtypes and on their device; the model may be on the meta device.

    Raises:
        ValueError: naming a weight of another shape than the configuration says.
    """
    for name, own in model.state_dict().items():
        if own.shape != weights[name].shape:
            want, got = tuple(own.shape), tuple(weights[name].shape)
            raise ValueError(f"{name} must have the shape that the configuration says, {want}, got {got}")
    model.load_state_dict(weights, assign=True)
    model.to(next(iter(weights.values())).device)  # layouts too


def demand(config: Any, model_type: str, **wanted: Any) -> None:
    """Refuse a configuration of another kind of model, or with an option that changes the numbers and ours has not.

    Raises:
        ValueError: naming the option, what it is and what it must be.
    """
    for name, value in {"model_type": model_type, **wanted}.items():
        if (got := getattr(config, name, value)) != value:
            raise ValueError(f"the configuration's {name} must be {value!r}, got {got!r}")


def attention_of(config: Any) -> Entry | list[Entry]:
    """``config.gdl_layout``, as :attr:`models.language.Shape.attention` has it."""
    entry = getattr(config, "gdl_layout", None)
    return list(entry) if isinstance(entry, (list, tuple)) else entry


def attending(shape: Shape) -> dict[str, Any]:
    """What a configuration there says of our attention; ``gdl_sparse`` becomes known to transformers if it has to."""
    if shape.attention is None:
        return {}
    hook.register()
    return {"gdl_layout": shape.attention, "attn_implementation": hook.NAME}


def opened(source: Any, kinds: Iterable[str]) -> Any:
    """A model of transformers: ``source`` itself, or what ``save_pretrained`` wrote in a folder. No network is asked.

    Args:
        kinds: names of the classes that a folder's configuration may name.

    Raises:
        ValueError: if the folder has no whole model of one of ``kinds``; or the model has a ``gdl_layout``
            and attends by something that passes over it.
        TypeError: if ``source`` is neither.
    """
    import transformers

    if isinstance(source, (str, Path)):
        return _read(Path(source), list(kinds))
    if not isinstance(source, transformers.PreTrainedModel):
        raise TypeError(f"source must be a model of transformers or a folder, got {type(source).__name__}")
    by = source.config._attn_implementation
    if attention_of(source.config) is not None and by != hook.NAME:
        raise ValueError(
            f"the configuration's gdl_layout says what to keep, and this model attends by {by!r}, which passes over "
            f"it: model.set_attn_implementation({hook.NAME!r}), or delete config.gdl_layout"
        )
    return source


def _read(folder: Path, kinds: list[str]) -> Any:
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: must be a folder that save_pretrained wrote, and has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = (config.architectures or [None])[0]
    if named not in kinds:
        raise ValueError(f"{folder}: its configuration must name one of {', '.join(kinds)}, got {named!r}")
    if attention_of(config) is not None:
        hook.register()
        config._attn_implementation = hook.NAME
    try:
        model, found = getattr(transformers, named).from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a whole model ({error})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: the weights {', '.join(missing[:3])} are missing")
    return model
