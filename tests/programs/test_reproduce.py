"""scripts/reproduce.py runs a row of the table; scripts/bench.py measures the loop."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import results
from helpers import PAGES, copied_pages, refused
from moco import checkpoint, options
from moco.errors import UsageError
from moco.run import read_log
from processes import ROOT, forking, start, until


def test_a_row_is_interrupted_and_resumed(tmp_path):
    """scripts/reproduce.py passes signals on to the script that it runs, which saves its step."""
    small = "--dataset digits --per-class 16 --image-size 8 -b 32 --moco-k 64 --warm-up 1 -p 1"
    args = ["in-200", "-a", "resnet20", "--epochs", "200", "--name", "tiny"]
    args += ["--pretrain", f"'{small}'", "--runs", str(tmp_path), "--results", str(tmp_path)]
    seconds = [0.5]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = start("scripts/reproduce.py", *args)
        assert ("continuing at epoch" in until(run, "Epoch: [")) == (number == signal.SIGINT)
        os.kill(run.pid, number)
        out = run.communicate(timeout=60)[0]
        assert run.returncode == status and "--resume auto continues" in out and "Traceback" not in out, out
        seconds.append(json.loads((tmp_path / "in-200-tiny-seed0/begun.json").read_text())["cpu_seconds"])
    assert seconds == sorted(set(seconds))  # processor time over restarts
    assert checkpoint.load(tmp_path / "in-200-tiny-seed0/checkpoint_last.pth.tar")["options"]["epochs"] == 200


def test_rows_and_recipes(run):
    """The commands that reproduce the table, against its specification."""
    done = run("scripts/reproduce.py", "--print")
    lines = done.out.splitlines()
    assert len(lines) == 30
    moco = [line for line in lines if line.startswith("python main_moco")]
    assert [re.search(r"main_(\w+)\.py .*--epochs (\d+)", line).groups() for line in moco] == [
        ("moco", "200"),
        ("moco_in", "200"),
        ("moco", "1000"),
        ("moco_in", "1000"),
        ("moco_out", "1000"),
        ("moco_suploss", "1000"),
        ("moco_in", "100"),
        ("moco_proto", "100"),
        ("moco_out", "100"),
        ("moco_out", "1000"),
        ("moco_suploss", "1000"),
    ]
    assert sum("--dataset cifar100" in line for line in lines) == 8
    # weights and searches are named by this part of a key
    files = {(key.partition("-")[0], row.name) for key, row in results.ROWS.items()}
    assert len(files) == len({name for name, _ in files})
    for line in moco[:6] + moco[9:]:
        assert "-a resnet50 --lr 0.12 -b 256 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos" in line
    small = run("scripts/reproduce.py", "--small --print").out.splitlines()
    assert [line.split()[1] for line in small if "lincls" not in line] == [
        f"main_{name}.py" for name in ("ce", "supcon", "moco", "moco_in", "moco_out", "moco_suploss")
    ]
    for line in small:
        assert "-a resnet20" in line and "-b 256" in line
        same = "--lr 0.1 -b 256 --epochs 10" if "lincls" in line else "--epochs 60 -b 256 --aug-plus --warm-up 1"
        assert same in line
    files = [*(ROOT / "results").glob("*-resnet20-60ep-seed*.json"), *(ROOT / "results").glob("own-*ep-seed*.json")]
    assert len(files) > 10
    for path in files:  # the commands on file are those of --print
        row = re.split("-cpu|-h100|-h200", path.name)[0]
        result = json.loads(path.read_text())
        length = f"--epochs {result['epochs']}" if row == "own" else ""  # there are also shorter runs
        lines = run("scripts/reproduce.py", "--small --print", row, length).out.splitlines()
        for mine, line in zip(result["commands"], lines, strict=True):
            wanted, had = (re.split(" (?=-)", each) for each in (re.split(" --seed | --pretrained ", line)[0], mine))
            of_the_run = ("--seed ", "--pretrained ", "--output-dir ", "--compile")
            assert sorted(wanted) == sorted(each for each in had if not each.startswith(of_the_run)), path.name
    for key, script in (("ce", "ce"), ("supcon", "supcon"), ("moco", "moco"), ("out", "moco_out")):
        knn = {
            path.stem.split("-")[1]: float(read_log(path)[-1]["knn"])
            for path in (ROOT / "results/lr").glob(f"{key}-*.csv")
        }
        (line,) = [line for line in small if f"main_{script}.py" in line]
        assert f"--lr {max(knn, key=knn.get)} " in line
        assert all(f"{value:.1f}" in PAGES["results.md"] for value in knn.values())
    other_views = run("scripts/reproduce.py", "--print in-200 --pretrain=--aug-crop").out.splitlines()[0]
    assert "--moco-t 0.2 --cos" in other_views and "--aug-crop" in other_views
    refused(run("scripts/reproduce.py", "in-300 data/"), 2, "unknown row 'in-300'")


def test_a_row_scaled_down(run, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forking(subprocess.Popen))
    where = f"--runs {tmp_path}/runs --results {tmp_path}/results"
    small = "--dataset digits --per-class 16 --image-size 8 -b 32 --moco-k 64 --warm-up 1 --knn-freq 2"
    args = ["in-200 -a resnet20 --epochs 2 --name tiny", where, f"--pretrain '{small}'"]
    args.append("--linear '--dataset digits --per-class 16 --epochs 2 -b 32'")
    obstacle = tmp_path / "runs/in-200-tiny-seed0/linear_last.pth.tar.tmp"
    obstacle.mkdir(parents=True)
    assert "main_lincls.py ended with status 1; the same command continues it" in run("scripts/reproduce.py", *args).err
    (path,) = (tmp_path / "results").iterdir()
    cut = json.loads(path.read_text())  # a run that ends here has a file, too
    assert "top1" not in cut and cut["knn"] > 0 and len(cut["curve"]) == 2 and list(cut["options"]) == ["pretrain"]
    pages = copied_pages(tmp_path)
    assert run("scripts/report.py", "--results", tmp_path / "results", "--pages", pages).status == 0
    assert f"| {cut['knn']:.1f} | kNN only |" in (pages / "docs/results.md").read_text()

    obstacle.rmdir()
    done = run("scripts/reproduce.py", *args)
    assert done.status == 0, done.err
    refused(run("scripts/reproduce.py", "in-200", where, "--name try/1"), 2, "--name 'try/1'")
    other = run("scripts/reproduce.py", *args[:2], f"--pretrain '{small} --lr 0.6'", "--linear '--dataset digits'")
    assert other.status == 2 and "begun with other options" in other.err
    impossible = "ended with status 2"
    cases = [("--dataset digits --moco-k 0", impossible), ("--dataset=digits --moco-k=0", impossible)]
    for more, message in [*cases, ("", "'nowhere' does not exist")]:
        wrong = run("scripts/reproduce.py", "in-200", where, f"nowhere --name wrong --pretrain '{more}'")
        assert wrong.status == 2 and message in wrong.err and "continues it" not in wrong.err
        assert not (tmp_path / "runs/in-200-wrong-seed0/begun.json").exists()
    result = json.loads(path.read_text())
    assert (result["row"], result["images"], result["epochs"]) == ("MoCo v2 + SupContrast_In", 160, 2)
    assert len(result["curve"]) == 2 and len(result["commands"]) == 2 and 0 <= result["top1"] <= 100
    for program, name in (("pretrain", "checkpoint_last.pth.tar"), ("linear", "linear_last.pth.tar")):
        saved = checkpoint.load(tmp_path / "runs/in-200-tiny-seed0" / name)["options"]
        assert result["options"][program] == saved
    assert result["options"]["pretrain"]["moco_k"] == 64 and result["options"]["linear"]["epochs"] == 2
    scores = [float(row["top1"]) for row in read_log(tmp_path / "runs/in-200-tiny-seed0/linear.csv")]
    assert (result["top1"], result["best_top1"]) == (scores[-1], max(scores))
    needed = (
        "cpu_seconds commit hardware versions seed arch dataset batch_size pretrain_seconds linear_seconds knn measured"
    )
    assert not set(needed.split()) - set(result)
    path.unlink()
    again = run("scripts/reproduce.py", *args)
    assert again.status == 0 and "nothing is trained" in again.out and json.loads(path.read_text()) == result


def test_a_run_is_resumed_with_the_commands_that_it_was_started_with(tmp_path):
    import reproduce

    first, second = "python a --lr 1 --output-dir runs data/", "python b --pretrained runs/last data/"
    for _ in range(2):
        begun = reproduce.begin(tmp_path, [first, second])
        assert begun["commands"] == [first, second] and begun["cpu_seconds"] == 0
    other = second.replace(" b ", " b --lr 2 ")
    for pretraining in (first, first.replace("runs", "/more/runs")):  # the evaluation has not begun
        assert reproduce.begin(tmp_path, [pretraining, other])["commands"] == [pretraining, other]
    with pytest.raises(UsageError, match=f"begun with other options.*: {first}"):
        reproduce.begin(tmp_path, [first.replace("--lr 1", "--lr 2"), second])
    (tmp_path / checkpoint.LINEAR).touch()
    with pytest.raises(UsageError, match="begun with other options"):
        reproduce.begin(tmp_path, [first, other])
    moved = [line.replace("data/", "/more/data").replace("runs", "/more/runs") for line in (first, second)]
    assert reproduce.begin(tmp_path, moved)["commands"] == [first, second]


def test_the_processor_time_of_a_run_that_was_killed_is_not_known(tmp_path, monkeypatch):
    import reproduce

    def killed(command):
        raise KeyboardInterrupt

    begun = reproduce.begin(tmp_path, ["python a --output-dir runs data/"])
    monkeypatch.setattr(reproduce, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        reproduce.train(tmp_path, "python a data/", begun)
    begun = reproduce.begin(tmp_path, begun["commands"])
    monkeypatch.setattr(reproduce, "call", lambda command: 0)
    reproduce.train(tmp_path, "python a data/", begun)
    assert json.loads((tmp_path / "begun.json").read_text())["cpu_seconds"] is None


def test_a_hangup_is_ignored_under_nohup_and_else_saves():
    import reproduce

    for disposition, program, status in (
        (signal.SIG_IGN, "import signal, sys; sys.exit(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)", 1),
        (signal.SIG_DFL, "import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(60)", 143),
    ):
        before = signal.signal(signal.SIGHUP, disposition)
        try:
            assert reproduce.call([sys.executable, "-c", program]) == status
        finally:
            signal.signal(signal.SIGHUP, before)


def test_the_bench_measures_the_loop(run, tmp_path):
    import bench
    import report

    seen = []
    times = bench.loop(["-a", "resnet20", "-b", "16"], 2, 3, seen.append)
    assert seen == [0, 1, 2, 3] and len(times) == 3 and min(times) > 0
    out = tmp_path / "bench.json"
    assert run("scripts/bench.py", "--quick -a resnet20 -b 8 --rounds 1 --out", out).status == 0
    figures = json.loads(out.read_text())
    assert all(figures[name] > 0 for name in report.FIGURES) and figures["folder_crops_per_core"] > 0
    assert run("scripts/bench.py", "-a resnet20 -b 8 --profile", tmp_path / "trace.json").status == 0
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_the_linear_evaluation_of_each_row(run, monkeypatch):
    """lr, batch, epochs, and the factors of lr: those of MoCo's, and of SupContrast's authors."""
    lines = run("scripts/reproduce.py", "--print").out.splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    for key, (pretrain, line) in zip(results.ROWS, pairs, strict=True):
        if results.ROWS[key].top1 is None:
            continue
        monkeypatch.setattr(sys, "argv", line.split()[1:])
        args = options.linear_parser("").parse_args(line.split()[2:])
        found = (args.lr, args.batch_size, args.epochs, args.schedule, args.lr_decay, args.weight_decay, args.momentum)
        theirs = (5.0, 512, 100, [60, 75, 90, 100], 0.2, 0, 0.9), (1.0, 256, 100, [60, 80], 0.1, 0, 0.9)
        assert found == theirs["main_moco" in pretrain], key
        assert "main_moco" not in pretrain or "--bn-splits 2 " in pretrain


def test_a_ratio_of_the_bench_is_a_speed_up():
    import bench

    images_per_second, ratio = bench.compare(lambda: time.sleep(0.2) or 10, lambda: time.sleep(0.02) or 10, 3)
    assert ratio > 2 and images_per_second > 50  # ten times, if the machine has nothing else to do
