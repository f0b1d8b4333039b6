"""The `data` section: the log, what is taken from it, and how it is divided."""

from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from seqray.sections import Section


class ColumnsConfig(Section):
    """Our column names -> the names in the log."""

    user_id: str = "user_id"
    """Column of the user."""
    item_id: str = "item_id"
    """Column of the item."""
    timestamp: str | None = "timestamp"
    """Column of the time (number, date or text); null when the rows of the log are in order already."""
    event: str | None = None
    """Column of what happened, such as view, cart, purchase; for data.event_types and data.keep_events."""
    event_id: str | None = None
    """Column with an id of the event itself: of the rows with one id the first counts. For logs that may hold an
    event twice, as those of senders who try again do.
    """
    basket: str | None = None
    """Column that ties the events of one purchase together, such as an invoice number."""


class ItemsConfig(Section):
    """The optional item table; when an item has several rows, the last one counts."""

    path: str
    """File or folder, Parquet, CSV or JSONL; may be the log itself."""
    item_id: str = "item_id"
    """Column of the item."""
    title: str | None = None
    """Column shown as the title; a column named `title` is found by itself."""
    keep: tuple[str, ...] | None = None
    """Other columns to keep; all of them when not given."""


class SplitConfig(Section):
    """How each user's history is divided into training, validation and test."""

    type: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: last event is the test target, the one before it validation. `temporal`: cuts in time."""
    test_cut: datetime | None = None
    """temporal: events from here on are the test period (UTC when no zone is given)."""
    validation_cut: datetime | None = None
    """temporal: events from here to test_cut are the validation period."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """temporal, instead of cuts: the newest share of events is the test period, as much before it validation."""
    target: Literal["next_item", "next_basket"] = "next_item"
    """temporal: what is to be found, the first event of the period or all items of its first basket."""

    @field_validator("test_cut", "validation_cut")
    @classmethod
    def _in_utc(cls, cut: datetime | None) -> datetime | None:
        return cut.replace(tzinfo=UTC) if cut is not None and cut.tzinfo is None else cut

    @model_validator(mode="after")
    def _cuts_fit(self) -> Self:
        cuts = (self.test_cut, self.validation_cut)
        if self.type == "leave_one_out":
            if any(cuts) or self.test_fraction or self.target != "next_item":
                raise ValueError("test_cut, validation_cut, test_fraction and next_basket belong to type: temporal")
        elif bool(self.test_fraction) == any(cuts) or (any(cuts) and not all(cuts)):
            raise ValueError("temporal needs either test_fraction or both test_cut and validation_cut")
        elif self.validation_cut and self.test_cut and self.validation_cut >= self.test_cut:
            raise ValueError("validation_cut must be before test_cut")
        return self


class DataConfig(Section):
    """The log, what is taken from it, and where the prepared store goes."""

    path: str | tuple[str, ...]
    """File, folder or several, local or any pyarrow.fs URI (s3://, gs://, hdfs://)."""
    format: Literal["parquet", "csv", "jsonl"] | None = None
    """Taken from the file names when not given."""
    columns: ColumnsConfig = ColumnsConfig()
    """The log's own column names."""
    items: ItemsConfig | None = None
    """Item table, kept in the bundle and returned by the endpoint."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of numeric timestamps."""
    timestamp_format: str | None = None
    """strptime format of text timestamps; ISO 8601 when not given."""
    min_user_events: int = Field(1, ge=1)
    """Users with fewer events are left out."""
    min_item_events: int = Field(1, ge=1)
    """Items with fewer events are left out."""
    filter: Literal["k_core", "one_pass"] = "k_core"
    """Repeat both minimums until nothing changes, or apply each once (items, then users)."""
    event_types: tuple[str, ...] = Field((), max_length=127)
    """Values of columns.event that models with `event_type: true` tell apart; all others are one of their own."""
    keep_events: tuple[str, ...] = ()
    """Values of columns.event whose rows are read; all when not given. Impressions are no acts of the user, for one."""
    drop_items: tuple[str, ...] = ()
    """Ids that are no products, such as postage or fees; their events are left out."""
    repeats: Literal["keep", "once_per_basket", "drop"] = "keep"
    """drop: only a user's first event with an item stays; once_per_basket: the first in each basket."""
    tie_order: Literal["file", "shuffle", "column"] = "file"
    """Order of a user's events with equal time: as in the file, shuffled by `seed`, or by `tie_column`."""
    tie_column: str | None = None
    """Column for `tie_order: column`."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of rows that may go to quarantine before the command stops."""
    split: SplitConfig = SplitConfig()
    """Training, validation and test."""
    store: str = ""
    """Folder of the prepared store; `<output>/stores/<name>` when not given."""
    store_shards: int = Field(0, ge=0, le=100_000)
    """For a store larger than a node's disk: its events in so many files, of which a node holds a few at a time. It has
    a data order of its own. 0: one file, of which each node has a copy.
    """

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.tie_order == "column") != (self.tie_column is not None):
            raise ValueError("tie_column goes with tie_order: column, and only with it")
        if bool(self.event_types or self.keep_events) != (self.columns.event is not None):
            raise ValueError("event_types and keep_events go with columns.event, which goes with one of them")
        if len(set(self.event_types)) != len(self.event_types):
            raise ValueError("event_types names a type twice")
        if self.split.type == "temporal" and self.columns.timestamp is None:
            raise ValueError("split.type temporal needs columns.timestamp")
        if self.split.target == "next_basket" and not self.columns.timestamp:
            raise ValueError("split.target next_basket needs columns.timestamp")
        return self
