"""SIGTERM, SIGINT and SIGUSR1: a run finishes its step, saves and leaves."""

import signal

from moco import distributed
from moco.logs import say

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """A context manager in which SIGTERM, SIGINT and SIGUSR1 only set `asked`. A second SIGINT ends the run at once."""

    def __init__(self):
        self.asked = 0  # the signal's number

    @property
    def alone(self) -> bool:
        """Asked to stop, and there is no other process that must agree."""
        return bool(self.asked) and distributed.world_size() == 1

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in ASKING}
        return self

    def ask(self, number, frame):
        self.asked = number
        for s in ASKING:  # schedulers send theirs more than once
            signal.signal(s, signal.SIG_DFL if s == signal.SIGINT else signal.SIG_IGN)

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def leave(self, writer, when: str) -> None:
        """Ends this process when its checkpoint is written, as all processes have agreed."""
        writer.finish()
        say(f"stopped {when}; --resume auto continues from there")
        distributed.barrier()  # rank 0 has saved by now: the launcher ends all processes once one is gone
        raise SystemExit(128 + (self.asked or signal.SIGTERM))


def ignore_signals(worker: int = 0) -> None:
    """For data-loading workers: the training process handles signals, and needs its workers for the last step."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
