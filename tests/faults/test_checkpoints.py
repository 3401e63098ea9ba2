"""Checkpoints that are damaged or do not fit the run, and losses that must not be saved."""

import os
import pickle

import pytest
import torch

from helpers import SHORT, TINY, TINY_MOCO, free_port, refused, start
from moco import checkpoint


def test_resuming_on_other_data(run, folder, tmp_path):
    pets, birds = folder("pets", train=6, val=3), folder("birds", train=6, val=3, classes=("ant", "bee"))
    words = [SHORT, "--output-dir", tmp_path / "out"]
    run("main_moco_in.py", *words, pets)
    more = [*words, "--epochs 2 --resume auto"]
    refused(run("main_moco_in.py", *more, birds), 2, "other classes", "'cat'", "'bee'")
    linear = ["-b 4 --epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "out/checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear, birds).status == 0  # features are evaluated on any classes
    refused(run("main_lincls.py", *linear, "--epochs 2 --resume auto", pets), 2, "other classes")
    fewer = run("main_moco_in.py", *more, folder("few", train=4))
    assert fewer.status == 0 and "note: the training images were 12 and are now 8" in fewer.out
    saved = checkpoint.load(tmp_path / "out/checkpoint_last.pth.tar")
    torch.save({**saved, "step": 2}, tmp_path / "within.pth.tar")
    within = run("main_moco_in.py", *words, "--epochs 9 --resume", tmp_path / "within.pth.tar", pets)
    refused(within, 2, "within an epoch of 8 images", "has 12")


def test_checkpoints(run, tmp_path):
    run("main_moco_out.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    good = tmp_path / "checkpoint_last.pth.tar"
    whole = good.read_bytes()
    saved = torch.load(good, weights_only=True)
    bad = tmp_path / "bad.pth.tar"
    linear = [TINY, "--epochs 1 --output-dir", tmp_path / "out", "--pretrained", bad]
    resume = [TINY_MOCO, "--epochs 2 --output-dir", tmp_path / "out", "--resume", bad]

    def both(status, *says):
        refused(run("main_lincls.py", *linear), status, *says)
        refused(run("main_moco_out.py", *resume), status, *says)

    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint", bytes(1000)):
        bad.write_bytes(content)
        both(1, bad)
    odd = torch.eye(3).to_sparse(), torch.zeros(3, device="meta")
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
        both(1, bad)
    bad.unlink()
    bad.mkdir()
    both(2, "not a file")
    bad.rmdir()
    changed = {**saved, "state_dict": dict(saved["state_dict"])}
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.full((16, 3, 3, 3), torch.nan)
    torch.save(changed, bad)
    both(1, "not finite", "conv1.weight")
    changed["state_dict"]["module.encoder_q.conv1.weight"] = torch.zeros(16, 4, 3, 3)
    torch.save(changed, bad)
    both(1, "conv1.weight is (16, 4, 3, 3) in the checkpoint, (16, 3, 3, 3) in this")
    del changed["state_dict"]["module.encoder_q.conv1.weight"], changed["state_dict"]["module.encoder_q.bn1.weight"]
    torch.save(changed, bad)
    refused(run("main_moco_out.py", *resume), 1, "encoder_q.conv1.weight is missing")
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    torch.save({**saved, "state_dict": {"module.conv1.weight": torch.zeros(())}}, bad)
    refused(run("main_lincls.py", *linear), 1, "contains no ResNet")
    torch.save({**saved, "arch": "resnet18"}, bad)
    both(2, "resnet18", "resnet20")
    torch.save({**saved, "optimizer": {}}, bad)
    refused(run("main_moco_out.py", *resume), 1, "cannot be resumed")
    assert not list((tmp_path / "out").rglob("*.pth.tar*"))

    resume[-1] = good
    for words, says in (("--moco-k 81", "--moco-k 80"), ("-b 16", "--batch-size 32"), ("--moco-t 0.3", "--moco-t")):
        refused(run("main_moco_out.py", *resume, words), 2, says, "this run has")
    refused(run("main_moco_in.py", *resume), 2, "MoCoOut", "MoCoIn")
    announced = run("main_moco_out.py", *resume, "--lr 0.01")
    assert announced.status == 0 and "--lr was 0.03 and is now 0.01" in announced.out
    refused(run("main_lincls.py", TINY, "--epochs 1"), 2, "--pretrained")
    refused(run("main_lincls.py", TINY, "-e --pretrained", good), 2, "--resume")
    refused(run("main_lincls.py", TINY, "--resume", good), 1, "--pretrained")


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_with_code_in_it_is_not_opened(run, tmp_path):
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        bad, witness = tmp_path / "bad.pth.tar", tmp_path / "witness"
        save({"state_dict": {}, "arch": Malice(str(witness))}, bad)
        refused(run("main_lincls.py", TINY, "--pretrained", bad), 1, bad)
        assert not witness.exists()


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    words = [TINY_MOCO.replace("--cos", ""), "--warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *words, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    done = run("main_moco_out.py", *words, "--epochs 3 --lr 1e30 --resume auto")
    refused(done, 1, "epoch 1, step", "not finite")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_weights_that_the_last_update_spoilt_are_not_saved(run, tmp_path):
    """One step an epoch: its loss is finite, what it leaves is not."""
    words = [TINY_MOCO.replace("--cos", ""), "-b 160 --warm-up 0 --output-dir", tmp_path]
    run("main_moco_out.py", *words, "--epochs 1")
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    refused(run("main_moco_out.py", *words, "--epochs 2 --lr 1e38 --wd 1e3 --resume auto"), 1, "not finite", "--lr")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


@pytest.mark.parametrize(
    "script, last", [("main_moco.py", "checkpoint_last.pth.tar"), ("main_lincls.py", "linear_last.pth.tar")]
)
def test_only_one_of_two_machines_finds_the_checkpoint(script, last, tmp_path):
    """It would resume while the other one starts anew."""
    words = f"{TINY} --resume auto --world-size 2 --dist-url tcp://localhost:{free_port()} --output-dir".split()
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "1" / last).touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [start(script, *words, str(tmp_path / str(r)), "--rank", str(r), env=environment) for r in (0, 1)]
    out = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2] and "only some machines find a checkpoint" in out[0], out
