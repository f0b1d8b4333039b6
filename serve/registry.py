"""Registry: the versions of a model and which of them answer, as files that are created once and never written over.

    bundles/RUN-SHA/      copies of bundles, so that a version stays what it was
    versions/000017.json  what version 17 is: its bundle, and the sha256 of that bundle's manifest
    changes/000042.json   a change of the aliases: who, when, why, from what to what, and what holds since then

The change with the highest number holds, so the audit and the aliases are the same files and cannot disagree. To
compare and set is to create the change after the one that was seen: where somebody else did, the name is taken. A
version or change counts from the moment its file is there, after all that it speaks of.

What is atomic is `Folder.create_text`: on a local disk (or NFS) a hard link, on S3 a conditional write by boto3,
because pyarrow has none. Other object stores, and S3 look-alikes that take a conditional write for a plain one, are
refused on writing. Replicas only read, by pyarrow.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seqray.bundle import Bundle
from seqray.errors import DataError
from seqray.folder import Folder
from seqray.storage import MANIFEST_FILE, file_sha256, temporary_folder

RECORD = re.compile(r"\d{6,}\.json")
REMEMBERED = 50
"""Champions of before that `rollback` can go back to, one after the other."""


class Conflict(DataError):
    """Somebody else changed the aliases meanwhile."""


class Record(BaseModel):
    """What a file of the registry says; fields of a newer program are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, allow_inf_nan=False)

    when: str = ""
    """UTC, ISO 8601."""
    who: str = ""
    """Name of the OS user and host."""
    nonce: str = ""
    """Makes the text unique to its writer, as `Folder.create_text` wants it."""


class Version(Record):
    """A bundle under a number."""

    number: int = Field(ge=1)
    bundle: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    """Name of its folder in `bundles`."""
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str
    num_items: int
    num_bytes: int
    metrics: dict[str, float]
    source: str
    """Where the bundle was copied from."""


class Change(Record):
    """A change of the aliases, and what holds since."""

    number: int = Field(ge=0)
    action: Literal["nothing", "promote", "rollback", "challenge", "withdraw"]
    alias: Literal["champion", "challenger"] = "champion"
    old: int | None = None
    new: int | None = None
    why: str = ""
    champions: tuple[int, ...] = ()
    """The champion, then those before it, newest first, that `rollback` goes back to."""
    challenger: int | None = None

    @property
    def champion(self) -> int | None:
        """The version that answers."""
        return self.champions[0] if self.champions else None

    def promoted(self, version: int, why: str) -> "Change":
        """The change after this one that makes `version` the champion; it is no challenger any more."""
        champions = (version, *self.champions)[:REMEMBERED]
        challenger = None if self.challenger == version else self.challenger
        return self._next("promote", "champion", version, why, champions, challenger)

    def rolled_back(self, why: str) -> "Change":
        """... that makes the champion of before the champion again; DataError where there was none."""
        if len(self.champions) < 2:
            raise DataError(f"nothing to go back to: no champion before {self.champion or 'the first one'} is known")
        champions = self.champions[1:]
        challenger = None if self.challenger == champions[0] else self.challenger
        return self._next("rollback", "champion", champions[0], why, champions, challenger)

    def challenged(self, version: int | None, why: str) -> "Change":
        """... that makes `version` the challenger, or nobody."""
        action: Literal["challenge", "withdraw"] = "withdraw" if version is None else "challenge"
        return self._next(action, "challenger", version, why, self.champions, version)

    def _next(
        self,
        action: Literal["promote", "rollback", "challenge", "withdraw"],
        alias: Literal["champion", "challenger"],
        new: int | None,
        why: str,
        champions: tuple[int, ...],
        challenger: int | None,
    ) -> "Change":
        old = self.champion if alias == "champion" else self.challenger
        return Change(
            number=self.number + 1, action=action, alias=alias, old=old, new=new, why=why, champions=champions,
            challenger=challenger, **_signature(),
        )  # fmt: skip


NOTHING = Change(number=0, action="nothing")
"""What holds in a new registry."""
Kept = TypeVar("Kept", bound=Record)


@dataclass(frozen=True)
class Registry:
    """The registry in a folder, which may not be there yet. Errors: DataError names the file."""

    folder: Folder

    @classmethod
    def at(cls, location: str | Path) -> Self:
        """The registry at a local path or URI."""
        return cls(Folder.at(location))

    def head(self) -> Change:
        """The change that holds."""
        numbers = self._numbers("changes")
        return NOTHING if not numbers else self.latest(self._kept("changes", numbers[-1], Change))

    def latest(self, known: Change) -> Change:
        """The change that holds, from one that did: one look for a file where nothing changed."""
        while (text := self._text("changes", known.number + 1)) is not None:
            known = self._parse("changes", known.number + 1, text, Change)
        return known

    def changes(self) -> list[Change]:
        """All changes, oldest first: the audit."""
        return [self._kept("changes", number, Change) for number in self._numbers("changes")]

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        return [self._kept("versions", number, Version) for number in self._numbers("versions")]

    def version(self, number: int) -> Version:
        """A version; DataError with those that there are when it is none of them."""
        text = self._text("versions", number)
        if text is None:
            there = ", ".join(map(str, self._numbers("versions"))) or "none"
            raise DataError(f"{self.folder}: no version {number}; versions: {there}")
        return self._parse("versions", number, text, Version)

    def bundle(self, version: Version) -> str:
        """Path or URI of the bundle of a version."""
        return str(self.folder / "bundles" / version.bundle)

    def add(self, bundle: Bundle, num_bytes: int) -> Version:
        """Copies a verified bundle under the next number; one that has a number keeps it."""
        self._check_exclusive()
        sha256 = file_sha256(bundle.folder / MANIFEST_FILE)
        name = f"{bundle.version}-{sha256[:16]}"
        metrics = {key: float(value) for key, value in bundle.metrics.items() if type(value) in (int, float)}
        number = 1
        for known in self.versions():
            if known.manifest_sha256 == sha256:
                if (self.folder / "bundles" / known.bundle).read_text(MANIFEST_FILE) is None:  # deleted to free space
                    self._copy(bundle.folder, known.bundle)
                return known
            number = known.number + 1
        self._copy(bundle.folder, name)
        while True:
            version = Version(
                number=number, bundle=name, manifest_sha256=sha256, run_id=bundle.version, metrics=metrics,
                num_items=bundle.num_items, num_bytes=num_bytes, source=bundle.location, **_signature(),
            )  # fmt: skip
            if (self.folder / "versions").create_text(_file(number), _text(version)):
                return version
            other = self.version(number)  # of somebody else who adds at this moment, perhaps the same bundle
            if other.manifest_sha256 == sha256:
                return other
            number += 1

    def change(self, change: Change) -> None:
        """Sets the aliases; Conflict when another change came after the one that `change` was made from."""
        self._check_exclusive()
        if not (self.folder / "changes").create_text(_file(change.number), _text(change)):
            head = self.head()
            raise Conflict(
                f"{self.folder}: {head.who} changed the {head.alias} from {head.old or 'none'} to {head.new or 'none'} "
                "meanwhile; nothing was changed, look at the versions and decide again"
            )

    def _check_exclusive(self) -> None:
        """DataError when the store lets a second writer of a name through."""
        self.folder.create_text("registry.json", _text(Record(**_signature())))
        if self.folder.create_text("registry.json", _text(Record(**_signature()))):
            raise DataError(
                f"{self.folder}: this store does not keep exclusive writes apart; take another for a registry"
            )

    def _copy(self, source: Path, name: str) -> None:
        target = self.folder / "bundles" / name
        if not target.is_local:
            target.put(source)  # the bytes of every writer of this name are the same
            return
        if target.path.is_dir():
            return
        temporary = temporary_folder(target.path)
        try:
            for file in source.iterdir():
                shutil.copyfile(file, temporary / file.name)
                (temporary / file.name).chmod(0o444)
            os.replace(temporary, target.path)
        except OSError as error:
            if not target.path.is_dir():  # somebody else who adds the same bundle may have been faster
                raise DataError(f"{target}: cannot be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _numbers(self, folder: str) -> list[int]:
        names = (self.folder / folder).names()
        return sorted(int(name.partition(".")[0]) for name in names if RECORD.fullmatch(name))

    def _kept(self, folder: str, number: int, kind: type[Kept]) -> Kept:
        return self._parse(folder, number, self._text(folder, number) or "", kind)

    def _text(self, folder: str, number: int) -> str | None:
        return (self.folder / folder).read_text(_file(number))

    def _parse(self, folder: str, number: int, text: str, kind: type[Kept]) -> Kept:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{self.folder / folder / _file(number)}: cannot be read: {error}") from error


def _file(number: int) -> str:
    return f"{number:06}.json"


def _text(record: Record) -> str:
    return record.model_dump_json(indent=1) + "\n"


def _signature() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        user = str(os.getuid())
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"when": when, "who": f"{user}@{socket.gethostname()}", "nonce": secrets.token_hex(8)}
