"""Short runs of the scripts on scikit-learn's digits."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import SCRIPTS, TINY, TINY_MOCO, printed_losses, rows
from moco import checkpoint, datasets, pretrain
from moco.builder import MoCo
from moco.run import Log, Run

LINEAR = f"{TINY} --lr 1 --epochs 2"


@pytest.mark.parametrize("script", SCRIPTS)
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


def test_bf16_keeps_the_queue_in_float32(run, tmp_path, monkeypatch):
    seen, encode = set(), MoCo.encode
    monkeypatch.setattr(MoCo, "encode", lambda *rest: seen.add(torch.is_autocast_enabled("cpu")) or encode(*rest))
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --precision bf16 --output-dir", tmp_path)
    assert done.status == 0 and "bf16" in done.out and seen == {True}
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
