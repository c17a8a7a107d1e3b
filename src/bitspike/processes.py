"""Several processes that train one network as one process would: batch norms and counts over all of them.

`share_(model)` lets the batch norms of a network take their statistics from the batch of all processes (also on CPUs, where
`torch.nn.SyncBatchNorm` does not work), and tells modules with an attribute `over_processes` that they are not alone.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

__all__ = ["SharedBatchNorm", "share_", "summed", "unshare_", "world_size"]


def world_size() -> int:
    """How many processes there are; 1 without torchrun."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ranks else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


class _Normalise(torch.autograd.Function):
    """x [N, C, ...] -> (x - mean) / sqrt(var + eps) * weight + bias, mean and variance over all processes' x; also these
    two and the number of values. Sums are in float64, so that E[x^2] - E[x]^2 does not cancel.

    torch's own kernel computes the values from mean and variance: a count is rounded behind it, and another order of the same
    arithmetic would now and then give another count.
    Backward, with means over all processes: dx = weight / sigma (dy - mean(dy) - y mean(dy y)), y before weight and bias.
    A process may have no values at all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        C, axes, exact = x.shape[1], [0, *range(2, x.dim())], torch.float64
        sums = torch.cat([x.sum(axes, dtype=exact), x.to(exact).square().sum(axes),
                          torch.tensor([x.numel() // C], dtype=exact, device=x.device)])
        n = summed(sums)[-1].clone()
        mean = sums[:C] / n.clamp(min=1)
        var = (sums[C:-1] / n.clamp(min=1) - mean.square()).clamp(min=0)
        inverse = (var + eps).rsqrt()
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var, inverse = (value.to(wide) for value in (mean, var, inverse))
        ctx.save_for_backward(x, weight, mean, inverse, n)
        ctx.mark_non_differentiable(mean, var, n)
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, n = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], [1, x.shape[1]] + [1] * (x.dim() - 2)
        dy, y = grads[0].to(mean.dtype), (x - mean.view(shape)) * inverse.view(shape)
        own = torch.cat([dy.sum(axes, dtype=n.dtype), (dy * y).sum(axes, dtype=n.dtype)])
        d_bias, d_weight = own.to(mean.dtype).split(len(mean))
        means = (summed(own.clone()) / n.clamp(min=1)).to(mean.dtype).view(2, *shape)
        scale = inverse if weight is None else inverse * weight
        dx = (dy - means[0] - y * means[1]) * scale.view(shape)
        wanted = ctx.needs_input_grad
        return dx.to(x.dtype), d_weight if wanted[1] else None, d_bias if wanted[2] else None, None


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm (1d, 2d or 3d) that in training takes mean and variance from the batch of all processes.

    State, evaluation and gradients are those of the plain norm on the whole batch in one process: gradients as
    DistributedDataParallel expects them, which then takes their mean. Every process has to call it equally often, if need be
    with a batch of none. In one process it does the same with float64 sums, which torch's norm on a CPU has not: that one is
    off by about 1e-5, enough to move a count here and there. Deploys as: what the plain one deploys as.
    Source: torch.nn.SyncBatchNorm, which needs a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                share = self.momentum
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                    share = 1 / self.num_batches_tracked.item() if share is None else share
                share = 0.0 if share is None else share
                if float(count) > 1:
                    self.running_mean.lerp_(mean, share)
                    self.running_var.lerp_(var * (count / (count - 1)).to(var.dtype), share)
        return y  # type: ignore[no-any-return]


class _Shared1d(SharedBatchNorm, nn.BatchNorm1d):
    pass


class _Shared2d(SharedBatchNorm, nn.BatchNorm2d):
    pass


class _Shared3d(SharedBatchNorm, nn.BatchNorm3d):
    pass


_SHARED: dict[type, type] = {nn.BatchNorm1d: _Shared1d, nn.BatchNorm2d: _Shared2d, nn.BatchNorm3d: _Shared3d}
_PLAIN: dict[type, type] = {shared: plain for plain, shared in _SHARED.items()}


def share_(model: nn.Module, norms: bool = True) -> nn.Module:
    """Let a network's counts and, with `norms`, its batch norms be those of all processes, in place; names and state stay.

    >>> net = share_(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    >>> type(net[1]).__mro__[1].__name__, type(unshare_(net)[1]).__name__
    ('SharedBatchNorm', 'BatchNorm2d')
    """
    return _set(model, _SHARED if norms else {}, True)


def unshare_(model: nn.Module) -> nn.Module:
    """Undo `share_`: whoever calls the network now needs no other process."""
    return _set(model, _PLAIN, False)


def _set(model: nn.Module, classes: dict[type, type], over_processes: bool) -> nn.Module:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
        if hasattr(module, "over_processes"):
            module.over_processes = over_processes  # type: ignore[assignment]
    return model
