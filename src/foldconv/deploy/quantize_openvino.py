"""int8 for OpenVINO by NNCF, and what the compiled network then computes in int8."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import re
import sys
from typing import Any

_CALL = re.compile(r"(conv\w*?|linear)(?:_(\d+))?/")
"""An operation is named after the call that it comes from."""


def quantize(source: str, target: str, batches: list, settings: dict) -> None:
    """Write a float file's network in int8, all samples of `batches` looked at.

    NNCF quantizes weights per channel always, and corrects biases.
    """
    os.environ["NNCF_CI"] = "1"  # it sends nothing
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    left = [node for name, node in _nodes(model, settings["calls"]).items() if name in settings["keep"]]
    quantized = nncf.quantize(
        model,
        nncf.Dataset([batch if len(batch) > 1 else batch[0] for batch in batches]),
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=[node for nodes in left for node in nodes]),
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def int8_layers(source: str, target: str, settings: dict) -> list[str]:
    """The layers that OpenVINO's CPU plugin computes in int8: whose primitive in the compiled network is one."""
    import openvino

    compiled = openvino.Core().compile_model(target, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    integer: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        known = node.get_rt_info()
        if known["primitiveType"].astype(str).rpartition("_")[2].lower() in ("i8", "u8"):
            integer.update(known["originalLayersNames"].astype(str).split(","))
            integer.add(node.get_friendly_name())
    calls = {name.partition("/")[0] for name in integer if _CALL.match(name)}
    nodes = _nodes(openvino.Core().read_model(source), settings["calls"])
    return [name for name, found in nodes.items() if found and all(node.partition("/")[0] in calls for node in found)]


def _nodes(model: Any, calls: list) -> dict[str, list[str]]:
    """The names of the operations of each layer.

    Convolutions, and products with matrices, come in the order in which the network calls them.
    """
    kinds: dict[str, list[tuple[int, str]]] = {"conv": [], "linear": []}
    for node in model.get_ordered_ops():
        named = _CALL.match(node.get_friendly_name())
        if named and ("Convolution" in node.get_type_name() or node.get_type_name() == "MatMul"):
            kinds["conv" if named[1] != "linear" else "linear"].append((int(named[2] or 0), node.get_friendly_name()))
    found: dict[str, list[str]] = {}
    for kind, nodes in kinds.items():
        asked = [name for called, name in calls if called == kind]
        if len(asked) != len(nodes):
            raise RuntimeError(f"expected {len(asked)} {kind} operations, as the network calls, found {len(nodes)}")
        for name, (_, node) in zip(asked, sorted(nodes)):
            if name is not None:
                found.setdefault(name, []).append(node)
    return found
