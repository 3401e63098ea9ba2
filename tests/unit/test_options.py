"""Parsing and resolving options."""

import sys
from argparse import Namespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    names = "data mean std precision workers".split()
    args = Namespace(batch_size=4, dataset="digits", image_size=96, **dict.fromkeys(names))
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
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not compiled(150)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not compiled(150)


@pytest.mark.parametrize(
    "cores, machine, processes, workers",
    [(96, 96, 8, 64), (16, 16, 1, 8), (4, 4, 8, 8), (4, 64, 8, 32)],  # the last: each process has cores of its own
)
def test_the_default_number_of_workers(cores, machine, processes, workers, monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    monkeypatch.setattr(distributed, "processes_on_node", processes)
    monkeypatch.setattr(options.os, "cpu_count", lambda: machine)
    args = options.pretrain_parser("").parse_args(["--dataset", "digits"])
    assert options.resolve(args, torch.device("cpu")).workers == workers
    args.workers = 3
    assert options.resolve(args, torch.device("cpu")).workers == 3


def test_every_process_has_the_seed_that_rank_0_draws(monkeypatch):
    monkeypatch.setattr(distributed, "broadcast", lambda x: x.fill_(7))
    assert options.shared_seed(None, torch.device("cpu")) == 7
    assert options.shared_seed(3, torch.device("cpu")) == 3


@pytest.mark.parametrize(
    "what, change",
    [
        ("options", lambda args, split, saved: setattr(args, "lr", 0.2)),
        ("training images", lambda args, split, saved: split.labels.fill_(1)),
        ("training images", lambda args, split, saved: split.paths.sort(reverse=True)),
        ("checkpoint to resume", lambda args, split, saved: saved.update(step=7)),
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

    expected = what and f"the processes differ in their {what}, see docs/clusters.md"
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
