"""What ``python -m models ... sagan`` takes and prints."""

from __future__ import annotations

from ..gans.cli import compare_command, sample_command, train_command
from .model import Sagan, SaganConfig

#: What learns digits in minutes on a CPU.
TINY = SaganConfig(size=16, latent=64, width=16, attention_at=8)

train = train_command(Sagan, TINY, steps=2000)
sample = sample_command(Sagan)
compare = compare_command(Sagan, SaganConfig(size=64, width=32), batch=16)
