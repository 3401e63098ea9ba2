"""What happens when processes are killed, do not meet, or files rot: nothing is lost, nothing hangs."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, TINY, TINY_MOCO
from moco import checkpoint, launch, methods, options
from moco.errors import RunError, UsageError
from test_bad_input import refused
from test_runs import end, rows, same

KILLS = int(os.environ.get("KILLS", 3))  # KILLS=50 for the long version


def start(script, *words, **more):
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def until(run, begins):
    """Reads what a run prints, to the first line that begins so."""
    lines = []
    while not lines or not lines[-1].startswith(begins):
        lines.append(run.stdout.readline())
        assert lines[-1], "it has ended"
    return "".join(lines)


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
            time.sleep(rng.uniform(0, seconds / max(KILLS / 2, 3)))  # short enough that the kills come before its end
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


def test_a_second_interrupt_ends_at_once(tmp_path):
    """The first one has it save, which takes two minutes here."""
    run = start("tests/slow_disk.py", "main_moco.py", *TINY_MOCO.split(), "--output-dir", str(tmp_path))
    until(run, "Epoch: [0]")
    os.kill(run.pid, signal.SIGINT)
    until(run, "saving")
    time.sleep(2)  # for the first one, if this was the end of an epoch
    os.kill(run.pid, signal.SIGINT)
    out = run.communicate(timeout=30)[0]
    assert run.returncode == -signal.SIGINT and "stopped" not in out and "Traceback" not in out, out


@pytest.mark.parametrize("full", [False, True], ids=["reader gone", "disk full"])
def test_output_that_cannot_be_written_stops_the_run(tmp_path, full):
    if full and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    for script, words in (
        ("main_moco.py", f"{TINY_MOCO} --epochs 1 --output-dir {tmp_path}"),
        ("scripts/reproduce.py", "--print"),
    ):
        reader, writer = os.pipe()
        os.close(reader)
        if full:
            os.close(writer)
            writer = os.open("/dev/full", os.O_WRONLY)
        command = [sys.executable, str(ROOT / script), *words.split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writer)
        says = f"{Path(script).name}: error: stdout cannot be written: "
        assert done.returncode == 1 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done


def test_the_linear_evaluation_is_interrupted_and_goes_on(run, tmp_path):
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path).status == 0
    words = [*TINY.split(), "--lr", "0.1", "--epochs", "400", "--output-dir", str(tmp_path)]
    words += ["--pretrained", str(tmp_path / "checkpoint_last.pth.tar")]
    for more in ([], ["--resume", "auto"]):
        linear = start("main_lincls.py", *words, *more)
        assert ("continuing at epoch" in until(linear, "epoch ")) == bool(more)  # one is complete
        linear.send_signal(signal.SIGTERM)
        out = linear.communicate(timeout=60)[0]
        assert linear.returncode == 143 and "stopped " in out and "Traceback" not in out, out
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")
    assert [int(row["epoch"]) for row in rows(tmp_path / "linear.csv")] == list(range(saved["epoch"]))


def test_workers_end_with_a_run_that_fails(folder, tmp_path):
    """They ignore signals, including the one that Python sends them when it ends."""
    large = folder("large", train=8, size=(120, 100))
    (large / "train/cat/5.png").write_bytes(b"GIF89a, perhaps")
    words = f"-a resnet20 --image-size 8 -b 4 --epochs 1 --moco-k 16 -j 2 --output-dir {tmp_path} {large}"
    failing = start("main_moco.py", *words.split())
    out = failing.communicate(timeout=60)[0]
    assert failing.returncode == 1 and "cat/5.png' cannot be read" in out, out


def test_a_row_is_interrupted_and_goes_on(tmp_path):
    """scripts/reproduce.py passes signals on to the script that it runs, which saves its step."""
    small = "--dataset digits --image-size 8 -b 32 --moco-k 64 --warm-up 1 -p 1"
    words = ["in-200", "-a", "resnet20", "--epochs", "200", "--per-class", "16", "--name", "tiny"]
    words += ["--pretrain", small, "--runs", str(tmp_path), "--results", str(tmp_path)]
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = start("scripts/reproduce.py", *words, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert ("continuing at epoch" in until(run, "Epoch: [")) == (number == signal.SIGINT)
        os.kill(run.pid, number)
        out = run.communicate(timeout=60)[0]
        assert run.returncode == status and "--resume auto continues" in out and "Traceback" not in out, out
    assert checkpoint.load(tmp_path / "in-200-tiny-seed0/checkpoint_last.pth.tar")["options"]["epochs"] == 200


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(victim, tmp_path):
    """The other ends as well, within a minute, and says in one line what happened."""
    port = free_port()
    words = [*TINY_MOCO.split(), "--epochs", "5000", "--world-size", "2", "--dist-url", f"tcp://localhost:{port}"]
    words += ["--output-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [start("main_moco_out.py", *words, "--rank", str(rank), env=environment) for rank in (0, 1)]
    until(runs[0], "Epoch: [1]")
    runs[victim].kill()
    other = runs[1 - victim]
    begun = time.monotonic()
    out = other.communicate(timeout=60)[0]
    runs[victim].communicate()
    assert time.monotonic() - begun < 60
    assert other.returncode == 1 and "Traceback" not in out, out
    said = [line for line in out.splitlines() if "error: " in line]
    assert len(said) == 1 and "another of the 2 processes" in said[0], out
    assert f"(rank {1 - victim} on {socket.gethostname()})" in said[0] and "[c10d]" not in out, out


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


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(rank, run, monkeypatch):
    """A missing rank, a master that is not there: a clear line when the patience (ten minutes) ends."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=2))
    port = free_port()
    done = run("main_moco.py", TINY_MOCO, f"--world-size 2 --rank {rank} --dist-url tcp://localhost:{port}")
    said = [line for line in done.err.splitlines() if "error: " in line]
    assert done.status == 1 and len(said) == 1 and "could not meet" in said[0], done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint.pth.tar"
    checkpoint.save(path, {"epoch": 1, "arch": "resnet20", "state_dict": {"module.a": torch.arange(300.0)}})
    return path


def test_a_tensor_marked_as_a_folder(whole):
    """A bit that no checksum covers, for which torch.load returns uninitialised memory."""
    content = bytearray(whole.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 38] |= 0x10  # its external attributes
    folder = whole.with_name("folder.pth.tar")
    folder.write_bytes(content)
    with pytest.raises(RunError, match=r"folder\.pth\.tar' cannot be read .*: archive/data/0"):
        checkpoint.load(folder)


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
NAMES += "--save-freq --dataset --image-size --stem --mean --std --bn-splits --precision --knn-freq --per-class"
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
    parser = options.pretrain_parser("Title.\n\nText.", methods.OUT.add_options)
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
        refused(done, 2, "--gpu 0", "shows 0 GPUs")


def test_every_fault_on_the_page_has_its_test():
    section = (ROOT / "docs/faults.md").read_text()
    named = {line.split("`")[-2] for line in section.splitlines() if line.startswith("| ") and "`test_" in line}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 12
    for name in named:
        assert f"def {name}(" in tests, name
