"""Makes a dataset folder from a published dataset.

    python -m preprocessing.convert FORMAT SOURCE OUT

A format is a function in `preprocessing/formats/` that opens SOURCE and returns what is described in
`preprocessing/formats/source.py`; here is the one place that writes.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, as_user_error, run_cli
from common.files import check_new, write_folder, write_json_line
from common.flags import Parser
from common.progress import progress_bar
from data.metadata import check_norm
from data.missing import find_missing
from data.moments import NORM, write_norm
from data.packing import write_days, write_pixels
from preprocessing.formats import breizhcrops, cawa, eurocropsml, pastis, sits, timematch, ucr
from preprocessing.formats.source import Source
from preprocessing.split import FOLDS, deal

FORMATS: dict[str, Callable[..., Source]] = {
    module.__name__.rpartition(".")[2]: module.open_source
    for module in (pastis, timematch, breizhcrops, eurocropsml, sits, ucr, cawa)
}
PARTS, SEED = 5, 1  # of folds where there are no official ones


def open_source(name: str, path: Path, options: dict[str, Any]) -> Source:
    """Opens a published dataset.

    Args:
        name: of the format.
        path: file or folder.
        options: flags that were given, which formats name as arguments.

    Raises:
        UserError: if the files are not as expected, a package is missing or a flag is of another format.
    """
    function = FORMATS[name]
    for option in set(options) - set(inspect.signature(function).parameters):
        raise UserError(f"--{option} has no meaning for {name}; leave it out.")
    try:
        with as_user_error(ImportError, prefix=f"{name} needs the packages of requirements-formats.txt: "):
            source = function(path, **options)
    except UserError:
        raise
    except Exception as error:  # files of others can differ in any way
        raise UserError(f"{path} is not laid out as {name} expects ({_describe(error)}).") from error
    for parcel, count in Counter(source.names).most_common(1):
        if count > 1:
            raise UserError(f"{path} has parcel {parcel} {count} times; ids must differ.")
    return source


def convert(source: Source, out: Path, about: dict[str, Any], packed: bool = False) -> list[str]:
    """Writes a dataset folder, whole or not at all.

    Args:
        source: the dataset.
        out: the folder, new or empty.
        about: written to META/info.json beside what is known of the pixels.
        packed: whether pixels are written to PIXELS, instead of DATA.

    Returns:
        Lines that say what was made and what was assumed.

    Raises:
        UserError: if a parcel cannot be read or is not as expected, or the folder cannot be written.
    """
    numbered = not all(isinstance(name, int) for name in source.names)
    ids = list(range(1, len(source.names) + 1)) if numbered else list(source.names)
    norm = source.norm and check_norm(source.norm, (None, len(source.bands)), "the official normalisation")
    unwritable = as_user_error(OSError, prefix=f"the dataset cannot be written to {out}: ")
    with unwritable, write_folder(out) as work:
        days, count = _write_pixels(source, ids, work, packed)
        kept = [i for i, parcel in enumerate(ids) if parcel in days]
        assumed = list(source.assumed)
        if count["partly"]:
            assumed.append(f"{count['partly']:,} observations that lacked some bands are missing in all")

        def by_id(values: Sequence[Any]) -> dict[int, Any]:
            return {ids[i]: values[i] for i in kept if values[i] is not None}

        shared = all(own == days[ids[kept[0]]] for own in days.values())
        facts = {"nodata": source.nodata, "bands": [*source.bands], "units": source.units, "assumed": assumed}
        facts |= {"geomfeat": [*source.extra_names]} if source.extra else {}
        labels = {name: by_id(listed) for name, listed in source.labels.items()}
        contents = {
            "labels": labels,
            "classes": {name: listed for name, listed in source.classes.items() if listed},
            "dates": dict(enumerate(days[ids[kept[0]]])) if shared else None if packed else days,
            "info": about | facts,
            "geomfeat": by_id(source.extra) if source.extra else None,
            "groups": by_id(source.groups) if source.groups else None,
            "own_ids": by_id(source.names) if numbered else None,
            "folds": make_folds(source, ids, kept),
        }
        if packed and not shared:
            write_days(work, [days[parcel] for parcel in sorted(days)])
        (work / "META").mkdir()
        for name, content in contents.items():
            if content:
                write_json_line(work / "META" / f"{name}.json", content)
        if norm is not None:
            write_norm(work / NORM, norm)

    n_dates, unlabelled = sorted(map(len, days.values())), len(kept) - max(map(len, labels.values()))
    first, last = min(map(min, days.values())), max(map(max, days.values()))
    rows = {
        "parcels": f"{len(kept):,}, {unlabelled:,} of them unlabelled; {len(ids) - len(kept):,} without dates left out",
        "classes": ", ".join(f"{len(set(own.values()))} ({name})" for name, own in labels.items()),
        "dates": f"{n_dates[0]} to {n_dates[-1]}, {'shared' if shared else 'by parcel'}, from {first} to {last}",
        "bands": f"{len(source.bands)}: {' '.join(source.bands)}",
        "missing": f"{count['missing'] / count['all']:.1%} of the observations",
        "folds": "none",
    }
    if contents["folds"]:
        (splits,) = contents["folds"].values()
        rows["folds"] = f"{len(splits)}: train.py --folds {out / 'META' / FOLDS}"
    if len(labels) > 1:
        rows["classes"] += ": choose one by train.py --labels"
    return [
        str(out),
        *(f"  {name:8} {text}" for name, text in rows.items()),
        *(f"assumed: {text}" for text in assumed),
    ]


def _write_pixels(
    source: Source, ids: list[int], folder: Path, packed: bool
) -> tuple[dict[int, list[int]], Counter[str]]:
    """Writes the pixels of every parcel that has a date; returns their days by id, and counts of observations."""
    days, every_day, count, dtype = {}, {}, Counter(), None
    with ExitStack() as stack:
        for i in progress_bar(range(len(ids)), "converting", "parcels"):
            pixels, own = _read(source, i)
            if not len(own):
                continue
            if dtype is None:
                dtype = pixels.dtype
                add = stack.enter_context(write_pixels(folder, packed, dtype, source.nodata))
            if packed and pixels.dtype != dtype:
                raise UserError(
                    f"parcel {source.names[i]} has numbers of type {pixels.dtype}, others of {dtype}; leave --packed out."
                )
            count["partly"] += _complete_missing(pixels)
            missing = find_missing(np.moveaxis(pixels, 1, -1), source.nodata)
            count["missing"] += 0 if missing is None else int(missing.sum())
            count["all"] += pixels.size // pixels.shape[1]
            add(ids[i], pixels)
            days[ids[i]] = [every_day.setdefault(day, day) for day in own]  # an object for each of few days
    if not count["all"]:
        raise UserError("no parcel has a pixel on any date; nothing can be learned from such a dataset.")
    return days, count


def _read(source: Source, i: int) -> tuple[np.ndarray, Sequence[int]]:
    """Pixels and days of a parcel, checked; numbers of 64 bits become numbers of 32, which models compute with."""
    try:
        pixels, days = source.read(i)
    except UserError:
        raise
    except Exception as error:  # damaged files can fail in any way
        raise UserError(
            f"parcel {source.names[i]} cannot be read ({_describe(error)}); unpack its file again."
        ) from error
    expected = (len(days), len(source.bands))
    if pixels.ndim not in (2, 3) or pixels.shape[:2] != expected or pixels.dtype.kind not in "uif":
        raise UserError(
            f"parcel {source.names[i]} has an array of shape {pixels.shape}, type {pixels.dtype}; expected numbers of "
            f"{expected[0]} dates and {expected[1]} bands."
        )
    return pixels.astype({"f8": np.float32, "i8": np.int32}.get(pixels.dtype.str[1:], pixels.dtype)), days


def _complete_missing(pixels: np.ndarray) -> int:
    """Makes pixels, (L, C, ...), that are NaN in some bands NaN in all, in place, and returns how many."""
    if pixels.dtype.kind != "f":
        return 0
    undefined = np.isnan(pixels)
    partly = undefined.any(1) & ~undefined.all(1)
    np.moveaxis(pixels, 1, -1)[partly] = np.nan
    return int(partly.sum())


def make_folds(source: Source, ids: list[int], kept: list[int]) -> dict[str, Any] | None:
    """Content of a folds file: the official splits, or parts of whole groups; None where neither can be had.

    Args:
        source: the dataset.
        ids: of its parcels.
        kept: places of those that the folder has.
    """
    if source.groups is None:
        return None
    if source.splits is None:
        blocks = np.unique([str(source.groups[i]) for i in kept], return_inverse=True)[1]
        labels = next(iter(source.labels.values()))
        try:
            part = deal(blocks, np.array([str(labels[i]) for i in kept]), PARTS, SEED)
        except UserError:  # too few groups
            return None
        return {"folds": [[ids[i] for i, own in zip(kept, part) if own == k] for k in range(PARTS)]}
    members = defaultdict(list)
    for i in kept:
        members[source.groups[i]].append(ids[i])

    def parcels_of(groups: Collection[Hashable]) -> list[int]:
        return sorted(parcel for group in groups for parcel in members[group])

    splits = [{part: parcels_of(groups) for part, groups in split.items()} for split in source.splits]
    splits = [split for split in splits if all(split.values())]  # not all regions may have been downloaded
    return {"splits": splits} if splits else None


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())  # in one line


def main() -> None:
    """Command line: python -m preprocessing.convert FORMAT SOURCE OUT."""
    parser = Parser(
        description="Makes a dataset folder from a published dataset; see docs/published_datasets.md."
    )
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("source", metavar="SOURCE", type=Path, help="file or folder that the archive was unpacked to")
    add("out", metavar="OUT", type=Path, help="dataset folder to write, new or empty")
    add("--satellite", choices=tuple(pastis.BANDS), help="pastis: which satellite (default: S2)")
    mapping = "timematch: <country>_class_mapping.yml of the authors' code, or the folder of these files"
    add("--class_mapping", metavar="PATH", type=Path, help=mapping)
    add("--split", metavar="FILE", type=Path, help="eurocropsml: an official split, JSON")
    packed = "write one file of all pixels, PIXELS, instead of one per parcel; needed for millions of parcels"
    add("--packed", action="store_true", help=packed)
    args = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    name, path, out = args.pop("format"), args.pop("source"), args.pop("out").resolve()
    packed = args.pop("packed")
    check_new(out)
    source = open_source(name, path, args)
    print(*convert(source, out, {"format": name}, packed), sep="\n")


if __name__ == "__main__":
    run_cli(main)
