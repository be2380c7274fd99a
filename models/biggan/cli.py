"""What ``python -m models ... biggan`` takes and prints."""

from __future__ import annotations

from dataclasses import replace

from ..gans.cli import compare_command, sample_command, train_command
from .config import BigganConfig
from .model import Biggan

#: What learns digits in minutes on a CPU. A model so small, and a run so short, take larger rates than the paper's.
DIGITS = BigganConfig(size=16, latent=48, width=8, embedding=32, attention_at=8)
QUICK = replace(Biggan.recipe, generator_rate=5e-4, discriminator_rate=5e-4, ema=0.99, evaluate=100)

train = train_command(Biggan, DIGITS, steps=600, recipe=QUICK)
sample = sample_command(Biggan)
compare = compare_command(Biggan, BigganConfig(width=16), batch=4)
