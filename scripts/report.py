"""Rewrites the tables of README.md and docs/ between their markers, from the files in results/ alone, and draws
curves.png and embeddings.png there: the measured rows side by side.

python scripts/report.py            # rewrite
python scripts/report.py --check    # exit with status 1 if a page does not agree with results/
"""

import statistics
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import results
from moco import launch, logs, options
from moco.errors import RunError, UsageError
from picture import scatter
from reproduce import ROOT, by_option
from results import FIGURES, ROWS

# Options that say where a run is kept, how it is watched and how fast it is, not what it computes.
ASIDE = {"--seed", "--output-dir", "--pretrained", "--knn-freq", "--save-freq", "-p", "--print-freq", "-j", "--workers"}
ASIDE |= {"--compile", "--no-compile"}


# Networks and data of the small rows, and who trained the network with labels alone.
SMALL = ("resnet20", "cifar10", 50_000)
ANCHOR = (
    "ResNet-20 with labels, published by [He et al.](https://arxiv.org/abs/1512.03385)",
    "",
    "",
    "91.25 / -",
    "",
    "",
)


def main():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--pages", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ are")
    args = parser.parse_args()
    try:
        runs, benches = read(args.results)
        labelled = by_labels(args.results / "labels")
        for page, parts in {
            "README.md": {"rows": rows(runs), "table": table(runs)},
            "docs/results.md": {
                "runs": small_table(runs) + full_table(runs),
                "labels": labels_table(labelled),
                "searches": searches(args.results),
                "tries": tries(args.results / "own"),
                "speed": speed(benches),
            },
            "docs/imagenet.md": {"large": small_table([r for r in runs if r["dataset"] == "imagefolder"])},
        }.items():
            path = args.pages / page
            new = old = path.read_text()
            for name, content in parts.items():
                new = between(new, name, content, path)
            if args.check and new != old:
                raise RunError(f"'{path}' does not agree with '{args.results}': run make report")
            if not args.check:
                path.write_text(new)
        if not args.check:
            draw(runs, args.results)
            draw_labels(labelled, args.results)
    except OSError as error:
        launch.report_and_exit(RunError(f"'{error.filename}': {error.strerror}"))
    except (UsageError, RunError) as error:
        launch.report_and_exit(error)


def read(folder):
    """The runs and the benchmarks on file; RunError names a file that is neither."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'")
    found = [results.read(path) for path in sorted(folder.glob("*.json"))]
    return tuple([content for content in found if results.is_bench(content) == bench] for bench in (False, True))


def between(text, name, content, path):
    start, end = f"<!-- {name}: made from results/ by scripts/report.py -->\n", f"<!-- end of {name} -->"
    if start not in text or end not in text:
        raise RunError(f"'{path}' has no markers for its {name}")
    head, rest = text.split(start)
    return head + start + content + end + rest.split(end, 1)[1]


def rows(runs):
    """README's table of measured rows: the small network, each method at its longest."""
    table = [("", "epochs", "kNN", "top-1 / top-5", "core-hours", "weights")]
    for mine in measured(runs):
        cpu = [r["cpu_seconds"] / 3600 for r in mine if r.get("cpu_seconds") and not on_gpu(r)]
        files = [r["weights"]["file"] for r in mine if r.get("weights")]
        weights = f"[{Path(files[0]).name}]({files[0]})" if files else ""
        table.append((mine[0]["row"], mine[0]["epochs"], knn(mine), ours(mine)[0], spread(cpu, 1), weights))
    kept = [i for i in range(6) if any(row[i] for row in table[1:])]
    lines = [cells(*(row[i] for i in kept)) for row in [*table, ANCHOR]]
    return "\n".join([lines[0], "|---" * len(kept) + "|", *lines[1:]]) + "\n"


def measured(runs):
    """Of each method its longest runs with resnet20 on all of CIFAR-10: those with the fewest options of their own."""
    best = {}
    for group in grouped(r for r in runs if (r["arch"], r["dataset"], r["images"]) == SMALL):
        rank = (-group[0]["epochs"], len(difference(group[0])))
        if rank < best.get(group[0]["row"], ((1,),))[0]:
            best[group[0]["row"]] = (rank, group)
    return [best[name][1] for name in sorted(best, key=order)]


def table(runs):
    """Published rows, and what was measured of them; without these columns, where they would be empty."""
    full = [r for r in runs if is_full(r)]
    of_row = {row: [r for r in full if is_published(r, row)] for row in ROWS.values() if row.published}
    more = ["measured", "hardware", "time"] if any(of_row.values()) else []
    titles = ["", "script", "epochs", "published top-1 / top-5", *more]
    lines = [cells(*titles), "|---" * len(titles) + "|"]
    for row, mine in of_row.items():
        top5 = "-" if row.top5 is None else row.top5
        cell = cells(row.name, f"`{row.script}`", row.epochs, f"{row.top1} / {top5}", *ours(mine)[: len(more)])
        lines.append(cell)
    return "\n".join(lines) + "\n"


def full_table(runs):
    """Runs of the published network with other options than a row's."""
    other = grouped(r for r in runs if is_full(r) and not any(is_published(r, row) for row in ROWS.values()))
    if not other:
        return ""
    lines = ["", "The published network and images with other options than the row's, or for other epochs:", ""]
    lines += ["| | epochs | options | kNN | top-1 / top-5 | hardware | time |", "|---|---|---|---|---|---|---|"]
    for mine in other:
        what = ", ".join(difference(mine[0]))
        lines.append(cells(mine[0]["row"], mine[0]["epochs"], what, knn(mine), *ours(mine)))
    return "\n".join(lines) + "\n"


def small_table(runs):
    """All runs of other networks or data."""
    small = grouped(r for r in runs if not is_full(r))
    lines = ["| | data | network | epochs | views, precision | kNN | top-1 / top-5 | hardware | time |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for mine in small:
        what = (mine[0][name] for name in ("row", "dataset", "arch", "epochs"))
        manner = ", ".join([how(mine[0]), *unlike(mine[0], small)])
        lines.append(cells(*what, manner, knn(mine), *ours(mine)))
    return "\n".join(lines) + "\n"


def searches(folder):
    """The kNN accuracy at each lr that was tried, from the logs in lr/; the best one in bold."""
    lines = ["| | lr: kNN |", "|---|---|"]
    for key in ("ce", "supcon", "moco", "out"):
        found = {}
        for path in (folder / "lr").glob(f"{key}-*.csv"):
            found[path.stem.split("-")[1]] = float(logs.read(path)[-1]["knn"])
        if found:
            best = max(found, key=found.get)
            shown = (f"{lr}: {found[lr]:.1f}" for lr in sorted(found, key=float))
            shown = (f"**{text}**" if text.startswith(f"{best}:") else text for text in shown)
            name = next(row.name for k, row in ROWS.items() if k.partition("-")[0] == key)
            lines.append(cells(name, ", ".join(shown)))
    return "\n".join(lines) + "\n"


def tries(folder):
    """The kNN accuracy with the options that were tried for the row of our own: a log each, named after them."""
    lines = ["| options | kNN |", "|---|---|"]
    for path in sorted(folder.glob("*.csv")):
        lines.append(cells(f"`--{path.stem.replace('_', ' ')}`", f"{float(logs.read(path)[-1]['knn']):.1f}"))
    return "\n".join(lines) + "\n"


def by_labels(folder):
    """Of runs on some of the labels: method -> labels a class -> run."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        run = results.read(path)
        given = dict(pairwise(" ".join(run["commands"]).split()))
        number = int(given.get("--labels-per-class") or given["--per-class"])
        found.setdefault(run["row"], {})[number] = run
    return {row: dict(sorted(found[row].items())) for row in sorted(found, key=order)}


def label_numbers(labelled):
    return sorted({number for runs in labelled.values() for number in runs})


def labels_table(labelled):
    """Accuracy by the number of labels a class, a method a line."""
    numbers = label_numbers(labelled)
    lines = [cells("top-1 (kNN), labels a class:", *(f"{n:,}" for n in numbers)), "|---" * (len(numbers) + 1) + "|"]
    for row, runs in labelled.items():
        shown = []
        for number in numbers:
            run = runs.get(number)
            # A run that knows no labels has all of them in kNN's bank: that compares with all labels alone.
            alike = run and ("--labels-per-class" in run["commands"][0] or number == numbers[-1])
            shown.append(f"{run['top1']:.1f}" + f" ({run['knn']:.1f})" * bool(alike) if run else "")
        lines.append(cells(row, *shown))
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
    """The options that other runs of the same method, data, network, epochs and precision do not have."""
    others = [difference(group[0]) for group in groups if alike(group[0]) == alike(run)]
    return [text for text in difference(run) if not all(text in other for other in others)]


def knn(runs):
    return spread([r["knn"] for r in runs if r.get("knn") is not None], 1)


def is_full(run):
    """Does the published network on the whole of CIFAR-10, not a row scaled down?"""
    return (run["arch"], run["dataset"], run["images"]) == ("resnet50", "cifar10", 50_000)


def on_gpu(run):
    return not run["hardware"]["name"].startswith("cpu")


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


def draw(runs, folder):
    """curves.png and embeddings.png: the methods side by side, a colour each; not the row of our own."""
    methods = {row.name for row in ROWS.values() if row.published}
    chosen = [group[0] for group in measured(runs) if group[0]["row"] in methods]
    if len(chosen) < 2:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, (what, title) in zip(axes, {"loss": "loss", "knn": "kNN, top-1 in %"}.items(), strict=True):
        for run in chosen:
            points = [(e["epoch"] + 1, e[what]) for e in run["curve"] if e.get(what) is not None]
            panel.plot(*zip(*points, strict=True), f"C{order(run['row'])}", label=run["row"])
        panel.set(xlabel="epoch", ylabel=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "curves.png", dpi=90)
    plt.close(figure)

    drawn = [run for run in chosen if run.get("embedding")]
    figure, axes = plt.subplots(-(-len(drawn) // 3), 3, figsize=(11, 3.9 * -(-len(drawn) // 3)), squeeze=False)
    for panel in axes.flat[len(drawn) :]:
        panel.axis("off")
    for panel, run in zip(axes.flat, drawn, strict=False):
        points = run["embedding"]
        xy, labels = np.array([points["x"], points["y"]]).T, np.array(points["label"])
        scatter(panel, xy, labels, points["classes"], legend=False)
        panel.set_title(f"{run['row']}: {run['top1']:.1f} %", fontsize=10, color=f"C{order(run['row'])}")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=min(10, len(handles[1])), frameon=False, markerscale=3)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "embeddings.png", dpi=90)
    plt.close(figure)


def draw_labels(labelled, folder):
    """labels.png: accuracy by the number of labels a class."""
    if not labelled:
        return
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for row, runs in labelled.items():
        axes.plot(list(runs), [run["top1"] for run in runs.values()], f"C{order(row)}o-", label=row)
    numbers = label_numbers(labelled)
    axes.set(xscale="log", xlabel="labels a class", ylabel="top-1 in %")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers], minor=False)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "labels.png", dpi=90)
    plt.close(figure)


def speed(benches):
    if not benches:
        return "Not measured yet.\n"
    lines = ["| | " + " | ".join(f"{b['hardware']['device']}, {b['hardware']['cores']} cores" for b in benches) + " |"]
    lines.append("|---" * (len(benches) + 1) + "|")
    for key, title in FIGURES.items():
        digits = 0 if key == "images_per_second" else 2
        lines.append(f"| {title} | " + " | ".join(f"{b[key]:,.{digits}f}" if key in b else "" for b in benches) + " |")
    for title, key in (("measured", "measured"), ("command", "command")):
        lines.append(
            f"| {title} | " + " | ".join(f"`{b[key]}`" if key == "command" else b[key] for b in benches) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
