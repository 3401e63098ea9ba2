"""Runs with labels for some of the images: --labels-per-class, and an image folder's unlabelled/."""

import pytest

from helpers import EVERY_SCRIPT, TINY_MOCO, add_unlabelled, equal_tensors, rows
from moco import checkpoint, datasets

LABEL_AWARE = [(script, args) for script, args in EVERY_SCRIPT if script not in ("main_moco.py", "main_ce.py")]
SMALL = "-a resnet20 --image-size 8 -b 4 --epochs 1 --seed 0"


def weights(folder):
    return checkpoint.load(folder / "checkpoint_last.pth.tar")["state_dict"]


@pytest.mark.parametrize("script, args", EVERY_SCRIPT)
def test_every_method_trains_with_some_labels_missing(script, args, run, folder, tmp_path):
    done = run(script, args, "--epochs 1 --knn-freq 1 --labels-per-class 3 --output-dir", tmp_path / "digits")
    assert done.status == 0 and "160 images of 10 classes, 30 of them labelled, 5 steps" in done.out, done.err
    assert ("note: cross entropy trains on the labelled images only" in done.out) == (script == "main_ce.py")
    assert 0 < float(rows(tmp_path / "digits/log.csv")[0]["knn"]) <= 100

    data = add_unlabelled(folder(train=6, val=2))
    queue = "--moco-k 16" if "moco" in script else ""
    done = run(script, SMALL, queue, "--knn-freq 1 --output-dir", tmp_path, data)
    assert done.status == 0 and "17 images of 2 classes, 12 of them labelled, 4 steps" in done.out, done.err


def test_the_linear_evaluation_leaves_out_unlabelled_images(run, trained, tmp_path):
    data, last, _ = trained
    add_unlabelled(data)
    done = run("main_lincls.py", "-b 4 --epochs 1 --seed 0 --pretrained", last, "--output-dir", tmp_path / "out", data)
    assert done.status == 0 and "16 images, 4 steps per epoch" in done.out, done.err


@pytest.mark.parametrize("script, args", LABEL_AWARE)
def test_without_labels_each_query_has_one_positive(script, args, run, tmp_path):
    done = run(script, args, "--epochs 2 --labels-per-class 0 --output-dir", tmp_path)
    assert done.status == 0 and "160 images of 10 classes, 0 of them labelled" in done.out, done.err
    assert [float(row["positives"]) for row in rows(tmp_path / "log.csv")] == [1, 1]


@pytest.mark.parametrize("script", ["main_moco.py", "main_moco_in.py"])
def test_labels_per_class_changes_nothing_if_it_keeps_all_labels(script, run, tmp_path):
    for name, option in (("default", ""), ("all", "--labels-per-class 16"), ("some", "--labels-per-class 2")):
        assert run(script, TINY_MOCO, "--epochs 1 --output-dir", tmp_path / name, option).status == 0
    default = weights(tmp_path / "default")
    assert equal_tensors(default, weights(tmp_path / "all"))
    assert equal_tensors(default, weights(tmp_path / "some")) == (script == "main_moco.py")


def test_cross_entropy_ignores_unlabelled_images(run, folder, tmp_path):
    """Two folders differ only in images that have no label in the second run."""
    one, other = folder("one", train=6, val=2), folder("other", train=6, val=2)
    for n in range(3, 6):
        for path in other.glob(f"train/*/{n}.png"):
            datasets.Image.new("RGB", (12, 12), (40 * n, 0, 0)).save(path)
    for option, same in (("", False), ("--labels-per-class 3", True)):
        for data in (one, other):
            assert run("main_ce.py", SMALL, option, "--output-dir", tmp_path / data.name / "run", data).status == 0
        assert equal_tensors(*(weights(tmp_path / data.name / "run") for data in (one, other))) == same
