"""Labels for some of the images: --labels-per-class, and an image folder's unlabelled/."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TINY, TINY_MOCO
from moco import augment, baselines, checkpoint, datasets, encoders, evaluate
from test_bad_input import refused

LABEL_AWARE = ["main_moco_in.py", "main_moco_out.py", "main_moco_suploss.py"]
SCRIPTS = [(script, TINY_MOCO) for script in ["main_moco.py", *LABEL_AWARE]]
SCRIPTS += [("main_supcon.py", TINY), ("main_ce.py", TINY)]
SMALL = "-a resnet20 --image-size 8 -b 4 --epochs 1 --seed 0"


def weights(folder):
    return checkpoint.load(folder / "checkpoint_last.pth.tar")["state_dict"]


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def add_unlabelled(data, count=5, size=(12, 12)):
    """Puts images of every class into unlabelled/, of other names and pixels, some of them in a folder below it."""
    (data / "unlabelled/more").mkdir(parents=True)
    for n in range(count):
        image = datasets.Image.new("RGB", size, (40 * n, 90, 10))
        image.save(data / "unlabelled" / ("more" if n % 2 else "") / f"u{n}.png")
    return data


def test_the_first_of_each_class_keep_their_label():
    whole = datasets.load("digits", None, True, per_class=16)
    split = datasets.load("digits", None, True, per_class=16, labels_per_class=3)
    assert torch.equal(split.images, whole.images) and len(split) == 160
    seen = [0] * 10
    for label, true in zip(split.labels.tolist(), whole.labels.tolist(), strict=True):
        assert label == (true if seen[true] < 3 else -1)
        seen[true] += 1
    # what main_lincls.py --per-class 3 trains on
    linear = datasets.load("digits", None, True, per_class=3)
    assert torch.equal(split.labelled().images, linear.images) and torch.equal(split.labelled().labels, linear.labels)
    assert torch.equal(datasets.load("digits", None, True, per_class=16, labels_per_class=99).labels, whole.labels)
    assert set(datasets.load("digits", None, True, labels_per_class=0).labels.tolist()) == {-1}


@pytest.mark.parametrize("size", [(12, 12), (13, 20)])  # of one size: in memory; of several: in their files
def test_unlabelled_images_of_a_folder(folder, size):
    data = add_unlabelled(folder(train=6, val=2), size=size)

    def load(train=True, **options):
        split = datasets.load("imagefolder", data, train, **options)
        assert (split.images is not None) == (size == (12, 12) or not options.get("unlabelled"))
        return split.labels.tolist(), {name for name in map(os.path.basename, split.paths) if name[0] == "u"}

    theirs = {f"u{n}.png" for n in range(5)}
    assert load(unlabelled=True) == ([0] * 6 + [1] * 6 + [-1] * 5, theirs)
    assert load(unlabelled=True, per_class=2) == ([0, 0, 1, 1] + [-1] * 5, theirs)
    assert load(unlabelled=True, holdout=4) == ([0, 0, 1, 1] + [-1] * 5, theirs)
    assert load(unlabelled=True, holdout=2, labels_per_class=1) == ([0, -1, -1, -1, 1, -1, -1, -1] + [-1] * 5, theirs)
    assert load() == ([0] * 6 + [1] * 6, set())
    assert load(False) == ([0, 0, 1, 1], set())
    assert load(False, holdout=1) == ([0, 1], set())


@pytest.mark.parametrize("script, words", SCRIPTS)
def test_every_method_trains_where_some_labels_are_missing(script, words, run, folder, tmp_path):
    done = run(script, words, "--epochs 1 --knn-freq 1 --labels-per-class 3 --output-dir", tmp_path / "digits")
    assert done.status == 0 and "160 images of 10 classes, 30 of them labelled, 5 steps" in done.out, done.err
    assert ("note: cross entropy trains on the labelled images only" in done.out) == (script == "main_ce.py")
    assert 0 < float(log(tmp_path / "digits")[0]["knn"]) <= 100

    data = add_unlabelled(folder(train=6, val=2))
    queue = "--moco-k 16" if "moco" in script else ""
    done = run(script, SMALL, queue, "--knn-freq 1 --output-dir", tmp_path, data)
    assert done.status == 0 and "17 images of 2 classes, 12 of them labelled, 4 steps" in done.out, done.err
    words = ["-b 4 --epochs 1 --pretrained", tmp_path / "checkpoint_last.pth.tar"]
    done = run("main_lincls.py", *words, "--seed 0 --output-dir", tmp_path, data)
    assert done.status == 0 and "12 images, 3 steps per epoch" in done.out, done.err


@pytest.mark.parametrize("script, words", [(script, TINY_MOCO) for script in LABEL_AWARE] + [("main_supcon.py", TINY)])
def test_without_labels_there_is_one_positive_a_query(script, words, run, tmp_path):
    done = run(script, words, "--epochs 2 --labels-per-class 0 --output-dir", tmp_path)
    assert done.status == 0 and "160 images of 10 classes, 0 of them labelled" in done.out, done.err
    assert [float(row["positives"]) for row in log(tmp_path)] == [1, 1]


@pytest.mark.parametrize("script, words", SCRIPTS)
def test_with_all_labels_the_weights_are_equal_bit_for_bit(script, words, run, tmp_path):
    for name, option in (("without", ""), ("all", "--labels-per-class 16"), ("some", "--labels-per-class 2")):
        assert run(script, words, "--epochs 1 --output-dir", tmp_path / name, option).status == 0
    without = weights(tmp_path / "without")
    assert equal(without, weights(tmp_path / "all"))
    assert equal(without, weights(tmp_path / "some")) == (script == "main_moco.py")


def test_cross_entropy_sees_no_unlabelled_image(run, folder, tmp_path):
    one, other = folder("one", train=6, val=2), folder("other", train=6, val=2)
    for n in range(3, 6):
        for place in other.glob(f"train/*/{n}.png"):
            datasets.Image.new("RGB", (12, 12), (40 * n, 0, 0)).save(place)
    for option, same in (("", False), ("--labels-per-class 3", True)):
        for data in (one, other):
            assert run("main_ce.py", SMALL, option, "--output-dir", tmp_path / data.name / "run", data).status == 0
        assert equal(*(weights(tmp_path / data.name / "run") for data in (one, other))) == same


@pytest.mark.parametrize("splits", [1, 2])
def test_an_unlabelled_anchor_of_supcontrast_has_its_other_view(splits, monkeypatch):
    torch.manual_seed(0)
    model = baselines.SupContrast(encoders.build("resnet20"), 8, bn_splits=splits)
    labels = torch.tensor([3, -1, 3, -1, -1, 2, -1, 0])
    seen = []
    loss = baselines.out_loss
    monkeypatch.setattr(baselines, "out_loss", lambda *masks: seen.append(masks) or loss(*masks))
    model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8), labels)
    _, positives, contrast = seen[0]
    # which image a row shows: the first views of a chunk, then its second ones
    images = torch.arange(8).view(splits, 1, -1).expand(-1, 2, -1).flatten().tolist()
    for row, image in enumerate(images):
        same = {image} if labels[image] < 0 else set((labels == labels[image]).nonzero().flatten().tolist())
        expected = [j for j, other in enumerate(images) if other in same and j != row]
        assert (positives & contrast)[row].nonzero().flatten().tolist() == expected
        assert len(expected) == (3 if labels[image] == 3 else 1)


def test_two_processes_and_two_chunks_are_the_same(run, tmp_path):
    """Each process counts its own images from 0: the other view must not be looked for on another process."""
    script, words = (
        "main_supcon.py",
        [*TINY.split(), "--epochs", "2", "--lr", "0.02", "--labels-per-class", "4", "--output-dir"],
    )
    assert run(script, *words, tmp_path / "one", "--bn-splits 2").status == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(ROOT / script), *words, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for column in ("loss", "positives"):
        one_s, two_s = ([float(row[column]) for row in rows] for rows in (one, two))
        assert one_s == pytest.approx(two_s, rel=1e-4), column


def test_the_bank_of_knn_is_the_labelled_images():
    torch.manual_seed(0)
    encoder = encoders.build("resnet20")(num_classes=8)
    centre = augment.Centre(8, *datasets.STATISTICS["digits"])
    validation = datasets.load("digits", None, False)
    few = datasets.load("digits", None, True, per_class=4)
    partly = datasets.load("digits", None, True, labels_per_class=4)
    accuracy = evaluate.knn(encoder, few, validation, centre)
    assert evaluate.knn(encoder, partly, validation, centre) == accuracy
    assert evaluate.knn(encoder, datasets.load("digits", None, True), validation, centre) != accuracy


def test_bad_input(run, folder, tmp_path):
    refused(run("main_ce.py", TINY, "--labels-per-class 0"), 2, "--labels-per-class 0", "cross entropy")
    refused(run("main_moco_in.py", TINY_MOCO, "--labels-per-class 0 --knn-freq 1"), 2, "--knn-freq 1")
    refused(run("main_moco_in.py", TINY_MOCO, "--labels-per-class -1"), 2, "--labels-per-class")
    refused(run("main_lincls.py", TINY, "--labels-per-class 3"), 2, "--labels-per-class")
    words = [TINY_MOCO, "--epochs 1 --output-dir", tmp_path]
    assert run("main_moco_in.py", *words, "--labels-per-class 3").status == 0
    words += ["--epochs 2 --resume auto --labels-per-class"]
    refused(run("main_moco_in.py", *words, 4), 2, "--labels-per-class 3, this run has 4")
    assert run("main_moco_in.py", *words, 3).status == 0
    older = torch.load(tmp_path / "checkpoint_last.pth.tar")
    del older["options"]["labels_per_class"]
    torch.save(older, tmp_path / "checkpoint_last.pth.tar")
    refused(run("main_moco_in.py", *words, 3), 2, "--labels-per-class None, this run has 3")


@pytest.mark.parametrize("how", ["file link", "folder link", "the folder itself", "empty", "broken link"])
def test_an_unlabelled_folder_that_is_refused(how, run, folder, tmp_path):
    data = folder(train=6, val=2)
    image, unlabelled = data / "train/dog/2.png", data / "unlabelled"
    if how == "the folder itself":
        unlabelled.symlink_to(data / "train")
    else:
        unlabelled.mkdir()
    if how == "file link":
        (unlabelled / "x.png").symlink_to(image)
    if how == "folder link":
        (unlabelled / "x").symlink_to(data / "train/dog")
    if how == "broken link":
        (unlabelled / "x.png").symlink_to("nowhere.png")
    done = run("main_moco_in.py", SMALL, "--moco-k 16 --output-dir", tmp_path / "out", data)
    if how == "broken link":
        refused(done, 1, "x.png", "cannot be read")
    else:
        refused(done, 2, "unlabelled", "no image" if how == "empty" else "train/dog" if "link" in how else "train/cat")
    assert not list(tmp_path.rglob("*.pth.tar*"))
