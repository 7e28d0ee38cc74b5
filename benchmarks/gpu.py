"""What composing costs on a GPU, and whether it is right there: one command for a machine that has one.

    python benchmarks/gpu.py --out gpu.json

`--dry` runs all of it on the CPU with tiny networks, so that what fails at the first GPU is no slip of this file; what
it measures means nothing.

Checked against torch's operations: both compositions, every gradient, training steps, also under autocast in
channels_last, a compiled layer, a step captured as a CUDA graph. Timed by CUDA events, in milliseconds: compositions
and training steps, each round in a new order; ratios are medians of a value divided by the first contestant's in the
same round, printed beside what they should reach.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import sys
import time

import torch
import torchvision
from torch import nn

import foldconv
from foldconv import ops
from foldconv.files.atomic import write_json
from foldconv.lab.bench.samples import ratios, spread
from foldconv.lab.machine import machine, portable, versions


@dataclasses.dataclass(frozen=True)
class Place:
    """Where everything runs, and how large it is."""

    device: str = "cuda"
    fast: str = "gpu"
    """The path that is checked and timed beside torch's operations."""
    size: int = 224
    layers: tuple = ((64, 64, 1), (128, 128, 1), (256, 256, 1), (512, 512, 1), (256, 8, 32), (512, 1, 512))
    cases: tuple = (("resnet18", 32, False), ("resnet18", 256, False), ("resnet50", 64, True), ("resnet50", 256, True))
    """Network, batch, bfloat16 autocast in channels_last."""
    checked: tuple = ("resnet18", 16)
    """Network and batch of the training steps that are compared."""
    backend: str = "inductor"
    warm_up: int = 5

    @property
    def contestants(self):
        paths = dict.fromkeys((self.fast, "torch"))
        return [("plain", "torch"), *((m, path) for m in ("doconv", "orepa") for path in paths)]


_TINY = "squeezenet1_1"
DRY = Place(
    "cpu", "torch", 32, ((8, 8, 1), (8, 2, 4)), ((_TINY, 2, False), (_TINY, 2, True)), (_TINY, 2), "eager", warm_up=0
)
# Method, network, batch, bfloat16: the ratio to the plain network that the GPU's path should reach.
REACH = {
    ("doconv", "resnet50", 64, True): 1.01,
    ("doconv", "resnet50", 256, True): 1.01,
    ("doconv", "resnet18", 32, False): 1.05,
    ("orepa", "resnet50", 256, True): 1.15,
    ("orepa", "resnet18", 256, False): 1.15,
}
place = Place()


def draw(*shape, last=False, dtype=torch.float32):
    tensor = torch.randn(shape, device=place.device, dtype=dtype)
    return (tensor.transpose(1, 2).contiguous().transpose(1, 2) if last else tensor).requires_grad_()


def compositions(out, inputs, groups, k=9, last=False, dtype=torch.float32):
    kernels = [draw(out, inputs, k, last=last, dtype=dtype) for last in (last, last, True)]
    shapes = [(out, inputs)] * 3 + [(out, inputs, 8), (groups * inputs, 8, k), (6, out), (groups * inputs, k, k)]
    *others, D = [draw(*shape, dtype=dtype) for shape in shapes]
    cosines = draw(out, k, dtype=dtype).detach()

    def orepa(weight, product, average, prior, *rest):
        branches = ops.Orepa(weight, average, prior, product, *rest, cosines.to(weight.dtype), k // 2)
        return ops.compose_orepa(branches, groups)

    doconv = functools.partial(ops.compose_depthwise, groups=groups)
    return {"doconv": (doconv, [kernels[0], D]), "orepa": (orepa, [*kernels[1:], *others])}


def check(name, found, expected, most):
    pairs = zip(found, expected, strict=True)
    error = max(((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)
    print(f"{'ok ' if error <= most else 'BAD'}  {name}: off by {error:.1e}, at most {most:.0e}", flush=True)
    return {"check": name, "error": error, "most": most, "passed": error <= most}


def kernel_and_gradients(path, compose, tensors, grad):
    with ops.using(path):
        kernel = compose(*tensors)
    return [kernel, *torch.autograd.grad(kernel, tensors, grad.to(kernel.dtype))]


def check_compositions():
    precisions = ((torch.float32, 2e-6), (torch.float64, 1e-12))
    for (dtype, most), last, layer in itertools.product(precisions, (False, True), [*place.layers, (96, 7, 3)]):
        grad = torch.randn(*layer[:2], 9, device=place.device, dtype=dtype)
        for method, (compose, tensors) in compositions(*layer, last=last, dtype=dtype).items():
            exact = [t.detach().double().requires_grad_() for t in tensors]
            cases = ((place.fast, tensors), (place.fast, tensors), ("torch", exact))
            found, again, expected = (kernel_and_gradients(path, compose, inputs, grad) for path, inputs in cases)
            name = f"{method} {layer} {dtype} {'channels_last' if last else 'taps innermost'}"
            yield check(name, found, expected, most)
            yield check(f"{name}, a second run", found, again, 0)


def network(method, name, amp=False):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name).to(place.device)
    net = net if method == "plain" else foldconv.expand(net, method)
    for p in net.parameters():  # so that what starts as zero counts
        p.data.add_(torch.randn_like(p), alpha=0.02)
    return net.to(memory_format=torch.channels_last) if amp else net


def trainer(net, path, images, labels, amp):
    optimizer = torch.optim.SGD(net.train().parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with ops.using(path):
            with torch.autocast(place.device, torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch_of(batch, amp=False):
    torch.manual_seed(0)
    images, labels = (
        torch.randn(batch, 3, place.size, place.size, device=place.device),
        torch.randint(1000, (batch,), device=place.device),
    )
    return images.contiguous(memory_format=torch.channels_last) if amp else images, labels


def check_training():
    name, batch = place.checked
    for method in ("doconv", "orepa"):
        for amp in (False, True):
            inputs = *batch_of(batch, amp), amp
            steps = (trainer(network(method, name, amp), path, *inputs) for path in (place.fast, "torch"))
            losses = ([step() for _ in range(3)] for step in steps)
            title = f"{method}, training steps{', bf16 autocast, channels_last' if amp else ''}"
            yield check(title, *losses, 2e-2 if amp else 1e-3)
        layer = foldconv.expand(nn.Conv2d(64, 64, 3, padding=1, device=place.device), method)
        x = torch.randn(4, 64, 14, 14, device=place.device)
        yield check(f"{method}, a compiled layer", [torch.compile(layer, backend=place.backend)(x)], [layer(x)], 1e-2)
        # A captured step replayed is the same step taken one by one.
        captured, eager = (trainer(network(method, name), place.fast, *batch_of(batch), False) for _ in range(2))
        if place.device == "cpu":
            losses = [torch.manual_seed(0) and [step()] for step in (captured, eager)]
            yield check(f"{method}, a training step again", *losses, 0)
            continue
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                captured()
        side.synchronize()
        with torch.cuda.graph(graph):
            loss = captured()
        for _ in range(3):
            graph.replay()
        yield check(f"{method}, a captured training step", [loss], [eager() for _ in range(6)][-1:], 1e-3)


def milliseconds(run):
    if place.device == "cpu":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def paired(runs, rounds):
    samples, order = {name: [] for name in runs}, random.Random(0)
    for _ in range(place.warm_up + rounds):
        for name in order.sample(list(runs), len(runs)):
            samples[name].append(milliseconds(runs[name]))
    samples = {name: values[place.warm_up :] for name, values in samples.items()}
    medians = {name: spread(values)["median"] for name, values in samples.items()}
    print(medians)
    return {"medians": medians, "ratios": ratios(samples, next(iter(runs))), "samples": samples}


def time_layers(rounds):
    for layer in place.layers:
        grad = torch.randn(*layer[:2], 9, device=place.device)
        for method, case in compositions(*layer).items():
            runs = {
                path: functools.partial(kernel_and_gradients, path, *case, grad)
                for path in dict.fromkeys(("torch", place.fast))
            }
            yield {"method": method, "layer": layer, **paired(runs, rounds)}


def time_steps(name, batch, amp, rounds):
    inputs, runs, memory = (*batch_of(batch, amp), amp), {}, {}
    for method, path in place.contestants:
        key = method if method == "plain" else f"{method}, {path}"
        before = torch.cuda.memory_allocated()  # 0 where there is no GPU
        runs[key] = trainer(network(method, name, amp), path, *inputs)
        runs[key]()
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs[key]()
        memory[key] = torch.cuda.max_memory_allocated() - before
    found = {"network": name, "batch": batch, "amp": amp, "peak_bytes": memory, **paired(runs, rounds)}
    for key, ratio in found["ratios"].items():
        wanted = REACH.get((key.partition(",")[0], name, batch, amp)) if key.endswith(place.fast) else None
        goal = f", to reach ≤ {wanted}" if wanted else ""
        print(f"{name} {batch} {key:16} {ratio['median']:.3f}×  {memory[key] / 1e9:.2f} GB{goal}")
    return found


def main(arguments=None):
    global place
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="the JSON file")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--dry", action="store_true", help="everything once, tiny and on the CPU; the figures mean nothing"
    )
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        return "gpu.py: torch finds no GPU with CUDA here, and this measures nothing else; --dry tries it on the CPU"
    place = DRY if options.dry else Place()
    report = {
        "command": f"python benchmarks/gpu.py --out {portable(options.out)} --rounds {options.rounds}",
        "dry": options.dry,
        "machine": {**machine(place.device), "tf32_convolutions": torch.backends.cudnn.allow_tf32},
        "versions": versions(),
        "checks": [*check_compositions(), *check_training()],
    }
    steps = [time_steps(*case, options.rounds) for case in place.cases]
    report |= {"layers": [*time_layers(options.rounds)], "steps": steps}
    write_json(options.out, report, indent=1)
    return 0 if all(c["passed"] for c in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
