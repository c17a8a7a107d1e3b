"""Executes an artifact's program: uint8 pictures in, float32 logits out, integers in between."""
from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import artifact, kernels, ops
from bitspike.deploy.compiled import Compiled, LayerTime
from bitspike.deploy.errors import ArtifactError, KernelError
from bitspike.deploy.ops import Array
from bitspike.deploy.program import Op, Program

ZOO = Path(__file__).parent / "zoo"
CHUNK_BYTES = 4 << 20  # values alive at once where numpy computes, per thread

#: one op bound to its kernels: (inputs, threads) -> output
_Step = Callable[[list[Array], int], Array]


def _bind(op: Op, signed: bool, kernel_set: kernels.KernelSet) -> _Step:
    a: dict[str, Any] = dict(op.attributes)
    if op.name == "conv":
        conv = kernel_set.prepare_conv(**a, signed=signed)
        return lambda inputs, threads: conv(inputs[0], threads)
    function = getattr(kernel_set, op.name, None)
    if function is None or "amount" in a:  # this set has no kernel for it: the definition is always there
        definition = getattr(ops, op.name)
        return lambda inputs, threads: definition(*inputs, **a)
    return lambda inputs, threads: function(*inputs, **a, threads=threads)


class Net:
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

    def __init__(self, source: artifact.Artifact) -> None:
        self._artifact = source
        self._bound: dict[str, list[_Step]] = {}
        self._compiled: dict[str, Compiled] = {}

    @property
    def header(self) -> Mapping[str, Any]:
        """The artifact's header, as in docs/format.md."""
        return self._artifact.header

    @property
    def program(self) -> Program:
        """The checked program: ops with their layer names and multiplications, and the shape of every value."""
        return self._artifact.program

    @property
    def classes(self) -> list[str]:
        """Class names, one per logit."""
        return list(self.header["classes"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        source = self.header["input"]
        return source["height"], source["width"], source["channels"]

    @property
    def input_steps(self) -> int:
        """Frames of one input: 1 for a picture, T for a sequence of event frames."""
        return int(self.header["input"].get("steps", 1))

    @property
    def time_steps(self) -> int:
        """T, the number of time steps."""
        return int(self.header["time_steps"])

    def __repr__(self) -> str:
        return f"<Net {self.header['name']!r}: {self.input_shape} -> {len(self.classes)} classes, T = {self.time_steps}>"

    def __call__(self, images: NDArray[np.uint8], threads: int | None = None) -> NDArray[np.float32]:
        """Logits float32 `[B, classes]` of uint8 pictures `[B, H, W, C]` or, where `input_steps` is T, sequences
        `[T, B, H, W, C]`; B may be 0. `threads`: all cores if None.

        Raises:
            TypeError: the pictures are not a uint8 array, or `threads` is not an integer.
            ValueError: they have another shape, or `threads` is less than 1.
        """
        images, count = self._check(images, threads)
        logits = np.empty((images.shape[1], len(self.header["classes"])), np.float32)
        extension = kernels.extension(kernels.active())
        if extension is not None:
            self._compile(extension).run(images, logits, count)
            return logits
        program = self.program
        chunk = max(1, CHUNK_BYTES * count // program.live_bytes)
        steps = self._steps()
        for first in range(0, images.shape[1], chunk):
            values: dict[str, Array] = {"pixels": np.ascontiguousarray(images[:, first : first + chunk])}
            for index, (op, step) in enumerate(zip(program.ops, steps, strict=True)):
                values[op.output] = step([values[name] for name in op.inputs], count)
                for name in {*op.inputs, op.output}:
                    if program.last_use[name] <= index:
                        del values[name]
            logits[first : first + chunk] = self._logits(values[program.output])
        return logits

    def explain(self, images: NDArray[np.uint8], threads: int | None = 1, repeats: int = 5) -> list[LayerTime]:
        """Where the time goes: every stage (a convolution, and what is fused to it) with its variant, density and time.

        The shortest of `repeats` passes over all images together. With threads, they share every image.

        Raises:
            TypeError, ValueError: as for a call.
            KernelError: on numpy, which has no stages.
        """
        images, count = self._check(images, threads)
        extension = kernels.extension(kernels.active())
        if extension is None:
            raise KernelError(f"explain: the kernels in use are 'numpy', which run op by op; choose one of "
                              f"{', '.join(kernels.available()[1:]) or 'the compiled ones (none is installed)'}")
        return self._compile(extension).explain(images, count, max(1, repeats))

    def trace(self, images: NDArray[np.uint8], threads: int | None = None) -> dict[str, Array]:
        """Every value of the program by its id, `[S, B, H, W, C]`; nothing is freed, so keep the batch small.

        Raises:
            TypeError, ValueError: as for a call.
        """
        images, count = self._check(images, threads)
        values: dict[str, Array] = {"pixels": images}
        for op, step in zip(self.program.ops, self._steps(), strict=True):
            values[op.output] = step([values[name] for name in op.inputs], count)
        return values

    def _logits(self, potential: Array) -> NDArray[np.float32]:
        scale = np.float32(2.0 ** -self.header["fraction_bits"])  # a power of two: the product is exact
        return potential[0, :, 0, 0, :].astype(np.float32) * scale

    def _check(self, images: Any, threads: Any) -> tuple[NDArray[np.uint8], int]:
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
        if threads is None:
            return np.ascontiguousarray(images), os.cpu_count() or 1
        number: Any = None if isinstance(threads, bool) else threads
        try:
            count = operator.index(number)
        except TypeError:
            raise TypeError(f"threads: found {threads!r}; an integer from 1, or None for all cores, is needed") from None
        if not 1 <= count <= 1024:
            raise ValueError(f"threads: found {count}; 1..1024 are allowed")
        return np.ascontiguousarray(images), count

    def _compile(self, extension: Any) -> Compiled:
        """The program laid out for the kernels in use."""
        name = kernels.active()
        if name not in self._compiled:
            kernel_set, values = kernels.get(name), self.program.values
            self._compiled[name] = Compiled(
                self.program, extension, name, self.header["fraction_bits"],
                lambda op: _bind(op, values[op.inputs[0]].kind == "s8", kernel_set),
            )
        return self._compiled[name]

    def _steps(self) -> list[_Step]:
        """The ops bound to the kernels in use; weights are laid out for a set of kernels when it is first used."""
        kernel_set = kernels.get(kernels.active())
        bound = self._bound.get(kernel_set.name)
        if bound is None:
            values = self.program.values
            bound = [_bind(op, values[op.inputs[0]].kind == "s8", kernel_set) for op in self.program.ops]
            self._bound[kernel_set.name] = bound
        return bound


def builtin_names() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(path.stem for path in ZOO.glob("*.bitspike"))


def load(path_or_name: str | os.PathLike[str]) -> Net:
    """Open an artifact: the path of a `*.bitspike` file, or the name of a built-in network such as "cifar10".

    A text with neither a folder nor the ending `.bitspike` is a name, unless there is a file called so.

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
    return Net(artifact.read(path))
