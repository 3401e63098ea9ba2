"""Writes a checkpoint's encoder in a format that other programs read, and runs it there.

    python scripts/export.py CHECKPOINT encoder.pth            # state dict with torchvision's names
    python scripts/export.py CHECKPOINT encoder.safetensors    # the same names; timm reads it, too
    python scripts/export.py CHECKPOINT encoder.onnx           # input `images`, outputs `features` and, if any, `logits`

The input is an image as `moco.load_encoder`'s `preprocess` makes it. The file has `fc` if the checkpoint has a classifier.
.safetensors and .onnx need more packages: pip install -e ".[export]".
"""

import copy
import io
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from moco import inference, launch, options
from moco.errors import UsageError, say
from output import check_output, writing

NEEDS = {".pth": [], ".safetensors": ["safetensors"], ".onnx": ["onnx", "onnxscript", "onnxruntime"]}


class FeaturesAndLogits(nn.Module):
    """(N, 3, H, W) -> features (N, width) and, with a classifier, logits (N, classes)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.classifier, network.fc = network.fc, nn.Identity()
        self.encoder = network

    def forward(self, images: torch.Tensor):
        features = self.encoder(images)
        return features if isinstance(self.classifier, nn.Identity) else (features, self.classifier(features))


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help=f"file to write; its suffix is the format: {', '.join(NEEDS)}"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    args = parser.parse_args()
    if missing := [name for name in NEEDS.get(args.out.suffix.lower(), []) if not find_spec(name)]:
        raise UsageError(f'{args.out.suffix} needs {missing[0]}: pip install -e ".[export]"')
    check_output(args.out, args.force, NEEDS)
    network, centre, classes = inference.load(args.checkpoint)
    images = torch.randn(7, 3, centre.size, centre.size, generator=torch.Generator().manual_seed(0))
    export = {".pth": to_pth, ".safetensors": to_safetensors, ".onnx": to_onnx}[args.out.suffix.lower()]
    with writing(args.out) as tmp:
        worst = export(network, images, tmp)
    what = "encoder" if classes is None else f"encoder and classifier of {len(classes)} classes"
    say(f"{args.out}: {what}; largest relative difference on a batch of {len(images)}: {worst:.1e}")


def to_pth(network: nn.Module, images: torch.Tensor, path: Path) -> float:
    content = io.BytesIO()  # written as bytes: torch, safetensors and ONNX have errors of their own for a full disk
    torch.save(network.state_dict(), content)
    path.write_bytes(content.getbuffer())
    return compared(network, images, torch.load(path, weights_only=True))


def to_safetensors(network: nn.Module, images: torch.Tensor, path: Path) -> float:
    from safetensors.torch import load_file, save

    path.write_bytes(save({name: value.contiguous() for name, value in network.state_dict().items()}))
    return compared(network, images, load_file(path))


@torch.no_grad()
def compared(network: nn.Module, images: torch.Tensor, state: dict) -> float:
    """The largest relative difference between a network and one that has its weights from a file."""
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(state)
    return difference(network(images), other(images))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


def to_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> float:
    import onnxruntime

    network = FeaturesAndLogits(network).eval()
    names = ["features"] if isinstance(network.classifier, nn.Identity) else ["features", "logits"]
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    path.write_bytes(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):
        with torch.no_grad():
            ours = network(batch)
        theirs = session.run(names, {"images": batch.numpy()})
        for one, other in zip(ours if len(names) > 1 else [ours], theirs, strict=True):
            worst = max(worst, difference(one, torch.from_numpy(other)))
    return worst


if __name__ == "__main__":
    main()
