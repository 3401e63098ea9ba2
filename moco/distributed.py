"""Launching (one process, spawn, torchrun) and the few collectives.

Every function works without an initialised process group: then there is one process.
"""

import atexit
import contextlib
import inspect
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from moco.errors import RunError, UsageError, one_line

PATIENCE = timedelta(minutes=10)  # how long a process waits for the others before it gives up
GRACE = 10  # seconds that the other processes have to leave when one has failed
# Names that differ between releases of PyTorch; the older ones warn in the newer ones.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if newer else "broadcast_buffers"
ADVICE = "--resume auto goes on from the last checkpoint"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x):
    """(n, ...) on each process -> (world_size * n, ...), in rank order, without gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    gather_into(out, x.contiguous())
    return out


def parallel(model, device):
    """The model with its gradients averaged over the processes, each of which keeps its own running statistics."""
    if world_size() == 1:
        return model
    buffers = {SYNC_BUFFERS: False}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **buffers)


def all_mean(x):
    """The mean of a float tensor over the processes, on each of them."""
    return all_sum(x.clone()) / world_size() if world_size() > 1 else x


def all_sum(x):
    """The sum of a tensor over the processes, on each of them, written into x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def total(value, device):
    """The sum of a number over the processes."""
    return all_sum(torch.tensor(value, dtype=torch.float64, device=device)).item()


def from_first(x):
    """The first process's tensor, on each of them (written into x)."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def my_rows(x):
    """This process's equal share of the rows of a tensor that every process holds."""
    share = len(x) // world_size()
    return x[rank() * share : (rank() + 1) * share]


def shuffle_images(images, order):
    """MoCo's gathered shuffle: row j of the result is global row order[j]; each process gets its share of rows."""
    return all_gather(images)[my_rows(order)]


def barrier():
    if world_size() > 1:
        dist.barrier()


def launch(worker, args):
    """Runs `worker(device, args)` on every process that the command line asks for, and exits with its status.

    Under torchrun this process is one of them. With --multiprocessing-distributed it starts one for each visible GPU
    (one, on a CPU). Otherwise it is the only one of this machine: on GPU --gpu, the first GPU, or the CPU.
    An error of the user's is one line on stderr, from the first process alone.
    """
    try:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            args.dist_url = "env://"
            run(worker, args, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            return
        nodes, node = args.world_size, args.rank
        if nodes < 1:
            nodes, node = 1, 0
        if not 0 <= node < nodes:
            raise UsageError(f"--rank {args.rank} is not one of the {nodes} nodes: it is 0 to {nodes - 1}")
        on_node = torch.cuda.device_count() if args.multiprocessing_distributed and args.gpu is None else 1
        on_node = max(on_node, 1)
        args.world_size, args.rank = nodes * on_node, node * on_node
        if args.world_size > 1 and node == 0:
            check_port(args.dist_url)
        if on_node == 1:
            run(worker, args, args.gpu or 0, 1)
        else:
            spawn(worker, args, on_node)
    except (UsageError, RunError) as error:
        complain(error, max(args.rank, 0) if "RANK" in os.environ else 0)


def complain(error, rank=0):
    """One line on stderr and the error's exit status.

    What befalls all processes the first one says; the others wait for it, since whoever starts them ends all with the
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


def spawn(worker, args, processes):
    """One process a GPU of this machine. What this process is asked by a signal, it passes on to them."""
    context = mp.start_processes(spawned, (worker, args, processes), processes, join=False)

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
        complain(RunError(f"process {error.error_index} of {processes} was ended by {error.signal_name}; {ADVICE}"))


def spawned(local_rank, worker, args, processes):
    args.rank += local_rank
    os.setpgrp()  # a terminal's Ctrl-C goes to the process that started this one, which passes it on, once
    try:
        run(worker, args, local_rank, processes)
    except (UsageError, RunError) as error:
        complain(error, args.rank)


def run(worker, args, local_rank, processes):
    """Joins the process group, if there is more than one process, and calls the worker on this process's device."""
    gpus = torch.cuda.device_count()
    if gpus and (processes > gpus or local_rank >= gpus):
        raise UsageError(f"process {local_rank} of {processes} has no GPU: this machine shows {gpus}")
    args.processes_on_node = processes
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    elif args.gpu is not None:
        raise UsageError(f"--gpu {args.gpu}: this machine shows no GPU")
    batch = args.batch_size
    if batch % args.world_size:
        raise UsageError(f"-b {batch} cannot be shared equally by {args.world_size} processes")
    if args.world_size > 1:
        backend = args.dist_backend or ("nccl" if gpus else "gloo")
        try:
            dist.init_process_group(
                backend, args.dist_url, PATIENCE, args.world_size, args.rank, device_id=device if gpus else None
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"the {args.world_size} processes could not meet at {args.dist_url} within "
                f"{PATIENCE.total_seconds() / 60:g} minutes: {reason}",
                alone=True,
            ) from None
    try:
        worker(device, args)
        leave_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:  # all processes have agreed to leave
        leave_group()
        raise
    # A process that fails alone does not leave the group first: with NCCL that waits for the others.
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            reason = str(error).splitlines()[0]
            raise RunError(f"out of memory: a smaller -b or --moco-k may fit ({reason})", alone=True) from None
        if not lost_connection(error):
            raise
        raise RunError(f"another of the {args.world_size} processes has ended or cannot be reached; {ADVICE}") from None


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_connection(error):
    """Is this how a collective fails when another process is gone?"""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        dist.is_initialized() and any(word in text for word in ("gloo", "Connection", "NCCL", "Timed out"))
    )


def check_port(url):
    """The first process listens on the port of --dist-url, so it must be free."""
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
