from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from context_diffusion.core import event_log
from context_diffusion.core.errors import ConfigError, ErrorCode, RowError, StorageError
from context_diffusion.core.uris import normal, relative, resolve
from context_diffusion.inputs.url_policy import check_allowed
from context_diffusion.storage import filesystem
from context_diffusion.storage.filesystem import Storage

STORAGE = Storage(deadline_s=2)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3')}/out"


def test_create_never_overwrites_and_replace_does(folder: str) -> None:
    uri = f"{folder}/deep/part-00000.parquet"
    assert STORAGE.create(uri, b"first")
    assert STORAGE.create(uri, b"second") is False
    assert STORAGE.read(uri) == b"first"
    STORAGE.replace(uri, b"third")
    assert STORAGE.read(uri) == b"third"
    assert STORAGE.list(f"{folder}/deep") == ["part-00000.parquet"]
    STORAGE.delete(uri)
    STORAGE.delete(uri)
    assert not STORAGE.exists(uri)
    assert STORAGE.list(f"{folder}/never") == []


def test_of_many_writers_at_once_one_wins(folder: str) -> None:
    uri, won, gate = f"{folder}/one", [], threading.Barrier(6)

    def write(number: int) -> None:
        gate.wait()
        if STORAGE.create(uri, b"%d" % number * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert STORAGE.read(uri) == b"%d" % won[0] * 1000


def test_one_put_whatever_the_size_and_a_lost_answer_is_ones_own_write(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    calls: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def losing(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        result = await call(self, method, *args, **kwargs)
        if method == "put_object" and calls.count("put_object") == 1:
            raise ConnectionResetError("the answer was lost")
        return result

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", losing)
    data = bytes(6 * 2**20)
    assert STORAGE.create(f"{s3}/large", data) is True
    assert calls.count("put_object") == 2
    assert not [name for name in calls if "multipart" in name]


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless files", "none here"])
@pytest.mark.parametrize("way", ["create", "replace"])
def test_an_error_at_any_step_of_a_local_write_leaves_what_was_there(
    way: str, nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call into the system fails in turn, with an error that no second try mends; the bytes go two by
    two."""
    calls = ("open", "write", "fsync", "link", "replace", "chmod")
    real = {name: getattr(os, name) for name in calls}
    count, failing = 0, 0

    def step(name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[name](args[0], args[1][:2]) if name == "write" else real[name](*args, **kwargs)

        return called

    for failing in range(1, 20):
        count, folder = 0, tmp_path / str(failing)
        folder.mkdir()
        before = {} if way == "create" else {"part": b"old"}
        for name, data in before.items():
            (folder / name).write_bytes(data)
        with monkeypatch.context() as patched:
            for name in calls:
                patched.setattr(os, name, step(name))
            if not nameless:
                patched.delattr(os, "O_TMPFILE")
            with contextlib.suppress(StorageError):
                getattr(STORAGE, way)(str(folder / "part"), b"new!")
                before = {"part": b"new!"}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        if count < failing:
            break
    assert 5 <= count < failing


def test_without_nameless_files_creating_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    assert STORAGE.create(str(tmp_path / "part"), b"first")
    assert STORAGE.create(str(tmp_path / "part"), b"second") is False
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("part", b"first")]


def test_a_rows_file(folder: str) -> None:
    STORAGE.replace(f"{folder}/a.bin", b"12345")
    assert STORAGE.read_input(f"{folder}/a.bin", 5) == b"12345"
    for name, most, code in (("a.bin", 4, ErrorCode.FILE_TOO_LARGE), ("none.bin", 5, ErrorCode.MISSING_FILE)):
        with pytest.raises(RowError, match=name) as caught:
            STORAGE.read_input(f"{folder}/{name}", most)
        assert caught.value.code == code


def test_a_fingerprint_tells_versions_apart_and_globs_keep_their_scheme(folder: str) -> None:
    uri = f"{folder}/m.csv"
    STORAGE.replace(uri, b"aaaa")
    before = STORAGE.fingerprint(uri)
    assert STORAGE.fingerprint(uri) == before
    STORAGE.replace(uri, b"bbbb")
    assert STORAGE.fingerprint(uri) != before
    assert STORAGE.glob(f"{folder}/*.csv") == [uri]
    with STORAGE.open(uri) as file:
        file.seek(2)
        assert file.read() == b"bb"
    assert STORAGE.read_range(uri, 1, 2) == b"bb"


def test_all_files_below_a_folder_whatever_its_name(folder: str) -> None:
    wanted = [f"{folder}/own [1]/a.bin", f"{folder}/own [1]/deeper/b.bin"]
    for uri in (*wanted, f"{folder}/elsewhere.bin"):
        STORAGE.replace(uri, b"1")
    assert STORAGE.files(f"{folder}/own [1]") == wanted
    assert STORAGE.files(f"{folder}/nowhere") == []


def test_a_passing_fault_is_tried_again_a_final_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec.implementations.local as local

    (tmp_path / "a").write_bytes(b"data")
    tries: list[str] = []
    cat = local.LocalFileSystem.cat_file

    def failing(self: Any, path: str, **kwargs: Any) -> bytes:
        tries.append(path)
        if len(tries) < 3:
            raise ConnectionResetError("reset")
        return cat(self, path, **kwargs)

    monkeypatch.setattr(local.LocalFileSystem, "cat_file", failing)
    assert STORAGE.read(str(tmp_path / "a")) == b"data"
    assert len(tries) == 3
    with pytest.raises(FileNotFoundError):
        STORAGE.read(str(tmp_path / "b"))
    assert len(tries) == 4


def test_a_store_that_is_waited_for_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.processes import point_to

    monkeypatch.setattr(event_log, "FIRST_S", 0.5)
    point_to(monkeypatch, "http://127.0.0.1:9", "some", "keys")  # nobody listens there
    with pytest.raises(StorageError, match="s3://nowhere/x"):
        Storage({"s3": {"config_kwargs": {"retries": {"max_attempts": 0}}}}, deadline_s=3).read(
            "s3://nowhere/x"
        )
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(r"waiting, \d s: s3://nowhere/x is retried for up to 3 s: EndpointConnectionError", line)


def test_it_travels() -> None:
    assert pickle.loads(pickle.dumps(STORAGE)) == STORAGE


@pytest.mark.parametrize("name", ["100%.png", "a b#c?.png", "%20.png", "é/ü.png"])
def test_odd_names_survive(name: str, tmp_path: Path) -> None:
    uri = resolve(name, str(tmp_path))
    STORAGE.create(uri, b"x")
    assert (tmp_path / name).read_bytes() == b"x"
    assert STORAGE.read_input(f"file://{uri}", 9) == b"x"


def test_relative_uris_are_the_manifests() -> None:
    assert resolve("img/a.png", "s3://b/m") == "s3://b/m/img/a.png"
    assert resolve("/abs/a.png", "/m") == "/abs/a.png"
    assert resolve("gs://x/a.png", "/m") == "gs://x/a.png"


@pytest.mark.parametrize(
    ("uri", "allow"),
    [
        ("s3://bucket/dir/a.png", ["s3://bucket/dir"]),
        ("S3://bucket/dir/a.png", ["s3://bucket/dir/"]),
        ("file:///data/in/a.png", ["/data/in"]),
        ("/data/in/x/../a.png", ["file:///data/in"]),
    ],
)
def test_what_lies_under_a_prefix_is_read(uri: str, allow: list[str]) -> None:
    check_allowed(uri, allow)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/dir2/a.png",
        "s3://bucket/dir/../secret",
        "s3://other/dir/a.png",
        "/data/in/../../etc/passwd",
        "/data/input2/a.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "zip://a.png::s3://bucket/dir/x.zip",
        "simplecache::s3://bucket/dir/a.png",
        "github://org:repo@main/a.png",
        "local:///etc/passwd",
    ],
)
def test_all_else_is_forbidden(uri: str) -> None:
    with pytest.raises(RowError) as caught:
        check_allowed(uri, ["s3://bucket/dir", "/data/in"])
    assert caught.value.code == ErrorCode.FORBIDDEN_URI


def test_a_symbolic_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RowError, match="allow"):
        check_allowed(str(tmp_path / "in" / "link"), [str(tmp_path / "in")])


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.8", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
def test_http_hosts_of_the_inner_network_are_forbidden(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (address, 0))])
    with pytest.raises(RowError, match="not public"):
        check_allowed("https://pictures.example/a.png", ["https://pictures.example"])


@pytest.mark.parametrize(
    ("uri", "package", "command"),
    [
        ("gs://b/m.parquet", "gcsfs", "context-diffusion[gcs]"),
        ("az://c/x", "adlfs", "context-diffusion[azure]"),
    ],
)
def test_a_protocol_whose_package_is_missing_names_what_installs_it(
    uri: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # missing, though it be here
    with pytest.raises(ConfigError, match=re.escape(f"pip install '{command}'")):
        Storage().exists(uri)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("/data/rows/a/q.png", "a/q.png"),
        ("/data/q.png", "../q.png"),
        ("file:///data/rows/q.png", "q.png"),
        ("q.png", "q.png"),
        ("s3://bucket/q.png", "s3://bucket/q.png"),
        ("https://example.com/q.png", "https://example.com/q.png"),
    ],
)
def test_a_local_path_is_told_relative_to_the_manifest_and_found_again(uri: str, told: str) -> None:
    base = "/data/rows"
    assert relative(uri, base) == told
    if not uri.startswith("q"):
        assert normal(resolve(told, base)) == normal(uri)
    assert relative(uri, "s3://bucket/rows") == uri


@pytest.mark.timeout(60)
def test_missing_credentials_are_told_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are not waited for as long as a store is."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(filesystem, "CREDENTIALS_S", 1)
    with pytest.raises(ConfigError, match=r"NoCredentialsError.*set AWS_ACCESS_KEY_ID.*storage_options"):
        Storage(deadline_s=3600).exists("s3://bucket/rows.jsonl")
    with pytest.raises(RowError, match="NoCredentialsError") as row:
        Storage(deadline_s=3600).read_input("s3://bucket/a.png", 10)
    assert row.value.code == ErrorCode.UNREADABLE_FILE


def test_a_quoted_name_of_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"x")
    with pytest.raises(
        RowError, match=r"percent signs are not decoded in local paths: did you mean '.*a b\.png'"
    ):
        Storage().read_input(f"file://{tmp_path}/a%20b.png", 10)
