"""`bitspike run FILE RECORDING`: whole recordings, live streams, GIF and HTML."""
from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitspike.cli import call
from bitspike.data.events import events, read, write
from bitspike.data.events.framing import Frames
from bitspike.deploy import artifact, load

T, SIDE, CLASSES = 4, 8, ("</script>box", "mug", "pen")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A convolution, a LIF and two means; its file says that it was trained on windows of 1 ms of a 16 x 16 sensor."""
    return make_network(tmp_path / "net.bitspike", {"sensor": [16, 16], "layout": None, "window_us": 1000}, "time")


def make_network(path: Path, known: dict | None, by: str) -> Path:
    random, scheme, width = np.random.default_rng(0), {"kind": "uniform", "bits": 4}, len(CLASSES)
    tensors = {"w": artifact.pack_codes(random.integers(-8, 8, (width, 3, 3, 2)), scheme), "m": np.full(width, 900, np.int32),
               "b": random.integers(-9999, 9999, width).astype(np.int32)}
    program = [
        {"op": "conv", "in": ["pixels"], "out": "x", "weight": "w", "scheme": scheme, "shape": [width, 2, 3, 3],
         "stride": [1, 1], "padding": [1, 1], "groups": 1, "m": "m", "s": 3, "b": "b", "range": [0, 255]},
        {"op": "lif", "in": ["x"], "out": "s", "decay": [1, 1], "gain": [1, 0], "threshold": 1 << 14, "reset": "soft",
         "steps": T, "strict": False},
        {"op": "mean", "in": ["s"], "out": "a", "over": "space", "m": 1 << 18},
        {"op": "mean", "in": ["a"], "out": "logits", "over": "time", "m": 1}]
    provenance = {"settings": {"frames_by": by}, **({"events": known} if known else {})}
    artifact.write(path, {
        "name": "events", "input": {"height": SIDE, "width": SIDE, "channels": 2, "resize": None, "steps": T},
        "classes": list(CLASSES), "time_steps": T, "fraction_bits": 16, "program": program, "output": "logits",
        "provenance": provenance}, tensors)
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """10 ms of events, 100 a millisecond."""
    random = np.random.default_rng(1)
    t = np.arange(1000) * 10 + 5_000_000
    write(tmp_path / "rec.npz", events(t, random.integers(0, 16, 1000), random.integers(0, 16, 1000),
                                       random.integers(0, 2, 1000)), "npz", size=(16, 16))
    return tmp_path / "rec.npz"


def test_a_whole_recording(recording: Path, tmp_path: Path, capsys):
    """Trained on whole recordings cut into T equal times: so it is cut."""
    from bitspike.data.events import read

    network = make_network(tmp_path / "net.bitspike", {"sensor": [16, 16], "layout": None, "window_us": None}, "time")
    broken = tmp_path / "broken.dat"
    broken.write_bytes(b"% Version 2\n\x0c\x08123")
    assert call(["run", str(network), str(recording), str(broken), "--json"]) == 2
    out = capsys.readouterr()
    good, bad = json.loads(out.out)
    frames = Frames(T, (SIDE, SIDE), "time").of(read(recording).data, (16, 16))
    logits = load(network)(frames.transpose(0, 2, 3, 1)[:, None])[0]
    assert [g["index"] for g in good["top"]] == np.argsort(-logits, kind="stable").tolist()
    assert "broken.dat at byte 14: 3 bytes are left" in bad["error"] and "broken.dat" in out.err


def test_whole_recordings_of_windows_of_a_fixed_length(network: Path, recording: Path, tmp_path: Path, capsys):
    """Four windows of 1 ms, as in training: what is shorter is not stretched, what is longer is refused, as that would be."""
    assert call(["run", str(network), str(recording)]) == 2
    out = capsys.readouterr()
    assert "it lasts 9,991 us; the network was trained on 4 windows of 1,000 us, 4,000 us in all. Give --stream" in out.err
    assert not out.out
    from bitspike.data.events import read

    for number, by in ((400, "time"), (150, "time"), (150, "count")):
        part = read(recording).data[:number]
        write(tmp_path / "part.npz", part, "npz", size=(16, 16))
        path = make_network(tmp_path / "other.bitspike", {"sensor": [16, 16], "window_us": 1000}, by)
        assert call(["run", str(path), str(tmp_path / "part.npz"), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert call(["run", str(path), str(tmp_path / "part.npz"), "--stream", "--json"]) == 0
        streamed = json.loads(capsys.readouterr().out)["decisions"]
        frames = np.zeros((T, 2, SIDE, SIDE), np.uint8)
        for t, x, y, p in part.tolist():
            frames[(t - 5_000_000) // 1000, p, y // 2, x // 2] += 1
        logits = load(network)(frames.transpose(0, 2, 3, 1)[:, None])[0]
        shown = {guess["index"]: guess["logit"] for guess in found["top"]}
        assert [shown[i] for i in range(3)] == logits.tolist()
        assert number < 400 or streamed[-1]["top"] == found["top"]


def test_a_network_whose_file_does_not_say_how(recording: Path, tmp_path: Path, capsys):
    path = make_network(tmp_path / "net.bitspike", None, "?")
    assert call(["run", str(path), str(recording)]) == 0
    assert "does not say how its recordings were cut; taken: 4 frames of equal numbers of events" in capsys.readouterr().err
    assert call(["run", str(path), str(recording), "--stream"]) == 2, "nothing is guessed about a stream"
    assert "how long is a window?" in capsys.readouterr().err


def test_a_clock_that_is_set_back(network: Path, tmp_path: Path, capsys):
    """The time shown goes on; the totals and a warning say what happened."""
    random = np.random.default_rng(1)
    t = np.concatenate([np.arange(500) * 10 + 9_000_000_000, [10**15], np.arange(500) * 10])
    write(tmp_path / "rec.npz", events(t, random.integers(0, 16, 1001), random.integers(0, 16, 1001),
                                       random.integers(0, 2, 1001)), "npz", size=(16, 16))
    words = ["run", str(network), str(tmp_path / "rec.npz"), "--stream"]
    assert call([*words, "--save", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr()
    assert "its clock jumped, to 0 us: the windows begin anew there" in out.err
    lines = out.out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["0.004 s", "0.009 s", "0.010 s (a round not over"]
    assert "10 windows, 1,000 events" in lines[3] and "1 event dropped whose time was far off, 1 jump of the clock" in lines[3]
    data = json.loads(re.search(r"const D=(\{.*?\});const I", (tmp_path / "a.html").read_text())[1])
    assert data["stop"] == list(range(1000, 11_000, 1000)) and data["h"] == SIDE
    assert call([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [d["clock_jumped"] for d in found["decisions"]] == [False] * 5 + [True] + [False] * 4
    assert found["totals"]["astray"] == 1 and found["totals"]["jumps"] == 1


@pytest.mark.parametrize("more", [[], ["--stream"], ["--stream", "--json"]])
def test_a_reader_that_goes_away(network: Path, recording: Path, tmp_path: Path, more: list[str]):
    """`bitspike run ... | head -1` ends, and says nothing."""
    import shlex

    write(tmp_path / "part.npz", events(np.arange(300), [1] * 300, [2] * 300, [1] * 300), "npz")
    code = "import sys; from bitspike.cli import main; main()"
    words = shlex.join([sys.executable, "-u", "-c", code, "run", str(network), *[str(tmp_path / "part.npz")] * 20, *more])
    for reader in ("head -1", "true"):
        done = subprocess.run(f"{words} | {reader}", shell=True, capture_output=True, text=True, timeout=30)
        assert not done.stderr and len(done.stdout.splitlines()) <= 1


def test_a_stream_as_json(network: Path, recording: Path, capsys):
    assert call(["run", str(network), str(recording), "--stream", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    steps = [d["step"] for d in found["decisions"]]
    assert [i for i, d in enumerate(found["decisions"]) if d["ends_round"]] == [3, 7]
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2] and all(d["events"] == 100 for d in found["decisions"])
    assert found["decisions"][0]["start_us"] == 5_000_000 and found["decisions"][0]["stop_us"] == 5_001_000
    assert found["totals"]["events"] == 1000 and found["totals"]["late"] == 0
    assert call(["run", str(network), str(recording), "--stream", "--json", "--never-reset", "--window-events", "300"]) == 0
    found = json.loads(capsys.readouterr().out)["decisions"]
    assert [d["events"] for d in found] == [300, 300, 300, 100] and [d["step"] for d in found] == [1, 2, 3, 4]


def test_a_stream_as_lines(network: Path, recording: Path, capsys):
    assert call(["run", str(network), str(recording), "--stream", "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "0.004 s", "0.008 s", "0.010 s (a round not over"] and "over: 2 of 4 windows): " in lines[2]
    assert "10 windows, 1,000 events" in lines[3] and "decision after" in lines[3]
    best = lines[1].split(": ")[1].split("  ")[0]
    assert lines[3].endswith(f"after the last whole round, at 0.008 s: {best}"), "not what little the last windows say"
    assert call(["run", str(network), str(recording), "--stream", "--never-reset"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["0.004 s", "0.008 s", "0.010 s"]


def test_an_interrupted_stream_says_what_it_saw(network: Path, recording: Path, tmp_path: Path):
    """Ctrl-C: a summary, one calm line, no file."""
    words = ["run", str(network), str(recording), "--stream", "--speed", "0.001", "--save", str(tmp_path / "a.gif")]
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from bitspike.cli import main; main()"
    play = subprocess.Popen([sys.executable, "-c", start, *words],  # the handler: a job in the background ignores SIGINT
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert play.stdout is not None
    first = play.stdout.readline()  # the first round, four of ten seconds on
    play.send_signal(signal.SIGINT)
    out, err = play.communicate(timeout=20)
    seen = re.search(r"(\d+) windows, ", out)
    assert first.startswith("0.004 s: ") and seen and 4 <= int(seen[1]) < 10, out
    assert err.strip().endswith("interrupted") and "Traceback" not in err and play.returncode == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bitspike", "rec.npz"]


@pytest.mark.parametrize("number", [1000, 999, 5, 4])
def test_windows_by_count_as_in_training(number: int, recording: Path, tmp_path: Path, capsys):
    """T parts of the whole recording, the rest with the last."""
    from bitspike.data.events import read

    path = make_network(tmp_path / "count.bitspike", None, "count")
    write(tmp_path / "part.npz", read(recording).data[:number], "npz", size=(16, 16))
    for more in ([], ["--speed", "1000"]):
        assert call(["run", str(path), str(tmp_path / "part.npz"), "--stream", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)["decisions"]
        assert [d["events"] for d in found] == [number // 4] * 3 + [number - 3 * (number // 4)]
    assert call(["run", str(path), str(tmp_path / "part.npz"), "--json"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["top"] == found[-1]["top"], "after T windows, the whole sequence"


def test_gif(network: Path, recording: Path, tmp_path: Path, capsys):
    assert call(["run", str(network), str(recording), "--stream", "--save", str(tmp_path / "a.gif")]) == 0
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 10 and film.size == (496, 328)
        film.seek(3)
        pixels = np.asarray(film.convert("RGB"))[:256, :256]
    bright = pixels.max(2) > 60
    assert bright.mean() > 0.05, "events are seen"
    amber, blue = (pixels[..., 0] > pixels[..., 2] + 40).mean(), (pixels[..., 2] > pixels[..., 0] + 40).mean()
    assert amber > 0.02 and blue > 0.02
    assert "wrote" in capsys.readouterr().err


def test_page(network: Path, recording: Path, tmp_path: Path):
    assert call(["run", str(network), str(recording), "--stream", "--save", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("</script>") == 1, "nothing else is needed"
    data = json.loads(re.search(r"const D=(\{.*?\});const I", page)[1])
    assert data["names"] == list(CLASSES) and len(data["shares"]) == 10 and data["stop"][-1] == 10_000
    sheet = Image.open(io.BytesIO(base64.b64decode(data["sheet"].partition(",")[2])))
    assert sheet.size == (data["w"] * data["columns"], data["h"])


def test_a_film_shows_what_the_windows_held(network: Path, recording: Path, tmp_path: Path):
    """Dropped events are not drawn, and nothing behind them is lost."""
    plain, odd = read(recording).data, tmp_path / "odd.npy"
    at = len(plain) // 2
    more = events([10**12, int(plain["t"][at])], [3, 900], [3, 3], [1, 1])  # far in the future; beside the sensor
    write(odd, np.concatenate([plain[:at], more, plain[at:]]).astype(plain.dtype), "npy")
    films = []
    for path in (recording, odd):
        assert call(["run", str(network), str(path), "--stream", "--save", str(tmp_path / "a.html")]) == 0
        films.append(json.loads(re.search(r"const D=(\{.*?\});const I", (tmp_path / "a.html").read_text())[1]))
    for name in ("sheet", "stop", "events", "shares"):
        assert films[0][name] == films[1][name], name


@pytest.mark.parametrize("speed", ["nan", "inf", "-1"])
def test_speeds_that_are_none(network: Path, recording: Path, capsys, speed):
    assert call(["run", str(network), str(recording), "--stream", "--speed", speed]) == 2
    assert "--speed" in capsys.readouterr().err


def test_damaged_and_empty_recordings(network: Path, recording: Path, tmp_path: Path, capsys):
    """The others are still played; --prefix takes what is whole; without an event there is no decision."""
    write(tmp_path / "whole.dat", events(np.arange(0, 8000, 10), [1] * 800, [2] * 800, [1] * 800), "dat", size=(16, 16))
    cut, empty = tmp_path / "cut.dat", tmp_path / "empty.aedat"
    cut.write_bytes((tmp_path / "whole.dat").read_bytes()[:-3])
    empty.write_bytes(b"#!AER-DAT2.0\r\n# AEChip: DVS128\r\n")
    assert call(["run", str(network), str(cut), str(empty), str(recording), "--stream"]) == 2
    out = capsys.readouterr()
    assert "5 bytes are left" in out.err and "--prefix" in out.err and "no events in it" in out.err
    assert [line for line in out.out.splitlines() if line.startswith("/")] == [str(cut), str(empty), str(recording)]
    assert "10 windows, 1,000 events" in out.out
    assert call(["run", str(network), str(cut), str(recording), "--stream", "--json", "--prefix"]) == 0
    out = capsys.readouterr()
    first, second = json.loads(out.out)
    assert first["totals"]["events"] == 799 and second["totals"]["events"] == 1000
    assert "cut.dat at byte" in out.err and "Taken: the 799 events before." in out.err
    whole = str(make_network(tmp_path / "whole.bitspike", None, "time"))
    assert call(["run", whole, str(cut), "--prefix"]) == 0 and "Taken: the 799" in capsys.readouterr().err
    assert call(["run", whole, str(cut)]) == 2 and "--prefix" in capsys.readouterr().err
    assert call(["run", str(network), str(empty), "--prefix"]) == 2 and "no events in it" in capsys.readouterr().err


def test_what_is_refused(network: Path, recording: Path, tmp_path: Path, capsys):
    def refused(*words: str) -> str:
        assert call(["run", str(network), str(recording), *words]) == 2
        return capsys.readouterr().err

    assert "go with --stream" in refused("--save", "x.gif")
    message = refused("--stream", "--save", "x.mp4")
    assert "a .gif or .html of one recording" in message and "such as .mp4, are made of the .gif" in message
    assert "--save x.gif, of 2 recordings" in refused(str(recording), "--stream", "--save", "x.gif")
    assert "make it first" in refused("--stream", "--save", str(tmp_path / "none" / "x.gif"))
    assert "give one of --window-us" in refused("--stream", "--window-us", "5", "--window-events", "5")
    assert "at least 1" in refused("--stream", "--window-us", "0")
    silent = make_network(tmp_path / "time.bitspike", None, "time")
    assert call(["run", str(silent), str(recording), "--stream"]) == 2
    assert "how long is a window?" in capsys.readouterr().err
    assert call(["run", "cifar10", str(tmp_path / "none.png")]) == 2
    assert "none.png: there is no such file" in capsys.readouterr().err
    assert call(["run", "cifar10", str(recording), "--stream"]) == 2
    message = capsys.readouterr().err
    assert "was made for pictures of 3 channels" in message and "needs a network of event frames" in message
    for more in ([], ["--stream"]):
        assert call(["run", str(network), str(tmp_path / "none.aedat"), str(tmp_path), *more]) == 2
        message = capsys.readouterr().err
        assert "none.aedat: there is no such file" in message and f"{tmp_path}: this is a folder" in message
        assert "Errno" not in message


@pytest.mark.parametrize("wanted", [[], ["--stream"]])
def test_events_outside_the_sensor(network, tmp_path, capsys, wanted):
    """A few are dropped, and the decision is that of the others; many are another sensor."""
    random = np.random.default_rng(1)
    x = random.integers(0, 16, 300)
    y, t = random.integers(0, 16, 300), np.arange(300) * 10
    said = []
    for odd in (0, 2, 30):
        columns = np.where(np.arange(300) < 300 - odd, x, 900)
        write(tmp_path / "a.npy", events(t, columns, y, np.zeros(300, int)), "npy")
        if odd == 2:  # the same without them
            write(tmp_path / "b.npy", events(t[:298], x[:298], y[:298], np.zeros(298, int)), "npy")
            assert call(["run", str(network), str(tmp_path / "b.npy"), "--json", *wanted]) == 0
            said.append(capsys.readouterr().out)
        assert call(["run", str(network), str(tmp_path / "a.npy"), "--json", *wanted]) == 0
        out = capsys.readouterr()
        said.append(out.out)
        assert ("trained on a sensor of 16 x 16" in out.err) == (odd == 30)
        if odd == 2:
            assert "2 events outside" in out.err or json.loads(out.out)["totals"]["outside"] == 2
    tops = [re.findall(r'"logit": ([^,}\s]+)', text) for text in said]
    assert tops[1] == tops[2] and tops[2]
