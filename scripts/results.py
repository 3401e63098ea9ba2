"""The rows of the table, and the files of measured runs and benchmarks: one schema, written and read here."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from moco.errors import RunError

MOCO = "-a resnet50 --lr 0.12 -b 256 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 2"  # two GPUs in one process
LINEAR = "-a resnet50 --lr 1.0 -b 256"
SUPCON_LINEAR = "-a resnet50 --recipe supcon"
SMALL_LINEAR = "-a resnet20 --recipe moco --lr 0.1 -b 256 --epochs 10 --schedule 6 8 --precision fp32"
# Chosen on training images held out; no row of the table has this recipe.
OWN = "-a resnet20 --lr 0.3 -b 256 --wd 5e-4 --moco-k 4096 --moco-m 0.9 --mlp --moco-t 0.1 --aug-mild --cos --warm-up 1"
OWN += " --knn-freq 10 --precision fp32"
PROTO = OWN.replace("--lr 0.3", "--lr 0.15")


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, its script and options, and the published percentages; None: not published."""

    name: str
    script: str
    options: str
    epochs: int
    linear: str | None
    top1: float | None
    top5: float | None

    @property
    def published(self) -> bool:
        return self.top1 is not None


ROWS = {
    "ce": Row("SupCrossEntropy", "main_ce.py", "-a resnet50", 500, None, 95.0, None),
    "supcon": Row("SupContrast", "main_supcon.py", "-a resnet50", 1000, SUPCON_LINEAR, 96.0, None),
    "moco-200": Row("MoCo v2", "main_moco.py", MOCO, 200, LINEAR, 87.4, 99.6),
    "in-200": Row("MoCo v2 + SupContrast_In", "main_moco_in.py", MOCO, 200, LINEAR, 95.4, 99.9),
    "moco-1000": Row("MoCo v2", "main_moco.py", MOCO, 1000, LINEAR, 93.6, 99.8),
    "in-1000": Row("MoCo v2 + SupContrast_In", "main_moco_in.py", MOCO, 1000, LINEAR, 96.1, 99.8),
    "out-1000": Row("MoCo v2 + SupContrast_Out", "main_moco_out.py", MOCO, 1000, LINEAR, 96.1, 99.9),
    "suploss-1000": Row("MoCo v2 + SupContrast_Suploss", "main_moco_suploss.py", MOCO, 1000, LINEAR, 96.0, 99.9),
    "own": Row("MoCo v2 + SupContrast_In, own recipe", "main_moco_in.py", OWN, 100, SMALL_LINEAR, None, None),
    "proto": Row("MoCo v2 + In + prototypes", "main_moco_proto.py", PROTO, 100, SMALL_LINEAR, None, None),
}

FIGURES = {
    "views_ratio": "speed-up of batched views over PIL (one core each; a GPU against all cores)",
    "folder_ratio": "speed-up of decoding a JPEG once and cropping it twice to 224 pixels over two PIL views, one core",
    "loop_over_bare": "speed of the training loop, relative to the bare encoders",
    "loop_over_plain": "speed-up over the unoptimised loop",
    "images_per_second": "images/s of the loop (GPU: ResNet-50, batch 256; CPU: ResNet-18, batch 128)",
}


def number(value, content=None):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text(value, content=None):
    return isinstance(value, str)


def percent(value, content=None):
    return number(value) and 0 <= value <= 100


def hardware(value, content):
    return isinstance(value, dict) and text(value.get("device")) and number(value.get("cores"))


def row_name(value, content):
    return value in [row.name for row in ROWS.values()]


def command_lines(value, content):
    return isinstance(value, list) and value and all(text(line) and len(line.split()) > 2 for line in value)


def curve(value, content):
    entries = value if isinstance(value, list) and len(value) == content["epochs"] else [None]
    return all(
        isinstance(e, dict) and number(e.get("loss")) and number(e.get("seconds")) and number(e.get("knn") or 0)
        for e in entries
    )


def embedding(value, content):
    points = [value.get(name) for name in ("x", "y", "label")] if isinstance(value, dict) else [None]
    lists = all(isinstance(p, list) and all(number(v) for v in p) for p in points)
    return lists and len({len(p) for p in points}) == 1 and isinstance(value.get("classes"), list)


def weights(value, content):
    return isinstance(value, dict) and text(value.get("file")) and text(value.get("sha256"))


# What a file must have, and what each part of it is.
RUN = dict(row=row_name, commands=command_lines, arch=text, dataset=text, top1=percent, top5=percent, hardware=hardware)
RUN |= dict.fromkeys(["epochs", "images", "seed", "pretrain_seconds", "linear_seconds"], number) | dict(curve=curve)
OPTIONAL = dict(knn=percent, embedding=embedding, cpu_seconds=number, weights=weights, folder_ratio=number)
BENCH = dict.fromkeys(FIGURES.keys() - OPTIONAL.keys(), number) | dict(hardware=hardware, measured=text, command=text)


def is_bench(content):
    return isinstance(content, dict) and "views_ratio" in content


def check(content, path):
    """RunError: the content is not that of a whole run or benchmark."""
    bench, given = is_bench(content), content if isinstance(content, dict) else {}
    schema = (BENCH if bench else RUN) | {n: right for n, right in OPTIONAL.items() if given.get(n) is not None}
    for name, right in schema.items():
        if not right(given.get(name), given):
            kind = "benchmark" if bench else "run"
            raise RunError(f"'{path}' is not the file of a whole {kind}: its {name} is missing or wrong")


def read(path):
    """The content of a run's or a benchmark's file."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise RunError(f"'{path}' is no JSON (an interrupted run?): {error}") from None
    check(content, path)
    return content


def write(path, content):
    check(content, path)
    write_json(path, content)


def read_json(path):
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"'{path}' cannot be read: {error}") from None


def write_json(path, content):
    """A line for each of the dict's values, however long it is."""
    tmp = Path(f"{path}.tmp")
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    tmp.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    os.replace(tmp, path)
