"""Rewrites the tables of README.md and docs/ between their markers, from the files in results/ only.

python scripts/report.py            # rewrite, and draw curves.png, embeddings.png and labels.png in results/
python scripts/report.py --check    # exit with status 1 if a page does not agree with results/
"""

import re
import statistics
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import results
from moco import launch, methods, options
from moco.errors import RunError, UsageError
from moco.run import read_log
from picture import scatter
from results import NAMES, ROOT, ROWS, recipe

PARSERS = [options.pretrain_parser("", method.add_options) for method in methods.ALL.values()]
PARSERS.append(options.linear_parser(""))
# The flags of the options that change what a run computes; and those of them that have a column of their own.
FLAGS = {name: flag for parser in PARSERS for name, (flag, _, _) in parser.when_resumed.items()}
FLAGS |= {"groups": "--bn-splits", "init": "--init"}
VIEWS = ("aug_plus", "aug_mild", "aug_crop")
SHOWN = {"arch", "dataset", "precision", "seed", "stem", "mean", "std", *VIEWS}
PASSES = "encoder passes per image"  # epochs times Row.passes
FIRST = f"|network|data|epochs|{PASSES}|options|kNN|top-1 / top-5|published|core-hours|weights".split("|")
ALL = f"|data|network|epochs|{PASSES}|options|kNN|top-1 / top-5|hardware|time".split("|")
ANCHOR = """Cross entropy, [He et al.](https://arxiv.org/abs/1512.03385); \
[200 epochs, best one](https://github.com/chenyaofo/pytorch-cifar-models)"""

FIGURES = {
    "views_ratio": "speed-up of batched views over PIL (one core each; a GPU against all cores)",
    "folder_ratio": "a JPEG to two uint8 crops of 224 pixels (the rest of the views is batched, not counted), "
    "over torchvision's two finished views on PIL; both decode once, one core",
    "loop_over_bare": "speed of the training loop, relative to the bare encoders",
    "images_per_second": "images/s of the loop (GPU: ResNet-50, batch 256; CPU: ResNet-18, batch 128)",
}


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--pages", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ are")
    args = parser.parse_args()
    if not args.results.is_dir():
        raise UsageError(f"there is no folder '{args.results}'")
    try:
        report(args.results, args.pages, args.check)
    except OSError as error:
        raise RunError(f"'{error.filename}': {error.strerror}") from None


def report(folder, pages, check):
    files, labelled = files_in(folder), by_labels(folder / "labels")
    groups = grouped(file for file in files if "row" in file)
    small = longest(groups)
    blocks = {
        "rows": run_table([*filter(is_full, groups), *small], FIRST, [{"": ANCHOR, "published": "91.25; 92.6"}]),
        "table": published_table(),
        "runs": run_table(groups, ALL),
        "large": run_table([group for group in groups if group[0]["dataset"] == "imagefolder"], ALL),
        "labels": labels_table(labelled),
        "searches": searches(folder / "lr"),
        "tries": searches(folder / "own"),
        "speed": speed([file for file in files if "row" not in file]),
    }
    marker = rf"(<!-- ({'|'.join(blocks)}): made from results/ by scripts/report.py -->\n).*?(<!-- end of \2 -->)"
    found = set()
    for path in [pages / "README.md", *sorted((pages / "docs").glob("*.md"))]:
        old = path.read_text()
        new = re.sub(marker, lambda match: match[1] + blocks[match[2]] + match[3], old, flags=re.S)
        found |= {match[2] for match in re.finditer(marker, old, re.S)}
        if check and new != old:
            raise RunError(f"'{path}' does not agree with '{folder}': run make report")
        if new != old:
            path.write_text(new)
    if missing := blocks.keys() - found:
        raise RunError(f"no page in '{pages}' has both markers of {', '.join(sorted(missing))}")
    if not check:
        draw(small, folder)
        draw_labels(labelled, folder)


def files_in(folder):
    return [results.read(path) for path in sorted(folder.glob("*.json"))]


def lines(titles, rows):
    """A table in Markdown, without the columns that are empty."""
    kept = [i for i in range(len(titles)) if i == 0 or any(row[i] != "" for row in rows)]
    table = ["| " + " | ".join(str(row[i]) for i in kept) + " |\n" for row in [titles, *rows]]
    return "".join([table[0], "|---" * len(kept) + "|\n", *table[1:]])


def described(runs, groups):
    """The cells of a table for runs that differ only in their seed, by title; `groups`: the table's runs."""
    run = runs[0]
    on_cpu = run["hardware"]["name"].startswith("cpu")
    weights = next((r["weights"]["file"] for r in runs if "weights" in r), None)
    minutes = statistics.mean(r["pretrain_seconds"] + r["linear_seconds"] for r in runs) / 60
    own = f"(own classifier: {scores_of(runs, 'classifier_')})" if "classifier_top1" in run else ""
    linear = scores_of(runs) if "top1" in run else ""
    return {
        "": run["row"],
        "data": run["dataset"],
        "network": run["arch"],
        "epochs": run["epochs"],
        PASSES: run["epochs"] * row_of(run).passes,
        "options": ", ".join([*how(run), *unlike(run, groups)]),
        "kNN": spread(runs, "knn"),
        "top-1 / top-5": f"{linear} {own}".strip() or "kNN only",
        "published": published(run) if is_full(runs) else "",
        "core-hours": spread(runs, "cpu_seconds", 3600) if on_cpu else "",
        "weights": f"[{Path(weights).name}]({weights})" if weights else "",
        "hardware": "; ".join(sorted({title(r) for r in runs})),
        "time": f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h",
    }


def run_table(groups, titles, more=()):
    found = [described(group, groups) for group in groups] + [dict.fromkeys(titles, "") | cells for cells in more]
    return lines(titles, [[cells[title] for title in titles] for cells in found])


def scores_of(runs, whose=""):
    return " / ".join(spread(runs, f"{whose}{name}") for name in ("top1", "top5"))


def spread(runs, name, unit=1):
    """The mean of what is measured, and if there are several the standard deviation."""
    values = [run[name] / unit for run in runs if run.get(name) is not None]
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"


def title(file):
    return f"{file['hardware']['device']}, {file['hardware']['cores']} cores"


def longest(groups):
    """The small network on all of CIFAR-10: of each kind of views the runs with more than half of the most epochs."""
    small = [g for g in groups if (g[0]["arch"], g[0]["dataset"], g[0]["images"]) == ("resnet20", "cifar10", 50_000)]
    most = {views(g[0]): g[0]["epochs"] for g in small}  # they are sorted by epochs
    kept = [g for g in small if 2 * g[0]["epochs"] > most[views(g[0])]]
    return sorted(kept, key=lambda g: (most[views(g[0])], NAMES.index(g[0]["row"])))


def published(run):
    """What is published of a run's script and data set: for as many epochs, or else for any."""
    rows = [r for r in ROWS.values() if r.top1 and (r.script, r.dataset) == (row_of(run).script, run["dataset"])]
    same = [row for row in rows if row.epochs == run["epochs"]]
    return "; ".join(scores(row) + f" ({row.epochs} epochs)" * (not same) for row in same or rows)


def scores(row):
    return f"{row.top1} / {row.top5 or '-'}"


def published_table():
    """A line per method and length, a column per data set."""
    table = []
    for row in (row for row in ROWS.values() if row.top1 and row.dataset == "cifar10"):
        what = [f"`{row.script}`", row.epochs, f"{recipe(row)['pretrain']['batch_size']}"]
        larger = [r for r in ROWS.values() if (r.name, r.dataset, r.epochs) == (row.name, "cifar100", row.epochs)]
        table.append([row.name, *what, scores(row), "".join(map(scores, larger))])
        if row.rerun:
            table.append([f"{row.name}, the reference's rerun", *what, f"{row.rerun} / -", ""])
    return lines(["", "script", "epochs", "batch", "CIFAR-10, top-1 / top-5", "CIFAR-100, top-1 / top-5"], table)


def searches(folder):
    """The kNN accuracy of what was tried for a row, a log each named ROW-OPTIONS.csv; the best one in bold."""
    table = []
    for key, name in {key.partition("-")[0]: row.name for key, row in ROWS.items()}.items():
        logs = {path.stem.partition("-")[2].replace("_", " "): path for path in sorted(folder.glob(f"{key}-*.csv"))}
        tried = {what: float(read_log(path)[-1]["knn"]) for what, path in logs.items()}
        best = max(tried, key=tried.get, default=None)
        shown = (f"**{what}: {knn:.1f}**" if what == best else f"{what}: {knn:.1f}" for what, knn in tried.items())
        table += [[name, ", ".join(shown)]] if tried else []
    return lines(["", "options: kNN"], table)


def by_labels(folder):
    """Of runs on some of the labels: method -> labels per class -> run, in order."""
    found = {name: {} for name in NAMES}
    for run in files_in(folder):
        given = run["options"]
        number = given["pretrain"].get("labels_per_class") or given["linear"]["per_class"]
        found[run["row"]][number] = run
    return {row: dict(sorted(runs.items())) for row, runs in found.items() if runs}


def labels_table(labelled):
    """Accuracy by the number of labels per class, a method a line."""
    numbers, table = sorted(set().union(*labelled.values())), []
    for row, runs in labelled.items():
        shown = dict.fromkeys(numbers, "")
        for number, run in runs.items():
            # A run without labels has all of them in kNN's bank: comparable only with the runs on all labels.
            alike = run["options"]["pretrain"].get("labels_per_class") or number == numbers[-1]
            shown[number] = f"{top1(run):.1f}" + f" ({run['knn']:.1f})" * bool(alike)
        own = any("top1" not in run for run in runs.values())
        table.append([row + " (own classifier)" * own, *shown.values()])
    return lines(["top-1 (kNN), labels per class:", *(f"{n:,}" for n in numbers)], table)


def grouped(runs):
    """Lists of runs that differ in nothing but the seed."""
    groups = {}
    for run in runs:
        groups.setdefault((*alike(run), str(sorted(settings(run["options"]).items()))), []).append(run)
    return [group for _, group in sorted(groups.items())]


def alike(run):
    """What runs of one method have in common that differ only in their options or seeds."""
    return run["dataset"], run["arch"], run["epochs"], *how(run), NAMES.index(run["row"])


def settings(options):
    """(program, option) -> value, of the options that are given and that no column shows."""
    names = FLAGS.keys() - SHOWN
    found = {(program, name): given[name] for program, given in options.items() for name in names & given.keys()}
    found.pop(("pretrain", "epochs"), None)
    return {key: value for key, value in found.items() if value not in (None, False)}


def unlike(run, groups):
    """The options that set a run apart: from its row, or if it is a small one from those of its method and epochs."""
    alikes = [group[0]["options"] for group in groups if alike(group[0]) == alike(run)]
    mine, differing = settings(run["options"]), set()
    for programs in [recipe(row_of(run))] if is_full([run]) else alikes:
        other, common = settings(programs), programs.keys() & run["options"].keys()
        differing |= {key for key in {*mine, *other} if key[0] in common and mine.get(key) != other.get(key)}
    found = []
    for program, name in sorted(differing, key=lambda key: (key[0] == "linear", key)):
        value = mine.get((program, name))
        values = [] if value is True or value is None else value if isinstance(value, list) else [value]
        words = " ".join(map(str, [FLAGS[name], *values]))
        found.append(f"{'linear: ' * (program == 'linear')}{'no ' * (value is None)}`{words}`")
    return found


def row_of(run):
    """The run's row of the table, for as many epochs if there is one."""
    rows = [row for row in ROWS.values() if row.name == run["row"]]
    return min(rows, key=lambda row: (row.dataset != run["dataset"], row.epochs != run["epochs"]))


def is_full(runs):
    """Do they train the published network on the whole of CIFAR, not a row scaled down?"""
    run = runs[0]
    return run["arch"] == "resnet50" and run["dataset"].startswith("cifar") and run["images"] == 50_000


def views(run):
    given = run["options"]["pretrain"]
    return next((f"`--{name.replace('_', '-')}`" for name in VIEWS if given.get(name)), "the script's views")


def how(run):
    given = run["options"]["pretrain"]
    return [views(run), *["`--views pil`"] * (given.get("views") == "pil"), given["precision"]]


def top1(run):
    """Of the linear classifier, or of cross entropy's own where there is no other, or None."""
    return run.get("top1", run.get("classifier_top1"))


def draw(groups, folder):
    """curves.png and embeddings.png: the methods side by side with the same views, a colour each."""
    chosen = {g[0]["row"]: g[0] for g in groups if g[0]["options"]["pretrain"].get("aug_plus")}.values()
    figure = Figure(figsize=(11, 4), layout="constrained")
    for panel, (what, label) in zip(
        figure.subplots(1, 2), {"loss": "loss", "knn": "kNN, top-1 in %"}.items(), strict=True
    ):
        for run in chosen:
            points = [(e["epoch"] + 1, e[what]) for e in run["curve"] if e.get(what) is not None]
            panel.plot(*zip(*points, strict=True), f"C{NAMES.index(run['row'])}", label=run["row"])
        panel.set(xlabel="epoch", ylabel=label)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "curves.png", dpi=90)

    drawn = [run for run in chosen if "embedding" in run]
    rows = max(1, -(-len(drawn) // 3))
    figure = Figure(figsize=(11, 3.9 * rows))
    for panel, run in zip_longest(figure.subplots(rows, 3).flat, drawn):
        if run is None:
            panel.axis("off")
            continue
        points = run["embedding"]
        xy = np.array([points["x"], points["y"]]).T
        scatter(panel, xy, np.array(points["label"]), points["classes"], legend=False)
        panel.set_title(f"{run['row']}: {top1(run):.1f} %", fontsize=10, color=f"C{NAMES.index(run['row'])}")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=10, frameon=False, markerscale=3)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "embeddings.png", dpi=90)


def draw_labels(labelled, folder):
    """labels.png: accuracy by the number of labels per class."""
    if not labelled:
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, runs in labelled.items():
        axes.plot(list(runs), [top1(run) for run in runs.values()], f"C{NAMES.index(row)}o-", label=row)
    numbers = sorted(set().union(*labelled.values()))
    axes.set(xscale="log", xlabel="labels per class", ylabel="top-1 in %")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "labels.png", dpi=90)


def speed(benches):
    table = []
    for key, what in FIGURES.items():
        digits = 0 if key == "images_per_second" else 2
        table.append([what, *(f"{b[key]:,.{digits}f}" if key in b else "" for b in benches)])
    table += [["measured", *(b["measured"] for b in benches)], ["command", *(f"`{b['command']}`" for b in benches)]]
    return lines(["", *map(title, benches)], table)


if __name__ == "__main__":
    main()
