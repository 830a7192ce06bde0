"""What a classifier is made of: its temporal encoder by name, and all sizes. Encoders register themselves here."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import models
from common.errors import UserError, as_user_error
from common.files import read_json
from models.layers import DAYS

PRESETS = Path(__file__).resolve().parent.parent / "config_fig2.json"


class Size(NamedTuple):
    """A size that an encoder can be given: a number, or a list of widths.

    Attributes:
        default: the published one.
        help: what it is, for the command line.
        optional: whether it may be None.
        is_argument: whether the classifier's class takes it as a keyword argument.
    """

    default: Any
    help: str
    optional: bool = False
    is_argument: bool = True


@dataclass(frozen=True)
class Encoder:
    """A classifier with its temporal encoder, as flags, results folders and reports know it.

    Attributes:
        name: of the flag that chooses it, and in conf.json.
        title: for people.
        classifier: its class, whose keyword arguments are those of the pixel-set encoder, `positions`, `mlp4`, the
            names in `sizes` and what `dates` gives.
        sizes: by name; encoders may share names.
        output: the size that ends with the width that enters the decoder.
        has_attention: whether `classifier.attention` works.
        dates: further keyword arguments that depend on the dates of an architecture.
        agree: makes sizes that were not typed fit those that were, as `models.layers.agree_attention` does.
    """

    name: str
    title: str
    classifier: type[nn.Module]
    sizes: Mapping[str, Size]
    output: str
    has_attention: bool = False
    dates: Callable[[Architecture], dict[str, Any]] = lambda architecture: {}
    agree: Callable[[dict[str, Any], dict[str, Any]], None] = lambda sizes, typed: None


ENCODERS: dict[str, Encoder] = {}
DEFAULT_ENCODER = "ltae"


def register(
    name: str, title: str, sizes: Mapping[str, Size], output: str, **others: Any
) -> Callable[[type], type]:
    """Makes a classifier known under a name; a decorator of its class. For the arguments see `Encoder`."""

    def add(classifier: type[nn.Module]) -> type[nn.Module]:
        ENCODERS[name] = Encoder(name, title, classifier, sizes, output, **others)
        return classifier

    return add


def known_encoders() -> dict[str, Encoder]:
    """All encoders by name: those of every file in this folder."""
    for module in pkgutil.iter_modules(models.__path__):
        importlib.import_module(f"models.{module.name}")
    return ENCODERS


# Settings that all encoders share and that have the same name as a flag.
_SHARED = ("input_dim", "mlp1", "pooling", "mlp2", "n_extra", "mlp4", "positions", "date_positions", "grid")


@dataclass(frozen=True)
class Architecture:
    """A classifier's description; the defaults are those of the published weights.

    Attributes:
        encoder: name of the temporal encoder.
        input_dim: channels C of a pixel.
        mlp1, pooling, mlp2: of the pixel-set encoder.
        n_extra: number of extra features F.
        mlp4: widths of the decoder, down to the number of classes.
        n_dates: number of dates L, shared by all parcels; None for dates that vary.
        positions: "bespoke" for the days of the dates, "order" for their numbers.
        date_positions: day of each date, (L,); None for dates that vary.
        grid: days that an encoder interpolates varying dates to, if it does.
        sizes: of the temporal encoder, by name.
    """

    encoder: str = DEFAULT_ENCODER
    input_dim: int = 10
    mlp1: Sequence[int] = (10, 32, 64)
    pooling: str = "mean_std"
    mlp2: Sequence[int] = (132, 128)
    n_extra: int = 4
    mlp4: Sequence[int] = (128, 64, 32, 20)
    n_dates: int | None = 24
    positions: str = "bespoke"
    date_positions: Sequence[int] | None = None
    grid: Sequence[int] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Encoder:
        """The registered encoder."""
        return known_encoders()[self.encoder]

    @property
    def varying(self) -> bool:
        """Whether the model takes any dates."""
        return self.n_dates is None

    @property
    def n_classes(self) -> int:
        """Number of classes that the decoder tells apart."""
        return self.mlp4[-1]

    def hyperparameters(self) -> dict[str, Any]:
        """Keyword arguments of the classifier's class."""
        positions = DAYS if self.varying else self.date_positions if self.positions == "bespoke" else None
        common = {name: getattr(self, name) for name in ("input_dim", "mlp1", "pooling", "mlp2", "mlp4")}
        common |= {"with_extra": self.n_extra > 0, "extra_size": self.n_extra, "positions": positions}
        sizes = {name: self.sizes[name] for name, size in self.kind.sizes.items() if size.is_argument}
        return common | sizes | self.kind.dates(self)

    def build(self) -> nn.Module:
        """The classifier, untrained.

        Raises:
            UserError: if sizes do not fit together.
        """
        with as_user_error(ValueError):
            return self.kind.classifier(**self.hyperparameters())

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of the flags, sizes that other encoders have included."""
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        del own["encoder"], own["sizes"]
        own |= {"lms": own.pop("n_dates"), "num_classes": self.n_classes}
        return default_settings() | own | dict(self.sizes) | {name: name == self.encoder for name in flags()}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Architecture:
        """What `to_dict` made of an architecture; a name that is not there has its published default."""
        encoder = chosen_encoder(config)
        config = default_settings(encoder) | dict(config)
        sizes = {name: config[name] for name in known_encoders()[encoder].sizes}
        return cls(encoder, **{name: config[name] for name in _SHARED}, n_dates=config["lms"], sizes=sizes)


@dataclass(frozen=True)
class DataShape:
    """What the data tell of an architecture.

    Attributes:
        n_channels: C.
        n_dates: L, None for dates that vary.
        n_extra: F.
        n_classes: number of classes to tell apart.
        date_positions: day of each date, (L,); None for dates that vary.
        day_range: first and last day of any parcel.
    """

    n_channels: int
    n_dates: int | None
    n_extra: int
    n_classes: int
    date_positions: Sequence[int] | None = None
    day_range: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, dataset: Any, n_classes: int) -> DataShape:
        """That of a `PixelSetData`."""
        n_dates, positions = (None, None) if dataset.varying else (dataset.n_dates, dataset.date_positions)
        return cls(dataset.n_channels, n_dates, dataset.n_extra, n_classes, positions, dataset.day_range)


def flags() -> list[str]:
    """Names of the flags that choose an encoder other than the default one."""
    return [name for name in known_encoders() if name != DEFAULT_ENCODER]


def chosen_encoder(config: Mapping[str, Any]) -> str:
    """The encoder that is chosen among flags by name.

    Raises:
        UserError: if there is more than one.
    """
    chosen = [name for name in flags() if config.get(name)]
    if len(chosen) > 1:
        names = [f"--{name}" for name in flags()]
        raise UserError(f"more than one of {', '.join(names[:-1])} and {names[-1]} is given; choose one.")
    return chosen[0] if chosen else DEFAULT_ENCODER


def default_settings(encoder: str = DEFAULT_ENCODER) -> dict[str, Any]:
    """The published default of every setting, under the names of the flags; of sizes, those of an encoder win."""
    kinds = known_encoders()
    shared = Architecture()
    settings = {name: getattr(shared, name) for name in _SHARED}
    settings |= {"lms": shared.n_dates, "num_classes": shared.n_classes, **dict.fromkeys(flags(), False)}
    for kind in [*reversed([k for k in kinds.values() if k.name != encoder]), kinds[encoder]]:
        settings |= {name: size.default for name, size in kind.sizes.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def describe_default(name: str) -> str:
    """The published default of a setting for people: of each encoder, where they differ."""
    kinds = [kind for kind in known_encoders().values() if name in kind.sizes]
    values = {kind.title.removeprefix("PSE + "): kind.sizes[name].default for kind in kinds}
    texts = [json.dumps(value, separators=(",", ":")) for value in values.values()]
    if len(set(texts)) > 1:
        return "; ".join(map(" ".join, zip(values, texts)))
    return json.dumps(default_settings()[name], separators=(",", ":")).replace('"', "")


def read_preset(name: str | None) -> dict[str, Any]:
    """Settings of a configuration of config_fig2.json by its name, ARCHITECTURE/SIZE; none for None.

    Raises:
        UserError: if there is no such configuration.
    """
    if name is None:
        return {}
    presets = read_json(PRESETS)
    architecture, _, size = name.partition("/")
    if size not in presets.get(architecture, {}):
        known = ", ".join(f"{a}/{s}" for a in presets for s in presets[a])
        raise UserError(f"--preset {name} is unknown; expected one of {known}.")
    values = presets[architecture][size]
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in values.items()}
