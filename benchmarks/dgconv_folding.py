"""What folding DGConv saves: ``python benchmarks/dgconv_folding.py [--help]``.

A G-ResNeXt whose 3×3 convolutions have learned `--groups` groups, interleaved, in evaluation mode: as it was trained
(dense convolutions with masked kernels, inside `composed_once`), folded, and folded with the permutations absorbed.
Each round times all three one after the other; printed are medians over the rounds and of the
rounds' ratios.
"""

import argparse
import statistics
import time

import torch

import foldconv
from foldconv.lab.zoo import GResNeXt


def network(layers, groups):
    net = foldconv.expand(GResNeXt(layers), "dgconv", include="layer*.conv2").eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, foldconv.DGConv2d):
                # The highest bits stay open: groups of channels that lie far apart.
                closed = groups.bit_length() - 1
                layer.gates.copy_(torch.tensor([1.0] * (len(layer.gates) - closed) + [-1.0] * closed))
    return net


def seconds(model, x):
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 1, 1, 1], help="blocks per stage")
    parser.add_argument("--groups", type=int, default=32, help="a power of two, at most 128")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.groups not in (2**k for k in range(8)):
        parser.error(f"--groups: expected a power of two from 1 to 128, received {options.groups}")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, 3, options.size, options.size)
    masked = network(options.layers, options.groups)
    folded = foldconv.fold(masked, batchnorm=False)
    absorbed = foldconv.absorb_permutations(folded)
    models = {"masked, dense": masked, "folded": folded, "folded, absorbed": absorbed}
    rounds = []
    with torch.inference_mode(), foldconv.composed_once(masked):
        for model in models.values():
            error = (model(x) - masked(x)).abs().max() / masked(x).abs().max()
            assert error < 1e-4, error
        for _ in range(options.rounds):
            rounds.append([seconds(model, x) for model in models.values()])
    print(f"{'':18} {'multiply-adds':>16} {'parameters':>12} {'ms':>8} {'× faster':>9}")
    for i, (name, model) in enumerate(models.items()):
        told = foldconv.summary(model, tuple(x.shape))
        ms = 1000 * statistics.median(r[i] for r in rounds)
        ratio = statistics.median(r[0] / r[i] for r in rounds)
        print(f"{name:18} {told.macs_training:16,} {told.parameters_training:12,} {ms:8.1f} {ratio:9.2f}")


if __name__ == "__main__":
    main()
