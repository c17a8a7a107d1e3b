"""Training a stack of reversible blocks without keeping their activations.

Back-propagation needs what every layer saw. A reversible block's input can be computed from its output, so only the last
output has to be kept, and each branch runs once more on the way back. With

    y = branch(x1) + (x0 + x1) / 2        so        x0 = 2 (y - branch(x1)) - x1

every step back doubles whatever rounding error there is: in float32 the streams are noise after some four blocks, and a
spike that flips is no small error. Here the inverse is exact. The streams are float64 multiples of 2^-24 (`GRID`), a branch's
output is rounded to that grid, sums of such numbers are exact, and the one bit that the halving drops is kept: two bits an
element and block in place of some thirty floats.

Everything else is run again as it was: the random numbers (dropout), the precision of autocast, and the buffers (running
statistics of norms, bounds of membranes) are put back to what they were before the first time, so nothing is counted twice.
Exactness rests on a branch giving the same numbers for the same input; on a GPU that takes deterministic algorithms.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitspike.neurons import pack_mask, unpack_mask

GRID = 2.0**-24
#: beyond this a sum of multiples of `GRID` no longer fits a float64 exactly
_LARGEST = 2.0**26


class Reversible(Protocol):
    """A block of two branches: x2 = attn(x1) + (x0 + x1) / 2, x3 = mlp(x2) + (x1 + x2) / 2."""

    attn: nn.Module
    mlp: nn.Module


def _branches(blocks: Sequence[Reversible]) -> list[nn.Module]:
    return [branch for block in blocks for branch in (block.attn, block.mlp)]


def _on_grid(x: Tensor) -> Tensor:
    return x.double().div_(GRID).round_().mul_(GRID)


class _Couple(torch.autograd.Function):
    """round(branch) + floor((x0 + x1) / 2) on the grid, with the gradient of branch + (x0 + x1) / 2."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        ctx.dtype = branch.dtype
        return _on_grid(branch) + _halve(x0, x1)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = grads[0] * 0.5
        return grads[0].to(ctx.dtype), half, half


def _halve(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """((x0 + x1) / 2 rounded down to the grid, whether something was dropped)."""
    whole = (x0 + x1).div_(GRID)
    odd = whole.remainder(2) == 1
    return whole.sub_(odd.to(whole.dtype)).mul_(GRID / 2), odd


class _Again:
    """What a branch's run depends on besides its input, so that a second run gives the same numbers."""

    def __init__(self, branch: nn.Module, device: torch.device) -> None:
        self.branch, self.device = branch, device
        self.random = torch.get_rng_state()
        self.device_random = torch.get_device_module(device).get_rng_state(device) if device.type != "cpu" else None
        self.buffers = [buffer.clone() for buffer in branch.buffers()]
        self.casts = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        after = [buffer.clone() for buffer in self.branch.buffers()]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([] if self.device_random is None else [self.device],
                                                      device_type=self.device.type if self.device.type != "cpu" else "cuda"))
            for kind, (enabled, dtype) in self.casts.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            torch.set_rng_state(self.random)
            if self.device_random is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_random, self.device)
            with torch.no_grad():
                for buffer, value in zip(self.branch.buffers(), self.buffers, strict=True):
                    buffer.copy_(value)
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, value in zip(self.branch.buffers(), after, strict=True):
                        buffer.copy_(value)


class _Stack(torch.autograd.Function):
    """All blocks; keeps the last two streams, and of every branch the dropped bits."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, x1: Tensor, branches: list[nn.Module], dtype: torch.dtype, *parameters: Tensor) -> Any:
        ctx.branches, ctx.dtype, ctx.parameters = branches, dtype, parameters
        ctx.again, ctx.odd = [], []
        for branch in branches:  # (x0, x1) -> (x1, y)
            ctx.again.append(_Again(branch, x1.device))
            half, odd = _halve(x0, x1)
            ctx.odd.append(pack_mask(odd))
            x0, x1 = x1, _on_grid(branch(x1.to(dtype))).add_(half)
        if not bool(x1.abs().amax() < _LARGEST):  # NaN too
            raise ValueError("reversible blocks: a stream is not finite, or too large to be run back exactly (2^26). Train "
                             'with memory="store", which names the first module at fault.')
        ctx.save_for_backward(x0, x1)
        return x0, x1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.again:  # let go of after the first time, whatever retain_graph says
            raise RuntimeError("reversible blocks: a second backward pass through one forward pass, and what the first needed "
                               'is gone. Sum the losses before backward(), run forward again, or train with memory="store".')
        x1, y = (stream.detach() for stream in ctx.saved_tensors)  # they are this node's own outputs
        grad_x1, grad_y = (g.clone() for g in grads)
        of: dict[int, Tensor] = {}
        for branch, again, odd in zip(reversed(ctx.branches), reversed(ctx.again), reversed(ctx.odd), strict=True):
            own = [p for p in branch.parameters() if p.requires_grad]
            with torch.enable_grad(), again():
                x = x1.to(ctx.dtype).detach().requires_grad_()
                out = branch(x)
                # within, since a norm's backward pass checks that nobody has touched its statistics since
                found = torch.autograd.grad(out, [x, *own], grad_y.to(out.dtype), allow_unused=True)
            for parameter, grad in zip(own, found[1:], strict=True):
                if grad is not None:
                    of[id(parameter)] = of[id(parameter)] + grad if id(parameter) in of else grad
            # y = out + floor((x0 + x1) / 2)
            whole = y.sub(_on_grid(out.detach())).mul_(2).add_(unpack_mask(odd, y.shape).to(y.dtype), alpha=GRID)
            y, x1 = x1, whole.sub_(x1)
            half = grad_y * 0.5
            grad_x1, grad_y = half, grad_x1 + half + (0 if found[0] is None else found[0])
        ctx.again, ctx.odd = [], []
        # x1 and y are now the stack's own inputs, x0 and x1
        return grad_x1, grad_y, None, None, *(of.get(id(p)) for p in ctx.parameters)


def run_blocks(blocks: Sequence[Reversible], x0: Tensor, x1: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
    """The streams (x0, x1) through all blocks, on the grid: -> the last block's (x2, x3), in the dtype of x1.

    recompute: keep the last streams only and run every branch again on the way back; False gives the same numbers and
    gradients with everything kept, as torch does by itself.
    Memory: two bits an element and block, next to one branch's activations. Time: one more forward pass.
    Errors: ValueError for branches with hooks (the losses and reports that look inside would see values without a
    gradient), and for streams that are not finite.
    Source: RevNet (Gomez et al., 2017); the dropped bit as in Maclaurin et al., ICML 2015. BESTformer proposes reversible
    blocks, its release stores their activations.
    """
    dtype, branches = x1.dtype, _branches(blocks)
    x0, x1 = _Enter.apply(x0), _Enter.apply(x1)
    if not recompute:
        for branch in branches:
            x0, x1 = x1, _Couple.apply(branch(x1.to(dtype)), x0, x1)
        return x0.to(dtype), x1.to(dtype)
    hooked = [name for branch in branches for name, m in branch.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise ValueError(f'memory="recompute": {len(hooked)} modules of the blocks have hooks, for example {hooked[0]!r}, '
                         'that would see values without a gradient. With a spike penalty or taps use memory="store".')
    parameters = [p for branch in branches for p in branch.parameters() if p.requires_grad]
    x0, x1 = _Stack.apply(x0, x1, branches, dtype, *dict.fromkeys(parameters))
    return x0.to(dtype), x1.to(dtype)


class _Enter(torch.autograd.Function):
    """Onto the grid, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return _on_grid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype)
