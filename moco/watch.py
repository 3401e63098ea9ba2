"""A thread that notices when another process has failed: an NCCL collective would wait for it without end.

Heartbeats go through the store where the processes met, a few bytes a second.
"""

import contextlib
import ctypes
import itertools
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

EVERY = 2  # seconds between two heartbeats
LOST = 30  # seconds without a heartbeat after which a process counts as dead
GRACE = 10  # seconds in which the training thread may notice itself, before this one ends the process


class Watch:
    """A thread that watches the next rank, and what any rank has reported; a failure reaches all.

    Args:
        host, port: of the store. node: this machine's number.
        lost: called in the thread with what has happened, when the training thread has not noticed by itself.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, node: int, lost: Callable[[str], None]):
        # The group's own connection would be taken while a collective waits for it.
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
        self.store = dist.PrefixStore(f"moco/watch/{attempt}", store)
        no_warnings()
        self.rank, self.next, self.node, self.lost = rank, (rank + 1) % world_size, node, lost
        self.place = f"rank {rank} on {socket.gethostname()}"
        self.stopped = threading.Event()
        self.broken = False  # the store is gone
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        sign, silent = None, 0
        for beat in itertools.count():
            try:
                self.ask(self.store.set, f"alive/{self.rank}", f"{beat} {self.place}")
                before, sign = sign, self.read(f"alive/{self.next}")
                # Counted, not timed: this process may have been suspended itself.
                silent = silent + EVERY if sign == before else 0
                if silent >= LOST:
                    who = sign.partition(" ")[2] if sign else f"rank {self.next}"
                    self.ask(self.store.set, "failed", f"{who} has sent no heartbeat for {LOST} seconds")
                failure = self.read("failed")
            except ConnectionError:
                failure = "rank 0 cannot be reached"
            if failure:
                if not self.stopped.wait(GRACE):
                    self.lost(failure)
                return
            if self.stopped.wait(EVERY):
                return

    def ask(self, request: Callable, *values) -> Any:
        """The store's answer; ConnectionError, if it is gone. After one failure none is asked for: it might be late."""
        if not self.broken:
            try:
                return request(*values)
            except RuntimeError:
                self.broken = True
        raise ConnectionError

    def read(self, name: str) -> str | None:
        return self.ask(self.store.get, name).decode() if self.ask(self.store.check, [name]) else None

    def tell(self, text: str) -> None:
        """Tells the other processes why this one fails; the first failure counts."""
        with contextlib.suppress(ConnectionError):
            self.ask(self.store.compare_set, "failed", "", text)

    def failure(self) -> str | None:
        """The failure that a process has reported, if any."""
        with contextlib.suppress(ConnectionError):
            return self.read("failed")
        return None

    def first_of_node(self) -> bool | None:
        """Whether this is the first process of its machine to ask; None if rank 0, and the store with it, is gone."""
        with contextlib.suppress(ConnectionError):
            return self.ask(self.store.add, f"failed/{self.node}", 1) == 1
        return None

    def stop(self) -> None:
        self.stopped.set()


def no_warnings() -> None:
    """This process prints PyTorch's C++ errors only: a request that the death of rank 0 interrupts prints a page.

    As TORCH_CPP_LOG_LEVEL=ERROR does, which PyTorch reads when it is imported; where the user has set that, it stays.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        with contextlib.suppress(OSError, ValueError):  # another system, or another version of PyTorch
            ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level").value = 2
