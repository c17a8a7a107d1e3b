"""What holds for every model."""
from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402

from bitspike.layers import quantizable, quantize_, quantizers  # noqa: E402
from bitspike.models.blocks import LayerScale, NormPad  # noqa: E402
from bitspike.neurons import IELIF, LIF  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

from .zoo import MODELS, batch, lively, logits  # noqa: E402


def make(name, seed=0):
    torch.manual_seed(seed)
    model, shape = MODELS[name]
    return lively(model()), batch(shape)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_gradient(name):
    model, x = make(name)
    quantize_(model, QuantSpec({"*": Scheme("lsq", 4)}))
    logits(model.train()(x)).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter_name, p in trained.items():
        assert p.grad is not None, parameter_name
        assert torch.isfinite(p.grad).all(), parameter_name
    silent = [n for n, p in trained.items() if not (p.grad != 0).any()]
    # a convolution's bias in front of a norm has no effect, up to rounding
    assert not [n for n in silent if not n.endswith("conv.bias")]


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_two_is_two_batches_of_one(name):
    model, x = make(name)
    model.double().eval()
    axis = 1 if x.dim() == 5 else 0
    with torch.no_grad():
        one_by_one = torch.cat([model(part.double()) for part in x.split(1, axis)])
        torch.testing.assert_close(model(x.double()), one_by_one, rtol=1e-9, atol=1e-9)
    assert one_by_one.shape == (2, 5)
    assert one_by_one[0].ne(one_by_one[1]).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16(name, training):
    model, x = make(name)
    quantize_(model, QuantSpec({"*": Scheme("lsq", 4)}))
    model.train(training).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model(x))
    assert torch.isfinite(y).all()
    if training:
        y.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_quantizers_begin_in_evaluation_too(name):
    model, x = make(name)
    quantize_(model, QuantSpec({"*": Scheme("lsq", 4)}))
    model.eval()
    with torch.no_grad():
        first = model(x)
    assert all(bool(q.initialized) for _, q in quantizers(model))
    other = quantize_(make(name, seed=1)[0], QuantSpec({"*": Scheme("lsq", 4)}))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), first)
    assert torch.equal(copy.deepcopy(model)(x), first)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, LIF | IELIF | NormPad | LayerScale) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("name", MODELS)
def test_traces_to_few_kinds_of_nodes(name):
    model, _ = make(name)
    graph = Tracer().trace(model)
    functions = {n.target.__name__ for n in graph.nodes if n.op == "call_function"}
    modules = {type(model.get_submodule(n.target)).__name__ for n in graph.nodes if n.op == "call_module"}
    assert functions <= {"add", "mul", "as_sequence", "spike_attention", "spike_attention_map", "spike_attention_read",
                         "spike_coincidences", "spike_mask"}
    assert {n.target for n in graph.nodes if n.op == "call_method"} <= {"mean", "flatten"}
    assert modules <= {"Conv2d", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "Linear", "IELIF", "LIF", "NormPad", "LayerScale"}
    used = {n.target for n in graph.nodes if n.op == "call_module"}
    assert used >= set(quantizable(model))


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(("strict", "cifar", "compact"))])
@pytest.mark.parametrize("training", [True, False])
def test_strict_products_have_counts_on_one_side(name, training):
    """Every convolution and linear layer but the first, and both products of the attention, see counts times a scale."""
    model, x = make(name)
    model.double().train(training)
    checked, origin = {}, {}

    def remember(module, inputs, output):
        origin[id(output)] = module, output

    def inspect(layer_name):
        def hook(module, inputs):
            (s,) = inputs
            flat = s._base if s._base is not None else s
            neuron = next((m for m, out in origin.values() if out.data_ptr() == flat.data_ptr()), None)
            assert neuron is not None, f"{layer_name}: its input comes from no neuron"
            counts = s / neuron.scale
            assert torch.equal(counts, counts.round()), layer_name
            assert float(counts.min()) >= 0, layer_name
            assert float(counts.max()) <= neuron.levels, layer_name
            checked[layer_name] = float(counts.mean())
        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, LIF | IELIF):
            module.register_forward_hook(remember)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(inspect(module_name))
        if module_name == "stem.conv":
            module._forward_pre_hooks.clear()
    with torch.no_grad():
        model(x.double())
    assert set(checked) == set(quantizable(model)) - {"stem.conv"}
    assert all(mean > 0 for mean in checked.values()), "the test is empty for a silent layer"
    for parent in model.modules():  # attention reads its neurons directly
        for part in ("q_neuron", "k_neuron", "v_neuron", "attention_neuron"):
            if hasattr(parent, "qkv"):
                assert isinstance(getattr(parent, part), LIF | IELIF)


def test_published_topology_has_real_valued_inputs_in_between():
    """The counterpart of the strict proof: the hooks above would notice."""
    model, x = make("published")
    real = []
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module_name != "stem.conv":
            module.register_forward_pre_hook(
                lambda _m, inputs, n=module_name: real.append(n) if (inputs[0] * 4).frac().any() else None)
    with torch.no_grad():
        model.double().eval()(x.double())
    inner = ("depthwise", "project.conv")
    assert real
    assert all(n.endswith(inner) for n in real)
