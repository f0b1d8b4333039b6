"""The sections of the programs: train, evaluate, tune, and the tracking and cluster that they share."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from seqray.sections import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Fine-tuning: where it runs, how long, and how the weights move."""

    num_workers: int | tuple[int, int] = 1
    """Ray Train workers; 0 trains in the command's own process without a cluster. [2, 8] is elastic: as many of 2 to 8
    as the cluster holds, more when it grows and fewer when it shrinks.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU for each worker where the cluster (or this process) has them."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and so threads, of one worker."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds the whole model. fsdp: weights, gradients and optimizer are shared out over the workers,
    and a block is gathered while it is worked on (FSDP2); for backbones too large for one GPU.
    """
    vocabulary_parallel: int = Field(1, ge=1)
    """Workers that share out the rows of the item table and its optimizer, for catalogues too large for one GPU; must
    divide num_workers. Needs loss.type: softmax, and a model that keeps its items in an ItemTable, as all of ours do.
    """
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the hardware multiplies bf16 (on a CPU inside a narrow model without kernels
    not: it does not pay)."""
    init_from: str | None = None
    """Bundle whose weights a new run starts from; its items are matched by id, new ones start anew."""
    epochs: int = Field(20, ge=1)
    """Passes over the training sequences, at the most."""
    batch_size: int = Field(256, ge=1)
    """Sequences of one optimizer step, over all workers."""
    accumulate_steps: int = Field(1, ge=1)
    """Micro-batches that a worker's part of a step is cut into, one after the other: the same step with less memory.
    Negatives that come from the batch (in_batch, mixed) come from a micro-batch.
    """
    activation_checkpointing: bool = False
    """Keep of each block of the model its input alone, and compute the rest again in the backward pass."""
    windows: Literal["last", "all"] = "last"
    """Of a history longer than model.max_length: train on its newest window, or on all of them."""
    samples: Literal["auto", "rows", "prefixes"] = "auto"
    """rows: a window is one sample, with a target after each event. prefixes: every prefix of a history is a sample,
    with a target after its newest event. auto: rows, but prefixes for a model that is not causal.
    """
    weigh: Literal["items", "baskets"] = "items"
    """next_basket: each item of a basket counts the same in the loss, or each basket."""
    half_life_days: float | None = Field(None, gt=0)
    """A target counts half as much as one that is so many days younger; null: all the same."""
    until: Literal["validation", "test"] = "validation"
    """Train on the events before the validation targets, or (a final training with `epochs` chosen before, without
    early stopping) on all before the test targets.
    """
    target: Literal["next_item", "next_basket"] | None = None
    """The next event, or all items of the next basket (events of one user at one time); as data.split when null."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Adam's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    clip_norm: float | None = Field(5.0, gt=0)
    """Gradient norm is clipped to this; null turns it off."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, down to 0 at the last epoch."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between validations."""
    monitor: str = "val/ndcg@10"
    """Metric that chooses the best weights, stops early, and ranks trials; larger is better."""
    patience: int = Field(5, ge=1)
    """Validations without a better `monitor` before training stops."""
    checkpoint_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; a validation that is the best so far writes one too."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept, beside the best one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are no numbers, on any worker: end the run, or leave the step out on all of them.
    """
    max_failures: int = Field(3, ge=0)
    """Times Ray Train starts the workers again after one of them died; a preempted node does not count."""
    max_preemptions: int = Field(100, ge=0)
    """Times it does so after a node was preempted."""
    hang_timeout_s: float = Field(600, gt=0)
    """Seconds without headway (a step, a batch of an evaluation) after which the workers end and are started again."""
    start_timeout_s: float = Field(300, gt=0)
    """Seconds that a cluster may take to have room for the workers, at the start and after a failure; then the run
    ends.
    """
    resize_interval_s: float = Field(60, gt=0)
    """Elastic: seconds between looks at the cluster for another number of workers. A resize costs the steps since the
    last checkpoint.
    """

    @field_validator("num_workers", mode="before")
    @classmethod
    def _workers_fit(cls, given: Any) -> Any:
        numbers = given if isinstance(given, list | tuple) else (given,)
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if not whole or len(numbers) not in {1, 2} or (isinstance(given, list | tuple) and len(numbers) == 1):
            raise ValueError("a whole number, or [least, most] for an elastic run")
        if not (0 <= numbers[0] <= numbers[-1] <= 4096) or (len(numbers) == 2 and numbers[0] < 1):
            raise ValueError("from 0 to 4096 workers; elastic: [least, most], from 1")
        return given

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.vocabulary_parallel > 1 and self.min_workers != self.max_workers:
            raise ValueError("an elastic run has any number of workers, so vocabulary_parallel is 1 there")
        if max(1, self.max_workers) % self.vocabulary_parallel:
            raise ValueError(
                f"vocabulary_parallel {self.vocabulary_parallel} does not divide num_workers {self.num_workers}"
            )
        return self


class EvaluateConfig(Section):
    """Full ranking over the catalogue."""

    k: tuple[int, ...] = Field((5, 10, 20), min_length=1)
    """Cut-offs of hit_rate, ndcg, mrr and coverage."""
    exclude_seen: bool = True
    """Leave items of the history out of the ranking; wrong for purchase logs with repeats."""
    popularity_window_days: float = Field(90.0, gt=0)
    """Window of the windowed popularity baseline."""
    batch_size: int = Field(256, ge=1)
    """Users ranked at a time."""
    bundle: str | None = None
    """Bundle that `python -m train.evaluate` puts beside the baselines."""
    split: Literal["test", "val"] = "test"
    """Targets that `python -m train.evaluate` ranks."""

    @field_validator("k")
    @classmethod
    def _k_positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if min(k) < 1 or len(set(k)) != len(k):
            raise ValueError("k holds different numbers from 1 up")
        return tuple(sorted(k))


class Distribution(Section):
    """What a searched value is drawn from: exactly one key, such as `{loguniform: [1.0e-4, 1.0e-2]}`."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """A real number between two bounds."""
    loguniform: tuple[float, float] | None = None
    """A real number between two positive bounds, even on the logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        given = [(key, value) for key, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of choice, uniform, loguniform, randint")
        key, value = given[0]
        if key != "choice" and not value[0] < value[1]:
            raise ValueError(f"{key}: the lower bound {value[0]} is not below {value[1]}")
        if key == "loguniform" and value[0] <= 0:
            raise ValueError("loguniform: bounds must be above 0")
        return self

    def examples(self) -> tuple[Any, ...]:
        """All choices, or the ends of the distribution; for real numbers also one between, which is no whole number."""
        low_high = self.uniform or self.loguniform
        if low_high is not None:
            return (*low_high, low_high[0] + (low_high[1] - low_high[0]) / 2**0.5)
        return self.choice or self.randint or ()


class TuneConfig(Section):
    """Hyperparameter search: each trial is a train run with some values of the tree replaced."""

    space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted path -> distribution; paths under model, loss and train."""
    num_trials: int = Field(16, ge=1)
    """Trials of the search."""
    search: Literal["optuna", "random"] = "optuna"
    """How the next sample is chosen."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops weak trials early (Li et al. 2020)."""
    grace_validations: int = Field(2, ge=1)
    """asha: validations that every trial gets."""
    reduction_factor: int = Field(3, ge=2)
    """asha: one of this many trials goes on from a rung."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; as many as the cluster holds when not given."""


class TrackingConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when a W&B key is set, else offline (runs land under `<output>/wandb` and sync later)."""
    project: str = "seqray"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class ClusterConfig(Section):
    """The Ray cluster that the commands use."""

    address: str | None = None
    """`local` starts one in this process; an address joins it; null joins a running one, else starts one."""
    cache_folder: str | None = None
    """Folder on each node's own disk for copies of what lies behind URIs; `~/.cache/seqray` when null."""
    cache_days: float = Field(7.0, gt=0)
    """Copies that nobody asked for in so many days are deleted when another one is fetched."""
    cache_shards_gib: float = Field(100.0, gt=0)
    """What a node's copies of the shards of one store may take (data.store_shards), in GiB."""
