"""`foldconv.convert_weights` where MXNet is: a torch network's file in Gluon, blocks, and files byte by byte."""

import json
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

from foldconv.errors import UnsupportedError
from foldconv.files.convert import convert_weights
from foldconv.files.convert._params import DTYPES, read_params, write_params
from foldconv.gluon import DOConv2D, expand

FIXTURES = Path(__file__).parent.parent / "fixtures"


def network(**norm):
    """What tests/convert/write_gluon.py has in torch."""
    net = gluon.nn.HybridSequential()
    net.add(
        DOConv2D(8, 3, in_channels=3, use_bias=False, depth_multiplier=12),
        gluon.nn.BatchNorm(in_channels=8, **norm),
        gluon.nn.Activation("relu"),
        gluon.nn.Conv2D(8, 3, groups=8, in_channels=8),
        gluon.nn.Conv2DTranspose(8, 2, strides=2, groups=2, in_channels=8),
        gluon.nn.Flatten(),
        gluon.nn.Dense(5, in_units=800),
    )
    net.initialize()
    return net


@pytest.fixture
def golden():
    with np.load(FIXTURES / "convert_gluon.npz") as file:
        return mx.nd.array(file["input"]), file["output"]


def near(received, wanted, tolerance=1e-5):
    np.testing.assert_allclose(received.asnumpy(), wanted, rtol=tolerance, atol=tolerance * abs(wanted).max())


def test_gluon_loads_what_torch_converted_and_computes_the_same(golden):
    net, (x, wanted) = network(), golden
    net.load_parameters(str(FIXTURES / "convert_gluon.params"))
    near(net(x), wanted)


def test_blocks_are_sources_targets_and_templates(golden, tmp_path):
    x, wanted = golden
    net = network(epsilon=0.2)
    found = convert_weights(FIXTURES / "convert_gluon.params", net).layers
    assert list(found) == ["0", "1", "3", "4", "6"]
    near(net(x), wanted)
    again = network(epsilon=1e-4)
    convert_weights(net, tmp_path / "net.params", like=again)
    assert abs(again(x).asnumpy() - wanted).max() > 1e-2
    again.load_parameters(str(tmp_path / "net.params"))
    near(again(x), wanted)
    rich = expand(net, "doconv", include="3")
    for parameter in rich.collect_params().values():
        parameter.set_data(mx.nd.random.normal(shape=parameter.shape) ** 2)
    convert_weights(again, rich)
    near(rich(x), wanted)
    # Both by convert_weights, which composes as the layers do.
    rich[3].D.set_data(mx.nd.random.normal(shape=rich[3].D.shape))
    convert_weights(rich, net)
    near(net(x), rich(x).asnumpy())


def test_a_scale_that_gluon_ignores_is_none(golden):
    x, _ = golden
    source, target = network(scale=False), network()
    source[1].gamma.set_data(mx.nd.full((8,), 7))
    source[1].running_var.set_data(mx.nd.full((8,), 2))
    convert_weights(source, target)
    near(target(x), source(x).asnumpy())
    target[1].gamma.set_data(mx.nd.full((8,), 0.5))
    convert_weights(target, source)
    near(source(x), target(x).asnumpy())
    target[1].gamma.set_data(mx.nd.full((8,), -0.5))
    with pytest.raises(UnsupportedError, match=r"1 → 1: the target's norm has no scale \(gamma\), and no variance"):
        convert_weights(target, source)


def test_channels_last():
    first, last = (gluon.nn.HybridSequential() for _ in range(2))
    first.add(gluon.nn.Conv2D(8, (3, 2), in_channels=4, groups=2))
    last.add(gluon.nn.Conv2D(8, (3, 2), in_channels=4, groups=2, layout="NHWC"))
    for net in (first, last):
        net.initialize()
    weight = mx.nd.random.normal(shape=first[0].weight.shape)
    first[0].weight.set_data(weight)
    convert_weights(first, last)
    near(last[0].weight.data(), weight.asnumpy().transpose(0, 2, 3, 1), 0)
    first[0].weight.set_data(0 * weight)
    convert_weights(last, first)
    near(first[0].weight.data(), weight.asnumpy(), 0)


def test_a_block_without_values_is_refused():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3))
    net.initialize()
    with pytest.raises(UnsupportedError, match=r"0.weight: it has no values yet; initialize the network and call it"):
        convert_weights(FIXTURES / "convert_gluon.params", net)


def test_files_are_mxnets_byte_by_byte(tmp_path):
    arrays = {f"{dtype}.weight": np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES}
    mx.nd.save(str(tmp_path / "theirs"), {name: mx.nd.array(a, dtype=a.dtype) for name, a in arrays.items()})
    write_params(tmp_path / "ours", arrays)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = read_params(tmp_path / "theirs")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)
        assert np.array_equal(mx.nd.load(str(tmp_path / "ours"))[name].asnumpy(), array)


def test_an_exported_network(golden, tmp_path):
    x, wanted = golden
    net = network()
    net.load_parameters(str(FIXTURES / "convert_gluon.params"))
    net.hybridize()
    net(x)
    net.export(str(tmp_path / "net"))
    again = network()
    found = convert_weights(tmp_path / "net-0000.params", again).layers
    assert len(found) == 5
    near(again(x), wanted)


def test_files_need_neither_mxnet_nor_torch(tmp_path):
    code = (
        "from foldconv import convert_weights; import json, sys\n"
        f"path = {str(FIXTURES / 'convert_gluon.params')!r}\n"
        f"convert_weights(path, {str(tmp_path / 'out.params')!r}, like=path)\n"
        "print(json.dumps([name for name in ('torch', 'mxnet', 'keras') if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
    assert (tmp_path / "out.params").read_bytes() == (FIXTURES / "convert_gluon.params").read_bytes()
