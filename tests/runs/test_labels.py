"""Runs with labels for some of the images: --labels-per-class, and an image folder's unlabelled/."""

import pytest
import torch

from helpers import TINY, TINY_MOCO, add_unlabelled, rows
from moco import checkpoint, datasets

LABEL_AWARE = ["main_moco_in.py", "main_moco_out.py", "main_moco_suploss.py"]
EVERY_SCRIPT = [(script, TINY_MOCO) for script in ["main_moco.py", *LABEL_AWARE]]
EVERY_SCRIPT += [("main_supcon.py", TINY), ("main_ce.py", TINY)]
SMALL = "-a resnet20 --image-size 8 -b 4 --epochs 1 --seed 0"


def weights(folder):
    return checkpoint.load(folder / "checkpoint_last.pth.tar")["state_dict"]


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("script, words", EVERY_SCRIPT)
def test_every_method_trains_where_some_labels_are_missing(script, words, run, folder, tmp_path):
    done = run(script, words, "--epochs 1 --knn-freq 1 --labels-per-class 3 --output-dir", tmp_path / "digits")
    assert done.status == 0 and "160 images of 10 classes, 30 of them labelled, 5 steps" in done.out, done.err
    assert ("note: cross entropy trains on the labelled images only" in done.out) == (script == "main_ce.py")
    assert 0 < float(rows(tmp_path / "digits/log.csv")[0]["knn"]) <= 100

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
    assert [float(row["positives"]) for row in rows(tmp_path / "log.csv")] == [1, 1]


@pytest.mark.parametrize("script, words", EVERY_SCRIPT)
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
