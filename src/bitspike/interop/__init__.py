"""Networks that were not written here: their neurons become bitspike's, everything else stays what it is.

`bitspike.interop.spikingjelly.convert(model)` and `bitspike.interop.snntorch.convert(model, example, ...)` give a copy that
`quantize_`, a search, `profile` and `export_model` take like any model of `bitspike.models`. `check_same_spikes` proves that
every neuron of the copy fires as in the original. `as_graph` writes down a forward that asks for shapes, for the exporter.
"""
from bitspike.interop.concrete import as_graph
from bitspike.interop.same import SameSpikes, check_same_spikes
from bitspike.interop.translate import InteropError

__all__ = ["InteropError", "SameSpikes", "as_graph", "check_same_spikes"]
