import pytest
import torch
from torch import nn
from torchvision import models

from moco import encoders
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
    with pytest.raises(UsageError, match=why):
        encoders.build(arch)
    with pytest.raises(UsageError, match="stem"):
        encoders.build("resnet18", "mnist")
