"""The weights of measured rows: written with a row, evaluated, verified; and what is refused."""

import json
import shutil
import subprocess

import pytest
import torch

import weights
from helpers import refused
from moco.run import read_log
from processes import ROOT, forking

SMALL = "--pretrain '-b 8 --image-size 12 --bn-splits 1 --knn-freq 1 {}' --linear '-b 8 --epochs 2 --schedule 1'"


def test_the_weights_on_file_are_those_that_results_name():
    rows = [json.loads(path.read_text()).get("weights") for path in (ROOT / "results").glob("*.json")]
    named = {row["file"]: row["sha256"] for row in rows if row}
    assert named == {f"pretrained/{path.name}": weights.sha256(path) for path in (ROOT / "pretrained").iterdir()}


@pytest.fixture
def measured(run, folder, tmp_path, monkeypatch):
    """In and cross entropy for an epoch: the data, the weights, the results, and the words that name them."""
    monkeypatch.setattr(subprocess, "Popen", forking(subprocess.Popen))
    data = folder(train=12, val=6)
    where = f"--runs {tmp_path}/runs --results {tmp_path}/files --weights {tmp_path}/pretrained"
    for key, more in (("in-200", "--moco-k 32"), ("ce", "")):
        done = run("scripts/reproduce.py", f"--small {key} {data} --epochs 1 {SMALL.format(more)} {where}")
        assert done.status == 0, done.err
    return data, tmp_path / "pretrained", tmp_path / "files", where


def test_one_file_three_uses(run, measured, folder, tmp_path):
    data, weights, files, where = measured
    for name in ("in", "ce"):
        (path,) = files.glob(f"{name}-*.json")
        row, file = json.loads(path.read_text()), weights / f"{name}-resnet20.pth.tar"
        assert row["weights"]["file"] == f"pretrained/{file.name}"
        done = run("main_lincls.py", "-e --resume", file, data)  # of the last epoch
        assert f"top1={row['top1']:.2f} top5={row['top5']:.2f}" in done.out.splitlines()[-1], done.err
        done = run("main_lincls.py", "--epochs 1 -b 8 --pretrained", file, "--output-dir", tmp_path / name, data)
        assert done.status == 0 and "result: top1=" in done.out, done.err
        refused(run("main_lincls.py", "--resume", file, data), 2, file.name, "only weights")
        words = f"-a resnet20 --image-size 12 -b 8 --output-dir {tmp_path}"
        refused(run("main_moco_in.py", words, "--resume", file, data), 2, file.name, "only weights")
        saved = torch.load(file, weights_only=True)
        assert "optimizer" not in saved and all(key.startswith("module.") for key in saved["state_dict"])
        assert file.stat().st_size < 1_300_000

    assert sorted(path.name for path in weights.iterdir()) == ["ce-resnet20.pth.tar", "in-resnet20.pth.tar"]
    again = run("scripts/reproduce.py", f"--small in-1000 {data} --epochs 1 {SMALL.format('--moco-k 32')} {where}")
    refused(again, 2, "in-resnet20.pth.tar' has the weights of", "--weights")
    done = run("scripts/reproduce.py", "--verify", where, data)
    assert done.status == 0 and len(done.out.splitlines()) == 2 and "differs" not in done.out, done.err

    (path,) = files.glob("ce-*.json")
    row, (log,) = json.loads(path.read_text()), tmp_path.glob("runs/ce-*/log.csv")
    for name in ("top1", "top5"):  # cross entropy's own classifier, and a linear one on its frozen features
        assert row[f"classifier_{name}"] == float(read_log(log)[-1][name])
        assert row[name] == float(read_log(log.with_name("linear.csv"))[-1][name])

    (path,) = files.glob("in-*.json")
    row = path.read_text()
    path.write_text(json.dumps({**json.loads(row), "top1": json.loads(row)["top1"] / 2 + 20}))
    done = run("scripts/reproduce.py", "--verify", where, data)
    assert done.status == 1 and "in-resnet20.pth.tar" in done.err and "differs from" in done.out
    path.write_text(row)

    other = folder("other", classes=("bird", "dog"), train=2, val=2)
    refused(run("scripts/reproduce.py", "--verify", where, other), 2, "resnet20.pth.tar", "other classes")
    refused(run("scripts/reproduce.py", "--verify", where, tmp_path / "nowhere"), 2, "nowhere")
    file = weights / "in-resnet20.pth.tar"
    shutil.copy(file, weights / "mine.pth.tar")
    refused(run("scripts/reproduce.py", "--verify", where, data), 1, "mine.pth.tar", "names")
    (weights / "mine.pth.tar").unlink()
    saved = torch.load(file, weights_only=True)
    saved["state_dict"]["module.fc.bias"] += 1
    torch.save(saved, file)
    refused(run("scripts/reproduce.py", "--verify", where, data), 1, "in-resnet20.pth.tar", "checksum")
    three = folder("three", classes=("cat", "cow", "dog"), train=2, val=2)
    refused(run("main_lincls.py", "-e --resume", file, three), 2, file.name, "other classes")
    file.write_bytes(file.read_bytes()[:5000])
    refused(run("main_lincls.py", "-e --resume", file, data), 1, file.name)
    refused(run("main_lincls.py", "-e --resume", tmp_path / "none.pth.tar", data), 2, "none.pth.tar")
    file.unlink()
    refused(run("scripts/reproduce.py", "--verify", where, data), 1, "in-resnet20.pth.tar", "missing")
    shutil.rmtree(weights)
    refused(run("scripts/reproduce.py", "--verify", where, data), 2, "pretrained", "no weights")
