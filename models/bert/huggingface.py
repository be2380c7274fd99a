"""BERT's weights to and from ``BertModel`` and ``BertForMaskedLM`` of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..huggingface import Same, attending, attention_of, both, demand, give, opened, to_ours, to_theirs
from .model import Bert, BertForMaskedLM, Config

_QKV = ("query", "key", "value")

#: A second name there for a weight that is listed already.
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def from_huggingface(source: Any) -> Bert | BertForMaskedLM:
    """Our model with the weights of theirs, in their dtype, on their device, in their mode.

    Args:
        source: a ``BertModel`` or ``BertForMaskedLM``, or a folder in which ``save_pretrained`` wrote one.

    Raises:
        ValueError: if an option of its configuration changes the numbers and ours has not its like, if it
            has other weights, or the folder has no whole model.
        TypeError: if ``source`` is neither.
    """
    theirs = opened(source, ("BertModel", "BertForMaskedLM"))
    return from_state_dict(theirs.state_dict(), theirs.config).train(theirs.training)


def from_state_dict(state: Mapping[str, Tensor], config: Any) -> Bert | BertForMaskedLM:
    """The same from a state dict and a ``BertConfig``: with weights of ``cls.predictions`` it is a masked-LM."""
    shape = config_from_huggingface(config)
    masked_lm = "cls.predictions.bias" in state
    with torch.device("meta"):
        model = BertForMaskedLM(shape) if masked_lm else Bert(shape, pooler="pooler.dense.weight" in state)
    if masked_lm:
        demand(config, "bert", tie_word_embeddings=True)
    for name, other in _TIED.items():
        if name in state and not torch.equal(state[name], state[other]):
            raise ValueError(f"{name} must be tied to {other}, and differs from it")
    give(model, to_ours(_table(model), {name: weight for name, weight in state.items() if name not in _TIED}))
    return model


def to_huggingface(model: Bert | BertForMaskedLM) -> Any:
    """A ``BertModel``, with a pooler where ours has one, or a ``BertForMaskedLM``, with our weights.

    With ``attention`` patterns it attends by ``gdl_sparse``, which is registered for it, and ``config.gdl_layout``.
    """
    import transformers

    config = config_to_huggingface(model.config)
    state = to_theirs(_table(model), model.state_dict())
    if isinstance(model, BertForMaskedLM):
        theirs = transformers.BertForMaskedLM(config)
        state |= {name: state[other] for name, other in _TIED.items()}
    else:
        theirs = transformers.BertModel(config, add_pooling_layer=model.pooler is not None)
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    return theirs.to(next(model.parameters()).device).train(model.training)


def config_from_huggingface(config: Any) -> Config:
    """Our configuration from a ``BertConfig``.

    Raises:
        ValueError: naming the option that ours has not.
    """
    demand(
        config, "bert", hidden_act="gelu", position_embedding_type="absolute", is_decoder=False,
        add_cross_attention=False,
    )  # fmt: skip
    return Config(
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        eps=config.layer_norm_eps,
        token_types=config.type_vocab_size,
        padding=config.pad_token_id,
        attention=attention_of(config),
    )


def config_to_huggingface(shape: Config) -> Any:
    """A ``BertConfig`` from ours."""
    import transformers

    return transformers.BertConfig(
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.attention_dropout,
        layer_norm_eps=shape.eps,
        type_vocab_size=shape.token_types,
        pad_token_id=shape.padding,
        **attending(shape),
    )


def _table(model: Bert | BertForMaskedLM) -> list[Same]:
    if isinstance(model, BertForMaskedLM):
        inner = [
            Same(f"bert.{ours}", tuple(f"bert.{name}" for name in theirs)) for ours, theirs, _ in _table(model.bert)
        ]
        return [
            *inner,
            *both("transform", "cls.predictions.transform.dense"),
            *both("norm", "cls.predictions.transform.LayerNorm"),
            Same("bias", ("cls.predictions.bias",)),
        ]
    table = [
        Same("embeddings.word.weight", ("embeddings.word_embeddings.weight",)),
        Same("embeddings.position.weight", ("embeddings.position_embeddings.weight",)),
        Same("embeddings.token_type.weight", ("embeddings.token_type_embeddings.weight",)),
        *both("embeddings.norm", "embeddings.LayerNorm"),
    ]
    for layer in range(model.config.layers):
        ours, theirs = f"layers.{layer}", f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}.attention.self.{part}.{kind}" for part in _QKV)
            table.append(Same(f"{ours}.attention.qkv.{kind}", parts))
        table += both(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        table += both(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        table += both(f"{ours}.mlp.0", f"{theirs}.intermediate.dense")
        table += both(f"{ours}.mlp.2", f"{theirs}.output.dense")
        table += both(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    return table if model.pooler is None else [*table, *both("pooler", "pooler.dense")]
