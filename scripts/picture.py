"""Draws a run: its curves, and the embedding of its validation images, coloured by class.

python scripts/picture.py RUN [DATA]        # RUN/picture.png, from the logs and checkpoint_last.pth.tar in RUN
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

import os
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay

from moco import checkpoint, datasets, evaluate, inference, launch, options
from moco.checkpoint import LINEAR
from moco.errors import RunError, UsageError, say
from moco.run import read_log
from output import check_output, writing


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a pretraining run")
    parser.add_argument("data", nargs="?", metavar="DATA", help="data folder (default: the one it was trained on)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/picture.png")
    args = parser.parse_args()
    out = args.out or args.run / "picture.png"
    check_output(out, True, [".png", ".jpg", ".pdf", ".svg"])
    draw(args.run, args.data, out)
    say(f"{out}")


def draw(run, folder, out):
    points, labels, classes = embedding(run, folder)
    log, linear = read_log(run / "log.csv"), read_log(run / "linear.csv")
    classifier = checkpoint.load(run / LINEAR) if (run / LINEAR).is_file() else {}
    confusion = classifier.get("confusion")
    panels = [["loss", "map"], ["linear", "map"]] if linear else [["loss", "map"]]
    if confusion is not None:
        panels = [[*row, "confusion"] for row in panels]
    figure = Figure(figsize=(6 * len(panels[0]), 5.2), layout="constrained")
    axes = figure.subplot_mosaic(panels)
    curve(axes["loss"], log, "loss", xlabel="epoch of pretraining", ylabel="loss")
    if linear:
        curve(axes["linear"], linear, "top1", xlabel="epoch of the linear classifier", ylabel="top-1 in %")
    scatter(axes["map"], points, labels, classes)
    if len(classes) <= 20:
        axes["map"].legend(markerscale=2, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes["map"].set_title("validation images: t-SNE of the frozen features")
    if confusion is not None:
        matrix(axes["confusion"], confusion, drawable(classifier["options"].get("classes", classes)))
    with writing(out) as tmp:
        figure.savefig(tmp, dpi=110, format=out.suffix[1:].lower())


def matrix(axes, confusion, classes):
    """The confusion matrix in percent of each class's images."""
    rates, few = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1), len(classes) <= 20
    how = dict(cmap="Blues", im_kw=dict(vmin=0, vmax=100), include_values=few, values_format=".0f", colorbar=False)
    display = ConfusionMatrixDisplay(rates.numpy(), display_labels=classes)
    display.plot(ax=axes, xticks_rotation="vertical", text_kw=dict(fontsize=7), **how)
    axes.set_title("linear classifier: images of a class in %")
    if not few:
        axes.set(xticks=[], yticks=[])


def curve(axes, log, column, **labels):
    marker = "." if len(log) == 1 else None  # one point is no line
    axes.plot([int(row["epoch"]) for row in log], [float(row[column]) for row in log], marker=marker)
    axes.set(**labels)


def embedding(run, folder=None, most=2000):
    """t-SNE of the frozen encoder's features of the validation images, or of `most` of them.

    Returns:
        points (N, 2), labels (N,), the classes' names.
    """
    path = Path(run) / checkpoint.LAST
    saved = checkpoint.load(path)
    args = saved["options"]
    if not {"data", "dataset"} <= set(args):
        raise RunError(f"checkpoint '{path}' does not say how it was trained: it is not from this project's scripts")
    device, folder = launch.choose_device(), folder or args["data"]
    name = args["dataset"]
    if folder != args["data"]:
        name = datasets.resolve("auto", folder, name)
    elif name != "digits" and not Path(folder).is_dir():
        raise UsageError(f"the data folder '{folder}' does not exist: name another one after {run}")
    only_val = name == "imagefolder" and not Path(folder, "train").is_dir()
    holdout = 0 if only_val else args.get("holdout", 0)
    same = dict(holdout=holdout, classes=args.get("classes"), device=device)
    split = datasets.load(name, folder, False, **same)
    if len(split) < 2:
        raise UsageError(f"'{folder}' has one validation image: an embedding needs at least two")
    if len(split) > most:
        split = split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:most])
    network, centre, _ = inference.load(path, saved)
    features, labels = evaluate.extract(evaluate.frozen(network.to(device)), split, centre)
    tsne = TSNE(init="pca", perplexity=min(30, (len(features) - 1) / 3), random_state=0)
    return tsne.fit_transform(features.cpu().numpy()), labels.cpu().numpy(), drawable(split.classes)


def drawable(names):
    """Names as matplotlib can draw them: without undecodable bytes, '$' begins no formula, '_' hides no legend entry."""
    names = [os.fsencode(name).decode(errors="replace").replace("$", r"\$") for name in names]
    return [r"$\_$" + name[1:] if name.startswith("_") else name for name in names]


def scatter(axes, points, labels, classes):
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "nipy_spectral"].resampled(len(classes))
    for label, name in enumerate(classes):
        axes.scatter(*points[labels == label].T, s=6, color=colours(label), label=name if len(classes) <= 20 else None)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
