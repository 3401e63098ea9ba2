"""Supervised contrastive learning with momentum contrast: MoCo v2 with a label-aware queue."""

import os
from typing import TYPE_CHECKING

# How long waiting OpenMP threads spin; libgomp reads it when torch is imported. By default two runs on one machine
# starve each other: on two cores of an AMD EPYC one run of resnet20 trains 192 images/s, two at once 35 and 36. With
# 1,000 rounds one run trains 184, two 106 and 117 (OMP_WAIT_POLICY=PASSIVE: 179; 116 and 120).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from PIL import Image


def load_encoder(
    path: "str | Path", device: "torch.device | str" = "cpu"
) -> "tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]":
    """The encoder in a checkpoint, and the preprocessing that its evaluation uses.

    Args:
        path: a checkpoint of this project, MoCo or SupContrast, a file of pretrained/, or a state dict of torchvision's
            or timm's ResNets (.pth, .safetensors). device: where the encoder goes.
    Returns:
        encoder: in eval mode, (N, 3, H, W) float -> (N, width) float32 features, not normalised.
        preprocess: a PIL image of any size -> its (3, size, size) float32 input, on the CPU. ValueError for one of
            more than 8 bits per channel (modes I and F): scale it to 8 bits first.
    Raises:
        UsageError: no such file. RunError: it is corrupt or contains no ResNet.
    """
    from functools import partial

    from torch import nn

    from moco import inference

    network, centre, _ = inference.load(path)
    network.fc = nn.Identity()
    return network.to(device), partial(inference.preprocess, centre=centre)
