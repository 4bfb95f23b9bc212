"""What the server must not forget: files, jobs, their events and checkpoints, adapters. SQLite in WAL mode.

Every record is a msgspec struct, kept as JSON beside the few columns that are searched. Ids sort by creation, so a page's
cursor is an id and stays valid when records come or go. `insert(..., durable=True)` has reached the disk when it returns;
other writes survive the death of the process, though perhaps not of the machine.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from flexllm.config import FinetuneConfig
from flexllm.peft.config import PeftConfig
from flexllm.server.protocol import peft_from_plain


class FileRecord(msgspec.Struct, kw_only=True):
    id: str
    created_at: int
    filename: str
    purpose: str
    bytes: int
    status: str = "uploaded"  # uploaded | processed | error
    status_details: str | None = None
    examples: int = 0  # usable lines of a training file


class JobRecord(msgspec.Struct, kw_only=True):
    """A finetuning job as the API shows it, and all it takes to run it again. `prepared`: its data is tokenized."""

    id: str
    created_at: int
    model: str
    training_file: str
    status: str  # validating_files | queued | running | paused | succeeded | failed | cancelled
    seed: int
    finetune: FinetuneConfig
    peft: PeftConfig
    learning_rate_multiplier: float
    validation_file: str | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    init_adapter: str | None = None  # the folder of the fine-tuned model it continues
    tenant: str = ""  # the OpenAI-Project that made it
    prepared: bool = False
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    step: int = 0  # optimizer steps reported
    valid_step: int = 0  # the step of the latest validation pass reported
    total_steps: int = 0
    result_files: list[str] = msgspec.field(default_factory=list)
    error: dict[str, str | None] | None = None

    @property
    def is_final(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")


class EventRecord(msgspec.Struct, kw_only=True):
    id: str
    created_at: int
    job_id: str
    message: str
    level: str = "info"  # info | warn | error
    type: str = "message"  # message | metrics
    data: dict[str, Any] | None = None


class CheckpointRecord(msgspec.Struct, kw_only=True):
    id: str
    created_at: int
    job_id: str
    model: str  # the name it is served under
    step_number: int
    metrics: dict[str, float | None]


class AdapterRecord(msgspec.Struct, kw_only=True):
    """A served adapter. Its id is the model's name."""

    id: str
    created_at: int
    path: str
    job_id: str | None = None  # None: loaded by a user


Record = TypeVar("Record", FileRecord, JobRecord, EventRecord, CheckpointRecord, AdapterRecord)


@dataclass(frozen=True)
class Page(Generic[Record]):
    data: list[Record]
    has_more: bool


class Table(Generic[Record]):
    """Records of one type. `owner` names the field that the table can be filtered by."""

    def __init__(self, store: Store, name: str, record_type: type[Record], owner: str) -> None:
        self._store, self._name, self._owner = store, name, owner
        self._type: type[Record] = record_type
        store.execute(f"CREATE TABLE IF NOT EXISTS {name} (id TEXT PRIMARY KEY, owner TEXT, body BLOB NOT NULL)")
        store.execute(f"CREATE INDEX IF NOT EXISTS {name}_by_owner ON {name} (owner, id)")

    def insert(self, record: Record, *, durable: bool = False) -> None:
        """Raises sqlite3.IntegrityError when the id is taken."""
        self._store.execute(f"INSERT INTO {self._name} VALUES (?, ?, ?)", self._row(record), durable=durable)

    def update(self, record: Record, *, durable: bool = False) -> None:
        row = self._row(record)
        self._store.execute(f"UPDATE {self._name} SET owner = ?, body = ? WHERE id = ?", (row[1], row[2], row[0]), durable=durable)

    def delete(self, record_id: str) -> None:
        self._store.execute(f"DELETE FROM {self._name} WHERE id = ?", (record_id,))

    def get(self, record_id: str) -> Record | None:
        rows = self._store.execute(f"SELECT body FROM {self._name} WHERE id = ?", (record_id,))
        return self._decode(rows[0]) if rows else None

    def page(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        descending: bool = True,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[Record]:
        """The `limit` records that follow the id `after`, newest first unless `descending` is False."""
        where: list[str] = ["1"]
        values: list[Any] = []
        if after is not None:
            where.append(f"id {'<' if descending else '>'} ?")
            values.append(after)
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        for key, value in (metadata or {}).items():
            where.append("EXISTS (SELECT 1 FROM json_each(body, '$.metadata') WHERE key = ? AND value = ?)")
            values += [key, value]
        order = "DESC" if descending else "ASC"
        rows = self._store.execute(
            f"SELECT body FROM {self._name} WHERE {' AND '.join(where)} ORDER BY id {order} LIMIT ?", (*values, limit + 1)
        )
        return Page([self._decode(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def all(self, owner: str | None = None) -> Iterator[Record]:
        """Oldest first; records may be changed or deleted on the way."""
        page = Page[Record]([], has_more=True)
        while page.has_more:
            page = self.page(after=page.data[-1].id if page.data else None, limit=500, descending=False, owner=owner)
            yield from page.data

    def _row(self, record: Record) -> tuple[str, str | None, str]:
        return record.id, getattr(record, self._owner), msgspec.json.encode(record).decode()

    def _decode(self, row: tuple[str]) -> Record:
        return msgspec.json.decode(row[0], type=self._type, dec_hook=peft_from_plain)


class Store:
    """One connection, serialized by a lock: any thread may call. Raises sqlite3.OperationalError when the disk is full."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._last_id_time = 0
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self.files = Table(self, "files", FileRecord, owner="purpose")
        self.jobs = Table(self, "jobs", JobRecord, owner="status")
        self.events = Table(self, "events", EventRecord, owner="job_id")
        self.checkpoints = Table(self, "checkpoints", CheckpointRecord, owner="job_id")
        self.adapters = Table(self, "adapters", AdapterRecord, owner="job_id")

    def new_id(self, prefix: str) -> str:
        """Opaque to clients; later ids sort after earlier ones of the same prefix."""
        with self._lock:
            self._last_id_time = max(self._last_id_time + 1, time.time_ns() // 1000)
            return f"{prefix}-{self._last_id_time:013x}{secrets.token_hex(5)}"

    def execute(self, sql: str, values: tuple[Any, ...] = (), *, durable: bool = False) -> list[Any]:
        with self._lock:
            if durable:
                self._connection.execute("PRAGMA synchronous=FULL")
            try:
                return self._connection.execute(sql, values).fetchall()
            finally:
                if durable:
                    self._connection.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        with self._lock:
            self._connection.close()
