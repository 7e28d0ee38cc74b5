"""Other people's tools on composed layers: fusers of convolution and norm, tracers of torch.fx."""

import pytest
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import foldconv
from foldconv.testing import randomize

METHODS = ("doconv", foldconv.DOConv(depth_multiplier=30), "dgconv", "orepa", "expandnet")
BRANCHED = ("repvgg", "acnet", "dbb", "mobileone", "qarepvgg", "orepa_vgg", foldconv.DOConv(composition="feature"))


def network(method, bias=False, **options):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=bias, **options), nn.BatchNorm2d(8)).double()
    net = foldconv.expand(net, method)
    randomize(net)
    return net.eval()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_fused_norm_is_right_or_refused(method):
    x = torch.randn(2, 4, 6, 6).double()
    for options in ({}, {"bias": True}, {"groups": 2}):
        net = network(method, **options)
        if net[0].scales_with_weight:
            torch.testing.assert_close(fuse_conv_bn_eval(*net)(x), net(x), rtol=1e-10, atol=1e-10)
            continue
        with pytest.raises(
            foldconv.UnsupportedError, match=r"OREPAConv2d|DOConv2d: its kernel is not weight .*fold first"
        ):
            fuse_conv_bn_eval(*net)
        if net[0].bias is None:
            with pytest.raises(foldconv.UnsupportedError, match="fold first"):
                net[0].register_parameter("bias", nn.Parameter(torch.zeros(8)))
        # What is no fuser goes on.
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
        net.half().to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("method", [*METHODS, *BRANCHED], ids=str)
def test_fx_traces(method):
    x = torch.randn(2, 4, 6, 6).double()
    net = network(method)
    traced = fx.symbolic_trace(net)
    assert "0" in {node.target for node in traced.graph.nodes if node.op == "call_module"}
    torch.testing.assert_close(traced(x), net(x), rtol=1e-10, atol=1e-10)
    if method in METHODS:
        alone = fx.symbolic_trace(net[0])
        torch.testing.assert_close(alone(x), net[0](x), rtol=1e-10, atol=1e-10)
        assert {p.shape for p in alone.parameters()} == {p.shape for p in net[0].parameters()}
