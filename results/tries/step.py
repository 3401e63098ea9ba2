"""Time of a training step on a CPU, with malloc's defaults or as in a run: step.py default|kept in|supcon STEPS."""

import resource
import sys
import time

import torch

from moco import encoders, launch
from moco.baselines import SupContrast
from moco.builder import MoCoIn

how, method, steps = sys.argv[1:]
if how == "kept":
    launch.keep_freed_memory()
torch.manual_seed(0)
queue = dict(K=4096, T=0.2, mlp=True)
model = MoCoIn(encoders.build("resnet20"), **queue) if method == "in" else SupContrast(encoders.build("resnet20"))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9, fused=True)
views, labels, times = torch.randn(2, 256, 3, 32, 32), torch.randint(10, (256,)), []
for _ in range(int(steps)):
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    optimizer.zero_grad()
    model(*views, labels).backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
after, times = resource.getrusage(resource.RUSAGE_SELF), sorted(times[2:])
print(
    f"{how} {method}: median {times[len(times) // 2]:.3f} s, min {times[0]:.3f} s, new pages in the last step "
    f"{after.ru_minflt - before.ru_minflt}, system {after.ru_stime:.1f} s, user {after.ru_utime:.1f} s, "
    f"peak {after.ru_maxrss >> 10} MiB"
)
