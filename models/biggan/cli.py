"""What ``python -m models ... biggan`` takes and prints."""

from __future__ import annotations

from dataclasses import replace

from ..gans.cli import compare_command, sample_command, train_command
from .config import BigganConfig
from .model import Biggan

#: What learns digits in minutes on a CPU.
TINY = BigganConfig(size=16, latent=48, width=16, embedding=32, attention_at=8)

train = train_command(Biggan, TINY, steps=2000)
sample = sample_command(Biggan)
compare = compare_command(Biggan, replace(TINY, size=64, latent=100, attention_at=64), batch=8)
