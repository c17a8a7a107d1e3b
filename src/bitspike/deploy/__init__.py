"""The device side: runs `*.bitspike` artifacts as integers, with numpy and a small compiled extension.

    >>> from bitspike.deploy import load
    >>> net = load("cifar10")          # doctest: +SKIP
    >>> logits = net(images)           # uint8 [B, 32, 32, 3] -> float32 [B, 10]   # doctest: +SKIP
"""
from bitspike.deploy import kernels
from bitspike.deploy.errors import ArtifactError, ImageError, StepError
from bitspike.deploy.preprocess import read_image
from bitspike.deploy.runtime import Net, load
from bitspike.deploy.steps import Steps
from bitspike.deploy.stream import Decision, Stream

__all__ = ["ArtifactError", "Decision", "ImageError", "Net", "StepError", "Steps", "Stream", "kernels", "load", "read_image"]
