"""Measures fine-tuning of transformers in the memory of two layers: memory, time, gradient error, largest batch.

    python experiments/benchmarks/restack.py             # about 5 minutes, one thread
    python experiments/benchmarks/restack.py --quick     # 12 layers instead of 24, one round
    python experiments/benchmarks/restack.py --model llama

Randomly initialised models of transformers: ViT of width 192 on pictures of 96 x 96 in patches of 16, batch 16; BERT,
GPT-2 and Llama of width 192 on 64 tokens, batch 8, without a cache. Training mode without dropout; the loss is
logits.square().mean().

Kept: the memory that a forward pass leaves for the backward pass. Peak: the largest sum of the allocator's events in
one forward and backward pass, above the level before; gradients are preallocated. Times are processor time of one
thread. A round times every row once, and a figure is the median over the rounds of the ratio to the untouched model in
the same round. Gradient error: relative, in the global norm over all parameters, in single precision, against autograd
over the same states: for euler the untouched model, for bdia the run on the same grid and with the same signs (seed=0)
that keeps all states, for momentum the stored run. Batch: the largest whose peak fits into the memory of the untouched
model.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from memory import peak_mib
from torch import Tensor, nn

from odenets import RestackWarning, restack
from odenets.backprop.meter import meter_on

SIZES = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
TEXT = {**SIZES, "vocab_size": 1000, "max_position_embeddings": 64, "pad_token_id": 0}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# The model, the path of its blocks, and its batch in the table.
MODELS: dict[str, tuple[Callable[[int], Any], str, int]] = {
    "vit": (
        lambda depth: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, **OFF, num_hidden_layers=depth, image_size=96, patch_size=16, num_labels=10)
        ),
        "vit.layers",
        16,
    ),
    "bert": (
        lambda depth: transformers.BertForSequenceClassification(
            transformers.BertConfig(**TEXT, **OFF, num_hidden_layers=depth)
        ),
        "bert.encoder.layer",
        8,
    ),
    "gpt2": (
        lambda depth: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=192, n_layer=depth, n_head=3, vocab_size=1000, n_positions=64, use_cache=False,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
            )
        ),
        "transformer.h",
        8,
    ),
    "llama": (
        lambda depth: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**TEXT, num_hidden_layers=depth, use_cache=False)
        ),
        "model.layers",
        8,
    ),
}  # fmt: skip
# For each row, the reference of its gradients: another row, or the options of a run that keeps all states.
ROWS: dict[str, tuple[dict[str, Any] | None, Any]] = {
    "untouched": (None, None),
    "euler, store": ({"scheme": "euler", "backprop": "store"}, "untouched"),
    "euler, checkpoint": ({"scheme": "euler", "backprop": "checkpoint"}, "untouched"),
    "bdia, exact": (
        {"scheme": "bdia", "backprop": "exact", "seed": 0},
        {"scheme": "bdia", "backprop": "exact(store=true)", "seed": 0},
    ),
    "momentum(9/10), reverse": (
        {"scheme": "momentum(9/10)", "backprop": "reverse"},
        {"scheme": "momentum(9/10)", "backprop": "store"},
    ),
}


def build(name: str, depth: int, options: dict[str, Any] | None) -> nn.Module:
    torch.manual_seed(0)
    make, path, _ = MODELS[name]
    net = make(depth).train()
    if options is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestackWarning)
            restack(net, path, **options)
    return net


def batch(name: str, n: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        return torch.randn(n, 3, 96, 96, generator=draw)
    return torch.randint(3, 1000, (n, 64), generator=draw)


def step(net: nn.Module, x: Tensor) -> None:
    net(x).logits.square().mean().backward()


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    net.zero_grad()
    step(net, x)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def kept_mib(net: nn.Module, x: Tensor) -> float:
    with meter_on(x.device) as meter:
        meter.mark()
        loss = net(x).logits.square().mean()
        meter.mark()
    del loss
    return meter.intervals[1].start / 2**20


def largest(peak: Callable[[int], float], limit: float, n: int) -> int:
    """Returns the largest batch whose peak is within the limit; the peak is nearly linear in the batch."""
    low, high = peak(n), peak(2 * n)
    guess = max(1, int(n + (limit - low) / max(high - low, 1e-9) * n))
    while guess > 1 and peak(guess) > limit:
        guess -= max(1, guess // 50)
    return guess


def rows(name: str, depth: int, rounds: int) -> list[list[str]]:
    n = MODELS[name][2]
    x = batch(name, n)
    nets = {row: build(name, depth, options) for row, (options, _) in ROWS.items()}
    for net in nets.values():
        step(net, x)  # measures growth and allocates the gradients
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(rounds):
        for row, net in nets.items():
            start = time.process_time()
            step(net, x)
            found[row].append(time.process_time() - start)
    limit = peak_mib(lambda: step(nets["untouched"], x))
    table = []
    for row, net in nets.items():
        against = ROWS[row][1]
        error = "–"
        if against is not None:
            other = copy.deepcopy(nets[against]) if isinstance(against, str) else build(name, depth, against)
            fresh = build(name, depth, ROWS[row][0])
            want, got = gradient(other, x), gradient(fresh, x)
            error = f"{float((got - want).norm() / want.norm()):.1e}"
        ratio = statistics.median(a / b for a, b in zip(found[row], found["untouched"], strict=True))
        fits = largest(lambda m, net=net: peak_mib(lambda: step(net, batch(name, m))), limit, n)
        peak = peak_mib(lambda net=net: step(net, x))
        table.append([row, f"{kept_mib(net, x):.1f}", f"{peak:.1f}", f"{ratio:.2f}", error, str(fits)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=["vit", "bert"])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="12 layers, one round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    depth, rounds = (12, 1) if given.quick else (given.depth, given.rounds)
    for name in given.model:
        print(f"\n{name}, {depth} layers, batch {MODELS[name][2]}, torch {torch.__version__}, "
              f"transformers {transformers.__version__}\n")  # fmt: skip
        print("| Blocks | Kept, MiB | Peak, MiB | Time | Gradient error | Batch in the same memory |")
        print("|---|--:|--:|--:|--:|--:|")
        for row in rows(name, depth, rounds):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
