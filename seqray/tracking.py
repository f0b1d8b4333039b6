"""Tracker: the metrics of one run in Weights & Biases, which may be away or slow without stopping anything.

Everything of W&B, its import too, happens in one daemon thread fed by a bounded queue. A run that W&B cannot take is
recorded in a local folder, and a resumed run (the same run_id) goes on in the same W&B run.
"""

import configparser
import netrc
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from seqray.errors import ConfigError
from seqray.folder import Folder
from seqray.program_config import TrackingConfig

ENVIRONMENT_MODES = {
    "online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline",
    "shared": "online",
}  # fmt: skip
"""Values of WANDB_MODE -> ours."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What tracking may cost: seconds to wait for W&B, and records kept while it is slow."""

    init_s: float = 20.0
    finish_offline_s: float = 10.0
    finish_online_s: float = 30.0
    records: int = 10_000


def resolve_mode(config: TrackingConfig) -> str:
    """`online`, `offline` or `disabled`; `auto` asks WANDB_MODE, else is online where a W&B key is set."""
    if config.mode != "auto":
        return config.mode
    wanted = os.environ.get("WANDB_MODE")
    if wanted is None:
        return "online" if _has_key() else "offline"
    if wanted not in ENVIRONMENT_MODES:
        raise ConfigError(f"WANDB_MODE: {wanted!r} is none of {', '.join(ENVIRONMENT_MODES)}")
    return ENVIRONMENT_MODES[wanted]


class Tracker:
    """One run of W&B, for rank 0. No method raises or waits for W&B, but `finish` for a stated time."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        *,
        run_id: str,
        name: str,
        group: str,
        tags: tuple[str, ...],
        settings: Mapping[str, Any],
        limits: Limits = Limits(),
        copy_to: Folder | None = None,
        warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """copy_to: where the folder of an offline run goes at its end, since `folder` is on this machine alone;
        warn: takes a line, from the thread of W&B too.
        """
        self.mode = resolve_mode(config)
        self.run_folder: Path | None = None
        """Where W&B keeps this run on disk, once it is known; `wandb sync FOLDER` uploads it."""
        self._config = config
        self._folder = folder
        self._run_id = run_id
        self._name, self._group, self._tags = name[:128], group[:128], tuple(tag[:64] for tag in tags)
        self._settings = dict(settings)
        self._limits, self._copy_to, self._say = limits, copy_to, warn
        self._changed = threading.Condition()
        self._records: deque[tuple[int, dict[str, float]]] = deque(maxlen=limits.records)
        self._summary: dict[str, Any] = {}
        self._exit_code: int | None = None
        self._dropped = 0
        self._thread: threading.Thread | None = None
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="seqray-tracking", daemon=True)
            self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics of optimizer step `step`; when W&B is too slow, the oldest records are dropped."""
        if self._thread is None:
            return
        with self._changed:
            self._dropped += len(self._records) == self._records.maxlen
            self._records.append((step, dict(metrics)))
            self._changed.notify()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets values that stand for the whole run, such as test metrics and the bundle's path."""
        with self._changed:
            self._summary.update(values)
            self._changed.notify()

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run (0: it succeeded), waiting at most `finish_offline_s` or `finish_online_s` for W&B."""
        if self._thread is None:
            return
        with self._changed:
            self._exit_code = exit_code
            self._changed.notify()
        limit = self._limits.finish_online_s if self.mode == "online" else self._limits.finish_offline_s
        self._thread.join(limit)
        if self._thread.is_alive():
            self._warn(f"W&B did not finish within {limit:g} s; {self._sync_later()}")
        if self._dropped:
            self._warn(f"W&B was too slow for {self._dropped} of the records; the oldest were dropped")

    def _work(self) -> None:
        run = None
        if self.mode == "online" and not _has_key():  # wandb would ask for one at the terminal
            self._warn(f"no W&B key is set; this run is recorded offline, {self._sync_later()}")
            self.mode = "offline"
        if self.mode == "online":
            run = self._attempt(
                lambda: self._start("online"), f"W&B did not start; this run is recorded offline, {self._sync_later()}"
            )
        if run is None:
            run = self._attempt(self._start_offline, "W&B did not start; this run is not recorded")
        if run is not None:
            self.run_folder = Path(run.settings.sync_dir)
            self._attempt(lambda: self._feed(run), f"W&B failed; {self._sync_later()}")
            self._attempt(_flush, f"W&B failed; {self._sync_later()}")
            if self._copy_to is not None and self.mode == "offline":
                target, source = self._copy_to / self.run_folder.name, self.run_folder
                self._attempt(lambda: target.put(source), f"the offline run stays in {source}")

    def _start_offline(self) -> Any:
        if self.mode == "online":
            import wandb

            wandb.teardown()  # the failed attempt to start online still holds the run id
            self.mode = "offline"
        return self._start("offline")

    def _start(self, mode: Literal["online", "offline"]) -> Any:
        # W&B's reports about its own errors would keep the process alive for seconds when the network is away.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        self._folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            id=self._run_id,
            resume="allow",
            name=self._name,
            group=self._group,
            tags=self._tags,
            config=self._settings,
            allow_val_change=True,
            dir=self._folder,
            mode=mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                label_disable=True,
                x_disable_machine_info=True,  # it asks the cloud's metadata service
                x_disable_stats=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=5.0,  # what a killed process loses, in seconds
                init_timeout=self._limits.init_s,
                finish_timeout=0.7 * self._limits.finish_online_s,
                finish_timeout_raises=True,
                stop_fn=_ignore_stop,
                reinit="create_new",  # a run of the user's own stays as it is
            ),
        )

    def _feed(self, run: Any) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._records or self._summary or self._exit_code is not None)
                records, summary, exit_code = list(self._records), self._summary, self._exit_code
                self._records.clear()
                self._summary = {}
            for step, metrics in records:
                run.log(metrics, step=step)
            if summary:
                run.summary.update(summary)
            if exit_code is not None:
                run.finish(exit_code=exit_code)
                return

    def _attempt(self, action: Callable[[], Result], failure: str) -> Result | None:
        try:
            return action()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever W&B does, training goes on
            lines = str(error).splitlines() or [""]
            self._warn(f"{failure} ({type(error).__name__}: {lines[0][:200]})")
            return None

    def _warn(self, message: str) -> None:
        self._say(f"warning: {message}")

    def _sync_later(self) -> str:
        return f"later: wandb sync {self.run_folder or self._folder / 'wandb' / f'offline-run-*-{self._run_id}'}"


def _flush() -> None:
    import wandb

    if wandb.run is None:  # no run of the user's own in this process
        wandb.teardown()  # run.finish() returns before the file is written, and Ray may kill a worker at once


def _ignore_stop() -> None:
    # By default a click in W&B interrupts the main thread, which Ray Train takes for a crash and starts anew.
    print("warning: W&B asks to stop this run; stop the command instead", file=sys.stderr)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(file).authenticators(urlsplit(_base_url()).netloc)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return found is not None and bool(found[2])


def _base_url() -> str:
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    # `wandb login --host` leaves the address of a server of one's own here.
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return "https://api.wandb.ai"
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")
