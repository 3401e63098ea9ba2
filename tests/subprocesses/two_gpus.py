"""Runs a script as if there were two GPUs; the two processes that it starts use the CPU: SCRIPT [OPTION...]. Used by test_launch."""

import runpy
import sys

import torch

if __name__ == "__main__":
    torch.cuda.device_count = lambda: 2
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
