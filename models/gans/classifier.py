"""A small network that tells digits apart. Its features measure how near generated digits are to real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..cache import cache_directory
from .data import Batches, Digits, resized

KIND = "gdl_kernels.digits_classifier.1"

SEED = 0
STEPS = 400
BATCH = 64

#: What a kept classifier must have been trained with.
TRAINED = {"seed": SEED, "steps": STEPS, "batch": BATCH}


class Classifier(nn.Module):
    """Three convolutions and a layer of 64 features. ``(N, 1, H, W)`` in [-1, 1], of any size, to ``(N, 10)``.

    Attributes:
        accuracy: the share of held-out digits that it gets right.
    """

    size = 16
    accuracy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (self.size // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.register_buffer("accuracy", torch.zeros(()))

    def features(self, images: Tensor) -> Tensor:
        """``(N, 64)``, on the CPU in float32 wherever the images are."""
        return self.body(resized(images.detach().float().cpu(), self.size))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def digits_classifier() -> Classifier:
    """The classifier of digits, trained in a few seconds at the first call and then kept in the cache directory."""
    path = cache_directory() / "digits-classifier.safetensors"
    with torch.random.fork_rng(devices=[]):  # whoever asks draws the same numbers before and after
        try:
            tensors, about = checkpoint.load(path, KIND)
            if about != TRAINED:
                raise ValueError(f"{path}: must have been trained with {TRAINED}, but was with {about}")
            classifier = Classifier()
            checkpoint.load_weights(path, classifier, tensors)
        except ValueError:  # not there, damaged, or of another version: train it again
            classifier = trained()
            checkpoint.save(path, KIND, classifier.state_dict(), TRAINED)
    return classifier.eval().requires_grad_(False)


def trained() -> Classifier:
    """A classifier trained on the digits that are not held out."""
    torch.manual_seed(SEED)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    for _, (images, labels) in zip(range(STEPS), Batches(Digits(Classifier.size), BATCH, SEED)):
        optimizer.zero_grad()
        F.cross_entropy(classifier(images), labels).backward()
        optimizer.step()
        schedule.step()
    held_out = Digits(Classifier.size, "held out")
    with torch.no_grad():
        classifier.accuracy.copy_((classifier(held_out.images).argmax(1) == held_out.labels).float().mean())
    return classifier
