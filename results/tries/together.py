#!/usr/bin/env python3
"""Runs many short trainings side by side on one GPU: command lines from stdin, JOBS of them at a time.

    python results/tries/together.py JOBS DATA... < lines        (from the project's folder, with PYTHONPATH=.)

`python SCRIPT` in a line is a fork of a process that has imported all modules and decoded the images of each DATA, so it
starts in a second. After a first SIGTERM (`pkill -o -f together.py`: the forks have the same name) no more lines start; a
second one is passed on to what runs, which saves and ends. For Linux.
"""

import concurrent.futures
import functools
import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = [ROOT, ROOT / "scripts", ROOT / "results" / "tries"]
BOTH = (signal.SIGTERM, signal.SIGINT)


def client():
    """What `python` is within a line. It hands its command line to the server, and ends with its status."""
    words = sys.argv[1:]
    if not words or Path(words[0]).resolve().parent not in OURS:
        os.execv(os.environ["TOGETHER_PYTHON"], [os.environ["TOGETHER_PYTHON"], *words])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ["TOGETHER"])
        socket.send_fds(server, [json.dumps([words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
        pid = int(server.recv(32))
        for number in (*BOTH, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int(server.recv(32))
    sys.exit(status if status >= 0 else 128 - status)


def serve(path: str, folders: list[str]) -> None:
    """Imports and decodes once, then forks for each client."""
    sys.path[:0] = map(str, OURS)
    import moco  # noqa: F401, I001  before torch

    import torch

    import main_lincls  # noqa: F401
    import reproduce  # noqa: F401
    from moco import datasets, pretrain  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    datasets.open_image = functools.cache(datasets.open_image)
    for folder, train in itertools.product(folders, (True, False)):
        datasets.load("imagefolder", folder, train)
    for number in (*BOTH, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen(64)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> None:
    """Forks once more to run the client's script; waits for its end."""
    request, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    words, folder, environment = json.loads(request)
    pid = os.fork()
    if pid:
        for file in (0, 1, 2, *files):
            os.close(file)  # who reads them waits for their end
        connection.send(str(pid).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(str(status).encode())
        os._exit(0)
    connection.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
    for number in BOTH:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.executable, sys.argv = environment["TOGETHER"] + "-bin/python", words
    runpy.run_path(words[0], run_name="__main__")


def main():
    jobs, folders = int(sys.argv[1]), sys.argv[2:]
    lines = [line.strip() for line in sys.stdin if line.strip() and not line.startswith("#")]
    asked, running = [], set()

    def stop(number, frame):
        asked.append(number)
        for process in running if len(asked) > 1 else ():
            os.killpg(process.pid, signal.SIGTERM)

    def one(number, line):
        if asked:
            return
        begun = time.time()
        process = subprocess.Popen(line, shell=True, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
        running.add(process)
        status = process.wait()
        running.remove(process)
        print(f"together: line {number}: status {status}, {time.time() - begun:.0f} s: {line}", flush=True)

    folder = tempfile.mkdtemp()  # without `with`: the forks leave through here, too
    path = os.path.join(folder, "server")
    os.mkdir(f"{path}-bin")
    os.symlink(Path(__file__).resolve(), f"{path}-bin/python")
    environment = os.environ | {
        "TOGETHER": path,
        "TOGETHER_PYTHON": sys.executable,
        "PATH": f"{path}-bin{os.pathsep}{os.environ['PATH']}",
    }
    if (server := os.fork()) == 0:
        return serve(path, folders)
    for number in BOTH:
        signal.signal(number, stop)
    while not os.path.exists(path):
        time.sleep(0.1)
        if os.waitpid(server, os.WNOHANG)[0]:
            sys.exit("together: the server has ended")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, itertools.count(1), lines))
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    shutil.rmtree(folder)


if __name__ == "__main__":
    client() if Path(sys.argv[0]).name == "python" else main()
