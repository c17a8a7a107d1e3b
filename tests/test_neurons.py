"""Neurons: the equations, by hand and by an independent loop; steps, gradients, memory."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bitspike.neurons import (  # noqa: E402
    IELIF,
    LIF,
    ArcTan,
    Rectangle,
    Sigmoid,
    Surrogate,
    Triangle,
    pack_mask,
    timewise,
    unpack_mask,
)
from bitspike.quantizers import Membrane  # noqa: E402

SURROGATES = [Sigmoid(), Sigmoid(2.0), Triangle(), Triangle(0.5), ArcTan(), Rectangle(), Rectangle(2.0)]
LIFS = {
    "published": LIF, "soft": lambda: LIF(reset="soft"), "none": lambda: LIF(reset="none"),
    "late": lambda: LIF(decay=0.8, scale_input=False, reset="late", strict=True), "late_at": lambda: LIF(reset="late"),
    "q_snn": lambda: LIF(scale_input=False, detach_reset=False, surrogate=Triangle(), strict=True),
    "half": lambda: LIF(threshold=0.5), "slow": lambda: LIF(decay=0.9, scale_input=False),
    "membrane": lambda: LIF(membrane=Membrane(4)).eval(),
}
IELIFS = {
    "four": IELIF, "one": lambda: IELIF(1), "many": lambda: IELIF(255), "attention": lambda: IELIF(4, scale=0.5),
    "wide": lambda: IELIF(4, gain=2.0), "carry": lambda: IELIF(4, decay=0.5),
    "carry_all": lambda: IELIF(3, gain=1.5, decay=1.0),
}
ALL = {**LIFS, **IELIFS}


def potentials(T=5, seed=0, spread=1.5):
    return torch.randn(T, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * spread + 0.4


# ------------------------------------------------------------------------------------------------ equations
@pytest.mark.parametrize("name", [n for n in LIFS if n != "membrane"])
def test_lif_equations(name):
    neuron, x = LIFS[name](), potentials()
    v, fired = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for t, s in enumerate(neuron(x)):
        h = neuron.decay * v + (1 - neuron.decay if neuron.scale_input else 1) * x[t]
        h = h - neuron.threshold * fired.float() if neuron.reset == "late" else h
        fired = h > neuron.threshold if neuron.strict else h >= neuron.threshold
        assert torch.equal(s, fired.float())
        v = {"hard": torch.where(fired, 0.0, h), "soft": h - neuron.threshold * fired.float()}.get(neuron.reset, h)


def test_lif_by_hand():
    # 0.8 | 0.4 + 0.6 = 1.0 fires at the threshold, reset | 0.9
    assert LIF()(torch.tensor([[1.6], [1.2], [1.8]])).flatten().tolist() == [0, 1, 0]
    assert LIF(strict=True)(torch.tensor([[1.6], [1.2], [0.9]])).flatten().tolist() == [0, 0, 0]
    # soft: 1.5 fires, 0.5 left; 0.25 + 0.75 fires
    assert LIF(reset="soft")(torch.tensor([[3.0], [1.5]])).flatten().tolist() == [1, 1]
    # late: 1.5 fires, 0.75 + 1.25 - 1 = 1 fires; soft would be 0.25 + 1.25
    late = LIF(reset="late", scale_input=False)
    assert late(torch.tensor([[1.5], [1.25], [1.375]])).flatten().tolist() == [1, 1, 0]


@given(st.integers(1, 255), st.floats(0.1, 300), st.one_of(st.none(), st.floats(0.01, 4)),
       st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
@settings(max_examples=60)
def test_ielif_counts(levels, gain, scale, values):
    neuron = IELIF(levels, gain, scale)
    x = torch.tensor([values])
    counts = [math.floor(min(max(float(u), 0.0), levels) + 0.5) for u in (x[0] * gain)]
    assert torch.equal(neuron(x)[0], torch.tensor(counts, dtype=torch.float32) * neuron.scale)


def test_ielif_published_values():
    x = torch.tensor([[0.124, 0.125, 0.374, 0.375, 1.2, -1.0]])
    assert IELIF(4)(x).flatten().tolist() == [0, 0.25, 0.25, 0.5, 1, 0]
    assert IELIF(4, scale=0.5)(x).flatten().tolist() == [0, 0.5, 0.5, 1, 2, 0]


def test_ielif_carry_over():
    x, neuron = potentials(), IELIF(4, gain=2.0, decay=0.25)
    v = torch.zeros_like(x[0])
    for t, y in enumerate(neuron(x)):
        u = v + x[t]
        n = (u * 2).clamp(0, 4).add(0.5).floor()
        assert torch.equal(y, n * 0.5)
        v = 0.25 * (u - n / 2)


# ---------------------------------------------------------------------------------------- properties of all
@pytest.mark.parametrize("name", ALL)
def test_steps_equal_the_sequence(name):
    neuron, x = ALL[name](), potentials()
    sequence = neuron(x)
    v, steps = torch.zeros_like(x[0]), []
    for x_t in x:
        y, v = neuron.step(v, x_t)
        steps.append(y)
    assert torch.equal(torch.stack(steps), sequence)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_are_counts_times_scale(name, dtype):
    neuron, x = ALL[name](), potentials().to(dtype)
    if dtype == torch.bfloat16 and neuron.levels > 128:
        pytest.skip("bfloat16 has 8 bits: it cannot hold count + 1/2 above 128")
    y = neuron(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    counts = torch.arange(neuron.levels + 1, dtype=dtype) * neuron.scale
    assert torch.isin(y, counts).all()
    assert y.unique().numel() > 1


@pytest.mark.parametrize("name", ALL)
def test_no_state_between_calls_and_samples(name):
    neuron, x = ALL[name](), potentials()
    first = neuron(x)
    assert torch.equal(neuron(x), first)
    assert torch.equal(torch.cat([neuron(x[:, :1]), neuron(x[:, 1:])], 1), first)


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_finite_and_not_zero(name):
    x = potentials().requires_grad_()
    ALL[name]()(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("name", ALL)
def test_any_layout_gives_the_same(name):
    neuron, x = ALL[name](), potentials()
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    outer = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for value in (x, last, x.transpose(3, 4).contiguous().transpose(3, 4)):
        leaf = value.detach().requires_grad_()
        y = neuron(leaf)
        assert torch.equal(y, neuron(x))
        y.backward(outer)
        gradients.append(leaf.grad)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


@pytest.mark.parametrize("name", [n for n in IELIFS if "carry" not in n])
def test_ielif_gradient(name):
    neuron, x = IELIFS[name](), potentials().requires_grad_()
    outer = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    neuron(x).backward(outer)
    u = x.detach() * neuron.gain
    expected = outer * ((u > 0) & (u < neuron.levels)) * (neuron.gain * neuron.scale)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["four", "one", "attention", "wide", "carry"])
def test_binary_steps_sum_to_the_count(name):
    neuron, x = IELIFS[name](), potentials()
    y = neuron(x)
    steps = neuron.binary_steps(y)
    assert steps.shape == (neuron.levels, *y.shape)
    assert torch.isin(steps, torch.tensor([0.0, 1.0])).all()
    assert torch.equal(steps.sum(0) * neuron.scale, y)
    weight = torch.randn(5, 3, 3, 3)  # W y = scale * sum over d of W s_d
    per_step = sum(timewise(lambda s: torch.nn.functional.conv2d(s, weight), s) for s in steps) * neuron.scale
    torch.testing.assert_close(timewise(lambda s: torch.nn.functional.conv2d(s, weight), y), per_step, rtol=1e-4, atol=1e-5)


def test_detached_reset_changes_only_the_gradient():
    x = potentials()
    grads = []
    for detach in (True, False):
        leaf = x.clone().requires_grad_()
        y = LIF(detach_reset=detach)(leaf)
        y[-1].sum().backward()
        grads.append((y.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


# ---------------------------------------------------------------------------------------------- surrogates
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_surrogate_integrates_to_one_step(surrogate):
    d = torch.linspace(-200, 200, 800_001, dtype=torch.float64)
    assert float(torch.trapezoid(surrogate.derivative(d), d)) == pytest.approx(1.0, abs=0.01)
    assert (surrogate.derivative(d) >= 0).all()


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_surrogate_forward_and_backward(surrogate):
    d = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5], requires_grad=True)
    assert surrogate(d).tolist() == [0, 0, 1, 1, 1]
    assert surrogate(d, strict=True).tolist() == [0, 0, 0, 1, 1]
    surrogate(d).sum().backward()
    assert torch.equal(d.grad, surrogate.derivative(d.detach()))


def test_surrogate_equality_and_base():
    assert Sigmoid(2.0) == Sigmoid(2.0) != Sigmoid(4.0)
    assert hash(Triangle()) == hash(Triangle())
    with pytest.raises(TypeError, match="defines no derivative"):
        Surrogate().derivative(torch.zeros(1))


# -------------------------------------------------------------------------------------------- masks, errors
@given(st.lists(st.booleans(), max_size=70))
def test_mask_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.numel() == (len(bits) + 7) // 8
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_ielif_keeps_one_bit_per_element():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        IELIF(4)(potentials().requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept) == potentials().numel() // 8


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LIF(decay=2), "decay=2"), (lambda: LIF(threshold=0), "threshold=0"), (lambda: LIF(reset="soff"), "'soff'"),
    (lambda: IELIF(2.5), "levels=2.5; allowed: integers"), (lambda: IELIF(4, scale=0.0), "scale=0.0"),
    (lambda: IELIF(4, scale=-1.0), "scale=-1.0"),
    (lambda: LIF()(torch.zeros(0, 2)), r"LIF: input of shape \(0, 2\) has no time"),
    (lambda: IELIF(4)(torch.zeros(0, 2)), "has no time"),
    (lambda: IELIF(4, decay=0.5)(torch.zeros(0, 2)), "has no time"),
    (lambda: IELIF(0), "levels=0"), (lambda: IELIF(256), "levels=256"), (lambda: IELIF(4, gain=-1), "gain=-1"),
    (lambda: IELIF(4, decay=1.5), "decay=1.5"),
])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
