"""Scoring of all users of a store: what is to be done, and one file of it, without Ray."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seqray.cache import Cache
from seqray.errors import SeqrayError
from seqray.folder import Folder
from seqray.item_filter import Filter
from seqray.query import Query, Recommendation
from seqray.recommender import Recommender
from seqray.sequences import SequenceStore
from serve.admission import Admission


@dataclass(frozen=True)
class Plan:
    """What a folder of scores holds, or will; plain data, as in its `_plan.json`."""

    bundle: str
    """Where the bundle is, and the sha256 of its manifest."""
    bundle_sha256: str
    model_version: str
    store: str
    """Where the store is, and the sha256 of its files by name."""
    store_sha256: dict[str, str]
    users: int
    users_a_file: int
    k: int
    exclude_seen: bool | None
    filter: dict[str, Any] | None
    now: float
    """Time of all queries, seconds since 1970: that at which the job was begun."""

    @property
    def files(self) -> int:
        """Files of the whole job."""
        return -(-self.users // self.users_a_file)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another plan would have answered otherwise; places and the time do not count."""
        mine = {name: value for name, value in asdict(self).items() if name not in ("bundle", "store", "now")}
        return [name for name, value in mine.items() if other.get(name) != value]


def file_name(number: int) -> str:
    """The name of a file of the output."""
    return f"part-{number:06d}.parquet"


class Scorer:
    """Makes the tables of a plan: a row for each user and recommended item, users in the order of the store."""

    def __init__(self, plan: Plan, recommender: Recommender, store: SequenceStore, batch_size: int) -> None:
        self._plan, self._recommender, self._store, self._batch_size = plan, recommender, store, batch_size
        self._item_ids: list[Any] = [None, *store.items_table.column("item_id").to_pylist()]
        self._event_types: list[str | None] = [None, *(store.manifest["data"].get("event_types") or ())]
        self._filter: Filter | None = None if plan.filter is None else recommender.read_filter(plan.filter)

    def table(self, number: int) -> Any:
        """The Arrow table of one file: user_id, rank, item_id, score, source, model_version."""
        first = number * self._plan.users_a_file
        users = np.arange(first, min(first + self._plan.users_a_file, self._plan.users))
        # Users of about the same length together, so that what is read at a time is of one size.
        order = np.argsort(np.diff(self._store.offsets)[users], kind="stable")
        answers: dict[int, Recommendation] = {}
        queries = self._queries(users)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size].tolist()
            found = self._recommender.recommend([queries[place] for place in places])
            answers.update(zip(places, found, strict=True))
        return self._rows(users, [answers[place] for place in range(len(users))])

    def _queries(self, users: Any) -> list[Query]:
        store, plan = self._store, self._plan
        begin, end = int(store.offsets[users[0]]), int(store.offsets[users[-1] + 1])
        places = np.arange(begin, end)
        items = [self._item_ids[item] for item in store.items[places].tolist()]
        times = (store.timestamps[places] / 1e6).tolist() if store.has_timestamps else []
        types = [] if store.event_types is None else [self._event_types[n] for n in store.event_types[places].tolist()]
        bounds = (store.offsets[users[0] : users[-1] + 2] - begin).tolist()
        return [
            Query(
                tuple(items[a:b]), plan.k, exclude_seen=plan.exclude_seen, filter=self._filter, now=plan.now,
                events=tuple(types[a:b]), timestamps=tuple(times[a:b]),
            )
            for a, b in pairwise(bounds)
        ]  # fmt: skip

    def _rows(self, users: Any, answers: Sequence[Recommendation]) -> Any:
        counts = np.array([len(answer.items) for answer in answers])
        user_ids = self._store.user_ids.take(pa.array(np.repeat(users, counts)))
        items = [item for answer in answers for item in answer.items]
        item_type = self._recommender.bundle.items.schema.field("item_id").type
        sources = pa.array([item.source for item in items], pa.string()).dictionary_encode()
        version = pa.DictionaryArray.from_arrays(np.zeros(len(items), np.int32), [self._plan.model_version])
        return pa.table(
            {
                "user_id": user_ids,
                "rank": pa.array(np.concatenate([np.arange(1, count + 1) for count in counts]), pa.int32()),
                "item_id": pa.array([item.item_id for item in items], item_type),
                "score": pa.array([item.score for item in items], pa.float64()),
                "source": sources,
                "model_version": version,
            }
        )


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker comes by what it needs; plain data, so that it travels."""

    output: str
    admission: Admission
    cache: Cache
    device: str
    num_threads: int
    batch_size: int


class ScoringWorker:
    """A process that makes files, called by Ray Data with numbers of files."""

    def __init__(self, plan: Plan, settings: WorkerSettings) -> None:
        self._plan, self._settings = plan, settings

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Writes each file, durably; a row for each with the rows in it, or with what went wrong."""
        done = list(self._made(batch["number"].tolist()))
        return {"number": [n for n, _, _ in done], "rows": [r for _, r, _ in done], "error": [e for _, _, e in done]}

    def _made(self, numbers: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        for number in numbers:
            try:
                table = self._scorer.table(number)
                sink = io.BytesIO()
                pq.write_table(table, sink, compression="zstd")
                Folder.at(self._settings.output).write_durably(file_name(number), sink.getvalue())
            except SeqrayError as error:
                yield number, 0, str(error)
            else:
                yield number, len(table), ""

    @cached_property
    def _scorer(self) -> Scorer:
        """Opened at the first file, so that what goes wrong there is told like everything else."""
        plan, settings = self._plan, self._settings
        bundle = settings.admission.load(plan.bundle, plan.bundle_sha256)
        store = SequenceStore(settings.cache.fetch(plan.store), plan.store, settings.cache)
        recommender = Recommender(bundle, settings.device, settings.num_threads, build_kernels=True)
        return Scorer(plan, recommender, store, settings.batch_size)
