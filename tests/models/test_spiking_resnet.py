"""Q-SNN's ResNets and the spiking VGG: counts, shapes, spikes, published weights."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitspike.layers import neurons_with_membrane, quantizable, quantize_  # noqa: E402
from bitspike.models import spiking_resnet as sr  # noqa: E402
from bitspike.models.published import PublishedWeightsError  # noqa: E402
from bitspike.neurons import LIF, Triangle  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

from .zoo import batch, lively  # noqa: E402


@pytest.mark.parametrize(("size", "classes", "weights", "first", "head"), [
    (sr.cifar_resnet19, 10, 12_558_720, 3_456, 5_120), (sr.cifar_resnet19, 100, 12_604_800, 3_456, 51_200),
    (sr.imagenet_resnet18, 1000, 11_678_912, 9_408, 512_000), (sr.dvs_vgg, 10, 9_263_232, 1_152, 46_080)])
def test_counts(size, classes, weights, first, head):
    with torch.device("meta"):
        model = size(classes)
    counts = [layer.weight.numel() for layer in quantizable(model).values()]
    assert (sum(counts), counts[0], counts[-1]) == (weights, first, head)
    assert len(neurons_with_membrane(model)) == {sr.cifar_resnet19: 17, sr.imagenet_resnet18: 17, sr.dvs_vgg: 8}[size]


@pytest.mark.parametrize(("size", "options", "shape", "steps"), [
    (sr.SpikingResNet, {"widths": (8, 16, 32), "depths": (1, 2, 1)}, (2, 3, 16, 16), 2),
    (sr.SpikingResNet, {"widths": (8, 16), "depths": (1, 1), "stem": (7, 2), "pool": True, "time_steps": 4}, (2, 3, 40, 32), 4),
    (sr.SpikingVGG, {"widths": (8, 0, 8, 0), "size": 13}, (3, 2, 2, 13, 13), 3)])
def test_logits_of_every_step(size, options, shape, steps):
    torch.manual_seed(0)
    model = lively(size(num_classes=5, **options)).eval()
    x = batch(shape)
    with torch.no_grad():
        every = model(x)
        model.per_step = False
        assert torch.equal(model(x), every.mean(0))
    assert every.shape == (steps, 2, 5)
    assert every[0].ne(every[1]).any()


def test_resolution_of_the_stages():
    model = sr.imagenet_resnet18(10)
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _x, out: shapes.append(list(out.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 1, 3, 64, 64))
    assert shapes == [[1, 1, 64, 16, 16], [1, 1, 128, 8, 8], [1, 1, 256, 4, 4], [1, 1, 512, 2, 2]]
    assert [[block.shortcut is not None for block in stage] for stage in model.stages] == [[False, False]] + 3 * [[True, False]]


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_what_convolutions_see(pool):
    """Spikes, but for the first one; the published mean over pixels of the VGG gives quarters."""
    for model, x in ((sr.SpikingResNet((8, 16), (2, 1), 5), batch((2, 3, 16, 16))),
                     (sr.SpikingVGG((8, 0, 8, 8, 0), 5, size=16, pool=pool), batch((2, 2, 2, 16, 16)))):
        values = {}
        for name, module in lively(model).eval().named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(
                    lambda _m, x, name=name, values=values: values.__setitem__(name, set(x[0].unique().tolist())))
        with torch.no_grad():
            model(x)
        later = set().union(*list(values.values())[1:])
        assert len(next(iter(values.values()))) > 5
        assert later == ({0.0, 1.0} if pool == "max" or isinstance(model, sr.SpikingResNet) else {0, 0.25, 0.5, 0.75, 1})


def test_default_neuron():
    neuron = sr.cifar_resnet19().neuron
    assert isinstance(neuron, LIF)
    assert (neuron.decay, neuron.scale_input, neuron.detach_reset, neuron.strict) == (0.5, False, False, True)
    assert neuron.surrogate == Triangle()
    assert neuron(torch.tensor([[1.0, 1.1]])).tolist() == [[0.0, 1.0]]


def test_membranes_by_rule():
    model = quantize_(sr.SpikingResNet((8, 16), (1, 1), 5), QuantSpec({"*neuron*": Scheme("membrane", 4)}))
    assert all(neuron.membrane.bits == 4 for neuron in neurons_with_membrane(model).values())
    assert len(neurons_with_membrane(model)) == 5


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sr.SpikingResNet((8, 8), (1,)), "one number per stage"), (lambda: sr.SpikingResNet(time_steps=0), "time_steps=0"),
    (lambda: sr.SpikingVGG((0, 8)), "begins with a convolution"),
    (lambda: sr.SpikingVGG((8, 0, 8, 0), size=3), "leave a pixel"),
    (lambda: sr.SpikingVGG(pool="sum"), "'mean'"), (lambda: sr.SpikingVGG(time_steps=0), "time_steps=0")])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------- published weights
def aliases(layer):
    """The released names of one of our layers; the release registers most of them several times."""
    if layer == "head":
        return ["fc.ops"]
    if layer.startswith("stem"):
        prefix, number, kind = "", "1", layer.removeprefix("stem.")
    else:
        _, stage, block, part, kind = layer.split(".")
        prefix, number = f"layer{int(stage) + 1}.{block}.", part[-1]
        if part == "shortcut":
            down = f"{prefix}downsample."
            return [f"{down}layer.module"] if kind == "conv" else [f"{down}bn.bn", f"{down}bn.seqbn.module"]
    if kind == "conv":
        return [f"{prefix}conv{number}", f"{prefix}conv{number}_s.layer.module"]
    return [f"{prefix}{name}{end}" for name in (f"bn{number}", f"conv{number}_s.bn") for end in (".bn", ".seqbn.module")]


def test_load_published_resnet():
    def tiny():
        return sr.SpikingResNet((8, 16), (2, 1), 5)

    source = lively(tiny())
    state = {}
    for name, value in source.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        for theirs in aliases(layer):
            assert sr.published_name(f"{theirs}.{leaf}") == name
            state[f"{theirs}.{leaf}"] = value.clone()
    model = sr.load_published(tiny(), state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    state["layer1.0.conv1_s.bn.seqbn.module.bias"] += 1  # one of four names
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PublishedWeightsError, match=r"layer1.0.bn1.bn.bias and layer1.0.conv1_s.bn.seqbn.module.bias are one"):
        sr.load_published(model, state)
    state["layer1.0.conv1_s.bn.seqbn.module.bias"] = state["layer1.0.bn1.bn.bias"]
    state["layer9.0.bn1.bias"] = state.pop("fc.ops.bias")
    with pytest.raises(PublishedWeightsError, match=r"(?s)1 missing: head.bias.*1 unexpected: layer9.0.bn1.bias"):
        sr.load_published(model, state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_load_published_vgg():
    def tiny():
        return sr.SpikingVGG((8, 0, 16, 0), 5, size=8)

    source = lively(tiny())
    state = {}
    for name, value in source.state_dict().items():
        theirs = name.replace(".conv.", ".fwd.module.0.").replace(".norm.", ".fwd.module.1.").replace(
            "head.", "classifier.0.module.")
        state[theirs] = value.clone()
    model = sr.load_published(tiny(), state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_names_of_modules():
    model = sr.SpikingResNet((8, 16), (2, 1), 5, stem=(7, 2), pool=True)
    for theirs, ours in {
        "lif1": "neuron", "layer1.0": "stages.0.0", "layer2": "stages.1", "layer2.0.lif2": "stages.1.0.neuron2",
        "layer2.0.downsample": "stages.1.0.shortcut", "layer1.1.conv2_s": "stages.0.1.conv2", "conv1_s": "stem", "fc": "head",
        "bn1": "stem.norm", "layer2.0.bn1": "stages.1.0.conv1.norm", "maxpool": "pool",
    }.items():
        assert sr.published_name(theirs) == ours
        model.get_submodule(ours)
