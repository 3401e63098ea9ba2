import os
import runpy
import shlex
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


@pytest.fixture
def folder(tmp_path):
    """folder(train=6, val=2) makes an image folder of two classes with that many images of each."""

    def make(name="data", size=(12, 12), classes=("cat", "dog"), **splits):
        rng = np.random.default_rng(0)
        for split, count in splits.items():
            for i, label in enumerate(classes):
                place = tmp_path / name / split / label
                place.mkdir(parents=True)
                for n in range(count):
                    pixels = rng.integers(0, 128, (size[1], size[0], 3)) + 127 * i
                    Image.fromarray(pixels.astype(np.uint8)).save(place / f"{n}.png")
        return tmp_path / name

    return make


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
def trained(run, folder, tmp_path):
    """The data, a pretraining checkpoint and a classifier's."""
    data = folder(train=8, val=5)
    assert run("main_moco_in.py", TINY_FOLDER, "--moco-k 32 --mlp --output-dir", tmp_path, data).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    done = run("main_lincls.py", "-b 8 --epochs 2 --pretrained", last, "--output-dir", tmp_path, data)
    assert "worst classes: " in done.out.splitlines()[-2] and "cat" in done.out.splitlines()[-2]
    return data, last, tmp_path / "model_best.pth.tar"
