"""A trained network that another one learns from: a RUN of ours, or a classifier of torchvision or timm.

    RUN                                the folder of a finished `bitspike train`
    torchvision:NAME:WEIGHTS           such as torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1
    timm:NAME:WEIGHTS                  such as timm:resnet18:teacher.safetensors

WEIGHTS is a file of tensors (`.safetensors`, `.pth`), or for torchvision the name of published weights and for timm
"pretrained", which these packages download on first use.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.checkpoints import load_run
from bitspike.models.published import PublishedWeightsError, read_weights
from bitspike.objectives import autocast, prediction
from bitspike.recipe import Recipe, RecipeError

Teacher = Callable[[Tensor], Tensor]
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _View(nn.Module):
    """Images as the student sees them -> as the teacher does: its own size and normalisation, folded into one step."""

    factor: Tensor
    offset: Tensor

    def __init__(self, size: int | None, mean: tuple[float, ...], std: tuple[float, ...], student: Recipe) -> None:
        super().__init__()
        channels = max(len(mean), len(student.mean))
        theirs = [torch.tensor(v).expand(channels)[:, None, None] for v in (mean, std)]
        ours = [torch.tensor(v).expand(channels)[:, None, None] for v in (student.mean, student.std)]
        self.size = size
        # pixel = x * our std + our mean; what the teacher sees is (pixel - its mean) / its std
        self.register_buffer("factor", ours[1] / theirs[1])
        self.register_buffer("offset", (ours[0] - theirs[0]) / theirs[1])

    def forward(self, images: Tensor) -> Tensor:
        x = images if bool((self.factor == 1).all() and (self.offset == 0).all()) else images * self.factor + self.offset
        if self.size is not None and x.dim() == 4 and x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return x


def load_teacher(recipe: Recipe, classes: int, device: torch.device) -> Teacher:
    """The network that `recipe.teacher` names, frozen and in eval mode: images as the student sees them -> logits [B, K].

    Of a segmenter [B, K, h, w]; such a teacher sees the pictures at the student's size.

    classes: what the student tells apart; the teacher must have as many outputs. It runs in the recipe's precision.
    Errors: RecipeError for a text that names nothing, for a package or weights that are not there, and for another number
    of classes; RunError for a folder that is no run.
    """
    kind, _, rest = recipe.teacher.partition(":")
    name, _, weights = rest.partition(":")
    if kind in ("torchvision", "timm") and not Path(recipe.teacher).exists():
        if not name or not weights:
            raise _refuse(recipe, f"'{kind}:NAME:WEIGHTS', WEIGHTS being a file or {_published(kind)}")
        model, view = (_torchvision if kind == "torchvision" else _timm)(recipe, name, weights, classes)
    else:
        if Path(recipe.teacher).is_file():
            packed = recipe.teacher.endswith(".bitspike")
            raise _refuse(recipe, "the RUN folder of a 'bitspike train'" + (
                "; a .bitspike file is the integer program of a device, give the RUN it was exported from" if packed else
                "; weights of another package go behind its name, 'torchvision:NAME:WEIGHTS' or 'timm:NAME:WEIGHTS'"))
        model, theirs = load_run(recipe.teacher)
        view = _View(theirs.image_size if theirs.task == "classification" else None, theirs.mean, theirs.std, recipe)
    model, view = model.to(device).requires_grad_(False).eval(), view.to(device)
    checked = False

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        nonlocal checked
        with autocast(recipe, device):
            logits = prediction(model(view(images))).float()
        if not checked and logits.shape[1] != classes:
            raise RecipeError(f"recipe {recipe.name!r}: the teacher {recipe.teacher!r} tells {logits.shape[1]} classes apart, "
                              f"the student {classes}; train a teacher on {recipe.data}.")
        checked = True
        return logits

    return teach


def _refuse(recipe: Recipe, allowed: str) -> RecipeError:
    return RecipeError(f"recipe {recipe.name!r}, field teacher={recipe.teacher!r}: allowed: {allowed}.")


def _published(kind: str) -> str:
    return "the name of torchvision's weights" if kind == "torchvision" else "'pretrained'"


def _load_file(recipe: Recipe, model: nn.Module, weights: str) -> nn.Module:
    try:
        model.load_state_dict(read_weights(weights))
    except (FileNotFoundError, PublishedWeightsError) as error:
        raise _refuse(recipe, f"weights that can be read ({error})") from None
    except RuntimeError as error:
        raise _refuse(recipe, f"weights of that network ({str(error).splitlines()[-1].strip()})") from None
    return model


def _downloaded(recipe: Recipe, make: Callable[[], nn.Module]) -> nn.Module:
    """What a package makes of weights that it fetches; offline each package fails in a way of its own."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _refuse(recipe, f"weights that can be had, and here the package could not fetch them ({reason}); fetch them "
                              "where there is a network and give the file in place of their name") from error


def _torchvision(recipe: Recipe, name: str, weights: str, classes: int) -> tuple[nn.Module, _View]:
    from torchvision import models

    if name not in models.list_models():
        raise _refuse(recipe, "a network of torchvision.models.list_models() behind 'torchvision:'")
    if Path(weights).is_file():
        (mean, std), size = _IMAGENET, 224
        model = _load_file(recipe, models.get_model(name, num_classes=classes), weights)
    else:
        known = models.get_model_weights(name).__members__
        if weights not in known:
            raise _refuse(recipe, f"a file, or one of {', '.join(known)} behind 'torchvision:{name}:'")
        preset: Any = known[weights].transforms()
        mean, std, size = tuple(preset.mean), tuple(preset.std), preset.crop_size[0]
        model = _downloaded(recipe, lambda: models.get_model(name, weights=known[weights]))
    return model, _View(size, mean, std, recipe)


def _timm(recipe: Recipe, name: str, weights: str, classes: int) -> tuple[nn.Module, _View]:
    import timm

    if name.split(".")[0] not in timm.list_models():
        raise _refuse(recipe, "a network of timm.list_models() behind 'timm:'")
    if weights == "pretrained":
        model = _downloaded(recipe, lambda: timm.create_model(name, pretrained=True))
    elif Path(weights).is_file():
        model = _load_file(recipe, timm.create_model(name, num_classes=classes), weights)
    else:
        raise _refuse(recipe, f"a file or 'pretrained' behind 'timm:{name}:'")
    config = timm.data.resolve_model_data_config(model)
    return model, _View(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]), recipe)
