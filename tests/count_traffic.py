"""Prints what every gather of a short run carries. Used by test_runs."""

import torch
import torch.distributed as dist
from conftest import TINY_MOCO

from moco import builder, distributed, options, pretrain

dist.init_process_group("gloo")
gather = distributed.gather_into


def counted(out, x):
    if distributed.rank() == 0:
        print("gathered", x.numel(), flush=True)
    gather(out, x)


def forbidden(*args, **kwargs):
    raise AssertionError("another way in which tensors cross processes")


distributed.gather_into = counted
for name in ("all_gather_into_tensor", "all_gather_single", "all_gather", "all_to_all", "scatter", "gather"):
    setattr(dist, name, forbidden)
parser = options.pretrain_parser("")
builder.MoCoOut.add_options(parser)
args = parser.parse_args([*TINY_MOCO.split(), "--epochs", "1", "--output-dir", "/dev/null"])
args.processes_on_node = 2
pretrain.save = lambda *rest: None
pretrain.logs.Log.__init__ = lambda self, *rest: setattr(self, "writer", None)
pretrain.logs.Log.add = lambda self, epoch, **values: None
pretrain.train(builder.MoCoOut, torch.device("cpu"), args)
dist.destroy_process_group()
