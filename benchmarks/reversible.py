"""Memory and time of a training step with activations stored and recomputed, over the depth of a BESTformer.

    python benchmarks/reversible.py --depths 2 4 8 16 [--json FILE]

Every figure is of a fresh process: the largest resident memory of a training step, as the system counts it, less that of
the loaded model and the size of its gradients; in brackets what autograd holds between the forward and the backward pass.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(memory: str, depth: int, channels: int, batch: int, size: int, steps: int, threads: int) -> dict[str, float]:
    """One configuration, in this process: peak and kept bytes, seconds a step (the fastest)."""
    import torch

    from bitspike.layers import quantize_
    from bitspike.models.bestformer import BESTformer
    from bitspike.papers.bestformer import PUBLISHED

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net = quantize_(BESTformer(channels, depth, 8, memory=memory), PUBLISHED).train()
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(10, (batch,))
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    before, seconds = _peak_bytes(), []
    for _ in range(steps):
        held.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            first, second = net(images)
        loss = torch.nn.functional.cross_entropy(first, labels) + torch.nn.functional.cross_entropy(second, labels)
        kept = sum(count for address, count in held.items() if address not in own)
        # the bits that the halvings dropped are no tensors of the graph's own: two an element and block
        if memory == "recompute":
            kept += 2 * depth * 4 * batch * channels * (size // 4) ** 2 // 8
        loss.backward()
        seconds.append(time.perf_counter() - start)
        net.zero_grad(set_to_none=True)
    return {"peak": _peak_bytes() - before - gradients, "kept": kept, "seconds": min(seconds)}


def main() -> None:
    """Measure every depth both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--one", nargs=2, metavar=("MEMORY", "DEPTH"), help="one configuration, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.channels, options.batch, options.size,
                                 options.steps, options.threads)))
        return
    rows = []
    print(f"BESTformer, {options.channels} channels, 4 time steps, {options.size}x{options.size}, batch {options.batch}, "
          f"float32, {options.threads} thread(s)\n")
    print("| depth | stored MiB (kept) | recomputed MiB (kept) | memory | time |\n|---|---|---|---|---|")
    for depth in options.depths:
        found = {}
        for memory in ("store", "recompute"):
            command = [sys.executable, __file__, "--one", memory, str(depth)]
            for name in ("channels", "batch", "size", "steps", "threads"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[memory] = json.loads(done.stdout.splitlines()[-1])
        a, b = found["store"], found["recompute"]
        rows.append({"depth": depth, **found})
        cells = [f"{x['peak'] / 2**20:.0f} ({x['kept'] / 2**20:.0f})" for x in (a, b)]
        print(f"| {depth} | {cells[0]} | {cells[1]} | {b['peak'] / a['peak']:.2f} x ({b['kept'] / a['kept']:.2f} x) | "
              f"{b['seconds'] / a['seconds']:.2f} x |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
