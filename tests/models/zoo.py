"""Every model that exists, at a size for tests; a new one is tested by being listed."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitspike.models.bestformer import BESTformer
from bitspike.models.compact_spikeformer import CompactSpikeformer
from bitspike.models.meta_spikeformer import MetaSpikeFormer, ielif, ielif_attention
from bitspike.models.spike_driven import SpikeDrivenTransformer
from bitspike.models.spikformer import Spikformer
from bitspike.models.spiking_resnet import SpikingResNet, SpikingVGG
from bitspike.neurons import IELIF, LIF


def _meta(topology: str, *, spiking: str = "ielif", time_steps: int = 1, **sizes) -> MetaSpikeFormer:
    # the inputs of these tests have few tokens; LIF with a halved input would hardly fire in a network this narrow
    neurons = {"ielif": (ielif, ielif_attention),
               "lif": (lambda: LIF(scale_input=False), lambda: LIF(threshold=0.1, reset="soft")),
               "carry": (lambda: IELIF(4, decay=0.5), lambda: IELIF(4, scale=0.5, decay=0.5))}[spiking]
    sizes = {"widths": (8, 8, 16, 24), "depths": (2, 1), "heads": 4, "num_classes": 5, "layer_scale": 0.5, **sizes}
    return MetaSpikeFormer(neuron=neurons[0], attention_neuron=neurons[1], topology=topology, time_steps=time_steps, **sizes)


def _tokens(model: Callable[..., nn.Module], **sizes) -> nn.Module:
    """A transformer with one resolution: 16 channels, two blocks, neurons that fire at these sizes."""
    return model(16, 2, num_classes=5, time_steps=3, neuron=lambda: LIF(scale_input=False),
                 attention_neuron=lambda: LIF(threshold=0.1, reset="soft"), **sizes)


def _driven(**sizes) -> nn.Module:
    model = _tokens(SpikeDrivenTransformer, **sizes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(40)  # the published initialisation needs batch statistics to fire
    return model


#: name -> (model, shape of one input batch of 2)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "published": (lambda: _meta("published"), (2, 3, 64, 64)),
    "strict": (lambda: _meta("strict"), (2, 3, 64, 64)),
    "published_lif": (lambda: _meta("published", spiking="lif", time_steps=4, layer_scale=None),
                      (2, 3, 32, 32)),
    "strict_lif": (lambda: _meta("strict", spiking="lif", time_steps=4), (2, 3, 32, 32)),
    "strict_carry": (lambda: _meta("strict", spiking="carry", time_steps=3), (2, 3, 32, 32)),
    "cifar": (lambda: _meta("strict", stem=(3, 1), strides=(1, 2, 2, 1), attention_scale=0.03), (2, 3, 24, 24)),
    "events": (lambda: _meta("published", in_channels=2), (3, 2, 2, 32, 32)),
    "compact": (lambda: CompactSpikeformer((8, 16, 16), heads=4, num_classes=5), (2, 3, 32, 32)),
    "compact_lif": (lambda: CompactSpikeformer((8, 16, 16), heads=4, num_classes=5, time_steps=3,
                                               neuron=lambda: LIF(0.5, 0.7, scale_input=False)), (2, 3, 32, 32)),
    "spikformer": (lambda: _tokens(Spikformer, heads=4), (2, 3, 16, 16)),
    "spikingformer": (lambda: _tokens(Spikformer, heads=4, shortcut="membrane"), (2, 3, 16, 16)),
    "spikformer_events": (lambda: _tokens(Spikformer, heads=2, in_channels=2, pooling="1010", qkv_bias=True),
                          (3, 2, 2, 16, 16)),
    "spike_driven": (_driven, (2, 3, 16, 16)),
    "spike_driven_small": (lambda: _driven(pooling="1111"), (2, 3, 37, 51)),
    "bestformer": (lambda: _tokens(BESTformer, heads=4), (2, 3, 16, 16)),
    "bestformer_kv": (lambda: _tokens(BESTformer, heads=4, product="kv", pooling="1011"), (2, 3, 37, 51)),
    "resnet": (lambda: SpikingResNet((8, 12, 16), (1, 2, 1), 5, per_step=False), (2, 3, 16, 16)),
    "resnet_imagenet": (lambda: SpikingResNet((8, 16), (2, 1), 5, stem=(7, 2), pool=True, per_step=False), (2, 3, 37, 51)),
    "vgg": (lambda: SpikingVGG((8, 8, 0, 16, 0), 5, size=16, per_step=False), (3, 2, 2, 16, 16)),
    "odd": (lambda: _meta("published", widths=(6, 10, 12, 9), heads=3, mlp_ratio=2), (2, 3, 37, 51)),
}


def logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a model returns, as one tensor; in training some return one per head."""
    return torch.stack(output) if isinstance(output, tuple) else output


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def lively(model: nn.Module) -> nn.Module:
    """Norms with statistics and offsets at which every neuron fires sometimes: a fresh network is nearly silent."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            if not module.weight.requires_grad:  # the compact network
                module.running_var.fill_(1.0)
                module.bias.data.copy_(0.6 * torch.rand(n, generator=generator))
                continue
            module.weight.data.copy_(0.5 + torch.rand(n, generator=generator))
            module.bias.data.copy_(0.6 * torch.rand(n, generator=generator))
            module.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
            module.running_var.copy_(0.05 + 0.2 * torch.rand(n, generator=generator))
    return model
