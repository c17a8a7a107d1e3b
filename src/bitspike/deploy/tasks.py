"""What a header says about pictures that are answered with more than a class: checked, and as plain data.

A classifier has one program. A segmenter has one, whose output is a map of logits. A detector has one that sees the whole
picture and, with regions (Mask R-CNN), one for the boxes and one for the masks of regions cut out of the first one's maps.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import ArtifactError
from bitspike.deploy.fields import Fields, shown
from bitspike.deploy.program import LIMITS, MAX_CHANNELS, MAX_LIVE_BYTES, MAX_SIDE, Program, Value, check_program

MAX_LEVELS = 12
MAX_ANCHORS = 64          # of one cell
MAX_CANDIDATES = 10_000   # boxes that are sorted, compared or cut out, of one level or picture
MAX_BOXES = 1000          # given back, of one picture
MAX_REGION_SIDE = 128
MAX_OVERLAP = 4           # so many windows, along each side, may see a pixel
TASKS = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class Letterbox:
    """How a picture of any size meets the program: scaled so that its short side is `short`, or less where the long one would
    pass `long` (0: it may), then padded on the right and below with `border` to multiples of `multiple`.
    """

    short: int
    long: int
    multiple: int
    border: tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """A canvas is seen in squares of `side` pixels (all of it where it is shorter), `step` apart; their logits are averaged.

    >>> list(Windows(64, 42).starts(160))
    [0, 42, 84, 96]
    """

    side: int
    step: int

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of every window of such a canvas."""
        return min(self.side, height), min(self.side, width)

    def starts(self, length: int) -> tuple[int, ...]:
        """Where windows begin along one side of a canvas; the last one ends at its border."""
        last = max(0, length - self.side)
        return (*range(0, last, self.step), last)


@dataclass(frozen=True)
class Level:
    """One map of a detector: pixels per cell, ids of scores and deltas, anchors int `[A, 4]` around a cell's corner (x1, y1,
    x2, y2), and the id of the map that regions are cut from, if they are.
    """

    stride: int
    scores: str
    deltas: str
    anchors: NDArray[np.float32]
    map: str | None


@dataclass(frozen=True)
class Part:
    """A program that reads regions: `side` x `side` codes 0..levels of potentials x, `clip(rshift(x * m, s), 0, levels)`."""

    name: str
    program: Program
    listing: Sequence[Mapping[str, Any]]
    fraction_bits: int
    side: int
    m: int
    s: int
    levels: int


@dataclass(frozen=True)
class Detection:
    """How the maps of a detector become boxes.

    Without regions (RetinaNet), scores are class logits `[A * classes]` of every cell. With regions (Mask R-CNN), they are
    whether there is anything `[A]`; the best `candidates` of a level are decoded, `proposals` are left after an NMS with
    overlap `proposal_overlap`, and each is looked at by `box` (class logits with the background first, deltas for each) and,
    if it is kept, by `mask`. coder: divisors of deltas (x, y, width, height), of anchors; region_coder: of regions.
    canonical: side in pixels of a region that is cut from the map of stride 16; sampling: points per cell and side.
    """

    levels: tuple[Level, ...]
    coder: tuple[float, ...]
    candidates: int
    score: float
    overlap: float
    most: int
    proposals: int = 0
    proposal_overlap: float = 0.0
    region_coder: tuple[float, ...] = ()
    canonical: int = 0
    sampling: int = 0
    box: Part | None = None
    mask: Part | None = None

    @property
    def outputs(self) -> list[str]:
        """Ids that the first program must write."""
        return [name for level in self.levels for name in (level.scores, level.deltas, level.map) if name is not None]

    @property
    def parts(self) -> list[Part]:
        """The programs that read regions."""
        return [part for part in (self.box, self.mask) if part is not None]


def check_letterbox(found: Any, where: str, channels: int) -> Letterbox:
    """The header's `input.letterbox`. Errors: ArtifactError."""
    fields = Fields(found, where)
    short, long = fields.integer("short", 1, MAX_SIDE), fields.integer("long", 0, MAX_SIDE)
    multiple, border = fields.integer("multiple", 1, MAX_SIDE), fields.integers("border", channels, 0, 255)
    fields.done()
    return Letterbox(short, long, multiple, border)


def check_windows(found: Any, where: str, multiple: int) -> Windows:
    """The header's `windows`; sides are padded to multiples of `multiple`. Errors: ArtifactError."""
    fields = Fields(found, where)
    side = fields.integer("side", 1, MAX_SIDE)
    if side % multiple:
        raise fields.fail("side", f"a multiple of the letterbox's {multiple}")
    step = fields.integer("step", -(-side // MAX_OVERLAP), side)
    fields.done()
    return Windows(side, step)


def _must_be(program: Program, name: str, what: str, **shape: int) -> Value:
    """A value that is one step of potentials, of this height, width and number of channels."""
    y = program.values[name]
    found = {"height": y.height, "width": y.width, "channels": y.channels}
    if y.kind != "i32" or y.steps != 1 or any(found[key] != n for key, n in shape.items()):
        wanted = ", ".join(f"{key} {n}" for key, n in shape.items())
        raise ArtifactError(f"{what} {shown(name)} is {y.kind} {[y.steps, 'B', y.height, y.width, y.channels]}; it must be "
                            f"i32, one step, {wanted}")
    return y


def check_segmentation(program: Program, stride: int, height: int, width: int, classes: int) -> None:
    """The output is a map of logits, one cell for `stride` x `stride` pixels. Errors: ArtifactError."""
    if height % stride or width % stride:
        raise ArtifactError(f"header 'stride' is {stride}; it must divide the input, {height} x {width}")
    _must_be(program, program.output, "the output", height=height // stride, width=width // stride, channels=classes)


def _level(found: Any, where: str, regions: bool) -> Level:
    fields = Fields(found, where)
    boxes = fields.get("anchors")
    if not isinstance(boxes, list) or not 1 <= len(boxes) <= MAX_ANCHORS:
        raise fields.fail("anchors", f"a list of 1..{MAX_ANCHORS} boxes")
    anchors = [Fields({"anchor": box}, where).integers("anchor", 4, -MAX_SIDE, MAX_SIDE) for box in boxes]
    if any(x2 <= x1 or y2 <= y1 for x1, y1, x2, y2 in anchors):
        raise fields.fail("anchors", "boxes [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    level = Level(fields.integer("stride", 1, MAX_SIDE), fields.text("scores"), fields.text("deltas"),
                  np.array(anchors, np.float32), fields.text("map") if regions and fields.has("map") else None)
    fields.done()
    return level


def _part(found: Any, name: str, channels: int, outputs: Sequence[tuple[str, int, int]], tensors: Mapping[str, NDArray[Any]],
          first: Program) -> Part:
    """A program of regions; outputs: key in the header, channels, and how often the side of the input (0: one pixel)."""
    where = f"header 'detection' '{name}'"
    fields = Fields(found, where)
    side, levels = fields.integer("side", 1, MAX_REGION_SIDE), fields.integer("levels", 1, LIMITS["u8"][1])
    m, s = fields.factor("codes")
    bits = fields.integer("fraction_bits", 0, 30)
    names = [fields.text(key) for key, _, _ in outputs]
    listing = fields.get("program")
    fields.done()
    source = Value("u8", 1, side, side, channels, 0, levels)
    program = check_program(listing, names, source, 1, bits, tensors, first.codes, f"detection.{name}.program")
    for key, (_, count, times) in zip(names, outputs, strict=True):
        y = _must_be(program, key, where, channels=count)
        if (y.height, y.width) != ((1, 1) if times == 0 else (y.height, y.height)) or y.height > MAX_REGION_SIDE:
            raise ArtifactError(f"{where}: {shown(key)} is {y.height} x {y.width}; it must be "
                                f"{'1 x 1' if times == 0 else f'square, at most {MAX_REGION_SIDE} a side'}")
    return Part(name, program, listing, bits, side, m, s, levels)


def read_detection(found: Any) -> Detection:
    """The header's `detection` but for its parts, which need the first program. Errors: ArtifactError."""
    fields = Fields(found, "header 'detection'")
    kind = fields.choice("kind", ("anchors", "regions"))
    levels = fields.get("levels")
    if not isinstance(levels, list) or not 1 <= len(levels) <= MAX_LEVELS:
        raise fields.fail("levels", f"a list of 1..{MAX_LEVELS} levels")
    regions = kind == "regions"
    checked = tuple(_level(level, f"header 'detection' level {i}", regions) for i, level in enumerate(levels))
    common: dict[str, Any] = {
        "levels": checked, "coder": fields.numbers("coder", 4, 1e-3, 1e3),
        "candidates": fields.integer("candidates", 1, MAX_CANDIDATES),
        "score": fields.number("score", 0, 1), "overlap": fields.number("overlap", 0, 1),
        "most": fields.integer("most", 1, MAX_BOXES),
    }
    if regions:
        common |= {
            "proposals": fields.integer("proposals", 1, MAX_CANDIDATES),
            "region_coder": fields.numbers("region_coder", 4, 1e-3, 1e3),
            "proposal_overlap": fields.number("proposal_overlap", 0, 1),
            "canonical": fields.integer("canonical", 1, MAX_SIDE), "sampling": fields.integer("sampling", 1, 16),
        }
        with_maps = [level for level in checked if level.map is not None]
        if not with_maps or checked[: len(with_maps)] != tuple(with_maps):
            raise fields.fail("levels", "levels of which the first ones, at least one, have a 'map'")
        if any(b.stride != 2 * a.stride for a, b in pairwise(with_maps)):
            raise fields.fail("levels", "levels whose strides double, where regions are cut from them")
        fields.get("box")
        fields.has("mask")
    fields.done()
    return Detection(**common)


def check_maps(found: Detection, program: Program, height: int, width: int, classes: int) -> int:
    """The first program writes what the levels say, at this size of the input; returns the channels of the maps.

    Errors: ArtifactError.
    """
    channels = 0
    for i, level in enumerate(found.levels):
        where, cells = f"header 'detection' level {i}:", {"height": height // level.stride, "width": width // level.stride}
        if height % level.stride or width % level.stride:
            raise ArtifactError(f"{where} stride {level.stride} does not divide the input, {height} x {width}")
        each = 1 if found.proposals else classes
        _must_be(program, level.scores, where, **cells, channels=len(level.anchors) * each)
        _must_be(program, level.deltas, where, **cells, channels=4 * len(level.anchors))
        if level.map is not None:
            channels = channels or program.values[level.map].channels
            _must_be(program, level.map, where, **cells, channels=channels)
    return channels


def check_parts(found: Any, detection: Detection, channels: int, classes: int, tensors: Mapping[str, NDArray[Any]],
                program: Program) -> Detection:
    """`detection` with the programs of regions. Errors: ArtifactError."""
    if not detection.proposals:
        return detection
    if channels > MAX_CHANNELS:
        raise ArtifactError(f"header 'detection': maps of {channels} channels; at most {MAX_CHANNELS} are allowed")
    needed = 20 * detection.proposals * (classes + 1)  # bytes of what is said of all regions
    if needed > MAX_LIVE_BYTES:
        raise ArtifactError(f"header 'detection': {detection.proposals} proposals of {classes} classes take {needed} bytes; at "
                            f"most {MAX_LIVE_BYTES} are allowed")
    of_box, of_mask = (("classes", classes + 1, 0), ("deltas", 4 * (classes + 1), 0)), (("masks", classes + 1, 1),)
    box = _part(found["box"], "box", channels, of_box, tensors, program)
    mask = _part(found["mask"], "mask", channels, of_mask, tensors, program) if "mask" in found else None
    return replace(detection, box=box, mask=mask)
