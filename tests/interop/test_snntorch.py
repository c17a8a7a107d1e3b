"""snnTorch's networks here: loops over time rolled up, the same spikes and gradients; or a clear error."""
from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
snn = pytest.importorskip("snntorch", reason="snnTorch is not installed: pip install 'bitspike[snntorch]'")

from snntorch import surrogate  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from bitspike import QuantSpec, Scheme, export_model, load, profile, quantize_  # noqa: E402
from bitspike.interop import InteropError, check_same_spikes  # noqa: E402
from bitspike.interop.snntorch import convert  # noqa: E402
from bitspike.interop.translate import OverTime  # noqa: E402
from bitspike.layers import quantizable  # noqa: E402
from bitspike.neurons import LIF  # noqa: E402

from .pictures import normalised, pictures, settle  # noqa: E402

GRAD = surrogate.fast_sigmoid(slope=25)


class Dense(nn.Module):
    """The fully connected network of tutorial 5, smaller."""

    def __init__(self, steps=6, **options):
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, 40), snn.Leaky(beta=0.95, **options)
        self.fc2, self.lif2 = nn.Linear(40, 4), snn.Leaky(beta=0.95, **options)
        self.fc2.weight.data *= 2

    def forward(self, x):
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk2_rec, mem2_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class Convolutional(nn.Module):
    """The convolutional network of tutorial 6, smaller, over a sequence of frames or a picture."""

    def __init__(self, steps=5, frames=False, norm=False):
        super().__init__()
        self.steps, self.frames = steps, frames
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 3), snn.Leaky(beta=0.5, spike_grad=GRAD)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2, self.lif2 = nn.Conv2d(4, 8, 3), snn.Leaky(beta=0.5, spike_grad=GRAD, reset_mechanism="zero")
        self.fc1, self.lif3 = nn.Linear(8 * 2 * 2, 4), snn.Leaky(beta=0.5, spike_grad=GRAD)
        self.fc1.weight.data *= 8  # or it never fires

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        record = []
        for step in range(x.size(0) if self.frames else self.steps):
            cur1 = F.max_pool2d(self.conv1(x[step] if self.frames else x), 2)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = F.avg_pool2d(self.norm(self.conv2(spk1)), 2)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk3, mem3 = self.lif3(self.fc1(spk2.view(spk2.size(0), -1)), mem3)
            record.append(spk3)
        return torch.stack(record)


def sequential(**last):
    """Tutorial 6's nn.Sequential, smaller: one step, the loop is the caller's."""
    def leaky(**more):
        return snn.Leaky(beta=0.9, spike_grad=GRAD, init_hidden=True, **more)

    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), leaky(), nn.Conv2d(4, 8, 3), nn.MaxPool2d(2), leaky(),
                         nn.Flatten(), nn.Linear(8 * 2 * 2, 4), leaky(**last))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def check(net, ours, x):
    report = check_same_spikes(net, ours, x)
    assert report.different == 0
    assert not report.silent
    return report


# ---------------------------------------------------------------------------------------------------- neurons
@pytest.mark.parametrize("options", [
    {"beta": 0.9}, {"beta": 0.5, "reset_mechanism": "zero"}, {"beta": 0.8, "reset_mechanism": "none"},
    {"beta": 0.7, "threshold": 0.6}, {"beta": 1.5, "threshold": 2.0},
    {"beta": 0.6, "learn_beta": True, "learn_threshold": True},
    {"beta": torch.full((6,), 0.4)}, {"beta": 0.9, "reset_mechanism": "zero", "reset_delay": False}],
    ids=lambda o: ",".join(map(str, o)))
def test_leaky_fires_the_same_with_the_same_gradients(options):
    net = nn.Sequential(snn.Leaky(init_hidden=True, **options))
    x = torch.randn(9, 5, 6) * 1.5 + 0.3
    ours = convert(net, x[0], steps=9)
    report = check(net, ours, x)
    assert report.compared == x.numel()
    assert report.largest_difference == 0
    weight = torch.linspace(-1, 1, x.numel()).view_as(x)
    grads = []
    for run in (lambda leaf: torch.stack([net(frame) for frame in leaf]), ours):
        net[0].reset_mem()
        leaf = x.clone().requires_grad_()
        (run(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("options", [{"beta": 0.9}, {"R": 5.1, "C": 0.8, "time_step": 0.5},
                                     {"beta": 0.8, "reset_mechanism": "none", "time_step": 0.25, "threshold": 0.3}])
def test_lapicque(options):
    net = nn.Sequential(snn.Lapicque(init_hidden=True, **options))
    x = torch.randn(9, 5, 6) * 1.5 + 0.3
    check(net, convert(net, x[0], steps=9), x)


# ------------------------------------------------------------------------------------------------------ loops
def test_the_network_of_tutorial_5():
    net, x = Dense(), torch.randn(3, 64) * 2
    ours = convert(net, x)
    assert list(quantizable(ours)) == ["fc1", "fc2"]
    assert check(net, ours, x).largest_difference == 0
    assert ours(torch.randn(7, 64)).shape == (6, 7, 4)  # another batch
    assert [type(m) for m in (ours.lif1, ours.lif2)] == [LIF, LIF]
    assert len([n for n in ours.graph.nodes if n.op == "call_module"]) == 4  # each layer once


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_network_of_tutorial_6(frames, norm):
    net = Convolutional(frames=frames, norm=norm)
    x = torch.randn(*([5] if frames else []), 3, 1, 14, 14) * 2
    ours = convert(net, x)
    check(net, ours, x)
    assert type(ours.conv1) is OverTime
    assert type(net.conv1) is nn.Conv2d
    assert ours(x[..., :1, :, :, :]).shape == (5, 1, 4)


@pytest.mark.parametrize("last", [{}, {"output": True}])
def test_a_network_of_one_step(last):
    net, x = sequential(**last), torch.randn(3, 1, 14, 14) * 2
    ours = convert(net, x, steps=7)
    check(net, copy.deepcopy(ours), x)
    check(net, ours, torch.randn(7, 2, 1, 14, 14) * 2)  # a sequence
    assert [type(ours.get_submodule(i)) for i in "01267"] == [OverTime, OverTime, LIF, nn.Flatten, nn.Linear]
    with pytest.raises(ValueError, match=r"inputs of 4 axes \[B, ...\] or sequences \[7, B, ...\], found \[3, 2, 1, 14, 14\]"):
        ours(torch.zeros(3, 2, 1, 14, 14))


class Returns(Dense):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        spk2_rec, total, mem1, mem2 = [], 0, self.lif1.reset_mem(), self.lif2.reset_mem()
        shift = self.fc1.weight.mean()
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(F.dropout(x * 0.5, 0.5, self.training)) * 2 + shift, mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem=mem2)
            total = total + spk2
            spk2_rec.append(spk2)
        stack = torch.stack(spk2_rec)
        return {"list": spk2_rec, "sum": total, "python_sum": sum(spk2_rec), "mean": stack.mean(0), "rate": total / self.steps,
                "second": (0, stack), "axis": torch.stack(spk2_rec, dim=1)}[self.what]


@pytest.mark.parametrize("what", ["list", "sum", "python_sum", "mean", "rate", "second", "axis"])
def test_what_a_loop_may_return(what):
    net, x = Returns(what).eval(), torch.randn(3, 64) * 2
    ours = convert(net, x, output=1 if what == "second" else 0)
    check(net, ours, x)
    expected = net(x)
    expected = torch.stack(expected) if what == "list" else expected[1] if what == "second" else expected
    torch.testing.assert_close(ours(x), expected)


def test_the_original_stays_as_it_was():
    net, x = Dense(), torch.randn(3, 64) * 2
    spikes, mem = net(x)
    held = net.lif1.mem
    ours = convert(net, x)
    assert net.lif1.mem is held
    assert isinstance(net.lif1, snn.Leaky)
    ours.fc1.weight.data.zero_()
    assert torch.equal(net(x)[0], spikes)
    (spikes.sum() + mem.sum()).backward()
    assert net.fc1.weight.grad is not None


# --------------------------------------------------------------------------------------------- low bits, integers
@pytest.mark.parametrize("kind", ["loop", "sequential", "dense"])
def test_from_float_to_integers(kind, tmp_path):
    size = 8 if kind == "dense" else 14
    pixels = pictures(64, 16, 1)[:, :size, :size].copy()
    if kind == "loop":
        net, steps = Convolutional(norm=True), 5
        ours = convert(net, normalised(pixels[:2]))
    elif kind == "sequential":
        steps = 4
        ours = convert(sequential(), normalised(pixels[:2]), steps=steps)
    else:
        net, steps = Dense(), 6
        ours = nn.Sequential(nn.Flatten(), convert(net, normalised(pixels[:2]).flatten(1)))
    quantize_(ours, QuantSpec({"*": Scheme("uniform", 4)}))
    settle(ours, pixels)
    seen = profile(ours, normalised(pixels[:4]))
    assert seen.weights == sum(m.weight.numel() for m in quantizable(ours).values())
    assert seen.spikes_per_neuron > 0
    export_model(ours, tmp_path / "net.bitspike", mean=[0.5], std=[0.25], image_size=size, channels=1, classes=list("abcd"),
                 calibration_images=pixels, name="theirs", time_steps=steps, min_agreement=0.9)
    with torch.no_grad():
        expected = ours(normalised(pixels)).mean(0)
    found = torch.from_numpy(load(tmp_path / "net.bitspike")(pixels))
    assert (found - expected).abs().max() <= 1 / steps + 1e-5  # here and there a spike at a threshold
    assert (found - expected).abs().mean() < 0.01
    assert expected.std() > 0.05


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(("broken", "message"), [
    (lambda: snn.Synaptic(alpha=0.9, beta=0.8, init_hidden=True), r"^0 \(Synaptic\): .* no integer form here.*Leaky"),
    (lambda: snn.Alpha(alpha=0.9, beta=0.8, init_hidden=True), r"^0 \(Alpha\): .* no integer form"),
    (lambda: snn.RLeaky(beta=0.8, linear_features=6, init_hidden=True), r"^0 \(RLeaky\): .* no integer form"),
    (lambda: snn.Leaky(beta=torch.rand(6), init_hidden=True), r"^0 \(Leaky\): beta has 6 values"),
    (lambda: snn.Leaky(beta=0.5, inhibition=True, init_hidden=True), "inhibition=True"),
    (lambda: snn.Leaky(beta=0.5, graded_spikes_factor=2.0, init_hidden=True), "graded_spikes_factor=2"),
    (lambda: snn.Leaky(beta=0.5, reset_delay=False, init_hidden=True), "reset_delay=False"),
    (lambda: snn.Leaky(beta=0.0, init_hidden=True), "remembers nothing but its last spike"),
    (lambda: snn.Leaky(beta=0.5, threshold=0.0, init_hidden=True), "threshold=0; it must be positive"),
    (lambda: snn.Leaky(beta=0.5, spike_grad=torch.sigmoid, init_hidden=True), "its spike function gives"),
    (lambda: snn.Lapicque(beta=0.5, reset_mechanism="zero", init_hidden=True), "forgets the input of the step after a spike"),
    (lambda: snn.Lapicque(R=1, C=1, time_step=3, init_hidden=True), "multiply the potential by -2 each step"),
    (lambda: nn.Linear(6, 6), "has no neurons of snnTorch"),
], ids=["synaptic", "alpha", "rleaky", "betas", "inhibition", "graded", "delay", "beta0", "threshold", "smooth", "zero",
        "unstable", "none"])
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_what_has_no_integer_form(broken, message):
    with pytest.raises(InteropError, match=message):
        convert(nn.Sequential(broken()), torch.zeros(2, 6), steps=3)


class Wrong(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.fc, self.lif, self.other = body, nn.Linear(6, 6), snn.Leaky(beta=0.5), snn.Leaky(beta=0.5)

    def forward(self, x):
        return self.body(self, x)


def recurrent(net, x):
    spk, mem, out = torch.zeros(2, 6), net.lif.reset_mem(), []
    for _ in range(3):
        spk, mem = net.lif(net.fc(x + spk), mem)
        out.append(net.other(spk)[0])
    return torch.stack(out)


def last_step(net, x):
    for _ in range(3):
        spk, _ = net.lif(net.fc(x))
        spk, _ = net.other(spk)
    return spk


def potentials(net, x):
    out = []
    for _ in range(3):
        spk, _ = net.lif(net.fc(x))
        out.append(net.other(spk)[1])
    return torch.stack(out)


def meddling(net, x):
    mem, out = net.lif.reset_mem(), []
    for _ in range(3):
        spk, mem = net.lif(net.fc(x), mem * 0.5)
        out.append(net.other(spk)[0])
    return torch.stack(out)


def by_step(net, x):
    out = []
    for step in range(3):
        spk, _ = net.lif(net.fc(x) * (step + 1))
        out.append(net.other(spk)[0])
    return torch.stack(out)


def unequal(net, x):
    return torch.stack([net.lif(net.other(net.lif(x)[0])[0])[0] for _ in range(3)])


def strange(net, x):
    return torch.stack([net.other(net.lif(torch.cumsum(net.fc(x), 1))[0])[0] for _ in range(3)])


def by_content(net, x):
    return torch.stack([net.other(net.lif(x if x.sum() > 0 else -x)[0])[0] for _ in range(3)])


@pytest.mark.parametrize(("body", "message"), [
    (recurrent, "steps of the loop are not alike, or one step uses values of another"),
    (last_step, "its value at a single step"),
    (potentials, "the potentials of neuron 'other' are used"),
    (meddling, "'lif': its potential before step 2 is not what step 1"),
    (by_step, "a number that changes with the step"), (unequal, "'other' is run 3 times and 'lif' 6 times"),
    (strange, "'cumsum' in forward inside the loop over time is not known"),
    (by_content, "a branch depends on what a tensor holds"),
])
def test_loops_without_an_integer_form(body, message):
    with pytest.raises(InteropError, match=message):
        convert(Wrong(body), torch.ones(2, 6))


def test_steps_have_to_be_said():
    with pytest.raises(InteropError, match=r"the forward makes one step; say how many"):
        convert(sequential(), torch.zeros(2, 1, 14, 14))
    with pytest.raises(InteropError, match=r"the forward makes 6 steps, steps=5 was given"):
        convert(Dense(), torch.zeros(2, 64), steps=5)
    with pytest.raises(InteropError, match=r"output=2: the network returns 2 values, 0 to 1"):
        convert(Dense(), torch.zeros(2, 64), output=2)
    with pytest.raises(InteropError, match=r"steps=0; at least 1"):
        convert(sequential(), torch.zeros(2, 1, 14, 14), steps=0)


def test_a_change_is_found():
    net, x = Dense(), torch.randn(3, 64) * 2
    ours = convert(net, x)
    ours.lif2.threshold *= 1.5
    with pytest.raises(InteropError, match=r"does not fire as the original: .* of neuron 'lif2'"):
        check_same_spikes(net, ours, x)
