"""Two processes, one of which is killed while the other waits without end: PORT VICTIM RANK. Used by test_launch."""

import os
import signal
import sys
import time

import torch.distributed as dist

from moco import launch, watch

watch.LOST, watch.GRACE = 4, 1
port, victim, rank = map(int, sys.argv[1:])


def worker(device):
    dist.barrier()
    time.sleep(3)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)


launch.launch(worker, world_size=2, rank=rank, dist_url=f"tcp://localhost:{port}")
