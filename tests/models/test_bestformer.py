"""BESTformer: counts, both attention products, reversible blocks, two heads, published weights."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitspike.layers import codes, quantizable, quantize_, quantizer_of  # noqa: E402
from bitspike.models import bestformer as bf  # noqa: E402
from bitspike.models.published import PublishedWeightsError  # noqa: E402
from bitspike.neurons import LIF  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

from .zoo import MODELS, batch, lively  # noqa: E402

BINARY = QuantSpec({"*": Scheme("binary"), "tokenizer.stages.0.conv": Scheme("full"), "head*": Scheme("full")})


@pytest.mark.parametrize(("size", "classes", "parameters", "binary"), [
    (bf.cifar_4_384, 10, 9_314_884, 9_275_904), (bf.cifar_4_384, 100, 9_384_184, 9_275_904),
    (bf.imagenet_8_512, 1000, 30_178_064, 29_073_408)])
def test_counts(size, classes, parameters, binary):
    with torch.device("meta"):
        model = quantize_(size(classes), BINARY)
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = quantizable(model)
    assert sum(layer.weight.numel() for layer in layers.values() if quantizer_of(layer)) == binary
    assert [name for name, layer in layers.items() if quantizer_of(layer) is None] == [
        "tokenizer.stages.0.conv", "head", "head2"]


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("product", bf.PRODUCTS)
def test_attention_products(heads, product):
    """Per head and in the order of tokens, written out."""
    q, k, v = (torch.rand(3, 2, 2, 6, 3, 4) < 0.6).double()
    strength = torch.rand(2, heads).double()
    potential = bf.spike_attention_map(q, k, v, heads, product)
    chosen = (potential >= 2).double()
    out = bf.spike_attention_read(chosen, q, v, strength, heads, product, 0.125)
    assert out.shape == q.shape
    dim = 6 // heads
    for head in range(heads):
        tokens = [x[:, :, dim * head:dim * (head + 1)].flatten(3).transpose(2, 3) for x in (q, k, v)]
        products = tokens[0] @ tokens[1].transpose(2, 3) if product == "qk" else tokens[1].transpose(2, 3) @ tokens[2]
        assert torch.equal(potential[:, :, head], products)
        bits = (products >= 2).double()
        read = bits @ tokens[2] if product == "qk" else tokens[0] @ bits
        expected = read * 0.125 * strength[:, None, head, None, None]
        assert torch.equal(out[:, :, dim * head:dim * (head + 1)].flatten(3).transpose(2, 3), expected)


def test_the_map_is_binary():
    for product in bf.PRODUCTS:
        model = lively(MODELS["bestformer" if product == "qk" else "bestformer_kv"][0]()).eval()
        maps = []
        for block in model.blocks:
            block.attn.map_neuron.register_forward_hook(lambda _m, _x, out, maps=maps: maps.append(out))
        with torch.no_grad():
            model(batch((2, 3, 32, 32)))
        assert all(set(m.unique().tolist()) == {0.0, 1.0} for m in maps)
        assert list(maps[0].shape) == [3, 2, 4, *([64, 64] if product == "qk" else [4, 4])]


def test_default_neurons():
    attn = bf.BESTformer(16, 1, 2).blocks[0].attn
    assert (attn.map_neuron.reset, attn.map_neuron.threshold, attn.attention_neuron.threshold) == ("soft", 1.0, 0.5)
    assert attn.map_neuron(torch.tensor([[1.9, 2.0]])).tolist() == [[0.0, 1.0]]
    assert isinstance(attn.neuron, LIF)
    assert attn.neuron.reset == "hard"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bestformer", "bestformer_kv"])
def test_inverse(name, training):
    torch.manual_seed(3)
    model = quantize_(lively(MODELS[name][0]()).double(), BINARY).train(training)
    x0, x1 = torch.randn(2, 3, 2, 16, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        forth = x0, x1
        for block in model.blocks:
            forth = block(*forth)
        assert (forth[0] - x0).abs().max() > 1
        back = forth
        for block in reversed(model.blocks):
            back = block.inverse(*back)
    torch.testing.assert_close(back[0], x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(back[1], x1, rtol=0, atol=1e-12)


def test_two_heads():
    model = lively(MODELS["bestformer"][0]())
    x = batch((2, 3, 16, 16))
    with torch.no_grad():
        both = model.train()(x)
        assert isinstance(both, tuple)
        assert [list(y.shape) for y in both] == [[2, 5], [2, 5]]
        labels, teacher = model.eval().forward_heads(x)
        assert labels.ne(teacher).any()
        assert torch.equal(model(x), (labels + teacher) / 2)


def test_a_sequence_needs_as_many_steps_as_the_strength():
    model = MODELS["bestformer"][0]().eval()
    x = batch((3, 2, 3, 16, 16))
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        assert torch.equal(model(x[0]), model(x[:1].expand(3, -1, -1, -1, -1)))
        with pytest.raises(ValueError, match=r"2 steps; .* learned for 3"):
            model(x[:2])


def test_strength_moves_the_threshold():
    """Doubling it is halving the threshold of the neuron behind: how it is meant to be deployed."""
    model = lively(MODELS["bestformer"][0]()).eval()
    x = batch((2, 3, 16, 16))
    with torch.no_grad():
        plain = model(x)
        for block in model.blocks:
            block.attn.strength.mul_(2)
        doubled = model(x)
        for block in model.blocks:
            block.attn.attention_neuron.threshold *= 2
        assert torch.equal(model(x), plain)
    assert doubled.ne(plain).any()


@pytest.mark.parametrize(("options", "message"), [
    ({"product": "qv"}, "'qk'"), ({"heads": 3}, "multiple of 3"), ({"depth": 0}, "depth=0"),
    ({"channels": 12}, "multiple of 8"), ({"pooling": "11"}, "four characters")])
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        bf.BESTformer(**{"channels": 16, "depth": 1, "heads": 2, **options})


# ---------------------------------------------------------------------------------------- published weights
def released(model, tokenizer):
    """The model's state under the released names, "block{}_" (CIFAR) or "proj{}_" (ImageNet)."""
    names = {"head": "head", "head2": "head2"}
    for step in range(5):
        theirs = "proj_" if tokenizer == "proj{}_" and step == 0 else tokenizer.format(step)
        names |= {f"tokenizer.stages.{step}.{a}": f"patch_embed.{theirs}{b}" for a, b in (("conv", "conv"), ("norm", "bn"))}
    for block in range(len(model.blocks)):
        names[f"blocks.{block}.attn"] = f"block.{block}.attn"
        for ours, theirs in (("conv", "conv"), ("norm", "bn")):
            for part in ("q", "k", "v", "proj"):
                names[f"blocks.{block}.attn.{part}.{ours}"] = f"block.{block}.attn.{part}_{theirs}"
            for step in (1, 2):
                names[f"blocks.{block}.mlp.fc{step}.{ours}"] = f"block.{block}.mlp.mlp{step}_{theirs}"
    state = {}
    for name, value in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "strength":
            leaf, value = "lambda_attn", value[:, None, :, None, None]
        elif ".attn." in name and value.dim() == 4:
            value = value.squeeze(-1)  # a Conv1d there
        state[f"{names[layer]}.{leaf}"] = value.clone()
    return state


@pytest.mark.parametrize("tokenizer", ["block{}_", "proj{}_"])
def test_load_published(tokenizer):
    source = lively(MODELS["bestformer"][0]())
    with torch.no_grad():
        for block in source.blocks:
            block.attn.strength.normal_()
    state = released(source, tokenizer)
    assert state["block.0.attn.lambda_attn"].shape == (3, 1, 4, 1, 1)
    model = bf.load_published(MODELS["bestformer"][0](), state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    state["block.0.attn.lambda_attn"] = torch.ones(4, 1, 4, 1, 1)
    with pytest.raises(PublishedWeightsError, match=r"lambda_attn: found \[4, 4\], the model has \[3, 4\]"):
        bf.load_published(model, state)
    with pytest.raises(PublishedWeightsError, match=r"missing"):
        bf.load_published(quantize_(MODELS["bestformer"][0](), BINARY), state)


def test_names_of_modules():
    model = bf.BESTformer(16, 2, 2)
    for theirs, ours in {
        "patch_embed": "tokenizer", "block.1": "blocks.1", "block.0.attn": "blocks.0.attn", "block.1.mlp": "blocks.1.mlp",
        "block.0.attn.attn_lif0": "blocks.0.attn.map_neuron", "block.0.attn.attn_lif": "blocks.0.attn.attention_neuron",
        "block.0.attn.proj_lif": "blocks.0.attn.neuron", "patch_embed.block1_lif": "tokenizer.stages.1.neuron",
        "block.1.mlp.mlp2_lif": "blocks.1.mlp.fc2.neuron", "block.1.attn.v_lif": "blocks.1.attn.v_neuron",
    }.items():
        assert bf.published_name(theirs) == ours
        model.get_submodule(ours)


def test_one_bit_per_weight():
    model = quantize_(MODELS["bestformer"][0](), BINARY)
    for layer in quantizable(model).values():
        if quantizer_of(layer) is not None:
            values, scale = codes(layer)
            assert set(values.unique().tolist()) == {-1, 1}
            assert (scale == 1).all()
            assert isinstance(layer, nn.Conv2d)
