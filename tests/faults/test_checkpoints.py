"""Checkpoints that are corrupt or do not match the run, and runs that diverge."""

import math
import pickle

import pytest
import torch

from helpers import SHORT, TINY, TINY_MOCO, refused
from moco import checkpoint
from processes import free_port, start


def test_resuming_on_other_data(run, folder, tmp_path):
    pets, birds = folder("pets", train=6, val=3), folder("birds", train=6, val=3, classes=("ant", "bee"))
    args = [SHORT, "--output-dir", tmp_path / "out"]
    run("main_moco_in.py", *args, pets)
    more = [*args, "--epochs 2 --resume auto"]
    refused(run("main_moco_in.py", *more, birds), 2, "other classes", "'cat'", "'bee'")
    linear = ["-b 4 --epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "out/checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear, birds).status == 0  # a new classifier, so any classes will do
    refused(run("main_lincls.py", *linear, "--epochs 2 --resume auto", pets), 2, "other classes")
    fewer = run("main_moco_in.py", *more, folder("few", train=4))
    assert fewer.status == 0 and "note: the training images were 12 and are now 8" in fewer.out
    saved = checkpoint.load(tmp_path / "out/checkpoint_last.pth.tar")
    torch.save({**saved, "step": 2}, tmp_path / "mid-epoch.pth.tar")
    mid_epoch = run("main_moco_in.py", *args, "--epochs 9 --resume", tmp_path / "mid-epoch.pth.tar", pets)
    refused(mid_epoch, 2, "within an epoch of 8 images", "has 12")


def test_checkpoints(run, tmp_path):
    """Corrupt files, tensors that do not fit, and options that differ from the run that is resumed."""
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    good = tmp_path / "checkpoint_last.pth.tar"
    saved_bytes = good.read_bytes()
    saved = torch.load(good, weights_only=True)
    bad = tmp_path / "bad.pth.tar"
    linear = [TINY, "--epochs 1 --output-dir", tmp_path / "out", "--pretrained", bad]
    resume = [TINY_MOCO, "--epochs 2 --output-dir", tmp_path / "out", "--resume", bad]

    def both_refuse(status, *messages):
        refused(run("main_lincls.py", *linear), status, *messages)
        refused(run("main_moco_out.py", *resume), status, *messages)

    for content in (saved_bytes[: len(saved_bytes) // 2], saved_bytes[:100], b"", b"not a checkpoint", bytes(1000)):
        bad.write_bytes(content)
        both_refuse(1, bad)
    odd = torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.float8_e4m3fn)
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
        both_refuse(1, bad)
    bad.unlink()
    bad.mkdir()
    both_refuse(2, "not a file")
    bad.rmdir()
    changed = {**saved, "state_dict": dict(saved["state_dict"])}
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.full((16, 3, 3, 3), torch.nan)
    torch.save(changed, bad)
    both_refuse(1, "not finite", "conv1.weight")
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.zeros(16, 4, 3, 3)
    torch.save(changed, bad)
    both_refuse(1, "size mismatch", "conv1.weight", "[16, 4, 3, 3]", "[16, 3, 3, 3]")
    del changed["state_dict"]["module.encoder_q.conv1.weight"], changed["state_dict"]["module.encoder_q.bn1.weight"]
    torch.save(changed, bad)
    refused(run("main_moco_out.py", *resume), 1, "Missing key", "encoder_q.conv1.weight")
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    torch.save({**saved, "state_dict": {"module.conv1.weight": torch.zeros(())}}, bad)
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    for wrong in (
        dict(mean=0.5),
        dict(std=[1.0]),
        dict(std=[1, 0, 1]),
        dict(mean=[0, 0], std=[1, 1, 1, 1]),
        dict(image_size=(8, 8)),
        dict(image_size=math.inf),
    ):
        torch.save({**saved, "options": saved["options"] | wrong}, bad)
        refused(run("main_lincls.py", *linear), 1, "image_size", "mean", "std")
    torch.save({**saved, "arch": "resnet18"}, bad)
    both_refuse(2, "resnet18", "resnet20")
    torch.save({**saved, "optimizer": {}}, bad)
    refused(run("main_moco_out.py", *resume), 1, "cannot be resumed")
    assert not list((tmp_path / "out").rglob("*.pth.tar*"))

    resume[-1] = good
    for args, message in (("--moco-k 81", "--moco-k 80"), ("-b 16", "--batch-size 32"), ("--moco-t 0.3", "--moco-t")):
        refused(run("main_moco_out.py", *resume, args), 2, message, "this run has")
    refused(run("main_moco_in.py", *resume), 2, "MoCoOut", "MoCoIn")
    announced = run("main_moco_out.py", *resume, "--lr 0.01 --wd 0.5")
    assert announced.status == 0 and "--lr was 0.03 and is now 0.01" in announced.out
    resumed = checkpoint.load(tmp_path / "out/checkpoint_last.pth.tar")
    assert resumed["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    refused(run("main_lincls.py", TINY, "--epochs 1"), 2, "--pretrained")
    refused(run("main_lincls.py", TINY, "-e --pretrained", good), 2, "--resume")
    refused(run("main_lincls.py", TINY, "--resume", good), 1, "--pretrained")


class CreatesFile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_with_code_in_it_is_not_opened(run, tmp_path):
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        bad, created = tmp_path / "bad.pth.tar", tmp_path / "created"
        save({"state_dict": {}, "arch": CreatesFile(str(created))}, bad)
        refused(run("main_lincls.py", TINY, "--pretrained", bad), 1, bad)
        assert not created.exists()


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    args = [TINY_MOCO.replace("--cos", ""), "--warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *args, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    done = run("main_moco_out.py", *args, "--epochs 3 --lr 1e30 --resume auto")
    refused(done, 1, "epoch 1, step", "not finite")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    """One step per epoch: its loss is finite, but the weights after its update are not."""
    args = [TINY_MOCO.replace("--cos", ""), "-b 160 --warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *args, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    refused(run("main_moco_out.py", *args, "--epochs 2 --lr 1e38 --wd 1e3 --resume auto"), 1, "not finite", "--lr")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


@pytest.mark.parametrize(
    "script, last", [("main_moco.py", "checkpoint_last.pth.tar"), ("main_lincls.py", "linear_last.pth.tar")]
)
def test_only_one_of_two_machines_finds_the_checkpoint(script, last, tmp_path):
    """Otherwise one machine would resume while the other starts from scratch."""
    args = f"{TINY} --resume auto --world-size 2 --dist-url tcp://localhost:{free_port()} --output-dir"
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "1" / last).touch()
    runs = [start(script, args, tmp_path / str(rank), f"--rank {rank}") for rank in (0, 1)]
    out = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2] and "only some nodes find a checkpoint" in out[0], out
