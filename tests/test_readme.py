"""What README.md says: its commands run, its table is right.

The commands run in a folder with `path/to/dataset` a small simulated dataset. Training commands get
a few more flags, so that they take seconds: few folds, epochs and pixels.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks.__main__ as benchmark
from benchmarks import measure
from benchmarks.cases import Sides
from learning.options import DataShape, resolve_architecture
from models.architecture import read_preset
from models.layers import trainable_parameters
from tests.processes import PATIENCE, start, wait

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
SHELL = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("python ")]
SHORT = "--epochs 1 --kfold 3 --npixel 4"
FILES = {"figure2.py": {"res_dir": "figure2.png"}}


def run(words: list[str], folder: Path) -> str:
    """What a command prints that begins with `python`; in a child, where torch need not be imported again.

    Args:
        words: of the command, after `python`: a script, or -m and a module.
        folder: where it runs.
    """
    module, place = (words[1], 1) if words[0] == "-m" else (words[0].removesuffix(".py"), 0)

    def main() -> None:
        os.chdir(folder)
        for name in (module, f"{module}.__main__"):  # to be executed, not imported
            sys.modules.pop(name, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    log = folder / "log"
    log.unlink(missing_ok=True)
    assert wait(start(main, words[place + 1 :], log)) == 0, f"{shlex.join(words)}\n{log.read_text()}"
    return log.read_text()


def run_anew(words: list[str], folder: Path) -> str:
    """The same by a Python of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset in it, where commands run."""
    folder = tmp_path_factory.mktemp("clone")
    run(
        shlex.split("-m preprocessing.simulate path/to/dataset --parcels 120 --seed 3 --max_pixels 8"), folder
    )
    return folder


def test_every_command_is_known() -> None:
    """Commands of another kind than those tested here must not slip in untested."""
    others = {line for line in SHELL if line and line not in COMMANDS}
    assert others == {"make train", "make test"}  # what .ci/run calls
    assert (
        "make train" in (ROOT / ".ci" / "run").read_text()
        and "make test" in (ROOT / ".ci" / "run").read_text()
    )
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"train.py", "inference.py", "-m"}


def test_commands_run_in_the_order_given(clone: Path) -> None:
    pytest.importorskip("rasterio", reason="needs requirements-geo.txt")
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] in ("train.py", "figure2.py"):
            words += SHORT.split()
        if "--rasters" in words:
            words += ["--parcels", "150"]
        if words[:2] == ["-m", "benchmarks"]:
            continue  # see the next test
        if "path/to/weights" in words:  # published ones: folds alone
            for path in (clone / "results" / "ltae").glob("Fold_*"):
                shutil.copytree(path, clone / "path" / "to" / "weights" / path.name)
            words[words.index("--kfold") + 1] = "3"
        output = run(words, clone)
        for name in ("res_dir", "output_dir"):
            if f"--{name}" in words:
                written = clone / words[words.index(f"--{name}") + 1]
                files = {"res_dir": "overall.json", "output_dir": "predictions.csv"} | FILES.get(words[0], {})
                assert (written / files[name]).exists()
        assert output


def run_once(sides: Sides, side: str) -> float:
    """In place of `measure.run_time`, which repeats what is short for a quarter of a second."""
    begin = time.perf_counter()
    sides[side]()
    return time.perf_counter() - begin


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """With the smallest sizes and processes that import nothing again; with SOAK=1 as a user runs it."""
    assert "python -m benchmarks" in COMMANDS
    if os.environ.get("SOAK"):
        output = run_anew(["-m", "benchmarks", "--quick"], tmp_path)
    else:

        def main() -> None:
            measure.get_context = lambda kind: multiprocessing.get_context("fork")
            measure.Worker.close = lambda self: (
                self._process.kill()
            )  # forked, it would not see the end of its pipe
            measure.run_time = run_once
            benchmark.QUICK = benchmark.QUICK._replace(batch_size=4, pixels=(8,))
            benchmark.main()

        assert wait(start(main, ["--quick", "--threads", "1"], tmp_path / "log")) == 0, (
            tmp_path / "log"
        ).read_text()
        output = (tmp_path / "log").read_text()
    assert output.count("\n|") > 10


def test_random_forest_that_the_table_names(clone: Path) -> None:
    assert "`python -m benchmarks.random_forest`" in README
    options = "--dataset_folder path/to/dataset --kfold 3 --trees 3"
    output = run(["-m", "benchmarks.random_forest", *shlex.split(options)], clone)
    assert re.search(r"accuracy \d+\.\d%, mIoU 0\.\d+", output)


def test_python_example_runs_on_the_trained_weights(clone: Path) -> None:
    (example,) = [block for kind, block in BLOCKS if kind == "python"]
    run(shlex.split(f"train.py --dataset_folder path/to/dataset --res_dir example {SHORT}"), clone)
    (clone / "example.py").write_text(example.replace("results/ltae", "example"))
    output = run_anew(["example.py"], clone)
    assert re.fullmatch(r"1 \d+ 0\.\d+\n", output)


def test_table_of_configurations() -> None:
    rows = re.findall(r"^\| `(\w+/\w+)` \|(.*)\| ([\d,]+) \| ([\d,]+) \|$", README, flags=re.M)
    assert len(rows) == 26
    for name, settings, temporal, total in rows:
        architecture = resolve_architecture({}, read_preset(name), DataShape(10, 24, 4, 20, range(24)))
        model, config = architecture.build(), architecture.to_dict()
        assert trainable_parameters(model.temporal_encoder) == int(temporal.replace(",", ""))
        assert trainable_parameters(model) == int(total.replace(",", ""))
        for key, value in re.findall(r"(\w+) (\[[\d,]+\]|\d+)", settings):
            assert str(config[key]).replace(" ", "") == value, (name, key)


def test_names_no_flag_that_does_not_exist(tmp_path: Path) -> None:
    scripts = [*re.findall(r"python (\w+\.py)", README), *re.findall(r"python (-m [\w.]+)", README)]
    help_text = "".join(run([*script.split(), "--help"], tmp_path) for script in sorted(set(scripts)))
    for flag in set(re.findall(r"--\w+", README)):
        assert flag in help_text or flag == "--nproc_per_node", flag  # of torchrun
