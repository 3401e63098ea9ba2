"""The training loop of every pretraining script."""

import math
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moco import augment, checkpoint, datasets, distributed, encoders, evaluate, launch, logs, options
from moco.batches import Batches, Centres
from moco.builder import MoCoProto
from moco.datasets import Split
from moco.epoch import Record, autocast, resume, set_learning_rate
from moco.errors import UsageError
from moco.logs import say
from moco.losses import UNLABELLED
from moco.signals import Interruption

WATCH_EVERY = 10  # steps between two looks at the health of the contrast: it costs a few passes over the logits
HEALTH = ["accuracy", "positive_similarity", "negative_similarity", "positives"]
COLUMNS = ["epoch", "loss", "lr", "images_per_second", "seconds", *HEALTH, "knn", "top1", "top5"]
ADVICE = "a lower --lr, a longer --warm-up or a higher --moco-t may help"


def main(
    model_class: type[nn.Module], description: str, method: options.Method = options.MOCO, **defaults: object
) -> None:
    """What a pretraining script calls.

    Args:
        model_class: MoCoOut and the like; its forward returns the loss. See moco.builder.
        description: the text of --help. method: its options and views, and how it is built; MoCo's unless given.
        defaults: of options, where they differ from MoCo's.
    """
    parser = options.pretrain_parser(description, method, **defaults)
    args = parser.parse_args()
    if args.cos and args.schedule is not options.SCHEDULE:
        parser.error("--schedule has no effect with --cos, which is on: add --no-cos, or omit --schedule")
    launch.launch(partial(train, model_class, method, args), **options.launching(args))


def train(model_class: type[nn.Module], method: options.Method, args: Namespace, device: torch.device) -> None:
    """Trains, while no other run may use the output folder."""
    with checkpoint.lock(args.output_dir, "log"):  # before its checkpoint is read: another run may be saving one
        prepare(model_class, method, args, device)


def prepare(model_class: type[nn.Module], method: options.Method, args: Namespace, device: torch.device) -> None:
    """Resolves the options, loads the images and the checkpoint to resume, and trains."""
    path = checkpoint.find(args.resume, args.output_dir, device)
    saved = checkpoint.load(path) if path else None
    if saved and "optimizer" not in saved:
        raise UsageError(
            f"'{path}' holds weights alone: training cannot be resumed from it (--init starts from them, and "
            "main_lincls.py --pretrained evaluates them)"
        )
    args = options.resolve_pretraining(args, device, model_class.__name__, saved["options"] if saved else {})
    if saved and args.init:
        say(f"note: --init is ignored: this run continues from '{path}'")
    if saved:
        if saved.get("arch") != args.arch:
            raise UsageError(f"checkpoint '{path}' was trained with -a {saved.get('arch')}, this run has {args.arch}")
        checkpoint.compare_options(saved["options"], vars(args), path)
    if args.labels_per_class == 0 and (model_class.classifies or args.knn_freq):
        what = "cross entropy" if model_class.classifies else f"--knn-freq {args.knn_freq}"
        raise UsageError(f"--labels-per-class 0 leaves no labelled image: {what} needs some")
    load = partial(datasets.load, args.dataset, args.data, holdout=args.holdout, device=device)
    chosen = dict(per_class=args.per_class, labels_per_class=args.labels_per_class, unlabelled=True)
    split = load(True, **chosen)
    if model_class.labelled and len(split.classes) < 2:
        raise UsageError(f"'{args.data}' has one class, '{split.classes[0]}': this method needs at least two classes")
    if args.aug_crop and (split.images is None or set(split.images.shape[2:]) != {args.image_size}):
        raise UsageError(f"--aug-crop is for images of --image-size {args.image_size} alone: choose other views")
    if saved:
        checkpoint.compare_data(saved, len(split), split.classes, path)
    validation = load(False) if args.knn_freq or model_class.classifies else None
    fit(model_class, method, args, device, split, validation, saved, path)


def fit(
    model_class: type[nn.Module],
    method: options.Method,
    args: Namespace,
    device: torch.device,
    split: Split,
    validation: Split | None = None,
    saved: dict | None = None,
    path: str | None = None,
) -> None:
    """The training loop. `args`: resolved. `saved`: the checkpoint to resume, read from `path`."""
    args.images, args.classes = len(split), split.classes
    steps = len(split) // args.batch_size
    args.compile = options.compiles(args, steps, device)
    batches = Batches(
        # What trains on labels alone sees the same ones again, so that an epoch has as many steps for every method.
        split.labelled().repeated(len(split)) if model_class.classifies else split,
        method.views(args),
        batch_size=args.batch_size,
        seed=args.seed,
        mean=args.mean,
        std=args.std,
        device=device,
        shuffle_keys=model_class.shuffle_keys and args.groups > 1,
        workers=args.workers,
        epochs=args.epochs,
        compile=args.compile,
    )
    torch.manual_seed(args.seed)
    base_encoder = encoders.build(args.arch, args.stem)
    model = method.build(model_class, base_encoder, args, len(split.classes))
    if args.init and not saved:
        checkpoint.initialise(model.encoder_q, args.init)
        if hasattr(model, "encoder_k"):
            model.encoder_k.load_state_dict(model.encoder_q.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    sgd = dict(momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov, fused=True)
    optimizer = torch.optim.SGD(parameter_groups(model, args.no_bias_decay), args.lr, **sgd)
    average = None
    if args.ema is not None:
        average = AveragedModel(model.encoder_q, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    record, first_epoch = Record(steps, device), args.start_epoch
    if saved:
        checkpoint.load_state(model, saved["state_dict"], path)
        first_epoch = resume(saved, path, optimizer, record)
        if average:
            kept = {n.removeprefix("module.encoder_q."): v for n, v in saved["average"].items()}
            checkpoint.load_state(average.module, kept, path)
            average.n_averaged.fill_(1)
    if first_epoch >= args.epochs:
        say(f"'{path}' has {first_epoch} epochs, --epochs is {args.epochs}: there is nothing left to do")
        return
    if args.compile:
        for encoder in model.children():
            encoder.compile()
    network = distributed.parallel(model, device)
    log = logs.Log(args.output_dir, "log", COLUMNS, first_epoch)
    moments = (epoch + step / steps for epoch in range(args.epochs) for step in (0, steps - 1))  # its extremes
    highest = max(method.learning_rate(moment, args) for moment in moments)
    introduce(args, device, model_class, split, steps, first_epoch, record.shown, highest)

    network.train()
    with Interruption() as interruption, checkpoint.Writer() as writer, closing(batches):
        stop = False
        for epoch in range(first_epoch, args.epochs):
            progress = logs.Progress(epoch, args.epochs, steps * args.batch_size, args.batch_size, record)
            for step, (views, labels, order) in progress.waited_for(batches.epoch(epoch, record.shown)):
                lr = method.learning_rate(epoch + step / steps, args)
                set_learning_rate(optimizer, lr)
                model.watch = step % WATCH_EVERY == 0
                with autocast(device, args.precision):
                    inputs = (*views, labels) if model.labelled else views
                    loss = network(*inputs) if order is None else network(*inputs, order=order)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if average:
                    average.update_parameters(model.encoder_q)

                record.add(step, loss, model.health if model.watch else None)
                done = step + 1
                if done % args.print_freq == 0 or done == steps or interruption.alone:
                    stop = record.look(done, epoch, interruption, ADVICE)
                    losses = record.losses
                    progress.show(done, Loss=f"{losses[step]:.4f} ({losses[:done].mean():.4f})", lr=f"{lr:.4g}")
                    if stop and done < steps:
                        progress.close()
                        save(writer, args, model, average, optimizer, epoch, record.state(progress.spent()))
                        interruption.leave(writer, f"in epoch {epoch} after step {done}")
            progress.close()
            average_statistics(model, average)
            row = record.unevaluated or dict(lr=lr, images_per_second=progress.images_per_second, **record.averages())
            if model.classifies or knn_is_due(args, epoch):  # saved first: an evaluation that fails costs no epoch
                save(writer, args, model, average, optimizer, epoch, record.state(progress.spent(), row))
                row |= measure(model, average, args, epoch, split, validation, device)
            row["seconds"] = progress.spent()
            log.add(epoch, **row)
            describe(epoch, row, args)
            # The log comes first: a resumed run drops what it will write again.
            save(writer, args, model, average, optimizer, epoch + 1)
            if stop:
                interruption.leave(writer, f"after epoch {epoch}")
            record.restart(progress.spent() - row["seconds"])  # saving belongs to the next epoch
    log.close()


def parameter_groups(model: nn.Module, no_bias_decay: bool) -> list[dict]:
    """The trained parameters. Prototypes have no weight decay, with `no_bias_decay` neither have biases and batch norm."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = [name == "prototypes" or (no_bias_decay and p.dim() < 2) for name, p in trained]
    decayed, others = ([p for (_, p), f in zip(trained, free, strict=True) if f == which] for which in (False, True))
    return [dict(params=decayed)] + ([dict(params=others, weight_decay=0)] if others else [])


def knn_is_due(args: Namespace, epoch: int) -> bool:
    return args.knn_freq and ((epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs)


def measure(
    model: nn.Module,
    average: AveragedModel | None,
    args: Namespace,
    epoch: int,
    split: Split,
    validation: Split,
    device: torch.device,
) -> dict[str, float]:
    """The encoder's kNN accuracy, where it is due, and a classifier's own accuracy."""
    found = {}
    encoder = average.module if average else model.encoder_q
    centre = augment.Centre(args.image_size, args.mean, args.std, crop=not args.aug_crop)
    if knn_is_due(args, epoch):
        found["knn"] = evaluate.knn(encoder, split, validation, centre, args.batch_size, workers=args.workers)
    prototypes = isinstance(model, MoCoProto) and knn_is_due(args, epoch)
    if model.classifies or prototypes:
        network = evaluate.frozen(encoder, keep_fc=True)
        if prototypes:
            features = network
            network = lambda images: model.scores(F.normalize(features(images), dim=1))  # noqa: E731
        centre = replace(centre, crop=False) if model.classifies else centre
        images = Centres(validation, centre, args.batch_size, device, args.workers)
        found["top1"], found["top5"] = evaluate.accuracy(network, images, len(validation.classes))[:2]
    return found


def save(
    writer: checkpoint.Writer,
    args: Namespace,
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    begun: dict | None = None,
) -> None:
    """`epoch` epochs are complete; `begun`: what the next one has seen so far, see Record.state."""
    if begun:
        average_statistics(model, average)
    state = model.state_dict()
    checkpoint.check_finite(state, f"after {epoch} epochs and {begun['step'] if begun else 0} steps")
    if distributed.rank() != 0:
        return
    content = {
        "epoch": epoch,
        "arch": args.arch,
        "state_dict": checkpoint.with_prefix(state),
        "optimizer": optimizer.state_dict(),
        "options": options.plain(args),
    }
    if average:
        content["average"] = checkpoint.with_prefix(
            {f"encoder_q.{n}": v for n, v in average.module.state_dict().items()}
        )
    kept = not begun and (epoch % args.save_freq == 0 or epoch == args.epochs)
    name = f"checkpoint_{epoch - 1:04d}.pth.tar" if kept else None
    writer.save(Path(args.output_dir, checkpoint.LAST), content | (begun or {}), name)


def average_statistics(*models: nn.Module | None) -> None:
    """Batch norm's running statistics become their mean over the processes, as they would be in one process."""
    buffers = [named for model in models if model for named in model.named_buffers()]
    running = [b for name, b in buffers if name.endswith(("running_mean", "running_var"))]
    if distributed.world_size() > 1:
        means = distributed.all_mean(torch.cat([b.flatten() for b in running])).split([b.numel() for b in running])
        torch._foreach_copy_(running, [mean.view_as(b) for mean, b in zip(means, running, strict=True)])


def introduce(
    args: Namespace,
    device: torch.device,
    model_class: type[nn.Module],
    split: Split,
    steps: int,
    epoch: int,
    step: int,
    highest: float,
) -> None:
    """The lines before the first epoch. `highest`: the highest learning rate of the run."""
    processes = distributed.world_size()
    labelled, some = int((split.labels != UNLABELLED).sum()), ""
    if labelled < len(split) or args.labels_per_class is not None:
        some = f", {labelled:,} of them labelled"
    say(
        f"{args.objective}: {args.arch} on {len(split):,} images of {len(args.classes)} classes{some}, {steps} steps an "
        f"epoch, on {processes} process{'es' * (processes > 1)} ({device.type}, "
        f"{args.precision}{', compiled' * args.compile}), seed {args.seed}"
    )
    if model_class.classifies and labelled < len(split):
        say("note: cross entropy trains on the labelled images alone, repeated to as many steps as all images give")
    if epoch or step:
        say(f"going on with epoch {epoch}, step {step}")
    if args.groups == 1 and hasattr(args, "moco_k"):
        say("note: batch norm sees the whole batch, so there is no Shuffling BN: --bn-splits 2 reproduces two GPUs")
    if 2 * args.warm_up > args.epochs:
        say(
            f"note: --warm-up {args.warm_up} takes {min(args.warm_up, args.epochs)} of the {args.epochs} epochs: the "
            f"highest lr will be {highest:.4g}, --lr is {args.lr:g}"
        )


def describe(epoch: int, row: dict, args: Namespace) -> None:
    """The line after each epoch. It shows whether a loss near log K is normal."""
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
