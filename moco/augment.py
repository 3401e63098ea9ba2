"""Views: draw their parameters for many images, then apply them to a whole batch on the device that trains.

With the same parameters, every operation agrees with torchvision's on a PIL image up to rounding. Crops, flips and blurs
are linear in rows and in columns: each is two batched matrix products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms

TOP, LEFT, HEIGHT, WIDTH, FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, RADIUS = range(11)
SMALL = 64  # pixels: smaller or equal views get the defaults for CIFAR, larger ones those for ImageNet
LONGEST = 32  # times the shorter side: of a longer image the middle is resized; 1 x 4,000 pixels would take 1.5 GB
ATTEMPTS = 10  # of RandomResizedCrop, to find a crop that fits into the image
GRAY_WEIGHTS = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # of red, green, blue: Pillow's mode L, ITU-R 601


@dataclass(frozen=True)
class Recipe:
    """One view's random operations, in torchvision's terms.

    size: side of the view. scale, ratio: of RandomResizedCrop. padding: if given, a RandomCrop from the image with
    this many black pixels around it replaces RandomResizedCrop (He et al., arXiv:1512.03385, section 4.2).
    jitter: brightness, contrast, saturation and hue of ColorJitter, or None, applied with probability jitter_p.
    gray_p: of RandomGrayscale, which comes before the jitter if gray_first. blur: smallest and largest radius of
    Pillow's GaussianBlur, applied with probability blur_p. flip_p: of the horizontal flip.
    """

    size: int = 32
    scale: tuple = (0.2, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    jitter: tuple | None = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    gray_first: bool = False
    blur_p: float = 0.5
    blur: tuple = (0.1, 2.0)
    flip_p: float = 0.5
    padding: int | None = None

    def draw(self, count: int, height: int | None, width: int | None, generator: torch.Generator) -> Tensor:
        """The parameters of `count` views of height x width images. None: the images are cropped already.

        Returns:
            (count, 11) float32: top, left, height, width of the crop in pixels, flip, factors of brightness,
            contrast and saturation, shift of hue in turns, gray, radius of the blur in pixels. An operation that is
            not applied has its identity: factor 1; shift, flip, gray and radius 0.
        """

        # One row of uniform numbers per image, so that a view does not depend on how many are drawn. float64, so that
        # crops are rounded to whole pixels as in torchvision. Colours, blur and flip take 9; a padded crop takes 2 more,
        # RandomResizedCrop 2 per attempt and 2.
        numbers = 9 if height is None else 11 if self.padding is not None else 9 + 2 * ATTEMPTS + 2
        draws = iter(torch.rand(count, numbers, generator=generator, dtype=torch.float64).T)

        def uniform(low=0.0, high=1.0):
            return low + (high - low) * next(draws)

        parameters = torch.zeros(count, 11, dtype=torch.float64)
        if height is not None:
            crops = self.crops if self.padding is None else self.padded_crops
            parameters[:, :4] = crops(uniform, height, width)
        parameters[:, FLIP] = uniform() < self.flip_p
        parameters[:, BRIGHTNESS : HUE + 1] = torch.tensor([1.0, 1.0, 1.0, 0.0])
        if self.jitter:
            applied = uniform() < self.jitter_p
            for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), self.jitter[:3], strict=True):
                factor = uniform(max(0, 1 - strength), 1 + strength)
                parameters[:, column] = torch.where(applied, factor, 1)
            parameters[:, HUE] = torch.where(applied, uniform(-self.jitter[3], self.jitter[3]), 0)
        parameters[:, GRAY] = uniform() < self.gray_p
        blurred = uniform() < self.blur_p
        parameters[:, RADIUS] = torch.where(blurred, uniform(*self.blur), 0)
        return parameters.float()

    def draw_crop(self, height: int, width: int, generator: torch.Generator) -> tuple[int, ...]:
        """Top, left, height, width of the crop of one height x width image."""
        # `crops` of one image, with the same numbers, in plain Python: ten times as fast; workers do it for every view.
        draws = torch.rand(2 * ATTEMPTS + 2, generator=generator, dtype=torch.float64).tolist()
        (least, most), (low, high) = self.scale, (math.log(ratio) for ratio in self.ratio)
        for first, second in zip(draws[:ATTEMPTS], draws[ATTEMPTS : 2 * ATTEMPTS], strict=True):
            area, ratio = height * width * (least + (most - least) * first), math.exp(low + (high - low) * second)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
        return self.central_crop(height, width)

    def crops(self, uniform: Callable[..., Tensor], height: int, width: int) -> Tensor:
        """(count, 4) boxes of RandomResizedCrop: the first of ten attempts that fits into the image, else `central_crop`."""
        log_ratio = [math.log(r) for r in self.ratio]
        area = height * width * torch.stack([uniform(*self.scale) for _ in range(ATTEMPTS)], 1)
        ratio = torch.stack([uniform(*log_ratio) for _ in range(ATTEMPTS)], 1).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)
        h, w = h.gather(1, first).squeeze(1), w.gather(1, first).squeeze(1)
        top = (uniform() * (height - h + 1)).floor()
        left = (uniform() * (width - w + 1)).floor()
        central = torch.tensor(self.central_crop(height, width), dtype=torch.float64)
        return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), central)

    def padded_crops(self, uniform: Callable[..., Tensor], height: int, width: int) -> Tensor:
        """(count, 4) boxes of RandomCrop; top and left are negative where the crop begins in the padding."""
        top, left = (
            (uniform() * (side + 2 * self.padding - self.size + 1)).floor() - self.padding for side in (height, width)
        )
        size = torch.full_like(top, self.size)
        return torch.stack([top, left, size, size], 1)

    def central_crop(self, height: int, width: int) -> tuple[int, ...]:
        """RandomResizedCrop's fallback: the largest central crop whose aspect ratio is allowed."""
        h, w = min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def draw_order(self, generator: torch.Generator) -> tuple[int, ...]:
        """The order of brightness, contrast, saturation and hue (0 to 3) in a batch of views."""
        return tuple(torch.randperm(4, generator=generator).tolist())

    def transform(self, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
        """The same views by torchvision: PIL image -> (3, size, size) float32. It draws from torch's own generator."""
        crop = transforms.RandomResizedCrop(self.size, self.scale, self.ratio)
        if self.padding is not None:
            crop = transforms.RandomCrop(self.size, self.padding)
        jitter = transforms.ColorJitter(*(self.jitter or (0, 0, 0, 0)))
        colours = [transforms.RandomApply([jitter], self.jitter_p), transforms.RandomGrayscale(self.gray_p)]
        blur = transforms.RandomApply([partial(pillow_blur, radii=self.blur)], self.blur_p)
        flip = transforms.RandomHorizontalFlip(self.flip_p)
        tail = [blur, flip, transforms.ToTensor(), transforms.Normalize(mean, std)]
        return transforms.Compose([crop, *(reversed(colours) if self.gray_first else colours), *tail])


AUG_PLUS = Recipe()
PLAIN = Recipe(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True, blur_p=0)
LINEAR = Recipe(scale=(0.08, 1.0), jitter=None, gray_p=0, blur_p=0)
SUPCON = Recipe(blur_p=0)
CROSS_ENTROPY = Recipe(jitter=None, gray_p=0, blur_p=0)
MILD = Recipe(scale=(0.5, 1.0), jitter=None, gray_p=0, blur_p=0)
PADDED = Recipe(padding=4, jitter=None, gray_p=0, blur_p=0)


def pillow_blur(image: Image.Image, radii: tuple[float, float]) -> Image.Image:
    """Gaussian blur of a PIL image, its radius drawn uniformly between the smallest and the largest of `radii`."""
    radius = torch.empty(1).uniform_(*radii).item()
    return image.filter(ImageFilter.GaussianBlur(radius))


class Views:
    """Makes a recipe's views of a batch.

    Args:
        mean, std: three floats each, of pixels in 0..1. compile: torch.compile each operation by itself; the 24
            orders of the colour jitter would be 24 programs. cropped: images are crops of the view's size already.
    """

    def __init__(
        self,
        recipe: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        compile: bool = False,
        cropped: bool = False,
    ):
        self.recipe = recipe
        self.mean, self.std = (constant(tuple(values), device) for values in (mean, std))
        # A program for each size: of the last batch, too.
        wrap = partial(torch.compile, dynamic=False) if compile else lambda function: function
        self.crop = wrap(flip if cropped else crop)
        self.gray, self.blur, self.finish = wrap(gray), wrap(blur), wrap(finish)
        self.colours = [wrap(function) for function in (brightness, contrast, saturation, hue)]

    @torch.no_grad()
    def __call__(self, images: Tensor, parameters: Tensor, order: Sequence[int]) -> Tensor:
        """
        Args:
            images: (N, 3, H, W) uint8. parameters: (N, 11) float32, see Recipe.draw. order: see Recipe.draw_order.
        Returns:
            (N, 3, S, S) float32, normalised, channels last.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images are uint8, with pixels from 0 to 255, not {images.dtype}")
        recipe = self.recipe
        with torch.autocast(images.device.type, enabled=False):
            x = self.crop(images, parameters, recipe.size)
            if recipe.gray_p and recipe.gray_first:
                x = self.gray(x, column(parameters, GRAY))
            if recipe.jitter:
                for which in order:
                    x = self.colours[which](x, column(parameters, BRIGHTNESS + which))
            if recipe.gray_p and not recipe.gray_first:
                x = self.gray(x, column(parameters, GRAY))
            if recipe.blur_p:
                x = self.blur(x, parameters[:, RADIUS])
            return self.finish(x, self.mean, self.std)


# The operations work on pixels in 0..255, laid out (N, H, 3, W): a matrix product over the rows then sees (N, H, 3W),
# one over the columns (N, 3H, W), and neither needs a copy.


def column(parameters: Tensor, which: int) -> Tensor:
    return parameters[:, which, None, None, None]


def rows_first(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, H, 3, W) float32."""
    return images.transpose(1, 2).contiguous().float()


def linear(x: Tensor, by_rows: Tensor, by_columns: Tensor) -> Tensor:
    """x (N, H, 3, W) -> (N, S, 3, S), with the matrices (N, S, H) and (N, S, W)."""
    return torch.einsum("nsh,nhcw,ntw->nsct", by_rows, x, by_columns)


def triangles(start: Tensor, length: Tensor, size: int, out: int, flip: Tensor | None = None) -> Tensor:
    """(N, out, size): the weights with which Pillow's bilinear filter resizes `length` pixels from `start` on to `out`.

    The weights of an output pixel are a triangle around its place in the input, as wide as one input pixel or one
    output pixel, whichever is larger, cut off at the ends of the crop and normalised to sum to 1. `flip` mirrors the
    places.
    """
    pixel = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    place = torch.arange(out, device=start.device, dtype=start.dtype) + 0.5
    start, length = start[:, None], length[:, None]
    if flip is not None:
        place = torch.where(flip[:, None] > 0, out - place, place)
    scale = length / out
    unit = scale.clamp(min=1)
    # Pixels outside the crop are infinitely far away. Masked here, where both operands are still small.
    inside = (pixel > start) & (pixel < start + length)
    pixel = torch.where(inside, (pixel - start) / unit, torch.inf)
    distance = (pixel[:, None, :] - (place * scale / unit)[:, :, None]).abs_()
    weight = distance.neg_().add_(1).clamp_(min=0)
    return weight.div_(weight.sum(2, keepdim=True).clamp_(min=1e-6))  # 0 in the padding: black


def crop(images: Tensor, parameters: Tensor, size: int) -> Tensor:
    """RandomResizedCrop and horizontal flip: (N, 3, H, W) uint8 -> (N, S, 3, S) float32."""
    height, width = images.shape[2:]
    by_rows = triangles(parameters[:, TOP], parameters[:, HEIGHT], height, size)
    by_columns = triangles(parameters[:, LEFT], parameters[:, WIDTH], width, size, flip=parameters[:, FLIP])
    return linear(rows_first(images), by_rows, by_columns)


def flip(images: Tensor, parameters: Tensor, size: int) -> Tensor:
    """Only the horizontal flip: (N, 3, S, S) uint8 -> (N, S, 3, S) float32."""
    x = rows_first(images)
    return torch.where(column(parameters, FLIP) > 0, x.flip(3), x)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3, height, width), uint8 on a CPU or float: Pillow's antialiased bilinear filter.

    uint8 results differ from Pillow's by at most 2 of 255.
    """
    if images.shape[2:] == (height, width):
        return images
    return nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)


def luminance(x: Tensor) -> Tensor:
    """(N, H, 1, W) of (N, H, 3, W)."""
    red, green, blue = x.split(1, dim=2)
    return (red * GRAY_WEIGHTS[0]).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    # Pillow takes the mean of the gray image in whole numbers, and rounds it.
    mean = luminance(x).round_().mean((1, 2, 3), keepdim=True).add_(0.5).floor_()
    return torch.lerp(mean, x, factor).clamp_(0, 255)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luminance(x), x, factor).clamp_(0, 255)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` and keeps HSV's value and saturation, in torchvision's float arithmetic."""
    red, green, blue = x.split(1, dim=2)
    value = torch.maximum(red, green).maximum(blue)
    lowest = torch.minimum(red, green).minimum(blue)
    chroma = value - lowest
    # The hue, from 0 (red) through green to 3 (cyan), and through blue to -3: one formula for all sextants gives chroma
    # times its size. The usual three cases and a remainder would take most of the time on a CPU.
    size = (green + blue).sub_(red).add_(value).sub_(lowest, alpha=2)
    sextant = size.div_(chroma.clamp(min=1e-6)).copysign_(green - blue).add_(6 * shift)
    sextant.sub_((sextant / 6).floor_(), alpha=6)
    # Each channel is a trapezium over the hue circle, between the lowest and the highest value.
    out = [(sextant - 3).abs_().sub_(1), (sextant - 2).abs_().neg_().add_(2), (sextant - 4).abs_().neg_().add_(2)]
    return torch.cat(out, dim=2).clamp_(0, 1).mul_(chroma).add_(lowest)


def gray(x: Tensor, applied: Tensor) -> Tensor:
    return torch.lerp(x, luminance(x), applied)


def blur(x: Tensor, radius: Tensor) -> Tensor:
    """Pillow's GaussianBlur: three passes of an extended box, the edge repeated at each of them."""
    box = boxes(radius, x.shape[1])
    thrice = box @ box @ box
    return linear(x, thrice, thrice)


def boxes(radius: Tensor, size: int) -> Tensor:
    """(N, size, size): one pass of Pillow's extended box blur over `size` pixels.

    The box has 2 * whole + 1 pixels of equal weight and one fractional pixel at each end, so that three passes have
    the variance radius ** 2 (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box
    Filtering, 2011).
    """
    variance = radius.square() / 3
    length = (12 * variance + 1).sqrt()
    whole = ((length - 1) / 2).floor()
    odd = 2 * whole + 1
    fraction = odd * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    reach, whole, fraction = (whole + fraction)[:, None, None], whole[:, None], fraction[:, None]
    pixel = torch.arange(size, device=radius.device, dtype=radius.dtype)
    box = (reach + 1 - (pixel - pixel[:, None]).abs_()).clamp_(0, 1)
    # The edge is repeated: the first pixel, and mirrored the last, stands for every pixel at its distance or farther.
    beyond = (whole + 1 - pixel).clamp_(min=0) + fraction * (pixel <= whole + 1)
    box[:, :, 0], box[:, :, -1] = beyond, beyond.flip(1)
    return box.div_(2 * reach + 1)


def finish(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(N, S, 3, S) in 0..255 -> (N, 3, S, S) normalised, channels last."""
    x = (x - mean).div_(std)
    return x.transpose(2, 3).contiguous().permute(0, 3, 1, 2)


@cache  # a transfer to a GPU would make the host wait for it
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean or standard deviation of pixels in 0..1 -> (3, 1) float32, of pixels in 0..255."""
    return 255 * torch.tensor(values, device=device, dtype=torch.float32).view(3, 1)


@dataclass(frozen=True)
class Centre:
    """The view of an image for evaluation: resize the shorter side, then take the centre.

    size: side of the view. mean, std: of the pixels, in 0..1. crop: resize the shorter side to 9/8 of `size` up to 64
    pixels (36 for 32), beyond them to 256/224 of it (256 for 224), as torchvision does; else to `size`, so that images
    of this size do not change.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 3, size, size) float32, normalised, channels last."""
        return self.normalise(self.cut(images.float()))

    def cut(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, size, size), uint8 on a CPU or float: without the normalisation."""
        longest = LONGEST * min(images.shape[2:])
        images = transforms.functional.center_crop(images, [min(side, longest) for side in images.shape[2:]])
        short = round(self.size * (9 / 8 if self.size <= SMALL else 256 / 224)) if self.crop else self.size
        height, width = (short * side // min(images.shape[2:]) for side in images.shape[2:])
        return transforms.functional.center_crop(resize(images, height, width), self.size)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, size, size) in 0..255 -> float32, normalised, channels last."""
        mean, std = (constant(tuple(values), images.device) for values in (self.mean, self.std))
        return finish(rows_first(images), mean, std)
