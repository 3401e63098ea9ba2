"""Writes a checkpoint's encoder in a format that other programs read, and compares what it computes there.

    python scripts/export.py CHECKPOINT encoder.pth            # state dict with torchvision's names
    python scripts/export.py CHECKPOINT encoder.safetensors    # the same names; timm reads it, too
    python scripts/export.py CHECKPOINT encoder.onnx           # input `images`, outputs `features` and, if any, `logits`

The input is an image as `moco.load_encoder`'s `preprocess` makes it. The file has `fc` if the checkpoint has a classifier.
.safetensors and .onnx need more packages: pip install -e ".[export]".
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

import copy
import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from moco import inference, launch, options
from moco.errors import UsageError, say
from output import check_output, writing

NEEDS = {".pth": [], ".safetensors": ["safetensors"], ".onnx": ["onnx", "onnxscript", "onnxruntime"]}


class Outputs(nn.Module):
    """(N, 3, H, W) -> features (N, width) and, with a classifier, logits (N, classes): a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(network)
        self.classifier, self.encoder.fc = self.encoder.fc, nn.Identity()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.encoder(images)
        return (features,) if isinstance(self.classifier, nn.Identity) else (features, self.classifier(features))


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help=f"file to write; its suffix is the format: {', '.join(NEEDS)}"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    args = parser.parse_args()
    suffix = args.out.suffix.lower()
    if missing := [name for name in NEEDS.get(suffix, []) if not find_spec(name)]:
        raise UsageError(f'{args.out.suffix} needs {missing[0]}: pip install -e ".[export]"')
    check_output(args.out, args.force, NEEDS)
    network, centre, classes = inference.load(args.checkpoint)
    network.requires_grad_(False)
    images = torch.randn(7, 3, centre.size, centre.size, generator=torch.Generator().manual_seed(0))
    with writing(args.out) as tmp:
        read_back = {".pth": to_pth, ".safetensors": to_safetensors, ".onnx": to_onnx}[suffix](network, images, tmp)
        worst = max(difference(Outputs(network), read_back, batch) for batch in (images, images[:1]))
    what = "encoder" if classes is None else f"encoder and classifier of {len(classes)} classes"
    say(f"{args.out}: {what}; largest relative difference on a batch of {len(images)}: {worst:.1e}")


def difference(first: Callable, second: Callable, images: torch.Tensor) -> float:
    """The largest relative difference between the outputs of two functions."""
    pairs = zip(first(images), second(images), strict=True)
    return max(float((ours - theirs).abs().max() / ours.abs().max()) for ours, theirs in pairs)


# Each writes a file and returns the function that is in it, from images to the tuple of Outputs. The file is written as
# bytes: torch, safetensors and ONNX have errors of their own for a full disk.


def to_pth(network: nn.Module, images: torch.Tensor, path: Path) -> Callable:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    path.write_bytes(content.getbuffer())
    return with_weights(network, torch.load(path, weights_only=True))


def to_safetensors(network: nn.Module, images: torch.Tensor, path: Path) -> Callable:
    from safetensors.torch import load_file, save

    path.write_bytes(save({name: value.contiguous() for name, value in network.state_dict().items()}))
    return with_weights(network, load_file(path))


def with_weights(network: nn.Module, state: dict) -> Callable:
    other = copy.deepcopy(network)
    other.load_state_dict(state)
    return Outputs(other)


def to_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> Callable:
    import onnxruntime

    network = Outputs(network).eval()
    names = ["features", "logits"][: len(network(images))]
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
    return lambda batch: [torch.from_numpy(output) for output in session.run(names, {"images": batch.numpy()})]


if __name__ == "__main__":
    main()
