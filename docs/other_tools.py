"""Other people's tools, each run once on an expanded network: a row per tool with its version and what came out.

    python docs/other_tools.py [tool ...]

Tools that are not installed are passed over. Numbers are errors relative to the largest right output, in float64
where the tool allows it. docs/with-other-tools.md has the rows, and says what to do.
"""

import copy
import logging
import sys
import tempfile
import warnings
from importlib import metadata

import torch
from torch import nn

import foldconv
from foldconv.network.tree import foldable_layers

TOOLS = {}
METHODS = ("doconv", "orepa", "repvgg")
X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tool(package):
    """Register a function that runs one tool of a package and gives a line."""

    def register(function):
        TOOLS.setdefault(package, []).append(function)
        return function

    return register


def network(channels=4):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), *head).double()


def stirred(model, seed=1, size=0.1):
    """The model with parameters and norm statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(size * torch.randn(m.num_features, generator=generator))
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
        for p in model.parameters():
            p.add_(size * p.std(correction=0) * torch.randn(p.shape, generator=generator).to(p))
        for layer in foldable_layers(model).values():
            if isinstance(layer, foldconv.DOConv2d):
                layer.D.add_(size * torch.randn(layer.D.shape, generator=generator).to(layer.D))
    return model.eval()


def rich(method, make=network):
    return stirred(foldconv.expand(make(), method))


def off(expected, received):
    expected, received = tensors(expected), tensors(received)
    return max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in zip(expected, received))


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values if isinstance(value, (torch.Tensor, dict, tuple, list)) for t in tensors(value)]


def each(run, methods=METHODS):
    """What `run` gives for each method, or the error."""
    return "; ".join(f"{method} {outcome(run, method)}" for method in methods)


def outcome(run, *args):
    try:
        got = run(*args)
        return f"{got:.1e}" if isinstance(got, float) else str(got)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"


def trained_step(net, x, loss):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        loss(net(x)).backward()
        optimizer.step(), optimizer.zero_grad()
    return net.eval()


def expanded_and_folded(make, x):
    """Expand, train three steps, fold with the norms: error of the fold, convolutions and norms taken."""

    def run(method):
        torch.manual_seed(0)
        net = stirred(make(), size=0.02)
        convs = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in net.modules())
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        net = foldconv.expand(net, method, example_inputs=x)
        taken = len(foldable_layers(net))
        net = trained_step(net, x, lambda y: sum(t.square().mean() for t in tensors(y)))
        plain = foldconv.fold(net, batchnorm=True, example_inputs=x)
        left = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        error = off(net(x), plain(x))
        return f"{error:.1e} ({taken} of {convs} convolutions, {norms - left} of {norms} norms)"

    return run


# ---------------------------------------------------------------------- averages of weights


def averaged(make_average):
    """Three steps with an average of weights; is it what the averaged parameters compute, and does it fold?"""

    def run(method):
        student = rich(method).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        update, teacher = make_average(student)
        for _ in range(3):
            student(X).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
            update()
            student.eval()(X), student.train()
        with teacher() as net:
            net.eval()
            y = net(X)
            return max(off(copy.deepcopy(net)(X), y), off(y, foldconv.fold(net)(X)))

    return each(run)


class Given:
    """A network in a `with` statement."""

    def __init__(self, net):
        self.net = net

    def __enter__(self):
        return self.net

    def __exit__(self, *_):
        pass


@tool("ema-pytorch")
def ema():
    from ema_pytorch import EMA

    def make(student):
        average = EMA(student, beta=0.5, update_after_step=0, update_every=1)
        return average.update, lambda: Given(average.ema_model)

    return averaged(make)


@tool("torch-ema")
def exponential_moving_average():
    import contextlib

    from torch_ema import ExponentialMovingAverage

    def make(student):
        average = ExponentialMovingAverage(student.parameters(), decay=0.5)

        @contextlib.contextmanager
        def teacher():
            student.eval()(X)
            with average.average_parameters():
                yield student

        return average.update, teacher

    return averaged(make)


@tool("ultralytics")
def model_ema():
    from ultralytics.utils.torch_utils import ModelEMA

    def make(student):
        average = ModelEMA(student, decay=0.5, tau=1)
        return lambda: average.update(student), lambda: Given(average.ema)

    return averaged(make)


# ---------------------------------------------------------------------- fusers of convolution and norm


@tool("ultralytics")
def fuse_conv_and_bn():
    from ultralytics.utils.torch_utils import fuse_conv_and_bn

    def run(method):
        net = rich(method)
        y = net[:2](X)
        return off(y, fuse_conv_and_bn(net[0], net[1])(X))

    return each(run, ("doconv", foldconv.DOConv(depth_multiplier=12), "orepa", "repvgg"))


@tool("ultralytics")
def yolo_fold():
    from ultralytics.nn.tasks import DetectionModel

    def make():
        return DetectionModel("yolov8n.yaml", ch=3, nc=3, verbose=False).double()

    return each(expanded_and_folded(make, torch.randn(1, 3, 64, 64, dtype=torch.float64)), ("doconv", "repvgg"))


@tool("ultralytics")
def yolo_fuse():
    """fuse() of the expanded network, and of the folded one."""
    from ultralytics.nn.tasks import DetectionModel

    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def run(method):
        torch.manual_seed(0)
        net = stirred(DetectionModel("yolo11n.yaml", ch=3, nc=3, verbose=False).double(), size=0.02)
        net = stirred(foldconv.expand(net, method, example_inputs=x), 2, size=0.02)
        y = net(x)
        first = outcome(lambda: off(y, copy.deepcopy(net).fuse(verbose=False)(x)))
        return f"{first}, folded first {outcome(lambda: off(y, foldconv.fold(net).fuse(verbose=False)(x)))}"

    return each(run, ("doconv", "repvgg"))


@tool("mmcv-lite")
def fuse_conv_bn():
    from mmcv.cnn import fuse_conv_bn

    def run(method):
        net = rich(method)
        y = net(X)
        return off(y, fuse_conv_bn(copy.deepcopy(net))(X))

    methods = ("doconv", foldconv.DOConv(depth_multiplier=12), "orepa", "repvgg")
    folded = off(rich("orepa")(X), fuse_conv_bn(foldconv.fold(rich("orepa")))(X))
    return f"{each(run, methods)}; folded first {folded:.1e}"


@tool("mmcv-lite")
def conv_module():
    from mmcv.cnn import ConvModule

    def make():
        parts = [ConvModule(3, 8, 3, norm_cfg={"type": "BN"}), ConvModule(8, 8, 3, padding=1, norm_cfg={"type": "BN"})]
        return nn.Sequential(*parts).double()

    return each(expanded_and_folded(make, torch.randn(2, 3, 16, 16, dtype=torch.float64)))


@tool("mmengine")
def base_model():
    from mmengine.model import BaseModel

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, inputs, data_samples=None, mode="tensor"):
            y = self.net(inputs)
            return {"loss": y.square().mean()} if mode == "loss" else y

    return each(expanded_and_folded(lambda: Model().double(), X))


# ---------------------------------------------------------------------- whole networks


@tool("transformers")
def networks():
    from transformers import MobileNetV2Config, MobileNetV2Model, ResNetConfig, ResNetModel

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    mobile = MobileNetV2Config(depth_multiplier=0.25)
    both = {
        "ResNet": lambda: ResNetModel(resnet).double(),
        "MobileNetV2": lambda: MobileNetV2Model(mobile).double(),
    }
    return "; ".join(
        f"{name}: {each(expanded_and_folded(make, x), ('doconv', 'repvgg'))}" for name, make in both.items()
    )


@tool("segmentation-models-pytorch")
def segmentation():
    import segmentation_models_pytorch as smp

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    return "; ".join(
        f"{name}: "
        + each(
            expanded_and_folded(
                lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None, classes=2).double(), x
            ),
            ("doconv", "repvgg"),
        )
        for name in ("Unet", "FPN", "DeepLabV3Plus")
    )


@tool("monai")
def medical():
    from monai.networks.nets import UNet

    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    return each(
        expanded_and_folded(lambda: UNet(2, 1, 2, (4, 8, 16), (2, 2), num_res_units=1, norm="batch").double(), x),
        ("doconv", "repvgg"),
    )


# ---------------------------------------------------------------------- pruning, adapters, quantization


@tool("torch-pruning")
def prune_channels():
    import torch_pruning

    def make():
        torch.manual_seed(0)
        first, second = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(64, 3, 1))

    def cut(net):
        graph = torch_pruning.DependencyGraph().build_dependency(net, X.float())
        convs = [m for m in net if isinstance(m, nn.Conv2d)]
        graph.get_pruning_group(convs[0], torch_pruning.prune_conv_out_channels, idxs=list(range(24))).prune()
        return net

    def run(method):
        net = rich(method, make).float()
        return f"output {tuple(cut(net)(X.float()).shape)}"

    plain = foldconv.fold(rich("doconv", make).float())
    expected = copy.deepcopy(plain)
    with torch.no_grad():
        expected[0].weight[:24], expected[0].bias[:24] = 0, 0
    error = off(expected(X.float()), cut(plain)(X.float()))
    return f"{each(run, ('doconv', 'orepa'))}; folded first {error:.1e}"


@tool("peft")
def lora():
    from peft import LoraConfig, get_peft_model

    def run(method):
        net = get_peft_model(rich(method), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
        y = net(X)
        merged = outcome(lambda: off(y, copy.deepcopy(net).merge_and_unload()(X)))
        folded = outcome(lambda: off(y, foldconv.fold(net)(X)))
        both = outcome(lambda: off(y, foldconv.fold(net).merge_and_unload()(X)))
        return f"merged {merged}, folded {folded}, folded, then merged {both}"

    return each(run)


class Wrapped(nn.Module):
    """A network in a module with a forward of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def quantized(quantize, is_integer):
    """How many of the network's convolutions and linear layers a quantizer takes, expanded and folded first."""

    def run(method, fold=False):
        net = rich(method).float()
        if fold:
            net = foldconv.fold(net, batchnorm=True)
        quantized = quantize(net)
        taken = is_integer(quantized)
        return f"{taken} taken, {off(net(X.float()), quantized(X.float())):.1e}"

    return f"{each(run)}; folded first {outcome(run, 'doconv', True)}"


@tool("torchao")
def pt2e():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def quantize(net):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(net, (X.float(),)).module(), quantizer)
        prepared(X.float())
        return convert_pt2e(prepared)

    def is_integer(net):
        # Weights are dequantized per channel where they are used.
        return sum("dequantize_per_channel" in str(node.target) for node in net.graph.nodes)

    return quantized(quantize, is_integer)


@tool("brevitas")
def layerwise():
    from brevitas.graph.quantize import layerwise_quantize

    def is_integer(net):
        return sum(type(m).__name__ in ("QuantConv2d", "QuantLinear") for m in net.modules())

    return quantized(lambda net: layerwise_quantize(copy.deepcopy(net)), is_integer)


@tool("brevitas")
def preprocess():
    from brevitas.graph.quantize import preprocess_for_quantize

    def run(method, fold=False):
        net = foldconv.fold(rich(method)).float() if fold else rich(method).float()
        return off(net(X.float()), preprocess_for_quantize(copy.deepcopy(net))(X.float()))

    return f"{each(run)}; folded first {outcome(run, 'doconv', True)}"


@tool("nncf")
def post_training():
    import nncf

    def quantize(net):
        return nncf.quantize(Wrapped(net), nncf.Dataset([X.float()]), subset_size=1)

    def is_integer(net):
        return sum("weight" in name for name, m in net.named_modules() if "Quantizer" in type(m).__name__)

    return quantized(quantize, is_integer)


@tool("opacus")
def per_sample_gradients():
    from opacus import GradSampleModule

    def run(method):
        net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()).double(), method)
        net = stirred(net).train()
        sampled = GradSampleModule(copy.deepcopy(net), loss_reduction="sum")
        sampled(X).square().sum().backward()
        worst = 0.0
        for i, x in enumerate(X):
            net.zero_grad()
            net(x[None]).square().sum().backward()
            for p, q in zip(net.parameters(), sampled.parameters()):
                worst = max(worst, off(p.grad, q.grad_sample[i]))
        return worst

    return each(run, ("doconv", "orepa"))


# ---------------------------------------------------------------------- explaining and offloading


@tool("captum")
def integrated_gradients():
    from captum.attr import IntegratedGradients

    def run(method):
        net = rich(method)
        expected = IntegratedGradients(foldconv.fold(net)).attribute(X, target=1, n_steps=8)
        return off(expected, IntegratedGradients(net).attribute(X, target=1, n_steps=8))

    return each(run)


@tool("accelerate")
def offload():
    from accelerate import cpu_offload, disk_offload

    def run(method):
        net = rich(method)
        y = net(X)
        kept = cpu_offload(copy.deepcopy(net), torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            away = disk_offload(copy.deepcopy(net), folder, torch.device("cpu"))
            errors = f"{off(y, kept(X)):.1e} (CPU), {off(y, away(X)):.1e} (disk)"
        return f"{errors}, folded {outcome(lambda: off(y, foldconv.fold(kept)(X)))}"

    return each(run)


# ---------------------------------------------------------------------- counters


def counted(count):
    """Multiply-adds of the plain network, of the expanded ones, and of the fold."""
    numbers = {method: outcome(lambda m=method: count(rich(m))) for method in METHODS}
    numbers = {"plain": count(network().eval()), **numbers, "folded": count(foldconv.fold(rich("repvgg")))}
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


@tool("torchinfo")
def info():
    import torchinfo

    return counted(lambda net: torchinfo.summary(net.float(), input_data=X[:1].float(), verbose=0).total_mult_adds)


@tool("ptflops")
def flops():
    from ptflops import get_model_complexity_info

    def count(net, backend):
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        return int(get_model_complexity_info(net.float(), (4, 8, 8), **options)[0])

    backends = ("pytorch", "aten")
    return "; ".join(f"{name}: {counted(lambda net, name=name: count(net, name))}" for name in backends)


@tool("ultralytics-thop")
def profile():
    import thop

    return counted(lambda net: int(thop.profile(net.float(), (X[:1].float(),), verbose=False)[0]))


@tool("calflops")
def calculate_flops():
    from calflops import calculate_flops

    def count(net):
        options = {"print_results": False, "print_detailed": False, "output_as_string": False}
        return int(calculate_flops(net.float(), input_shape=(1, 4, 8, 8), **options)[1])

    return counted(count)


def main(wanted):
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(
        f"foldconv {metadata.version('foldconv')}, torch {torch.__version__}" if has("foldconv") else torch.__version__
    )
    for package, functions in TOOLS.items():
        if has(package) and (not wanted or package in wanted):
            for function in functions:
                print(f"{package} {metadata.version(package)}  {function.__name__}: {outcome(function)}", flush=True)


def has(package):
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
