"""Runs with prototypes (main_moco_proto.py) and the options of recipes beyond the published ones."""

from helpers import TINY_MOCO, columns, equal_tensors, interrupt
from moco import checkpoint


def test_prototypes_train_resume_and_are_evaluated(run, tmp_path, monkeypatch):
    args = [TINY_MOCO, "--lr 0.1 --epochs 3 --knn-freq 1 --nesterov --no-bias-decay --bn-splits 2"]
    assert run("main_moco_proto.py", *args, "--output-dir", tmp_path / "whole").status == 0
    interrupt(monkeypatch, 8)
    args += ["--output-dir", tmp_path / "cut"]
    assert run("main_moco_proto.py", *args).status == 143
    assert run("main_moco_proto.py", *args, "--resume auto").status == 0
    whole, cut = (columns(tmp_path / name / "log.csv", "loss", "knn", "top1") for name in ("whole", "cut"))
    assert whole == cut
    one, two = (checkpoint.load(tmp_path / name / checkpoint.LAST) for name in ("whole", "cut"))
    assert equal_tensors(one["state_dict"], two["state_dict"])
    groups = one["optimizer"]["param_groups"]
    assert [(g["momentum"], g["nesterov"], g["weight_decay"]) for g in groups] == [(0.9, True, 1e-4), (0.9, True, 0)]
    assert [f"{g['lr']:.7g}" for g in groups] == 2 * columns(tmp_path / "whole/log.csv", "lr")[-1]
