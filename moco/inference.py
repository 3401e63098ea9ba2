"""From a checkpoint to a network that can be used: its weights, its preprocessing, its classes."""

from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from moco import augment, checkpoint, datasets, encoders


def load(path: str | Path) -> tuple[nn.Module, augment.Centre, list[str] | None]:
    """The network in a checkpoint, in eval mode on the CPU; the view of an image that it takes; its classes.

    `fc` is the classifier of a linear evaluation, of cross entropy, or of a file of torchvision's or timm's; else the
    identity (and there are no classes).
    """
    saved = checkpoint.load(path)
    weights = checkpoint.encoder_weights(saved, path)
    known = checkpoint.described(saved, weights, path)
    options = saved["options"]
    whole = not checkpoint.prefix_of_encoder(saved["state_dict"])  # else fc is the projection head
    classifier = "fc.weight" in weights and (whole or options.get("objective") == "CrossEntropy")
    network = encoders.build(known["arch"], known["stem"])(num_classes=len(weights["fc.weight"]) if classifier else 1)
    checkpoint.load_encoder(network, weights, path, classifier=classifier)
    classes = None
    if classifier:
        classes = options.get("classes") or [str(label) for label in range(len(weights["fc.weight"]))]
    else:
        network.fc = nn.Identity()
    mean, std = datasets.IMAGENET if known["stem"] == "imagenet" else datasets.CIFAR10  # of one that does not say
    # Cross entropy evaluates images as they are; kNN, where there is no evaluation yet, crops.
    as_they_are = options.get("objective") == "CrossEntropy" or options.get("aug_crop")
    crop = options.get("centre_crop", not as_they_are)
    centre = augment.Centre(known["image_size"], known["mean"] or mean, known["std"] or std, crop)
    return network.eval(), centre, classes


def preprocess(image: Image.Image, centre: augment.Centre) -> Tensor:
    """(3, size, size) float32 of a PIL image of any size; ValueError: it has more than 8 bits a channel."""
    return centre.normalise(centre.cut(datasets.pixels(datasets.rgb(image)))[None])[0]
