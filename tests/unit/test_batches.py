"""Batches of training and validation views, mostly of images in files."""

import subprocess
import sys
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as by_torchvision

from helpers import SIZES, photo
from moco import augment, batches, datasets, distributed

OPTIONS = dict(batch_size=4, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu"))


def collect(epoch):
    """The stacked views and labels of each batch of an epoch."""
    return [(torch.stack(views), labels) for views, labels, _ in epoch]


def assert_equal(some, others):
    for (views, labels), (other_views, other_labels) in zip(some, others, strict=True):
        assert torch.equal(views, other_views) and torch.equal(labels, other_labels)


def test_two_processes_share_the_files(photos, monkeypatch):
    """Each of the 16 files of epoch 3 is decoded by one process."""
    split = datasets.load("imagefolder", photos(), True)
    recipes = [augment.AUG_PLUS] * 2
    decoded = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        decoded += batches.Batches(split, recipes, shuffle_keys=True, **OPTIONS).files.items([3])
    assert sorted(item for step in decoded for item in step) == [(3, i) for i in range(16)]


def test_workers_persist_over_epochs(photos):
    """The same workers load all epochs, with the same batches as new workers, also from within an epoch."""
    split = datasets.load("imagefolder", photos(), True)

    def build(**options):
        return batches.Batches(split, [augment.AUG_PLUS] * 2, **OPTIONS, **options)

    persistent = build(workers=2, epochs=2)
    first = collect(persistent.epoch(0))
    stream = persistent.files.stream
    second = collect(persistent.epoch(1))
    assert persistent.files.stream is stream is not None
    assert_equal(first, collect(build(workers=0).epoch(0)))
    assert_equal(second, collect(build(workers=0).epoch(1)))
    with closing(build(workers=1, epochs=2)) as resumed:
        assert_equal(second[1:], collect(resumed.epoch(1, first=1)))
    assert_equal(first, collect(persistent.epoch(0)))  # an earlier epoch starts new workers
    assert not torch.equal(first[0][0][0], first[0][0][1])  # two views differ
    persistent.close()


def test_workers_begin_the_next_epoch_during_the_current_one(photos, monkeypatch):
    split, asked, items = datasets.load("imagefolder", photos(), True), [], batches.Files.items
    monkeypatch.setattr(batches.Files, "items", lambda *a: (asked.append(each[0][0]) or each for each in items(*a)))
    with closing(batches.Batches(split, [augment.LINEAR], workers=2, epochs=2, **OPTIONS)) as loader:
        assert len(list(loader.epoch(0))) == 4
        assert asked[:4] == [0] * 4 and 1 in asked


def test_a_program_ends_without_closing_its_batches(photos):
    program = f"""
import torch
from moco import augment, batches, datasets
split = datasets.load("imagefolder", {str(photos())!r}, True)
loader = batches.Batches(split, [augment.AUG_PLUS], epochs=9, workers=2, **{OPTIONS!r})
next(loader.epoch(0))
"""
    program = program.replace("device(type='cpu')", "torch.device('cpu')")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("size", SIZES)
def test_crops_agree_with_torchvision(size, tmp_path):
    photo(np.random.default_rng(1), size).save(tmp_path / "a.png")
    split = datasets.Split(torch.zeros(1, dtype=torch.long), ["a"], paths=[str(tmp_path / "a.png")])
    recipe = augment.Recipe(size=32)
    dataset = batches.Crops(split, [recipe, recipe], seed=3)
    image = datasets.open_image(split.paths[0])
    for epoch in range(10):
        crops = dataset[epoch, 0]
        assert crops.shape == (2, 3, 32, 32) and crops.dtype == torch.uint8
        for view in range(2):
            seeds = (3, epoch, batches.CROPS, 0, view)
            box = recipe.draw_crop(size[1], size[0], batches.generator(*seeds))
            drawn = recipe.draw(1, size[1], size[0], batches.generator(*seeds))[0, :4]
            assert drawn.tolist() == list(box)
            theirs = by_torchvision.resized_crop(image, *box, (32, 32))
            theirs = by_torchvision.pil_to_tensor(theirs)
            assert (crops[view].int() - theirs.int()).abs().max() <= 2


def test_views_of_cropped_images_are_views_with_a_full_crop():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 24, 24), dtype=torch.uint8, generator=rng)
    recipe = augment.Recipe(size=24)
    parameters = recipe.draw(64, 24, 24, rng)
    parameters[:, :4] = torch.tensor([0.0, 0.0, 24.0, 24.0])
    whole, cropped = (augment.Views(recipe, (0.5,) * 3, (0.5,) * 3, "cpu", cropped=c) for c in (False, True))
    assert torch.equal(whole(images, parameters, (2, 0, 3, 1)), cropped(images, parameters, (2, 0, 3, 1)))


@pytest.mark.parametrize("size, short", [(32, 36), (64, 72), (96, 110), (224, 256)])
@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (60, 200), (256, 256)])
def test_validation_views_of_files_agree_with_torchvision(size, short, height, width):
    image = photo(np.random.default_rng(2), (width, height))
    for crop, side in ((True, short), (False, size)):
        (ours,) = augment.Centre(size, (0.5,) * 3, (0.5,) * 3, crop).cut(datasets.pixels(image)[None])
        chain = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size), transforms.PILToTensor()])
        assert ours.shape == (3, size, size)
        assert (ours.int() - chain(image).int()).abs().max() <= 2


def test_validation_views_of_files(photos):
    """In order, with any number of workers."""
    split, centre = datasets.load("imagefolder", photos(), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    for workers in (0, 2):
        loaded = list(batches.Centres(split, centre, 3, torch.device("cpu"), workers))
        assert [len(labels) for _, labels in loaded] == [3, 3, 2]
        assert torch.cat([labels for _, labels in loaded]).tolist() == split.labels.tolist()
        assert torch.equal(loaded[1][0][0], centre.normalise(batches.CentreCrops(split, centre)[3][None])[0])


def test_all_processes_validate_the_same_number_of_batches(photos, monkeypatch):
    split, centre = datasets.load("imagefolder", photos(val=3), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, counts in enumerate(([1, 1], [1, 1], [1, 0], [1, 0])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loaded = list(batches.Centres(split, centre, 4, torch.device("cpu"), 0))
        assert [len(images) for images, _ in loaded] == [len(labels) for _, labels in loaded] == counts


def test_odd_files(tmp_path):
    """EXIF rotation is not applied; a wrong suffix, an animation and CMYK are read as Pillow reads them."""
    rng = np.random.default_rng(0)
    image = photo(rng, (120, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    image.save(tmp_path / "turned.png", exif=exif)

    frames = [photo(rng, (120, 100)).quantize(16) for _ in range(3)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    image.save(tmp_path / "misnamed.jpg", format="PNG")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    names = ["turned.png", "misnamed.jpg", "animated.gif", "cmyk.jpg"]
    split = datasets.Split(torch.zeros(4, dtype=torch.long), ["a"], paths=[str(tmp_path / name) for name in names])
    whole = batches.Crops(split, [augment.Recipe(size=100, scale=(1.0, 1.0), ratio=(1.2, 1.2))], seed=0)
    expected = [image, image, frames[0].convert("RGB"), Image.open(tmp_path / "cmyk.jpg").convert("RGB")]
    for i, theirs in enumerate(expected):
        ours = whole[0, i][0]
        theirs = by_torchvision.pil_to_tensor(theirs.resize((100, 100), Image.BILINEAR))
        assert (ours.int() - theirs.int()).abs().max() <= 2, names[i]


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "files"])
def test_a_last_batch_of_fewer_images_than_processes(in_memory, folder, monkeypatch):
    """Nine images in batches of four, and one validation image: the second of two processes gets none in the last batch."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "processes_on_node", 2)
    data = folder(train=5, val=1)
    split = datasets.load("imagefolder", data, True, in_memory=in_memory).take(torch.arange(9))
    loader = batches.Batches(split, [augment.LINEAR, augment.LINEAR], workers=0, drop_last=False, **OPTIONS)
    sizes = [([len(view) for view in views], len(labels)) for views, labels, _ in loader.epoch(0)]
    assert sizes == [([2, 2], 2), ([2, 2], 2), ([0, 0], 0)]
    one = datasets.load("imagefolder", data, False, in_memory=in_memory).take(torch.arange(1))
    centre = augment.Centre(12, OPTIONS["mean"], OPTIONS["std"])
    ((images, labels),) = batches.Centres(one, centre, 4, OPTIONS["device"])
    assert images.shape == (0, 3, 12, 12) and len(labels) == 0


@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
def test_views_labels_and_order_belong_together(in_files, tmp_path):
    """Image i has colour i in both views; row j of the key views shows image order[j] of the batch (Shuffling BN)."""
    colours = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(20, 3, 8, 8).contiguous()
    split = datasets.Split(3 * torch.arange(20), ["a"], colours)
    if in_files:
        paths = [str(tmp_path / f"{i}.png") for i in range(20)]
        for i, path in enumerate(paths):
            split.pillow(i).save(path)
        split = datasets.Split(split.labels, ["a"], paths=paths)
    same = augment.Recipe(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=None, gray_p=0, blur_p=0, flip_p=0)
    how = OPTIONS | dict(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    loader = batches.Batches(split, [same, same], shuffle_keys=True, workers=0, epochs=2, **how)
    seen, orders = [], set()
    for epoch in range(2):
        for views, labels, order in loader.epoch(epoch):
            queries, keys = (view[:, 0, 0, 0].round().long() for view in views)
            assert torch.equal(labels, 3 * queries) and torch.equal(keys, queries[order])
            assert order.sort().values.tolist() == [0, 1, 2, 3]
            seen += queries.tolist()
            orders.add(tuple(order.tolist()))
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:] and seen[:20] != list(range(20)) and len(orders) > 3


def test_parameters_differ_between_views_images_epochs_and_seeds():
    split, drawn = datasets.load("digits", None, True, per_class=2), []
    for seed in (0, 1):
        loader = batches.Batches(split, [augment.PLAIN] * 2, **OPTIONS | dict(seed=seed))
        loader.views = [lambda images, parameters, order: parameters] * 2
        drawn += [row for epoch in range(2) for views, *_ in loader.epoch(epoch) for row in torch.cat(views).tolist()]
    assert len(drawn) == len(set(map(tuple, drawn))) == 160


@pytest.mark.parametrize("seed", range(5))
def test_each_row_goes_to_the_process_that_needs_it(seed, monkeypatch):
    """Four processes of three rows, one after the other. (Two always send as many rows as they receive.)"""
    rows, order = torch.arange(100, 112), torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    sent = {}

    def send(rank, out, x, received, sizes):
        sent[rank] = x.split(sizes)

    def receive(rank, out, x, received, sizes):
        parts = [sent[sender][rank] for sender in range(4)]
        assert [len(part) for part in parts] == received
        out.copy_(torch.cat(parts))

    for call in (send, receive):
        found = []
        for rank in range(4):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed.dist, "all_to_all_single", partial(call, rank))
            found.append(distributed.exchange(rows[3 * rank : 3 * rank + 3], order, order))
    assert torch.equal(torch.cat(found), rows[order])
