"""Round trips, hand-made bytes of every format, truncation, hostile sizes and fuzzed bytes."""
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitspike.data.events import DTYPE, FORMATS, EventError, events, gesture_labels, iterate, read, write
from bitspike.data.events import aedat4 as aedat4_format
from bitspike.extras import MissingExtra

NEEDS = {"hdf5": "h5py"}
SIZE = {"aedat2": (128, 128), "nmnist": None, "npy": None}


def write_or_skip(path, data, format, **more):
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])
    write(path, data, format, **more)


# ------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [0, 1, 20, 20_000])
def test_round_trip(format, number, recording, tmp_path):
    data = recording(number)
    size = (128, 128) if format == "aedat2" else (100, 120)
    path = tmp_path / "recording.bin"  # a name that says nothing but to N-MNIST, which has no other mark when short
    write_or_skip(path, data, format, size=size)
    if format == "nmnist" and not number:
        with pytest.raises(EventError, match="empty"):
            read(path)
        return
    if format == "npz":
        path = path.rename(tmp_path / "recording")
    found = read(path)
    assert found.format == format and found.data.dtype == DTYPE and np.array_equal(found.data, data)
    expected = SIZE.get(format, size)
    assert found.size == (expected if format != "aedat3" else None)
    pieces = list(iterate(path, 999))
    assert [len(p) for p in pieces] == [999] * (number // 999) + [number % 999] * bool(number % 999)
    assert not pieces or np.array_equal(np.concatenate([p.data for p in pieces]), data)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file stays"


@pytest.mark.parametrize(("compression", "package"), [("lz4", "lz4"), ("zstd", "zstandard")])
def test_aedat4_compressed(compression, package, recording, tmp_path):
    pytest.importorskip(package)
    data = recording(20_000)
    with (tmp_path / "x").open("wb") as file:
        aedat4_format.write(file, data, (100, 120), compression)
    assert np.array_equal(read(tmp_path / "x").data, data)


def test_missing_package(recording, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    path = tmp_path / "x"
    with path.open("wb") as file:
        aedat4_format.write(file, recording(10), None)
    raw = bytearray(path.read_bytes())
    raw[14 + 4 + 24] = 1  # the compression of the header
    path.write_bytes(raw)
    with pytest.raises(ImportError, match="pip install lz4"):
        read(path)


@pytest.mark.parametrize("format", ["evt2", "evt3", "dat", "aedat2", "aedat3", "nmnist"])
def test_long_times(format, recording, tmp_path):
    """Overflows of every clock, over block boundaries; pauses of minutes."""
    data = recording(300_000, span=20_000_000)
    data["t"][150_000:] += 600_000_000
    if format == "dat":
        data["t"] += (1 << 32) - 10_000_000
    elif format == "aedat2":
        data["t"] += (1 << 31) - 1_000_000
        data = data[data["t"] >= 0]
        data["t"][0] = (1 << 31) - 1_000_000
    elif format == "aedat3":
        data["t"] += (1 << 31) - 1_000_000
    write(tmp_path / "x", data, format)
    assert np.array_equal(read(tmp_path / "x").data, data)


def test_time_may_run_backwards(tmp_path, recording):
    data = recording(1000, span=100_000)
    data["t"][500:] -= 2000
    data["t"] += 5000
    for format in ("evt2", "evt3", "dat", "aedat2", "aedat3", "aedat4", "nmnist", "npz"):
        write(tmp_path / "x", data, format)
        assert np.array_equal(read(tmp_path / "x").data, data), format


@pytest.mark.parametrize(("format", "change", "message"), [
    ("aedat2", {"x": 128}, "x lies in .*128"), ("nmnist", {"y": 240}, "y lies in .*240"), ("evt3", {"x": 2048}, "x lies"),
    ("evt2", {"t": -1}, "t lies"), ("dat", {"t": 1 << 33}, "32-bit"), ("npy", {"p": 2}, "p lies"),
    ("tiff", {}, "unknown format"),
])
def test_what_a_format_cannot_hold(format, change, message, tmp_path):
    row = {"t": 1, "x": 1, "y": 1, "p": 1, **change}
    with pytest.raises(EventError, match=message):
        write(tmp_path / "x", events(*([row[n]] for n in "txyp")), format)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- by hand
def test_evt3_vectors(tmp_path):
    words = [0x8001, 0x6005, 0x0007, 0x3000 | 0x800 | 100, 0x4000 | 0b100000000011, 0x5000 | 0b10000001,
             0x4000, 0x4001, 0x2000 | 50, 0x6006, 0xA000, 0x4001, 0x3000 | 9, 0x5001]
    (tmp_path / "x").write_bytes(b"% evt 3.0\n% end\n" + np.array(words, "<u2").tobytes())
    found = read(tmp_path / "x")
    t = 4096 + 5
    assert found.data.tolist() == [(t, 100, 7, 1), (t, 101, 7, 1), (t, 111, 7, 1), (t, 112, 7, 1), (t, 119, 7, 1),
                                   (t, 132, 7, 1), (t, 50, 7, 0), (t + 1, 144, 7, 1), (t + 1, 9, 7, 0)]
    assert found.skipped == {"triggers": 1}


@pytest.mark.parametrize("format", ["evt2", "evt3"])
def test_state_between_blocks(format, recording, tmp_path, monkeypatch):
    """The same events whatever the size of a block."""
    from bitspike.data.events import core

    random = np.random.default_rng(1)
    kinds = random.choice([0, 1, 8, 10, 14] if format == "evt2" else [0, 2, 3, 4, 5, 6, 8, 10, 14, 15], 5000)
    if format == "evt2":
        raw = (kinds.astype(np.uint32) << 28 | random.integers(0, 1 << 28, 5000, np.uint32)).astype("<u4")
    else:
        raw = (kinds << 12 | random.integers(0, 1 << 10, 5000)).astype("<u2")
    (tmp_path / "x").write_bytes(f"% evt {format[-1]}.0\n% end\n".encode() + raw.tobytes())
    whole = read(tmp_path / "x", on_error="prefix")
    assert len(whole) > 100
    for size in (1, 7, 1000):
        monkeypatch.setattr(core, "BLOCK", size)
        found = read(tmp_path / "x", on_error="prefix")
        assert np.array_equal(found.data, whole.data) and found.skipped == whole.skipped
        assert (found.problem and found.problem.offset) == (whole.problem and whole.problem.offset)


def test_aedat2_layouts(tmp_path):
    pairs = struct.pack(">II", 3 << 8 | 5 << 1 | 1, 10) + struct.pack(">II", 1 << 15, 11) + struct.pack(">II", 0, 0xFFFFFFFF)
    (tmp_path / "x").write_bytes(b"#!AER-DAT2.0\r\n# hello\r\n" + pairs)
    found = read(tmp_path / "x")
    assert found.data[0].item() == (10, 122, 124, 0) and found.skipped == {"special": 1}
    assert read(tmp_path / "x", layout="cifar10-dvs").data[0].item() == (10, 124, 122, 0)
    assert read(tmp_path / "x", layout="dvs128-raw").data[0].item() == (10, 5, 3, 1)
    with pytest.raises(EventError, match="unknown layout 'x'; allowed: dvs128"):
        read(tmp_path / "x", layout="x")
    davis = struct.pack(">II", 259 << 22 | 345 << 12 | 1 << 11, 10) + struct.pack(">II", 1 << 31, 11) + struct.pack(
        ">II", 1 << 10, 12) + struct.pack(">II", 260 << 22, 13)
    (tmp_path / "y").write_bytes(b"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.Davis346red\r\n" + davis)
    found = read(tmp_path / "y", on_error="prefix")
    assert found.data.tolist() == [(10, 0, 0, 1)] and found.skipped == {"frame or inertial samples": 1, "special": 1}
    assert found.problem.offset == (tmp_path / "y").stat().st_size - 8 and "y=260" in str(found.problem)


def test_aedat3_packets(tmp_path):
    def packet(kind, overflow, rows, width=8):
        return struct.pack("<hh6i", kind, 0, width, 4, overflow, len(rows), len(rows), len(rows)) + b"".join(
            struct.pack("<Ii", *row) for row in rows)

    body = packet(0, 0, [(1, 5)]) + packet(1, 2, [(1 | 2 | 9 << 2 | 8 << 17, 7), (0, 8)])
    (tmp_path / "x").write_bytes(b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n" + body)
    found = read(tmp_path / "x")
    assert found.data.tolist() == [((2 << 31) + 7, 8, 9, 1)] and found.size == (128, 128)
    assert found.skipped == {"special": 1, "marked invalid": 1}


def test_nmnist_overflow(tmp_path):
    rows = [(1, 2, 0x80, 0, 5), (0, 240, 0, 0, 0), (3, 4, 0, 0, 6)]
    (tmp_path / "x.bin").write_bytes(b"".join(bytes(r) for r in rows))
    assert read(tmp_path / "x.bin").data.tolist() == [(5, 1, 2, 1), (8192 + 6, 3, 4, 0)]


def test_gesture_labels(tmp_path):
    path = tmp_path / "user01_fluorescent_labels.csv"
    path.write_text("class,startTime_usec,endTime_usec\n2,10,20\n11,30,40\n")
    assert [tuple(span) for span in gesture_labels(path)] == [(1, 10, 20), (10, 30, 40)]
    path.write_text("class,startTime_usec,endTime_usec\n2,10,20\n12,30,40\n")
    with pytest.raises(EventError, match="line 3"):
        gesture_labels(path)


def test_plain_arrays(tmp_path):
    rows = np.array([[5, 1, 2, -1], [6, 3, 4, 1]])
    np.save(tmp_path / "a.npy", rows)
    assert read(tmp_path / "a.npy").data.tolist() == [(5, 1, 2, 0), (6, 3, 4, 1)]
    np.savez(tmp_path / "b.npz", t=rows[:, 0], x=rows[:, 1], y=rows[:, 2], p=rows[:, 3] > 0)
    assert read(tmp_path / "b.npz").data.tolist() == [(5, 1, 2, 0), (6, 3, 4, 1)]
    np.savez_compressed(tmp_path / "c.npz", events=rows.astype(np.float64))
    assert len(read(tmp_path / "c.npz")) == 2
    np.save(tmp_path / "d.npy", rows + [0.5, 0, 0, 0])
    with pytest.raises(EventError, match=r"t = 5.5, expected a whole number .* \(multiply seconds by 1e6\)"):
        read(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.array([{"t": 1}]), allow_pickle=True)
    with pytest.raises(EventError, match="Python objects"):
        read(tmp_path / "e.npy")
    np.savez(tmp_path / "f.npz", a=rows)
    with pytest.raises(EventError, match="has a; expected columns t, x, y and p"):
        read(tmp_path / "f.npz")


# ------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("hdf5", "npz")])
def test_truncated(format, recording, tmp_path):
    data = recording(2000)
    path = tmp_path / "x.bin"
    write(path, data, format, size=(128, 128))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(EventError, match=r"x\.bin at byte \d+: .*on_error=") as caught:
        read(path)
    assert 0 < caught.value.offset < len(raw)
    found = read(path, on_error="prefix")
    assert 0 <= 2000 - len(found) <= (2000 if format == "aedat4" else 1) and np.array_equal(found.data, data[:len(found)])
    assert str(found.problem) == str(caught.value)
    pieces = list(iterate(path, 300, on_error="prefix"))
    assert sum(map(len, pieces)) == len(found) and str(pieces[-1].problem) == str(caught.value)
    assert all(p.problem is None for p in pieces[:-1])


def test_outside_the_sensor(recording, tmp_path):
    data = recording(100)
    data["x"][60] = 500
    write(tmp_path / "x", data, "dat", size=None)
    raw = (tmp_path / "x").read_bytes().replace(b"% Version 2\n", b"% Version 2\n% Width 120\n% Height 100\n")
    (tmp_path / "x").write_bytes(raw)
    found = read(tmp_path / "x", on_error="prefix")
    assert len(found) == 60 and found.problem.offset == len(raw) - 8 * 40 and "x=500" in str(found.problem)


def test_hostile_sizes(recording, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + struct.pack("<hh6i", 1, 0, 8, 4, 0, 2**31 - 1, 2**31 - 1, 0))
    with pytest.raises(EventError, match="announces"):
        read(path)
    path.write_bytes(b"#!AER-DAT4.0\r\n" + struct.pack("<I", 2**32 - 1))
    with pytest.raises(EventError, match="truncated or corrupt"):
        read(path)
    text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999, 4)}"
    header = b"\x93NUMPY\x01\x00\x46\x00" + text.ljust(69) + b"\n"
    path.write_bytes(header + bytes(64))
    found = read(path, on_error="prefix")
    assert len(found) == 2 and found.problem.offset == len(header) + 64
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        for name in "txyp":
            archive.writestr(f"{name}.npy", header)
    with pytest.raises(EventError, match="claims int64"):
        read(tmp_path / "z.npz")


def test_aedat4_bomb(recording, tmp_path, monkeypatch):
    frame = pytest.importorskip("lz4.frame")
    monkeypatch.setattr(aedat4_format, "_LIMIT", 1 << 16)
    path = tmp_path / "x"
    with path.open("wb") as file:
        aedat4_format.write(file, recording(100), None, "lz4")
    bomb = frame.compress(bytes(1 << 24))
    path.write_bytes(path.read_bytes() + struct.pack("<ii", 0, len(bomb)) + bomb)
    found = read(path, on_error="prefix")
    assert len(found) == 100 and "unpacks to more than" in str(found.problem)


@pytest.mark.parametrize(("raw", "message"), [
    (b"", "empty"), (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "which no format"),
    (b"#!AER-DAT1.0\r\n", "AEDAT 2.0, 3.1 and 4.0"), (b"#!AER-DAT3.0\r\n", "only 3.1"), (b"#!AER-DAT2", "first line"),
    (b"% evt 2.1\n% end\n", "EVT 2.1"), (b"% hello\n", "neither an encoding"),
])
def test_not_a_recording(raw, message, tmp_path):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(EventError, match=message):
        read(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """format -> the bytes of a small valid file."""
    folder = tmp_path_factory.mktemp("seeds")
    random = np.random.default_rng(0)
    data = events(np.sort(random.integers(0, 90_000, 60)), *(random.integers(0, n, 60) for n in (100, 90, 2)))
    out = {}
    for format in FORMATS:
        if format != "hdf5":  # what h5py does with damaged files is h5py's
            write(folder / format, data, format, size=(128, 128))
            out[format] = (folder / format).read_bytes()
    return out


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "hdf5"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed(format, seeds, tmp_path, data):
    raw = bytearray(seeds[format])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=8)):
        raw[at] = value
    raw = raw[:data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=40))
    path = tmp_path / f"{format}.bin" if format == "nmnist" else tmp_path / format
    path.write_bytes(raw)
    try:
        whole = read(path)
    except EventError as error:
        assert error.path == path and (error.offset is None or 0 <= error.offset <= len(raw))
        found = read(path, on_error="prefix")
        assert str(found.problem) == str(error)
    except MissingExtra:  # the flipped byte was that of the compression
        assert format == "aedat4"
    else:
        assert whole.data.dtype == DTYPE and whole.problem is None and (not len(whole) or whole.data["p"].max() <= 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", b"#!AER-DAT2.0\r\n", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n", b"#!AER-DAT4.0\r\n",
                              b"% evt 2.0\n% end\n", b"% evt 3.0\n% end\n", b"% Version 2\n\x0c\x08", b"\x93NUMPY",
                              b"PK\x03\x04"]),
       rest=st.binary(max_size=300))
def test_random_bytes(start, rest, tmp_path):
    (tmp_path / "x").write_bytes(start + rest)
    assert read(tmp_path / "x", on_error="prefix").data.dtype == DTYPE


@pytest.mark.parametrize("byte", [0, 0xFF, 0x20, 0xF0, 1])
@pytest.mark.parametrize("length", [10, 4000])
def test_constant_bytes_are_no_recording(byte: int, length: int, tmp_path):
    """What a crash leaves of a file, often zeros."""
    path = tmp_path / "crashed.bin"
    path.write_bytes(bytes([byte]) * length)
    with pytest.raises(EventError, match="which no format that is read here does"):
        read(path)
