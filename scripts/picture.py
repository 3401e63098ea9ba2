"""Draws a run: its curves, and the embedding of its validation images, coloured by class.

python scripts/picture.py RUN [DATA]        # RUN/picture.png, from the logs and checkpoint_last.pth.tar in RUN
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import checkpoint, data, distributed, encoders, evaluate, logs, options
from moco.errors import RunError, UsageError

MOST_POINTS = 2000


def main():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a pretraining run")
    parser.add_argument("data", nargs="?", metavar="DATA", help="data folder (default: the one it was trained on)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/picture.png")
    words = parser.parse_args()
    try:
        out = words.out or words.run / "picture.png"
        draw(words.run, words.data, out)
        print(out)
    except (UsageError, RunError) as error:
        distributed.complain(error)


def draw(run, folder, out):
    features, labels, classes, accuracy = embedding(run, folder)
    log, linear = logs.read(run / "log.csv"), logs.read(run / "linear.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    left.plot([int(r["epoch"]) for r in log], [float(r["loss"]) for r in log], color="tab:blue")
    left.set(
        xlabel="epoch of pretraining", ylabel="loss", title="pretraining" + " and linear evaluation" * bool(linear)
    )
    if linear:
        above, beside = left.twiny(), left.twinx()
        above.remove()
        share = len(log) / len(linear)  # both runs over the whole width
        beside.plot([share * int(r["epoch"]) for r in linear], [float(r["top1"]) for r in linear], color="tab:orange")
        beside.set_ylabel(f"linear classifier, top-1 in % (its {len(linear)} epochs)", color="tab:orange")
    scatter(right, features, labels, classes)
    right.set_title(f"validation images (t-SNE of frozen features; kNN {accuracy:.1f}%)")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def embedding(run, folder=None):
    """t-SNE of the frozen encoder's validation features.

    Returns:
        points (N, 2), labels (N,), the classes' names, and the features' leave-one-out kNN accuracy in percent.
    """
    path = Path(run) / checkpoint.LAST
    saved = checkpoint.load(path)
    args = argparse.Namespace(**saved["options"])
    args.data = folder or args.data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.settle(args, device)
    split = data.load(args, False, device)
    encoder = encoders.build(args.arch, args.stem)(num_classes=1)
    encoder.fc = torch.nn.Identity()
    prefix = checkpoint.PREFIX + "encoder_q."
    weights = {n.removeprefix(prefix): v for n, v in saved["state_dict"].items() if n.startswith(prefix)}
    checkpoint.load_state(encoder, {n: v for n, v in weights.items() if not n.startswith("fc.")}, path)
    features, labels = evaluate.extract(evaluate.frozen(encoder.to(device)), split, args, device)
    if len(features) > MOST_POINTS:
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST_POINTS].to(device)
        features, labels = features[chosen], labels[chosen]
    similarity = (features @ features.T).fill_diagonal_(-2)
    right = labels[similarity.topk(min(10, len(labels) - 1), 1).indices].mode(1).values == labels
    tsne = TSNE(init="pca", perplexity=min(30, (len(features) - 1) / 3), random_state=0)
    return (
        tsne.fit_transform(features.cpu().numpy()),
        labels.cpu().numpy(),
        split.classes,
        100 * right.float().mean().item(),
    )


def scatter(axes, points, labels, classes):
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "nipy_spectral", len(classes))
    for label, name in enumerate(classes):
        axes.scatter(*points[labels == label].T, s=6, color=colours(label), label=name if len(classes) <= 20 else None)
    axes.set(xticks=[], yticks=[])
    if len(classes) <= 20:
        axes.legend(markerscale=2, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
