"""What docs/ shows runs as it stands."""

import math
import re

import torch

from conftest import ROOT


def test_a_training_loop_of_ones_own(run, tmp_path, monkeypatch, capfd):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    there = {}
    exec(blocks[0], there)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", capfd.readouterr().out)]
    assert len(losses) == 2 and all(0 < loss < 2 * math.log(1024) for loss in losses)
    model, labels = there["model"], there["labels"]
    entered = model.label_queue[: 2 * len(labels)]  # two epochs
    assert torch.equal(entered.sort().values, labels.repeat(2).sort().values)
    assert not any(
        torch.equal(q, k) for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True)
    )
    done = run("main_lincls.py", "--pretrained mine.pth.tar --dataset digits --image-size 8 --epochs 1 --seed 0")
    assert done.status == 0 and "result: top1=" in done.out, done.err
