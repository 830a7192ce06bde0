"""Tries and measures this code on a GPU: the tests marked gpu, then training epochs, in one table.

make gpu                                            with PYTHON=... a Python that has PyTorch for CUDA
python -m benchmarks.cuda [--out FILE] [--quick]

The epochs are of as many parcels as Sentinel2-Agri has, which are made in the GPU's memory from a hundred simulated ones.
Nothing but the hundred is written or read. What a few steps took is taken for all of an epoch's.
"""

import common  # isort: skip  # noqa: F401  # before torch, see there

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import DEFAULT, N_CLASSES
from benchmarks.plain import PlainClassifier
from common.errors import UserError, run_cli
from common.files import write_bytes
from common.flags import Parser
from common.machine import prepare_device
from common.progress import progress_bar
from data.samplers import BatchSampler, evaluation_batch
from data.settings import DataSettings
from dataset import PixelSetData, batch_loader, find_norm
from learning.engine import OPTIMIZERS, ReplayedSteps, evaluation, train_epoch
from learning.focal_loss import FocalLoss
from learning.options import resolve_architecture
from learning.weight_init import weight_init
from models.architecture import DataShape, read_preset
from preprocessing.simulate import simulate
from reports.figure2 import all_configurations

PARCELS, BATCH_SIZE = 115_021, 128  # of Sentinel2-Agri, and of the published training
IMITATED_KERNELS = 190  # of a training step, at most, as tests/test_cuda.py counts them without a GPU
ROOT = Path(__file__).parent.parent
# Parcels of an epoch, and steps that are timed of each configuration of Figure 2.
NORMAL, QUICK = (PARCELS, 100), (1000, 4)


def main() -> None:
    """Tests, measures, prints and writes the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/gpu.md", help="file for the table")
    parser.add_argument("--quick", action="store_true", help="few parcels and steps")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError(
            f"PyTorch {torch.__version__} of {sys.executable} finds no GPU; set PYTHON= to a Python that has PyTorch for CUDA."
        )
    device = torch.device("cuda", 0)
    rows, failed = run_tests()
    prepare_device(device)
    rows += measure(device, *(QUICK if args.quick else NORMAL))
    title = f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
    table = "\n".join([title, "", "| what | found |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows), ""])
    print(table)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, table.encode())
    print(f"Table: {out}")
    if failed:
        raise UserError(f"{failed} tests failed on this GPU; see above.")


def run_tests() -> tuple[list[tuple[str, str]], int]:
    """Runs the tests marked gpu; a row for each, and how many failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        every = sorted((ROOT / "tests").glob("test_*.py"))
        files = [path for path in every if "mark.gpu" in path.read_text()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", f"--junitxml={report}"]
        subprocess.run([*command, "--continue-on-collection-errors", *map(str, files)], cwd=ROOT)
        if not report.exists():
            raise UserError("the tests did not run, see above; requirements.txt lists what they need.")
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314
    rows, n_failed = [], 0
    for case in cases:
        found = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        n_failed += bool(found) and found[0] != "skipped"
        rows.append((case.get("name", "").replace("_", " "), found[0] if found else "passed"))
    return rows, n_failed


def measure(device: torch.device, parcels: int, steps: int) -> list[tuple[str, str]]:
    """Rows of the table: epochs, kernels, memory."""
    rows = []

    def add(what: str, found: str) -> None:
        rows.append((what, found))

    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder) / "data", 100, 1, progress=False)
        small = PixelSetData.for_run(Path(folder) / "data", DataSettings())
        small.set_norm(find_norm(small)[0])
        dataset = enlarge(small, parcels, device)
        add("pixels in GPU memory, GB", f"{dataset.store._on_device.nbytes / 1e9:.1f}")
        n_steps = -(-parcels // BATCH_SIZE)
        for name, replay in (("one by one", False), ("as a CUDA graph", True)):
            training = Training(dataset, DEFAULT, replay)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = [sum(training.run(parcels)) for _ in range(3)]
            add(f"training epoch of {parcels:,} parcels, steps {name}, s", f"{median(seconds):.2f}")
            peak = torch.cuda.max_memory_allocated() - before
            add(f"peak memory beside the pixels, steps {name}, GB", f"{peak / 1e9:.2f}")
        eager = Training(dataset, DEFAULT, False)
        add("evaluation epoch, s", f"{median(eager.evaluate() for _ in range(3)):.2f}")
        kernels = f"{eager.count_kernels():.0f}"
        add(f"kernels of a training step (at most {IMITATED_KERNELS} on the imitation)", kernels)
        for textbook, name in ((False, "this code"), (True, "textbook form")):
            seconds = eager.time_model(textbook, steps)
            add(f"forward, loss, backward of a batch that is there, {name}, ms", f"{1e3 * seconds:.2f}")
        for preset in progress_bar(all_configurations(), "Figure 2", "configurations"):
            times = []
            for replay in (False, True):
                training = Training(dataset, preset, replay)
                training.run(8 * BATCH_SIZE)
                drawing, stepping = training.run(steps * BATCH_SIZE)
                times.append(drawing + stepping * n_steps / steps)
            found = "{:.2f} / {:.2f}".format(*times)
            add(f"training epoch, extrapolated, {preset}, s, one by one / as a graph", found)
    return rows


def enlarge(small: PixelSetData, parcels: int, device: torch.device) -> PixelSetData:
    """So many parcels in a device's memory, which repeat the pixels of a few."""
    view = small.to(device)
    times = -(-parcels // len(small))
    n_rows = len(view.store._on_device)
    view.store._on_device = view.store._on_device.repeat(times, 1)
    copies = torch.arange(times, device=device).repeat_interleave(len(view.store.ids))
    view.store._first_rows = view.store._first_rows.repeat(times) + copies * n_rows
    copies = torch.arange(times, device=device).repeat_interleave(len(small))
    view._places = (view._places.repeat(times) + copies * len(view.store.ids))[:parcels]
    view._sizes, view._target = (x.repeat(times)[:parcels] for x in (view._sizes, view._target))
    view._ids, view.extra = torch.arange(parcels, device=device), view.extra.repeat(times, 1)[:parcels]
    view.pid = list(map(str, range(parcels)))
    return view


class Training:
    """A training of a configuration of Figure 2, epoch by epoch."""

    def __init__(self, dataset: PixelSetData, preset: str, replay: bool) -> None:
        self.dataset, self.device, self.epoch = dataset, dataset.device, 0
        sizes = resolve_architecture({}, read_preset(preset), DataShape.of(dataset, N_CLASSES))
        self.model = sizes.build().apply(weight_init).to(self.device)
        self.optimizer = OPTIMIZERS["adam"](self.model.parameters(), 0.001)
        self.criterion, self.drawn = FocalLoss(1), dataset.epoch_draws(0)
        self.replayed = ReplayedSteps(self.optimizer, BATCH_SIZE, N_CLASSES, self.device) if replay else None

    def run(self, parcels: int) -> tuple[float, float]:
        """Seconds of an epoch of so many parcels: of the draws, which are for all parcels, and of the steps."""
        self.epoch += 1
        torch.cuda.synchronize()
        start = perf_counter()
        self.drawn.redraw(self.epoch)
        torch.cuda.synchronize()
        drawn = perf_counter()
        some = range(min(parcels, len(self.drawn)))
        loader = batch_loader(self.drawn, BatchSampler(some, BATCH_SIZE, self.epoch, drop_single=True), 0)
        what = self.model, self.optimizer, self.criterion, loader, self.device, N_CLASSES
        train_epoch(*what, replayed=self.replayed)
        torch.cuda.synchronize()
        return drawn - start, perf_counter() - drawn

    def evaluate(self) -> float:
        """Seconds of an evaluation of all parcels."""
        drawn = self.dataset.evaluation(1)
        loader = batch_loader(drawn, BatchSampler(range(len(drawn)), evaluation_batch(self.device)), 0)
        torch.cuda.synchronize()
        start = perf_counter()
        evaluation(self.model, self.criterion, loader, self.device, N_CLASSES)
        torch.cuda.synchronize()
        return perf_counter() - start

    def count_kernels(self) -> float:
        """Kernels of a training step, copies and fillings of memory not counted: the difference of 20 and 10 steps."""
        counts = []
        for steps in (10, 20):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                self.run(steps * BATCH_SIZE)
            on_gpu = torch.autograd.DeviceType.CUDA
            names = [event.name for event in found.events() if event.device_type == on_gpu]
            counts.append(sum(not name.startswith(("Memcpy", "Memset")) for name in names))
        return (counts[1] - counts[0]) / 10

    def time_model(self, textbook: bool, steps: int) -> float:
        """Median seconds of forward, loss and backward on one batch, by this code or in its textbook form."""
        model = PlainClassifier(self.model) if textbook else self.model
        x, y = self.drawn.batch(range(BATCH_SIZE))
        seconds = []
        for _ in range(steps + 3):
            torch.cuda.synchronize()
            start = perf_counter()
            self.optimizer.zero_grad()
            self.criterion(model(x), y).backward()
            torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
        return median(seconds[3:])


if __name__ == "__main__":
    run_cli(main)
