"""The weights of measured rows: an encoder with its linear classifier a file, written by reproduce.py and checked by it."""

import hashlib
from pathlib import Path

import torch

import results
from moco import checkpoint, datasets, evaluate, inference, launch
from moco.batches import Centres
from moco.checkpoint import LINEAR
from moco.errors import RunError, UsageError, say

TOLERANCE = 0.02  # in percent: two of 10,000 images
KEPT = ["arch", "stem", "image_size", "mean", "std", "classes", "images", "dataset", "epochs", "batch_size", "seed"]


def write(run: Path, result: dict, path: Path) -> dict:
    """Writes the last epoch's encoder and classifier of a finished run, and says where and with which checksum.

    Args:
        run: the run's folder. result: its top1, top5 and linear_epochs. path: of the file.
    """
    pretraining, saved = checkpoint.load(run / checkpoint.LAST), checkpoint.load(run / LINEAR)
    kept = {name: pretraining["options"][name] for name in KEPT}
    content = {
        "epoch": saved["epoch"],
        "arch": saved["arch"],
        "state_dict": checkpoint.with_prefix(checkpoint.encoder_weights(saved, run)),
        "best": {"top1": result["top1"], "top5": result["top5"], "epoch": result["linear_epochs"] - 1},
        "options": kept | {"centre_crop": saved["options"]["centre_crop"]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, content)
    return {"file": f"{path.parent.name}/{path.name}", "sha256": sha256(path)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(folder: Path, files: Path, data: str) -> None:
    """Evaluates every file of `folder` in float32 on CIFAR-10 in `data`, against the file in `files` that names it.

    Raises:
        RunError: one is missing or changed, belongs to no result, or gives another accuracy.
    """
    rows = [(path, results.read(path)) for path in sorted(files.glob("*.json"))]
    named = {Path(row["weights"]["file"]).name: (path, row) for path, row in rows if row.get("weights")}
    found = sorted(folder.glob("*.pth.tar"))
    if not found:
        raise UsageError(f"'{folder}' holds no weights (*.pth.tar)")
    for path in found:
        if path.name not in named:
            raise RunError(f"no file in '{files}' names '{path}'")
    for name in named:
        if not (folder / name).exists():
            raise RunError(f"'{folder / name}' is missing: '{named[name][0]}' names it")
    dataset = datasets.resolve("auto", data)
    device = launch.choose_device()
    images = datasets.load(dataset, data, False, device=device)
    wrong = []
    for path in found:
        file, row = named[path.name]
        if sha256(path) != row["weights"]["sha256"]:
            raise RunError(f"'{path}' is not the file that '{file}' names: its checksum differs")
        scores = accuracy(path, images, device)
        # Weights of cross entropy from before it had a linear classifier hold its own.
        filed = [row.get(name, row.get(f"classifier_{name}")) for name in ("top1", "top5")]
        same = all(abs(mine - theirs) <= TOLERANCE for mine, theirs in zip(scores, filed, strict=True))
        wrong += [] if same else [path.name]
        here, there = (f"{top1:.2f} / {top5:.2f}" for top1, top5 in (scores, filed))
        say(f"{path.name:<28} {here}  {'=' if same else 'differs from'} {there}  {file}")
    if wrong:
        raise RunError(f"other accuracies than on file: {', '.join(wrong)}")


def accuracy(path: Path, images: datasets.Split, device: torch.device) -> tuple[float, float]:
    """Top-1 and top-5 in percent of a file's encoder and classifier, in float32."""
    network, centre, classes = inference.load(path)
    checkpoint.compare_classes(classes, images.classes, path)
    network = evaluate.frozen(network, keep_fc=True).to(device)
    return evaluate.accuracy(network, Centres(images, centre, 250, device), len(images.classes))[:2]
