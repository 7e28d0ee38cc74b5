"""Compiled loops are kept so that processes which compile at once never find each other's machine code."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

USE = """
import types
import torch
from foldconv import ops
from foldconv.ops import _depthwise

window = types.SimpleNamespace(stride=(1, 1), padding=(2, 2), dilation=(1, 1), groups=2)
for dtype in (torch.float32, torch.float64):
    taps = torch.randn(2, 2, 3, dtype=dtype).transpose(1, 2)[:, :, :2]
    D = torch.randn(3, 2, 2, dtype=dtype)
    for laid_out in (taps, taps.contiguous())[: 1 if dtype == torch.float64 else 2]:
        with ops.using("cpu"):
            ops.compose_depthwise(laid_out.requires_grad_(), D.requires_grad_()).sum().backward()
    x = torch.randn(1, 2, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    assert _depthwise.weight_gradient(x, x, torch.randn(2, 1, 5, 5, dtype=dtype), window) is not None
"""


def test_each_variant_of_a_loop_has_its_own_files(tmp_path):
    """Numba numbers the files behind one index without a lock; behind each of ours is one."""

    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", USE], check=True, env=environment)
    indexes = {file.stem for file in tmp_path.rglob("*.nbi")}
    files = {file.stem for file in tmp_path.rglob("*.nbc")}
    assert len(indexes) == 9  # chain, its way back and outer; chain_last, outer_last and weight_gradient twice
    assert files == {f"{name}.1" for name in indexes}
