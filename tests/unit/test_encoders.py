"""Base encoders against torchvision and the papers, and batch norm over chunks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from moco import encoders, evaluate
from moco.errors import UsageError


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_parameters_have_torchvisions_names(arch):
    ours = encoders.build(arch)(num_classes=16).state_dict()
    theirs = models.get_model(arch, num_classes=16).state_dict()
    assert list(ours) == list(theirs)
    assert {n for n in ours if ours[n].shape != theirs[n].shape} == {"conv1.weight"}


def test_cifar_stem():
    network = encoders.build("resnet18")(num_classes=7)
    assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    seen = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert seen == [(2, 64, 32, 32)]
    assert network.conv1.bias is None
    # He et al.: variance 2 / (9 * 64). PyTorch's default would be 1 / (3 * 27).
    assert network.conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    assert encoders.build("resnet50")(num_classes=9).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 9)


def test_imagenet_stem_is_torchvisions():
    torch.manual_seed(0)
    ours = encoders.build("resnet18", "imagenet")(num_classes=5).eval()
    theirs = models.resnet18(num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_resnet20():
    network = encoders.build("resnet20")(num_classes=10)
    # He et al. give 0.27 million parameters.
    assert sum(p.numel() for p in network.parameters()) == 269_722
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 19
    widths = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, inputs, output: widths.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert widths == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    shortcut = network.layer2[0].downsample(torch.ones(1, 16, 4, 4))
    assert shortcut[:, 8:24].eq(1).all() and shortcut.sum() == 16 * 4


def test_resnet20_is_the_network_of_the_paper():
    """Its forward pass agrees with one in float64 that is written from its weights."""
    torch.manual_seed(0)
    network = encoders.build("resnet20")(num_classes=10).double().eval()
    for name, weight in network.state_dict().items():
        if weight.ndim == 1 and weight.is_floating_point():
            weight.copy_(torch.rand_like(weight) + 0.5 * name.endswith(("var", "weight")))
    p = network.state_dict()

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, p[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, scale, shift = (
            p[f"{bn}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = conv_bn(images, "conv1", "bn1").clamp(min=0)
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = torch.zeros(len(x), width, x.shape[2] // stride, x.shape[3] // stride, dtype=torch.float64)
            first = (width - x.shape[1]) // 2
            shortcut[:, first : first + x.shape[1]] = x[:, :, ::stride, ::stride]
            inside = conv_bn(x, f"{at}.conv1", f"{at}.bn1", stride).clamp(min=0)
            x = (conv_bn(inside, f"{at}.conv2", f"{at}.bn2") + shortcut).clamp(min=0)
    wanted = x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    assert torch.allclose(network(images), wanted)


def test_resnet20_is_initialised_as_by_he_et_al():
    network = encoders.build("resnet20")(num_classes=10)
    for convolution in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        wanted = (2 / (9 * convolution.out_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(wanted, rel=0.2)


def chunk_by_chunk(network, images, splits):
    """Applies a copy of the network to each chunk: the features, and the mean of the copies' running statistics by name."""
    chunks = images.chunk(splits)
    copies = [copy.deepcopy(network) for _ in chunks]
    features = torch.cat([one(chunk) for one, chunk in zip(copies, chunks, strict=True)])
    states = [one.state_dict() for one in copies]
    names = [name for name in states[0] if "running" in name]
    return features, {name: torch.stack([state[name] for state in states]).mean(0) for name in names}


class Layers(nn.Module):
    """BatchNorm1d, 2d and 3d; one without running statistics, one without parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4, momentum=None)
        self.inner = nn.ModuleDict({"bn": nn.BatchNorm3d(4, affine=False)})
        self.free = nn.BatchNorm1d(4, track_running_stats=False)
        self.fc = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())

    def forward(self, x):
        x = self.inner["bn"](self.bn1(self.conv1(x)).relu()[..., None])
        return self.fc(self.free(x.square().mean((2, 3, 4))))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [12, 11, 3], ids=["divisible", "a smaller chunk", "fewer than chunks"])
def test_batch_norm_of_chunks(size, compiled):
    """Features, gradients and running statistics are as if the network saw one chunk after another."""
    torch.manual_seed(0)
    network = Layers() if size > 3 else nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for p in network.parameters():
        nn.init.normal_(p)
    split, images = copy.deepcopy(network), torch.randn(size, 3, 6, 6)
    encoders.split_batch_norm(split, 4)
    wanted, statistics = chunk_by_chunk(network, images, 4)
    (wanted.relu() ** 2).sum().backward()
    network.zero_grad()
    reference = copy.deepcopy(network)
    sum((reference(chunk).relu() ** 2).sum() for chunk in images.chunk(4)).backward()
    run = torch.compile(split, backend="aot_eager") if compiled else split
    features = run(images)
    (features.relu() ** 2).sum().backward()
    assert torch.allclose(features, wanted, atol=1e-5)
    for name, p in reference.named_parameters():
        mine = split.get_parameter(name).grad
        assert (mine - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-4, name
    for name, value in statistics.items():
        assert torch.allclose(split.state_dict()[name], value, atol=1e-6), name
    assert all(value == 1 for name, value in split.state_dict().items() if "num_batches" in name)


def test_batch_norm_of_chunks_keeps_names_and_parameters():
    network = encoders.build("resnet18")(num_classes=5)
    names, parameters = list(network.state_dict()), dict(network.named_parameters())
    network.bn1.requires_grad_(False)
    before = [p.requires_grad for p in parameters.values()]
    encoders.split_batch_norm(network, 2)
    assert list(network.state_dict()) == names
    assert all(p is parameters[name] for name, p in network.named_parameters())
    assert [p.requires_grad for p in network.parameters()] == before
    assert type(network.bn1) is not nn.BatchNorm2d


def test_batch_norm_of_chunks_in_eval_mode():
    """It normalises all images by its running statistics, and does not update them."""
    torch.manual_seed(0)
    network = encoders.build("resnet20")(num_classes=5)
    network(torch.randn(8, 3, 8, 8))
    split, images = copy.deepcopy(network), torch.randn(7, 3, 8, 8)
    encoders.split_batch_norm(split, 4)
    assert torch.equal(split.eval()(images), network.eval()(images))
    assert torch.equal(evaluate.frozen(split)(images), evaluate.frozen(network)(images))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in split.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_batch_norm_of_chunks_of_a_large_mean(compiled):
    """With a mean of 1,000 times the standard deviation, E[x^2] - E[x]^2 would lose all digits in float32."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.BatchNorm2d(3))
    encoders.split_batch_norm(layer, 2)
    x = (1000 + torch.randn(8, 3, 5, 5)) * torch.tensor([1.0, -1.0, 1e-3]).view(3, 1, 1)
    chunks = x.double().unflatten(0, (2, 4))
    var, mean = torch.var_mean(chunks, (1, 3, 4), correction=0, keepdim=True)
    wanted = ((chunks - mean) / (var + 1e-5).sqrt()).flatten(0, 1)
    found = (torch.compile(layer, backend="aot_eager") if compiled else layer)(x)
    assert torch.allclose(found.double(), wanted, atol=1e-3)
    unbiased = var.mean(0).flatten() * (100 / 99)
    assert torch.allclose(layer[0].running_var.double(), 0.9 + 0.1 * unbiased, rtol=1e-4)
    assert torch.allclose(layer[0].running_mean.double(), 0.1 * mean.mean(0).flatten(), rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_batch_norm_of_chunks_keeps_the_dtype(compiled):
    layer = nn.Sequential(nn.BatchNorm2d(3))
    encoders.split_batch_norm(layer, 2)
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        assert call(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer[0].running_var.dtype == torch.float32
    assert layer.double()(torch.randn(4, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_batch_norm_that_cannot_be_split_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    with pytest.raises(UsageError, match="layer '1' is a SyncBatchNorm"):
        encoders.split_batch_norm(network, 2)
    encoders.split_batch_norm(network, 1)


def test_mlp_head():
    for arch, width in (("resnet20", 64), ("resnet18", 512), ("resnet50", 2048)):
        network = encoders.build(arch)(num_classes=128)
        encoders.add_mlp_head(network)
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name.startswith("fc.")}
        assert shapes == {
            "fc.0.weight": (2048, width),
            "fc.0.bias": (2048,),
            "fc.2.weight": (128, 2048),
            "fc.2.bias": (128,),
        }
        assert isinstance(network.fc[1], nn.ReLU)


@pytest.mark.parametrize(
    "arch, why", [("resnet51", "unknown"), ("vgg16", "not a ResNet"), ("densenet121", "not a ResNet")]
)
def test_other_architectures_are_refused(arch, why):
    with pytest.raises(UsageError, match=why) as refusal:
        encoders.build(arch)
    for word in (f"'{arch}'", "resnet20", "resnet50"):  # the unknown name, and some valid ones
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_other_stems_are_refused():
    with pytest.raises(UsageError, match=r"stem 'mnist'.*cifar.*imagenet"):
        encoders.build("resnet18", "mnist")
