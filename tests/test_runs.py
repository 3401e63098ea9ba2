"""The scripts as a user runs them: on scikit-learn's digits, small and short."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT, TINY, TINY_MOCO
from moco import augment, batches, checkpoint, datasets, distributed, methods, options, pretrain
from moco.run import Log, Run

SCRIPTS = ["main_moco.py", "main_moco_in.py", "main_moco_out.py", "main_moco_suploss.py"]
LINEAR = f"{TINY} --lr 1 --epochs 2"


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def printed_losses(out):
    """Of every step, at -p 1."""
    return [float(line.split("Loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("Epoch: [")]


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
    again = run("main_lincls.py", "-e --resume", tmp_path / "model_best.pth.tar")  # of digits, as the checkpoint says
    assert again.out.strip() == result
    for name, epochs in (("log", 3), ("linear", 2)):  # neither has purged the other
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(epochs))


def test_linear_evaluation_reads_mocos_own_checkpoints(run, tmp_path):
    """Nothing but epoch, arch, state_dict and optimizer; and the classifier learns something."""
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    saved = torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)
    theirs = {name: saved[name] for name in ("epoch", "arch", "state_dict", "optimizer")}
    torch.save(theirs, tmp_path / "moco.pth.tar")
    words = "-a resnet20 --dataset digits --image-size 8 -b 128 --lr 0.3 --epochs 8 --schedule 5 7 --seed 0"
    done = run("main_lincls.py", words, "--pretrained", tmp_path / "moco.pth.tar", "--output-dir", tmp_path)
    assert done.status == 0, done.err
    assert float(done.out.split("result: top1=")[1].split()[0]) > 30  # chance is 10


def test_linear_evaluation_of_an_imagenet_checkpoint_that_says_nothing():
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}

    def resolved(*words, **options_of_the_checkpoint):
        args = options.linear_parser("").parse_args([*words, "-a", "resnet50", "--dataset", "imagefolder", "data/"])
        saved = {"options": options_of_the_checkpoint}
        return options.resolve_linear(args, torch.device("cpu"), "moco.pth.tar", saved, weights)

    args = resolved()
    assert (args.stem, args.image_size, (tuple(args.mean), tuple(args.std))) == ("imagenet", 224, datasets.IMAGENET)
    args = resolved("--mean", "0.1", "0.2", "0.3", std=[1, 1, 1])
    assert (args.mean, args.std) == ([0.1, 0.2, 0.3], [1, 1, 1])


def test_the_help_of_a_recipe(run):
    for words, says in (("--recipe supcon", "(default: 5.0)"), ("", "(default: 30.0)")):
        assert f"never rescaled with the batch {says}" in " ".join(run("main_lincls.py", words, "--help").out.split())


def test_a_log_lives_until_its_run_is_replaced(run, tmp_path):
    """The same command without --resume: nothing is lost before there is something in its place."""
    words = [TINY_MOCO, "--output-dir", tmp_path]
    first = run("main_moco.py", *words, "--epochs 2")
    assert "overwritten" not in first.out and "no Shuffling BN" in first.out
    log = Log(tmp_path, "log", pretrain.COLUMNS)
    assert len(rows(tmp_path / "log.csv")) == 2
    log.add(0, loss=9.0)
    assert [float(row["loss"]) for row in rows(tmp_path / "log.csv")] == [9.0]
    assert (
        "will be overwritten; --resume auto continues it" in run("main_moco.py", *words, "--epochs 1 --bn-splits 2").out
    )


def test_a_resumed_run_takes_its_epoch_from_the_checkpoint(run, tmp_path):
    words = [TINY_MOCO, "--output-dir", tmp_path]
    run("main_moco.py", *words, "--epochs 2")
    done = run("main_moco.py", *words, "--epochs 3 --start-epoch 1 --resume auto")
    assert "continuing at epoch 2" in done.out
    assert [row["epoch"] for row in rows(tmp_path / "log.csv")] == ["0", "1", "2"]
    done = run("main_moco.py", *words, "--epochs 1 --resume auto")
    assert done.status == 0 and "has 3 epochs, --epochs is 1" in done.out and "going on" not in done.out
    assert len(rows(tmp_path / "log.csv")) == 3


def test_an_epochs_seconds_have_the_saving_before_it_in_them(run, tmp_path, monkeypatch):
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda *rest: (time.sleep(0.5), save(*rest)))
    run("main_moco.py", TINY_MOCO, "--epochs 2 --output-dir", tmp_path)
    assert float(rows(tmp_path / "log.csv")[1]["seconds"]) > 0.5


def test_images_are_counted_not_full_batches(run, tmp_path, monkeypatch):
    """Of 40 images in one step, by a clock that ticks once at each look: the same speed with room for 256."""
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    words, shown = [TINY, "--lr 1 --epochs 2 --per-class 4 --pretrained", tmp_path / "checkpoint_last.pth.tar"], []
    for batch in (40, 256):
        ticks = itertools.count()
        monkeypatch.setattr("moco.run.time", SimpleNamespace(perf_counter=lambda ticks=ticks: float(next(ticks))))
        done = run("main_lincls.py", *words, f"-b {batch} --output-dir", tmp_path)
        speeds = [float(row["images_per_second"]) for row in rows(tmp_path / "linear.csv")]
        shown.append((speeds, [line.split("images/s ")[1] for line in done.out.splitlines() if "images/s" in line]))
    assert shown[0] == shown[1] and len(shown[0][0]) == len(shown[0][1]) == 2 and "ETA" in shown[0][1][0]


def begun(run, folder):
    """A run that was interrupted within its second epoch: its words and its checkpoint."""
    words = [TINY_MOCO, "--epochs 3 --output-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        show, seen = Run.show, []

        def interrupt(self, done, **values):
            show(self, done, **values)
            seen.append(done)
            if len(seen) == 8:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Run, "show", interrupt)
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


def test_cross_entropy_takes_a_schedule(run, tmp_path):
    words = [TINY, "--no-cos --lr 0.1 --epochs 3 --schedule 1 2 --output-dir", tmp_path]
    assert run("main_ce.py", *words).status == 0
    assert [float(row["lr"]) for row in rows(tmp_path / "log.csv")] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "files"])
def test_a_last_batch_of_fewer_images_than_processes(in_memory, folder, monkeypatch):
    """Nine images in batches of four, and one for validation: the second process of two has none of them at the end."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "processes_on_node", 2)
    place, (mean, std), device = folder(train=5, val=1), datasets.CIFAR10, torch.device("cpu")
    split = datasets.load("imagefolder", place, True, in_memory=in_memory).take(torch.arange(9))
    how = dict(batch_size=4, seed=0, mean=mean, std=std, device=device, workers=0, drop_last=False)
    made = batches.Batches(split, [augment.LINEAR, augment.LINEAR], **how)
    shapes = [([tuple(view.shape) for view in made], len(labels)) for made, labels, _ in made.epoch(0)]
    assert [labels for _, labels in shapes] == [2, 2, 0] and shapes[-1][0][0][0] == 0
    one = datasets.load("imagefolder", place, False, in_memory=in_memory).take(torch.arange(1))
    ((images, labels),) = batches.Centres(one, augment.Centre(12, mean, std), 4, device)
    assert images.shape == (0, 3, 12, 12) and len(labels) == 0


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
    show, seen = Run.show, []

    def interrupt(self, done, **values):
        show(self, done, **values)
        seen.append(done)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "show", interrupt)
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


@pytest.mark.parametrize("script", ["main_supcon.py", "main_ce.py"])
def test_the_rows_without_a_queue(script, run, tmp_path):
    done = run(script, TINY, "--aug-plus --epochs 2 --warm-up 1 --knn-freq 1 --output-dir", tmp_path)
    assert done.status == 0, done.err
    log = rows(tmp_path / "log.csv")
    assert 0 < float(log[1]["knn"]) <= 100
    if script == "main_ce.py":
        assert 0 < float(log[1]["top1"]) <= float(log[1]["top5"]) <= 100
        return
    words = [TINY, "--recipe supcon --epochs 1 --pretrained", tmp_path / "checkpoint_last.pth.tar"]
    done = run("main_lincls.py", *words, "--output-dir", tmp_path)
    assert done.status == 0 and "result: top1=" in done.out
    again = run("main_lincls.py", "-e --dataset digits --resume", tmp_path / "model_best.pth.tar")
    assert again.out.strip() == done.out.splitlines()[-1]  # with that recipe's images


OBJECTIVES = [method.model.__name__ for method in methods.ALL.values()]


def every_objective(tmp_path, *worlds):
    """The steps' losses and the last checkpoint of each objective in each world: (processes, words after OUT)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--master-port=0"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    runs = []
    for number, (processes, *words) in enumerate(worlds):
        launch = [*launcher, f"--nproc-per-node={processes}"] if processes > 1 else []
        command = [sys.executable, *launch, str(ROOT / "tests" / "every_objective.py"), str(tmp_path / str(number))]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        runs.append(subprocess.Popen([*command, *words], env=environment, **pipes))
    for process in runs:
        out = process.communicate(timeout=280)[0]
        assert process.returncode == 0, out
    found = []
    for number in range(len(worlds)):
        places = {name: tmp_path / str(number) / name for name in OBJECTIVES}
        states = {name: checkpoint.load(at / "checkpoint_last.pth.tar")["state_dict"] for name, at in places.items()}
        losses = {name: [float(row["loss"]) for row in rows(at / "steps.csv")] for name, at in places.items()}
        found.append((losses, states))
    return found


def test_two_processes_are_one_with_two_splits(tmp_path):
    """Step by step, for every objective, with Shuffling BN; and the running statistics agree as well."""
    (losses, states), (one_losses, one_states) = every_objective(tmp_path, (2, "1"), (1, "2"))
    for name in OBJECTIVES:
        assert len(losses[name]) == 10
        assert losses[name] == pytest.approx(one_losses[name], rel=2e-4), name
        for key, value in states[name].items():
            if value.is_floating_point():
                assert torch.allclose(value, one_states[name][key], rtol=1e-2, atol=1e-3), (name, key)
            else:
                assert torch.equal(value, one_states[name][key]), (name, key)


def test_two_compiled_processes_with_two_splits(tmp_path):
    """A key encoder's parameter that took gradient would end the second step: its gradient is never complete."""
    (losses, _), (one_losses, _) = every_objective(tmp_path, (2, "2", "--compile"), (1, "4", "--no-compile"))
    for name in OBJECTIVES:
        assert len(losses[name]) == 10
        assert losses[name] == pytest.approx(one_losses[name], rel=2e-4), name


@pytest.mark.parametrize(
    "method, features, width, files",
    [("MoCoOut", 16, 16, False), ("MoCoOut", 16, 16, True), ("SupContrast", 32, 128, False)],
    ids=["queue", "queue-files", "none"],
)
def test_no_image_crosses_processes(method, features, width, files, folder, tmp_path):
    """A step's collectives: one gather of keys (features) with labels, and DDP's gradients, overlapped with the
    backward pass; every --print-freq steps one more, of the losses. Of images in files, the key crops, as uint8."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += [str(ROOT / "tests" / "count_traffic.py"), str(tmp_path), method]
    if files:
        data = folder(train=80)
        with Image.open(data / "train/cat/0.png") as image:
            image.resize((13, 14)).save(data / "train/cat/0.png")  # of several sizes: they stay in their files
        words += ["--dataset", "imagefolder", "--per-class", "80", str(data)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    sent = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("sent")]
    sent = [(what, int(size), int(step), int(missing)) for what, size, step, missing in sent]
    saved = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    gradients = 4 * sum(s["momentum_buffer"].numel() for s in saved["optimizer"]["state"].values())
    crops = [each for each in sent if each[0] == "crops"]
    assert [size for _, size, *_ in crops] == [16 * 3 * 8 * 8] * (5 if files else 0)
    sent = [each for each in sent if each[0] != "crops"]
    for step in (1, 2, 3, 4):  # of five: after the last one comes what ends an epoch
        gather, *buckets = [each for each in sent if each[2] == step]
        losses = [buckets.pop()] if step % 2 == 0 else []
        assert gather[:2] == ("gather", features * (4 * width + 8))  # the features and an int64 label of each row
        assert {what for what, *_ in buckets} == {"bucket"} and sum(size for _, size, *_ in buckets) == gradients
        assert [each[:2] for each in losses] == [("reduce", 4 * 3)] * len(losses)  # of two steps, and who is to stop
        if step > 1:  # from the second step on the buckets are in the order of the gradients
            assert len(buckets) > 1 and buckets[0][3] > 0
    *_, last = [each for each in sent if each[2] == 5]
    assert "broadcast" not in {what for what, *_ in sent} and last[0] == "reduce"


def test_schedule_at_each_boundary():
    def rate(moment, warm_up=5, schedule=None):
        return methods.moco_learning_rate(moment, 0.4, 1000, warm_up, schedule)

    assert rate(0) == 0
    assert rate(2.5) == pytest.approx(0.2)
    assert rate(5 - 1e-9) == pytest.approx(0.4) == rate(5)
    assert rate(502.5) == pytest.approx(0.2)
    assert rate(1000 - 1e-6) == pytest.approx(0, abs=1e-9)
    assert rate(300) == pytest.approx(0.2 * (1 + math.cos(math.pi * 295 / 995)))
    for moment, wanted in (
        (2.5, 0.2),
        (5, 0.4),
        (599.99, 0.4),
        (600, 0.04),
        (799.99, 0.04),
        (800, 0.004),
        (999, 0.004),
    ):
        assert rate(moment, schedule=[600, 800]) == pytest.approx(wanted)
    assert rate(0, warm_up=0, schedule=[600, 800]) == 0.4


def test_the_schedule_of_supcontrasts_authors_at_each_boundary():
    """Their epochs count from 1: the cosine of epoch e is at e, and the warm-up of ten epochs ends on that of ten."""
    lowest = 0.5 * 0.1**3

    def rate(moment, warm_up=10):
        return methods.supcon_learning_rate(moment, 0.5, 1000, warm_up)

    def theirs(count):
        return lowest + (0.5 - lowest) * (1 + math.cos(math.pi * count / 1000)) / 2

    assert rate(0) == 0.01
    assert rate(5) == pytest.approx((0.01 + theirs(10)) / 2)
    assert rate(9.98) == pytest.approx(0.01 + 0.998 * (theirs(10) - 0.01))
    assert rate(10 - 1e-12) == pytest.approx(theirs(10)) and theirs(10) < 0.4999
    for ours, count in ((10, 11), (10.99, 11), (11, 12), (499, 500), (998.5, 999), (999, 1000), (999.99, 1000)):
        assert rate(ours) == pytest.approx(theirs(count), rel=1e-12), ours
    assert rate(999) == pytest.approx(lowest)
    assert rate(0, warm_up=0) == rate(0.99, warm_up=0) == pytest.approx(theirs(1))


def end(folder):
    """Weights, queue, optimizer state, and the log without its times."""
    saved = checkpoint.load(folder / "checkpoint_last.pth.tar")
    state = {f"momentum of {i}": s["momentum_buffer"] for i, s in saved["optimizer"]["state"].items()}
    log = [[row["epoch"], row["loss"], row["lr"], row["accuracy"]] for row in rows(folder / "log.csv")]
    return saved["state_dict"] | state, log


def same(first, second):
    assert first[1] == second[1]
    assert set(first[0]) == set(second[0])
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_within_the_epoch_and_resuming_is_exact(number, status, run, tmp_path, monkeypatch):
    words = [TINY_MOCO, "--epochs 3 --output-dir"]
    run("main_moco_out.py", *words, tmp_path / "whole")
    show, seen = Run.show, []

    def interrupt(self, done, **values):
        show(self, done, **values)
        seen.append(done)
        if len(seen) == 8:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "show", interrupt)
    stopped = run("main_moco_out.py", *words, tmp_path / "parts")
    assert stopped.status == status and "--resume auto" in stopped.out
    assert checkpoint.load(tmp_path / "parts" / "checkpoint_last.pth.tar")["step"] == 4
    done = run("main_moco_out.py", *words, tmp_path / "parts", "--resume auto")
    assert done.status == 0, done.err
    same(end(tmp_path / "whole"), end(tmp_path / "parts"))


def test_resuming_on_another_number_of_processes(run, tmp_path):
    """One process with --bn-splits 4 is two processes with --bn-splits 2: here, four chunks against four."""
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --bn-splits 4 --output-dir", tmp_path)
    words = [TINY_MOCO, "--output-dir", tmp_path, "--epochs 2 --resume auto"]
    refused = run("main_moco_out.py", *words, "--bn-splits 2")
    assert refused.status == 2 and "--bn-splits" in refused.err
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=localhost:0", str(ROOT / "main_moco_out.py"), *TINY_MOCO.split()]
    command += ["--output-dir", str(tmp_path / "two"), "--epochs", "2", "--bn-splits", "2"]
    command += ["--resume", str(tmp_path / "checkpoint_last.pth.tar")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    once = run("main_moco_out.py", *words, "--bn-splits 4")
    assert once.status == 0, once.err
    losses = [float(rows(folder / "log.csv")[-1]["loss"]) for folder in (tmp_path, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_precision_and_compile_are_taken(run, tmp_path):
    done = run("main_moco_out.py", TINY_MOCO, "--epochs 1 --precision bf16 --output-dir", tmp_path)
    assert done.status == 0 and "bf16" in done.out
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["state_dict"]["module.queue"].dtype == torch.float32


def test_holdout(run, folder, tmp_path):
    """The last images of each class validate and are not trained on; no validation folder is read."""
    place = folder(train=6)
    whole = datasets.load("imagefolder", place, True)
    train, validation = (datasets.load("imagefolder", place, part, holdout=2) for part in (True, False))
    assert train.paths == whole.paths[:4] + whole.paths[6:10] and train.labels.tolist() == [0] * 4 + [1] * 4
    assert validation.paths == whole.paths[4:6] + whole.paths[10:] and validation.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(torch.cat([train.images, validation.images]).sum(0), whole.images.sum(0))
    words = ["-a resnet20 --image-size 12 --epochs 1 -b 4 --holdout 2 --output-dir", tmp_path, place]
    done = run("main_moco.py", *words, "--moco-k 8 --knn-freq 1")
    assert done.status == 0 and "kNN" in done.out
    done = run("main_lincls.py", *words, "--pretrained", tmp_path / "checkpoint_last.pth.tar")
    assert done.status == 0 and "8 images" in done.out and "result: top1=" in done.out


def test_the_seed_is_drawn_shown_and_kept(run, tmp_path):
    words = TINY_MOCO.replace("--seed 0", "")
    done = run("main_moco_out.py", words, "--epochs 1 --output-dir", tmp_path)
    seed = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"]
    assert f"--seed {seed}" in done.out
    run("main_moco_out.py", words, "--epochs 2 --resume auto --output-dir", tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["options"]["seed"] == seed
