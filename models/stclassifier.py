"""The four classifiers: pixel-set encoder, temporal encoder, decoder; and ensembles of trained ones."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.competings import GRU, TempConv
from models.decoder import get_decoder
from models.layers import Positions, trainable_parameters
from models.ltae import LTAE
from models.pse import PixelSet, PixelSetEncoder, split_input
from models.series import Series, present_first
from models.tae import TemporalAttentionEncoder
from models.weights import choose_folds, load_weights, read_checkpoint


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

    def forward(self, input: PixelSet | Series) -> Tensor | tuple[Tensor, Tensor]:
        """Classifies a batch of parcels.

        Args:
            input: ((pixels, mask), extra), or (pixels, mask) without extra features: pixels (B, L, C, S), mask
                (B, L, S) of 0 and 1, extra (B, L, F); all dates are present and those the model was made for. Or a
                `Series`, whose positions are computed from its days.

        Returns:
            Logits (B, K); with return_att a tuple of logits and attention (H, B, L). In evaluation mode, those of a
            parcel without any observation are NaN.
        """
        encoded, attention = self._encode(input)
        logits = self.decoder(encoded)
        return logits if attention is None else (logits, attention)

    def embed(self, input: PixelSet | Series) -> Tensor:
        """The vector of each parcel that the decoder takes, (B, mlp4[0]); in evaluation NaN without observation."""
        return self._encode(input)[0]

    def attention(self, input: PixelSet | Series) -> Tensor:
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

    def _encode(self, input: PixelSet | Series) -> tuple[Tensor, Tensor | None]:
        """The vector of each parcel, (B, mlp4[0]), and, with return_att, the attention (H, B, L)."""
        if isinstance(input, Series):
            return self._encode_series(input)
        encoded = self.temporal_encoder(self.spatial_encoder(input))
        return encoded if isinstance(encoded, tuple) else (encoded, None)

    def _encode_series(self, series: Series) -> tuple[Tensor, Tensor | None]:
        L = series.mask.shape[1]
        (pixels, mask, extra, days), present, place = present_first(series)
        x = self.spatial_encoder((pixels, mask) if extra is None else ((pixels, mask), extra), present)
        encoded = self.temporal_encoder(x, days, present)
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
        ltae = LTAE(mlp2[-1], n_head, d_k, mlp3, dropout, d_model, T, len_max_seq, positions, return_att)
        super().__init__(pse, ltae, mlp4)


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
        tae = TemporalAttentionEncoder(
            mlp2[-1], n_head, d_k, d_model, mlp3, dropout, T, len_max_seq, positions, return_att
        )
        super().__init__(pse, tae, mlp4)


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


class Ensemble(nn.Module):
    """Trained classifiers, one per fold, that predict together; always in evaluation mode.

    Args:
        members: classifiers with the same input and classes.
    """

    def __init__(self, members: Sequence[PseClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        """Stays in evaluation mode, whatever is asked: batch statistics and dropout would change predictions."""
        return super().train(False)

    def _look_at(self, input: PixelSet | Series) -> None:
        """Called with every batch."""

    @torch.no_grad()
    def member_log_probabilities(self, input: PixelSet | Series) -> Tensor:
        """Every member's log-softmax, (members, B, K)."""
        self._look_at(input)
        outputs = (member(input) for member in self.members)
        logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.log_softmax(torch.stack(logits), dim=2)

    def forward(self, input: PixelSet | Series) -> Tensor:
        """Mean over the members of their log-softmax, (B, K)."""
        return self.member_log_probabilities(input).mean(0)

    def predict_class(self, input: PixelSet | Series) -> Tensor:
        """Index of the most likely class of each parcel, (B,)."""
        return self(input).argmax(1)

    @torch.no_grad()
    def embed(self, input: PixelSet | Series) -> Tensor:
        """Every member's `embed`, (members, B, mlp4[0]); each member has a space of its own."""
        return torch.stack([member.embed(input) for member in self.members])

    @torch.no_grad()
    def attention(self, input: PixelSet | Series) -> Tensor:
        """Every member's `attention`, (members, H, B, L); head h of one has nothing to do with head h of another."""
        return torch.stack([member.attention(input) for member in self.members])


class PseLTae_pretrained(Ensemble):
    """The classifiers trained on the folds of a cross-validation, read from their weights.

    Args:
        weight_folder: folder of `Fold_k/model.pth.tar`.
        hyperparameters: keyword arguments of the classifier that was trained.
        device: where to load it.
        fold: "all" for the ensemble, or the number, from 1, of one fold.

    Raises:
        FileNotFoundError: if the folder or the fold is missing.
        ValueError: if a checkpoint is damaged, unsafe, or of another architecture, or the device is missing.
    """

    classifier: type[PseClassifier] = PseLTae

    def __init__(
        self,
        weight_folder: str | Path,
        hyperparameters: dict[str, Any],
        device: str | torch.device = "cuda",
        fold: int | str = "all",
    ) -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r} but PyTorch finds no GPU; pass device='cpu'.")
        members = []
        for path in choose_folds(weight_folder, fold).values():
            member = self.classifier(**hyperparameters)
            load_weights(member, read_checkpoint(path)["state_dict"], source=path)
            members.append(member)
        super().__init__(members)
        self._is_first_batch = True
        self.to(device)

    def _look_at(self, input: PixelSet | Series) -> None:
        """Warns if the first batch is plainly not normalised: large numbers, or many of which none is below 0."""
        if not self._is_first_batch:
            return
        self._is_first_batch = False
        pixels = input.pixels if isinstance(input, Series) else split_input(input)[0][0]
        if pixels.abs().median() > 10 or (len(pixels) >= 8 and pixels.min() >= 0):
            warnings.warn(
                f"the pixels are not normalised, they are from {pixels.min():g} to {pixels.max():g}, so the predictions mean "
                "nothing; learning.run.open_run(folder).predict(dataset_folder) reads and normalises them as in training.",
                stacklevel=4,
            )

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
        from learning.run import open_run  # that module imports this one

        return open_run(folder, cls.classifier.__name__).load(fold, device)


class PseTae_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseTae`."""

    classifier = PseTae


class PseGru_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseGru`."""

    classifier = PseGru


class PseTempCNN_pretrained(PseLTae_pretrained):
    """`PseLTae_pretrained` for `PseTempCNN`."""

    classifier = PseTempCNN
