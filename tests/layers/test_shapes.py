"""Parameters of unequal channel counts, as a pruner leaves them: an error of ours, on every path."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv import ops

METHODS = [
    "doconv",
    foldconv.DOConv(depth_multiplier=12),
    foldconv.DOConv(composition="feature"),
    "dgconv",
    "orepa",
    "expandnet",
    foldconv.ExpandNet(chain="CK"),
    foldconv.OREPA(large="orepa"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_parameter_cut_alone_is_named_with_its_layer(method):
    size = 7 if not isinstance(method, (str, foldconv.DOConv)) else 3
    net = nn.Sequential(nn.Conv2d(8, 72, size, bias=False))
    for name, p in foldconv.expand(net, method)[0].named_parameters():
        for dim in range(min(p.dim(), 2)):
            for left in {1, p.shape[dim] - 1} - {0, p.shape[dim]}:
                rich = foldconv.expand(net, method).eval()
                rich[0]._parameters[name] = nn.Parameter(p.detach().narrow(dim, 0, left).clone())
                if name == "weight" and dim == 0 and getattr(rich[0], "weight_extra", 0) is None:
                    continue  # D has no outputs
                for use in (lambda rich: rich(torch.zeros(1, 8, 9, 9)), foldconv.fold):
                    with pytest.raises(foldconv.UnsupportedError) as caught:
                        use(rich)
                    said = str(caught.value)
                    assert said.startswith("0")
                    assert type(rich[0]).__name__ in said
                    assert str(tuple(rich[0]._parameters[name].shape)) in said


def test_transposed():
    layer = foldconv.expand(nn.ConvTranspose2d(8, 4, 3), "doconv")
    layer.D = nn.Parameter(torch.zeros(1, 9, 9))
    with pytest.raises(foldconv.UnsupportedError, match=r"^DOConvTranspose2d: .* \(8, 9, 9\), received \(1, 9, 9\)"):
        layer(torch.zeros(1, 8, 5, 5))


def test_operations_compare_before_they_pick_a_path():
    taps = torch.zeros(64, 64, 9)
    p = ops.Orepa(
        weight=taps,
        average=taps[..., 0],
        prior=taps[..., 0],
        product=taps,
        point=None,
        pointwise=torch.zeros(64, 64, 8),
        depthwise=torch.zeros(64, 8, 9),
        scales=torch.zeros(5, 64),
        cosines=torch.zeros(64, 9),
        centre=4,
    )
    assert ops.compose_orepa(p).shape == taps.shape
    with pytest.raises(
        foldconv.UnsupportedError, match=r"D: beside taps .* expected shape \(64, any, 9\), .* \(40, 9, 9\)"
    ):
        ops.compose_depthwise(taps, torch.zeros(40, 9, 9))
    for field in ("average", "prior", "product", "pointwise", "depthwise", "scales", "cosines"):
        cut = getattr(p, field)[:40] if field != "scales" else p.scales[:, :40]
        with pytest.raises(foldconv.UnsupportedError, match=f"^{field}: beside weight"):
            ops.compose_orepa(p._replace(**{field: cut}))
