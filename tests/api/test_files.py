"""Files: upload and its validation, pages, content, deletion."""

from __future__ import annotations

import errno
import json

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.conftest import MODEL, Server, eventually, training_lines


def upload(client: OpenAI, content: bytes, name: str = "train.jsonl") -> openai.types.FileObject:
    return client.files.create(file=(name, content), purpose="fine-tune")


def test_life_of_a_file(client: OpenAI) -> None:
    content = training_lines(5)
    file = upload(client, content)
    assert file.object == "file"
    assert (file.bytes, file.filename, file.purpose) == (len(content), "train.jsonl", "fine-tune")
    assert client.files.wait_for_processing(file.id, max_wait_seconds=5).status == "processed"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_pages(client: OpenAI, http: httpx.Client) -> None:
    ids = [upload(client, training_lines(1), f"{i}.jsonl").id for i in range(5)]
    assert ids == sorted(ids)
    listed = [f.id for f in client.files.list(limit=2, order="asc")]  # the client walks the pages
    assert [i for i in listed if i in ids] == ids
    newest = [f.id for f in client.files.list(limit=2)]
    assert newest[:5] == ids[::-1]
    page = http.get("/v1/files", params={"limit": 2}).json()
    assert page["object"] == "list"
    assert page["has_more"] is True
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    assert http.get("/v1/files", params={"purpose": "assistants"}).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    client.files.delete(page["data"][-1]["id"])  # a cursor outlives its record
    assert http.get("/v1/files", params={"after": page["last_id"], "limit": 1}).json()["data"]


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 10**6}, {"limit": "x"}, {"order": "sideways"}])
def test_bad_page_parameters(http: httpx.Client, params: dict[str, object]) -> None:
    response = http.get("/v1/files", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(params))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no examples"),
        (b"\n\n", "no examples"),
        (training_lines(2) + b"\n{oops", "line 3"),
        (training_lines(1) + b'\n\n{"messages": []}', "line 3"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), "line 1"),
        (b'{"text": "x", "colour": "red"}', "colour"),
        (b"\xff\xfe\x00", "line 1"),
    ],
)
def test_a_bad_file_says_where(client: OpenAI, content: bytes, reason: str) -> None:
    file = upload(client, content)
    assert file.status == "error"
    assert file.status_details
    assert reason in file.status_details
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    assert caught.value.param == "training_file"
    assert reason in str(caught.value)


def test_bad_uploads(http: httpx.Client) -> None:
    before = len(http.get("/v1/files").json()["data"])
    for options, param in (
        ({"files": {"file": b"x"}, "data": {"purpose": "assistants"}}, "purpose"),
        ({"files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": b"x"}, "data": {"purpose": "fine-tune", "expires_after[anchor]": "created_at"}}, "expires_after[anchor]"),
    ):
        response = http.post("/v1/files", **options)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    broken = http.post("/v1/files", content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400
    assert len(http.get("/v1/files").json()["data"]) == before


def test_no_upload_leaves_parts_behind(server: Server, client: OpenAI) -> None:
    upload(client, b"{bad")
    assert not list((server.state_dir / "files").glob("*.part"))


def test_a_full_disk(client: OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted((server.state_dir / "files").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("flexllm.server.shelf.shutil.copyfileobj", refuse)
        with pytest.raises(openai.InternalServerError) as caught:
            upload(client, training_lines(1))
    assert caught.value.status_code == 503
    assert caught.value.code == "storage_error"
    assert sorted((server.state_dir / "files").iterdir()) == before
    assert upload(client, training_lines(1)).status == "processed"


def test_file_names_are_only_names(client: OpenAI, server: Server) -> None:
    file = upload(client, training_lines(1), "../../etc/passwd")
    assert file.filename == "passwd"
    assert (server.state_dir / "files" / file.id).exists()


def test_a_file_in_use_cannot_be_deleted(client: OpenAI) -> None:
    file = upload(client, training_lines(40))
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, hyperparameters={"n_epochs": 100})
    with pytest.raises(openai.ConflictError):
        client.files.delete(file.id)
    client.fine_tuning.jobs.cancel(job.id)
    eventually(lambda: client.files.delete(file.id).deleted)
