"""Damaged and hostile files: a reader gives a value or one sentence, never another exception, a hang, or 2 GB of memory.

Every format is read a few hundred times in a process of its own, each time damaged in another way; a few thousand times
with SOAK=1 in the environment, as `make soak` does.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.arrays import load_arrays
from data.folds import read_splits
from data.metadata import read_norm
from dataset import PixelSetData, find_norm
from learning.checkpoints import STATE, FoldProgress, finished_folds
from learning.results import load_normalisation, save_normalisation, save_overall
from learning.run import read_run
from models.weights import load_weights, read_checkpoint
from tests.commands import run_train
from tests.folders import NOMENCLATURE, write_folder
from tests.processes import start, wait

# Damaged numbers may overflow; what counts is whether they are refused by one sentence, or read.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

N_INPUTS = 3000 if os.environ.get("SOAK") else 150
MEMORY, SECONDS = 2 * 2**30, 60
ODD_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    "",
    "x" * 300,
    "../../x",
    "20170231",
    [],
    {},
    [[]],
)
ODD_VALUES += ({"a": {}}, [1, "a"], "1e400", 1.5, "\ud800", "NaN", 10**400)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Damages a file in a few places, or cuts it."""
    if zipfile.is_zipfile(io.BytesIO(data)) and draw.random() < 0.7:
        return mutate_member(data, draw)
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        # Most of what a reader believes stands at the beginning or at the end.
        length = draw.choice((len(data), min(len(data), 200)))
        place = draw.randrange(length) if draw.random() < 0.7 else len(data) - 1 - draw.randrange(length)
        match draw.randrange(6):
            case 0:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place] = draw.randrange(256)
            case 2:
                del data[place + 1 :]
            case 3:
                data[place:place] = draw.randbytes(draw.randrange(1, 30))
            case 4:
                other = draw.randrange(len(data))
                data[place:place] = data[other : other + draw.randrange(1, 60)]
            case 5:
                number = struct.pack("<Q", draw.choice(ODD_NUMBERS))[: draw.choice((1, 2, 4, 8))]
                data[place : place + len(number)] = number
    return bytes(data)


def mutate_member(data: bytes, draw: random.Random) -> bytes:
    """Damages one file of an archive whose checksums are right again."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = draw.choice([name for name in names if name.endswith(".pkl")] or names)
    if draw.random() < 0.3:
        chosen = draw.choice(names)
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            content = source.read(name)
            archive.writestr(name, mutate(content, draw) if name == chosen and content else content)
    return target.getvalue()


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Puts an odd value or name somewhere into a JSON file; damages its bytes now and then."""
    if draw.random() < 0.3:
        return mutate(data, draw)
    value = node = json.loads(data)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(list(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        if isinstance(node, dict) and draw.random() < 0.3:
            moved = node.pop(key)
            if draw.random() < 0.5:
                node[draw.choice(("", "-1", "../x", "1e3", "0", str(2**64), " 1"))] = moved
        else:
            node[key] = draw.choice(ODD_VALUES)
        return json.dumps(value).encode()


def check_reader(
    path: Path,
    read: Callable[[], object],
    log: Path,
    change: Callable[[bytes, random.Random], bytes] = mutate,
) -> None:
    """Reads a file N_INPUTS times, damaged each time, in a child process."""
    original = path.read_bytes()

    def main() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        torch.set_num_threads(1)
        accepted = 0
        for i in range(N_INPUTS):
            path.write_bytes(change(original, random.Random(f"{path.name} {i}")))
            signal.alarm(SECONDS)
            try:
                read()
                accepted += 1
            except ValueError as error:
                sentence = type(error) in (UnicodeDecodeError, json.JSONDecodeError), str(error)
                if (
                    sentence[0]
                    or str(path.name.split(".")[0]) not in str(error)
                    and str(path.parent) not in str(error)
                ):
                    print(f"FAILED input {i}: not a sentence on the file: {error!r}")
                    traceback.print_exc(file=sys.stdout)
            except BaseException as error:
                print(f"FAILED input {i}: {error!r}"[:1000])
                traceback.print_exc(file=sys.stdout)
        signal.alarm(0)
        print(f"{accepted} of {N_INPUTS} accepted")

    pid = start(main, [], log)
    status = wait(pid)
    text = log.read_text()
    path.write_bytes(original)
    assert status == 0, f"input {path.name}: the process ended with {status}\n{text}"
    assert "FAILED" not in text, text[:6000]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and the state of a training in the middle of its second fold."""
    path = tmp_path_factory.mktemp("pristine")
    folder = write_folder(path / "set", n_parcels=12, statistics=True)
    PixelSetData(folder, NOMENCLATURE, 4)
    with pytest.MonkeyPatch.context() as patch:
        run_train(
            folder, path / "res", "--epochs 1 --mlp1 [4,8] --mlp3 [32,16] --n_head 2 --mlp4 [16,3]", patch
        )
    return path


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def read_dataset(folder: Path) -> None:
    """All that a training reads, and a batch."""
    dataset = PixelSetData(folder, NOMENCLATURE, 4, None, None, "geomfeat", jitter=None)
    find_norm(dataset)
    dataset.batch(range(len(dataset)))


def test_npy(place: Path, tmp_path: Path) -> None:
    folder = place / "set"

    def read() -> None:
        for path in folder.glob("*PACKED-*"):
            shutil.rmtree(path)
        read_dataset(folder)

    check_reader(folder / "DATA" / "3.npy", read, tmp_path / "log")


@pytest.mark.parametrize("name", ["labels", "dates", "geomfeat"])
def test_json_of_a_dataset(place: Path, tmp_path: Path, name: str) -> None:
    path = place / "set" / "META" / f"{name}.json"
    check_reader(path, lambda: read_dataset(place / "set"), tmp_path / "log", mutate_json)


def test_info_json(place: Path, tmp_path: Path) -> None:
    path = place / "set" / "META" / "info.json"
    info = {
        "nodata": 0,
        "bands": ["B2", "B3", "B4", "B8"],
        "crs": "EPSG:32631",
        "geomfeat": ["a", "b", "c", "d"],
    }
    path.write_text(json.dumps(info))
    check_reader(path, lambda: read_dataset(place / "set"), tmp_path / "log", mutate_json)


def test_folds_json(place: Path, tmp_path: Path) -> None:
    path = place / "folds.json"
    path.write_text(json.dumps({str(parcel): parcel % 3 + 1 for parcel in range(1, 13)}))
    check_reader(path, lambda: read_splits(path), tmp_path / "log", mutate_json)


def test_conf_json(place: Path, tmp_path: Path) -> None:
    check_reader(place / "res" / "conf.json", lambda: read_run(place / "res"), tmp_path / "log", mutate_json)


@pytest.mark.parametrize("name", ["trainlog.json", "test_metrics.json"])
def test_json_of_a_finished_fold(place: Path, tmp_path: Path, name: str) -> None:
    path = place / "res" / "Fold_1" / name
    check_reader(path, lambda: finished_folds(place / "res", 3), tmp_path / "log", mutate_json)


def test_pickled_mean_and_deviation(place: Path, tmp_path: Path) -> None:
    path = place / "set" / "S2-2017-T31TFM-meanstd.pkl"
    check_reader(path, lambda: read_norm(path, (5, 4)), tmp_path / "log")


def test_pickled_confusion_matrix(place: Path, tmp_path: Path) -> None:
    path = place / "res" / "Fold_2" / "conf_mat.pkl"
    check_reader(path, lambda: save_overall(place / "res", 3), tmp_path / "log")


def test_normalisation(place: Path, tmp_path: Path) -> None:
    save_normalisation(place / "res", (np.ones((5, 4)), np.ones((5, 4))), (np.ones(4), np.ones(4)))
    check_reader(
        place / "res" / "normalisation.npz", lambda: load_normalisation(place / "res"), tmp_path / "log"
    )


def test_checkpoint(place: Path, tmp_path: Path) -> None:
    path = place / "res" / "Fold_1" / "model.pth.tar"
    model = small_model()

    def read() -> None:
        load_weights(model, read_checkpoint(path)["state_dict"], path)

    check_reader(path, read, tmp_path / "log")


@pytest.mark.parametrize("averaged", [range(0), range(1, 2)], ids=["best", "mean"])
def test_state_of_a_training(place: Path, tmp_path: Path, averaged: range) -> None:
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    scores = {"val_IoU": 0.5, "val_loss": 1.0}
    folder = place / "res" / "Fold_3"
    FoldProgress(folder, model, optimizer, averaged).finish_epoch(scores)

    def read() -> None:
        progress = FoldProgress(folder, model, optimizer, averaged)
        progress.finish()
        assert all(x.isfinite().all() for x in model.state_dict().values())
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()

    check_reader(folder / STATE, read, tmp_path / "log")


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


@pytest.mark.parametrize("name", ["index.npz", "pixels.npy"])
def test_packed_store(place: Path, tmp_path: Path, name: str) -> None:
    # A copy of a folder has other times, so it is packed anew.
    read_dataset(place / "set")
    path = next((place / "set").glob("PACKED-*")) / name
    check_reader(path, lambda: read_dataset(place / "set"), tmp_path / "log")


def test_outlines(place: Path, tmp_path: Path) -> None:
    geopandas = pytest.importorskip(
        "geopandas", reason="vector files need the packages of requirements-geo.txt"
    )
    from shapely.geometry import box

    from preprocessing.parcels import read_outlines

    path = tmp_path / "parcels.gpkg"
    shapes = [box(i, 0, i + 1, 1) for i in range(20)]
    table = {"id": range(20), "label": [i % 3 for i in range(20)]}
    geopandas.GeoDataFrame(table, geometry=shapes, crs="EPSG:32631").to_file(path, driver="GPKG")
    check_reader(path, lambda: read_outlines(path, "id"), tmp_path / "log")


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    """For every reader of pickled files, with the usual way in: a call that leaves a trace."""
    trace, path = tmp_path / "trace", tmp_path / "file"
    command = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    path.write_bytes(command)
    with pytest.raises(ValueError, match="os.system|posix.system"):
        load_arrays(path)
    checkpoint = io.BytesIO()
    torch.save({"epoch": 1, "state_dict": {}}, checkpoint)
    source, target = zipfile.ZipFile(checkpoint), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, command if name.endswith("data.pkl") else source.read(name))
    for data in (command, target.getvalue()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../7", "..", "7/../../8", "-1", "1e3", "０", "7 "])
def test_ids_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Ids are whole numbers wherever they come from; as file names or keys of META, others are refused or without effect."""
    folder = write_folder(tmp_path / "set", n_parcels=4)
    outside = sorted(tmp_path.rglob("*"))
    for meta in ("labels", "geomfeat"):
        path = folder / "META" / f"{meta}.json"
        value = json.loads(path.read_text())
        (value[NOMENCLATURE] if meta == "labels" else value)[name] = 1 if meta == "labels" else [1, 2, 3, 4]
        path.write_text(json.dumps(value))
    dataset = PixelSetData(folder, NOMENCLATURE, 4, None, None, "geomfeat")
    assert dataset.pid == ["1", "2", "3", "4"]
    made = {p for p in tmp_path.rglob("*") if p not in outside}
    assert all(
        p.is_relative_to(folder) and p.name.startswith((".PACKED", "PACKED", "pixels", "index", "missing"))
        for p in made
    )
