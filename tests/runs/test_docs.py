"""The programs and commands in docs/ run."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from helpers import PAGES, README, foreign, python_blocks
from moco import encoders, methods, options
from processes import ROOT, start


def test_a_custom_training_loop(run, tmp_path, monkeypatch, capfd):
    program, _ = python_blocks(PAGES["library.md"])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    exec(program, namespace)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", capfd.readouterr().out)]
    assert len(losses) == 2 and all(0 < loss < 2 * math.log(1024) for loss in losses)
    model, labels = namespace["model"], namespace["labels"]
    enqueued = model.label_queue[: 2 * len(labels)]  # two epochs
    assert torch.equal(enqueued.sort().values, labels.repeat(2).sort().values)
    assert not any(
        torch.equal(q, k) for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True)
    )
    done = run("main_lincls.py", "--pretrained mine.pth.tar --dataset digits --image-size 8 --epochs 1 --seed 0")
    assert done.status == 0 and "result: top1=" in done.out, done.err


def test_fsdp_as_on_the_page(tmp_path):
    """The key encoder follows the query encoder."""
    done = start("tests/subprocesses/sharded.py", tmp_path / "store")
    out = done.communicate(timeout=60)[0]
    assert done.returncode == 0, out
    queries, keys = map(float, out.split()[-2:])
    assert 0 < keys < queries, out


def test_images_with_several_labels():
    """The example's weights are the number of shared labels over that of all labels, and 1 for the query's own key."""
    namespace, seen = {}, []
    exec(python_blocks(PAGES["library.md"])[1], namespace)
    loss = namespace["out_loss"]
    namespace["out_loss"] = lambda logits, weights: (seen.append(weights), loss(logits, weights))[1]
    torch.manual_seed(0)
    model = namespace["Overlap"](encoders.build("resnet20"), dim=8, K=3)
    labels = torch.tensor([0b1, 0b101, -1])
    model.label_queue.copy_(torch.tensor([0b1101, -1, 0b1000000]))
    model(torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), labels).backward()
    wanted = [[1, 1 / 2, 0, 1 / 3, 0, 0], [1 / 2, 1, 0, 2 / 3, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert torch.allclose(seen[0], torch.tensor(wanted))


def test_the_commands_for_imagenet_are_valid():
    commands = re.findall(r"^    python (main_.*)", PAGES["imagenet.md"].replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        script, *args = command.split()
        linear = script == "main_lincls.py"
        parser = options.linear_parser("") if linear else options.pretrain_parser("", methods.OUT.add_options)
        parsed = parser.parse_args(args)
        assert parsed.data == "imagenet/" and (linear or parsed.image_size == 224)


def test_enlarging_cifar10(folder, tmp_path, monkeypatch):
    folder(train=3, val=2).rename(tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)
    (program,) = python_blocks(PAGES["imagenet.md"])
    exec(program, {})
    files = sorted((tmp_path / "large").glob("*/*/*.jpg"))
    sizes = {Image.open(path).size for path in files}
    assert len(files) == 10 and len(sizes) > 5 and all(96 <= side <= 256 for size in sizes for side in size)


def test_load_encoder_as_on_the_pages(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40)).save("photo.png")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    for page in (PAGES["use.md"], README):
        (program,) = [block for block in python_blocks(page) if "load_encoder" in block]
        namespace = {}
        exec(program, namespace)
        assert namespace["features"].shape == (1, 64)


def test_the_page_on_photos(run, folder, tmp_path, monkeypatch):
    """Runs its commands with small photos, a smaller network and two epochs."""
    pytest.importorskip("onnxruntime")
    (block,) = re.findall(r"^```\n(.*?)^```$", PAGES["photos.md"], re.S | re.M)
    fetch, *commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == 3 and "'resnet50.pth'" in fetch
    monkeypatch.chdir(tmp_path)
    folder("photos", size=(90, 80), train=8, val=4)
    (tmp_path / foreign(tmp_path, "torchvision")[0].name).rename("resnet50.pth")
    for command in commands:
        _, script, *args = command.split()
        small = "--image-size 72 -b 8 --moco-k 16 --epochs 2 -j 1" if script == "main_moco_out.py" else ""
        done = run(script, " ".join(args), small)
        assert done.status == 0, done.err
        assert {"main_moco_out.py": "120 tensors taken", "scripts/extract.py": "MAP@R"}.get(script, "") in done.out
    assert (tmp_path / "run/encoder.onnx").exists()
    (program,) = python_blocks(PAGES["photos.md"])
    (tmp_path / "check.py").write_text(program)
    (tmp_path / "photos/train/dog/3.png").write_bytes(b"broken")
    command = [sys.executable, "check.py", "photos"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    (line,) = done.stdout.splitlines()
    assert "photos/train/dog/3.png' cannot be read" in line, done
