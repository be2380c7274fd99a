"""Hugging Face transformers: ``attn_implementation="gdl_sparse"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import layouts
from ..layouts import Layout, check_entry, named
from ..layouts import register_pattern as register_pattern  # where users of transformers look for it
from ..ops.sparse_attention import sparse_attention

#: What models ask for by ``attn_implementation``.
NAME = "gdl_sparse"

#: The first version whose masks this has been tested with: what a mask's function is called with changed within 5.
_OLDEST = (5, 24)

#: The shortest causal layout that is built: longer ones are of twice the length each, and serve all that are shorter.
_SHORTEST = 256

#: What changes an attention's numbers and no layout says.
_REFUSED = {
    "output_attentions": "attention weights, which are never stored",
    "head_mask": "a mask of heads",
    "position_bias": "a bias of the scores",
    "softcap": "a cap of the scores",
    "s_aux": "learned sinks",
    "sinks": "learned sinks",
    "indices": "keys chosen by their values",
    "block_indices": "keys chosen by their values",
    "cu_seq_lens_q": "packed sequences",
}


def register() -> None:
    """Make ``attn_implementation="gdl_sparse"`` known to transformers. A second call changes nothing.

    ``config.gdl_layout`` says what such a model keeps::

        {"pattern": "fixed", "stride": 128, "summary": 32}      # every layer; the arguments are those of layouts.fixed
        [{"pattern": "local", "window": 256}, None]             # one entry a layer, by its layer_idx

    None, or no such entry, is the model's own attention: causal or full, within its sliding window. A model's window
    holds beside a pattern too. A pattern's first position is a sequence's first token: where a batch is padded on the
    left, after the padding.

    Raises:
        ImportError: if transformers is not installed, or too old or new.
    """
    attention, masks = _interfaces()
    attention.register(NAME, attend)
    masks.register(NAME, visible_keys)


def unregister() -> None:
    """Undo :func:`register`: transformers no longer knows the name. Without it, nothing.

    Raises:
        ImportError: if transformers is not installed, or too old or new.
    """
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)  # where transformers' own register puts it; it has no reverse


#: Patterns of which only the distance counts. In the others it matters which position is the first.
_BY_DISTANCE = ("local", "strided")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the queries of a call may see, as the model has it.

    Attributes:
        causal: whether no query sees a later key.
        window: that of ``layouts.local``; None where every distance will do.
        n_k: keys.
        start: where the first query is among the keys.
        forgotten: keys before those, which a sliding cache has dropped.
        padding: bool ``(B, n_k)``, True for keys that none may see; None where there are none.
    """

    causal: bool
    window: int | None
    n_k: int
    start: int
    forgotten: int = 0
    padding: Tensor | None = None

    @cached_property
    def left_padding(self) -> list[int]:
        """Padded keys before the first token of each sequence. Read once a forward pass: on a GPU the CPU waits."""
        return [] if self.padding is None else self.padding.long().cumprod(1).sum(1).tolist()


#: What may be done to a mask between the model and its layers.
_MOVES = (Tensor.to, Tensor.detach, Tensor.contiguous, Tensor.clone)


class SparseMask(Tensor):
    """What transformers hands from a model's mask to its layers: it takes a tensor of four dimensions for a mask.

    It has no values, only ``seen``; what would read values or change it raises, as a model does that adds to its mask.
    """

    seen: _Seen

    @staticmethod
    def of(seen: _Seen, batch: int, n_q: int, device: torch.device | str) -> SparseMask:
        mask = torch.zeros((), dtype=torch.bool, device=device).expand(batch, 1, n_q, seen.n_k).as_subclass(SparseMask)
        mask.seen = seen
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MOVES:
            own = args[0]
            device = func(torch.empty(0, device=own.device), *args[1:], **kwargs or {}).device
            padding = None if own.seen.padding is None else own.seen.padding.to(device)
            return cls.of(replace(own.seen, padding=padding), own.shape[0], own.shape[2], device)
        if func in (Tensor.as_subclass, Tensor.dim, Tensor.size) or func.__name__ == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(
            f"{NAME} serves a mask that is handed from the model to its layers as it is, and this model, or "
            f"torch.compile, calls {func.__name__} on it: use attn_implementation='sdpa', or generate(..., "
            "disable_compile=True) where a static cache made it compile"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SparseMask({self.seen})"


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> SparseMask:
    """The mask of a forward pass, as transformers' ``AttentionMaskInterface`` calls for it. Nothing is queries by keys.

    Args:
        q_offset, kv_offset: positions of the first query and of the first key; a cache that slides has dropped others.
        mask_function: transformers' own of causal, full, or windowed attention; default causal.
        attention_mask: bool ``(B, positions)``, False for padding.

    Raises:
        ValueError: if ``mask_function`` is another, such as that of packed sequences, or ``attention_mask`` not 2-D.
    """
    from transformers import masking_utils

    causal, window = (True, None) if mask_function is None else _read(mask_function)
    padding = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, positions), got shape {tuple(attention_mask.shape)}")
        kept: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = ~kept[:, kv_offset : kv_offset + kv_length].bool()
        # Past the last query of a causal call nothing is read: a static cache is no padding.
        if not padding[:, : int(q_offset) - kv_offset + q_length if causal else None].any():
            padding = None
    # A static cache counts in place: its tensor has moved on by the time that the layers read it.
    seen = _Seen(causal, window, kv_length, int(q_offset) - kv_offset if causal else 0, kv_offset, padding)
    return SparseMask.of(seen, batch_size, q_length, device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention layer, as transformers' ``AttentionInterface`` calls it: :func:`gdl_kernels.sparse_attention`.

    Args:
        query: ``(B, H, Nq, D)``.
        key, value: ``(B, Hkv, Nk, D)``; heads are not repeated.
        attention_mask: what ``visible_keys`` gave; or None: then ``is_causal`` says what is seen, or else the module's.

    Returns:
        ``(B, Nq, H, Dv)``, and None for the weights.

    Raises:
        ValueError: if the call asks for what no layout says, or ``config.gdl_layout`` does not fit the model.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{NAME} has no {name}, {what}: use attn_implementation='eager'")
    if attention_mask is None:
        seen = _unmasked(module, query, key, is_causal)
    elif isinstance(attention_mask, SparseMask):
        seen = attention_mask.seen
    else:
        raise ValueError(
            f"{NAME} takes a mask of (batch, positions), which says what is padding, and the rest from "
            f"config.gdl_layout; got one of shape {tuple(attention_mask.shape)}: use attn_implementation='sdpa'"
        )
    if key.shape[2] != seen.n_k:
        raise ValueError(f"{NAME}: the mask of this call is for {seen.n_k} keys, and the layer has {key.shape[2]}")
    entry = _entry(module)
    call = partial(_call, entry=entry, scale=scaling, dropout_p=dropout)
    if entry is None or entry["pattern"] in _BY_DISTANCE or not (seen.forgotten or any(seen.left_padding)):
        out = call(query, key, value, seen)
    elif seen.forgotten:
        raise ValueError(
            f"{NAME}: the cache has dropped this layer's first {seen.forgotten} keys, and the pattern "
            f"{entry['pattern']!r} counts from the first: use a cache that keeps all, transformers.DynamicCache()"
        )
    else:
        out = _from_first_tokens(call, query, key, value, seen)
    return out.transpose(1, 2).contiguous(), None


def _call(query: Tensor, key: Tensor, value: Tensor, seen: _Seen, entry: dict[str, Any] | None, **rest: Any) -> Tensor:
    layout = _layout_of(entry, seen, query, key)
    return sparse_attention(query, key, value, layout, key_padding_mask=seen.padding, query_start=seen.start, **rest)


def _from_first_tokens(call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, seen: _Seen) -> Tensor:
    """Samples with equal padding on the left together, without it; what comes out for padding is 0."""
    assert seen.padding is not None
    last = seen.start + query.shape[2] - 1  # an empty sequence keeps one query, which sees nothing
    pads = [min(pad, last) for pad in seen.left_padding]
    outs, order = [], []
    for pad in sorted(set(pads)):
        samples = [i for i, own in enumerate(pads) if own == pad]
        above = max(pad - seen.start, 0)  # queries that are padding
        part = replace(seen, n_k=seen.n_k - pad, start=max(seen.start - pad, 0), padding=seen.padding[samples, pad:])
        out = call(query[samples, :, above:], key[samples, :, pad:], value[samples, :, pad:], part)
        outs.append(F.pad(out, (0, 0, above, 0)))
        order += samples
    return torch.cat(outs)[torch.tensor(order, device=query.device).argsort()]


def _interfaces() -> tuple[Any, Any]:
    """AttentionInterface and AttentionMaskInterface."""
    oldest = ".".join(map(str, _OLDEST))
    wanted = f"gdl_kernels.integrations.transformers needs it: pip install 'transformers>={oldest},<6'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; {wanted}") from error
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if not _OLDEST <= (major, minor) < (6, 0):
        raise ImportError(f"found transformers {transformers.__version__}; {wanted}")
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def _read(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask of transformers' is causal, and its window. A closure is known by its code, never by a guess."""
    from transformers import masking_utils as hf

    if mask_function is hf.causal_mask_function:
        return True, None
    if mask_function is hf.bidirectional_mask_function:
        return False, None
    if mask_function.__code__ is hf.and_masks().__code__:
        overlay, *rest = _variables(mask_function)["mask_functions"]
        if rest == [hf.causal_mask_function] and overlay.__code__ is hf.sliding_window_overlay(1).__code__:
            return True, _variables(overlay)["sliding_window"]
        windowed = hf.sliding_window_bidirectional_overlay(1).__code__
        if rest == [hf.bidirectional_mask_function] and overlay.__code__ is windowed:
            return False, _variables(overlay)["sliding_window"] + 1  # its distance is inclusive
    raise ValueError(
        f"{NAME} serves causal, full and sliding-window attention, with padding, and this model asks for another mask: "
        "packed sequences, chunks, blocks of images or one of its own. Use attn_implementation='sdpa'"
    )


def _variables(closure: Callable[..., Any]) -> dict[str, Any]:
    return {name: cell.cell_contents for name, cell in zip(closure.__code__.co_freevars, closure.__closure__ or ())}


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> _Seen:
    """A call with no mask, as transformers reads it for PyTorch's own attention: one query sees all."""
    n_q, n_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal and n_q not in (1, n_k):
        raise ValueError(f"{NAME}: {n_q} causal queries on {n_k} keys with no mask that says where they are")
    return _Seen(bool(is_causal), None, n_k, n_k - n_q if is_causal else 0)


def _entry(module: nn.Module) -> dict[str, Any] | None:
    """What ``gdl_layout`` says of a layer."""
    config: Any = getattr(module, "config", None)
    entry = getattr(config, "gdl_layout", None)
    if entry is None:
        return None
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError("gdl_layout is for self-attention, and this model attends to another sequence besides")
    if isinstance(entry, (list, tuple)):
        layer: Any = getattr(module, "layer_idx", None)
        if layer is None or layer >= len(entry):
            raise ValueError(f"gdl_layout has {len(entry)} entries, and there is none for layer {layer}")
        entry = entry[layer]
        if entry is None:
            return None
    check_entry(entry, "gdl_layout")
    return entry


def _layout_of(entry: dict[str, Any] | None, seen: _Seen, query: Tensor, key: Tensor) -> Layout:
    n_q, n_k = query.shape[2], key.shape[2]
    if seen.causal:
        n = max(n_k, seen.start + n_q, _SHORTEST)
        n_q = n_k = 1 << (n - 1).bit_length()
    elif n_q != n_k and (entry is not None or seen.window is not None):
        raise ValueError(f"{NAME}: a pattern that is not causal needs as many queries as keys, got {n_q} and {n_k}")
    if n_q != n_k:
        return _full(n_q, n_k, query.device)
    # A window as long as the sequence is none: lengths up to it share one layout with models that have none.
    window = None if seen.window is None or seen.window >= n_k else seen.window
    if entry is None and window is not None:
        entry, window = {"pattern": "local", "window": window}, None
    layout = named(n_k, entry, causal=seen.causal, device=query.device, argument="gdl_layout")
    return layout if window is None else _windowed(layout, window, seen.causal)


# As in layouts.named: what inference mode builds has to serve training, too.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _full(n_q: int, n_k: int, device: torch.device) -> Layout:
    return layouts.full(n_q, n_k).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _windowed(layout: Layout, window: int, causal: bool) -> Layout:
    return layout & layouts.local(layout.n_k, window, causal=causal, block_size=layout.block_size).to(layout.device)
