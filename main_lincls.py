"""Linear evaluation: trains a linear classifier on the frozen features of a pretraining checkpoint.

    python main_lincls.py -a resnet50 --lr 1.0 -b 256 --pretrained checkpoint_0999.pth.tar data/

The classifier starts at N(0, 0.01) with bias 0, the encoder stays in eval mode. The classifier of the best epoch is
in model_best.pth.tar, with its encoder; this evaluates it again:

    python main_lincls.py -e --resume model_best.pth.tar data/
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import augment, checkpoint, datasets, distributed, encoders, evaluate, launch, options
from moco.batches import Batches, Centres
from moco.checkpoint import BEST, LINEAR
from moco.datasets import Split
from moco.errors import RunError, UsageError, say
from moco.run import Run, lock, set_learning_rate

COLUMNS = ["epoch", "loss", "lr", "top1", "top5", "images_per_second", "seconds"]


def main() -> None:
    args = options.linear_parser(__doc__).parse_args()
    launch.launch(partial(evaluate_linear, args), **options.launching(args))


def evaluate_linear(args: Namespace, device: torch.device) -> None:
    """Evaluates, or trains while no other linear evaluation may use the output folder."""
    with nullcontext() if args.evaluate else lock(args.output_dir, "linear"):
        prepare(args, device)


def prepare(args: Namespace, device: torch.device) -> None:
    """Loads encoder and images, then evaluates or trains a classifier."""
    args.resume = checkpoint.find(args.resume, args.output_dir, device, LINEAR, writes=not args.evaluate)
    source, saved, weights = read(args)
    args = options.resolve_linear(args, device, source, saved, weights)
    options.agree(args, device, saved=saved)

    load = partial(datasets.load, args.dataset, args.data, holdout=args.holdout, device=device)
    validation = load(False, classes=saved["options"].get("classes") if args.resume else None)
    options.agree(args, device, validation=validation)
    if args.resume:
        checkpoint.compare_classes(saved["options"].get("classes"), validation.classes, source)
    encoder = encoders.build(args.arch, args.stem)(num_classes=len(validation.classes))
    checkpoint.load_encoder(encoder, weights, source, classifier=args.resume is not None)
    encoder.to(device)
    for tensor in encoder.state_dict().values():  # the path may be a local copy on each node: all use rank 0's
        distributed.broadcast(tensor)
    backbone = evaluate.frozen(encoder)
    centre = augment.Centre(args.image_size, args.mean, args.std, args.centre_crop)
    images = Centres(validation, centre, args.batch_size, device, args.workers)
    validated = []  # features of the validation images, in float32: the encoder is frozen, so they are made once

    @torch.no_grad()
    def validate():
        """evaluate.accuracy on the validation images."""
        if not validated:
            validated.extend([(backbone(batch), labels) for batch, labels in images])
        return evaluate.accuracy(encoder.fc, validated, len(validation.classes))

    if args.evaluate:
        top1, top5, *_ = validate()
        epoch = int(saved.get("epoch", 0)) - (not saved.get("step"))  # of its last step
        say(f"result: top1={top1:.2f} top5={top5:.2f} epoch={epoch}")
        return
    if args.resume:
        options.compare_options(saved["options"], args, source)
    split = load(True, per_class=args.per_class)
    if len(split.classes) < 2:
        raise UsageError(f"'{args.data}' has one class, '{split.classes[0]}': there is nothing to classify")
    if args.aug_crop:
        split.check_side(args.image_size, f"'{source}' was trained with --aug-crop")
    options.agree(args, device, split)
    if args.resume:
        checkpoint.compare_data(saved, len(split), split.classes, source)
    args = options.complete(args, split, -(-len(split) // args.batch_size), device)
    # A program for each of the few sizes that batches have, the last one included.
    network = torch.compile(backbone, dynamic=False) if args.compile else backbone

    def features(images):
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        with torch.no_grad(), bf16:
            return network(images).float()

    train(args, device, encoder, features, validate, split, source, saved)


def read(args: Namespace) -> tuple[str, dict, dict[str, Tensor]]:
    """The checkpoint of --resume or --pretrained: its path, its content, its encoder's weights."""
    source = args.resume or args.pretrained
    if source is None:
        raise UsageError("name the checkpoint: --pretrained PATH (or --resume PATH, for one of this script's own)")
    if args.evaluate and not args.resume:
        raise UsageError("-e evaluates a trained classifier: name it with --resume (this script's model_best.pth.tar)")
    saved = checkpoint.load(source)
    if args.resume and "best" not in saved:
        raise RunError(f"checkpoint '{source}' is not from this script: name an encoder with --pretrained")
    if args.resume and not args.evaluate and "optimizer" not in saved:
        raise UsageError(f"'{source}' contains only weights: evaluate them with -e, or train on them with --pretrained")
    weights = checkpoint.encoder_weights(saved, source)
    if args.resume and args.pretrained:
        pretrained = checkpoint.load(args.pretrained)
        check_source(weights, checkpoint.encoder_weights(pretrained, args.pretrained), args)
    return source, saved, weights


def check_source(weights: dict[str, Tensor], pretrained: dict[str, Tensor], args: Namespace) -> None:
    """UsageError: the classifier to resume was trained on another encoder than --pretrained."""
    for name, value in weights.items():
        if name.startswith("fc.") or (name.endswith(checkpoint.COUNTER) and name not in pretrained):  # in old files
            continue
        if name not in pretrained or not torch.equal(value, pretrained[name]):
            raise UsageError(
                f"the classifier in '{args.resume}' was trained on another encoder than '{args.pretrained}' ({name} "
                "differs): choose another --output-dir, or omit --resume"
            )


def train(
    args: Namespace,
    device: torch.device,
    encoder: nn.Module,
    features: Callable[[Tensor], Tensor],
    validate: Callable[[], tuple[float, float, Tensor, Tensor | None]],
    split: Split,
    source: str,
    saved: dict,
) -> None:
    """Trains `encoder.fc` on the frozen features, and validates it after each epoch."""
    classifier, best, counts = encoder.fc, None, None
    batches = Batches(
        split,
        [replace(args.train_views, size=args.image_size)],
        batch_size=args.batch_size,
        seed=args.seed,
        mean=args.mean,
        std=args.std,
        device=device,
        drop_last=False,
        workers=args.workers,
        epochs=args.epochs,
        compile=args.compile,
    )
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    sizes = dict(epochs=args.epochs, steps=len(batches), images=len(split), batch_size=args.batch_size)
    advice = f"try a lower --lr than {args.lr:g}"
    run = Run(args.output_dir, "linear", LINEAR, COLUMNS, args.print_freq, device, advice, **sizes)
    run.epoch = args.start_epoch
    if args.resume:
        run.resume(saved, optimizer, source)
        best = saved["best"]
        if run.epoch < args.epochs:
            say(f"continuing at epoch {run.epoch} of '{source}'")
    else:
        torch.manual_seed(args.seed)
        # On the CPU: the same on any device.
        classifier.weight.data.copy_(nn.init.normal_(torch.empty(classifier.weight.shape), std=0.01))
        nn.init.zeros_(classifier.bias)
    say(
        f"linear classifier of {len(split.classes)} classes on {args.arch} from '{source}': {len(split):,} images, "
        f"{len(batches)} steps per epoch"
    )

    def save(epoch: int, more: dict) -> None:
        """`epoch` epochs are complete; `more`: the last one's confusion matrix, or the state of an incomplete epoch."""
        checkpoint.check_finite(classifier.state_dict(), f"after {epoch} epochs")
        content = dict(epoch=epoch, arch=args.arch, state_dict=checkpoint.with_prefix(encoder.state_dict()))
        content |= dict(optimizer=optimizer.state_dict(), best=best, options=options.plain(args))
        run.save(content | more, BEST if "confusion" in more and best["epoch"] == epoch - 1 else None)

    with run, closing(batches):
        for epoch in range(run.epoch, args.epochs):
            lr = args.lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)
            set_learning_rate(optimizer, lr)
            for step, ((images,), labels, _) in run.steps(batches.epoch(epoch, run.step)):
                # Summed over this process's rows, divided by the global batch: the last one may not be shared equally.
                batch = min(args.batch_size, len(split) - step * args.batch_size)
                loss = F.cross_entropy(classifier(features(images)), labels, reduction="sum") / batch
                optimizer.zero_grad()
                loss.backward()
                for parameter in classifier.parameters():
                    distributed.all_sum(parameter.grad)
                optimizer.step()
                run.add(step, loss * distributed.world_size())  # the mean of these is the global batch's
                if run.due(step):
                    run.sync(step, lr)
                    if run.saving:
                        save(epoch, run.state())
                        run.exit_if_stopping()
            row = run.summary()
            if run.stopping or counts is None:  # the first evaluation makes features: a failure there loses no epoch
                save(epoch, run.state(row))
            run.exit_if_stopping()
            top1, top5, counts, confusion = validate()
            row |= dict(top1=top1, top5=top5)
            if best is None or top1 > best["top1"]:
                best = dict(top1=top1, top5=top5, epoch=epoch)
            run.log(row)
            save(epoch + 1, {"confusion": confusion})
            run.say(
                f"epoch {epoch}: top-1 {top1:.2f}, top-5 {top5:.2f}; best top-1 {best['top1']:.2f}, "
                f"top-5 {best['top5']:.2f} (epoch {best['epoch']})"
            )
            run.exit_if_stopping()
    if best is None:
        raise UsageError(f"no epoch to train: {run.epoch} of {args.epochs} are done")
    if counts is not None:
        say(worst_classes(counts, split.classes))
    say(f"result: top1={best['top1']:.2f} top5={best['top5']:.2f} epoch={best['epoch']}")


def worst_classes(counts: Tensor, classes: Sequence[str], count: int = 3) -> str:
    """The classes of lowest top-1 accuracy, as a line; `counts`: see `accuracy`; a class without images is left out."""
    rates = [(100 * right / all, name) for right, all, name in zip(*counts.tolist(), classes, strict=True) if all]
    return "worst classes: " + ", ".join(f"{name} {rate:.1f}" for rate, name in sorted(rates)[:count])


if __name__ == "__main__":
    main()
