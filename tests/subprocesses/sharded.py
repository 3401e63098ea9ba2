"""Two training steps with FSDP2 as docs/library.md has it: FILE for the process to meet itself. Prints how far the keys moved."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moco import encoders
from moco.builder import MoCoOut

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
model = MoCoOut(encoders.build("resnet20"), dim=8, K=32, m=0.5, T=0.2)
for module in (model.encoder_q, model.encoder_k, model):
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
weights = [encoder.fc.weight.full_tensor().clone() for encoder in (model.encoder_q, model.encoder_k)]
for _ in range(2):
    optimizer.zero_grad()
    model(*torch.randn(2, 8, 3, 8, 8), torch.randint(3, (8,))).backward()
    optimizer.step()
moved = [
    (encoder.fc.weight.full_tensor() - before).abs().sum().item()
    for encoder, before in zip((model.encoder_q, model.encoder_k), weights, strict=True)
]
print(*moved)
dist.destroy_process_group()
