"""int8 for ExecuTorch: PT2E with XNNPACK's quantizer, and what was lowered in int8."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from typing import Any

_BESIDE = ".int8.json"


def quantize(source: str, target: str, batches: list, settings: dict) -> None:
    """Write a program of torch.export in int8; what the lowered graph has in int8 is noted for `int8_layers`."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program: Any = torch.export.load(source)
    keep, known = set(settings["keep"]), settings["layers"]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(settings["per_channel"]))
    quantizer.set_filter_function(lambda node: _layer(node, known) not in keep)
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(*map(torch.from_numpy, batch))
        again = torch.export.export(
            convert_pt2e(prepared), program.example_inputs[0], dynamic_shapes=_shapes(program, settings)
        )
    edge = to_edge_transform_and_lower(again, partitioner=[XnnpackPartitioner()])
    with open(target + _BESIDE, "w", encoding="utf-8") as file:
        json.dump(_lowered(edge.exported_program(), known), file)
    with open(target, "wb") as file:
        edge.to_executorch().write_to_file(file)


def int8_layers(source: str, target: str, settings: dict) -> list[str]:
    """The layers that XNNPACK gets in int8, as the graph says that became the file."""
    import os

    with open(target + _BESIDE, encoding="utf-8") as file:
        found = json.load(file)
    os.unlink(target + _BESIDE)
    return [name for name in settings["layers"] if found.get(name)]


def _shapes(program: Any, settings: dict) -> Any:
    import torch

    if not settings["any_batch"]:
        return None
    size, shapes = torch.export.Dim("batch", max=settings["bound"]), torch.export.ShapesCollection()
    for value in program.example_inputs[0]:
        shapes[value] = {0: size}
    return shapes


def _lowered(program: Any, known: list[str]) -> dict[str, bool]:
    """For each layer whether all its calls are XNNPACK's, with rounded inputs and weights."""
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    found: dict[str, bool] = {}

    def look(graph_module: Any, delegated: bool) -> None:
        for node in graph_module.graph.nodes:
            target = str(node.target)
            if node.op == "call_function" and any(word in target for word in ("convolution", "linear", "addmm", ".mm")):
                name = _layer(node, known)
                if name is not None:
                    used = node.args[1:3] if "addmm" in target else node.args[:2]
                    rounded = all("dequantize" in str(_origin(value).target) for value in used)
                    found[name] = found.get(name, True) and delegated and rounded
        for _, child in graph_module.named_children():
            if isinstance(child, LoweredBackendModule):
                look(child.original_module.graph_module, True)

    look(program.graph_module, False)
    return found


def _origin(node: Any) -> Any:
    """What a value was before it was laid out otherwise."""
    while node.op == "call_function" and any(
        word in str(node.target) for word in ("permute", "transpose", ".t.", "t_copy", "view", "clone", "_to_dim_order")
    ):
        node = node.args[0]
    return node


def _layer(node: Any, known: list[str]) -> str | None:
    """The innermost layer whose code made a node."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        name = path.removeprefix("L['self'].")
        if name in known:
            return name
    return None
