"""What travels to a worker, as plain data with paths from the root."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from seqray.config import Config
from train.runs import Content, Run, absolute

LOG_FILE = "train.log"
"""In the run's folder: the lines that tell how the run goes."""


@dataclass(frozen=True)
class Job:
    """One run for one attempt."""

    config: dict[str, Any]
    store: str
    run_folder: str
    run_id: str
    attempt: int
    bundle: str
    """Where the bundle goes."""
    content: Content
    """Content hashes of the store."""
    init_from: str | None
    """Bundle that the run starts from."""
    parent: str | None
    """Run id of that bundle."""
    wandb: str
    """Offline W&B runs go to the folder `wandb` in here."""
    group: str
    """W&B group: the experiment, or the search that a trial belongs to."""
    echo: bool
    """The worker prints the lines of the run's log: it is the command's own process, and no trial among others."""

    @classmethod
    def of(cls, config: Config, run: Run, store: Path, output: Path, group: str, *, echo: bool) -> Self:
        """The job of `run`; its bundle goes to `<output>/bundles/<name>/<run id>`."""
        source = config.train.init_from
        return cls(
            config=config.plain(),
            store=str(store),
            run_folder=str(run.folder),
            run_id=run.id,
            attempt=run.attempt,
            bundle=str(output / "bundles" / config.name / run.id),
            content=run.content,
            parent=run.parent,
            init_from=None if source is None else str(absolute(source)),
            wandb=str(output),
            group=group,
            echo=echo,
        )

    def plain(self) -> dict[str, Any]:
        """The job as plain data, which `Job(**plain)` takes back."""
        return asdict(self)
