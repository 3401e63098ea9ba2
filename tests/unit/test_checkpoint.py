"""A checkpoint is written completely or not at all, and only read if its checksums match."""

import argparse
import datetime
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import no_space
from moco import checkpoint
from moco.errors import RunError, UsageError


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth.tar"
    checkpoint.save(path, {"state_dict": {"a": torch.zeros(3)}})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(checkpoint.RunError, match="No space left on device"):
        checkpoint.save(path, {"state_dict": {"a": torch.ones(3)}})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    writer = checkpoint.Writer()
    writer.save([path], {"state_dict": {"a": torch.ones(3)}})
    with pytest.raises(checkpoint.RunError, match="No space left on device"):
        writer.finish()


def test_a_failed_save_is_noticed_before_the_next(tmp_path):
    (tmp_path / "last.tmp").mkdir()
    writer = checkpoint.Writer()
    writer.check()  # nothing has been written
    writer.save([tmp_path / "last"], {})
    writer.thread.shutdown()
    with pytest.raises(RunError, match="Is a directory"):
        writer.check()


def test_a_checkpoint_that_will_be_overwritten_is_named(tmp_path, capsys):
    (tmp_path / checkpoint.LAST).touch()
    for resume, named in ((None, True), ("old.pth.tar", True), (str(tmp_path / "." / checkpoint.LAST), False)):
        assert checkpoint.find(resume, str(tmp_path), torch.device("cpu")) == resume
        assert ("will be overwritten" in capsys.readouterr().out) == named


def test_a_full_disk_is_named_in_the_error(tmp_path):
    """torch itself reports 'enforce fail at inline_container.cc'."""
    os.symlink("/dev/full", tmp_path / "a.tmp")
    with pytest.raises(checkpoint.RunError, match=r"could not be written: No space left on device$"):
        checkpoint.save(tmp_path / "a", {"state_dict": {"a": torch.ones(3)}})


def test_a_save_writes_the_numbered_checkpoint_first(tmp_path, monkeypatch):
    """If the process is killed before it replaces the last checkpoint, the resumed run writes both again."""
    path, kept = tmp_path / "last", tmp_path / "kept"
    checkpoint.save(path, {"state_dict": {"a": torch.zeros(3)}})

    def replace(old, new):
        if new == path:
            raise OSError(5, "killed")
        os.rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    writer = checkpoint.Writer()
    writer.save([kept, path], {"state_dict": {"a": torch.ones(3)}})
    with pytest.raises(checkpoint.RunError):
        writer.finish()
    assert [checkpoint.load(p)["state_dict"]["a"].sum() for p in (path, kept)] == [0, 3]


def test_a_checkpoint_has_the_weights_at_the_call_of_save(tmp_path):
    """Training continues and changes the weights while a thread writes them."""
    writer, gate = checkpoint.Writer(), threading.Event()
    writer.thread.submit(gate.wait)
    weights = torch.zeros(3)
    writer.save([tmp_path / "b", tmp_path / "a"], {"state_dict": {"a": weights}})
    weights += 1
    gate.set()
    writer.finish()
    for name in "ab":
        assert checkpoint.load(tmp_path / name)["state_dict"]["a"].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint.pth.tar"
    checkpoint.save(path, {"epoch": 1, "arch": "resnet20", "state_dict": {"module.a": torch.arange(300.0)}})
    return path


def test_a_tensor_marked_as_a_folder(saved):
    """No checksum covers this bit, and with it torch.load would return uninitialised memory."""
    content = bytearray(saved.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    content[entry + 38] |= 0x10  # its external attributes
    folder = saved.with_name("folder.pth.tar")
    folder.write_bytes(content)
    with pytest.raises(RunError, match=r"folder\.pth\.tar' cannot be read .*: archive/data/0"):
        checkpoint.load(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_checkpoints(saved, data):
    """With bytes changed, removed or inserted anywhere, it either loads the same tensors or is refused in one line."""
    content = bytearray(saved.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "insert", "drop"]))
    noise = data.draw(st.binary(min_size=1, max_size=8))
    if how == "change":
        content[at : at + len(noise)] = noise
    elif how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = noise
    else:
        del content[at : at + len(noise)]
    damaged = saved.with_name("damaged.pth.tar")
    damaged.write_bytes(content)
    try:
        loaded = checkpoint.load(damaged)
    except (RunError, UsageError) as error:
        assert "damaged.pth.tar" in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(loaded["state_dict"]["module.a"], torch.arange(300.0))


def test_a_namespace_is_read_but_no_other_class(tmp_path):
    saved = {"state_dict": {"module.a": torch.zeros(1)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "a.pth")
    assert checkpoint.load(tmp_path / "a.pth")["args"].lr == 0.1
    torch.save(saved | {"args": argparse.Namespace(day=datetime.date(2020, 1, 1))}, tmp_path / "a.pth")
    with pytest.raises(checkpoint.RunError, match="only tensors and plain values"):
        checkpoint.load(tmp_path / "a.pth")
