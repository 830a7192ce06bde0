"""Varying dates and missing observations in the models: what is absent must not matter, and nothing else may change."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batch import Batch
from models.competings import interpolate
from models.stclassifier import PseGru, PseLTae, PseTae, PseTempCNN

C, S, F, K = 4, 6, 2, 5
PSE = {"input_dim": C, "mlp1": [C, 8, 16], "extra_size": F, "mlp4": [16, K]}
GRID = [0, 30, 60, 90, 120, 150]
MODELS = {
    "L-TAE": (PseLTae, {"n_head": 4, "d_k": 4, "d_model": None, "mlp3": [32, 16]}),
    "L-TAE, d_model": (PseLTae, {"n_head": 4, "d_k": 4, "d_model": 16, "mlp3": [16, 16]}),
    "TAE": (PseTae, {"n_head": 2, "d_k": 4, "mlp3": [64, 16]}),
    "TAE, d_model": (PseTae, {"n_head": 2, "d_k": 4, "d_model": 16, "mlp3": [32, 16]}),
    "GRU": (PseGru, {"hidden_dim": 16}),
    "TempCNN": (PseTempCNN, {"nker": [8, 8], "mlp3": [16], "seq_len": len(GRID), "grid": GRID}),
}
POOLINGS = ["mean_std", "mean_max"]


def build(name: str, pooling: str = "mean_std", **changes):
    """A model for varying dates, in double precision, with statistics and weights that hide nothing."""
    kind, arguments = MODELS[name]
    torch.manual_seed(3)
    arguments = {"positions": "days", **arguments}
    if name == "TempCNN":
        arguments["positions"] = GRID
    if kind in (PseLTae, PseTae):
        arguments["len_max_seq"] = None
    model = kind(**PSE, mlp2=[2 * 16 + F, 32], pooling=pooling, **(arguments | changes)).double()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return model.eval()


def draw(B: int = 7, L: int = 9, seed: int = 0) -> Batch:
    """Parcels of 1 to L dates, present ones first, with pixels that are absent now and then."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(B, L, C, S, generator=g, dtype=torch.float64)
    n = torch.randint(1, L + 1, (B,), generator=g)
    n[0], n[1] = L, 1
    mask = (torch.rand(B, L, S, generator=g) < 0.7).double()
    mask[..., 0] = 1
    mask = mask * (torch.arange(L) < n[:, None])[..., None]
    extra = torch.randn(B, 1, F, generator=g, dtype=torch.float64).expand(-1, L, -1)
    days = torch.randint(0, 160, (B, L), generator=g).sort(1).values
    return Batch(pixels, mask, extra, days)


def one(series: Batch, parcel: int, dates: Tensor | slice = slice(None)) -> Batch:
    """A batch of one parcel, with some of its dates."""
    return Batch(*(x[parcel : parcel + 1][:, dates] for x in series[:4]))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_neighbours_or_padding(name, pooling):
    model, series = build(name, pooling), draw()
    logits = model(series)
    assert logits.isfinite().all() and logits.std(0).min() > 1e-4
    for i, n in enumerate((series.mask.sum(2) > 0).sum(1)):
        assert close(model(one(series, i, slice(0, n)))[0], logits[i])


@pytest.mark.parametrize("name", MODELS)
def test_in_single_precision_too(name):
    model, series = build(name).float(), Batch(*(x.float() for x in draw()[:4]))
    logits = model(series)
    for i, n in enumerate((series.mask.sum(2) > 0).sum(1)):
        assert close(
            model(one(series, i, slice(0, n)))[0],
            logits[i],
            1e-6 * max(1, float(logits.detach().abs().max())),
        )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GRU"])
def test_logits_do_not_depend_on_the_order_of_dates(name):
    model, series = build(name), draw()
    order = torch.randperm(series.days.shape[1], generator=torch.Generator().manual_seed(1))
    assert close(model(Batch(*(x[:, order] for x in series[:4]))), model(series))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_absent_does_not_matter(name, pooling):
    """Dates and pixels whose mask is 0 may hold anything; max and min read copies of present pixels there."""
    model, series = build(name, pooling), draw()
    logits = model(series)
    absent = (series.mask == 0).unsqueeze(2).expand_as(series.pixels)
    if pooling == "mean_max":
        absent = absent & (series.mask.sum(2) == 0)[:, :, None, None]
    days = torch.where(series.mask.sum(2) == 0, 77, series.days)
    other = series._replace(pixels=series.pixels.masked_fill(absent, 1e3), days=days)
    assert close(model(other), logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_date_in_between_can_be_absent(name):
    model, series = build(name), draw()
    series.mask[0, 4] = 0
    rest = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    assert close(model(series)[0], model(one(series, 0, rest))[0])


@pytest.mark.parametrize("name", MODELS)
def test_days_matter(name):
    model, series = build(name), draw()
    other = series._replace(days=(series.days * 3) % 160)
    assert (model(other) - model(series)).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_parcel_without_observations_is_undefined(name):
    model, series = build(name), draw()
    logits = model(series)
    series.mask[2] = 0
    found = model(series)
    assert found[2].isnan().all()
    assert close(found[[0, 1, 3, 4, 5, 6]], logits[[0, 1, 3, 4, 5, 6]])
    series.mask[:] = 0
    assert model(series).isnan().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_training_sees_only_what_is_present(name, pooling):
    """Batch statistics, gradients and running statistics are those of parcels without any padding or gap."""
    model, series = build(name, pooling).train(), draw()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    padded = copy.deepcopy(model)
    wide = Batch(*(torch.cat([x[:, :4], torch.full_like(x[:, :2], 5), x[:, 4:]], dim=1) for x in series[:4]))
    wide.mask[:, 4:6] = 0
    for net, data in ((model, series), (padded, wide)):
        (net(data) * torch.arange(7 * K).view(7, K)).sum().backward()
    for (key, ours), theirs in zip(model.state_dict().items(), padded.state_dict().values()):
        assert close(ours, theirs), key
    for (key, ours), theirs in zip(model.named_parameters(), padded.parameters()):
        if ours.grad is not None:
            assert close(ours.grad, theirs.grad, 1e-6 * float(1 + ours.grad.abs().max())), key
    n_rows = S * (series.mask.sum(2) > 0).sum()
    rows = series.pixels.permute(0, 1, 3, 2)[series.mask.sum(2) > 0].reshape(n_rows, C)
    lin, bn = model.spatial_encoder.mlp1[0].lin, model.spatial_encoder.mlp1[0].bn
    fresh = build(name, pooling).spatial_encoder.mlp1[0].bn
    assert close(bn.running_mean, 0.9 * fresh.running_mean + 0.1 * lin(rows).mean(0), 1e-8)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_fixed_dates_through_the_general_path_equal_the_published_path(name, pooling):
    days = [3, 20, 25, 60, 100, 151]
    changes = {"positions": days}
    if name.startswith(("L-TAE", "TAE")):
        changes["len_max_seq"] = len(days)
    if name == "TempCNN":
        changes["grid"] = None
    model = build(name, pooling, **changes)
    series = draw(L=6)
    series = series._replace(
        mask=torch.ones_like(series.mask), days=torch.tensor(days).expand(len(series.days), -1)
    )
    published = model(((series.pixels, series.mask), series.extra))
    assert close(model(series), published, 1e-6)  # the table is kept in single precision


def test_a_model_of_fixed_dates_refuses_others():
    days = [3, 20, 25, 60, 100, 151]
    for name in ("L-TAE, d_model", "TempCNN"):
        changes = (
            {"positions": days, "grid": None} if name == "TempCNN" else {"positions": days, "len_max_seq": 6}
        )
        with pytest.raises(ValueError, match="exactly 6 dates, all present"):
            build(name, **changes)(draw(L=6))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "TempCNN"])
def test_a_model_of_varying_dates_asks_for_days(name):
    series = draw()
    with pytest.raises(ValueError, match="Batch"):
        build(name)(((series.pixels, series.mask), series.extra))


@pytest.mark.parametrize("name", ["L-TAE", "TAE, d_model"])
def test_attention_stays_with_its_dates(name):
    model, series = build(name, return_att=True), draw()
    logits, attention = model(series)
    present = series.mask.sum(2) > 0
    assert attention.shape[1:] == present.shape
    assert close(attention.sum(2), torch.ones(()).double()) and (attention[:, ~present] == 0).all()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    _, shuffled = model(Batch(*(x[:, order] for x in series[:4])))
    assert close(shuffled, attention[:, :, order])


def test_interpolation_equals_numpys():
    g = torch.Generator().manual_seed(0)
    x, days = torch.randn(5, 8, 3, generator=g), torch.rand(5, 8, generator=g) * 150
    present = torch.rand(5, 8, generator=g) < 0.6
    present[:, 3] = True
    present[0] = torch.arange(8) == 3
    grid = torch.tensor(GRID).float()
    found = interpolate(x, days, present, grid)
    for b in range(5):
        order = days[b][present[b]].argsort()
        for e in range(3):
            expected = np.interp(grid, days[b][present[b]][order], x[b, present[b], e][order])
            assert np.allclose(found[b, :, e], expected, atol=1e-5)


def test_interpolation_of_a_day_with_two_dates_takes_one_of_them():
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    found = interpolate(x, torch.tensor([[0, 30, 30]]), None, torch.tensor([0.0, 15, 30, 60]))
    assert found[0, 2, 0] in (2, 3) and found[0, :2, 0].tolist() == [1, 1.5] and found[0, 3, 0] in (2, 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_mask_need_not_be_asked_where_the_batch_tells_what_is_present(name):
    """What the batch says counts, so that no host waits for a device; see also `tests/test_cuda.py`."""
    model, batch = build(name), draw()
    batch.mask[0, 3] = 0
    told = batch._replace(present=(batch.mask != 0).any(2).numpy())
    assert torch.equal(model(told), model(batch))
    less = told._replace(present=told.present & (np.arange(9) != 0))
    assert close(model(less)[0], model(one(batch, 0, torch.tensor([1, 2, 4, 5, 6, 7, 8])))[0])


def test_the_earlier_name_of_a_batch_still_serves() -> None:
    from models.series import Series as earlier

    assert earlier is Batch
