"""Measures the speed of the views and of the training loop, each against a baseline in the same run.

    python scripts/bench.py --quick            # views, and the loop against bare encoders
    python scripts/bench.py --out bench.json   # and the time of a step by batch and queue

Images are random pixels, and scikit-learn's two photos for JPEGs: no data set is needed. The encoders are ResNet-50 at
batch 256 in bfloat16 on a GPU, ResNet-18 at batch 128 in float32 on a CPU.
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from moco import augment, batches, builder, datasets, distributed, encoders, launch, methods, options, pretrain
from output import check_output
from reproduce import conditions
from results import write_json

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# As in the README's commands, but for one epoch that is as long as the measurement.
LOOP = "--dataset cifar10 --lr 0.03 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos --warm-up 0 --epochs 1 --seed 0"


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="skip the time of a step by batch and queue: minutes on two cores")
    add("-a", "--arch", default="resnet50" if GPU else "resnet18", help="default: %(default)s")
    add("-b", "--batch-size", type=options.positive_int, default=256 if GPU else 128, help="default: %(default)s")
    add("--rounds", type=options.positive_int, default=3, help="repetitions of each comparison (default: 3)")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--profile", type=Path, metavar="FILE", help="only write a PyTorch trace of five steps of the loop")
    args = parser.parse_args()
    launch.choose_device()  # with cuDNN's settings: it cannot search for algorithms once a CUDA graph is recorded
    for path in filter(None, (args.out, args.profile)):
        check_output(path, force=True)
    case = ["-a", args.arch, "-b", str(args.batch_size)] + ["--precision", "bf16", "--compile"] * GPU
    if args.profile:
        return trace(case, args.profile)
    command = " ".join(["python", "scripts/bench.py", *sys.argv[1:]])
    figures = {**conditions(), "measured": time.strftime("%Y-%m-%d"), "command": command}
    print(f"on {figures['hardware']['device']}, {figures['hardware']['cores']} cores, torch {torch.__version__}")
    parts = [bench_views(args.rounds), bench_folder(args.rounds), bench_loop(case, args)]
    for key, title, value in chain(*parts, [] if args.quick else bench_growth(case)):
        figures[key] = value
        if args.out:  # as far as it has come: a run may be cut short
            write_json(args.out, figures)
        print(f"{title:<72} {value:>12,.2f}", flush=True)


def synthetic(count):
    """`count` random images, of which 4,096 differ."""
    images = torch.randint(256, (4096, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return datasets.Split(torch.arange(4096) % 10, [str(c) for c in range(10)], images).repeated(count)


# Each of these yields (key, title, value) as soon as it is measured.


def bench_views(rounds):
    """Two views per image: torchvision on PIL images on one core, against batches on this device (one core of a CPU)."""
    split, statistics, rng = synthetic(256), datasets.CIFAR10, torch.Generator().manual_seed(0)
    recipe, times = augment.AUG_PLUS, 100 if GPU else 4
    transform, views = recipe.transform(*statistics), augment.Views(recipe, *statistics, DEVICE, compile=GPU)
    pictures, images = [split.pillow(i) for i in range(len(split))], split.images.to(DEVICE)
    parameters = [recipe.draw(len(split), 32, 32, rng).to(DEVICE) for _ in range(2)]

    def theirs():
        for picture in pictures:
            transform(picture), transform(picture)
        return len(split)

    def ours():
        for drawn in parameters * times:
            views(images, drawn, recipe.draw_order(rng))
        return len(split) * times

    batched, ratio = compare(theirs, ours, rounds)
    cores = distributed.cores() if GPU else 1
    yield "views_batched", f"two batched views on {'this GPU' if GPU else 'one core'}, images/s", batched
    yield "views_ratio", f"  ratio to torchvision's on PIL images on {cores} core(s)", ratio / cores


def bench_folder(rounds):
    """Photos of 640 x 427 on one core, decoded once: to two finished views of 224 by torchvision on PIL, or to the two uint8
    crops that a data-loading worker makes. The rest of their views is batched, on the training device, and not counted."""
    recipe, paths = replace(augment.AUG_PLUS, size=224), load_sample_images().filenames * 12
    split = datasets.Split(torch.zeros(len(paths), dtype=torch.long), ["all"], paths=paths)
    transform, crops = recipe.transform(*datasets.IMAGENET), batches.Crops(split, [recipe, recipe], seed=0)

    def theirs():
        for path in paths:
            image = datasets.open_image(path)
            transform(image), transform(image)
        return len(paths)

    def ours():
        for i in range(len(paths)):
            crops[0, i]
        return len(paths)

    cropped, ratio = compare(theirs, ours, rounds)
    yield "folder_crops_per_core", "a JPEG to two uint8 crops of 224 on one core, images/s", cropped
    yield "folder_ratio", "  ratio to two views of torchvision's (the rest of ours is not counted)", ratio


def compare(theirs, ours, rounds):
    """Images/s of `ours`, and its ratio to `theirs`: medians over rounds. Each returns how many images it has made.

    They run alternately, with one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours()  # every operation is compiled
    pairs = [(speed(theirs), speed(ours)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    return median(second for _, second in pairs), median(second / first for first, second in pairs)


def speed(work):
    start = now()
    return work() / (now() - start)


def now():
    """Synchronises with the device, then returns the time in seconds."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def bench_loop(case, args):
    """The whole loop against the bare encoders: alternately, a few steps of one and a few of the other."""
    turn, turns = (20, 5 * args.rounds) if GPU else (1, args.rounds + 1)  # steps, and how often
    step, bare_speeds = bare(args.arch, args.batch_size), []

    def between(i):
        bare_speeds.append(speed(lambda: sum(step() for _ in range(turn))))

    loop_times = loop(case, turn, turns, between)
    # The fastest turn of each: what else runs on the machine only adds to a turn.
    whole = turn * args.batch_size / min(loop_times)
    yield "images_per_second", f"loop of main_moco_out.py, {args.arch}, batch {args.batch_size}, images/s", whole
    yield "loop_over_bare", "  ratio to the bare encoders", whole / max(bare_speeds)


def bench_growth(case):
    """Milliseconds of a step, by batch and by queue."""
    steps = 40 if GPU else 6
    for batch, queue in ((64, 4096), (512, 4096), (256, 4096), (256, 16384), (256, 65536)):
        torch._dynamo.reset()  # a second size would have it make programs for any size, which are slower
        (taken,) = loop([*case, "-b", str(batch), "--moco-k", str(queue)], steps, 1)
        title = f"a step, batch {batch}, queue {queue:,}, ms"
        yield f"step_ms_batch_{batch}_queue_{queue}", title, 1000 * taken / steps


def loop(words, turn, turns, between=lambda i: None):
    """Times the training loop of main_moco_out.py; its model records when a forward pass begins.

    `between(i)` runs before turn i, and after the last one.

    Returns:
        the seconds of each turn of `turn` steps. The first steps, which compile and warm up, are not in them.
    """
    args = options.pretrain_parser("", methods.OUT.add_options).parse_args([*LOOP.split(), *words, "data/"])
    skipped = 10 if args.compile else 3 if GPU else 1
    step, begins, ends = -skipped, [], []

    class Timed(builder.MoCoOut):
        def forward(self, *inputs):
            nonlocal step
            if step in range(0, turn * turns + 1, turn):
                ends.append(now())
                between(step // turn)
                begins.append(now())
            step += 1
            return super().forward(*inputs)

    def work(device):
        images = synthetic((turn * turns + skipped + 1) * args.batch_size)  # one more step: its beginning ends the last
        images.images = images.images.to(device)
        with tempfile.TemporaryDirectory() as args.output_dir, open(os.devnull, "w") as null, redirect_stdout(null):
            resolved = options.resolve_pretraining(args, device, "MoCoOut", None)
            resolved = options.complete(resolved, images, len(images) // args.batch_size, device)
            pretrain.fit(methods.with_queue(Timed), resolved, images, None, None, None, device)

    launch.launch(work, **options.launching(args))
    return [end - begin for begin, end in zip(begins[:-1], ends[1:], strict=True)]


def bare(arch, batch):
    """A function that takes one step of what any implementation needs, and returns the number of images.

    The step is the queries' forward and backward pass, the keys' forward pass, and SGD.
    """
    torch.manual_seed(0)
    model = builder.MoCoOut(encoders.build(arch), K=1, mlp=True).to(DEVICE, memory_format=torch.channels_last).train()
    query, key = model.encoder_q, model.encoder_k
    if GPU:
        encoders.compile_encoder(query, DEVICE)
        encoders.compile_encoder(key, DEVICE)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    views = [torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last) for _ in range(2)]
    own = torch.arange(batch, device=DEVICE)

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            with torch.no_grad():  # first, as in the loop: their activations are freed before the queries'
                keys = F.normalize(key(views[1]).float(), dim=1)
            queries = F.normalize(query(views[0]).float(), dim=1)
            loss = F.cross_entropy(queries @ keys.T / 0.2, own)  # gradients of the loop's size
        loss.backward()
        optimizer.step()
        return batch

    for _ in range(10 if GPU else 1):
        step()
    return step


def trace(case, path):
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    profiler = torch.profiler.profile(activities=activities)
    loop(case, 5, 1, lambda i: profiler.stop() if i else profiler.start())
    profiler.export_chrome_trace(str(path))
    order = f"self_{DEVICE.type}_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    print(f"{path}: open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
