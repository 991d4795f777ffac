"""What DDP and FSDP2 see of each gradient sink: two ranks on the CPU, one linear layer, for `settle_interfaces.py`.

What: a layer whose autograd function hands its weight gradient to a sink, wrapped in DistributedDataParallel and in
`fully_shard`; is the gradient the mean over both ranks?
Why: hooks of a parameter run even where its gradient is None, so that a wrong
sink could train unsynchronised in silence.
Left out: NCCL, CUDA graphs, gradient accumulation, mixed precision.

    python settle_hooks.py      # prints one JSON object on its last line
"""

import json
import os
import tempfile

import torch
import torch.distributed as dist
from settle_ops import AutogradSink, InPlaceSink, relative_error, sink_matmul
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WORLD = 2


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sink):
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, sink_matmul(ctx.sink, weight, dy.t(), x), None


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
        self.sink = None

    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.sink)


def trial(wrapper: str, kind: str, rank: int) -> str:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1 + rank)).requires_grad_()
    layer = Linear()
    buffer = torch.zeros_like(layer.weight)
    exact = torch.ones(4, 8).t() @ x.detach()  # of the sum of the outputs
    mean = exact.clone()
    dist.all_reduce(mean)
    mean /= WORLD
    layer.sink = InPlaceSink({layer.weight: buffer}, accumulate=False) if kind == "in place" else AutogradSink()
    wrapped = (
        DistributedDataParallel(layer)
        if wrapper == "DDP"
        else fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    )
    try:
        for _ in range(2):  # DDP complains in the second iteration where its hooks did not run in the first
            wrapped.zero_grad()
            wrapped(x).sum().backward()
    except (RuntimeError, KeyError, AssertionError) as error:
        return f"raises {type(error).__name__}"
    grad = layer.weight.grad
    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    seen = buffer if kind == "in place" else grad
    state = "mean over ranks" if relative_error(seen, mean) < 1e-6 else "this rank's alone"
    if kind == "in place":
        state += ", .grad " + ("None" if grad is None else "zero" if not grad.any() else "set")
    return "no error: gradient is " + state


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    results = {f"{w} with the {k} sink": trial(w, k, rank) for w in ("DDP", "FSDP2") for k in ("autograd", "in place")}
    if rank == 0:
        print(json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (os.path.join(folder, "store"),), nprocs=WORLD)
