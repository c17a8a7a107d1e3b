from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bitspike.deploy import ArtifactError, Net, executor, kernels, load, runtime
from bitspike.deploy.artifact import encode, parse, write
from bitspike.deploy.errors import KernelError
from bitspike.deploy.program import OPS

from .random_programs import random_artifact, random_images


def net_of(seed: int) -> Net:
    return Net(parse(encode(*random_artifact(seed))))


def on(name: str, net: Net, images: np.ndarray, **more: int) -> np.ndarray:
    before = kernels.active()
    kernels.use(name)
    try:
        return net(images, **more)
    finally:
        kernels.use(before)


def some(images: np.ndarray, which: slice) -> np.ndarray:
    """A part of the batch, of pictures or of sequences."""
    return images[which] if images.ndim == 4 else images[:, which]


def test_random_programs_hold_every_op():
    assert {op.name for seed in range(60) for op in net_of(seed).program.ops} == set(OPS)


@pytest.mark.parametrize("seed", range(60))
def test_same_numbers_on_all_kernels_batches_and_threads(seed: int, monkeypatch: pytest.MonkeyPatch):
    net = net_of(seed)
    images = random_images(net.header, 5, seed)
    expected = on("numpy", net, images)
    assert expected.shape == (5, len(net.classes)) and expected.dtype == np.float32
    for name in kernels.available()[1:]:
        np.testing.assert_array_equal(on(name, net, images, threads=1), expected, err_msg=name)
    np.testing.assert_array_equal(net(images, threads=3), expected)
    parts = [net(some(images, which)) for which in (slice(2), slice(2, 2), slice(2, None))]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    np.testing.assert_array_equal(net(some(images, slice(None, None, -1)))[::-1], expected)
    monkeypatch.setattr(executor, "CHUNK_BYTES", net.program.live_bytes)
    np.testing.assert_array_equal(net(images, threads=2), expected)


@pytest.mark.parametrize("seed", range(5))
def test_trace_holds_every_value_as_the_program_says(seed: int):
    net = net_of(seed)
    images = random_images(net.header, 2)
    values = net.trace(images, threads=1)
    assert set(values) == set(net.program.values)
    for name, value in net.program.values.items():
        x = values[name]
        assert x.shape == (value.steps, 2, value.height, value.width, value.channels)
        assert x.dtype == {"u8": np.uint8, "s8": np.int8, "i32": np.int32}[value.kind]
        assert value.lo <= x.min() and x.max() <= value.hi
    logits = values[net.program.output][0, :, 0, 0].astype(np.float32) / 2 ** net.header["fraction_bits"]
    np.testing.assert_array_equal(logits, net(images))


def test_no_pictures():
    net = net_of(1)
    logits = net(random_images(net.header, 0))
    assert logits.shape == (0, len(net.classes)) and logits.dtype == np.float32


def test_one_net_in_several_threads():
    net = net_of(2)
    images = random_images(net.header, 16)
    expected = net(images, threads=1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: net(images, threads=2), range(16)):
            np.testing.assert_array_equal(found, expected)


def test_wrong_pictures_are_named():
    net = net_of(3)
    good = random_images(net.header, 1)
    for wrong in (good.astype(np.float32), good.tolist(), None):
        with pytest.raises(TypeError, match="uint8"):
            net(wrong)
    for wrong in (good[0], good[..., :0], good[..., 1:, :], good[None]):
        with pytest.raises(ValueError, match="shape"):
            net(wrong)
    sequence = next(net for net in map(net_of, range(60)) if net.input_steps > 1)
    frames = random_images(sequence.header, 2)
    for wrong in (frames[0], frames[1:], frames[None]):
        with pytest.raises(ValueError, match=f"needs .{sequence.time_steps}, B, .* .time steps, batch, height"):
            sequence(wrong)
    for threads in (0, -1, 10**6):
        with pytest.raises(ValueError, match="threads"):
            net(good, threads=threads)
    for threads in (1.0, True, "2", [1]):
        with pytest.raises(TypeError, match="threads"):
            net(good, threads=threads)
    np.testing.assert_array_equal(net(good, threads=np.int64(2)), net(good))
    for name in (["scalar"], None, "abacus"):
        with pytest.raises(KernelError, match="no set"):
            kernels.use(name)


def test_load_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    header, tensors = random_artifact(4)
    write(tmp_path / "mine.bitspike", header, tensors)
    monkeypatch.setattr(runtime, "ZOO", tmp_path)
    images = random_images(header, 2)
    np.testing.assert_array_equal(load("mine")(images), load(str(tmp_path / "mine.bitspike"))(images))
    with pytest.raises(ArtifactError, match="Built in: mine"):
        load("yours")
    assert "mine" not in repr(load("mine")) and "random" in repr(load("mine"))


def test_an_existing_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "zoo").mkdir()
    for place, seed in (("zoo/mine.bitspike", 4), ("renamed", 5), ("mine", 6)):
        write(tmp_path / place, *random_artifact(seed))
    monkeypatch.setattr(runtime, "ZOO", tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    assert load("renamed").header["program"] == random_artifact(5)[0]["program"]
    assert load("mine").header["program"] == random_artifact(6)[0]["program"]
    (tmp_path / "mine").unlink()
    (tmp_path / "mine").mkdir()  # a data set, say
    assert load("mine").header["program"] == random_artifact(4)[0]["program"]


def test_a_run_folder_is_told_to_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for run in ("run1", tmp_path / "run1"):
        with pytest.raises(ArtifactError, match="export it first: 'bitspike export"):
            load(run)


def test_importing_needs_neither_torch_nor_pillow():
    code = (
        "import sys, bitspike.deploy as d; loaded = {'torch', 'PIL', 'scipy'} & set(sys.modules); assert not loaded, loaded; "
        "assert d.kernels.active() == d.kernels.available()[-1]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numpy_alone_is_enough():
    code = (
        "import sys; sys.modules['bitspike.deploy._kernels'] = None; from bitspike.deploy import kernels; "
        "assert kernels.available() == ['numpy'] and kernels.active() == 'numpy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
