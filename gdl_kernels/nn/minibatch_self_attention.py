"""SAGAN's self-attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.minibatch_self_attention import minibatch_self_attention
from .spectral_norm import spectral_norm as add_spectral_norm

#: What public implementations call our layers and ``gamma``.
OTHER_NAMES = {
    "query_conv": "theta",
    "key_conv": "phi",
    "value_conv": "g",
    "snconv1x1_theta": "theta",
    "snconv1x1_phi": "phi",
    "snconv1x1_g": "g",
    "snconv1x1_o_conv": "o",
    "snconv1x1_attn": "o",
    "sigma": "gamma",
}


class MinibatchSelfAttention2d(nn.Module):
    """Self-attention with a residual connection, of SAGAN and BigGAN (arXiv 1805.08318, section 3).

    ``x + gamma * o(minibatch_self_attention(theta(x), phi(x), g(x)))`` with 1x1 convolutions ``theta``, ``phi``, ``g``
    and ``o``, and ``gamma`` a number that starts at 0. Differentiable twice.

    ``load_state_dict`` reads the weights of BigGAN-PyTorch (``theta``, ``phi``, ``g``, ``o``, with ``u0`` and ``sv0``),
    of pytorch-pretrained-BigGAN (``snconv1x1_theta``, ``_phi``, ``_g``, ``_o_conv``, with ``weight_orig``, ``weight_u``
    and ``weight_v``), of voletiv's SAGAN (the last named ``snconv1x1_attn``, ``gamma`` named ``sigma``) and, into a
    layer with ``out_conv=False``, those of ``query_conv``, ``key_conv`` and ``value_conv``. Any of them with or without
    biases, and with spectral norm if this layer has it.

    Args:
        channels: of the images.
        key_channels: of query and key; by default an eighth of ``channels``.
        value_channels: of value; by default half of ``channels``, as in SAGAN's code and BigGAN. The paper has an
            eighth. Without ``o``, ``channels``.
        pool: 2 max-pools key and value 2x2, as SAGAN's code and BigGAN do; 1 does not.
        scale: multiplies the scores.
        score: ``"dot"`` or ``"l2"``.
        spectral_norm: gives every convolution :func:`gdl_kernels.spectral_norm`.
        bias: gives every convolution a bias.
        out_conv: False leaves out ``o``.

    Shapes: ``(B, channels, H, W)`` to the same.

    Raises:
        ValueError: if a channel count is less than 1, or ``value_channels`` are not ``channels`` and there is no ``o``;
            of the images, if they are not ``(B, channels, H, W)``; and what the op refuses, when it is called.
        TypeError: if a channel count is no integer.
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool: int = 2,
        scale: float = 1.0,
        score: str = "dot",
        spectral_norm: bool = False,
        bias: bool = False,
        out_conv: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_channels("channels", channels)
        if key_channels is None:
            key_channels = max(1, channels // 8)
        if value_channels is None:
            value_channels = max(1, channels // 2) if out_conv else channels
        _check_channels("key_channels", key_channels)
        _check_channels("value_channels", value_channels)
        if not out_conv and value_channels != channels:
            raise ValueError(
                f"value_channels must be the {channels} channels where out_conv is False, got {value_channels}"
            )
        self.channels, self.pool, self.scale, self.score = channels, pool, scale, score

        def convolution(inputs: int, outputs: int) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)
            return add_spectral_norm(layer) if spectral_norm else layer

        self.theta = convolution(channels, key_channels)
        self.phi = convolution(channels, key_channels)
        self.g = convolution(channels, value_channels)
        self.o = convolution(value_channels, channels) if out_conv else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_read_other_names)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got shape {tuple(x.shape)}")
        attended = minibatch_self_attention(
            self.theta(x), self.phi(x), self.g(x), scale=self.scale, pool=self.pool, score=self.score
        )
        # In one pass; under autocast in the dtype of x, as the sum of both would be.
        return torch.addcmul(x, self.gamma, self.o(attended))

    def extra_repr(self) -> str:
        return f"pool={self.pool}, scale={self.scale}, score={self.score!r}"


def _check_channels(name: str, count: int) -> None:
    if not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _read_other_names(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames what other implementations call the layers. What is in their weights, the layers read."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        first, dot, rest = name.removeprefix(prefix).partition(".")
        if first in OTHER_NAMES:
            state_dict[f"{prefix}{OTHER_NAMES[first]}{dot}{rest}"] = state_dict.pop(name)
    gamma = state_dict.get(f"{prefix}gamma")
    if gamma is not None and gamma.numel() == 1:
        state_dict[f"{prefix}gamma"] = gamma.reshape(())  # others have a vector of one
