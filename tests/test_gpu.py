"""On a GPU: the CPU's numbers, and steps that the host does not wait for. They are run by name:

python -m pytest tests/test_gpu.py
"""

import copy
import os
import subprocess
import sys

import pytest
import torch

from helpers import MEAN, ROOT, SCRIPTS, STD, TINY, TINY_MOCO, images, printed_losses, rows
from moco import augment, encoders, pretrain

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and its name: pytest tests/test_gpu.py"
)


EVERY_SCRIPT = [(script, TINY_MOCO) for script in SCRIPTS] + [("main_supcon.py", TINY), ("main_ce.py", TINY)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", [augment.AUG_PLUS, augment.PLAIN], ids=["aug_plus", "plain"])
def test_views_are_the_cpus(recipe, compiled):
    x, rng = images(120, 40, 36), torch.Generator().manual_seed(1)
    parameters, order = recipe.draw(120, 40, 36, rng), recipe.draw_order(rng)
    there = augment.Views(recipe, MEAN, STD, "cpu")(x, parameters, order)
    here = augment.Views(recipe, MEAN, STD, "cuda", compile=compiled)(x.cuda(), parameters.cuda(), order)
    assert here.is_contiguous(memory_format=torch.channels_last)
    difference = (here.cpu() - there).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # The contrast's mean is rounded to whole numbers: sums in another order may fall on the other side.
    assert difference.mean() < 0.02 and difference.max() < 1


@pytest.mark.parametrize(("script", "words"), EVERY_SCRIPT, ids=[script for script, _ in EVERY_SCRIPT])
def test_losses_are_the_cpus(script, words, run, tmp_path):
    words += f" --epochs 1 --lr 0.01 --output-dir {tmp_path}"  # a high lr would enlarge the smallest difference
    command = [sys.executable, str(ROOT / script), *words.split()]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    there = subprocess.run(command, env=no_gpu, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0 and "(cpu, fp32)" in there.stdout, there.stderr
    for precision, tolerance in (("fp32", 0.02), ("bf16", 0.1)):
        here = run(script, words, f"--precision {precision}")
        assert here.status == 0 and f"(cuda, {precision})" in here.out, here.err
        assert printed_losses(here.out) == pytest.approx(printed_losses(there.stdout), abs=tolerance)


@pytest.mark.parametrize(("script", "words"), EVERY_SCRIPT, ids=[script for script, _ in EVERY_SCRIPT])
def test_no_step_waits_for_the_gpu(script, words, run, tmp_path, monkeypatch):
    """Between the first step of an epoch, which takes its indices to the GPU, and the last one, which shows the loss."""
    seen = []

    def watched(optimizer, lr):  # the loop sets it at the start of each step
        torch.cuda.set_sync_debug_mode("error" if 0 < len(seen) < 4 else "default")
        seen.append(len(seen))
        set_learning_rate(optimizer, lr)

    set_learning_rate = pretrain.set_learning_rate
    monkeypatch.setattr(pretrain, "set_learning_rate", watched)
    monkeypatch.setattr(pretrain, "HEALTH_EVERY", 1)
    splits = "--bn-splits 2" if words == TINY_MOCO else ""
    try:
        done = run(script, words, splits, "-p 100 --epochs 1 --output-dir", tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.status == 0 and seen == list(range(5)), done.err


def test_compiled_batch_norm_of_chunks_is_the_eager_one():
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


def test_a_compiled_run_goes_on_and_is_evaluated(run, tmp_path):
    words = [TINY_MOCO, "--compile --bn-splits 2 --knn-freq 1"]
    words += ["--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:10023"]
    for name, lengths in (("whole", [2]), ("parts", [1, 2])):
        for epochs in lengths:
            # The warm-up takes the first epoch: its schedule does not depend on how many follow.
            done = run("main_moco_in.py", *words, f"--epochs {epochs} --resume auto --output-dir", tmp_path / name)
            assert done.status == 0 and "compiled" in done.out, done.err
    whole, parts = (rows(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts] == ["0", "1"] and all(row["knn"] for row in whole + parts)
    assert float(parts[0]["loss"]) == pytest.approx(float(whole[0]["loss"]), abs=0.05)
    source = ["--pretrained", tmp_path / "whole" / "checkpoint_last.pth.tar", "--output-dir", tmp_path]
    done = run("main_lincls.py", TINY, "--compile --lr 1 --epochs 2", *source)
    assert done.status == 0 and "result: top1=" in done.out, done.err
