"""slow_disk.py SCRIPT ...: runs a script to which every checkpoint takes two minutes, and is never saved."""

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
