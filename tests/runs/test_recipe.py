"""Runs with prototypes (main_moco_proto.py) and with an average of the weights (--ema)."""

import torch

import moco
from helpers import TINY_MOCO, columns, equal_tensors, interrupt
from moco import checkpoint


def test_prototypes_train_resume_and_are_evaluated(run, tmp_path, monkeypatch):
    args = [TINY_MOCO, "--lr 0.1 --epochs 3 --knn-freq 1 --ema 0.9 --nesterov --no-bias-decay --bn-splits 2"]
    assert run("main_moco_proto.py", *args, "--output-dir", tmp_path / "whole").status == 0
    interrupt(monkeypatch, 8)
    args += ["--output-dir", tmp_path / "cut"]
    assert run("main_moco_proto.py", *args).status == 143
    assert run("main_moco_proto.py", *args, "--resume auto").status == 0
    whole, cut = (columns(tmp_path / name / "log.csv", "loss", "knn", "top1") for name in ("whole", "cut"))
    assert whole == cut
    one, two = (checkpoint.load(tmp_path / name / checkpoint.LAST) for name in ("whole", "cut"))
    for key in ("state_dict", "average"):
        assert equal_tensors(one[key], two[key])
    # load_encoder and the evaluations use the average.
    encoder, _ = moco.load_encoder(tmp_path / "whole" / checkpoint.LAST)
    weight = encoder.state_dict()["conv1.weight"]
    assert torch.equal(weight, one["average"]["module.encoder_q.conv1.weight"])
    assert not torch.equal(weight, one["state_dict"]["module.encoder_q.conv1.weight"])


def test_the_average_against_its_formula(run, tmp_path):
    """Three epochs of one step each: the average starts as the first weights w, then e <- 0.5 e + 0.5 w."""
    run("main_moco_in.py", TINY_MOCO, "-b 160 --lr 0.1 --epochs 3 --save-freq 1 --ema 0.5 --output-dir", tmp_path)
    saved = [torch.load(tmp_path / f"checkpoint_{i:04d}.pth.tar", weights_only=True) for i in range(3)]
    name = "module.encoder_q.layer2.0.conv1.weight"
    first, second, third = (s["state_dict"][name].double() for s in saved)
    expected = 0.25 * first + 0.25 * second + 0.5 * third
    assert torch.allclose(saved[2]["average"][name].double(), expected, atol=1e-7)
