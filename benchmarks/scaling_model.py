"""A model of throughput, cost and memory on many GPUs: the tables of docs/scaling.md, from assumptions of your own.

.venv/bin/python -m benchmarks.scaling_model [--machine h100|l40s] [--hidden-dim 256] [--efficiency 0.3] ...

Nothing is run on a GPU here: what it prints is computed. `--check SECONDS PARAMETERS WORKERS BYTES_PER_S` puts a
measured step through the same formula.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

GIB = 2**30
WEIGHT, GRADIENT, ADAM, LOSS_GRADIENT, BF16_COPY = 4, 4, 8, 4, 2
"""Bytes a weight: itself, its gradient in DDP's buckets, Adam's two slots; of the item table besides what the full
softmax adds up, and its copy for the products. Read from the code, not measured."""
ADAM_TRAFFIC = 28
"""Bytes a weight that an Adam step reads and writes."""
SCORE_BYTES = 4 * 268_435_456
"""What `loss.chunk_elements` lets the full softmax hold of its scores on a GPU."""
BACKBONE_HIDDEN = 0.5
"""Share of the backward pass of the blocks that hides the sum of their own gradients."""


@dataclass(frozen=True)
class Machine:
    """A node of GPUs; vendor's figures and list prices, rounded."""

    name: str
    gpus: int
    memory: float
    """Bytes of a GPU."""
    flops: float
    """bf16, dense, a second and GPU."""
    hbm: float
    """Bytes a second and GPU."""
    inside: float
    """Bytes a second that a ring over the GPUs of a node moves."""
    between: float
    """Bytes a second between nodes, of a whole node."""
    dollars: float
    """An hour and GPU."""


MACHINES = {
    "h100": Machine("8 x H100 80 GB, 3.2 Tbit/s", 8, 80e9, 989e12, 3.35e12, 400e9, 400e9, 4.0),
    "l40s": Machine("4 x L40S 48 GB, 100 Gbit/s (cluster.yaml)", 4, 48e9, 362e12, 0.86e12, 25e9, 12.5e9, 2.6),
}


@dataclass(frozen=True)
class Work:
    """A model and a step."""

    hidden_dim: int = 256
    num_blocks: int = 4
    history: int = 200
    """Events of a sequence, on average."""
    tokens: int = 32_768
    """Of one GPU and step."""
    negatives: int = 8192
    """Of the sampled softmax, shared by a step."""
    efficiency: float = 0.3
    """Share of `flops` that products reach."""
    network: float = 0.7
    """Share of `inside` and `between` that collectives reach."""
    latency: float = 30e-6
    """Seconds of a collective beside its bytes."""

    @property
    def backbone(self) -> int:
        """Weights of the blocks."""
        return 12 * self.num_blocks * self.hidden_dim**2


@dataclass(frozen=True)
class Layout:
    """How the item table lies: sampled or full softmax, and how many GPUs share out a table."""

    name: str
    sampled: bool = False
    sharded: bool = False
    """FSDP2: states are shared out over all, but the table is whole while it is worked with."""
    group: int = 1
    """train.vocabulary_parallel."""


def ring(machine: Machine, work: Work, gpus: int, size: float, *, spread: int = 0, rings: int = 1) -> float:
    """Seconds of an all-reduce of `size` bytes over `gpus`; a gather or a scatter takes half.

    spread: GPUs among which they stand, where not side by side. rings: how many such sums a node's network carries at
    the same time, each of its own bytes.
    """
    if gpus == 1:
        return 0.0
    rate = machine.inside if max(gpus, spread) <= machine.gpus else machine.between / rings
    return work.latency + 2 * (gpus - 1) / gpus * size / (work.network * rate)


def step_seconds(machine: Machine, work: Work, items: int, gpus: int, layout: Layout) -> dict[str, float]:
    """Where the seconds of a step go."""
    rate, D, T = machine.flops * work.efficiency, work.hidden_dim, work.tokens
    blocks = T * (6 * work.backbone + 6 * work.num_blocks * work.history * D) / rate
    scored = work.negatives + 1 if layout.sampled else items
    table = items * D / layout.group
    # The group scores the tokens of all its GPUs against a share of the table each: the same products a GPU.
    loss = 6 * T * scored * D / rate
    own = table / gpus if layout.sharded else table
    adam = (own + work.backbone / (gpus if layout.sharded else 1)) * ADAM_TRAFFIC / machine.hbm
    copies = gpus // layout.group
    rings = min(layout.group, machine.gpus)
    table_sum = ring(machine, work, copies, table * GRADIENT, spread=gpus, rings=rings)
    exchanged = layout.group * T * D * (2 + 4 + 4 + 4) / 2  # hidden states, their slopes, and both of the lookup
    vocabulary = ring(machine, work, layout.group, exchanged)
    if layout.group > 1 and not layout.sampled:  # two small sums for each chunk of the scores
        vocabulary += 2 * work.latency * T * items * 4 / SCORE_BYTES
    if layout.sharded:  # gathered once, and its gradient scattered once
        table_sum = ring(machine, work, gpus, table * (WEIGHT + GRADIENT) / 2)
    backbone_sum = ring(machine, work, gpus, work.backbone * GRADIENT)
    exposed = max(0.0, backbone_sum - BACKBONE_HIDDEN * blocks)
    return {"blocks": blocks, "loss": loss, "adam": adam, "network": table_sum + vocabulary + exposed}


def memory_bytes(work: Work, items: int, gpus: int, layout: Layout) -> float:
    """Of one GPU, with what a step's activations and scores take."""
    D, T = work.hidden_dim, work.tokens
    of_loss = 0 if layout.sampled else BF16_COPY
    state = WEIGHT + GRADIENT + ADAM
    table = items * D / layout.group * (state + LOSS_GRADIENT + of_loss)
    backbone = work.backbone * state
    if layout.sharded:
        table = items * D * (state / gpus + WEIGHT + GRADIENT + LOSS_GRADIENT + of_loss)
        backbone = work.backbone * state / gpus + work.backbone / work.num_blocks * (WEIGHT + GRADIENT)
    activations = T * D * work.num_blocks * 34 * 2 / 2 + layout.group * T * D * (2 + 4)
    scores = T * work.negatives * 2 if layout.sampled else min(SCORE_BYTES, 4 * T * layout.group * items / layout.group)
    return table + backbone + activations + scores


def layouts(gpus: int, loss: str) -> list[Layout]:
    """Those that the config offers on so many GPUs for the loss `full` or `sampled`; `missing` is not built."""
    groups = [2**power for power in range(1, gpus.bit_length()) if 2**power <= gpus]
    if loss == "missing":
        return [Layout(f"vocabulary {group}", sampled=True, group=group) for group in groups]
    whole = [Layout("ddp", loss == "sampled"), Layout("fsdp", loss == "sampled", sharded=True)]
    return whole if loss == "sampled" else [*whole, *(Layout(f"vocabulary {group}", group=group) for group in groups)]


def number(value: float) -> str:
    """10 M, 1.2 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def tokens_per_s(machine: Machine, work: Work, items: int, gpus: int, layout: Layout) -> float:
    """Of all GPUs."""
    return gpus * work.tokens / sum(step_seconds(machine, work, items, gpus, layout).values())


def fits(machine: Machine, work: Work, items: int, gpus: int, layout: Layout) -> bool:
    """With a tenth of the memory to spare."""
    return memory_bytes(work, items, gpus, layout) < 0.9 * machine.memory


def best(machine: Machine, work: Work, items: int, gpus: int, loss: str) -> Layout | None:
    """The fastest layout that fits."""
    fitting = [one for one in layouts(gpus, loss) if fits(machine, work, items, gpus, one)]
    return max(fitting, key=lambda one: tokens_per_s(machine, work, items, gpus, one), default=None)


def print_memory(machine: Machine, work: Work, catalogues: list[int]) -> None:
    shown = [Layout("ddp"), Layout("fsdp", sharded=True)]
    shown += [Layout(f"vocabulary {group}", group=group) for group in (8, 64, 512)]
    print(f"\nFull softmax: memory of one of 512 GPUs, GB (has {machine.memory / 1e9:.0f})")
    print("| items | " + " | ".join(layout.name for layout in shown) + " |\n|---" + "|---:" * len(shown) + "|")
    for items in catalogues:
        row = [f"{memory_bytes(work, items, 512, layout) / 1e9:,.1f}" for layout in shown]
        print(f"| {number(items)} | " + " | ".join(row) + " |")


def print_throughput(machine: Machine, work: Work, catalogues: list[int], counts: list[int]) -> None:
    for loss, title in (
        ("full", "full softmax"),
        ("sampled", f"sampled softmax, {work.negatives:,} negatives"),
        ("missing", "NOT BUILT: sampled softmax over a table in shards"),
    ):
        print(f"\n{title}: tokens/s of all, dollars for a billion tokens, network's share, fastest layout that fits")
        print("| items | " + " | ".join(f"{gpus} GPUs" for gpus in counts) + " |\n|---" + "|---" * len(counts) + "|")
        for items in catalogues:
            print(f"| {number(items)} | " + " | ".join(cell(machine, work, items, n, loss) for n in counts) + " |")


def cell(machine: Machine, work: Work, items: int, gpus: int, loss: str) -> str:
    layout = best(machine, work, items, gpus, loss)
    if layout is None:
        return "does not fit"
    seconds = step_seconds(machine, work, items, gpus, layout)
    speed = tokens_per_s(machine, work, items, gpus, layout)
    dollars = gpus * machine.dollars / 3600 * 1e9 / speed
    share = seconds["network"] / sum(seconds.values())
    return f"{number(speed)}, ${number(dollars)}, {share:.0%}, {layout.name}"


def print_crossings(machine: Machine, work: Work, gpus: int) -> None:
    """From how many items on each layout is the faster one, and the one that fits."""
    ddp, fsdp = Layout("ddp"), Layout("fsdp", sharded=True)
    vocabulary = Layout("vocabulary", group=machine.gpus)

    def costs(items: int, layout: Layout) -> dict[str, float]:
        return step_seconds(machine, work, items, gpus, layout)

    def faster(items: int, one: Layout, other: Layout, times: float = 1.0) -> bool:
        return sum(costs(items, one).values()) * times < sum(costs(items, other).values())

    def too_large(items: int, layout: Layout) -> bool:
        return not fits(machine, work, items, gpus, layout)

    print(f"\nOn {gpus} GPUs")
    for name, holds in (
        ("ddp no longer fits from", lambda n: too_large(n, ddp)),
        ("fsdp no longer fits from", lambda n: too_large(n, fsdp)),
        (f"vocabulary_parallel={machine.gpus} is faster than ddp from", lambda n: faster(n, vocabulary, ddp)),
        (f"vocabulary_parallel={machine.gpus} no longer fits from", lambda n: too_large(n, vocabulary)),
        ("the loss costs more than the blocks from", lambda n: costs(n, ddp)["loss"] > costs(n, ddp)["blocks"]),
        ("sampled (ddp) is twice as fast as full (ddp) from", lambda n: faster(n, Layout("s", sampled=True), ddp, 2.0)),
    ):  # fmt: skip
        found = next((items for items in steps() if holds(items)), None)
        print(f"- {name} {'never' if found is None else number(found) + ' items'}")


def steps() -> Iterator[int]:
    """Catalogues from a thousand items up, a twentieth more each time."""
    items = 1000.0
    while items < 3e10:
        yield int(items)
        items *= 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, default="h100")
    for field in fields(Work):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    for name in ("memory", "flops", "hbm", "inside", "between", "dollars"):
        parser.add_argument(f"--{name}", type=float, help="of the machine, instead of its own")
    parser.add_argument("--check", nargs=4, type=float, metavar=("SECONDS", "PARAMETERS", "WORKERS", "BYTES_PER_S"))
    arguments = parser.parse_args()
    if arguments.check:
        seconds, parameters, workers, rate = arguments.check
        exchanged = 2 * (workers - 1) / workers * parameters * GRADIENT / rate
        print(
            f"a step of {seconds:.4f} s and {exchanged:.4f} s of network: scaling {seconds / (seconds + exchanged):.2f}"
        )
        return
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    machine = MACHINES[arguments.machine]
    machine = replace(machine, **{f.name: given[f.name] for f in fields(Machine) if f.name in given})
    work = Work(**{field.name: given[field.name] for field in fields(Work)})
    print(f"{machine}\n{work}\n{work.backbone:,} weights in the blocks")
    catalogues = [10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000]
    print_memory(machine, work, catalogues)
    print_throughput(machine, work, [1_000_000, *catalogues], [8, 64, 512])
    for gpus in (8, 64):
        print_crossings(machine, work, gpus)


if __name__ == "__main__":
    main()
