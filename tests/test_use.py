"""From a checkpoint to features and other formats; one output folder, two runs; what a disk refuses."""

import argparse
import datetime
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as tv

import extract
import main_lincls
import moco
from conftest import ROOT, TINY, TINY_MOCO
from moco import augment, batches, checkpoint, datasets, encoders, evaluate, inference
from test_bad_input import refused
from test_faults import start, until

WORDS = "-a resnet20 --image-size 12 -b 8 --epochs 1 --seed 0"


@pytest.fixture
def trained(run, folder, tmp_path):
    """The data, a pretraining checkpoint and a classifier's."""
    data = folder(train=8, val=5)
    assert run("main_moco_in.py", WORDS, "--moco-k 32 --mlp --output-dir", tmp_path, data).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    done = run("main_lincls.py", "-b 8 --epochs 2 --pretrained", last, "--output-dir", tmp_path, data)
    assert "worst classes: " in done.out.splitlines()[-2] and "cat" in done.out.splitlines()[-2]
    return data, last, tmp_path / "model_best.pth.tar"


def test_features_are_those_of_the_linear_evaluation(trained):
    data, last, best = trained
    split = datasets.load("imagefolder", data, False)
    for path in (last, best):
        encoder, preprocess = moco.load_encoder(path)
        assert not encoder.training
        saved = checkpoint.load(path)
        frozen = encoders.build("resnet20")(num_classes=1)
        checkpoint.load_encoder(frozen, checkpoint.encoder_weights(saved, path), path)
        options = saved["options"]
        centre = augment.Centre(12, options["mean"], options["std"])
        ((images, _),) = batches.Centres(split, centre, 64, torch.device("cpu"))
        wanted = evaluate.frozen(frozen)(images)
        with torch.no_grad():
            mine = torch.stack([preprocess(Image.open(file)) for file in split.paths])
            features = encoder(mine)
        std = torch.tensor(options["std"]).view(3, 1, 1)
        assert ((mine - images).abs() * std).max() <= 1 / 255 + 1e-6
        assert features.shape == (10, 64) and features.dtype == torch.float32
        assert (encoder(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_preprocess_takes_any_image(trained):
    _, preprocess = moco.load_encoder(trained[1])
    for mode, size in (("L", (40, 20)), ("RGBA", (20, 50)), ("P", (12, 12)), ("CMYK", (9, 9))):
        assert preprocess(Image.new(mode, size)).shape == (3, 12, 12)
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    small = tv.center_crop(tv.resize(image, 14), [12, 12])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in datasets.CIFAR10)
    assert ((preprocess(image) * std + mean) - tv.to_tensor(small)).abs().max() < 2 / 255


def test_the_page_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40)).save("photo.png")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    for page in ("docs/use.md", "README.md"):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
        (block,) = [block for block in blocks if "load_encoder" in block]
        there = {}
        exec(block, there)
        assert there["features"].shape == (1, 64)


def test_mocos_own_checkpoint(tmp_path):
    network = models.resnet18(num_classes=128)
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "theirs.pth.tar")
    encoder, preprocess = moco.load_encoder(tmp_path / "theirs.pth.tar")
    network.fc = torch.nn.Identity()
    images = preprocess(Image.new("RGB", (300, 260), "red"))[None]
    assert images.shape == (1, 3, 224, 224) and torch.equal(encoder(images), network.eval()(images))


def test_extract(run, trained, folder, tmp_path):
    data, last, _ = trained
    out = tmp_path / "features.npz"
    done = run("scripts/extract.py", last, data, "--out", out, "--neighbours 3 --picture", tmp_path / "sheet.png")
    assert done.status == 0, done.err
    found = np.load(out)
    encoder, preprocess = moco.load_encoder(last)
    with torch.no_grad():
        wanted = encoder(torch.stack([preprocess(Image.open(data / path)) for path in found["paths"]]))
    assert np.allclose(found["features"], wanted, rtol=1e-4, atol=1e-5) and found["features"].dtype == np.float32
    assert found["labels"].tolist() == [0] * 5 + [1] * 5 and found["paths"][0] == "val/cat/0.png"
    assert Image.open(tmp_path / "sheet.png").size == (4 * 66 + 8, 10 * 66)
    done = run("scripts/extract.py", last, data / "train", "--out", out, "--force")  # any folder of images
    found = np.load(out)
    assert len(found["features"]) == 16 and set(found["labels"]) == {-1} and "dog/7.png" in found["paths"]
    assert run("scripts/extract.py", last, "--dataset digits --split val --out", out, "--force").status == 0
    assert len(np.load(out)["labels"]) == datasets.VALIDATION_DIGITS

    refused(run("scripts/extract.py", last, data, "--out", out), 2, "exists")
    words = ("--split train --out", out, "--force")
    refused(run("scripts/extract.py", last, data / "train", *words), 2, "--split train", "has no train/")
    (tmp_path / "empty").mkdir()
    refused(run("scripts/extract.py", last, tmp_path / "empty", "--out", out, "--force"), 2, "no image")
    refused(run("scripts/extract.py", last, tmp_path / "none", "--out", out, "--force"), 2, "does not exist")
    refused(run("scripts/extract.py", last, data, "--out", tmp_path / "no/f.npz"), 2, "there is no folder")
    torch.save({"state_dict": {"module.weight": torch.zeros(1)}}, tmp_path / "other.pth.tar")
    refused(run("scripts/extract.py", tmp_path / "other.pth.tar", data, "--out", tmp_path / "f.npz"), 1, "no ResNet")


def test_export(run, trained, tmp_path):
    pytest.importorskip("onnxruntime")
    from safetensors.torch import load_file

    _, last, best = trained
    network, _, classes = inference.load(best)
    assert classes == ["cat", "dog"]
    for suffix in ("pth", "safetensors", "onnx"):
        for source in (last, best):
            done = run("scripts/export.py", source, tmp_path / f"e.{suffix}", "--force")
            assert done.status == 0, done.err
            assert float(done.out.split("batch of 7: ")[1]) < 1e-4  # ONNX: of batch 1 as well
    for state in (torch.load(tmp_path / "e.pth", weights_only=True), load_file(tmp_path / "e.safetensors")):
        network.load_state_dict(state)
    refused(run("scripts/export.py", last, tmp_path / "e.pth"), 2, "exists")
    refused(run("scripts/export.py", last, tmp_path / "e.h5"), 2, "suffix", ".onnx")
    refused(run("scripts/export.py", last, tmp_path / "no/e.pth"), 2, "there is no folder")


def test_export_to_torchvision_and_timm(run, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    words = "-a resnet18 --stem imagenet --dataset digits --image-size 32 --per-class 2 -b 16 --epochs 1 --moco-k 16"
    assert run("main_moco.py", words, "--output-dir", tmp_path).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    assert run("scripts/export.py", last, tmp_path / "e.safetensors").status == 0
    state = load_file(tmp_path / "e.safetensors")
    encoder, _ = moco.load_encoder(last)
    theirs, tvs = timm.create_model("resnet18", num_classes=0), models.resnet18()
    tvs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    for other in (theirs, tvs):
        other.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.allclose(other.eval()(images), encoder(images), rtol=1e-4, atol=1e-5)


def test_the_worst_classes_and_the_picture(run, trained, tmp_path):
    counts = torch.tensor([[8, 5, 0], [10, 10, 0]])
    assert main_lincls.worst_classes(counts, ["cat", "dog", "fox"]) == "worst classes: dog 50.0, cat 80.0"
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")
    assert saved["confusion"].sum(1).tolist() == [5, 5]
    done = run("scripts/picture.py", tmp_path)
    assert done.status == 0 and Image.open(tmp_path / "picture.png").width > 1500, done.err


def test_two_runs_in_one_folder(run, folder, tmp_path, monkeypatch):
    """The second one waits, and goes on when the first one has saved and ended; else it is refused."""
    monkeypatch.setattr("moco.run.PATIENCE", 1)
    photos = folder(train=16, size=(120, 100))  # in files: a data-loading worker must not keep the lock
    words = [f"-a resnet20 --image-size 8 -b 4 --moco-k 16 --seed 0 -p 1 -j 1 {photos} --output-dir", tmp_path]
    command = ["main_moco.py", *" ".join(map(str, words)).split()]
    first = start(*command)
    until(first, "epoch 0:")
    refused(run("main_moco.py", *words, "--resume auto"), 1, f"process {first.pid} on ", tmp_path, "--output-dir")
    linear = [TINY, "--epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear).status == 0  # it writes other files
    checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    first.kill()
    first.communicate()
    epoch = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["epoch"]
    assert run("main_moco.py", *words, f"--epochs {epoch + 1} --resume auto").status == 0

    monkeypatch.setattr("moco.run.PATIENCE", 60)
    first = start(*command, "--resume", "auto")
    until(first, "Epoch:")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (first.send_signal(signal.SIGTERM), sleep(seconds)))
    done = run("main_moco.py", *words, "--epochs 1 --resume auto")
    stopped = first.communicate()[0]
    assert first.returncode == 143 and "stopped" in stopped
    assert f"note: process {first.pid} on " in done.out and "nothing left to do" in done.out, done


def test_a_file_system_without_locks(run, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    done = run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    assert done.status == 0 and f"note: '{tmp_path}' cannot be locked (No locks available)" in done.out


def test_a_schedule_that_has_no_effect_is_refused(run, tmp_path):
    words = [TINY, "--epochs 2 --schedule 1 --output-dir", tmp_path]
    refused(run("main_ce.py", *words), 2, "--schedule", "--no-cos")  # --cos is its default
    refused(run("main_moco.py", *words, "--cos"), 2, "--schedule", "--no-cos")
    assert run("main_ce.py", *words, "--no-cos").status == 0


@pytest.mark.parametrize("warm_up, announced", [(1, False), (2, True), (9, True)])
def test_a_warm_up_that_takes_most_epochs(warm_up, announced, run, tmp_path):
    done = run("main_ce.py", TINY, f"--lr 0.8 --warm-up {warm_up} --epochs 3 --output-dir", tmp_path)
    rates = [float(line.split("lr ")[1].split()[0]) for line in done.out.splitlines() if line.startswith("Epoch: [")]
    assert (f"highest lr will be {max(rates):.4g}, --lr is 0.8" in done.out) == announced
    assert announced or "highest lr" not in done.out


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own: of a megabyte, or read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("it takes root to mount a file system")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", place], capture_output=True)  # a map of a removed file may be left


@pytest.mark.parametrize("options, says", [("size=1m", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_that_refuses(options, says, run, trained, folder, small_disk, tmp_path):
    """One line, nothing left behind; a read-only disk is met before the work, a full one by its first page."""
    data, last, _ = trained
    disk = small_disk(options)
    free = shutil.disk_usage(disk).free
    outputs = [("export.py", last, disk / f"e.{suffix}") for suffix in ("pth", "safetensors", "onnx")]
    outputs += [("picture.py", tmp_path, "--out", disk / "p.png")]
    many = "--dataset digits --split train"  # 368 kB of features, twice while they become a file
    outputs += [("extract.py", last, many, "--out", disk / "f.npz")]
    outputs += [("extract.py", last, data, "--out", tmp_path / "f.npz", "--picture", disk / "p.png", "--force")]
    for how in ("read-only",) if options == "ro" else ("full", "nearly full"):
        if options != "ro":
            (disk / "filler").write_bytes(bytes(free if how == "full" else free - 40_000))
        for script, *words in outputs:
            refused(run(f"scripts/{script}", *words), 1, says, disk)
            assert {path.name for path in disk.iterdir()} <= {"filler"}


def test_extract_on_a_disk_that_fills_up(trained, small_disk):
    """In a process of its own: it was ended by SIGBUS."""
    disk = small_disk("size=200k")
    done = start(
        "scripts/extract.py", str(trained[1]), *["--dataset", "digits", "--split", "train", "--out"], f"{disk}/f.npz"
    )
    out = done.communicate()[0]
    assert done.returncode == 1 and "f.npz' cannot be written: No space left on device" in out, out
    assert "Traceback" not in out and not list(disk.iterdir())


def test_a_log_on_a_full_disk(small_disk):
    """TensorBoard's thread meets it, too, and must not print a traceback after our line."""
    disk = small_disk("size=600k")
    program = f"""
import sys
from contextlib import suppress
from moco.errors import RunError
from moco.run import Log
log = Log("{disk}/out", "log", ["epoch", "loss"])
with suppress(OSError), open("{disk}/filler", "wb") as file:
    file.write(bytes(1 << 20))
log.write = lambda rows: None  # log.csv, which is rewritten, finds a page; TensorBoard's file needs more
try:
    for epoch in range(1000):
        log.add(epoch, loss=1.0)
except RunError as error:
    print("error:", error, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr


def test_names_that_stdout_cannot_encode(trained, run, folder, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    data = folder("odd", train=4, val=4, classes=(name, "dog"))
    command = [
        "main_lincls.py",
        *["-b", "4", "--epochs", "1", "--pretrained"],
        str(trained[1]),
        "--output-dir",
        str(tmp_path),
    ]
    linear = start(*command, str(data), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out = linear.communicate()[0]
    assert linear.returncode == 0 and "result: top1=" in out and "worst classes: " in out, out
    words = "-a resnet20 --image-size 12 -b 4 --epochs 1 --moco-k 16 --output-dir"
    assert run("main_moco_in.py", words, tmp_path / "run", data).status == 0
    done = run("scripts/picture.py", tmp_path / "run")
    assert done.status == 0, done.err


def test_a_folder_with_val_alone(run, trained, folder, tmp_path):
    """It is evaluated; its classes are the checkpoint's, even where some have no folder."""
    data, last, best = trained
    whole = run("main_lincls.py", "-e --resume", best, data).out
    shutil.copytree(data / "val", tmp_path / "alone/val")
    alone = tmp_path / "alone"
    assert run("main_lincls.py", "-e --resume", best, alone).out.splitlines()[-1] == whole.splitlines()[-1]
    assert run("scripts/extract.py", last, alone, "--out", tmp_path / "alone.npz").status == 0
    assert np.load(tmp_path / "alone.npz")["labels"].tolist() == [0] * 5 + [1] * 5
    assert run("scripts/picture.py", tmp_path, alone).status == 0
    shutil.rmtree(alone / "val/cat")
    split = datasets.load("imagefolder", alone, False, classes=["cat", "dog"])
    assert split.labels.tolist() == [1] * 5 and split.classes == ["cat", "dog"]
    assert run("main_lincls.py", "-e --resume", best, alone).status == 0
    assert run("scripts/picture.py", tmp_path, alone).status == 0
    os.rename(alone / "val/dog", alone / "val/wolf")
    refused(run("main_lincls.py", "-e --resume", best, alone), 2, "not trained on", "wolf")
    refused(run("main_moco.py", WORDS, "--output-dir", tmp_path / "o", alone), 2, "has no train/ folder")


def test_names_of_outputs(run, trained, tmp_path, monkeypatch):
    data, last, _ = trained
    refused(
        run("scripts/extract.py", last, data, "--out", tmp_path / "f.npz", "--picture", tmp_path / "sheet"), 2, "suffix"
    )
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "p.xyz"), 2, "suffix", ".png")
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "a1"), 2, "suffix")
    assert not (tmp_path / "f.npz").exists()
    saved = torch.load(last, weights_only=True)
    saved["options"]["data"] = "data"
    torch.save(saved, tmp_path / "elsewhere.pth.tar")
    os.replace(tmp_path / "elsewhere.pth.tar", last)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    refused(run("scripts/picture.py", tmp_path), 2, "data folder 'data' does not exist")


def test_only_the_images_of_the_subset_are_decoded(folder, monkeypatch):
    data, opened = folder(train=8, val=5), []
    monkeypatch.setattr(
        datasets, "open_image", lambda *words, f=datasets.open_image, **more: opened.append(1) or f(*words, **more)
    )
    split = datasets.load("imagefolder", data, True, per_class=2)
    assert split.images.shape == (4, 3, 12, 12) and len(opened) <= 5


def test_many_classes_have_no_confusion_matrix():
    classes = 10_000
    labels = torch.arange(classes)
    scores = torch.eye(classes)[labels.roll(0)]
    scores[0] = scores[1]
    batches = [(scores[:600], labels[:600]), (scores[600:], labels[600:])]
    top1, _, counts, confusion = evaluate.accuracy(lambda x: x, batches, classes)
    assert confusion is None and counts.shape == (2, classes)
    assert top1 == pytest.approx(100 * (classes - 1) / classes) and counts[:, :2].tolist() == [[0, 1], [1, 1]]
    few = evaluate.accuracy(lambda x: x, [(torch.eye(3)[[0, 1, 1]], torch.arange(3))], 3)
    assert few[2].tolist() == [[1, 1, 0], [1, 1, 1]] and few[3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_skipped_pictures_are_counted(run, trained, folder, tmp_path):
    data, last, _ = trained
    for name in ("a.gif", "b.GIF", "c.avif", "d.jfif", "readme.txt"):
        (data / "train/cat" / name).touch()
    done = run("main_moco.py", WORDS, "--output-dir", tmp_path / "out", data)
    assert done.status == 0 and f"note: skipped in '{data / 'train'}': 1 .avif, 2 .gif, 1 .jfif" in done.out, done.out
    done = run("scripts/extract.py", last, data / "train/cat", "--out", tmp_path / "cat.npz")
    assert done.status == 0 and "1 .avif, 2 .gif, 1 .jfif" in done.out


def test_photos_of_trains(run, trained, tmp_path):
    """A plain folder may have a subfolder train/."""
    _, last, _ = trained
    for name in ("train/1.png", "car/2.png", "3.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / name)
    words = ["scripts/extract.py", last, tmp_path / "photos", "--out", tmp_path / "photos.npz"]
    done = run(*words)
    assert done.status == 0 and set(np.load(words[-1])["paths"]) == {"train/1.png", "car/2.png", "3.png"}, done.err
    (tmp_path / "photos/train/red").mkdir()
    (tmp_path / "photos/train/1.png").rename(tmp_path / "photos/train/red/1.png")
    refused(run(*words, "--force"), 2, "neither val/ nor test/")
    assert run(*words, "--force --dataset folder").status == 0
    assert set(np.load(words[-1])["paths"]) == {"train/red/1.png", "car/2.png", "3.png"}


def test_deep_images_are_refused_by_preprocess(trained):
    _, preprocess = moco.load_encoder(trained[1])
    for mode in ("I", "F", "I;16"):
        with pytest.raises(ValueError, match="more than 8 bits"):
            preprocess(Image.new(mode, (20, 20)))
    assert "ValueError" in moco.load_encoder.__doc__ and "ValueError" in (ROOT / "docs/use.md").read_text()


def test_the_sdist_has_what_the_tests_need(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    files = [name for name in files.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    build = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "src" / done.stdout.splitlines()[-1]) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files if not name.startswith(".")} <= there


def random_statistics(network):
    """As if it were trained: batch norm that does something."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


def supcontrasts(network):
    """A checkpoint as SupContrast's scripts save it: other names, and their options beside it."""
    state = {n.replace("downsample", "shortcut"): v for n, v in network.state_dict().items() if not n.startswith("fc.")}
    state = {f"encoder.module.{name}": value for name, value in state.items()} | {"head.0.weight": torch.zeros(3, 3)}
    return {
        "opt": argparse.Namespace(model="resnet18", lr_decay_epochs=[700]),
        "model": state,
        "optimizer": {},
        "epoch": 3,
    }


def foreign(tmp_path, kind):
    """A file of someone else's weights, and their network."""
    path = tmp_path / f"theirs.{'safetensors' if kind == 'timm' else 'pth'}"
    if kind == "timm":
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        network = random_statistics(timm.create_model("resnet18", num_classes=7))
        save_file(network.state_dict(), path)
    elif kind == "SupContrast":
        network = random_statistics(encoders.build("resnet18")(num_classes=7))
        torch.save(supcontrasts(network), path)
    else:
        network = random_statistics(models.resnet18(num_classes=7))
        state = network.state_dict()
        if kind == "old torchvision":  # before version 0.2
            state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(state, path)
    network.fc = torch.nn.Identity()
    return path, network


@pytest.mark.parametrize("kind", ["torchvision", "old torchvision", "timm", "SupContrast"])
def test_weights_from_elsewhere(kind, run, tmp_path):
    """The same features in load_encoder, and in a pretraining run before its first step."""
    path, theirs = foreign(tmp_path, kind)
    cifar = kind == "SupContrast"
    images = torch.randn(2, 3, 48, 48)
    encoder, preprocess = moco.load_encoder(path)
    with torch.no_grad():
        wanted = theirs(images)
        assert (encoder(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert preprocess(Image.new("RGB", (300, 260))).shape[1:] == ((32, 32) if cifar else (224, 224))
    _, _, classes = inference.load(path)
    assert classes == (None if cifar else [str(label) for label in range(7)])

    # A learning rate of 0 leaves the weights as they are; batch norm's statistics move.
    words = "--dataset digits --image-size 8 --per-class 2 -b 16 --epochs 1 --moco-k 16 --lr 0 --stem "
    words += "cifar" if cifar else "imagenet"
    done = run("main_moco_in.py", words, "--init", path, "--output-dir", tmp_path / "run")
    assert done.status == 0, done.err
    tensors = len(theirs.state_dict())
    tensors -= 20 * (kind == "old torchvision")
    left = "head.*" if cifar else "fc.bias, fc.weight"
    assert f"--init '{path}': {tensors} tensors taken; not taken: {left}" in done.out, done.out
    assert "MoCoIn: resnet18 on" in done.out  # told from the shapes
    saved = checkpoint.load(tmp_path / "run/checkpoint_last.pth.tar")
    for prefix in ("module.encoder_q.", "module.encoder_k."):
        for name, value in theirs.state_dict().items():
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                assert torch.equal(saved["state_dict"][prefix + name], value), name


def test_init_and_its_limits(run, tmp_path):
    path, _ = foreign(tmp_path, "torchvision")
    words = "--dataset digits --image-size 8 --per-class 2 -b 16 --epochs 1 --output-dir"
    done = run("main_ce.py", words, tmp_path / "ce", "--init", path)
    assert done.status == 0 and "119 tensors taken; not taken: conv1.weight, fc.bias, fc.weight" in done.out, done
    assert "first convolution is 7x7, this network's is 3x3 and starts anew: --stem imagenet would take it" in done.out
    last = tmp_path / "ce/checkpoint_last.pth.tar"
    done = run("main_ce.py", words, tmp_path / "ce", "--init", path, "--epochs 2 --resume auto")
    assert done.status == 0 and f"note: --init is ignored: this run continues from '{last}'" in done.out, done
    assert "tensors taken" not in done.out
    done = run("main_supcon.py", words, tmp_path / "supcon", "--init", last)
    assert done.status == 0 and "120 tensors taken" in done.out, done
    refused(run("main_ce.py", words, tmp_path / "o", "-a resnet50 --init", path), 1, "does not fit", "is missing")
    refused(run("main_ce.py", words, tmp_path / "o", "--init nowhere.pth"), 2, "'nowhere.pth' does not exist")
    refused(run("main_ce.py", words, tmp_path / "o", "--resume", path), 2, "only weights", "--init")
    state = torch.load(path, weights_only=True)
    del state["layer1.0.bn1.weight"]
    torch.save(state, tmp_path / "part.pth")
    refused(run("main_ce.py", words, tmp_path / "o", "--init", tmp_path / "part.pth"), 1, "shapes", "part.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 nonsense")
    refused(run("main_ce.py", words, tmp_path / "o", "--init", tmp_path / "bad.safetensors"), 1, "bad.safetensors")


def test_a_namespace_is_data_and_other_classes_are_not_read(tmp_path):
    saved = {"state_dict": {"module.a": torch.zeros(1)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "a.pth")
    assert checkpoint.load(tmp_path / "a.pth")["args"].lr == 0.1
    torch.save(saved | {"args": argparse.Namespace(day=datetime.date(2020, 1, 1))}, tmp_path / "a.pth")
    with pytest.raises(checkpoint.RunError, match="more than tensors"):
        checkpoint.load(tmp_path / "a.pth")


def test_weights_from_elsewhere_in_every_script(run, trained, tmp_path):
    """What export.py writes is read back, too."""
    _, last, best = trained
    path, _ = foreign(tmp_path, "torchvision")
    digits = "--dataset digits --image-size 8 -b 16"
    assert run("scripts/export.py", path, tmp_path / "back.safetensors").status == 0
    for source in (path, tmp_path / "back.safetensors"):
        assert (
            run("scripts/extract.py", source, "--dataset digits -b 64 --out", tmp_path / f"{source.stem}.npz").status
            == 0
        )
        out = tmp_path / source.stem
        done = run("main_lincls.py", digits, "--per-class 4 --epochs 1 --pretrained", source, "--output-dir", out)
        assert done.status == 0 and "on resnet18 from" in done.out, done.err
    both = [np.load(tmp_path / f"{name}.npz")["features"] for name in ("theirs", "back")]
    assert np.array_equal(*both)
    encoder, _ = moco.load_encoder(last)
    images = torch.randn(2, 3, 12, 12)
    for suffix in ("pth", "safetensors"):
        assert run("scripts/export.py", last, tmp_path / f"e.{suffix}").status == 0
        assert torch.equal(moco.load_encoder(tmp_path / f"e.{suffix}")[0](images), encoder(images))
    assert run("scripts/export.py", best, tmp_path / "classifier.pth").status == 0
    network, _, classes = inference.load(tmp_path / "classifier.pth")
    assert classes == ["0", "1"] and torch.equal(network(images), inference.load(best)[0](images))


def neighbours():
    """An embedding with some order in it, of classes of different sizes; the last one has a single image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate([3, 17, 40, 2, 9, 1])])
    features = torch.randn(6, 8, generator=generator)[labels] + torch.randn(len(labels), 8, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return torch.nn.functional.normalize(features[order], dim=1), labels[order]


def test_retrieval_is_its_formula(monkeypatch):
    features, labels = neighbours()
    found = extract.retrieval(features, labels)
    monkeypatch.setattr(extract, "PART_BYTES", 32 * len(labels) * 5)
    assert extract.retrieval(features, labels) == pytest.approx(found)  # in parts of five queries
    scores = []
    for i, (feature, label) in enumerate(zip(features.double(), labels, strict=True)):
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j: -float(features[j].double() @ feature))
        hits = [bool(labels[j] == label) for j in others]
        if R := sum(hits):
            average = sum(sum(hits[: r + 1]) / (r + 1) for r in range(R) if hits[r]) / R
            scores.append([hits[0], any(hits[:5]), average])
    assert len(scores) == len(labels) - 1
    assert found == pytest.approx((100 * np.mean(scores, 0)).tolist())
    assert extract.retrieval(features[:2], torch.arange(2)) is None


def test_retrieval_is_that_of_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    features, labels = neighbours()
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    ).get_accuracy(features, labels)
    first, _, map_at_r = extract.retrieval(features, labels)
    assert 100 * theirs["precision_at_1"] == pytest.approx(first, abs=1e-4)
    assert 100 * theirs["mean_average_precision_at_r"] == pytest.approx(map_at_r, abs=1e-4)


def test_extract_says_how_well_images_find_each_other(run, trained, tmp_path):
    data, last, _ = trained
    done = run("scripts/extract.py", last, data, "--out", tmp_path / "f.npz")
    found = np.load(tmp_path / "f.npz")
    features = torch.nn.functional.normalize(torch.from_numpy(found["features"]), dim=1)
    wanted = extract.retrieval(features, torch.from_numpy(found["labels"]))
    assert "recall@1 {:.2f}, recall@5 {:.2f}, MAP@R {:.2f}".format(*wanted) in done.out
    assert "MAP@R" not in run("scripts/extract.py", last, data / "val", "--out", tmp_path / "f.npz --force").out


def test_the_projector(run, trained, tmp_path):
    """What TensorBoard reads: a table of features, one of class and path, and the thumbnails on one sheet."""
    data, last, _ = trained
    os.rename(data / "val/dog/0.png", data / "val/dog/a\tb.png")
    words = ["scripts/extract.py", last, data, "--out", tmp_path / "f.npz", "--force --projector", tmp_path / "look"]
    done = run(*words)
    assert done.status == 0 and f"tensorboard --logdir {tmp_path / 'look'}" in done.out, done.err
    found = np.load(tmp_path / "f.npz")
    place = tmp_path / "look/00000/default"
    table = np.loadtxt(place / "tensors.tsv", delimiter="\t")
    assert np.allclose(table, found["features"], rtol=1e-4, atol=1e-5)
    rows = [line.split("\t") for line in (place / "metadata.tsv").read_text().splitlines()]
    assert rows[0] == ["class", "path"] and rows[1] == ["cat", "val/cat/0.png"] and len(rows) == 11
    assert sorted(rows[6:])[-1] == ["dog", r"val/dog/a\tb.png"]
    assert Image.open(place / "sprite.png").size == (4 * 32, 4 * 32)
    assert "00000/default" in (tmp_path / "look/projector_config.pbtxt").read_text()
    refused(run(*words), 2, "look' exists")


def test_the_page_on_photos(run, folder, tmp_path, monkeypatch):
    """Its commands as they stand, but for small photos, a smaller network and two epochs."""
    pytest.importorskip("onnxruntime")
    (block,) = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs/photos.md").read_text(), re.S | re.M)
    fetch, *commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == 3 and "'resnet50.pth'" in fetch
    monkeypatch.chdir(tmp_path)
    folder("photos", size=(90, 80), train=8, val=4)
    (tmp_path / foreign(tmp_path, "torchvision")[0].name).rename("resnet50.pth")
    for command in commands:
        _, script, *words = command.split()
        small = "--image-size 72 -b 8 --moco-k 16 --epochs 2 -j 1" if script == "main_moco_out.py" else ""
        done = run(script, " ".join(words), small)
        assert done.status == 0, done.err
        assert {"main_moco_out.py": "120 tensors taken", "scripts/extract.py": "MAP@R"}.get(script, "") in done.out
    assert (tmp_path / "run/encoder.onnx").exists()
