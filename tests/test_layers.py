"""quantize_: attaches by name to anyone's model, all or nothing."""
from __future__ import annotations

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitspike.layers import (  # noqa: E402
    cached_weights,
    codes,
    latent_weight,
    make_quantizer,
    neurons_with_membrane,
    norms_anew,
    quantizable,
    quantize_,
    quantizer_of,
    quantizers,
)
from bitspike.neurons import LIF  # noqa: E402
from bitspike.spec import KINDS, QuantSpec, Scheme, SpecError  # noqa: E402

WEIGHT_SCHEMES = [Scheme(kind, bits, per) for kind, widths in KINDS.items() if kind not in ("full", "membrane")
                  for bits in widths for per in ("channel", "tensor")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.neuron = LIF()
        self.line = nn.Conv1d(4, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.line(self.neuron(self.conv(x)[None])[0].flatten(2)).mean(2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES, ids=lambda s: f"{s.kind}{s.bits}_{s.per}")
def test_every_scheme_on_every_kind_of_layer(net, scheme):
    latent = {name: layer.weight.detach().clone() for name, layer in quantizable(net).items()}
    assert quantize_(net, QuantSpec({"*": scheme})) is net
    assert [name for name, _ in quantizers(net)] == ["conv", "line", "head"]
    net(IMAGE).square().sum().backward()
    for name, layer in quantizable(net).items():
        integers, scale = codes(layer)
        grid = scale.view(-1, *[1] * (integers.dim() - 1)) if scale.numel() > 1 else scale
        assert torch.equal(layer.weight.detach(), integers * grid)
        assert torch.equal(latent_weight(layer), latent[name])
        assert latent_weight(layer).grad.isfinite().all()


def test_full_and_unnamed_layers_are_left_alone(net):
    quantize_(net, QuantSpec([("*", Scheme("lsq", 4)), ("conv", Scheme("full"))]))
    assert quantizer_of(net.conv) is None
    assert type(net.conv) is nn.Conv2d
    assert latent_weight(net.conv) is net.conv.weight
    with pytest.raises(SpecError, match="has no quantizer"):
        codes(net.conv)


def test_membrane_goes_to_the_neurons(net):
    assert list(neurons_with_membrane(net)) == ["neuron"]
    quantize_(net, QuantSpec({"*": Scheme("membrane", 4)}))
    assert net.neuron.membrane.bits == 4
    assert quantizer_of(net.head) is None


@pytest.mark.parametrize("rules", [
    [("*", Scheme("lsq", 4)), ("haed", Scheme("lsq", 8))],
    [("*", Scheme("lsq", 4)), ("conv", Scheme("membrane", 8))],
])
def test_an_error_changes_nothing(net, rules):
    with pytest.raises(SpecError, match="matches no layer"):
        quantize_(net, QuantSpec(rules))
    assert not list(quantizers(net))
    assert net.neuron.membrane is None


def test_twice_is_an_error(net):
    quantize_(net, QuantSpec({"head": Scheme("lsq", 4)}))
    with pytest.raises(SpecError, match="'head' is already quantized"):
        quantize_(net, QuantSpec({"*": Scheme("lsq", 4)}))
    assert quantizer_of(net.conv) is None
    quantize_(net, QuantSpec({"conv": Scheme("lsq", 4)}))  # the others still can be


@pytest.mark.parametrize("foreign", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm],
                         ids=["parametrized", "hooked"])
def test_weights_computed_by_something_else_are_refused(net, foreign):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated
        foreign(net.head)
    with pytest.raises(SpecError, match="'head': its weight is no plain parameter but computed by something else"):
        quantize_(net, QuantSpec({"*": Scheme("lsq", 4)}))
    assert quantizer_of(net.conv) is None


def test_lazy_layers_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(SpecError, match="'0' is a LazyConv2d without a shape yet; run one forward first"):
        quantize_(model, QuantSpec({"*": Scheme("lsq", 4)}))
    model(IMAGE)
    assert len(list(quantizers(quantize_(model, QuantSpec({"*": Scheme("lsq", 4)}))))) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype(net, dtype):
    quantize_(net.to(dtype), QuantSpec({"*": Scheme("lsq", 4)}))
    assert net(IMAGE.to(dtype)).dtype == dtype


def test_attaching_does_not_initialise(net):
    quantize_(net, QuantSpec({"*": Scheme("lsq", 4)}))
    assert not any(bool(q.initialized) for _, q in quantizers(net))


def test_state_dict_round_trip(net):
    spec = QuantSpec({"*": Scheme("lsq", 4), "head": Scheme("binary")})
    quantize_(net, spec)
    expected = net.eval()(IMAGE)
    other = quantize_(Net(), spec)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(IMAGE), expected)
    assert torch.equal(copy.deepcopy(net)(IMAGE), expected)


def test_cached_weights_quantize_once(net):
    quantize_(net, QuantSpec({"*": Scheme("lsq", 4)}))
    expected = net(IMAGE)
    calls = []
    for _, quantizer in quantizers(net):
        quantizer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), cached_weights(net):
        assert torch.equal(net(IMAGE), expected)
        assert torch.equal(net(IMAGE), expected)
    assert len(calls) == 3


def test_make_quantizer_refuses_what_is_no_weight_scheme():
    with pytest.raises(SpecError, match="not a weight scheme"):
        make_quantizer(Scheme("membrane", 4), torch.zeros(2, 2))


def test_norms_anew_average_the_batches_and_leave_modes_alone():
    last = nn.BatchNorm2d(2, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), last).eval()
    net[1].running_mean.fill_(9.0)
    batches = torch.randn(3, 4, 1, 5, 5)
    with torch.no_grad():
        with norms_anew(net) as count:
            for batch in batches:
                net(batch)
            assert count == 1 and net[1].training and not net[2].training
        wanted = torch.stack([net[0](batch).mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(net[1].running_mean, wanted, atol=1e-6)
    assert net[1].momentum == 0.1 and not net[1].training
