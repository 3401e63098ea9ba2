"""What the loader makes: crops and validation views of images in files, batch by batch."""

import statistics
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as by_torchvision

from helpers import SIZES, photo
from moco import augment, batches, datasets, distributed

HOW = dict(batch_size=4, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu"))


def made(batches_of_epoch):
    return [(torch.stack(views), labels) for views, labels, _ in batches_of_epoch]


def equal(some, others):
    assert len(some) == len(others)
    for (views, labels), (views2, labels2) in zip(some, others, strict=True):
        assert torch.equal(views, views2) and torch.equal(labels, labels2)


def test_two_processes_share_the_files(photos, monkeypatch):
    split = datasets.load("imagefolder", photos(), True)
    recipes = [augment.AUG_PLUS] * 2
    asked = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        asked += batches.Batches(split, recipes, shuffle_keys=True, **HOW).source.items([3])
    assert sorted(item for step in asked for item in step) == [(3, i) for i in range(16)]


def test_workers_go_on_over_epochs(photos):
    """One set of workers makes what new ones would make, epoch by epoch, and from within an epoch."""
    split = datasets.load("imagefolder", photos(), True)

    def build(**more):
        return batches.Batches(split, [augment.AUG_PLUS] * 2, **HOW, **more)

    through = build(workers=2, epochs=2)
    first = made(through.epoch(0))
    stream = through.source.stream
    second = made(through.epoch(1))
    assert through.source.stream is stream is not None
    equal(first, made(build(workers=0).epoch(0)))
    equal(second, made(build(workers=0).epoch(1)))
    with closing(build(workers=1, epochs=2)) as alone:
        equal(second[1:], made(alone.epoch(1, first=1)))
    equal(first, made(through.epoch(0)))  # back again: begun anew
    assert not torch.equal(first[0][0][0], first[0][0][1])  # two views differ
    through.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_first_step_of_an_epoch_waits_no_longer_than_the_others(photos, monkeypatch):
    """A batch takes a worker 0.2 s, four workers keep up with steps of 60 ms, and new ones would be noticed."""
    monkeypatch.setattr(
        batches.Crops,
        "__getitem__",
        lambda self, item: time.sleep(0.05) or torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    )
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    split, times = datasets.load("imagefolder", photos(train=20), True), []
    with closing(batches.Batches(split, [augment.LINEAR], workers=4, epochs=3, **HOW)) as made:
        for epoch in range(3):
            begun = time.monotonic()
            for step, _ in enumerate(made.epoch(epoch)):
                time.sleep(0.06)
                times.append((epoch, step, time.monotonic() - begun))
                begun = time.monotonic()
    assert len(times) == 30
    median = statistics.median(seconds for *_, seconds in times)
    assert all(seconds <= 2 * median for epoch, step, seconds in times if epoch and not step), times


def test_a_program_that_closes_nothing_ends(photos):
    program = f"""
import torch
from moco import augment, batches, datasets
split = datasets.load("imagefolder", {str(photos())!r}, True)
made = batches.Batches(split, [augment.AUG_PLUS], epochs=9, workers=2, **{HOW!r})
next(made.epoch(0))
"""
    program = program.replace("device(type='cpu')", "torch.device('cpu')")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_torchvisions(size, tmp_path):
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


def test_views_of_crops_are_views_of_images_of_that_size():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 24, 24), dtype=torch.uint8, generator=rng)
    recipe = augment.Recipe(size=24)
    parameters = recipe.draw(64, 24, 24, rng)
    parameters[:, :4] = torch.tensor([0.0, 0.0, 24.0, 24.0])
    whole, cropped = (augment.Views(recipe, (0.5,) * 3, (0.5,) * 3, "cpu", cropped=c) for c in (False, True))
    assert torch.equal(whole(images, parameters, (2, 0, 3, 1)), cropped(images, parameters, (2, 0, 3, 1)))


@pytest.mark.parametrize("size, short", [(32, 36), (64, 72), (96, 110), (224, 256)])
@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (60, 200), (256, 256)])
def test_validation_views_of_files_are_torchvisions(size, short, height, width):
    image = photo(np.random.default_rng(2), (width, height))
    for crop, side in ((True, short), (False, size)):
        ours = augment.Centre(size, (0.5,) * 3, (0.5,) * 3, crop).cut(datasets.pixels(image))
        chain = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size), transforms.PILToTensor()])
        assert ours.shape == (3, size, size)
        assert (ours.int() - chain(image).int()).abs().max() <= 2


def test_validation_remembers_no_sizes(photos):
    split, centre = datasets.load("imagefolder", photos(), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    before = augment.resizing.cache_info().currsize
    for workers in (0, 2):
        shown = list(batches.Centres(split, centre, 3, torch.device("cpu"), workers))
        assert [len(labels) for _, labels in shown] == [3, 3, 2]
        assert torch.cat([labels for _, labels in shown]).tolist() == split.labels.tolist()
        assert torch.equal(shown[1][0][0], centre.normalise(batches.CentreCrops(split, centre)[3][None])[0])
    assert augment.resizing.cache_info().currsize == before


def test_every_process_validates_as_many_batches(photos, monkeypatch):
    split, centre = datasets.load("imagefolder", photos(val=3), False), augment.Centre(32, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, counts in enumerate(([1, 1], [1, 1], [1, 0], [1, 0])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shown = list(batches.Centres(split, centre, 4, torch.device("cpu"), 0))
        assert [len(images) for images, _ in shown] == [len(labels) for _, labels in shown] == counts


def test_odd_files_are_read_as_they_are_stored(tmp_path):
    rng = np.random.default_rng(0)
    image = photo(rng, (120, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: not applied
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "cmyk.tif", compression=None)
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
    """Nine images in batches of four, and one for validation: the second process of two has none of them at the end."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "processes_on_node", 2)
    place, (mean, std), device = folder(train=5, val=1), datasets.CIFAR10, torch.device("cpu")
    split = datasets.load("imagefolder", place, True, in_memory=in_memory).take(torch.arange(9))
    how = dict(batch_size=4, seed=0, mean=mean, std=std, device=device, workers=0, drop_last=False)
    made = batches.Batches(split, [augment.LINEAR, augment.LINEAR], **how)
    shapes = [([tuple(view.shape) for view in made], len(labels)) for made, labels, _ in made.epoch(0)]
    assert [labels for _, labels in shapes] == [2, 2, 0] and shapes[-1][0][0][0] == 0
    one = datasets.load("imagefolder", place, False, in_memory=in_memory).take(torch.arange(1))
    ((images, labels),) = batches.Centres(one, augment.Centre(12, mean, std), 4, device)
    assert images.shape == (0, 3, 12, 12) and len(labels) == 0
