"""Recipes on COCO: published sizes, specs that find their layers, errors."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from bitspike.checkpoints import build  # noqa: E402
from bitspike.data.catalogue import NAMES  # noqa: E402
from bitspike.layers import quantizable, quantizer_of  # noqa: E402
from bitspike.models.detection import MaskRCNN  # noqa: E402
from bitspike.models.meta_spikeformer import MetaSpikeFormer  # noqa: E402
from bitspike.papers import all_recipes, qsd_coco  # noqa: E402
from bitspike.recipe import RecipeError  # noqa: E402


@pytest.mark.parametrize("name", qsd_coco.RECIPES)
def test_recipe(name):
    recipe = qsd_coco.RECIPES[name]
    assert recipe.name == name
    assert recipe.claim
    assert f"bitspike train {name} " in recipe.cost
    assert recipe.data in NAMES
    assert all_recipes()[name] is recipe
    if "31m" in name:
        return
    model = build(recipe)
    quantized = {layer for layer, module in quantizable(model).items() if quantizer_of(module) is not None}
    if "small" in name or "overfit" in name:
        assert quantized == (set() if name.endswith("float") else set(quantizable(model)))
        if "from_cifar" in name:
            assert model.strides == (8, 16, 32)
            with pytest.raises(RecipeError, match="starts from a network trained on CIFAR-10"):
                recipe.objective(model, recipe, lambda *_: torch.zeros(()))
    else:
        assert quantized == {layer for layer in quantizable(model) if layer.startswith("dense.backbone.")}
        assert model.strides == ((4, 8, 16, 32, 64) if isinstance(model, MaskRCNN) else (8, 16, 32, 64, 128))
        with pytest.raises(RecipeError, match="starts from trained ImageNet weights"):
            recipe.objective(model, recipe, lambda *_: torch.zeros(()))


def tiny(levels=4):
    return MetaSpikeFormer((8, 8, 16, 16), (1, 1), heads=2, num_classes=7)


@pytest.mark.parametrize("detector", [qsd_coco.coco_mask_rcnn, qsd_coco.coco_retinanet])
def test_start_from_imagenet(imagenet_file, monkeypatch, detector):
    monkeypatch.setitem(qsd_coco.SIZES, "tiny", (tiny, 8, 16))
    torch.manual_seed(1)
    trained = tiny()
    start = imagenet_file(trained)
    torch.manual_seed(2)
    model = detector(size="tiny", start=start)
    taken = model.backbone.state_dict()
    assert not any(name.startswith("head") for name in taken)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in taken.items())
    recipe = qsd_coco.RECIPES["qsd_transformer.coco_mask_rcnn_15m"].override({"model_options.start": start})
    loss = object()
    assert recipe.objective(model, recipe, loss) is loss


def test_unknown_size():
    with pytest.raises(ValueError, match="size='7b'; allowed: 8m, 15m, 31m"):
        qsd_coco.coco_mask_rcnn(size="7b")


def test_warm_up_is_a_thousand_steps():
    recipe = qsd_coco.RECIPES["qsd_transformer.coco_mask_rcnn_15m"]
    steps_per_epoch = 117266 // recipe.batch_size
    assert abs(recipe.warmup_epochs * steps_per_epoch - 1000) < 1
