"""Time and memory of one training step (forward, backward, optimizer) on the CPU: ours against the formulas as written.

Network: the 15 M QSD-Transformer, 4-bit LSQ weights, IE-LIF neurons, 224 x 224. The other side, `plain_model` below, is
what a careful reader of the paper and its released code would write: LSQ with the detach trick and a broadcast step, a
float mask kept by every neuron, contiguous NCHW, eager torch. It has the same weights, sees the same images and is
checked to give the same loss and gradients before anything is timed. Each side runs in a process of its own; steps
alternate, so that both see the same machine. Peak memory: the process's largest resident size minus that before its first
step.

    python benchmarks/train_step.py [--batch 8] [--image 224] [--steps 7] [--threads N] [--json FILE]

Targets: ours in float32 at least 1.5 x faster with at most 0.7 x the peak memory; ours in bfloat16 at least 2 x faster
than the plain float32. `cpu` counts the processor's time, which other programs on the machine disturb less than `wall`.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = {"plain float32": ("plain", "float32"), "ours float32": ("ours", "float32"), "ours bfloat16": ("ours", "bfloat16")}


# ------------------------------------------------------------------------------------ the plain transcription
def lsq(w: Tensor, alpha: Tensor, bits: int = 4) -> Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    g = 1 / math.sqrt(w.numel() * high)
    a = (alpha * g + (alpha - alpha * g).detach()).view(-1, *[1] * (w.dim() - 1))
    v = (w / a).clamp(low, high)
    return ((v.round() - v).detach() + v) * a


class QConv2d(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, lsq(self.weight, self.alpha), self.bias)


class QLinear(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.alpha = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, lsq(self.weight, self.alpha), self.bias)


class Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        u = 4 * x
        ctx.save_for_backward(((u > 0) & (u < 4)).to(x.dtype))
        return torch.floor(torch.clamp(u, 0, 4) + 0.5)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 4 * grads[0] * ctx.saved_tensors[0]


class Neuron(nn.Module):
    def __init__(self, scale: float = 0.25) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return Count.apply(x) * self.scale  # type: ignore[no-any-return]


class Unit(nn.Module):
    """Neuron (if any), convolution, norm (if any)."""

    def __init__(self, conv: nn.Module, neuron: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.neuron, self.conv = (Neuron() if neuron else nn.Identity()), conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.neuron(x)))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.sep = nn.Module()
        self.sep.expand = Unit(QConv2d(c, 2 * c, 1, bias=False))
        self.sep.depthwise = Unit(QConv2d(2 * c, 2 * c, 7, padding=3, groups=2 * c, bias=False), norm=False)
        self.sep.project = Unit(QConv2d(2 * c, c, 1, bias=False), neuron=False)
        self.conv1 = Unit(QConv2d(c, 4 * c, 3, padding=1, bias=False))
        self.conv2 = Unit(QConv2d(4 * c, c, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sep.project(self.sep.depthwise(self.sep.expand(x)))  # type: ignore[operator]
        return x + self.conv2(self.conv1(x))  # type: ignore[no-any-return]


class NormPad(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = F.pad(n(x), [1, 1, 1, 1])
        border = n.bias.detach() - n.running_mean * n.weight.detach() / torch.sqrt(n.running_var + n.eps)  # type: ignore[operator]
        border = border.view(1, -1, 1, 1)
        x[:, :, 0:1, :] = border
        x[:, :, -1:, :] = border
        x[:, :, :, 0:1] = border
        x[:, :, :, -1:] = border
        return x


class RepConv(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.mix, self.pad = QConv2d(c, c, 1, bias=False), NormPad(c)
        self.depthwise = QConv2d(c, c, 3, groups=c, bias=False)
        self.project = Unit(QConv2d(c, c, 1, bias=False), neuron=False)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(self.depthwise(self.pad(self.mix(x)))))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, c: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.attn, self.mlp, self.scale1, self.scale2 = nn.Module(), nn.Module(), nn.Module(), nn.Module()
        for name in ("q", "k", "v", "proj"):
            setattr(self.attn, name, RepConv(c))
        self.neuron, self.attention_neuron = Neuron(), Neuron(0.5)
        self.mlp.fc1, self.mlp.fc2 = Unit(QConv2d(c, 4 * c, 1)), Unit(QConv2d(4 * c, c, 1))
        self.scale1.weight, self.scale2.weight = nn.Parameter(torch.ones(c)), nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        s = self.neuron(x)

        def tokens(conv: nn.Module) -> Tensor:  # [B, heads, N, dim]
            return self.neuron(conv(s)).flatten(2).transpose(1, 2).reshape(B, H * W, self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = tokens(self.attn.q), tokens(self.attn.k), tokens(self.attn.v)  # type: ignore[arg-type]
        a = q @ (k.transpose(-2, -1) @ v) * 0.25
        a = self.attn.proj(self.attention_neuron(a.transpose(2, 3).reshape(B, C, H, W)))  # type: ignore[operator]
        x = x + self.scale1.weight.view(-1, 1, 1) * a  # type: ignore[operator]
        return x + self.scale2.weight.view(-1, 1, 1) * self.mlp.fc2(self.mlp.fc1(x))  # type: ignore[operator,no-any-return]


class Plain(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 360), depths: tuple[int, int] = (6, 2)) -> None:
        super().__init__()
        half = widths[0] // 2
        self.stem = Unit(QConv2d(3, half, 7, 2, padding=3), neuron=False)
        self.stem_block = ConvBlock(half)
        self.stages = nn.ModuleList()
        for i, c in enumerate(widths):
            stage = nn.Module()
            stage.down = Unit(QConv2d(widths[i - 1] if i else half, c, 3, 1 if i == 3 else 2, padding=1))
            blocks: list[nn.Module] = [ConvBlock(c) for _ in range(i + 1)] if i < 2 else [
                Block(c) for _ in range(depths[i - 2])]
            stage.blocks = nn.Sequential(*blocks)
            self.stages.append(stage)
        self.neuron, self.head = Neuron(), QLinear(widths[3], 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_block(self.stem(x))
        for stage in self.stages:
            x = stage.blocks(stage.down(x))  # type: ignore[operator]
        return self.head(self.neuron(x.mean((2, 3))))  # type: ignore[no-any-return]


def plain_name(name: str) -> str:
    """Name of a parameter or buffer of ours -> in `Plain`."""
    return name.replace("parametrizations.weight.original", "weight").replace("parametrizations.weight.0.scale", "alpha")


# ------------------------------------------------------------------------------------------------- both sides
def our_model() -> nn.Module:
    from bitspike.layers import quantize_
    from bitspike.models.meta_spikeformer import imagenet_15m
    from bitspike.quantizers import LSQ
    from bitspike.spec import QuantSpec, Scheme

    torch.manual_seed(0)
    model = quantize_(imagenet_15m(), QuantSpec({"*": Scheme("lsq", 4)}))
    for name, module in model.named_modules():
        if isinstance(module, LSQ):  # the steps of the first forward, so that both sides start from the same
            module.codes(model.get_parameter(name.removesuffix(".0") + ".original"))
    for name, parameter in model.named_parameters():
        if name.endswith(("scale1.weight", "scale2.weight")):
            nn.init.constant_(parameter, 0.1)  # at the published 1e-6 a wrong branch would hide
        elif "norm.bias" in name:  # at zero, a channel whose inputs are all silent stands exactly on a threshold
            nn.init.uniform_(parameter, -0.2, 0.2)
    return model


def plain_model(state: dict[str, Tensor]) -> nn.Module:
    model = Plain()
    named = {plain_name(name): value for name, value in state.items() if not name.endswith("initialized")}
    model.load_state_dict(named)
    return model


def data(batch: int, image: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, image, image, generator=generator), torch.arange(batch) * 7 % 1000


class Side:
    """One of the two implementations, ready to make steps."""

    def __init__(self, kind: str, dtype: str, batch: int, image: int) -> None:
        ours = our_model()
        self.model = ours if kind == "ours" else plain_model(ours.state_dict())
        del ours
        self.x, self.y = data(batch, image)
        if kind == "ours":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.bf16 = dtype == "bfloat16"
        # each side as it would be written: `fused` is what our training uses, the default is what a script gets
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=kind == "ours" or None)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def resident_mb() -> float:
    """Resident now; where the system does not say, the largest so far."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else peak_mb()


def child(kind: str, dtype: str, batch: int, image: int, threads: int) -> None:
    """Answers every line on stdin with the figures of one step."""
    torch.set_num_threads(threads)
    side = Side(kind, dtype, batch, image)
    before = resident_mb()
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = side.step()
        figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss,
                   "memory": peak_mb() - before}
        print(json.dumps(figures), flush=True)


def check() -> dict[str, dict[str, float]]:
    """Differences between the two sides' loss and gradients; stops where they are not the same computation."""
    differences = {}
    ours = our_model().double()
    plain = plain_model(ours.state_dict()).double()
    for precision, limit in ((torch.float64, 1e-9), (torch.float32, 2e-2)):
        ours, plain = ours.to(precision), plain.to(precision)
        x, y = data(2, 64)
        losses, grads = [], []
        for model, image in ((ours.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)),  # type: ignore[call-overload]
                             (plain, x)):
            model.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(image.to(precision)), y)
            loss.backward()
            losses.append(loss.item())
            grads.append({plain_name(n): p.grad.double().flatten() for n, p in model.named_parameters()
                          if p.grad is not None})
        assert grads[0].keys() == grads[1].keys(), grads[0].keys() ^ grads[1].keys()
        a, b = (torch.cat([g[name] for name in sorted(g)]) for g in grads)
        # float32: a sum that lands on the other side of a threshold changes a spike, so whole gradients are compared
        found = {"loss": abs(losses[0] - losses[1]), "gradient": float((a - b).norm() / b.norm())}
        if max(found.values()) > limit:
            raise SystemExit(f"the two sides differ by more than {limit:g} in {precision}, {found}: nothing to compare.")
        differences[str(precision)] = found
    return differences


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.batch, args.image, args.threads)
        return
    if args.check:
        torch.set_num_threads(args.threads)
        print(json.dumps(check()))
        return
    command = [sys.executable, __file__, f"--batch={args.batch}", f"--image={args.image}", f"--threads={args.threads}"]
    # in a process of its own: what this one has resident would count as its children's peak
    checked = subprocess.run([*command, "--check"], stdout=subprocess.PIPE, text=True, check=True).stdout
    differences = json.loads(checked)
    for precision, d in differences.items():
        print(f"{precision}: loss differs by {d['loss']:.1e}, gradient by {d['gradient']:.1e} (relative norm)")
    processes = {name: subprocess.Popen([*command, "--child", *side], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, bufsize=1, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
                 for name, side in SIDES.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for step in range(args.steps + 1):  # the first one warms up
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            figures = json.loads(process.stdout.readline())
            if step:
                runs[name].append(figures)
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()

    from bitspike._train_kernels import isa
    result: dict[str, Any] = {"batch": args.batch, "image": args.image, "steps": args.steps, "threads": args.threads,
                              "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                              "kernels": isa(), "differences": differences, "sides": {}, "ratios": {}}
    print(f"\n15 M QSD-Transformer, batch {args.batch}, {args.image} x {args.image}, {args.threads} threads, {args.steps} "
          f"steps after a warm-up, kernels: {isa()}")
    for name, figures in runs.items():
        side = {key: spread([f[key] for f in figures]) for key in ("wall", "cpu")} | {"memory": figures[-1]["memory"]}
        result["sides"][name] = side
        print(f"{name:14s} wall {side['wall']['median']:6.2f} s ({side['wall']['low']:.2f} to {side['wall']['high']:.2f})   "
              f"cpu {side['cpu']['median']:6.2f} s ({side['cpu']['low']:.2f} to {side['cpu']['high']:.2f})   "
              f"peak memory {side['memory']:6.0f} MB")
    for name in ("ours float32", "ours bfloat16"):
        ratios = {key: spread([p[key] / o[key] for p, o in zip(runs["plain float32"], runs[name], strict=True)])
                  for key in ("wall", "cpu")}
        memory = runs[name][-1]["memory"] / runs["plain float32"][-1]["memory"]
        result["ratios"][name] = ratios | {"memory": memory}
        print(f"{name:14s} faster than plain float32: wall {ratios['wall']['median']:.2f} x ({ratios['wall']['low']:.2f} to "
              f"{ratios['wall']['high']:.2f}), cpu {ratios['cpu']['median']:.2f} x ({ratios['cpu']['low']:.2f} to "
              f"{ratios['cpu']['high']:.2f}); peak memory {memory:.2f} x")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
