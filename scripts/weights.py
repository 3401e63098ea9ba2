"""The weights of measured rows, a file per encoder and linear classifier: reproduce.py writes and checks them."""

import hashlib
from pathlib import Path

import results
from moco import checkpoint, datasets, evaluate, inference, launch
from moco.batches import Centres
from moco.checkpoint import LINEAR
from moco.errors import RunError, UsageError, say

SCORES = ("top1", "top5")
TOLERANCE = 0.02  # in percent: two of 10,000 images
KEPT = ["arch", "stem", "image_size", "mean", "std", "classes", "images", "dataset", "epochs", "batch_size", "seed"]


def write(run: Path, result: dict, path: Path) -> dict:
    """Writes the last epoch's encoder and classifier of a finished run, and says where and with which checksum.

    Args:
        run: the run's folder. result: its top1 and top5. path: of the file.
    """
    pretraining, saved = checkpoint.load(run / checkpoint.LAST), checkpoint.load(run / LINEAR)
    kept = {name: pretraining["options"][name] for name in KEPT}
    kept |= {name: saved["options"][name] for name in ("centre_crop", "aug_crop") if name in saved["options"]}
    content = {
        "epoch": saved["epoch"],
        "arch": saved["arch"],
        "state_dict": checkpoint.with_prefix(checkpoint.encoder_weights(saved, run)),
        # the accuracy that main_lincls.py -e prints: the last epoch's, as the weights are
        "best": {"top1": result["top1"], "top5": result["top5"], "epoch": saved["epoch"] - 1},
        "options": kept,
    }
    checkpoint.save(path, content)
    return {"file": f"{path.parent.name}/{path.name}", "sha256": sha256(path)}


def refuse_another_rows(file: Path, files: Path, own: Path) -> None:
    """UsageError: a result in `files` other than `own` names this file of weights, which would be overwritten."""
    for path in files.glob("*.json"):
        if path != own and results.read_json(path).get("weights", {}).get("file") == f"{file.parent.name}/{file.name}":
            raise UsageError(f"'{file}' has the weights of '{path}': choose another --weights")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(folder: Path, files: Path, data: str) -> None:
    """Evaluates every encoder and classifier in `folder`, in float32 on the validation images in `data`.

    Their accuracies must be those of the file in `files` that names them.

    Raises:
        RunError: one is missing or changed, belongs to no result, or gives another accuracy.
    """
    rows = [(path, results.read_json(path)) for path in sorted(files.glob("*.json"))]
    named = {Path(row["weights"]["file"]).name: (path, row) for path, row in rows if {"weights", *SCORES} <= row.keys()}
    found = {path.name for path in folder.glob("*.pth.tar")}
    if not found:
        raise UsageError(f"'{folder}' has no weights (*.pth.tar)")
    for name in sorted(found ^ named.keys()):
        missing = f"'{folder / name}' is missing: '{named[name][0]}' names it" if name in named else ""
        raise RunError(missing or f"no file in '{files}' names '{folder / name}'")
    device, wrong = launch.choose_device(), []
    images = datasets.load(datasets.resolve("auto", data), data, False, device=device)
    for name in sorted(found):
        path, (file, row) = folder / name, named[name]
        if sha256(path) != row["weights"]["sha256"]:
            raise RunError(f"'{path}' is not the file that '{file}' names: its checksum differs")
        network, centre, classes = inference.load(path)
        checkpoint.compare_classes(classes, images.classes, path)
        batches = Centres(images, centre, 250, device)
        scores = evaluate.accuracy(evaluate.frozen(network, keep_fc=True).to(device), batches, len(images.classes))[:2]
        filed = [row[score] for score in SCORES]
        same = all(abs(mine - theirs) <= TOLERANCE for mine, theirs in zip(scores, filed, strict=True))
        wrong += [] if same else [name]
        measured, wanted = (f"{top1:.2f} / {top5:.2f}" for top1, top5 in (scores, filed))
        say(f"{name:<28} {measured}  {'=' if same else 'differs from'} {wanted}  {file}")
    if wrong:
        raise RunError(f"accuracies differ from those on file: {', '.join(wrong)}")
