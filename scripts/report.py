"""Rewrites the tables of README.md and docs/ between their markers, from the files in results/ alone, and draws
curves.png, embeddings.png and labels.png there.

python scripts/report.py            # rewrite
python scripts/report.py --check    # exit with status 1 if a page does not agree with results/
"""

import re
import statistics
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import results
from moco import launch, options
from moco.errors import RunError, UsageError
from moco.run import read_log
from picture import scatter
from results import NAMES, ROOT, ROWS, recipe

# Options that do not change what a run computes, that follow from others, or that have a column of their own.
ASIDE = {"data", "output_dir", "pretrained", "resume", "evaluate", "seed", "start_epoch", "workers", "compile", "gpu"}
ASIDE |= {
    "print_freq",
    "knn_freq",
    "save_freq",
    "images",
    "classes",
    "objective",
    "bn_splits",
    "centre_crop",
    "lr_decay",
}
ASIDE |= {"multiprocessing_distributed", "world_size", "rank", "dist_url", "dist_backend"}
VIEWS = ("aug_plus", "aug_mild", "aug_crop")
ASIDE |= {"precision", "views", "arch", "dataset", "stem", "mean", "std", *VIEWS}
FLAGS = {"batch_size": "-b", "weight_decay": "--wd", "groups": "--bn-splits"}
SMALL = ("resnet20", "cifar10", 50_000)
PASSES = "encoder passes per image"  # epochs times Row.passes
FIRST = f"|network|data|epochs|{PASSES}|options|kNN|top-1 / top-5|published|core-hours|weights".split("|")
ALL = f"|data|network|epochs|{PASSES}|options|kNN|top-1 / top-5|hardware|time".split("|")
ANCHOR = "Cross entropy, [He et al.](https://arxiv.org/abs/1512.03385); [200 epochs, best one](https://github.com/"
ANCHOR = {"": ANCHOR + "chenyaofo/pytorch-cifar-models)", "published": "91.25; 92.6"}

FIGURES = {
    "views_ratio": "speed-up of batched views over PIL (one core each; a GPU against all cores)",
    "folder_ratio": "a JPEG to two uint8 crops of 224 pixels (the rest of the views is batched, not counted), "
    "over torchvision's two finished views on PIL; both decode once, one core",
    "loop_over_bare": "speed of the training loop, relative to the bare encoders",
    "images_per_second": "images/s of the loop (GPU: ResNet-50, batch 256; CPU: ResNet-18, batch 128)",
}


def main():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--pages", type=Path, default=ROOT, metavar="DIR", help="where README.md and docs/ are")
    args = parser.parse_args()
    try:
        if not args.results.is_dir():
            raise UsageError(f"there is no folder '{args.results}'")
        files = [results.read(path) for path in sorted(args.results.glob("*.json"))]
        runs, benches = ([f for f in files if results.is_bench(f) == bench] for bench in (False, True))
        labelled = by_labels(args.results / "labels")
        groups = grouped(runs)
        full, large = [g for g in groups if is_full(g[0])], [g for g in groups if g[0]["dataset"] == "imagefolder"]
        blocks = {
            "rows": run_table(full + longest(groups), FIRST, [ANCHOR]),
            "table": published_table(),
            "runs": run_table(groups, ALL),
            "large": run_table(large, ALL),
            "labels": labels_table(labelled),
            "searches": searches(args.results / "lr"),
            "tries": searches(args.results / "own"),
            "speed": speed(benches),
        }
        missing = set(blocks)
        marker = re.compile(
            rf"(<!-- ({'|'.join(blocks)}): made from results/ by scripts/report.py -->\n).*?(<!-- end of \2 -->)", re.S
        )
        for path in [args.pages / "README.md", *sorted((args.pages / "docs").glob("*.md"))]:
            old = path.read_text()
            new = marker.sub(lambda found: found[1] + blocks[found[2]] + found[3], old)
            missing -= {name for _, name, _ in marker.findall(old)}
            if args.check and new != old:
                raise RunError(f"'{path}' does not agree with '{args.results}': run make report")
            if new != old:
                path.write_text(new)
        if missing:
            raise RunError(f"no page in '{args.pages}' has both markers of {', '.join(sorted(missing))}")
        if not args.check:
            draw(longest(groups), args.results)
            draw_labels(labelled, args.results)
    except OSError as error:
        launch.report_and_exit(RunError(f"'{error.filename}': {error.strerror}"))
    except (UsageError, RunError) as error:
        launch.report_and_exit(error)


def lines(titles, rows):
    """A table in Markdown, without the columns that are empty."""
    kept = [i for i in range(len(titles)) if i == 0 or any(row[i] != "" for row in rows)]
    table = ["| " + " | ".join(str(row[i]) for i in kept) + " |\n" for row in [titles, *rows]]
    return "".join([table[0], "|---" * len(kept) + "|\n", *table[1:]])


def described(runs, groups):
    """The cells of a table for runs that differ only in their seed, by title; `groups`: the table's runs."""
    run = runs[0]
    on_cpu = run["hardware"]["name"].startswith("cpu")
    cpu = [r["cpu_seconds"] / 3600 for r in runs if on_cpu and r.get("cpu_seconds")]
    files = [r["weights"]["file"] for r in runs if "weights" in r]
    minutes = statistics.mean(r["pretrain_seconds"] + r["linear_seconds"] for r in runs) / 60
    return {
        "": run["row"],
        "data": run["dataset"],
        "network": run["arch"],
        "epochs": run["epochs"],
        PASSES: run["epochs"] * row_of(run).passes,
        "options": ", ".join([*how(run), *unlike(run, groups)]),
        "kNN": spread([r["knn"] for r in runs if r.get("knn") is not None]),
        "top-1 / top-5": accuracy(runs),
        "published": published(run) if is_full(run) else "",
        "core-hours": spread(cpu),
        "weights": f"[{Path(files[0]).name}]({files[0]})" if files else "",
        "hardware": "; ".join(sorted({f"{r['hardware']['device']}, {r['hardware']['cores']} cores" for r in runs})),
        "time": f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h",
    }


def run_table(groups, titles, more=()):
    found = [described(group, groups) for group in groups] + [dict.fromkeys(titles, "") | cells for cells in more]
    return lines(titles, [[cells[title] for title in titles] for cells in found])


def accuracy(runs):
    """The cell of the last epoch's top-1 / top-5; cross entropy's own classifier in brackets."""
    done, own = [r for r in runs if "top1" in r], [r for r in runs if "classifier_top1" in r]
    shown = [" / ".join(spread([r[name] for r in done]) for name in ("top1", "top5"))] if done else []
    if own:
        scores = " / ".join(spread([r[f"classifier_{name}"] for r in own]) for name in ("top1", "top5"))
        shown.append(f"(own classifier: {scores})")
    return " ".join(shown) or "kNN only"


def longest(groups):
    """The small network on all of CIFAR-10: of each kind of views the runs with more than half of the most epochs."""
    small = [g for g in groups if (g[0]["arch"], g[0]["dataset"], g[0]["images"]) == SMALL]
    most = {views(g[0]): g[0]["epochs"] for g in small}  # they are sorted by epochs
    kept = [g for g in small if 2 * g[0]["epochs"] > most[views(g[0])]]
    return sorted(kept, key=lambda g: (most[views(g[0])], order(g[0]["row"])))


def published(run):
    """What is published of a run's script and data set: for as many epochs, or else for any."""
    rows = [r for r in ROWS.values() if r.published and (r.script, r.dataset) == (row_of(run).script, run["dataset"])]
    same = [row for row in rows if row.epochs == run["epochs"]]
    return "; ".join(scores(row) + f" ({row.epochs} epochs)" * (not same) for row in same or rows)


def scores(row):
    return f"{row.top1} / {'-' if row.top5 is None else row.top5}"


def published_table():
    """A line per method and length, a column per data set."""
    table = []
    for row in ROWS.values():
        if row.published and row.dataset == "cifar10":
            what = [f"`{row.script}`", row.epochs, row.batch]
            larger = [r for r in ROWS.values() if (r.name, r.dataset, r.epochs) == (row.name, "cifar100", row.epochs)]
            table.append([row.name, *what, scores(row), scores(larger[0]) if larger else ""])
            if row.rerun:
                table.append([f"{row.name}, the reference's rerun", *what, f"{row.rerun} / -", ""])
    return lines(["", "script", "epochs", "batch", "CIFAR-10, top-1 / top-5", "CIFAR-100, top-1 / top-5"], table)


def searches(folder):
    """The kNN accuracy of what was tried for a row, a log each named ROW-OPTIONS.csv; the best one in bold."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        row, _, what = path.stem.partition("-")
        found.setdefault(row, {})[what.replace("_", " ")] = float(read_log(path)[-1]["knn"])
    table = []
    for key, name in {key.partition("-")[0]: row.name for key, row in ROWS.items()}.items():
        tried = found.get(key, {})
        best = max(tried, key=tried.get, default=None)
        shown = (f"**{what}: {knn:.1f}**" if what == best else f"{what}: {knn:.1f}" for what, knn in tried.items())
        table += [[name, ", ".join(shown)]] if tried else []
    return lines(["", "options: kNN"], table)


def by_labels(folder):
    """Of runs on some of the labels: method -> labels per class -> run."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        run = results.read(path)
        given = run["options"]
        number = given["pretrain"].get("labels_per_class") or given["linear"]["per_class"]
        found.setdefault(run["row"], {})[number] = run
    return {row: dict(sorted(found[row].items())) for row in sorted(found, key=order)}


def labels_table(labelled):
    """Accuracy by the number of labels per class, a method a line."""
    numbers, table = sorted({number for runs in labelled.values() for number in runs}), []
    for row, runs in labelled.items():
        shown = []
        for number in numbers:
            run = runs.get(number)
            # A run without labels has all of them in kNN's bank: comparable only with the runs on all labels.
            alike = run and (run["options"]["pretrain"].get("labels_per_class") or number == numbers[-1])
            shown.append(f"{top1(run):.1f}" + f" ({run['knn']:.1f})" * bool(alike) if run else "")
        own = any("top1" not in run for run in runs.values())
        table.append([row + " (own classifier)" * own, *shown])
    return lines(["top-1 (kNN), labels per class:", *(f"{n:,}" for n in numbers)], table)


def grouped(runs):
    """Lists of runs that differ in nothing but the seed."""
    groups = {}
    for run in runs:
        groups.setdefault((*alike(run), str(sorted(settings(run["options"]).items()))), []).append(run)
    return [group for _, group in sorted(groups.items())]


def alike(run):
    """What runs of one method have in common that differ only in their options or seeds."""
    return run["dataset"], run["arch"], run["epochs"], *how(run), order(run["row"])


def settings(options):
    """(program, option) -> value, of the options that are given and that no column shows."""
    found = {(program, name): value for program, given in options.items() for name, value in given.items()}
    aside = {("pretrain", "epochs"), *((program, name) for program in options for name in ASIDE)}
    return {key: value for key, value in found.items() if key not in aside and value not in (None, False)}


def unlike(run, groups):
    """The options that set a run apart: from its row, or if it is a small one from those of its method and epochs."""
    alikes = [group[0]["options"] for group in groups if alike(group[0]) == alike(run)]
    mine, differing = settings(run["options"]), set()
    for programs in [recipe(row_of(run))] if is_full(run) else alikes:
        other, common = settings(programs), programs.keys() & run["options"].keys()
        differing |= {key for key in {*mine, *other} if key[0] in common and mine.get(key) != other.get(key)}
    found = []
    for program, name in sorted(differing, key=lambda key: (key[0] == "linear", key)):
        value = mine.get((program, name))
        values = [] if value is True or value is None else value if isinstance(value, list) else [value]
        words = " ".join(map(str, [FLAGS.get(name, f"--{name.replace('_', '-')}"), *values]))
        found.append(f"{'linear: ' * (program == 'linear')}{'no ' * (value is None)}`{words}`")
    return found


def row_of(run):
    """The run's row of the table, for as many epochs if there is one."""
    rows = [row for row in ROWS.values() if row.name == run["row"]]
    return min(rows, key=lambda row: (row.dataset != run["dataset"], row.epochs != run["epochs"]))


def is_full(run):
    """Does the published network on the whole of CIFAR, not a row scaled down?"""
    return run["arch"] == "resnet50" and run["dataset"].startswith("cifar") and run["images"] == 50_000


def order(name):
    return NAMES.index(name)


def views(run):
    given = run["options"]["pretrain"]
    chosen = [f"`--{name.replace('_', '-')}`" for name in VIEWS if given.get(name)]
    return chosen[0] if chosen else "the script's views"


def how(run):
    given = run["options"]["pretrain"]
    return [views(run), *["`--views pil`"] * (given.get("views") == "pil"), given["precision"]]


def top1(run):
    """Of the linear classifier, or of cross entropy's own where there is no other, or None."""
    return run.get("top1", run.get("classifier_top1"))


def spread(values, digits=1):
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"


def draw(groups, folder):
    """curves.png and embeddings.png: the methods side by side with the same views, a colour each."""
    chosen = {g[0]["row"]: g[0] for g in groups if g[0]["options"]["pretrain"].get("aug_plus")}.values()
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
    if not drawn:
        return
    figure, axes = plt.subplots(-(-len(drawn) // 3), 3, figsize=(11, 3.9 * -(-len(drawn) // 3)), squeeze=False)
    for panel in axes.flat[len(drawn) :]:
        panel.axis("off")
    for panel, run in zip(axes.flat, drawn, strict=False):
        points = run["embedding"]
        xy, labels = np.array([points["x"], points["y"]]).T, np.array(points["label"])
        scatter(panel, xy, labels, points["classes"], legend=False)
        panel.set_title(f"{run['row']}: {top1(run):.1f} %", fontsize=10, color=f"C{order(run['row'])}")
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=min(10, len(handles[1])), frameon=False, markerscale=3)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(folder / "embeddings.png", dpi=90)
    plt.close(figure)


def draw_labels(labelled, folder):
    """labels.png: accuracy by the number of labels per class."""
    if not labelled:
        return
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for row, runs in labelled.items():
        axes.plot(list(runs), [top1(run) for run in runs.values()], f"C{order(row)}o-", label=row)
    numbers = sorted({number for runs in labelled.values() for number in runs})
    axes.set(xscale="log", xlabel="labels per class", ylabel="top-1 in %")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers], minor=False)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "labels.png", dpi=90)
    plt.close(figure)


def speed(benches):
    if not benches:
        return "Not measured yet.\n"
    table = []
    for key, title in FIGURES.items():
        digits = 0 if key == "images_per_second" else 2
        table.append([title, *(f"{b[key]:,.{digits}f}" if key in b else "" for b in benches)])
    table += [["measured", *(b["measured"] for b in benches)], ["command", *(f"`{b['command']}`" for b in benches)]]
    return lines(["", *(f"{b['hardware']['device']}, {b['hardware']['cores']} cores" for b in benches)], table)


if __name__ == "__main__":
    main()
