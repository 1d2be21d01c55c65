"""Pictures as a checkpoint wants them: from a folder, or seeded noise.

The steps are timm's evaluation transform: RGB, resize with antialiasing so that the short side becomes
``floor(size / crop_pct)``, crop the centre, scale to 0-1, normalise. Beyond timm, the camera's orientation is applied.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nextvit_models.errors import DeployError
from nextvit_models.preprocessing import Preprocessing

SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UNREADABLE: Final = (
    EOFError,
    OSError,
    SyntaxError,  # what Pillow raises on a broken PNG
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_NAMED: Final = 3
"""How many of the unreadable pictures a message names."""
_LONGEST: Final = 100_000
"""Pixels along the longer side after the resize; a strip of 1 x 5000 would take a gigabyte."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Pictures cut to size but not yet normalised.

    ``pixels`` is (N, 3, H, W) uint8 RGB, read-only. ``labels`` holds each picture's class folder, None where there is
    none. ``fingerprint`` is the SHA-256 of shape, pixels, mean and std: equal when ``normalised()`` is. ``source``
    says in words where the pictures come from.
    """

    pixels: NDArray[np.uint8]
    preprocessing: Preprocessing
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def normalised(self) -> NDArray[np.float32]:
        """(pixels / 255 - mean) / std, (N, 3, H, W) float32, in torchvision's order of operations."""
        result = self.pixels.astype(np.float32)
        result /= np.float32(255)
        result -= _per_channel(self.preprocessing.mean)
        result /= _per_channel(self.preprocessing.std)
        return result

    @property
    def fingerprint(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        header = f"{self.pixels.shape} {self.preprocessing.mean} {self.preprocessing.std} "
        return hashlib.sha256(header.encode() + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of a folder that are read when they are asked for, so that memory doesn't grow with their number.

    ``size`` is (height, width) in pixels; ``total`` counts what else the folder holds.
    """

    folder: Path
    paths: tuple[Path, ...]
    total: int
    size: tuple[int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """Where each picture is in the folder, ``readable``."""
        return tuple(readable(path.relative_to(self.folder).as_posix()) for path in self.paths)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """Each picture's class folder, None where there is none."""
        return tuple(_label(path.relative_to(self.folder)) for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes in their order, and of what becomes of them; reads every file, decodes none."""
        digest = hashlib.sha256(f"{self.size} {sorted(self.preprocessing.as_dict().items())} ".encode())
        for path in self.paths:
            digest.update(hashlib.sha256(_bytes_of(path, self.folder)).digest())
        return digest.hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> ImageSet:
        """Those from ``start`` to before ``stop``; raises DeployError naming what can't be read."""
        some = slice(start, stop)
        return ImageSet(
            pixels=_read_all(self.paths[some], self.folder, self.size, self.preprocessing),
            preprocessing=self.preprocessing,
            names=self.names[some],
            labels=self.labels[some],
            source=f"{self.total} images in {self.folder.resolve().name}, {len(self.paths[some])} used",
        )


def find_pictures(folder: Path, limit: int | None, size: tuple[int, int], preprocessing: Preprocessing) -> Pictures:
    """The first ``limit`` pictures of a folder, all where it is None, one of each subfolder in turn; none is read.

    ``size`` is (height, width) in pixels. Raises DeployError when there is no picture, or the folder can't be listed.
    """
    if limit is not None and limit < 1:
        raise DeployError(f"asked for {limit} images; ask for at least 1")
    groups = _find(folder)
    paths = tuple(islice(_in_turns(groups), limit))
    if not paths:
        raise DeployError(f"no image in {folder}; it takes {', '.join(sorted(SUFFIXES))}")
    return Pictures(folder, paths, sum(len(group) for group in groups), size, preprocessing)


def load_images(folder: Path, limit: int, size: tuple[int, int], preprocessing: Preprocessing) -> ImageSet:
    """Read up to ``limit`` pictures below ``folder`` and cut them to ``size`` (height, width).

    A folder below ``folder`` is a class; the pictures are taken in turns from all of them, in the order of their
    names, so that a few pictures already show many classes. Raises DeployError when there is no picture, or when one
    that was to be used cannot be read: none is skipped.
    """
    return find_pictures(folder, limit, size, preprocessing).read()


def readable(name: str) -> str:
    """A file's name in characters that can be written anywhere: bytes of it that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def enlarged(images: ImageSet, count: int, size: tuple[int, int]) -> ImageSet:
    """``count`` of the images, from the first on and again where there are fewer, stretched to ``size``.

    ``size`` is (height, width) in pixels.
    """
    height, width = size
    chosen = [index % len(images) for index in range(count)]
    pixels = np.empty((count, 3, height, width), np.uint8)
    for place, index in enumerate(chosen):
        picture = Image.fromarray(images.pixels[index].transpose(1, 2, 0))
        pixels[place] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return ImageSet(
        pixels=_frozen(pixels),
        preprocessing=images.preprocessing,
        names=tuple(images.names[index] for index in chosen),
        labels=tuple(images.labels[index] for index in chosen),
        source=f"{images.source}, at {height}x{width}",
    )


def noise_images(count: int, size: tuple[int, int], preprocessing: Preprocessing, seed: int) -> ImageSet:
    """Seeded pictures of tinted blobs and grain, spread as the pictures the checkpoint was trained on.

    Each channel has about the mean and deviation of ``preprocessing``, clipped to 0-255, so that the network works
    in its usual range. ``size`` is (height, width). The same arguments give the same pixels.
    """
    if count < 1:
        raise DeployError(f"asked for {count} images; ask for at least 1")
    generator = np.random.default_rng(seed)
    standard = np.stack([_standard_noise(generator, size) for _ in range(count)])
    pixels = 255 * (_per_channel(preprocessing.mean) + _per_channel(preprocessing.std) * standard)
    return ImageSet(
        pixels=_frozen(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)),
        preprocessing=preprocessing,
        names=tuple(f"noise-{index}" for index in range(count)),
        labels=(None,) * count,
        source=f"{count} noise images, seed {seed}",
    )


def _per_channel(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(3, 1, 1)


def _frozen(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels.setflags(write=False)
    return pixels


def _standard_noise(generator: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """(3, H, W) of mean about 0 and deviation about 1: a tint, large blobs, grain."""
    height, width = size
    tint = 0.4 * generator.standard_normal((3, 1, 1), np.float32)
    coarse = generator.standard_normal((3, 6, 6), np.float32)
    blobs = np.stack([_enlarge(channel, size) for channel in coarse])
    grain = 0.5 * generator.standard_normal((3, height, width), np.float32)
    return (tint + blobs + grain).astype(np.float32)


def _enlarge(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    height, width = size
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def _find(folder: Path) -> list[list[Path]]:
    """The pictures of each folder in the order of names; the folders in theirs. Hidden names are passed over."""
    if not folder.is_dir():
        raise DeployError(f"{folder} is not a folder; name one that holds images")
    groups: list[list[Path]] = []
    seen: set[str] = set()
    try:
        for parent, folders, files in os.walk(folder, onerror=_reraise, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()  # a link back up
                continue
            seen.add(real)
            if pictures := [Path(parent, name) for name in sorted(files) if _is_picture(name)]:
                groups.append(pictures)
    except OSError as error:
        raise DeployError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from error
    return groups


def _reraise(error: OSError) -> None:
    raise error


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _in_turns(groups: Sequence[Sequence[Path]]) -> Iterator[Path]:
    """The first of each group, then the second of each, and so on."""
    return (path for row in zip_longest(*groups) for path in row if path is not None)


def _bytes_of(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        name = path.relative_to(folder).as_posix()
        raise DeployError(f"{name} in {folder} cannot be read: {error.strerror}; repair or remove it") from error


def _label(path: Path) -> str | None:
    """The topmost folder, as image-folder datasets name their classes."""
    return path.parts[0] if len(path.parts) > 1 else None


def _read_all(
    paths: Sequence[Path], folder: Path, size: tuple[int, int], preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    pixels = np.empty((len(paths), 3, *size), np.uint8)
    unreadable: list[str] = []
    for index, path in enumerate(paths):
        try:
            pixels[index] = _read(path, size, preprocessing)
        except _UNREADABLE:
            unreadable.append(path.relative_to(folder).as_posix())
    if unreadable:
        named = ", ".join(unreadable[:_NAMED]) + (", ..." if len(unreadable) > _NAMED else "")
        raise DeployError(
            f"{len(unreadable)} of {len(paths)} images in {folder} cannot be read: {named}; repair or remove them"
        )
    return _frozen(pixels)


def _read(path: Path, size: tuple[int, int], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One picture, (3, H, W) uint8. Raises one of ``_UNREADABLE``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            picture = to_rgb(ImageOps.exif_transpose(opened))
    return np.asarray(_cut(picture, size, preprocessing)).transpose(2, 0, 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels of eight bits; transparency is dropped, 16-bit grey keeps its upper half."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in {"I", "F"}:
        raise ValueError("32 bits per channel")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _cut(picture: Image.Image, size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resize so that the picture just covers ``size / crop_pct``, then take the middle."""
    height, width = size
    cover_height, cover_width = map(preprocessing.cover, size)
    if cover_height * picture.width >= cover_width * picture.height:
        scaled = cover_height * picture.width // picture.height, cover_height
    else:
        scaled = cover_width, cover_width * picture.height // picture.width
    if max(scaled) > _LONGEST:
        raise ValueError("too long and thin")
    picture = picture.resize(scaled, _FILTERS[preprocessing.interpolation])
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))
