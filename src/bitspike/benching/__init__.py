"""How fast is a network, and how fast would other engines run it? `bitspike bench` is the front of this package."""
from bitspike.benching.comparison import Result, benchmark
from bitspike.benching.lower import PeerError

__all__ = ["PeerError", "Result", "benchmark"]
