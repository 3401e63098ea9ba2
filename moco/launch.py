"""Launching: one process, one for each GPU, or one of torchrun's; and how errors of a launch are told."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco import distributed
from moco.errors import RunError, UsageError, one_line

PATIENCE = timedelta(minutes=10)  # how long a process waits for the others before it gives up
GRACE = 10  # seconds that the other processes have to leave when one has failed
ADVICE = "--resume auto goes on from the last checkpoint"


@dataclass(frozen=True)
class Process:
    """This process among all: its rank, its number on this machine, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    on_node: int = 1  # processes of this machine
    url: str = "env://"
    backend: str | None = None  # None: nccl on GPUs, gloo on CPUs


def launch(worker: Callable[[torch.device], None], **options) -> None:
    """Runs `worker(device)` on every process that the command line asks for, and exits with its status.

    `options`: see `plan`. An error of the user's is one line on stderr, from rank 0 alone.
    """
    rank = 0
    try:
        process, spawning = plan(os.environ, torch.cuda.device_count(), **options)
        rank = 0 if spawning else process.rank
        spawn(worker, process) if spawning else run(worker, process)
    except (UsageError, RunError) as error:
        complain(error, rank if "RANK" in os.environ else 0)


def plan(
    environment: Mapping[str, str],
    gpus: int,
    *,
    multiprocessing_distributed: bool = False,
    gpu: int | None = None,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = "tcp://localhost:10001",
    dist_backend: str | None = None,
) -> tuple[Process, bool]:
    """What this process is, and whether it starts the processes of this machine (then: the first of them).

    Under torchrun it is one of them. With --multiprocessing-distributed it starts one for each of the `gpus` that are
    visible. Otherwise it is the only one of this machine: on GPU --gpu, the first GPU, or the CPU. `world_size`
    and `rank` count machines, as in MoCo.
    """
    if gpu is not None and not gpus:
        raise UsageError(f"--gpu {gpu}: this machine shows no GPU")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        ranks = (int(environment[name]) for name in ("RANK", "WORLD_SIZE"))
        local = (int(environment.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        return Process(*ranks, *local, backend=dist_backend), False
    nodes, node = (world_size, rank) if world_size >= 1 else (1, 0)
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {rank} is not one of the {nodes} nodes: it is 0 to {nodes - 1}")
    on_node = max(gpus, 1) if multiprocessing_distributed and gpu is None else 1
    if nodes * on_node > 1 and node == 0:
        check_port(dist_url)
    first = Process(node * on_node, nodes * on_node, gpu or 0, on_node, dist_url, dist_backend)
    return first, on_node > 1


def check_port(url: str) -> None:
    """Rank 0 listens on the port of --dist-url, so it must be free."""
    place = urlparse(url)
    if place.scheme != "tcp":
        return
    try:
        port = place.port
    except ValueError:
        port = None
    if port is None:
        raise UsageError(f"--dist-url '{url}' names no port: write tcp://HOST:PORT")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise RunError(f"port {port} is in use: name another one with --dist-url") from None


def complain(error: UsageError | RunError, rank: int = 0) -> None:
    """One line on stderr and the error's exit status.

    Rank 0 prints an error that all ranks share; the others wait for it, since whoever starts them ends all with the
    first that fails. `error.alone` marks what only one process has met.
    """
    if rank == 0 or getattr(error, "alone", False):
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line(error)}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    if dist.is_initialized():
        # A group whose processes go one by one can hang or abort while the interpreter is taken down.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(error.status)
    sys.exit(error.status)


def spawn(worker: Callable[[torch.device], None], first: Process) -> None:
    """Starts the processes of this machine, one for each GPU, and passes on the signals that it gets."""
    context = mp.start_processes(spawned, (worker, first), first.on_node, join=False)

    def pass_on(number, frame):
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except mp.ProcessExitedException as error:
        if error.signal_name is None:  # the process that failed has said why
            sys.exit(error.exit_code)
        complain(RunError(f"process {error.error_index} of {first.on_node} was ended by {error.signal_name}; {ADVICE}"))


def spawned(local_rank: int, worker: Callable[[torch.device], None], first: Process) -> None:
    os.setpgrp()  # a terminal's Ctrl-C goes to the process that started this one, which passes it on, once
    process = replace(first, rank=first.rank + local_rank, local_rank=local_rank)
    try:
        run(worker, process)
    except (UsageError, RunError) as error:
        complain(error, process.rank)


def run(worker: Callable[[torch.device], None], process: Process) -> None:
    """Joins the process group, if there is more than one process, and calls the worker on this process's device."""
    device = choose_device(process)
    distributed.processes_on_node = process.on_node
    if process.world_size > 1:
        join_group(process, device)
    try:
        worker(device)
        leave_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # all processes have agreed to leave
        leave_group()
        raise
    except RuntimeError as error:  # a process that fails alone does not leave the group: with NCCL that would wait
        raise explained(error, process) from None


def choose_device(process: Process) -> torch.device:
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if process.on_node > gpus or process.local_rank >= gpus:
        raise UsageError(f"process {process.local_rank} of {process.on_node} has no GPU: this machine shows {gpus}")
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    # TF32 for convolutions, where float32 is asked for; similarities and views are products in float32 itself.
    torch.backends.cudnn.allow_tf32 = True
    return device


def join_group(process: Process, device: torch.device) -> None:
    backend = process.backend or ("nccl" if device.type == "cuda" else "gloo")
    own = device if device.type == "cuda" else None
    try:
        dist.init_process_group(backend, process.url, PATIENCE, process.world_size, process.rank, device_id=own)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the {process.world_size} processes could not meet at {process.url} within "
            f"{PATIENCE.total_seconds() / 60:g} minutes: {str(error).splitlines()[0]}",
            alone=True,
        ) from None


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def explained(error: RuntimeError, process: Process) -> RuntimeError | RunError:
    """The error as the user is told it, or itself if it is a defect of the program."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return RunError(f"out of memory: a smaller -b or --moco-k may fit ({str(error).splitlines()[0]})", alone=True)
    if distributed.lost_connection(error):
        return RunError(f"another of the {process.world_size} processes has ended or cannot be reached; {ADVICE}")
    return error
