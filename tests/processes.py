"""Starts scripts in processes of their own, which fork from a server that has imported torch: importing it takes seconds."""

import multiprocessing
import os
import random
import runpy
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["helpers", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard"])
# Launchers, for what depends on how Python starts or ends.
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]  # on a free port
TORCHRUN += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
LAUNCHED = []


@contextmanager
def killed_after(run, seconds):
    """Kills a run if the block takes longer, so that its output ends."""
    killer = Timer(seconds, run.kill)
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        killer.cancel()


class Forked:
    """A forked process that runs a script, with the interface of subprocess.Popen; `out` and `err` are connections."""

    def __init__(self, command, out, err, env, cwd=None):
        self.process = FORKSERVER.Process(target=execute, args=(command, out, err, dict(env), cwd or os.getcwd()))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        with killed_after(self, timeout or 600):
            with self.stdout:
                out = self.stdout.read()
            self.wait()
        return out, None

    def send_signal(self, number):
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    @property
    def returncode(self):
        return self.process.exitcode


def execute(command, out, err, env, folder):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    multiprocessing.set_start_method(None, force=True)  # Python's own, as in an interpreter of its own
    random.seed()  # else all would have the server's state
    np.random.seed()
    torch.seed()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def split(args):
    """Command-line arguments: strings are split as a shell does, other values become one argument each."""
    return [piece for arg in args for piece in (shlex.split(arg) if isinstance(arg, str) else [str(arg)])]


def start(script, *args, launcher=None, env=os.environ, **options):
    """Starts a script in a process of its own; stderr goes to stdout. `args` as in the fixture `run`."""
    command = [str(ROOT / script), *split(args)]
    if launcher:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        LAUNCHED.append(subprocess.Popen([*launcher, *command], env=env, **pipes, **options))
        return LAUNCHED[-1]
    reader, writer = FORKSERVER.Pipe(duplex=False)
    run = Forked(command, writer, writer, env, **options)
    writer.close()
    run.stdout = os.fdopen(os.dup(reader.fileno()))
    reader.close()
    return run


def forking(popen):
    """A subprocess.Popen that forks where a program starts one of our scripts, with the output of this process."""

    def start(command, *args, **options):
        if command[0] != sys.executable:
            return popen(command, *args, **options)
        return Forked(command[1:], *(Connection(os.dup(fd), readable=False) for fd in (1, 2)), os.environ)

    return start


def kill_all():
    """Ends the processes that a failed test has left behind: pytest would wait for them."""
    while LAUNCHED:
        LAUNCHED.pop().terminate()  # torchrun passes it on
    for process in multiprocessing.active_children():
        if isinstance(process, FORKSERVER.Process):
            process.kill()


def free_port():
    """A port that no connection gets by chance: Linux takes theirs from 32768 on."""
    while True:
        with socket.socket() as free, suppress(OSError):
            free.bind(("", random.SystemRandom().randrange(10_000, 32_000)))
            return free.getsockname()[1]


def run_processes(script, *args, processes=2):
    """Runs a script to its end on several processes of one machine; returns the first returncode that is not 0, and out."""
    common = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    common |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    runs = [start(script, *args, env=os.environ | common | rank) for rank in ranks]
    outs = [run.communicate(timeout=280)[0] for run in runs]
    return SimpleNamespace(returncode=next((run.returncode for run in runs if run.returncode), 0), out="".join(outs))


def until(run, prefix):
    """Reads a run's output up to the first line with this prefix."""
    lines = []
    with killed_after(run, 120):
        while not lines or not lines[-1].startswith(prefix):
            lines.append(run.stdout.readline())
            assert lines[-1], f"the run has ended, or printed no '{prefix}' in two minutes"
    return "".join(lines)
