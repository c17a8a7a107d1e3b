"""Quantizer, Uniforms: forward is codes times scale, exactly; gradients; first-batch initialisation; limits."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bitspike.quantizers import LSQ, Binary, MaxScale, Membrane, PowerOfTwo, Quantizer, Uniform  # noqa: E402

# every weight quantizer that exists, with every width and every option
ALL = {
    **{f"lsq{b}_{c}_{init}": (lambda b=b, c=c, init=init: LSQ(b, c, init))
       for b in range(2, 9) for c in (1, 5) for init in ("tensor", "channel")},
    **{f"pow2_{b}_{per}": (lambda b=b, per=per: PowerOfTwo(b, True, per)) for b in (2, 3, 4) for per in (False, True)},
    **{f"uniform{b}_{per}": (lambda b=b, per=per: Uniform(b, per)) for b in range(2, 9) for per in (False, True)},
    **{f"pow2_scale_{b}_{per}": (lambda b=b, per=per: PowerOfTwo(b, False, per)) for b in range(2, 9) for per in (False, True)},
    **{f"max{b}_{per}": (lambda b=b, per=per: MaxScale(b, per)) for b in range(2, 9) for per in (False, True)},
    **{f"binary_{g}_{s}": (lambda g=g, s=s: Binary(g, s)) for g in ("ste", "ir_net") for s in ("none", "pow2", "mean")},
}
# one of each, for the slower tests
SOME = [n for n in ALL if n in ("lsq4_5_tensor", "lsq2_1_tensor", "pow2_4_True", "pow2_3_False", "pow2_scale_4_True",
                                "uniform4_True", "max8_False", "binary_ste_mean", "binary_ir_net_pow2")]
SHAPES = [(5, 6, 3, 3), (5, 7), (5, 4, 1), (5, 1, 3, 3)]


def test_every_quantizer_is_listed():
    assert {type(make()) for make in ALL.values()} == set(Quantizer.__subclasses__())


def weights(shape=SHAPES[0], seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.1).to(dtype)


def shaped(scale, w):
    return scale.view(-1, *[1] * (w.dim() - 1)) if scale.numel() > 1 else scale


def limits(quantizer):
    if quantizer.deploys_as == "binary":
        return {-1, 1}
    if quantizer.deploys_as == "pow2":
        return {0} | {s * 2**e for s in (-1, 1) for e in range(2 ** (quantizer.bits - 1) - 1)}
    return set(range(-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1)))


# ------------------------------------------------------------------------------------------- codes x scale
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_codes_times_scale(name, shape):
    for dtype in (torch.float32, torch.float64):
        quantizer, w = ALL[name]().to(dtype), weights(shape, dtype=dtype)
        out = quantizer(w)
        codes, scale = quantizer.codes(w)
        assert out.dtype == dtype
        assert codes.dtype == torch.int32
        assert codes.shape == w.shape
        assert scale.shape in ((1,), (shape[0],))
        assert (scale > 0).all()
        assert torch.equal(out, codes * shaped(scale, w).to(dtype))
        assert set(codes.unique().tolist()) <= limits(quantizer)
        assert not codes.requires_grad
        assert not scale.requires_grad


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_dtype_keep_it(name, dtype):
    for w in (weights(dtype=dtype), torch.zeros(5, 3, dtype=dtype)):
        for quantizer in (ALL[name](), ALL[name]().to(dtype)):  # its own state in float32 and in the weights' dtype
            leaf = w.clone().requires_grad_()
            out = quantizer(leaf)
            codes, scale = quantizer.codes(w)
            assert out.dtype == scale.dtype == dtype
            assert (scale > 0).all()
            assert torch.equal(out.detach(), codes * shaped(scale, w))
            assert set(codes.unique().tolist()) <= limits(quantizer)
            out.sum().backward()
            assert torch.isfinite(leaf.grad).all()
            assert all(p.grad.dtype == p.dtype and torch.isfinite(p.grad).all() for p in quantizer.parameters())


def test_max_scale_of_half_precision_stays_in_its_bits():
    for seed in range(200):  # the quotient by a rounded scale may pass the largest code
        w = weights((5, 4), seed, torch.bfloat16)
        assert int(MaxScale(8).codes(w)[0].abs().max()) <= 127


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_quantizes_the_float32_weight(precision):
    for name in SOME:
        quantizer, w = ALL[name](), weights((5, 6))
        expected = quantizer(w)
        with torch.autocast("cpu", precision):
            out = quantizer(w)
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", SOME)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=10, max_size=10))
@settings(max_examples=30)
def test_any_weights(name, values):
    quantizer, w = ALL[name](), torch.tensor(values).view(5, 2)
    codes, scale = quantizer.codes(w)
    assert torch.equal(quantizer(w), codes * shaped(scale, w))
    assert (scale > 0).all()
    assert set(codes.unique().tolist()) <= limits(quantizer)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fill", [0.0, 0.25, -1e-12])
def test_constant_weights(name, fill):
    quantizer, w = ALL[name](), torch.full((5, 3), fill, requires_grad=True)
    out = quantizer(w)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert torch.isfinite(w.grad).all()
    codes, scale = quantizer.codes(w.detach())
    assert torch.equal(out.detach(), codes * shaped(scale, w))


def test_single_weight_per_channel():
    for make in ALL.values():
        quantizer, w = make(), torch.tensor([[0.5], [-0.25], [0.0], [1.0], [2.0]], requires_grad=True)
        out = quantizer(w)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_weights(name):
    quantizer, w = ALL[name](), weights().requires_grad_()
    (quantizer(w) * weights(seed=1)).sum().backward()
    assert torch.isfinite(w.grad).all()
    assert (w.grad != 0).float().mean() > 0.2
    for parameter in quantizer.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).all()


# --------------------------------------------------------------------------------------------------- LSQ
def test_lsq_gradient_equations():
    q, w = LSQ(3, 5), weights(dtype=torch.float64).requires_grad_()
    q = q.double()
    q(w)
    with torch.no_grad():
        q.scale.mul_(torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0]))
    outer = weights(seed=3, dtype=torch.float64)
    q(w).backward(outer)
    v = w.detach() / q.scale.detach().view(-1, 1, 1, 1)
    inside = (v >= -4) & (v <= 3)
    assert torch.equal(w.grad, outer * inside)
    slope = torch.where(inside, v.round() - v, v.clamp(-4, 3))
    expected = (outer * slope).sum((1, 2, 3)) / math.sqrt(w.numel() * 3)
    torch.testing.assert_close(q.scale.grad, expected)


def test_lsq_first_use_initialises_whatever_it_is():
    w = weights()
    expected = 2 * w.abs().mean() / math.sqrt(7)
    for first in (lambda q: q(w), lambda q: q.eval()(w), lambda q: q.codes(w)):
        q = LSQ(4, 5)
        assert not q.initialized
        first(q)
        assert q.initialized
        torch.testing.assert_close(q.scale.detach(), expected.expand(5))
        with torch.no_grad():
            q.scale.mul_(2)
        q(10 * w)  # never again
        torch.testing.assert_close(q.scale.detach(), 2 * expected.expand(5))


def test_lsq_loaded_is_not_initialised_again():
    w, trained = weights(), LSQ(4, 5)
    trained(w)
    trained.scale.data.mul_(3)
    q = LSQ(4, 5)
    q.load_state_dict(trained.state_dict())
    assert torch.equal(q(w), trained(w))
    assert torch.equal(q.scale, trained.scale)
    fresh = LSQ(4, 5)
    fresh.load_state_dict(LSQ(4, 5).state_dict())  # saved before its first use
    fresh(w)
    assert fresh.initialized


def test_lsq_step_stays_positive():
    w = weights()
    q = LSQ(4, 5)
    q(w)
    q.scale.data.copy_(torch.tensor([-1.0, 0.0, 1e-12, 0.1, 1.0]))
    codes, scale = q.codes(w)
    assert (scale >= 1e-8).all()
    assert torch.equal(q(w), codes * shaped(scale, w))
    optimizer = torch.optim.SGD(q.parameters(), lr=1e3)
    q(w).square().sum().backward()
    optimizer.step()
    assert (q.codes(w)[1] > 0).all()


def test_lsq_rounds_half_to_even():
    q = LSQ(4)
    q.initialized.fill_(True)
    assert q.codes(torch.tensor([[0.5, 1.5, 2.5, -0.5, -9.0, 9.0]]))[0].tolist() == [[0, 2, 2, 0, -8, 7]]


# ------------------------------------------------------------------------------------------------- others
def test_pow2_levels_by_hand():
    w = torch.tensor([[1.0, 0.75, 0.7, 0.26, -0.5, 0.2, 0.01]])
    # 3 bits: s * {1, 1/2, 1/4}, zero below 2^-2.5 = 0.177; log2(0.75) = -0.42 rounds to 0, log2(0.7) = -0.51 to -1
    codes, scale = PowerOfTwo(3).codes(w)
    assert codes.tolist() == [[4, 4, 2, 1, -2, 1, 0]]
    assert scale.tolist() == [0.25]


@pytest.mark.parametrize("bits", range(2, 9))
def test_pow2_scale_is_a_power_of_two(bits):
    scale = PowerOfTwo(bits, levels=False).codes(weights())[1]
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())


def test_binary_by_hand():
    w = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, -8.0]])
    assert Binary().codes(w)[0].tolist() == [[1, -1, 1, 1], [1, 1, 1, -1]]
    assert Binary(scale="mean").codes(w)[1].tolist() == [0.5, 3.0]
    published = Binary(zero="published")
    assert published(w)[0].tolist() == [1, -1, 0, 0]
    with pytest.raises(ValueError, match='Use zero="plus"'):
        published.codes(w)


def test_binary_of_weights_as_they_are():
    w = torch.tensor([[3.0, 1.0, 2.0, -2.0], [0.0, 0.25, 0.0, -0.75]])
    plain = Binary(scale="mean", normalise=False)
    codes, scale = plain.codes(w)
    assert codes.tolist() == [[1, 1, 1, -1], [1, 1, 1, -1]] and scale.tolist() == [2.0, 0.25]
    assert torch.equal(plain(w), codes * scale[:, None])
    assert Binary(scale="pow2", normalise=False).codes(w)[1].tolist() == [2.0, 0.25]
    leaf, outer = w.clone().requires_grad_(), weights((2, 4))
    plain(leaf).backward(outer)
    assert torch.equal(leaf.grad, outer * scale[:, None])
    with pytest.raises(ValueError, match="exactly zero"):
        Binary(zero="published", normalise=False).codes(w)


def test_binary_gradients():
    w, outer = weights((4, 9), dtype=torch.float64), weights((4, 9), 1, torch.float64)
    normal = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
    for progress, t in ((0.0, 0.1), (0.5, 1.0), (1.0, 10.0)):
        grads = []
        for surrogate in (lambda n, t=t: max(1 / t, 1) / 1 * torch.tanh(t * n), None):
            leaf = w.clone().requires_grad_()
            if surrogate is None:
                quantizer = Binary("ir_net").double()
                quantizer.anneal(progress)
                out = quantizer(leaf)
            else:  # the estimator is the true gradient of k tanh(t w)
                out = surrogate((leaf - leaf.mean(1, keepdim=True)) / leaf.std(1, keepdim=True))
            out.backward(outer)
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-9)
    assert torch.equal(Binary()(w), torch.where(normal >= 0, 1.0, -1.0).double())


def test_binary_progress_is_saved():
    quantizer = Binary("ir_net")
    quantizer.anneal(2.0)
    again = Binary("ir_net")
    again.load_state_dict(quantizer.state_dict())
    assert float(again.progress) == 1.0


def test_max_scale_signed_is_published_and_refuses_codes_beyond_the_width():
    w = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(MaxScale(8, False, "signed")(w), torch.tensor([[0.5, -1.0]]))
    with pytest.raises(ValueError, match="code -254"):
        MaxScale(8, False, "signed").codes(w)


# ---------------------------------------------------------------------------------------------- membrane
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["running", "batch"])
@pytest.mark.parametrize("tanh", [True, False])
def test_membrane_codes(bits, scale, tanh):
    membrane, u = Membrane(bits, scale, tanh), weights((3, 4, 5)) * 10
    membrane(u)
    membrane.eval()
    for value in (u, 3 * u, torch.zeros_like(u)):
        codes, step = membrane.codes(value)
        assert torch.equal(membrane(value), codes * step)
        assert codes.abs().max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("scale", ["running", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_membrane_of_another_dtype(scale, dtype):
    for u in (weights((3, 4), dtype=dtype), torch.zeros(3, 4, dtype=dtype)):
        membrane = Membrane(4, scale).eval()
        codes, step = membrane.codes(u)
        assert membrane(u).dtype == dtype
        assert torch.equal(membrane(u), codes * step)


def test_membrane_does_not_depend_on_the_batch_in_evaluation():
    membrane, u = Membrane(4), weights((3, 4)) * 10
    membrane(u)
    membrane.eval()
    alone = membrane(u[:1])
    assert torch.equal(membrane(torch.cat([u[:1], 100 * u[1:]]))[:1], alone)


def test_membrane_of_32_bits_is_the_tanh_alone():
    membrane, u = Membrane(32), (weights((3, 4)) * 3).requires_grad_()
    z = membrane(u)
    assert torch.equal(z, torch.tanh(u)) and float(membrane.bound) == 0
    z.sum().backward()
    torch.testing.assert_close(u.grad, 1 - torch.tanh(u.detach()) ** 2)
    with pytest.raises(ValueError, match=r"no codes; take 2\.\.8 bits"):
        membrane.codes(u)


def test_membrane_bound_runs_in_training_only():
    membrane, u = Membrane(4, tanh=False), torch.ones(3)
    membrane(u)
    assert float(membrane.bound) == 1.0
    membrane(2 * u)
    assert float(membrane.bound) == pytest.approx(1.1)
    before = membrane.bound.clone()
    membrane.codes(5 * u)
    membrane.eval()(5 * u)
    assert torch.equal(membrane.bound, before)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LSQ(1), "For one bit use Binary"), (lambda: LSQ(9), "bits=9"), (lambda: PowerOfTwo(5), r"2\.\.4"),
    (lambda: PowerOfTwo(9, levels=False), r"2\.\.8"), (lambda: MaxScale(1), "bits=1"), (lambda: MaxScale(top="x"), "'x'"),
    (lambda: Binary("x"), "'ste', 'ir_net'"), (lambda: Binary(scale="x"), "scale='x'"), (lambda: Binary(zero="x"), "zero='x'"),
    (lambda: Membrane(1), "bits=1"), (lambda: Membrane(32, tanh=False), "does nothing"), (lambda: Membrane(8, "x"), "'x'"),
])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_base_class_has_no_codes():
    with pytest.raises(TypeError, match="base class"):
        Quantizer().codes(torch.zeros(1))
