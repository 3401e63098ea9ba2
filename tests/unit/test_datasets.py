"""The images and labels of a data set, and whether its images are in memory."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import add_unlabelled
from moco import datasets


def test_which_data_sets_a_folder_can_have(tmp_path):
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / ".hidden").touch()
    (tmp_path / "@eaDir").mkdir()
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / "cifar-100-python").mkdir()
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]  # CIFAR-10 can be downloaded to it
    assert datasets.resolve("auto", tmp_path) == "cifar10"
    assert datasets.resolve("auto", tmp_path, "cifar100") == "cifar100"
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / "train").mkdir()
    assert datasets.candidates(tmp_path) == ["imagefolder"]


def test_labels_per_class_keeps_the_first_labels_of_each_class():
    whole = datasets.load("digits", None, True, per_class=16)
    split = datasets.load("digits", None, True, per_class=16, labels_per_class=3)
    assert torch.equal(split.images, whole.images) and len(split) == 160
    seen = [0] * 10
    for label, true in zip(split.labels.tolist(), whole.labels.tolist(), strict=True):
        assert label == (true if seen[true] < 3 else -1)
        seen[true] += 1
    # main_lincls.py --per-class 3 trains on the same images.
    linear = datasets.load("digits", None, True, per_class=3)
    assert torch.equal(split.labelled().images, linear.images) and torch.equal(split.labelled().labels, linear.labels)
    assert torch.equal(datasets.load("digits", None, True, per_class=16, labels_per_class=99).labels, whole.labels)
    assert set(datasets.load("digits", None, True, labels_per_class=0).labels.tolist()) == {-1}


@pytest.mark.parametrize(
    "size", [(12, 12), (13, 20)]
)  # images of one size are kept in memory, of several sizes in their files
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


def test_only_the_images_of_the_subset_are_decoded(folder, monkeypatch):
    data, opened = folder(train=8, val=5), []
    monkeypatch.setattr(
        datasets, "open_image", lambda *args, f=datasets.open_image, **options: opened.append(1) or f(*args, **options)
    )
    split = datasets.load("imagefolder", data, True, per_class=2)
    assert split.images.shape == (4, 3, 12, 12) and len(opened) <= 5


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, monkeypatch, tmp_path):
    """Training or test images, channels first, with their labels; held-out images are training images."""
    data = np.arange(72, dtype=np.uint8).reshape(4, 2, 3, 3)  # images, height, width, channels
    read = []

    def theirs(kind):
        def dataset(folder, train, download=False):
            read.append((kind, train))
            targets = [0, 1, 0, 1] if train else [1, 1, 0, 0]
            return SimpleNamespace(data=data if train else data + 100, targets=targets, classes=[kind, "fox"])

        return dataset

    for kind in ("cifar10", "cifar100"):
        monkeypatch.setattr(datasets.datasets, kind.upper(), theirs(kind))
    channels_first = torch.from_numpy(data).permute(0, 3, 1, 2)
    train, validation = (datasets.load(name, tmp_path, part) for part in (True, False))
    assert read == [(name, True), (name, False)]  # once each
    assert train.classes == [name, "fox"] and train.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(train.images, channels_first)
    assert validation.labels.tolist() == [1, 1, 0, 0] and torch.equal(validation.images, channels_first + 100)
    held = datasets.load(name, tmp_path, False, holdout=1)
    assert held.labels.tolist() == [0, 1] and torch.equal(held.images, channels_first[2:])


def test_the_statistics_of_the_data_sets():
    assert datasets.STATISTICS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert datasets.STATISTICS["cifar100"] == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert datasets.IMAGENET == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_which_images_validate(folder):
    """val/ if there are val/ and test/; the digits of other writers; --per-class counts after --holdout."""
    both = folder(train=6, val=3, test=2)
    assert len(datasets.load("imagefolder", both, False)) == 6
    train, validation = (datasets.load("imagefolder", both, part, holdout=2, per_class=3) for part in (True, False))
    names = [[path[-9:-4] for path in split.paths] for split in (train, validation)]
    assert names == [[f"{c}/{n}" for c in ("cat", "dog") for n in numbers] for numbers in ((0, 1, 2), (4, 5))]
    classes = datasets.load("imagefolder", both, False, holdout=2, classes=["ant", "cat", "dog"]).classes
    assert classes == ["cat", "dog"]  # train/ has the classes, whatever a checkpoint was trained on
    digits = [datasets.load("digits", None, part).images.flatten(1) for part in (True, False)]
    assert [len(images) for images in digits] == [1437, 360]
    assert (digits[0][:, None] == digits[1]).all(2).sum() == 0
