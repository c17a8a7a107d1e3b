"""Spikformer, Spikingformer and Spike-driven Transformer: sizes, attention, published weights."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from bitspike.models import spike_driven as sd  # noqa: E402
from bitspike.models import spikformer as sf  # noqa: E402
from bitspike.models.published import PublishedWeightsError  # noqa: E402
from bitspike.neurons import LIF  # noqa: E402

from .zoo import MODELS, batch, lively  # noqa: E402

SIZES = {  # parameters
    sf.cifar_4_256: 4_155_178, sf.cifar_2_384: 5_765_050, sf.cifar_4_384: 9_324_730,
    sf.imagenet_8_384: 16_816_024, sf.imagenet_8_512: 29_689_384, sf.imagenet_8_768: 66_338_632,
    sf.spikingformer_cifar_4_256: 4_152_106, sf.spikingformer_cifar_2_384: 5_762_746,
    sf.spikingformer_cifar_4_384: 9_320_122,
    sf.spikingformer_8_384: 16_816_024, sf.spikingformer_8_512: 29_689_384, sf.spikingformer_8_768: 66_338_632,
    sf.dvs_2_256: 2_566_666, sd.dvs_2_256: 2_566_666,
    sd.cifar_2_512: 10_233_418, sd.imagenet_8_384: 16_816_024, sd.imagenet_6_512: 23_373_352,
    sd.imagenet_8_512: 29_689_384, sd.imagenet_10_512: 36_005_416, sd.imagenet_8_768: 66_338_632,
}


@pytest.mark.parametrize("size", SIZES, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}")
def test_sizes(size):
    with torch.device("meta"):
        model = size()
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    assert f"{SIZES[size] / 1e6:.1f}" in size.__doc__ or f"{SIZES[size] / 1e6:.2f}" in size.__doc__
    pools = sum(isinstance(module, nn.MaxPool2d) for module in model.modules())
    assert pools == (2 if "cifar" in size.__name__ else 4)


@pytest.mark.parametrize(("pooling", "side"), [("0011", 8), ("1111", 2), ("1000", 16), ("0000", 32)])
@pytest.mark.parametrize("make", [
    lambda pooling: sf.Tokenizer(3, 16, pooling, sf.lif), lambda pooling: sf.MembraneTokenizer(3, 16, pooling, sf.lif),
    lambda pooling: sd.Tokenizer(3, 16, pooling, sf.lif)])
def test_tokenizers(make, pooling, side):
    assert make(pooling)(torch.zeros(2, 1, 3, 32, 32)).shape == (2, 1, 16, side, side)


@pytest.mark.parametrize(("shortcut", "counts"), [("spike", True), ("membrane", False)])
def test_what_flows_between_the_blocks(shortcut, counts):
    """Spikformer's stream holds small integers, Spikingformer's real potentials."""
    model = lively(MODELS["spikformer" if shortcut == "spike" else "spikingformer"][0]()).eval()
    with torch.no_grad():
        x = model.blocks(model.tokenizer(batch((3, 2, 3, 16, 16))))
    assert bool(x.frac().any()) != counts
    if counts:
        assert 1 < x.max() <= 2 + 2 * len(model.blocks)
        assert x.min() == 0


def test_spikingformer_convolves_spikes_only():
    model = lively(MODELS["spikingformer"][0]()).eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _m, x, name=name: inputs.__setitem__(name, x[0]))
    with torch.no_grad():
        model(batch((2, 3, 16, 16)))
    real = [name for name, x in inputs.items() if not set(x.unique().tolist()) <= {0.0, 1.0}]
    assert real == ["tokenizer.stages.0.conv"]
    assert len(inputs) == 5 + 2 * 6


def test_spike_driven_attention():
    q, k, v = (torch.rand(3, 2, 2, 4, 3, 3) < 0.5).float()
    counts = sd.spike_coincidences(k, v)
    assert counts.shape == (2, 2, 4, 1, 1)
    assert counts[1, 0, 2].item() == sum(a * b for a, b in zip(k[1, 0, 2].flatten(), v[1, 0, 2].flatten(), strict=True))
    masked = sd.spike_mask(q, (counts >= 3).float())
    for channel in range(4):
        expected = q[0, 1, channel] if counts[0, 1, channel] >= 3 else torch.zeros(3, 3)
        assert torch.equal(masked[0, 1, channel], expected)


def test_default_neurons():
    model = sd.cifar_2_512(num_classes=3)
    assert (model.neuron.decay, model.neuron.threshold, model.neuron.reset) == (0.5, 1.0, "hard")
    assert isinstance(model.neuron, LIF)
    assert model.blocks[0].attn.attention_neuron.threshold == 0.5


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sf.Spikformer(20), "multiple of 8"), (lambda: sf.Spikformer(16, heads=3), "multiple of 3"),
    (lambda: sf.Spikformer(16, heads=2, shortcut="none"), "'spike', 'membrane'"),
    (lambda: sf.Spikformer(16, heads=2, pooling="012"), "four characters"),
    (lambda: sf.Spikformer(16, heads=2, time_steps=0), "time_steps=0"),
    (lambda: sd.SpikeDrivenTransformer(16, depth=0), "depth=0"),
    (lambda: sd.SpikeDrivenTransformer(16, mlp_ratio=1), "another shortcut"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------- published weights
def _released(kind, depth):
    """(released name, our name) of every layer, written out; an independent statement of the tables in the models' files."""
    first = {"spikformer_cifar": "proj", "spikformer_imagenet": "proj", "spike_driven": "proj",
             "spikingformer_cifar": "block0", "spikingformer_imagenet": "proj"}[kind]
    later = {"spikformer_cifar": "proj_conv{} proj_bn{}", "spikformer_imagenet": "proj_conv{} proj_bn{}",
             "spike_driven": "proj_conv{} proj_bn{}", "spikingformer_cifar": "block{}_conv block{}_bn",
             "spikingformer_imagenet": "proj{}_conv proj{}_bn"}[kind]
    steps = 5 if kind.startswith("spikingformer") else 4
    yield f"patch_embed.{first}_conv", "tokenizer.stages.0.conv"
    yield f"patch_embed.{first}_bn", "tokenizer.stages.0.norm"
    for step in range(1, steps):
        conv, norm = later.format(step, step).split()
        yield f"patch_embed.{conv}", f"tokenizer.stages.{step}.conv"
        yield f"patch_embed.{norm}", f"tokenizer.stages.{step}.norm"
    if steps == 4:
        yield "patch_embed.rpe_conv", "tokenizer.rpe.conv"
        yield "patch_embed.rpe_bn", "tokenizer.rpe.norm"
    linear = "linear" if kind == "spikformer_cifar" else "conv"
    mlp = "mlp" if kind.startswith("spikingformer") else "fc"
    for block in range(depth):
        for part in ("q", "k", "v", "proj"):
            yield f"block.{block}.attn.{part}_{linear}", f"blocks.{block}.attn.{part}.conv"
            yield f"block.{block}.attn.{part}_bn", f"blocks.{block}.attn.{part}.norm"
        for step in (1, 2):
            yield f"block.{block}.mlp.{mlp}{step}_{linear}", f"blocks.{block}.mlp.fc{step}.conv"
            yield f"block.{block}.mlp.{mlp}{step}_bn", f"blocks.{block}.mlp.fc{step}.norm"
    yield "head", "head"


KINDS = {
    "spikformer_cifar": lambda: sf.Spikformer(16, 2, 2, qkv_bias=True),
    "spikformer_imagenet": lambda: sf.Spikformer(16, 2, 2, pooling="1111"),
    "spikingformer_cifar": lambda: sf.Spikformer(16, 2, 2, shortcut="membrane"),
    "spikingformer_imagenet": lambda: sf.Spikformer(16, 2, 2, shortcut="membrane", pooling="1111"),
    "spike_driven": lambda: sd.SpikeDrivenTransformer(16, 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", [True, False])
def test_load_published(kind, file, tmp_path):
    module = sd if kind == "spike_driven" else sf
    source = lively(KINDS[kind]())
    names = {ours: theirs for theirs, ours in _released(kind, 2)}
    state = {}
    for name, value in source.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if kind == "spikformer_cifar" and ".attn." in name and value.dim() == 4:
            value = value.flatten(1)  # a Linear there
        elif kind.endswith("imagenet") and ".attn." in name and value.dim() == 4:
            value = value.squeeze(-1)  # a Conv1d there
        state[f"{names[layer]}.{leaf}"] = value.clone()
    dead = {"spike_driven": {"block.0.attn.talking_heads.weight": torch.zeros(8, 8, 1)}}.get(
        kind, {"block.1.norm1.weight": torch.ones(16), "block.0.norm2.bias": torch.ones(16)})
    state |= dead
    if file:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    model = module.load_published(KINDS[kind](), tmp_path / "w.safetensors" if file else state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state["block.0.attn.pos"] = state.pop("head.bias")
    with pytest.raises(PublishedWeightsError, match=r"(?s)1 missing: head.bias.*1 unexpected: block.0.attn.pos"):
        module.load_published(model, state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_names_of_modules():
    for theirs, ours in {
        "patch_embed": "tokenizer", "patch_embed.proj_lif": "tokenizer.stages.0.neuron", "block.1": "blocks.1",
        "patch_embed.proj_lif3": "tokenizer.stages.3.neuron", "patch_embed.rpe_lif": "tokenizer.rpe.neuron",
        "patch_embed.maxpool2": "tokenizer.stages.2.pool", "block.0.attn.q_lif": "blocks.0.attn.q_neuron",
        "block.0.attn.attn_lif": "blocks.0.attn.attention_neuron", "block.0.attn.proj_lif": "blocks.0.attn.proj_neuron",
        "block.1.mlp.fc2_lif": "blocks.1.mlp.fc2.neuron", "block.1.mlp": "blocks.1.mlp",
    }.items():
        assert sf.published_name(theirs) == ours
        KINDS["spikformer_cifar"]().get_submodule(ours)
    for theirs, ours in {
        "patch_embed.block3_lif": "tokenizer.stages.3.neuron", "patch_embed.block4_mp": "tokenizer.stages.4.pool",
        "patch_embed.maxpool3": "tokenizer.stages.3.pool", "patch_embed.proj2_lif": "tokenizer.stages.2.neuron",
        "block.0.attn.proj_lif": "blocks.0.attn.neuron", "block.1.mlp.mlp1_lif": "blocks.1.mlp.fc1.neuron",
    }.items():
        assert sf.published_name(theirs, "membrane") == ours
        KINDS["spikingformer_cifar"]().get_submodule(ours)
    for theirs, ours in {
        "patch_embed.proj_lif2": "tokenizer.stages.2.neuron", "patch_embed.proj_lif3": "tokenizer.rpe.neuron",
        "block.0.attn.talking_heads_lif": "blocks.0.attn.attention_neuron", "head_lif": "neuron",
        "block.0.attn.shortcut_lif": "blocks.0.attn.neuron", "block.1.mlp.fc1_lif": "blocks.1.mlp.fc1.neuron",
    }.items():
        assert sd.published_name(theirs) == ours
        KINDS["spike_driven"]().get_submodule(ours)
