"""Batched views against torchvision's operations on PIL images, and their parameters against its distributions."""

import numpy as np
import pytest
import torch
from PIL import ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as tv

from helpers import MEAN, NEEDS_COMPILER, STD, images, photo, pillow
from moco import augment
from moco.augment import AUG_PLUS, PLAIN, Recipe

IDENTITY = torch.tensor([0, 0, 32, 32, 0, 1, 1, 1, 0, 0, 0.0])


def pixels(image):
    return torch.from_numpy(np.array(image)).float()


def packed(x):
    return augment.rows_first(x)


def unpacked(x):
    """(N, H, 3, W) -> (N, H, W, 3)."""
    return x.permute(0, 1, 3, 2)


def deviation(ours, theirs):
    """The largest difference at any pixel, in units of 1/255."""
    return (unpacked(ours).clamp(0, 255).round() - torch.stack([pixels(p) for p in theirs])).abs().max().item()


@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (48, 40)])
def test_crop_and_flip_agree_with_pillow(height, width):
    x = images(200, height, width)
    parameters = AUG_PLUS.draw(200, height, width, torch.Generator().manual_seed(0))
    theirs = []
    for image, row in zip(x, parameters, strict=True):
        picture = tv.resized_crop(pillow(image), *(int(v) for v in row[:4]), [32, 32])
        theirs.append(tv.hflip(picture) if row[augment.FLIP] else picture)
    assert deviation(augment.crop(x, parameters, 32), theirs) <= 1


def test_a_crop_of_one_pixel():
    row = torch.tensor([[5, 7, 1, 1, 0.0]])
    x = images(1)
    assert torch.equal(unpacked(augment.crop(x, row, 32)), x[:, :, 5, 7].float().expand(1, 32, 32, 3))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_agrees_with_pillow(name):
    x = images(120)
    factor = torch.linspace(0.2, 1.8, 120)
    theirs = [getattr(tv, f"adjust_{name}")(pillow(i), f.item()) for i, f in zip(x, factor, strict=True)]
    assert deviation(getattr(augment, name)(packed(x), factor.view(-1, 1, 1, 1)), theirs) <= 1


def test_hue_agrees_with_torchvision_on_float_tensors():
    x = images(120)
    shift = torch.linspace(-0.5, 0.5, 120)
    theirs = torch.stack([tv.adjust_hue(i / 255, s.item()) for i, s in zip(x, shift, strict=True)])
    ours = unpacked(augment.hue(packed(x), shift.view(-1, 1, 1, 1))).permute(0, 3, 1, 2)
    assert (ours - 255 * theirs).abs().max() <= 0.1
    assert ours.isfinite().all()


def test_grayscale_agrees_with_pillow():
    x = images(40)
    theirs = [tv.rgb_to_grayscale(pillow(i), 3) for i in x]
    assert deviation(augment.gray(packed(x), torch.ones(40, 1, 1, 1)), theirs) <= 1


def test_blur_is_pillows():
    x = images(120)
    radius = torch.linspace(0.1, 2, 120)
    theirs = [pillow(i).filter(ImageFilter.GaussianBlur(r.item())) for i, r in zip(x, radius, strict=True)]
    assert deviation(augment.blur(packed(x), radius), theirs) <= 3


def test_a_wide_blur_of_a_small_image():
    x = images(8, 8, 8)
    theirs = [pillow(i).filter(ImageFilter.GaussianBlur(6)) for i in x]
    assert deviation(augment.blur(packed(x), torch.full((8,), 6.0)), theirs) <= 3


def test_identity_parameters_change_nothing():
    x = images(8)
    ours = augment.Views(AUG_PLUS, (0, 0, 0), (1, 1, 1), "cpu")(x, IDENTITY.expand(8, -1), (3, 1, 0, 2))
    assert (ours * 255 - x).abs().max() < 1e-3


def view_by_pillow(recipe, image, row, order):
    """One view with given parameters, by torchvision on a PIL image; hue on a float tensor, because PIL's has 8 bits."""
    top, left, height, width = (int(v) for v in row[:4])
    picture = tv.resized_crop(pillow(image), top, left, height, width, [recipe.size] * 2)

    def gray(picture):
        return tv.rgb_to_grayscale(picture, 3) if row[augment.GRAY] else picture

    if recipe.gray_first:
        picture = gray(picture)
    for which in order:
        value = row[augment.BRIGHTNESS + which].item()
        if which == 3:
            turned = tv.adjust_hue(tv.to_tensor(picture), value)
            picture = tv.to_pil_image((255 * turned).round().byte())
        else:
            picture = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[which](picture, value)
    if not recipe.gray_first:
        picture = gray(picture)
    if row[augment.RADIUS]:
        picture = picture.filter(ImageFilter.GaussianBlur(row[augment.RADIUS].item()))
    return tv.hflip(picture) if row[augment.FLIP] else picture


@pytest.mark.parametrize("recipe", [AUG_PLUS, PLAIN, augment.LINEAR, augment.SUPCON, augment.MILD])
def test_whole_chain(recipe):
    x = images(120, 40, 36)
    rng = torch.Generator().manual_seed(1)
    parameters, order = recipe.draw(120, 40, 36, rng), recipe.draw_order(rng)
    ours = augment.Views(recipe, MEAN, STD, "cpu")(x, parameters, order)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    theirs = [view_by_pillow(recipe, i, row, order) for i, row in zip(x, parameters, strict=True)]
    difference = ours - torch.stack([tv.normalize(tv.to_tensor(p), MEAN, STD) for p in theirs])
    difference = difference.abs() * torch.tensor(STD).view(3, 1, 1) * 255
    # Pillow truncates to integers after every operation, and later operations can amplify that error.
    assert difference.mean() < 1.5
    assert difference.max() <= 12


@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (48, 40), (30, 45)])
def test_validation_views_agree_with_pillow(height, width):
    x = images(20, height, width)
    chain = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32)])
    ours = augment.Centre(32, (0, 0, 0), (1 / 255,) * 3)(x).permute(0, 2, 3, 1)
    assert (ours.round() - torch.stack([pixels(chain(pillow(i))) for i in x])).abs().max() <= 1
    ours = augment.Centre(32, (0, 0, 0), (1 / 255,) * 3, crop=False)(x).permute(0, 2, 3, 1)
    chain = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])  # keeps the aspect ratio
    assert (ours.round() - torch.stack([pixels(chain(pillow(i))) for i in x])).abs().max() <= 1


@pytest.mark.parametrize("shape", [(2, 3000), (3000, 2)])
@pytest.mark.parametrize("crop", [True, False])
def test_only_the_middle_of_a_very_long_image_is_resized(shape, crop, monkeypatch):
    """Enlarged as a whole, a strip of 1 x 4,000 pixels would take 1.5 GB."""
    image = torch.linspace(0, 250, 3000).to(torch.uint8).expand(1, 3, 2, -1).contiguous()
    centre = augment.Centre(64, (0, 0, 0), (1, 1, 1), crop)
    wanted = centre.cut(image[..., 1500 - 32 : 1500 + 32])
    resize, sizes = augment.resize, []
    monkeypatch.setattr(augment, "resize", lambda x, *size: sizes.append(size) or resize(x, *size))
    found = centre.cut(image if shape == (2, 3000) else image.mT)
    assert torch.equal(found if shape == (2, 3000) else found.mT, wanted) and max(sizes[0]) <= 32 * 72


@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (4, 32), (40, 9)])
def test_crops_have_torchvisions_distribution(height, width):
    count = 10_000
    ours = AUG_PLUS.draw(count, height, width, torch.Generator().manual_seed(0))[:, :4]
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    theirs = torch.tensor(
        [transforms.RandomResizedCrop.get_params(picture, AUG_PLUS.scale, AUG_PLUS.ratio) for _ in range(count)]
    )
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()

    def moments(crops):
        top, left, h, w = crops.double().T
        area, aspect = h * w / (height * width), (w / h).log()
        values = torch.stack([top / height, left / width, h / height, w / width, area, aspect])
        return torch.cat([values.mean(1), values.std(1), (area < 0.5).double().mean().view(1)])

    assert (moments(ours) - moments(theirs)).abs().max() < 0.02


@pytest.mark.parametrize("recipe", [AUG_PLUS, PLAIN])
def test_colours_have_torchvisions_distribution(recipe):
    count = 50_000
    parameters = recipe.draw(count, 32, 32, torch.Generator().manual_seed(0)).double()
    applied = parameters[:, augment.BRIGHTNESS] != 1
    assert abs(applied.double().mean() - recipe.jitter_p) < 0.01
    for column, strength in zip(range(augment.BRIGHTNESS, augment.HUE), recipe.jitter[:3], strict=True):
        factor = parameters[applied, column]
        wanted = torch.linspace(1 - strength, 1 + strength, 11, dtype=torch.float64)
        assert (factor.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)) - wanted).abs().max() < 0.01
    shift, strength = parameters[applied, augment.HUE], recipe.jitter[3]
    assert abs(shift.mean()) < 0.01 and abs(shift.abs().mean() - strength / 2) < 0.01 * strength
    assert (parameters[~applied, augment.BRIGHTNESS : augment.HUE + 1] == torch.tensor([1.0, 1, 1, 0])).all()
    assert abs(parameters[:, augment.FLIP].mean() - 0.5) < 0.01
    assert abs(parameters[:, augment.GRAY].mean() - 0.2) < 0.01
    radius = parameters[:, augment.RADIUS]
    assert abs((radius > 0).double().mean() - recipe.blur_p) < 0.01
    if recipe.blur_p:
        assert abs(radius[radius > 0].mean() - 1.05) < 0.02
        assert radius.max() <= 2 and radius[radius > 0].min() >= 0.1
    # The parameters are independent of each other.
    correlation = torch.corrcoef(parameters[applied][:, [4, 5, 6, 7, 8, 9]].T) - torch.eye(6, dtype=torch.float64)
    assert correlation.abs().max() < 0.02


def test_all_jitter_orders_are_equally_likely():
    rng = torch.Generator().manual_seed(0)
    orders = [AUG_PLUS.draw_order(rng) for _ in range(4800)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and min(counts) > 140 and max(counts) < 260


def test_a_draw_depends_on_the_seed_only():
    draw = [AUG_PLUS.draw(64, 32, 32, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_row_does_not_depend_on_how_many_are_drawn():
    many = AUG_PLUS.draw(100, 32, 32, torch.Generator().manual_seed(0))
    for count in (1, 5, 16, 64):
        assert torch.equal(AUG_PLUS.draw(count, 32, 32, torch.Generator().manual_seed(0)), many[:count])


def test_pixels_in_another_range_are_refused():
    parameters = AUG_PLUS.draw(4, 32, 32, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="uint8"):
        augment.Views(AUG_PLUS, MEAN, STD, "cpu")(images(4) / 255, parameters, (0, 1, 2, 3))


def test_black_and_gray_have_no_hue():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)  # 0 is black
    assert torch.equal(augment.hue(packed(x), torch.full((1, 1, 1, 1), 0.1)), packed(x))


def test_a_view_does_not_depend_on_its_batch():
    x, parameters = images(16), AUG_PLUS.draw(16, 32, 32, torch.Generator().manual_seed(0))
    views = augment.Views(AUG_PLUS, MEAN, STD, "cpu")
    with torch.autocast("cpu", torch.bfloat16):  # views are float32 under autocast, too
        whole = views(x, parameters, (0, 1, 2, 3))
    assert torch.allclose(views(x[5:6], parameters[5:6], (0, 1, 2, 3)), whole[5:6], atol=1e-5)


@NEEDS_COMPILER
def test_compiled_views_agree_with_eager_ones():
    x, parameters = images(16), AUG_PLUS.draw(16, 32, 32, torch.Generator().manual_seed(0))
    eager = augment.Views(AUG_PLUS, MEAN, STD, "cpu")(x, parameters, (3, 1, 0, 2))
    compiled = augment.Views(AUG_PLUS, MEAN, STD, "cpu", compile=True)(x, parameters, (3, 1, 0, 2))
    assert (eager - compiled).abs().max() < 1e-3


def test_pillow_transform_draws_from_torchs_generator():
    transform = Recipe(size=24).transform(MEAN, STD)
    image = pillow(images(1)[0])
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(transform(image))
    assert views[0].shape == (3, 24, 24) and torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_padded_views_agree_with_torchvision():
    x, recipe = images(120), augment.PADDED
    parameters = recipe.draw(120, 32, 32, torch.Generator().manual_seed(1))
    ours = augment.Views(recipe, MEAN, STD, "cpu")(x, parameters, (0, 1, 2, 3))
    theirs = []
    for image, row in zip(x, parameters, strict=True):
        top, left = (int(v) + 4 for v in row[:2])
        picture = tv.crop(tv.pad(pillow(image), 4), top, left, 32, 32)
        theirs.append(tv.normalize(tv.to_tensor(tv.hflip(picture) if row[augment.FLIP] else picture), MEAN, STD))
    assert (ours - torch.stack(theirs)).abs().max() < 1e-5


def test_padded_crops_have_torchvisions_distribution():
    count = 20_000
    ours = augment.PADDED.draw(count, 32, 40, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    padded = torch.empty(1, 40, 48)
    theirs = torch.tensor([transforms.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(count)]) - 4
    for column in (0, 1):
        mine, other = ours[:, column].long(), theirs[:, column]
        assert (mine.min(), mine.max()) == (other.min(), other.max())
        assert (mine.add(4).bincount() - other.add(4).bincount()).abs().max() < 0.02 * count
    assert isinstance(augment.PADDED.transform(MEAN, STD).transforms[0], transforms.RandomCrop)


def test_the_views_for_pil_images_are_the_recipes():
    """Each operation with probability 1 and without a range, on its own."""
    torch.manual_seed(0)
    nothing = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=None, gray_p=0, blur_p=0, flip_p=0)
    image = photo(np.random.default_rng(0), (32, 32))

    def view(**changes):
        made = augment.Recipe(**nothing | changes).transform((0,) * 3, (1,) * 3)(image)
        return (255 * made).round().byte().permute(1, 2, 0).numpy()

    assert np.array_equal(view(), np.array(image)) and np.array_equal(view(flip_p=1), np.array(ImageOps.mirror(image)))
    assert np.array_equal(view(blur_p=1, blur=(1.5, 1.5)), np.array(image.filter(ImageFilter.GaussianBlur(1.5))))
    assert np.array_equal(view(gray_p=1), np.array(image.convert("L").convert("RGB")))
    colour = dict(gray_p=1, jitter=(0, 0, 0, 0.4), jitter_p=1)  # turns no hue of a gray image
    assert np.array_equal(view(**colour, gray_first=True), view(gray_p=1)) and np.ptp(view(**colour), axis=2).max() == 0
    assert not np.array_equal(view(**colour), view(gray_p=1))  # the jitter came first
    assert not np.array_equal(view(scale=(0.2, 0.2)), np.array(image))
