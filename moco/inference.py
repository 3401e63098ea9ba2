"""From a checkpoint to a network for inference, with its preprocessing and its classes."""

from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from moco import augment, checkpoint, datasets, encoders


def load(path: str | Path, saved: dict | None = None) -> tuple[nn.Module, augment.Centre, list[str] | None]:
    """The network in a checkpoint, in eval mode on the CPU; the view that it was evaluated on; its classes.

    `fc` is the classifier of a linear evaluation, of cross entropy, or of torchvision's or timm's network; without one
    it is the identity, and the classes are None. `saved`: the content of the file, if it has been read.
    """
    saved = saved or checkpoint.load(path)
    weights = checkpoint.encoder_weights(saved, path)
    known = checkpoint.described(saved, weights, path)
    options, classes = saved["options"], None
    whole = not checkpoint.prefix_of_encoder(saved["state_dict"])  # else `fc` is the projection head
    outputs = len(weights["fc.weight"]) if "fc.weight" in weights else 1
    network = encoders.build(known["arch"], known["stem"])(num_classes=outputs)
    theirs, ours = (shapes_of_fc(state) for state in (weights, network.state_dict()))
    classifier = theirs == ours and (whole or options.get("objective") == "CrossEntropy")
    checkpoint.load_encoder(network, weights, path, classifier=classifier)
    if classifier:
        classes = options.get("classes") or [str(label) for label in range(outputs)]
    else:
        network.fc = nn.Identity()
    mean, std = known["mean"] or datasets.CIFAR10[0], known["std"] or datasets.CIFAR10[1]
    # A linear evaluation says whether it crops; before one, only kNN crops.
    crop = options.get("centre_crop", options.get("objective") != "CrossEntropy" and not options.get("aug_crop"))
    centre = augment.Centre(known["image_size"], mean, std, crop)
    return network.eval(), centre, classes


def shapes_of_fc(state_dict: dict) -> dict:
    return {name: value.shape for name, value in state_dict.items() if name.startswith("fc.")}


def preprocess(image: Image.Image, centre: augment.Centre) -> Tensor:
    """(3, size, size) float32 of a PIL image of any size; ValueError: it has more than 8 bits per channel."""
    return centre.normalise(centre.cut(datasets.pixels(datasets.rgb(image))[None]))[0].contiguous()
