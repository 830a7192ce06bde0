"""Names of classes."""

from pathlib import Path

from common.errors import UserError
from common.files import read_json

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
    names = content.get(nomenclature, {}) if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} is something else; expected {_CLASSES}, names in quotes.")
    return {label: name for label, name in names.items() if name != label}  # what names itself needs no name
