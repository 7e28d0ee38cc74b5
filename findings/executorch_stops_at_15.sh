#!/usr/bin/env bash
# A network of small convolutions, exported for batches up to 64 from an example of 2, is lowered by ExecuTorch to a file that takes 15 at most; from an example of 16 it takes 64: what a phone may batch hangs on the example.
# Guessed before running: the file takes any batch up to the bound that torch.export was given and still shows.
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

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
largest = {}
for example in (2, 16):
    x = torch.randn(example, 3, 16, 16)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    (bound,) = {int(each.upper) for each in program.range_constraints.values()}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    taken = []
    for size in (1, 15, 16, 64):
        batch = torch.randn(size, 3, 16, 16)
        try:
            found = Runtime.get().load_program(lowered.buffer).load_method("forward").execute([batch])[0]
        except RuntimeError:
            continue
        assert torch.allclose(found, net(batch), atol=1e-5)
        taken.append(size)
    largest[example] = taken[-1]
    print(f"executorch {version('executorch')}, torch {torch.__version__}: exported with {example} samples, bound {bound}; of batches 1, 15, 16, 64 the file takes {taken}")
assert largest == {2: 15, 16: 64}
PY
