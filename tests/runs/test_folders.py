"""Runs on image folders with images of several sizes."""

from collections import Counter

import pytest

from helpers import PHOTOS, PHOTOS_MOCO, losses, rows
from moco import batches, checkpoint, datasets
from processes import run_processes


@pytest.mark.parametrize(
    "script, args", [("main_moco_in.py", f"{PHOTOS_MOCO} --bn-splits 2"), ("main_supcon.py", PHOTOS)]
)
def test_each_file_is_opened_once_an_epoch(script, args, run, photos, tmp_path, monkeypatch):
    opened, pillow = Counter(), datasets.Split.pillow

    def counted(self, index):
        opened[self.paths[index]] += 1
        return pillow(self, index)

    monkeypatch.setattr(datasets.Split, "pillow", counted)
    assert run(script, args, "-j 0 --output-dir", tmp_path, photos()).status == 0
    assert len(opened) == 16 and set(opened.values()) == {2}  # two epochs


def test_losses_depend_on_neither_processes_nor_workers(run, photos, tmp_path):
    data = photos(train=16)
    for workers in (0, 1, 2):
        out = tmp_path / f"workers{workers}"
        assert run("main_moco_in.py", PHOTOS_MOCO, f"--bn-splits 2 -j {workers} --output-dir", out, data).status == 0
    assert losses(tmp_path / "workers0") == losses(tmp_path / "workers1") == losses(tmp_path / "workers2")
    done = run_processes("main_moco_in.py", PHOTOS_MOCO, "-j 2 --knn-freq 1 --output-dir", tmp_path / "two", data)
    assert done.returncode == 0, done.out
    one, two = ([float(loss) for loss in losses(tmp_path / name)] for name in ("workers0", "two"))
    assert two == pytest.approx(one, rel=2e-4)
    assert all(0 <= float(row["knn"]) <= 100 for row in rows(tmp_path / "two/log.csv"))


def test_the_validation_images_are_read_once(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    passes, once = [], batches.Centres.__iter__
    monkeypatch.setattr(batches.Centres, "__iter__", lambda images: passes.append(images) or once(images))
    args = ["-b 8 --lr 1 -j 0 --seed 0 --output-dir", tmp_path, data]
    done = run("main_lincls.py", "--epochs 3 --pretrained", tmp_path / "checkpoint_last.pth.tar", *args)
    assert done.status == 0 and len(passes) == 1, done.err
    again = run("main_lincls.py", "-e --resume", tmp_path / "model_best.pth.tar", *args)
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1] and len(passes) == 2


def test_linear_evaluation_of_large_images(run, photos, tmp_path):
    data = photos()
    args = PHOTOS_MOCO.replace("--image-size 16", "--image-size 72 --stem imagenet")
    assert run("main_moco.py", args, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    args = ["--pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir", tmp_path, data]
    done = run("main_lincls.py", "-b 8 --epochs 1 --lr 1 -j 2", *args)
    assert done.status == 0, done.err
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")["options"]
    assert saved["image_size"] == 72 and tuple(saved["mean"]) == datasets.IMAGENET[0]
