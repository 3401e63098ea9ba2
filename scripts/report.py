"""Rewrites the README's tables between their markers, from the files in results/ alone.

python scripts/report.py            # rewrite
python scripts/report.py --check    # exit with status 1 if the README does not agree with results/
"""

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reproduce import ROOT, ROWS

from moco import distributed, options
from moco.errors import RunError, UsageError

NUMBERS = ("epochs", "top1", "top5", "best_top1", "pretrain_seconds", "linear_seconds", "images", "seed")
FIGURES = {
    "views_ratio": "batched views against the PIL chain",
    "loop_over_bare": "whole loop against the bare encoders",
    "loop_over_plain": "whole loop against the same with every speed-up off",
    "images_per_second": "images/s of the loop",
}


def main():
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the README is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    words = parser.parse_args()
    try:
        runs, benches = read(words.results)
        old = words.readme.read_text()
        new = between(old, "table", table(runs))
        new = between(new, "speed", speed(benches))
        if words.check and new != old:
            raise RunError(f"'{words.readme}' does not agree with '{words.results}': run make report")
        if new != old:
            words.readme.write_text(new)
    except (UsageError, RunError) as error:
        distributed.complain(error)


def read(folder):
    """The runs and the benchmarks on file; RunError names a file that is neither."""
    runs, benches = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"'{path}' is no JSON (an interrupted run?): {error}") from None
        if isinstance(content, dict) and "views_ratio" in content:
            benches.append(content)
            continue
        names = {row.name for row in ROWS.values()}
        if not isinstance(content, dict) or content.get("row") not in names:
            raise RunError(f"'{path}' is not a run's file: its row is none of the table's")
        wrong = [n for n in NUMBERS if isinstance(content.get(n), bool) or not isinstance(content.get(n), int | float)]
        wrong += [n for n in ("top1", "top5", "best_top1") if n not in wrong and not 0 <= content[n] <= 100]
        if wrong or not isinstance(content.get("curve"), list) or len(content["curve"]) != content["epochs"]:
            raise RunError(
                f"'{path}' is not a whole run's file: {wrong[0] if wrong else 'its curve'} is missing or wrong"
            )
        runs.append(content)
    return runs, benches


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
    for row in ROWS.values():
        mine = [r for r in runs if r["row"] == row.name and r["epochs"] == row.epochs and is_full(r)]
        top5 = "-" if row.top5 is None else row.top5
        cells = [row.name, f"`{row.script}`", row.epochs, f"{row.top1} / {top5}", *ours(mine)]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    small = [r for r in runs if not is_full(r)]
    if small:
        lines += ["", "What a machine without a GPU can do (a mean over seeds where there are several):", ""]
        lines += ["| | data | network | epochs | views, precision | kNN | top-1 / top-5 | hardware | time |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        groups = {}
        for run in small:
            key = (run["dataset"], run["arch"], run["epochs"], how(run), order(run["row"]))
            groups.setdefault(key, []).append(run)
        for (dataset, arch, epochs, manner, _), mine in sorted(groups.items()):
            knn = spread([r["knn"] for r in mine if r["knn"] is not None], 1)
            cells = [mine[0]["row"], dataset, arch, epochs, manner, knn, *ours(mine)]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def is_full(run):
    """Does the published network on the whole of CIFAR-10, not a row scaled down?"""
    return (run["arch"], run["dataset"], run["images"]) == ("resnet50", "cifar10", 50_000)


def order(name):
    return [row.name for row in ROWS.values()].index(name)


def how(run):
    words = run["commands"][0].split()
    values = dict(pairwise(words))
    return f"{values.get('--views', 'batched')}, {values.get('--precision', 'fp32')}"


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
