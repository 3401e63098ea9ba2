"""Measures the speed of the views and of the training loop, each against a baseline in the same run.

    python scripts/bench.py --quick            # views, and the loop against bare encoders
    python scripts/bench.py --out bench.json   # and the time of a step by batch and queue

Images are random pixels: no data set is needed. The encoders are ResNet-50 at batch 256 in bfloat16 on a GPU, ResNet-18
at batch 128 in float32 on a CPU.
"""

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image

from moco import augment, batches, builder, datasets, distributed, encoders, launch, methods, options, pretrain
from reproduce import conditions
from results import write_json

IMAGES, CLASSES = 4096, 10
# As in the README's commands, but for one epoch that is as long as the measurement.
LOOP = "--dataset cifar10 --lr 0.03 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos --warm-up 0 --epochs 1 --seed 0"


def main():
    gpu = torch.cuda.is_available()
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="skip the time of a step by batch and queue: minutes on two cores")
    add("-a", "--arch", default="resnet50" if gpu else "resnet18", help="default: %(default)s")
    add("-b", "--batch-size", type=options.positive_int, default=256 if gpu else 128, help="default: %(default)s")
    add("--rounds", type=options.positive_int, default=3, help="repetitions of each comparison (default: 3)")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--profile", type=Path, metavar="FILE", help="only write a PyTorch trace of five steps of the loop")
    args = parser.parse_args()
    for name in ("out", "profile"):
        if (path := getattr(args, name)) and not path.parent.is_dir():
            parser.error(f"there is no folder '{path.parent}' for --{name}")
    case = ["-a", args.arch, "-b", str(args.batch_size)] + ["--precision", "bf16", "--compile"] * gpu
    if args.profile:
        trace(case, args.profile, gpu)
        return
    figures = {**conditions(), "measured": time.strftime("%Y-%m-%d")}
    figures["command"] = " ".join(["python", "scripts/bench.py", *sys.argv[1:]])
    print(f"on {figures['hardware']['device']}, {figures['hardware']['cores']} cores, torch {torch.__version__}")

    def show(key, value, title):
        figures[key] = value
        if args.out:  # as far as it has come: a run may be cut short
            write_json(args.out, figures)
        print(f"{title:<72} {value:>12,.2f}", flush=True)

    bench_views(show, gpu, args.rounds)
    bench_folder(show, args.rounds)
    bench_loop(show, case, args, gpu)
    if not args.quick:
        bench_growth(show, case, gpu)


def synthetic(count):
    """`count` random images, of which 4,096 differ."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=rng)
    chosen = torch.arange(count) % IMAGES
    return datasets.Split(chosen % CLASSES, [str(c) for c in range(CLASSES)], images[chosen])


def bench_views(show, gpu, rounds):
    """Two views per image: torchvision on PIL images on one core, against batches on this device (one core of a CPU)."""
    images, statistics, rng = synthetic(256).images, datasets.CIFAR10, torch.Generator().manual_seed(0)
    recipe, device = augment.AUG_PLUS, torch.device("cuda" if gpu else "cpu")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    transform, views = recipe.transform(*statistics), augment.Views(recipe, *statistics, device, compile=gpu)
    on_device, times = images.to(device), 100 if gpu else 4
    parameters = [recipe.draw(256, 32, 32, rng).to(device) for _ in range(2)]

    def theirs():
        for picture in pictures:
            transform(picture), transform(picture)

    def ours():
        for drawn in parameters * times:
            views(on_device, drawn, recipe.draw_order(rng))

    cores, where = (distributed.cores(), "this GPU") if gpu else (1, "one core")
    theirs = (theirs, 256, "views_pil_per_core", "two PIL views on one core, images/s")
    ours = (ours, 256 * times, "views_batched", f"two batched views on {where}, images/s")
    compare(theirs, ours, ("views_ratio", f"  ratio to {cores} core(s) of PIL views"), show, rounds, cores)


def bench_folder(show, rounds, count=24):
    """A JPEG of 500 x 375 on one core, decoded once: to two finished views of 224 by torchvision on PIL, or to the two uint8
    crops that a data-loading worker makes. The rest of their views is batched, on the training device, and not counted."""
    recipe, rng = replace(augment.AUG_PLUS, size=224), torch.Generator().manual_seed(0)
    transform = recipe.transform(*datasets.IMAGENET)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{i}.jpg") for i in range(count)]
        for path in paths:  # coarse shapes with a little noise: about as many bytes as a photo's
            coarse = torch.randint(256, (1, 3, 24, 32), generator=rng).float()
            smooth = F.interpolate(coarse, (375, 500), mode="bicubic")[0]
            noisy = (smooth + 6 * torch.randn(smooth.shape, generator=rng)).clamp(0, 255).byte()
            Image.fromarray(noisy.permute(1, 2, 0).numpy()).save(path, quality=90)
        split = datasets.Split(torch.zeros(count, dtype=torch.long), ["all"], paths=paths)
        crops = batches.Crops(split, [recipe, recipe], seed=0)

        def theirs():
            for path in paths:
                image = datasets.open_image(path)
                transform(image), transform(image)

        def ours():
            for i in range(count):
                crops[0, i]

        theirs = (theirs, count, "folder_pil_per_core", "a JPEG to two PIL views of 224 on one core, images/s")
        ours = (ours, count, "folder_crops_per_core", "a JPEG to two uint8 crops of 224 on one core, images/s")
        compare(theirs, ours, ("folder_ratio", "  ratio (the rest of our views is not counted)"), show, rounds)


def compare(theirs, ours, ratio, show, rounds, cores=1):
    """Shows images/s of two functions, timed by turns with one thread, and the median of their ratio.

    theirs, ours: function, images, key, title. ratio: key, title; it is to `cores` times theirs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours[0]()  # every operation is compiled
    pairs = [[images / seconds(work) for work, images, *_ in (theirs, ours)] for _ in range(rounds)]
    torch.set_num_threads(threads)
    for (*_, key, title), speeds in zip((theirs, ours), zip(*pairs, strict=True), strict=True):
        show(key, median(speeds), title)
    show(ratio[0], median(b / a for a, b in pairs) / cores, ratio[1])


def seconds(work):
    start = now()
    work()
    return now() - start


def now():
    """The time in seconds at which the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bench_loop(show, case, args, gpu):
    """The whole loop against the bare encoders: by turns, a few steps of one and a few of the other."""
    turn, turns = (20, 5 * args.rounds) if gpu else (1, args.rounds + 1)  # steps, and how often
    step, bare_times = bare(args.arch, args.batch_size, gpu), []

    def between(i):
        bare_times.append(seconds(lambda: [step() for _ in range(turn)]))

    loop_times = loop(case, turn, turns, between)
    # The fastest turn of each: what else runs on the machine only adds to a turn.
    speeds = [turn * args.batch_size / min(times) for times in (bare_times, loop_times)]
    show("bare_images_per_second", speeds[0], f"bare encoders, {args.arch}, batch {args.batch_size}, images/s")
    show("images_per_second", speeds[1], "whole loop of main_moco_out.py, images/s")
    show("loop_over_bare", speeds[1] / speeds[0], "  ratio")


def bench_growth(show, case, gpu):
    """Milliseconds of a step, by batch and by queue."""
    steps = 40 if gpu else 6
    for batch, queue in ((64, 4096), (512, 4096), (256, 4096), (256, 16384), (256, 65536)):
        torch._dynamo.reset()  # a second size would have it make programs for any size, which are slower
        (taken,) = loop([*case, "-b", str(batch), "--moco-k", str(queue)], steps, 1)
        title = f"a step, batch {batch}, queue {queue:,}, ms"
        show(f"step_ms_batch_{batch}_queue_{queue}", 1000 * taken / steps, title)


def loop(words, turn, turns, between=lambda i: None):
    """Times the training loop of main_moco_out.py; its model records when a forward pass begins.

    `between(i)` runs before turn i, and after the last one.

    Returns:
        the seconds of each turn of `turn` steps. The first steps, which compile and warm up, are not in them.
    """
    args = options.pretrain_parser("", methods.OUT.add_options).parse_args([*LOOP.split(), *words, "data/"])
    skipped = 10 if args.compile else 3 if torch.cuda.is_available() else 1
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
            resolved = options.resolve_pretraining(args, device, "MoCoOut", {})
            resolved = options.complete(resolved, images, len(images) // args.batch_size, device)
            pretrain.fit(methods.with_queue(Timed), resolved, images, None, None, None, device)

    launch.launch(work, **options.launching(args))
    return [end - begin for begin, end in zip(begins[:-1], ends[1:], strict=True)]


def bare(arch, batch, gpu):
    """A function that takes one step of what any implementation needs: query forward and backward, key forward, SGD."""
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    model = builder.MoCoOut(encoders.build(arch), K=1, mlp=True).to(device, memory_format=torch.channels_last).train()
    query, key = model.encoder_q, model.encoder_k
    if gpu:
        query.compile()
        key.compile()
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    views = [torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last) for _ in range(2)]

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            with torch.no_grad():  # first, as in the loop: their activations are freed before the queries'
                keys = F.normalize(key(views[1]).float(), dim=1)
            queries = F.normalize(query(views[0]).float(), dim=1)
            loss = F.cross_entropy(
                queries @ keys.T / 0.2, torch.arange(batch, device=device)
            )  # gradients of the loop's size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(10 if gpu else 1):
        step()
    return step


def trace(case, path, gpu):
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    profiler = torch.profiler.profile(activities=activities)

    loop(case, 5, 1, lambda i: profiler.stop() if i else profiler.start())
    profiler.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    print(f"{path}: open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
