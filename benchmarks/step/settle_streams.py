"""Which of the things done before a capture must be done on the capturing stream? One case a process, for its sake.

What: a leaf, its AccumulateGrad node, its hook and its first gradient, each made on the side stream that captures or on
the default stream, then a backward pass captured and replayed.
Why: some of these spoil the capture and with it the process. Left out: several devices, leaves that are views.

    python settle_streams.py CASE      # one of CASES; the last line says "captured" or names the error
"""

import sys

import torch

CASES = (
    "all on the side stream",
    "leaf made on the default stream",
    "hook registered on the default stream",
    "gradient first taken on the default stream",
    "AccumulateGrad node made and kept on the side stream",
    "AccumulateGrad node made and kept on the default stream",
    "warm-up's autograd graph kept, on the default stream",
)


def main(case: str) -> None:
    side, default = torch.cuda.Stream(), torch.cuda.default_stream()
    torch.cuda.set_stream(side)
    x = torch.randn(64, 64, device="cuda")
    with torch.cuda.stream(default if "leaf made on the default" in case else side):
        w = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    torch.cuda.synchronize()
    kept = []
    with torch.cuda.stream(default if "on the default" in case and "leaf" not in case else side):
        if "hook" in case:
            w.register_post_accumulate_grad_hook(lambda p: None)
        elif "gradient first" in case:
            (x @ w).square().sum().backward()
        elif "AccumulateGrad" in case:
            kept.append(w.view_as(w).grad_fn.next_functions[0][0])  # as DistributedDataParallel does
        elif "kept" in case:
            kept.append((x @ w).square().sum())
    torch.cuda.synchronize()
    if w.grad is None:
        w.grad = torch.zeros_like(w)
    for _ in range(2):
        (x @ w).square().sum().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        w.grad.zero_()
        (x @ w).square().sum().backward()
    w.grad.fill_(7.0)
    graph.replay()
    torch.cuda.synchronize()
    exact = 2 * x.t() @ (x @ w.detach())
    error = ((w.grad - exact).norm() / exact.norm()).item()
    print(f"captured, error {error:.0e}")


if __name__ == "__main__":
    main(sys.argv[1])
