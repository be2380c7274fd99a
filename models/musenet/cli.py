"""The commands of ``python -m models ... musenet``, a file each."""

from __future__ import annotations

from .cli_compare import compare
from .cli_sample import sample
from .cli_train import train

__all__ = ["compare", "sample", "train"]
