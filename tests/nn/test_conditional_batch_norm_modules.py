"""ConditionalBatchNorm and standing statistics."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdl_kernels import conditional_batch_norm
from gdl_kernels.nn import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    standing_statistics,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = 6, channels: int = 5) -> Tensor:
    return 2 * torch.randn(batch, channels, 4, 3) + torch.arange(channels).view(-1, 1, 1)


def test_gain_and_bias_are_linear_in_the_condition() -> None:
    module = ConditionalBatchNorm2d(5, 7, eps=1e-3, momentum=0.2)
    x, condition = images(), torch.randn(6, 7)
    gain, bias = 1 + condition @ module.gain.weight.T, condition @ module.bias.weight.T
    mean, var = torch.zeros(5), torch.ones(5)
    expected = conditional_batch_norm(x, gain, bias, mean, var, training=True, eps=1e-3, momentum=0.2)
    torch.testing.assert_close(module(x, condition), expected)
    torch.testing.assert_close((module.running_mean, module.running_var), (mean, var))
    module.eval()
    expected = conditional_batch_norm(x, gain, bias, mean, var, training=False, eps=1e-3)
    torch.testing.assert_close(module(x, condition), expected)
    assert repr(module).startswith("ConditionalBatchNorm2d(\n  5, eps=0.001, momentum=0.2, track_running_stats=True\n")


@pytest.mark.parametrize("training", [True, False])
def test_gain_and_bias_may_be_computed_elsewhere(training: bool) -> None:
    one, other = (ConditionalBatchNorm2d(5, 7, momentum=None).train(training) for _ in range(2))
    other.load_state_dict(one.state_dict())
    for _ in range(2):
        x, condition = images(), torch.randn(6, 7)
        gain_and_bias = condition @ torch.cat([one.gain.weight, one.bias.weight]).T
        torch.testing.assert_close(
            other.normalize(x, 1 + gain_and_bias[:, :5], gain_and_bias[:, 5:]), one(x, condition)
        )
    torch.testing.assert_close(dict(other.named_buffers()), dict(one.named_buffers()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_with_classes_it_starts_as_torchs_batch_norm(momentum: float | None, track_running_stats: bool) -> None:
    ours = ConditionalBatchNorm2d(5, num_classes=3, momentum=momentum, track_running_stats=track_running_stats)
    theirs = nn.BatchNorm2d(5, affine=False, momentum=momentum, track_running_stats=track_running_stats)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    for training in (True, True, False, True, False):
        ours.train(training)
        theirs.train(training)
        x = images()
        torch.testing.assert_close(ours(x, labels), theirs(x))
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_each_class_has_its_gain() -> None:
    module = ConditionalBatchNorm2d(5, num_classes=3)
    x, labels = images(), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = module(x, labels)
    with torch.no_grad():
        module.gain.weight[1] = 2
        module.bias.weight[2] = 7
    changed = module(x, labels)
    torch.testing.assert_close(changed[labels == 0], plain[labels == 0])
    torch.testing.assert_close(changed[labels == 1], 3 * plain[labels == 1])
    torch.testing.assert_close(changed[labels == 2], 7 + plain[labels == 2])
    changed.square().sum().backward()
    assert module.gain.weight.grad.abs().amin() > 0


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (ConditionalBatchNorm1d, (6, 5)),
        (ConditionalBatchNorm1d, (6, 5, 9)),
        (ConditionalBatchNorm3d, (6, 5, 2, 3, 4)),
    ],
)
def test_other_dimensions(kind: type[ConditionalBatchNorm2d], shape: tuple[int, ...]) -> None:
    module, x = kind(5, 7), torch.randn(shape)
    y = module(x, torch.zeros(6, 7))
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True))


def test_state_dict_is_torchs_and_the_layers() -> None:
    module, other = ConditionalBatchNorm2d(5, 7), ConditionalBatchNorm2d(5, 7)
    module(images(), torch.randn(6, 7))
    names = set(nn.BatchNorm2d(5, affine=False).state_dict())
    assert set(module.state_dict()) == names | {"gain.weight", "bias.weight"}
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    x, condition = images(), torch.randn(6, 7)
    for again in (other, copy.deepcopy(module)):
        torch.testing.assert_close(again.eval()(x, condition), module.eval()(x, condition))


def test_spectral_norm_on_the_layers() -> None:
    module = ConditionalBatchNorm2d(5, 7)
    nn.utils.parametrizations.spectral_norm(module.gain)
    torch.testing.assert_close(torch.linalg.matrix_norm(module.gain.weight, 2).item(), 1.0, rtol=0.05, atol=0)
    vector = module.gain.parametrizations.weight[0]._u.clone()
    module.eval()
    with standing_statistics(module):
        module(images(), torch.randn(6, 7))
    assert torch.equal(module.gain.parametrizations.weight[0]._u, vector)  # its layers stay in their mode
    assert not module.gain.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    module = ConditionalBatchNorm2d(5, 7, dtype=dtype)
    assert module.running_var.dtype == torch.promote_types(dtype, torch.float32)
    x, condition = images().to(dtype), torch.randn(6, 7, dtype=dtype)
    assert module(x, condition).dtype == dtype
    assert module.to(dtype)(x, condition).dtype == dtype


def test_autocast() -> None:
    module = ConditionalBatchNorm2d(5, 7)
    x, condition = images(), torch.randn(6, 7)
    exact = module(x, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y = module(x.to(dtype), condition)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiles_into_one_graph(momentum: float | None) -> None:
    torch._dynamo.reset()
    module = ConditionalBatchNorm2d(5, 7, momentum=momentum)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        x, condition = images(), torch.randn(6, 7)
        torch.testing.assert_close(compiled(x, condition), twin(x, condition))
    torch.testing.assert_close(dict(module.named_buffers()), dict(twin.named_buffers()))
    torch._dynamo.reset()


class Generator(nn.Module):
    """As BigGAN's: conditional batch norms, and a plain one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ConditionalBatchNorm2d(5, 7) for _ in range(2))
        self.last = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x, condition)
        return self.last(self.dropout(x))


def trained() -> Generator:
    generator = Generator()
    for _ in range(3):
        generator(images(), torch.randn(6, 7))
    return generator.eval()


def test_standing_statistics_are_the_mean_over_the_batches() -> None:
    generator, batches = trained(), [images() * scale for scale in (1, 2, 5)]
    with standing_statistics(generator):
        assert generator.norms[0].training
        assert generator.last.training
        assert not generator.training
        assert not generator.dropout.training
        for x in batches:
            generator(x, torch.randn(6, 7))
    each = [0, 2, 3]
    first = generator.norms[0]
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean(each) for x in batches]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var(each) for x in batches]).mean(0))
    for norm in (*generator.norms, generator.last):
        assert not norm.training
        assert norm.momentum == 0.1
        assert norm.num_batches_tracked == 3
    # Evaluation uses them, and training goes on from them.
    x, gain = batches[0], torch.ones(6, 5)
    expected = conditional_batch_norm(x, gain, 0 * gain, first.running_mean, first.running_var, training=False)
    torch.testing.assert_close(first(x, torch.zeros(6, 7)), expected)
    before = first.running_mean.clone()
    first.train()(x, torch.zeros(6, 7))
    torch.testing.assert_close(first.running_mean, 0.9 * before + 0.1 * x.mean(each))


def test_an_exception_leaves_the_statistics_as_they_were() -> None:
    generator = trained().train()
    before = copy.deepcopy(generator.state_dict())

    def fails() -> None:
        with standing_statistics(generator):
            generator(images(), torch.randn(6, 7))
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fails()
    torch.testing.assert_close(dict(generator.state_dict()), dict(before), rtol=0, atol=0)
    for norm in (*generator.norms, generator.last):
        assert norm.training
        assert norm.momentum == 0.1


def test_a_module_that_saw_no_batch_keeps_its_statistics() -> None:
    generator = trained()
    before = copy.deepcopy(generator.last.state_dict())
    with standing_statistics(generator):
        generator.norms[0](images(), torch.randn(6, 7))
    torch.testing.assert_close(dict(generator.last.state_dict()), dict(before), rtol=0, atol=0)
    assert generator.norms[0].num_batches_tracked == 1


@pytest.mark.parametrize("root", [nn.Linear(2, 2), ConditionalBatchNorm2d(5, 7, track_running_stats=False)])
def test_standing_statistics_of_nothing(root: nn.Module) -> None:
    with pytest.raises(ValueError, match="root must have a batch norm that tracks"), standing_statistics(root):
        pass


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "one of cond_features and num_classes must be given, got None and None"),
        ({"cond_features": 3, "num_classes": 4}, ValueError, "one of .* must be given, got 3 and 4"),
        ({"cond_features": 0}, ValueError, "cond_features must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer, got 2.0"),
        ({"num_features": 0, "num_classes": 2}, ValueError, "num_features must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConditionalBatchNorm2d(**{"num_features": 5, **settings})


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 4, 4, 4)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    module = ConditionalBatchNorm2d(5, 7)
    with pytest.raises(ValueError, match="x must have 4 dimensions and 5 channels, got shape"):
        module(torch.randn(shape), torch.randn(6, 7))
    assert module.num_batches_tracked == 0
