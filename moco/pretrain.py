"""The training loop of every pretraining script."""

import math
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from moco import augment, checkpoint, datasets, distributed, encoders, evaluate, launch, options
from moco.batches import Batches, Centres
from moco.datasets import Split
from moco.errors import UsageError, say
from moco.losses import HEALTH, UNLABELLED
from moco.methods import Method
from moco.run import Run, lock, set_learning_rate

HEALTH_EVERY = 10  # steps between measurements of the contrast's health, which cost a few passes over the logits
COLUMNS = ["epoch", "loss", "lr", "images_per_second", "seconds", *HEALTH, "knn", "top1", "top5"]
ADVICE = "a lower --lr, a longer --warm-up or a higher --moco-t may help"


def main(method: Method, description: str) -> None:
    """What a pretraining script calls. `description`: the text of --help."""
    parser = options.pretrain_parser(description, method.add_options, method.defaults)
    args = parser.parse_args()
    if args.cos and args.schedule is not parser.get_default("schedule"):
        parser.error("--schedule has no effect with --cos, which is on: add --no-cos, or omit --schedule")
    launch.launch(partial(train, method, args), **options.launching(args))


def train(method: Method, args: Namespace, device: torch.device) -> None:
    """Trains, and keeps other runs out of the output folder."""
    with lock(args.output_dir, "log"):  # before reading a checkpoint there: another run may be saving it
        fit(method, *prepare(method, args, device), device)


def prepare(
    method: Method, args: Namespace, device: torch.device
) -> tuple[Namespace, Split, Split | None, dict | None, str | None]:
    """The final options, the training and the validation images, the checkpoint to resume and its path."""
    path = checkpoint.find(args.resume, args.output_dir, device)
    saved = checkpoint.load(path) if path else None
    if saved and "optimizer" not in saved:
        raise UsageError(
            f"'{path}' contains only weights: training cannot be resumed from it (--init starts from them, and "
            "main_lincls.py --pretrained evaluates them)"
        )
    args = options.resolve_pretraining(args, device, method.model.__name__, saved)
    options.agree(args, device, saved=saved)
    if saved:
        if args.init:
            say(f"note: --init is ignored: this run continues from '{path}'")
        if saved.get("arch") != args.arch:
            raise UsageError(f"checkpoint '{path}' was trained with -a {saved.get('arch')}, this run has {args.arch}")
        options.compare_options(saved["options"], args, path)
    if args.labels_per_class == 0 and (method.labels_only or args.knn_freq):
        what = "cross entropy" if method.labels_only else f"--knn-freq {args.knn_freq}"
        raise UsageError(f"--labels-per-class 0 leaves no labels: {what} needs some")
    load = partial(datasets.load, args.dataset, args.data, holdout=args.holdout, device=device)
    split = load(True, per_class=args.per_class, labels_per_class=args.labels_per_class, unlabelled=True)
    if method.labels and len(split.classes) < 2:
        raise UsageError(f"'{args.data}' has one class, '{split.classes[0]}': this method needs at least two classes")
    if args.aug_crop:
        split.check_side(args.image_size, "--aug-crop")
    validation = load(False) if args.knn_freq or method.labels_only else None
    options.agree(args, device, split, validation=validation)
    if saved:
        checkpoint.compare_data(saved, len(split), split.classes, path)
    args = options.complete(args, split, len(split) // args.batch_size, device)
    return args, split, validation, saved, path


def fit(
    method: Method,
    args: Namespace,
    split: Split,
    validation: Split | None,
    saved: dict | None,
    path: str | None,
    device: torch.device,
) -> None:
    """The training loop. `saved`: the checkpoint to resume, read from `path`, or None."""
    batches = make_batches(method, args, split, device)
    model = make_model(method, args, device, saved, path)
    sgd = dict(momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov, fused=True)
    optimizer = torch.optim.SGD(parameter_groups(model, args.no_bias_decay), args.lr, **sgd)
    steps = len(batches)
    sizes = dict(epochs=args.epochs, steps=steps, images=steps * args.batch_size, batch_size=args.batch_size)
    run = Run(args.output_dir, "log", checkpoint.LAST, COLUMNS, args.print_freq, device, ADVICE, **sizes)
    run.epoch = args.start_epoch
    if saved:
        run.resume(saved, optimizer, path)
    if run.epoch >= args.epochs:
        say(f"'{path}' has {run.epoch} epochs, --epochs is {args.epochs}: there is nothing left to do")
        return
    introduce(method, args, split, steps, run, device)
    network = distributed.parallel(model, device).train()

    def save(epoch: int, within: dict | None = None) -> None:
        """Saves after `epoch` complete epochs; `within`: the state of the next one, see Run.state."""
        average_statistics(model)
        state = model.state_dict()
        checkpoint.check_finite(state, f"after {epoch} epochs and {run.step} steps")
        content = dict(epoch=epoch, arch=args.arch, state_dict=checkpoint.with_prefix(state))
        content |= dict(optimizer=optimizer.state_dict(), options=options.plain(args))
        kept = not within and (epoch % args.save_freq == 0 or epoch == args.epochs)
        name = f"checkpoint_{epoch - 1:04d}.pth.tar" if kept else None
        run.save(content | (within or {}), name)

    with run, closing(batches):
        for epoch in range(run.epoch, args.epochs):
            for step, (views, labels, order) in run.steps(batches.epoch(epoch, run.step)):
                lr = method.learning_rate(epoch + step / steps, args)
                set_learning_rate(optimizer, lr)
                model.measure_health = step % HEALTH_EVERY == 0
                optimizer.zero_grad()  # here, so that gradients take no memory during the forward pass
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    loss = network(*method.inputs(views, labels, order))
                loss.backward()
                optimizer.step()
                run.add(step, loss, model.health if model.measure_health else None)
                # Nothing up to this line waits for the device.
                if run.due(step):
                    run.sync(step, lr)
                    if run.saving:
                        save(epoch, run.state())
                        run.exit_if_stopping()
            row = run.summary()
            if method.labels_only or knn_is_due(args, epoch):
                save(epoch, run.state(row))  # first, so that a failed evaluation loses no epoch
                run.exit_if_stopping()
                row |= measure(method, model, args, epoch, split, validation, device)
            run.log(row)
            save(epoch + 1)  # after the log: a resumed run replaces the rows after its checkpoint
            run.say(epoch_line(epoch, row, args))
            run.exit_if_stopping()


def make_batches(method: Method, args: Namespace, split: Split, device: torch.device) -> Batches:
    # A method that needs labels repeats the labelled images, so that an epoch has equally many steps for every method.
    return Batches(
        split.labelled().repeated(len(split)) if method.labels_only else split,
        method.recipes(args),
        batch_size=args.batch_size,
        seed=args.seed,
        mean=args.mean,
        std=args.std,
        device=device,
        shuffle_keys=method.shuffle_keys and args.groups > 1,
        workers=args.workers,
        epochs=args.epochs,
        compile=args.compile,
    )


def make_model(
    method: Method, args: Namespace, device: torch.device, saved: dict | None, path: str | None
) -> nn.Module:
    """The model, new or from a checkpoint."""
    torch.manual_seed(args.seed)
    model = method.build(method.model, encoders.build(args.arch, args.stem), args, len(args.classes))
    if args.init and not saved:
        checkpoint.initialise(model.encoder_q, args.init)
        if hasattr(model, "encoder_k"):
            model.encoder_k.load_state_dict(model.encoder_q.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    if saved:
        checkpoint.load_state(model, saved["state_dict"], path)
    if args.compile:
        for encoder in model.children():
            encoders.compile_encoder(encoder, device)
    return model


def parameter_groups(model: nn.Module, no_bias_decay: bool) -> list[dict]:
    """Parameter groups with and without weight decay.

    Prototypes have none; with `no_bias_decay`, biases and batch norm have none either.
    """
    decayed, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (others if name == "prototypes" or (no_bias_decay and p.dim() < 2) else decayed).append(p)
    return [dict(params=decayed)] + ([dict(params=others, weight_decay=0)] if others else [])


def knn_is_due(args: Namespace, epoch: int) -> bool:
    return args.knn_freq > 0 and ((epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs)


def measure(
    method: Method,
    model: nn.Module,
    args: Namespace,
    epoch: int,
    split: Split,
    validation: Split,
    device: torch.device,
) -> dict[str, float]:
    """The encoder's kNN accuracy, if due, and the accuracy of the model's own classifier, if it has one."""
    found = {}
    centre = augment.Centre(args.image_size, args.mean, args.std, crop=not args.aug_crop)
    if knn_is_due(args, epoch):
        found["knn"] = evaluate.knn(model.encoder_q, split, validation, centre, args.batch_size, workers=args.workers)
    if method.classifier:
        centre = replace(centre, crop=False) if method.labels_only else centre
        images = Centres(validation, centre, args.batch_size, device, args.workers)
        scores = method.classifier(model)
        found["top1"], found["top5"] = evaluate.accuracy(scores, images, len(validation.classes))[:2]
    return found


def average_statistics(model: nn.Module) -> None:
    """Averages batch norm's running statistics over the processes, as one process would have them."""
    running = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    means = distributed.all_mean(torch.cat([b.flatten() for b in running])).split([b.numel() for b in running])
    torch._foreach_copy_(running, [mean.view_as(b) for mean, b in zip(means, running, strict=True)])


def introduce(method: Method, args: Namespace, split: Split, steps: int, run: Run, device: torch.device) -> None:
    """The lines before the first epoch."""
    processes, labelled = distributed.world_size(), int((split.labels != UNLABELLED).sum())
    some = f", {labelled:,} of them labelled" * (labelled < len(split))
    say(
        f"{args.objective}: {args.arch} on {len(split):,} images of {len(args.classes)} classes{some}, {steps} steps per "
        f"epoch, on {processes} process{'es' * (processes > 1)} ({device.type}, "
        f"{args.precision}{', compiled' * args.compile}), seed {args.seed}"
    )
    if method.labels_only and labelled < len(split):
        say("note: cross entropy trains on the labelled images only, repeated to as many steps as all images give")
    if run.epoch or run.step:
        say(f"continuing at epoch {run.epoch}, step {run.step}")
    if args.groups == 1 and method.shuffle_keys:
        say("note: batch norm sees the whole batch, so there is no Shuffling BN: --bn-splits 2 reproduces two GPUs")
    if 2 * args.warm_up > args.epochs:
        moments = (epoch + step / steps for epoch in range(args.epochs) for step in (0, steps - 1))
        highest = max(method.learning_rate(moment, args) for moment in moments)
        say(
            f"note: --warm-up {args.warm_up} takes {min(args.warm_up, args.epochs)} of the {args.epochs} epochs: the "
            f"highest lr will be {highest:.4g}, --lr is {args.lr:g}"
        )


def epoch_line(epoch: int, row: dict, args: Namespace) -> str:
    """The line after each epoch. It shows whether a loss near log K is normal."""
    text = f"epoch {epoch}: loss {row['loss']:.4f}"
    if "accuracy" in row:
        text += (
            f", contrastive accuracy {row['accuracy']:.1%}, similarity to positives {row['positive_similarity']:.3f} "
            f"and to negatives {row['negative_similarity']:.3f}, {row['positives']:.1f} positives per query"
        )
        if hasattr(args, "moco_k"):
            text += f" (log K = {math.log(args.moco_k):.2f})"
    if "knn" in row:
        text += f", kNN {row['knn']:.2f}%"
    if "top1" in row:
        text += f", top-1 {row['top1']:.2f}, top-5 {row['top5']:.2f}"
    return f"{text}, {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
