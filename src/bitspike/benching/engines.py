"""The engines that are compared: how each runs a network, and at its best.

An engine is prepared once (files in a folder), then opened: `open_engine(name, folder, threads)` gives a function from pixels
uint8 [B, H, W, C] to logits. The same function opens it in a fresh process, for memory and cold start.
"""
from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.benching.lower import PeerError
from bitspike.deploy import Net, load_classifier

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Opened:
    """`prepare(pixels)` gives what `run` takes, outside of the timing; `run` gives logits [B, classes]."""

    prepare: Callable[[Pixels], Any]
    run: Callable[[Any], NDArray[np.float32]]
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """One peer. `needs`: packages; `file`: what it opens in the folder."""

    name: str
    needs: tuple[str, ...]
    file: str
    open: Callable[[Path, int], Opened]
    install: str


# ---------------------------------------------------------------------------------------------------------- ours
def _open_ours(path: Path, threads: int) -> Opened:
    net = load_classifier(path)
    return Opened(lambda pixels: pixels, lambda pixels: net(pixels, threads))


# --------------------------------------------------------------------------------------------------------- PyTorch
def _nchw(pixels: Pixels) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.moveaxis(pixels, 3, 1).astype(np.float32))


def _torch_runner(module: Any, threads: int, chosen: Path, forward: Any = None) -> Opened:
    """`chosen`: the file that remembers the faster layout for a fresh process."""
    import torch

    torch.set_num_threads(threads)
    call = module if forward is None else forward
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    choice: dict[str, str] = {"layout": chosen.read_text()} if chosen.exists() else {}

    def prepare(pixels: Pixels) -> Any:
        x = torch.from_numpy(_nchw(pixels))
        if not choice:
            times = {}
            with torch.inference_mode():
                for name, layout in layouts.items():
                    module.to(memory_format=layout)
                    given = x.contiguous(memory_format=layout)
                    took = []
                    for _ in range(4):
                        began = time.perf_counter()
                        call(given)
                        took.append(time.perf_counter() - began)
                    times[name] = min(took[1:])
            choice["layout"] = min(times, key=lambda name: times[name])
            chosen.write_text(choice["layout"])
        module.to(memory_format=layouts[choice["layout"]])
        return x.contiguous(memory_format=layouts[choice["layout"]])

    def run(x: Any) -> NDArray[np.float32]:
        with torch.inference_mode():
            return call(x).numpy()

    return Opened(prepare, run)


def _load_module(path: Path) -> Any:
    import torch

    if path.suffix == ".pt":  # a recipe's own model, written by this process's caller
        return torch.load(path, weights_only=False).eval()
    from bitspike.benching.to_torch import PeerModule

    return PeerModule(load_classifier(path)).eval()


def _open_torch(path: Path, threads: int) -> Opened:
    return _torch_runner(_load_module(path), threads, path.with_suffix(".eager"))


def _open_compiled(path: Path, threads: int) -> Opened:
    import torch

    module = _load_module(path)
    return _torch_runner(module, threads, path.with_suffix(".compiled"), torch.compile(module, dynamic=False))


# ----------------------------------------------------------------------------------------------------- ONNX Runtime
def _open_onnxruntime(path: Path, threads: int) -> Opened:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Opened(_nchw, lambda x: session.run(["logits"], {"pixels": x})[0])


# --------------------------------------------------------------------------------------------------------- OpenVINO
def _open_openvino(path: Path, threads: int, precision: str, streams: bool = False) -> Opened:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT" if streams else "LATENCY",
                "INFERENCE_PRECISION_HINT": precision}
    if streams:
        settings["NUM_STREAMS"] = threads
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    if not streams:
        request = compiled.create_infer_request()
        return Opened(_nchw, lambda x: request.infer({0: x})[0])
    queue = ov.AsyncInferQueue(compiled, threads)
    batch = int(compiled.input(0).shape[0])

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = np.empty((len(x), compiled.output(0).shape[1]), np.float32)

        def keep(request: Any, first: int) -> None:
            logits[first:first + batch] = request.get_output_tensor(0).data

        queue.set_callback(keep)
        for first in range(0, len(x), batch):
            queue.start_async({0: x[first:first + batch]}, first)
        queue.wait_all()
        return logits

    return Opened(_nchw, run)


def _openvino(precision: str, streams: bool = False) -> Callable[[Path, int], Opened]:
    return lambda path, threads: _open_openvino(path, threads, precision, streams)


_ORT, _OV = "pip install onnx onnxruntime", "pip install onnx openvino"
OURS = Engine("bitspike", (), "net.bitspike", _open_ours, "")
MODEL = Engine("pytorch eager, the recipe's model", ("torch",), "model.pt", _open_torch, "pip install 'bitspike[train]'")
PEERS: tuple[Engine, ...] = (
    Engine("onnxruntime float32", ("onnx", "onnxruntime"), "float.onnx", _open_onnxruntime, _ORT),
    Engine("onnxruntime int8", ("onnx", "onnxruntime"), "all.onnx", _open_onnxruntime, _ORT),
    Engine("openvino float32", ("onnx", "openvino"), "float.onnx", _openvino("f32"), _OV),
    Engine("openvino bfloat16", ("onnx", "openvino"), "float.onnx", _openvino("bf16"), _OV),
    Engine("openvino int8", ("onnx", "openvino"), "counts.onnx", _openvino("f32"), _OV),
    Engine("pytorch eager", ("torch",), "net.bitspike", _open_torch, "pip install 'bitspike[train]'"),
    Engine("pytorch compiled", ("torch",), "net.bitspike", _open_compiled, "pip install 'bitspike[train]'"),
)
#: with several threads and pictures: one stream of single pictures per thread
STREAMS = Engine("openvino int8, streams", ("onnx", "openvino"), "counts.single.onnx", _openvino("f32", True), _OV)


def missing(engine: Engine) -> list[str]:
    """Packages of an engine that are not installed."""
    return [package for package in engine.needs if importlib.util.find_spec(package) is None]


# ---------------------------------------------------------------------------------------------------------- files
def _ranges(net: Net, folder: Path, pixels: Pixels) -> dict[str, float]:
    """Largest absolute output of every convolution on these pictures, by the float network itself."""
    import onnxruntime as ort

    from bitspike.benching.to_onnx import to_onnx

    session = ort.InferenceSession(to_onnx(net, 1, show_convs=True).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    ranges: dict[str, float] = {}
    for picture in _nchw(pixels):
        for name, value in zip(names, session.run(None, {"pixels": picture[None]}), strict=True):
            if name.startswith("conv:"):
                ranges[name[5:]] = max(ranges.get(name[5:], 0.0), float(np.abs(value).max()))
    return ranges


def write_files(net: Net, artifact: Path, folder: Path, pixels: Pixels, engines: Mapping[str, Engine]) -> None:
    """Write what the engines open: ONNX models for the batch `len(pixels)`, and the artifact. Errors: PeerError."""
    wanted = {engine.file for engine in engines.values()}
    if "net.bitspike" in wanted:
        (folder / "net.bitspike").write_bytes(artifact.read_bytes())
    onnx_files = sorted(file for file in wanted if file.endswith(".onnx"))
    if not onnx_files:
        return
    from bitspike.benching.to_onnx import to_onnx

    if net.input_steps > 1:
        raise PeerError("other engines are given pictures, not sequences of frames; bench without --peers.")
    for file in onnx_files:
        form, _, single = file.removesuffix(".onnx").partition(".")
        ranges = _ranges(net, folder, pixels[:4]) if form == "all" else None
        model = to_onnx(net, 1 if single else len(pixels), form, ranges)
        (folder / file).write_bytes(model.SerializeToString())


def int8_share(name: str, folder: Path, pixels: Pixels) -> str | None:
    """How many convolutions really run on int8, by the engine's own account: "138 of 139"; None for a float engine."""
    if name == "onnxruntime int8":
        import onnx
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        ort.InferenceSession(str(folder / "all.onnx"), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node]
        fast = sum(kind in ("QLinearConv", "QConv", "ConvInteger") for kind in kinds)
        return f"{fast} of {fast + sum(kind in ('Conv', 'FusedConv', 'NchwcConv') for kind in kinds)}"
    if name == "openvino int8":
        import openvino as ov

        core = ov.Core()
        compiled = core.compile_model(core.read_model(folder / "counts.onnx"), "CPU",
                                      {"PERF_COUNT": "YES", "INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        request.infer({0: _nchw(pixels)})
        ran = [info.exec_type.lower() for info in request.get_profiling_info()
               if info.node_type.endswith("Convolution") and info.exec_type != "undef"]
        return f"{sum(kind.endswith('i8') for kind in ran)} of {len(ran)}"
    return None


# ---------------------------------------------------------------------------------------------------- fresh process
def _peak_mb() -> float:
    """Peak resident memory of this process in MiB; nan where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def fresh(engine: Engine, folder: Path, threads: int) -> dict[str, float]:
    """In this process, which must be new: milliseconds from the imports to the first logits, and peak memory in MiB."""

    pixels = np.load(folder / "pixels.npy")[:1] if engine is STREAMS else np.load(folder / "pixels.npy")
    before = _peak_mb()
    began = time.perf_counter()
    opened = engine.open(folder / engine.file, threads)
    opened.run(opened.prepare(pixels))
    first = 1e3 * (time.perf_counter() - began)
    opened.run(opened.prepare(pixels))
    return {"cold_start_ms": first, "peak_mb": _peak_mb(), "peak_mb_over_numpy": _peak_mb() - before}


def main(arguments: list[str]) -> None:
    """`python -m bitspike.benching.engines NAME FOLDER THREADS`: prints `fresh` as JSON."""
    name, folder, threads = arguments
    engine = next(e for e in (OURS, MODEL, STREAMS, *PEERS) if e.name == name)
    print(json.dumps(fresh(engine, Path(folder), int(threads))))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
