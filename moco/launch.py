"""Starts the processes that MoCo's options ask for, or joins those that torchrun started; an error is one line.

A process is described by torchrun's variables.
"""

import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import distributed
from moco.errors import WORKER_DIED, RunError, UsageError, first_line, one_line, say

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DIST_URL = "tcp://localhost:10001"
PATIENCE = timedelta(minutes=10)  # how long a process waits for the others
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)  # a run finishes its step, saves and exits
GRACE = 5  # seconds that the other processes have to exit after one has failed
ADVICE = "--resume auto continues from the last checkpoint"


class LostError(RunError):
    """Another process has ended."""


@contextlib.contextmanager
def reporting(process: Mapping[str, str] | None = None) -> Iterator[None]:
    """An error in the block, or in a function that this decorates, is one line on stderr and its exit status.

    The process does not leave its group then: with NCCL that would wait.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as >&- does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (UsageError, RunError) as error:
        report_and_exit(error, process)
    except (RuntimeError, OSError, MemoryError) as error:
        report_and_exit(explained(error), process)


@reporting()
def launch(
    worker: Callable[[torch.device], None], *, gpu: int | None = None, dist_backend: str | None = None, **options
) -> None:
    """Calls `worker(device)` in every process. An error is one line on stderr and its exit status.

    If the environment has all of VARIABLES, torchrun or scripts/slurm.sh has started this process. Otherwise the
    options say what to start, see `plan`; a started process imports the worker.
    """
    if all(name in os.environ for name in VARIABLES):
        processes, gpu = [inherited(os.environ, gpu=gpu, **options)], None
    else:
        processes = plan(os.environ, torch.cuda.device_count() if gpu is None else 1, **options)
    if len(processes) > 1:
        spawn(worker, processes, dist_backend)
    else:
        run(0, worker, processes, dist_backend, gpu)


def inherited(environment: Mapping[str, str], **options) -> dict[str, str]:
    """The variables of this process. A note names the options that they override."""
    process = {name: environment[name] for name in VARIABLES}
    unset = dict(multiprocessing_distributed=False, gpu=None, world_size=-1, rank=-1, dist_url=DIST_URL)
    given = [name for name in unset if options.get(name, unset[name]) != unset[name]]
    if given and process["RANK"] == "0":
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        say(f"note: {names} ignored: RANK, WORLD_SIZE and LOCAL_RANK are set and take precedence")
    return process


def plan(
    environment: Mapping[str, str],
    gpus: int,
    *,
    multiprocessing_distributed: bool = False,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = DIST_URL,
) -> list[dict[str, str]]:
    """The variables of each process of this machine, or [{}] for a single process.

    As in MoCo, `world_size` and `rank` count machines. With `multiprocessing_distributed` a machine has one process
    per GPU, else one.

    Raises:
        UsageError: impossible options, or a launcher has started several processes that would not find each other.
    """
    if "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1":
        missing = ", ".join(name for name in VARIABLES if name not in environment)
        raise UsageError(f"RANK and WORLD_SIZE are set, but not {missing}: use torchrun, see docs/clusters.md")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in environment and world_size <= 1:
        text = "use scripts/slurm.sh, or start torchrun in one task per node"
        raise UsageError(
            f"RANK is not set: each of the {tasks} tasks of this srun step would train a model of its own; {text}"
        )
    nodes, node = (world_size, rank) if world_size >= 1 else (1, 0)
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {rank} is not one of the {nodes} nodes: it is 0 to {nodes - 1}")
    place = re.fullmatch(r"tcp://\[?(.+?)\]?:(\d+)", dist_url)
    if not place:
        raise UsageError(f"--dist-url '{dist_url}': use tcp://HOST:PORT, or start the script with torchrun")
    on_node = max(gpus, 1) if multiprocessing_distributed else 1
    if nodes * on_node == 1:
        return [{}]
    numbers = [(node * on_node + i, nodes * on_node, i, on_node) for i in range(on_node)]
    return [dict(zip(VARIABLES, (*map(str, each), *place.groups()), strict=True)) for each in numbers]


def spawn(worker: Callable[[torch.device], None], processes: list[dict[str, str]], backend: str | None) -> None:
    """Starts the processes of this machine and passes signals on to them; exits with the status of the first to fail."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # not "Terminating process"
    context = mp.start_processes(run, (worker, processes, backend), len(processes), join=False)
    asked = []

    def pass_on(number, frame):
        asked.append(signal.Signals(number).name)
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except mp.ProcessExitedException as error:
        if error.signal_name is None:  # the failed process has printed its error
            sys.exit(error.exit_code)
        if error.signal_name in asked:  # before it could handle signals
            sys.exit(128 + signal.Signals[error.signal_name])
        text = f"process {error.error_index} of {len(processes)} was ended by {error.signal_name}; {ADVICE}"
        report_and_exit(RunError(text), processes[error.error_index] | dict(LOCAL_RANK="0"))


def run(index: int, worker: Callable, processes: list[dict], backend: str | None, gpu: int | None = None) -> None:
    """Calls the worker in the process of this index, which first joins the group, if there are several."""
    process = processes[index]
    os.environ.update(process)
    world_size, on_node = int(process.get("WORLD_SIZE", 1)), int(process.get("LOCAL_WORLD_SIZE", 1))
    distributed.nodes, distributed.processes_on_node = -(-world_size // on_node), on_node
    distributed.local_rank = int(process.get("LOCAL_RANK", 0))
    if len(processes) > 1:
        os.setpgrp()  # a terminal's Ctrl-C goes to the process that started this one, which passes it on, once
    with reporting(process):
        device = choose_device(gpu)
        if world_size > 1:
            join_group(device, backend or ("nccl" if device.type == "cuda" else "gloo"), world_size)
        try:
            worker(device)
        except SystemExit:  # all processes have agreed to leave
            leave_group()
            raise
        leave_group()


def choose_device(gpu: int | None = None) -> torch.device:
    """GPU `gpu`; else the only visible GPU, or that of the local rank; without GPUs the CPU."""
    gpus, processes = torch.cuda.device_count(), distributed.processes_on_node
    if gpu is None and not gpus:
        keep_freed_memory()
        return torch.device("cpu")
    if gpu is not None and gpu >= gpus:
        raise UsageError(f"--gpu {gpu}: this machine has {gpus} visible GPUs")
    if gpu is None and 1 < gpus < processes:
        raise UsageError(f"{processes} processes need one GPU each, but only {gpus} are visible")
    device = torch.device("cuda", gpu if gpu is not None else distributed.local_rank if gpus > 1 else 0)
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        text = f"the GPU cannot be used: {first_line(error)} (set CUDA_VISIBLE_DEVICES= to train on the CPU)"
        raise RunError(text) from None
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means float32; bf16 is for speed
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch.compile's advice, in old releases
    return device


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory for the next step.

    By default it returns each tensor of more than 32 MB to the system, which fills the pages of the next one with zeros:
    some quarter of SupContrast's step (docs/results.md, Speed).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def join_group(device: torch.device, backend: str, world_size: int) -> None:
    try:
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device if device.type == "cuda" else None)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "NCCL" in str(error):
            raise RunError(f"NCCL cannot connect the {world_size} processes: {nccl_reason(error)}") from None
        raise RunError(
            f"the {world_size} processes could not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"(--dist-url) within {PATIENCE.total_seconds() / 60:g} minutes: {first_line(error)}"
        ) from None


def nccl_reason(error: Exception) -> str:
    """The line of an NCCL error that says why: the first, or the last one after a line that names a source file."""
    lines = [line for line in str(error).splitlines() if line.strip() not in ("", "Last error:")]
    return lines[-1 if lines[0].startswith("NCCL error") else 0]


def leave_group() -> None:
    if dist.is_initialized():
        dist.barrier()  # rank 0 hosts the store, which the others need to leave
        dist.destroy_process_group()


def explained(error: RuntimeError | OSError | MemoryError) -> RunError:
    """A one-line error for a known failure; any other is raised again, as a bug."""
    if isinstance(error, OSError) and error.strerror:
        return RunError(f"'{error.filename}': {error.strerror}" if error.filename else error.strerror)
    if "during capture" in str(error) and error.__context__:  # what ended the recording of a CUDA graph
        error = error.__context__
    torchs = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(text in str(error) for text in torchs):
        advice = "a smaller -b or --moco-k, no --knn-freq, or --no-compile may fit"
        return RunError(f"out of memory: {advice} ({first_line(error)})")
    if "DataLoader worker" in str(error):  # PyTorch's SIGCHLD handler raises it wherever the main thread is
        return RunError(WORKER_DIED)
    if distributed.lost_connection(error):
        others, reason = distributed.world_size(), f" ({nccl_reason(error)})" if "NCCL" in str(error) else ""
        return LostError(f"another of the {others} processes has ended or cannot be reached{reason}; {ADVICE}")
    raise error


def report_and_exit(error: UsageError | RunError, process: Mapping[str, str] | None = None) -> NoReturn:
    """Exits with the error's status after one line on stderr, with rank and host if there are several processes.

    The first process of a machine prints at once, and its launcher ends the others before they print the same error.
    Others, and those that have lost a process, print only if they are still alive seconds later.
    """
    text = one_line(error)
    if process and process["WORLD_SIZE"] != "1":
        text += f" (rank {process['RANK']} on {socket.gethostname()})"
        time.sleep((GRACE + 2) * (isinstance(error, LostError) + (process["LOCAL_RANK"] != "0")))
    with contextlib.suppress(OSError):  # stderr may be a closed pipe
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        # Without the normal exit: destroying the group while its processes end one by one can hang or abort.
        sys.stdout.flush()
        os._exit(error.status)
    sys.exit(error.status)
