import os
import runpy
import shutil
import sys
from types import SimpleNamespace

# Only test_gpu uses a GPU: other tests compare bit by bit, and start more processes than there are GPUs.
if not any("test_gpu" in arg for arg in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Set before torch is imported: threads do not speed up such small networks, and the processes of a test share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

pytest.register_assert_rewrite("helpers")
from helpers import SIZES, TINY_FOLDER, photo  # noqa: E402
from processes import ROOT, kill_all, split  # noqa: E402

# Tests also run scripts in processes of their own, and the programs in subprocesses/ import the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    kill_all()


@pytest.fixture
def run(monkeypatch, capfd, tmp_path_factory):
    """run("main_moco.py", "--epochs 2 ...") runs a script in this process and returns its status, out and err.

    It runs in an empty folder, which a run without --output-dir locks.
    """
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *split(args)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


def make_folder(root, size=(12, 12), classes=("cat", "dog"), **counts):
    """An image folder at root; train=6 makes six images per class in train/."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        for i, label in enumerate(classes):
            (root / name / label).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 128, (size[1], size[0], 3)) + 127 * i
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / label / f"{n}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    """folder(train=6, val=2) makes an image folder of two classes, with six training images of each."""
    return lambda name="data", **options: make_folder(tmp_path / name, **options)


@pytest.fixture
def photos(tmp_path):
    """photos(train=8, val=4) makes an image folder of two classes of JPEGs of several sizes."""

    def make(train=8, val=4):
        rng, root = np.random.default_rng(0), tmp_path / "photos"
        for name, count in (("train", train), ("val", val)):
            for label in ("cat", "dog"):
                (root / name / label).mkdir(parents=True)
                for n in range(count):
                    photo(rng, SIZES[n % len(SIZES)]).save(root / name / label / f"{n}.jpg", quality=90)
        return root

    return make


@pytest.fixture
def trained(run, tmp_path, tmp_path_factory):
    """Paths of the data, a pretraining checkpoint and a classifier: trained once, and copied for each test."""
    once = tmp_path_factory.getbasetemp() / "trained"
    if not (once / "model_best.pth.tar").exists():
        data, last = make_folder(once / "data", train=8, val=5), once / "checkpoint_last.pth.tar"
        assert run("main_moco_in.py", TINY_FOLDER, "--moco-k 32 --mlp --output-dir", once, data).status == 0
        done = run("main_lincls.py", "-b 8 --epochs 2 --pretrained", last, "--output-dir", once, data)
        assert "worst classes: " in done.out.splitlines()[-2] and "cat" in done.out.splitlines()[-2]
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", tmp_path / "checkpoint_last.pth.tar", tmp_path / "model_best.pth.tar"
