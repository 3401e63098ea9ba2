"""Base encoders: torchvision's ResNet family with the CIFAR or the ImageNet stem, and resnet20 for small machines."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models.resnet import BasicBlock

from moco import distributed
from moco.errors import UsageError

HIDDEN = 2048  # width of the projection head's hidden layer, as in the reference; MoCo's own is as wide as the encoder


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
        raise UsageError(f"architecture '{arch}' is not a ResNet whose last layer is fc: -a takes {', '.join(names())}")

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

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2]
        missing = self.channels - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class resnet20(nn.Module):
    """The 20-layer CIFAR ResNet of He et al. (arXiv:1512.03385, section 4.2): three stages, 16, 32 and 64 wide.

    (N, 3, H, W) -> (N, num_classes). 0.27 million parameters, 41 million multiply-adds per 32x32 image.
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


RESNETS = (models.ResNet, resnet20)


class SplitBatchNorm(_BatchNorm):
    """Batch norm that sees each of `splits` chunks of the batch by itself, as it would on as many processes.

    In training every chunk is normalised by its own mean and variance, and the running statistics take one step
    towards the mean of the chunks': what the processes arrive at when they average theirs. The chunks are those of
    `x.chunk(splits)`, so where `splits` does not divide the batch the last one is smaller, or there are fewer.

    Args:
        layer: gives its parameters and statistics to this one, which trains them only if `layer` did.
    """

    def __init__(self, layer: _BatchNorm, splits: int):
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            setattr(self, name, tensor)
        self.train(layer.training)
        self.splits = splits

    def _check_input_dim(self, x: Tensor) -> None:
        """Accepts any (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        # F.batch_norm is the fastest in eager mode; a compiler makes fewer kernels of the formula for all chunks.
        equal = len(x) % self.splits == 0 and x[:, 0].numel() > self.splits
        whole = torch.compiler.is_compiling() and equal
        normed, mean, var = self.at_once(x) if whole else self.one_by_one(x)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), step)
                self.running_var.lerp_(var.mean(0).to(self.running_var.dtype), step)
        return normed

    def one_by_one(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x normalised, and the mean and the unbiased variance of each chunk, (chunks, C)."""
        chunks = x.chunk(self.splits)
        like = x if self.weight is None else self.weight
        mean, var = like.new_zeros(2, len(chunks), self.num_features)
        normed = [
            F.batch_norm(chunk, m, v, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for chunk, m, v in zip(chunks, mean, var, strict=True)
        ]
        return torch.cat(normed), mean, var

    def at_once(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `one_by_one`, for equal chunks."""
        chunks = x.unflatten(0, (self.splits, -1))  # (splits, n, C, ...)
        chunks = chunks.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(chunks, [1, *range(3, chunks.dim())], correction=0, keepdim=True)
        scale, shift = torch.rsqrt(var + self.eps), 0
        if self.affine:
            weight, shift = (p.view(-1, *[1] * (x.dim() - 2)) for p in (self.weight, self.bias))
            scale = scale * weight
        normed = ((chunks - mean) * scale + shift).to(x.dtype).flatten(0, 1)
        count = chunks[0, :, 0].numel()
        return normed, mean.detach().flatten(1), var.detach().flatten(1) * (count / (count - 1))


def split_batch_norm(encoder: nn.Module, splits: int) -> None:
    """Makes an encoder's batch norm layers normalise each of `splits` chunks of the batch separately; names do not change.

    Raises:
        UsageError: a layer is of another kind of batch norm than PyTorch's three (BatchNorm1d, 2d and 3d).
    """
    if splits == 1:
        return
    for name, layer in list(encoder.named_modules(remove_duplicate=False)):
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, SplitBatchNorm(layer, splits))
        elif isinstance(layer, _BatchNorm):
            raise UsageError(f"bn_splits={splits}: layer '{name}' is a {type(layer).__name__}, which cannot be split")


def compile_encoder(encoder: nn.Module, device: torch.device) -> None:
    """torch.compile in place. With one process on a GPU a pass becomes one launch: a CUDA graph replays its kernels.

    The outputs of such a pass last until the next one.
    """
    graphs = device.type == "cuda" and distributed.world_size() == 1
    encoder.compile(mode="reduce-overhead" if graphs else None)


def add_mlp_head(network: nn.Module) -> None:
    """Replaces `fc` with MoCo v2's head, Linear(width, 2048), ReLU, Linear(2048, dim): `fc.0.*` and `fc.2.*`."""
    width, dim = network.fc.in_features, network.fc.out_features
    network.fc = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, dim))
