"""Parsing and resolving options."""

import math
import sys
from argparse import Namespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import results
from helpers import on_processes
from moco import augment, datasets, distributed, methods, options
from moco.errors import UsageError

NAMES = (
    "-a -j --epochs --start-epoch -b --lr --schedule --momentum --wd -p --resume --seed --gpu --world-size "
    "--rank --dist-url --dist-backend --moco-dim --moco-k --moco-m --moco-t --mlp --aug-plus --cos --warm-up "
    "--output-dir --save-freq --dataset --image-size --stem --mean --std --bn-splits --precision --knn-freq "
    "--per-class"
)
VALUES = st.one_of(
    st.integers(-3, 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.sampled_from(["", "-", "auto", "1e9"]),
)


def resolved(script, words, saved=None):
    method = methods.ALL[script]
    parser = options.pretrain_parser("", method.add_options, method.defaults)
    args = parser.parse_args([*words.split(), "--dataset", "digits", "--seed", "0"])
    return options.resolve_pretraining(args, torch.device("cpu"), "", saved)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(NAMES.split()), st.lists(VALUES, max_size=3)), max_size=4))
def test_any_command_line(capsys, pairs):
    """Either it parses, or it is refused in one line with status 2."""
    parser = options.pretrain_parser("Title.\n\nText.", methods.OUT.add_options)
    capsys.readouterr()
    try:
        parser.parse_args([arg for name, values in pairs for arg in (name, *values)])
    except SystemExit as exit:
        assert exit.code == 2
        err = capsys.readouterr().err
        assert err.count("error: ") >= 1 and len(err.splitlines()) == 1


@pytest.mark.parametrize("size, expected", [(64, datasets.CIFAR10), (65, datasets.IMAGENET), (224, datasets.IMAGENET)])
def test_large_images_have_the_statistics_of_imagenet(size, expected, photos):
    data = str(photos())
    args = options.pretrain_parser("", methods.OUT.add_options).parse_args(["--image-size", str(size), data])
    resolved = options.resolve(args, torch.device("cpu"))
    assert (tuple(resolved.mean), tuple(resolved.std)) == expected
    linear = options.linear_parser("").parse_args([data])
    saved = {"options": options.plain(resolved), "arch": "resnet50"}
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    linear = options.resolve_linear(linear, torch.device("cpu"), "a checkpoint", saved, weights)
    assert (linear.image_size, linear.mean, linear.std) == (size, resolved.mean, resolved.std)


def test_digits_keep_their_statistics_at_any_size():
    args = Namespace(batch_size=4, dataset="digits", data=None, image_size=96, mean=None, std=None, precision=None)
    assert options.resolve(args, torch.device("cpu")).mean == list(datasets.STATISTICS["digits"][0])


def test_linear_evaluation_of_an_imagenet_checkpoint_without_options():
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7)}

    def resolved(*more, **saved_options):
        args = options.linear_parser("").parse_args([*more, "-a", "resnet50", "--dataset", "imagefolder", "data/"])
        saved = {"options": saved_options}
        return options.resolve_linear(args, torch.device("cpu"), "moco.pth.tar", saved, weights)

    args = resolved()
    assert (args.stem, args.image_size, (tuple(args.mean), tuple(args.std))) == ("imagenet", 224, datasets.IMAGENET)
    args = resolved("--mean", "0.1", "0.2", "0.3", std=[1, 1, 1])
    assert (args.mean, args.std) == ([0.1, 0.2, 0.3], [1, 1, 1])


def test_long_runs_on_a_gpu_are_compiled_if_they_can_be(monkeypatch, tmp_path):
    split = datasets.Split(torch.zeros(4).long(), ["cat", "dog"])
    args = Namespace(epochs=100, compile=None)

    def compiled(steps):
        return options.complete(args, split, steps, torch.device("cuda")).compile

    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(options, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(options.sysconfig, "get_path", lambda *names: tmp_path)
    assert compiled(150) and not compiled(149)
    with monkeypatch.context() as patch:
        patch.setattr(options, "find_spec", lambda name: None)
        assert not compiled(150)
    (tmp_path / "Python.h").rename(tmp_path / "other.h")
    assert not compiled(150)
    (tmp_path / "other.h").rename(tmp_path / "Python.h")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not compiled(150)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not compiled(150)


def test_every_process_has_the_seed_that_rank_0_draws(monkeypatch):
    monkeypatch.setattr(distributed, "broadcast", lambda x: x.fill_(7))
    assert options.shared_seed(None, torch.device("cpu")) == 7
    assert options.shared_seed(3, torch.device("cpu")) == 3


@pytest.mark.parametrize(
    "what, change",
    [
        ("lr", lambda args, split, saved: setattr(args, "lr", 0.2)),
        ("the training images", lambda args, split, saved: split.labels.fill_(1)),
        ("the training images", lambda args, split, saved: split.paths.sort(reverse=True)),
        ("the checkpoint", lambda args, split, saved: saved.update(step=7)),
        ("the checkpoint", lambda args, split, saved: saved.clear()),  # it has none
        (None, lambda args, split, saved: setattr(args, "workers", 3)),
    ],
)
def test_processes_that_differ_are_refused(what, change):
    def agree():
        args = Namespace(lr=0.1, workers=2)
        split = datasets.Split(torch.tensor([0, 1]), ["cat", "dog"], paths=["a/cat/0.png", "a/dog/1.png"])
        saved = dict(epoch=3, step=6)
        if distributed.rank() == 1:
            split.paths = [path.replace("a/", "b/") for path in split.paths]  # a folder of its own is fine
            change(args, split, saved)
        try:
            return options.agree(args, torch.device("cpu"), split, saved)
        except UsageError as error:
            return str(error)

    expected = what and f"the processes differ in {what}: they must be the same on all, see docs/clusters.md"
    assert on_processes(agree, 2) == [expected] * 2


@pytest.mark.parametrize(
    "words, theirs, views, crop, decay",
    [
        ("", {}, augment.LINEAR, True, 0.1),
        ("--recipe supcon", {}, augment.CROSS_ENTROPY, False, 0.2),
        ("", dict(aug_crop=True), augment.PADDED, False, 0.1),
    ],
)
def test_the_views_of_the_linear_evaluation(words, theirs, views, crop, decay, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_lincls.py", *words.split()])
    args = options.linear_parser("").parse_args(
        [*words.split(), *["-a", "resnet20", "--dataset", "digits", "--seed", "0"]]
    )
    weights = {"conv1.weight": torch.zeros(16, 3, 3, 3)}
    args = options.resolve_linear(args, torch.device("cpu"), "a checkpoint", {"options": theirs}, weights)
    assert (args.train_views, args.centre_crop, args.lr_decay) == (views, crop, decay)


@pytest.mark.parametrize("key", results.ROWS)
def test_the_learning_rate_of_each_rows_command(key):
    """MoCo's: from 0 to lr in 5 epochs, then half a cosine to 0. SupContrast's: 0.01 to the cosine of epoch 10, then to lr / 1000."""
    row = results.ROWS[key]
    args = resolved(row.script, f"{row.options} --epochs {row.epochs}")
    lr, epochs = args.lr, row.epochs

    def rate(moment):
        return methods.ALL[row.script].learning_rate(moment, args)

    if row.script in ("main_supcon.py", "main_ce.py"):
        tenth = lr * (0.001 + 0.999 * (1 + math.cos(math.pi * 10 / epochs)) / 2)
        wanted = [(0, 0.01), (5, (0.01 + tenth) / 2), (epochs / 2 - 1, lr * 0.5005), (epochs - 0.5, lr / 1000)]
        assert lr == {"main_supcon.py": 0.5, "main_ce.py": 0.8}[row.script]
    else:
        warm_up = 1 if "own" in key or key == "proto" else 5
        wanted = [(0, 0), (warm_up / 2, lr / 2), (warm_up, lr), ((warm_up + epochs) / 2, lr / 2), (epochs, 0)]
    assert [rate(moment) for moment, _ in wanted] == pytest.approx([value for _, value in wanted], abs=1e-12)


def test_the_learning_rate_without_cos():
    args = resolved("main_moco_out.py", "")
    rates = [methods.OUT.learning_rate(moment, args) for moment in (0, 2.5, 5, 599.9, 600, 799.9, 800, 999)]
    assert rates == pytest.approx([0, 0.015, 0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    for script, epochs in (("main_ce.py", (350, 400, 450)), ("main_supcon.py", (700, 800, 900))):
        args = resolved(script, "--no-cos --lr 1")  # the steps of SupContrast's authors
        moments = [moment for epoch in epochs for moment in (epoch - 0.1, epoch)]
        rates = [methods.ALL[script].learning_rate(moment, args) for moment in moments]
        assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])


def test_the_stem_and_the_network_by_default():
    for size, stem in ((32, "cifar"), (64, "cifar"), (65, "imagenet"), (224, "imagenet")):
        args = resolved("main_moco_out.py", f"--image-size {size}")
        assert (args.stem, args.arch) == (stem, "resnet50")
    other = {"arch": "resnet18", "options": {}}  # without this project's options
    assert resolved("main_moco_out.py", "--init does-not-matter", other).arch == "resnet18"
