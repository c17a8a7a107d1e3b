"""Meta-SpikeFormer: sizes, stages, attention, published weights."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from bitspike.layers import quantizable, quantize_  # noqa: E402
from bitspike.models import meta_spikeformer as ms  # noqa: E402
from bitspike.models.blocks import LayerScale, NormPad, as_sequence, spike_attention  # noqa: E402
from bitspike.models.published import PublishedWeightsError, read_weights  # noqa: E402
from bitspike.neurons import IELIF, LIF  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

from .zoo import MODELS, batch, lively  # noqa: E402

SIZES = {  # convolution and linear weights
    ms.imagenet_8m: 8_261_208, ms.imagenet_15m: 15_015_072, ms.imagenet_31m: 31_193_520, ms.imagenet_55m: 55_163_456,
    ms.imagenet_74m: 74_378_304, ms.imagenet_123m: 123_461_472,
    ms.metaspikformer_8_256: 15_015_072, ms.metaspikformer_8_384: 31_193_520, ms.metaspikformer_8_512: 55_163_456,
    ms.metaspikformer_8_768: 123_461_472,
    ms.cifar_small: 1_969_104, ms.cifar_small_lif: 1_969_104, ms.cifar_base: 8_337_104, ms.dvs_small: 1_970_240,
}


@pytest.mark.parametrize("size", SIZES, ids=lambda f: f.__name__)
def test_sizes(size):
    with torch.device("meta"):
        model = size()
    assert sum(layer.weight.numel() for layer in quantizable(model).values()) == SIZES[size]
    lif = size.__name__.startswith("metaspikformer") or size.__name__.endswith("lif")
    assert isinstance(model.neuron, LIF if lif else IELIF)


def test_four_stages():
    model = MODELS["published"][0]().eval()
    with torch.no_grad():
        stages = model.forward_features(batch((2, 3, 64, 64)))
    assert [list(s.shape) for s in stages] == [[1, 2, 8, 16, 16], [1, 2, 8, 8, 8], [1, 2, 16, 4, 4], [1, 2, 24, 4, 4]]


def test_an_image_is_a_constant_sequence():
    model = lively(MODELS["strict_lif"][0]()).double().eval()
    x = batch((2, 3, 32, 32)).double()
    with torch.no_grad():
        assert torch.equal(model(x), model(x.expand(4, -1, -1, -1, -1)))
    with pytest.raises(ValueError, match=r"found \[3, 32, 32\]"):
        as_sequence(x[0], 4)


def test_qkv_is_what_forward_uses():
    block = lively(MODELS["strict"][0]()).eval().stages[2].blocks[0].attn
    x, seen = torch.randn(1, 2, 16, 4, 4), []
    for part in "qkv":
        getattr(block, f"{part}_neuron").register_forward_hook(lambda _m, _i, out: seen.append(out))
    q, k, v = block.qkv(x)
    out = block(x)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    again = block.proj(block.attention_neuron(spike_attention(q, k, v, block.heads, block.scale)))
    assert torch.equal(out, again)


def test_spike_attention_is_q_kt_v():
    q, k, v = torch.randint(0, 5, (3, 2, 2, 6, 3, 4)).double()
    found = spike_attention(q, k, v, 2, 0.25)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        tokens = [x[:, :, part].flatten(3).transpose(2, 3) for x in (q, k, v)]
        expected = 0.25 * (tokens[0] @ tokens[1].transpose(2, 3)) @ tokens[2]
        assert torch.equal(found[:, :, part].flatten(3).transpose(2, 3), expected)


@pytest.mark.parametrize("training", [True, False])
def test_norm_pad_is_the_norm_of_a_zero_border(training):
    pad = lively(NormPad(3, 2)).train(training)
    x = torch.randn(2, 3, 5, 4)
    out = pad(x)
    pad.eval()
    zero = pad.norm(torch.zeros(1, 3, 1, 1)).flatten()
    assert out.shape == (2, 3, 9, 8)
    torch.testing.assert_close(out[1, :, 0, 3], zero)
    torch.testing.assert_close(out[0, :, 4, -1], zero)
    if not training:
        torch.testing.assert_close(out[:, :, 2:-2, 2:-2], pad.norm(x))
    with pytest.raises(ValueError, match="padding=0"):
        NormPad(3, 0)


def test_layer_scale():
    assert MODELS["published_lif"][0]().stages[2].blocks[0].scale1 is None
    scaled = LayerScale(3, 0.5)(torch.ones(1, 1, 3, 2, 2))
    assert torch.equal(scaled, torch.full((1, 1, 3, 2, 2), 0.5))
    assert ms.MetaSpikeFormer((8, 8, 8, 8), (1, 1)).stages[2].blocks[0].scale1.weight[0].item() == pytest.approx(1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"topology": "loose"}, "'published', 'strict'"), ({"widths": (8, 8, 8)}, "four numbers"),
    ({"widths": (7, 8, 8, 8)}, "must be even"), ({"time_steps": 0}, "time_steps=0"), ({"heads": 3}, "multiple of 3"),
])
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ms.MetaSpikeFormer(**{"widths": (8, 8, 8, 8), "depths": (1, 1), **options})


# ---------------------------------------------------------------------------------------- published weights
def tiny():
    return ms.MetaSpikeFormer((4, 4, 8, 8), (1, 1), heads=2, num_classes=3)


def layers(depths):
    """(released name, our name) of every layer, written out; an independent statement of the table in the model's file."""
    def conv_block(theirs, ours):
        yield from ((f"{theirs}.Conv.{a}", f"{ours}.sep.{b}") for a, b in (
            ("pwconv1", "expand.conv"), ("bn1", "expand.norm"), ("dwconv", "depthwise.conv"), ("pwconv2", "project.conv"),
            ("bn2", "project.norm")))
        yield from ((f"{theirs}.{a}{n}", f"{ours}.conv{n}.{b}") for n in (1, 2) for a, b in (("conv", "conv"), ("bn", "norm")))

    def block(theirs, ours):
        for part in ("q", "k", "v", "proj"):
            yield from ((f"{theirs}.attn.{part}_conv.{a}", f"{ours}.attn.{part}.{b}") for a, b in (
                ("0.body.0", "mix"), ("0.body.1.bn", "pad.norm"), ("0.body.2.0", "depthwise"), ("0.body.2.1", "project.conv"),
                ("0.body.2.2", "project.norm"), ("1", "norm")))
        for n in (1, 2):
            yield from ((f"{theirs}.mlp.fc{n}_{a}", f"{ours}.mlp.fc{n}.{b}") for a, b in (("conv", "conv"), ("bn", "norm")))

    for theirs, ours in (("1_1", "stem"), ("1_2", "stages.0.down"), ("2", "stages.1.down"), ("3", "stages.2.down"),
                         ("4", "stages.3.down")):
        yield from ((f"downsample{theirs}.encode_{a}", f"{ours}.{b}") for a, b in (("conv", "conv"), ("bn", "norm")))
    for theirs, ours in (("1_1", "stem_block"), ("1_2", "stages.0.blocks.0"), ("2_1", "stages.1.blocks.0"),
                         ("2_2", "stages.1.blocks.1")):
        yield from conv_block(f"ConvBlock{theirs}.0", ours)
    for stage, depth in zip((3, 4), depths, strict=True):
        for n in range(depth):
            yield from block(f"block{stage}.{n}", f"stages.{stage - 1}.blocks.{n}")
    yield "head", "head"


def released(model):
    """The model's state under the released names."""
    names = {ours: theirs for theirs, ours in layers((1, 1))}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (("original", "weight"), ("0.scale", "alpha"), ("0.initialized", "init_state")):
            name = name.replace(f".parametrizations.weight.{ours}", f".{theirs}")
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(("scale1", "scale2")):
            _, stage, _, n, scale = layer.split(".")
            name = f"block{int(stage) + 1}.{n}.layer_{scale}"
        else:
            name = f"{names[layer]}.{leaf}"
        if leaf == "init_state":
            value = value.reshape(1).float()
        state[name] = value.clone().squeeze(-1) if ".mlp.fc" in name and value.dim() == 4 else value.clone()
    return state


def test_names():
    assert [ms.published_name(theirs) for theirs, _ in layers((11, 2))] == [ours for _, ours in layers((11, 2))]
    for theirs, ours in {
        "lif": "neuron", "head": "head", "downsample2": "stages.1.down", "downsample2.encode_lif": "stages.1.down.neuron",
        "ConvBlock1_1.0": "stem_block", "ConvBlock1_1.0.Conv": "stem_block.sep",
        "ConvBlock1_1.0.lif2": "stem_block.conv2.neuron",
        "ConvBlock1_1.0.Conv.lif2": "stem_block.sep.depthwise.neuron", "block4.1": "stages.3.blocks.1",
        "block3.0.attn": "stages.2.blocks.0.attn", "block3.0.attn.head_lif": "stages.2.blocks.0.attn.neuron",
        "block3.0.attn.k_lif": "stages.2.blocks.0.attn.k_neuron", "block3.0.mlp.fc1_lif": "stages.2.blocks.0.mlp.fc1.neuron",
        "block3.0.attn.attn_lif": "stages.2.blocks.0.attn.attention_neuron", "block3.0.mlp": "stages.2.blocks.0.mlp",
        "block3.0.attn.q_conv": "stages.2.blocks.0.attn.q", "block3.0.attn.q_conv.0": "stages.2.blocks.0.attn.q.project",
        "block3.0.attn.q_conv.0.body.1": "stages.2.blocks.0.attn.q.pad",
    }.items():
        assert ms.published_name(theirs) == ours
        tiny_one = ms.MetaSpikeFormer((4, 4, 8, 8), (1, 2), heads=2)
        tiny_one.get_submodule(ours)


@pytest.mark.parametrize("form", ["safetensors", "pth", "pth_model", "pth_module"])
def test_load_published_files(tmp_path, form):
    source = tiny()
    state = released(source)
    assert state["block3.0.mlp.fc1_conv.weight"].dim() == 3  # a Conv1d there
    state["head.act.alpha"] = torch.zeros(8)
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        path = tmp_path / "w.pth"
        wrapped = {f"module.{k}": v for k, v in state.items()} if form == "pth_module" else state
        torch.save({"model": wrapped, "epoch": 3} if form == "pth_model" else wrapped, path)
    model = ms.load_published(tiny(), path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_load_published_quantized():
    spec = QuantSpec({"*": Scheme("lsq", 4)})
    source = quantize_(tiny(), spec)
    with torch.no_grad():
        source(torch.randn(1, 3, 32, 32))
    state = released(source)
    model = ms.load_published(quantize_(tiny(), spec), state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(PublishedWeightsError, match=r"call quantize_\(model, spec\) with an 'lsq' scheme first"):
        ms.load_published(tiny(), state)
    with pytest.raises(PublishedWeightsError, match="load it first, then call quantize_"):
        ms.load_published(quantize_(tiny(), spec), released(tiny()))


def test_load_published_averages_the_distilled_heads():
    state = released(tiny())
    state["head_kd.weight"], state["head_kd.bias"] = state["head.weight"] + 2, state["head.bias"] - 4
    model = ms.load_published(tiny(), state)
    torch.testing.assert_close(model.head.weight.detach(), state["head.weight"] + 1)
    torch.testing.assert_close(model.head.bias.detach(), state["head.bias"] - 2)


def test_load_published_refuses_and_changes_nothing():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = released(tiny())
    del state["head.bias"]
    state["head.act.beta"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1)
    state["downsample1_1.encode_conv.weight"] = torch.zeros(2, 3, 3, 3)
    with pytest.raises(PublishedWeightsError, match=r"(?s)1 missing: head.bias.*2 unexpected: head.act.beta, pos_") as error:
        ms.load_published(model, state)
    assert error.value.missing == ["head.bias"]
    assert sorted(error.value.unexpected) == ["head.act.beta", "pos_embed"]
    assert error.value.mismatched == ["downsample1_1.encode_conv.weight: found [2, 3, 3, 3], the model has [2, 3, 7, 7]"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="topology is 'strict'"):
        ms.load_published(ms.MetaSpikeFormer((4, 4, 8, 8), (1, 1), heads=2, topology="strict"), {})


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_read_weights_refuses_what_is_no_table_of_tensors(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_weights(tmp_path / "none.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(PublishedWeightsError, match="would run its code"):
        read_weights(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0{")
        with pytest.raises(PublishedWeightsError):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(PublishedWeightsError, match="no table of tensors"):
        read_weights(tmp_path / "empty.pth")
