"""int8 for LiteRT: the dynamic recipe of ai-edge-quantizer, and which weights the file then has in int8."""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import re
from typing import Any

_LAYERS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "CONV_3D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1}
_LAYERS |= {"CONV_3D_TRANSPOSE": 1, "BATCH_MATMUL": 1}
"""Operations that have a weight, and which of their inputs it is."""


def quantize(source: str, target: str, batches: list, settings: dict) -> None:
    """Write a float file's network with weights in int8; activations are rounded while it runs, by their own range."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope

    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    made = quantizer.Quantizer(source)
    granularity = qtyping.QuantGranularity
    made.add_dynamic_config(
        *(".*", everything, 8),
        granularity=granularity.CHANNELWISE if settings["per_channel"] else granularity.TENSORWISE,
    )
    tensors, found = _operations(source)
    for operation, weight in found:
        if settings["weights"].get(fingerprint(weight)) in settings["keep"]:
            scope = f"^{re.escape(get_op_scope(operation, tensors))}$"
            made.update_quantization_recipe(
                scope, everything, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
            )
    made.quantize().export_model(target, overwrite=True)


def int8_layers(source: str, target: str, settings: dict) -> list[str]:
    """The layers all of whose weights are int8 in the file; their operations are those of the float file, in order."""
    import numpy as np

    found: dict[str, bool] = {}
    for (_, weight), (_, written) in zip(_operations(source)[1], _operations(target)[1], strict=True):
        name = settings["weights"].get(fingerprint(weight))
        if name is not None:
            found[name] = found.get(name, True) and written.dtype == np.int8
    return [name for name in settings["layers"] if found.get(name)]


def fingerprint(weight: Any) -> str:
    """What a weight has in any order of its dimensions."""
    import numpy as np

    return hashlib.sha256(np.sort(np.asarray(weight, np.float32), axis=None).tobytes()).hexdigest()


def _operations(path: str) -> tuple[list, list[tuple[Any, Any]]]:
    """The tensors, and each operation with its constant weight."""
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(path)
    graph = model.subgraphs[0]
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    dtypes = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT8: np.int8}
    found = []
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex]
        place = _LAYERS.get(names[max(code.builtinCode, code.deprecatedBuiltinCode)])
        if place is not None:
            tensor = graph.tensors[operation.inputs[place]]
            data = model.buffers[tensor.buffer].data
            if data is not None and tensor.type in dtypes:
                found.append((operation, np.frombuffer(bytes(data), dtypes[tensor.type])))
    return graph.tensors, found
