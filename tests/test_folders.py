"""Image folders of any size: decoded and cropped once by workers, the rest of the views on the device."""

import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional as by_torchvision

from conftest import ROOT
from moco import augment, batches, checkpoint, datasets, distributed, encoders, evaluate, methods, options
from moco.run import Run, read_log
from test_faults import free_port, start, until

SIZES = [(120, 100), (100, 140), (97, 97), (300, 64)]
WORDS = "-a resnet20 --image-size 16 -b 8 --epochs 2 --warm-up 0 --seed 0 -p 1"
MOCO = f"{WORDS} --moco-k 16 --moco-dim 16 --aug-plus"
HOW = dict(batch_size=4, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu"))


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


def photo(rng, size):
    return Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize(size, Image.BICUBIC)


def losses(folder):
    return [row["loss"] for row in read_log(folder / "log.csv")]


def made(batches_of_epoch):
    return [(torch.stack(views), labels) for views, labels, _ in batches_of_epoch]


def equal(some, others):
    assert len(some) == len(others)
    for (views, labels), (views2, labels2) in zip(some, others, strict=True):
        assert torch.equal(views, views2) and torch.equal(labels, labels2)


@pytest.mark.parametrize("script, words", [("main_moco_in.py", f"{MOCO} --bn-splits 2"), ("main_supcon.py", WORDS)])
def test_each_file_is_opened_once_an_epoch(script, words, run, photos, tmp_path, monkeypatch):
    opened, pillow = Counter(), datasets.Split.pillow

    def counted(self, index):
        opened[self.paths[index]] += 1
        return pillow(self, index)

    monkeypatch.setattr(datasets.Split, "pillow", counted)
    assert run(script, words, "-j 0 --output-dir", tmp_path, photos()).status == 0
    assert len(opened) == 16 and set(opened.values()) == {2}  # two epochs


def test_two_processes_share_the_files(photos, monkeypatch):
    split = datasets.load("imagefolder", photos(), True)
    recipes = [augment.AUG_PLUS] * 2
    asked = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        asked += batches.Batches(split, recipes, shuffle_keys=True, **HOW).source.items([3])
    assert sorted(item for step in asked for item in step) == [(3, i) for i in range(16)]


def test_losses_depend_on_neither_processes_nor_workers(run, photos, tmp_path):
    data = photos(train=16)
    for workers in (0, 1, 2):
        out = tmp_path / f"workers{workers}"
        assert run("main_moco_in.py", MOCO, f"--bn-splits 2 -j {workers} --output-dir", out, data).status == 0
    assert losses(tmp_path / "workers0") == losses(tmp_path / "workers1") == losses(tmp_path / "workers2")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "main_moco_in.py"), *MOCO.split()]
    words += ["-j", "2", "--knn-freq", "1", "--output-dir", str(tmp_path / "two"), str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = ([float(loss) for loss in losses(tmp_path / name)] for name in ("workers0", "two"))
    assert two == pytest.approx(one, rel=2e-4)
    assert all(0 <= float(row["knn"]) <= 100 for row in read_log(tmp_path / "two/log.csv"))


def test_resuming_within_an_epoch_is_exact(run, photos, tmp_path, monkeypatch):
    data, seen, show = photos(train=16), [], Run.show
    assert run("main_moco_out.py", MOCO, "-j 2 --output-dir", tmp_path / "whole", data).status == 0

    def interrupt(self, done, **values):
        show(self, done, **values)
        seen.append(done)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "show", interrupt)
    words = [MOCO, "-j 2 --output-dir", tmp_path / "cut", data]
    assert run("main_moco_out.py", *words).status == 143
    assert checkpoint.load(tmp_path / "cut/checkpoint_last.pth.tar")["step"] == 3
    assert run("main_moco_out.py", *words, "--resume auto").status == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_workers_go_on_over_epochs(photos):
    """One set of workers makes what new ones would make, epoch by epoch, and from within an epoch."""
    split = datasets.load("imagefolder", photos(), True)

    def build(**more):
        return batches.Batches(split, [augment.AUG_PLUS] * 2, **HOW, **more)

    through = build(workers=2, epochs=2)
    first = made(through.epoch(0))
    stream = through.source.stream
    second = made(through.epoch(1))
    assert through.source.stream is stream is not None
    equal(first, made(build(workers=0).epoch(0)))
    equal(second, made(build(workers=0).epoch(1)))
    with closing(build(workers=1, epochs=2)) as alone:
        equal(second[1:], made(alone.epoch(1, first=1)))
    equal(first, made(through.epoch(0)))  # back again: begun anew
    assert not torch.equal(first[0][0][0], first[0][0][1])  # two views differ
    through.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_first_step_of_an_epoch_waits_no_longer_than_the_others(photos, monkeypatch):
    """A batch takes a worker 0.2 s, four workers keep up with steps of 60 ms, and new ones would be noticed."""
    monkeypatch.setattr(
        batches.Crops,
        "__getitem__",
        lambda self, item: time.sleep(0.05) or torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    )
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    split, times = datasets.load("imagefolder", photos(train=20), True), []
    with closing(batches.Batches(split, [augment.LINEAR], workers=4, epochs=3, **HOW)) as made:
        for epoch in range(3):
            begun = time.monotonic()
            for step, _ in enumerate(made.epoch(epoch)):
                time.sleep(0.06)
                times.append((epoch, step, time.monotonic() - begun))
                begun = time.monotonic()
    assert len(times) == 30
    median = statistics.median(seconds for *_, seconds in times)
    assert all(seconds <= 2 * median for epoch, step, seconds in times if epoch and not step), times


def test_a_program_that_closes_nothing_ends(photos):
    program = f"""
import torch
from moco import augment, batches, datasets
split = datasets.load("imagefolder", {str(photos())!r}, True)
made = batches.Batches(split, [augment.AUG_PLUS], epochs=9, workers=2, **{HOW!r})
next(made.epoch(0))
"""
    program = program.replace("device(type='cpu')", "torch.device('cpu')")
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_torchvisions(size, tmp_path):
    photo(np.random.default_rng(1), size).save(tmp_path / "a.png")
    split = datasets.Split(torch.zeros(1, dtype=torch.long), ["a"], paths=[str(tmp_path / "a.png")])
    recipe = augment.Recipe(size=32)
    dataset = batches.Crops(split, [recipe, recipe], seed=3)
    image = datasets.open_image(split.paths[0])
    for epoch in range(10):
        crops = dataset[epoch, 0]
        assert crops.shape == (2, 3, 32, 32) and crops.dtype == torch.uint8
        for view in range(2):
            seeds = (3, epoch, batches.CROPS, 0, view)
            box = recipe.draw_crop(size[1], size[0], batches.generator(*seeds))
            drawn = recipe.draw(1, size[1], size[0], batches.generator(*seeds))[0, :4]
            assert drawn.tolist() == list(box)
            theirs = by_torchvision.resized_crop(image, *box, (32, 32))
            theirs = by_torchvision.pil_to_tensor(theirs)
            assert (crops[view].int() - theirs.int()).abs().max() <= 2


def test_views_of_crops_are_views_of_images_of_that_size():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 24, 24), dtype=torch.uint8, generator=rng)
    recipe = augment.Recipe(size=24)
    parameters = recipe.draw(64, 24, 24, rng)
    parameters[:, :4] = torch.tensor([0.0, 0.0, 24.0, 24.0])
    whole, cropped = (augment.Views(recipe, (0.5,) * 3, (0.5,) * 3, "cpu", cropped=c) for c in (False, True))
    assert torch.equal(whole(images, parameters, (2, 0, 3, 1)), cropped(images, parameters, (2, 0, 3, 1)))


@pytest.mark.parametrize("size, short", [(32, 36), (64, 72), (96, 110), (224, 256)])
@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (60, 200), (256, 256)])
def test_validation_views_of_files_are_torchvisions(size, short, height, width):
    image = photo(np.random.default_rng(2), (width, height))
    for crop, side in ((True, short), (False, size)):
        ours = augment.Centre(size, (0.5,) * 3, (0.5,) * 3, crop).cut(datasets.pixels(image))
        chain = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size), transforms.PILToTensor()])
        assert ours.shape == (3, size, size)
        assert (ours.int() - chain(image).int()).abs().max() <= 2


def test_validation_remembers_no_sizes(photos):
    split, centre = datasets.load("imagefolder", photos(), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    before = augment.resizing.cache_info().currsize
    for workers in (0, 2):
        shown = list(batches.Centres(split, centre, 3, torch.device("cpu"), workers))
        assert [len(labels) for _, labels in shown] == [3, 3, 2]
        assert torch.cat([labels for _, labels in shown]).tolist() == split.labels.tolist()
        assert torch.equal(shown[1][0][0], centre.normalise(batches.CentreCrops(split, centre)[3][None])[0])
    assert augment.resizing.cache_info().currsize == before


def test_every_process_validates_as_many_batches(photos, monkeypatch):
    split, centre = datasets.load("imagefolder", photos(val=3), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, counts in enumerate(([1, 1], [1, 1], [1, 0], [1, 0])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shown = list(batches.Centres(split, centre, 4, torch.device("cpu"), 0))
        assert [len(images) for images, _ in shown] == [len(labels) for _, labels in shown] == counts


def test_the_vote_in_parts_is_the_vote(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    bank, query = (F.normalize(torch.randn(n, 16, generator=rng), dim=1) for n in (999, 50))
    labels = torch.randint(7, (999,), generator=rng)
    similarity, nearest = (query @ bank.T).topk(30)
    votes = torch.zeros(50, 7).scatter_add_(1, labels[nearest], (similarity / 0.1).exp())
    for part_bytes in (1, 4 * 66 * 20, 4 * 66 * 100, 1 << 30):
        monkeypatch.setattr(evaluate, "PART_BYTES", part_bytes)
        assert torch.equal(evaluate.vote(query, bank, labels, 7, 30, 0.1), votes.argmax(1))


def test_a_large_bank_is_kept_in_half_precision(monkeypatch):
    split = datasets.load("digits", None, True, per_class=20)
    encoder = evaluate.frozen(encoders.build("resnet20")(num_classes=10))
    centre = augment.Centre(8, (0.5,) * 3, (0.5,) * 3)
    full, labels = evaluate.extract(encoder, split, centre)
    half, _ = evaluate.extract(encoder, split, centre, full_bytes=4 * full.numel() - 1)
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16) and torch.equal(labels, split.labels)
    assert torch.equal(full.half(), half)
    validation = datasets.load("digits", None, False).of_each_class(slice(10))
    network = encoders.build("resnet20")(num_classes=10)
    ways = []
    for bytes_ in (1 << 30, 0):
        monkeypatch.setattr(evaluate, "FULL_BYTES", bytes_)
        ways.append(evaluate.knn(network, split, validation, centre))
    assert ways[1] == pytest.approx(ways[0], abs=2)


def knn_bytes(images, queries, width, classes):
    """Both banks with their labels, a part of the bank with its similarities, the votes."""
    banks = sum(n * width * (2 if 4 * n * width > evaluate.FULL_BYTES else 4) for n in (images, queries))
    votes = min(queries, evaluate.QUERIES) * 4 * (width + classes)
    return banks + (images + queries) * 8 + evaluate.PART_BYTES + votes


def test_the_memory_of_knn(monkeypatch):
    """What ImageNet takes; and with smaller features, what a process takes at its peak is what was calculated."""
    assert knn_bytes(1_281_167, 50_000, 2048, 1000) <= 6e9
    program = """
import resource, torch
from moco import evaluate
images, queries, width = 60_000, 2_000, 512
evaluate.FULL_BYTES, evaluate.PART_BYTES = 0, 8 << 20
evaluate.frozen = lambda encoder: encoder
def features(encoder, split, *more):
    out = torch.empty(split, width, dtype=torch.float16)
    for part in out.split(1000):
        part.copy_(torch.randn(len(part), width))
    return out, torch.zeros(split, dtype=torch.long)
evaluate.extract = features
class Images(int):
    classes = range(10)
    __len__ = int
    labelled = lambda self: self
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(9, 9) @ torch.ones(9, 9)
before = peak()
assert evaluate.knn(None, Images(images), Images(queries), None) == 100
print(peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(evaluate, "FULL_BYTES", 0)
    monkeypatch.setattr(evaluate, "PART_BYTES", 8 << 20)
    assert int(done.stdout) < 1.5 * knn_bytes(60_000, 2_000, 512, 10)


@pytest.mark.parametrize("size, expected", [(64, datasets.CIFAR10), (65, datasets.IMAGENET), (224, datasets.IMAGENET)])
def test_statistics_of_large_images(size, expected, photos):
    words = ["--image-size", str(size), str(photos())]
    args = options.pretrain_parser("", methods.OUT.add_options).parse_args(words)
    resolved = options.resolve(args, torch.device("cpu"))
    assert (tuple(resolved.mean), tuple(resolved.std)) == expected
    linear = options.linear_parser("").parse_args(words[2:])
    saved = {"options": options.plain(resolved), "arch": "resnet50"}
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    agreed = options.resolve_linear(linear, torch.device("cpu"), "a checkpoint", saved, weights)
    assert (agreed.image_size, agreed.mean, agreed.std) == (size, resolved.mean, resolved.std)


def test_odd_files_are_read_as_they_are_stored(tmp_path):
    rng = np.random.default_rng(0)
    image = photo(rng, (120, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: not applied
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "cmyk.tif", compression=None)
    frames = [photo(rng, (120, 100)).quantize(16) for _ in range(3)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    image.save(tmp_path / "misnamed.jpg", format="PNG")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    names = ["turned.png", "misnamed.jpg", "animated.gif", "cmyk.jpg"]
    split = datasets.Split(torch.zeros(4, dtype=torch.long), ["a"], paths=[str(tmp_path / name) for name in names])
    whole = batches.Crops(split, [augment.Recipe(size=100, scale=(1.0, 1.0), ratio=(1.2, 1.2))], seed=0)
    expected = [image, image, frames[0].convert("RGB"), Image.open(tmp_path / "cmyk.jpg").convert("RGB")]
    for i, theirs in enumerate(expected):
        ours = whole[0, i][0]
        theirs = by_torchvision.pil_to_tensor(theirs.resize((100, 100), Image.BILINEAR))
        assert (ours.int() - theirs.int()).abs().max() <= 2, names[i]


@pytest.mark.parametrize("spoil", ["truncated", "empty", "deep"])
def test_a_file_that_cannot_be_read_is_named(spoil, run, photos, tmp_path):
    data = photos()
    for place in ("train/dog/3.jpg", "val/dog/3.jpg"):
        if spoil == "deep":
            Image.fromarray(np.zeros((99, 99), np.uint16)).save(data / place, format="PNG")
        else:
            content = (data / place).read_bytes()
            (data / place).write_bytes(content[: len(content) // 2 if spoil == "truncated" else 0])
        done = run("main_moco.py", MOCO, "-j 2 --knn-freq 1 --output-dir", tmp_path / "out", data)
        assert done.status == 1 and len(done.err.splitlines()) == 1
        assert place in done.err and "cannot be read" in done.err
        shutil.copy(data / place.replace("3", "2"), data / place)


def test_a_worker_that_dies_ends_the_run_in_one_line(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(batches.Crops, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    done = run("main_moco.py", MOCO, "-j 2 --output-dir", tmp_path / "out", photos())
    assert done.status == 1 and len(done.err.splitlines()) == 1
    assert "a data-loading worker died" in done.err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_within_a_step(processes, photos, tmp_path):
    """PyTorch's handler of SIGCHLD raises an error wherever the main thread is, mostly in the network."""
    words = [*MOCO.split(), "--image-size", "96", "--epochs", "500", "-j", "4", "--output-dir", str(tmp_path / "out")]
    words += ["--world-size", str(processes), "--dist-url", f"tcp://localhost:{free_port()}", str(photos(train=16))]
    runs = [start("main_moco.py", *words, "--rank", str(rank)) for rank in range(processes)]
    until(runs[0], "Epoch: [0]")
    victim = runs[-1].pid
    os.kill(int(Path(f"/proc/{victim}/task/{victim}/children").read_text().split()[0]), signal.SIGKILL)
    printed = [run.communicate(timeout=60)[0] for run in runs]
    for rank, run in enumerate(runs):
        said = [line for line in printed[rank].splitlines() if "error: " in line]
        assert run.returncode == 1 and len(said) == 1 and "Traceback" not in printed[rank], printed[rank]
        assert ("a data-loading worker died" if run is runs[-1] else "another of the 2 processes") in said[0]


def test_too_little_shared_memory(run, photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(batches, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = photos()
    done = run("main_moco.py", MOCO, "-j 2 --output-dir", tmp_path / "out", data)
    assert done.status == 1 and len(done.err.splitlines()) == 1 and "--shm-size" in done.err
    assert run("main_moco.py", MOCO, "-j 0 --output-dir", tmp_path / "out", data).status == 0


@pytest.mark.parametrize("script, words", [("main_moco_in.py", f"{MOCO} --knn-freq 1"), ("main_ce.py", WORDS)])
@pytest.mark.parametrize("fails", [1, 2])
def test_an_epoch_is_saved_before_it_is_evaluated(script, words, fails, run, photos, tmp_path, monkeypatch):
    data, name = photos(), "accuracy" if script == "main_ce.py" else "knn"
    assert run(script, words, "-j 0 --output-dir", tmp_path / "whole", data).status == 0
    evaluation, calls = getattr(evaluate, name), []

    def breaks(*args, **more):
        calls.append(0)
        if len(calls) == fails:
            sys.exit(99)
        return evaluation(*args, **more)

    monkeypatch.setattr(evaluate, name, breaks)
    more = ["-j 0 --output-dir", tmp_path / "cut", data]
    assert run(script, words, *more).status == 99
    saved = checkpoint.load(tmp_path / "cut/checkpoint_last.pth.tar")
    assert (saved["epoch"], saved["step"]) == (fails - 1, 2) and math.isfinite(saved["unevaluated"]["loss"])
    assert len(losses(tmp_path / "cut")) == fails - 1 if fails > 1 else not (tmp_path / "cut/log.csv").exists()
    assert run(script, words, *more, "--resume auto").status == 0
    columns = ("epoch", "loss", "lr", "accuracy", "knn", "top1", "top5")
    whole, cut = ([[row[c] for c in columns] for row in read_log(tmp_path / n / "log.csv")] for n in ("whole", "cut"))
    assert cut == whole and len(cut) == 2
    ends = [checkpoint.load(tmp_path / n / "checkpoint_0001.pth.tar") for n in ("whole", "cut")]
    assert all("unevaluated" not in end for end in ends)
    assert all(torch.equal(value, ends[1]["state_dict"][key]) for key, value in ends[0]["state_dict"].items())


def test_a_linear_evaluation_is_saved_before_it_is_evaluated(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", MOCO, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    words = ["-b 8 --epochs 2 --lr 1 -j 0 --seed 0 --pretrained", tmp_path / "checkpoint_last.pth.tar"]
    whole = run("main_lincls.py", *words, "--output-dir", tmp_path / "whole", data)
    accuracy, calls = evaluate.accuracy, []

    def breaks(*args, **more):
        calls.append(0)
        if len(calls) == 2:
            sys.exit(99)
        return accuracy(*args, **more)

    monkeypatch.setattr(evaluate, "accuracy", breaks)
    more = ["--output-dir", tmp_path / "cut", data]
    assert run("main_lincls.py", *words, *more).status == 99
    assert checkpoint.load(tmp_path / "cut/linear_last.pth.tar")["step"] == 2
    resumed = run("main_lincls.py", *words, *more, "--resume auto")
    assert resumed.status == 0 and resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]
    logged = [read_log(tmp_path / name / "linear.csv") for name in ("whole", "cut")]
    columns = ("epoch", "loss", "lr", "top1", "top5")
    assert [[row[c] for c in columns] for row in logged[0]] == [[row[c] for c in columns] for row in logged[1]]


def test_the_validation_images_are_read_once(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", MOCO, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    passes, once = [], batches.Centres.__iter__
    monkeypatch.setattr(batches.Centres, "__iter__", lambda images: passes.append(images) or once(images))
    words = ["-b 8 --lr 1 -j 0 --seed 0 --output-dir", tmp_path, data]
    done = run("main_lincls.py", "--epochs 3 --pretrained", tmp_path / "checkpoint_last.pth.tar", *words)
    assert done.status == 0 and len(passes) == 1, done.err
    again = run("main_lincls.py", "-e --resume", tmp_path / "model_best.pth.tar", *words)
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1] and len(passes) == 2


def test_linear_evaluation_of_large_images(run, photos, tmp_path):
    data = photos()
    words = MOCO.replace("--image-size 16", "--image-size 72 --stem imagenet")
    assert run("main_moco.py", words, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    done = run(
        "main_lincls.py",
        "-b 8 --epochs 1 --lr 1 -j 2 --pretrained",
        tmp_path / "checkpoint_last.pth.tar",
        "--output-dir",
        tmp_path,
        data,
    )
    assert done.status == 0, done.err
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")["options"]
    assert saved["image_size"] == 72 and tuple(saved["mean"]) == datasets.IMAGENET[0]


def test_resolve_leaves_small_images_alone():
    args = Namespace(batch_size=4, dataset="digits", data=None, image_size=96, mean=None, std=None, precision=None)
    assert options.resolve(args, torch.device("cpu")).mean == list(datasets.STATISTICS["digits"][0])
