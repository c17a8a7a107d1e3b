"""Loss and measures of segmentation, against sums written out and against torchmetrics' own."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")

from torch import nn  # noqa: E402

from bitspike.data import Arrays, Dataset  # noqa: E402
from bitspike.data.scenes import VOID  # noqa: E402
from bitspike.recipe import Recipe, RecipeError  # noqa: E402
from bitspike.tasks import task_of  # noqa: E402
from bitspike.tasks.segmentation import SegmentationMeter, enlarged, pixel_loss, predicted_logits  # noqa: E402

RECIPE = Recipe("x", nn.Identity, task="segmentation", data="camvid")


def meter(classes=4):
    return SegmentationMeter(RECIPE, classes, torch.device("cpu"))


def given(logits, truth):
    h, w = truth.shape[-2:]
    size = torch.tensor([h, w])
    return [{"semantic": t, "canvas": size, "size": size, "original_size": size} for t in truth]


def test_loss_by_hand():
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0, 0] = 1.0
    truth = torch.tensor([[[1, VOID]]])
    assert float(pixel_loss(logits, truth)) == pytest.approx(math.log(1 + math.exp(-1)) / 2)


def test_loss_of_a_batch_is_the_mean_of_its_parts():
    torch.manual_seed(0)
    logits, truth = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 10, 10))
    truth[0, :7] = VOID
    whole = pixel_loss(logits, truth)
    parts = torch.stack([pixel_loss(logits[i : i + 2], truth[i : i + 2]) for i in (0, 2)]).mean()
    assert torch.allclose(whole, parts)


def test_the_auxiliary_head_is_weighed():
    torch.manual_seed(0)
    out, aux, truth = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2), torch.randint(3, (1, 8, 8))
    loss = task_of(RECIPE).loss(RECIPE.override({"auxiliary": "0.4"}))(out, {"out": out, "aux": aux}, truth)
    assert torch.allclose(loss, pixel_loss(out, truth) + 0.4 * pixel_loss(aux, truth))


def test_measures_by_hand():
    found = meter(3)
    truth = torch.tensor([[[0, 0, 1, VOID]]], dtype=torch.uint8)
    says = torch.tensor([0, 1, 1, 2])
    found.add(10 * nn.functional.one_hot(says, 3).float().T.reshape(1, 3, 1, 4), given(None, truth))
    result = found.compute()
    # class 0: 1 of 2; class 1: 1 of 2; class 2 occurs nowhere but under the void
    assert result["miou"] == 50.0 and result["pixel_accuracy"] == pytest.approx(66.6667) and result["n"] == 1


def test_measures_are_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    torch.manual_seed(1)
    logits, truth = torch.randn(3, 4, 6, 7), torch.randint(4, (3, 6, 7))
    truth[:, 0] = VOID
    found = meter()
    found.add(logits[:2], given(None, truth[:2]))
    found.add(logits[2:], given(None, truth[2:]))
    result = found.compute()
    index = MulticlassJaccardIndex(4, ignore_index=VOID)(logits.argmax(1), truth)
    accuracy = MulticlassAccuracy(4, average="micro", ignore_index=VOID)(logits.argmax(1), truth)
    assert result["miou"] == pytest.approx(100 * float(index), abs=1e-3)
    assert result["pixel_accuracy"] == pytest.approx(100 * float(accuracy), abs=1e-3)
    mean = nn.functional.cross_entropy(logits, truth, ignore_index=VOID)
    assert result["loss"] == pytest.approx(float(mean), rel=1e-5)


def test_the_padding_is_cut_before_the_picture_is_enlarged():
    logits = torch.randn(3, 8, 8)
    found = predicted_logits(logits, (32, 32), (32, 20), (64, 40))
    assert found.shape == (3, 64, 40)
    assert torch.equal(found, enlarged(enlarged(logits[None], 32, 32)[..., :20], 64, 40)[0])


def test_another_number_of_classes_is_an_error():
    with pytest.raises(RecipeError, match=r"needs \[B, 4, h, w\]"):
        meter().add(torch.zeros(1, 3, 2, 2), given(None, torch.zeros(1, 2, 2, dtype=torch.uint8)))


def test_data_of_another_task():
    split = Arrays(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="these have a class a picture"):
        task_of(RECIPE).batches(RECIPE.override({"batch_size": "2"}), Dataset("x", ("a",), split, split, split, ""))


@pytest.mark.parametrize("key, value, message", [
    ("mixup", "0.5", "task='segmentation' does not use it"), ("label_smoothing", "0.1", "does not use it"),
    ("flip", "alternating", r"none \| random"), ("crop", "random_resized", r"whole \| random"),
    ("scales", "2,1", "two in order"), ("schedule", "steps", "drop_epochs"), ("window", "-1", "a multiple of 32"),
])
def test_fields_that_cannot_be_meant(key, value, message):
    with pytest.raises(RecipeError, match=message):
        RECIPE.override({key: value})


@pytest.mark.parametrize("key, value", [
    ("scales", "0.5,2"), ("window", "64"), ("pictures", "3"), ("auxiliary", "1"), ("colour_jitter", "0.1"),
    ("long_side", "99"), ("skip_broken", "yes"), ("crop", "random")])
def test_fields_that_classification_does_not_know(key, value):
    with pytest.raises(RecipeError, match=r"does not use it|whole \| random_resized"):
        Recipe("x", nn.Identity).override({key: value})
