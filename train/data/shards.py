"""Tokenised examples in memory-mapped files, each made once, by whichever process comes first, and found by content.

The files of some records lie in a folder named by a hash of all that the tokens depend on. Each holds the examples of
`SHARD` rows and is written atomically, so a process that is killed leaves whole files, from which the next one goes on.
Several processes, of one host or of several that share the disk, divide the files among themselves: a claim beside a
file says that someone is at work on it. Claims only save work. Where one is lost, or its owner is dead, a file is made
twice, with the same content.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxsteer.io import Tokenizer
from train.data.columns import Columns, Row
from train.data.encoding import Encoding
from train.data.records import CHUNK, Records, Tally
from train.data.shard_file import Place, Shard, place_of, read, write
from train.data.tokenize import encode_rows

SHARD = 16_384
"""Rows whose examples are in one file."""

WORTH_SECONDS = 2.0
"""Records that fit one file and took less time than this to tokenise are not written."""

STALE_SECONDS = 60.0
"""A claim that was not renewed for so long is a dead process's; it is renewed after every chunk of examples."""

_POLL_SECONDS = 0.2

_FORMAT = 4
"""Version of the files; it is part of the folder's name, so that others are not found."""

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the number of rows, a context manager whose value is called with the number done so far."""


def unwatched(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A `Watch` that shows nothing."""
    return nullcontext(lambda done: None)


class Tokenised(NamedTuple):
    """The examples of records, of any length, and what was counted of all rows."""

    columns: list[Columns]
    tally: Tally


def tokenise_records(
    records: Records, tokenizer: Tokenizer, encoding: Encoding, cache: Path, *, watch: Watch = unwatched
) -> Tokenised:
    """Tokenise records, or find them tokenised.

    Args:
        records: what to tokenise.
        tokenizer: of the model.
        encoding: how; its maximum length does not matter.
        cache: the folder of all such files; created if needed. What cannot be written to it is kept in memory.
        watch: shows progress; entered only if there is more than one chunk of rows to tokenise.

    Returns:
        The examples in the order of the rows.

    Raises:
        ValueError: as `Records` and `encode`.
    """
    work = _Work(records, tokenizer, encoding.dated(tokenizer), cache)
    shards = work.found()
    if shards is None:
        with watch(len(records)) if len(records) > CHUNK else unwatched(0) as advance:
            shards = work.done(advance)
    return Tokenised([shard.columns for shard in shards], sum((shard.tally for shard in shards), Tally()))


@dataclass
class _Work:
    """What is to be tokenised, and where it is kept."""

    records: Records
    tokenizer: Tokenizer
    encoding: Encoding
    cache: Path

    @cached_property
    def folder(self) -> Path:
        """Named by a hash of everything that the tokens depend on."""
        digest = hashlib.sha256()

        def add(value: Any) -> None:
            digest.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")

        add([_FORMAT, SHARD, self.encoding.chat, self.encoding.date, self.encoding.loss_on])
        add([self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template])
        add([self.tokenizer.special_tokens_map, self.tokenizer.eos_token_id])
        add(self.records.key)
        return self.cache / digest.hexdigest()

    def found(self) -> list[Shard] | None:
        """All shards, if there are files of all of them and none is damaged. Damaged ones are deleted."""
        files = self._files()
        if not files or len(files) < next(iter(files)).of:
            return None
        shards = {place.number: self._read(path) for place, path in files.items()}
        whole = [shards[number] for number in sorted(shards)]
        return None if None in whole else whole  # type: ignore[return-value]

    def _files(self) -> dict[Place, Path]:
        """The files that are there."""
        with suppress(OSError):
            return {place: path for path in self.folder.iterdir() if (place := place_of(path))}
        return {}

    def _read(self, path: Path) -> Shard | None:
        if (shard := read(path)) is None:
            with suppress(OSError):
                path.unlink()
        return shard

    def done(self, advance: Callable[[int], None]) -> list[Shard]:
        """All shards, once this process and others have made those that are missing."""
        total = -(-len(self.records) // SHARD)
        shards = dict[int, Shard]()
        while len(shards) < total:
            before = len(shards)
            for place, path in self._files().items():
                if place.number not in shards and (shard := self._read(path)) is not None:
                    shards[place.number] = shard
            missing = [number for number in range(total) if number not in shards]
            if (made := self._make_one(missing, total, advance)) is not None:
                shards[made[0]] = made[1]
            elif missing and before == len(shards):
                time.sleep(_POLL_SECONDS)  # others are at work on all that is missing
            advance(min(len(shards) * SHARD, len(self.records)))
        return [shards[number] for number in range(total)]

    def _make_one(self, missing: list[int], total: int, advance: Callable[[int], None]) -> tuple[int, Shard] | None:
        """Make one of the missing shards; None if others are at work on all of them."""
        for number in missing:
            with _claim(self.folder / f"{number:05}.claim") as renew:
                if renew is None or any(place.number == number for place in self._files()):
                    continue  # someone is making it, or has just made it
                start, done = time.perf_counter(), (total - len(missing)) * SHARD

                def went_on(rows: int, renew: Callable[[], None] = renew, done: int = done) -> None:
                    renew()
                    advance(done + rows)

                shard = self._made(number, went_on)
                if total > 1 or time.perf_counter() - start >= WORTH_SECONDS:
                    with suppress(OSError):  # a full disk, or a folder that cannot be written to
                        self.folder.mkdir(parents=True, exist_ok=True)
                        shard = read(write(self.folder, Place(number, total), shard)) or shard
                return number, shard
        return None

    def _made(self, number: int, advance: Callable[[int], None]) -> Shard:
        """Tokenise one shard; `advance` is called with the number of its rows that are done."""
        rows, tally = list[Row](), Tally()
        first, stop = number * SHARD, min((number + 1) * SHARD, len(self.records))
        for start in range(first, stop, CHUNK):
            examples, _, counted = self.records.read(start, min(start + CHUNK, stop))
            rows += encode_rows(examples, self.tokenizer, self.encoding) if examples else []
            tally += counted
            advance(min(start + CHUNK, stop) - first)
        return Shard(Columns.of(rows), tally)


@contextmanager
def _claim(path: Path) -> Iterator[Callable[[], None] | None]:
    """Claim a shard while the block runs; gives what renews the claim, or None if another process has one.

    In a folder that cannot be written to, every claim is granted.
    """
    owner = f"{socket.gethostname()} {os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        granted = _created(path, owner) or (_is_stale(path) and _created(path, owner, again=True))
    except OSError:
        granted = True
    if not granted:
        yield None
        return

    def renew() -> None:
        with suppress(OSError):
            os.utime(path)

    try:
        yield renew
    finally:
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()  # where nothing was written


def _created(path: Path, owner: str, *, again: bool = False) -> bool:
    """Whether this process could create a claim; `again` replaces one."""
    if again:
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            file.write(owner)
    except FileExistsError:
        return False
    return True


def _is_stale(path: Path) -> bool:
    """Whether the process that made a claim is dead."""
    try:
        host, _, pid = path.read_text().rpartition(" ")
        renewed = path.stat().st_mtime
    except FileNotFoundError:
        return True  # given back meanwhile
    if host == socket.gethostname() and pid.isdecimal() and not _is_alive(int(pid)):
        return True
    return _now(path.parent) - renewed > STALE_SECONDS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system, which may be another host's."""
    probe = folder / f".{socket.gethostname()}.{os.getpid()}.clock"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
