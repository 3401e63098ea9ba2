"""Checkpoints and weights of MoCo, SupContrast, torchvision and timm."""

import pytest
import torch
from PIL import Image
from torchvision import models

import moco
from helpers import TINY_MOCO, foreign, refused
from moco import checkpoint, inference


def test_linear_evaluation_reads_mocos_own_checkpoints(run, tmp_path):
    """They have only epoch, arch, state_dict and optimizer. The classifier learns from the features."""
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    saved = torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)
    theirs = {name: saved[name] for name in ("epoch", "arch", "state_dict", "optimizer")}
    torch.save(theirs, tmp_path / "moco.pth.tar")
    args = "-a resnet20 --dataset digits --image-size 8 -b 128 --lr 0.3 --epochs 8 --schedule 5 7 --seed 0"
    done = run("main_lincls.py", args, "--pretrained", tmp_path / "moco.pth.tar", "--output-dir", tmp_path)
    assert done.status == 0, done.err
    assert float(done.out.split("result: top1=")[1].split()[0]) > 30  # chance is 10


def test_load_encoder_reads_mocos_own_checkpoints(tmp_path):
    network = models.resnet18(num_classes=128)
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "theirs.pth.tar")
    encoder, preprocess = moco.load_encoder(tmp_path / "theirs.pth.tar")
    network.fc = torch.nn.Identity()
    images = preprocess(Image.new("RGB", (300, 260), "red"))[None]
    assert images.shape == (1, 3, 224, 224) and torch.equal(encoder(images), network.eval()(images))


@pytest.mark.parametrize("kind", ["torchvision", "old torchvision", "timm", "SupContrast"])
def test_weights_of_other_projects(kind, run, tmp_path):
    """load_encoder computes the same features, and a pretraining run starts with the same weights."""
    path, theirs = foreign(tmp_path, kind)
    cifar = kind == "SupContrast"
    images = torch.randn(2, 3, 48, 48)
    encoder, preprocess = moco.load_encoder(path)
    with torch.no_grad():
        wanted = theirs(images)
        assert (encoder(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert preprocess(Image.new("RGB", (300, 260))).shape[1:] == ((32, 32) if cifar else (224, 224))
    _, _, classes = inference.load(path)
    assert classes == (None if cifar else [str(label) for label in range(7)])

    # A learning rate of 0 does not change the weights, but batch norm updates its statistics.
    args = "--dataset digits --image-size 8 --per-class 2 -b 16 --epochs 1 --moco-k 16 --lr 0 --stem "
    args += "cifar" if cifar else "imagenet"
    done = run("main_moco_in.py", args, "--init", path, "--output-dir", tmp_path / "run")
    assert done.status == 0, done.err
    tensors = len(theirs.state_dict())
    tensors -= 20 * (kind == "old torchvision")
    left = "head.*" if cifar else "fc.bias, fc.weight"
    assert f"--init '{path}': {tensors} tensors taken; not taken: {left}" in done.out, done.out
    assert "MoCoIn: resnet18 on" in done.out  # recognised by the shapes
    saved = checkpoint.load(tmp_path / "run/checkpoint_last.pth.tar")
    for prefix in ("module.encoder_q.", "module.encoder_k."):
        for name, value in theirs.state_dict().items():
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                assert torch.equal(saved["state_dict"][prefix + name], value), name


def test_linear_evaluation_of_old_weights_resumes(run, tmp_path):
    """They have no counters of batches, and the checkpoint of the classifier has."""
    path, _ = foreign(tmp_path, "old torchvision")
    args = ["--dataset digits --image-size 8 --per-class 2 -b 16 --pretrained", path, "--output-dir", tmp_path]
    assert run("main_lincls.py", *args, "--epochs 1").status == 0
    done = run("main_lincls.py", *args, "--epochs 2 --resume auto")
    assert done.status == 0 and "continuing at epoch 1" in done.out, done.err


def test_init_and_its_limits(run, tmp_path):
    """--init with other layers, in a resumed run, from a run of another script, and with weights that do not fit."""
    path, _ = foreign(tmp_path, "torchvision")
    args = "--dataset digits --image-size 8 --per-class 2 -b 16 --epochs 1 --output-dir"
    done = run("main_ce.py", args, tmp_path / "ce", "--init", path)
    assert done.status == 0 and "119 tensors taken; not taken: conv1.weight, fc.bias, fc.weight" in done.out, done
    assert (
        "first convolution is 7x7, this network's is 3x3 and keeps its random weights: --stem imagenet would load it"
        in done.out
    )
    last = tmp_path / "ce/checkpoint_last.pth.tar"
    done = run("main_ce.py", args, tmp_path / "ce", "--init", path, "--epochs 2 --resume auto")
    assert done.status == 0 and f"note: --init is ignored: this run continues from '{last}'" in done.out, done
    assert "tensors taken" not in done.out
    done = run("main_supcon.py", args, tmp_path / "supcon", "--init", last)
    assert done.status == 0 and "120 tensors taken" in done.out, done
    refused(run("main_ce.py", args, tmp_path / "o", "-a resnet50 --init", path), 1, "does not fit", "Missing key")
    refused(run("main_ce.py", args, tmp_path / "o", "--init nowhere.pth"), 2, "'nowhere.pth' does not exist")
    refused(run("main_ce.py", args, tmp_path / "o", "--resume", path), 2, "only weights", "--init")
    state = torch.load(path, weights_only=True)
    del state["layer1.0.bn1.weight"]
    torch.save(state, tmp_path / "part.pth")
    refused(run("main_ce.py", args, tmp_path / "o", "--init", tmp_path / "part.pth"), 1, "shapes", "part.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 nonsense")
    refused(run("main_ce.py", args, tmp_path / "o", "--init", tmp_path / "bad.safetensors"), 1, "bad.safetensors")
