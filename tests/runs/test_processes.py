"""The number of processes does not change the result, and no image in memory is sent to another process."""

import json
import re

import pytest
import torch
from PIL import Image

from helpers import NEEDS_COMPILER, README, TINY, TINY_MOCO, columns, interrupt, python_blocks, refused, rows
from moco import checkpoint, methods
from processes import free_port, run_processes, start

OBJECTIVES = [method.model.__name__ for method in methods.ALL.values()]


@pytest.mark.parametrize("script, options", [("main_supcon.py", TINY), ("main_moco_proto.py", TINY_MOCO)])
def test_two_processes_are_one_with_two_splits_for_unlabelled_images(script, options, run, tmp_path):
    """An unlabelled image's only positive is its other view. All means agree, though processes have more or fewer positives."""
    args = [options, "--epochs 2 --lr 0.02 --labels-per-class 4 --output-dir"]
    assert run(script, *args, tmp_path / "one", "--bn-splits 2").status == 0
    done = run_processes(script, *args, tmp_path / "two")
    assert done.returncode == 0, done.out
    one, two = rows(tmp_path / "one/log.csv"), rows(tmp_path / "two/log.csv")
    for column in ("loss", "positives", "positive_similarity", "negative_similarity"):
        assert [float(row[column]) for row in one] == pytest.approx([float(row[column]) for row in two], rel=1e-4), (
            column
        )


def test_the_example_does_not_depend_on_the_number_of_processes(tmp_path):
    """The README's custom objective. Few images have a label, so the processes have different numbers of queries with a positive."""
    (example,) = [block for block in python_blocks(README) if re.match(r"# main_\w+\.py\n", block)]
    assert len(example.splitlines()) < 20
    script = tmp_path / "main_variant.py"
    script.write_text(example)
    args = [TINY, "--epochs 1 --moco-k 40 --moco-dim 8 --labels-per-class 8"]
    losses = []
    for processes, splits in ((1, 2), (2, 1)):
        out = tmp_path / str(splits)
        done = run_processes(script, *args, f"--bn-splits {splits} --output-dir", out, processes=processes)
        assert done.returncode == 0 and "QueueOnly" in done.out, done.out
        losses.append(float(rows(out / "log.csv")[-1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def every_objective(folder, processes, splits, *more):
    """(losses of all steps, weights at the end) by objective."""
    program = ["tests/subprocesses/every_objective.py", folder, splits, *more]
    done = run_processes(*program, processes=processes)
    assert done.returncode == 0, done.out
    return found(folder)


def found(folder):
    names = sorted(path.name for path in folder.iterdir())
    losses = {name: json.loads((folder / name / "losses.json").read_text()) for name in names}
    states = {name: checkpoint.load(folder / name / "checkpoint_last.pth.tar")["state_dict"] for name in names}
    return losses, states


def test_losses_do_not_depend_on_processes_or_nodes(tmp_path):
    """Eight processes; four with two chunks each; two nodes with four chunks each; one process with eight chunks.

    The network is a small one: test_two_processes_are_one_with_two_splits has resnet20.
    """
    worlds = [every_objective(tmp_path / str(p), p, 8 // p, "--no-compile")[0] for p in (8, 4, 1)]
    nodes = ["tests/subprocesses/every_objective.py", tmp_path / "nodes", 4, "--no-compile --world-size 2"]
    nodes.append(f"--dist-url tcp://localhost:{free_port()} --rank")
    for run in [start(*nodes, rank) for rank in (0, 1)]:
        out = run.communicate(timeout=280)[0]
        assert run.returncode == 0, out
    worlds.append(found(tmp_path / "nodes")[0])
    for name in [method.model.__name__ for method in methods.ALL.values() if not method.labels_only]:
        for losses in worlds:
            assert len(losses[name]) == 10 and losses[name] == pytest.approx(worlds[0][name], rel=2e-4), name


def test_two_processes_are_one_with_two_splits(tmp_path):
    """For every objective, with Shuffling BN, the losses of all steps agree, and so do weights and running statistics."""
    losses, states = every_objective(tmp_path / "two", 2, 1)
    one_losses, one_states = every_objective(tmp_path / "one", 1, 2)
    for name in OBJECTIVES:
        assert len(losses[name]) == 10
        assert losses[name] == pytest.approx(one_losses[name], rel=2e-4), name
        for key, value in states[name].items():
            if value.is_floating_point():
                assert torch.allclose(value, one_states[name][key], rtol=1e-2, atol=1e-3), (name, key)
            else:
                assert torch.equal(value, one_states[name][key]), (name, key)


@NEEDS_COMPILER
def test_two_compiled_processes_with_two_splits(tmp_path):
    """Compiling must not make the key encoder's parameters require gradients: DistributedDataParallel would fail in step 2."""
    losses, _ = every_objective(tmp_path / "two", 2, 2, "--compile")
    one_losses, _ = every_objective(tmp_path / "one", 1, 4, "--no-compile")
    assert losses.keys() == {"MoCoOut", "SupContrast"}
    for name in losses:
        assert len(losses[name]) == 10
        assert losses[name] == pytest.approx(one_losses[name], rel=2e-4), name


@pytest.mark.parametrize(
    "method, features, width, files",
    [("MoCoOut", 16, 16, False), ("MoCoOut", 16, 16, True), ("SupContrast", 32, 128, False)],
    ids=["queue", "queue-files", "none"],
)
def test_no_image_crosses_processes(method, features, width, files, folder, tmp_path):
    """The collectives of a step and their bytes.

    A step has one all-gather, of keys (or features) with labels, and DistributedDataParallel's all-reduce of gradients,
    which overlaps the backward pass. Every --print-freq steps there is one more, of the losses. If images are in
    files, an all-to-all sends key crops as uint8.
    """
    args = []
    if files:
        data = folder(train=80)
        with Image.open(data / "train/cat/0.png") as image:
            image.resize((13, 14)).save(data / "train/cat/0.png")  # images of several sizes stay in their files
        args = ["--dataset imagefolder --per-class 80", data]
    done = run_processes("tests/subprocesses/count_traffic.py", tmp_path, method, *args)
    assert done.returncode == 0, done.out
    sent = [line.split()[1:] for line in done.out.splitlines() if line.startswith("sent")]
    sent = [(what, int(size), int(step), int(missing)) for what, size, step, missing in sent]
    saved = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    gradients = 4 * sum(s["momentum_buffer"].numel() for s in saved["optimizer"]["state"].values())
    crops = [each for each in sent if each[0] == "crops"]
    assert [size for _, size, *_ in crops] == [16 * 3 * 8 * 8] * (5 if files else 0)
    sent = [each for each in sent if each[0] != "crops"]
    for step in (1, 2, 3, 4):  # not the fifth and last step: the collectives at the end of the epoch follow it
        gather, *buckets = [each for each in sent if each[2] == step]
        losses = [buckets.pop()] if step % 2 == 0 else []
        assert gather[:2] == ("gather", features * (4 * width + 8))  # float32 features and an int64 label per row
        assert {what for what, *_ in buckets} == {"bucket"} and sum(size for _, size, *_ in buckets) == gradients
        # Whether it is time to save, whether each of three signals came, and two losses.
        assert [each[:2] for each in losses] == [("reduce", 4 * 6)] * len(losses)
        if step > 1:  # after the first step, DistributedDataParallel orders its buckets as the gradients arrive
            assert len(buckets) > 1 and buckets[0][3] > 0
    *_, last = [each for each in sent if each[2] == 5]
    assert "broadcast" not in {what for what, _, step, _ in sent if step} and last[0] == "reduce"


def test_resuming_on_another_number_of_processes(run, tmp_path, monkeypatch):
    """One process with --bn-splits 4, stopped within an epoch, continues as two processes with --bn-splits 2."""
    args = [TINY_MOCO, "--epochs 2 --output-dir"]
    interrupt(monkeypatch, 7)
    assert run("main_moco_out.py", *args, tmp_path, "--bn-splits 4").status == 143
    refused(run("main_moco_out.py", *args, tmp_path, "--resume auto --bn-splits 2"), 2, "--bn-splits")
    resume = ["--resume", tmp_path / "checkpoint_last.pth.tar"]
    done = run_processes("main_moco_out.py", *args, tmp_path / "two", "--bn-splits 2", *resume)
    assert done.returncode == 0, done.out
    one = run("main_moco_out.py", *args, tmp_path, "--resume auto --bn-splits 4")
    assert one.status == 0, one.err
    for name in ("loss", "positives", "positive_similarity"):
        first, second = (float(rows(folder / "log.csv")[-1][name]) for folder in (tmp_path, tmp_path / "two"))
        assert first == pytest.approx(second, rel=1e-4), name


def test_the_linear_evaluation_does_not_depend_on_the_number_of_processes(run, tmp_path):
    """The last of five batches has 22 images, which four processes cannot share equally."""
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path).status == 0
    args = [TINY, "--per-class 15 --lr 1 --epochs 2 --pretrained", tmp_path / "checkpoint_last.pth.tar", "--output-dir"]
    assert run("main_lincls.py", *args, tmp_path / "one").status == 0
    done = run_processes("main_lincls.py", *args, tmp_path / "four", processes=4)
    assert done.returncode == 0, done.out
    for name, tolerance in (("loss", 1e-3), ("top1", 0.6), ("top5", 0.6)):
        one, four = ([float(x) for (x,) in columns(tmp_path / p / "linear.csv", name)] for p in ("one", "four"))
        assert four == pytest.approx(one, abs=tolerance), name
    one, four = (checkpoint.load(tmp_path / p / "linear_last.pth.tar")["state_dict"] for p in ("one", "four"))
    assert torch.allclose(one["module.fc.weight"], four["module.fc.weight"], rtol=1e-2, atol=1e-3)
