"""Weights from and to ``torch.nn.Transformer``, by name.

Its state dict becomes that of :class:`~.model.EncoderDecoder` and back. Norms, activation and numbers of layers are
the caller's to match: ``norm="pre"`` is ``norm_first=True``, and torch always ends a stack with a norm, which is
``final_norm=True``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Of a layer here, and of one of torch's. The encoder's have one norm less.
_LAYER = {
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out": "self_attn.out_proj",
    "mlp.0": "linear1",
    "mlp.2": "linear2",
    "attention_residual.norm": "norm1",
}
_ENCODER = {**_LAYER, "mlp_residual.norm": "norm2"}
_DECODER = {
    **_LAYER, "cross.out": "multihead_attn.out_proj", "cross_residual.norm": "norm2", "mlp_residual.norm": "norm3"
}  # fmt: skip

#: torch keeps the projections of query, key and value in one matrix, of ``3 * width`` rows; here the first is apart.
_CROSS = "multihead_attn.in_proj_"


def from_torch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``torch.nn.Transformer`` as that of an ``EncoderDecoder``.

    Tensors are views of the given ones. Gradients by these names go the same way.

    Raises:
        ValueError: if there is a name that ``torch.nn.Transformer`` does not have.
    """
    names = {"encoder": {theirs: ours for ours, theirs in _ENCODER.items()},
             "decoder": {theirs: ours for ours, theirs in _DECODER.items()}}  # fmt: skip
    weights = {}
    for name, tensor in state.items():
        stack, *rest = name.split(".")
        if stack not in names or not rest:
            raise ValueError(f"state must be a torch.nn.Transformer's, got a weight named {name!r}")
        if rest[0] == "norm":
            weights[f"{stack}_norm.{'.'.join(rest[1:])}"] = tensor
            continue
        place, part = ".".join(rest[1:2]), ".".join(rest[2:])
        if stack == "decoder" and part.startswith(_CROSS):
            kind, width = part.removeprefix(_CROSS), len(tensor) // 3
            weights[f"{stack}.{place}.cross.query.{kind}"] = tensor[:width]
            weights[f"{stack}.{place}.cross.key_value.{kind}"] = tensor[width:]
            continue
        weights[f"{stack}.{place}.{_renamed(name, part, names[stack])}"] = tensor
    return weights


def to_torch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an ``EncoderDecoder`` as that of a ``torch.nn.Transformer``: :func:`from_torch` reversed.

    Raises:
        ValueError: if there is a name that an ``EncoderDecoder`` does not have.
    """
    names = {"encoder": _ENCODER, "decoder": _DECODER}
    state = {}
    for name, tensor in weights.items():
        stack, *rest = name.split(".")
        if stack in ("encoder_norm", "decoder_norm"):
            state[f"{stack.removesuffix('_norm')}.norm.{'.'.join(rest)}"] = tensor
            continue
        if stack not in names or len(rest) < 2:
            raise ValueError(f"weights must be an EncoderDecoder's, got one named {name!r}")
        place, part = rest[0], ".".join(rest[1:])
        if part.startswith("cross.key_value."):
            continue  # goes with the query
        if part.startswith("cross.query."):
            kind = part.removeprefix("cross.query.")
            both = [tensor, weights[f"{stack}.{place}.cross.key_value.{kind}"]]
            state[f"{stack}.layers.{place}.{_CROSS}{kind}"] = torch.cat(both)
            continue
        state[f"{stack}.layers.{place}.{_renamed(name, part, names[stack])}"] = tensor
    return state


def _renamed(name: str, part: str, names: Mapping[str, str]) -> str:
    """The other name of a layer's ``part``: of all of it, or of what comes before ``.weight`` or ``.bias``."""
    if part in names:
        return names[part]
    module, _, kind = part.rpartition(".")
    if module not in names:
        raise ValueError(f"there is no such weight in a layer: {name!r}")
    return f"{names[module]}.{kind}"
