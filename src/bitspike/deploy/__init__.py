"""The device side: runs `*.bitspike` artifacts as integers, with numpy and a small compiled extension.

    >>> from bitspike.deploy import load
    >>> net = load("cifar10")          # doctest: +SKIP
    >>> logits = net(images)           # uint8 [B, 32, 32, 3] -> float32 [B, 10]   # doctest: +SKIP
"""
from bitspike.deploy import kernels
from bitspike.deploy.dense import Detector, Segmenter
from bitspike.deploy.errors import ArtifactError, ImageError, StepError, StreamError
from bitspike.deploy.preprocess import read_image
from bitspike.deploy.runtime import Net, load, load_classifier
from bitspike.deploy.steps import Steps
from bitspike.deploy.stream import Decision, Stream

__all__ = ["ArtifactError", "Decision", "Detector", "ImageError", "Net", "Segmenter", "StepError", "Steps", "Stream",
           "StreamError", "kernels", "load", "load_classifier", "read_image"]
