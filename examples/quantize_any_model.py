"""Make any torch model low-bit: attach quantizers by name, look at codes and size. Takes seconds."""
import torch
from torch import nn

from bitspike import QuantSpec, Scheme, codes, profile, quantize_
from bitspike.neurons import IELIF

net = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), IELIF(4), nn.Conv2d(16, 32, 3, stride=2, padding=1), IELIF(4), nn.Flatten(),
    nn.Linear(32 * 8 * 8, 10))
spec = QuantSpec({"*": Scheme("lsq", 4), "5": Scheme("binary")})  # the last rule that matches a layer holds
quantize_(net, spec)

images = torch.rand(8, 3, 16, 16)
assert net(images).shape == (8, 10)
integers, scale = codes(net[2])
print("codes of layer 2:", integers.min().item(), "to", integers.max().item(), "with", scale.numel(), "steps")

report = profile(net, images, name="a small net")
print(f"{report.weights:,} weights in {report.weight_bytes:,} bytes; {report.spikes_per_neuron:.2f} spikes per neuron")
print(f"energy per image: literature {report.literature_pj / 1e3:.1f} nJ, bit-aware {report.bit_aware.total_pj / 1e3:.1f} nJ, "
      f"quantized ANN {report.quantized_ann.total_pj / 1e3:.1f} nJ")
