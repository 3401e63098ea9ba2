"""Short runs of the scripts on scikit-learn's digits."""

import dataclasses
import io
import itertools
import math
import re
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import TINY, TINY_MOCO, columns, printed_losses, rows
from moco import augment, batches, checkpoint, datasets, evaluate, inference, pretrain
from moco.builder import MoCo
from moco.run import Log, Run

LINEAR = f"{TINY} --lr 1 --epochs 2"


@pytest.mark.parametrize("script", ["main_moco.py", "main_moco_in.py"])
def test_pretrain_then_linear_evaluation(script, run, tmp_path):
    done = run(script, TINY_MOCO, "--epochs 3 --save-freq 2 --output-dir", tmp_path)
    assert done.status == 0, done.err
    log = rows(tmp_path / "log.csv")
    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert {"loss", "lr", "images_per_second", "seconds"} <= set(log[0])
    losses = printed_losses(done.out)
    assert len(losses) == 15 and all(math.isfinite(loss) for loss in losses)
    assert float(log[1]["loss"]) == pytest.approx(sum(losses[5:10]) / 5, abs=1e-3)
    assert "contrastive accuracy" in done.out and "log K = 4.38" in done.out
    kept = sorted(p.name for p in tmp_path.glob("*.pth.tar"))
    assert kept == ["checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar", "checkpoint_last.pth.tar"]
    saved = torch.load(tmp_path / "checkpoint_0002.pth.tar", weights_only=True)
    assert saved["epoch"] == 3 and saved["arch"] == "resnet20" and saved["optimizer"]["param_groups"]
    assert all(name.startswith("module.") for name in saved["state_dict"])
    assert saved["state_dict"]["module.queue"].shape == (16, 80)
    assert saved["state_dict"]["module.queue_ptr"].item() == 3 * 5 * 32 % 80

    done = run("main_lincls.py", LINEAR, "--pretrained", tmp_path / "checkpoint_0002.pth.tar", "--output-dir", tmp_path)
    assert done.status == 0, done.err
    result = done.out.strip().splitlines()[-1]
    assert result.startswith("result: top1=") and "top5=" in result and "epoch=" in result
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    for name, value in best["state_dict"].items():
        if ".fc." not in name:
            assert torch.equal(value, saved["state_dict"][name.replace("module.", "module.encoder_q.")])
    assert best["state_dict"]["module.fc.weight"].shape == (10, 64)
    again = run("main_lincls.py", "-e --resume", tmp_path / "model_best.pth.tar")  # on the data set in the checkpoint
    assert again.out.strip() == result
    for name, epochs in (("log", 3), ("linear", 2)):  # the linear evaluation has not purged the other log
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(epochs))


def test_help_shows_the_defaults_of_a_recipe(run):
    for args, default in (("--rec supcon", "(default: 5.0)"), ("", "(default: 30.0)")):
        assert f"never rescaled with the batch {default}" in " ".join(run("main_lincls.py", args, "--help").out.split())


def test_an_earlier_log_is_overwritten_by_the_first_new_row(run, tmp_path):
    """A new run without --resume keeps the earlier run's log until it has an epoch of its own."""
    args = [TINY_MOCO, "--output-dir", tmp_path]
    first = run("main_moco.py", *args, "--epochs 2")
    assert "overwritten" not in first.out and "no Shuffling BN" in first.out
    log = Log(tmp_path, "log", pretrain.COLUMNS)
    assert len(rows(tmp_path / "log.csv")) == 2
    log.add(0, loss=9.0)
    assert [float(row["loss"]) for row in rows(tmp_path / "log.csv")] == [9.0]
    again = run("main_moco.py", *args, "--epochs 1 --bn-splits 2")
    assert "will be overwritten; --resume auto continues it" in again.out


def test_seconds_of_an_epoch_include_saving_the_one_before(run, tmp_path, monkeypatch):
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda *rest: (time.sleep(0.5), save(*rest)))
    run("main_moco.py", TINY_MOCO, "--epochs 2 --output-dir", tmp_path)
    assert float(rows(tmp_path / "log.csv")[1]["seconds"]) > 0.5


def test_speed_counts_images_and_not_full_batches(run, tmp_path, monkeypatch):
    """40 images are one step for -b 40 and for -b 256. With a clock that advances by 1 per call, the speeds are equal."""
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    args, shown = [TINY, "--lr 1 --epochs 2 --per-class 4 --pretrained", tmp_path / "checkpoint_last.pth.tar"], []
    for batch in (40, 256):
        ticks = itertools.count()
        monkeypatch.setattr("moco.run.time", SimpleNamespace(perf_counter=lambda ticks=ticks: float(next(ticks))))
        done = run("main_lincls.py", *args, f"-b {batch} --output-dir", tmp_path)
        log = rows(tmp_path / "linear.csv")
        speeds, losses = [float(row["images_per_second"]) for row in log], [float(row["loss"]) for row in log]
        lines = [line.split("images/s ")[1] for line in done.out.splitlines() if "images/s" in line]
        shown.append((speeds, lines, pytest.approx(losses, rel=1e-5)))
    assert (
        shown[0][:2] == shown[1][:2]
        and losses == shown[0][2]
        and len(shown[0][0]) == len(shown[0][1]) == 2
        and "ETA" in shown[0][1][0]
    )


def test_cross_entropy_with_a_schedule(run, tmp_path):
    args = [TINY, "--no-cos --lr 0.1 --epochs 3 --schedule 1 2 --output-dir", tmp_path]
    assert run("main_ce.py", *args).status == 0
    assert [float(row["lr"]) for row in rows(tmp_path / "log.csv")] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize("script", ["main_supcon.py", "main_ce.py"])
def test_scripts_without_a_queue(script, run, tmp_path):
    done = run(script, TINY, "--aug-plus --epochs 2 --warm-up 1 --knn-freq 1 --output-dir", tmp_path)
    assert done.status == 0, done.err
    log = rows(tmp_path / "log.csv")
    assert 0 < float(log[1]["knn"]) <= 100
    if script == "main_ce.py":
        assert 0 < float(log[1]["top1"]) <= float(log[1]["top5"]) <= 100
        return
    args = [TINY, "--recipe supcon --lr 1 --epochs 3 --schedule 1 2", "--pretrained", tmp_path / checkpoint.LAST]
    done = run("main_lincls.py", *args, "--output-dir", tmp_path)
    assert done.status == 0 and "result: top1=" in done.out
    assert [float(row["lr"]) for row in rows(tmp_path / "linear.csv")] == pytest.approx([1, 0.2, 0.04])
    (group,) = checkpoint.load(tmp_path / checkpoint.LINEAR)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.04)
    again = run("main_lincls.py", "-e --dataset digits --resume", tmp_path / "model_best.pth.tar")
    assert again.out.strip() == done.out.splitlines()[-1]  # with the recipe's validation images


def test_bf16_keeps_the_queue_and_the_evaluation_in_float32(run, tmp_path, monkeypatch):
    def recorded(function, modes):
        return lambda *args, **options: modes.add(torch.is_autocast_enabled("cpu")) or function(*args, **options)

    trained, evaluated = set(), set()
    monkeypatch.setattr(MoCo, "encode", recorded(MoCo.encode, trained))
    monkeypatch.setattr(evaluate, "extract", recorded(evaluate.extract, evaluated))
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --knn-freq 1 --precision bf16 --output-dir", tmp_path)
    assert done.status == 0 and "bf16" in done.out and (trained, evaluated) == ({True}, {False}), done
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["state_dict"]["module.queue"].dtype == torch.float32


def test_holdout(run, folder, tmp_path):
    """The last images of each class are the validation images, not training images; val/ is not needed."""
    data = folder(train=6)
    whole = datasets.load("imagefolder", data, True)
    train, validation = (datasets.load("imagefolder", data, part, holdout=2) for part in (True, False))
    assert train.paths == whole.paths[:4] + whole.paths[6:10] and train.labels.tolist() == [0] * 4 + [1] * 4
    assert validation.paths == whole.paths[4:6] + whole.paths[10:] and validation.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(torch.cat([train.images, validation.images]).sum(0), whole.images.sum(0))
    args = ["-a resnet20 --image-size 12 --epochs 1 -b 4 --holdout 2 --output-dir", tmp_path, data]
    done = run("main_moco.py", *args, "--moco-k 8 --knn-freq 1")
    assert done.status == 0 and "kNN" in done.out
    done = run("main_lincls.py", *args, "--pretrained", tmp_path / "checkpoint_last.pth.tar")
    assert done.status == 0 and "8 images" in done.out and "result: top1=" in done.out


@pytest.mark.parametrize("warm_up, announced", [(1, False), (2, True), (9, True)])
def test_a_note_if_the_warm_up_takes_most_epochs(warm_up, announced, run, tmp_path):
    done = run("main_ce.py", TINY, f"--lr 0.8 --warm-up {warm_up} --epochs 3 --output-dir", tmp_path)
    rates = [float(line.split("lr ")[1].split()[0]) for line in done.out.splitlines() if line.startswith("Epoch: [")]
    assert (f"highest lr will be {max(rates):.4g}, --lr is 0.8" in done.out) == announced
    assert announced or "highest lr" not in done.out


def test_training_and_evaluation_have_the_size_and_statistics_of_the_options(run, tmp_path, monkeypatch):
    """Each image has one colour, which crops and flips do not change."""
    for split in ("train", "val"):
        for label, grey in (("cat", 51), ("dog", 204)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (12, 12), (grey,) * 3).save(tmp_path / "data" / split / label / f"{n}.png")
    seen = Counter()

    def spied(make):
        def made(self, *args):
            for inputs, *more in make(self, *args):
                for x in torch.cat(inputs) if isinstance(inputs, list) else inputs:
                    assert x.shape == (3, 16, 16) and (x - x[:, :1, :1]).abs().max() < 1e-3
                    seen[type(self).__name__, *(round(value, 2) for value in x[:, 0, 0].tolist())] += 1
                yield inputs, *more

        return made

    for kind, name in ((batches.Batches, "epoch"), (batches.Centres, "__iter__")):
        monkeypatch.setattr(kind, name, spied(getattr(kind, name)))
    sizes = "--image-size 16 --mean 0.1 0.2 0.3 --std 0.5 0.4 0.25 -a resnet20"
    args = ["-b 4 --epochs 1 --seed 0 --output-dir", tmp_path, tmp_path / "data"]
    assert run("main_moco_in.py", sizes, "--moco-k 8 --aug-mild --knn-freq 1", *args).status == 0
    pretraining, colours = Counter(seen), [(0.2, 0.0, -0.4), (1.4, 1.5, 2.0)]  # (51 / 255 - 0.1) / 0.5 and so on
    assert pretraining == {(kind, *colour): 8 for kind in ("Batches", "Centres") for colour in colours}
    seen.clear()
    assert run("main_lincls.py", "--pretrained", tmp_path / checkpoint.LAST, *args).status == 0
    assert seen == {(kind, *colour): 4 for kind in ("Batches", "Centres") for colour in colours}


@pytest.mark.parametrize(
    "script, views, crop",
    [
        ("main_moco_in.py", "--aug-plus", True),
        ("main_moco_in.py", "--aug-crop", False),
        ("main_ce.py", "--aug-plus", True),
    ],
)
def test_the_accuracies_in_the_log_are_those_of_the_checkpoint(script, views, crop, run, tmp_path):
    """kNN of the query encoder; cross entropy's own classifier sees the validation images as they are."""
    args = TINY_MOCO.replace("--aug-plus", views) if "moco" in script else f"{TINY} {views}"
    assert run(script, args, "--lr 0.1 --epochs 2 --knn-freq 1 --output-dir", tmp_path).status == 0
    last, log = tmp_path / checkpoint.LAST, rows(tmp_path / "log.csv")[-1]
    train, validation = datasets.load("digits", None, True, per_class=16), datasets.load("digits", None, False)
    centre = augment.Centre(8, *datasets.STATISTICS["digits"], crop=crop)
    network, preprocess, classes = inference.load(last)
    assert float(log["knn"]) == pytest.approx(evaluate.knn(network, train, validation, centre), abs=1e-4)
    if script == "main_ce.py":
        centre = dataclasses.replace(centre, crop=False)
        images = batches.Centres(validation, centre, 64, torch.device("cpu"))
        scores = evaluate.accuracy(evaluate.frozen(network, keep_fc=True), images, 10)[:2]
        assert [float(log["top1"]), float(log["top5"])] == pytest.approx(scores, abs=1e-4)
    assert classes == (list("0123456789") if script == "main_ce.py" else None)
    assert preprocess.crop == centre.crop  # what load_encoder, extract.py and export.py use


def test_the_best_epoch_is_the_first_of_the_highest_top1(run, tmp_path):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    args = [TINY, "--lr 1 --epochs 6 --pretrained", tmp_path / checkpoint.LAST, "--output-dir", tmp_path]
    done = run("main_lincls.py", *args)
    log = [(float(row["top1"]), float(row["top5"]), int(row["epoch"])) for row in rows(tmp_path / "linear.csv")]
    top1, top5, epoch = max(log, key=lambda row: row[0])
    assert min(log)[0] < top1 and len(log) == 6
    assert done.out.splitlines()[-1] == f"result: top1={top1:.2f} top5={top5:.2f} epoch={epoch}"
    assert checkpoint.load(tmp_path / checkpoint.BEST)["epoch"] == epoch + 1


def test_the_classifier_starts_and_is_trained_as_by_moco(run, tmp_path):
    """Weights N(0, 0.01), bias 0; SGD with momentum 0.9 and no weight decay."""
    run("main_moco.py", TINY_MOCO, "--momentum 0.5 --epochs 1 --output-dir", tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["optimizer"]["param_groups"][0]["momentum"] == 0.5
    args = [TINY, "--lr 0 --epochs 2 --pretrained", tmp_path / checkpoint.LAST, "--output-dir", tmp_path]
    done = run("main_lincls.py", *args)
    assert done.status == 0 and done.out.rstrip().endswith("epoch=0"), done  # the best is the first of equal ones
    saved = checkpoint.load(tmp_path / checkpoint.LINEAR)
    weight, bias = (saved["state_dict"][f"module.fc.{name}"] for name in ("weight", "bias"))
    assert weight.std().item() == pytest.approx(0.01, rel=0.1) and abs(weight.mean()) < 0.002 and not bias.any()
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0, False)


def test_the_epochs_that_knn_follows(run, tmp_path):
    """Every second one, and the last; --start-epoch 1 begins with the second."""
    args = [TINY_MOCO, "--knn-freq 2 --epochs 5 --start-epoch 1 --output-dir", tmp_path]
    assert run("main_moco.py", *args).status == 0
    log = [(int(row["epoch"]), bool(row["knn"])) for row in rows(tmp_path / "log.csv")]
    assert log == [(1, True), (2, False), (3, True), (4, True)]
    args = [
        TINY,
        "--lr 1 --epochs 3 --start-epoch 2 --pretrained",
        tmp_path / checkpoint.LAST,
        "--output-dir",
        tmp_path,
    ]
    assert run("main_lincls.py", *args).status == 0
    assert columns(tmp_path / "linear.csv", "epoch") == [["2"]]


def test_the_lines_of_a_resumed_epoch(tmp_path, monkeypatch, capsys):
    """Epoch 1 of 3, resumed at step 2 of 5; a step has 10 images and takes 10 seconds, so an image takes 1."""
    clock = [1000.0]
    monkeypatch.setattr("moco.run.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    sizes = dict(epochs=3, steps=5, images=50, batch_size=10)
    run = Run(tmp_path, "log", "last", ["epoch", "images_per_second"], 2, torch.device("cpu"), "", **sizes)
    run.epoch, run.step, run.losses[:2] = 1, 2, torch.tensor([8.0, 6.0])
    with run:
        for step, loss in run.steps([4.0, 2.0, 0.0]):
            clock[0] += 10
            run.add(step, torch.tensor(loss))
            if run.due(step):
                run.sync(step, 0.1)
        assert run.summary()["images_per_second"] == 1
    assert capsys.readouterr().out.splitlines() == [
        "Epoch: [1][4/5]  Time 10.000  Data 0.000  Loss 2.0000 (5.0000)  lr 0.1  images/s 1  ETA 0:01:00",
        "Epoch: [1][5/5]  Time 10.000  Data 0.000  Loss 0.0000 (4.0000)  lr 0.1  images/s 1  ETA 0:00:50",
    ]


def test_a_bar_on_a_terminal(monkeypatch, tmp_path):
    """It shows the loss of the step that it is at; what is printed when a run stops has a line of its own."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    sizes = dict(epochs=1, steps=3, images=6, batch_size=2)
    run = Run(tmp_path, "log", "last", ["epoch", "images_per_second"], 1, torch.device("cpu"), "", **sizes)
    with pytest.raises(SystemExit), run:
        for step, _ in run.steps(range(3)):
            run.add(step, torch.tensor(step + 0.5))
            time.sleep(0.11)  # a bar is drawn ten times a second
            assert run.due(step)
            run.sync(step, lr=0.1)
            if step == 1:
                run.stopping = signal.SIGTERM
                run.exit_if_stopping()
    drawn = sys.stdout.getvalue().split("\r")
    assert re.search(r" 1/3 .*Loss=0.5000 ", "".join(drawn)), drawn
    assert drawn[-1].startswith("stopped in epoch 0 after step 2"), drawn
