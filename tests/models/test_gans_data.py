"""Images to learn from, and batches of them that can be resumed."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import lmdb
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from models.gans.data import Batches, BrokenImage, Digits, Folder, Images, Lsun, decoded, open_images


class Numbers(Images):
    """Image ``i`` is ``i`` on the left and ``-i`` on the right."""

    size, channels, classes = 2, 1, ("all",)

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise BrokenImage(f"image {index}: no good")
        return torch.tensor([1.0, -1.0]).expand(1, 2, 2) * index, 0


def encoded(size: tuple[int, int], color: object, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: a red image, and a blue one beside a grey one further down."""
    files = {
        "cats/red.png": encoded((20, 12), (255, 0, 0)),
        "dogs/blue.JPG": encoded((12, 30), (0, 0, 255), kind="JPEG"),
        "dogs/more/grey.png": encoded((16, 16), 51, "L"),
        "dogs/.hidden.png": b"",
        "dogs/notes.txt": b"not an image",
        ".git/x.png": b"",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_digits_are_those_of_scikit_learn() -> None:
    found = load_digits()
    everything = Digits(8, "all")
    assert len(everything) == 1797
    assert torch.equal(everything.images[:, 0], torch.from_numpy(found.images).float() / 8 - 1)
    assert everything.labels.tolist() == found.target.tolist()
    training, held_out = Digits(8), Digits(8, "held out")
    assert len(held_out) == 360
    assert torch.equal(held_out.images, everything.images[::5])
    assert len(training) == 1437
    assert not (training.images[:, None] == held_out.images[None, :100]).flatten(2).all(2).any()


@pytest.mark.parametrize("size", [4, 16, 32])
def test_digits_are_resized(size: int) -> None:
    digits = Digits(size)
    image, label = digits[3]
    assert image.shape == (1, size, size)
    assert image.dtype == torch.float32
    assert label == int(digits.labels[3])
    assert digits.images.min() >= -1
    assert digits.images.max() <= 1
    assert digits.images.mean() == pytest.approx(Digits(8).images.mean().item(), abs=0.05)


def test_a_folder_has_a_class_for_each_subfolder(folder: Path) -> None:
    images = Folder(folder, 8)
    assert images.classes == ("cats", "dogs")
    assert [label for _, label in (images[i] for i in range(3))] == [0, 1, 1]
    red, blue, grey = (images[i][0] for i in range(3))
    assert torch.equal(red, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 8, 8))
    assert (blue - torch.tensor([-1.0, -1, 1])[:, None, None]).abs().max() < 0.05  # JPEG is not exact
    torch.testing.assert_close(grey, torch.full((3, 8, 8), 51 / 127.5 - 1))
    assert Folder(folder, 8, grey=True)[2][0].shape == (1, 8, 8)
    assert Folder(folder / "cats", 8).classes == ("cats",)


def test_the_middle_is_cut_out() -> None:
    picture = Image.new("L", (12, 4), 0)
    picture.paste(255, (4, 0, 8, 4))
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert torch.equal(decoded(file.getvalue(), 4, 1), torch.ones(1, 4, 4))


def test_what_is_transparent_is_white() -> None:
    image = decoded(encoded((4, 4), (255, 0, 0, 0), "RGBA"), 4, 3)
    assert torch.equal(image, torch.ones(3, 4, 4))
    half = decoded(encoded((4, 4), (0, 128), "LA"), 4, 1)
    torch.testing.assert_close(half, torch.full((1, 4, 4), 127 / 127.5 - 1), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "can't be decoded"),
        (encoded((9, 9), 1)[:40], "can't be decoded"),
        (encoded((9, 9), 1, "I;16"), "its mode must have 8 bits a channel, .*, got I;16"),
        (encoded((9, 7), 1), "must be at least 8 pixels each way, got 9×7"),
    ],
    ids=["empty", "cut off", "16 bits", "small"],
)
def test_a_broken_image_is_named(folder: Path, data: bytes, message: str) -> None:
    file = folder / "dogs" / "blue.JPG"
    file.write_bytes(data)
    images = Folder(folder, 8)
    with pytest.raises(BrokenImage, match=rf"dogs/blue\.JPG: {message}"):
        images[1]


def test_a_folder_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: must be a folder of images, but there is no such folder"):
        open_images(str(tmp_path / "nowhere"), 8)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: has no images \(\.bmp"):
        open_images(str(folder), 8)
    with pytest.raises(ValueError, match=r"empty: has no images"):
        open_images(str(folder / "empty"), 8)
    (folder / "empty").rmdir()
    (folder / "loose.png").write_bytes(encoded((9, 9), 0))
    with pytest.raises(ValueError, match=r"must have images, or subfolders of them for classes, not both: loose\.png"):
        open_images(str(folder), 8)


def written(path: Path, values: dict[str, bytes]) -> Path:
    with lmdb.open(str(path), map_size=2**20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def test_lsun_s_database_is_read(tmp_path: Path) -> None:
    values = {"b": encoded((9, 12), (0, 255, 0), kind="WEBP"), "a": encoded((8, 8), (255, 0, 0)), "c": b"broken"}
    images = open_images(str(written(tmp_path / "bedroom_train_lmdb", values)), 8)
    assert isinstance(images, Lsun)
    assert len(images) == 3
    assert images.classes == ("bedroom_train_lmdb",)
    red, label = images[0]  # by key
    assert torch.equal(red, torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 8, 8))
    assert label == 0
    with pytest.raises(BrokenImage, match="bedroom_train_lmdb, c: can't be decoded"):
        images[2]


def test_workers_change_nothing(tmp_path: Path) -> None:
    values = {f"{n:02}": encoded((8, 8), (9 * n, 0, n)) for n in range(20)} | {"07": b"broken"}
    images = Lsun(written(tmp_path / "lmdb", values), 8)
    images[0]  # opens the database, which a process of its own has to open again
    alone, aside = (Batches(images, 4, 3, workers=workers, on_error="skip") for workers in (0, 2))
    for ours, theirs in islice(zip(alone, aside), 8):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert alone.skipped == aside.skipped
    assert aside.skipped == {f"{tmp_path}/lmdb, 07: can't be decoded (no kind of image that is known)"}


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty_lmdb: has no images"):
        open_images(str(written(tmp_path / "empty_lmdb", {})), 8)
    (tmp_path / "data.mdb").write_bytes(b"nothing like it" * 1000)
    with pytest.raises(ValueError, match="can't be read as an LMDB"):
        open_images(str(tmp_path), 8)


def indices(batches: Batches, count: int) -> list[int]:
    return [int(n) for images, _ in islice(batches, count) for n in images[:, 0, 0].abs().amax(1)]


def test_every_image_comes_once_an_epoch() -> None:
    seen = indices(Batches(Numbers(10), 4, seed=1), 10)  # four epochs, and batches that reach over their ends
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != indices(Batches(Numbers(10), 4, seed=2), 10)


def test_a_stream_goes_on_where_another_stopped() -> None:
    whole = [images for images, _ in islice(Batches(Numbers(10), 4, seed=1), 9)]
    for done in (0, 2, 5):
        first = Batches(Numbers(10), 4, seed=1)
        list(islice(first, done))
        assert first.taken == 4 * done
        rest = Batches(Numbers(10), 4, seed=1, taken=first.taken)
        assert all(torch.equal(a, b) for a, (b, _) in zip(whole[done:], rest))


def test_half_of_all_images_are_mirrored() -> None:
    images = torch.cat([images for images, _ in islice(Batches(Numbers(101), 100, seed=0), 10)])
    left = images[:, 0, 0, 0]
    assert 400 < int((left < 0).sum()) < 600
    straight = torch.cat([images for images, _ in islice(Batches(Numbers(101), 100, seed=0, flip=False), 10)])
    assert not (straight[:, 0, 0, 0] < 0).any()
    assert torch.equal(left.abs(), straight[:, 0, 0, 0])


def test_digits_are_never_mirrored() -> None:
    digits = Digits(8)
    ours = {tuple(image.flatten().tolist()) for image in digits.images}
    for images, _ in islice(Batches(digits, 100, seed=0), 3):
        assert all(tuple(image.flatten().tolist()) in ours for image in images)


def test_the_stream_leaves_other_randomness_alone() -> None:
    before = torch.get_rng_state()
    list(islice(Batches(Numbers(10), 4, seed=1), 5))
    assert torch.equal(before, torch.get_rng_state())


def test_a_broken_image_ends_the_stream() -> None:
    batches = Batches(Numbers(10, frozenset({3})), 5, seed=0)
    with pytest.raises(BrokenImage, match=r"^image 3: no good$"):
        list(islice(batches, 4))


def test_a_broken_image_is_skipped_if_asked() -> None:
    batches = Batches(Numbers(10, frozenset({3, 4})), 5, seed=0, on_error="skip")
    seen = Counter(indices(batches, 4))
    assert seen == {5: 6, **dict.fromkeys((0, 1, 2, 6, 7, 8, 9), 2)}
    assert batches.skipped == {"image 3: no good", "image 4: no good"}


def test_where_all_are_broken_even_skipping_ends() -> None:
    with pytest.raises(BrokenImage, match="no good"):
        next(Batches(Numbers(4, frozenset(range(4))), 2, seed=0, on_error="skip"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"on_error": "shrug"}, "on_error must be raise or skip, got 'shrug'"),
    ],
)
def test_what_makes_no_sense_is_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(Numbers(3), **{"batch": 1, "seed": 0, **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be at least 4 for digits, got 2"):
        Digits(2)
    with pytest.raises(ValueError, match="part must be training, held out or all, got 'best'"):
        Digits(8, "best")
