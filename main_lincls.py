"""Linear evaluation: trains a linear classifier on the frozen features of a pretraining checkpoint.

    python main_lincls.py -a resnet50 --lr 1.0 -b 256 --pretrained checkpoint_0999.pth.tar data/

The classifier starts at N(0, 0.01) with bias 0, the encoder stays in eval mode. The classifier of the best epoch is
in model_best.pth.tar, with its encoder; this evaluates it again:

    python main_lincls.py -e --resume model_best.pth.tar data/
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from moco import checkpoint, data, distributed, encoders, logs, options
from moco.errors import RunError, UsageError
from moco.evaluate import frozen, topk_hits
from moco.logs import say

LAST, BEST = "linear_last.pth.tar", "model_best.pth.tar"
COLUMNS = ["epoch", "loss", "lr", "top1", "top5", "images_per_second", "seconds", "cpu_seconds"]


def main():
    distributed.launch(evaluate, options.parse(options.linear_parser(__doc__)))


def evaluate(device, args):
    args.resume = checkpoint.find(args, device, LAST)
    source = args.resume or args.pretrained
    if source is None:
        raise UsageError("name the checkpoint: --pretrained PATH (or --resume PATH, for one of this script's own)")
    if args.evaluate and not args.resume:
        raise UsageError("-e evaluates a trained classifier: name it with --resume (this script's model_best.pth.tar)")
    saved = checkpoint.load(source)
    if args.resume and not (isinstance(saved.get("best"), dict) and "optimizer" in saved):
        raise RunError(f"checkpoint '{source}' is not one of this script's: name an encoder with --pretrained")
    weights = encoder_weights(saved["state_dict"], source)
    if args.resume and args.pretrained:
        check_source(weights, encoder_weights(checkpoint.load(args.pretrained)["state_dict"], args.pretrained), args)
    theirs = saved["options"]
    take_options(args, saved, theirs, weights, source)
    options.settle(args, device)

    validation = data.load(args, False, device)
    classes = len(validation.classes)
    trained = args.resume is not None
    encoder = encoders.build(args.arch, args.stem)(num_classes=classes)
    load_encoder(encoder, weights, source, classifier=trained)
    encoder.to(device, memory_format=torch.channels_last)
    backbone, classifier = frozen(encoder), encoder.fc
    if args.evaluate:
        args.centre_crop = theirs.get("centre_crop", args.centre_crop)
        top1, top5 = validate(backbone, classifier, validation, args, device)
        say(f"result: top1={top1:.2f} top5={top5:.2f} epoch={int(saved.get('epoch', 0)) - 1}")
        return

    if trained:
        args.seed = theirs.get("seed") if args.seed is None else args.seed
        checkpoint.compare_options(theirs, args, source)
    args.seed = options.shared_seed(args.seed, device)
    split = data.load(args, True, device)
    args.images, args.classes = len(split), split.classes
    if classes < 2:
        raise UsageError(f"'{args.data}' has one class, '{split.classes[0]}': there is nothing to classify")
    if trained:
        checkpoint.compare_data(saved, args, source)
    options.settle_compile(args, -(-len(split) // args.batch_size), device)
    recipe = replace(args.train_views, size=args.image_size)
    batches = data.Batches(split, [recipe], args, device, drop_last=False)
    optimizer = torch.optim.SGD(
        classifier.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    if not trained:
        torch.manual_seed(args.seed)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
    first_epoch, best = args.start_epoch, None
    if trained:
        try:
            checkpoint.load_optimizer(optimizer, saved["optimizer"], args)
            first_epoch, best = int(saved["epoch"]), saved["best"]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"checkpoint '{source}' cannot be resumed: {error}") from None
        if first_epoch < args.epochs:
            say(f"going on with epoch {first_epoch} of '{source}'")
    if args.compile:
        backbone.compile(dynamic=False)  # of the few sizes that batches have, the last ones included
    log = logs.Log(args.output_dir, "linear", COLUMNS, first_epoch)
    say(
        f"linear classifier of {classes} classes on {args.arch} from '{source}': {len(split):,} images, {len(batches)} steps an epoch"
    )

    spent = 0.0, 0.0  # seconds and processor time before an epoch's first step
    with checkpoint.Interruption() as interruption, checkpoint.Writer() as writer, closing(batches):
        for epoch in range(first_epoch, args.epochs):
            lr = args.lr * args.lr_decay ** sum(epoch >= milestone for milestone in args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = torch.zeros(len(batches), device=device)
            progress = logs.Progress(epoch, args.epochs, len(batches), args.batch_size, batches.cpu_seconds, 0, *spent)
            for step, ((images,), labels, _) in enumerate(progress.waited_for(batches.epoch(epoch))):
                features = backbone_features(backbone, images, args, device)
                # Summed over this process's rows, divided by the global batch: the last one may not be shared equally.
                batch = min(args.batch_size, len(split) - step * args.batch_size)
                loss = F.cross_entropy(classifier(features), labels, reduction="sum") / batch
                optimizer.zero_grad()
                loss.backward()
                for parameter in classifier.parameters():
                    distributed.all_sum(parameter.grad)
                optimizer.step()
                losses[step] = loss.detach()
                if (step + 1) % args.print_freq == 0 or step + 1 == len(batches):
                    progress.show(
                        step + 1, Loss=f"{losses[: step + 1].mean() * distributed.world_size():.4f}", lr=f"{lr:.4g}"
                    )
            progress.close()
            loss = distributed.all_sum(losses).mean().item()
            if loss != loss or loss == float("inf"):
                raise RunError(f"the loss of epoch {epoch} is not finite: try a lower --lr than {args.lr:g}")
            speed = progress.images_per_second  # of training; an epoch's seconds have the validation in them
            top1, top5 = validate(backbone, classifier, validation, args, device)
            if best is None or top1 > best["top1"]:
                best = dict(top1=top1, top5=top5, epoch=epoch)
            say(
                f"epoch {epoch}: top-1 {top1:.2f}, top-5 {top5:.2f}; best top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f} (epoch {best['epoch']})"
            )
            row = dict(loss=loss, lr=lr, top1=top1, top5=top5, images_per_second=speed)
            row |= dict(seconds=progress.seconds, cpu_seconds=progress.cpu_seconds(device))
            log.add(epoch, **row)
            checkpoint.check_finite(classifier.state_dict(), f"after epoch {epoch}")
            if distributed.rank() == 0:
                save(writer, encoder, optimizer, epoch, best, args)
            if distributed.total(interruption.asked, device):
                interruption.leave(writer, f"after epoch {epoch}")
            spent = progress.seconds - row["seconds"], progress.cpu_seconds(device) - row["cpu_seconds"]
    log.close()
    if best is None:
        raise UsageError(f"no epoch to train: {first_epoch} of {args.epochs} are done")
    say(f"result: top1={best['top1']:.2f} top5={best['top5']:.2f} epoch={best['epoch']}")


def encoder_weights(state_dict, path):
    """The query encoder in a checkpoint of ours or of MoCo's, or the whole network in one of this script's."""
    names = [name.removeprefix("module.") for name in state_dict]
    prefix = "encoder_q." if any(name.startswith("encoder_q.") for name in names) else ""
    weights = {
        name.removeprefix(prefix): value
        for name, value in zip(names, state_dict.values(), strict=True)
        if name.startswith(prefix)
    }
    if "conv1.weight" not in weights or weights["conv1.weight"].dim() != 4:
        raise RunError(f"checkpoint '{path}' holds no ResNet: neither encoder_q.conv1.weight nor conv1.weight is there")
    return weights


def check_source(weights, pretrained, args):
    """A classifier goes on with the encoder that it was begun with, and no other."""
    for name, value in weights.items():
        if not name.startswith("fc.") and not (name in pretrained and torch.equal(value, pretrained[name])):
            raise UsageError(
                f"the classifier in '{args.resume}' was trained on another encoder than '{args.pretrained}' ({name} "
                "differs): choose another --output-dir, or leave --resume away"
            )


def take_options(args, saved, theirs, weights, path):
    """What the command line leaves open is the checkpoint's: architecture, stem, image size and statistics."""
    arch = saved.get("arch")
    if args.arch is None:
        args.arch = arch or "resnet50"
    elif arch and arch != args.arch:
        raise UsageError(f"checkpoint '{path}' was trained with -a {arch}, not {args.arch}")
    args.stem = "cifar" if weights["conv1.weight"].shape[-1] == 3 else "imagenet"
    args.image_size = args.image_size or theirs.get("image_size") or (32 if args.stem == "cifar" else 224)
    mean, std = data.IMAGENET if args.stem == "imagenet" else (None, None)  # of a checkpoint that is not ours
    args.mean, args.std = args.mean or theirs.get("mean", mean), args.std or theirs.get("std", std)
    if args.dataset == "auto":
        possible = ["digits"] if args.data is None else data.candidates(args.data)
        args.dataset = theirs["dataset"] if theirs.get("dataset") in possible else "auto"


def load_encoder(encoder, weights, path, classifier):
    """Everything but `fc`, unless the classifier is there too."""
    own = encoder.state_dict()
    weights = {name: value for name, value in weights.items() if classifier or not name.startswith("fc.")}
    kept = {} if classifier else {name: value for name, value in own.items() if name.startswith("fc.")}
    checkpoint.load_state(encoder, weights | kept, path)


def save(writer, encoder, optimizer, epoch, best, args):
    content = {
        "epoch": epoch + 1,
        "arch": args.arch,
        "state_dict": checkpoint.with_prefix(encoder.state_dict()),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "options": options.plain(args),
    }
    writer.save(Path(args.output_dir, LAST), content, BEST if best["epoch"] == epoch else None)


@torch.no_grad()
def backbone_features(backbone, images, args, device):
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return backbone(images).float()


@torch.no_grad()
def validate(backbone, classifier, split, args, device):
    """Top-1 and top-5 accuracy on the validation images, in percent."""
    hits = torch.zeros(2, dtype=torch.long, device=device)
    for images, labels in data.Centres(split, args, device, crop=args.centre_crop):
        hits += topk_hits(classifier(backbone_features(backbone, images, args, device)), labels)
    return (100 * distributed.all_sum(hits).double() / len(split)).tolist()


if __name__ == "__main__":
    main()
