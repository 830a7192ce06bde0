"""Figure 2 of the paper: trains its configurations by cross-validation and draws mIoU against parameters.

    python figure2.py --dataset_folder D --res_dir R
    torchrun --nproc_per_node N figure2.py --dataset_folder D --res_dir R     N configurations at a time
    python figure2.py --res_dir R --draw                                      only draws what is there

A configuration is trained by train.py in R/ARCHITECTURE/SIZE. One that is finished is skipped, one that was interrupted
goes on where it stopped. figure2.csv and figure2.png are made anew after each.
"""

import common  # isort: skip  # noqa: F401  # before torch, see there

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import train
from common.errors import UserError, run_cli
from common.files import write_json
from common.flags import Parser, positive
from learning.checkpoints import check_typed_settings
from learning.results import CONFIG, OVERALL, prepare_output
from reports.figure2 import PICTURE, TABLE, TIME, all_configurations, draw, read_seconds

OWN_FLAGS = ("--preset", "--overwrite", "--tae", "--gru", "--tcnn")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Reads the command line; returns the flags of this script and, checked, those that are passed on to train.py."""
    parser = Parser(
        description=__doc__.split("\n")[0], epilog="Any other flag is passed on to train.py (see its --help)."
    )
    parser.add_argument(
        "--res_dir", default="./results/figure2", help="folder of all runs, table and picture"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="architectures or configurations, such as LTAE TAE/195k"
    )
    parser.add_argument("--draw", action="store_true", help="only draw what is there, train nothing")
    parser.add_argument("--epochs", type=positive, default=100, help="epochs per fold")
    parser.add_argument("--kfold", type=positive, default=5, help="number of folds, at least 3")
    args, flags = parser.parse_known_args()
    taken = {flag.split("=")[0] for flag in flags}.intersection(OWN_FLAGS)
    if taken:
        raise UserError(f"{min(taken)} is set for each configuration by figure2.py; leave it out.")
    flags += ["--epochs", str(args.epochs), "--kfold", str(args.kfold)]
    parse_train(flags)
    return args, flags


def main() -> None:
    """Trains what is asked for and not finished, and draws."""
    args, flags = parse_args()
    res_dir = Path(args.res_dir)
    names = choose(args.only)
    if not args.draw:
        prepare_output(res_dir)
        rank = leave_torchrun()
        if parse_train(flags).device is None and torch.cuda.device_count() > 1:
            flags += ["--device", f"cuda:{rank % torch.cuda.device_count()}"]
        for name in names:
            train_claimed(res_dir, name, flags)
    rows = draw(res_dir)
    if args.draw and not rows:
        raise UserError(f"{res_dir} holds no configuration with a tested fold, such as LTAE/9k; train first.")
    print(f"{len(rows)} configurations: {res_dir / TABLE}, {res_dir / PICTURE}")


def choose(only: Sequence[str] | None) -> list[str]:
    """The configurations that --only names, all of an architecture for its name, in the figure's order."""
    known = all_configurations()
    if only is None:
        return known
    for name in only:
        if not any(name in (each, each.split("/")[0]) for each in known):
            raise UserError(
                f"--only {name} is unknown; expected any of {', '.join(known)}, or the part before the slash for all "
                "of an architecture."
            )
    return [each for each in known if each in only or each.split("/")[0] in only]


def leave_torchrun() -> int:
    """Makes this process train alone, not as one of a group; returns its number on this machine, from 0."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if "WORLD_SIZE" in os.environ:
        os.environ["WORLD_SIZE"] = "1"
    return rank


def train_claimed(res_dir: Path, name: str, flags: Sequence[str]) -> None:
    """Trains a configuration unless it is finished or another process is at it."""
    folder = prepare_output(res_dir / name)
    try:
        with FileLock(folder / ".claimed", timeout=0):  # let go by the system if the process dies
            if (folder / OVERALL).exists():  # which has the scores of all folds
                check_typed_settings(folder, parse_train([*flags, "--preset", name]))
                print(f"{name}: finished")
                return
            train_one(folder, name, flags)
    except Timeout:
        print(f"{name}: another process is at it")
        return
    draw(res_dir)


def parse_train(flags: Sequence[str]) -> argparse.Namespace:
    """Flags of train.py, checked as it does."""
    sys.argv = ["train.py", *flags]
    return train.parse_args()


def train_one(folder: Path, name: str, flags: Sequence[str]) -> None:
    """Trains a configuration, or goes on with it, by train.py; keeps the time that it took in all."""
    print(f"\n{name}", flush=True)
    before = (read_seconds(folder) or 0.0) if (folder / CONFIG).exists() else 0.0
    start = time.monotonic()
    sys.argv = ["train.py", "--preset", name, "--res_dir", str(folder), "--resume", *flags]
    try:
        train.main()
    finally:
        write_json(folder / TIME, {"seconds": before + time.monotonic() - start})


if __name__ == "__main__":
    run_cli(main)
