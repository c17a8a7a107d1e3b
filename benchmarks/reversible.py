"""Memory and time of a training step with activations stored and recomputed, over the depth of a BESTformer.

    python benchmarks/reversible.py --depths 2 4 8 16 [--json FILE]

Every row is of two fresh processes. The main figure is torch's own: the most bytes that its allocator had out at once during
a training step, the network itself not counted, from the events of `torch.profiler`. It is the same in every run. Once with
the gradients of all parameters, as usual, and once with each gradient dropped as soon as it is there, which is what the
activations alone need (the gradients of a network twice as deep are twice as large however it is trained). Resident memory,
as the system counts it, stands beside it: it adds what the C library keeps for later and what oneDNN allocates itself.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from bitspike.layers import quantize_
from bitspike.models.bestformer import BESTformer
from bitspike.papers.bestformer import PUBLISHED


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allocated(net: torch.nn.Module, step: Callable[[], None]) -> tuple[int, int]:
    """The most bytes that torch's CPU allocator had out at once during `step`, beyond those at its start.

    The second figure leaves out the gradients that the parameters have afterwards.
    """
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    waiting, events = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while waiting:  # the tables of the profiler give sums over operators only
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    if not events:
        raise RuntimeError("torch.profiler recorded no allocation; this benchmark needs its events.")
    events.sort(key=lambda event: event[0])
    gradients = {p.grad.untyped_storage().data_ptr() for p in net.parameters() if p.grad is not None}
    lasts = {address: k for k, (_, address, _) in enumerate(events)}  # an address serves many tensors, a gradient last
    most = now = without = others = 0
    for k, (_, address, count) in enumerate(events):
        now += count
        others += count if address not in gradients or lasts[address] != k else 0
        most, without = max(most, now), max(without, others)
    return most, without


def measure(memory: str, depth: int, channels: int, batch: int, size: int, steps: int, threads: int) -> dict[str, float]:
    """One configuration, in this process: the peaks in bytes, seconds a step (the fastest)."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net = quantize_(BESTformer(channels, depth, 8, memory=memory), PUBLISHED).train()
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(10, (batch,))

    def step() -> None:
        first, second = net(images)
        (torch.nn.functional.cross_entropy(first, labels) + torch.nn.functional.cross_entropy(second, labels)).backward()

    before, seconds = _resident(), []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        net.zero_grad(set_to_none=True)
    resident = _resident() - before
    whole, without = allocated(net, step)
    return {"allocated": whole, "without_gradients": without, "resident": resident, "seconds": min(seconds)}


def main() -> None:
    """Measure every depth both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps to time, each of them without the profiler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--one", nargs=2, metavar=("MEMORY", "DEPTH"), help="one configuration, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.channels, options.batch, options.size,
                                 options.steps, options.threads)))
        return
    rows = []
    print(f"{datetime.now(UTC):%Y-%m-%d}, BESTformer, {options.channels} channels, 4 time steps, "
          f"{options.size}x{options.size}, batch {options.batch}, float32, {options.threads} thread(s), {platform.machine()}; "
          "MiB, in brackets without gradients\n")
    print("| depth | allocated, stored | allocated, recomputed | ratio | resident: stored, recomputed, ratio | time |\n"
          "|---|---|---|---|---|---|")
    for depth in options.depths:
        found = {}
        for memory in ("store", "recompute"):
            command = [sys.executable, __file__, "--one", memory, str(depth)]
            for name in ("channels", "batch", "size", "steps", "threads"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "KINETO_LOG_LEVEL": "99"})  # the profiler's own chatter
            found[memory] = json.loads(done.stdout.splitlines()[-1])
        a, b = found["store"], found["recompute"]
        rows.append({"depth": depth, **found})
        cells = [f"{x['allocated'] / 2**20:.0f} ({x['without_gradients'] / 2**20:.0f})" for x in (a, b)]
        print(f"| {depth} | {cells[0]} | {cells[1]} | {b['allocated'] / a['allocated']:.2f} x "
              f"({b['without_gradients'] / a['without_gradients']:.2f} x) | {a['resident'] / 2**20:.0f}, "
              f"{b['resident'] / 2**20:.0f}, {b['resident'] / a['resident']:.2f} x | {b['seconds'] / a['seconds']:.2f} x |",
              flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
