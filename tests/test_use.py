"""From a checkpoint to features and other formats."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as tv

import moco
from conftest import ROOT
from moco import augment, batches, checkpoint, datasets, encoders, evaluate, inference
from test_bad_input import refused

WORDS = "-a resnet20 --image-size 12 -b 8 --epochs 1 --seed 0"


@pytest.fixture
def trained(run, folder, tmp_path):
    """The data, a pretraining checkpoint and a classifier's."""
    data = folder(train=8, val=5)
    assert run("main_moco_in.py", WORDS, "--moco-k 32 --mlp --output-dir", tmp_path, data).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    done = run("main_lincls.py", "-b 8 --epochs 2 --pretrained", last, "--output-dir", tmp_path, data)
    assert "worst classes: " in done.out.splitlines()[-2] and "cat" in done.out.splitlines()[-2]
    return data, last, tmp_path / "model_best.pth.tar"


def test_features_are_those_of_the_linear_evaluation(trained):
    data, last, best = trained
    split = datasets.load("imagefolder", data, False)
    for path in (last, best):
        encoder, preprocess = moco.load_encoder(path)
        assert not encoder.training
        saved = checkpoint.load(path)
        frozen = encoders.build("resnet20")(num_classes=1)
        checkpoint.load_encoder(frozen, checkpoint.encoder_weights(saved, path), path)
        options = saved["options"]
        centre = augment.Centre(12, options["mean"], options["std"])
        ((images, _),) = batches.Centres(split, centre, 64, torch.device("cpu"))
        wanted = evaluate.frozen(frozen)(images)
        with torch.no_grad():
            mine = torch.stack([preprocess(Image.open(file)) for file in split.paths])
            features = encoder(mine)
        std = torch.tensor(options["std"]).view(3, 1, 1)
        assert ((mine - images).abs() * std).max() <= 1 / 255 + 1e-6
        assert features.shape == (10, 64) and features.dtype == torch.float32
        assert (encoder(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_preprocess_takes_any_image(trained):
    _, preprocess = moco.load_encoder(trained[1])
    for mode, size in (("L", (40, 20)), ("RGBA", (20, 50)), ("P", (12, 12)), ("CMYK", (9, 9))):
        assert preprocess(Image.new(mode, size)).shape == (3, 12, 12)
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    small = tv.center_crop(tv.resize(image, 14), [12, 12])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in datasets.CIFAR10)
    assert ((preprocess(image) * std + mean) - tv.to_tensor(small)).abs().max() < 2 / 255


def test_the_page_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40)).save("photo.png")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    for page in ("docs/use.md", "README.md"):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
        (block,) = [block for block in blocks if "load_encoder" in block]
        there = {}
        exec(block, there)
        assert there["features"].shape == (1, 64)


def test_mocos_own_checkpoint(tmp_path):
    network = models.resnet18(num_classes=128)
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "theirs.pth.tar")
    encoder, preprocess = moco.load_encoder(tmp_path / "theirs.pth.tar")
    network.fc = torch.nn.Identity()
    images = preprocess(Image.new("RGB", (300, 260), "red"))[None]
    assert images.shape == (1, 3, 224, 224) and torch.equal(encoder(images), network.eval()(images))


def test_extract(run, trained, folder, tmp_path):
    data, last, _ = trained
    out = tmp_path / "features.npz"
    done = run("scripts/extract.py", last, data, "--out", out, "--neighbours 3 --picture", tmp_path / "sheet.png")
    assert done.status == 0, done.err
    found = np.load(out)
    encoder, preprocess = moco.load_encoder(last)
    with torch.no_grad():
        wanted = encoder(torch.stack([preprocess(Image.open(data / path)) for path in found["paths"]]))
    assert np.allclose(found["features"], wanted, rtol=1e-4, atol=1e-5) and found["features"].dtype == np.float32
    assert found["labels"].tolist() == [0] * 5 + [1] * 5 and found["paths"][0] == "val/cat/0.png"
    assert Image.open(tmp_path / "sheet.png").size == (4 * 66 + 8, 10 * 66)
    done = run("scripts/extract.py", last, data / "train", "--out", out, "--force")  # any folder of images
    found = np.load(out)
    assert len(found["features"]) == 16 and set(found["labels"]) == {-1} and "dog/7.png" in found["paths"]
    assert run("scripts/extract.py", last, "--dataset digits --split val --out", out, "--force").status == 0
    assert len(np.load(out)["labels"]) == datasets.VALIDATION_DIGITS

    refused(run("scripts/extract.py", last, data, "--out", out), 2, "exists")
    words = ("--split train --out", out, "--force")
    refused(run("scripts/extract.py", last, data / "train", *words), 2, "--split train", "has no train/")
    (tmp_path / "empty").mkdir()
    refused(run("scripts/extract.py", last, tmp_path / "empty", "--out", out, "--force"), 2, "no image")
    refused(run("scripts/extract.py", last, tmp_path / "none", "--out", out, "--force"), 2, "does not exist")
    refused(run("scripts/extract.py", last, data, "--out", tmp_path / "no/f.npz"), 2, "there is no folder")
    torch.save({"state_dict": {"module.weight": torch.zeros(1)}}, tmp_path / "other.pth.tar")
    refused(run("scripts/extract.py", tmp_path / "other.pth.tar", data, "--out", tmp_path / "f.npz"), 1, "no ResNet")


def test_export(run, trained, tmp_path):
    pytest.importorskip("onnxruntime")
    from safetensors.torch import load_file

    _, last, best = trained
    network, _, classes = inference.load(best)
    assert classes == ["cat", "dog"]
    for suffix in ("pth", "safetensors", "onnx"):
        for source in (last, best):
            done = run("scripts/export.py", source, tmp_path / f"e.{suffix}", "--force")
            assert done.status == 0, done.err
            assert float(done.out.split("batch of 7: ")[1]) < 1e-4  # ONNX: of batch 1 as well
    for state in (torch.load(tmp_path / "e.pth", weights_only=True), load_file(tmp_path / "e.safetensors")):
        network.load_state_dict(state)
    refused(run("scripts/export.py", last, tmp_path / "e.pth"), 2, "exists")
    refused(run("scripts/export.py", last, tmp_path / "e.h5"), 2, "suffix", ".onnx")
    refused(run("scripts/export.py", last, tmp_path / "no/e.pth"), 2, "there is no folder")


def test_export_to_torchvision_and_timm(run, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    words = "-a resnet18 --stem imagenet --dataset digits --image-size 32 --per-class 2 -b 16 --epochs 1 --moco-k 16"
    assert run("main_moco.py", words, "--output-dir", tmp_path).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    assert run("scripts/export.py", last, tmp_path / "e.safetensors").status == 0
    state = load_file(tmp_path / "e.safetensors")
    encoder, _ = moco.load_encoder(last)
    theirs, tvs = timm.create_model("resnet18", num_classes=0), models.resnet18()
    tvs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    for other in (theirs, tvs):
        other.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.allclose(other.eval()(images), encoder(images), rtol=1e-4, atol=1e-5)


def test_the_worst_classes_and_the_picture(run, trained, tmp_path):
    confusion = torch.tensor([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    assert evaluate.worst_classes(confusion, ["cat", "dog", "fox"]) == "worst classes: dog 50.0, cat 80.0"
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")
    assert saved["confusion"].sum(1).tolist() == [5, 5]
    done = run("scripts/picture.py", tmp_path)
    assert done.status == 0 and Image.open(tmp_path / "picture.png").width > 1500, done.err
