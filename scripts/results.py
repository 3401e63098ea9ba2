"""The rows of the tables, and the files of measured runs and benchmarks."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from moco import methods
from moco.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
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
    """A row of the table: its name, scripts and options, and the published percentages; None: not published."""

    name: str
    script: str
    options: str
    epochs: int
    linear: str
    top1: float | None
    top5: float | None = None
    dataset: str = "cifar10"
    rerun: float | None = None  # top-1 of the reference's own run of another paper's row

    @property
    def passes(self) -> int:
        """Passes of an encoder per image and epoch: three per view (a backward pass counts as two), one for a key."""
        method = methods.ALL[self.script]
        return 3 * method.views - 2 * method.shuffle_keys


CE, SUPCON = ("SupCrossEntropy", "main_ce.py"), ("SupContrast", "main_supcon.py")
IN, OUT = (("MoCo v2 + SupContrast_" + name, f"main_moco_{name.lower()}.py") for name in ("In", "Out"))
SUPLOSS = ("MoCo v2 + SupContrast_Suploss", "main_moco_suploss.py")
OF_100 = " --dataset cifar100"

ROWS = {
    "ce": Row(*CE, "-a resnet50", 500, SUPCON_LINEAR, 95.0),
    "supcon": Row(*SUPCON, "-a resnet50", 1000, SUPCON_LINEAR, 96.0, rerun=95.6),
    "moco-200": Row("MoCo v2", "main_moco.py", MOCO, 200, LINEAR, 87.4, 99.6),
    "in-200": Row(*IN, MOCO, 200, LINEAR, 95.4, 99.9),
    "moco-1000": Row("MoCo v2", "main_moco.py", MOCO, 1000, LINEAR, 93.6, 99.8),
    "in-1000": Row(*IN, MOCO, 1000, LINEAR, 96.1, 99.8),
    "out-1000": Row(*OUT, MOCO, 1000, LINEAR, 96.1, 99.9),
    "suploss-1000": Row(*SUPLOSS, MOCO, 1000, LINEAR, 96.0, 99.9),
    "own": Row("MoCo v2 + SupContrast_In, own recipe", IN[1], OWN, 100, SMALL_LINEAR, None),
    "proto": Row("MoCo v2 + In + prototypes", "main_moco_proto.py", PROTO, 100, SMALL_LINEAR, None),
    "own_out": Row("MoCo v2 + SupContrast_Out, own recipe", OUT[1], OWN, 100, SMALL_LINEAR, None),
    "ce-cifar100": Row(*CE, "-a resnet50" + OF_100, 500, SUPCON_LINEAR + OF_100, 75.3, None, "cifar100"),
    "supcon-cifar100": Row(*SUPCON, "-a resnet50" + OF_100, 1000, SUPCON_LINEAR + OF_100, 76.5, None, "cifar100"),
    "out-cifar100": Row(*OUT, MOCO + OF_100, 1000, LINEAR + OF_100, 77.3, 93.0, "cifar100"),
    "suploss-cifar100": Row(*SUPLOSS, MOCO + OF_100, 1000, LINEAR + OF_100, 78.0, 93.2, "cifar100"),
}
BY_NAME = {row.name: row for row in ROWS.values()}  # rows of one name differ in epochs and data set only
NAMES = list(BY_NAME)


def read_json(path):
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"'{path}' cannot be read: {error}") from None


def write_json(path, content):
    """Writes a dict as JSON, one line per value."""
    tmp = Path(f"{path}.tmp")
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    tmp.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    os.replace(tmp, path)
