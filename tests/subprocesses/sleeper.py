"""Starts two processes and kills the second; the first ignores SIGTERM and sleeps: PORT. Used by test_launch."""

import os
import signal
import sys
import time

import torch

from moco import distributed, launch


def worker(device):
    distributed.barrier()
    if distributed.rank() == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("survivor", os.getpid(), flush=True)
    time.sleep(300)


if __name__ == "__main__":
    launch.GRACE = 1
    torch.cuda.device_count = lambda: 2  # only here: the processes that it starts see no GPU
    launch.launch(worker, multiprocessing_distributed=True, dist_url=f"tcp://localhost:{sys.argv[1]}")
