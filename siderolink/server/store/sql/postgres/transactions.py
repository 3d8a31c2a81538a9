"""Runs one work in one database transaction: reads without locks, then locks, checks, writes and commits in one round trip.

A work buffers its changes until it has run. Then everything that it read and will change is locked: absent rows and sets by
transaction-level advisory locks, existing rows by row locks. All works lock in the same order, so there is no deadlock. The
database compares the rows with those that were read; if they have changed, the work runs again. New unique values (random ids
and addresses) are not looked up first: if a unique constraint refuses one, the work runs again with lookups. A retry takes the
locks of the attempt before it reads.
"""

import random
from collections.abc import Collection, Iterable, Sequence, Set
from hashlib import blake2b
from typing import TypeGuard, TypeVar

import anyio
from psycopg import AsyncConnection as Driver
from psycopg import Error as DriverError

from siderolink.common.errors import StoreError, StoreUnavailableError
from siderolink.common.tasks import to_its_end
from siderolink.server.store.base import Work
from siderolink.server.store.rows import Machine
from siderolink.server.store.sql.batch_reads import Found, Key, answers, is_optimistic, seek
from siderolink.server.store.sql.cells import cell
from siderolink.server.store.sql.postgres import queries
from siderolink.server.store.sql.postgres.database import ContendedError, Database, answer_awaited, is_outcome_unknown
from siderolink.server.store.sql.postgres.queries import Step, Version
from siderolink.server.store.sql.transaction import SqlTransaction

T = TypeVar("T")

ATTEMPTS = 20
_AWAY_ATTEMPTS = 3


def _number(key: Key) -> int:
    """The number of a key's advisory lock."""
    name, value = key
    found = cell(value)
    data = found if isinstance(found, bytes) else repr(found).encode()
    return int.from_bytes(blake2b(name.encode() + b"\0" + data, digest_size=8).digest(), signed=True)


def _locks(keys: Iterable[Key]) -> list[Step]:
    numbers = sorted({_number(key) for key in keys})
    return [queries.lock(numbers)] if numbers else []


class _Reads:
    """See `Reads`. Reads each key once for one work."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._wanted: set[Key] = set()
        self._answers: dict[Key, Found] = {}
        self._asked: list[Key] = []
        self._versions: dict[int, Version] = {}
        self.rounds = 0

    def want(self, keys: Iterable[Key]) -> None:
        self._wanted |= {key for key in keys if key not in self._answers}

    async def read(self, key: Key) -> Found:
        if key not in self._answers:
            wanted, self._wanted = [*(self._wanted | {key})], set()
            self.rounds += 1
            self._asked += wanted
            with answer_awaited():
                rows, versions = await queries.read(self._driver, seek(wanted))
            self._versions |= versions
            found = answers(wanted, rows)
            for one in wanted:
                answer = self._answers[one] = found.get(one)
                if isinstance(answer, Machine):
                    self._answers.setdefault(("id", answer.id), answer)
        return self._answers[key]

    def check(self, keys: Set[Key], *, is_locking: bool) -> list[Step]:
        """Steps that fail if the value of any key has changed. Raises ContendedError if that is already known."""
        asked = [key for key in self._asked if key in keys]
        expected: dict[str, str] = {}
        for key in asked:
            answer = self._answers[key]
            for one in answer if _is_set(answer) else () if answer is None else (answer,):
                row, version = self._versions[id(one)]
                if expected.setdefault(row, version) != version:
                    raise ContendedError("the rows read have changed")
        return [queries.check(seek(asked), expected, is_locking=is_locking)] if asked else []


def _is_set(answer: Found) -> TypeGuard[Sequence[object]]:
    """Distinguishes a set from one row; a Ban is a tuple, too."""
    return isinstance(answer, list)


class _Attempt:
    """One attempt to run a work."""

    def __init__(self, *, is_checked: bool, locks: Collection[Key]) -> None:
        self._is_checked = is_checked
        self.locks = set(locks)
        """Locks to take before reading."""
        self.is_committing = False
        self.has_changed = False
        """Whether there are changes for the feed."""

    async def run(self, driver: Driver, work: Work[T]) -> T:
        is_held = bool(self.locks)
        if is_held:
            await _send(driver, [queries.BEGIN, *_locks(self.locks)])
        reads = _Reads(driver)
        transaction = SqlTransaction(reads, is_checked=self._is_checked)
        result = await work(transaction)
        read = {key for key in transaction.reads if key in transaction.writes or not is_optimistic(key)}
        steps: list[Step] = []
        if transaction.has_written:
            keys = read | (transaction.writes - {("id", machine_id) for machine_id in transaction.seen})
            self.locks |= keys
            # without a COMMIT of its own, the driver could not tell which statement an error at the end is of
            steps += [] if is_held else [queries.BEGIN]
            steps += [*_locks(keys), *reads.check(read, is_locking=True), *queries.writes(transaction), queries.COMMIT]
        elif reads.rounds > 1:
            steps += reads.check(read, is_locking=False)
        if steps:
            self.is_committing = transaction.has_written
            await _send(driver, steps)
        self.has_changed = bool(transaction.changes or transaction.audited)
        return result


async def _send(driver: Driver, steps: Iterable[Step]) -> None:
    """In one round trip."""
    with answer_awaited():
        await _run(driver, steps)


async def _run(driver: Driver, steps: Iterable[Step]) -> None:
    failure: DriverError | None = None
    try:
        async with driver.pipeline(), driver.cursor() as cursor:
            try:
                for statement, given in steps:
                    if len(given) == 1:
                        await cursor.execute(statement.text, statement.values(given[0]))
                    elif given:
                        await cursor.executemany(statement.text, [statement.values(one) for one in given])
            except DriverError as error:
                failure = error  # raised below: otherwise the pipeline would log the skipped statements
    except DriverError as error:
        failure = failure or error
    if failure is not None:
        raise failure


async def run_work(database: Database, work: Work[T], *, urgent: bool = False) -> tuple[T, bool]:
    """The work's result after its commit, and whether it made changes for the feed.

    Raises what the work raises, or StoreError.
    """
    locks: set[Key] = set()
    is_checked, away = False, 0
    for number in range(ATTEMPTS):
        attempt = _Attempt(is_checked=is_checked, locks=locks)
        try:
            async with database.driver(urgent=urgent) as driver:
                # a caller that is cancelled must not leave the connection in the middle of something
                return await to_its_end(attempt.run(driver, work)), attempt.has_changed
        except ContendedError as error:
            if error.is_unique and is_checked and number > 2:
                raise StoreError("the database holds a value that may not be repeated") from error
            is_checked = is_checked or error.is_unique
            locks = attempt.locks
        except StoreUnavailableError as error:
            away += 1
            if attempt.is_committing and is_outcome_unknown(error):
                raise StoreUnavailableError(f"{error}; the change may have been stored") from error
            if attempt.is_committing or away == _AWAY_ATTEMPTS:
                raise
            await anyio.sleep(0.1 * 2**away)
        await anyio.sleep(random.uniform(0, 0.002 * number))
    raise StoreUnavailableError("the database is too busy: other transactions keep changing the same rows")
