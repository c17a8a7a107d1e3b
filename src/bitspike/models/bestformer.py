"""BESTformer: a Spikingformer for binary weights, with a binary attention map and reversible blocks (IJCAI 2025).

    image -> tokenizer -> (x0, x1), equal -> reversible blocks -> mean over space and time of both -> two heads

Attention: the product of two of q, k, v goes through a neuron of its own, so the map is one bit per entry:

    "qk":  M = N0(q k^T) per pair of tokens,    o = scale * strength[t, head] * (M v)      the CIFAR release
    "kv":  M = N0(k^T v) per pair of channels,  o = scale * strength[t, head] * (q M)      the ImageNet release

N0 is a LIF with soft reset. `strength` ("lambda", m[t] below) is learned, one factor per step and head, and multiplies the
input a[t] of the next neuron, and so it does on a device: as the multiplier that turns integer sums into potentials, which
every current of a neuron has. Dividing the threshold by it instead is another neuron as soon as T > 1: with u[t] = v[t] / m[t],

    v[t] = d v[t-1] + g m[t] a[t] >= theta        is        u[t] = d (m[t-1] / m[t]) u[t-1] + g a[t] >= theta / m[t]

so the factor moves from the input to the leak, which is no shift any more; the two are the same only from rest (T = 1) or with
one strength for all steps, and for a negative one the comparison turns round.

Weights are full precision here; `quantize_` with Scheme("binary") on all convolutions but the first makes it the paper's.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.fx
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, as_sequence
from bitspike.models.published import load_renamed, read_table
from bitspike.models.reversible import run_blocks
from bitspike.models.spikformer import MembraneTokenizer, Mlp, lif, lif_attention
from bitspike.models.spikformer import published_name as spikformer_name
from bitspike.neurons import LIF

NeuronFactory = Callable[[], nn.Module]
PRODUCTS = ("qk", "kv")


def lif_map() -> LIF:
    """BESTformer's neuron on the attention map: tau 2, threshold 1, soft reset. From rest it fires at a product of 2."""
    return LIF(reset="soft")


# ---------------------------------------------------------------------------------------------- attention
def _per_head(x_TBCHW: Tensor, heads: int) -> Tensor:
    T, B, C, H, W = x_TBCHW.shape
    return x_TBCHW.reshape(T, B, heads, C // heads, H * W)


def spike_attention_map(q_TBCHW: Tensor, k_TBCHW: Tensor, v_TBCHW: Tensor, heads: int, product: str) -> Tensor:
    """What becomes the attention map: q k^T [T, B, heads, N, N] ("qk") or k^T v [T, B, heads, dim, dim] ("kv").

    Shapes: q, k, v [T, B, C, H, W], C = heads * dim, N = H * W. The sums are integers.
    """
    k = _per_head(k_TBCHW, heads)
    if product == "qk":
        return _per_head(q_TBCHW, heads).transpose(-2, -1) @ k
    return k @ _per_head(v_TBCHW, heads).transpose(-2, -1)


def spike_attention_read(map_TBhXX: Tensor, q_TBCHW: Tensor, v_TBCHW: Tensor, strength_Th: Tensor, heads: int,
                         product: str, scale: float) -> Tensor:
    """What the map selects: scale * strength * (M v) ("qk") or * (q M) ("kv"): -> [T, B, C, H, W].

    Shapes: strength [T, heads], one factor per step and head.
    Errors: ValueError where the sequence has another number of steps than `strength`.
    """
    if len(map_TBhXX) != len(strength_Th):
        raise ValueError(f"BESTformer: a sequence of {len(map_TBhXX)} steps; its attention strength was learned for "
                         f"{len(strength_Th)}. Build the model with time_steps={len(map_TBhXX)}.")
    if product == "qk":
        o = _per_head(v_TBCHW, heads) @ map_TBhXX.transpose(-2, -1)
    else:
        o = map_TBhXX.transpose(-2, -1) @ _per_head(q_TBCHW, heads)
    return (o * scale * strength_Th[:, None, :, None, None]).reshape(q_TBCHW.shape)


# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_attention_map")
torch.fx.wrap("spike_attention_read")


class Attention(nn.Module):
    """Self-attention with a binary map: [T, B, C, H, W] -> same. `product`: "qk" or "kv", see the module's docstring.

    Forward hooks on `q_neuron`, `k_neuron`, `v_neuron`, `map_neuron` see q, k, v and the map.
    """

    def __init__(self, channels: int, heads: int, product: str, time_steps: int, neuron: NeuronFactory,
                 map_neuron: NeuronFactory, attention_neuron: NeuronFactory, scale: float) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"BESTformer: {channels} channels in {heads} heads; take a multiple of {heads}.")

        def conv() -> ConvNorm:
            return ConvNorm(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

        self.heads, self.product, self.scale = heads, product, scale
        self.neuron = neuron()
        self.q, self.k, self.v = conv(), conv(), conv()
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.map_neuron = map_neuron()
        self.strength = nn.Parameter(torch.ones(time_steps, heads))
        self.attention_neuron = attention_neuron()
        self.proj = conv()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = self.neuron(x_TBCHW)
        q, k, v = self.q_neuron(self.q(s)), self.k_neuron(self.k(s)), self.v_neuron(self.v(s))
        chosen = self.map_neuron(spike_attention_map(q, k, v, self.heads, self.product))
        o = spike_attention_read(chosen, q, v, self.strength, self.heads, self.product, self.scale)
        return self.proj(self.attention_neuron(o))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, product={self.product!r}, scale={self.scale:g}"


class ReversibleBlock(nn.Module):
    """Two streams, of which the inputs can be computed back from the outputs:

        x2 = attn(x1) + (x0 + x1) / 2,   x3 = mlp(x2) + (x1 + x2) / 2
    Shapes: all [T, B, C, H, W]. Source: BESTformer, `RevSpikingTransformer`; its first block has no x0 and adds x1
    instead, which is x0 = x1 here.
    """

    def __init__(self, attn: Attention, mlp: Mlp) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x0_TBCHW: Tensor, x1_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        x2 = self.attn(x1_TBCHW) + (x0_TBCHW + x1_TBCHW) * 0.5
        return x2, self.mlp(x2) + (x1_TBCHW + x2) * 0.5

    def inverse(self, x2_TBCHW: Tensor, x3_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(x2, x3) -> (x0, x1): x1 = 2 (x3 - mlp(x2)) - x2,  x0 = 2 (x2 - attn(x1)) - x1.

        Exact up to the rounding of these sums: a potential within that rounding of a threshold may spike differently.
        In training mode the norms must see the same batch, and they take its statistics in once more.
        """
        x1 = (x3_TBCHW - self.mlp(x2_TBCHW)) * 2 - x2_TBCHW
        return (x2_TBCHW - self.attn(x1)) * 2 - x1, x1


class PlainBlock(ReversibleBlock):
    """The same two parts with plain residual sums, which cannot be undone: x2 = x1 + attn(x1), x3 = x2 + mlp(x2).

    The release's `SpikingTransformer`, its baseline. x0 is not looked at; (x2, x3) feed the two heads as usual.
    """

    def forward(self, x0_TBCHW: Tensor, x1_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        x2 = x1_TBCHW + self.attn(x1_TBCHW)
        return x2, x2 + self.mlp(x2)

    def inverse(self, x2_TBCHW: Tensor, x3_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        """There is none. Errors: TypeError."""
        raise TypeError("PlainBlock has no inverse: its input cannot be told from its output. Use ReversibleBlock.")


# -------------------------------------------------------------------------------------------------- model
class BESTformer(nn.Module):
    """BESTformer; the defaults are 4-384 for CIFAR-10.

    Args:
        channels, depth: width of the tokens, number of reversible blocks.
        heads: attention heads; must divide channels. mlp_ratio: hidden channels of the MLPs per channel.
        num_classes, in_channels: of the heads and of the image (3), or of the event frames (2).
        time_steps: how often a static image is shown. The learned strength has one value per step, so a sequence must have
            as many.
        product: which attention product is the binary map, "qk" or "kv".
        neuron, map_neuron, attention_neuron: functions that return a new neuron: everywhere, on the map, after attention.
        attention_scale: fixed factor beside the learned strength.
        pooling: which of the tokenizer's four steps halve the resolution: "0011" for CIFAR, "1111" for ImageNet.
        reversible: blocks with an inverse, or with plain residual sums (the baseline).
        memory: what training keeps for the backward pass: "store" the activations of every block, or "recompute" them from
            the last block's output: constant memory in depth, for one more forward pass (`models.reversible`).
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W] -> in training a pair of logits [B, num_classes], of the labels'
    head and of the teacher's; in evaluation their mean [B, num_classes]. `forward_heads` always gives the pair.
    Errors: ValueError for sizes that cannot be meant.
    Source: `cifar/model.py` and `imagenet/model.py` of the release; convolutions keep torch's initialisation, the heads are
    trunc_normal(0.02), as there. Differs from it: `time_steps` sets the strength's steps (the release always takes 4).

    >>> net = BESTformer(16, depth=1, heads=2, num_classes=5, product="kv").eval()
    >>> net(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(self, channels: int = 384, depth: int = 4, heads: int = 8, mlp_ratio: int = 4, num_classes: int = 10,
                 in_channels: int = 3, time_steps: int = 4, product: str = "qk", neuron: NeuronFactory = lif,
                 map_neuron: NeuronFactory = lif_map, attention_neuron: NeuronFactory = lif_attention,
                 attention_scale: float = 0.125, pooling: str = "0011", reversible: bool = True, memory: str = "store") -> None:
        super().__init__()
        if memory not in ("store", "recompute"):
            raise ValueError(f"BESTformer: memory={memory!r}; allowed: 'store', 'recompute'.")
        if memory == "recompute" and not reversible:
            raise ValueError("BESTformer: memory='recompute' needs blocks with an inverse: reversible=True.")
        if product not in PRODUCTS:
            raise ValueError(f"BESTformer: product={product!r}; allowed: 'qk' (CIFAR), 'kv' (ImageNet).")
        if time_steps < 1 or depth < 1:
            raise ValueError(f"BESTformer: time_steps={time_steps}, depth={depth}; both must be at least 1.")
        self.time_steps, self.num_classes, self.memory = time_steps, num_classes, memory
        self.tokenizer = MembraneTokenizer(in_channels, channels, pooling, neuron)
        block = ReversibleBlock if reversible else PlainBlock
        self.blocks = nn.ModuleList([
            block(Attention(channels, heads, product, time_steps, neuron, map_neuron, attention_neuron,
                            attention_scale),
                  Mlp(channels, mlp_ratio, neuron, membrane=True, bias=False)) for _ in range(depth)])
        self.head, self.head2 = nn.Linear(channels, num_classes), nn.Linear(channels, num_classes)
        for head in (self.head, self.head2):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> the tokenizer's potentials from half the size on, the last one the mean of both streams
        behind the blocks, [T, B, C, H, W].
        """
        maps = self.tokenizer.maps(as_sequence(x, self.time_steps))
        x0_TBCHW, x1_TBCHW = self._streams(maps[-1])
        return [*maps[:-1], (x0_TBCHW + x1_TBCHW) * 0.5]

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images or a sequence -> logits of the x2 stream (labels) and of the x3 stream (teacher), each [B, classes]."""
        x0_TBCHW, x1_TBCHW = self._streams(self.tokenizer(as_sequence(x, self.time_steps)))
        return self.head(x0_TBCHW.mean((3, 4)).mean(0)), self.head2(x1_TBCHW.mean((3, 4)).mean(0))

    def _streams(self, x1_TBCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens -> what comes out of the last block."""
        x0_TBCHW = x1_TBCHW
        if self.memory == "recompute" and self.training and torch.is_grad_enabled():
            x0_TBCHW, x1_TBCHW = run_blocks(self.blocks, x0_TBCHW, x1_TBCHW, recompute=True)  # type: ignore[arg-type]
        else:
            for block in self.blocks:
                x0_TBCHW, x1_TBCHW = block(x0_TBCHW, x1_TBCHW)
        return x0_TBCHW, x1_TBCHW

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, teacher = self.forward_heads(x)
        return (labels, teacher) if self.training else (labels + teacher) * 0.5


# -------------------------------------------------------------------------------------------------- sizes
def cifar_4_384(num_classes: int = 10, time_steps: int = 4, reversible: bool = True, memory: str = "store") -> BESTformer:
    """9,314,884 parameters with 10 classes, 9,384,184 with 100; 9.276 M binary weights."""
    return BESTformer(num_classes=num_classes, time_steps=time_steps, reversible=reversible, memory=memory)


def imagenet_8_512(num_classes: int = 1000, time_steps: int = 4, memory: str = "store") -> BESTformer:
    """30.18 M parameters; 29.07 M binary weights."""
    return BESTformer(512, 8, num_classes=num_classes, time_steps=time_steps, product="kv", pooling="1111", memory=memory)


def dvs_2_256(num_classes: int = 10, time_steps: int = 16, heads: int = 16) -> BESTformer:
    """2.6 M parameters, for event frames of 128x128 with two polarities. The size is Spikformer's for CIFAR10-DVS."""
    return BESTformer(256, 2, heads, num_classes=num_classes, in_channels=2, time_steps=time_steps, pooling="1111")


def lif_full() -> LIF:
    """`lif` with its input not halved: fires at a potential of 1 in the first step, where the norms behind it start."""
    return LIF(scale_input=False)


def small(num_classes: int = 10, time_steps: int = 2, channels: int = 128, depth: int = 2, heads: int = 4,
          pooling: str = "1010", reversible: bool = True, memory: str = "store") -> BESTformer:
    """0.64 M weights, 48 M MACs a step at 32x32: what a CPU core trains in minutes."""
    return BESTformer(channels, depth, heads, num_classes=num_classes, time_steps=time_steps, neuron=lif_full,
                      pooling=pooling, reversible=reversible, memory=memory)


# -------------------------------------------------------------------------------------- published weights
def published_name(name: str) -> str:
    """Name of a module or parameter in the released code (CIFAR or ImageNet) -> the name of the same thing here.

    >>> published_name("block.0.attn.lambda_attn"), published_name("block.1.attn.attn_lif0")
    ('blocks.0.attn.strength', 'blocks.1.attn.map_neuron')
    """
    name = name.replace(".lambda_attn", ".strength").replace(".attn_lif0", ".map_neuron")
    return spikformer_name(name, "membrane")


def load_published(model: BESTformer, weights: str | Path | Mapping[str, Tensor]) -> BESTformer:
    """Load a released BESTformer checkpoint (its full-precision latent weights) in place and return the model.

    weights: a `.safetensors` file, a torch `.pth` (tensors only), or a table of tensors; before `quantize_`.
    Errors: PublishedWeightsError with the lists of keys, and then nothing is changed; FileNotFoundError.
    """
    state, where = read_table(weights)
    for name, tensor in state.items():
        if name.endswith(".lambda_attn") and tensor.dim() == 5:  # [T, 1, heads, 1, 1] there
            state[name] = tensor.flatten(1)
    load_renamed(model, state, published_name, where)
    return model
