"""An interrupted run ends as an uninterrupted one."""

import csv
import math
import signal
import sys

import pytest
import torch

from helpers import PHOTOS, PHOTOS_MOCO, TINY, TINY_MOCO, end, interrupt, losses, rows, same
from moco import checkpoint, evaluate, pretrain
from moco.run import read_log


def test_resuming_within_an_epoch_is_exact(run, photos, tmp_path, monkeypatch):
    data = photos(train=16)
    assert run("main_moco_out.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "whole", data).status == 0
    interrupt(monkeypatch, 6)
    words = [PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "cut", data]
    assert run("main_moco_out.py", *words).status == 143
    assert checkpoint.load(tmp_path / "cut/checkpoint_last.pth.tar")["step"] == 3
    assert run("main_moco_out.py", *words, "--resume auto").status == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("script, words", [("main_moco_in.py", f"{PHOTOS_MOCO} --knn-freq 1"), ("main_ce.py", PHOTOS)])
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
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --epochs 1 --output-dir", tmp_path, data).status == 0
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


def test_a_resumed_run_takes_its_epoch_from_the_checkpoint(run, tmp_path):
    words = [TINY_MOCO, "--output-dir", tmp_path]
    run("main_moco.py", *words, "--epochs 2")
    done = run("main_moco.py", *words, "--epochs 3 --start-epoch 1 --resume auto")
    assert "continuing at epoch 2" in done.out
    assert [row["epoch"] for row in rows(tmp_path / "log.csv")] == ["0", "1", "2"]
    done = run("main_moco.py", *words, "--epochs 1 --resume auto")
    assert done.status == 0 and "has 3 epochs, --epochs is 1" in done.out and "going on" not in done.out
    assert len(rows(tmp_path / "log.csv")) == 3


def begun(run, folder):
    """A run that was interrupted within its second epoch: its words and its checkpoint."""
    words = [TINY_MOCO, "--epochs 3 --output-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 8)
        assert run("main_moco.py", *words).status == 143
    return words, checkpoint.load(folder / "checkpoint_last.pth.tar")


def test_an_older_checkpoint_goes_on(run, tmp_path):
    """Version 0.1 had --views, and processor times in checkpoints and logs."""
    words, saved = begun(run, tmp_path)
    saved |= dict(seconds=100.0, cpu_seconds=150.0)
    saved["options"]["views"] = "batched"
    torch.save(saved, tmp_path / "checkpoint_last.pth.tar")
    log = rows(tmp_path / "log.csv")
    with open(tmp_path / "log.csv", "w") as file:
        table = csv.DictWriter(file, [*log[0], "cpu_seconds"], restval="1.5")
        table.writeheader()
        table.writerows(log)
    assert run("main_moco.py", *words, "--resume auto").status == 0
    after = rows(tmp_path / "log.csv")
    assert list(after[0]) == pretrain.COLUMNS and after[0] == log[0] and len(after) == 3
    assert 100 < float(after[1]["seconds"]) < 200 and float(after[2]["seconds"]) < 100


def test_a_checkpoint_of_views_by_pillow_is_evaluated_but_not_resumed(run, tmp_path):
    words, saved = begun(run, tmp_path)
    saved["options"]["views"] = "pil"
    torch.save(saved, tmp_path / "checkpoint_last.pth.tar")
    done = run("main_moco.py", *words, "--resume auto")
    assert done.status == 2 and len(done.err.splitlines()) == 1 and "--views pil" in done.err
    source = ["--pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir", tmp_path]
    assert "result: top1=" in run("main_lincls.py", TINY, "--lr 1 --epochs 1", *source).out


def test_linear_evaluation_resumes(run, tmp_path):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    words = [TINY, "--lr 1 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir"]
    run("main_lincls.py", *words, tmp_path / "whole", "--epochs 3")
    run("main_lincls.py", *words, tmp_path / "parts", "--epochs 1")
    done = run("main_lincls.py", *words, tmp_path / "parts", "--epochs 3 --resume auto")
    assert done.status == 0, done.err
    whole, parts = (checkpoint.load(tmp_path / part / "linear_last.pth.tar") for part in ("whole", "parts"))
    assert whole["best"] == parts["best"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name])
    assert [row["epoch"] for row in rows(tmp_path / "parts" / "linear.csv")] == ["0", "1", "2"]

    done = run("main_lincls.py", *words, tmp_path / "parts", "--epochs 4 --resume auto -b 16")
    assert done.status == 2 and "--batch-size 32" in done.err
    run("main_moco.py", TINY_MOCO, "--epochs 2 --resume auto --output-dir", tmp_path)  # another encoder by now
    done = run("main_lincls.py", *words, tmp_path / "parts", "--epochs 4 --resume auto")
    assert done.status == 2 and "another encoder" in done.err


def test_linear_evaluation_stops_and_resumes_within_an_epoch(run, tmp_path, monkeypatch):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    words = [TINY, "--lr 1 --epochs 2 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir"]
    assert run("main_lincls.py", *words, tmp_path / "whole").status == 0
    interrupt(monkeypatch, 2)
    stopped = run("main_lincls.py", *words, tmp_path / "parts")
    assert stopped.status == 143 and "in epoch 0 after step 3" in stopped.out
    done = run("main_lincls.py", *words, tmp_path / "parts", "--resume auto")
    assert done.status == 0, done.err
    whole, parts = (checkpoint.load(tmp_path / part / "linear_last.pth.tar") for part in ("whole", "parts"))
    assert whole["best"] == parts["best"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name])
    losses = [[row["loss"] for row in rows(tmp_path / part / "linear.csv")] for part in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_within_the_epoch_and_resuming_is_exact(number, status, run, tmp_path, monkeypatch):
    words = [TINY_MOCO, "--epochs 3 --output-dir"]
    run("main_moco_out.py", *words, tmp_path / "whole")
    interrupt(monkeypatch, 8, number)
    stopped = run("main_moco_out.py", *words, tmp_path / "parts")
    assert stopped.status == status and "--resume auto" in stopped.out
    assert checkpoint.load(tmp_path / "parts" / "checkpoint_last.pth.tar")["step"] == 4
    done = run("main_moco_out.py", *words, tmp_path / "parts", "--resume auto")
    assert done.status == 0, done.err
    same(end(tmp_path / "whole"), end(tmp_path / "parts"))


def test_the_seed_is_drawn_shown_and_kept(run, tmp_path):
    words = TINY_MOCO.replace("--seed 0", "")
    done = run("main_moco_out.py", words, "--epochs 1 --output-dir", tmp_path)
    seed = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"]
    assert f"--seed {seed}" in done.out
    run("main_moco_out.py", words, "--epochs 2 --resume auto --output-dir", tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"] == seed
