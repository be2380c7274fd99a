"""What the launchers share: an op's arguments as kernels take them, pooling, tile sizes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import _images, _tuned
from ...._triton import capability, ceil_div, launch, power_of_two
from ...._tuned import Config
from ...sparse_attention.triton.launch import DOT, padded
from . import maps

#: How ``pool`` is launched, by whether channels are last; ``values``: that a thread writes, ``channels``: of a tile. So
#: it goes along memory: all channels of some windows, or many windows of some channels. Not tuned yet.
POOL = {
    True: {"values": 8, "channels": 64, "num_warps": 4},
    False: {"values": 8, "channels": 8, "num_warps": 4},
}


class Map(NamedTuple):
    """A tensor, and its strides from image to image, channel to channel, pixel to pixel."""

    tensor: Tensor
    strides: tuple[int, int, int]


def as_map(x: Tensor) -> Map:
    """The tensor itself where its pixels or its channels are next to each other, else a copy where they are."""
    sizes, strides = x.shape, x.stride()
    found = _strides(sizes, strides)
    if found is not None:
        return Map(x, found)
    last = _images.channels_last(x)
    lines = _images.lines(x, last)
    return Map(lines.tensor, _in_order(lines.image, lines.line, last))


@functools.lru_cache(maxsize=1024)
def _strides(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    last = strides[1] == 1 and sizes[1] > 1
    found = _images.line_strides(sizes, strides, last)
    return None if found is None else _in_order(*found, last)


def _in_order(image: int, line: int, last: bool) -> tuple[int, int, int]:
    return (image, 1, line) if last else (image, line, 1)


class Pooled(NamedTuple):
    """Keys or values as the kernels walk them.

    Attributes:
        pooled: the map, or where nothing is pooled the tensor itself.
        picked: of another tensor, if it is given, what stands where the largest of each window was; else as ``pooled``.
        winner: which of each window that is, 0 to 3, in memory as ``pooled``; None where nothing is pooled.
    """

    pooled: Map
    picked: Map
    winner: Tensor | None


#: For 16-bit inputs, by kernel, with up to 128 padded channels. Chosen by what the compiler reports: nothing spills,
#: and 99 KB of shared memory, what the smaller chips have, are enough. Not tuned yet.
TILES = {
    "forward": (128, 64, 3, 8),
    "grad_query": (64, 32, 3, 4),
    "grad_key_value": (64, 32, 3, 8),
    "double_rows": (64, 32, 2, 4),
    "double_columns": (64, 16, 2, 8),
}


@functools.cache
def built_in_tiles(kernel: str, channels: int, itemsize: int) -> Config:
    """How a kernel of :data:`TILES` is launched where no table says otherwise.

    Args:
        channels: the larger of the padded channel counts.
        itemsize: bytes an element.
    """
    return dict(zip(("own", "step", "num_stages", "num_warps"), _tiles(kernel, channels, itemsize)))


def _tiles(kernel: str, channels: int, itemsize: int) -> tuple[int, int, int, int]:
    if itemsize == 4:
        # "ieee" products of float32 run on the ordinary cores, operands in registers: small tiles, many warps.
        small = channels > 64 and kernel in ("grad_query", "grad_key_value", "double_rows")
        own = 16 if small or channels > 128 else 32
        return own, 16, 1, 4 if channels <= 64 else 8
    if channels > 128:
        return 32, 16, 2, 4
    if channels > 64 and kernel == "double_rows":
        # Without sm_90's own instruction, which takes 64 queries: those would spill on sm_80. Penalties of gradients go
        # through discriminators, whose attention has at most 64 channels.
        return 32, 16, 2, 8
    return TILES[kernel]


class Call:
    """The arguments that every op of minibatch_self_attention ends with, and what follows from them."""

    def __init__(self, query: Tensor, value: Tensor, scale: float, pool: int, score: str, _backend: str) -> None:
        self.device, self.dtype = query.device, query.dtype
        self.batch, self.channels, height, width = query.shape
        self.value_channels = value.shape[1]
        self.pool = pool
        self.height, self.width = height // pool, width // pool
        self.n_q, self.n_k = height * width, self.height * self.width
        self.l2 = score == "l2"
        # -scale |q - k|^2 is 2 scale (q.k - |k|^2 / 2) but for what is the same for all keys.
        self.scale = 2 * scale if self.l2 else scale

    def walked(self, x: Tensor, other: Tensor | None = None) -> Pooled:
        """Keys or values, pooled if the call pools."""
        source, second = as_map(x), as_map(x if other is None else other)
        if self.pool == 1:
            return Pooled(source, second, None)
        channels, last = x.shape[1], _images.channels_last(x)
        memory_format = torch.channels_last if last else torch.contiguous_format
        sizes = self.batch, channels, self.height, self.width
        pooled = as_map(torch.empty(sizes, dtype=x.dtype, device=self.device, memory_format=memory_format))
        picked = pooled if other is None else Map(torch.empty_like(pooled.tensor), pooled.strides)
        winner = torch.empty_like(pooled.tensor, dtype=torch.int8)
        config = self._config("pool", (int(last), self.dtype.itemsize), POOL[last])
        channel_block = min(config["channels"], power_of_two(channels))
        window_block = 32 * config["num_warps"] * config["values"] // channel_block
        blocks = ceil_div(channels, channel_block), ceil_div(self.n_k, window_block)
        launch(
            maps.pool, self.batch * blocks[0] * blocks[1], self.device,
            source.tensor, pooled.tensor, winner, None if other is None else second.tensor, picked.tensor,
            source.strides, pooled.strides, second.strides, channels, self.n_k, self.width, *blocks,
            CHANNELS=channel_block, WINDOWS=window_block, num_warps=config["num_warps"],
        )  # fmt: skip
        return Pooled(pooled, picked, winner)

    def launch(self, name: str, kernel: Any, *args: Any) -> None:
        """Launch a kernel whose programs own queries, or keys where ``name`` says so."""
        block_c, block_v = padded(self.channels), padded(self.value_channels)
        key = max(block_c, block_v), self.dtype.itemsize
        config = self._config(name, key, built_in_tiles(name, *key))
        owned = self.n_k if name in ("grad_key_value", "double_columns") else self.n_q
        launch(
            kernel, self.batch * ceil_div(owned, config["own"]), self.device, *args, self.n_q, self.n_k, self.scale,
            C=self.channels, CV=self.value_channels, BLOCK_C=block_c, BLOCK_V=block_v, OWN=config["own"],
            STEP=config["step"], DOT=DOT[self.dtype], L2=self.l2, num_stages=config["num_stages"],
            num_warps=config["num_warps"],
        )  # fmt: skip

    def _config(self, kernel: str, key: tuple[int, ...], built_in: Config) -> Config:
        return _tuned.configuration(capability(self.device), "minibatch_self_attention", kernel, key, built_in)

    def rows(self, count: int) -> list[Tensor]:
        """A number for each query, several."""
        return [torch.empty(self.batch, self.n_q, dtype=torch.float32, device=self.device) for _ in range(count)]
