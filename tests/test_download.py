"""preprocessing.download against a local server that speaks Zenodo's record interface, and hostile archives."""

import hashlib
import io
import json
import shutil
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.errors import UserError
from preprocessing import archives, download
from preprocessing.archives import unpack
from preprocessing.download import RECORDS, next_step
from tests.processes import contents, kill_at_every_stage

NUMBER = RECORDS["weights"]


class Service(ThreadingHTTPServer):
    """A record service that can misbehave.

    Attributes:
        files: content by name.
        breaks: bytes after which each of the next answers breaks off.
        ranges: whether parts of files are served.
        asked: Range headers of all requests for files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.ranges = True
        self.asked: list[str | None] = []
        self.record: object = None

    def describe(self) -> object:
        return self.record or {
            "id": NUMBER,
            "files": [
                {
                    "key": name,
                    "size": len(content),
                    "checksum": f"md5:{hashlib.md5(content).hexdigest()}",
                    "links": {"self": f"{self.url}/files/{name}/content"},
                }
                for name, content in self.files.items()
            ],
        }


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        if self.path == f"/api/records/{NUMBER}":
            return self.answer(200, json.dumps(self.server.describe()).encode())
        name = self.path.removeprefix("/files/").removesuffix("/content")
        if name not in self.server.files:
            return self.answer(404, b"no such thing")
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        return self.answer(206 if start else 200, self.server.files[name][start:], breaks=True)

    def answer(self, status: int, body: bytes, breaks: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if breaks and self.server.breaks:
            body = body[: self.server.breaks.pop(0)]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(download, "PATIENCE", 0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def make_tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def files_in(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
    }


WEIGHTS = {"run/Fold_1/model.pth.tar": bytes(range(256)) * 40, "run/Fold_1/conf.json": b"{}"}


@pytest.mark.parametrize("name, make", [("w.tar.gz", make_tar), ("w.zip", make_zip)])
def test_downloads_checks_and_unpacks(
    name: str, make, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    service.files = {name: make(WEIGHTS), "readme.txt": b"how to"}
    folder = tmp_path / "new"
    assert download.download("weights", folder, service.url) == [folder / "run", folder / "readme.txt"]
    assert files_in(folder) == {*WEIGHTS, "readme.txt"}
    assert (folder / "run/Fold_1/model.pth.tar").read_bytes() == WEIGHTS["run/Fold_1/model.pth.tar"]
    assert "2 file(s)" in capsys.readouterr().out
    assert next_step("weights", folder).startswith(
        f"Next: python inference.py --weight_dir {folder / 'run'} "
    )

    service.asked.clear()
    assert download.download("weights", folder, service.url) == [folder / "run", folder / "readme.txt"]
    assert service.asked == []  # all there, nothing asked for again


def test_goes_on_where_it_broke_off(service: Service, tmp_path: Path) -> None:
    content = bytes(i * i % 251 for i in range(10_000))
    service.files, service.breaks = {"big.bin": content}, [3000, 2500]
    download.download("weights", tmp_path, service.url)
    assert (tmp_path / "big.bin").read_bytes() == content
    assert service.asked == [None, "bytes=3000-", "bytes=5500-"]


def test_goes_on_in_another_call(service: Service, tmp_path: Path) -> None:
    content = bytes(i * i % 251 for i in range(10_000))
    service.files, service.breaks = {"big.bin": content}, [4000] + [0] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"4 kB of 10 kB are there.*again to go on"):
        download.download("weights", tmp_path, service.url)
    assert files_in(tmp_path) == set()
    service.asked.clear()
    download.download("weights", tmp_path, service.url)
    assert (tmp_path / "big.bin").read_bytes() == content and service.asked == ["bytes=4000-"]


def test_killed_at_every_stage(service: Service, tmp_path: Path) -> None:
    """What is there is never taken for more than it is, and the same command goes on."""
    archive, log, folder = make_tar(WEIGHTS | {"other/a.txt": b"a"}), tmp_path / "log", tmp_path / "to"
    service.files = {"w.tar.gz": archive, "big.bin": bytes(i * i % 251 for i in range(3_000))}
    expected = {"big.bin": service.files["big.bin"], **WEIGHTS, "other/a.txt": b"a"}
    killed = kill_at_every_stage(lambda: download.download("weights", folder, service.url), [], folder, log)
    hidden = [path.name for path in folder.iterdir() if path.name[0] == "."]
    assert all(name == ".w.tar.gz.unpacked" or name.endswith(".unfinished") for name in hidden)
    assert {name: data for name, data in contents(folder).items() if name[0] != "."} == expected
    for name in ("big.bin", "w.tar.gz"):
        assert {f"write .{name}.part", f"within .{name}.part", f"rename {name}"} <= set(killed)
    unpacking = ".unpacking-w.tar.gz"
    steps = {
        f"{step} {unpacking}/{name}" for name in (*WEIGHTS, "other/a.txt") for step in ("write", "within")
    }
    assert steps | {"rename run", "rename other", "rename .w.tar.gz.unpacked"} <= set(killed)
    assert "remove w.tar.gz anew" in killed and f"rmdir {unpacking} anew" in killed


def test_what_is_unpacked_needs_no_more_room(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.files = {"w.tar.gz": make_tar(WEIGHTS)}
    expected = download.download("weights", tmp_path, service.url)
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert download.download("weights", tmp_path, service.url) == expected


def test_starts_again_where_the_server_cannot_go_on(service: Service, tmp_path: Path) -> None:
    content = bytes(i * i % 251 for i in range(10_000))
    service.files, service.breaks, service.ranges = {"big.bin": content}, [7000], False
    download.download("weights", tmp_path, service.url)
    assert (tmp_path / "big.bin").read_bytes() == content


def test_refuses_a_file_with_another_checksum(service: Service, tmp_path: Path) -> None:
    service.files = {"a.bin": b"right" * 100}
    service.record = service.describe()
    service.files = {"a.bin": b"wrong" * 100}
    with pytest.raises(UserError, match=r"a\.bin was damaged .* not md5:"):
        download.download("weights", tmp_path, service.url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": "../evil"}, "the name of"),
        ({"key": "/etc/x"}, "the name of"),
        ({"size": "many"}, "many"),
        ({"checksum": "none"}, "the checksum of"),
        ({"links": {"self": "file:///etc/passwd"}}, "the url of"),
        ({"links": {}}, "does not describe files"),
    ],
)
def test_distrusts_the_record(change: dict, message: str, service: Service, tmp_path: Path) -> None:
    service.files = {"a.bin": b"abc"}
    record = service.describe()
    record["files"][0].update(change)
    service.record = record
    with pytest.raises(UserError, match=message):
        download.download("weights", tmp_path, service.url)
    assert list(tmp_path.iterdir()) == [] and service.asked == []


def test_says_what_is_wrong_with_the_service(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="answers 404"):
        download.download("sentinel-agri", tmp_path, service.url)
    service.record = ["something else"]
    with pytest.raises(UserError, match="does not describe files"):
        download.download("weights", tmp_path, service.url)
    service.record = {
        "files": [{"key": "a", "size": 3, "checksum": "md5:00", "links": {"self": f"{service.url}/x"}}]
    }
    with pytest.raises(UserError, match="/x answers 404"):
        download.download("weights", tmp_path, service.url)
    monkeypatch.setattr(download, "TIMEOUT", 2)
    with pytest.raises(UserError, match="cannot be reached"):
        download.download("weights", tmp_path, "http://127.0.0.1:9")


def test_asks_for_room_first(service: Service, tmp_path: Path) -> None:
    service.files = {"a.bin": b"abc"}
    record = service.describe()
    record["files"][0]["size"] = 10**18
    service.record = record
    with pytest.raises(UserError, match=r"free, the files take 1000000000\.0 GB"):
        download.download("weights", tmp_path, service.url)
    assert service.asked == []


@pytest.mark.parametrize(
    "name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "C:\\out.txt", "a\\..\\out"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_refuses_members_that_lead_elsewhere(kind: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    archive = folder / f"x.{kind}"
    members = {"good.txt": b"1", name: b"2"}
    archive.write_bytes(make_zip(members) if kind == "zip" else make_tar(members, "w"))
    with pytest.raises(UserError, match="is hostile"):
        unpack(archive, folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [archive.name]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_refuses_links_and_devices_in_tar(kind: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("thing")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        unpack(archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_refuses_links_in_zip(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        info = zipfile.ZipInfo("thing")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        unpack(archive, tmp_path)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_refuses_bombs_before_they_fill_the_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_BASE", 10_000)
    members = {"small": b"1", "zeros": bytes(3_000_000)}
    archive = tmp_path / f"x.{kind}"
    archive.write_bytes(make_zip(members) if kind == "zip" else make_tar(members))
    with pytest.raises(UserError, match="unpacks to more than"):
        unpack(archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]
    monkeypatch.setattr(archives, "MOST_BASE", 10_000_000)
    monkeypatch.setattr(archives, "MOST_FILES", 1)
    with pytest.raises(UserError, match="or 1 files"):
        unpack(archive, tmp_path)


def test_a_zip_cannot_hold_more_than_it_says(tmp_path: Path) -> None:
    data = bytearray(make_zip({"zeros": bytes(3_000_000)}))
    size = (3_000_000).to_bytes(4, "little")
    while (place := data.find(size)) >= 0:  # in the local header and in the directory
        data[place : place + 4] = (10).to_bytes(4, "little")
    archive = tmp_path / "x.zip"
    archive.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        unpack(archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_damaged_archives_leave_nothing(kind: str, tmp_path: Path) -> None:
    whole = {"zip": make_zip, "tar": lambda members: make_tar(members, "w"), "tar.gz": make_tar}[kind](
        WEIGHTS
    )
    archive = tmp_path / f"x.{kind}"
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        unpack(archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_overwrites_nothing(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    archive.write_bytes(make_zip({"a/b.txt": b"new", "c.txt": b"new"}))
    (tmp_path / "c.txt").write_text("old")
    with pytest.raises(UserError, match="c.txt exists already"):
        unpack(archive, tmp_path)
    assert (tmp_path / "c.txt").read_text() == "old" and not (tmp_path / "a").exists()


def test_names_the_folder_to_go_on_with(tmp_path: Path) -> None:
    assert "has no folder DATA" in next_step("sentinel-agri", tmp_path)
    (tmp_path / "a b" / "DATA").mkdir(parents=True)
    expected = f"python train.py --dataset_folder '{tmp_path / 'a b'}' --res_dir"
    assert expected in next_step("sentinel-agri", tmp_path)
