"""Say what is on images: their likeliest classes, by a trained network or by an exported file in its runtime.

MODEL is a run folder, a file of foldconv, or an exported file (.onnx, .pt2, .pte, .xml, .param, .tflite). The images
are prepared as in training, as the file says. IMAGE is a file, a folder, which is searched, or - for an image on
standard input.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...deploy.formats import FORMATS
from ._common import Parser, UsageError, add_network_arguments, check_picture, count, open_named

HELP = "the likeliest classes of images"
EXAMPLES = (
    "foldconv predict runs/mine photo.jpg",
    "foldconv predict mine.onnx photos/ --top 3 --json",
    "foldconv predict runs/mine photos/ --picture predictions.png",
)
_ON_A_PICTURE = 24


def add_arguments(parser: Parser) -> None:
    """The model, the images, and how to show what was found."""
    parser.add_argument("model", metavar="MODEL", help="run folder, file of foldconv, or exported file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image, folder, or - for standard input")
    parser.add_argument("--top", metavar="N", type=count, default=5, help="classes to show (default: 5)")
    parser.add_argument(
        "--picture", metavar="FILE", help=f"PNG to draw the first {_ON_A_PICTURE} images into, with their classes"
    )
    add_network_arguments(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Prepare, compute, sort; the classes of each image as plain values and as a table."""
    import torch

    from ...errors import CheckpointError
    from ...network.table import align
    from ..data.preprocessing import expect_described, prepare

    if options.picture:
        check_picture(options.picture)
    compute, description = _model(options)
    if description.get("task", "classification") != "classification":
        return _answers(options, compute, description)
    if description.get("preprocessing") is None:
        raise CheckpointError(f"{options.model}: does not say how images are prepared; train and export it anew")
    steps = expect_described(description["preprocessing"], options.model)
    found, drawn = [], []
    for some in _batches(_images(options.images)):
        images = [_read(name, source) for name, source in some]
        drawn += images[: _ON_A_PICTURE - len(drawn)]
        for (name, _), output in zip(some, compute([prepare(image, steps) for image in images])):
            chances = torch.as_tensor(output).double().flatten().softmax(0)
            classes = _classes(description, len(chances), options.model)
            order = chances.argsort(descending=True)[: options.top].tolist()
            predictions = [{"class": classes[i], "index": i, "probability": float(chances[i])} for i in order]
            found.append({"image": name, "predictions": predictions})
    if options.picture:
        _draw(options.picture, drawn, found)
    rows = [("image", *(f"{i + 1}." for i in range(len(found[0]["predictions"]))))]
    for each in found:
        rows.append((each["image"], *(f"{100 * p['probability']:.1f} % {p['class']}" for p in each["predictions"])))
    return {"model": options.model, "images": found}, align(rows)


def _answers(
    options: argparse.Namespace, compute: Callable[[Sequence[Any]], list[Any]], description: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """What a segmentation or a detection says of each image."""
    import numpy as np
    import torch

    from ...network.table import align
    from ..tasks.pictures import write_grid
    from ..train.classification import task_of

    task = task_of(description["task"])
    if Path(options.model).suffix in FORMATS:
        raise UsageError("foldconv predict", f"{options.model}: an exported {task.name} cannot be shown; give its run")
    found, drawn, classes = [], [], [str(name) for name in description.get("classes") or ()]
    for name, source in _images(options.images):
        image = _read(name, source)
        (output,) = compute([task.read(image, description)])
        answers = task.answers(output, classes or [str(number) for number in range(256)])
        found.append({"image": name, "predictions": answers[: options.top]})
        if len(drawn) < _ON_A_PICTURE:
            drawn.append(task.painted(torch.from_numpy(np.array(image)).permute(2, 0, 1), output, classes))
    if options.picture:
        columns = min(4, len(drawn))
        rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
        write_grid(rows, (), options.picture, overwrite=False)
    most = max(len(each["predictions"]) for each in found)
    lines = [("image", *(f"{i + 1}." for i in range(most)))]
    for each in found:
        said = [f"{100 * p.get('probability', p.get('share')):.1f} % {p['class']}" for p in each["predictions"]]
        lines.append((each["image"], *said, *[""] * (most - len(said))))
    return {"model": options.model, "images": found}, align(lines)


def _model(options: argparse.Namespace) -> tuple[Callable[[Sequence[Any]], list[Any]], dict[str, Any]]:
    """What computes the outputs of prepared images, and the description of the file."""
    import torch

    if Path(options.model).suffix in FORMATS:
        from ...deploy.export import runner

        return runner(options.model)
    network, description = open_named(options, options.model)

    def compute(images: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return [network(image) for image in images]

    return compute, description


def _classes(description: dict[str, Any], number: int, model: str) -> list[str]:
    """The names of the classes, or their numbers."""
    from ...errors import CheckpointError, shown

    names = description.get("classes", description.get("labels"))
    if names is None:
        return [str(i) for i in range(number)]
    if not isinstance(names, (list, tuple)) or len(names) != number:
        raise CheckpointError(f"{model}: expected the names of {number} classes, received {shown(names)}")
    return [str(name) for name in names]


def _read(name: str, source: Any) -> Any:
    from ...errors import UnsupportedError
    from ..data.folders import read_rgb

    try:
        return read_rgb(source)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None


def _batches(images: Iterator[Any]) -> Iterator[list[Any]]:
    """So many at a time that a runtime is not started for each."""
    while some := list(itertools.islice(images, 64)):
        yield some


def _images(named: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each image's name, and what to read it from."""
    from ...errors import UnsupportedError
    from ..data.folders import image_files

    for name in named:
        if name == "-":
            import io

            yield name, io.BytesIO(sys.stdin.buffer.read())
        elif Path(name).is_dir():
            files = image_files(name)
            if not files:
                raise UnsupportedError(f"{name}: expected images in this folder, found none")
            yield from ((file, file) for file in files)
        elif not Path(name).exists():
            raise UnsupportedError(f"{name}: no such file or folder; expected images, or folders of them")
        else:
            yield name, name


def _draw(path: str, images: Sequence[Any], found: Sequence[dict[str, Any]]) -> None:
    """The images in a grid, above each its likeliest class."""
    import math

    from matplotlib.figure import Figure

    from ...files.atomic import atomic_path

    columns = min(6, math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(images):
            first = found[place]["predictions"][0]
            axes.imshow(images[place])
            axes.set_title(f"{first['class']}\n{100 * first['probability']:.0f} %", fontsize=9)
    with atomic_path(path, overwrite=False) as temporary:
        figure.savefig(temporary, dpi=120)
