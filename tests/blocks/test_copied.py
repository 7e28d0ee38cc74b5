"""Copied blocks fold by their attributes, if a run shows that they are what they seem."""

import copy

import pytest
import torch
from torch import nn

import foldconv
from foldconv.algebra.norms import is_norm
from foldconv.testing import randomize

X = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv_norm(i, o, size, **options):
    return nn.Sequential(nn.Conv2d(i, o, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(o))


class RBR(nn.Module):
    """RepVGG's original with its gate, YOLOv6's RepVGGBlock, YOLOv7's RepConv: `act` has the name of theirs."""

    def __init__(self, i, o, stride=1, act="nonlinearity", gate=None, factor=1.0):
        super().__init__()
        self.own_name, self.factor = act, factor
        self.se = gate or nn.Identity()  # registered first, and reads another number of channels
        setattr(self, act, nn.ReLU())
        self.deploy = False
        self.rbr_identity = nn.BatchNorm2d(i) if i == o and stride == 1 else None
        self.rbr_dense = conv_norm(i, o, 3, stride=stride)
        self.rbr_1x1 = conv_norm(i, o, 1, stride=stride)

    def forward(self, x):
        after = nn.Sequential(self.se, getattr(self, self.own_name))
        if hasattr(self, "rbr_reparam"):
            return after(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return after(self.rbr_dense(x) + self.factor * self.rbr_1x1(x) + identity)


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down = nn.Conv2d(channels, 2, 1)
        self.up = nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class QARBR(nn.Module):
    """YOLOv6's QARepVGGBlock (an average beside the others: V2); its own fold keeps the norm behind the sum."""

    def __init__(self, i, o, average=False):
        super().__init__()
        self.nonlinearity, self.se, self.deploy = nn.ReLU(), nn.Identity(), False
        self.rbr_identity = nn.Identity() if i == o else None
        self.rbr_dense = conv_norm(i, o, 3)
        self.rbr_1x1 = nn.Conv2d(i, o, 1, bias=False)
        if average:
            self.rbr_avg = nn.AvgPool2d(3, 1, 1)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x):
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.bn(self.se(self.rbr_reparam(x))))
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        total = total if self.rbr_identity is None else total + self.rbr_identity(x)
        total = total + self.rbr_avg(x) if hasattr(self, "rbr_avg") else total
        return self.nonlinearity(self.bn(self.se(total)))


class Residual(nn.Module):
    def forward(self, x):
        return x


class QARepVGG(nn.Module):
    """super-gradients' QARepVGGBlock: a placeholder for the fold, two steps of folding, the gate behind all."""

    def __init__(self, i, o, alpha=True, post_bn=True):
        super().__init__()
        self.nonlinearity, self.se = nn.SiLU(), nn.Identity()
        self.branch_3x3, self.branch_1x1 = conv_norm(i, o, 3), nn.Conv2d(i, o, 1)
        self.identity = Residual() if i == o else None
        if i == o:
            self.register_buffer("id_tensor", torch.zeros(i, i, 3, 3), persistent=False)
        self.alpha = nn.Parameter(torch.tensor([1.0])) if alpha else 1.0
        self.post_bn = nn.BatchNorm2d(o) if post_bn else nn.Identity()
        self.rbr_reparam = nn.Conv2d(i, o, 3, padding=1)
        self.partially_fused = self.fully_fused = False

    def forward(self, x):
        if self.fully_fused:
            return self.se(self.nonlinearity(self.rbr_reparam(x)))
        if self.partially_fused:
            return self.se(self.nonlinearity(self.post_bn(self.rbr_reparam(x))))
        identity = 0.0 if self.identity is None else self.identity(x)
        total = self.branch_3x3(x) + self.alpha * self.branch_1x1(x) + identity
        return self.se(self.nonlinearity(self.post_bn(total)))


class PartlyFused(QARepVGG):
    def __init__(self, i, o):
        super().__init__(i, o)
        del self.branch_3x3, self.branch_1x1, self.identity, self.alpha
        self.partially_fused = True


class SuperRepVGG(nn.Module):
    """super-gradients' RepVGGBlock."""

    def __init__(self, i, o):
        super().__init__()
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()
        self.no_conv_branch = nn.BatchNorm2d(i) if i == o else None
        self.branch_3x3, self.branch_1x1 = conv_norm(i, o, 3), conv_norm(i, o, 1)
        self.alpha, self.build_residual_branches = nn.Parameter(torch.tensor([1.0])), True

    def forward(self, x):
        if not self.build_residual_branches:
            return self.nonlinearity(self.se(self.rbr_reparam(x)))
        identity = 0 if self.no_conv_branch is None else self.no_conv_branch(x)
        return self.nonlinearity(self.se(self.branch_3x3(x) + self.alpha * self.branch_1x1(x) + identity))


class MM(nn.Module):
    """OpenMMLab's RepVGGBlock."""

    def __init__(self, i, o, identity="branch_norm"):
        super().__init__()
        self.deploy, self.act, self.own_name = False, nn.ReLU(), identity
        self.branch_3x3, self.branch_1x1 = conv_norm(i, o, 3), conv_norm(i, o, 1)
        setattr(self, identity, nn.BatchNorm2d(i) if i == o else None)

    def forward(self, x):
        if self.deploy:
            return self.act(self.branch_reparam(x))
        total, identity = self.branch_1x1(x) + self.branch_3x3(x), getattr(self, self.own_name)
        return self.act(total if identity is None else total + identity(x))


class MMMobileOne(nn.Module):
    """OpenMMLab's MobileOneBlock."""

    def __init__(self, i, o):
        super().__init__()
        self.deploy, self.se, self.act = False, nn.Identity(), nn.ReLU()
        self.branch_norm = nn.BatchNorm2d(i) if i == o else None
        self.branch_scale = conv_norm(i, o, 1)
        self.branch_conv_list = nn.ModuleList(conv_norm(i, o, 3) for _ in range(2))

    def forward(self, x):
        if self.deploy:
            return self.act(self.se(self.branch_reparam(x)))
        branches = (self.branch_norm, self.branch_scale, *self.branch_conv_list)
        return self.act(self.se(sum(branch(x) for branch in branches if branch is not None)))


class ConvModule(nn.Module):
    """A convolution and a norm, as many projects have a class for them."""

    def __init__(self, i, o, size, act=None):
        super().__init__()
        self.conv, self.bn = conv_norm(i, o, size)
        self.act = act

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.act is None else self.act(x)


class OfModules(RBR):
    def __init__(self, i, o, act=None):
        super().__init__(i, o)
        self.rbr_dense, self.rbr_1x1 = ConvModule(i, o, 3), ConvModule(i, o, 1, act)


class MobileOne(nn.Module):
    """MobileOne's original."""

    def __init__(self, i, o, size=3, convs=2):
        super().__init__()
        self.inference_mode, self.se, self.activation = False, nn.Identity(), nn.GELU()
        self.rbr_skip = nn.BatchNorm2d(i) if i == o else None
        self.rbr_conv = nn.ModuleList(conv_norm(i, o, size) for _ in range(convs)) if convs else None
        self.rbr_scale = conv_norm(i, o, 1) if size > 1 else None

    def forward(self, x):
        if self.inference_mode:
            return self.activation(self.se(self.reparam_conv(x)))
        total = sum(
            branch(x) for branch in (self.rbr_skip, self.rbr_scale, *(self.rbr_conv or ())) if branch is not None
        )
        return self.activation(self.se(total))


BLOCKS = {
    "YOLOv6 RepVGGBlock": lambda: (RBR(4, 6, stride=2), RBR(6, 6)),
    "YOLOv7 RepConv": lambda: (RBR(4, 6, act="act"), RBR(6, 6, act="act")),
    "RepVGG with a gate": lambda: (RBR(4, 6, gate=Gate(6)), RBR(6, 6, gate=Gate(6))),
    "YOLOv6 QARepVGGBlock": lambda: (QARBR(4, 6), QARBR(6, 6)),
    "YOLOv6 QARepVGGBlockV2": lambda: (QARBR(4, 4, average=True),),
    "super-gradients QARepVGGBlock": lambda: (
        QARepVGG(4, 6),
        QARepVGG(6, 6, alpha=False),
        QARepVGG(6, 6, post_bn=False),
    ),
    "super-gradients QARepVGGBlock, partly fused": lambda: (PartlyFused(4, 6),),
    "super-gradients RepVGGBlock": lambda: (SuperRepVGG(4, 6), SuperRepVGG(6, 6)),
    "OpenMMLab RepVGGBlock": lambda: (MM(4, 6), MM(6, 6), MM(6, 6, "branch_identity")),
    "OpenMMLab MobileOneBlock": lambda: (MMMobileOne(4, 6), MMMobileOne(6, 6)),
    "branches of a class of their own": lambda: (OfModules(4, 6), OfModules(6, 6)),
    "MobileOne": lambda: (MobileOne(4, 6), MobileOne(6, 6), MobileOne(6, 6, size=1), MobileOne(6, 6, convs=0)),
}


def drawn(*blocks):
    """A network of blocks with random parameters and statistics, in float64 and evaluation mode."""
    model = nn.Sequential(*blocks).double()
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)
    return model.eval()


def norms_of(model):
    return [name for name, module in model.named_modules() if is_norm(module)]


@torch.no_grad()
def off(a, b):
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_copied_block_folds_exactly(name):
    model = drawn(*BLOCKS[name]())
    keys, expected = list(model.state_dict()), model(X)
    assert expected.abs().max() > 0
    folded = foldconv.fold(model, blocks=True)
    assert norms_of(folded) == []
    assert off(expected, folded(X)) <= 1e-12
    assert list(model.state_dict()) == keys
    again = copy.deepcopy(foldconv.fold(folded, blocks=True))
    assert list(again.state_dict()) == list(folded.state_dict())
    assert torch.equal(again(X), folded(X))
    gates = {key for key in keys if ".se." in key}
    convs = {
        key
        for key in folded.state_dict()
        if key.rpartition(".")[0].endswith(("rbr_reparam", "reparam_conv", "branch_reparam"))
    }
    assert set(folded.state_dict()) - convs == gates
    assert len(convs) == 2 * len(model)


class NeverLooks(RBR):
    def forward(self, x):
        return self.rbr_dense(x) + self.rbr_1x1(x)


class TwoInputs(RBR):
    def forward(self, x, y=None):
        return super().forward(x) + y


class OddParts(RBR):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.kept = self.rbr_dense
        del self.rbr_dense
        self.rbr_dense = [self.kept]

    def forward(self, x):
        return self.rbr_dense[0](x)


class Nonlinear(RBR):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.rbr_1x1.append(nn.ReLU())


@pytest.mark.parametrize(
    ("block", "error", "reason"),
    [
        (RBR(4, 4, factor=0.5), foldconv.FoldMismatchError, "differs from the block: expected at most .*received"),
        (NeverLooks(4, 4), foldconv.UnsupportedError, "NeverLooks with its fold in it cannot be run alone"),
        (TwoInputs(4, 4), foldconv.UnsupportedError, "TwoInputs cannot be run alone"),
        (OddParts(4, 4), foldconv.UnsupportedError, "OddParts is built otherwise than we know it"),
        (Nonlinear(4, 4), foldconv.UnsupportedError, "ReLU"),
        (OfModules(4, 4, nn.ReLU()), foldconv.UnsupportedError, "ConvModule applies ReLU"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_only_looks_like_a_block_is_left_with_the_reason(block, error, reason, caplog):
    model = drawn(block)
    folded = foldconv.fold(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert type(folded[0]) is type(block)
    assert "fold leaves a block as it is: 0: " in caplog.text
    with pytest.raises(error, match=rf"^0: .*{reason}"):
        foldconv.fold(model, blocks=True)


def test_a_wrapper_that_answers_for_its_block_is_no_block():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = RBR(4, 4)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x):
            return self.inner(x) + 1

    model = drawn(Wrapper())
    folded = foldconv.fold(model)
    assert norms_of(folded) == []
    assert off(model(X), folded(X)) <= 1e-12


def test_weights_that_are_computed_fold_as_evaluation_mode_computes_them():
    model = drawn(RBR(4, 4))
    nn.utils.parametrizations.spectral_norm(model[0].rbr_dense[0])
    nn.utils.parametrizations.weight_norm(model[0].rbr_1x1[0])
    expected = model(X)
    model.train()
    vector = model[0].rbr_dense[0].parametrizations.weight[0]._u.clone()
    folded = foldconv.fold(model)
    assert folded.training
    assert folded[0].rbr_reparam.training
    assert off(expected, folded.eval()(X)) <= 1e-12
    assert torch.equal(model[0].rbr_dense[0].parametrizations.weight[0]._u, vector)


def test_another_default_device_and_none():
    model = drawn(RBR(4, 4))
    with torch.device("meta"):
        folded = foldconv.fold(model)
    assert off(model(X), folded(X)) <= 1e-12
    # Without values nothing can prove that a block is what its attributes say.
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: .*RBR is on the meta device"):
        foldconv.fold(model.to("meta"), blocks=True)
