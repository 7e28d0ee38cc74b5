"""Other people's tools on an expanded network: docs/with-other-tools.md, as far as they are installed here."""

import copy
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import foldconv
from foldconv.network.tree import foldable_layers

METHODS = ("doconv", "orepa", "repvgg")
X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    ).double()


def stirred(model, seed=1):
    """The model with parameters and norm statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator))
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def expanded(method, make=network):
    return stirred(foldconv.expand(make(), method)).eval()


def off(expected, received):
    return float((expected - received).detach().abs().max() / expected.detach().abs().max())


def steps(net, optimizer=None, count=3):
    """Some steps of training, after each of which the network is in the mode that it was in."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(count):
        net(X.to(next(net.parameters()).dtype)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return net


@pytest.fixture(params=METHODS)
def rich(request):
    return expanded(request.param)


# ---------------------------------------------------------------------- torch


def test_prune(rich):
    for layer in rich[0], rich[3]:
        conv = next(m for m in layer.modules() if isinstance(m, nn.Conv2d))
        prune.l1_unstructured(conv, "weight", 0.5)
    steps(rich)
    plain = foldconv.fold(rich)
    assert off(rich(X), plain(X)) < 1e-12
    if isinstance(rich[0], nn.Conv2d):
        assert (plain[0].weight != 0).all()  # zeros in `weight` are none in the kernel


def test_prune_after_folding(rich):
    plain = foldconv.fold(rich)
    prune.l1_unstructured(plain[0], "weight", 0.5)
    assert (plain[0].weight == 0).sum() == plain[0].weight.numel() // 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_and_spectral_norm():
    utilities = (
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    )
    for utility in utilities:
        for method in METHODS:
            net = expanded(method)
            conv = next(m for m in net[0].modules() if isinstance(m, nn.Conv2d))
            utility(conv)
            steps(net.train()).eval()
            plain = foldconv.fold(net)
            assert off(net(X), plain(X)) < 1e-12
            assert not parametrize.is_parametrized(plain[0])
            if utility is parametrizations.spectral_norm and method == "doconv":
                # What is normalized is `weight`; D has changed the kernel since.
                norms = [torch.linalg.matrix_norm(w.flatten(1), 2).item() for w in (conv.weight, plain[0].weight)]
                assert abs(norms[0] - 1) < 0.01 < abs(norms[1] - 1)


def test_averaged_model(rich):
    rich.train()
    for options in ({"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}, {}):
        average = AveragedModel(rich, **options)
        optimizer = torch.optim.SGD(rich.parameters(), lr=0.1)
        for _ in range(3):
            steps(rich, optimizer, 1)
            average.update_parameters(rich)
        update_bn([X, 2 * X], average)
        average.eval()
        expected = average(X)
        assert off(copy.deepcopy(average)(X), expected) == 0
        assert off(expected, foldconv.fold(average)(X)) < 1e-12
        assert off(expected, foldconv.fold(average.module)(X)) < 1e-12


def test_fused_optimizers():
    for method in METHODS:
        for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
            # Where a gradient is zero but for rounding, a small eps makes a step of its sign.
            options: dict = {} if optimizer is torch.optim.SGD else {"eps": 0.01}
            one, other = expanded(method), expanded(method)
            steps(one, optimizer(one.parameters(), lr=0.01, **options, fused=True))
            steps(other, optimizer(other.parameters(), lr=0.01, **options))
            assert off(other(X), one(X)) < 1e-9  # in evaluation mode throughout


def test_muon_takes_matrices_only(rich):
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon(rich.parameters())


def test_vector_to_parameters(rich):
    expected, vector = rich(X), nn.utils.parameters_to_vector(rich.parameters())
    nn.utils.vector_to_parameters(vector * 2, rich.parameters())
    doubled = rich(X)
    assert off(expected, doubled) > 0.1
    assert off(copy.deepcopy(rich)(X), doubled) == 0


def test_functional_call_and_vmap(rich):
    parameters, buffers = dict(rich.named_parameters()), dict(rich.named_buffers())

    def loss(parameters, x):
        return functional_call(rich, (parameters, buffers), (x[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i, x in enumerate(X):
        rich.zero_grad()
        rich(x[None]).square().sum().backward()
        for name, p in parameters.items():
            assert torch.allclose(per_sample[name][i], p.grad, rtol=1e-9, atol=1e-9), name
    nets = [rich, stirred(copy.deepcopy(rich))]
    outputs = vmap(lambda p, b: functional_call(rich, (p, b), (X,)))(*stack_module_state(nets))
    assert all(off(net(X), y) < 1e-12 for net, y in zip(nets, outputs, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_jit_trace(rich):
    traced = torch.jit.trace(rich, X)
    # OREPA's cosines, single precision by definition, are rounded otherwise there.
    assert off(rich(2 * X), traced(2 * X)) < 1e-8
    assert off(rich(2 * X), torch.jit.freeze(traced)(2 * X)) < 1e-8


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_jit_script():
    with pytest.raises(Exception, match="Unknown type annotation"):
        torch.jit.script(expanded("doconv"))
    plain = foldconv.fold(expanded("doconv"))
    assert off(plain(X), torch.jit.script(plain)(X)) < 1e-12


def test_torch_export(rich):
    rich = rich[:2]
    assert off(rich(2 * X), torch.export.export(rich, (X,)).module()(2 * X)) < 1e-12


def test_torch_compile(rich):
    rich = rich[:1]
    compiled = torch.compile(rich, backend="eager", fullgraph=True)
    assert off(rich(X), compiled(X)) < 1e-12
    assert off(rich(X), foldconv.fold(compiled)(X)) < 1e-12
    torch.compiler.reset()


def test_activation_checkpointing(rich):
    rich.train()
    ordinary, saving = copy.deepcopy(rich), copy.deepcopy(rich)
    ordinary(X).square().mean().backward()
    checkpoint(saving, X, use_reentrant=False).square().mean().backward()
    for p, q in zip(ordinary.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_convert_sync_batchnorm(rich):
    expected = rich(X)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(rich))
    assert off(expected, synchronized(X)) < 1e-12
    for batchnorm in (False, True):
        assert off(expected, foldconv.fold(synchronized, batchnorm=batchnorm)(X)) < 1e-12
    before = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert len(foldable_layers(foldconv.expand(before, "repvgg"))) == 2


def test_data_parallel():
    for method in METHODS:
        wrapped = foldconv.expand(nn.DataParallel(network()), method)
        alone = stirred(wrapped).eval()
        plain = foldconv.fold(alone)
        assert list(plain.state_dict()) == list(network().state_dict())
        assert off(alone(X), plain(X)) < 1e-12


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::UserWarning:torch.ao")
def test_eager_quantization(rich):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def quantized(net):
            parts = quantization.QuantStub(), *net.float(), quantization.DeQuantStub()
            net = nn.Sequential(*parts).eval()
            net.qconfig = quantization.get_default_qconfig("x86")
            prepared = quantization.prepare(net)
            prepared(X.float())
            return quantization.convert(prepared)

        plain = foldconv.fold(rich, batchnorm=True)
        right = quantized(copy.deepcopy(plain))
        wrong = quantized(copy.deepcopy(rich))
    integer = torch.ao.nn.quantized.Conv2d
    assert [type(right[1]), type(right[4])] == [integer, integer]
    assert off(plain.float()(X.float()), right(X.float())) < 0.05
    # Without a fold the layers stay in floating point, and meet quantized inputs.
    assert type(wrong[1]) is type(rich[0])
    with pytest.raises(NotImplementedError, match="QuantizedCPU"):
        wrong(X.float())


def test_fx_symbolic_trace(rich):
    traced = torch.fx.symbolic_trace(rich)
    assert off(rich(X), traced(X)) < 1e-12
    assert off(rich(X), foldconv.fold(traced)(X)) < 1e-12


def test_fuse_conv_bn_eval():
    rich = expanded("doconv")
    assert off(rich[:2](X), nn.utils.fuse_conv_bn_eval(rich[0], rich[1])(X)) < 1e-12
    for method in (foldconv.DOConv(depth_multiplier=12), "orepa"):
        rich = expanded(method)
        with pytest.raises(foldconv.UnsupportedError, match="fold"):
            nn.utils.fuse_conv_bn_eval(rich[0], rich[1])(X)


def test_fx_fuse():
    from torch.fx.experimental.optimization import fuse

    for method in METHODS:
        rich = expanded(method)
        assert off(rich(X), fuse(foldconv.fold(rich))(X)) < 1e-12


def test_walking_the_graph_of_gradients():
    x = torch.randn(1, 64, 4, 4)
    for method in METHODS:  # of a size that compiled loops compose
        nodes, names = [foldconv.expand(nn.Conv2d(64, 64, 3), method)(x).grad_fn], set()
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [following for following, _ in node.next_functions if following is not None]
        assert "torch::autograd::AccumulateGrad" in names


def test_flop_counter():
    def counted(net):
        with FlopCounterMode(display=False) as counter:
            net(X)
        return counter.get_total_flops()

    plain, costs = counted(network()), {}
    for method in ("doconv", "repvgg"):
        net = expanded(method)
        assert counted(foldconv.fold(net)) == plain
        costs[method] = counted(net)
        assert foldconv.summary(net, X).macs_folded * 2 == plain
    assert costs["repvgg"] > plain


# ---------------------------------------------------------------------- timm

timm = pytest.importorskip("timm")
for part in "optim", "utils.model":
    importlib.import_module(f"timm.{part}")
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def resnet(**options):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", channels=(8, 8, 8, 8), num_classes=3, **options).double()


def test_timm_model_ema():
    for method in METHODS:
        student = expanded(method).train()
        average = timm.utils.ModelEmaV3(student, decay=0.5)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        for _ in range(3):
            steps(student, optimizer, 1)
            average.update(student)
            teacher = average.module(X)
            assert off(copy.deepcopy(average.module)(X), teacher) == 0
        assert off(teacher, foldconv.fold(average.module)(X)) < 1e-12
        assert off(student.eval()(X), teacher) > 1e-3


def test_timm_features_only():
    plain = stirred(resnet(features_only=True)).eval()
    for method in METHODS:
        folded = foldconv.fold(foldconv.expand(plain, method), batchnorm=True)
        assert max(map(off, plain(IMAGES), folded(IMAGES))) < 1e-12
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert foldable_layers(foldconv.expand(plain, "repvgg"))


def test_timm_grad_checkpointing():
    plain = stirred(resnet())
    plain.set_grad_checkpointing()
    for method in ("orepa", "repvgg"):
        saving = stirred(foldconv.expand(plain, method))
        ordinary = copy.deepcopy(saving)
        ordinary.set_grad_checkpointing(False)
        saving(IMAGES).mean().backward(), ordinary(IMAGES).mean().backward()
        for p, q in zip(saving.parameters(), ordinary.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9)
        folded = foldconv.fold(saving.eval(), batchnorm=True)
        assert off(saving(IMAGES), folded(IMAGES)) < 1e-12
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_timm_reparameterize_model():
    from timm.models.repghost import RepGhostModule

    stem = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    plain = stirred(nn.Sequential(*stem, RepGhostModule(4, 8), RepGhostModule(8, 4)).double()).eval()
    for method in ("doconv", "repvgg"):
        rich = stirred(foldconv.expand(plain, method)).eval()
        expected = rich(IMAGES)
        folded = foldconv.fold(rich, blocks=True)  # timm's blocks, too
        assert not any("fusion_conv" in name for name in folded.state_dict())
        assert off(expected, folded(IMAGES)) < 1e-9
        for net in (folded, foldconv.fold(rich, blocks=False), rich):
            fused = timm.utils.model.reparameterize_model(net)
            assert {type(m).__module__.partition(".")[0] for m in fused.modules()} == {"torch", "timm"}
            assert off(expected, fused(IMAGES)) < 1e-9
        assert torch.equal(rich(IMAGES), expected)  # the copy was changed
        assert not any(set(vars(m)) & {"fuse", "switch_to_deploy"} for m in folded.modules())


def test_blocks_that_fuse_themselves_fold_first():
    class Block(nn.Sequential):
        def reparameterize(self):
            self[0] = nn.utils.fuse_conv_bn_eval(self[0], self.pop(1))

        def fuse(self, features):
            raise AssertionError("takes features, so it is something else")

    plain = stirred(nn.Sequential(Block(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), nn.ReLU()).double())
    for method in ("orepa", "repvgg"):
        rich = stirred(foldconv.expand(plain, method)).eval()
        copied = copy.deepcopy(rich)
        for module in copied:
            if hasattr(module, "reparameterize"):
                module.reparameterize()
        assert [type(m) for m in copied.modules() if not [*m.children()]] == [nn.Conv2d, nn.ReLU]
        assert off(rich(IMAGES), copied(IMAGES)) < 1e-9
        assert set(vars(rich[0])) - set(vars(plain[0])) == {"reparameterize"}
        assert set(vars(foldconv.fold(rich)[0])) == set(vars(plain[0]))


def test_timm_optimizer_factory():
    rich = expanded("orepa")
    names = {id(p): name for name, p in rich.named_parameters()}

    def decayed(groups):
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    by_timm = decayed(timm.optim.create_optimizer_v2(rich, opt="adamw", weight_decay=0.05).param_groups)
    by_us = decayed(foldconv.parameter_groups(rich, 0.05))
    assert by_timm - by_us == {"0.vector", "3.vector"}
    assert by_us < by_timm


def test_what_accelerate_runs_is_not_folded():
    for method in METHODS:  # docs/other_tools.py does it with accelerate
        rich = expanded(method)
        for module in rich.modules():
            if module._parameters:
                module._hf_hook = object()
        with pytest.raises(foldconv.UnsupportedError, match=r"0\S*: accelerate moves .*remove_hook_from_submodules"):
            foldconv.fold(rich)


# ---------------------------------------------------------------------- torchvision, Lightning


def test_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor

    for method in METHODS:
        rich = expanded(method, resnet)
        extractor = create_feature_extractor(rich, ["layer2"]).eval()
        expected = rich.forward_intermediates(IMAGES, indices=[2], intermediates_only=True)[0]
        assert off(expected, extractor(IMAGES)["layer2"]) < 1e-12
        assert off(expected, foldconv.fold(extractor)(IMAGES)["layer2"]) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_lightning_weight_averaging():
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for method in ("doconv", "repvgg"):
        for average in (EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)):
            module = Module(expanded(method).train())
            trainer = lightning.Trainer(max_epochs=2, callbacks=[average], accelerator="cpu", **quiet)
            trainer.fit(module, torch.utils.data.DataLoader(X, 2))
            net = module.net.eval()
            expected = net(X)
            assert off(copy.deepcopy(net)(X), expected) == 0
            assert off(expected, foldconv.fold(net)(X)) < 1e-12


# ---------------------------------------------------------------------- the page

ROOT = Path(__file__).parent.parent


def test_the_page_names_each_test():
    page = (ROOT / "docs" / "with-other-tools.md").read_text(encoding="utf-8")
    own = {name for name in globals() if name.startswith("test_")} - {"test_the_page_names_each_test"}
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", page)
    assert {name for file, name in named if not file} == own
    for file, name in named:
        if file:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    for script in re.findall(r"`(findings/\w+\.sh)`", page):
        assert (ROOT / script).is_file()
