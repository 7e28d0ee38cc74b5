"""Images per second of training batches: augmented as whole batches in memory, against torchvision in a DataLoader.

CIFAR's shape and augmentation (flip, pad by 4 and crop, normalize), batches of 128, random pixels. The ways take turns,
so that what else the machine does meets all of them; the medians and their ratio are printed.

    python benchmarks/data_loading.py --images 10000 --rounds 5 --workers 2
"""

import argparse
import statistics
import time

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from foldconv.lab.data import BatchTransform, ImageData, training_loader

MEAN, STD, BATCH = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 128


class OneByOne(Dataset):
    """What torchvision.datasets.CIFAR10 does with an image."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self._images, self._labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return self._transform(self._images[index]), self._labels[index]


def images_per_second(loader, device: str) -> float:
    begin, count = time.perf_counter(), 0
    for images, labels in loader:
        images, _ = images.to(device), labels.to(device)
        count += len(images)
    if device != "cpu":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the DataLoader")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of this process; more than one loses on busy cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (options.images,))
    tensors = TensorDataset(images, labels)
    transform = BatchTransform(MEAN, STD, flip=True, pad=4)
    data = ImageData("random", tensors, tensors, 10, (3, 32, 32), transform=transform)
    one_by_one = OneByOne(images, labels)
    ways = {
        "whole batches": training_loader(data, BATCH, 0, lambda: 0, device=options.device),
        "torchvision, this process": DataLoader(one_by_one, BATCH, shuffle=True),
    }
    if options.workers:
        ways[f"torchvision, {options.workers} workers"] = DataLoader(
            one_by_one, BATCH, shuffle=True, num_workers=options.workers, persistent_workers=True
        )
    rates = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, loader in ways.items():
            rate = images_per_second(loader, options.device)
            if turn:  # the first one starts workers and copies to the device
                rates[name].append(rate)
    print(f"{options.images} images, batches of {BATCH}, {options.rounds} rounds, {torch.get_num_threads()} threads")
    for name, found in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["whole batches"], found))
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(
            f"{name:28} {statistics.median(found):10,.0f} images/s ({spread}); whole batches {ratio:.1f} times as fast"
        )


if __name__ == "__main__":
    main()
