"""Prints the collectives of a short run, with the bytes that rank 0 passes to each: OUT CLASS [OPTION...]. Used by test_processes.

Each line has the kind of collective (gather, reduce, broadcast, crops for the all-to-all, or bucket for the gradients in
a bucket of DistributedDataParallel), its bytes, the step, and how many gradients this backward pass has yet to compute.
To run it by hand: PYTHONPATH=.:tests torchrun --nproc-per-node 4 tests/subprocesses/count_traffic.py ...
"""

import sys

import torch.distributed as dist

from helpers import TINY, train
from moco import distributed, methods

dist.init_process_group("gloo")
step, missing = 0, 0
all_reduce = dist.all_reduce


def note(what, x):
    if distributed.rank() == 0:
        print("sent", what, x.numel() * x.element_size(), step, missing, flush=True)


def counted(what, call, argument=0):
    def wrapped(*args, **kwargs):
        note(what, args[argument])
        return call(*args, **kwargs)

    return wrapped


def forbidden(*args, **kwargs):
    raise AssertionError("a collective that this test does not count")


def parallel(model, device):
    network = wrap(model, device)

    def hook(state, bucket):
        note("bucket", bucket.buffer())
        mean = bucket.buffer().div_(distributed.world_size())
        return all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])

    network.register_comm_hook(None, hook)
    network.register_forward_pre_hook(count_step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count_gradient)
    return network


def count_step(network, inputs):
    global step, missing
    step, missing = step + 1, sum(parameter.requires_grad for parameter in network.parameters())


def count_gradient(parameter):
    global missing
    missing -= 1


distributed.gather_into = counted("gather", distributed.gather_into, 1)
dist.all_reduce = counted("reduce", all_reduce)
dist.broadcast = counted("broadcast", dist.broadcast)
dist.all_to_all_single = counted("crops", dist.all_to_all_single, 1)
for name in ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_to_all", "scatter"):
    setattr(dist, name, forbidden)
for name in ("gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "send", "recv", "isend", "irecv"):
    setattr(dist, name, forbidden)
for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "batch_isend_irecv"):
    setattr(dist, name, forbidden)
wrap, distributed.parallel = distributed.parallel, parallel

out, method_name = sys.argv[1:3]
method = next(method for method in methods.ALL.values() if method.model.__name__ == method_name)
train(method, TINY, "-p 2 --epochs 1 --warm-up 1 --output-dir", out, *sys.argv[3:])
dist.destroy_process_group()
