"""Q-SNN: published counts and sizes, regulation, recipes."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from torch.nn import functional as F  # noqa: E402

from bitspike import cost  # noqa: E402
from bitspike.checkpoints import build, load_run  # noqa: E402
from bitspike.data import load  # noqa: E402
from bitspike.layers import latent_weight, neurons_with_membrane, quantizable, quantizer_of  # noqa: E402
from bitspike.models import spiking_resnet  # noqa: E402
from bitspike.objectives import classification_loss  # noqa: E402
from bitspike.papers import q_snn as paper  # noqa: E402
from bitspike.quantizers import Binary, MaxScale, Membrane  # noqa: E402
from bitspike.recipe import RecipeError  # noqa: E402
from bitspike.spec import QuantSpec  # noqa: E402
from bitspike.training import train  # noqa: E402


# --------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(("name", "weights", "megabytes"), [
    ("q_snn.cifar10_resnet19", 12_558_720, 1.577), ("q_snn.cifar100_resnet19", 12_604_800, 1.623),
    ("q_snn.imagenet_resnet18", None, 1.916), ("q_snn.cifar10_dvs_vgg", None, 1.199)])
def test_sizes_of_the_paper(name, weights, megabytes):
    with torch.device("meta"):
        model = build(paper.RECIPES[name])
    sizes = [(latent_weight(layer).numel(), quantizer_of(layer).bits) for layer in quantizable(model).values()]
    assert weights is None or sum(count for count, _ in sizes) == weights
    assert round(cost.published_bytes(sizes) / 1e6, 3) == megabytes
    assert all(isinstance(neuron.membrane, Membrane) for neuron in neurons_with_membrane(model).values())


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_spec(bits):
    recipe = replace(paper.RECIPES["q_snn.cifar10_small"], spec=paper.spec("stem.conv", bits), model=tiny)
    model = build(recipe)
    kinds = {name: quantizer_of(layer) for name, layer in quantizable(model).items()}
    assert isinstance(kinds["stem.conv"], MaxScale) and isinstance(kinds["head"], MaxScale)
    inner = [quantizer for name, quantizer in kinds.items() if name not in ("stem.conv", "head")]
    assert all(isinstance(q, Binary) and (q.gradient, q.scale) == ("ir_net", "pow2") for q in inner)
    membranes = [neuron.membrane for neuron in neurons_with_membrane(model).values()]
    assert membranes and all(m.bits == bits and m.tanh for m in membranes)  # the tanh stays where the rounding goes
    assert QuantSpec.from_json(recipe.spec.to_json()) == recipe.spec


@pytest.mark.parametrize(("file", "options"), [
    *((f"q_snn_membrane_{bits}.json", {"membrane": bits}) for bits in (8, 4, 2, 32)),
    ("q_snn_unregulated.json", {"regulated": False})])
def test_the_example_specs_are_those_of_the_paper(file, options):
    path = Path(__file__).parents[2] / "examples" / "specs" / file
    if not path.exists():
        pytest.skip("the examples are not beside the tests")
    recipe = paper.RECIPES["q_snn.cifar10_small"].override({"spec": str(path)})
    assert recipe.spec == paper.spec("stem.conv", **options)


def test_without_regulation_the_weights_are_the_plain_sign_times_the_mean():
    """sign(w) mean|w|, of weights whose mean is far from zero: normalised, half of them would change sign."""
    model = build(replace(paper.RECIPES["q_snn.cifar10_small"], spec=paper.spec("stem.conv", regulated=False), model=tiny))
    layer = next(layer for layer in quantizable(model).values() if isinstance(quantizer_of(layer), Binary))
    latent = latent_weight(layer)
    with torch.no_grad():
        latent.abs_().add_(0.1)
    layer.weight.sum().backward()
    means = latent.detach().abs().mean((1, 2, 3), keepdim=True)
    assert torch.equal(layer.weight, means.expand_as(latent))
    assert torch.allclose(latent.grad, means.expand_as(latent))  # straight through, times the scale


def test_the_float_twin_differs_in_its_bits_alone():
    twin = build(paper.RECIPES["q_snn.cifar10_small_float"])
    assert all(quantizer_of(layer) is None for layer in quantizable(twin).values())
    membranes = [neuron.membrane for neuron in neurons_with_membrane(twin).values()]
    assert membranes and all(m.bits == 32 and m.tanh for m in membranes)


# ---------------------------------------------------------------------------------------------- regulation
def tiny() -> spiking_resnet.SpikingResNet:
    return spiking_resnet.small(widths=(8, 8), depths=(1, 1))


def test_regulation_is_its_formula():
    torch.manual_seed(0)
    model, x, y = tiny().train(), torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    rates = []
    neurons = list(neurons_with_membrane(model).values())
    handles = [n.register_forward_hook(lambda module, inputs, output: rates.append(output.mean())) for n in neurons]
    with torch.no_grad():
        logits_TBK = model(x)
    for handle in handles:
        handle.remove()
    recipe = replace(paper.RECIPES["q_snn.cifar10_small"], regulation=0.3, label_smoothing=0.0)
    loss = paper.regulated(model, recipe, classification_loss(recipe))
    found = loss(x, model(x), y)
    wanted = torch.stack([F.cross_entropy(logits, y) for logits in logits_TBK]).mean()
    wanted = wanted + 0.3 * torch.stack([(rate - 0.5) ** 2 for rate in rates[1:-1]]).mean()
    assert len(rates) == 5 and torch.allclose(found, wanted, atol=1e-5)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())
    off = replace(recipe, regulation=0.0)
    assert torch.allclose(paper.regulated(tiny(), off, None)(x, logits_TBK, y),
                          torch.stack([F.cross_entropy(logits, y) for logits in logits_TBK]).mean())
    with pytest.raises(ValueError, match="needs three"):
        paper.spike_regulation({"a": torch.tensor(0.1), "b": torch.tensor(0.2)})


@pytest.mark.parametrize("settings", [{"distill": 0.5}, {"teacher": "run"}, {"teacher_labels": "soft"}, {"temperature": 2.0}])
def test_what_would_have_no_effect_is_refused(settings):
    recipe = replace(paper.RECIPES["q_snn.cifar10_small"], **settings)
    with pytest.raises(RecipeError, match=f"field {next(iter(settings))}=.*reads only regulation"):
        paper.regulated(tiny(), recipe, classification_loss(recipe))


def test_training_stores_the_annealing_and_the_membranes(tmp_path):
    recipe = replace(paper.RECIPES["q_snn.cifar10_small"], model=tiny, data="fashion_mnist_sample", image_size=28,
                     epochs=0.1, warmup_epochs=0.0, batch_size=50, precision="fp32")
    train(recipe, load("fashion_mnist_sample", None), tmp_path)
    model, _ = load_run(tmp_path, recipe)
    progress = {float(q.progress) for layer in quantizable(model).values()
                if isinstance(q := quantizer_of(layer), Binary)}
    assert len(progress) == 1 and 0.5 < progress.pop() < 1
    assert all(0 < float(n.membrane.bound) <= 1 for n in neurons_with_membrane(model).values())


def test_every_recipe_says_what_it_claims_and_costs():
    for recipe in paper.RECIPES.values():
        assert recipe.claim and recipe.name in recipe.cost
