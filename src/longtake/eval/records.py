"""Files of records: a header line that says what they belong to, then one line of JSON per finished stream.

A run that finds its file goes on where it stopped; a line cut off by a crash is dropped. Shards of an
evaluation write a file each, `<name>-<shard>of<shards>.jsonl`, and skip what any of them has finished.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.io.files import write_whole

RecordT = TypeVar("RecordT", bound=Config)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "i/n", i from 0.

        Raises:
            EvalError: Not of that form, or i is not below n.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise EvalError(f"shard {text!r} is not i/n with 0 <= i < n", "use for instance 0/4")
        return cls(int(index), int(count))

    def of(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """This part of all items."""
        return items[self.index :: self.count]


class RecordFile(Generic[RecordT]):
    """One file of records of one kind.

    Args:
        path: The file; its directory is created by `resume`.
        kind: Class of the records.
        header: What two runs must share for their records to be put together.
    """

    def __init__(self, path: Path, kind: type[RecordT], header: Mapping[str, object]) -> None:
        self.path = path
        self._kind = kind
        self._header = header

    def resume(self) -> list[RecordT]:
        """Starts the file, or repairs it and gives the records that it holds.

        Raises:
            EvalError: The directory or the file cannot be written, or the file holds other records.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(
                f"cannot create the directory {str(self.path.parent)!r}: {error.strerror}",
                "give another --out",
            ) from error
        records = self.read() if self.path.exists() else []
        lines = [json.dumps(self._header), *(record.model_dump_json() for record in records)]
        with _told(self.path):
            write_whole(self.path, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        return records

    def append(self, records: Iterable[RecordT]) -> None:
        """Writes records through to the disk. Raises EvalError where that fails; those before stay whole."""
        with _told(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(record.model_dump_json() + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[RecordT]:
        """The whole records of the file.

        Raises:
            EvalError: It is no file of records, or one of another evaluation.
        """
        header, lines = read_lines(self.path)
        different = [name for name in self._header if header.get(name) != self._header[name]]
        if different:
            raise EvalError(
                f"{str(self.path)!r} holds records with another {', '.join(different)}",
                "use another --out or delete the file",
            )
        records = []
        for number, line in enumerate(lines, start=2):
            try:
                records.append(self._kind.loads(line, source=f"{self.path}:{number}"))
            except ConfigError as error:
                raise EvalError(error.problem, f"delete line {number}") from error
        return records


class ShardedRecords(Generic[RecordT]):
    """The files of all shards of one evaluation, of which one is this run's.

    Args:
        out: Directory of the files.
        name: What their names begin with.
        shard: This run's.
        kind: Class of the records.
        header: As in `RecordFile`.
    """

    def __init__(
        self, out: Path, name: str, shard: Shard, kind: type[RecordT], header: Mapping[str, object]
    ) -> None:
        self.out = out
        self._names = re.compile(rf"{re.escape(name)}-\d+of\d+\.jsonl")
        self._kind = kind
        self._header = header
        self._own = self._open(out / f"{name}-{shard.index}of{shard.count}.jsonl")

    def resume(self) -> list[RecordT]:
        """Starts or repairs this shard's file, and gives what all shards have finished.

        Raises:
            EvalError: The directory cannot be made, or a file holds other records.
        """
        self._own.resume()
        return self.read()

    def append(self, records: Iterable[RecordT]) -> None:
        """Writes records of this shard through to the disk."""
        self._own.append(records)

    def read(self) -> list[RecordT]:
        """The whole records of all shards.

        Raises:
            EvalError: As `RecordFile.read`.
        """
        files = sorted(path for path in self.out.iterdir() if self._names.fullmatch(path.name))
        return [record for path in files for record in self._open(path).read()]

    def _open(self, path: Path) -> RecordFile[RecordT]:
        return RecordFile(path, self._kind, self._header)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """A disk's refusal as an error of ours."""
    try:
        yield
    except OSError as error:
        raise EvalError(
            f"cannot write {str(path)!r}: {error.strerror}", "make room, or give another --out"
        ) from error


def read_lines(path: Path) -> tuple[dict[str, object], list[str]]:
    """Header and whole lines of a file of records.

    Raises:
        EvalError: It is no such file.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{str(path)!r} cannot be read as a file of records", "use another --out") from error
    try:
        header = json.loads(first)
    except ValueError as error:
        raise EvalError(f"{str(path)!r} is no file of records", "use another --out") from error
    if not isinstance(header, dict):
        raise EvalError(f"{str(path)!r} is no file of records", "use another --out")
    return header, lines[:-1]  # the last piece is empty, or was cut off
