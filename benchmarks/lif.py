"""A LIF neuron over a sequence, forward and backward: the one-pass kernels against plain torch.

    python benchmarks/lif.py [--steps 4] [--elements 2097152] [--repeats 5]

Processor time of one thread, in milliseconds: the least of `repeats` runs, the two ways in turn. "one pass" is `LIF.forward` as
training calls it, "torch" is `LIF.eagerly`, the same equations step by step.
"""
from __future__ import annotations

import argparse
import time

import torch

from bitspike import _train_kernels
from bitspike.neurons import LIF
from bitspike.quantizers import Membrane


def least_ms(ways: list[object], x: torch.Tensor, grad: torch.Tensor, repeats: int) -> list[float]:
    """The least processor time of each way, after one run that is not counted."""
    best = [float("inf")] * len(ways)
    for run in range(repeats + 1):
        for k, way in enumerate(ways):
            start = time.process_time()
            way(x).backward(grad)  # type: ignore[operator]
            if run:
                best[k] = min(best[k], (time.process_time() - start) * 1e3)
            x.grad = None
    return best


def main() -> None:
    """Measure float32 and bfloat16, with and without a membrane quantizer, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--elements", type=int, default=2**21, help="neurons: elements of one step")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{options.steps} x {options.elements:,} elements, {_train_kernels.isa()}, torch {torch.__version__}\n")
    print("| dtype | membrane | torch, ms | one pass, ms | ratio |\n|---|---|---|---|---|")
    for bits in (0, 8, 32):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(options.steps, options.elements, dtype=dtype, requires_grad=True)
            grad = torch.randn(options.steps, options.elements, dtype=dtype)
            neuron = LIF(membrane=Membrane(bits) if bits else None)
            if neuron._kernel_shape(x) is None:
                raise SystemExit("the kernels do not apply here: is bitspike._train compiled?")
            eager, fast = least_ms([neuron.eagerly, neuron], x, grad, options.repeats)
            name = {0: "none", 32: "tanh alone"}.get(bits, f"{bits} bits")
            kind = str(dtype).removeprefix("torch.")
            print(f"| {kind} | {name} | {eager:.0f} | {fast:.0f} | {eager / fast:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
