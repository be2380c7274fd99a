"""A batch shared out over two processes, gloo between them, against one process that has all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from models.biggan.config import BigganConfig
from models.biggan.model import Biggan
from models.gans.data import Batch, Batches, Digits
from models.gans.ranks import Ranks
from models.gans.training import Training

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

CONFIG = BigganConfig(size=16, latent=6, width=2, embedding=3, attention_at=8, channels=1, classes=10)
RECIPE = replace(
    Biggan.recipe, batch=8, accumulate=2, discriminator_steps=1, evaluate=9, scored=10, generator_rate=1e-9,
    discriminator_rate=1e-9,
)  # fmt: skip


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def exact() -> dict[str, Any]:
    """Gradients of both losses in float64, and what the generator's norms gathered."""
    torch.manual_seed(0)
    gan = Biggan(CONFIG).double().train()
    ranks = Ranks.current()
    ranks.synchronize(gan)
    latents, labels = torch.randn(6, 6, dtype=torch.float64), torch.arange(6)
    images = torch.randn(6, 1, 16, 16, dtype=torch.float64)
    latents, labels, images = (ranks.share(whole) for whole in (latents, labels, images))
    found = {}
    with torch.no_grad():
        fake = gan.fakes(latents, labels)
    sum(gan.discriminator_terms(Batch(images, labels), fake).values()).backward()  # type: ignore[union-attr]
    gan.discriminator.requires_grad_(False)
    sum(gan.generator_terms(gan.fakes(latents, labels)).values()).backward()  # type: ignore[union-attr]
    for name, network in (("generator", gan.generator), ("discriminator", gan.discriminator)):
        ranks.average([p.grad for p in network.parameters() if p.grad is not None])
        found[name] = gradients(network)
    found["buffers"] = {name: b.clone() for name, b in gan.named_buffers() if "running" in name}
    return found


def trained() -> dict[str, Any]:
    """A step of the loop. Rates are so small that rounding can't move a weight by more than that."""
    run = Training.begun(Biggan, CONFIG, RECIPE)
    run._judge = None  # type: ignore[assignment]  # scores are the same on each rank, and no part of this
    (done,) = run.run(1)
    scalars = {name: value for name, value in done.scalars.items() if not name.startswith("speed")}
    return {name: gradients(network) for name, network in run.networks.items()} | {"scalars": scalars}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save([exact(), trained()], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(_rank, args=(str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def test_gradients_are_those_of_the_whole_batch(ranks: list[list[Any]]) -> None:
    expected = exact()
    for found, _ in ranks:
        for part in ("generator", "discriminator", "buffers"):
            assert found[part]
            torch.testing.assert_close(found[part], expected[part], rtol=1e-9, atol=1e-11)


def test_a_step_of_the_loop_is_that_of_one_process(ranks: list[list[Any]]) -> None:
    """In float32, and with the batch in two parts besides."""
    expected = trained()
    for _, found in ranks:
        for part, values in expected.items():
            torch.testing.assert_close(found[part], values, rtol=1e-3, atol=1e-5)
    assert ranks[0][1]["scalars"] == ranks[1][1]["scalars"]


def test_ranks_read_what_one_process_reads() -> None:
    whole = Batches(Digits(8), 6, seed=3, taken=1435)  # over the end of an epoch
    shared = [Batches(Digits(8), 6, seed=3, taken=1435, ranks=Ranks(rank, 3)) for rank in range(3)]
    for _ in range(2):
        parts = [next(batches) for batches in shared]
        torch.testing.assert_close(tuple(torch.cat(columns) for columns in zip(*parts)), next(whole))
    assert {batches.taken for batches in shared} == {whole.taken}


def test_what_can_not_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"one process must train this model, got 2: '0' takes its statistics"):
        Ranks(0, 2).synchronize(nn.Sequential(nn.BatchNorm2d(3)))
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(0, 3))
    monkeypatch.setattr(Ranks, "synchronize", lambda self, root: None)
    with pytest.raises(ValueError, match="batch must be a multiple of 2 parts times 3 processes, got 8"):
        Training.begun(Biggan, CONFIG, RECIPE)


def test_torchrun_trains(tmp_path: Path) -> None:
    """The first rank alone tells of the run and saves it; one process may go on with it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "models", "train",
        "biggan", "--out", str(tmp_path), "--steps", "1", "--width", "1", "--latent", "6", "--embedding", "3",
        "--batch", "4", "--scored", "10", "--evaluate", "9",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("1 steps done.") == 1
    assert Training.resumed(Biggan, tmp_path / "checkpoint.safetensors").step == 1
