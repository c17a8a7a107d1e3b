"""SpikeHQ: its arithmetic of factors, its recipes, and the spec that was found."""
from dataclasses import replace

import pytest
import torch

from bitspike import cost
from bitspike.checkpoints import build
from bitspike.cost import BIT_PROPORTIONAL, COUNT, FIRST, SPIKE, Operation
from bitspike.layers import quantizable, quantizers
from bitspike.models import spikformer
from bitspike.models.compact_spikeformer import compact
from bitspike.papers import spike_hq
from bitspike.searching import make_space


@pytest.mark.parametrize("bits,published", [(3.67, 8.72), (3.14, 10.19)])
def test_published_factors_are_those_of_average_bits(bits, published):
    """Two layers of equal work whose widths mix to the average: energy and compression fall by one factor."""
    low = Operation("a", SPIKE, (1000,), 10**6, 1000, 3, 100, 100, mean_count=0.2)
    share = bits - 3  # of weights and of work with 4 bits
    parts = [replace(low, weights=round(1000 * (1 - share)), macs=round(10**6 * (1 - share))),
             replace(low, weights=round(1000 * share), macs=round(10**6 * share), weight_bits=4)]

    def energy(ops):
        return sum(cost.bit_aware(op, 1e6, BIT_PROPORTIONAL).total_pj for op in ops)

    full = [replace(op, weight_bits=32) for op in parts]
    assert energy(full) / energy(parts) == pytest.approx(published, rel=2e-3)
    assert sum(op.packed_bytes for op in full) / sum(op.packed_bytes for op in parts) == pytest.approx(published, rel=5e-3)


def test_float_energy_on_bit_proportional_is_the_literature_s():
    for kind in (FIRST, SPIKE, COUNT):
        op = Operation("a", kind, (1,), 1000, 10, 32, 10, 10, mean_count=0.3)
        assert cost.bit_aware(op, 1e9, BIT_PROPORTIONAL).total_pj == pytest.approx(cost.literature_pj(op))


def test_the_found_spec_names_every_layer_of_the_compact_network():
    space = make_space(compact())
    choice = spike_hq.SEARCHED.resolve(space.layers)
    assert set(choice) == set(space.layers)
    assert space.bits(choice) <= 3.2 and {s.kind for s in choice.values()} == {"uniform", "pow2"}
    assert all(any((s.kind, s.bits) == (c.kind, c.bits) for c in space.layers[n]) for n, s in choice.items())
    assert dict(quantizers(build(spike_hq.RECIPES["spike_hq.cifar10_small"])))["head"].bits == 8


def test_event_networks_take_their_frames():
    net = spikformer.dvs_2_256(11, 2).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 1, 2, 128, 128)).shape == (1, 11)
    weights = sum(layer.weight.numel() for layer in quantizable(net).values())
    assert 2.5e6 < weights < 2.7e6


def test_every_recipe_says_what_is_claimed():
    for name, recipe in spike_hq.RECIPES.items():
        assert name.startswith("spike_hq.") and recipe.claim and name in recipe.cost
