"""Recipes of segmentation: the published schedule, specs that find their layers, a start from ImageNet weights."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from bitspike.checkpoints import build  # noqa: E402
from bitspike.data.catalogue import NAMES  # noqa: E402
from bitspike.layers import quantizable, quantizer_of  # noqa: E402
from bitspike.models.meta_spikeformer import MetaSpikeFormer  # noqa: E402
from bitspike.optimizers import learning_rate, parameter_groups  # noqa: E402
from bitspike.papers import all_recipes, qsd_segmentation  # noqa: E402
from bitspike.recipe import RecipeError  # noqa: E402

ADE = qsd_segmentation.RECIPES["qsd_transformer.ade20k_15m"]


@pytest.mark.parametrize("name", qsd_segmentation.RECIPES)
def test_recipe(name):
    recipe = qsd_segmentation.RECIPES[name]
    assert recipe.name == name and recipe.claim and f"bitspike train {name} " in recipe.cost
    assert recipe.data in NAMES and recipe.task == "segmentation" and all_recipes()[name] is recipe


@pytest.mark.parametrize("name, wanted", [("camvid_small", ("",)), ("camvid_small_float", ()), ("ade20k_15m", ("backbone.",))])
def test_the_spec(name, wanted):
    model = build(qsd_segmentation.RECIPES[f"qsd_transformer.{name}"])
    layers = quantizable(model)
    assert {n for n, layer in layers.items() if quantizer_of(layer) is not None} == {n for n in layers if n.startswith(wanted)}
    assert model.strides == (4, 8, 16)


def test_the_published_schedule():
    per_epoch = (20210 - 1011) // 16
    steps = round(ADE.epochs * per_epoch)
    assert steps == 160_000 and ADE.lr == 1e-3 and ADE.weight_decay == 5e-3
    rates = [learning_rate(ADE, step, steps, per_epoch) for step in (0, 1500, 80_750, steps - 1)]
    assert rates == pytest.approx([1e-6, 1e-3, 5e-4, 0], abs=1e-8)


def test_neck_and_head_learn_twice_as_fast():
    model = build(ADE.override({"model_options.size": "8m", "spec": "none"}))
    fast = {id(p) for group in parameter_groups(model, ADE) if group["lr_scale"] == 2 for p in group["params"]}
    assert fast == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert all(group["weight_decay"] == 0 for group in parameter_groups(model, ADE) if group["params"][0].dim() == 1)


def tiny(levels=4):
    return MetaSpikeFormer((8, 8, 16, 16), (1, 1), heads=2, num_classes=7)


def test_start_from_imagenet(imagenet_file, monkeypatch):
    monkeypatch.setitem(qsd_segmentation.SIZES, "tiny", tiny)
    torch.manual_seed(1)
    trained = tiny()
    start = imagenet_file(trained)
    torch.manual_seed(2)
    taken = qsd_segmentation.ade20k_semantic_fpn(size="tiny", start=start).backbone.state_dict()
    assert taken and all(torch.equal(value, trained.state_dict()[name]) for name, value in taken.items())
    recipe = ADE.override({"model_options.size": "tiny"})
    with pytest.raises(RecipeError, match="starts from trained ImageNet weights"):
        recipe.objective(tiny(), recipe, lambda *_: torch.zeros(()))
    with pytest.raises(ValueError, match=r"size='9m'; allowed: 8m, 15m"):
        qsd_segmentation.ade20k_semantic_fpn(size="9m")
