"""The training loop of every pretraining script."""

import math
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moco import checkpoint, data, distributed, evaluate, logs, options
from moco.errors import RunError, UsageError
from moco.logs import say

WATCH_EVERY = 10  # steps between two looks at the health of the contrast: it costs a few passes over the logits
COLUMNS = [
    "epoch",
    "loss",
    "lr",
    "images_per_second",
    "seconds",
    "cpu_seconds",
    "accuracy",
    "positive_similarity",
    "negative_similarity",
    "positives",
    "knn",
    "top1",
    "top5",
]


def main(model_class, description, **recipe):
    """What a pretraining script calls: MoCoOut and the like, the text of --help, and defaults that differ from MoCo's.

    A model class says what it takes (`add_options`, `recipe`, `views`, `shuffle_keys`, `labelled`) and how it is made
    (`from_options`); its forward returns the loss. See moco.builder.
    """
    parser = options.pretrain_parser(description)
    model_class.add_options(parser)
    parser.set_defaults(**recipe)
    distributed.launch(partial(train, model_class), options.parse(parser))


def learning_rate(epoch, args):
    """At a moment of the run, in epochs (a step after the start of epoch 3 is 3 + 1 / steps).

    MoCo's: linear from 0 to lr over the warm-up; then half a cosine from lr to 0 over the rest (`--cos`), or lr
    divided by 10 at each epoch of the schedule. With `supcon_cosine` it is SupContrast's.
    """
    if args.cos and args.supcon_cosine:
        return supcon_learning_rate(epoch, args)
    if epoch < args.warm_up:
        return args.lr * epoch / args.warm_up
    if args.cos:
        return args.lr * (1 + math.cos(math.pi * (epoch - args.warm_up) / (args.epochs - args.warm_up))) / 2
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def supcon_learning_rate(epoch, args):
    """Half a cosine from lr to lr / 1000 over all epochs, stepped once an epoch: epoch e of 0, 1, ... has its value at
    e + 1. Over the warm-up instead linear, step by step, from 0.01 to the cosine's value at the warm-up's end.
    """

    def cosine(done):
        return args.lr * (0.001 + 0.999 * (1 + math.cos(math.pi * done / args.epochs)) / 2)

    if epoch < args.warm_up:
        return 0.01 + (cosine(args.warm_up) - 0.01) * epoch / args.warm_up
    return cosine(math.floor(epoch) + 1)


def train(model_class, device, args):
    resumed = prepare(args, device, model_class)
    split = data.load(args, True, device)
    args.images, args.classes = len(split), split.classes
    if model_class.labelled and len(split.classes) < 2:
        raise UsageError(f"'{args.data}' has one class, '{split.classes[0]}': labels tell nothing apart there")
    if resumed:
        checkpoint.compare_data(resumed, args, resumed["path"])
    steps = len(split) // args.batch_size
    options.settle_compile(args, steps, device)
    recipe = replace(model_class.recipe(args), size=args.image_size)
    batches = data.Batches(
        split, [recipe] * model_class.views, args, device, shuffle_keys=model_class.shuffle_keys and args.groups > 1
    )
    validation = data.load(args, False, device) if args.knn_freq or model_class.classifies else None

    torch.manual_seed(args.seed)
    model = model_class.from_options(args, len(split.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    # What the epoch has seen so far: kept on the device, read only when it is shown.
    losses = torch.zeros(steps, device=device)
    health = torch.zeros(5, device=device)  # sums of losses.contrast_health's four values, and their number
    first_epoch, first_step, spent = args.start_epoch, 0, (0.0, 0.0)  # seconds and processor time of a begun epoch
    if resumed:
        first_epoch, first_step, spent = restore(resumed, model, optimizer, losses, health, args)
    if args.compile:
        for encoder in model.children():
            encoder.compile()
    network = distributed.parallel(model, device)
    if first_epoch >= args.epochs:
        say(f"'{resumed['path']}' has {first_epoch} epochs, --epochs is {args.epochs}: there is nothing left to do")
        return
    log = logs.Log(args.output_dir, "log", COLUMNS, first_epoch)
    introduce(args, device, split, steps, first_epoch, first_step)

    network.train()
    with checkpoint.Interruption() as interruption, checkpoint.Writer() as writer, closing(batches):
        for epoch in range(first_epoch, args.epochs):
            clock = batches.cpu_seconds
            progress = logs.Progress(epoch, args.epochs, steps, args.batch_size, clock, first_step, *spent)
            shown = first_step
            for step, (views, labels, order) in enumerate(
                progress.waited_for(batches.epoch(epoch, first_step)), start=first_step
            ):
                lr = learning_rate(epoch + step / steps, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                model.watch = step % WATCH_EVERY == 0
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    inputs = (*views, labels) if model.labelled else views
                    loss = network(*inputs) if order is None else network(*inputs, order=order)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

                losses[step] = loss.detach()
                if model.watch and model.health is not None:
                    health[:4] += model.health
                    health[4] += 1
                done = step + 1
                if done % args.print_freq == 0 or done == steps or interruption.alone:
                    stop = check(losses, shown, done, epoch, interruption)
                    progress.show(done, Loss=f"{losses[step]:.4f} ({losses[:done].mean():.4f})", lr=f"{lr:.4g}")
                    shown = done
                    if stop and done < steps:
                        progress.close()
                        spent = progress.seconds, progress.cpu_seconds(device)
                        save(writer, args, model, optimizer, epoch, done, losses, health, spent)
                        interruption.leave(writer, f"in epoch {epoch} after step {done}")
            progress.close()
            average_statistics(model)
            row = summary(losses, health, lr, progress)
            if args.knn_freq and ((epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs):
                row["knn"] = evaluate.knn(model.encoder_q, split, validation, args, device)
            if model.classifies:
                row["top1"], row["top5"] = evaluate.accuracy(model.encoder_q, validation, args, device)
            row |= dict(seconds=progress.seconds, cpu_seconds=progress.cpu_seconds(device))
            log.add(epoch, **row)
            describe(epoch, row, args)
            losses.zero_()
            health.zero_()
            # The log comes first: a resumed run drops what it will write again.
            save(writer, args, model, optimizer, epoch + 1)
            if interruption.agreed:
                interruption.leave(writer, f"after epoch {epoch}")
            spent = progress.seconds - row["seconds"], progress.cpu_seconds(device) - row["cpu_seconds"]
            first_step = 0
    log.close()


def prepare(args, device, model_class):
    """Settles what the command line leaves open; returns the checkpoint to go on from, or None."""
    options.settle(args, device)
    if args.warm_up is None:  # SupContrast's authors, for batches over 256
        args.warm_up = 10 if args.batch_size > 256 else 0
    if args.batch_size % (distributed.world_size() * args.bn_splits):
        raise UsageError(f"-b {args.batch_size} cannot be cut into --bn-splits {args.bn_splits} equal chunks")
    if args.start_epoch >= args.epochs:
        raise UsageError(
            f"--start-epoch {args.start_epoch} leaves no epoch of --epochs {args.epochs}: it counts from 0"
        )
    args.groups = distributed.world_size() * args.bn_splits
    if args.batch_size < 2 * args.groups:
        raise UsageError(f"-b {args.batch_size}: batch norm needs 2 images in each of its {args.groups} groups")
    args.objective = model_class.__name__
    path = checkpoint.find(args, device)
    resumed = checkpoint.load(path) if path else None
    saved = resumed["options"] if resumed else {}
    args.seed = options.shared_seed(args.seed if args.seed is not None else saved.get("seed"), device)
    if resumed:
        if resumed.get("arch") != args.arch:
            raise UsageError(f"checkpoint '{path}' was trained with -a {resumed.get('arch')}, this run has {args.arch}")
        checkpoint.compare_options(saved, args, path)
        resumed["path"] = path
    return resumed


def restore(resumed, model, optimizer, losses, health, args):
    """Weights, optimizer and the state of a begun epoch; returns the epoch and step to go on from, and the seconds and
    processor time that the epoch has taken."""
    path = resumed["path"]
    checkpoint.load_state(model, resumed["state_dict"], path)
    try:
        checkpoint.load_optimizer(optimizer, resumed["optimizer"], args)
        epoch, step = int(resumed["epoch"]), int(resumed.get("step", 0))
        spent = float(resumed.get("seconds", 0)), float(resumed.get("cpu_seconds", 0))
        if step:
            losses[:step] = resumed["losses"]
            health.copy_(resumed["health"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"checkpoint '{path}' cannot be resumed: {type(error).__name__}: {reason}") from None
    return epoch, step, spent


def save(writer, args, model, optimizer, epoch, step=0, losses=None, health=None, spent=(0.0, 0.0)):
    """`epoch` epochs are complete, and `step` steps of the next one, with what it has seen so far."""
    if step:
        average_statistics(model)
        health = distributed.all_mean(health)
    state = model.state_dict()
    checkpoint.check_finite(state, f"after {epoch} epochs and {step} steps")
    if distributed.rank() != 0:
        return
    content = {
        "epoch": epoch,
        "arch": args.arch,
        "state_dict": checkpoint.with_prefix(state),
        "optimizer": optimizer.state_dict(),
        "options": options.plain(args),
    }
    if step:
        content |= {"step": step, "losses": losses[:step].clone(), "health": health}
        content |= {"seconds": spent[0], "cpu_seconds": spent[1]}
    kept = not step and (epoch % args.save_freq == 0 or epoch == args.epochs)
    name = f"checkpoint_{epoch - 1:04d}.pth.tar" if kept else None
    writer.save(Path(args.output_dir, checkpoint.LAST), content, name)


def check(losses, shown, done, epoch, interruption):
    """Makes the losses since the last look global, stops at one that is not finite; do the processes agree to stop?"""
    asked = losses.new_full((1,), float(interruption.asked))
    fresh = distributed.all_mean(torch.cat([losses[shown:done], asked]))
    losses[shown:done] = fresh[:-1]
    *values, asked = fresh.tolist()
    wrong = [step for step, value in enumerate(values, start=shown) if not math.isfinite(value)]
    if wrong:
        raise RunError(
            f"the loss of epoch {epoch}, step {wrong[0]}, is not finite; a lower --lr, a longer --warm-up "
            "or a higher --moco-t may help. The last checkpoint is from before it"
        )
    interruption.agreed = asked > 0
    return interruption.agreed


def average_statistics(model):
    """Batch norm's running statistics become their mean over the processes, as they would be in one process."""
    running = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if distributed.world_size() > 1:
        means = distributed.all_mean(torch.cat([b.flatten() for b in running])).split([b.numel() for b in running])
        torch._foreach_copy_(running, [mean.view_as(b) for mean, b in zip(means, running, strict=True)])


def summary(losses, health, lr, progress):
    row = dict(loss=losses.mean().item(), lr=lr, images_per_second=progress.images_per_second)
    *sums, number = distributed.all_mean(health).tolist()
    if number:
        names = ("accuracy", "positive_similarity", "negative_similarity", "positives")
        row |= {name: value / number for name, value in zip(names, sums, strict=True)}
    return row


def introduce(args, device, split, steps, epoch, step):
    say(
        f"{args.objective}: {args.arch} on {len(split):,} images of {len(split.classes)} classes, {steps} steps an "
        f"epoch, on {distributed.world_size()} process{'es' * (distributed.world_size() > 1)} ({device.type}, "
        f"{args.precision}{', compiled' * args.compile}), seed {args.seed}"
    )
    if epoch or step:
        say(f"going on with epoch {epoch}, step {step}")
    if args.groups == 1 and hasattr(args, "moco_k"):
        say(
            "note: batch norm sees the whole batch, so there is no Shuffling BN: --bn-splits 2 is what two GPUs compute"
        )
    if args.warm_up >= args.epochs:
        say(f"note: --warm-up {args.warm_up} takes all of the {args.epochs} epochs")


def describe(epoch, row, args):
    """The line that answers "is a loss near log K normal?"."""
    text = f"epoch {epoch}: loss {row['loss']:.4f}"
    if "accuracy" in row:
        text += (
            f", contrastive accuracy {row['accuracy']:.1%}, similarity to positives {row['positive_similarity']:.3f} "
            f"and to negatives {row['negative_similarity']:.3f}, {row['positives']:.1f} positives a query"
        )
        if hasattr(args, "moco_k"):
            text += f" (log K = {math.log(args.moco_k):.2f})"
    if row.get("knn") is not None:
        text += f", kNN {row['knn']:.2f}%"
    if "top1" in row:
        text += f", top-1 {row['top1']:.2f}, top-5 {row['top5']:.2f}"
    say(f"{text}, {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s")
