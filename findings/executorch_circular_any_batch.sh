#!/usr/bin/env bash
# ExecuTorch lowers a circularly padded convolution exported for any batch without complaint, and the file takes only the batch size of the example; reflect padding takes any: who ships such a network learns it on the device.
# Guessed before running: either the lowering refuses it, or the file takes any batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python torch==2.15.0 executorch==1.5.1 torchao==0.18.0 numpy==2.4.6 setuptools==80.10.2
env/bin/python -W ignore - 2> errors <<'PY' || { tail -5 errors; exit 1; }
from importlib.metadata import version

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn

seen = {}
x = torch.randn(3, 4, 9, 10, generator=torch.Generator().manual_seed(0))
for mode in ("circular", "reflect"):
    torch.manual_seed(0)
    net = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode).eval()
    program = torch.export.export(net, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", max=8)},))
    assert torch.allclose(program.module()(x), net(x), atol=1e-5)  # what was exported takes any batch
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    for size in (1, 2, 3):
        method = Runtime.get().load_program(lowered.buffer).load_method("forward")
        try:
            found = "right" if torch.allclose(method.execute([x[:size]])[0], net(x[:size]), atol=1e-5) else "wrong"
        except RuntimeError:
            found = "RuntimeError"
        seen[mode, size] = found
        print(f"executorch {version('executorch')}, {mode} padding, lowered with a batch of 2, run with {size}: {found}")
assert seen == {(mode, n): "right" if mode == "reflect" or n == 2 else "RuntimeError" for mode, n in seen}
PY
