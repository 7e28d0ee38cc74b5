"""int8 for ONNX Runtime: QDQ by its own static quantization, and what it then computes in int8."""

# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import collections
import logging
import os
import tempfile
from typing import Any

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantize(source: str, target: str, batches: list, settings: dict) -> None:
    """Write a float file's network in int8.

    Activations are unsigned: signed ones leave, on x86, every convolution in float whose input has a second reader,
    such as a residual sum. Transposed convolutions stay, since the runtime has none in int8 and rounding around them
    would only cost.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry

    logging.disable(logging.WARNING)  # it recommends what folding has done
    model = _unshared(onnx.load(source))
    graph = model.graph
    weights = {value.name for value in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.left, None)
            return None if batch is None else dict(zip(names, batch))

    quantize_static(
        model,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=settings["per_channel"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=sorted(set(QDQRegistry) - {"ConvTranspose"}),
        # A product's output is rounded only for the next layer's sake: the network's own output would only lose.
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        nodes_to_exclude=[node.name for name, node in _layers(graph, settings["layers"]) if name in settings["keep"]],
    )


def _unshared(model: Any) -> Any:
    """The model with a weight of its own for each call: with one for two, a session told to be exact does not load."""
    values, seen = {value.name: value for value in model.graph.initializer}, set()
    for number, node in enumerate(model.graph.node):
        name = node.input[1] if node.op_type in _LAYERS else None
        if name in seen and name in values:
            own = model.graph.initializer.add()
            own.CopyFrom(values[name])
            own.name = node.input[1] = f"{name}_{number}"
        seen.add(name)
    return model


def notes(target: str, batches: list) -> list[str]:
    """What a user should know of this file on this machine.

    Without VNNI, x86 processors add two products of 8 bits in 16, which overflow; a session can be told to be exact.
    """
    import numpy as np
    import onnxruntime

    outputs = []
    for exact in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", exact)
        session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
        fed = dict(zip((value.name for value in session.get_inputs()), batches[0]))
        outputs.append(np.concatenate([np.ravel(value) for value in session.run(None, fed)]).astype(np.float64))
    change = np.linalg.norm(outputs[0] - outputs[1]) / max(np.linalg.norm(outputs[1]), 1e-30)
    if change <= 1e-3:
        return []
    return [
        f"this processor has no VNNI and lets sums of 8-bit products overflow, which changes the output by "
        f"{100 * change:.1f} %: there, set the session option session.x64quantprecision to 1 (exact, slower), or "
        "quantize per tensor"
    ]


def int8_layers(source: str, target: str, settings: dict) -> list[str]:
    """The layers that ONNX Runtime computes in int8: those that its own optimization of the file makes integer ones."""
    import onnx
    import onnxruntime

    needed = collections.Counter(
        (name, _weight(node)) for name, node in _layers(_unshared(onnx.load(source)).graph, settings["layers"])
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Beyond this level layouts change and names with them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    integer = collections.Counter(value for node in nodes if node.op_type.startswith("Q") for value in node.input)
    short = {name for (name, weight), count in needed.items() if integer[f"{weight}_quantized"] < count}
    return [name for name in dict.fromkeys(name for name, _ in needed) if name not in short]


def _layers(graph: Any, names: list[str]) -> list[tuple[str, Any]]:
    """Each node that is a layer of the network, with the layer's name, which its exporter noted or its weight has."""
    found = []
    for node in graph.node:
        if node.op_type in _LAYERS:
            noted = [prop.value for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
            scopes = ast.literal_eval(noted[0]) if noted else []
            known = [scope for scope in scopes if scope in names] or [_weight(node).removesuffix(".weight")]
            if known[-1] in names:
                found.append((known[-1], node))
    return found


def _weight(node: Any) -> str:
    return node.input[1]
