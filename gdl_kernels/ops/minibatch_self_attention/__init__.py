"""Self-attention over the pixels of every image of a minibatch."""

from __future__ import annotations

from torch import Tensor

from ..._arguments import autocast_is_on, check_finite, check_floating, in_autocast
from . import op, reference


def minibatch_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    pool: int = 1,
    score: str = "dot",
    backend: str | None = None,
) -> Tensor:
    """Every pixel attends to all pixels of its image (SAGAN, arXiv 1805.08318, section 3).

    ``out[b, :, i] = sum_j p[i, j] value[b, :, j]`` with ``p[i, :] = softmax_j(s[i, j])`` over the pixels ``j``, and
    ``s[i, j] = scale <query[b, :, i], key[b, :, j]>``. The map of all pairs is never in memory, nor in any gradient.

    Args:
        query: ``(B, C, H, W)``, any strides: what the 1x1 convolutions give.
        key: ``(B, C, H, W)``.
        value: ``(B, Cv, H, W)``.
        scale: 1 as SAGAN and BigGAN have it.
        pool: 2 attends to key and value max-pooled 2x2, as ``F.max_pool2d(..., 2)`` does it; 1 to all pixels.
        score: ``"dot"`` as above, or ``"l2"``: ``s[i, j] = -scale |query[b, :, i] - key[b, :, j]|^2`` (arXiv
            2006.04710, which is Lipschitz where query and key share their weights).
        backend: overrides the backend of this call.

    Returns:
        ``(B, Cv, H, W)`` in the dtype of ``value``, contiguous or, where ``value`` is, channels last.
        Sums are kept in float32, in float64 for float64. What is not finite stays in its image.
        For its gradient it keeps its inputs, its output and a number a pixel.
        Twice differentiable by kernels, and from the reference beyond; under ``torch.compile`` once.

    Raises:
        ValueError: if shapes, batches or devices don't fit each other, ``scale`` is not finite, ``pool`` is neither 1
            nor 2 or doesn't divide the map, or ``score`` is unknown.
        TypeError: if dtypes differ or are not floating point.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    if autocast_is_on():
        query, key, value = in_autocast(query, key, value)
    chosen = _serving(backend, query, key, value, scale, pool, score)
    if chosen == "reference":
        return reference.minibatch_self_attention(query, key, value, scale, pool, score)
    return op.forward(query, key, value, scale, pool, score, chosen)[0]


@op.choices.serving
def _serving(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, scale: float, pool: int, score: str
) -> str:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
    dtype, device, sizes = query.dtype, query.device, query.shape
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        shape = tensor.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must be (batch, channels, height, width), got shape {tuple(shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of query, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")
        if shape[0] != sizes[0]:
            raise ValueError(f"{name} must have the batch size of query, {sizes[0]}, got {shape[0]}")
        if shape[2] != sizes[2] or shape[3] != sizes[3]:
            wanted = f"{tuple(sizes[2:])}, got {tuple(shape[2:])}"
            raise ValueError(f"{name} must have the height and width of query, {wanted}")
        if 0 in shape and 0 in shape[1:]:
            raise ValueError(f"{name} must have a channel and a pixel at least, got shape {tuple(shape)}")
    if key.shape[1] != sizes[1]:
        raise ValueError(f"key must have the channels of query, {sizes[1]}, got {key.shape[1]}")
    check_finite("scale", scale)
    if not isinstance(pool, int) or pool not in (1, 2):
        raise ValueError(f"pool must be 1 or 2, got {pool!r}")
    if sizes[2] % pool or sizes[3] % pool:
        raise ValueError(f"pool={pool} needs maps of even height and width, got {tuple(sizes[2:])}")
    if score not in reference.SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, reference.SCORES))}, got {score!r}")
    return op.choices.pick(device, backend, query, key, value, scale=scale, pool=pool, score=score)
