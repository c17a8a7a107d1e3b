"""BESTformer: published counts, distillation, teachers, recipes."""
from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from bitspike import teachers  # noqa: E402
from bitspike.checkpoints import build, load_run  # noqa: E402
from bitspike.data import Dataset, load  # noqa: E402
from bitspike.evaluation import normalise  # noqa: E402
from bitspike.layers import latent_weight, quantizable, quantizer_of  # noqa: E402
from bitspike.models import bestformer as models  # noqa: E402
from bitspike.objectives import classification_loss  # noqa: E402
from bitspike.optimizers import learning_rate  # noqa: E402
from bitspike.papers import bestformer as paper  # noqa: E402
from bitspike.quantizers import Binary, MaxScale  # noqa: E402
from bitspike.recipe import Recipe, RecipeError  # noqa: E402
from bitspike.teachers import load_teacher  # noqa: E402
from bitspike.training import train  # noqa: E402

CPU = torch.device("cpu")


def tiny(num_classes: int = 10) -> models.BESTformer:
    return models.small(num_classes, channels=16, depth=1, heads=2)


def tiny_teacher() -> nn.Module:
    return paper.teacher_cnn(widths=(8, 8, 8))


SMALL = replace(paper.RECIPES["bestformer.cifar10_small"], model=tiny, data="fashion_mnist_sample", image_size=28,
                mean=(0.3,) * 3, std=(0.3,), epochs=0.1, warmup_epochs=0.0, batch_size=50, precision="fp32")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("fashion_mnist_sample", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    recipe = replace(paper.RECIPES["bestformer.teacher_cifar10"], model=tiny_teacher, data="fashion_mnist_sample",
                     image_size=28, epochs=0.2, warmup_epochs=0.0, batch_size=100, precision="fp32", lr=0.02)
    train(recipe, data, folder)
    return folder


# --------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(("name", "parameters"), [("bestformer.cifar10", 9_314_884), ("bestformer.cifar100", 9_384_184)])
def test_counts_of_the_paper(name, parameters):
    recipe = paper.RECIPES[name]
    with torch.device("meta"):
        model = recipe.model(**recipe.model_options)
        assert sum(p.numel() for p in model.parameters()) == parameters
        binary = [layer for layer in quantizable(build(recipe)).values() if isinstance(quantizer_of(layer), Binary)]
    assert round(sum(latent_weight(layer).numel() for layer in binary) / 1e6, 3) == 9.276


@pytest.mark.parametrize("name", [name for name in paper.RECIPES if name.endswith("cifar10_small")])
def test_the_small_recipe_has_what_a_device_holds(name):
    kinds = {layer: type(quantizer_of(module)) for layer, module in quantizable(build(paper.RECIPES[name])).items()}
    ends = {layer for layer, kind in kinds.items() if kind is MaxScale}
    assert ends == {"tokenizer.stages.0.conv", "head", "head2"} and set(kinds.values()) == {Binary, MaxScale}


def test_the_learning_rate_of_the_logs():
    """lr_e = 1e-5 + (1.4142e-3 - 1e-5) / 2 (1 + cos(pi e / 400)) from epoch 0 on; the logs have 1.147e-3 and 6.34e-5."""
    recipe, steps = paper.RECIPES["bestformer.cifar10"], 97
    rates = [learning_rate(recipe, epoch * steps, 400 * steps, steps) for epoch in (0, 20, 115, 350)]
    assert rates == pytest.approx([1e-5, 1.4055e-3, 1.1467e-3, 6.34e-5], rel=1e-3)
    later = [learning_rate(replace(recipe, schedule="cosine"), epoch * steps, 400 * steps, steps) for epoch in (20, 115)]
    assert later == pytest.approx([1.414e-3, 1.2076e-3], rel=1e-3)


# -------------------------------------------------------------------------------------------- distillation
def test_enhancement_is_its_formula(monkeypatch):
    told = torch.randn(4, 10) * 3
    monkeypatch.setattr(paper, "load_teacher", lambda recipe, classes, device: lambda images: told)
    images, y, heads = torch.randn(4, 3, 28, 28), torch.tensor([1, 2, 3, 4]), (torch.randn(4, 10), torch.randn(4, 10))
    for share, labels, tau in ((0.5, "hard", 1.0), (0.3, "soft", 2.0), (1.0, "soft", 1.0)):
        recipe = replace(SMALL, distill=share, teacher="x", teacher_labels=labels, temperature=tau)
        loss = paper.information_enhancement(tiny(), recipe, classification_loss(recipe))
        if labels == "hard":
            term = F.cross_entropy(heads[1], told.argmax(1))
        else:
            p, q = F.softmax(told / tau, 1), F.softmax(heads[1] / tau, 1)
            term = tau**2 * (p * (p / q).log()).sum(1).mean()
        own = F.cross_entropy(heads[0], y, label_smoothing=0.1)
        assert torch.allclose(loss(images, heads, y), (1 - share) * own + share * term, atol=1e-5)
    plain = replace(SMALL, distill=0.0)
    ordinary = classification_loss(plain)
    assert paper.information_enhancement(tiny(), plain, ordinary) is ordinary


def test_what_distillation_refuses(run):
    loss = classification_loss(SMALL)
    with pytest.raises(RecipeError, match="needs a teacher: a run"):
        paper.information_enhancement(tiny(), SMALL, loss)
    with pytest.raises(RecipeError, match=r"distill=2.0: allowed here: 0\.\.1"):
        paper.information_enhancement(tiny(), replace(SMALL, distill=2.0, teacher=str(run)), loss)
    with pytest.raises(RecipeError, match=r"temperature=0\.0"):
        replace(SMALL, temperature=0.0)


@pytest.mark.parametrize("settings", [
    {"regulation": 0.5}, {"distill": 0.0, "teacher": "x"}, {"distill": 0.0, "temperature": 2.0},
    {"teacher": "x", "temperature": 2.0}, {"distill": 0.0, "teacher_labels": "soft"}])
def test_what_would_have_no_effect_is_refused(settings):
    name = list(settings)[-1]
    with pytest.raises(RecipeError, match=f"field {name}=.*its objective reads"):
        paper.information_enhancement(tiny(), replace(SMALL, **settings), classification_loss(SMALL))


def test_training_with_a_run_as_teacher(tmp_path, data, run):
    final = train(replace(SMALL, teacher=str(run)), data, tmp_path)
    assert final["test_n"] == 1000
    model, recipe = load_run(tmp_path, replace(SMALL, teacher=str(run)))
    assert recipe.teacher == str(run) and model(torch.zeros(1, 3, 28, 28)).shape == (1, 10)


# ------------------------------------------------------------------------------------------------ teachers
def test_a_teacher_sees_pixels_normalised_its_own_way(run, data):
    """The student's images, turned back to pixels and normalised as the teacher was trained."""
    model, theirs = load_run(run)
    pixels = data.test.images[:6]
    told = load_teacher(replace(SMALL, teacher=str(run)), 10, CPU)(normalise(pixels, SMALL))
    with torch.no_grad():
        assert torch.allclose(told, model(normalise(pixels, theirs)), atol=1e-4)
    with pytest.raises(RecipeError, match="tells 10 classes apart, the student 100"):
        load_teacher(replace(SMALL, teacher=str(run)), 100, CPU)(normalise(pixels, SMALL))


@pytest.mark.parametrize(("kind", "name"), [("torchvision", "mobilenet_v3_small"), ("timm", "mobilenetv3_small_050")])
def test_classifiers_of_other_packages(tmp_path, kind, name):
    if kind == "torchvision":
        from torchvision.models import get_model
        model = get_model(name, num_classes=10)
    else:
        import timm
        model = timm.create_model(name, num_classes=10)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    recipe = replace(SMALL, teacher=f"{kind}:{name}:{tmp_path / 'w.pth'}")
    x = torch.randn(2, 3, 32, 32)
    told = load_teacher(recipe, 10, CPU)(x)
    mean, std = (torch.tensor(v)[:, None, None] for v in teachers._IMAGENET)
    theirs = F.interpolate((x * 0.3 + 0.3 - mean) / std, size=(224, 224), mode="bilinear")
    with torch.no_grad():
        assert torch.allclose(told, model(theirs), atol=1e-4)
    for text, message in ((f"{kind}:{name}", "NAME:WEIGHTS"), (f"{kind}:no_such_net:x", "a network of"),
                          (f"{kind}:{name}:nowhere.pth", "a file"), (f"{kind}:{name}:{__file__}", "weights that can be read")):
        with pytest.raises(RecipeError, match=message):
            load_teacher(replace(SMALL, teacher=text), 10, CPU)


@pytest.mark.parametrize(("file", "message"), [("net.bitspike", "give the RUN it was exported from"),
                                               ("net.pth", "'torchvision:NAME:WEIGHTS'")])
def test_a_file_is_no_teacher(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(RecipeError, match=f"field teacher=.*the RUN folder.*{message}"):
        load_teacher(replace(SMALL, teacher=str(tmp_path / file)), 10, CPU)


@pytest.mark.parametrize(("text", "module", "function"), [
    ("torchvision:mobilenet_v3_small:IMAGENET1K_V1", "torchvision.models", "get_model"),
    ("timm:mobilenetv3_small_050:pretrained", "timm", "create_model")])
def test_without_a_network_the_message_names_the_field(monkeypatch, text, module, function):
    def offline(*arguments, **options):
        raise ConnectionError("name resolution\nfailed")

    monkeypatch.setattr(importlib.import_module(module), function, offline)
    with pytest.raises(RecipeError, match=f"field teacher='{text}'.*name resolution failed.*give the file"):
        load_teacher(replace(SMALL, teacher=text), 10, CPU)


def test_weights_of_another_network(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RecipeError, match="weights of that network"):
        load_teacher(replace(SMALL, teacher=f"torchvision:mobilenet_v3_small:{tmp_path / 'w.pth'}"), 10, CPU)


def test_every_recipe_says_what_it_claims_and_costs():
    for recipe in paper.RECIPES.values():
        assert isinstance(recipe, Recipe) and recipe.claim and recipe.name in recipe.cost
