"""The formulas against numbers worked out by hand or published."""
import math

import pytest

from bitspike import cost
from bitspike.cost import COUNT, DENSE, FIRST, KINDS, SPIKE, Operation


def op(kind=COUNT, **changes):
    given = {"name": "a", "kind": kind, "shape": (8, 16, 3, 3), "macs": 1152 * 49, "weights": 1152, "weight_bits": 4,
             "inputs": 16 * 49, "outputs": 8 * 49, "levels": 4, "mean_count": 0.25, "density": 0.2}
    return Operation(**{**given, **changes})


def test_published_sizes():
    for weights, params_m in ((15_015_000, 1.877), (31_194_000, 3.899), (55_163_000, 6.895)):
        assert cost.published_params_m([(weights, 4)]) == pytest.approx(params_m, abs=5e-4)
    # SpikeHQ: compression = 32 / average bits
    assert pytest.approx(8.72, abs=0.01) == 32 / 3.67
    assert cost.published_bytes([(100, 8), (100, 1)]) == 112.5


@pytest.mark.parametrize("count,mac_g,published_mj", [(0.25, 9.9, 2.5), (0.28, 21.2, 5.7), (0.24, 37.7, 8.7)])
def test_published_energies_follow_from_the_merged_count(count, mac_g, published_mj):
    first = {2.5: 59e6, 5.7: 88e6, 8.7: 118e6}[published_mj]
    total = (cost.published_pj(op(FIRST, macs=int(first)))
             + cost.published_pj(op(COUNT, macs=int(mac_g * 1e9), mean_count=count)))
    assert total / 1e9 == pytest.approx(published_mj, rel=0.02)


def test_spikingformer_8_512():
    """4 steps: 0.3473 G products in the first layer and 6.5175 G additions are its README's 7.46 mJ."""
    first = cost.literature_pj(op(FIRST, macs=86_825_000, steps=4))
    rest = cost.literature_pj(op(SPIKE, macs=6_517_500_000, mean_count=1.0, levels=1))
    assert (first + rest) / 1e9 == pytest.approx(7.4635, abs=5e-4)


def test_a_layer_by_hand():
    layer = op()
    assert layer.packed_bytes == 576
    assert layer.synaptic_ops == 1152 * 49 * 0.25
    assert layer.code_bits == 3
    # fan-in 144, counts to 4: 577 values below the sign and 4 bits of weight
    assert layer.accumulator_bits == 4 + math.ceil(math.log2(577))
    energy = cost.bit_aware(layer, model_bytes=576)
    addition = cost.add_pj(14)
    product = 0.2 * 3 * 4 / 64 + addition
    rescale = 8 * 49 * (3.2 + 0.1)
    assert energy.arithmetic_pj == pytest.approx(1152 * 49 * min(0.25 * addition, 0.2 * product) + rescale)
    assert energy.weights_pj == pytest.approx(576 / 8 * 10)
    assert energy.activations_pj == pytest.approx(2 * 16 * 49 * 3 / 8 / 8 * 10)
    assert energy.total_pj == pytest.approx(energy.arithmetic_pj + energy.weights_pj + energy.activations_pj)
    ann = cost.quantized_ann(layer, model_bytes=576)
    assert ann.arithmetic_pj == pytest.approx(1152 * 49 * product + rescale)
    assert ann.weights_pj == energy.weights_pj and ann.activations_pj == energy.activations_pj


def test_steps_are_paid_by_the_spiking_network_only():
    layer = op(SPIKE, levels=1, steps=4, mean_count=0.1, density=0.1)
    assert cost.literature_pj(layer) == pytest.approx(4 * 0.1 * 0.9 * layer.macs)
    ann = cost.quantized_ann(layer, 576)
    assert ann.activations_pj == pytest.approx(10 / 8 * 2 * 16 * 49 * cost.code_bits(4) / 8)
    assert cost.bit_aware(layer, 576).activations_pj == pytest.approx(10 / 8 * 2 * 4 * 16 * 49 / 8)


def test_zero_spikes_cost_no_additions():
    silent = op(mean_count=0.0, density=0.0)
    assert cost.literature_pj(silent) == 0
    assert cost.bit_aware(silent, 1).arithmetic_pj == pytest.approx(8 * 49 * 3.3)


def test_real_valued_inputs_are_products_everywhere():
    dense = op(DENSE, mean_count=17.0, density=0.1)
    assert cost.literature_pj(dense) == pytest.approx(4.6 * dense.macs)
    assert cost.bit_aware(dense, 1).arithmetic_pj == cost.quantized_ann(dense, 1).arithmetic_pj


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_more_spikes_never_cost_less(kind, bits):
    energies = [cost.bit_aware(op(kind, weight_bits=bits, mean_count=4 * d, density=d), 10**7).total_pj
                for d in (0.0, 0.1, 0.5, 1.0)]
    assert energies == sorted(energies) and energies[0] > 0


def test_unknown_kind():
    with pytest.raises(ValueError, match="spike x weight"):
        op("spikes")


def test_every_constant_is_cited():
    assert all(("Horowitz" in line and "pJ" in line) or "assumption" in line for line in cost.CMOS_45NM.describe())
    assert pytest.approx(4.6) == cost.E_MAC_PJ and cost.E_AC_PJ == 0.9


def test_arithmetic_by_width():
    """A network of binary weights and spikes: the bit budget is T, NS-ACE the additions, ends counted at their widths."""
    first = cost.Operation("first", cost.FIRST, (), 100, 10, 8, 1, 1, steps=4, levels=255)
    inner = cost.Operation("inner", cost.SPIKE, (), 1000, 10, 1, 1, 1, steps=4, mean_count=0.2)
    product = cost.Operation("map", cost.ATTENTION, (), 50, 0, 1, 1, 1, steps=4, mean_count=0.5)
    counts = cost.Operation("counts", cost.COUNT, (), 1000, 10, 4, 1, 1, levels=4, mean_count=0.5)
    assert cost.bit_budget([first, inner, product]) == 4 and cost.bit_budget([counts]) == 16
    assert cost.bit_budget([first]) == 0
    assert [cost.s_ace(op) for op in (first, inner, product, counts)] == [4 * 100 * 64, 4000, 200, 16000]
    assert [cost.ns_ace(op) for op in (first, inner, product, counts)] == [4 * 100 * 64, 800, 100, 2000]
    assert cost.ns_ace(inner) == inner.synaptic_ops  # one bit each
