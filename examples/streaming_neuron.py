"""A neuron is a function of a whole sequence; its step function gives the same spikes one time step at a time."""
import torch

from bitspike.neurons import IELIF, LIF

torch.manual_seed(0)
drive = torch.rand(6, 1, 4) * 4  # [T, B, C]
for neuron in (LIF(decay=0.5), IELIF(4, decay=0.25)):
    whole = neuron(drive)
    potential, steps = torch.zeros_like(drive[0]), []
    for x in drive:
        spikes, potential = neuron.step(potential, x)
        steps.append(spikes)
    assert torch.equal(whole, torch.stack(steps))
    print(neuron, "->", whole[:, 0, 0].tolist())

# a count is as many binary spikes: what a spike-driven device sees
counts = IELIF(4)(torch.tensor([[0.1, 0.3, 0.6, 1.5]]))
steps = IELIF(4).binary_steps(counts)
assert torch.equal(steps.sum(0) * 0.25, counts)
print(counts.tolist(), "is", steps[:, 0].int().tolist())
