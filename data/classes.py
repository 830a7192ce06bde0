"""Classes: the numbers that stand for labels, and names."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import read_json

UNKNOWN = -1  # target of a parcel without a label among the classes
_CLASSES = "{nomenclature: {label: name}}"


def read_class_names(folder: Path, nomenclature: str | None) -> dict[str, str]:
    """Names by label, as text, from META/classes.json; none where there is no such file or nomenclature.

    Raises:
        UserError: if the file is something else.
    """
    path = folder / "META" / "classes.json"
    if not path.exists():
        return {}
    content = read_json(path, _CLASSES)
    if not isinstance(content, dict) or not all(isinstance(names, dict) for names in content.values()):
        raise UserError(f"{path} is something else; expected {_CLASSES}.")
    names = content.get(nomenclature, {})
    if not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} is something else; expected {_CLASSES}, names in quotes.")
    return {label: name for label, name in names.items() if name != label}  # what names itself needs no name


def number_labels(
    labels: Sequence[int | str | None], classes: Sequence[int | str] | None
) -> tuple[list[int | str] | None, list[int | None]]:
    """Numbers the labels of parcels.

    Args:
        labels: of the parcels, N; None where it is not known.
        classes: labels to number from 0 on; None for all: whole numbers stay, text is numbered in alphabetical order.

    Returns:
        The labels that targets number, None where targets are labels; and the targets, N, None for other labels.
    """
    if classes is None and any(isinstance(label, str) for label in labels):
        classes = sorted({label for label in labels if label is not None})
    if classes is None:
        return None, list(labels)
    number = {label: i for i, label in enumerate(classes)}
    return list(classes), [number.get(label) for label in labels]
