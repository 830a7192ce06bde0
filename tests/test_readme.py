"""What README.md and the pages in docs/ say: their commands run, their tables are right.

The commands run in a folder with `path/to/dataset` a small simulated dataset, page by page in the order in which README.md
links to them. Training commands get a few more flags, so that they take seconds: few folds, epochs and pixels.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as benchmark
import figure2  # noqa: F401  # and with it what the other scripts import: once here, not once per command
import inference  # noqa: F401
import train  # noqa: F401
from benchmarks import measure
from learning.options import resolve_architecture
from models.architecture import DataShape, read_preset
from models.layers import trainable_parameters
from tests.processes import PATIENCE, start, start_ranks, wait

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = dict.fromkeys(re.findall(r"\]\(docs/(\w+\.md)", README))  # in order, each once
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in NAMES}
TEXT = "\n".join(
    [README, *(page for name, page in PAGES.items() if name != "extending.md")]
)  # see test_extending.py
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
SHELL = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith(("python ", "torchrun "))]
SHORT = "--epochs 1 --kfold 3 --npixel 4"
FILES = {"figure2.py": {"res_dir": "figure2.png"}}


def run(words: list[str], folder: Path, n_ranks: int = 1) -> str:
    """What a command prints that begins with `python`; in a child, where torch need not be imported again.

    Args:
        words: of the command, after `python`: a script, or -m and a module.
        folder: where it runs.
        n_ranks: number of processes that run it together.
    """
    module, place = (words[1], 1) if words[0] == "-m" else (words[0].removesuffix(".py"), 0)

    def main() -> None:
        os.chdir(folder)
        for name in (module, f"{module}.__main__"):  # to be executed, not imported
            sys.modules.pop(name, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    log, words = folder / "log", words[place + 1 :]
    log.unlink(missing_ok=True)
    children = start_ranks(main, words, log, n_ranks) if n_ranks > 1 else [start(main, words, log)]
    assert [wait(child) for child in children] == n_ranks * [0], f"{shlex.join(words)}\n{log.read_text()}"
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
    # What .ci/run calls, and what tests/test_cuda.py tries.
    assert others == {"make train", "make test", "make gpu PYTHON=path/to/python"}
    runner = (ROOT / ".ci" / "run").read_text()
    assert "make train" in runner and "make test" in runner
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"train.py", "inference.py", "-m"}
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "text", "bibtex"}
    assert len(set(COMMANDS)) == len(COMMANDS)


def test_commands_run_in_the_order_given(clone: Path) -> None:
    """Trainings that no later command uses run with SOAK=1 alone: test_ways.py resolves their flags, test_figure2.py trains."""
    pytest.importorskip("rasterio", reason="needs requirements-geo.txt")
    for i, command in enumerate(COMMANDS):
        program, *words = shlex.split(command)
        if words[0] in ("train.py", "figure2.py") and not os.environ.get("SOAK"):
            res_dir = words[words.index("--res_dir") + 1]
            if all(res_dir not in shlex.split(later) for later in COMMANDS[i + 1 :]):
                continue
        n_ranks = int(words[words.index("--nproc_per_node") + 1]) if program == "torchrun" else 1
        words = words[2:] if program == "torchrun" else words
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
        output = run(words, clone, n_ranks)
        for flag, file in {"res_dir": "overall.json", "output_dir": "predictions.csv", "export": ""}.items():
            if f"--{flag}" in words:
                written = clone / words[words.index(f"--{flag}") + 1]
                assert (written / FILES.get(words[0], {}).get(flag, file)).exists()
        assert output


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """By processes that import nothing again; with SOAK=1 as a user runs it."""
    assert "python -m benchmarks" in COMMANDS
    if os.environ.get("SOAK"):
        output = run_anew(["-m", "benchmarks", "--quick"], tmp_path)
    else:

        def main() -> None:
            measure.START = "fork"
            benchmark.main()

        log = tmp_path / "log"
        assert wait(start(main, ["--quick", "--threads", "1"], log)) == 0, log.read_text()
        output = log.read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", output, flags=re.M)
    assert len(rows) == 7 + 2 * 5 + 1
    for name, ours, others, ratios in rows:
        for other, ratio in zip(others.split(" / "), ratios.split(" / "), strict=True):
            if "memory" not in name:  # of so little, or where nothing tells, that can be 0
                assert float(ours) > 0 and float(ratio) == pytest.approx(
                    float(other) / float(ours), rel=0.05, abs=0.02
                )


def test_baselines_that_the_table_names(clone: Path) -> None:
    assert "`python -m benchmarks.baselines --seeds 3`" in README
    options = "--dataset_folder path/to/dataset --kfold 3 --trees 3 --only forest"
    output = run(["-m", "benchmarks.baselines", *shlex.split(options)], clone)
    assert re.search(r"accuracy \d+\.\d %, mIoU 0\.\d+", output)


def test_python_examples_run_on_the_trained_weights(clone: Path) -> None:
    first, second = [block for kind, block in BLOCKS if kind == "python"]
    run(shlex.split(f"train.py --dataset_folder path/to/dataset --res_dir example {SHORT}"), clone)
    (clone / "example.py").write_text((first + second).replace("results/ltae", "example"))
    output = run_anew(["example.py"], clone)
    assert re.fullmatch(r"1 \d+ 0\.\d+\n3 False\n", output)


def test_table_of_configurations() -> None:
    rows = re.findall(r"^\| `(\w+/\w+)` \|(.*)\| ([\d,]+) \| ([\d,]+) \|$", TEXT, flags=re.M)
    assert len(rows) == 26
    for name, settings, temporal, total in rows:
        architecture = resolve_architecture({}, read_preset(name), DataShape(10, 24, 4, 20, range(24)))
        model, config = architecture.build(), architecture.to_dict()
        assert trainable_parameters(model.temporal_encoder) == int(temporal.replace(",", ""))
        assert trainable_parameters(model) == int(total.replace(",", ""))
        for key, value in re.findall(r"(\w+) (\[[\d,]+\]|\d+)", settings):
            assert str(config[key]).replace(" ", "") == value, (name, key)


def test_names_no_flag_that_does_not_exist(tmp_path: Path) -> None:
    scripts = {*re.findall(r"python (\w+\.py)", TEXT), *re.findall(r"python (-m [\w.]+)", TEXT)}
    help_text = "".join(run([*script.split(), "--help"], tmp_path) for script in sorted(scripts))
    for flag in set(re.findall(r"--\w+", TEXT)):
        assert re.search(rf"{flag}\b", help_text) or flag == "--nproc_per_node", flag  # of torchrun


def test_defaults_in_the_table_of_flags(tmp_path: Path) -> None:
    help_text = " ".join(run(["train.py", "--help"], tmp_path).split())
    rows = re.findall(r"^\| (`--[^|]+) \|[^|]+\| ([\d\[][^|a-z]*) \|$", PAGES["training.md"], flags=re.M)
    defaults = {}
    for flags, values in rows:
        defaults |= zip(re.findall(r"--\w+", flags), re.findall(r"\[[\d,]+\]|[\d.]+", values), strict=True)
    assert len(defaults) >= 10 and defaults["--d_model"] == "256"
    for flag, value in defaults.items():
        (found,) = re.findall(rf" {flag} [A-Z]\w* (?:(?! --).)*?\(default: ([^)]+)\)", help_text)
        found = found.split(";")[0].removeprefix("L-TAE ")  # of encoders whose defaults differ
        assert found in (value, f"{value}.0"), flag
