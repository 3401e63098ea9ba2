"""Reproduces rows of the README's table: pretraining, linear evaluation, and a file with the result in results/.

    python scripts/reproduce.py in-200 data/                 # one row, as published
    python scripts/reproduce.py --print                      # the command lines of all rows, nothing run
    python scripts/reproduce.py --small data/                # the six methods with a small network
    python scripts/reproduce.py --verify data/               # the accuracy of every file of pretrained/: ten seconds per file
    python scripts/reproduce.py out-1000 data/ -a resnet20 --epochs 5 --seeds 0 1 2     # scaled down, three seeds

Run an interrupted command again and it continues. Logs and checkpoints are in runs/ROW-NAME-seedN/.
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torchvision

import results
import weights
from moco import checkpoint, distributed, launch, options
from moco.checkpoint import LINEAR
from moco.errors import UsageError, say
from moco.run import read_log
from picture import embedding
from results import ROOT, ROWS, SMALL_LINEAR

# Without a GPU: the same views, batch and classifier for all.
SMALL = "-a resnet20 --epochs 60 -b 256 --aug-plus --warm-up 1 --knn-freq 5 --precision bf16"
# The best of four per method, by kNN accuracy on held-out training images: results/lr/.
SMALL_LR = {"main_ce.py": "0.1", "main_moco.py": "0.06"}  # and 0.6 for the others
SMALL_ROWS = ("ce", "supcon", "moco-200", "in-200", "out-1000", "suploss-1000")  # each method once


@launch.reporting()
def main():
    args = parse()
    if args.verify:
        weights.verify(args.weights or ROOT / "pretrained", args.results, args.data)
        return
    for key in args.rows or ROWS:
        for seed in args.seeds:
            if args.print:
                say("\n".join(map(shlex.join, commands(key, args, seed, "RUN"))))
            else:
                reproduce(key, args, seed)


def parse():
    parser = options.Parser(f"{__doc__}\nrows: {', '.join(ROWS)}")
    add = parser.add_argument
    add("words", nargs="*", metavar="ROW", help="rows to run, and the data folder (default: data/)")
    add("--print", action="store_true", help="show the command lines (of all rows, unless some are named), run nothing")
    add("--seeds", type=options.count, nargs="+", default=[0], metavar="N", help="one run for each (default: 0)")
    add("--small", action="store_true", help="resnet20, 60 epochs, the same views and batch for all methods")
    add("-a", "--arch", help="another architecture than the row's")
    add("--epochs", type=options.positive_int, metavar="N", help="another number of epochs of pretraining")
    add("--pretrain", default="", metavar="OPTIONS", help="options for pretraining, in quotes; one: --pretrain=--mlp")
    add("--linear", default="", metavar="OPTIONS", help="more options for the linear evaluation, in quotes")
    add("--name", help="of the run's folder and file (default: made from the row, the architecture and the epochs)")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept (default: runs)")
    add("--weights", type=Path, metavar="DIR", help="also write weights there (--verify: read; default: pretrained)")
    add("--verify", action="store_true", help="evaluate each file of --weights against --results; no training")
    add("--results", type=Path, metavar="DIR", help="where files go (default: results; --verify: this project's)")
    args = parser.parse_intermixed_args()
    for name in ("pretrain", "linear"):
        text = getattr(args, name)
        try:
            setattr(args, name, shlex.split(text))
        except ValueError as error:
            parser.error(f"--{name} {text}: {error}")
    if {"-a", "--arch", "--epochs"} & {*last_of_each(args.pretrain)}:
        parser.error("-a and --epochs are options of this script: name them outside of --pretrain")
    if args.name and Path(args.name).name != args.name:
        parser.error(f"--name '{args.name}' is part of a file's name: it cannot have a folder")
    args.rows = [word for word in args.words if word in ROWS] or [*SMALL_ROWS] * args.small
    others = [word for word in args.words if word not in ROWS]
    args.data = others.pop() if others else "data/"
    args.results = args.results or (ROOT / "results" if args.verify else Path("results"))
    if others or not (args.rows or args.verify or (args.print and not args.words)):
        problem = f"unknown row '{others[0]}'" if others else "name a row"
        parser.error(f"{problem}: the rows are {', '.join(ROWS)}; the data folder comes last")
    return args


def commands(key, args, seed, folder):
    """The command lines of a run, pretraining first; each a list of words."""
    row = ROWS[key]
    pretrain, linear = f"{row.options} --epochs {row.epochs}", row.linear
    if args.small and row.top1 is not None:  # the rows of our own are small themselves
        pretrain += f" {SMALL} --lr {SMALL_LR.get(row.script, '0.6')}"
        linear += f" {SMALL_LINEAR}"
    epochs = ["--epochs", str(args.epochs)] if args.epochs else []
    arch = ["-a", args.arch] if args.arch else []
    pretrain = last_of_each([*pretrain.split(), *epochs, *arch, *args.pretrain])
    linear = last_of_each([*linear.split(), *arch, *args.linear])
    common = ["--seed", str(seed), "--output-dir", str(folder), args.data]
    source = ["--pretrained", f"{folder}/{checkpoint.LAST}"]
    return [["python", row.script, *pretrain, *common], ["python", "main_lincls.py", *linear, *source, *common]]


def last_of_each(words):
    """Options with their values; of one that is given twice, the last, and of views. "--lr=0.6" becomes two words."""
    found = {}
    for word in words:
        if word.startswith("-"):
            option = word.split("=", 1)
            name = "views" if word.startswith("--aug-") else option[0]
            found.pop(name, None)
            found[name] = option
        elif found:
            found[name].append(word)
    return [word for option in found.values() for word in option]


def reproduce(key, args, seed):
    """Runs what has not run yet and writes the run's file."""
    pretrain = commands(key, args, seed, "")[0]
    arch, epochs = (pretrain[pretrain.index(option) + 1] for option in ("-a", "--epochs"))
    name = f"{args.name or f'{arch}-{epochs}ep'}-seed{seed}"
    folder = args.runs / f"{key}-{name}"
    for place in (folder, args.results):  # before the hours of work that go there
        place.mkdir(parents=True, exist_ok=True)
    lines = [shlex.join(command) for command in commands(key, args, seed, folder)]
    begun = begin(folder, lines)
    file = args.weights and seed == args.seeds[0] and args.weights / f"{key.partition('-')[0]}-{arch}.pth.tar"
    path = args.results / f"{key}-{begun['hardware']['name']}-{name}.json"
    if file:
        weights.refuse_another_rows(file, args.results, path)
    ended = folder / "result.json"
    if ended.is_file() and (folder / LINEAR).is_file():
        say(f"the run in '{folder}' is complete: nothing is trained")
        result = results.read_json(ended)
    else:
        ended.unlink(missing_ok=True)
        train(folder, lines[0], begun)
        before = results.read_json(path) if path.is_file() else {}
        if not (folder / LINEAR).exists() and "top1" not in before:  # a run cut short from here on has a file, too
            results.write_json(path, collect(folder, key, begun, seed))
        train(folder, lines[1], begun)
        points, labels, classes = embedding(folder, args.data, most=1000)
        torch.cuda.empty_cache()  # for the next run, another process
        x, y = points.T.astype(float).round(1).tolist()
        result = collect(folder, key, begun, seed)
        result["embedding"] = {"x": x, "y": y, "label": labels.tolist(), "classes": classes}
    if file:
        result["weights"] = weights.write(folder, result, file)
    for copy in (ended, path):
        results.write_json(copy, result)
    say(f"{path}: top-1 {result['top1']:.2f}, top-5 {result['top5']:.2f}, kNN {result.get('knn')}")


def begin(folder, lines):
    """How a run was begun, from its folder; UsageError: with other options."""
    path = folder / "begun.json"
    if not path.is_file():
        results.write_json(path, {"commands": lines, **conditions(), "cpu_seconds": 0.0})
    begun = results.read_json(path)
    old = begun.get("commands", [])
    mine, its = ([*map(without_folders, each)] for each in (lines, old))
    if mine != its and mine[:1] == its[:1] and not (folder / LINEAR).exists():
        say(f"note: the linear evaluation has not begun; this command line replaces: {'; '.join(old[1:])}")
        begun["commands"] = lines
    elif mine != its:
        text = f"'{folder}' was begun with other options: choose another --name, or remove it. It was begun with: "
        raise UsageError(text + "; ".join(old))
    return begun


def without_folders(line):
    """The words of a command line, except where its folders are: they may have moved."""
    *words, data = shlex.split(line)
    kept = [word for before, word in pairwise(["", *words]) if before not in ("--output-dir", "--pretrained")]
    return [*kept, Path(data).name]


def train(folder, line, begun):
    """Runs a command line of a run, or what is left of it, and adds its processor time to `begun`."""
    say(f"$ {line}")
    _, script, *words = shlex.split(line)
    before, spent = sum(os.times()[2:4]), begun["cpu_seconds"]  # of child processes that have ended: user and system
    results.write_json(folder / "begun.json", begun | {"cpu_seconds": None})  # not known if this process is killed
    status = call([sys.executable, str(ROOT / script), *words, "--resume", "auto"])
    begun["cpu_seconds"] = None if spent is None else round(spent + sum(os.times()[2:4]) - before, 1)
    results.write_json(folder / "begun.json", begun)
    if status == 2 and not (folder / checkpoint.LAST).exists():  # nothing has begun: correct the options and repeat
        (folder / "begun.json").unlink()
    if status:
        advice = "" if status == 2 else "; the same command continues it"
        print(f"{script} ended with status {status}{advice}", file=sys.stderr)
        raise SystemExit(status)


def collect(folder, key, begun, seed):
    """The content of a run's file, from its logs and its last checkpoints: without top1 before the linear evaluation."""
    files = {"pretrain": folder / checkpoint.LAST, "linear": folder / LINEAR}
    saved = {program: checkpoint.load(file)["options"] for program, file in files.items() if file.exists()}
    curve, linear = numbers(folder / "log.csv"), numbers(folder / "linear.csv")
    own, last = curve[-1], linear[-1] if linear else {}  # some methods have a classifier of their own
    best = max(linear, key=lambda row: row["top1"], default={})
    result = {
        "row": ROWS[key].name,
        **begun,  # with its commands
        "options": saved,
        "seed": seed,
        **{name: saved["pretrain"][name] for name in ("arch", "images", "epochs", "batch_size")},
        "dataset": dataset(saved["pretrain"]),
        "pretrain_seconds": round(sum(row["seconds"] for row in curve), 1),
        "linear_seconds": round(sum(row["seconds"] for row in linear), 1),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in curve), 1),
        **{name: last.get(name) for name in ("top1", "top5")},
        **{f"best_{name}": best.get(name) for name in ("top1", "top5")},
        **{f"classifier_{name}": own.get(name) for name in ("top1", "top5")},
        "knn": own.get("knn"),
        "curve": curve,
        "measured": time.strftime("%Y-%m-%d"),
    }
    if not conditions().items() <= begun.items():
        result["ended_with"] = conditions()  # another commit, machine or version than it began with
    return {name: value for name, value in result.items() if value is not None}


def numbers(path):
    """The rows of a log with numbers for text, without what was not measured."""
    rows = [{name: float(value) for name, value in row.items() if value != ""} for row in read_log(path)]
    return [row | {"epoch": int(row["epoch"])} for row in rows]


def call(command):
    """Runs a command to its end and returns its exit status; signals that ask this process to stop are passed on."""
    asked, child = [], None

    def pass_on(number, frame):
        number = signal.SIGTERM if number == signal.SIGHUP else number  # the script does not handle SIGHUP
        asked.append(number)
        if child:
            child.send_signal(number)

    stop = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
        stop.remove(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in stop}
    child = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C comes through here, once
    for number in asked:
        child.send_signal(number)
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status < 0:  # a signal has ended it
        asked.append(-status)
    return status if status > 0 or not asked else 128 + asked[0]  # it may have ended before it could stop


def dataset(saved):
    """An image folder with CIFAR-10's classes is CIFAR-10, unless its images are enlarged."""
    cifar10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return "cifar10" if saved["classes"] == cifar10 and saved["image_size"] == 32 else saved["dataset"]


def conditions():
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"commit": commit(), "hardware": hardware(), "versions": versions}


def hardware():
    cores, count = distributed.cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        title = torch.cuda.get_device_name(0)
        name = "-".join(title.lower().removeprefix("nvidia ").split()) + f"-x{count}" * (count > 1)
        return {"name": name, "device": f"{count} x {title}", "cores": cores}
    told = Path("/proc/cpuinfo")  # on Linux
    model = re.search("^model name.*: (.*)", told.read_text(), re.M) if told.is_file() else None
    return {"name": f"cpu{cores}", "device": model[1] if model else platform.machine(), "cores": cores}


def commit():
    """The commit that runs, marked if the code differs from it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return "unknown"
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "*.py"])
    head, changed = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True).stdout.strip() for c in commands)
    return (head or "unknown") + ("-changed" if changed else "")


if __name__ == "__main__":
    main()
