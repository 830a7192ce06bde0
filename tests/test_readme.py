"""What README.md says: its commands run, its table is right.

The commands run in a copy of the repository with `path/to/dataset` a small simulated dataset. Training commands get
a few more flags, so that they take seconds: few folds, epochs and pixels.
"""

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from learning.options import DataShape, resolve_architecture
from models.architecture import read_preset
from models.layers import trainable_parameters

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
SHELL = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("python ")]
SHORT = "--epochs 1 --kfold 3 --npixel 4"
FILES = {"figure2.py": {"res_dir": "figure2.png"}}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's code in an empty folder, and a dataset in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "models",
        "learning",
        "preprocessing",
        "benchmarks",
        "dataset.py",
        "train.py",
        "inference.py",
        "figure2.py",
    ):
        (folder / name).symlink_to(ROOT / name)
    (folder / "config_fig2.json").symlink_to(ROOT / "config_fig2.json")
    command = "-m preprocessing.simulate path/to/dataset --parcels 120 --seed 3 --max_pixels 8"
    run([sys.executable, *shlex.split(command)], folder)
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
            words += ["--quick"]
        if "path/to/weights" in words:  # published ones: folds alone
            for path in (clone / "results" / "ltae").glob("Fold_*"):
                shutil.copytree(path, clone / "path" / "to" / "weights" / path.name)
            words[words.index("--kfold") + 1] = "3"
        output = run([sys.executable, *words], clone)
        for name in ("res_dir", "output_dir"):
            if f"--{name}" in words:
                written = clone / words[words.index(f"--{name}") + 1]
                files = {"res_dir": "overall.json", "output_dir": "predictions.csv"} | FILES.get(words[0], {})
                assert (written / files[name]).exists()
        assert output


def test_random_forest_that_the_table_names(clone: Path) -> None:
    assert "`python -m benchmarks.random_forest`" in README
    options = "--dataset_folder path/to/dataset --kfold 3 --trees 3"
    output = run([sys.executable, "-m", "benchmarks.random_forest", *shlex.split(options)], clone)
    assert re.search(r"accuracy \d+\.\d%, mIoU 0\.\d+", output)


def test_python_example_runs_on_the_trained_weights(clone: Path) -> None:
    (example,) = [block for kind, block in BLOCKS if kind == "python"]
    run(
        [
            sys.executable,
            "train.py",
            "--dataset_folder",
            "path/to/dataset",
            "--res_dir",
            "example",
            *SHORT.split(),
        ],
        clone,
    )
    output = run([sys.executable, "-c", example.replace("results/ltae", "example")], clone)
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


def test_names_no_flag_that_does_not_exist() -> None:
    scripts = [*re.findall(r"python (\w+\.py)", README), *re.findall(r"python (-m [\w.]+)", README)]
    with ThreadPoolExecutor() as pool:
        commands = [[sys.executable, *script.split(), "--help"] for script in sorted(set(scripts))]
        help_text = "".join(pool.map(lambda command: run(command, ROOT), commands))
    for flag in set(re.findall(r"--\w+", README)):
        assert flag in help_text or flag == "--nproc_per_node", flag  # of torchrun
