"""Sets in one .npz file in Keras' layout. Never unpickled."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ...errors import UnsupportedError
from ...files.archives import check_archive, is_archive
from .arrays import Arrays, resized

KERAS = "x_train, y_train, x_test, y_test"


def read_npz(path: str | os.PathLike[str], image_size: int | None = None) -> Arrays:
    """Images and labels from a file, which is read again only when it has changed.

    Keras' layout: ``x_train``, ``y_train``, ``x_test``, ``y_test``, uint8 (N, H, W) or (N, H, W, C); ``classes`` may
    hold names.

    Args:
        path: the file.
        image_size: squares of so many pixels; None keeps the size, which is then the same for all images.

    Raises:
        FileNotFoundError: no such file.
        UnsupportedError: not such a file, or a damaged one, or one with pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data set (.npz), found no such file; check the path")
    state = path.stat()
    changes = state.st_ino, state.st_ctime_ns, state.st_mtime_ns, state.st_size
    return _read(str(path), (str(path.resolve()), *changes), image_size)


@functools.lru_cache(maxsize=2)
def _read(path: str, _identity: tuple, image_size: int | None) -> Arrays:
    arrays = _load(path)
    classes = _classes(path, arrays)
    missing = [key for key in KERAS.split(", ") if key not in arrays]
    if missing:
        has = f"which has {', '.join(sorted(arrays))}" if arrays else "which has none"
        expected = f"expected {KERAS}; save pixels so, not encoded images, with numpy.savez"
        raise UnsupportedError(f"{path}: no {', '.join(missing)} in this file, {has}; {expected}")
    train, test = (resized(_pixels(path, key, arrays[key]), image_size) for key in ("x_train", "x_test"))
    if train.shape[1:] != test.shape[1:]:
        shapes = f"received {tuple(train.shape[1:])} for training and {tuple(test.shape[1:])} for testing"
        raise UnsupportedError(
            f"{path}: expected images of one shape, {shapes} (channels, height, width); give image_size"
        )
    labels = [_labels(path, key, arrays[key], len(images)) for key, images in (("y_train", train), ("y_test", test))]
    return Arrays(path, train, labels[0], test, labels[1], classes)


def _load(path: str) -> dict[str, np.ndarray]:
    try:
        if is_archive(path):
            check_archive(path, compressed=True)
        with open(path, "rb") as stream:  # NumPy leaves a file open that it cannot read
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UnsupportedError(f"{path}: expected an .npz file with {KERAS}, received a single array")
            with file:
                arrays = {key: file[key] for key in file.files if key in (*KERAS.split(", "), "classes")}
            for key, array in arrays.items():
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{key} is no array")
            return arrays
    except UnsupportedError:
        raise
    except Exception as error:  # NumPy reads headers as Python, and raises what zipfile, zlib and Python's parser do
        if "allow_pickle" in str(error):
            reason = "one with pickled objects, which could run code; save plain arrays with numpy.savez"
        else:
            reason = f"a damaged or truncated one ({' '.join(str(error).split())}); copy or write it again"
        raise UnsupportedError(f"{path}: expected an .npz file with {KERAS}, received {reason}") from error


def _classes(path: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    if "classes" not in arrays:
        return None
    names = arrays["classes"]
    if names.ndim != 1 or names.dtype.kind not in "US" or not len(names):
        received = f"received {names.dtype} of shape {names.shape}"
        raise UnsupportedError(f"{path}: classes: expected one text per class, {received}")
    try:
        return tuple(map(str, np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names))
    except (UnicodeError, SystemError):  # Python's own, for a code beyond the last character
        raise UnsupportedError(f"{path}: classes: expected one text per class, received what is no Unicode") from None


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
