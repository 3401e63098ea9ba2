"""Runs a script as on a machine with two GPUs: SCRIPT [OPTION...]. The processes that it starts see none: the CPU."""

import runpy
import sys

import torch

if __name__ == "__main__":
    torch.cuda.device_count = lambda: 2
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
