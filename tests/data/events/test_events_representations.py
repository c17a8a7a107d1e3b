"""Frames, voxel grids, time surfaces and augmentations against loops over single events."""
import subprocess
import sys

import numpy as np
import pytest

from bitspike.data.events import EventError, augment, events, frames, time_surface, voxel_grid
from bitspike.data.events.representations import edges, windows

SIZE = (100, 120)


@pytest.mark.parametrize("by", ["count", "time"])
@pytest.mark.parametrize("number", [0, 1, 3, 5003])
def test_frames(by, number, recording):
    data = recording(number)
    out = frames(data, SIZE, 4, by)
    assert out.shape == (4, 2, *SIZE) and out.dtype == np.int32 and out.sum() == number
    wanted = np.zeros_like(out)
    for i, (t, x, y, p) in enumerate(data.tolist()):
        each = number // 4 if by == "count" else (int(data["t"][-1]) - int(data["t"][0])) // 4
        step = min(3, (i if by == "count" else t - int(data["t"][0])) // each) if each else 3
        wanted[step, p, y, x] += 1
    if number != 1 and not (number == 3 and by == "count"):
        assert np.array_equal(out, wanted)
    shuffled = data[np.random.default_rng(0).permutation(number)]
    if by == "time":
        assert np.array_equal(frames(shuffled, SIZE, 4, by), out)


def test_edges_of_one_moment():
    assert edges(events([5, 5, 5], [0] * 3, [0] * 3, [0] * 3), 2, "time").tolist() == [0, 0, 3]


def test_windows(recording):
    data = recording(2000)
    out = windows(data, SIZE, microseconds=50_000)
    steps = (data["t"] - data["t"][0]) // 50_000
    assert np.array_equal(out.sum(axis=(1, 2, 3)), np.bincount(steps))
    assert windows(data, SIZE, count=300).sum(axis=(1, 2, 3)).tolist() == [300] * 6 + [200]
    assert np.array_equal(windows(data[::-1], SIZE, microseconds=50_000), out), "by time, the order makes no difference"
    for step in range(len(out)):
        assert np.array_equal(out[step], frames(data[steps == step], SIZE, 1)[0])
    assert windows(data[:0], SIZE, count=300).shape == (0, 2, *SIZE)
    with pytest.raises(EventError, match="counters"):
        windows(data, SIZE, microseconds=1)


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_voxel_grid(bins, recording):
    data = recording(3000)
    wanted = np.zeros((bins, *SIZE))
    first, last = int(data["t"][0]), int(data["t"][-1])
    for t, x, y, p in data.tolist():
        for b in range(bins):
            wanted[b, y, x] += (2 * p - 1) * max(0.0, 1 - abs(b - (bins - 1) * (t - first) / (last - first)))
    assert np.allclose(voxel_grid(data, SIZE, bins), wanted, atol=1e-5)
    assert np.allclose(voxel_grid(data[::-1], SIZE, bins), wanted, atol=1e-5)
    assert not voxel_grid(data[:0], SIZE, bins).any()


def test_time_surface(recording):
    data = recording(3000)
    moments = np.array([0, 50_000, 50_000, 200_000])
    wanted = np.zeros((4, 2, *SIZE))
    for k, moment in enumerate(moments):
        for t, x, y, p in data.tolist():
            if t <= moment:
                wanted[k, p, y, x] = np.exp(-(moment - t) / 1e4)
    assert np.allclose(time_surface(data, SIZE, 1e4, moments), wanted, atol=1e-6)
    assert np.allclose(time_surface(data[::-1], SIZE, 1e4)[0].max(), 1)


def test_errors(recording):
    data = recording(10)
    for make in (lambda s: frames(data, s, 2), lambda s: voxel_grid(data, s, 2), lambda s: time_surface(data, s, 1.0)):
        with pytest.raises(EventError, match="outside the sensor of 3 x 3"):
            make((3, 3))
    with pytest.raises(EventError, match="allowed: at least 1, and 'count' or 'time'"):
        frames(data, SIZE, 2, "frames")


def test_augment(recording):
    data, before = recording(2000), recording(2000)
    random = np.random.default_rng(0)
    flipped = augment.flip(data, SIZE, random, 1.0)
    assert np.array_equal(flipped["x"] + data["x"], np.full(2000, 119))
    assert np.array_equal(augment.flip(flipped, SIZE, random, 1.0), data)
    assert np.array_equal(augment.flip(data, SIZE, random, 0.0), data)
    rolled = augment.roll(data, SIZE, np.random.default_rng(3), 30)
    dx, dy = np.random.default_rng(3).integers(-30, 31, 2)
    assert set(rolled.tolist()) <= {(t, x + dx, y + dy, p) for t, x, y, p in data.tolist()} and len(rolled) > 500
    assert np.array_equal(augment.rotate(data, SIZE, random, 0.0), data)
    turned = augment.rotate(data, SIZE, random, 30.0)
    assert 0 < len(turned) < 2000 and turned["x"].max() < 120 and turned["y"].max() < 100
    sheared = augment.shear(data, SIZE, np.random.default_rng(4), 0.2)
    slope = np.random.default_rng(4).uniform(-0.2, 0.2)
    wanted = np.rint(data["x"] + slope * (data["y"] - 49.5)).astype(int)
    assert sheared["x"].tolist() == [x for x in wanted if 0 <= x < 120] and len(sheared) < 2000
    gone = 2000 - len(augment.cutout(data, SIZE, random, 30))
    assert 0 < gone <= 2000 * 900 / 12000 * 1.5
    jittered = augment.jitter_time(data, random, 500.0)
    assert (np.diff(jittered["t"]) >= 0).all() and len(jittered) == 2000 and not np.array_equal(jittered["t"], data["t"])
    assert 1300 < len(augment.drop(data, random, 0.25)) < 1700
    mixed = augment.mix(data, recording(2000, seed=5), random, 0.5)
    assert (np.diff(mixed["t"]) >= 0).all() and 1700 < len(mixed) < 2300
    assert np.array_equal(data, before), "the input is not changed"
    one, two = (augment.rotate(data, SIZE, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, two), "decided by the generator alone"
    for change in (augment.flip, augment.roll, augment.rotate, augment.shear, augment.geometric, augment.cutout):
        assert len(change(data[:0], SIZE, random)) == 0
    with pytest.raises(EventError, match=r"share=2; allowed: 0\.\.1"):
        augment.drop(data, random, 2)


def test_one_of_six_changes(recording):
    """How far every event may go: 5/128 of 256 x 128 is 10 and 5 pixels, 0.3 of half the height 19."""
    size = (128, 256)
    data = recording(500, size)
    data["p"] = 1
    data["t"] = np.arange(500)  # tells which event it was
    kinds = set()
    for seed in range(60):
        out = augment.geometric(data, size, np.random.default_rng(seed))
        old = data[out["t"]]
        dx, dy = out["x"].astype(int) - old["x"], out["y"].astype(int) - old["y"]
        which = int(np.random.default_rng(seed).integers(6))
        kinds.add(which)
        if which in (0, 5):
            assert not dx.any() and not dy.any() and (len(out) == 500) >= (which == 0) and len(out) > 350
        elif which == 1:
            assert not dy.any() and abs(dx).max() <= 19.5
        elif which in (2, 3):
            moved, still, most = (dx, dy, 10) if which == 2 else (dy, dx, 5)
            assert len(set(moved)) == 1 and not still.any() and abs(moved[0]) <= most
        else:
            assert abs(dx).max() <= 2 * 143 * np.sin(np.deg2rad(15)) + 1
    assert kinds == set(range(6))
    assert np.array_equal(augment.geometric(data, size, np.random.default_rng(3), 0.0)["x"], data["x"])


def test_modules_need_no_torch():
    """Each module alone, without what `bitspike.data` imports."""
    code = ("import sys, types, importlib.util, pathlib\n"
            "root = pathlib.Path(importlib.util.find_spec('bitspike').origin).parent\n"
            "package = types.ModuleType('bitspike.data'); package.__path__ = [str(root / 'data')]\n"
            "sys.modules['bitspike.data'] = package\n"
            "import bitspike.data.events, bitspike.data.events.augment\n"
            "assert not {'torch', 'lz4', 'zstandard', 'h5py'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_memory_or_arithmetic_could_not_hold():
    far = events([-(1 << 62), 1 << 62], [0, 0], [0, 0], [1, 1])
    for call in (lambda: voxel_grid(far, (4, 4), 5), lambda: time_surface(far, (4, 4), 9.0),
                 lambda: windows(far, (4, 4), microseconds=1000)):
        with pytest.raises(EventError, match="no microseconds of a recording"):
            call()
    near = events([0, 1], [0, 0], [0, 0], [1, 1])
    for call in (lambda: voxel_grid(near, (4, 4), 10**9), lambda: frames(near, (4, 4), 10**9),
                 lambda: frames(near, (1 << 16, 1 << 16), 10)):
        with pytest.raises(EventError, match="counters"):
            call()
    with pytest.raises(EventError, match="pooled"):
        frames(near, (4, 4), 2, pooled=(0, 4))
    with pytest.raises(EventError, match="its end must be after"):
        frames(near, (4, 4), 2, "time", span=(5, 5))
