"""Peak memory and time of each loss, forward and backward, over a large catalogue.

python -m benchmarks.loss_memory --items 1000000 --tokens 2048 --hidden-dim 64 --precision bf16

Each loss runs in a process of its own. On a CPU the peak is the highest resident memory above what the inputs took, on
a GPU what PyTorch's allocator held above them; the weights' gradient (items x hidden_dim x 4 bytes) is part of it. The
plain form is left out where its logits would not fit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.losses import build_loss
from seqray.memory import keep_freed_memory
from seqray.models.protocol import Prediction
from seqray.negatives import Negatives, Popularity
from seqray.samples import Targets
from seqray.sections import Component, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig

OURS: dict[str, Component] = {
    "softmax": SoftmaxConfig(),
    "sampled_softmax 1,024 uniform": SampledSoftmaxConfig(num_negatives=1024),
    "sampled_softmax 8,192 uniform": SampledSoftmaxConfig(num_negatives=8192),
    "sampled_softmax 8,192 mixed": SampledSoftmaxConfig(num_negatives=8192, negatives="mixed"),
    "gbce 256": GBCEConfig(),
    "gbce 256 shared": GBCEConfig(per="batch"),
}
PLAIN = ("F.cross_entropy",)
CHUNKED = ("F.linear_cross_entropy",) if hasattr(F, "linear_cross_entropy") else ()
Inputs = tuple[Tensor, Tensor, Tensor]
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs every loss in a child and prints the table."""
    arguments = parse()
    if arguments.only:
        print(json.dumps(measure(arguments)))
        return
    plain_bytes = arguments.items * arguments.tokens * 4
    print(f"{arguments.items:,} items, {arguments.tokens:,} targets, hidden_dim {arguments.hidden_dim}, ", end="")
    print(f"{arguments.precision} on {arguments.device}; float32 logits would take {plain_bytes / 2**20:,.0f} MiB")
    print(f"{'loss':32} {'peak MiB':>9} {'seconds':>8}")
    for name in (*OURS, *CHUNKED, *PLAIN):
        if name in PLAIN and 3 * plain_bytes > free_bytes(arguments.device):
            print(f"{name:32} {'-':>9} {'-':>8}  (three copies of the logits do not fit)")
            continue
        command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:], "--only", name]
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name:32} failed with exit code {done.returncode}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:32} {found['peak_bytes'] / 2**20:9,.0f} {found['seconds']:8.2f}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; PyTorch's choice when 0")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--only", help="measure one loss in this process and print JSON")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak bytes above the inputs and seconds of one loss; the process runs nothing else."""
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden_dim, generator=generator).to(device).requires_grad_()
    weights = torch.randn(arguments.items + 1, arguments.hidden_dim, generator=generator).mul_(0.02)
    weights = weights.to(device).requires_grad_()
    items = torch.randint(1, arguments.items + 1, (arguments.tokens,), generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
        warm = hidden[:1] @ weights[:2].T  # libraries load here and not in the measurement
    del warm
    loss, before, seconds = chosen(arguments, device), peak(device), []
    for _ in range(arguments.repeats):
        hidden.grad = weights.grad = None
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            total = loss((hidden, weights, items))
        torch.autograd.backward(total)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"peak_bytes": peak(device) - before, "seconds": min(seconds)}


def chosen(arguments: argparse.Namespace, device: torch.device) -> Callable[[Inputs], Tensor]:
    """The loss that `--only` names, as a function of hidden states, weights and target items."""
    if arguments.only in OURS:
        ours, popularity = build_loss(OURS[arguments.only]), Popularity(np.ones(arguments.items))

        def library(inputs: Inputs) -> Tensor:
            targets = Targets(inputs[2], None, torch.arange(len(inputs[2]), device=device))
            negatives = Negatives((0, 0, 0), arguments.items, targets, popularity)
            return ours(Prediction(inputs[0], inputs[1]), targets, negatives)

        return library
    if arguments.only in CHUNKED:
        dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda inputs: F.linear_cross_entropy(
            inputs[0].to(dtype), inputs[1].to(dtype), inputs[2], reduction="sum", options=options
        )
    return lambda inputs: F.cross_entropy(inputs[0] @ inputs[1].T, inputs[2], reduction="sum")


def peak(device: torch.device) -> int:
    """The most bytes that this process held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def free_bytes(device: str) -> int:
    """Memory that is free on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
