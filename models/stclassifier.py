"""The four classifiers: pixel-set encoder, temporal encoder, decoder; and those that were trained on the folds of a run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch, present_first, send
from models import competings, ltae, tae
from models.architecture import Architecture, register
from models.competings import GRU, TempConv
from models.decoder import get_decoder
from models.ensemble import Ensemble, load_members
from models.layers import Positions, agree_attention, trainable_parameters
from models.ltae import LTAE
from models.pse import PixelSet, PixelSetEncoder
from models.tae import TemporalAttentionEncoder


class PseClassifier(nn.Module):
    """Encodes the pixels of each date, then the series of dates, then decodes class logits.

    Args:
        spatial_encoder: the pixel-set encoder.
        temporal_encoder: any module from (B, L, E) to (B, E').
        mlp4: widths of the decoder, from E' to the number of classes.

    Raises:
        ValueError: if mlp4 does not start with the temporal encoder's output width.
    """

    def __init__(
        self, spatial_encoder: PixelSetEncoder, temporal_encoder: nn.Module, mlp4: Sequence[int]
    ) -> None:
        super().__init__()
        if mlp4[0] != temporal_encoder.output_dim:
            raise ValueError(
                f"Decoder: mlp4[0] is {mlp4[0]} but the temporal encoder gives {temporal_encoder.output_dim} numbers; "
                f"start mlp4 with {temporal_encoder.output_dim}."
            )
        # Names fixed by published weights.
        self.spatial_encoder = spatial_encoder
        self.temporal_encoder = temporal_encoder
        self.decoder = get_decoder(mlp4)

    def forward(self, input: PixelSet | Batch) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies a batch of parcels.

        Args:
            input: ((pixels, mask), extra), or (pixels, mask) without extra features: pixels (B, L, C, S), mask
                (B, L, S) of 0 and 1, extra (B, L, F); all dates are present and those the model was made for. Or a
                `Batch`, whose positions are computed from its days.

        Returns:
            Logits (B, K); with return_att a tuple of logits and attention (H, B, L). In evaluation mode, those of a
            parcel without any observation are NaN.
        """
        encoded, attention = self._encode(input)
        logits = self.decoder(encoded)
        return logits if attention is None else (logits, attention)

    def embed(self, input: PixelSet | Batch) -> Tensor:
        """The vector of each parcel that the decoder takes, (B, mlp4[0]); in evaluation NaN without observation."""
        return self._encode(input)[0]

    def attention(self, input: PixelSet | Batch) -> Tensor:
        """Each head's attention to each date, (H, B, L), whatever return_att is; it sums to 1 over the dates.

        Raises:
            ValueError: if the temporal encoder has none.
        """
        encoder = self.temporal_encoder
        if not hasattr(encoder, "return_att"):
            raise ValueError(f"{type(self).__name__} has no attention; PseLTae and PseTae do.")
        asked, encoder.return_att = encoder.return_att, True
        try:
            return self._encode(input)[1]
        finally:
            encoder.return_att = asked

    def _encode(self, input: PixelSet | Batch) -> tuple[Tensor, Tensor | None]:
        """The vector of each parcel, (B, mlp4[0]), and, with return_att, the attention (H, B, L)."""
        if isinstance(input, Batch):
            return self._encode_dates(input)
        encoded = self.temporal_encoder(self.spatial_encoder(input))
        return encoded if isinstance(encoded, tuple) else (encoded, None)

    def _encode_dates(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The same of parcels whose dates differ, or of which some are absent."""
        L = batch.mask.shape[1]
        batch, place = present_first(batch)
        n_dates, present = batch.present.sum(1).tolist(), send(batch.present, batch.mask.device)
        x = self.spatial_encoder(batch.published(), n_dates)
        encoded = self.temporal_encoder(x, batch.days, present, n_dates)
        encoded, attention = encoded if isinstance(encoded, tuple) else (encoded, None)
        if not self.training:
            encoded = encoded.masked_fill(~present.any(1, keepdim=True), torch.nan)
        if attention is None:
            return encoded, None
        attention = attention * present  # a parcel without dates attends to none
        whole = attention.new_zeros(*attention.shape[:2], L)
        return encoded, whole.scatter(2, place.expand_as(attention), attention)

    def param_ratio(self) -> int:
        """Prints the number of trainable parameters with each part's share, and returns it."""
        parts = {"spatial": self.spatial_encoder, "temporal": self.temporal_encoder, "decoder": self.decoder}
        counts = {name: trainable_parameters(part) for name, part in parts.items()}
        total = sum(counts.values())
        shares = ", ".join(f"{name} {100 * count / total:.1f}%" for name, count in counts.items())
        print(f"{total} trainable parameters: {shares}")
        return total


def n_dates(architecture: Architecture) -> dict[str, Any]:
    """What the attention must know of the dates: their number, None where they vary."""
    return {"len_max_seq": architecture.n_dates}


_ATTENTION = {"output": "mlp3", "has_attention": True, "dates": n_dates}


@register(
    "ltae", "PSE + L-TAE", ltae.SIZES, **_ATTENTION, agree=partial(agree_attention, share_channels=True)
)
class PseLTae(PseClassifier):
    """Pixel-set encoder and lightweight temporal attention; arguments as in `PixelSetEncoder` and `LTAE`.

    mlp3 are the widths after the attention, mlp4 those of the decoder.
    """

    def __init__(
        self,
        input_dim: int = 10,
        mlp1: Sequence[int] = (10, 32, 64),
        pooling: str = "mean_std",
        mlp2: Sequence[int] = (132, 128),
        with_extra: bool = True,
        extra_size: int = 4,
        n_head: int = 16,
        d_k: int = 8,
        d_model: int | None = 256,
        mlp3: Sequence[int] = (256, 128),
        dropout: float = 0.2,
        T: int = 1000,
        len_max_seq: int | None = 24,
        positions: Positions = None,
        mlp4: Sequence[int] = (128, 64, 32, 20),
        return_att: bool = False,
    ) -> None:
        pse = PixelSetEncoder(input_dim, mlp1, pooling, mlp2, with_extra, extra_size)
        encoder = LTAE(mlp2[-1], n_head, d_k, mlp3, dropout, d_model, T, len_max_seq, positions, return_att)
        super().__init__(pse, encoder, mlp4)


@register("tae", "PSE + TAE", tae.SIZES, **_ATTENTION, agree=partial(agree_attention, share_channels=False))
class PseTae(PseClassifier):
    """Pixel-set encoder and temporal attention; arguments as in `PixelSetEncoder` and `TemporalAttentionEncoder`."""

    def __init__(
        self,
        input_dim: int = 10,
        mlp1: Sequence[int] = (10, 32, 64),
        pooling: str = "mean_std",
        mlp2: Sequence[int] = (132, 128),
        with_extra: bool = True,
        extra_size: int = 4,
        n_head: int = 4,
        d_k: int = 32,
        d_model: int | None = None,
        mlp3: Sequence[int] = (512, 128, 128),
        dropout: float = 0.2,
        T: int = 1000,
        len_max_seq: int | None = 24,
        positions: Positions = None,
        mlp4: Sequence[int] = (128, 64, 32, 20),
        return_att: bool = False,
    ) -> None:
        pse = PixelSetEncoder(input_dim, mlp1, pooling, mlp2, with_extra, extra_size)
        encoder = TemporalAttentionEncoder(
            mlp2[-1], n_head, d_k, d_model, mlp3, dropout, T, len_max_seq, positions, return_att
        )
        super().__init__(pse, encoder, mlp4)


@register("gru", "PSE + GRU", competings.GRU_SIZES, "hidden_dim")
class PseGru(PseClassifier):
    """Pixel-set encoder and GRU; arguments as in `PixelSetEncoder` and `GRU`."""

    def __init__(
        self,
        input_dim: int = 10,
        mlp1: Sequence[int] = (10, 32, 64),
        pooling: str = "mean_std",
        mlp2: Sequence[int] = (132, 128),
        with_extra: bool = True,
        extra_size: int = 4,
        hidden_dim: int = 128,
        mlp4: Sequence[int] = (128, 64, 32, 20),
        positions: Positions = None,
    ) -> None:
        pse = PixelSetEncoder(input_dim, mlp1, pooling, mlp2, with_extra, extra_size)
        super().__init__(pse, GRU(mlp2[-1], hidden_dim, positions), mlp4)


def regular_dates(architecture: Architecture) -> dict[str, Any]:
    """The dates that TempCNN sees: those of all parcels, or a grid where they vary."""
    if not architecture.varying:
        return {"seq_len": architecture.n_dates}
    grid = architecture.grid
    return {"seq_len": len(grid), "positions": grid, "grid": grid}


@register("tcnn", "PSE + TempCNN", competings.TEMPCNN_SIZES, "mlp3", dates=regular_dates)
class PseTempCNN(PseClassifier):
    """Pixel-set encoder and temporal convolutions; arguments as in `PixelSetEncoder` and `TempConv` (mlp3: nfc)."""

    def __init__(
        self,
        input_dim: int = 10,
        mlp1: Sequence[int] = (10, 32, 64),
        pooling: str = "mean_std",
        mlp2: Sequence[int] = (132, 128),
        with_extra: bool = True,
        extra_size: int = 4,
        nker: Sequence[int] = (32, 32, 128),
        mlp3: Sequence[int] = (128, 128),
        seq_len: int = 24,
        mlp4: Sequence[int] = (128, 64, 32, 20),
        positions: Sequence[float] | None = None,
        *,
        grid: Sequence[float] | None = None,
    ) -> None:
        pse = PixelSetEncoder(input_dim, mlp1, pooling, mlp2, with_extra, extra_size)
        super().__init__(pse, TempConv(mlp2[-1], nker, seq_len, mlp3, positions, grid=grid), mlp4)


class PseLTae_pretrained(Ensemble):
    """The classifiers trained on the folds of a cross-validation, read from their weights; see `load_members`.

    Args:
        weight_folder: folder of `Fold_k/model.pth.tar`.
        hyperparameters: keyword arguments of the classifier that was trained.
        device: where to load it.
        fold: "all" for the ensemble, or the number, from 1, of one fold.
    """

    classifier: type[PseClassifier] = PseLTae

    def __init__(
        self,
        weight_folder: str | Path,
        hyperparameters: dict[str, Any],
        device: str | torch.device | None = "cuda",
        fold: int | str = "all",
    ) -> None:
        super().__init__(load_members(self.classifier, weight_folder, hyperparameters, device, fold))

    @classmethod
    def from_run(
        cls, folder: str | Path, fold: int | str = "all", device: str | torch.device | None = None
    ) -> "PseLTae_pretrained":
        """The classifiers of a results folder of train.py, as the conf.json beside its folds describes them.

        Args:
            folder: results folder. Without a conf.json, like published weights, its classifiers are taken to have
                the published default hyperparameters and to be trained on the published dates.
            fold, device: as for the class; without a device CUDA if there is a GPU, else the CPU.

        Raises:
            FileNotFoundError: if the fold is missing.
            ValueError: as for the class; also if there is no such folder, or conf.json is damaged or of another classifier.
        """
        from learning.run import open_run  # the one arrow upwards: published usage starts at this class

        run = open_run(folder, classifier=cls.classifier)
        return cls(folder, run.architecture.hyperparameters(), device, fold)


class PseTae_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseTae`."""

    classifier = PseTae


class PseGru_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseGru`."""

    classifier = PseGru


class PseTempCNN_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseTempCNN`."""

    classifier = PseTempCNN
