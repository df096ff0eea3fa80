"""Pictures per second of the CIFAR-10 loader alone, against the training rate of a small HO-ResNet that it must feed.

    python experiments/benchmarks/loader.py FOLDER [--batches 100] [--threads 1]

FOLDER holds train.parquet and test.parquet. The loader's figure includes batching, crop, flip and normalisation; the
model's is forward, backward and update on a batch that is there. They are timed in turns; the medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from odenets.models import HOResNet
from odenets.training import Augment, Images


def batches(data: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches without end, as a run sees them."""
    while True:
        for batch in data.train_dataloader():
            yield data.on_after_batch_transfer(batch, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scheme", default="rk4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

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
