"""Recipes, optimizers, losses, run folders, and what a run refuses."""
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitspike.checkpoints import build, load_weights, resolved_spec, save_checkpoint, start_run
from bitspike.data import Arrays, Dataset, load
from bitspike.evaluation import as_input
from bitspike.layers import quantize_, quantizers
from bitspike.neurons import IELIF, LIF, timewise
from bitspike.objectives import (
    classification_loss,
    first_nonfinite,
    prediction,
    spike_costs,
    spike_penalty,
    temporal_loss,
)
from bitspike.optimizers import Average, learning_rate, make_optimizer, parameter_groups
from bitspike.papers import all_recipes, find_recipe
from bitspike.recipe import Recipe, RecipeError, differences
from bitspike.spec import QuantSpec, Scheme
from bitspike.tasks import task_of
from bitspike.training import NonFinite, RunError, _working_model, evaluate, load_run, normalise, read_metrics, train


class Net(nn.Module):
    """Two convolutions with neurons; grey 28x28 images, ten classes."""

    def __init__(self, width: int = 8, spoil: float = 1.0, levels: tuple[int, ...] = (4, 4)) -> None:
        super().__init__()
        self.conv1, self.norm1, self.n1 = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), IELIF(levels[0])
        self.conv2, self.norm2, self.n2 = nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), IELIF(levels[1])
        self.head = nn.Linear(width * 49, 10)
        self.spoil = spoil

    def forward(self, x_BCHW):
        x = self.n1(self.norm1(self.conv1(x_BCHW))[None])[0]
        x = self.n2(self.norm2(self.conv2(x) * self.spoil)[None])[0]
        return self.head(x.flatten(1))


RECIPE = Recipe("tiny", Net, bits=4, data="fashion_mnist_sample", image_size=28, mean=(0.286,), std=(0.353,), epochs=1,
                batch_size=100, lr=0.02, schedule="triangle", warmup_epochs=0.2)


class _Seven(Net):
    """Answers for seven classes only."""

    def forward(self, x):
        return super().forward(x)[..., :7]


@pytest.fixture(scope="module")
def data():
    return load("fashion_mnist_sample", None)


# ------------------------------------------------------------------------------------------------- recipes
def test_override_parses_by_type():
    recipe = RECIPE.override({"lr": "1e-3", "epochs": "2.5", "batch_size": "64", "betas": "0.8,0.9", "flip": "alternating",
                              "channels_last": "no", "model_options.width": "16", "data": "cifar10", "bits": "1",
                              "model_options.levels": "[2, 4]"})
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.betas) == (1e-3, 2.5, 64, (0.8, 0.9))
    assert recipe.channels_last is False and recipe.model_options == {"width": 16, "levels": (2, 4)}
    assert recipe.quant_spec() == QuantSpec({"*": Scheme("binary")}) and RECIPE.lr == 0.02


@pytest.mark.parametrize("key, text, message", [
    ("lrr", "1", r"no field 'lrr' \(nearest: 'lr'\)"),
    ("warmup_epoch", "1", r"nearest: 'warmup_epochs'"),
    ("model", "x", r"the field 'model' cannot be set by text\. .*model_options\.KEY=VALUE"),
    ("model_options", "3", r"'model_options' cannot be set by text\. .*model_options\.KEY=VALUE"),
    ("name", "x", r"'name' cannot be set by text\.$"),
    ("model_options.levels", "4", r"model_options\.levels='4': allowed: a list, such as \[4, 4\]"),
    ("distill", "1", "the recipe has no objective"),
    ("teacher", "runs/a", "the recipe has no objective"),
    *[(key, text, f"field {key}=.*: allowed: {allowed}") for key, values, allowed in [
        ("lr", "nan inf 0 -1", "a finite number above 0"), ("epochs", "nan inf 0", "a finite number above 0"),
        ("betas", "0.9 0.9,1 -1,0.5 0.9,0.9,0.9", "two numbers"), ("momentum", "1 -0.1 nan", "0 .* up to"),
        ("label_smoothing", "1 -0.1", "0 .* up to"), ("random_erasing", "1.1 -1 nan", "0..1"),
        ("workers", "-1", "an integer"), ("cutout", "-1", "an integer"), ("cutout", "29", "at most image_size=28"),
        ("translate", "-1", "an integer"), ("translate", "28", "less than image_size=28"),
        ("std", "0 -1 nan inf ,", "finite numbers above 0"), ("mean", "nan ,", "finite numbers"),
        *[(name, "-1 nan inf", "a finite number of at least 0") for name in (
            "weight_decay", "plain_lr", "scale_lr", "warmup_epochs", "warmup_lr", "min_lr", "grad_clip", "mixup", "cutmix",
            "mixup_off_epoch", "spike_penalty", "distill")],
    ] for text in values.split()],
    ("lr", "fast", r"field lr='fast': allowed: a number"),
    ("batch_size", "1.5", "a whole number"),
    ("batch_size", "0", "at least 1"),
    ("optimizer", "adam", r"adamw \| lamb \| sgd \| muon"),
    ("betas", "a,b", "numbers separated by commas"),
    ("channels_last", "maybe", r"true \| false"),
    ("bits", "9", r"1\.\.8, or 32"),
    ("ema", "1", "up to, not including, 1"),
    ("accumulate", "3", "a divisor of batch_size=100"),
    ("model_options.widht", "3", r"no option 'widht' \(nearest: 'width'\); allowed: width, spoil, levels"),
    ("model_options.width", "wide", "a whole number"),
    ("spec", "/nowhere.json", "'none' or the path of a spec"),
])
def test_override_errors(key, text, message):
    with pytest.raises(RecipeError, match=message):
        RECIPE.override({key: text})


def test_spec_override(tmp_path):
    spec = QuantSpec({"*": Scheme("lsq", 3), "head": Scheme("full")})
    (tmp_path / "s.json").write_text(spec.to_json())
    recipe = RECIPE.override({"spec": str(tmp_path / "s.json")})
    assert recipe.quant_spec() == spec
    with pytest.raises(RecipeError, match="bits=2 has no effect"):
        recipe.override({"bits": "2"})
    assert recipe.override({"bits": "2", "spec": "none"}).quant_spec() == QuantSpec({"*": Scheme("lsq", 2)})
    assert RECIPE.override({"bits": "32"}).quant_spec() is None


def test_recipe_round_trip():
    recipe = RECIPE.override({"model_options.levels": "[2, 4]", "spec": "none"})
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(stored) == recipe
    assert differences(stored, RECIPE.override({"workers": "7"}).to_dict()) == ["model_options: {'levels': [2, 4]} -> {}"]
    older = {name: value for name, value in stored.items() if name not in ("frames", "task", "scales", "drop_epochs")}
    assert differences(older, stored) == []  # a run from before these fields goes on
    for path in ("os:system", "bitspike.models:nothing", "nowhere:Net"):
        with pytest.raises(RecipeError, match=f"the run names {path}"):
            Recipe.from_dict({**stored, "model": path})
    with pytest.raises(RecipeError, match="unknown field 'colour'"):
        Recipe.from_dict({**stored, "colour": 1})


def test_find_recipe():
    with pytest.raises(RecipeError, match=r"no recipe 'qsd_transformer.cifar_10_smal'"):
        find_recipe("qsd_transformer.cifar_10_smal")
    for name, recipe in all_recipes().items():
        assert find_recipe(name) == recipe and Recipe.from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()


# ---------------------------------------------------------------------------------------------- optimizers
def test_groups():
    model = build(RECIPE)
    weights, plain, scales = parameter_groups(model, RECIPE)
    assert [p.dim() for p in weights["params"]] == [4, 4, 2] and weights["weight_decay"] == 0.05
    assert len(plain["params"]) == 7 and plain["weight_decay"] == 0
    assert len(scales["params"]) == 3 and scales["weight_decay"] == 0


def test_fused_adamw_on_channels_last_is_adamw():
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last)
    layer.weight.data.copy_(weight)
    optimizer = make_optimizer(layer, RECIPE)
    other = weight.clone().requires_grad_()
    plain = torch.optim.AdamW([other], lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, foreach=False)
    for _ in range(3):
        layer.weight.grad, other.grad = grad.clone(), grad.contiguous()
        optimizer.step()
        plain.step()
    assert torch.allclose(layer.weight, other, atol=1e-6)


def test_cosine():
    recipe = RECIPE.override({"schedule": "cosine", "warmup_epochs": "1", "warmup_lr": "0.01", "min_lr": "0.002"})
    rates = [learning_rate(recipe, s, 40, 10) for s in range(41)]
    assert all(math.isclose(rates[s], r) for s, r in {0: 0.01, 5: 0.015, 10: 0.02, 25: 0.011, 40: 0.002}.items())
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_average():
    source, kept = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    average = Average(kept, 0.5)
    source.weight.data.fill_(4.0)
    average.update(source)
    assert kept.weight.tolist() == [4.0, 4.0], "the first update copies"
    source.weight.data.fill_(0.0)
    source.num_batches_tracked.fill_(7)
    average.update(source)  # decay min(0.5, 2/11)
    assert torch.allclose(kept.weight, torch.tensor(4 * 2 / 11)) and int(kept.num_batches_tracked) == 7


# -------------------------------------------------------------------------------------------------- losses
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.a, self.q, self.k, self.unread = LIF(), IELIF(4), IELIF(4), LIF()
        self.mix, self.head = nn.Conv2d(4, 8, 1, groups=2), nn.Linear(4, 3)

    def forward(self, x):
        s = self.a(self.stem(x)[None])
        both = self.mix(s.flatten(0, 1))
        q, k = both.chunk(2, 1)
        q, k = self.q(q[None])[0].flatten(2), self.k(k[None])[0].flatten(2)
        y = q @ (k.transpose(1, 2) @ k) if q.shape[1] == q.shape[2] else (k @ q.transpose(1, 2)) @ q
        self.unread(y[None])
        return self.head(torch.nn.functional.adaptive_avg_pool1d(y, 1).flatten(1))


def test_spike_costs_by_hand():
    model = Attention()
    pixels = torch.zeros(2, 1, 2, 3)
    # mix: 8 outputs x 2 inputs x 6 pixels; k q^T: 4x4x6, half each; (k q^T) q: 4x6x4, all q's
    assert spike_costs(model, pixels) == {"a": 96.0, "q": 48.0 + 96.0, "k": 48.0, "unread": 0.0}


def test_spike_costs_of_sums_and_concatenations():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.add, self.cat = LIF(), LIF(), nn.Conv2d(2, 3, 1), nn.Conv2d(6, 1, 1)

        def forward(self, x):
            a, b = self.a(x[None])[0], self.b(-x[None])[0]
            return self.add(a + b), self.cat(torch.cat([a, b, a], 1))

    # the sum: every spike of either counts, 2 x 3 x 4 pixels; the concatenation: a has two thirds of 6 x 4
    assert spike_costs(Joined(), torch.ones(1, 2, 2, 2)) == pytest.approx({"a": 24 + 16, "b": 24 + 8})


def test_spike_costs_leave_the_model_alone():
    model = build(RECIPE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    costs = spike_costs(model, torch.zeros(1, 1, 28, 28))
    assert costs == {"n1": 7 * 7 * 8 * 8 * 9.0, "n2": 49 * 80.0}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.n1._forward_hooks


def test_penalty_weighs_by_cost():
    counts = {"a": torch.tensor(2.0), "b": torch.tensor(1.0), "c": torch.tensor(9.0)}
    assert float(spike_penalty(counts, {"a": 1.0, "b": 3.0, "c": 0.0})) == 1.25
    with pytest.raises(ValueError, match="no neuron of the model feeds"):
        spike_penalty(counts, {"c": 0.0})


def test_loss_over_time_is_that_of_the_mean():
    logits, y = torch.randn(3, 4, 10), torch.tensor([1, 2, 3, 4])
    loss = classification_loss(RECIPE)
    assert torch.allclose(loss(y, logits, y), loss(y, logits.mean(0), y))


def test_temporal_loss_is_the_mean_of_the_steps_losses():
    logits, y = torch.randn(3, 4, 10), torch.tensor([1, 2, 3, 4])
    loss, smooth = temporal_loss(RECIPE), temporal_loss(RECIPE.override({"label_smoothing": "0.1"}))
    steps = [nn.functional.cross_entropy(one, y) for one in logits]
    assert torch.allclose(loss(y, logits, y), sum(steps) / 3)
    assert loss(y, logits, y) > classification_loss(RECIPE)(y, logits, y)  # cross entropy is convex
    hot = nn.functional.one_hot(y, 10).float()
    assert torch.allclose(smooth(y, logits[0], hot), smooth(y, logits[0], y))
    assert torch.allclose(loss(y, (logits, logits[0]), y), (sum(steps) / 3 + steps[0]) / 2)


def test_several_heads():
    one, two, y = torch.randn(4, 10), torch.randn(3, 4, 10), torch.tensor([1, 2, 3, 4])
    loss = classification_loss(RECIPE)
    assert torch.allclose(loss(y, (one, two), y), (loss(y, one, y) + loss(y, two, y)) / 2)
    assert torch.allclose(prediction((one, two)), (one + two.mean(0)) / 2)


class Frames(nn.Module):
    """A network for sequences of two-channel frames with two heads: [T, B, 2, 28, 28] -> in training a pair of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(2, 8, 5, 4), nn.BatchNorm2d(8), LIF(scale_input=False)
        self.head, self.head2 = nn.Linear(8 * 36, 10), nn.Linear(8 * 36, 10)

    def forward(self, x_TBCHW):
        assert x_TBCHW.shape[0] == 3 and x_TBCHW.shape[2:] == (2, 28, 28)
        s = self.neuron(timewise(self.norm, timewise(self.conv, x_TBCHW))).flatten(2)
        logits = self.head(s), self.head2(s).mean(0)
        return logits if self.training else prediction(logits)


def test_sequences_of_frames_and_two_heads(tmp_path, data):
    def recordings(split):
        frames = split.images[:300, None].expand(-1, 3, 2, -1, -1).contiguous()
        frames[:, :, 1] = 255 - frames[:, :, 1]
        return Arrays(frames, split.labels[:300])

    made = Dataset("frames", data.classes, *(recordings(s) for s in (data.train, data.val, data.test)), data.hash)
    recipe = Recipe("frames", Frames, data="frames", image_size=28, mean=(0.3, 0.7), std=(0.35,), epochs=8, batch_size=50,
                    lr=0.01, mixup=0.1, spike_penalty=0.01)
    final = train(recipe, made, tmp_path)
    assert final["test_n"] == 300 and final["test_top1"] > 60  # chance is 10
    model, stored = load_run(tmp_path, recipe)
    assert evaluate(model, stored, made)["top1"] == final["test_top1"]
    images = as_input(normalise(made.test.images[:5], recipe))
    assert images.shape == (3, 5, 2, 28, 28) and torch.allclose(
        images[1, 2, 1], (made.test.images[2, 1, 1] / 255 - 0.7) / 0.35, atol=1e-5)


def test_normalise_makes_three_channels():
    pixels = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    recipe = RECIPE.override({"mean": "0.1,0.2,0.3", "std": "0.5"})
    x = normalise(pixels, recipe)
    assert x.shape == (2, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x, (pixels / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- runs
def test_a_run_from_start_to_finish(tmp_path, data, capsys):
    recipe = RECIPE.override({"ema": "0.8", "spike_penalty": "0.05", "epochs": "2"})
    last = train(recipe, data, tmp_path / "run", overrides={"lr": "0.03"}, log_seconds=0)
    epochs = read_metrics(tmp_path / "run")
    assert epochs[-1] == last and last["test_n"] == 1000 and last["test_top1"] > 55
    assert [row["step"] for row in epochs] == [38, 76, 76] and epochs[1]["loss"] < epochs[0]["loss"]
    assert {"val_top1", "val_top5", "val_mean_spikes", "images_per_s", "lr"} <= epochs[0].keys()
    assert "images/s" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["overrides"] == {"lr": "0.03"} and config["recipe"]["lr"] == 0.03 and config["data_hash"] == data.hash
    model, loaded = load_run(tmp_path / "run")
    assert loaded.lr == 0.03 and not model.training
    assert evaluate(model, loaded, data, "test")["top1"] == last["test_top1"]
    spec = QuantSpec.from_json((tmp_path / "run" / "checkpoint" / "spec.json").read_text())
    assert spec == QuantSpec({name: Scheme("lsq", 4) for name in ("conv1", "conv2", "head")})

    assert train(recipe, data, tmp_path / "run", overrides={"lr": "0.03"}) == last
    assert "is finished: 76 steps" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"run of recipe 'tiny' with other settings: lr: 0\.03 -> 0\.02\. Choose another --out"):
        train(recipe, data, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"ema\.safetensors: not a whole safetensors file"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("changes", [
    {"optimizer": "lamb", "precision": "bf16"}, {"optimizer": "muon", "bits": "32"},
    {"optimizer": "sgd", "train_on": "train+val", "lr": "0.1", "cutout": "6", "random_erasing": "0.5"},
])
def test_other_ways_to_train(tmp_path, data, changes):
    last = train(RECIPE, data, tmp_path, overrides={"model_options.width": "12", **changes})
    assert last["test_top1"] > 30
    assert ("val_top1" in read_metrics(tmp_path)[0]) == ("train_on" not in changes)


def test_an_objective_replaces_the_loss(tmp_path, data):
    calls = []

    def objective(model, recipe, loss):
        def doubled(images, logits, targets):
            calls.append((images.shape, logits.shape))
            return 2 * loss(images, logits, targets)

        return doubled

    recipe = Recipe(**{**vars(RECIPE), "objective": objective, "epochs": 3 / 38})
    first = train(recipe, data, tmp_path / "a")
    plain = train(Recipe(**{**vars(recipe), "objective": None}), data, tmp_path / "b")
    assert calls == [((100, 1, 28, 28), (100, 10))] * 3 and first["step"] == plain["step"] == 3
    assert read_metrics(tmp_path / "a")[0]["loss"] > 1.9 * read_metrics(tmp_path / "b")[0]["loss"]


def test_binary_weights_are_annealed(tmp_path, data):
    spec = QuantSpec({"conv2": Scheme("binary", options={"gradient": "ir_net"})})
    train(Recipe(**{**vars(RECIPE), "bits": 32, "spec": spec, "epochs": 2}), data, tmp_path)
    model, _ = load_run(tmp_path)
    assert float(model.conv2.parametrizations.weight[0].progress) == pytest.approx(75 / 76)  # set before the last of 76 steps


def test_a_loss_that_is_not_finite(tmp_path, data):
    with pytest.raises(NonFinite, match=r"in step 0 \(learning rate 0\); .*norm2 \(BatchNorm2d; its input is not finite"):
        train(RECIPE, data, tmp_path / "a", overrides={"model_options.spoil": "nan"})
    with pytest.raises(NonFinite, match=r"in step 2 \(learning rate 2.5e\+37\); .*norm1 \(BatchNorm2d; its input is finite"):
        train(RECIPE, data, tmp_path / "b", overrides={"lr": "1e38", "optimizer": "sgd"})
    model = Net()
    model.conv2.weight.data[0, 0] = math.inf
    ones = torch.ones(2, 1, 28, 28)
    assert first_nonfinite(model, lambda: model(ones)) == "conv2 (Conv2d; its parameter 'weight' is not finite)"
    sound = Net()
    assert "so it is the loss itself" in first_nonfinite(sound, lambda: sound(ones))


@pytest.mark.parametrize("content, message", [
    ({}, r"not a run, there is no config\.json \(the folder is empty\)"),
    ({"photo.jpg": ""}, r"the folder holds photo\.jpg"),
    ({"config.json": "{"}, r"config\.json: cannot be read"),
    ({"config.json": "[]"}, "expected an object with a 'recipe'"),
    ({"config.json": '{"recipe": {"name": "x", "model": "torch.nn:NoSuch"}}'}, "the run names torch.nn:NoSuch"),
    ({"config.json": json.dumps({"recipe": RECIPE.to_dict()})}, "has no checkpoint yet"),
])
def test_folders_that_are_no_runs(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        load_run(tmp_path)


def test_train_refuses_a_folder_of_something_else(tmp_path, data):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(RunError, match=r"not a run.*the folder holds photo\.jpg"):
        train(RECIPE, data, tmp_path)


def test_two_processes_cannot_train_one_run(tmp_path, data):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (tmp_path / "config.json").write_text(json.dumps({"recipe": RECIPE.to_dict(), "data_hash": data.hash}))
        with pytest.raises(RunError, match="another process is training it"):
            train(RECIPE, data, tmp_path)
        other.stdin.close()
    train(RECIPE, data, tmp_path, overrides={"lr": "0.02"})


def test_wrong_sizes(tmp_path, data):
    with pytest.raises(RecipeError, match=r"multiple of 2 \(mixup and cutmix mix pairs of pictures\) x accumulate=20"):
        train(RECIPE, data, tmp_path / "a", overrides={"accumulate": "20", "mixup": "0.5"})
    with pytest.raises(ValueError, match="3800 training images are less than one batch of 5000"):
        train(RECIPE, data, tmp_path / "b", overrides={"batch_size": "5000"})


@pytest.mark.parametrize("wrong, message", [
    ({"accumulate": "20", "mixup": "0.5"}, "must be a multiple"),
    ({"rand_augment": "strong"}, r"rand_augment='strong': allowed: what timm reads, .*\(AssertionError\)\.$"),
    ({"rand_augment": "rand-x3"}, "Unknown RandAugment"),
    ({"model_options.levels": "[0, 4]"}, r"image_size=28, .*model_options=\{'levels': \(0, 4\)\}: ValueError: IELIF.*[^.]\.$"),
    ({"image_size": "8"}, "its model does not work with image_size=8, .*RuntimeError"),
    ({"mean": "0.1,0.2,0.3"}, "its model does not work with image_size=28, 3 values in mean"),
])
def test_a_failed_start_does_not_claim_the_folder(tmp_path, data, wrong, message):
    with pytest.raises(RecipeError, match=message):
        train(RECIPE, data, tmp_path / "run", overrides={"epochs": "0.03", **wrong})
    assert not (tmp_path / "run").exists()
    train(RECIPE, data, tmp_path / "run", overrides={"epochs": "0.03"})


def test_a_run_without_a_checkpoint_may_begin_again(tmp_path, data):
    with pytest.raises(NonFinite, match="there is no checkpoint yet"):
        train(RECIPE, data, tmp_path, overrides={"epochs": "0.03", "model_options.spoil": "nan"})
    assert json.loads((tmp_path / "config.json").read_text())["overrides"]["model_options.spoil"] == "nan"
    train(RECIPE, data, tmp_path, overrides={"epochs": "0.03"})
    assert json.loads((tmp_path / "config.json").read_text())["overrides"] == {"epochs": "0.03"}
    with pytest.raises(RunError, match="with other settings"):
        train(RECIPE, data, tmp_path, overrides={"epochs": "0.06"})
    with pytest.raises(RunError, match="another process has trained it in the meantime"):
        start_run(tmp_path, RECIPE, {}, data.hash)


def test_trying_the_model_leaves_it_fresh(data):
    model, expected = _working_model(RECIPE, task_of(RECIPE), data), build(RECIPE)
    assert not any(bool(quantizer.initialized) for _, quantizer in quantizers(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


@pytest.mark.parametrize("more", [{}, {"mixup": "0.5"}])
def test_a_wrong_number_of_outputs_is_refused_before_training(data, tmp_path, more):
    recipe = replace(RECIPE, model=_Seven)
    with pytest.raises(RecipeError, match=r"its model has 7 outputs, fashion_mnist_sample has 10 classes.*num_classes=10"):
        train(recipe, data, tmp_path / "run", overrides={"epochs": "0.03", **more})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_survives_a_kill_at_any_moment(tmp_path, monkeypatch):
    """Stop the writing at each system call in turn: what is found is the old state or the new one, whole."""
    import bitspike.checkpoints as module

    class Killed(BaseException):
        pass

    left = [math.inf]

    def counted(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in [(module, "save_file"), (module, "_sync"), (module.shutil, "rmtree"), (module.torch, "save"),
                        (module.Path, "rename"), (module.Path, "write_text"), (module.Path, "mkdir")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    layer, found = nn.Linear(2, 2), []

    def save(value):
        layer.weight.data.fill_(value)
        save_checkpoint(tmp_path, {"model": layer.state_dict()}, QuantSpec(), {"step": value}, {"optimizer": {}})

    for moment in range(200):
        save(2 * moment)
        left[0] = moment
        try:
            save(2 * moment + 1)
        except Killed:
            pass
        else:
            break
        finally:
            left[0] = math.inf
        folder = module.checkpoint_folder(tmp_path)
        load_weights(folder, "model", layer)
        step = module.read_state(folder)["step"]
        assert torch.equal(layer.weight, torch.full((2, 2), float(step)))
        assert torch.load(folder / "state.pt", weights_only=True) == {"optimizer": {}}
        found.append(step - 2 * moment)
    assert moment > 10 and set(found) == {0, 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_weights_of_another_model_are_refused(tmp_path):
    save_checkpoint(tmp_path, {"model": nn.Linear(2, 2).state_dict()}, QuantSpec(), {"step": 0}, {})
    for other in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False)):
        with pytest.raises(RunError, match=r"tensors do not fit the recipe's model, for example '(weight|bias)'"):
            load_weights(tmp_path / "checkpoint", "model", other)


def test_resolved_spec_names_layers():
    spec = QuantSpec({"*": Scheme("lsq", 4), "head": Scheme("full")})
    model = quantize_(Net(), spec)
    four = Scheme("lsq", 4)
    assert dict(resolved_spec(model, spec).rules) == {"conv1": four, "conv2": four, "head": Scheme("full")}
