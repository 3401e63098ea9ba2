"""What happens when processes are killed, do not meet, or files rot: nothing is lost, nothing hangs."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from conftest import ROOT, TINY_MOCO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import refused
from test_runs import end, rows, same

from moco import checkpoint, distributed, options
from moco.errors import RunError, UsageError

KILLS = int(os.environ.get("KILLS", 3))  # KILLS=50 for the long version


def start(script, *words, **more):
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def test_killed_at_random_instants(tmp_path):
    """SIGKILL, again and again: the run ends as one that never stopped, bit for bit."""
    words = [*TINY_MOCO.split(), "--epochs", "30", "--knn-freq", "20"]
    whole = start("main_moco_in.py", *words, "--output-dir", str(tmp_path / "whole"))
    out = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, out
    parts = tmp_path / "parts"
    seconds = sum(float(row["seconds"]) for row in rows(tmp_path / "whole" / "log.csv"))
    rng = random.Random(0)
    killed, reached = 0, 0
    while True:
        begun = time.monotonic()
        run = start("main_moco_in.py", *words, "--output-dir", str(parts), "--resume", "auto")
        begins = run.stdout.readline()  # until here it imports torch: the least interesting instants
        while begins and not begins.startswith(("MoCoIn", "Epoch")):
            begins = run.stdout.readline()
        if killed < KILLS:
            time.sleep(rng.uniform(0, seconds / max(KILLS / 2, 1)))
        else:
            run.wait(timeout=300)
        run.kill()
        run.stdout.close()
        status = run.wait()
        if (parts / "log.csv").is_file():
            done = len(rows(parts / "log.csv"))
            assert done >= reached - 1, "more than the current epoch was lost"
            reached = done
        if status == 0:
            break
        assert status == -signal.SIGKILL and time.monotonic() - begun < 300
        killed += 1
    same(end(tmp_path / "whole"), end(parts))
    assert [row["epoch"] for row in rows(parts / "log.csv")] == [str(e) for e in range(30)]
    assert killed >= min(KILLS, 2)
    assert not list(parts.glob("*.tmp")) or killed  # a kill can leave a file beside, never a half-written checkpoint


def test_a_second_interrupt_ends_at_once(tmp_path):
    run = start("main_moco.py", *TINY_MOCO.split(), "--epochs", "500", "--output-dir", str(tmp_path))
    while not run.stdout.readline().startswith("Epoch: [0][5"):
        pass
    os.kill(run.pid, signal.SIGINT)
    os.kill(run.pid, signal.SIGINT)
    out = run.communicate(timeout=60)[0]
    assert run.returncode in (130, -signal.SIGINT) and "Traceback" not in out, out


def test_a_row_is_interrupted_and_goes_on(tmp_path):
    """scripts/reproduce.py passes signals on to the script that it runs, which saves its step."""
    small = "--dataset digits --image-size 8 -b 32 --moco-k 64 --warm-up 1 -p 1"
    words = ["in-200", "-a", "resnet20", "--epochs", "200", "--per-class", "16", "--name", "tiny"]
    words += ["--pretrain", small, "--runs", str(tmp_path), "--results", str(tmp_path)]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = start("scripts/reproduce.py", *words, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        while not (line := run.stdout.readline()).startswith("Epoch: ["):
            assert line, "it has ended"
        os.kill(run.pid, number)
        out = run.communicate(timeout=60)[0]
        assert run.returncode == status and "--resume auto goes on" in out and "Traceback" not in out, out
    assert checkpoint.load(tmp_path / "in-200-tiny-seed0/checkpoint_last.pth.tar")["options"]["epochs"] == 200


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(victim, tmp_path):
    """The other ends as well, within a minute, and says in one line what happened."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = [*TINY_MOCO.split(), "--epochs", "5000", "--world-size", "2", "--dist-url", f"tcp://localhost:{port}"]
    words += ["--output-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [start("main_moco_out.py", *words, "--rank", str(rank), env=environment) for rank in (0, 1)]
    while not runs[0].stdout.readline().startswith("Epoch: [1]"):
        pass
    runs[victim].kill()
    other = runs[1 - victim]
    begun = time.monotonic()
    out = other.communicate(timeout=60)[0]
    runs[victim].communicate()
    assert time.monotonic() - begun < 60
    assert other.returncode == 1 and "Traceback" not in out, out
    said = [line for line in out.splitlines() if "error: " in line]
    assert len(said) == 1 and "another of the 2 processes" in said[0], out


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(rank, run, monkeypatch):
    """A missing rank, a master that is not there: a clear line when the patience (ten minutes) ends."""
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=2))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    done = run("main_moco.py", TINY_MOCO, f"--world-size 2 --rank {rank} --dist-url tcp://localhost:{port}")
    said = [line for line in done.err.splitlines() if "error: " in line]
    assert done.status == 1 and len(said) == 1 and "could not meet" in said[0], done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint.pth.tar"
    checkpoint.save(path, {"epoch": 1, "arch": "resnet20", "state_dict": {"module.a": torch.arange(300.0)}})
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_checkpoints(whole, choose):
    """Bytes changed, lost or added anywhere: the same tensors, or refused in one line."""
    content = bytearray(whole.read_bytes())
    at = choose.draw(st.integers(0, len(content) - 1))
    how = choose.draw(st.sampled_from(["change", "cut", "insert", "drop"]))
    noise = choose.draw(st.binary(min_size=1, max_size=8))
    if how == "change":
        content[at : at + len(noise)] = noise
    elif how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = noise
    else:
        del content[at : at + len(noise)]
    damaged = whole.with_name("damaged.pth.tar")
    damaged.write_bytes(content)
    try:
        loaded = checkpoint.load(damaged)
    except (RunError, UsageError) as error:
        assert "damaged.pth.tar" in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(loaded["state_dict"]["module.a"], torch.arange(300.0))


NAMES = "-a -j --epochs --start-epoch -b --lr --schedule --momentum --wd -p --resume --seed --gpu --world-size --rank "
NAMES += (
    "--dist-url --dist-backend --moco-dim --moco-k --moco-m --moco-t --mlp --aug-plus --cos --warm-up --output-dir "
)
NAMES += "--save-freq --dataset --image-size --stem --mean --std --bn-splits --views --precision --knn-freq --per-class"
VALUES = st.one_of(
    st.integers(-3, 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.sampled_from(["", "-", "auto", "1e9"]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(NAMES.split()), st.lists(VALUES, max_size=3)), max_size=4))
def test_any_command_line(capsys, pairs):
    """Parsed, or refused in one line with status 2."""
    from moco.builder import MoCoOut

    parser = options.pretrain_parser("Title.\n\nText.")
    MoCoOut.add_options(parser)
    capsys.readouterr()
    try:
        parser.parse_args([word for name, values in pairs for word in (name, *values)])
    except SystemExit as exit:
        assert exit.code == 2
        err = capsys.readouterr().err
        assert err.count("error: ") >= 1 and len(err.splitlines()) == 1


def test_settings_that_do_not_fit_the_data(run, tmp_path):
    done = run("main_moco.py", TINY_MOCO, "--epochs 1 --knn-freq 1 --output-dir", tmp_path, "--gpu 0")
    if not torch.cuda.is_available():
        refused(done, 2, "--gpu 0", "no GPU")


def test_every_fault_of_the_readme_has_its_test():
    section = (ROOT / "README.md").read_text().split("## What happens if")[1].split("\n## ")[0]
    named = {line.split("`")[-2] for line in section.splitlines() if line.startswith("| ") and "`test_" in line}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 12
    for name in named:
        assert f"def {name}(" in tests, name
