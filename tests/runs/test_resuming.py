"""An interrupted run that is resumed ends like an uninterrupted one."""

import csv
import math
import signal
import sys

import pytest
import torch

from helpers import (
    PHOTOS,
    PHOTOS_MOCO,
    TINY,
    TINY_MOCO,
    assert_equal_runs,
    columns,
    equal_tensors,
    interrupt,
    losses,
    refused,
    rows,
)
from moco import checkpoint, evaluate, pretrain
from moco.run import Run


def exit_at_call(patch, name, number):
    """Makes a function of moco.evaluate exit with status 99 at its call of this number, counted from 1."""
    function, calls = getattr(evaluate, name), []

    def replacement(*args, **options):
        calls.append(name)
        if len(calls) == number:
            sys.exit(99)
        return function(*args, **options)

    patch.setattr(evaluate, name, replacement)


def assert_equal_classifiers(first, second):
    """Asserts that two linear evaluations have the same best epoch and, bit for bit, the same weights."""
    one, other = (checkpoint.load(folder / "linear_last.pth.tar") for folder in (first, second))
    assert one["best"] == other["best"] and equal_tensors(one["state_dict"], other["state_dict"])


def test_resuming_within_an_epoch_is_exact(run, photos, tmp_path, monkeypatch):
    data = photos(train=16)
    assert run("main_moco_out.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "whole", data).status == 0
    interrupt(monkeypatch, 6)
    args = [PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "cut", data]
    assert run("main_moco_out.py", *args).status == 143
    assert checkpoint.load(tmp_path / "cut/checkpoint_last.pth.tar")["step"] == 3
    assert run("main_moco_out.py", *args, "--resume auto").status == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("script, args", [("main_moco_in.py", f"{PHOTOS_MOCO} --knn-freq 1"), ("main_ce.py", PHOTOS)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_is_saved_before_it_is_evaluated(script, args, epoch, run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run(script, args, "-j 0 --output-dir", tmp_path / "whole", data).status == 0
    exit_at_call(monkeypatch, "accuracy" if script == "main_ce.py" else "knn", epoch + 1)
    more = ["-j 0 --output-dir", tmp_path / "cut", data]
    assert run(script, args, *more).status == 99
    saved = checkpoint.load(tmp_path / "cut/checkpoint_last.pth.tar")
    assert (saved["epoch"], saved["step"]) == (epoch, 2) and math.isfinite(saved["unevaluated"]["loss"])
    assert len(losses(tmp_path / "cut")) == epoch if epoch else not (tmp_path / "cut/log.csv").exists()
    assert run(script, args, *more, "--resume auto").status == 0
    names = ("epoch", "loss", "lr", "accuracy", "knn", "top1", "top5")
    whole, cut = (columns(tmp_path / run / "log.csv", *names) for run in ("whole", "cut"))
    assert cut == whole and len(cut) == 2
    whole, cut = (checkpoint.load(tmp_path / run / "checkpoint_0001.pth.tar") for run in ("whole", "cut"))
    assert "unevaluated" not in whole and "unevaluated" not in cut
    assert equal_tensors(whole["state_dict"], cut["state_dict"])


def test_an_epoch_of_the_linear_evaluation_is_saved_before_its_accuracy(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
    args = ["-b 8 --epochs 2 --lr 1 -j 0 --seed 0 --pretrained", tmp_path / "checkpoint_last.pth.tar"]
    whole = run("main_lincls.py", *args, "--output-dir", tmp_path / "whole", data)
    exit_at_call(monkeypatch, "accuracy", 1)
    more = ["--output-dir", tmp_path / "cut", data]
    assert run("main_lincls.py", *args, *more).status == 99
    assert checkpoint.load(tmp_path / "cut/linear_last.pth.tar")["step"] == 2
    resumed = run("main_lincls.py", *args, *more, "--resume auto")
    assert resumed.status == 0 and resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]
    names = ("epoch", "loss", "lr", "top1", "top5")
    assert columns(tmp_path / "whole/linear.csv", *names) == columns(tmp_path / "cut/linear.csv", *names)


def test_a_resumed_run_takes_its_epoch_from_the_checkpoint(run, tmp_path):
    args = [TINY_MOCO, "--output-dir", tmp_path]
    run("main_moco.py", *args, "--epochs 2")
    done = run("main_moco.py", *args, "--epochs 3 --start-epoch 1 --resume auto")
    assert "continuing at epoch 2" in done.out
    assert [row["epoch"] for row in rows(tmp_path / "log.csv")] == ["0", "1", "2"]
    done = run("main_moco.py", *args, "--epochs 1 --resume auto")
    assert done.status == 0 and "has 3 epochs, --epochs is 1" in done.out and "continuing" not in done.out
    assert len(rows(tmp_path / "log.csv")) == 3


def interrupted(run, folder):
    """Interrupts a run within its second epoch; returns its arguments and its checkpoint."""
    args = [TINY_MOCO, "--epochs 3 --output-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 8)
        assert run("main_moco.py", *args).status == 143
    return args, checkpoint.load(folder / "checkpoint_last.pth.tar")


def test_resuming_from_a_checkpoint_of_version_0_1(run, tmp_path):
    """Version 0.1 had --views, and CPU times in checkpoints and logs."""
    args, saved = interrupted(run, tmp_path)
    saved |= dict(seconds=100.0, cpu_seconds=150.0)
    saved["options"]["views"] = "batched"
    torch.save(saved, tmp_path / "checkpoint_last.pth.tar")
    log = rows(tmp_path / "log.csv")
    with open(tmp_path / "log.csv", "w") as file:
        table = csv.DictWriter(file, [*log[0], "cpu_seconds"], restval="1.5")
        table.writeheader()
        table.writerows(log)
    assert run("main_moco.py", *args, "--resume auto").status == 0
    after = rows(tmp_path / "log.csv")
    assert list(after[0]) == pretrain.COLUMNS and after[0] == log[0] and len(after) == 3
    assert 100 < float(after[1]["seconds"]) < 200 and float(after[2]["seconds"]) < 100


def test_a_checkpoint_with_views_pil_is_evaluated_but_not_resumed(run, tmp_path):
    args, saved = interrupted(run, tmp_path)
    saved["options"]["views"] = "pil"
    torch.save(saved, tmp_path / "checkpoint_last.pth.tar")
    refused(run("main_moco.py", *args, "--resume auto"), 2, "--views pil")
    source = ["--pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir", tmp_path]
    assert "result: top1=" in run("main_lincls.py", TINY, "--lr 1 --epochs 1", *source).out


def test_linear_evaluation_resumes(run, tmp_path):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    args = [TINY, "--lr 1 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir"]
    run("main_lincls.py", *args, tmp_path / "whole", "--epochs 3")
    run("main_lincls.py", *args, tmp_path / "parts", "--epochs 1")
    done = run("main_lincls.py", *args, tmp_path / "parts", "--epochs 3 --resume auto")
    assert done.status == 0, done.err
    assert_equal_classifiers(tmp_path / "whole", tmp_path / "parts")
    assert [row["epoch"] for row in rows(tmp_path / "parts" / "linear.csv")] == ["0", "1", "2"]

    resume = [*args, tmp_path / "parts", "--epochs 4 --resume auto"]
    refused(run("main_lincls.py", *resume, "-b 16"), 2, "--batch-size 32")
    run("main_moco.py", TINY_MOCO, "--epochs 2 --resume auto --output-dir", tmp_path)  # changes the encoder
    refused(run("main_lincls.py", *resume), 2, "another encoder")


@pytest.mark.parametrize("views, lines", [("--aug-plus", 2), ("--aug-crop", 4)])
def test_linear_evaluation_stops_and_resumes_within_an_epoch(views, lines, run, tmp_path, monkeypatch):
    """Or after its last step, before the evaluation. With --aug-crop it has other views, and does not crop to evaluate."""
    run("main_moco.py", TINY_MOCO.replace("--aug-plus", views), "--epochs 1 --output-dir", tmp_path)
    args = [TINY, "--lr 1 --epochs 2 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir"]
    assert run("main_lincls.py", *args, tmp_path / "whole").status == 0
    interrupt(monkeypatch, lines)
    stopped = run("main_lincls.py", *args, tmp_path / "parts")
    assert stopped.status == 143 and f"in epoch 0 after step {lines + 1}" in stopped.out
    assert not (tmp_path / "parts/linear.csv").exists()
    last = tmp_path / "parts/linear_last.pth.tar"
    assert "epoch=0" in run("main_lincls.py", "-e --resume", last, "--dataset digits").out
    done = run("main_lincls.py", *args, tmp_path / "parts", "--resume auto")
    assert done.status == 0, done.err
    assert_equal_classifiers(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (columns(tmp_path / part / "linear.csv", "loss", "top1") for part in ("whole", "parts"))
    assert whole == parts and len(whole) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_within_the_epoch_and_resuming_is_exact(number, status, run, tmp_path, monkeypatch):
    args = [TINY_MOCO, "--epochs 3 --output-dir"]
    run("main_moco_out.py", *args, tmp_path / "whole")
    interrupt(monkeypatch, 8, number)
    stopped = run("main_moco_out.py", *args, tmp_path / "parts")
    assert stopped.status == status and "--resume auto" in stopped.out
    assert checkpoint.load(tmp_path / "parts" / "checkpoint_last.pth.tar")["step"] == 4
    done = run("main_moco_out.py", *args, tmp_path / "parts", "--resume auto")
    assert done.status == 0, done.err
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("script", ["main_moco_out.py", "main_lincls.py"])
def test_long_epochs_are_saved_in_between(script, run, trained, tmp_path, monkeypatch):
    data, last, _ = trained
    more = {"main_moco_out.py": "-a resnet20 --moco-k 32", "main_lincls.py": f"--pretrained {last} --lr 1"}[script]
    args = [more, "--image-size 12 -b 2 -p 2 --epochs 2 --seed 0", data, "--output-dir"]
    run(script, *args, tmp_path / "whole")
    monkeypatch.setattr("moco.run.SAVE_EVERY", 0)

    def fail(self):
        sys.exit(99)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "exit_if_stopping", fail)  # called after a save
        assert run(script, *args, tmp_path / "parts").status == 99
    (saved,) = (tmp_path / "parts").glob("*_last.pth.tar")
    assert checkpoint.load(saved)["step"] == 2
    done = run(script, *args, tmp_path / "parts", "--resume auto")
    assert done.status == 0 and "continuing at epoch 0" in done.out, done
    whole, parts = (checkpoint.load(tmp_path / part / saved.name) for part in ("whole", "parts"))
    assert equal_tensors(whole["state_dict"], parts["state_dict"])


def test_a_signal_in_the_last_step_comes_before_the_evaluation(run, tmp_path, monkeypatch):
    args = [TINY_MOCO, "--epochs 2 --knn-freq 1 --output-dir"]
    run("main_moco_out.py", *args, tmp_path / "whole")
    interrupt(monkeypatch, 4)
    assert run("main_moco_out.py", *args, tmp_path / "parts").status == 143
    assert checkpoint.load(tmp_path / "parts/checkpoint_last.pth.tar")["step"] == 5
    assert not (tmp_path / "parts/log.csv").exists()
    assert run("main_moco_out.py", *args, tmp_path / "parts", "--resume auto").status == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_in_the_last_step_of_a_run_changes_nothing(run, tmp_path, monkeypatch):
    interrupt(monkeypatch, 4)
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    assert done.status == 0 and "--resume" not in done.out, done
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["epoch"] == 1


def test_the_seed_is_drawn_shown_and_kept(run, tmp_path):
    args = TINY_MOCO.replace("--seed 0", "")
    done = run("main_moco_out.py", args, "--epochs 1 --output-dir", tmp_path)
    seed = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"]
    assert f"--seed {seed}" in done.out
    run("main_moco_out.py", args, "--epochs 2 --resume auto --output-dir", tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"] == seed


def test_a_linear_evaluation_keeps_the_seed_that_it_drew(run, tmp_path):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    args = [TINY.replace("--seed 0", ""), "--lr 1 --epochs 2 --pretrained", tmp_path / checkpoint.LAST]
    args += ["--output-dir", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2)
        assert run("main_lincls.py", *args).status == 143
    seed = checkpoint.load(tmp_path / checkpoint.LINEAR)["options"]["seed"]
    done = run("main_lincls.py", *args, "--resume auto")
    assert done.status == 0 and checkpoint.load(tmp_path / checkpoint.LINEAR)["options"]["seed"] == seed, done.err
