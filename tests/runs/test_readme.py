"""The commands, options and links of the README and docs/options.md."""

import re
import shlex

import pytest

from helpers import PAGES, README
from processes import ROOT

BLOCKS = [
    block.replace("\\\n", " ")
    for page in (README, PAGES["options.md"])
    for block in re.findall(r"^```\n(.*?)^```$", page, re.S | re.M)
]


COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if "python main_" in line]
SMALL = "-a resnet20 --image-size 8 -b 8 --epochs 1 --moco-k 32"


def test_commands(run, folder, tmp_path):
    """Runs each command with a small network, small data and one epoch."""
    assert len(COMMANDS) == 4
    data = folder(train=8, val=4)
    for command in COMMANDS:
        script, *args = shlex.split(command[command.index("main_") :])
        assert args.pop() == "data/"
        small = SMALL if script != "main_lincls.py" else "-a resnet20 -b 8 --epochs 1"
        if "--pretrained" in args:
            args[args.index("--pretrained") + 1] = str(tmp_path / "checkpoint_0000.pth.tar")
        done = run(script, shlex.join(args), small, "--output-dir", tmp_path, data)
        assert done.status == 0, done.err
    assert "result: top1=" in done.out


def test_every_option_on_the_page_exists(run):
    options = set(re.findall(r"`(--[a-z-]+)", PAGES["options.md"])) - {"--help"}
    assert len(options) > 12
    help_ = run("main_moco_out.py", "--help").out + run("main_lincls.py", "--help").out
    assert all(name in help_ for name in options), [name for name in options if name not in help_]


@pytest.mark.parametrize("script", ["moco", "moco_in", "moco_out", "moco_suploss", "supcon", "ce", "lincls"])
def test_help(script, run):
    done = run(f"main_{script}.py", "--help")
    assert done.status == 0 and "--output-dir" in done.out and "python main_" in done.out


def test_defaults_are_those_of_the_reference(run):
    for script, values in (
        ("main_moco_out.py", "--epochs 1000,-b 256,--lr 0.03,--momentum 0.9,--wd 0.0001,-j 8,-p 10,--warm-up 5"),
        ("main_moco_out.py", "--moco-dim 128,--moco-k 65536,--moco-m 0.99,--moco-t 0.07,--save-freq 200"),
        ("main_lincls.py", "--epochs 100,--lr 30.0,-b 256,--wd 0.0"),
        ("main_supcon.py", "--epochs 1000,--lr 0.5,-b 1024,--wd 0.0001,--temp 0.1"),
        ("main_ce.py", "--epochs 500,--lr 0.8,-b 1024,--wd 0.0001"),
    ):
        text = " ".join(run(script, "--help").out.split())
        for value in values.split(","):
            name, default = value.split()
            assert re.search(rf"(?<![\w-]){name}[ ,].*?default: {re.escape(default)}\)", text), value


def test_linked_files_exist():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (folder / link).exists(), link
