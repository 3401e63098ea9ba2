"""Rewrites the README's tables between their markers, from the files in results/ alone, and draws curves.png and
embeddings.png there: the methods side by side, wherever several of them did the same work.

python scripts/report.py            # rewrite
python scripts/report.py --check    # exit with status 1 if the README does not agree with results/
"""

import math
import statistics
import sys
from itertools import accumulate, pairwise, product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from picture import scatter
from reproduce import ROOT, by_option

import results
from moco import launch, options
from moco.errors import RunError, UsageError
from results import FIGURES, ROWS

# Options that say where a run is kept, how it is watched and how fast it is, not what it computes.
ASIDE = {"--seed", "--output-dir", "--pretrained", "--knn-freq", "--save-freq", "-p", "--print-freq", "-j", "--workers"}
ASIDE |= {"--compile", "--no-compile"}


def main():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the README is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    words = parser.parse_args()
    try:
        runs, benches = read(words.results)
        old = words.readme.read_text()
        new = between(old, "table", table(runs) + pictures(runs))
        new = between(new, "speed", speed(benches))
        if words.check and new != old:
            raise RunError(f"'{words.readme}' does not agree with '{words.results}': run make report")
        if not words.check:
            draw(runs, words.results)
            words.readme.write_text(new)
    except OSError as error:
        launch.complain(RunError(f"'{error.filename}': {error.strerror}"))
    except (UsageError, RunError) as error:
        launch.complain(error)


def read(folder):
    """The runs and the benchmarks on file; RunError names a file that is neither."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'")
    found = [results.read(path) for path in sorted(folder.glob("*.json"))]
    return tuple([content for content in found if results.is_bench(content) == bench] for bench in (False, True))


def between(text, name, content):
    start, end = f"<!-- {name}: made from results/ by scripts/report.py -->\n", f"<!-- end of {name} -->"
    if start not in text or end not in text:
        raise RunError(f"the README has no markers for its {name}")
    head, rest = text.split(start)
    return head + start + content + end + rest.split(end, 1)[1]


def table(runs):
    lines = [
        "| | script | epochs | published top-1 / top-5 | ours | hardware | time |",
        "|---|---|---|---|---|---|---|",
    ]
    full = [r for r in runs if is_full(r)]
    for row in ROWS.values():
        mine = [r for r in full if is_published(r, row)]
        top5 = "-" if row.top5 is None else row.top5
        lines.append(cells(row.name, f"`{row.script}`", row.epochs, f"{row.top1} / {top5}", *ours(mine)))
    other = grouped(r for r in full if not any(is_published(r, row) for row in ROWS.values()))
    if other:
        lines += ["", "The same network and images with other options than the row's, or for other epochs:", ""]
        lines += ["| | epochs | options | kNN | top-1 / top-5 | hardware | time |", "|---|---|---|---|---|---|---|"]
    for mine in other:
        what = ", ".join(difference(mine[0]))
        lines.append(cells(mine[0]["row"], mine[0]["epochs"], what, knn(mine), *ours(mine)))
    small = grouped(r for r in runs if not is_full(r))
    if small:
        lines += ["", "What a machine without a GPU can do (a mean over seeds where there are several):", ""]
        lines += ["| | data | network | epochs | views, precision | kNN | top-1 / top-5 | hardware | time |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
    for mine in small:
        what = (mine[0][name] for name in ("row", "dataset", "arch", "epochs"))
        manner = ", ".join([how(mine[0]), *unlike(mine[0], small)])
        lines.append(cells(*what, manner, knn(mine), *ours(mine)))
    return "\n".join(lines) + "\n"


def cells(*values):
    return f"| {' | '.join(str(value) for value in values)} |"


def grouped(runs):
    """Lists of runs that differ in nothing but the seed."""
    groups = {}
    for run in runs:
        groups.setdefault((*alike(run), str(settings(run["commands"]))), []).append(run)
    return [group for _, group in sorted(groups.items())]


def settings(commands):
    """The options on which the result of a run's command lines depends: script -> option -> values."""
    found = {}
    for line in commands:
        script, *words, _ = line.split()[1:]  # the data folder comes last
        found[script] = {name: values for name, values in sorted(by_option(words).items()) if name not in ASIDE}
    return found


def published(row):
    lines = [f"python {row.script} {row.options} --epochs {row.epochs} data/"]
    return settings(lines + [f"python main_lincls.py {row.linear} data/"] * (row.linear is not None))


def is_published(run, row):
    """Is it this row of the table, nothing changed?"""
    return run["row"] == row.name and settings(run["commands"]) == published(row)


def difference(run):
    """The options of a run that its method's first row does not have, in backquotes."""
    row = published(next(row for row in ROWS.values() if row.name == run["row"]))
    found = []
    for script, given in settings(run["commands"]).items():
        linear = script == "main_lincls.py"
        for name, values in given.items():
            if row.get(script, {}).get(name) != values and (linear or name != "--epochs"):
                found.append(f"{'linear: ' * linear}`{' '.join([name, *values])}`")
    return found


def alike(run):
    """What runs of one method have in common that differ in their options or seeds alone."""
    return run["dataset"], run["arch"], run["epochs"], how(run), order(run["row"])


def unlike(run, groups):
    """What tells a run from the others of its method, data, network, epochs and manner."""
    others = [difference(group[0]) for group in groups if alike(group[0]) == alike(run)]
    return [text for text in difference(run) if not all(text in other for other in others)]


def knn(runs):
    return spread([r["knn"] for r in runs if r.get("knn") is not None], 1)


def is_full(run):
    """Does the published network on the whole of CIFAR-10, not a row scaled down?"""
    return (run["arch"], run["dataset"], run["images"]) == ("resnet50", "cifar10", 50_000)


def order(name):
    return [row.name for row in ROWS.values()].index(name)


def how(run):
    words = run["commands"][0].split()
    values = dict(pairwise(words))
    return f"{values.get('--views', 'batched')}, {run.get('precision') or values.get('--precision', 'fp32')}"


def ours(runs):
    """Cells: top-1 / top-5, hardware, time."""
    if not runs:
        return "", "", ""
    scores = f"{spread([r['top1'] for r in runs], 1)} / {spread([r['top5'] for r in runs], 1)}"
    minutes = statistics.mean(r["pretrain_seconds"] + r["linear_seconds"] for r in runs) / 60
    device = sorted({f"{r['hardware']['device']}, {r['hardware']['cores']} cores" for r in runs})
    return scores, "; ".join(device), f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def spread(values, digits):
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"


def comparisons(runs):
    """A run of each method, by (data set, network, epochs, manner), wherever there are several methods: the one with
    the fewest options of its own, and the first seed."""
    groups = {}
    for run in sorted(runs, key=lambda run: (order(run["row"]), len(difference(run)), run["seed"])):
        title = f"{run['dataset']}, {run['arch']}, {run['epochs']} epochs, {how(run)}"
        groups.setdefault(title, {}).setdefault(run["row"], run)
    return {title: methods for title, methods in sorted(groups.items()) if len(methods) > 1}


def pictures(runs):
    if not comparisons(runs):
        return ""
    return (
        "\n![Loss and kNN accuracy of all methods](results/curves.png)\n"
        "\n![Validation images of all methods, embedded](results/embeddings.png)\n"
    )


def draw(runs, folder):
    """curves.png, a row of panels for each comparison, and embeddings.png, a panel for each of its methods."""
    groups = comparisons(runs)
    if not groups:
        return
    figure, axes = plt.subplots(len(groups), 4, figsize=(18, 4 * len(groups)), layout="constrained", squeeze=False)
    for (title, methods), row in zip(groups.items(), axes, strict=True):
        for panel, (what, time) in zip(row, product(("loss", "knn"), ("epoch", "minute")), strict=True):
            for name, run in methods.items():
                seconds = accumulate(entry["seconds"] for entry in run["curve"])
                times = [s / 60 if time == "minute" else i + 1 for i, s in enumerate(seconds)]
                values = [math.nan if entry.get(what) is None else entry[what] for entry in run["curve"]]
                measured = np.isfinite(values)  # kNN is not, in every epoch
                panel.plot(np.array(times)[measured], np.array(values)[measured], f"C{order(name)}", label=name)
            panel.set(xlabel=f"{time}s", ylabel={"loss": "loss", "knn": "kNN, top-1 in %"}[what])
        row[0].set_title(title, loc="left")
        row[0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=80)
    plt.close(figure)

    widest = max(len(methods) for methods in groups.values())
    size = 3.3 * widest, 3.7 * len(groups)
    figure, axes = plt.subplots(len(groups), widest, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for (title, methods), row in zip(groups.items(), axes, strict=True):
        for panel, (name, run) in zip(row, methods.items(), strict=False):
            points = run.get("embedding")
            if points is None:
                continue
            panel.axis("on")
            xy, labels = np.array([points["x"], points["y"]]).T, np.array(points["label"])
            scatter(panel, xy, labels, points["classes"], legend=run is list(methods.values())[-1])
            panel.set_title(f"{name}: {run['top1']:.1f}%", fontsize=9)
        row[0].set_ylabel(title)
    figure.savefig(folder / "embeddings.png", dpi=80)
    plt.close(figure)


def speed(benches):
    if not benches:
        return "Not measured yet.\n"
    lines = ["| | " + " | ".join(f"{b['hardware']['device']}, {b['hardware']['cores']} cores" for b in benches) + " |"]
    lines.append("|---" * (len(benches) + 1) + "|")
    for key, title in FIGURES.items():
        digits = 0 if key == "images_per_second" else 2
        lines.append(f"| {title} | " + " | ".join(f"{b[key]:,.{digits}f}" for b in benches) + " |")
    for title, key in (("measured", "measured"), ("command", "command")):
        lines.append(
            f"| {title} | " + " | ".join(f"`{b[key]}`" if key == "command" else b[key] for b in benches) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
