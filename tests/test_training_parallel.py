"""Two processes with the same global batch compute what one computes."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitspike.neurons import IELIF
from bitspike.recipe import Recipe
from bitspike.training import read_metrics, train


class Net(nn.Module):
    """Smooth, without batch statistics: those are per process."""

    def __init__(self, spikes: bool = False):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 5, 2), nn.Linear(6 * 144, 10)
        self.neuron = IELIF(4) if spikes else nn.Tanh()

    def forward(self, x_BCHW):
        return self.head(self.neuron(self.conv(x_BCHW)[None])[0].flatten(1))


RECIPE = Recipe("tiny", Net, data="fashion_mnist_sample", image_size=28, mean=(0.286,), std=(0.353,), epochs=4 / 95,
                batch_size=40, optimizer="sgd", lr=0.1, flip="random", translate=2, random_erasing=0.5)
WAYS = {
    "plain": {},
    "everything": {"accumulate": "2", "mixup": "0.8", "cutmix": "1", "bits": "4", "ema": "0.5", "model_options.spikes": "yes",
                   "spike_penalty": "0.1", "grad_clip": "0.5"},
}


def go(out: str) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    for name, changes in WAYS.items():
        train(RECIPE, None, Path(out) / name, overrides=changes)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_one(tmp_path, two_processes):
    two_processes(__name__, __file__, tmp_path / "two")
    for name, changes in WAYS.items():
        train(RECIPE, None, tmp_path / "one" / name, overrides=changes)
        one, two = (load_file(tmp_path / part / name / "checkpoint" / "model.safetensors") for part in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.allclose(one[key].double(), two[key].double(), rtol=1e-5, atol=1e-6), key
        first, second = (read_metrics(tmp_path / part / name) for part in ("one", "two"))
        assert abs(first[0]["loss"] - second[0]["loss"]) < 1e-5
        assert first[-1]["test_n"] == second[-1]["test_n"] == 1000
        assert abs(first[-1]["test_loss"] - second[-1]["test_loss"]) < 1e-5
