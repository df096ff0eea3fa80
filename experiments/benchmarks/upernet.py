"""Compares the memory of a training step of UPerNet in each backprop mode: predicted by ``odenets.plan``, and measured.

    python experiments/benchmarks/upernet.py                                        # RevCol-T at 128 pixels
    python experiments/benchmarks/upernet.py --model revcol_base --size 640 --batch 1 --predict

Memory is the peak of one forward and backward pass, beyond parameters, their gradients, and the batch, with 150 classes
and heads of the published size. Predicted: by the plan of the mode. Measured: the largest sum of the allocator's
events. ``--predict`` skips the measurement, for which the network may be too large.
"""

import argparse

import torch
from memory import peak_mib

import odenets
from odenets.segmentation import UPerNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="revcol_tiny")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=["store", "checkpoint", "reverse"])
    parser.add_argument("--predict", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | input | mode | predicted MiB | measured MiB | ratio |")
    print("|---|---|---|--:|--:|--:|")
    for mode in given.modes:
        torch.manual_seed(0)
        net = UPerNet(given.model, num_classes=150, backprop=mode)
        x = torch.randn(given.batch, 3, given.size, given.size)
        y = torch.randint(0, 150, (given.batch, given.size, given.size))
        # Batch norm cannot train on a batch of one; memory does not depend on it.
        if given.batch == 1:
            net.net.decode_head.eval()
            net.training = False
        for p in net.parameters():
            p.grad = torch.zeros_like(p)

        def step(net: UPerNet = net, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            torch.stack(list(net(x, y).values())).sum().backward()

        predicted = odenets.plan(net, x, y).predicted / 2**20
        measured = None if given.predict else peak_mib(step)
        figures = " | ".join(("", "") if measured is None else (f"{measured:.1f}", f"{predicted / measured:.3f}"))
        where = f"{given.batch} x {given.size} x {given.size}"
        print(f"| {given.model} | {where} | {mode} | {predicted:.1f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
