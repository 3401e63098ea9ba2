import os
import runpy
import shlex
import shutil
import sys
from types import SimpleNamespace

if not any("test_gpu" in word for word in sys.argv):  # the others compare bits, and start more processes than GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before torch: networks this small gain nothing from threads, and the tests start processes that share cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

pytest.register_assert_rewrite("helpers")
from helpers import ROOT, SIZES, TINY_FOLDER, photo  # noqa: E402

# The scripts are run in processes of their own, too; the programs in subprocesses/ import the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.fixture
def run(monkeypatch, capfd):
    """run("main_moco.py", "--epochs 2 ...") runs a script in this process: status, out, err."""

    def call(script, *words):
        words = [piece for word in words for piece in (shlex.split(word) if isinstance(word, str) else [str(word)])]
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


def make_folder(root, size=(12, 12), classes=("cat", "dog"), **splits):
    """An image folder at root, with that many images of each class in each split."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i, label in enumerate(classes):
            place = root / split / label
            place.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 128, (size[1], size[0], 3)) + 127 * i
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{n}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    """folder(train=6, val=2) makes an image folder of two classes with that many images of each."""
    return lambda name="data", **what: make_folder(tmp_path / name, **what)


@pytest.fixture
def photos(tmp_path):
    """An image folder of two classes of JPEGs of several sizes."""

    def make(train=8, val=4):
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for label in ("cat", "dog"):
                place = tmp_path / "photos" / split / label
                place.mkdir(parents=True)
                for n in range(count):
                    photo(rng, SIZES[n % len(SIZES)]).save(place / f"{n}.jpg", quality=90)
        return tmp_path / "photos"

    return make


@pytest.fixture
def trained(run, tmp_path, tmp_path_factory):
    """The data, a pretraining checkpoint and a classifier's: made once, and copied for each test."""
    once = tmp_path_factory.getbasetemp() / "trained"
    if not (once / "model_best.pth.tar").exists():
        data, last = make_folder(once / "data", train=8, val=5), once / "checkpoint_last.pth.tar"
        assert run("main_moco_in.py", TINY_FOLDER, "--moco-k 32 --mlp --output-dir", once, data).status == 0
        done = run("main_lincls.py", "-b 8 --epochs 2 --pretrained", last, "--output-dir", once, data)
        assert "worst classes: " in done.out.splitlines()[-2] and "cat" in done.out.splitlines()[-2]
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", tmp_path / "checkpoint_last.pth.tar", tmp_path / "model_best.pth.tar"
