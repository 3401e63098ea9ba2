import os
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

if not any("test_gpu" in word for word in sys.argv):  # the others compare bits, and start more processes than GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before torch: networks this small gain nothing from threads, and the tests start processes that share cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests")]
)  # the scripts are run in processes of their own, too

# A run of seconds: 160 of scikit-learn's digits as 8x8 images, resnet20, five steps an epoch.
TINY = "-a resnet20 --dataset digits --image-size 8 --per-class 16 -b 32 --seed 0 -p 1"
TINY_MOCO = f"{TINY} --moco-k 80 --moco-dim 16 --warm-up 1 --mlp --aug-plus --cos"


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
