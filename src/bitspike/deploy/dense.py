"""Networks that answer for a whole picture of any size: a class for every pixel, or the objects in it."""
from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import regions
from bitspike.deploy.artifact import Artifact
from bitspike.deploy.boxes import best, clip, decode, grid, large, sigmoid, softmax, suppress
from bitspike.deploy.errors import ArtifactError, ImageError
from bitspike.deploy.executor import Executor, thread_count
from bitspike.deploy.opened import Opened
from bitspike.deploy.ops import Array
from bitspike.deploy.preprocess import Scene, letterbox, open_picture
from bitspike.deploy.resample import joined, labels
from bitspike.deploy.tasks import Detection, Part, Windows

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = NDArray[np.uint8] | str | os.PathLike[str] | Image

#: runs one of the programs: (its name, it, its input) -> its outputs
_Call = Callable[[str, Executor, NDArray[np.uint8]], list[Array]]

MAX_CANVASES = 8              # sizes of pictures whose program is kept ready
MAX_MASK_BYTES = 1 << 30      # of one picture's masks
MAX_WINDOWS = 4096            # of one picture
MAX_LOGIT_BYTES = 1 << 30     # of one picture's windows
REGION_BYTES = 32 << 20       # of the regions that are looked at together


class DenseNet(Opened):
    """What `Segmenter` and `Detector` share: the program, ready for every size that pictures come in.

    A program does not depend on the size of its input, so it is checked and laid out again for each canvas (the picture,
    scaled and padded as in evaluation); the last ones are kept.
    """

    def __init__(self, source: Artifact) -> None:
        super().__init__(source)
        assert source.letterbox is not None
        self.letterbox = source.letterbox
        self._canvases: OrderedDict[tuple[int, int], Executor] = OrderedDict()
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.header['name']!r}: {len(self.classes)} classes, T = {self.time_steps}>"

    def scene(self, picture: Picture) -> Scene:
        """A picture (uint8 `[H, W, C]`, a Pillow image, or a file's path) as the program reads it.

        Errors: ImageError: it cannot be read. TypeError, ValueError: an array that is no picture.
        """
        channels = self.input_shape[2]
        if not isinstance(picture, np.ndarray):
            picture = open_picture(picture, channels)
        if picture.dtype != np.uint8:
            raise TypeError(f"a picture: found an array of {picture.dtype}; uint8 [H, W, {channels}] is needed")
        if picture.ndim != 3 or picture.shape[2] != channels:
            raise ValueError(f"a picture: found an array {list(picture.shape)}; uint8 [H, W, {channels}] is needed")
        return letterbox(picture, self.letterbox)

    def executor(self, height: int, width: int) -> Executor:
        """The program for a canvas of that size. Errors: ImageError: it does not run at that size."""
        with self._lock:
            found = self._canvases.get((height, width))
            if found is None:
                try:
                    found = Executor(self._artifact.at(height, width), self.header["fraction_bits"])
                except ArtifactError as error:
                    raise ImageError(f"a picture of {height} x {width} pixels after scaling: {error}") from None
                self._canvases[height, width] = found
                if len(self._canvases) > MAX_CANVASES:
                    self._canvases.popitem(last=False)
            self._canvases.move_to_end((height, width))
            return found

    def outputs(self, scene: Scene, threads: int | None = None) -> list[NDArray[np.float32]]:
        """What the program says of a whole scene: one map `[h, w, C]` per output, potentials as float32."""
        return self._outputs(scene.pixels, threads)

    def _outputs(self, pixels: NDArray[np.uint8], threads: int | None) -> list[NDArray[np.float32]]:
        run = self.executor(pixels.shape[0], pixels.shape[1])
        return [run.real(y[0, 0]) for y in run.outputs(pixels[None, None], thread_count(threads))]


def _each(pictures: Iterable[Picture]) -> Iterable[Picture]:
    if isinstance(pictures, (str, os.PathLike)) or (isinstance(pictures, np.ndarray) and pictures.ndim < 4):
        raise TypeError("one picture was given; a list of pictures (or an array [B, H, W, C]) is needed: net([picture])")
    return pictures


class Segmenter(DenseNet):
    """A class for every pixel. Safe to call from several threads.

    >>> from bitspike.deploy import load
    >>> net = load("street.bitspike")                                     # doctest: +SKIP
    >>> net(["street.jpg"])[0].shape                                      # doctest: +SKIP
    (480, 640)
    """

    task = "segmentation"

    @property
    def windows(self) -> Windows | None:
        """In which squares a picture is seen; None: whole."""
        return self._artifact.windows

    def __call__(self, pictures: Iterable[Picture], threads: int | None = None) -> list[NDArray[np.integer[Any]]]:
        """The class of every pixel, uint8 `[H, W]` (uint16 for more than 256 classes), of pictures of any size.

        Args:
            pictures: uint8 arrays `[H, W, C]`, Pillow images or paths of files. threads: all cores if None.

        Raises:
            ImageError: a picture cannot be read, or is too large or too narrow.
            TypeError, ValueError: what was given is no picture.
        """
        return [self.labels(self.scene(picture), threads) for picture in _each(pictures)]

    def labels(self, scene: Scene, threads: int | None = None) -> NDArray[np.integer[Any]]:
        """The class of every pixel of a scene's own picture."""
        canvas = scene.pixels.shape[0], scene.pixels.shape[1]
        return labels(self._cells(scene, threads), canvas, scene.size, scene.original, self._starts(*canvas))

    def logits(self, scene: Scene, threads: int | None = None) -> NDArray[np.float32]:
        """Logits of a scene `[h, w, K]`, one per cell; of a network that sees windows one per pixel, their mean."""
        cells = self._cells(scene, threads)
        if self.windows is None:
            return cells
        height, width = scene.pixels.shape[:2]
        rows, columns = self._starts(height, width)
        down, across = joined(cells.shape[0], height, rows), joined(cells.shape[1], width, columns)
        return np.tensordot(down, np.matmul(across, cells), 1)

    def in_windows(self, scene: Scene) -> Iterator[NDArray[np.uint8]]:
        """The parts of a scene's canvas that the program sees, row by row; its whole where there are no windows."""
        height, width = scene.pixels.shape[:2]
        h, w = (height, width) if self.windows is None else self.windows.shape(height, width)
        rows, columns = self._starts(height, width)
        for top in rows:
            for left in columns:
                yield np.ascontiguousarray(scene.pixels[top : top + h, left : left + w])

    def _starts(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and columns of a canvas where windows begin. Errors: ImageError: too many."""
        if self.windows is None:
            return (0,), (0,)
        rows, columns = self.windows.starts(height), self.windows.starts(width)
        if len(rows) * len(columns) > MAX_WINDOWS:
            raise ImageError(f"a picture of {height} x {width} pixels after scaling has {len(rows)} x {len(columns)} windows; "
                             f"at most {MAX_WINDOWS} are allowed. Make the picture smaller")
        return rows, columns

    def _cells(self, scene: Scene, threads: int | None) -> NDArray[np.float32]:
        """The logits of all windows side by side, as `resample.joined` takes them. Errors: ImageError: too many."""
        rows, columns = self._starts(*scene.pixels.shape[:2])
        found: NDArray[np.float32] | None = None
        for i, part in enumerate(self.in_windows(scene)):
            logits = self._outputs(part, threads)[0]
            if len(rows) * len(columns) == 1:
                return logits
            h, w, classes = logits.shape
            if found is None:
                if len(rows) * len(columns) * logits.nbytes > MAX_LOGIT_BYTES:
                    raise ImageError(f"the logits of {len(rows)} x {len(columns)} windows take more than {MAX_LOGIT_BYTES} "
                                     "bytes. Make the picture smaller")
                found = np.empty((len(rows) * h, len(columns) * w, classes), np.float32)
            top, left = divmod(i, len(columns))
            found[top * h : (top + 1) * h, left * w : (left + 1) * w] = logits
        assert found is not None
        return found


class Detector(DenseNet):
    """The objects of a picture. Safe to call from several threads.

    >>> from bitspike.deploy import load
    >>> net = load("street.bitspike")                                     # doctest: +SKIP
    >>> sorted(net(["street.jpg"])[0])                                    # doctest: +SKIP
    ['boxes', 'labels', 'masks', 'scores']
    """

    task = "detection"

    def __init__(self, source: Artifact) -> None:
        super().__init__(source)
        assert source.detection is not None
        self.detection: Detection = source.detection
        self.parts = {part.name: Executor(part.program, part.fraction_bits) for part in self.detection.parts}

    def __call__(self, pictures: Iterable[Picture], threads: int | None = None) -> list[dict[str, Array]]:
        """Per picture: boxes float32 `[N, 4]` (x1, y1, x2, y2 in its pixels), labels int64 `[N]` (indices of `classes`), scores
        float32 `[N]` in falling order and, if the network has masks, masks bool `[N, H, W]`.

        Args:
            pictures: uint8 arrays `[H, W, C]`, Pillow images or paths of files. threads: all cores if None.

        Raises:
            ImageError: a picture cannot be read, or is too large or too narrow.
            TypeError, ValueError: what was given is no picture.
        """
        return [self.in_picture(self.detect(scene, threads), scene) for scene in map(self.scene, _each(pictures))]

    def detect(self, scene: Scene, threads: int | None = None) -> dict[str, Array]:
        """What is in a scene, in pixels of its canvas; masks are probabilities `[N, m, m]`, each in its box."""
        count = thread_count(threads)
        return self._detect(scene, lambda name, run, x: run.outputs(x, count))

    def trace(self, scene: Scene, threads: int | None = None) -> dict[str, dict[str, Array]]:
        """Every value of every program on the way to `detect`: by the program, "" the first one, then by its id."""
        count, seen = thread_count(threads), dict[str, dict[str, Array]]()

        def watch(name: str, run: Executor, x: NDArray[np.uint8]) -> list[Array]:
            values = run.trace(x, count)
            before = seen.get(name)  # regions come in parts, where they are many
            seen[name] = values if before is None else {k: np.concatenate([before[k], v], 1) for k, v in values.items()}
            return [values[output] for output in run.program.outputs]

        self._detect(scene, watch)
        return seen

    def _detect(self, scene: Scene, call: _Call) -> dict[str, Array]:
        run, d = self.executor(*scene.pixels.shape[:2]), self.detection
        made = dict(zip(run.program.outputs, call("", run, scene.pixels[None, None]), strict=True))
        real = {name: run.real(made[name][0, 0]) for level in d.levels for name in (level.scores, level.deltas)}
        if d.box is None:
            return self._by_anchors(real, scene)
        maps = [made[level.map][0, 0] for level in d.levels if level.map is not None]
        return self._by_regions(maps, self._proposals(real, scene), scene, call)

    def in_picture(self, found: dict[str, Array], scene: Scene) -> dict[str, Array]:
        """What `detect` gave, in pixels of the picture itself; masks are bool `[N, H, W]`. Errors: ImageError: too large."""
        height, width = scene.original
        ratio = np.array([width / scene.size[1], height / scene.size[0]] * 2, np.float32)
        found = {**found, "boxes": clip(found["boxes"] * ratio, height, width)}
        if "masks" in found:
            if len(found["boxes"]) * height * width > MAX_MASK_BYTES:
                raise ImageError(f"{len(found['boxes'])} masks of {height} x {width} pixels; at most {MAX_MASK_BYTES} in all. "
                                 "Make the picture smaller")
            masks = np.zeros((len(found["boxes"]), height, width), bool)
            for i, (mask, box) in enumerate(zip(found["masks"], found["boxes"], strict=True)):
                masks[i] = regions.paste(mask, box, height, width)
            found["masks"] = masks
        return found

    # ------------------------------------------------------------------------------------------------ anchors
    def _by_anchors(self, real: dict[str, NDArray[np.float32]], scene: Scene) -> dict[str, Array]:
        """RetinaNet: every anchor says of every class how sure it is."""
        d, classes = self.detection, len(self.header["classes"])
        boxes, scores, labels = [], [], []
        for level in d.levels:
            said = sigmoid(real[level.scores].reshape(-1))
            kept = np.flatnonzero(said > np.float32(d.score))
            kept = kept[best(said[kept], d.candidates)]
            cells = kept // classes
            height, width = real[level.scores].shape[:2]
            anchors = grid(level.anchors, height, width, level.stride)[cells]
            boxes.append(clip(decode(real[level.deltas].reshape(-1, 4)[cells], anchors, d.coder), *scene.size))
            scores.append(said[kept])
            labels.append(kept % classes)
        return self._kept(np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels))

    def _kept(self, boxes: Array, scores: Array, labels: Array) -> dict[str, Array]:
        keep = suppress(boxes, scores, labels, self.detection.overlap, self.detection.most)
        return {"boxes": boxes[keep], "labels": labels[keep].astype(np.int64), "scores": scores[keep]}

    # ------------------------------------------------------------------------------------------------ regions
    def _proposals(self, real: dict[str, NDArray[np.float32]], scene: Scene) -> Array:
        """Mask R-CNN: the boxes that the first stage is surest of."""
        d = self.detection
        boxes, scores, levels = [], [], []
        for index, level in enumerate(d.levels):
            said = real[level.scores].reshape(-1)
            chosen = best(said, d.candidates)
            height, width = real[level.scores].shape[:2]
            anchors = grid(level.anchors, height, width, level.stride)[chosen]
            boxes.append(decode(real[level.deltas].reshape(-1, 4)[chosen], anchors, d.coder))
            scores.append(said[chosen])
            levels.append(np.full(len(chosen), index))
        whole = clip(np.concatenate(boxes), *scene.size)
        keep = large(whole, 1e-3)
        whole, score, level_of = whole[keep], sigmoid(np.concatenate(scores)[keep]), np.concatenate(levels)[keep]
        return whole[suppress(whole, score, level_of, d.proposal_overlap, d.proposals)]

    def codes(self, maps: list[Array], boxes: Array, part: Part) -> NDArray[np.uint8]:
        """What a program of regions reads of these boxes: uint8 `[1, R, side, side, C]`. maps: potentials `[h, w, C]`."""
        strides = [level.stride for level in self.detection.levels[: len(maps)]]
        levels = regions.level_of(boxes, strides, self.detection.canonical)
        x = regions.roi_align(maps, boxes, levels, strides, part.side, self.detection.sampling, regions.PLACE_BITS)
        return regions.codes_of(x, part.m, part.s, part.levels)[None]

    def _said(self, part: Part, maps: list[Array], boxes: Array, call: _Call,
              only: NDArray[np.int64] | None = None) -> list[NDArray[np.float32]]:
        """What a program of regions says of each box `[R, h, w, C]`; only: one channel of each, `[R, h, w]`."""
        run, made = self.parts[part.name], [part.program.values[name] for name in part.program.outputs]
        some = max(1, REGION_BYTES // (8 * part.side**2 * maps[0].shape[2] + sum(y.image_bytes for y in made)))
        pieces = [[np.zeros((0, y.height, y.width, y.channels)[: 4 if only is None else 3], np.float32) for y in made]]
        for first in range(0, len(boxes), some):
            rows = slice(first, first + some)
            found = [run.real(y[0]) for y in call(part.name, run, self.codes(maps, boxes[rows], part))]
            pieces.append(found if only is None else [y[np.arange(len(y)), :, :, only[rows]] for y in found])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _by_regions(self, maps: list[Array], proposals: Array, scene: Scene, call: _Call) -> dict[str, Array]:
        d, classes = self.detection, len(self.header["classes"])
        assert d.box is not None
        logits, deltas = (y[:, 0, 0] for y in self._said(d.box, maps, proposals, call))
        scores = softmax(logits)[:, 1:].reshape(-1)  # the background is no object
        labels = np.tile(np.arange(classes), len(proposals))
        moved = deltas.reshape(-1, 4), np.repeat(proposals, classes + 1, 0)
        boxes = clip(decode(*moved, d.region_coder), *scene.size).reshape(-1, classes + 1, 4)[:, 1:].reshape(-1, 4)
        keep = np.flatnonzero(scores > np.float32(d.score))
        keep = keep[large(boxes[keep], 1e-2)]
        found = self._kept(boxes[keep], scores[keep], labels[keep])
        if d.mask is not None:
            found["masks"] = sigmoid(self._said(d.mask, maps, found["boxes"], call, found["labels"] + 1)[0])
        return found
