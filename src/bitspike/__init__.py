"""bitspike: low-bit spiking vision networks, from training to a device."""
__version__ = "0.1.0"
