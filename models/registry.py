"""The models that ``python -m models`` knows: a line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

#: The commands that a model's ``cli`` may have, each a function that typer makes an interface of.
COMMANDS = {
    "compare": "Run a model on our kernels and in plain PyTorch: the same numbers, in less time and memory?",
    "train": "Train a model, with checkpoints and TensorBoard logs; --resume goes on exactly where it stopped.",
    "sample": "Let a model make something to look at or to listen to.",
}


@dataclass(frozen=True)
class Model:
    name: str
    about: str
    source: str

    def command(self, name: str) -> Callable[..., Any] | None:
        """The function ``name`` of ``models/<model>/cli.py``, where there is one."""
        return getattr(import_module(f"models.{self.name}.cli"), name, None)


MODELS = (
    Model("transformer", "an encoder and decoder that write a bass below a melody", "arXiv 1706.03762"),
    Model("musenet", "a Sparse Transformer that writes music", "MuseNet 2019; arXiv 1904.10509"),
    Model("bert", "an encoder that tells hidden words", "arXiv 1810.04805"),
    Model("gpt2", "a decoder that goes on with a text", "GPT-2 2019"),
    Model("progan", "a GAN that grows from 4×4 pixels, layer by layer", "arXiv 1710.10196"),
    Model("sagan", "a GAN with self-attention and spectral norm", "arXiv 1805.08318"),
    Model("biggan", "a class-conditional GAN with a shared class embedding, and its deep variant", "arXiv 1809.11096"),
    Model("stylegan", "a GAN that grows, with a style for every layer and noise", "arXiv 1812.04948"),
)
