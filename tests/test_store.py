"""The packed store: its content, when it is made again, and what remains when packing is cut short."""

import copy
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data import files, moments, packing
from data import store as module
from data.files import Files
from data.packing import open_store
from data.store import PixelStore
from tests.folders import write_folder
from tests.processes import contents, kill_at_every_stage, start, stop_when, wait, wait_until_stopped, watch

IDS = (3, 11, 2, 100, 7, 41)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "dataset", 6, ids=IDS, sizes=(0, 1, 7, 30, 2, 9))


def packs(parent: Path) -> list[str]:
    return sorted(
        path.name for path in parent.iterdir() if "PACKED" in path.name and not path.name.endswith(".lock")
    )


def read_all(store: PixelStore) -> np.ndarray:
    """All pixels through the store's own reading, (pixels, T * C)."""
    rows = torch.arange(int(store.sizes.sum())).unsqueeze(1)
    return store.read(rows, store.n_dates).flatten(1).double().numpy()


def check(store: PixelStore, folder: Path) -> None:
    """The store holds exactly the pixels of the files."""
    ids = sorted(int(path.stem) for path in (folder / "DATA").glob("*.npy"))
    assert store.ids.tolist() == ids
    pixels = read_all(store)
    for i, parcel in enumerate(ids):
        expected = np.load(folder / "DATA" / f"{parcel}.npy")
        assert (store.n_dates, store.n_channels) == expected.shape[:2]
        assert store.sizes[i] == expected.shape[2]
        first = store.sizes[:i].sum()
        rows = pixels[first : first + store.sizes[i]]
        np.testing.assert_array_equal(rows.reshape(-1, *expected.shape[:2]), expected.transpose(2, 0, 1))


# -------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("in_memory", [False, True])
def test_content_equals_the_files(folder, in_memory):
    store = open_store(folder, in_memory=in_memory)
    assert store.ids.tolist() == sorted(IDS)
    check(store, folder)
    places, pixels = torch.tensor([4, 1, 0, 5]), torch.tensor([[6, 0], [0, 0], [1, 1], [29, 3]])
    found = store.read(store.locate(places, pixels), store.n_dates)
    for place, chosen, values in zip(places, pixels, found):
        file = np.load(folder / "DATA" / f"{sorted(IDS)[place]}.npy")
        expected = file[:, :, chosen] if file.shape[2] else np.zeros((5, 4, 2))
        np.testing.assert_array_equal(values.permute(1, 2, 0), expected)


@pytest.mark.parametrize("dtype", ["u2", "f4", "i8"])
def test_pixels_of_parcels_with_dates_of_their_own(folder, dtype):
    """Beyond a parcel's own dates anything may be read, but nothing is read beyond the file."""
    for i, parcel in enumerate(IDS):
        path = folder / "DATA" / f"{parcel}.npy"
        np.save(path, np.load(path)[: 1 + i % 5].astype(dtype))
    store = open_store(folder)
    assert store.n_dates is None
    places, pixels = torch.tensor([5, 1, 2, 0, 4]), torch.tensor([[29, 0], [0, 0], [1, 0], [6, 3], [0, 8]])
    found = store.read(store.locate(places, pixels), 5)
    assert found.shape == (5, 2, 5, 4)
    for place, chosen, values in zip(places.tolist(), pixels, found):
        own = store.parcel(place)
        expected = own[chosen] if len(own) else np.zeros((2, *own.shape[1:]))
        np.testing.assert_array_equal(values[:, : own.shape[1]], expected)


def test_a_pickled_store_is_opened_again_not_copied(tmp_path):
    folder = write_folder(tmp_path, 6, sizes=[2000] * 6)
    for in_memory in (False, True):
        store = open_store(folder, in_memory=in_memory)
        data = pickle.dumps(store)
        assert len(data) < 1000
        check(pickle.loads(data), folder)
        assert pickle.loads(data).in_memory == in_memory


# --------------------------------------------------------------------------------------------- when it is packed


def test_second_opening_packs_nothing(folder, monkeypatch):
    first = open_store(folder)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    monkeypatch.delattr(packing, "_pack")
    second = open_store(folder)
    assert second.path == first.path
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before


def add(data: Path) -> None:
    np.save(data / "1.npy", np.full((5, 4, 3), 9, np.uint16))


def remove(data: Path) -> None:
    (data / "11.npy").unlink()


def change_size(data: Path) -> None:
    np.save(data / "11.npy", np.full((5, 4, 3), 9, np.uint16))


def change_values(data: Path) -> None:
    """The same size, written later."""
    stat = (data / "100.npy").stat()
    np.save(data / "100.npy", np.load(data / "100.npy") + 1)
    os.utime(data / "100.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**6))


def rename(data: Path) -> None:
    (data / "11.npy").rename(data / "12.npy")


@pytest.mark.parametrize("change", [add, remove, change_size, change_values, rename])
def test_a_changed_folder_is_packed_again_and_the_old_pack_removed(folder, change):
    first = open_store(folder)
    first.statistics("date")
    earlier = first.path
    del first  # what is open is never removed
    change(folder / "DATA")
    second = open_store(folder)
    assert second.path != earlier and packs(folder) == [second.path.name]
    check(second, folder)
    pixels = read_all(second)
    np.testing.assert_allclose(second.statistics("date")[0].reshape(-1), pixels.mean(0), rtol=1e-6)


@pytest.mark.parametrize("in_child", [False, True])
def test_a_pack_that_is_read_stays(folder, in_child):
    first = open_store(folder)
    earlier, pixels = first.path, read_all(first)
    view = copy.copy(first)
    if in_child:  # as a loading process, which is forked
        ready, go = os.pipe(), os.pipe()
        if not (pid := os.fork()):
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0 if (read_all(view) == pixels).all() and earlier.exists() else 1)
        os.read(ready[0], 1)
        del first, view
    add(folder / "DATA")
    second = open_store(folder)
    assert second.path != earlier and earlier.exists()
    if in_child:
        os.write(go[1], b"1")
        assert os.waitpid(pid, 0)[1] == 0
    else:
        np.testing.assert_array_equal(read_all(view), pixels)
        del first, view
    del second
    remove(folder / "DATA")
    third = open_store(folder).path.name
    assert packs(folder) == [third]  # nobody reads the others now


def test_pixels_are_packed_once_for_every_value_that_means_missing(folder, monkeypatch):
    values = np.load(folder / "DATA" / "7.npy")
    values[2, :, 0] = 200  # one pixel on one date
    np.save(folder / "DATA" / "7.npy", values)
    plain = open_store(folder)
    monkeypatch.delattr(packing, "_pack")
    other = open_store(folder, nodata=200)
    place = other.ids.tolist().index(7)
    assert other.path == plain.path and plain.complete.all()
    assert np.flatnonzero(~other.complete).tolist() == [place]
    means = [store.statistics("date")[0] for store in (plain, other)]
    pixels = read_all(plain).reshape(-1, plain.n_dates, plain.n_channels)
    present = ~(pixels == 200).all(2)
    expected = (pixels * present[:, :, None]).sum(0) / present.sum(0)[:, None]
    np.testing.assert_allclose(means[0], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(means[1], expected, rtol=1e-6)
    monkeypatch.setattr(module, "presence", None)  # known already
    for nodata, complete in ((None, plain.complete), (200, other.complete)):
        np.testing.assert_array_equal(open_store(folder, nodata=nodata).complete, complete)


def test_infinity_is_refused_unless_it_means_missing(tmp_path):
    folder = write_folder(tmp_path, 6, dtype=np.float32)
    values = np.load(folder / "DATA" / "3.npy")
    values[1, :, 0] = np.inf
    np.save(folder / "DATA" / "3.npy", values)
    assert open_store(folder, nodata=np.inf).complete.tolist() == [i != 3 for i in range(1, 7)]
    with pytest.raises(UserError, match=r"3\.npy contains infinity"):
        open_store(folder)


def test_other_files_beside_the_parcels_do_not_matter(folder):
    path = open_store(folder).path
    for name in ("Thumbs.db", ".DS_Store", "._11.npy", "notes.txt"):
        (folder / "DATA" / name).write_text("")
    assert open_store(folder).path == path


def test_a_folder_that_moves_keeps_its_pack(folder, tmp_path, monkeypatch):
    open_store(folder)
    folder.rename(tmp_path / "moved")
    monkeypatch.delattr(packing, "_pack")
    check(open_store(tmp_path / "moved"), tmp_path / "moved")


def test_two_datasets_of_one_name_share_a_cache(tmp_path):
    folders = [write_folder(tmp_path / place / "dataset", seed=i) for i, place in enumerate("ab")]
    stores = [open_store(folder, tmp_path / "cache") for folder in folders]
    for _ in range(2):
        for folder, store in zip(folders, stores):
            assert not packs(folder)
            check(store, folder)
        add(folders[0] / "DATA")  # the pack of the other must stay
        stores = [open_store(folder, tmp_path / "cache") for folder in folders]
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ------------------------------------------------------------------------------------------- cut short, at once


def test_packing_killed_at_every_stage_is_made_again(folder, tmp_path):
    path = open_store(folder).path
    packed, earlier = contents(path), path.with_name("PACKED-earlier")

    def before() -> None:
        """An outdated pack lies there; what a killed process had finished may not save the next one the work."""
        if path.exists():
            assert contents(path) == packed  # what has its final name is complete
            shutil.rmtree(earlier, ignore_errors=True)
            path.rename(earlier)

    killed = kill_at_every_stage(
        lambda: open_store(folder), [], folder, tmp_path / "log", before, every_time=True
    )
    assert contents(path) == packed
    check(open_store(folder), folder)
    assert packs(folder) == [path.name]  # and nothing beside it
    # Every file of DATA is read for its header, then for its values, while pixels.npy is written.
    reached = {f"read DATA/{parcel}.npy anew {time}" for parcel in IDS for time in (1, 2)}
    # So few pixels reach the disk at the end, in one piece.
    reached |= {f"{step} 1" for step in ("write .PACKED-*/pixels.npy", "write .PACKED-*/index.npz")}
    reached |= {"within .PACKED-*/index.npz 1"}
    reached |= {"remove .PACKED-*/pixels.npy anew 1", "rmdir .PACKED-* anew 1"}  # what a killed process left
    reached |= {
        f"rename {path.name} 1",
        "remove PACKED-earlier/pixels.npy anew 1",
        "rmdir PACKED-earlier anew 1",
    }
    assert reached <= set(killed)


def test_two_processes_at_once_pack_once(folder, tmp_path):
    def pack(name: str, *stops) -> int:
        def main() -> None:
            steps = tmp_path / f"{name}.steps"
            steps.touch()
            watch(folder, lambda step, path: steps.write_text(f"{steps.read_text()}{step} {path}\n"))
            stop_when(folder, *stops)
            open_store(folder)

        return start(main, [], tmp_path / "log")

    first = pack("first", lambda: any(name.startswith(".PACKED-") for name in packs(folder)))
    wait_until_stopped(first)
    second = pack("second", lambda: True, lambda: True)
    wait_until_stopped(second)
    os.kill(second, signal.SIGCONT)
    wait_until_stopped(second)  # at its second attempt to get the lock
    assert (tmp_path / "second.steps").read_text() == "write .PACKED.lock\n" * 2
    for pid in (first, second):
        os.kill(pid, signal.SIGCONT)
        assert wait(pid) == 0, (tmp_path / "log").read_text()
    read = [(tmp_path / f"{name}.steps").read_text().count("read DATA/") for name in ("first", "second")]
    assert read == [2 * len(IDS), 0]  # one read the files, one waited
    check(open_store(folder), folder)


def test_a_failed_packing_leaves_nothing(folder, monkeypatch):
    def interrupt(files: Files, i: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Files, "parcel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_store(folder)
    assert not packs(folder)


def test_a_file_that_changes_while_it_is_packed_is_reported(folder, monkeypatch):
    read = files._read_header

    def replace(name: Path) -> tuple[tuple[int, int, int], np.dtype]:
        header = read(name)
        if name.name == "7.npy":
            np.save(name, np.ones((5, 4, 3)))
        return header

    monkeypatch.setattr(files, "_read_header", replace)
    with pytest.raises(UserError, match=r"7\.npy changed or vanished"):
        open_store(folder)
    assert not packs(folder)


# --------------------------------------------------------------------------------------------------- no room


def test_no_room_is_said_before_packing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"needs 0\.0 GB .* 0\.0 GB are free; .* --cache_dir"):
        open_store(folder)
    assert not packs(folder)


def test_a_place_that_cannot_be_written_is_reported(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written in .*file.* --cache_dir"):
            open_store(folder, cache)
    check(open_store(folder, tmp_path / "new" / "cache"), folder)


def test_a_folder_that_may_only_be_read_is_reported(folder, monkeypatch, tmp_path):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packing, "FileLock", refuse)  # root writes anywhere, whatever a folder's mode says
    with pytest.raises(UserError, match=r"cannot be written in .*\(Permission denied\); .* --cache_dir"):
        open_store(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_to_write(folder, tmp_path):
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="--cache_dir"):
            open_store(folder)
        check(open_store(folder, tmp_path / "cache"), folder)
    finally:
        folder.chmod(0o755)


def test_a_damaged_pack_is_reported(folder):
    path = open_store(folder).path
    (path / "pixels.npy").write_bytes((path / "pixels.npy").read_bytes()[:200])
    with pytest.raises(UserError, match=r"PACKED-\w+ is damaged .* remove it"):
        open_store(folder)
    shutil.rmtree(path)
    check(open_store(folder), folder)


def test_memory_that_does_not_suffice_is_reported(folder, monkeypatch):
    open_store(folder)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(UserError, match="do not fit into memory; leave --preload out"):
        open_store(folder, in_memory=True)


# ------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "dtype, offset, spread", [("u2", 60000, 3), ("i4", 10**9, 5), ("f8", 1e7, 1e-2), ("f4", 1e6, 1)]
)
@pytest.mark.parametrize("chunk", [2**14, 7])
def test_statistics_of_nearly_constant_large_values(tmp_path, monkeypatch, dtype, offset, spread, chunk):
    """Sums of squares about zero would lose every digit here."""
    monkeypatch.setattr(moments, "_MOST_PIXELS", chunk)
    folder, random = write_folder(tmp_path, 6, dtype=dtype), np.random.default_rng(0)
    for parcel in range(1, 7):
        noise = random.uniform(-spread, spread, (5, 4, 50 + parcel)) + parcel * spread / 10
        np.save(folder / "DATA" / f"{parcel}.npy", (offset + noise).astype(dtype))
    store = open_store(folder)
    mean, std = store.statistics("date")
    pixels = read_all(store)
    exact = pixels - offset
    assert mean.shape == std.shape == (5, 4) and mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean.reshape(-1), pixels.mean(0), rtol=1e-7)
    np.testing.assert_allclose(std.reshape(-1), exact.std(0), rtol=1e-5)


def test_statistics_are_computed_once(folder, monkeypatch):
    store = open_store(folder)
    mean, std = store.statistics("date")
    monkeypatch.delattr(module, "Moments")
    for again in (store, open_store(folder)):
        np.testing.assert_array_equal(again.statistics("date"), (mean, std))
    assert (store.path / "statistics-date-nan.npz").stat().st_mode & 0o777 == (
        store.path / "index.npz"
    ).stat().st_mode & 0o777


def test_statistics_of_a_pack_that_may_only_be_read(folder, monkeypatch):
    expected = open_store(folder, folder.parent / "cache").statistics("date")

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "write_bytes", refuse)
    np.testing.assert_array_equal(open_store(folder).statistics("date"), expected)
