"""The few collectives. Every function works without an initialised process group: then there is one process."""

import inspect
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Names that differ between PyTorch releases; the old ones cause warnings in new releases.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if newer else "broadcast_buffers"

nodes, processes_on_node, local_rank = 1, 1, 0  # set by moco.launch


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Averages the model's gradients over the processes. All start from rank 0's state; each keeps its own statistics."""
    if world_size() == 1:
        return model
    for buffer in model.buffers():  # with SYNC_BUFFERS some releases of PyTorch leave them as they are
        broadcast(buffer)
    buffers, on_gpu = {SYNC_BUFFERS: False}, torch.device(device).type == "cuda"
    return DistributedDataParallel(model, device_ids=[device] if on_gpu else None, **buffers)


def all_gather(x: Tensor) -> Tensor:
    """(n, ...) on each process -> (world_size * n, ...), in rank order, without gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    gather_into(out, x.contiguous())
    return out


def gather_keys_and_labels(k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, C) float32 keys and (n,) int64 labels on each process -> those of all, in rank order, without gradient.

    Each int64 label is packed into two float32 columns next to its key: one gather per step.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are int64, not {labels.dtype}")
    if world_size() == 1:
        return k, labels
    packed = all_gather(torch.cat([k, labels.view(-1, 1).view(torch.float32)], dim=1))
    return packed[:, :-2], packed[:, -2:].contiguous().view(torch.long).view(-1)


def with_gradient(gathered: Tensor, mine: Tensor) -> Tensor:
    """`gathered` (world_size * n, ...) with this process's rows replaced by `mine`, which has a gradient.

    The backward pass needs no collective: each process differentiates the loss with respect to its own rows.
    (torch.distributed.nn.functional.all_gather would sum all processes' gradients in another collective.)
    """
    if world_size() == 1:
        return mine
    start = rank() * len(mine)
    return torch.cat([gathered[:start], mine, gathered[start + len(mine) :]])


def all_mean(x: Tensor) -> Tensor:
    """The mean of a float tensor over the processes, on each of them."""
    return all_sum(x.clone()) / world_size() if world_size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on each of them (written into x)."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's tensor, on each process (written into x)."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def my_rows(x: Tensor) -> Tensor:
    """This process's share of the rows of a tensor that every process has; all shares are equal, if possible."""
    return x.tensor_split(world_size())[rank()]


def exchange(x: Tensor, order: Tensor, on_host: Tensor) -> Tensor:
    """This process's share of the rows in a new order: global row j of the result is global row order[j] of x.

    Each row goes directly from the process that has it to the one that needs it.

    Args:
        x: (n, ...), this process's rows. order: (world_size * n,) int64, a permutation of all rows, on x's device.
        on_host: the same on the CPU: the sizes of what is sent are needed there, and reading `order` would wait.
    """
    if world_size() == 1:
        return x[order]
    me, by_process = rank(), (world_size(), len(x))
    mine = (order // len(x) == me).int().argsort(descending=True, stable=True)[: len(x)]  # new rows that are here
    senders = order.view(by_process)[me] // len(x)
    sent = (on_host // len(x) == me).view(by_process).sum(1).tolist()
    received = (on_host.view(by_process)[me] // len(x)).bincount(minlength=world_size()).tolist()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x[order[mine] - me * len(x)], received, sent)
    return out[senders.argsort(stable=True).argsort()]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        dist.is_initialized() and any(word in text for word in ("gloo", "Connection", "NCCL", "Timed out"))
    )
