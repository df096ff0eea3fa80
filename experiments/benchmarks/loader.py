"""Measures pictures per second of the loader alone: small ones from memory, or large ones decoded and cropped.

    python experiments/benchmarks/loader.py FOLDER [--batches 100] [--threads 1]
    python experiments/benchmarks/loader.py FOLDER --size 224 [--interpolation bicubic] [--rounds 30] [--enlarge 4]

Without --size FOLDER holds train.parquet and test.parquet of CIFAR-10, and the figure is printed beside the training
rate of a small HO-ResNet. The loader's figure includes batching, crop, flip and normalisation; the model's covers
forward pass, backward pass and update on a batch that is ready. They are timed in turns; the medians are printed.

With --size FOLDER holds class folders of large pictures; --enlarge takes copies that many times as wide and high. One
process reads batches of 64 from `Images` (random crop of 8 to 100 %, uint8), and from torchvision's ImageFolder with
RandomResizedCrop and PILToTensor, or, if torchvision does not import, from the same calls of PIL. Both are timed in
turns on the same files, in processor seconds; the ratio of a round is that of its two times.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

from odenets.cli import repair_torchvision
from odenets.models import HOResNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    repair_torchvision()  # a torchvision built for another torch keeps Lightning from importing

from odenets.training import Augment, Images
from odenets.training.decode import RESAMPLING, random_box


def batches(data: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields training batches endlessly, as a run would get them."""
    while True:
        for batch in data.train_dataloader():
            yield data.on_after_batch_transfer(batch, 0)


def torchvision_sets(root: str, size: int, interpolation: str) -> tuple[str, Any]:
    """Returns torchvision's data set of the folder, or an equivalent written with PIL."""
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError:
        return "PIL alone", PlainFolder(root, size, interpolation)
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.RandomResizedCrop(size, interpolation=mode), transforms.PILToTensor()]
    return "torchvision", ImageFolder(root, transforms.Compose(steps))


class PlainFolder:
    """Opens, converts to RGB, crops, resizes, and turns pictures into tensors, as torchvision does."""

    def __init__(self, root: str, size: int, interpolation: str) -> None:
        self.files = sorted(file for file in Path(root).glob("*/*") if file.is_file())
        self.size, self.how = size, RESAMPLING[interpolation]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with open(self.files[i], "rb") as file:
            picture = Image.open(file).convert("RGB")
        picture = picture.crop(random_box(*picture.size)).resize((self.size, self.size), self.how)
        return torch.from_numpy(np.array(picture, copy=True)).permute(2, 0, 1).contiguous(), 0


def enlarged(root: str, times: int, target: str) -> None:
    """Writes copies of a folder's pictures, `times` as wide and high, as JPEG of quality 90."""
    for file in sorted(Path(root).glob("*/*")):
        picture = Image.open(file).convert("RGB")
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.BICUBIC)
        copy = Path(target) / file.parent.name / f"{file.stem}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        picture.save(copy, quality=90)


def large(root: str, size: int, interpolation: Any, rounds: int) -> None:
    """Times both ways in turns on the same files; prints medians and the quartiles of the ratio."""
    data = Images(root, size=size, interpolation=interpolation, cache=False, num_workers=0, holdout=1e-9)
    data.setup("fit")
    ours: Any = data.sets["train"]
    name, theirs = torchvision_sets(root, size, interpolation)
    draw = random.Random(0)
    times: dict[str, list[float]] = {"odenets": [], name: []}
    for number in range(rounds + 1):
        picked = [draw.randrange(len(ours)) for _ in range(64)]
        ways = {
            "odenets": lambda p=picked: ours.__getitems__(p),
            name: lambda p=picked: default_collate([theirs[i] for i in p]),
        }
        for way in sorted(ways, reverse=bool(number % 2)):
            start = time.process_time()
            ways[way]()
            if number:  # the first round only brings the files into the page cache
                times[way].append(time.process_time() - start)
    for way, spent in times.items():
        print(f"{way:<12} {64 / statistics.median(spent):8,.0f} pictures per second of one core")
    ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
    low, middle, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.25, 0.5, 0.75))
    print(f"ratio of a round: {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {rounds} rounds; aim: at least 1.5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scheme", default="rk4")
    parser.add_argument("--size", type=int)
    parser.add_argument("--interpolation", default="bilinear", choices=("bilinear", "bicubic"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--enlarge", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.size:
        with tempfile.TemporaryDirectory() as folder:
            if args.enlarge > 1:
                enlarged(args.root, args.enlarge, folder)
            root = folder if args.enlarge > 1 else args.root
            return large(root, args.size, args.interpolation, args.rounds)

    start = time.perf_counter()
    data = Images(args.root, batch_size=args.batch_size, augment=Augment(crop=4, flip=0.5))
    data.setup("fit")
    decoded = time.perf_counter() - start
    data.trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
    loader = batches(data)

    net = HOResNet(scheme=args.scheme).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*next(loader))
    load, train = [], []
    for _ in range(args.batches):
        start = time.perf_counter()
        x, y = next(loader)
        middle = time.perf_counter()
        step(x, y)
        load.append(middle - start)
        train.append(time.perf_counter() - middle)
    rates = [args.batch_size / statistics.median(times) for times in (load, train)]
    print(f"decoding all pictures once   {decoded:8.1f} s")
    print(f"loader, crop, flip, norm.    {rates[0]:8,.0f} images/s")
    print(f"{args.scheme} HO-ResNet, {sum(p.numel() for p in net.parameters()):,}    {rates[1]:8,.0f} images/s (bf16)")
    print(f"loader / model               {rates[0] / rates[1]:8.1f}  (aim: at least 10)")


if __name__ == "__main__":
    main()
