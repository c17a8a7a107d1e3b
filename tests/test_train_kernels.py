"""The one-pass training kernels give what eager torch gives: the same bits, or for sums the same up to their order."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitspike import _train_convs, _train_kernels
from bitspike.layers import quantize_
from bitspike.models.blocks import SpikeConv
from bitspike.neurons import IELIF, LIF
from bitspike.quantizers import LSQ
from bitspike.spec import QuantSpec, Scheme

native = pytest.mark.skipif(_train_kernels.isa() is None, reason="bitspike._train is not compiled here")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def eagerly(compute):
    """The result of compute() without the extension."""
    kept, _train_kernels._native_ = _train_kernels._native_, None
    try:
        return compute()
    finally:
        _train_kernels._native_ = kept


def both(compute):
    return compute(), eagerly(compute)


def same_bits(a: Tensor, b: Tensor) -> bool:
    ints = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.contiguous().view(ints) == b.contiguous().view(ints)).all())


def value_and_gradient(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


# ------------------------------------------------------------------------------------------------ neurons
@native
@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=5), levels=st.sampled_from([1, 3, 4, 15, 200, 255]),
       gain=st.sampled_from([None, 1.0, 2.0, 3.3]), scale=st.sampled_from([None, 0.5, 1 / 3]),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_count_equals_eager(shape, levels, gain, scale, dtype, seed):
    torch.manual_seed(seed)
    neuron = IELIF(levels, gain, scale)
    x = (torch.randn(shape) * 2).to(dtype)
    (y, g), (eager_y, eager_g) = both(lambda: value_and_gradient(neuron, x, torch.randn(
        shape, generator=torch.Generator().manual_seed(1)).to(dtype)))
    assert same_bits(y, eager_y) and same_bits(g, eager_g)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 255, 256, 257, 16 * 1024 * 3 + 13])
def test_count_at_the_edges_of_blocks(size, dtype):
    neuron, x, grad = IELIF(4), torch.randn(1, size).to(dtype), torch.randn(1, size).to(dtype)
    (y, g), (eager_y, eager_g) = both(lambda: value_and_gradient(neuron, x, grad))
    assert same_bits(y, eager_y) and same_bits(g, eager_g)


@native
def test_every_bfloat16_value():
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]  # a NaN stays NaN; which one is not promised
    for neuron in (IELIF(4), IELIF(255), IELIF(7, 3.3, 0.3)):
        (y, g), (eager_y, eager_g) = both(lambda n=neuron: value_and_gradient(n, x[None], torch.ones_like(x[None])))
        assert same_bits(y, eager_y) and same_bits(g, eager_g)


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 5, 7),
    "channels_last": lambda: torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last),
    "sequence of channels_last": lambda: torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last)
                                              .unflatten(0, (2, 2)),
    "transposed": lambda: torch.randn(6, 4, 7).transpose(0, 2),
    "every second": lambda: torch.randn(4, 12, 5)[:, ::2],
    "expanded": lambda: torch.randn(1, 6, 5).expand(4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_keeps_values_and_strides(layout):
    x = LAYOUTS[layout]()
    for grad in (torch.randn(x.shape), torch.ones(()).expand(x.shape), torch.randn(x.shape[::-1]).permute(
            *reversed(range(x.dim())))):
        (y, g), (eager_y, eager_g) = both(lambda given=grad: value_and_gradient(IELIF(4), x, given))
        assert same_bits(y, eager_y) and same_bits(g, eager_g)
        assert y.stride() == eager_y.stride()


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_values_go_where_eager_torch_sends_them(dtype):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.5, -0.0, 2.0]], dtype=dtype)
    (y, _), (eager_y, _) = both(lambda: value_and_gradient(IELIF(4), x, torch.ones_like(x)))
    torch.testing.assert_close(y, eager_y, rtol=0, atol=0, equal_nan=True)
    for bad in (float("nan"), float("inf")):
        (_, g), (_, eager_g) = both(lambda b=bad: value_and_gradient(IELIF(4), x, torch.full_like(x, b)))
        torch.testing.assert_close(g, eager_g, rtol=0, atol=0, equal_nan=True)


def test_other_dtypes_take_the_torch_path():
    for dtype in (torch.float64, torch.float16):
        assert _train_kernels.count_forward(torch.zeros(3, dtype=dtype), 4, 4.0, 0.25) is None
    x = torch.randn(1, 50, dtype=torch.float64)
    y, _ = value_and_gradient(IELIF(4), x, torch.ones_like(x))
    assert torch.equal(y, torch.floor((4 * x).clamp(0, 4) + 0.5) / 4)


def test_a_gradient_of_the_gradient_is_not_lost():
    x = torch.randn(1, 20, requires_grad=True)
    weight = torch.randn(1, 20, requires_grad=True)
    (first,) = torch.autograd.grad((IELIF(4)(x) * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(second, ((x > 0) & (x < 1)).float())


@native
def test_threads_do_not_change_a_bit():
    x, w = torch.randn(3, 48, 40, 40), torch.randn(48, 8, 3, 3)
    lsq, before, results = LSQ(4, 48), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, g = value_and_gradient(IELIF(4), x, x)
            s = IELIF(4)(x)
            results.append([y, g, *value_and_gradient(lsq, w, w), _train_kernels.depthwise_weight(s, x, 7, 3)])
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# --------------------------------------------------------------------------------------------------- LSQ
@native
@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 11), min_size=2, max_size=4), bits=st.integers(2, 8), per_channel=st.booleans(),
       channels_last=st.booleans(), seed=st.integers(0, 99))
def test_lsq_equals_eager(shape, bits, per_channel, channels_last, seed):
    torch.manual_seed(seed)
    w = torch.randn(shape)
    if channels_last and w.dim() == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    quantizer, grad = LSQ(bits, shape[0] if per_channel else 1), torch.randn(shape)
    quantizer.codes(w)
    with torch.no_grad():
        quantizer.scale.mul_(torch.rand_like(quantizer.scale) + 0.2)
        quantizer.scale[0] = -1.0  # held at the smallest step

    def compute():
        weight = w.detach().requires_grad_()
        q = quantizer(weight)
        return q.detach(), *torch.autograd.grad(q, (weight, quantizer.scale), grad)

    (q, gw, gs), (eager_q, eager_gw, eager_gs) = both(compute)
    assert same_bits(q, eager_q) and same_bits(gw, eager_gw)
    torch.testing.assert_close(gs, eager_gs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- convolutions
CONVS = {
    "3x3 stride 2 with bias": lambda: nn.Conv2d(16, 24, 3, 2, 1),
    "1x1": lambda: nn.Conv2d(16, 8, 1, bias=False),
    "depthwise 7x7": lambda: nn.Conv2d(16, 16, 7, padding=3, groups=16, bias=False),
    "depthwise 3x3 without border": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "depthwise 5x5, wide border": lambda: nn.Conv2d(16, 16, 5, padding=4, groups=16, bias=False),
    "depthwise 3x3 stride 2": lambda: nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
    "dilated": lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2),
    "two groups": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2),
}
NEURONS = {"ielif": lambda: IELIF(4), "attention": lambda: IELIF(4, scale=0.5), "lif": LIF,
           "odd": lambda: IELIF(15, 3.3), "large": lambda: IELIF(31)}


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_convolution_of_counts_equals_torch(conv, neuron, autocast):
    block = quantize_(SpikeConv(NEURONS[neuron](), CONVS[conv]()), QuantSpec({"*": Scheme("lsq", 4)}))
    x = torch.randn(2, 2, 16, 9, 11) * 1.5

    def compute():
        block.zero_grad()
        image = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(image)
            loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        loss.backward()
        return y.detach(), image.grad, *[p.grad.clone() for p in block.parameters()]

    ours, eager = both(compute)
    if not autocast:
        torch.testing.assert_close(ours[0], eager[0], rtol=0, atol=0)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        limit = 3e-2 if autocast else 1e-5
        assert (a - b).float().norm() <= limit * b.float().norm() + 1e-4


@native
def test_counts_are_kept_in_half_a_byte():
    block, x = SpikeConv(IELIF(4), nn.Conv2d(16, 16, 3, padding=1)), torch.randn(1, 2, 16, 8, 8, requires_grad=True)
    s = block.neuron(x).flatten(0, 1)
    saved = {t.dtype: t for t in _train_convs.conv(block.conv, s, 0.25, 4).grad_fn.saved_tensors}
    assert saved[torch.uint8].numel() == s.numel() // 2
    assert s.shape not in [t.shape for t in saved.values()]


@native
@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 700), scale=st.sampled_from([0.25, 0.5, 1.0, 1 / 3, 0.3]), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 9))
def test_counts_come_back_exactly(size, scale, dtype, seed):
    torch.manual_seed(seed)
    y = (torch.randint(0, 16, (size,)).float() * scale).to(dtype)
    codes = _train_kernels.pack_counts(y, scale)
    assert torch.equal(_train_kernels.unpack_counts(codes, y.shape, y.stride(), dtype, scale), y)


@native
@pytest.mark.parametrize("wrong", [0.3, -0.25, 4.0, float("nan"), float("inf")])
def test_what_is_no_count_is_kept_as_it_is(wrong):
    y = torch.full((40,), 0.5)
    y[37] = wrong
    assert _train_kernels.pack_counts(y, 0.25) is None


def test_hooks_on_the_convolution_are_called():
    block, seen = SpikeConv(IELIF(4), nn.Conv2d(16, 16, 3)), []
    block.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(torch.randn(1, 1, 16, 5, 5))
    assert len(seen) == 1


def test_frozen_weights_and_inputs_get_no_gradient():
    block, x = SpikeConv(IELIF(4), nn.Conv2d(16, 16, 3, groups=16), norm=False), torch.randn(1, 1, 16, 5, 5)
    block.conv.weight.requires_grad_(False)
    block(x).sum().backward()
    assert block.conv.weight.grad is None and block.conv.bias.grad is not None
