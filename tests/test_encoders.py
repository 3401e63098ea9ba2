import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from moco import encoders, evaluate
from moco.errors import UsageError


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_names_are_torchvisions(arch):
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
    """Its forward pass once more, in float64, from the weights alone."""
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


def test_convolutions_of_resnet20_start_as_he_et_al_say():
    network = encoders.build("resnet20")(num_classes=10)
    for convolution in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        wanted = (2 / (9 * convolution.out_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(wanted, rel=0.2)


def test_apply_splits_the_batch_in_training_alone():
    torch.manual_seed(0)
    network = encoders.build("resnet20")(num_classes=5)
    images = torch.randn(8, 3, 8, 8)
    trained = copy.deepcopy(network)
    chunks = torch.cat([copy.deepcopy(network)(chunk) for chunk in images.chunk(4)])
    assert torch.allclose(encoders.apply(trained, images, 4), chunks, atol=1e-5)
    # Evaluation sees one image like another, in one pass, and keeps its statistics.
    trained.eval()
    before, passes = copy.deepcopy(trained.state_dict()), []
    trained.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    assert torch.equal(encoders.apply(trained, images, 4), trained(images))
    assert passes == [8, 8]
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("splits", [1, 2])
def test_apply_gives_float32_under_autocast(splits):
    network = encoders.build("resnet20")(num_classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoders.apply(network, torch.randn(4, 3, 8, 8), splits).dtype == torch.float32


@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
def test_batch_norm_of_chunks_in_one_pass(arch):
    """Features, gradients and statistics of chunk by chunk; the parameters stay the optimizer's."""
    torch.manual_seed(0)
    network = encoders.build(arch)(num_classes=5)
    for p in network.parameters():
        nn.init.normal_(p, std=0.5 if p.dim() == 1 else 0.1)
    split, images = copy.deepcopy(network), torch.randn(12, 3, 16, 16)
    parameters = dict(split.named_parameters())
    encoders.split_batch_norm(split, 3)
    assert list(split.state_dict()) == list(network.state_dict())
    assert all(p is parameters[name] for name, p in split.named_parameters())
    found = []
    for one in (network, split):
        features = encoders.apply(one, images, 3)
        features.square().mean().backward()
        found.append(
            [features, *(p.grad for p in one.parameters()), *(b for b in one.buffers() if b.is_floating_point())]
        )
    for wanted, mine in zip(*found, strict=True):
        assert (mine - wanted).norm() <= 1e-3 * wanted.norm()
    network.load_state_dict(split.state_dict())
    assert torch.equal(evaluate.frozen(split)(images), evaluate.frozen(network)(images))


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


@pytest.mark.parametrize("arch, why", [("resnet51", "unknown"), ("vgg16", "no ResNet"), ("densenet121", "no ResNet")])
def test_other_architectures_are_refused(arch, why):
    with pytest.raises(UsageError, match=why) as refusal:
        encoders.build(arch)
    for word in (f"'{arch}'", "resnet20", "resnet50"):  # what was asked for, and what there is
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_other_stems_are_refused():
    with pytest.raises(UsageError, match=r"stem 'mnist'.*cifar.*imagenet"):
        encoders.build("resnet18", "mnist")
