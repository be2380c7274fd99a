"""Images to learn from: scikit-learn's digits, a folder of images, LSUN's LMDB; and endless, resumable batches of them.

Every image is float32 ``(channels, size, size)`` in [-1, 1], with the number of its class. A stream of batches is a
function of its seed alone: which images, in which order and which of them mirrored is decided in the process that
trains, so that worker processes only read. So one number, how many images were taken, says where a stream stands.
"""

from __future__ import annotations

import io
import random
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .ranks import ALONE, Ranks

#: What a folder's images are told by.
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

#: Pillow's modes that have 8 bits a channel or fewer. Pillow itself would clip those that have more.
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

#: One digit in this many is held out.
HELD_OUT = 5

#: So many broken images one after the other are no accident, whatever was asked.
BROKEN_IN_A_ROW = 100


class BrokenImage(ValueError):
    """An image that can't be used. The message names it and says why."""


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images of one size.

    Attributes:
        size, channels: of every image.
        classes: their names, by number.
        mirrors: whether an image's mirror image is one as well.
    """

    size: int
    channels: int
    classes: tuple[str, ...]
    mirrors: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its class. Raises :class:`BrokenImage`."""


class Digits(Images):
    """The 1797 handwritten digits that scikit-learn ships, 8×8 and in 17 shades, resized.

    Args:
        size: at least 4.
        part: ``"training"``, ``"held out"`` (every fifth, always the same ones) or ``"all"``.
    """

    channels = 1
    classes = tuple("0123456789")
    mirrors = False

    def __init__(self, size: int, part: str = "training") -> None:
        if size < 4:
            raise ValueError(f"size must be at least 4 for digits, got {size}")
        if part not in ("training", "held out", "all"):
            raise ValueError(f"part must be training, held out or all, got {part!r}")
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
        labels = torch.from_numpy(found.target).long()
        held_out = torch.arange(len(images)) % HELD_OUT == 0
        chosen = {"training": ~held_out, "held out": held_out, "all": torch.ones_like(held_out)}[part]
        self.size = size
        self.images = resized(images[chosen], size)
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Folder(Images):
    """A folder of images: every subfolder is a class, or all are one class where there are no subfolders.

    Args:
        path: the folder; subfolders of classes are read at any depth, and hidden files not at all.
        size: images are cropped to the square in their middle, and resized to this.
        grey: one channel; else three.

    Raises:
        ValueError: naming the folder, if it is none, or it or one of its classes has no image.
    """

    def __init__(self, path: Path, size: int, *, grey: bool = False) -> None:
        if not path.is_dir():
            raise ValueError(f"{path}: must be a folder of images, but there is no such folder")
        self.size, self.channels = size, 1 if grey else 3
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        loose = _images_in(path, "*")
        by_class = {folder.name: _images_in(folder, "**/*") for folder in folders}
        if loose and folders:
            raise ValueError(f"{path}: must have images, or subfolders of them for classes, not both: {loose[0].name}")
        if not folders:
            by_class = {path.name: loose}
        for name, found in by_class.items():
            if not found:
                folder = path / name if folders else path
                raise ValueError(f"{folder}: has no images ({', '.join(sorted(SUFFIXES))})")
        self.classes = tuple(by_class)
        self.files = [(file, label) for label, found in enumerate(by_class.values()) for file in found]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        try:
            return decoded(file.read_bytes(), self.size, self.channels), label
        except (BrokenImage, OSError) as error:
            raise BrokenImage(f"{file}: {error}") from error


class Lsun(Images):
    """An LMDB as LSUN has them, a database for a category: keys are names, values are encoded images.

    Args:
        path: the folder of ``data.mdb``.

    Raises:
        ValueError: naming the folder, if it is no such database, or an empty one.
    """

    def __init__(self, path: Path, size: int, *, grey: bool = False) -> None:
        self.path, self.size, self.channels = path, size, 1 if grey else 3
        self.classes = (path.name,)
        self._database: Any = None
        with self._opened().begin() as transaction:
            self.keys = list(transaction.cursor().iternext(values=False))
        if not self.keys:
            raise ValueError(f"{path}: has no images")

    def _opened(self) -> Any:
        """The database, opened once in each process: a handle must not be carried into another."""
        import lmdb

        if self._database is None:
            try:
                self._database = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise ValueError(f"{self.path}: can't be read as an LMDB ({error})") from error
        return self._database

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_database": None}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        key = self.keys[index]
        with self._opened().begin() as transaction:
            value = transaction.get(key)
        try:
            return decoded(value, self.size, self.channels), 0
        except BrokenImage as error:
            raise BrokenImage(f"{self.path}, {key.decode(errors='replace')}: {error}") from error


def open_images(where: str, size: int, *, grey: bool = False) -> Images:
    """Images by what the command line calls them: ``digits``, an LMDB's folder, or a folder of images.

    Raises:
        ValueError: naming ``where``, if there are no images.
    """
    if where == "digits":
        return Digits(size)
    path = Path(where)
    return (Lsun if (path / "data.mdb").exists() else Folder)(path, size, grey=grey)


def decoded(data: bytes, size: int, channels: int) -> Tensor:
    """An encoded image as float32 ``(channels, size, size)``. What is transparent is white.

    Raises:
        BrokenImage: if it can't be decoded, has more than 8 bits a channel, or is smaller than ``size`` either way.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise BrokenImage("can't be decoded (no kind of image that is known)") from error
    except Exception as error:  # decoders raise whatever they come across
        raise BrokenImage(f"can't be decoded ({error})") from error
    if image.mode not in MODES:
        raise BrokenImage(f"its mode must have 8 bits a channel, one of {', '.join(sorted(MODES))}, got {image.mode}")
    if min(image.size) < size:
        raise BrokenImage(f"must be at least {size} pixels each way, got {image.width}×{image.height}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, channels)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def resized(images: Tensor, size: int) -> Tensor:
    """``(N, C, H, W)`` to ``(N, C, size, size)``, bilinear; smaller ones are averages and not samples."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


class Batch(NamedTuple):
    """Images ``(N, C, H, W)``, and classes ``(N,)``, int64; None where a model knows no classes."""

    images: Tensor
    labels: Tensor | None


class Batches:
    """Endless batches ``(N, C, H, W)`` with classes ``(N,)``, in a random order.

    Every image comes once, then every image once in another order, and so on. A batch may reach over the end of such an
    epoch, so each has the same number of images.

    Args:
        images: what to read.
        batch: images in a batch.
        seed: of order and mirroring.
        taken: how many images an earlier stream of the same seed has given; this one goes on there.
        flip: mirror every second image or so, where the images are such as may be.
        workers: processes that read; 0 reads in this one. The batches are the same.
        on_error: ``"raise"`` names the first broken image and ends; ``"skip"`` takes the next image in its place.
        ranks: each is given its share of every batch.

    Attributes:
        taken: images given so far.
        skipped: messages of the broken images that were skipped.

    Raises:
        ValueError: if an argument is not as said. While iterating, :class:`BrokenImage`.
    """

    def __init__(
        self, images: Images, batch: int, seed: int, *, taken: int = 0, flip: bool = True, workers: int = 0,
        on_error: str = "raise", ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
        self.batch, self.taken = batch, taken
        self.skipped: set[str] = set()
        loader = DataLoader(
            _Reader(images, skip=on_error == "skip"),
            batch_sampler=_Order(len(images), batch, seed, taken, flip and images.mirrors, ranks),
            num_workers=workers,
            collate_fn=_collate,
            # Not forked: this process may have threads by now, and a fork keeps their locks without them.
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # or the loader would draw from the one that latents are drawn from
        )
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        images, labels, broken = next(self._batches)
        if images is None:
            raise BrokenImage(broken[0])
        self.skipped.update(broken)
        self.taken += self.batch
        return images, labels


class _Order:
    """What to read: endless lists of ``(index, mirrored)``."""

    def __init__(self, count: int, batch: int, seed: int, taken: int, flip: bool, ranks: Ranks) -> None:
        self.count, self.batch, self.seed, self.taken, self.flip = count, batch, seed, taken, flip
        self.share = slice(batch * ranks.rank // ranks.count, batch * (ranks.rank + 1) // ranks.count)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        keys = self._keys()
        while True:
            yield [next(keys) for _ in range(self.batch)][self.share]

    def _keys(self) -> Iterator[tuple[int, bool]]:
        epoch, place = divmod(self.taken, self.count)
        while True:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(63))
            order = torch.randperm(self.count, generator=generator)
            mirrored = torch.rand(self.count, generator=generator) < 0.5
            for index, flip in zip(order[place:].tolist(), mirrored[place:].tolist()):
                yield index, flip and self.flip
            epoch, place = epoch + 1, 0


class _Reader(Dataset[Any]):
    """Reads what an order asks for. What is broken is handed over and not raised: a worker's errors are pages long."""

    def __init__(self, images: Images, *, skip: bool) -> None:
        self.images, self.skip = images, skip

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor | None, int, list[str]]:
        index, mirrored = key
        broken: list[str] = []
        for offset in range(BROKEN_IN_A_ROW if self.skip else 1):
            try:
                image, label = self.images[(index + offset) % len(self.images)]
            except BrokenImage as error:
                broken.append(str(error))
            else:
                return image.flip(-1) if mirrored else image, label, broken
        return None, 0, broken


def _collate(
    read: list[tuple[Tensor | None, int, list[str]]],
) -> tuple[Tensor | None, Tensor | None, list[str]]:
    images = [image for image, _, _ in read if image is not None]
    if len(images) < len(read):
        return None, None, next(broken for image, _, broken in read if image is None)
    skipped = [message for _, _, broken in read for message in broken]
    return torch.stack(images), torch.tensor([label for _, label, _ in read]), skipped


def _images_in(folder: Path, pattern: str) -> list[Path]:
    found = (p for p in folder.glob(pattern) if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())
