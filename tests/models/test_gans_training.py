"""The adversarial loop, and going on with it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from models.gans.training import Recipe, Training
from models.sagan.model import Sagan, SaganConfig
from models.training import Progress

CONFIG = SaganConfig(size=16, latent=8, width=4, attention_at=8, channels=1, classes=10)
RECIPE = Recipe(batch=8, evaluate=2, scored=80)


def scalars(done: list[Progress]) -> list[dict[str, float]]:
    return [{k: v for k, v in p.scalars.items() if not k.startswith("speed/")} for p in done]


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    straight = Training.begun(Sagan, CONFIG, RECIPE)
    whole = list(straight.run(5))
    first = Training.begun(Sagan, CONFIG, RECIPE)
    before = list(islice(first.run(5), 3))
    first.save(path)
    torch.manual_seed(99)  # what happens in between has no say
    resumed = Training.resumed(Sagan, path)
    after = list(resumed.run(5))
    assert scalars(before) + scalars(after) == scalars(whole)
    assert resumed.untrained == straight.untrained
    assert [p.step for p in whole if "scores/Fréchet distance" in p.scalars] == [2, 4, 5]
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, resumed.ema.state_dict()[name]), name
    for name, tensor in straight.gan.state_dict().items():
        assert torch.equal(tensor, resumed.gan.state_dict()[name]), name
    assert torch.equal(whole[-1].images["samples"], after[-1].images["samples"])
