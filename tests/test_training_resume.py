"""Interrupted anywhere and continued, a run ends in the very same weights."""
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bitspike.checkpoints import read_state
from bitspike.data import load
from bitspike.neurons import IELIF
from bitspike.recipe import Recipe
from bitspike.training import Interrupted, read_metrics, train

pause = 0.0  # seconds per forward pass: gives a parent process time to aim
stop_at: list[int] = []  # forward passes after which the model interrupts the program


class Net(nn.Module):
    """Batch norm, a neuron, dropout: state and randomness of every sort."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(1, 4, 5, 4, 2), nn.BatchNorm2d(4), IELIF(4)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4 * 49, 10)

    def forward(self, x_BCHW):
        if self.training and stop_at:
            stop_at[0] -= 1
            if stop_at[0] == 0:
                stop_at.clear()
                signal.raise_signal(signal.SIGINT)
        time.sleep(pause if self.training else 0)
        return self.head(self.drop(self.neuron(self.norm(self.conv(x_BCHW))[None])[0].flatten(1)))


RECIPE = Recipe("tiny", Net, bits=4, data="fashion_mnist_sample", image_size=28, mean=(0.286,), std=(0.353,), epochs=2,
                batch_size=380, lr=0.02, warmup_epochs=0.2, flip="alternating", translate=2, ema=0.9)
WAYS = {
    "adamw, bf16, penalty": {"precision": "bf16", "spike_penalty": "0.1", "batch_size": "500"},
    "sgd, accumulation, mixing": {"optimizer": "sgd", "accumulate": "2", "mixup": "0.8", "cutmix": "1", "random_erasing": "0.5",
                                  "ema": "0", "grad_clip": "1"},
    "lamb, RandAugment in workers": {"optimizer": "lamb", "rand_augment": "rand-m9-mstd0.5-inc1", "workers": "2"},
    "muon, binary": {"optimizer": "muon", "bits": "1"},
}


@pytest.fixture(autouse=True)
def one_thread():
    stop_at.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    return load("fashion_mnist_sample", None)


def files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoint").glob("*.safetensors")}


def measured(run: Path) -> list[dict]:
    """The metrics without their clocks."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_metrics(run)]


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_is_uninterrupted(tmp_path, data, way):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(RECIPE, data, whole, overrides=WAYS[way])
    for passes in (3, 6):
        stop_at[:] = [passes]
        with pytest.raises(Interrupted) as stopped:
            train(RECIPE, data, cut, overrides=WAYS[way])
        assert stopped.value.code == 130
    assert 0 < read_state(cut / "checkpoint")["step"] < read_state(whole / "checkpoint")["step"]
    train(RECIPE, data, cut, overrides=WAYS[way])
    assert files(cut) == files(whole) and measured(cut) == measured(whole)


def test_the_seed_decides(tmp_path, data):
    for name, seed in (("a", "0"), ("b", "1")):
        train(RECIPE, data, tmp_path / name, overrides={"seed": seed, "epochs": "0.2"})
    assert files(tmp_path / "a") != files(tmp_path / "b")


def go(run: str) -> None:
    """What the child process runs: slowly, with a checkpoint after every step."""
    global pause
    torch.set_num_threads(1)
    pause = 0.03
    train(RECIPE, None, run, checkpoint_minutes=0)


def start(run: Path) -> subprocess.Popen:
    code = ("import importlib.util, sys; name, path, run = sys.argv[1:]; "
            "s = importlib.util.spec_from_file_location(name, path); m = importlib.util.module_from_spec(s); "
            "sys.modules[name] = m; s.loader.exec_module(m); m.go(run)")
    source = str(Path(importlib.util.find_spec("bitspike").origin).parents[1])
    return subprocess.Popen([sys.executable, "-c", code, __name__, __file__, str(run)], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"})


def wait_for_step(run: Path, step: int, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if read_state(run / "checkpoint")["step"] >= step:
                return
        except Exception:
            pass  # not there yet, or just being replaced
        time.sleep(0.005)
    raise AssertionError(child.communicate(timeout=5))


def test_killed_and_terminated(tmp_path, data):
    train(RECIPE, data, tmp_path / "whole")
    run = tmp_path / "cut"
    child = start(run)
    wait_for_step(run, 3, child)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    child.stderr.close()
    child = start(run)
    wait_for_step(run, 11, child)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved after step" in said and "The same command goes on from here." in said
    train(RECIPE, data, run)
    assert files(run) == files(tmp_path / "whole") and measured(run) == measured(tmp_path / "whole")
