"""The contents of uploaded and produced files, one file per id in one folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from fastapi import UploadFile

from flexllm.server.store import FileRecord, Store

PURPOSE, RESULT_PURPOSE = "fine-tune", "fine-tune-results"


class FileShelf:
    def __init__(self, folder: Path, store: Store) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._store = folder, store
        for part in folder.glob("*.part"):  # uploads that a crash cut short
            part.unlink()

    def path(self, file_id: str) -> Path:
        return self._folder / file_id

    def receive(self, upload: UploadFile) -> FileRecord:
        """Copy and validate an upload. Nothing is left of one that fails. Blocks; raises OSError when the disk is full."""
        from flexllm.finetune.data import iter_examples, validate_file

        record = self._new_record(Path(upload.filename or "upload").name, PURPOSE)
        part = self.path(record.id).with_suffix(".part")
        try:
            with part.open("wb") as out:
                shutil.copyfileobj(upload.file, out, 1 << 20)
            record.bytes = part.stat().st_size
            errors = validate_file(part)
            record.examples = 0 if errors else sum(1 for _ in iter_examples(part))
            record.status, record.status_details = ("error", "\n".join(errors)) if errors else ("processed", None)
            part.rename(self.path(record.id))
            self._store.files.insert(record, durable=True)
        except BaseException:
            part.unlink(missing_ok=True)
            self.path(record.id).unlink(missing_ok=True)
            raise
        return record

    def add_result(self, filename: str, content: str) -> FileRecord:
        record = self._new_record(filename, RESULT_PURPOSE)
        record.bytes, record.status = len(content.encode()), "processed"
        self.path(record.id).write_text(content)
        self._store.files.insert(record)
        return record

    def delete(self, file_id: str) -> None:
        self._store.files.delete(file_id)
        self.path(file_id).unlink(missing_ok=True)

    def _new_record(self, filename: str, purpose: str) -> FileRecord:
        return FileRecord(id=self._store.new_id("file"), created_at=int(time.time()), filename=filename, purpose=purpose, bytes=0)
