"""Measures the speed of views, step and loop, each against a baseline in the same run.

    python scripts/bench.py --quick            # views, loop against bare encoders, loop against the unoptimised loop
    python scripts/bench.py --out bench.json   # and how a step grows with the batch, the queue and the processes, and
                                               # what 2,000 steps add to memory and open files

Images are random pixels: no data set is needed. On a GPU the baselines are ResNet-50 at batch 256 in bfloat16, on a
CPU ResNet-18 at batch 128 (loop against bare encoders) and resnet20 at batch 256 (loop against the unoptimised loop).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from moco import augment, batches, builder, datasets, distributed, encoders, launch, options, pretrain
from reproduce import commit, describe_hardware, versions
from results import write_json

IMAGES, CLASSES = 4096, 10
# As in the README's commands, but for one epoch that is as long as the measurement.
LOOP = "--lr 0.03 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos --warm-up 0 --epochs 1 --seed 0"


def main():
    parser = options.Parser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="without the growth of a step: minutes on two cores")
    add("-a", "--arch", help="network (default: resnet50 on a GPU; resnet18 and resnet20 on a CPU)")
    add(
        "-b", "--batch-size", type=options.positive_int, metavar="N", help="default: 256 on a GPU, 128 and 256 on a CPU"
    )
    add("--rounds", type=options.positive_int, default=3, metavar="N", help="repetitions of each pair (default: 3)")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--profile", type=Path, metavar="FILE", help="write a PyTorch trace of five steps of the loop")
    if sys.argv[1:2] == ["--loop"]:  # how it calls itself under torchrun
        speed, _ = loop(*sys.argv[2:])
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(speed))
        return
    words = parser.parse_args()
    if words.out and not words.out.parent.is_dir():
        parser.error(f"there is no folder '{words.out.parent}' for --out")
    gpu = torch.cuda.is_available()
    fast = ["--precision", "bf16", "--compile"] if gpu else []
    if words.profile:
        trace(words, fast)
        return
    hardware = describe_hardware()
    figures = {"device": "cuda" if gpu else "cpu", "hardware": hardware, "versions": versions(), "commit": commit()}
    figures |= {
        "measured": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "scripts/bench.py", *sys.argv[1:]]),
    }
    show = partial(report, figures, words.out)
    print(f"on {hardware['device']}, {hardware['cores']} cores, torch {torch.__version__}")

    bench_views(show, gpu, words.rounds)
    bench_folder(show, words.rounds)
    bench_loop(show, words, gpu, fast)
    bench_plain(show, words, gpu, fast)
    if not words.quick:
        bench_growth(show, words, gpu, fast)
        bench_long_run(show, gpu)
    if words.out:
        print(words.out)


def report(figures, out, key, value, title, shown=None):
    figures[key] = value
    if out:  # as far as it has come: a run may be cut short
        write_json(out, figures)
    print(f"{title:<72} {value if shown is None else shown:>12,.2f}", flush=True)


def synthetic(count):
    """Random images: so many, of which 4,096 differ."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=rng)
    chosen = torch.arange(count) % IMAGES
    return datasets.Split(chosen % CLASSES, [str(c) for c in range(CLASSES)], images[chosen])


def bench_views(show, gpu, rounds):
    """Two views an image: torchvision on PIL images on one core, against batches on this device (one core of a CPU)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = synthetic(256).images
    recipe, statistics_ = augment.AUG_PLUS, datasets.CIFAR10
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    transform = recipe.transform(*statistics_)
    device = torch.device("cuda" if gpu else "cpu")
    views = augment.Views(recipe, *statistics_, device, compile=gpu)
    on_device = images.to(device)
    rng = torch.Generator().manual_seed(0)
    parameters = [recipe.draw(256, 32, 32, rng).to(device) for _ in range(2)]

    def by_pillow():
        for picture in pictures:
            transform(picture), transform(picture)

    times = 100 if gpu else 4

    def in_batches():
        for _ in range(times):
            for drawn in parameters:
                views(on_device, drawn, recipe.draw_order(rng))

    in_batches()  # every operation is compiled
    pairs = [(256 / seconds(by_pillow), 256 * times / seconds(in_batches, gpu)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    pillow, batched = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    cores = distributed.cores() if gpu else 1
    show("views_pil_per_core", pillow, "PIL views on one core, images/s (two views each)")
    show("views_batched", batched, f"batched views on {'this GPU' if gpu else 'one core'}, images/s")
    ratio = statistics.median(b / p for p, b in pairs) / cores
    show("views_ratio", ratio, f"  ratio to {cores} core{'s' * (cores > 1)} of PIL views")


def bench_folder(show, rounds, count=24):
    """A data-loading worker's work for a JPEG of 500 x 375 and two views of 224, on one core, against torchvision's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = replace(augment.AUG_PLUS, size=224)
    transform = recipe.transform(*datasets.IMAGENET)
    rng = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{i}.jpg") for i in range(count)]
        for path in paths:  # coarse shapes with a little noise: about as many bytes as a photo's
            coarse = torch.randint(256, (1, 3, 24, 32), generator=rng).float()
            smooth = F.interpolate(coarse, (375, 500), mode="bicubic")[0]
            noisy = (smooth + 6 * torch.randn(smooth.shape, generator=rng)).clamp(0, 255).byte()
            Image.fromarray(noisy.permute(1, 2, 0).numpy()).save(path, quality=90)
        split = datasets.Split(torch.zeros(count, dtype=torch.long), ["all"], paths=paths)
        crops = batches.Crops(split, [recipe, recipe], seed=0)

        def ours():
            for i in range(count):
                crops[0, i]

        def theirs():
            for path in paths:
                image = datasets.open_image(path)
                transform(image), transform(image)

        ours()
        pairs = [(count / seconds(theirs), count / seconds(ours)) for _ in range(rounds)]
    torch.set_num_threads(threads)
    pillow, cropped = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    show("folder_pil_per_core", pillow, "a JPEG decoded, two PIL views of 224 on one core, images/s")
    show("folder_crops_per_core", cropped, "a JPEG decoded, two uint8 crops of 224 on one core, images/s")
    show("folder_ratio", statistics.median(c / p for p, c in pairs), "  ratio")


def seconds(work, gpu=False):
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_loop(show, words, gpu, fast):
    """The whole loop against the bare encoders: by turns, a few steps of one and a few of the other."""
    arch, batch = words.arch or ("resnet50" if gpu else "resnet18"), words.batch_size or (256 if gpu else 128)
    turn = 20 if gpu else 1  # steps
    turns = 5 * words.rounds if gpu else words.rounds + 1
    case = [*fast, "-a", arch, "-b", str(batch)]

    loop(*case, "--steps", "1")  # before anything larger has been in memory
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    show("peak_memory_bytes", memory, f"peak memory of main_moco_out.py, {arch}, batch {batch}, GiB", memory / 2**30)

    step, bare_times = bare(arch, batch, gpu), []

    def between(i):
        bare_times.append(seconds(lambda: [step() for _ in range(turn)], gpu))

    _, clock = loop(*case, "--steps", str(turn * turns), at_step=between, every=turn)
    loop_times = [after - before for before, after in pairwise(clock[::turn])]
    # The fastest turn of each: what else runs on the machine only adds to a turn.
    speeds = [turn * batch / min(times) for times in (bare_times, loop_times)]
    show("bare_images_per_second", speeds[0], f"bare encoders, {arch}, batch {batch}, images/s")
    show("images_per_second", speeds[1], "whole loop of main_moco_out.py, images/s")
    show("loop_over_bare", speeds[1] / speeds[0], "  ratio")


def bench_plain(show, words, gpu, fast):
    arch, batch = words.arch or ("resnet50" if gpu else "resnet20"), words.batch_size or 256
    case = ["-a", arch, "-b", str(batch), "--steps", "30" if gpu else "5"]
    pairs = [(loop(*case, *fast)[0], loop(*case, "--plain")[0]) for _ in range(words.rounds)]
    show(
        "plain_images_per_second",
        statistics.median(p[1] for p in pairs),
        f"unoptimised loop, {arch}, images/s",
    )
    show("loop_over_plain", statistics.median(p[0] / p[1] for p in pairs), "  ratio of the loop to it")


def bench_growth(show, words, gpu, fast):
    arch = words.arch or ("resnet50" if gpu else "resnet20")
    steps = ["--steps", "40" if gpu else "6"]

    def milliseconds(batch, *more):
        return 1000 * batch / loop("-a", arch, "-b", str(batch), *steps, *fast, *more)[0]

    for batch in (64, 128, 512, 256):  # the last one as the queues' below: torch.compile need not work again
        show(f"step_ms_batch_{batch}", milliseconds(batch), f"a step of {arch}, batch {batch}, queue 4,096, ms")
    for queue in (4096, 16384, 65536):
        show(f"step_ms_queue_{queue}", milliseconds(256, "--moco-k", str(queue)), f"  batch 256, queue {queue:,}, ms")
    for processes in range(1, (torch.cuda.device_count() if gpu else distributed.cores()) + 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__]
        case = ["--loop", "-a", arch, "-b", "256", *steps, *fast]
        threads = {} if gpu else {"OMP_NUM_THREADS": str(max(1, distributed.cores() // processes))}
        done = subprocess.run([*launcher, *case], capture_output=True, text=True, env={**os.environ, **threads})
        if done.returncode:
            sys.exit(f"bench.py: error: {processes} processes ended with:\n{done.stderr[-2000:]}")
        speed = json.loads(done.stdout.strip().splitlines()[-1])
        show(f"images_per_second_processes_{processes}", speed, f"  batch 256, {processes} process(es), images/s")


def bench_long_run(show, gpu, steps=2000):
    """What the last three quarters of many small steps add to the memory and the open files of the process."""
    if not Path("/proc/self/statm").is_file():
        return
    seen = []

    def look(step):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        seen.append((resident, torch.cuda.memory_allocated() if gpu else 0, len(os.listdir("/proc/self/fd"))))

    loop("-a", "resnet20", "-b", "16", "--steps", str(steps), at_step=look, every=steps // 4)
    memory, on_gpu, files = (after - before for before, after in zip(seen[1], seen[-1], strict=True))
    title = f"from step {steps // 4} to {steps} of one epoch"
    show("memory_growth_bytes", memory, f"{title}: memory, MiB", memory / 2**20)
    if gpu:
        show("gpu_memory_growth_bytes", on_gpu, f"{title}: memory of the GPU, MiB", on_gpu / 2**20)
    show("open_files_growth", files, f"{title}: open files")


class Plain(builder.MoCoOut):
    """The unoptimised loop: float32, channels first, images gathered for the shuffle (of processes)."""

    shuffle_keys = False

    def to(self, device, memory_format=None):
        torch.backends.cudnn.benchmark = False
        return super().to(device)

    def forward(self, im_q, im_k, labels):
        return super().forward(im_q.contiguous(), im_k.contiguous(), labels)


class Clock:
    """Notes when each measured step begins; stands still while `at_step(i)` runs, before every `every`-th of them."""

    def __init__(self, steps, skipped, at_step, every):
        self.steps, self.at_step, self.every = steps, at_step, every
        self.step, self.times, self.paused = -skipped, [], 0.0

    def tick(self):
        gpu = torch.cuda.is_available()
        if self.step == 0 and gpu:
            torch.cuda.reset_peak_memory_stats()  # of the search for the fastest convolutions
        if self.at_step and 0 <= self.step <= self.steps and self.step % self.every == 0:
            self.paused += seconds(lambda: self.at_step(self.step), gpu)
        elif self.step in (0, self.steps) and gpu:
            torch.cuda.synchronize()
        if 0 <= self.step <= self.steps:
            self.times.append(time.perf_counter() - self.paused)
        self.step += 1


compiled = None  # the network and the batch that torch.compile has seen


def loop(*words, at_step=None, every=1):
    """The training loop that main_moco_out.py runs, its model a little changed: it ticks at each forward pass.

    Returns:
        images/s without its first steps; and in seconds when each measured step began, and when the last one ended.
    """
    parser = options.pretrain_parser("", options.MOCO)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args(["data/", "--dataset", "cifar10", *LOOP.split(), *words])
    global compiled
    if args.compile and compiled != (args.arch, args.batch_size):
        torch._dynamo.reset()  # a second size would have it make programs for any size, which are slower
        compiled = (args.arch, args.batch_size)
    if args.plain:
        plain = dict(views="pil", precision="fp32", compile=False, print_freq=1, workers=distributed.cores())
        vars(args).update(plain)
    skipped = 10 if args.compile else 3 if torch.cuda.is_available() else 1
    clock = Clock(args.steps, skipped, at_step, every)

    class Timed(Plain if args.plain else builder.MoCoOut):
        def forward(self, *views, **order):
            clock.tick()
            return super().forward(*views, **order)

    def work(device):
        images = synthetic((args.steps + skipped + 1) * args.batch_size)  # one more step: its beginning ends the last
        if not args.plain:
            images.images = images.images.to(device)
        with tempfile.TemporaryDirectory() as args.output_dir, open(os.devnull, "w") as null, redirect_stdout(null):
            resolved = options.resolve_pretraining(args, device, "MoCoOut", {})
            pretrain.fit(Timed, options.MOCO, resolved, device, images)

    launch.launch(work, **options.launching(args))
    return args.steps * args.batch_size / (clock.times[-1] - clock.times[0]), clock.times


def bare(arch, batch, gpu):
    """A step of what no implementation can do without: query forward and backward, key forward, SGD."""
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    model = builder.MoCoOut(encoders.build(arch), K=1, mlp=True).to(device, memory_format=torch.channels_last).train()
    query, key = model.encoder_q, model.encoder_k
    if gpu:
        query.compile()
        key.compile()
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
    views = [torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last) for _ in range(2)]
    own = torch.arange(batch, device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            with torch.no_grad():  # first, as in the loop: their activations are freed before the queries'
                keys = F.normalize(key(views[1]).float(), dim=1)
            queries = F.normalize(query(views[0]).float(), dim=1)
            loss = F.cross_entropy(queries @ keys.T / 0.2, own)  # gradients of the loop's size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(10 if gpu else 1):
        step()
    return step


def trace(words, fast):
    gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    profiler = torch.profiler.profile(activities=activities)
    arch, batch = words.arch or ("resnet50" if gpu else "resnet18"), words.batch_size or (256 if gpu else 128)
    steps = 5

    def switch(step):
        profiler.start() if step == 0 else profiler.stop()

    loop(*fast, "-a", arch, "-b", str(batch), "--steps", str(steps), at_step=switch, every=steps)
    profiler.export_chrome_trace(str(words.profile))
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    print(f"{words.profile}: open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
