"""Launching one process, one for each GPU, or one of torchrun's or srun's; reporting their errors."""

import atexit
import contextlib
import os
import re
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

from moco import distributed, logs
from moco.errors import WORKER_DIED, RunError, UsageError, one_line
from moco.watch import Watch

PATIENCE = timedelta(minutes=10)  # how long a process waits for the others before it gives up
GRACE = 10  # seconds that the other processes have to leave when one has failed
ADVICE = "--resume auto continues from the last checkpoint"
DIST_URL = "tcp://localhost:10001"

watch: Watch | None = None  # of this process, while it is in a group


class LostError(RunError):
    """Another process is gone."""


@dataclass(frozen=True)
class Process:
    """Which of the processes this one is, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    on_node: int = 1  # processes of this machine
    url: str = "env://"
    backend: str | None = None  # None: nccl on GPUs, gloo on CPUs
    gpu: int | None = None  # the number of its GPU; None: its local rank
    node: int = 0  # the number of this machine


def launch(worker: Callable[[torch.device], None], **options) -> None:
    """Runs `worker(device)` on every process that the command line asks for, and exits with its status.

    `options`: see `plan`. A user error is one line on stderr, printed once on each machine.
    """
    process = None
    try:
        process, spawning, note = plan(os.environ, torch.cuda.device_count(), **options)
        if note and process.rank == 0:
            logs.say(note)
        spawn(worker, process) if spawning else run(worker, process)
    except (UsageError, RunError) as error:
        complain(error, process)


def plan(
    environment: Mapping[str, str],
    gpus: int,
    *,
    multiprocessing_distributed: bool = False,
    gpu: int | None = None,
    world_size: int = -1,
    rank: int = -1,
    dist_url: str = DIST_URL,
    dist_backend: str | None = None,
) -> tuple[Process, bool, str]:
    """What this process is; whether it starts the processes of this machine (then: the first of them); a note.

    The first of these that applies decides:

    1. torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`): this process is one of them.
    2. An srun step of several tasks: likewise, one task for each GPU. (A batch script's own shell is no such step.)
       With --multiprocessing-distributed and one task on each machine, the tasks count machines.
    3. `RANK` and `WORLD_SIZE` alone (Kubernetes' PyTorchJob): they count machines, as below.
    4. The options, as in MoCo: `world_size` and `rank` count machines. With --multiprocessing-distributed a machine
       starts one process for each of the `gpus` that are visible, otherwise it is one: on GPU --gpu, the first GPU,
       or the CPU.

    The note names the options that the environment overrides. Raises UsageError or RunError where the environment or
    the options are impossible.
    """
    if gpu is not None and not gpus:
        raise UsageError(f"--gpu {gpu}: this machine shows no GPU")
    given = {
        "--multiprocessing-distributed": multiprocessing_distributed,
        "--world-size": world_size != -1,
        "--rank": rank != -1,
        "--gpu": gpu is not None,
        "--dist-url": dist_url != DIST_URL,
    }

    def overridden(by, *names):
        names = [name for name in names if given[name]]
        return f"note: {by} decides which processes there are: {', '.join(names)} ignored" if names else ""

    many = multiprocessing_distributed
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        ranks = [integer(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        ranks.append(integer(environment, "LOCAL_WORLD_SIZE", 1))
        node = integer(environment, "GROUP_RANK", ranks[0] // ranks[3])
        return Process(*ranks, backend=dist_backend, node=node), False, overridden("torchrun", *given)
    if integer(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:
        rank, world_size = integer(environment, "SLURM_PROCID"), integer(environment, "SLURM_STEP_NUM_TASKS")
        on_node, node = tasks_here(environment), integer(environment, "SLURM_NODEID", 0)
        url = dist_url if given["--dist-url"] else meeting_point(environment)
        if not (many and on_node == 1 and gpu is None):
            if rank == 0:
                check_port(url)
            local = integer(environment, "SLURM_LOCALID", 0)
            own = 0 if gpus == 1 else None  # with --gpus-per-task=1 each task sees its own GPU, numbered 0
            process = Process(rank, world_size, local, on_node, url, dist_backend, own, node)
            return process, False, overridden("srun", *list(given)[:4])
        dist_url, note = url, overridden("srun", "--world-size", "--rank")
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = integer(environment, "RANK"), integer(environment, "WORLD_SIZE")
        many, note = True, ["--world-size", "--rank"]
        if "MASTER_ADDR" in environment:
            dist_url, note = meeting_point(environment), [*note, "--dist-url"]
        note = overridden("the environment (RANK and WORLD_SIZE, which count nodes)", *note)
    else:
        note = ""
    nodes, node = (world_size, rank) if world_size >= 1 else (1, 0)
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {rank} is not one of the {nodes} nodes: it is 0 to {nodes - 1}")
    on_node = max(gpus, 1) if many and gpu is None else 1
    if nodes * on_node > 1 and node == 0:
        check_port(dist_url)
    first = Process(node * on_node, nodes * on_node, 0, on_node, dist_url, dist_backend, gpu, node)
    return first, on_node > 1, note


def integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """An environment variable as an int; UsageError if it is not one."""
    text = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise UsageError(f"the environment variable {name} is '{text}', not a whole number") from None


def tasks_here(environment: Mapping[str, str]) -> int:
    """The tasks of this srun step on this node; SLURM writes those of all nodes as "4(x2),3"."""
    tasks = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            tasks += [int(match[1])] * int(match[2] or 1)
    node = integer(environment, "SLURM_NODEID", 0)
    return tasks[node] if node < len(tasks) else 1


def meeting_point(environment: Mapping[str, str]) -> str:
    """Where the processes meet: MASTER_ADDR and MASTER_PORT, or else the first node of an srun step, and a port that
    depends on the job and the step."""
    host = environment.get("MASTER_ADDR")
    if not host:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
        host = re.match(r"[^,\[]*", nodes)[0]  # of "gpu[07-09,12],cpu1" the first is gpu07
        if nodes[len(host) :].startswith("["):
            prefix, numbers, suffix = re.match(r"([^\[]*)\[(\w+)[^\]]*\]([^,\[]*)", nodes).groups()
            host = prefix + numbers + suffix
    step = integer(environment, "SLURM_JOB_ID", 0) + integer(environment, "SLURM_STEP_ID", 0)
    return f"tcp://{host}:{integer(environment, 'MASTER_PORT', 10001 + step % 10000)}"


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


def complain(error: UsageError | RunError, process: Process | None = None) -> None:
    """One line on stderr, with rank and host where there are several processes, and the error's exit status.

    On each machine the first process to get here prints it. The others wait, because the launcher ends all processes
    once one has failed. Without a group, or when rank 0 is gone, the machine's first process prints it. `error.alone`:
    perhaps only this process has the error, so it prints it itself.
    """
    several = process is not None and process.world_size > 1
    said = first = None
    if watch is not None:
        watch.stop()
        if isinstance(error, LostError):
            if process.on_node > 1:
                time.sleep(GRACE + 2)  # a launcher may know more, and ends this one
            said = watch.failure()
        else:
            watch.tell(f"{one_line(error)} ({place(process)})")
        first = watch.first_of_node()
    if first is None:
        first = not several or process.local_rank == 0 or getattr(error, "alone", False)
    if first:
        text = one_line(error) + (f" ({place(process)})" if several else "") + (f": {said}" if said else "")
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    if several:
        time.sleep(3)  # for the others: to print theirs, to read ours
    if dist.is_initialized():
        # A group whose processes go one by one can hang or abort while the interpreter is taken down.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(error.status)
    sys.exit(error.status)


def place(process: Process) -> str:
    return f"rank {process.rank} on {socket.gethostname()}"


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
        dead = replace(first, rank=first.rank + error.error_index, local_rank=0)
        text = f"process {error.error_index} of {first.on_node} was ended by {error.signal_name}; {ADVICE}"
        complain(RunError(text), dead)


def spawned(local_rank: int, worker: Callable[[torch.device], None], first: Process) -> None:
    os.setpgrp()  # a terminal's Ctrl-C goes to the process that started this one, which passes it on, once
    process = replace(first, rank=first.rank + local_rank, local_rank=local_rank)
    try:
        run(worker, process)
    except (UsageError, RunError) as error:
        complain(error, process)


def run(worker: Callable[[torch.device], None], process: Process) -> None:
    """Joins the process group, if there is more than one process, and calls the worker on this process's device."""
    device = choose_device(process)
    distributed.processes_on_node, distributed.local_rank = process.on_node, process.local_rank
    distributed.nodes = -(-process.world_size // process.on_node)
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
    number = process.local_rank if process.gpu is None else process.gpu
    if number >= gpus or (process.gpu is None and process.on_node > gpus):
        which = f"process {number} of {process.on_node} has no GPU" if process.gpu is None else f"no GPU {number}"
        raise UsageError(f"{which}: this machine shows {gpus}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 is float32 itself; bf16 is the fast one
    return device


def join_group(process: Process, device: torch.device) -> None:
    backend = process.backend or ("nccl" if device.type == "cuda" else "gloo")
    own = device if device.type == "cuda" else None
    try:
        dist.init_process_group(backend, process.url, PATIENCE, process.world_size, process.rank, device_id=own)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the {process.world_size} processes could not meet at {process.url} within "
            f"{PATIENCE.total_seconds() / 60:g} minutes: {str(error).splitlines()[0]}"
        ) from None
    start_watch(process)


def start_watch(process: Process) -> None:
    """Watches the other processes, over a connection of its own to the store where they met."""
    global watch
    place_of_store = urlparse(process.url)
    host, port = place_of_store.hostname, place_of_store.port
    if place_of_store.scheme == "env":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if host is None or port is None:  # file://
        return

    def lost(text):
        error = LostError(f"another of the {process.world_size} processes has ended or cannot be reached; {ADVICE}")
        if watch.first_of_node() or (watch.broken and process.local_rank == 0):
            line = f"{one_line(error)} ({place(process)}): {text}"
            print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
        os._exit(error.status)

    watch = Watch(host, port, process.rank, process.world_size, process.node, lost)


def leave_group() -> None:
    global watch
    if dist.is_initialized():
        dist.barrier()  # rank 0 hosts the store that the others watch
        if watch is not None:
            watch.stop()
            watch = None
        dist.destroy_process_group()


def explained(error: RuntimeError, process: Process) -> RuntimeError | RunError:
    """The error to report to the user, or the given one if it is a bug."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        reason = str(error).splitlines()[0]
        return RunError(f"out of memory: a smaller -b or --moco-k may fit ({reason})", alone=True)
    if "DataLoader worker" in str(error):  # PyTorch's SIGCHLD handler raises it wherever the main thread is
        return RunError(WORKER_DIED, alone=True)
    if distributed.lost_connection(error):
        return LostError(f"another of the {process.world_size} processes has ended or cannot be reached; {ADVICE}")
    return error
