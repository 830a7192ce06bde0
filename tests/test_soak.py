"""Long runs: nothing grows, and processes may share a store. With SOAK=1 in the environment, as long as real ones."""

import gc
import os
import threading
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

import train
from data.packing import open_store
from dataset import PixelSetData
from learning import crossvalidation
from learning.checkpoints import FoldProgress
from tests.folders import NOMENCLATURE, write_folder
from tests.processes import contents, start, wait

LONG = bool(os.environ.get("SOAK"))
EPOCHS = 200 if LONG else 30
MOST_GROWTH = 8 * 2**20  # bytes, between two thirds of an equally long run each


def usage() -> tuple[int, int]:
    """Bytes of this process in memory, and its open files once nothing of a loader is about to end any more."""
    gc.collect()
    for process in active_children():
        process.join()
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # closes a pipe when it has sent its last
            thread.join()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("n_workers", [0, 1])
def test_training_does_not_grow(tmp_path: Path, n_workers: int) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=30)
    epochs = EPOCHS if n_workers == 0 else EPOCHS // 5  # starting workers takes most of the time
    measured = tmp_path / "measured"

    def main() -> None:
        gc.freeze()  # what the tests before have left need not be looked through every time
        finish = FoldProgress.finish_epoch

        def finish_and_measure(self, scores) -> bool:
            with open(measured, "a") as file:
                print(*usage(), file=file)
            return finish(self, scores)

        FoldProgress.finish_epoch = finish_and_measure
        crossvalidation.count_workers = lambda asked: n_workers
        train.choose_splits = lambda *args, split=train.choose_splits: split(*args)[:1]
        train.main()

    line = f"--dataset_folder {folder} --res_dir {tmp_path / 'res'} --kfold 3 --npixel 6 --batch_size 8"
    pid = start(main, [*line.split(), "--epochs", str(epochs)], tmp_path / "log")
    assert wait(pid) == 0, (tmp_path / "log").read_text()
    memory, files = zip(*(map(int, row.split()) for row in measured.read_text().splitlines()))
    assert len(memory) == epochs
    third = epochs // 3
    assert max(memory[-third:]) - max(memory[third:-third]) < MOST_GROWTH, memory
    assert max(files[third:]) <= max(files[:third]), files


def test_a_store_that_four_processes_open_at_once(tmp_path: Path) -> None:
    """One of them packs; the others wait, and all read the same."""
    folder = write_folder(tmp_path / "set", n_parcels=40 if not LONG else 400)

    def main() -> None:
        dataset = PixelSetData(folder, NOMENCLATURE, 6).evaluation(1)
        (pixels, _), _ = dataset.batch(range(len(dataset)))
        torch.save(pixels.sum(), tmp_path / f"sum{os.getpid()}")

    for _ in range(10 if LONG else 2):
        for path in folder.glob("PACKED-*/*"):
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        pids = [start(main, [], tmp_path / "log") for _ in range(4)]
        assert [wait(pid) for pid in pids] == [0] * 4, (tmp_path / "log").read_text()
        sums = [torch.load(tmp_path / f"sum{pid}") for pid in pids]
        assert len(set(map(float, sums))) == 1
        assert len(list(folder.glob("*PACKED-*"))) == 1
        open_store(folder)
        assert not any(name.startswith(".PACKED-") for name in contents(folder))
