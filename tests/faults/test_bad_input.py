"""Bad input: one line on stderr, exit status 2 (usage) or 1 (a failure at run time), and no partial file."""

import errno
import os
import shutil
import socket
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import SHORT, TINY, TINY_MOCO, refused
from moco import datasets, distributed


@pytest.mark.parametrize(
    "args, message",
    [
        ("-b 0", "'0' is not a whole number of 1 or more"),
        ("--moco-k 0", "--moco-k"),
        ("--moco-t 0", "above 0"),
        ("--moco-t -1", "above 0"),
        ("--moco-t nan", "--moco-t"),
        ("--lr nan", "'nan' is not a number"),
        ("--lr fast", "'fast' is not a number"),
        ("--lr inf", "--lr"),
        ("--lr -0.1", "--lr"),
        ("--epochs 1.5", "--epochs"),
        ("--moco-m 1.1", "from 0 to 1"),
        ("--seed -3", "--seed"),
        ("--seed 99999999999999999999", "in 32 bits"),
        ("--image-size 100000", "from 8 to 4096"),
        ("--dataset mnist", "--dataset"),
        ("--image-size 3", "--image-size"),
        ("--std 0 1 1", "--std"),
        ("--nonsense", "--nonsense"),
        ("-a resnet51", "unknown architecture 'resnet51'"),
        ("-a vgg16", "not a ResNet"),
        ("-a vit_b_16", "not a ResNet"),
        ("-b 30 --bn-splits 4", "--bn-splits 4"),
        ("-b 4 --bn-splits 4", "2 images"),
        ("-b 2000", "fewer than one batch (-b 2000)"),
        ("--world-size 2 --rank 2", "--rank 2"),
        ("--nesterov --momentum 0", "--nesterov"),
        ("--gpu 77", "--gpu 77"),
        ("--resume nowhere.pth.tar", "'nowhere.pth.tar' does not exist"),
        ("--start-epoch 9", "--start-epoch 9"),
        ("--resume ''", "--resume: '' is empty"),
        ("--init ''", "--init: '' is empty"),
        ("-a ''", "--arch: '' is empty"),
        ("--output-dir ''", "--output-dir: '' is empty"),
        (f"--moco-k {10**400}", "in 32 bits"),
    ],
)
def test_options(args, message, run, tmp_path):
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path / "out", args)
    refused(done, 2, message)
    assert not list(tmp_path.rglob("*.pth.tar*"))


@pytest.mark.parametrize("script", ["main_moco_in.py", "main_lincls.py"])
def test_folders(script, run, folder, tmp_path):
    good = folder("good", train=6, val=3)
    run("main_moco_in.py", SHORT, "--output-dir", tmp_path / "trained", good)
    args = [SHORT, "--output-dir", tmp_path / "out"]
    if script == "main_lincls.py":
        args = ["-b 4 --epochs 1 --pretrained", tmp_path / "trained/checkpoint_last.pth.tar", *args[1:]]
    refused(run(script, *args), 2, "data folder")
    refused(run(script, *args, tmp_path / "nowhere"), 2, "nowhere", "does not exist", "--dataset cifar10")
    (tmp_path / "file").touch()
    refused(run(script, *args, tmp_path / "file"), 2, "not a folder")
    (tmp_path / "no-classes/train").mkdir(parents=True)
    (tmp_path / "no-classes/val").mkdir(parents=True)
    refused(run(script, *args, tmp_path / "no-classes"), 2, "no-classes", "class folders")
    without = folder("without", train=6, val=2)
    (without / "train/fox").mkdir()
    (without / "val/fox").mkdir()
    refused(run(script, *args, without), 2, "fox", "no image")
    broken = folder("broken", train=6, val=6)
    for split in ("train", "val"):
        content = (broken / split / "dog/3.png").read_bytes()
        (broken / split / "dog/3.png").write_bytes(content[: len(content) // 2])
    refused(run(script, *args, broken), 1, "dog/3.png", "cannot be read")
    assert not list((tmp_path / "out").rglob("*.pth.tar*"))


def test_holding_out_every_image(run, folder, tmp_path):
    args = ["-a resnet20 -b 4 --holdout 6 --output-dir", tmp_path, folder(train=6)]
    refused(run("main_ce.py", *args), 2, "--holdout 6", "6 training images")


def test_folders_of_the_linear_evaluation(run, folder, tmp_path):
    good = folder("good", train=6, test=3)
    assert run("main_moco_in.py", SHORT, "--output-dir", tmp_path, good).status == 0  # does not need val/
    args = ["-b 4 --epochs 1 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir", tmp_path / "linear"]
    assert run("main_lincls.py", *args, good).status == 0  # reads test/ if there is no val/
    refused(run("main_lincls.py", *args, folder("only-train", train=6)), 2, "neither val/ nor test/")
    other = folder("other", train=6, val=3)
    os.rename(other / "val/dog", other / "val/wolf")
    refused(run("main_lincls.py", *args, other), 2, "dog", "wolf", "differ")


def test_no_network(run, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Connection refused")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(distributed, "lost_connection", lambda error: True)  # with several processes it reads like one
    done = run("main_moco.py", SHORT, tmp_path)
    refused(done, 1, "no train/ folder and no CIFAR-10", "could not be downloaded", "Connection refused")
    refused(run("main_moco.py", SHORT, "--dataset cifar100", tmp_path), 1, "CIFAR-100")


@pytest.mark.parametrize("script", ["main_moco_in.py", "main_lincls.py"])
def test_nothing_is_downloaded_to_a_folder_with_other_files(script, run, folder, tmp_path, monkeypatch):
    """If the user gives data/train/ instead of data/, CIFAR-10 is not downloaded to it."""
    data = folder("photos", train=6, val=3)
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(getattr(datasets.datasets, name), "download", lambda self: pytest.fail("downloaded"))
    args = [SHORT, "--output-dir", tmp_path / "out"]
    if script == "main_lincls.py":
        run("main_moco_in.py", *args, data)
        args = ["-b 4 --epochs 1 --pretrained", tmp_path / "out/checkpoint_last.pth.tar"]
    refused(run(script, *args, data / "train"), 2, "photos/train", "no train/ folder", "neither empty")


def test_one_class(run, folder, tmp_path):
    data = folder(train=8, val=4, classes=("all",))
    refused(run("main_moco_in.py", SHORT, "--output-dir", tmp_path / "in", data), 2, "one class, 'all'")
    assert run("main_moco.py", SHORT, "--output-dir", tmp_path, data).status == 0  # MoCo v2 uses no labels
    linear = ["-b 4 --epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    refused(run("main_lincls.py", *linear, data), 2, "one class, 'all'")


def test_scripts(run, tmp_path):
    refused(run("scripts/report.py", "--results", tmp_path / "nowhere"), 2, "nowhere")
    refused(run("scripts/report.py", "--pages", tmp_path / "nowhere"), 1, "nowhere")
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "nowhere/a.png"), 2, "nowhere")
    for name in ("--out", "--profile"):
        refused(run("scripts/bench.py", name, tmp_path / "nowhere/a.json"), 2, "nowhere")
    torch.save({"state_dict": {}}, tmp_path / "checkpoint_last.pth.tar")
    refused(run("scripts/picture.py", tmp_path), 1, "not from this project")
    (tmp_path / "runs").touch()
    row = ["in-200", tmp_path, "--runs", tmp_path / "runs"]
    refused(run("scripts/reproduce.py", *row), 1, "Not a directory")
    for args in ("--arch resnet20", "--epochs=3", "-a resnet20"):
        refused(run("scripts/reproduce.py", *row, f"'--pretrain={args}'"), 2, "options of this script")
    refused(run("scripts/reproduce.py", *row, '''"--pretrain=it's"'''), 2, "--pretrain it's", "No closing quotation")


def test_out_of_memory(run, tmp_path):
    done = run("main_moco.py", TINY_MOCO, "--moco-k 2000000000 --moco-dim 20000 --epochs 1 --output-dir", tmp_path)
    refused(done, 1, "out of memory", "--moco-k")


def odd_images():
    """(name, a function that saves it to a path, can it be trained on?) for each odd file."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    image, second = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    return [
        ("gray.png", image.convert("L").save, True),
        ("palette.png", image.convert("P").save, True),
        ("cmyk.jpg", image.convert("CMYK").save, True),
        ("alpha.png", image.convert("RGBA").save, True),
        ("animated.webp", partial(image.save, save_all=True, append_images=[second]), True),
        ("16-bit.png", Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256).save, False),
        ("misnamed.png", partial(image.save, format="JPEG"), True),
        ("empty.png", Path.touch, False),
        ("text.jpg", partial(Path.write_text, data="not an image"), False),
        ("zip.png", lambda path: zipfile.ZipFile(path, "w").close(), False),
        ("decompression-bomb.png", Image.new("1", (19_000, 19_000)).save, False),
    ]


def test_odd_images(run, folder, tmp_path):
    """A run trains on the image, or its error names the file."""
    data = folder(train=4)
    for name, save, readable in odd_images():
        save(data / "train/cat" / name)
        done = run("main_moco.py", SHORT, "--output-dir", tmp_path / "out" / name, data)
        if readable:
            assert done.status == 0, (name, done.err)
        else:
            refused(done, 1, name, "cannot be read")
        (data / "train/cat" / name).unlink()


def test_odd_folders(run, folder, tmp_path):
    """Nested, hidden and linked folders and names that are not UTF-8: every image is read once."""
    root = folder(train=4)
    os.symlink(root / "train", root / "train/cat/around")
    os.symlink(root / "train/cat", root / "train/dog/circle")
    (root / "train/.hidden").mkdir()
    (root / "train/cat/._0.png").write_bytes(b"attributes of 0.png")
    for name in (".thumbnails", "@eaDir", "__MACOSX"):
        (root / "train/cat" / name).mkdir()
        shutil.copy(root / "train/dog/0.png", root / "train/cat" / name)
    nested = root / "train/dog/of/many/kinds"
    nested.mkdir(parents=True)
    name = os.path.join(os.fsencode(nested), b"\xff\xfe.png")
    with open(name, "wb") as file:
        file.write((root / "train/dog/0.png").read_bytes())
    (root / "train/readme.txt").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.png").write_bytes((root / "train/dog/0.png").read_bytes())
    os.symlink(elsewhere, root / "train/dog/linked")
    os.symlink(elsewhere, root / "train/dog/linked-again")
    os.symlink(tmp_path, elsewhere / "back")
    os.symlink(root / "train/dog/of", root / "train/dog/alias")  # sorted before its target
    (root / "train/fox").symlink_to(elsewhere)
    assert len(list(datasets.images_below(root / "train/cat", Counter()))) == 4
    found = list(datasets.images_below(root / "train/dog", Counter()))
    assert len(found) == 4 + 2 and os.fsdecode(name) in found
    assert [os.path.basename(path) for path in datasets.images_below(root / "train/fox", Counter())] == ["more.png"]
    assert run("main_moco.py", SHORT, "--output-dir", tmp_path / "out", root).status == 0
    with open(name, "wb") as file:
        file.write(b"broken")
    refused(run("main_moco.py", SHORT, "--output-dir", tmp_path / "out2", root), 1, "cannot be read")


def test_a_folder_that_cannot_be_listed(run, folder, tmp_path, monkeypatch):
    root, scan = folder(train=4), os.scandir
    (root / "train/dog/more").mkdir()

    def refuse(path):
        if str(path).endswith(denied):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for denied in ("train/dog/more", "train/dog", "train"):
        done = run("main_moco.py", SHORT, "--output-dir", tmp_path / "out", root)
        refused(done, 1, f"'{root / denied}", "Permission denied")


def test_bad_labels(run, folder, tmp_path):
    refused(run("main_ce.py", TINY, "--labels-per-class 0"), 2, "--labels-per-class 0", "cross entropy")
    refused(run("main_moco_in.py", TINY_MOCO, "--labels-per-class 0 --knn-freq 1"), 2, "--knn-freq 1")
    refused(run("main_moco_in.py", TINY_MOCO, "--labels-per-class -1"), 2, "--labels-per-class")
    refused(run("main_lincls.py", TINY, "--labels-per-class 3"), 2, "--labels-per-class")
    args = [TINY_MOCO, "--epochs 1 --output-dir", tmp_path]
    assert run("main_moco_in.py", *args, "--labels-per-class 3").status == 0
    args += ["--epochs 2 --resume auto --labels-per-class"]
    refused(run("main_moco_in.py", *args, 4), 2, "--labels-per-class 3, this run has 4")
    assert run("main_moco_in.py", *args, 3).status == 0
    older = torch.load(tmp_path / "checkpoint_last.pth.tar")
    del older["options"]["labels_per_class"]
    torch.save(older, tmp_path / "checkpoint_last.pth.tar")
    refused(run("main_moco_in.py", *args, 3), 2, "--labels-per-class None, this run has 3")


@pytest.mark.parametrize(
    "how, status, message",
    [
        ("file link", 2, "train/dog"),
        ("folder link", 2, "train/dog"),
        ("same folder", 2, "train/cat"),
        ("empty", 2, "no image"),
        ("broken link", 1, "cannot be read"),
    ],
)
def test_an_unlabelled_folder_that_is_refused(how, status, message, run, folder, tmp_path):
    data = folder(train=6, val=2)
    unlabelled = data / "unlabelled"
    if how == "same folder":
        unlabelled.symlink_to(data / "train")
    else:
        unlabelled.mkdir()
    if how == "file link":
        (unlabelled / "x.png").symlink_to(data / "train/dog/2.png")
    if how == "folder link":
        (unlabelled / "x").symlink_to(data / "train/dog")
    if how == "broken link":
        (unlabelled / "x.png").symlink_to("nowhere.png")
    done = run("main_moco_in.py", SHORT, "--output-dir", tmp_path / "out", data)
    refused(done, status, "x.png" if how == "broken link" else "unlabelled", message)
    assert not list(tmp_path.rglob("*.pth.tar*"))


def test_padded_crops_need_images_of_the_views_size(run, folder):
    data = folder(size=(40, 40), train=8, val=2)
    args = "-a resnet20 -b 8 --moco-k 16 --image-size 32 --aug-crop"
    refused(run("main_moco_in.py", args, data), 2, "--aug-crop")


def test_a_schedule_that_has_no_effect_is_refused(run, tmp_path):
    args = [TINY, "--epochs 2 --schedule 1 --output-dir", tmp_path]
    refused(run("main_ce.py", *args), 2, "--schedule", "--no-cos")  # --cos is the default of main_ce.py
    refused(run("main_moco.py", *args, "--cos"), 2, "--schedule", "--no-cos")
    assert run("main_ce.py", *args, "--no-cos").status == 0
