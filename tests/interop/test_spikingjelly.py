"""SpikingJelly's networks here: the same spikes and gradients, low bits, an integer program; or a clear error."""
from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed: pip install 'bitspike[spikingjelly]'")

from spikingjelly.activation_based import functional, layer, neuron, surrogate  # noqa: E402
from torch import nn  # noqa: E402

from bitspike import QuantSpec, Scheme, export_model, load, profile, quantize_  # noqa: E402
from bitspike.interop import InteropError, as_graph, check_same_spikes  # noqa: E402
from bitspike.interop.spikingjelly import convert  # noqa: E402
from bitspike.interop.translate import Borrowed, OverTime  # noqa: E402
from bitspike.layers import codes, quantizable  # noqa: E402
from bitspike.neurons import IELIF, LIF, ArcTan, Rectangle, Sigmoid, Triangle  # noqa: E402

from .pictures import normalised, pictures, settle  # noqa: E402


def plif(**options):
    node = neuron.ParametricLIFNode(init_tau=1.7, step_mode="m", **options)
    node.w.data.add_(0.3)  # trained since
    return node


NEURONS = {
    "lif": lambda: neuron.LIFNode(step_mode="m"),
    "lif_soft": lambda: neuron.LIFNode(tau=3.0, v_reset=None, v_threshold=0.7, step_mode="m"),
    "lif_whole_input": lambda: neuron.LIFNode(tau=1.5, decay_input=False, step_mode="m"),
    "lif_rest_below": lambda: neuron.LIFNode(v_reset=-0.3, step_mode="m"),
    "lif_rest_above": lambda: neuron.LIFNode(tau=1.3, v_reset=0.25, decay_input=False, detach_reset=True, step_mode="m"),
    "if": lambda: neuron.IFNode(step_mode="m"),
    "if_soft": lambda: neuron.IFNode(v_reset=None, v_threshold=1.5, step_mode="m"),
    "plif": plif,
    "plif_soft": lambda: plif(decay_input=False, v_reset=None),
}
if hasattr(neuron, "ILIFNode"):
    NEURONS["ilif"] = lambda: neuron.ILIFNode(step_mode="m")
    NEURONS["ilif_half"] = lambda: neuron.ILIFNode(tau=2.0, v_threshold=0.5, step_mode="m",
                                                   surrogate_function=surrogate.MultiLevelSpikeCount(8))


def drive(T=8, seed=0):
    return torch.randn(T, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.5


# --------------------------------------------------------------------------------------------------- neurons
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_fire_the_same(name):
    node = NEURONS[name]()
    ours = convert(node)
    assert isinstance(ours, LIF | IELIF)
    report = check_same_spikes(nn.Sequential(node), nn.Sequential(ours), drive())
    assert report.compared == 8 * 4 * 6
    assert not report.silent
    assert report.largest_difference == 0


@pytest.mark.parametrize("name", [n for n in NEURONS if n != "lif_rest_below"])
def test_gradients_are_the_same(name):
    node = NEURONS[name]().double()
    grads = []
    for net in (node, convert(node)):
        x = drive().requires_grad_()
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        (net(x) * weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize(("function", "ours"), [
    (surrogate.Sigmoid(3.0), Sigmoid(3.0)), (surrogate.ATan(), ArcTan(2.0)), (surrogate.PiecewiseQuadratic(0.5), Triangle(2.0)),
    (surrogate.Erf(), Borrowed), (surrogate.LeakyKReLU(), Borrowed),
    *([(surrogate.Rect(0.8), Rectangle(1.25))] if hasattr(surrogate, "Rect") else [])],
    ids=lambda x: type(x).__name__)
def test_surrogates(function, ours):
    node = neuron.IFNode(surrogate_function=function, step_mode="m")
    found = convert(node).surrogate
    assert found == ours or isinstance(found, Borrowed)
    distance = torch.linspace(-2, 2, 42, dtype=torch.float64, requires_grad=True)
    function(distance).sum().backward()
    torch.testing.assert_close(found.derivative(distance.detach()), distance.grad)


# ------------------------------------------------------------------------------------------------- containers
class Mixed(nn.Module):
    """Every kind of container and layer, and a forward that asks for shapes."""

    def __init__(self):
        super().__init__()
        self.conv = layer.Conv2d(3, 6, 3, padding=1)
        self.norm = layer.BatchNorm2d(6)
        self.fire = neuron.IFNode()
        self.block = layer.SeqToANNContainer(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.AvgPool2d(2))
        self.steps = layer.MultiStepContainer(nn.Conv2d(6, 6, 1), neuron.LIFNode(v_threshold=0.2), layer.Dropout(0.5))
        self.pool, self.flat = layer.AdaptiveAvgPool2d(2), layer.Flatten()
        self.head = layer.Linear(24, 5)
        functional.set_step_mode(self, "m")
        for child in (*self.block, *self.steps):  # inside of containers, steps are single
            if hasattr(child, "step_mode"):
                child.step_mode = "s"

    def forward(self, x):
        T, B, C, H, W = x.shape
        if x.ndim != 5 or C != 3:
            raise ValueError(f"{x.shape}")
        y = self.fire(self.norm(self.conv(x)))
        y = self.steps(self.block(y).reshape(T, B, 6, H // 2, W // 2))
        return self.head(self.flat(self.pool(y)))


def mixed(seed=0, T=4):
    torch.manual_seed(seed)
    net, x = Mixed(), torch.randn(T, 3, 3, 8, 8)
    with torch.no_grad():
        net(x)
    functional.reset_net(net)
    return net.eval(), x


def test_containers_layers_and_names():
    net, x = mixed()
    ours = convert(net)
    report = check_same_spikes(net, ours, x)
    assert set(report.neurons) == {"fire", "steps.1"}
    assert report.different == 0
    assert not report.silent
    assert report.largest_difference < 1e-12
    assert [type(m) for m in (ours.conv, ours.block, ours.steps, ours.head)] == [OverTime, OverTime, nn.Sequential, nn.Linear]
    assert list(quantizable(ours)) == ["conv.0", "block.0", "steps.0.0", "head"]
    assert all(type(m) is nn.Conv2d for name, m in quantizable(ours).items() if name != "head")
    assert not any(type(m).__module__.startswith("spikingjelly") for m in ours.modules())


def test_dropout_keeps_its_mask_over_the_steps():
    ours = convert(nn.Sequential(layer.Dropout(0.5, step_mode="m"))).train()
    y = ours(torch.ones(6, 2, 50))
    assert torch.equal(y, y[:1].expand_as(y))
    assert 0 < (y == 0).float().mean() < 1
    assert torch.equal(ours.eval()(torch.ones(6, 2, 5)), torch.ones(6, 2, 5))


def test_the_original_stays_as_it_was():
    net, x = mixed()
    y = net(x.requires_grad_())  # leaves potentials with gradients behind
    held = net.fire.v
    assert held.requires_grad
    before = copy.deepcopy(net.state_dict())
    ours = convert(net)
    assert net.fire.v is held
    assert type(net.conv) is layer.Conv2d
    ours.conv[0].weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ours = convert(net)
    assert torch.equal(ours(x), ours(x))  # from rest each time
    torch.testing.assert_close(ours(x), y)
    y.sum().backward()


def test_hooks_move_along():
    net, x = mixed()
    seen = []
    for module in (net.conv, net.fire):
        module.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    ours = convert(net)
    ours(x)
    assert seen == [(4, 3, 6, 8, 8)] * 2
    assert convert(net.train()).training
    assert convert(net.train()).fire.training


def test_a_module_in_two_places_stays_one():
    shared = layer.Linear(4, 4, step_mode="m")
    ours = convert(nn.Sequential(shared, neuron.IFNode(step_mode="m"), shared))
    assert ours[0] is ours[2]


# ------------------------------------------------------------------------------------------ their own networks
def sew(connection="ADD"):
    sew_resnet = pytest.importorskip("spikingjelly.activation_based.model.sew_resnet")
    net = sew_resnet.SEWResNet(sew_resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, cnf=connection, spiking_neuron=neuron.IFNode,
                               surrogate_function=surrogate.ATan(), detach_reset=True)
    functional.set_step_mode(net, "m")

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.unsqueeze(0).repeat(2, 1, 1, 1, 1))

    return Repeated()


def spikformer():
    model = pytest.importorskip("spikingjelly.activation_based.model.spikformer",
                                reason="this version of SpikingJelly has no Spikformer")
    return model.Spikformer(T=2, img_size_h=16, img_size_w=16, patch_size=4, num_classes=4, embed_dims=32, num_heads=2,
                            depths=1)


@pytest.mark.parametrize("build", [sew, spikformer])
def test_their_networks_from_float_to_integers(build, tmp_path):
    torch.manual_seed(0)
    pixels = pictures(24, 32 if build is sew else 16)
    net = build()
    ours = settle(convert(net), pixels)
    # the original with the same statistics: norms that were split stand side by side
    state = net.state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.copy_(_statistics(ours, name))
    report = check_same_spikes(net, ours, normalised(pixels[:4]))
    assert report.different == 0
    assert len(report.silent) <= 2
    assert report.spikes > 0.02 * report.compared
    assert report.largest_difference < 1e-10

    quantize_(ours, QuantSpec({"*": Scheme("uniform", 4)}))
    settle(ours, pixels)
    assert all(int(codes(m)[0].abs().max()) <= 8 for m in quantizable(ours).values())
    seen = profile(ours, normalised(pixels[:4]))
    assert seen.spikes_per_neuron > 0
    assert seen.weights == sum(m.weight.numel() for m in quantizable(ours).values())
    exported = export_model(
        as_graph(ours, normalised(pixels[:2])), tmp_path / "net.bitspike", mean=[0.5] * 3, std=[0.25] * 3,
        image_size=pixels.shape[1], classes=list("abcd"), calibration_images=pixels, name="theirs", time_steps=2,
        min_agreement=0.9)
    assert not any(row.from_float for row in exported.layers)
    with torch.no_grad():
        expected = ours(normalised(pixels)).mean(0)
    found = torch.from_numpy(load(tmp_path / "net.bitspike")(pixels))
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def _statistics(ours, name):
    """Of a norm of the original: "bn1.x" is "bn1.0.x" here, "qkv_conv_bn.1.x" the three "qkv_conv_bn.i.1.x"."""
    have = ours.state_dict()
    module, _, what = name.rpartition(".")
    if name in have:
        return have[name]
    if f"{module}.0.{what}" in have:
        return have[f"{module}.0.{what}"]
    outer, _, index = module.rpartition(".")
    return torch.cat([have[f"{outer}.{i}.{index}.{what}"] for i in range(3)])


@pytest.mark.parametrize("connection", ["AND", "IAND"])
def test_other_connections_of_sew_fire_the_same(connection):
    torch.manual_seed(0)
    net, x = sew(connection), normalised(pictures(2, 32))
    with torch.no_grad():
        net(x)
    assert check_same_spikes(net.eval(), convert(net), x).different == 0


# ----------------------------------------------------------------------------------------------------- errors
def test_a_change_is_found():
    net, x = mixed()
    ours = convert(net)
    ours.fire.threshold += 1e-3
    with pytest.raises(InteropError, match=r"does not fire as the original: .* first at step \d of neuron 'fire'"):
        check_same_spikes(net, ours, x)
    assert check_same_spikes(net, ours, x, dtype=torch.float32).different > 0
    with pytest.raises(InteropError, match=r"it has no neurons"):
        check_same_spikes(net, nn.Linear(2, 2), x)
    with pytest.raises(InteropError, match=r"'0' has none of that name in the original"):
        check_same_spikes(net, nn.Sequential(LIF()), x)


@pytest.mark.parametrize(("broken", "message"), [
    (lambda: neuron.LIFNode(), r"^0 \(LIFNode\) is in single-step mode.*set_step_mode\(model, 'm'\)"),
    (lambda: neuron.KLIFNode(step_mode="m"), r"^0 \(KLIFNode\): this neuron of SpikingJelly has no integer form here"),
    (lambda: neuron.EIFNode(step_mode="m"), r"EIFNode"),
    (lambda: layer.SynapseFilter(step_mode="m"), r"^0 \(SynapseFilter\): this layer of SpikingJelly has no integer form"),
    (lambda: neuron.IFNode(v_threshold=0.5, v_reset=0.5, step_mode="m"), "v_threshold=0.5 is not above v_reset=0.5"),
    (lambda: neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False), step_mode="m"), "spike function gives"),
    (lambda: layer.MultiStepContainer(nn.Sequential(neuron.IFNode())), "single-step mode|keeps a state inside"),
    (lambda: layer.SeqToANNContainer(neuron.IFNode()), r"0.0 \(IFNode\) keeps a state, and SeqToANNContainer merges"),
], ids=["single", "klif", "eif", "filter", "threshold", "smooth", "nested", "merged"])
def test_what_has_no_integer_form(broken, message):
    with pytest.raises(InteropError, match=message):
        convert(nn.Sequential(broken()))


def test_branches_on_tensors_cannot_be_written_down():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InteropError, match=r"Branch.forward cannot be written down: a branch depends on what a tensor holds"):
        as_graph(Branch(), torch.ones(2, 2))


def test_the_graph_takes_other_batch_sizes():
    net, x = mixed()
    ours = convert(net)
    graph = as_graph(ours, x)
    assert torch.equal(graph(x[:, :1]), ours(x[:, :1]))
    assert graph.conv[0].weight is ours.conv[0].weight
