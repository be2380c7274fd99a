"""What ``python -m models ... stylegan`` takes and prints."""

from __future__ import annotations

from ..gans.cli import compare_command, sample_command, train_command
from ..gans.growing import DIGITS
from .model import Stylegan, StyleganConfig

#: What learns digits in minutes on a CPU.
TINY = StyleganConfig(size=16, latent=64, style=64, mapping_layers=4, capacity=256, widest=64)

train = train_command(Stylegan, TINY, steps=DIGITS.steps(TINY), recipe=DIGITS)
sample = sample_command(Stylegan)
compare = compare_command(Stylegan, StyleganConfig(size=256, capacity=4096, widest=128), batch=8)
