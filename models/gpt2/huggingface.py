"""GPT-2's weights to and from ``GPT2Model`` and ``GPT2LMHeadModel`` of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..huggingface import Same, attending, attention_of, both, demand, give, opened, to_ours, to_theirs
from .model import GPT2, Config

#: What ``GPT2LMHeadModel`` puts before the names of its ``GPT2Model``, and the head, which is the embedding again.
_PREFIX, _HEAD = "transformer.", "lm_head.weight"

#: Of the published vocabulary.
_END_OF_TEXT = 50_256


def from_huggingface(source: Any) -> GPT2:
    """Our model with the weights of theirs, in their dtype, on their device, in their mode.

    Args:
        source: a ``GPT2LMHeadModel`` or ``GPT2Model``, or a folder in which ``save_pretrained`` wrote one.

    Raises:
        ValueError: if an option of its configuration changes the numbers and ours has not its like, if it
            has other weights, or the folder has no whole model.
        TypeError: if ``source`` is neither.
    """
    theirs = opened(source, ("GPT2LMHeadModel", "GPT2Model"))
    return from_state_dict(theirs.state_dict(), theirs.config).train(theirs.training)


def from_state_dict(state: Mapping[str, Tensor], config: Any) -> GPT2:
    """The same from a state dict and a ``GPT2Config``. The head is the embedding: both have the same weights."""
    with torch.device("meta"):
        model = GPT2(config_from_huggingface(config))
    state = dict(state)
    if (head := state.pop(_HEAD, None)) is not None:
        demand(config, "gpt2", tie_word_embeddings=True)
        state = {name.removeprefix(_PREFIX): weight for name, weight in state.items()}
        if "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
            raise ValueError(f"{_HEAD} must be tied to {_PREFIX}wte.weight, and differs from it")
    give(model, to_ours(_table(model), state))
    return model


def to_huggingface(model: GPT2, *, head: bool = True) -> Any:
    """A ``GPT2LMHeadModel``, or without ``head`` a ``GPT2Model``, with our weights.

    With ``attention`` patterns it attends by ``gdl_sparse``, which is registered for it, and ``config.gdl_layout``.
    """
    import transformers

    config = config_to_huggingface(model.config)
    state = to_theirs(_table(model), model.state_dict())
    if head:
        theirs = transformers.GPT2LMHeadModel(config)
        state = {_PREFIX + name: weight for name, weight in state.items()} | {_HEAD: state["wte.weight"]}
    else:
        theirs = transformers.GPT2Model(config)
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    return theirs.to(next(model.parameters()).device).train(model.training)


def config_from_huggingface(config: Any) -> Config:
    """Our configuration from a ``GPT2Config``.

    Raises:
        ValueError: naming the option that ours has not.
    """
    demand(
        config, "gpt2", activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False, add_cross_attention=False,
    )  # fmt: skip
    if config.resid_pdrop != config.embd_pdrop:
        raise ValueError(
            f"the configuration's embd_pdrop must be its resid_pdrop, {config.resid_pdrop}, got {config.embd_pdrop}"
        )
    return Config(
        vocabulary=config.vocab_size,
        context=config.n_positions,
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        hidden=4 * config.n_embd if config.n_inner is None else config.n_inner,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        eps=config.layer_norm_epsilon,
        attention=attention_of(config),
    )


def config_to_huggingface(shape: Config) -> Any:
    """A ``GPT2Config`` from ours."""
    import transformers

    end = _END_OF_TEXT if shape.vocabulary > _END_OF_TEXT else None
    return transformers.GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        n_inner=shape.hidden,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.attention_dropout,
        layer_norm_epsilon=shape.eps,
        bos_token_id=end,
        eos_token_id=end,
        **attending(shape),
    )


def _table(model: GPT2) -> list[Same]:
    table = [Same("embedding.weight", ("wte.weight",)), Same("position.weight", ("wpe.weight",))]
    for layer in range(model.config.layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        table += both(f"{ours}.attention_norm", f"{theirs}.ln_1")
        table += both(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True)
        table += both(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True)
        table += both(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        table += both(f"{ours}.mlp.0", f"{theirs}.mlp.c_fc", transposed=True)
        table += both(f"{ours}.mlp.2", f"{theirs}.mlp.c_proj", transposed=True)
    return [*table, *both("norm", "ln_f")]
