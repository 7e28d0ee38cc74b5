"""OpenMMLab's registries, hook and runner, with the real packages: ``nox -s hosts``."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv")
foldconv_mm = pytest.importorskip("foldconv.mm")

from mmcv.cnn import ConvModule  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import HOOKS, MODELS  # noqa: E402

import foldconv  # noqa: E402

NORM = {"type": "BN"}


def test_every_layer_of_one_kernel_is_registered_and_folds_in_a_block_of_mmcv():
    names = [f"{name}{rank}d" for name in ("DOConv", "OREPAConv", "DGConv", "ExpandNetConv") for rank in (1, 2, 3)]
    names += [f"OREPALargeConv{rank}d" for rank in (1, 2, 3)] + [f"DOConvTranspose{rank}d" for rank in (1, 2, 3)]
    assert [name for name in names if MODELS.get(name) is not getattr(foldconv, name)] == []
    x = torch.randn(2, 4, 6, 6)
    for name in ("DOConv2d", "OREPAConv2d", "DGConv2d", "ExpandNetConv2d"):
        block = ConvModule(4, 8, 3, padding=1, conv_cfg={"type": name}, norm_cfg=NORM, act_cfg=None).eval()
        folded = foldconv.fold(block)
        assert type(block.conv) is getattr(foldconv, name)
        assert type(folded.conv) is nn.Conv2d
        assert torch.allclose(folded(x), block(x), atol=1e-5), name


def test_what_mmcv_draws_is_the_kernel():
    # OREPA's origin branch is one of several, as in its authors' code.
    for name in ("DOConv2d", "DGConv2d", "ExpandNetConv2d"):
        conv = ConvModule(16, 32, 3, conv_cfg={"type": name}, norm_cfg=NORM).conv
        assert torch.allclose(conv.kernel(), conv.weight, atol=1e-6)
        assert abs(conv.weight.std() / (2 / (9 * 32)) ** 0.5 - 1) < 0.1


def test_options_reach_the_layer():
    conv = ConvModule(4, 8, 3, conv_cfg={"type": "DOConv2d", "depth_multiplier": 12}).conv
    assert conv.D.shape == (4, 9, 12)


class Body(BaseModule):
    def __init__(self):
        super().__init__(init_cfg={"type": "Constant", "val": 0.5, "layer": "Conv2d"})
        self.first = ConvModule(3, 4, 3, norm_cfg=NORM)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_network_from_a_config_is_initialized_then_expanded():
    MODELS.register_module("Body", force=True, module=Body)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    plain = MODELS.build({"type": "Body"})
    plain.init_weights()
    for method in ("acnet", {"method": "doconv", "depth_multiplier": 12}):
        cfg = {"type": "FoldConvExpanded", "method": method, "model": {"type": "Body"}, "example_shape": (2, 3, 6, 6)}
        torch.manual_seed(1)
        rich = MODELS.build(cfg)
        rich.init_weights()  # the runner does, once more
        assert torch.allclose(rich.eval()(x), plain.eval()(x), atol=1e-5)
        assert foldconv.fold(rich).state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(foldconv.NoMatchError, match="third"):
        MODELS.build(cfg | {"include": "third"})
    with pytest.raises(foldconv.UnsupportedError, match="doconf"):
        MODELS.build(cfg | {"method": "doconf"})


@pytest.mark.parametrize("paramwise", [None, {"custom_keys": {"first": {"lr_mult": 0.1}}, "norm_decay_mult": 0.5}])
def test_what_must_not_decay_does_not(paramwise):
    """OREPA's scales stay out of decay; all else, and the learning rates, are mmengine's."""
    net = foldconv.expand(Body(), "orepa")
    cfg = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.5, "weight_decay": 0.25}}
    cfg |= {} if paramwise is None else {"paramwise_cfg": paramwise}
    found = []
    for constructor in ("DefaultOptimWrapperConstructor", "FoldConvOptimWrapperConstructor"):
        optimizer = build_optim_wrapper(net, cfg | {"constructor": constructor}).optimizer
        groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        found.append({id(p): (group["lr"], group["weight_decay"]) for p, group in groups})
    theirs, ours = found
    scales = {
        id(p) for m in net.modules() for n, p in m.named_parameters(recurse=False) if n in getattr(m, "no_decay", ())
    }
    assert len(scales) == 2
    assert len(ours) == len([*net.parameters()])
    assert ours == {key: (rate, 0.0 if key in scales else decay) for key, (rate, decay) in theirs.items()}
    assert {rate for rate, _ in ours.values()} == ({0.5} if paramwise is None else {0.5, 0.05})


def test_a_parameter_of_two_modules_is_trained_once():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = net[0].weight
    net = foldconv.expand(net, "orepa")
    cfg = {"optimizer": {"type": "SGD", "lr": 0.5}, "constructor": "FoldConvOptimWrapperConstructor"}
    groups = build_optim_wrapper(net, {"type": "OptimWrapper", **cfg}).optimizer.param_groups
    assert {id(group["params"][0]) for group in groups} == set(map(id, net.parameters()))


def test_the_hook_refuses_what_is_no_flag():
    with pytest.raises(TypeError, match="batchnorm: expected True or False, received 'no'"):
        HOOKS.build({"type": "FoldHook", "batchnorm": "no"})


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save({"meta": {}, "state_dict": Body().state_dict()}, tmp_path / "epoch_1.pth")
    with pytest.raises(foldconv.CheckpointError, match="does not fit Sequential"):
        foldconv_mm.fold_checkpoint(tmp_path / "epoch_1.pth", nn.Sequential(foldconv.DOConv2d(3, 4, 3)))
    assert [*tmp_path.iterdir()] == [tmp_path / "epoch_1.pth"]
    norm_away = foldconv_mm.fold_checkpoint(
        tmp_path / "epoch_1.pth", Body(), tmp_path / "out.pth", batchnorm=True, example_shape=(2, 3, 6, 6)
    )
    assert "first.bn.weight" not in torch.load(norm_away)["state_dict"]


@pytest.mark.filterwarnings("ignore")  # of mmengine and torch
def test_the_example(import_example, tmp_path, monkeypatch):
    """From a config through train, save, resume and validation, with an average, to a fold that mmengine loads."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the example sets it, for good
    example = import_example("train_mm")
    methods = {
        "layers": {"type": "StripesNet", "conv_cfg": {"type": "DOConv2d", "depth_multiplier": 12}},
        "network": {"type": "FoldConvExpanded", "method": "repvgg", "model": {"type": "StripesNet"}},
    }
    for name, model in methods.items():
        done = example.main(tmp_path / name, model)
        assert done["error"] < 1e-6
        assert done["accuracy"] == done["validated"] > 60
