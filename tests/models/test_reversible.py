"""Reversible back-propagation: the gradients of stored activations, without them."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitspike.layers import quantize_
from bitspike.models.bestformer import BESTformer
from bitspike.models.reversible import GRID, run_blocks
from bitspike.neurons import LIF
from bitspike.objectives import SpikeCounts
from bitspike.spec import QuantSpec, Scheme


def network(depth: int = 2, membrane: int = 0, **options) -> BESTformer:
    torch.manual_seed(0)
    net = BESTformer(16, depth, 4, num_classes=5, time_steps=3, neuron=lambda: LIF(scale_input=False),
                     attention_neuron=lambda: LIF(threshold=0.1), **options)
    rules = [("*", Scheme("binary")), ("tokenizer.stages.0.conv", Scheme("full")), ("head*", Scheme("full"))]
    if membrane:
        rules.append(("blocks*", Scheme("membrane", membrane)))
    return quantize_(net, QuantSpec(rules))


class Noisy(nn.Module):
    """A branch with dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x.flatten(0, 1)))
        return nn.functional.dropout(torch.tanh(y), 0.3, self.training).unflatten(0, x.shape[:2])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Noisy(), Noisy()


def both_ways(blocks, x, seed=3):
    """Outputs, gradients of the input and of the parameters, and buffers, with stored activations and without."""
    results = []
    for recompute in (False, True):
        mine = copy.deepcopy(blocks).train()
        images = x.clone().requires_grad_()
        torch.manual_seed(seed)
        a, b = run_blocks(mine, images, images * 0.5, recompute)
        (a.square().sum() + (b * torch.arange(b.numel()).reshape(b.shape).sin()).sum()).backward()
        results.append([a.detach(), b.detach(), images.grad, *(p.grad for p in mine.parameters()), *mine.buffers(),
                        torch.rand(3)])
    return results


@pytest.mark.parametrize("depth", [1, 2, 16])
def test_same_gradients_at_any_depth(depth):
    torch.manual_seed(1)
    blocks = nn.ModuleList(Pair() for _ in range(depth))
    stored, recomputed = both_ways(blocks, torch.randn(2, 3, 4, 6, 5))
    assert len(stored) == len(recomputed)
    for one, other in zip(stored, recomputed, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(stored[0], recomputed[0]) and torch.equal(stored[-1], recomputed[-1])  # and the random numbers after it


@pytest.mark.parametrize("product, membrane", [("qk", 0), ("kv", 0), ("qk", 4)])
def test_spiking_blocks_are_run_again_spike_by_spike(product, membrane):
    net = network(16, membrane, product=product)
    tokens = torch.randn(3, 2, 16, 4, 4) * 2
    stored, recomputed = both_ways(net.blocks, tokens)
    for one, other in zip(stored, recomputed, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_grid_changes_nothing_to_speak_of():
    net = network(4).train()
    plain, tokens = copy.deepcopy(net), torch.randn(3, 2, 16, 4, 4) * 2
    x0 = x1 = tokens
    for block in plain.blocks:
        x0, x1 = block(x0, x1)
    a, b = run_blocks(net.blocks, tokens, tokens, True)
    assert a.dtype == torch.float32 and torch.allclose(a, x0, atol=1e-4) and torch.allclose(b, x1, atol=1e-4)
    assert torch.finfo(torch.float32).eps > GRID


def test_in_the_model_and_under_autocast():
    net = network(3, memory="recompute").train()
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    before = {n: b.clone() for n, b in net.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        labels, teacher = net(x)
        loss = nn.functional.cross_entropy(labels.float(), y) + nn.functional.cross_entropy(teacher.float(), y)
    after = {n: b.clone() for n, b in net.named_buffers()}
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert all(torch.equal(b, after[n]) for n, b in net.named_buffers())  # the way back leaves no trace
    assert all(int(after[n] - before[n]) == 1 for n in before if n.endswith("num_batches_tracked"))
    assert sum(bool((p.grad != 0).any()) for p in net.parameters()) > 0.9 * len(list(net.parameters()))
    assert net.eval()(x).shape == (4, 5)


def test_memory_does_not_grow_with_depth():
    def kept(depth: int, memory: str) -> int:
        net, seen = network(depth, memory=memory).train(), {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            labels = net(torch.randn(8, 3, 32, 32))[0]
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        bits = 0
        node = labels.grad_fn
        while node is not None and not hasattr(node, "odd"):
            node = next((n for n, _ in node.next_functions if n is not None), None)
        if node is not None:
            bits = sum(bit.numel() for bit in node.odd)
        return bits + sum(size for address, size in seen.items() if address not in own)

    assert kept(8, "recompute") - kept(2, "recompute") < 0.05 * (kept(8, "store") - kept(2, "store"))


def test_what_is_refused():
    with pytest.raises(ValueError, match="allowed: 'store', 'recompute'"):
        network(memory="disk")
    with pytest.raises(ValueError, match="needs blocks with an inverse"):
        network(memory="recompute", reversible=False)
    net = network(memory="recompute").train()
    counts = SpikeCounts(net)
    with pytest.raises(ValueError, match="modules of the blocks have hooks"):
        net(torch.randn(2, 3, 16, 16))
    counts.remove()
    with pytest.raises(ValueError, match="not finite, or too large"):
        run_blocks(net.blocks, torch.full((3, 2, 16, 4, 4), float("nan")), torch.zeros(3, 2, 16, 4, 4), True)


def test_a_second_backward_pass_says_what_to_do():
    net = network(2, memory="recompute").train()
    labels, _ = net(torch.randn(2, 3, 16, 16))
    labels.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r'a second backward pass .* Sum the losses .* memory="store"'):
        labels.sum().backward()
