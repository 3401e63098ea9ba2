"""The number of processes does not change the result, and no image crosses them."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from helpers import README, ROOT, TINY, TINY_MOCO, TWO_PROCESSES, rows
from moco import checkpoint, methods
from moco.run import read_log


def test_two_processes_and_two_chunks_are_the_same(run, tmp_path):
    """Each process counts its own images from 0: the other view must not be looked for on another process."""
    script, words = (
        "main_supcon.py",
        [*TINY.split(), "--epochs", "2", "--lr", "0.02", "--labels-per-class", "4", "--output-dir"],
    )
    assert run(script, *words, tmp_path / "one", "--bn-splits 2").status == 0
    command = [*TWO_PROCESSES, str(ROOT / script), *words, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one/log.csv"), rows(tmp_path / "two/log.csv")
    for column in ("loss", "positives"):
        one_s, two_s = ([float(row[column]) for row in rows] for rows in (one, two))
        assert one_s == pytest.approx(two_s, rel=1e-4), column


def test_losses_do_not_depend_on_how_processes_and_nodes_are_cut(tmp_path):
    """Eight processes, four of two chunks, two nodes of four chunks and one process of eight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/subprocesses/worlds.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    losses = {(world, method): values for world, method, values in lines}
    worlds, methods = {world for world, _ in losses}, {method for _, method in losses}
    assert len(worlds) == 4 and len(methods) == 6 and len(losses) == 24
    for (world, method), values in losses.items():
        assert len(values) == 3
        assert values == pytest.approx(losses["alone 1", method], rel=2e-4), (world, method)


def test_the_example_does_not_depend_on_the_number_of_processes(tmp_path):
    """Few images have a label, so few queries have a positive, and not as many on each process."""
    script = tmp_path / "main_variant.py"
    script.write_text(re.search(r"```python\n(# main_\w+\.py\n.*?)```", README, re.S)[1])
    words = [*TINY.split(), "--epochs", "1", "--moco-k", "40", "--moco-dim", "8", "--labels-per-class", "8"]
    losses = []
    for launch, splits in (([sys.executable], "2"), (TWO_PROCESSES, "1")):
        out = tmp_path / splits
        command = [*launch, str(script), *words, "--bn-splits", splits, "--output-dir", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        losses.append(float(read_log(out / "log.csv")[-1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


OBJECTIVES = [method.model.__name__ for method in methods.ALL.values()]


def every_objective(tmp_path, *worlds):
    """The steps' losses and the last checkpoint of each objective in each world: (processes, words after OUT)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for number, (processes, *words) in enumerate(worlds):
        launch = TWO_PROCESSES if processes == 2 else [sys.executable]
        command = [*launch, str(ROOT / "tests/subprocesses/every_objective.py"), str(tmp_path / str(number))]
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*TWO_PROCESSES, str(ROOT / "tests/subprocesses/count_traffic.py"), str(tmp_path), method]
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


def test_resuming_on_another_number_of_processes(run, tmp_path):
    """One process with --bn-splits 4 is two processes with --bn-splits 2: here, four chunks against four."""
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --bn-splits 4 --output-dir", tmp_path)
    words = [TINY_MOCO, "--output-dir", tmp_path, "--epochs 2 --resume auto"]
    refused = run("main_moco_out.py", *words, "--bn-splits 2")
    assert refused.status == 2 and "--bn-splits" in refused.err
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TWO_PROCESSES, str(ROOT / "main_moco_out.py"), *TINY_MOCO.split()]
    command += ["--output-dir", str(tmp_path / "two"), "--epochs", "2", "--bn-splits", "2"]
    command += ["--resume", str(tmp_path / "checkpoint_last.pth.tar")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    once = run("main_moco_out.py", *words, "--bn-splits 4")
    assert once.status == 0, once.err
    losses = [float(rows(folder / "log.csv")[-1]["loss"]) for folder in (tmp_path, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
