"""Times forward and backward passes of our convolutions and nn.Conv2d on maps of ConvNeXt, RDNet and DenseNet.

    python experiments/benchmarks/convolutions.py
    python experiments/benchmarks/convolutions.py --amp --threads 2

Figures are the least CPU time over rounds in which both take turns, in fp32 or under bfloat16 autocast, with
channels-last memory.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from odenets.layers import DepthwiseConv2d, PatchConv2d


def plain(module: nn.Conv2d) -> nn.Conv2d:
    """Returns torch's convolution with the same parameters."""
    sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
    twin = nn.Conv2d(*sizes, groups=module.groups)
    twin.load_state_dict(module.state_dict())
    return twin


def least(modules: list[nn.Conv2d], x: Tensor, rounds: int, amp: bool) -> list[float]:
    """Returns the least milliseconds of a forward and backward pass of each."""
    best = [float("inf")] * len(modules)
    for turn in range(rounds + 2):  # two warm-up rounds
        for i, module in enumerate(modules):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = module(x)
            y.backward(torch.ones_like(y, memory_format=torch.channels_last))
            if turn > 1:
                best[i] = min(best[i], (time.process_time() - start) * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [
        *((DepthwiseConv2d(c, 7), c, side) for c, side in ((96, 56), (192, 28), (384, 14), (768, 7), (440, 12))),
        *((DepthwiseConv2d(64, k), 64, 32) for k in (3, 5, 11)),
        *((PatchConv2d(c, out, 1), c, side) for c, out, side in ((160, 128, 24), (512, 128, 12), (1024, 128, 6))),
        *((PatchConv2d(c, out, 2), c, side) for c, out, side in ((264, 184, 24), (192, 384, 28), (384, 768, 6))),
    ]
    print(f"# batch {args.batch}, torch {torch.__version__}, {vars(args)}")
    print("| convolution | channels | side | ms | nn.Conv2d | of it |\n|---|---|---|---|---|---|")
    for module, channels, side in cases:
        x = torch.randn(args.batch, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        ours, theirs = least([module, plain(module)], x, args.rounds, args.amp)
        kind = f"{type(module).__name__} {module.kernel_size[0]}x{module.kernel_size[0]}"
        widths = f"{channels}" if module.groups > 1 else f"{channels} to {module.out_channels}"
        print(f"| {kind} | {widths} | {side} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
