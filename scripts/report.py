"""Rewrites the tables of README.md and docs/ between their markers, from the files in results/ only.

python scripts/report.py            # rewrite, and draw curves.png, embeddings.png and labels.png in results/
python scripts/report.py --check    # exit with status 1 if a page does not agree with results/
"""

import re
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import results
from moco import launch, methods, options
from moco.errors import RunError, UsageError
from moco.run import read_log
from picture import scatter
from results import BY_NAME, NAMES, ROOT, ROWS

PASSES = "encoder passes per image"  # epochs times Row.passes
FIRST = f"|network|data|epochs|{PASSES}|options|seeds|kNN|top-1 / top-5|published|weights".split("|")
ALL = f"|data|network|epochs|{PASSES}|options|seeds|kNN|top-1 / top-5|hardware|time".split("|")
ANCHOR = {
    "": "Cross entropy: [He et al.](https://arxiv.org/abs/1512.03385); "
    "[pytorch-cifar-models, best of 200 epochs on the test images](https://github.com/chenyaofo/pytorch-cifar-models)",
    "network": "resnet20",
    "published": "91.25; 92.6",
}

FIGURES = {
    "views_ratio": "speed-up of batched views over PIL (one core each; a GPU against one core, divided by the number of "
    "cores)",
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
    report(args.results, args.pages, args.check)


def report(folder, pages, check):
    """Writes the tables into the pages, or with `check` compares them, and draws the figures."""
    groups, labelled = grouped(folder), by_labels(folder / "labels")
    full = [group for group in groups if is_full(group[0])]
    small = [group for group in groups if group not in full and any("weights" in run for run in group)]
    blocks = {
        "rows": run_table([*full, *small], FIRST, ANCHOR),
        "table": published_table(),
        "runs": run_table(groups, ALL),
        "large": run_table([group for group in groups if group[0]["dataset"] == "imagefolder"], ALL),
        "labels": labels_table(labelled),
        "searches": searches(folder / "lr"),
        "tries": searches(folder / "own"),
        "speed": speed([results.read_json(path) for path in sorted(folder.glob("bench*.json"))]),
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
        draw(small, labelled, folder)


def table(titles, rows):
    """A table in Markdown, without the columns that are empty."""
    kept = [i for i in range(len(titles)) if i == 0 or any(row[i] != "" for row in rows)]
    first, *others = ["| " + " | ".join(str(row[i]) for i in kept) + " |\n" for row in [titles, *rows]]
    return "".join([first, "|---" * len(kept) + "|\n", *others])


def grouped(folder):
    """Lists of runs that differ in nothing but the seed, as their files' names say, in the order of the tables."""
    groups = {}
    for path in sorted(folder.glob("*-seed*.json")):
        groups.setdefault(path.stem.rpartition("-seed")[0], []).append(read_run(path))
    return sorted(groups.values(), key=place)


def read_run(path):
    run = results.read_json(path)
    if run.get("row") not in NAMES:
        raise RunError(f"'{path}' is not a run's file: it has no row of the tables")
    return run


def place(runs):
    """What the tables are sorted by."""
    run = runs[0]
    return run["dataset"], run["arch"], run["epochs"], NAMES.index(run["row"]), chosen_options(runs)


def chosen_options(runs):
    """The options that are shown of runs that differ in their seed: views, optimiser, precision, lr and temperature."""
    given = runs[0]["options"]["pretrain"]
    switches = ("aug_plus", "aug_mild", "aug_crop", "nesterov", "no_bias_decay")
    chosen = [f"`--{name.replace('_', '-')}`" for name in switches if given.get(name)]
    chosen += ["`--views pil`"] * (given.get("views") == "pil")  # of version 0.1
    values = [f"`--{name.replace('_', '-')} {given[name]}`" for name in ("lr", "moco_t", "temp") if name in given]
    return ", ".join([*chosen, precision(runs), *values])


def precision(runs):
    """That of the pretraining; a run may have ended on another machine, with another one than it began with."""
    changed = []
    for run in runs:
        given, last = re.search(r"--precision (\w+)", run["commands"][0]), run["options"]["pretrain"]["precision"]
        if given and given[1] != last:
            changed.append(f"{given[1]}, then {last}")
    if not changed:
        return runs[0]["options"]["pretrain"]["precision"]
    return changed[0] + f" ({len(changed)} of {len(runs)} runs)" * (len(runs) > 1)


def is_full(run):
    """Does it train the published network on the whole of CIFAR, and is not a row scaled down?"""
    return run["arch"] == "resnet50" and run["dataset"].startswith("cifar") and run["images"] == 50_000


def run_table(groups, titles, *more):
    """A line per group of runs. `more`: the cells of other lines, by title."""
    rows = [*map(described, groups), *more]
    return table(titles, [[cells.get(title, "") for title in titles] for cells in rows])


def described(runs):
    """The cells of a table, by title, for runs that differ only in their seed."""
    run = runs[0]
    weights = next((r["weights"]["file"] for r in runs if "weights" in r), None)
    minutes = statistics.mean(r["pretrain_seconds"] + r["linear_seconds"] for r in runs) / 60
    own = f"(own classifier: {scores_of(runs, 'classifier_')})" if "classifier_top1" in run else ""
    linear = scores_of(runs) if "top1" in run else ""
    return {
        "": run["row"],
        "data": run["dataset"],
        "network": run["arch"],
        "epochs": run["epochs"],
        PASSES: run["epochs"] * BY_NAME[run["row"]].passes,
        "options": chosen_options(runs),
        "seeds": len(runs),
        "kNN": spread(runs, "knn"),
        "top-1 / top-5": f"{linear} {own}".strip() or "kNN only",
        "published": published(run) if is_full(run) else "",
        "weights": f"[{Path(weights).name}]({weights})" if weights else "",
        "hardware": "; ".join(sorted({machine(r) for r in runs})),
        "time": f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h",
    }


def scores_of(runs, whose=""):
    return " / ".join(spread(runs, f"{whose}{name}") for name in ("top1", "top5"))


def spread(runs, name):
    """The mean of what is measured, and if there are several the standard deviation."""
    values = [run[name] for run in runs if run.get(name) is not None]
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def machine(file):
    return f"{file['hardware']['device']}, {file['hardware']['cores']} cores"


def published(run):
    """What is published of a run's script and data set: for as many epochs, or else for any."""
    key = BY_NAME[run["row"]].script, run["dataset"]
    rows = [row for row in ROWS.values() if row.top1 and (row.script, row.dataset) == key]
    same = [row for row in rows if row.epochs == run["epochs"]]
    return "; ".join(scores(row) + f" ({row.epochs} epochs)" * (not same) for row in same or rows)


def scores(row):
    return f"{row.top1} / {row.top5 or '-'}"


def published_table():
    """A line per method and length, a column per data set."""
    rows = []
    for row in (row for row in ROWS.values() if row.top1 and row.dataset == "cifar10"):
        what = [f"`{row.script}`", row.epochs, methods.ALL[row.script].defaults.get("batch_size", 256)]
        larger = [r for r in ROWS.values() if (r.name, r.dataset, r.epochs) == (row.name, "cifar100", row.epochs)]
        rows.append([row.name, *what, scores(row), "".join(map(scores, larger))])
        if row.rerun:
            rows.append([f"{row.name}, the reference's rerun", *what, f"{row.rerun} / -", ""])
    return table(["", "script", "epochs", "batch", "CIFAR-10, top-1 / top-5", "CIFAR-100, top-1 / top-5"], rows)


def searches(folder):
    """The kNN accuracy of what was tried for a row, one log per try, named ROW-OPTIONS.csv; the best one in bold."""
    rows = []
    for key, name in {key.partition("-")[0]: row.name for key, row in ROWS.items()}.items():
        logs = {path.stem.partition("-")[2].replace("_", " "): path for path in sorted(folder.glob(f"{key}-*.csv"))}
        tried = {what: float(read_log(path)[-1]["knn"]) for what, path in logs.items()}
        best = max(tried, key=tried.get, default=None)
        found = (f"**{what}: {knn:.1f}**" if what == best else f"{what}: {knn:.1f}" for what, knn in tried.items())
        rows += [[name, ", ".join(found)]] if tried else []
    return table(["", "options: kNN"], rows)


def by_labels(folder):
    """{method: {labels per class: run}} of the runs on some of the labels, in order."""
    found = {name: {} for name in NAMES}
    for path in sorted(folder.glob("*.json")):
        run = read_run(path)
        given = run["options"]
        number = given["pretrain"].get("labels_per_class") or given["linear"]["per_class"]
        if number in found[run["row"]]:
            raise RunError(f"'{path}' is a second run of {run['row']} with {number} labels per class: keep one of them")
        found[run["row"]][number] = run
    return {row: dict(sorted(runs.items())) for row, runs in found.items() if runs}


def labels_table(labelled):
    """Accuracy by the number of labels per class, one line per method."""
    numbers, rows = sorted(set().union(*labelled.values())), []
    for row, runs in labelled.items():
        cells = {number: f"{top1(run):.1f}" for number, run in runs.items()}
        for number, run in runs.items():
            # A run without labels has all of them in kNN's bank: comparable only with the runs on all labels.
            if run["options"]["pretrain"].get("labels_per_class") or number == numbers[-1]:
                cells[number] += f" ({run['knn']:.1f})"
        own = any("top1" not in run for run in runs.values())
        rows.append([row + " (own classifier)" * own, *(cells.get(number, "") for number in numbers)])
    return table(["top-1 (kNN), labels per class:", *(f"{n:,}" for n in numbers)], rows)


def top1(run):
    """Top-1 of the linear classifier, else of cross entropy's own classifier, else None."""
    return run.get("top1", run.get("classifier_top1"))


def speed(benches):
    rows = []
    for key, what in FIGURES.items():
        digits = 0 if key == "images_per_second" else 2
        rows.append([what, *(f"{b[key]:,.{digits}f}" if key in b else "" for b in benches)])
    rows += [
        ["measured", *(b["measured"] for b in benches)],
        ["command", *(f"`{b['command'].partition(' --out')[0]}`" for b in benches)],
    ]
    return table(["", *map(machine, benches)], rows)


def draw(groups, labelled, folder):
    """curves.png, embeddings.png and labels.png: the methods side by side, one colour per method."""
    colours = {name: f"C{i}" for i, name in enumerate(NAMES)}
    chosen = {g[0]["row"]: g[0] for g in groups if g[0]["options"]["pretrain"].get("aug_plus")}  # the same views
    figure = Figure(figsize=(11, 4), layout="constrained")
    for panel, what, label in zip(figure.subplots(1, 2), ("loss", "knn"), ("loss", "kNN, top-1 in %"), strict=True):
        for name, run in chosen.items():
            points = [(e["epoch"] + 1, e[what]) for e in run["curve"] if e.get(what) is not None]
            panel.plot(*zip(*points, strict=True), colours[name], label=name)
        panel.set(xlabel="epoch", ylabel=label)
    save(figure, folder / "curves.png")

    drawn = {name: run["embedding"] for name, run in chosen.items() if "embedding" in run}
    rows = max(1, -(-len(drawn) // 3))
    figure = Figure(figsize=(11, 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 3).flatten()
    for panel in panels[len(drawn) :]:
        panel.axis("off")
    for panel, (name, points) in zip(panels, drawn.items(), strict=False):
        scatter(panel, np.array([points["x"], points["y"]]).T, np.array(points["label"]), points["classes"])
        panel.set_title(f"{name}: {top1(chosen[name]):.1f} %", fontsize=10, color=colours[name])
    save(figure, folder / "embeddings.png", ncols=10, markerscale=3)

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel, numbers = figure.subplots(), sorted(set().union(*labelled.values()))
    for name, runs in labelled.items():
        panel.plot(list(runs), [top1(run) for run in runs.values()], f"{colours[name]}o-", label=name)
    panel.set(xscale="log", xlabel="labels per class", ylabel="top-1 in %")
    panel.set_xticks(numbers, [f"{n:,}" for n in numbers])
    panel.minorticks_off()
    save(figure, folder / "labels.png")


def save(figure, path, ncols=3, **how):
    """Writes a figure, with the entries of its first panel as the legend."""
    entries = figure.axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=ncols, frameon=False, **how)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
