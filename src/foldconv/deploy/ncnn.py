"""ncnn, written by pnnx; a file takes one sample at a time."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def convert(program: Any, path: str) -> None:
    """Write the graph and, beside it, the weights in 32 bits.

    pnnx's return code tells nothing: what counts is whether the two files are there.
    """
    import pnnx
    import torch
    from torch.utils._pytree import tree_leaves

    network = program.module()

    class Whole(torch.nn.Module):
        def forward(self, *values: Any) -> Any:
            outputs = tree_leaves(network(*values))  # of a dictionary it would refuse to take them
            return tuple(outputs) if len(outputs) > 1 else outputs[0]

        def eval(self) -> Any:  # which an exported program refuses, being in evaluation mode
            return self

    Whole.__module__ = "network"  # pnnx reads it, and takes no name that is not a word
    with tempfile.TemporaryDirectory() as folder:
        pnnx.export(Whole(), os.path.join(folder, "net.pt"), program.example_inputs[0], fp16=False)
        for suffix in (".param", ".bin"):
            made = Path(folder, f"net.ncnn{suffix}")
            if not made.is_file():
                raise RuntimeError(f"pnnx wrote no {made.name}")
            Path(path).with_suffix(suffix).write_bytes(made.read_bytes())


def run(path: str, batches: list) -> list:
    """The outputs for each batch, one sample after the other, in 32 bits."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    for load, file in ((net.load_param, path), (net.load_model, str(Path(path).with_suffix(".bin")))):
        if load(file) != 0:
            raise RuntimeError(f"ncnn does not load {os.path.basename(file)}")
    # They are in0, in1, ... and out0, ...; ncnn lists them as its graph has them, and an input that nobody reads as an
    # output, too.
    ins, outs = (
        {int(name.removeprefix(kind)): name for name in names if name.startswith(kind)}
        for kind, names in (("in", net.input_names()), ("out", net.output_names()))
    )
    outputs = []
    for batch in batches:
        samples = []
        for sample in zip(*batch):
            with net.create_extractor() as extractor:
                for number, name in ins.items():
                    array = sample[number]
                    if extractor.input(name, ncnn.Mat(np.ascontiguousarray(array)).clone()) != 0:
                        raise RuntimeError(f"ncnn does not take the input {name}")
                results = [extractor.extract(outs[number]) for number in sorted(outs)]
                if any(code != 0 for code, _ in results):
                    raise RuntimeError("ncnn does not compute the output")
                samples.append([np.array(value) for _, value in results])
        outputs.append([np.stack(values) for values in zip(*samples)])
    return outputs
