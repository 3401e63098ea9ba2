"""On a GPU: the same numbers as on a CPU, and training steps that do not synchronise. These tests run only by name:

python -m pytest tests/test_gpu.py
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

from helpers import EVERY_SCRIPT, MEAN, STD, TINY, TINY_MOCO, images, printed_losses, rows
from moco import augment, datasets, encoders, pretrain
from moco.batches import Centres
from processes import ROOT, split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and pytest tests/test_gpu.py")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", [augment.AUG_PLUS, augment.PLAIN], ids=["aug_plus", "plain"])
def test_views_agree_with_the_cpus(recipe, compiled):
    x, rng = images(120, 40, 36), torch.Generator().manual_seed(1)
    parameters, order = recipe.draw(120, 40, 36, rng), recipe.draw_order(rng)
    on_cpu = augment.Views(recipe, MEAN, STD, "cpu")(x, parameters, order)
    on_gpu = augment.Views(recipe, MEAN, STD, "cuda", compile=compiled)(x.cuda(), parameters.cuda(), order)
    assert on_gpu.is_contiguous(memory_format=torch.channels_last)
    difference = (on_gpu.cpu() - on_cpu).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Contrast rounds the image's mean to an integer, and a GPU's sum may round to the next one.
    assert difference.mean() < 0.02 and difference.max() < 1


@pytest.mark.parametrize(("script", "args"), EVERY_SCRIPT, ids=[script for script, _ in EVERY_SCRIPT])
def test_losses_agree_with_the_cpus(script, args, run, tmp_path):
    args = [args, "--epochs 1 --lr 0.01 --output-dir", tmp_path]  # a high lr would amplify rounding errors
    command = [sys.executable, str(ROOT / script), *split(args)]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    on_cpu = subprocess.run(command, env=no_gpu, capture_output=True, text=True, timeout=300)
    assert on_cpu.returncode == 0 and "(cpu, fp32)" in on_cpu.stdout, on_cpu.stderr
    for precision, tolerance in (("fp32", 0.02), ("bf16", 0.1)):
        on_gpu = run(script, *args, f"--precision {precision}")
        assert on_gpu.status == 0 and f"(cuda, {precision})" in on_gpu.out, on_gpu.err
        assert printed_losses(on_gpu.out) == pytest.approx(printed_losses(on_cpu.stdout), abs=tolerance)


@pytest.mark.parametrize(("script", "args"), EVERY_SCRIPT, ids=[script for script, _ in EVERY_SCRIPT])
def test_no_step_synchronises_with_the_gpu(script, args, run, tmp_path, monkeypatch):
    """Except the first step of an epoch, which copies its indices to the GPU, and the last one, which prints the loss."""
    steps = []

    def set_sync_debug_mode(optimizer, lr):  # the loop sets the learning rate at the start of each step
        torch.cuda.set_sync_debug_mode("error" if 0 < len(steps) < 4 else "default")
        steps.append(len(steps))
        set_learning_rate(optimizer, lr)

    set_learning_rate = pretrain.set_learning_rate
    monkeypatch.setattr(pretrain, "set_learning_rate", set_sync_debug_mode)
    monkeypatch.setattr(pretrain, "HEALTH_EVERY", 1)
    splits = "--bn-splits 2" if args == TINY_MOCO else ""
    try:
        done = run(script, args, splits, "-p 100 --epochs 1 --output-dir", tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.status == 0 and steps == list(range(5)), done.err


def test_no_batch_of_an_evaluation_synchronises_with_the_gpu():
    split = datasets.load("digits", None, False, device="cuda")
    batches = Centres(split, augment.Centre(16, MEAN, STD), 64, torch.device("cuda"))
    expected = [labels for _, labels in batches]  # the first time, constants are copied to the GPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = [labels for _, labels in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat(labels), torch.cat(expected)) and len(torch.cat(labels)) == 360


def test_compiled_batch_norm_of_chunks_agrees_with_eager():
    torch.manual_seed(0)
    eager = encoders.build("resnet20")(num_classes=5).to("cuda", memory_format=torch.channels_last)
    encoders.split_batch_norm(eager, 2)
    compiled = copy.deepcopy(eager)
    compiled.compile()
    x = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    results = []
    for network in (eager, compiled):
        features = network(x)
        features.square().sum().backward()
        results.append([features, network.conv1.weight.grad, network.bn1.weight.grad, network.bn1.running_var])
    for mine, wanted in zip(*results, strict=True):
        assert (mine - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(("script", "args"), [("main_moco_in.py", TINY_MOCO), ("main_supcon.py", TINY)])
def test_compiled_encoders_replay_cuda_graphs(script, args, run, tmp_path, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    losses = []
    torch._dynamo.reset()  # a second batch size in one process would make a program for any size
    for compiled in ("", "--compile"):
        done = run(
            script, args, compiled, "--precision fp32 --epochs 2 --lr 0.01 --output-dir", tmp_path / f"run{compiled}"
        )
        assert done.status == 0, done.err
        losses.append(printed_losses(done.out))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    # Of ten steps, the first ones warm up and record. A step is two or three passes: keys, queries, and back.
    assert len(replays) >= 8 * (3 if "moco" in script else 2)


def test_a_compiled_run_is_resumed_and_evaluated(run, tmp_path):
    args = [TINY_MOCO, "--compile --bn-splits 2 --knn-freq 1"]
    args += ["--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:10023"]
    for name, lengths in (("whole", [2]), ("parts", [1, 2])):
        for epochs in lengths:
            # The first epoch is the warm-up, so its learning rates do not depend on the number of epochs.
            done = run("main_moco_in.py", *args, f"--epochs {epochs} --resume auto --output-dir", tmp_path / name)
            assert done.status == 0 and "compiled" in done.out, done.err
    whole, parts = (rows(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts] == ["0", "1"] and all(row["knn"] for row in whole + parts)
    assert float(parts[0]["loss"]) == pytest.approx(float(whole[0]["loss"]), abs=0.05)
    source = ["--pretrained", tmp_path / "whole" / "checkpoint_last.pth.tar", "--output-dir", tmp_path]
    done = run("main_lincls.py", TINY, "--compile --lr 1 --epochs 2", *source)
    assert done.status == 0 and "result: top1=" in done.out, done.err
