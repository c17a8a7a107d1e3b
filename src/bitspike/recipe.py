"""Recipe: everything that decides a training run, as plain fields.

Values can be overridden by text (`--set lr=0.01`), written to a run's config and compared with it.
"""
from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bitspike.data.events.framing import Frames
from bitspike.spec import QuantSpec, Scheme

#: logits [B, K], or of every time step [T, B, K]; a tuple of them for a model with several heads. Of a segmenter logits
#: [B, K, h, w], in training also {"out": those, "aux": those of an auxiliary head}; a detector gives a dict of losses
Output = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
#: (images normalised [B, C, H, W] or sequences [T, B, C, H, W], the model's output, the task's targets) -> scalar loss;
#: targets of classification: [B] or [B, K], of segmentation [B, H, W], of detection a list of dicts
Loss = Callable[[Tensor, Any, Any], Tensor]


class RecipeError(ValueError):
    """A recipe or an override that cannot be meant: names the field, what was found and what is allowed."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Model: `model(**model_options)` gives the full-precision network, input float [B, C, H, W] or, where the data are
    sequences of frames, [T, B, C, H, W]; output logits [B, K], of every step [T, B, K], or a tuple of such, one a head.
    `spec` says which layer is quantized how; without one, `bits` quantizes every layer: 32 not at all, 1 with
    `Scheme("binary")`, 2..8 with `Scheme(scheme, bits)`.
    Data: uint8 pixels or frames; the model sees (pixel / 255 - mean) / std; grey images with three means become three
    channels. `train_on="train+val"` uses the held-out part too; then nothing is measured until the test at the end.
    Events: `frames` > 0 makes a sequence of as many event frames of each recording, image_size pixels a side, input float
    [T, B, 2, H, W]; `frames_by` cuts it into equal numbers of events or equal times; `event_augment` changes the events of
    a training recording before that, such as "roll=5,rotate=15,drop=0.1" (see `bitspike.data.events.framing`).
    Dense tasks ("segmentation", "detection"): pictures keep their proportions. In evaluation the short side is `image_size`, or
    less where the long side would pass `long_side` (0: no limit); in training it is image_size times a factor drawn between the
    two numbers of `scales`, and crop="random" then cuts a square of image_size. `colour_jitter` changes brightness, contrast
    and saturation by up to that share. `auxiliary` weighs the loss of an auxiliary head. `skip_broken` leaves pictures
    with broken annotations out instead of refusing the data. `pictures` takes only so many of the training pictures, evenly
    spaced (0: all). `window`: in evaluation, and from a file, a segmenter sees overlapping squares of that side (0: the whole
    picture).
    Steps: `batch_size` is that of one optimizer step, over all processes and `accumulate` parts. With `sync_norm` batch norms
    take their statistics from all processes, so that several train what one does; without, each from its own part.
    objective: `objective(model, recipe, loss) -> loss` lets a paper replace the loss; it is called once, with the model on
    its device, so it may load a `teacher`, hook layers, and weigh its term by `distill`. teacher_labels: whether a teacher
    says the class or the probabilities (at that `temperature`); papers that compare features do not read it.
    regulation: weight of another term of the objective's own, such as Q-SNN's spike regulation.
    start: RUN folder whose trained weights this one begins with (of the same network; steps of quantizers begin anew), as
    quantization-aware training from float weights does. distill_logits: weight of the divergence from the logits of the
    `teacher`, also a RUN folder.
    spike_penalty: weight of the mean spike count, each neuron weighted by its share of the operations its spikes cause.
    plain_lr multiplies the learning rate of biases and norms (with "muon" of everything but convolutions), scale_lr that of
    the quantizers' steps, head_lr that of everything that is not in the model's `backbone`. schedule "steps": a tenth after
    each of `drop_epochs`; "covered_cosine" counts from the first step, not from the end of the warm-up. ema: decay of the
    averaged weights, which are the ones evaluated; 0 is off. flip: "alternating" mirrors each image in every other epoch.
    claim, cost, notes: for people; they change nothing.

    >>> recipe = Recipe("demo", nn.Identity, epochs=2)
    >>> recipe.override({"lr": "0.01", "flip": "none"}).lr
    0.01
    >>> recipe.override({"epoch": "3"})
    Traceback (most recent call last):
    ...
    bitspike.recipe.RecipeError: recipe 'demo' has no field 'epoch' (nearest: 'epochs').
    """

    name: str
    model: Callable[..., nn.Module]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    spec: QuantSpec | None = None
    bits: int = 32
    scheme: Literal["lsq", "uniform", "pow2", "pow2_scale"] = "lsq"
    task: Literal["classification", "segmentation", "detection"] = "classification"
    # data
    data: str = "cifar10"
    train_on: Literal["train", "train+val"] = "train"
    image_size: int = 32
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    flip: Literal["none", "random", "alternating"] = "none"
    translate: int = 0
    translate_pad: Literal["reflect", "zero"] = "reflect"
    cutout: int = 0
    crop: Literal["whole", "random_resized", "random"] = "whole"
    scales: tuple[float, ...] = (1.0,)
    long_side: int = 0
    colour_jitter: float = 0.0
    skip_broken: bool = False
    pictures: int = 0
    window: int = 0
    rand_augment: str = ""
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_off_epoch: float = 0.0
    frames: int = 0
    frames_by: Literal["count", "time"] = "count"
    event_augment: str = ""
    workers: int = 2
    # steps
    start: str = ""
    epochs: float = 1.0
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Literal["adamw", "lamb", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, ...] = (0.9, 0.999)
    plain_lr: float = 1.0
    scale_lr: float = 1.0
    head_lr: float = 1.0
    schedule: Literal["cosine", "covered_cosine", "triangle", "steps"] = "cosine"
    drop_epochs: tuple[float, ...] = ()
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    grad_clip: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    sync_norm: bool = True
    ema: float = 0.0
    # loss
    label_smoothing: float = 0.0
    auxiliary: float = 0.0
    spike_penalty: float = 0.0
    regulation: float = 0.0
    distill: float = 0.0
    distill_logits: float = 0.0
    teacher: str = ""
    teacher_labels: Literal["hard", "soft"] = "hard"
    temperature: float = 1.0
    objective: Callable[[nn.Module, Recipe, Loss], Loss] | None = None
    # the rest
    seed: int = 0
    validate_every: int = 1
    claim: str = ""
    cost: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            allowed = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise self._refuse(name, getattr(self, name), " | ".join(allowed))
        for names, text, test in _RANGES:
            for name in names.split():
                if not test(getattr(self, name)):
                    raise self._refuse(name, getattr(self, name), text)
        if self.batch_size % self.accumulate:
            raise self._refuse("accumulate", self.accumulate, f"a divisor of batch_size={self.batch_size}")
        if self.translate >= self.image_size:
            raise self._refuse("translate", self.translate, f"less than image_size={self.image_size}")
        if self.cutout > self.image_size:
            raise self._refuse("cutout", self.cutout, f"at most image_size={self.image_size}")
        if len(self.std) not in (1, len(self.mean)):
            raise self._refuse("std", self.std, f"one number or {len(self.mean)}, as mean has")
        if self.event_augment and not self.frames:
            raise self._refuse("event_augment", self.event_augment, "nothing here: frames=0, so the data are pictures")
        self.event_frames()
        if self.regulation and self.objective is None:
            raise self._refuse("regulation", self.regulation, "nothing here: the recipe has no objective that would use it")
        self._check_task()
        for name in ("distill", "teacher"):
            if getattr(self, name) and self.objective is None and not self.distill_logits:
                raise self._refuse(name, getattr(self, name), "nothing here: the recipe has no objective that would use it")
        if self.distill_logits and not self.teacher:
            raise self._refuse("distill_logits", self.distill_logits, "0, or a teacher beside it: teacher=RUN")

    def _check_task(self) -> None:
        """Fields that one kind of task has and the other has not."""
        dense = self.task != "classification"
        default = {f.name: f.default for f in fields(self)}
        for name in _CLASSIFICATION_ONLY if dense else _DENSE_ONLY:
            if getattr(self, name) != default[name]:
                raise self._refuse(name, getattr(self, name), f"only {default[name]!r}: task={self.task!r} does not use it")
        if self.crop == ("random_resized" if dense else "random"):
            raise self._refuse("crop", self.crop, "whole | random" if dense else "whole | random_resized")
        if dense and self.flip == "alternating":
            raise self._refuse("flip", self.flip, "none | random")
        if self.distill_logits and self.task == "detection":
            raise self._refuse("distill_logits", self.distill_logits, "only 0: a detector has no logits of whole pictures")
        if (self.schedule == "steps") != bool(self.drop_epochs):
            raise self._refuse("drop_epochs", self.drop_epochs, "some epochs with schedule='steps', none with another")

    def _refuse(self, name: str, found: object, allowed: str) -> RecipeError:
        return RecipeError(f"recipe {self.name!r}, field {name}={found!r}: allowed: {allowed}.")

    def override(self, values: Mapping[str, str]) -> Recipe:
        """A copy with fields parsed from text; `model_options.levels=2` reaches into the model's options.

        `spec` takes the path of a spec in JSON, or "none". Errors: RecipeError for an unknown field (naming the nearest)
        or a value that does not parse (saying what is allowed).
        """
        changed: dict[str, Any] = {}
        options = dict(self.model_options)
        for key, text in values.items():
            head, _, rest = key.partition(".")
            if head == "model_options" and rest:
                options[rest] = self._parse_option(rest, text)
                changed["model_options"] = options
            elif key == "spec":
                changed[key] = None if text.lower() == "none" else self._read_spec(text)
            elif key in _types() and key not in ("name", "model", "model_options", "objective"):
                changed[key] = self._parse(key, text, _types()[key])
            elif key in _types():
                hint = " Set one option of its model: model_options.KEY=VALUE." if key.startswith("model") else ""
                raise RecipeError(f"recipe {self.name!r}: the field {key!r} cannot be set by text.{hint}")
            else:
                known = [n for n in _types() if n not in ("name", "model", "objective")]
                raise RecipeError(f"recipe {self.name!r} has no field {key!r}{_nearest(key, known)}.")
        if "bits" in changed and changed.get("spec", self.spec) is not None:
            raise RecipeError(f"recipe {self.name!r}: bits={changed['bits']} has no effect, its spec names the bits of each "
                              "layer. Override spec too: spec=none or spec=FILE.json.")
        return replace(self, **changed)

    def _parse(self, name: str, text: str, kind: Any) -> Any:
        return _parse(text, kind, lambda allowed: self._refuse(name, text, allowed))

    def _parse_option(self, name: str, text: str) -> Any:
        parameters = inspect.signature(self.model).parameters
        if name not in parameters and name not in self.model_options:
            raise RecipeError(f"recipe {self.name!r}: its model has no option {name!r}{_nearest(name, parameters)}; "
                              f"allowed: {', '.join(parameters) or 'none'}.")
        present = self.model_options.get(name)
        if present is None and name in parameters and parameters[name].default is not inspect.Parameter.empty:
            present = parameters[name].default
        if isinstance(present, bool | int | float | str):
            return self._parse(f"model_options.{name}", text, type(present))
        try:
            value = _tuples(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            value = text
        if isinstance(present, list | tuple) and not isinstance(value, tuple):
            raise self._refuse(f"model_options.{name}", text, f"a list, such as {json.dumps(present)}")
        return value

    def _read_spec(self, path: str) -> QuantSpec:
        try:
            return QuantSpec.from_json(Path(path).read_text())
        except OSError as error:
            raise self._refuse("spec", path, f"'none' or the path of a spec in JSON ({error})") from None

    def event_frames(self) -> Frames | None:
        """How recordings of events become frames; None for a recipe on pictures."""
        if not self.frames:
            return None
        return Frames(self.frames, (self.image_size, self.image_size), self.frames_by, self.event_augment)

    def quant_spec(self) -> QuantSpec | None:
        """The spec to attach; None for float weights."""
        if self.spec is not None or self.bits == 32:
            return self.spec
        return QuantSpec({"*": Scheme("binary") if self.bits == 1 else Scheme(self.scheme, self.bits)})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; functions as "module:name"."""
        plain: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, QuantSpec):
                value = json.loads(value.to_json())
            elif callable(value):
                value = f"{value.__module__}:{value.__qualname__}"
            plain[f.name] = dict(value) if isinstance(value, Mapping) else value
        return json.loads(json.dumps(plain))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`.

        Functions are looked up only in bitspike itself or in modules the program has already imported, so that reading a
        run never imports code of the run's choice. Errors: RecipeError.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise RecipeError(f"a stored recipe has the unknown field {unknown[0]!r}; it was written by another version.")
        values = {name: _tuples(value) for name, value in data.items()}
        for name in ("model", "objective"):
            if values.get(name) is not None:
                values[name] = _named(values[name])
        values["model_options"] = {k: _tuples(v) for k, v in dict(data.get("model_options", {})).items()}
        if data.get("spec") is not None:
            values["spec"] = QuantSpec.from_json(json.dumps(data["spec"]))
        return cls(**values)


_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("batch_size accumulate image_size validate_every", "an integer of at least 1", lambda v: v >= 1),
    ("bits", "1..8, or 32 for float weights", lambda v: v in (*range(1, 9), 32)),
    ("workers translate cutout frames long_side pictures", "an integer of at least 0", lambda v: v >= 0),
    ("window", "0, or a multiple of 32, as the sides of padded pictures are", lambda v: v >= 0 and v % 32 == 0),
    ("epochs lr temperature", "a finite number above 0", lambda v: 0 < v < math.inf),
    ("weight_decay plain_lr scale_lr head_lr warmup_epochs warmup_lr min_lr grad_clip mixup cutmix mixup_off_epoch "
     "spike_penalty regulation distill auxiliary colour_jitter", "a finite number of at least 0", lambda v: 0 <= v < math.inf),
    ("ema momentum label_smoothing", "0 (off) up to, not including, 1", lambda v: 0 <= v < 1),
    ("random_erasing distill_logits", "0..1", lambda v: 0 <= v <= 1),
    ("betas", "two numbers, each 0 up to, not including, 1", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v)),
    ("mean", "finite numbers, one a channel", lambda v: len(v) > 0 and all(map(math.isfinite, v))),
    ("scales", "one finite number above 0, or two in order", lambda v: len(v) in (1, 2) and 0 < v[0] <= v[-1] < math.inf),
    ("drop_epochs", "finite numbers above 0, in order", lambda v: all(0 < d < math.inf for d in v) and sorted(v) == list(v)),
    ("std", "finite numbers above 0", lambda v: len(v) > 0 and all(0 < s < math.inf for s in v)),
)
_DENSE_ONLY = ("scales", "long_side", "colour_jitter", "skip_broken", "auxiliary", "pictures", "window")
_CLASSIFICATION_ONLY = ("translate", "cutout", "rand_augment", "random_erasing", "mixup", "cutmix", "mixup_off_epoch", "frames",
                        "label_smoothing")
_LATER = ("start", "distill_logits", "teacher_labels", "temperature", "regulation", "frames", "frames_by", "event_augment",
          "task", "head_lr", "drop_epochs", *_DENSE_ONLY)
_DESCRIPTIVE = ("name", "workers", "validate_every", "claim", "cost", "notes")


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """"field: stored -> asked" for every field that changes the result (not the texts, not the number of workers)."""
    # a run of an older version did as these fields do when they are left alone
    later = {f.name: f.default for f in fields(Recipe) if f.name in _LATER}
    before = {**{name: list(v) if isinstance(v, tuple) else v for name, v in later.items()}, **stored}  # as JSON has them
    return [f"{name}: {before.get(name)!r} -> {asked.get(name)!r}" for name in {**before, **asked}
            if name not in _DESCRIPTIVE and before.get(name) != asked.get(name)]


def _types() -> dict[str, Any]:
    return {name: kind for name, kind in typing.get_type_hints(Recipe).items() if not name.startswith("_")}


def _parse(text: str, kind: Any, refuse: Callable[[str], RecipeError]) -> Any:
    """`text` as a value of the annotated type."""
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise refuse(" | ".join(typing.get_args(kind)))
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise refuse("true | false")
        return text.lower() in ("true", "1", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise refuse("a whole number" if kind is int else "a number") from None
    if typing.get_origin(kind) is tuple:
        try:
            return tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())
        except ValueError:
            raise refuse("numbers separated by commas, such as 0.9,0.999") from None
    return text


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    if module.split(".")[0] == "bitspike":
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RecipeError(f"the run names {path}, which this version does not have ({error}).") from None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, types.FunctionType | type):
        raise RecipeError(f"the run names {path}; it is not part of bitspike and not imported. Import {module} first, "
                          "or pass the recipe.")
    return found


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f" (nearest: {close[0]!r})" if close else ""
