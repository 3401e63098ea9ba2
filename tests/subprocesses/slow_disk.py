"""Runs a script that takes two minutes to save a checkpoint: SCRIPT [OPTION...]. Used by test_faults."""

import runpy
import sys
import time

from moco import checkpoint


def save(*rest):
    print("saving", flush=True)
    time.sleep(120)


checkpoint.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
