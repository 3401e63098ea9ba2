"""The commands, options and links of the README and docs/options.md."""

import re
import shlex

import pytest

from helpers import PAGES, README
from moco import methods, options
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
    named = set(re.findall(r"`(--[a-z-]+)", PAGES["options.md"])) - {"--help"}
    assert len(named) > 12
    help_ = run("main_moco_out.py", "--help").out + run("main_lincls.py", "--help").out
    assert all(name in help_ for name in named), [name for name in named if name not in help_]


@pytest.mark.parametrize("script", [*methods.ALL, "main_lincls.py"])
def test_help(script, run):
    done = run(script, "--help")
    assert done.status == 0 and "--output-dir" in done.out and "python main_" in done.out


@pytest.mark.parametrize(
    "script, wanted",
    [
        ("main_moco_out.py", dict(epochs=1000, lr=0.03, batch_size=256, weight_decay=1e-4, momentum=0.9, workers=8)),
        ("main_moco_out.py", dict(print_freq=10, warm_up=5, save_freq=200)),
        ("main_moco_out.py", dict(moco_dim=128, moco_k=65536, moco_m=0.99, moco_t=0.07)),
        ("main_lincls.py", dict(epochs=100, lr=30.0, batch_size=256, weight_decay=0.0)),
        ("main_supcon.py", dict(epochs=1000, lr=0.5, batch_size=1024, weight_decay=1e-4, dim=128, temp=0.1)),
        ("main_ce.py", dict(epochs=500, lr=0.8, batch_size=1024, weight_decay=1e-4)),
    ],
)
def test_defaults_are_those_of_the_reference(script, wanted):
    method = methods.ALL.get(script)
    parser = options.pretrain_parser("", method.add_options, method.defaults) if method else options.linear_parser("")
    args = vars(parser.parse_args([]))
    assert {name: args[name] for name in wanted} == wanted


def test_linked_files_exist():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (folder / link).exists(), link
