"""The compiled loops give what the numpy definitions give: events, counts of what is skipped, faults and their bytes."""
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitspike.data.events import events, frames, iterate, native, read, write
from bitspike.data.events.core import first_outside, is_sorted

pytestmark = pytest.mark.skipif(native.module is None, reason="the extension is not built")
_MANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
_HEADS = {"aedat2": b"#!AER-DAT2.0\r\n#End Of ASCII Header\r\n", "dat": b"% Version 2\n\x0c\x08", "evt2": b"% evt 2.0\n% end\n",
          "evt3": b"% evt 3.0\n% end\n", "nmnist": b""}


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(path, on_error="prefix")
    with monkeypatch.context() as patch:
        patch.setattr(native, "module", None)
        expected = read(path, on_error="prefix")
    assert found.data.dtype == expected.data.dtype and found.data.tobytes() == expected.data.tobytes()
    assert dict(found.skipped) == dict(expected.skipped) and found.size == expected.size
    assert str(found.problem) == str(expected.problem)


@_MANY
@given(data=st.data())
@pytest.mark.parametrize("format", ["aedat2", "aedat3", "nmnist", "dat", "evt2", "evt3"])
def test_damaged_files(format: str, recording, tmp_path: Path, monkeypatch, data) -> None:
    size = (30, 34) if format == "nmnist" else (100, 120)
    path = tmp_path / ("file.bin" if format == "nmnist" else "file")
    write(path, recording(400, size, data.draw(st.integers(0, 3)), data.draw(st.sampled_from([10_000, 30_000_000]))), format)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 12))):
        raw[data.draw(st.integers(min(60, len(raw) - 1), len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[:data.draw(st.integers(len(raw) // 2, len(raw)))])
    both(path, monkeypatch)


@_MANY
@given(words=st.binary(min_size=0, max_size=600), format=st.sampled_from(sorted(_HEADS)))
def test_any_words(words: bytes, format: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / ("any.bin" if format == "nmnist" else "any")
    path.write_bytes(_HEADS[format] + words + (b"" if format != "nmnist" else b"\0" * 5))
    both(path, monkeypatch)


@_MANY
@given(kinds=st.lists(st.sampled_from([0, 2, 3, 4, 4, 5, 6, 8, 8, 10, 14]), max_size=300), seed=st.integers(0, 99))
def test_evt3_words_of_known_types(kinds: list[int], seed: int, tmp_path: Path, monkeypatch) -> None:
    field = np.random.default_rng(seed).integers(0, 1 << 12, len(kinds)) & np.where(np.array(kinds) == 3, 0xBFF, 0xFFF)
    words = (np.array(kinds, np.int64) << 12 | field).astype("<u2") if kinds else np.zeros(0, "<u2")
    path = tmp_path / "words.raw"
    path.write_bytes(_HEADS["evt3"] + words.tobytes())
    both(path, monkeypatch)


@_MANY
@given(data=st.data(), number=st.integers(0, 1700), start=st.sampled_from([0, (1 << 31) - 4000, (1 << 32) - 4000]),
       format=st.sampled_from(["dat", "evt2"]))
def test_blocks_with_a_fault(data, number: int, start: int, format: str, recording, tmp_path: Path, monkeypatch) -> None:
    """Blocks are decoded without a branch unless something is odd: overflows, steps back, events off the sensor, bad types."""
    path, size = tmp_path / "file", (100, 120)
    there = recording(number, size, 0, 10_000)
    there["t"] += start
    there["t"][:1] = start  # what a .dat can begin with
    write(path, there, format, size=size)
    raw = bytearray(path.read_bytes())
    head = len(raw) - 8 * number if format == "dat" else raw.index(b"% end\n") + 6
    for _ in range(data.draw(st.integers(0, 3))):
        if len(raw) > head:
            raw[data.draw(st.integers(head, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    both(path, monkeypatch)


def test_a_piece_stays_when_the_next_is_read(recording, tmp_path: Path) -> None:
    """The buffer that a file is read into is taken over by the next block."""
    there = recording(200_000, (100, 120), 0, 1_000_000)
    for format in ("aedat2", "aedat3", "dat", "evt2", "evt3"):
        write(tmp_path / "file", there, format)
        pieces = list(iterate(tmp_path / "file", 30_000))
        assert [len(piece) for piece in pieces] == [30_000] * 6 + [20_000]
        whole = read(tmp_path / "file").data
        assert np.concatenate([piece.data for piece in pieces]).tolist() == whole.tolist()
        assert whole["x"].tolist() == there["x"].tolist()


def test_evt3_vectors_that_need_more_room(tmp_path: Path, monkeypatch) -> None:
    """Twelve events a word: the output of a block is larger than the block."""
    words = np.concatenate([[8 << 12 | 1, 6 << 12 | 5], np.tile([3 << 12 | 7, 4 << 12 | 0xFFF, 4 << 12 | 0xFFF], 4000)])
    path = tmp_path / "dense.raw"
    path.write_bytes(_HEADS["evt3"] + words.astype("<u2").tobytes())
    assert len(read(path)) == 4000 * 24
    both(path, monkeypatch)


@_MANY
@given(seed=st.integers(0, 99), number=st.integers(0, 500), steps=st.integers(1, 7), by=st.sampled_from(["count", "time"]),
       pooled=st.sampled_from([None, (9, 11), (5, 4), (30, 40)]))
def test_frames(seed: int, number: int, steps: int, by: str, pooled, recording, monkeypatch) -> None:
    data, size = recording(number, (30, 40), seed, 1000), (30, 40)
    found = frames(data, size, steps, by, pooled)
    with monkeypatch.context() as patch:
        patch.setattr(native, "module", None)
        np.testing.assert_array_equal(found, frames(data, size, steps, by, pooled))
    assert found.sum() == number and found.shape == (steps, 2, *(pooled or size))


def test_spans_are_cut_into_equal_times(recording) -> None:
    data = events([0, 99, 100, 250, 299, 300], [0] * 6, [0] * 6, [1] * 6)
    assert frames(data, (1, 1), 3, "time", span=(0, 300))[:, 1, 0, 0].tolist() == [2, 1, 2]


@_MANY
@given(times=st.lists(st.integers(-5, 5), max_size=40), x=st.integers(0, 12))
def test_looking_at_events(times: list[int], x: int, monkeypatch) -> None:
    data = events(times, [x] * len(times), range(len(times)), [1] * len(times))
    found = is_sorted(data), first_outside(data, 20, 10), first_outside(data[::2], 20, 10)
    with monkeypatch.context() as patch:
        patch.setattr(native, "module", None)
        assert found == (is_sorted(data), first_outside(data, 20, 10), first_outside(data[::2], 20, 10))
    assert found[0] == (times == sorted(times))


def test_the_extension_keeps_its_bounds() -> None:
    small = np.zeros(16, np.uint8)
    for name, extra in (("aedat2", (np.zeros(2, np.int64), 0)), ("aedat3", (0,)), ("dat", (np.zeros(3, np.int64), 9, 9)),
                        ("evt2", (np.zeros(6, np.int64), 9, 9)), ("evt3", (np.zeros(9, np.int64),)),
                        ("nmnist", (np.zeros(1, np.int64),))):
        with pytest.raises(ValueError, match="too small"):
            getattr(native.module, name)(np.zeros(64, np.uint8), small, *extra)
    outside = events([0], [3], [0], [1]).view(np.uint8)
    with pytest.raises(ValueError, match="too small"):
        native.module.accumulate(outside, np.zeros(1, np.int64), np.zeros(2, np.int64), 4, np.zeros(8, np.int32))
