"""Sets in one .npz file: Keras' layout, or JPEG bytes. Never unpickled."""

from __future__ import annotations

import functools
import io
import itertools
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ...errors import UnsupportedError
from .arrays import Arrays, resized

KERAS = "x_train, y_train, x_test, y_test"
JPEG = "jpeg_train, offsets_train, y_train, jpeg_test, offsets_test, y_test"


def read_npz(path: str | os.PathLike[str], image_size: int | None = None, corrupt_images: str = "error") -> Arrays:
    """Images and labels from a file, which is read again only when it has changed.

    Keras' layout: ``x_train``, ``y_train``, ``x_test``, ``y_test``, uint8 (N, H, W) or (N, H, W, C). Or encoded
    images (JPEG, PNG): ``jpeg_train``, all bytes in a row, and ``offsets_train``, where image i is
    ``jpeg_train[offsets_train[i]:offsets_train[i + 1]]``; ``y_train``; the same for test. ``classes`` may hold names.

    Args:
        path: the file.
        image_size: squares of so many pixels; None keeps the size, which is then the same for all images.
        corrupt_images: "error", or "skip" to leave out images that cannot be decoded.

    Raises:
        FileNotFoundError: no such file.
        UnsupportedError: not such a file, or a damaged one, or one with pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data set (.npz), found no such file; check the path")
    state = path.stat()
    return _read(str(path), (str(path.resolve()), state.st_mtime_ns, state.st_size), image_size, corrupt_images)


@functools.lru_cache(maxsize=2)
def _read(path: str, _identity: tuple, image_size: int | None, corrupt_images: str) -> Arrays:
    arrays = _load(path)
    classes = _classes(path, arrays)
    if "x_train" in arrays:
        _expect(path, arrays, KERAS)
        train, test = (_pixels(path, f"x_{split}", arrays[f"x_{split}"]) for split in ("train", "test"))
        unread: set[str] = set()
        kept = [torch.arange(len(train)), torch.arange(len(test))]
    else:
        _expect(path, arrays, JPEG)
        unread = set()
        grey = _is_grey(arrays)
        (train, kept_train), (test, kept_test) = (
            _decode(path, split, arrays, grey, image_size, corrupt_images, unread) for split in ("train", "test")
        )
        kept = [kept_train, kept_test]
    train, test = resized(train, image_size), resized(test, image_size)
    if train.shape[1:] != test.shape[1:]:
        shapes = f"received {tuple(train.shape[1:])} for training and {tuple(test.shape[1:])} for testing"
        raise UnsupportedError(
            f"{path}: expected images of one shape, {shapes} (channels, height, width); give image_size"
        )
    labels = [
        _labels(path, f"y_{split}", arrays[f"y_{split}"], count)[index]
        for split, index, count in zip(("train", "test"), kept, (_count(arrays, s) for s in ("train", "test")))
    ]
    return Arrays(path, train, labels[0], test, labels[1], classes, frozenset(unread))


def _load(path: str) -> dict[str, np.ndarray]:
    wanted = {*KERAS.split(", "), *JPEG.split(", "), "classes"}
    try:
        with open(path, "rb") as stream:  # NumPy leaves a file open that it cannot read
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UnsupportedError(f"{path}: expected an .npz file with {KERAS}, received a single array")
            with file:
                return {key: file[key] for key in file.files if key in wanted}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, UnsupportedError):
            raise
        if "allow_pickle" in str(error):
            reason = "one with pickled objects, which could run code; save plain arrays with numpy.savez"
        else:
            reason = f"a damaged or truncated one ({' '.join(str(error).split())}); copy or write it again"
        raise UnsupportedError(f"{path}: expected an .npz file with {KERAS}, received {reason}") from error


def _expect(path: str, arrays: Mapping[str, np.ndarray], layout: str) -> None:
    missing = [key for key in layout.split(", ") if key not in arrays]
    if missing:
        has = f"which has {', '.join(sorted(arrays))}" if arrays else "which has none of them"
        other = f"; expected {layout}" if "x_train" in arrays else f"; expected {KERAS}, or {JPEG}"
        raise UnsupportedError(f"{path}: no {', '.join(missing)} in this file, {has}{other}")


def _count(arrays: Mapping[str, np.ndarray], split: str) -> int:
    return len(arrays[f"x_{split}"]) if f"x_{split}" in arrays else len(arrays[f"offsets_{split}"]) - 1


def _classes(path: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    if "classes" not in arrays:
        return None
    names = arrays["classes"]
    if names.ndim != 1 or names.dtype.kind not in "US" or not len(names):
        received = f"received {names.dtype} of shape {names.shape}"
        raise UnsupportedError(f"{path}: classes: expected one text per class, {received}")
    return tuple(map(str, np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names))


def _pixels(path: str, key: str, array: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    received = f"received {array.dtype} of shape {array.shape}"
    if array.dtype != np.uint8:
        raise UnsupportedError(f"{path}: {key}: expected uint8 pixels, {received}; convert with .astype('uint8')")
    if array.ndim not in (3, 4) or 0 in array.shape or (array.ndim == 4 and array.shape[3] > 4):
        remedy = "put the channels last" if array.ndim == 4 else "one array for all images"
        raise UnsupportedError(
            f"{path}: {key}: expected images of shape (N, H, W) or (N, H, W, C), {received}; {remedy}"
        )
    images = torch.from_numpy(array)
    return images.unsqueeze(1) if array.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _labels(path: str, key: str, array: np.ndarray, count: int) -> torch.Tensor:
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array  # Keras' CIFAR: (N, 1)
    if flat.dtype.kind not in "iu" or flat.shape != (count,):
        expected = f"expected {count} whole numbers, one label per image"
        raise UnsupportedError(f"{path}: {key}: {expected}, received {array.dtype} of shape {array.shape}")
    return torch.from_numpy(flat.astype(np.int64))


def _is_grey(arrays: Mapping[str, np.ndarray]) -> bool:
    """All images get the channels of the first one."""
    from PIL import Image

    try:
        start, stop = arrays["offsets_train"][:2].tolist()
        with Image.open(io.BytesIO(arrays["jpeg_train"][start:stop].tobytes())) as image:
            return image.mode == "L"
    except Exception:  # whatever is wrong with it is said when it is decoded
        return False


def _decode(
    path: str,
    split: str,
    arrays: Mapping[str, np.ndarray],
    grey: bool,
    image_size: int | None,
    corrupt_images: str,
    unread: set[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (N, C, H, W) of a split that can be read, and which these are."""
    from PIL import Image, UnidentifiedImageError

    data, offsets = arrays[f"jpeg_{split}"], arrays[f"offsets_{split}"]
    if data.dtype != np.uint8 or data.ndim != 1:
        raise UnsupportedError(f"{path}: jpeg_{split}: expected bytes in a row, received {data.dtype} {data.shape}")
    fits = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not fits or int(offsets[0]) < 0 or int(offsets[-1]) > len(data) or bool((offsets[1:] < offsets[:-1]).any()):
        expected = f"expected growing positions, one more than images, up to the {len(data)} bytes of jpeg_{split}"
        last = f", the last {offsets[-1]}" if fits else f" of shape {offsets.shape}"
        raise UnsupportedError(f"{path}: offsets_{split}: {expected}, received {offsets.dtype}{last}; write it again")
    mode = "L" if grey else "RGB"
    whole, images, kept = data.tobytes(), [], []
    for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        place = f"{path}: jpeg_{split}[{i}]"
        try:
            with Image.open(io.BytesIO(whole[start:stop])) as image:
                pixels = torch.from_numpy(np.array(image.convert(mode)))
        except Exception as error:  # decoders raise all kinds, for bytes that anybody may have written
            if corrupt_images == "skip":
                unread.add(place)
                continue
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "of no known format" if unknown else " ".join(str(error).split())
            remedy = "replace it, or leave such images out with corrupt_images: skip"
            expected = f"expected an image, received {stop - start} bytes ({reason})"
            raise UnsupportedError(f"{place}: {expected}; {remedy}") from error
        tensor = resized((pixels.unsqueeze(0) if grey else pixels.permute(2, 0, 1)).unsqueeze(0), image_size)[0]
        if images and tensor.shape != images[0].shape:
            expected = f"expected shape {tuple(images[0].shape)} as of the first image"
            raise UnsupportedError(f"{place}: {expected}, received {tuple(tensor.shape)}; give image_size")
        images.append(tensor)
        kept.append(i)
    if not images:
        raise UnsupportedError(f"{path}: jpeg_{split}: expected images, received none that can be read")
    return torch.stack(images), torch.tensor(kept)
