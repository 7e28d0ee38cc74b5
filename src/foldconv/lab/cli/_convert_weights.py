"""Move weights between PyTorch's, Keras' and Gluon's checkpoints of the same network; the function is kept.

The template is a checkpoint of the target's framework, such as of the network as it was made: it gives names, shapes
and whatever a file holds besides weights. Which layer went where is printed; what order and shapes leave open is asked.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ._common import Parser, add_network_arguments, check_out, open_named

HELP = "move weights between PyTorch, Keras and Gluon"
EXAMPLES = (
    "foldconv convert-weights net.safetensors net.keras --like made.keras",
    "foldconv convert-weights runs/digits-digits_resnet-doconv/last.ckpt net.params --like made.params",
    "foldconv convert-weights resnet50.pth resnet50.weights.h5 --like keras.keras --names "
    "layer1.0.conv3=conv2_block1_3_conv --json",
)


def add_arguments(parser: Parser) -> None:
    """Files, and what they do not tell."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=".safetensors, .pt, .pth, .ckpt of foldconv, .keras, .weights.h5 or .params; no code in it is run",
    )
    parser.add_argument("out", metavar="OUT", help="file to write; an existing one is never overwritten")
    parser.add_argument("--like", metavar="TEMPLATE", required=True, help="checkpoint of the target's network")
    parser.add_argument(
        "--names",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE=TARGET",
        help="layers that order and shapes do not tell, or a JSON file of such pairs",
    )
    parser.add_argument("--source-eps", type=float, metavar="EPS", help="of the source's norms, where no file tells")
    parser.add_argument("--target-eps", type=float, metavar="EPS", help="of the target's norms, where no file tells")
    parser.add_argument(
        "--flatten",
        nargs="+",
        action="extend",
        type=_flattened,
        default=[],
        metavar="LAYER=HxWxC",
        help="Keras' dense layers that read a flattened map, or LAYER=no, where no file tells",
    )
    add_network_arguments(parser)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Convert; the pairs as plain values and as a table."""
    check_out(options.out)

    from ...files.convert import convert_weights

    conversion = convert_weights(
        _source(options),
        options.out,
        like=options.like,
        names=_names(options.names),
        source_eps=options.source_eps,
        target_eps=options.target_eps,
        flatten=dict(options.flatten),
    )
    result = {"source": options.source, "out": options.out, "layers": conversion.layers, "notes": conversion.notes}
    return result, str(conversion)


def _source(options: argparse.Namespace) -> Any:
    """The network, where a file or the user says which: it tells more than its tensors do. Else the path."""
    path = options.source
    if options.architecture or path.endswith(".ckpt") or _names_its_network(path):
        return open_named(options, path)[0]
    return path


def _names_its_network(path: str) -> bool:
    from ...errors import CheckpointError
    from ...files.native import read_description

    if not path.endswith(".safetensors"):
        return False
    try:
        return "architecture" in (read_description(path).get("extra") or {})
    except CheckpointError:
        return False


def _names(given: list[str]) -> dict[str, str]:
    from ...errors import CheckpointError

    found: dict[str, str] = {}
    for word in given:
        source, equals, target = word.partition("=")
        if equals and source and target:
            found[source] = target
            continue
        try:
            with open(word, encoding="utf-8") as file:
                content = json.load(file)
            assert isinstance(content, dict)
            found |= {str(key): str(value) for key, value in content.items()}
        except (OSError, ValueError, AssertionError):
            raise CheckpointError(
                f"--names {word}: expected SOURCE=TARGET, or a file with a JSON object of such pairs"
            ) from None
    return found


def _flattened(text: str) -> tuple[str, tuple[int, ...] | None]:
    """``LAYER=HxWxC``.

    >>> _flattened("fc=7x7x64"), _flattened("fc=no")
    (('fc', (7, 7, 64)), ('fc', None))
    """
    name, equals, shape = text.rpartition("=")
    sizes = shape.split("x")
    if not equals or not name or not (shape == "no" or all(size.isdigit() for size in sizes)):
        raise argparse.ArgumentTypeError(f"expected LAYER=HxWxC or LAYER=no, received {text!r}")
    return name, None if shape == "no" else tuple(map(int, sizes))
