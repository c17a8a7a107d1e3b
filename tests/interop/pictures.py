"""Pictures with structure, and norms and steps that fit them: what the interop tests share."""
from __future__ import annotations

import numpy as np
import torch

from bitspike.exporting.export import calibrate_norms


def pictures(n: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [n, size, size, channels]: squares of 4 pixels with noise."""
    rng = np.random.default_rng(seed)
    squares = np.kron(rng.integers(0, 256, (n, size // 4, size // 4, channels)), np.ones((1, 4, 4, 1)))
    return np.clip(squares + rng.normal(0, 10, squares.shape), 0, 255).astype(np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """float32 [n, channels, size, size] with mean 0.5 and std 0.25."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    return (x / 255 - 0.5) / 0.25


def settle(net: torch.nn.Module, pixels: np.ndarray) -> torch.nn.Module:
    """Give batch norms the statistics of these pictures, and quantizers their first steps."""
    calibrate_norms(net, pixels, [0.5] * pixels.shape[-1], [0.25] * pixels.shape[-1])
    return net.eval()
