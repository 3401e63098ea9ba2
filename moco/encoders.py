"""Base encoders: torchvision's ResNet family with the CIFAR or the ImageNet stem, and resnet20 for small machines."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models.resnet import BasicBlock

from moco.errors import UsageError

HIDDEN = 2048  # width of the projection head's hidden layer, whatever the encoder's width


def build(arch: str, stem: str = "cifar") -> Callable[..., nn.Module]:
    """The `base_encoder` that `moco.builder` takes: `build("resnet50")(num_classes=128)` is a network ending in `fc`.

    Args:
        arch: "resnet20", or any network of torchvision's ResNet family (resnet18, resnext50_32x4d, ...).
        stem: "cifar" (first convolution 3x3, stride 1, padding 1, no max-pool) or "imagenet" (torchvision's own).
            resnet20 always has its own, a 3x3 convolution.
    Raises:
        UsageError: unknown architecture or stem, or one that is not a ResNet.
    """
    if stem not in ("cifar", "imagenet"):
        raise UsageError(f"unknown stem '{stem}': it is cifar or imagenet")
    if arch == "resnet20":
        return resnet20
    if arch not in models.list_models(module=models):
        raise UsageError(f"unknown architecture '{arch}': -a takes {', '.join(names())}")
    if arch not in names():
        raise UsageError(f"architecture '{arch}' is no ResNet whose last layer is fc: -a takes {', '.join(names())}")

    def base_encoder(num_classes):
        network = models.get_model(arch, weights=None, num_classes=num_classes)
        if stem == "cifar":
            network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        return network

    return base_encoder


def names() -> list[str]:
    known = models.list_models(module=models)
    return ["resnet20", *(n for n in known if models.get_model_builder(n).__module__ == models.resnet.__name__)]


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, the new channels filled with zeros, no parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        x = x[:, :, ::2, ::2]
        missing = self.channels - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class resnet20(nn.Module):
    """The 20-layer CIFAR ResNet of He et al. (arXiv:1512.03385, section 4.2): three stages, 16, 32 and 64 wide.

    (N, 3, H, W) -> (N, num_classes). 0.27 million parameters, 41 MFLOP (multiply-adds) an image of 32x32.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self.stage(16, 16, 1)
        self.layer2 = self.stage(16, 32, 2)
        self.layer3 = self.stage(32, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def stage(width_in: int, width: int, stride: int) -> nn.Sequential:
        shortcut = PadShortcut(width) if stride != 1 else None
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, BasicBlock(width, width), BasicBlock(width, width))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def apply(encoder: nn.Module, images: torch.Tensor, bn_splits: int = 1) -> torch.Tensor:
    """(N, 3, H, W) -> (N, C) float32. In training, batch norm sees each of `bn_splits` chunks of the batch alone."""
    if bn_splits == 1 or not encoder.training or getattr(encoder, "splits_inside", False):
        return encoder(images).float()
    # Every chunk starts from the same running statistics and their results are averaged: one update by the mean of
    # the chunks' statistics, which is what as many processes arrive at when they average theirs.
    # (`.data`, since autograd would take a change of theirs for one of what the backward pass needs.)
    running = [buffer.data for buffer in encoder.buffers() if buffer.is_floating_point()]
    before, after = torch._foreach_mul(running, 1), torch._foreach_mul(running, 0)
    features = []
    chunks = images.chunk(bn_splits)  # fewer, if there are fewer images
    for chunk in chunks:
        torch._foreach_copy_(running, before)
        features.append(encoder(chunk).float())
        torch._foreach_add_(after, running, alpha=1 / len(chunks))
    torch._foreach_copy_(running, after)
    return torch.cat(features)


class SplitBatchNorm(_BatchNorm):
    """Batch norm that does in one pass what `apply` does chunk by chunk, to rounding: half the kernels, once compiled.

    It takes the place of a layer for images (N, C, H, W) or vectors (N, C), and shares its parameters and statistics.
    """

    def __init__(self, layer: _BatchNorm, splits: int):
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
        self.train(layer.training)
        self.splits = splits

    def _check_input_dim(self, x: Tensor) -> None:
        """Both kinds are right."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        chunks = x.unflatten(0, (self.splits, -1)).float()  # (splits, n, C, ...)
        others = [1, *range(3, chunks.dim())]
        mean = chunks.mean(others, keepdim=True)
        var = (chunks.square().mean(others, keepdim=True) - mean.square()).clamp(min=0)
        with torch.no_grad():
            count = chunks[0, :, 0].numel()
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(var.mean(0).flatten() * (count / (count - 1)), self.momentum)
        weight, bias = (p.view(-1, *[1] * (x.dim() - 2)) for p in (self.weight, self.bias))
        normed = (chunks - mean) * (torch.rsqrt(var + self.eps) * weight) + bias
        return normed.to(x.dtype).flatten(0, 1)


def split_batch_norm(encoder: nn.Module, splits: int) -> None:
    """Has the encoder's batch norm layers see each of `splits` equal chunks alone, so that `apply` need not cut it."""
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, SplitBatchNorm(layer, splits))
    encoder.splits_inside = True


def add_mlp_head(network: nn.Module) -> None:
    """Replaces `fc` with MoCo v2's head, Linear(width, 2048), ReLU, Linear(2048, dim): `fc.0.*` and `fc.2.*`."""
    width, dim = network.fc.in_features, network.fc.out_features
    network.fc = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, dim))
