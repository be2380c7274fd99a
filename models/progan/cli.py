"""What ``python -m models ... progan`` takes and prints."""

from __future__ import annotations

from ..gans.cli import compare_command, sample_command, train_command
from ..gans.growing import DIGITS, GrowingConfig
from .model import Progan

#: What learns digits in minutes on a CPU.
TINY = GrowingConfig(size=16, latent=64, capacity=256, widest=64)

train = train_command(Progan, TINY, steps=DIGITS.steps(TINY), recipe=DIGITS)
sample = sample_command(Progan)
compare = compare_command(Progan, GrowingConfig(size=256, capacity=4096, widest=128), batch=8)
