"""What travels to a worker, as plain data with URIs and paths from the root."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from seqray.config import Config
from seqray.folder import Folder
from train.baseline_rows import Rows
from train.runs import Content, Run


@dataclass(frozen=True)
class Job:
    """One run for one attempt."""

    config: dict[str, Any]
    store: str
    run_folder: str
    run_id: str
    attempt: int
    owner: str
    """Which of the commands that took this attempt at the same time it was."""
    bundle: str
    """Where the bundle goes."""
    content: Content
    """Content hashes of the store."""
    init_from: str | None
    """Bundle that the run starts from."""
    parent: str | None
    """Run id of that bundle."""
    output: str
    """Offline W&B runs go to the folder `wandb` in here."""
    group: str
    """W&B group: the experiment, or the search that a trial belongs to."""
    baselines: dict[str, Rows]
    """By split; one that is missing the first worker computes, while the others wait."""

    @classmethod
    def of(
        cls, config: Config, run: Run, output: Folder, group: str, baselines: Mapping[str, Rows] | None = None
    ) -> Self:
        """The job of `run`; its bundle goes to `<output>/bundles/<name>/<run id>`."""
        source = config.train.init_from
        return cls(
            config=config.plain(),
            store=str(Folder.at(config.data.store)),
            run_folder=str(run.folder),
            run_id=run.id,
            attempt=run.attempt,
            owner=run.owner,
            bundle=str(output / "bundles" / config.name / run.id),
            content=run.content,
            parent=run.parent,
            init_from=None if source is None else str(Folder.at(source)),
            output=str(output),
            group=group,
            baselines=dict(baselines or {}),
        )

    def plain(self) -> dict[str, Any]:
        """The job as plain data, which `Job(**plain)` takes back."""
        return asdict(self)
