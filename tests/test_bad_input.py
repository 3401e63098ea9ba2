"""Bad input: one clear line on stderr, exit status 2 (usage) or 1 (a failure at run time), nothing half-written."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, TINY_MOCO
from moco import checkpoint, datasets

SHORT = "-a resnet20 --image-size 8 -b 4 --epochs 1 --moco-k 16 --seed 0"


def refused(done, status, *says):
    """Nothing but one line on stderr, with all of these words."""
    lines = [line for line in done.err.splitlines() if line]
    assert done.status == status, (done.status, done.out, done.err)
    assert len(lines) == 1 and "error: " in lines[0], done.err
    for word in says:
        assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize(
    "words, says",
    [
        ("-b 0", "'0' is not a whole number of 1 or more"),
        ("--moco-k 0", "--moco-k"),
        ("--moco-t 0", "above 0"),
        ("--moco-t -1", "above 0"),
        ("--moco-t nan", "--moco-t"),
        ("--lr nan", "'nan' is not a number"),
        ("--lr fast", "'fast' is not a number"),
        ("--lr inf", "--lr"),
        ("--lr -0.1", "--lr"),
        ("--epochs 1.5", "--epochs"),
        ("--moco-m 1.1", "from 0 to 1"),
        ("--seed -3", "--seed"),
        ("--seed 99999999999999999999", "in 32 bits"),
        ("--image-size 100000", "from 8 to 4096"),
        ("--dataset mnist", "--dataset"),
        ("--image-size 3", "--image-size"),
        ("--std 0 1 1", "--std"),
        ("--nonsense", "--nonsense"),
        ("-a resnet51", "unknown architecture 'resnet51'"),
        ("-a vgg16", "no ResNet"),
        ("-a vit_b_16", "no ResNet"),
        ("-b 30 --bn-splits 4", "--bn-splits 4"),
        ("-b 4 --bn-splits 4", "2 images"),
        ("-b 2000", "fewer than one batch (-b 2000)"),
        ("--world-size 2 --rank 2", "--rank 2"),
        ("--gpu 77", "--gpu 77"),
        ("--resume nowhere.pth.tar", "'nowhere.pth.tar' does not exist"),
        ("--start-epoch 9", "--start-epoch 9"),
        ("--resume ''", "does not name a checkpoint"),
        (f"--moco-k {10**400}", "in 32 bits"),
    ],
)
def test_options(words, says, run, tmp_path):
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path / "out", words)
    refused(done, 2, says)
    assert not list(tmp_path.rglob("*.pth.tar*"))


def test_processes_that_cannot_share_a_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += [
        "--rdzv-endpoint=localhost:0",
        str(ROOT / "main_moco.py"),
        *TINY_MOCO.split(),
        "--epochs",
        "1",
        "-b",
        "31",
    ]
    done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: -b 31" in line]
    assert len(said) == 1 and "2 processes" in said[0], done.stderr


def test_a_port_in_use(run, monkeypatch):
    refused(run("main_moco.py", TINY_MOCO, "--world-size 2 --rank 0 --dist-url tcp://localhost"), 2, "HOST:PORT")
    monkeypatch.setattr(os, "environ", {**os.environ})  # which gets this process's variables
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        words = f"--world-size 2 --rank 0 --dist-url tcp://localhost:{port}"
        says = (f"could not meet at localhost:{port} (--dist-url)", "address already in use")
        refused(run("main_moco.py", TINY_MOCO, "--epochs 1", words), 1, *says)


@pytest.mark.parametrize("script", ["main_moco_in.py", "main_lincls.py"])
def test_folders(script, run, folder, tmp_path):
    good = folder("good", train=6, val=3)
    run("main_moco_in.py", SHORT, "--output-dir", tmp_path / "trained", good)
    words = [SHORT, "--output-dir", tmp_path / "out"]
    if script == "main_lincls.py":
        words = ["-b 4 --epochs 1 --pretrained", tmp_path / "trained/checkpoint_last.pth.tar", *words[1:]]
    refused(run(script, *words), 2, "data folder")
    refused(run(script, *words, tmp_path / "nowhere"), 2, "nowhere", "does not exist", "--dataset cifar10")
    (tmp_path / "file").touch()
    refused(run(script, *words, tmp_path / "file"), 2, "not a folder")
    (tmp_path / "hollow/train").mkdir(parents=True)
    (tmp_path / "hollow/val").mkdir(parents=True)
    refused(run(script, *words, tmp_path / "hollow"), 2, "hollow", "class folders")
    bare = folder("bare", train=6, val=2)
    (bare / "train/fox").mkdir()
    (bare / "val/fox").mkdir()
    refused(run(script, *words, bare), 2, "fox", "no image")
    broken = folder("broken", train=6, val=6)
    for split in ("train", "val"):
        whole = (broken / split / "dog/3.png").read_bytes()
        (broken / split / "dog/3.png").write_bytes(whole[: len(whole) // 2])
    refused(run(script, *words, broken), 1, "dog/3.png", "cannot be read")
    assert not list((tmp_path / "out").rglob("*.pth.tar*"))


def test_holding_out_every_image(run, folder, tmp_path):
    words = ["-a resnet20 -b 4 --holdout 6 --output-dir", tmp_path, folder(train=6)]
    refused(run("main_ce.py", *words), 2, "--holdout 6", "6 training images")


def test_folders_of_the_linear_evaluation(run, folder, tmp_path):
    good = folder("good", train=6, test=3)
    assert run("main_moco_in.py", SHORT, "--output-dir", tmp_path, good).status == 0  # needs no validation images
    words = ["-b 4 --epochs 1 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir", tmp_path / "linear"]
    assert run("main_lincls.py", *words, good).status == 0  # test/ serves as well as val/
    refused(run("main_lincls.py", *words, folder("alone", train=6)), 2, "neither val/ nor test/")
    other = folder("other", train=6, val=3)
    os.rename(other / "val/dog", other / "val/wolf")
    refused(run("main_lincls.py", *words, other), 2, "dog", "wolf", "differ")


def test_broken_image_among_large_ones(run, folder, tmp_path):
    """Decoded by data-loading workers: named all the same."""
    large = folder("large", train=8, size=(120, 100))
    (large / "train/cat/5.png").write_bytes(b"GIF89a, perhaps")
    for workers in (0, 2):
        done = run("main_moco.py", SHORT, f"--aug-plus -j {workers} --output-dir", tmp_path / "out", large)
        refused(done, 1, "cat/5.png", "cannot be read")
    os.remove(large / "train/cat/5.png")
    assert run("main_moco.py", SHORT, "--aug-plus -j 1 --output-dir", tmp_path / "out", large).status == 0


def test_no_network(run, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    done = run("main_moco.py", SHORT, tmp_path)
    refused(done, 1, "no train/ folder and no CIFAR-10", "could not be downloaded", "Network is unreachable")
    refused(run("main_moco.py", SHORT, "--dataset cifar100", tmp_path), 1, "CIFAR-100")


@pytest.mark.parametrize("script", ["main_moco_in.py", "main_lincls.py"])
def test_nothing_is_downloaded_to_a_folder_with_other_files(script, run, folder, tmp_path, monkeypatch):
    """A folder too deep, or without train/: not the place for CIFAR-10."""
    place = folder("photos", train=6, val=3)
    monkeypatch.setattr(datasets.datasets.CIFAR10, "download", lambda self: pytest.fail("it is downloaded"))
    monkeypatch.setattr(datasets.datasets.CIFAR100, "download", lambda self: pytest.fail("it is downloaded"))
    words = [SHORT, "--output-dir", tmp_path / "out"]
    if script == "main_lincls.py":
        run("main_moco_in.py", *words, place)
        words = ["-b 4 --epochs 1 --pretrained", tmp_path / "out/checkpoint_last.pth.tar"]
    refused(run(script, *words, place / "train"), 2, "photos/train", "no train/ folder", "neither empty")


def test_which_cifar(tmp_path):
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / ".hidden").touch()
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / "cifar-100-python").mkdir()
    assert datasets.candidates(tmp_path) == ["cifar100"]
    (tmp_path / "cifar-10-python.tar.gz").touch()
    assert datasets.candidates(tmp_path) == ["cifar10", "cifar100"]
    (tmp_path / "train").mkdir()
    assert datasets.candidates(tmp_path) == ["imagefolder"]


def test_resuming_on_other_data(run, folder, tmp_path):
    pets, birds = folder("pets", train=6, val=3), folder("birds", train=6, val=3, classes=("ant", "bee"))
    words = [SHORT, "--output-dir", tmp_path / "out"]
    run("main_moco_in.py", *words, pets)
    more = [*words, "--epochs 2 --resume auto"]
    refused(run("main_moco_in.py", *more, birds), 2, "other classes", "'cat'", "'bee'")
    linear = ["-b 4 --epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "out/checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear, birds).status == 0  # features are evaluated on any classes
    refused(run("main_lincls.py", *linear, "--epochs 2 --resume auto", pets), 2, "other classes")
    fewer = run("main_moco_in.py", *more, folder("few", train=4))
    assert fewer.status == 0 and "note: the training images were 12 and are now 8" in fewer.out
    saved = checkpoint.load(tmp_path / "out/checkpoint_last.pth.tar")
    torch.save({**saved, "step": 2}, tmp_path / "within.pth.tar")
    within = run("main_moco_in.py", *words, "--epochs 9 --resume", tmp_path / "within.pth.tar", pets)
    refused(within, 2, "within an epoch of 8 images", "has 12")


def test_one_class(run, folder, tmp_path):
    place = folder(train=8, val=4, classes=("all",))
    refused(run("main_moco_in.py", SHORT, "--output-dir", tmp_path / "in", place), 2, "one class, 'all'")
    assert run("main_moco.py", SHORT, "--output-dir", tmp_path, place).status == 0  # it needs no labels
    linear = ["-b 4 --epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    refused(run("main_lincls.py", *linear, place), 2, "one class, 'all'")


def test_files_in_the_way(run, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint_last.pth.tar.tmp").mkdir(parents=True)
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", out), 1, "could not be written: Is a directory")
    (out / "log.csv").write_bytes(bytes(range(256)) * 9)  # garbage is no row
    (out / "checkpoint_last.pth.tar.tmp").rmdir()
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --resume auto --output-dir", out).status == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "tensorboard").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", other), 1, "tensorboard")


def test_scripts(run, tmp_path):
    refused(run("scripts/report.py", "--results", tmp_path / "nowhere"), 2, "nowhere")
    refused(run("scripts/report.py", "--pages", tmp_path / "nowhere"), 1, "nowhere")
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "nowhere/a.png"), 2, "nowhere")
    for name in ("--out", "--profile"):
        refused(run("scripts/bench.py", name, tmp_path / "nowhere/a.json"), 2, "nowhere")
    torch.save({"state_dict": {}}, tmp_path / "checkpoint_last.pth.tar")
    refused(run("scripts/picture.py", tmp_path), 1, "not from this project")
    (tmp_path / "runs").touch()
    row = ["in-200", tmp_path, "--runs", tmp_path / "runs"]
    refused(run("scripts/reproduce.py", *row), 1, "cannot be made")
    for words in ("--arch resnet20", "--epochs=3", "-a resnet20"):
        refused(run("scripts/reproduce.py", *row, f"'--pretrain={words}'"), 2, "options of this script")
    refused(run("scripts/reproduce.py", *row, '''"--pretrain=it's"'''), 2, "--pretrain it's", "No closing quotation")


def test_checkpoints(run, tmp_path):
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    good = tmp_path / "checkpoint_last.pth.tar"
    whole = good.read_bytes()
    saved = torch.load(good, weights_only=True)
    bad = tmp_path / "bad.pth.tar"
    linear = [TINY, "--epochs 1 --output-dir", tmp_path / "out", "--pretrained", bad]
    resume = [TINY_MOCO, "--epochs 2 --output-dir", tmp_path / "out", "--resume", bad]

    def both(status, *says):
        refused(run("main_lincls.py", *linear), status, *says)
        refused(run("main_moco_out.py", *resume), status, *says)

    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint", bytes(1000)):
        bad.write_bytes(content)
        both(1, bad)
    odd = torch.eye(3).to_sparse(), torch.zeros(3, device="meta")
    for content in (
        *({"state_dict": {"module.queue": tensor}} for tensor in odd),
        [1, 2],
        {"epoch": 1},
        {"state_dict": 3},
        {"state_dict": {"module.queue": 3}},
        {"state_dict": {7: torch.zeros(3)}},
        torch.zeros(3),
    ):
        torch.save(content, bad)
        both(1, bad)
    bad.unlink()
    bad.mkdir()
    both(2, "not a file")
    bad.rmdir()
    changed = {**saved, "state_dict": dict(saved["state_dict"])}
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.full((16, 3, 3, 3), torch.nan)
    torch.save(changed, bad)
    both(1, "not finite", "conv1.weight")
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.zeros(16, 4, 3, 3)
    torch.save(changed, bad)
    both(1, "conv1.weight is (16, 4, 3, 3) in the checkpoint, (16, 3, 3, 3) in this")
    del changed["state_dict"]["module.encoder_q.conv1.weight"], changed["state_dict"]["module.encoder_q.bn1.weight"]
    torch.save(changed, bad)
    refused(run("main_moco_out.py", *resume), 1, "encoder_q.conv1.weight is missing")
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    torch.save({**saved, "state_dict": {"module.conv1.weight": torch.zeros(())}}, bad)
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    torch.save({**saved, "arch": "resnet18"}, bad)
    both(2, "resnet18", "resnet20")
    torch.save({**saved, "optimizer": {}}, bad)
    refused(run("main_moco_out.py", *resume), 1, "cannot be resumed")
    assert not list((tmp_path / "out").rglob("*.pth.tar*"))

    resume[-1] = good
    for words, says in (("--moco-k 81", "--moco-k 80"), ("-b 16", "--batch-size 32"), ("--moco-t 0.3", "--moco-t")):
        refused(run("main_moco_out.py", *resume, words), 2, says, "this run has")
    refused(run("main_moco_in.py", *resume), 2, "MoCoOut", "MoCoIn")
    announced = run("main_moco_out.py", *resume, "--lr 0.01")
    assert announced.status == 0 and "--lr was 0.03 and is now 0.01" in announced.out
    refused(run("main_lincls.py", TINY, "--epochs 1"), 2, "--pretrained")
    refused(run("main_lincls.py", TINY, "-e --pretrained", good), 2, "--resume")
    refused(run("main_lincls.py", TINY, "--resume", good), 1, "--pretrained")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_with_code_in_it_is_not_opened(run, tmp_path):
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        bad, witness = tmp_path / "bad.pth.tar", tmp_path / "witness"
        save({"state_dict": {}, "arch": Malice(str(witness))}, bad)
        refused(run("main_lincls.py", TINY, "--pretrained", bad), 1, bad)
        assert not witness.exists()


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    words = [TINY_MOCO.replace("--cos", ""), "--warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *words, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    done = run("main_moco_out.py", *words, "--epochs 3 --lr 1e30 --resume auto")
    refused(done, 1, "epoch 1, step", "not finite")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_weights_that_the_last_update_spoilt_are_not_saved(run, tmp_path):
    """One step an epoch: its loss is finite, what it leaves is not."""
    words = [TINY_MOCO.replace("--cos", ""), "-b 160 --warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *words, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    refused(run("main_moco_out.py", *words, "--epochs 2 --lr 1e38 --wd 1e3 --resume auto"), 1, "not finite", "--lr")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def full(file):
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint.save(path, {"state_dict": {"a": torch.zeros(3)}})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.RunError, match="No space left on device"):
        checkpoint.save(path, {"state_dict": {"a": torch.ones(3)}})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    writer = checkpoint.Writer()
    writer.save(path, {"state_dict": {"a": torch.ones(3)}})
    with pytest.raises(checkpoint.RunError, match="No space left on device"):
        writer.finish()


def test_a_full_disk_is_called_one(tmp_path):
    """As torch tells it, there is an 'enforce fail at inline_container.cc'."""
    os.symlink("/dev/full", tmp_path / "a.tmp")
    with pytest.raises(checkpoint.RunError, match=r"could not be written: No space left on device$"):
        checkpoint.save(tmp_path / "a", {"state_dict": {"a": torch.ones(3)}})


def test_a_checkpoint_is_kept_before_it_is_the_last(tmp_path, monkeypatch):
    """Whoever is killed in between makes both again."""
    path, kept = tmp_path / "last", tmp_path / "kept"
    checkpoint.save(path, {"state_dict": {"a": torch.zeros(3)}})

    def replace(old, new):
        if new == path:
            raise OSError(5, "killed")
        os.rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(checkpoint.RunError):
        checkpoint.save(path, {"state_dict": {"a": torch.ones(3)}}, "kept")
    assert [checkpoint.load(p)["state_dict"]["a"].sum() for p in (path, kept)] == [0, 3]


def test_a_disk_that_fills_up_stops_the_run(run, tmp_path, monkeypatch):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    done = run("main_moco.py", TINY_MOCO, "--epochs 3 --resume auto --output-dir", tmp_path)
    refused(done, 1, "checkpoint_last.pth.tar' could not be written", "the previous one is intact")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_a_checkpoint_is_saved_as_it_was(tmp_path):
    """Training goes on while it is written."""
    writer, gate = checkpoint.Writer(), threading.Event()
    writer.thread.submit(gate.wait)
    weights = torch.zeros(3)
    writer.save(tmp_path / "a", {"state_dict": {"a": weights}}, "b")
    weights += 1
    gate.set()
    writer.finish()
    for name in "ab":
        assert checkpoint.load(tmp_path / name)["state_dict"]["a"].tolist() == [0, 0, 0]


def test_more_than_fits_into_memory(run, tmp_path):
    done = run("main_moco.py", TINY_MOCO, "--moco-k 2000000000 --moco-dim 20000 --epochs 1 --output-dir", tmp_path)
    refused(done, 1, "out of memory", "--moco-k")


def test_an_output_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "out").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path / "out"), 1, "out")


def save_kinds(place):
    """Odd files, and whether each can be trained on."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    yield "gray", picture.convert("L").save(place / "gray.png"), True
    yield "palette", picture.convert("P").save(place / "palette.png"), True
    yield "cmyk", picture.convert("CMYK").save(place / "cmyk.jpg"), True
    yield "alpha", picture.convert("RGBA").save(place / "alpha.png"), True
    frames = [Image.fromarray(255 - pixels)]
    yield "animated", picture.save(place / "animated.webp", save_all=True, append_images=frames), True
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256)
    yield "16 bits", deep.save(place / "deep.png"), False
    yield "misnamed", picture.save(place / "misnamed.png", "JPEG"), True
    yield "empty", (place / "empty.png").touch(), False
    yield "text", (place / "text.jpg").write_text("no image at all"), False
    yield "a zip", zipfile.ZipFile(place / "zip.png", "w").close(), False
    bomb = Image.new("1", (30_000, 30_000))
    yield "a decompression bomb", bomb.save(place / "bomb.png"), False


def test_odd_images(run, folder, tmp_path):
    """Each is trained on, or refused by name."""
    for i in range(11):
        root = folder(f"odd{i}", train=4)
        place = root / "train/cat"
        before = set(place.iterdir())
        kinds = save_kinds(place)
        for _ in range(i + 1):
            for added in set(place.iterdir()) - before:
                added.unlink()
            kind, _, fine = next(kinds)
        added = (set(place.iterdir()) - before).pop()
        done = run("main_moco.py", SHORT, "--output-dir", tmp_path / f"out{i}", root)
        if fine:
            assert done.status == 0, (kind, done.err)
        else:
            refused(done, 1, added.name, "cannot be read")


def test_odd_folders(run, folder, tmp_path):
    root = folder(train=4)
    os.symlink(root / "train", root / "train/cat/around")
    os.symlink(root / "train/cat", root / "train/dog/circle")
    (root / "train/.hidden").mkdir()
    nested = root / "train/dog/of/many/kinds"
    nested.mkdir(parents=True)
    name = os.path.join(os.fsencode(nested), b"\xff\xfe.png")
    with open(name, "wb") as file:
        file.write((root / "train/dog/0.png").read_bytes())
    (root / "train/readme.txt").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.png").write_bytes((root / "train/dog/0.png").read_bytes())
    os.symlink(elsewhere, root / "train/dog/linked")
    os.symlink(elsewhere, root / "train/dog/linked-again")
    os.symlink(tmp_path, elsewhere / "back")
    os.symlink(root / "train/dog/of", root / "train/dog/alias")  # comes before what it leads to
    (root / "train/fox").symlink_to(elsewhere)
    assert len(list(datasets.images_below(root / "train/cat", Counter()))) == 4
    found = list(datasets.images_below(root / "train/dog", Counter()))
    assert len(found) == 4 + 2 and os.fsdecode(name) in found
    assert [os.path.basename(path) for path in datasets.images_below(root / "train/fox", Counter())] == ["more.png"]
    assert run("main_moco.py", SHORT, "--output-dir", tmp_path / "out", root).status == 0
    with open(name, "wb") as file:
        file.write(b"broken")
    refused(run("main_moco.py", SHORT, "--output-dir", tmp_path / "out2", root), 1, "cannot be read")
