"""What ``python -m models ... sagan`` takes and prints."""

from __future__ import annotations

from dataclasses import replace

from ..gans.cli import compare_command, sample_command, train_command
from .model import Sagan, SaganConfig

#: What learns digits in minutes on a CPU.
TINY = SaganConfig(size=16, latent=64, width=16, attention_at=8)
RECIPE = replace(Sagan.recipe, generator_rate=2e-4, discriminator_rate=8e-4, ema=0.99)

train = train_command(Sagan, TINY, steps=1500, recipe=RECIPE)
sample = sample_command(Sagan)
compare = compare_command(Sagan, SaganConfig(size=64, width=32), batch=16)
