"""Executes an artifact's program: uint8 pictures in, float32 logits out, integers in between."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import artifact
from bitspike.deploy.compiled import LayerTime
from bitspike.deploy.dense import Detector, Segmenter
from bitspike.deploy.errors import ArtifactError
from bitspike.deploy.executor import Executor, thread_count
from bitspike.deploy.opened import Opened
from bitspike.deploy.ops import Array

ZOO = Path(__file__).parent / "zoo"


class Net(Opened):
    """A network ready to run. Safe to call from several threads.

    Call it with uint8 pictures `[B, H, W, C]` (a network for sequences of frames: with `[T, B, H, W, C]`), get float32
    logits `[B, classes]`. The numbers do not depend on the batch a picture is in, on `threads`, or on the kernels in use.

    >>> import tempfile, os
    >>> tensors = {"w": artifact.pack_codes(np.eye(3, dtype=int), {"kind": "uniform", "bits": 2}),
    ...            "m": np.full(3, 256, np.int32), "b": np.zeros(3, np.int32)}
    >>> program = [
    ...     {"op": "conv", "in": ["pixels"], "out": "x", "weight": "w", "scheme": {"kind": "uniform", "bits": 2},
    ...      "shape": [3, 3, 1, 1], "stride": [1, 1], "padding": [0, 0], "groups": 1, "m": "m", "s": 0, "b": "b",
    ...      "range": [0, 255]},
    ...     {"op": "mean", "in": ["x"], "out": "logits", "over": "space", "m": 1}]
    >>> header = {"name": "mean colour", "input": {"height": 2, "width": 2, "channels": 3, "resize": None},
    ...           "classes": ["red", "green", "blue"], "time_steps": 1, "fraction_bits": 8, "program": program,
    ...           "output": "logits", "provenance": {}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "colour.bitspike")
    ...     artifact.write(path, header, tensors)
    ...     net = load(path)
    >>> picture = np.array([[[9, 0, 0], [9, 0, 0]], [[9, 2, 0], [9, 0, 4]]], np.uint8)
    >>> net(picture[None]).tolist(), net.classes[0], net.input_shape
    ([[9.0, 0.5, 1.0]], 'red', (2, 2, 3))
    """

    task = "classification"

    def __init__(self, source: artifact.Artifact) -> None:
        super().__init__(source)
        #: runs the program, without the checks of a call
        self.executor = Executor(source.program, source.header["fraction_bits"])

    def __repr__(self) -> str:
        return f"<Net {self.header['name']!r}: {self.input_shape} -> {len(self.classes)} classes, T = {self.time_steps}>"

    def __call__(self, images: NDArray[np.uint8], threads: int | None = None) -> NDArray[np.float32]:
        """Logits float32 `[B, classes]` of uint8 pictures `[B, H, W, C]` or, where `input_steps` is T, sequences
        `[T, B, H, W, C]`; B may be 0. `threads`: all cores if None.

        Raises:
            TypeError: the pictures are not a uint8 array, or `threads` is not an integer.
            ValueError: they have another shape, or `threads` is less than 1.
        """
        return self.executor.logits(*self.checked(images, threads))

    def explain(self, images: NDArray[np.uint8], threads: int | None = 1, repeats: int = 5) -> list[LayerTime]:
        """Where the time goes: every stage (a convolution, and what is fused to it) with its variant, density and time.

        The shortest of `repeats` passes over all images together. With threads, they share every image.

        Raises:
            TypeError, ValueError: as for a call.
            KernelError: on numpy, which has no stages.
        """
        return self.executor.explain(*self.checked(images, threads), repeats)

    def trace(self, images: NDArray[np.uint8], threads: int | None = None) -> dict[str, Array]:
        """Every value of the program by its id, `[S, B, H, W, C]`; nothing is freed, so keep the batch small.

        Raises:
            TypeError, ValueError: as for a call.
        """
        return self.executor.trace(*self.checked(images, threads))

    def checked(self, images: Any, threads: Any) -> tuple[NDArray[np.uint8], int]:
        """The pictures as the program reads them, `[S, B, H, W, C]`, and the number of threads. Errors: as for a call."""
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            found = f"{images.dtype} array" if isinstance(images, np.ndarray) else type(images).__name__
            raise TypeError(
                f"images: found {found}; a uint8 array [B, H, W, C] of pixels 0..255 is needed (bitspike.deploy.read_image "
                "makes one picture)"
            )
        frames, size = self.input_steps, self.input_shape
        fits = images.shape[1:] == size if frames == 1 else images.shape[:1] + images.shape[2:] == (frames, *size)
        if images.ndim != (4 if frames == 1 else 5) or not fits:
            needed = "[B, " if frames == 1 else f"[{frames}, B, "
            raise ValueError(
                f"images: found shape {list(images.shape)}; this network needs {needed}{', '.join(map(str, size))}] "
                f"({'' if frames == 1 else 'time steps, '}batch, height, width, channels)"
            )
        if frames == 1:
            images = images[None]
        return np.ascontiguousarray(images), thread_count(threads)


def builtin_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.stem for path in ZOO.glob("*.bitspike"))


def load(path_or_name: str | os.PathLike[str]) -> Net | Segmenter | Detector:
    """Open an artifact: the path of a `*.bitspike` file, or the name of a built-in network such as "cifar10".

    A text with neither a folder nor the ending `.bitspike` is a name, unless there is a file called so. What it gives depends
    on what the network was made for: a `Net` classifies pictures, a `Segmenter` gives every pixel a class, a `Detector` finds
    objects.

    Raises:
        ArtifactError: there is no such file or name, or anything is wrong with the file.

    >>> load("no-such-network")
    Traceback (most recent call last):
    bitspike.deploy.errors.ArtifactError: there is no built-in network 'no-such-network'. ...
    """
    path = Path(path_or_name)
    bare = isinstance(path_or_name, str) and path.name == path_or_name and path.suffix != ".bitspike"
    names = builtin_names()
    if bare and not path.is_file() and (path_or_name in names or not path.exists()):
        if path_or_name not in names:
            known = f"Built in: {', '.join(names)}" if names else "No network is built in"
            raise ArtifactError(
                f"there is no built-in network {path_or_name!r}. {known}; any other network is given by the path of its "
                "*.bitspike file"
            )
        path = ZOO / f"{path_or_name}.bitspike"
    found = artifact.read(path)
    kinds: dict[str, type[Net | Segmenter | Detector]] = {"segmentation": Segmenter, "detection": Detector}
    return kinds.get(found.task, Net)(found)


def load_classifier(path_or_name: str | os.PathLike[str]) -> Net:
    """`load`, of a network that classifies.

    Raises:
        ArtifactError: as `load`; or the network does something else.
    """
    net = load(path_or_name)
    if not isinstance(net, Net):
        raise ArtifactError(f"{os.fspath(path_or_name)}: this network was made for {net.task}; a classifier is needed here")
    return net
