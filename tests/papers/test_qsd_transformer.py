"""QSD-Transformer: counts and sizes as published, distillation, recipes."""
from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402

from bitspike.layers import latent_weight, quantizable, quantize_, quantizer_of  # noqa: E402
from bitspike.models import meta_spikeformer as ms  # noqa: E402
from bitspike.models.published import PublishedWeightsError  # noqa: E402
from bitspike.neurons import IELIF, LIF  # noqa: E402
from bitspike.papers import qsd_transformer as qsd  # noqa: E402
from bitspike.recipe import Recipe, RecipeError  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402


# --------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(("size", "weights", "published"), [
    (ms.imagenet_15m, 15.015, 1.877), (ms.imagenet_31m, 31.194, 3.899), (ms.imagenet_55m, 55.163, 6.895)],
    ids=["15m", "31m", "55m"])
def test_counts_of_the_paper(size, weights, published):
    with torch.device("meta"):
        model = quantize_(size(), QuantSpec({"*": Scheme("lsq", 4)}))
    layers = quantizable(model).values()
    assert all(quantizer_of(layer) is not None for layer in layers)  # the ends too
    count = sum(latent_weight(layer).numel() for layer in layers)
    assert round(count / 1e6, 3) == weights
    assert round(sum(latent_weight(layer).numel() * quantizer_of(layer).bits for layer in layers) / 32 / 1e6, 3) == published


# -------------------------------------------------------------------------------------------- distillation
def maps(T, channels, seed, blocks=2):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.rand(T, 3, channels, 4, 5, generator=generator) for _ in "qkv") for _ in range(blocks)]


def plain(student, teacher, heads, parts):
    """The docstring's formula, with the N x N matrices."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for part in parts:
            grams = []
            for x in (ours["qkv".index(part)], theirs["qkv".index(part)]):
                tokens = x.mean(0).unflatten(1, (heads, -1)).flatten(3).transpose(2, 3).double()
                gram = tokens @ tokens.transpose(2, 3)
                grams.append(gram / gram.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None])
            total = total + (grams[0] - grams[1]).flatten(2).norm(dim=2).sum(1).mean()
    return total


@pytest.mark.parametrize(("heads", "parts"), itertools.product((1, 2), ("qkv", "qk", "v")))
def test_fine_grained_loss_is_its_formula(heads, parts):
    student, teacher = maps(4, 8, 0), maps(1, 12, 1)
    found = qsd.fine_grained_loss(student, teacher, heads, parts)
    torch.testing.assert_close(found.double(), plain(student, teacher, heads, parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_fine_grained_loss_does_not_see_magnitude(scale):
    student = maps(1, 8, 0)
    teacher = [tuple(scale * x for x in triple) for triple in student]
    assert float(qsd.fine_grained_loss(student, teacher, 2)) < 0.02  # 12 terms of at most 1e-3


def test_fine_grained_loss_gradient():
    x = torch.rand(1, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    teacher = maps(1, 4, 3, blocks=1)
    teacher = [tuple(t[:, :2, :, :3, :3] for t in teacher[0])]
    loss = qsd.fine_grained_loss([(x, x, x)], teacher, 2)
    loss.backward()
    direction = torch.randn_like(x)
    with torch.no_grad():
        ahead, behind = (qsd.fine_grained_loss([(y, y, y)], teacher, 2) for y in (x + 1e-2 * direction, x - 1e-2 * direction))
    assert float((ahead - behind) / 2e-2) == pytest.approx(float((x.grad * direction).sum()), rel=0.05, abs=1e-3)


def test_fine_grained_loss_of_silence_is_finite():
    x = torch.zeros(1, 2, 4, 3, 3, requires_grad=True)
    teacher = [tuple(torch.rand(1, 2, 4, 3, 3) for _ in "qkv")]
    loss = qsd.fine_grained_loss([(x, x, x)], teacher, 2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(6.0)  # every distance is 1
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("arguments", "message"), [
    ((maps(1, 8, 0), maps(1, 8, 0), 3), "8 channels do not divide into 3 heads"),
    ((maps(1, 8, 0), maps(1, 8, 0)[:1], 2), "shows 2 attention blocks, the teacher 1"),
    ((maps(1, 8, 0), maps(1, 8, 0), 2, "qx"), "letters of 'qkv'"),
    ((maps(1, 8, 0), [tuple(x[..., :3] for x in t) for t in maps(1, 8, 0)], 2), "20 tokens in a batch of 3, the teacher 12"),
])
def test_fine_grained_loss_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        qsd.fine_grained_loss(*arguments)


def tiny(num_classes: int = 4, topology: str = "strict") -> ms.MetaSpikeFormer:
    return ms.MetaSpikeFormer((8, 8, 16, 16), (1, 1), heads=4, num_classes=num_classes, layer_scale=1.0, topology=topology,
                              attention_scale=0.05)


def tiny_ann(num_classes: int = 4) -> ms.MetaSpikeFormer:
    return qsd.as_ann(tiny(num_classes))


def test_as_ann_leaves_no_spiking_neuron():
    model = tiny_ann()
    assert not [m for m in model.modules() if isinstance(m, IELIF | LIF)]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_taps():
    model = tiny()
    taps = qsd.QKVTaps(model)
    with pytest.raises(RuntimeError, match="no complete forward"):
        taps.take()
    model(torch.randn(2, 3, 32, 32))
    triples = taps.take()
    assert [[list(x.shape) for x in t] for t in triples] == [[[1, 2, 16, 2, 2]] * 3] * 2
    with pytest.raises(RuntimeError, match="no complete forward"):
        taps.take()
    taps.remove()
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="Linear shows no q, k, v"):
        qsd.QKVTaps(nn.Linear(2, 2))
    linear = nn.Linear(2, 2)
    named = qsd.QKVTaps(linear, [(linear, linear, linear)])
    linear(torch.ones(1, 2))
    assert len(named.take()[0]) == 3


def test_distillation_teaches(monkeypatch):
    torch.manual_seed(0)
    teacher, student = tiny_ann(), quantize_(tiny(), QuantSpec({"*": Scheme("lsq", 4)}))
    teacher(torch.randn(8, 3, 32, 32))
    monkeypatch.setattr(qsd, "load_run", lambda path: (teacher.eval(), None))
    recipe = Recipe("x", tiny, teacher="runs/teacher", distill=0.5, objective=qsd.fine_grained_distillation)

    def rest(images, logits, targets):
        return logits.sum() * 0 + 3.0

    objective = qsd.fine_grained_distillation(student, recipe, rest)
    x = torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        loss = objective(x, student(x), torch.zeros(4, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[0] > 3.0
    assert min(values[-3:]) < values[0]
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    again = quantize_(tiny(), QuantSpec({"*": Scheme("lsq", 4)}))
    assert qsd.fine_grained_distillation(again, replace(recipe, distill=0.0, teacher=""), rest) is rest
    with pytest.raises(RecipeError, match=r"field teacher='runs/teacher'.*its objective reads none of such fields"):
        qsd.fine_grained_distillation(again, replace(recipe, distill=0.0), rest)
    with pytest.raises(RecipeError, match="needs a teacher"):
        qsd.fine_grained_distillation(again, replace(recipe, teacher=""), rest)


# ------------------------------------------------------------------------------------------------ transfer
def test_start_from_a_published_file(tmp_path):
    source, target = tiny(7, "published"), tiny(4, "published")
    state = source.state_dict()
    path = tmp_path / "w.pth"
    table = {name.replace("stem.conv", "downsample1_1.encode_conv"): value for name, value in state.items()
             if ".conv1." not in name and ".conv2." not in name}
    torch.save(table, path)
    with pytest.raises(PublishedWeightsError, match=r"conv1\.conv\.weight"):
        qsd.start_from(target, path)
    full = {**table, **{ours.replace(".conv.", ".").replace(".norm.", ".@."): value for ours, value in state.items()
                        if ".conv1." in ours or ".conv2." in ours}}
    full = {name.replace("conv1.@", "bn1").replace("conv2.@", "bn2"): value for name, value in full.items()}
    torch.save({"model": {**full, "stem_block.conv1.alpha": torch.ones(16), "head.act.signed": torch.zeros(1)}}, path)
    head = target.head.weight.detach().clone()
    qsd.start_from(target, path)
    for name, value in state.items():
        if not name.startswith("head."):
            assert torch.equal(target.state_dict()[name], value), name
    assert torch.equal(target.head.weight, head)


def test_transfer_refuses_without_a_start():
    with pytest.raises(RecipeError, match=r"model_options\.start=PATH"):
        qsd.transfer(tiny(), qsd.RECIPES["qsd_transformer.cifar10_transfer"], lambda *_: torch.zeros(()))


# ------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", qsd.RECIPES)
def test_recipe(name):
    recipe = qsd.RECIPES[name]
    assert recipe.name == name
    assert name.startswith("qsd_transformer.")
    assert recipe.claim
    assert f"bitspike train {name}" in recipe.cost
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with torch.device("meta"):
        model = recipe.model(**recipe.model_options)
        spec = recipe.quant_spec()
        if spec is not None:
            quantize_(model, spec)
    assert model.head.out_features == {"imagenet": 1000, "cifar100": 100}.get(recipe.data, 10)
    assert model.stem.conv.in_channels == len(recipe.mean)


def test_imagenet_recipes_have_the_published_values():
    for name in ("imagenet_15m", "imagenet_31m", "imagenet_55m"):
        r = qsd.RECIPES[f"qsd_transformer.{name}"]
        assert r.lr == pytest.approx(6e-4 * r.batch_size / 256)
        assert (r.batch_size, r.epochs, r.warmup_epochs, r.optimizer) == (8 * 196, 300, 15, "lamb")
        assert (r.weight_decay, r.min_lr, r.label_smoothing, r.ema, r.bits) == (0.05, 1e-6, 0.1, 0.99996, 4)
        assert (r.rand_augment, r.random_erasing, r.mixup, r.cutmix) == ("rand-m9-mstd0.5-inc1", 0.25, 0, 0)


def test_docstring_names_exist():
    text = Path(qsd.__file__).read_text()
    for word in ("neurons.IELIF", "quantizers.LSQ", "models.meta_spikeformer.Attention", "fine_grained_distillation"):
        assert f"`{word}`" in text
