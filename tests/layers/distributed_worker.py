"""One of two gloo processes of test_distributed.py: ``distributed_worker.py RANK FOLDER``.

Trains with DDP and with FSDP2 on its half of the batch and leaves what it computed in ``FOLDER/RANK.pt``.
"""

import datetime
import pathlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from foldconv import DGConv2d, DOConv2d, DOConvTranspose2d, ExpandNetConv2d, OREPAConv2d, composed_once, expand
from foldconv.layers import ComposedConv

WORLD, STEPS = 2, 3


def network(training):
    torch.manual_seed(0)
    net = nn.Sequential(
        DOConv2d(3, 6, 3, padding=1, depth_multiplier=11),
        nn.Tanh(),
        DOConv2d(6, 5, 3, stride=2, bias=False),
        nn.Tanh(),
        OREPAConv2d(5, 4, 3, padding=1),
        DGConv2d(4, 4, 3, padding=1),
        *expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), "dbb", init="paper"),
        ExpandNetConv2d(4, 6, 3, padding=1, rate=2),
        DOConv2d(6, 6, 1),
        DOConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    )
    net = net.double().train(training)
    # Norms by the statistics of half a batch would differ; frozen ones, as in fine-tuning, do not.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def images():
    return torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(net, batch, full=lambda p: p):
    """A few steps, looking at the evaluation between backward and step and after it; everything worth comparing."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    training, seen = net.training, {}

    def look(what):
        with torch.no_grad():
            seen[what] = net(images()).clone()

    for step in range(STEPS):
        optimizer.zero_grad()
        (net(batch) - 1).square().mean().backward()
        for name, p in net.named_parameters():
            seen[f"{step} gradient {name.removeprefix('module.')}"] = full(p.grad).clone()
        look(f"{step} before the step")
        optimizer.step()
        look(f"{step} after the step")
    net.eval()
    look("in evaluation")
    with torch.no_grad():
        for p in net.parameters():  # as an average of weights would do, without a word to the layers
            p.mul_(1.1)
    # What is split runs as outside; DDP writes the norms' buffers before each forward, so its inside is evaluated.
    with composed_once(getattr(net, "module", net)) as whole, torch.no_grad():
        seen["composed once"] = whole(images()).clone()
    look("in evaluation, after an edit")
    net.train(training)
    for name, p in net.named_parameters():
        seen[f"parameter {name.removeprefix('module.')}"] = full(p).detach().clone()
    return seen


def ddp(training, batch):
    net = DistributedDataParallel(network(training))
    return train(net, batch)


def fsdp(training, batch):
    net = network(training)
    mesh = init_device_mesh("cpu", (WORLD,))
    for child in net:
        if isinstance(child, ComposedConv):
            fully_shard(child, mesh=mesh)
    # The root's own parameters are also given back after a forward, so that an edit of a shard is gathered.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    shards = dict(net.named_parameters())
    assert all(type(p).__name__ == "DTensor" for p in shards.values())
    assert isinstance(net[0], DOConv2d)
    return train(net, batch, full=lambda p: p.full_tensor())


def main(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(pathlib.Path(folder) / "store"), WORLD)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    half = images().chunk(WORLD)[rank]
    jobs = {"ddp": ddp, "fsdp": fsdp}
    results = {name: {training: job(training, half) for training in (True, False)} for name, job in jobs.items()}
    torch.save(results, pathlib.Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
