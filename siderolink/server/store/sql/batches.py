"""Group commit: works that are queued together share one database transaction and one disk write.

The works of a batch run concurrently on the stored state and buffer their changes. They are then settled in the order in which
they were queued: a work that read what an earlier one changes is postponed to the next batch and runs again there, so the
result is the same as running them one after another. New unique values (random ids and addresses) are not looked up first: if
the database refuses one, nothing is stored and the batch runs again with lookups.
"""

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

import aiosqlite
import anyio

from siderolink.common.errors import StoreError
from siderolink.server.store.base import Work
from siderolink.server.store.feed import Change
from siderolink.server.store.sql import statements
from siderolink.server.store.sql.batch_reads import Key, Reader
from siderolink.server.store.sql.file import translated
from siderolink.server.store.sql.transaction import SqlTransaction

log = logging.getLogger(__name__)

MAX_BATCH = 256


class _Pending:
    """A queued item and the future of its result."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def succeed(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Job(_Pending):
    """A work that shares a database transaction with others."""

    def __init__(self, work: Work[Any]) -> None:
        super().__init__()
        self.work = work
        self.transaction: SqlTransaction
        self.result: Any = None
        self.error: Exception | None = None
        self.has_run = False

    @property
    def is_read_only(self) -> bool:
        return self.has_run and not self.transaction.has_written

    async def run(self, reader: Reader, is_checked: bool) -> None:
        self.transaction, self.error = SqlTransaction(reader, is_checked=is_checked), None
        try:
            self.result = await self.work(self.transaction)
        except Exception as error:
            self.error = error
        self.has_run = True

    def settle(self) -> None:
        if self.error is not None:
            self.fail(self.error)
        else:
            self.succeed(self.result)


class _Lone(_Pending):
    """Something to run on the connection outside any transaction."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def run(self) -> None:
        try:
            with translated():
                await self._work()
        except Exception as error:
            self.fail(error)
        except BaseException:
            self.fail(StoreError("the store is closed"))
            raise
        self.succeed(None)


class Batches:
    """Runs works on one connection's driver, batch by batch.

    All of them run in the task of `run`: SQLAlchemy closes a connection when its user is cancelled during a statement, and this
    connection is shared.
    """

    def __init__(
        self, driver: aiosqlite.Connection, on_changes: Callable[[Sequence[Change]], None], may_write: Callable[[], None]
    ) -> None:
        """`may_write` raises StoreError if nothing can be stored at the moment."""
        self._driver = driver
        self._may_write = may_write
        self._on_changes = on_changes
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._lone: deque[_Lone] = deque()
        self._is_closing = False
        self._ended = asyncio.Event()

    async def submit(self, work: Work[Any]) -> Any:
        """Run a work; returns its result once that is durable. Raises what the work raises, or StoreError."""
        if self._is_closing:
            raise StoreError("the store is closed")
        job = _Job(work)
        self._waiting.append(job)
        self._wake.set()
        return await job.future

    async def alone(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run something on the connection outside any transaction, between two batches.

        It runs to its end even if the caller is cancelled. Raises what it raises, or StoreError.
        """
        if self._is_closing:
            raise StoreError("the store is closed")
        lone = _Lone(work)
        self._lone.append(lone)
        self._wake.set()
        await lone.future

    async def close(self) -> None:
        """Wait until `run` has finished the queued works."""
        self._is_closing = True
        self._wake.set()
        await self._ended.wait()

    async def run(self) -> None:
        """Run the queued works until closed."""
        try:
            while self._waiting or self._lone or not self._is_closing:
                await self._wake.wait()
                if not self._is_closing:
                    self._wake.clear()
                while self._waiting or self._lone:
                    if self._waiting:
                        await self._run_next()
                    if self._lone and not (lone := self._lone.popleft()).future.cancelled():
                        await lone.run()
        finally:
            self._is_closing = True
            self._ended.set()
            for pending in (*self._waiting, *self._lone):
                pending.fail(StoreError("the store is closed"))

    async def _run_next(self) -> None:
        jobs = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        jobs = [job for job in jobs if not job.future.cancelled()]
        try:
            await self._run_batch(jobs)
        except BaseException:
            for job in jobs:
                job.fail(StoreError("the store is closed"))
            raise

    async def _run_batch(self, jobs: list[_Job]) -> None:
        taken, put_off = jobs, list[_Job]()
        failure: StoreError | None = None
        try:
            with translated():
                try:
                    taken, put_off = await self._attempt(jobs, is_checked=False)
                except sqlite3.IntegrityError:  # a value is already stored: find out whose it is
                    taken, put_off = await self._attempt(jobs, is_checked=True)
        except StoreError as error:
            failure = error
        except Exception as error:  # an unexpected error fails these works, but no later ones
            log.exception("works of the store failed")
            failure = StoreError(f"the state cannot be read or written: {type(error).__name__}")
        self._waiting.extendleft(reversed(put_off))
        changes: list[Change] = []
        for job in taken:
            if failure is not None and not job.is_read_only:
                job.error = job.error or failure
            elif job.error is None:
                changes += job.transaction.changes
        for job in taken:
            job.settle()
        if changes:  # published after the callers resume, so that they have applied their own changes by then
            self._on_changes(changes)

    async def _attempt(self, jobs: list[_Job], *, is_checked: bool) -> tuple[list[_Job], list[_Job]]:
        """Run the jobs and commit. Returns the committed jobs, and those that have to run again."""
        try:
            await _run_side_by_side(jobs, Reader(statements.SqliteFinder(self._driver)), is_checked)
            taken, put_off = _settle(jobs)
            changed = [job.transaction for job in taken if job.error is None and job.transaction.has_written]
            if changed:
                self._may_write()
                await _write(self._driver, changed)
                await self._driver.commit()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._driver.rollback()
            raise
        return taken, put_off


async def _run_side_by_side(jobs: list[_Job], reader: Reader, is_checked: bool) -> None:
    # asyncio's task groups cost half of anyio's, and there is one task per join
    async with asyncio.TaskGroup() as reading:
        answering = reading.create_task(reader.run())
        async with asyncio.TaskGroup() as works:
            for job in jobs:
                works.create_task(job.run(reader, is_checked))
        answering.cancel()


def _settle(jobs: list[_Job]) -> tuple[list[_Job], list[_Job]]:
    """Split jobs into those without conflicts and those that have to run again after them."""
    taken, put_off = [], []
    written: set[Key] = set()
    for job in jobs:
        transaction = job.transaction
        if written.isdisjoint(transaction.reads) and written.isdisjoint(transaction.writes):
            taken.append(job)
            if job.error is None:
                written |= transaction.writes
        else:
            put_off.append(job)
    return taken, put_off


async def _write(driver: aiosqlite.Connection, transactions: Sequence[SqlTransaction]) -> None:
    """Write the transactions' changes; begins a database transaction only if there are any."""
    rows = {machine_id: row for transaction in transactions for machine_id, row in transaction.rows.items()}
    known = [machine_id for transaction in transactions for machine_id in transaction.stored.intersection(transaction.rows)]
    await statements.replace_machines(driver, known, [row for row in rows.values() if row is not None])
    for transaction in transactions:
        await _write_one(driver, transaction)
    if any(transaction.audited for transaction in transactions):
        numbers = count(await statements.last_audit(driver) + 1)
        for transaction in transactions:
            transaction.number_audit(numbers)
        await statements.add_audit(driver, [entry for transaction in transactions for entry in transaction.audited])


async def _write_one(driver: aiosqlite.Connection, transaction: SqlTransaction) -> None:
    """Write the changes that are not written for all transactions at once."""
    if transaction.claimed:
        await statements.replace_claims(driver, transaction.claimed)
    if transaction.bans:
        await statements.set_bans(driver, transaction.bans)
    if transaction.tokens.has_changes:
        await statements.set_tokens(driver, transaction.tokens)
    if transaction.ownership.owners or transaction.ownership.put_servers:
        await statements.set_ownership(driver, transaction.ownership)
    if transaction.named:
        await statements.set_principals(driver, transaction.named)
    if transaction.record is not None:
        await statements.set_server(driver, transaction.record)
    if transaction.seen:
        await statements.note(driver, transaction.seen, transaction.noted_at)
    if transaction.happened:
        await statements.add_history(driver, transaction.happened)
