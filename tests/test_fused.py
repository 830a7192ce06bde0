"""The fused form of mlp1 and pooling against the plain one in `models/pse.py`."""

import copy
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from models import pse
from models.fast import pooling as fused
from models.fast.moments import mean_std
from models.pse import PixelSetEncoder

EXACT = 1e-10  # float64, as a share of the largest entry
B, L, S, C = 7, 5, 11, 4
Batch = tuple[Tensor, Tensor]


def build(mlp1: Sequence[int] = (C, 8, 6), seed: int = 0) -> PixelSetEncoder:
    """An encoder in float64 whose BatchNorms have weights, biases and running statistics of their own."""
    torch.manual_seed(seed)
    encoder = PixelSetEncoder(C, mlp1, mlp2=[2 * mlp1[-1], 5], with_extra=False).double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder


def draw_batch(
    parcels: int = B,
    per_date: bool = False,
    sizes: Sequence[int] | None = None,
    dates: int = L,
    slots: int = S,
) -> Batch:
    """Pixels (parcels, dates, C, slots) and mask; what is masked is no copy, so that any use of it shows."""
    r = torch.Generator().manual_seed(1)
    pixels = torch.randn(parcels, dates, C, slots, generator=r, dtype=torch.float64)
    if per_date:  # another number of ones at every date, anywhere
        n = torch.randint(1, slots + 1, (parcels, dates, 1), generator=r)
        return pixels, (torch.rand(parcels, dates, slots, generator=r).argsort(2) < n).double()
    n = torch.randint(1, slots + 1, (parcels,), generator=r) if sizes is None else torch.tensor(sizes)
    return pixels, (torch.arange(slots) < n.unsqueeze(1)).double().unsqueeze(1).expand(-1, dates, -1)


def run_fused(encoder: PixelSetEncoder, batch: Batch) -> list[Tensor]:
    """Mean and standard deviation, fused."""
    return list(fused.pool_mean_std(*batch, encoder.mlp1))


def run_plain(encoder: PixelSetEncoder, batch: Batch) -> list[Tensor]:
    """The same in plain form."""
    return encoder._pool(*batch)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def backward(output: list[Tensor]) -> None:
    """Gradients of a sum in which every entry of the output has a weight of its own."""
    weighted = (
        (x * torch.linspace(-1, 2 + i, x.numel(), dtype=x.dtype).view_as(x)).sum()
        for i, x in enumerate(output)
    )
    sum(weighted).backward()


def assert_like_plain(encoder: PixelSetEncoder, batch: Batch) -> None:
    """Outputs, gradients and BatchNorm's state agree in float64."""
    ours, plain = encoder, copy.deepcopy(encoder)
    found, expected = run_fused(ours, batch), run_plain(plain, batch)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < EXACT
    backward(found)
    backward(expected)
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        elif p.grad is None:  # a bias before a training-mode BatchNorm has no influence
            assert name.endswith("lin.bias") and q.grad.abs().max() < EXACT * largest
        else:
            assert relative_error(p.grad, q.grad) < EXACT, name
    for (name, p), q in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert relative_error(p.double(), q.double()) < EXACT, name


@pytest.mark.parametrize(
    "chunk_rows", [1, 2 * S * L, 10**6], ids=["one parcel", "two and a rest", "one chunk"]
)
@pytest.mark.parametrize("per_date", [False, True], ids=["one mask", "mask per date"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_like_plain(training: bool, per_date: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_PART_ROWS", chunk_rows)
    assert_like_plain(build().train(training), draw_batch(per_date=per_date))


@pytest.mark.parametrize("mlp1", [(C, 6), (C, 3, 9, 5), (C, 1, 2)], ids=str)
def test_any_number_of_layers(mlp1: Sequence[int]) -> None:
    assert_like_plain(build(mlp1).train(), draw_batch())
    assert_like_plain(build(mlp1).eval(), draw_batch())


@pytest.mark.parametrize("parcels", [1, 2, 3])
def test_few_parcels(parcels: int) -> None:
    assert_like_plain(build().train(), draw_batch(parcels))


def test_one_date_and_one_pixel() -> None:
    assert_like_plain(build().train(), draw_batch(dates=1))
    assert_like_plain(build().train(), draw_batch(slots=1))


def test_a_last_pixel_that_alone_is_valid() -> None:
    pixels, mask = draw_batch(per_date=True)
    mask[0] = 0
    mask[0, :, -1] = 1
    assert_like_plain(build().train(), (pixels, mask))


def test_layout_and_type_of_the_input_do_not_matter() -> None:
    encoder, (pixels, mask) = build().train(), draw_batch()
    pixel_major = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wider = torch.zeros(B, L + 2, C, 2 * S, dtype=torch.float64)[:, 1:-1, :, ::2].copy_(pixels)
    for other in (pixel_major, wider):
        assert not other.is_contiguous()
        assert_like_plain(copy.deepcopy(encoder), (other, mask.contiguous()))
    expected = run_fused(copy.deepcopy(encoder), (pixels, mask))
    for other in (mask.float(), mask.bool()):
        found = run_fused(copy.deepcopy(encoder), (pixels, other))
        assert max(map(relative_error, found, expected)) < EXACT


# ------------------------------------------------------------------------------------------- batch statistics


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_over_several_batches(momentum: float | None) -> None:
    encoder = build().train()
    for layer in encoder.mlp1:
        layer.bn.momentum = momentum
    for parcels in (2, 5, 4):
        encoder.zero_grad()
        assert_like_plain(encoder, draw_batch(parcels))
    assert all(layer.bn.num_batches_tracked == 3 for layer in encoder.mlp1)


def test_a_layer_whose_statistics_are_frozen() -> None:
    for frozen in (0, 1):
        encoder = build((C, 8, 7, 6)).train()
        encoder.mlp1[frozen].bn.eval()
        assert_like_plain(encoder, draw_batch())


@pytest.mark.parametrize("frozen", ["mlp1.0", "mlp1.1", "mlp1.0.lin", "mlp1"])
def test_frozen_parameters(frozen: str) -> None:
    encoder = build().train()
    encoder.get_submodule(frozen).requires_grad_(False)
    if frozen != "mlp1":
        return assert_like_plain(encoder, draw_batch())
    assert not any(x.requires_grad for x in run_fused(encoder, draw_batch()))


def contrast(weight: Tensor, generator: torch.Generator) -> None:
    """Lets a layer look at differences between its inputs alone."""
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        weight -= weight.mean(1, keepdim=True)


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
@pytest.mark.parametrize("layer", [0, 1], ids=["bands", "activations"])
def test_nearly_collinear_inputs_of_a_layer(layer: int, distance: float) -> None:
    """BatchNorm then magnifies what cancellation leaves; ours may lose little more than the plain form."""
    encoder, (pixels, mask) = build().train(), draw_batch()
    r = torch.Generator().manual_seed(2)
    if layer == 0:
        pixels = pixels[:, :, :1] + distance * pixels
    else:  # all units of the first layer nearly the same
        first = encoder.mlp1[0].lin.weight
        first.data = first[:1] + distance * torch.randn(first.shape, generator=r, dtype=torch.float64)
        for p in (encoder.mlp1[0].bn.weight, encoder.mlp1[0].bn.bias):
            p.data = torch.ones_like(p)
    contrast(encoder.mlp1[layer].lin.weight.data, r)
    encoder.mlp1[layer].bn.eps = 1e-12
    exact = run_plain(copy.deepcopy(encoder), (pixels, mask))
    assert_like_plain(copy.deepcopy(encoder), (pixels, mask))
    single = copy.deepcopy(encoder).float(), (pixels.float(), mask.float())
    ours = run_fused(copy.deepcopy(single[0]), single[1])
    plain = run_plain(*single)
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert relative_error(x, z) < 4 * relative_error(y, z) + 1e-5


def test_dead_units_and_constant_bands() -> None:
    """A variance of exactly zero, of a band, of a combination of bands and of a unit that never fires."""
    encoder, (pixels, mask) = build().train(), draw_batch()
    pixels[:, :, 1] = 3
    with torch.no_grad():
        encoder.mlp1[0].lin.weight[2] = 0
        encoder.mlp1[0].bn.bias[3] = -100
    assert_like_plain(encoder, (pixels, mask))


def test_not_a_number_is_passed_on() -> None:
    """Weights may diverge: training then ends with a sentence on the loss, not in linear algebra."""
    encoder = build().train()
    encoder.mlp1[0].lin.weight.data[0] = float("nan")
    assert all(x.isnan().any() for x in run_fused(encoder, draw_batch()))
    pixels, mask = draw_batch()
    pixels[0, 0, 0, 0] = float("inf")
    assert all(x.isnan().any() for x in run_fused(build().train(), (pixels, mask)))


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_date", [False, True])
def test_the_deviation_of_one_pixel_has_no_gradient(per_date: bool, dtype: torch.dtype) -> None:
    """1 / std is 3e15 there."""
    encoder = build().train().to(dtype)
    pixels, mask = (x.to(dtype) for x in draw_batch(sizes=[1, 11, 4, 1, 2, 1, 3]))
    _, std = run_fused(encoder, (pixels, mask.contiguous() if per_date else mask))
    assert torch.allclose(std[[0, 3, 5]], torch.tensor(1e-31, dtype=dtype).sqrt(), rtol=1e-6, atol=0)
    std[[0, 3, 5]].sum().backward()
    for layer in encoder.mlp1:
        assert layer.lin.weight.grad.abs().max() == 0


def test_gradients_in_single_precision() -> None:
    encoder, batch = build().train(), draw_batch(per_date=True)
    single = copy.deepcopy(encoder).float()
    backward(run_plain(encoder, batch))
    backward(run_fused(single, tuple(x.float() for x in batch)))
    for (name, p), q in zip(encoder.named_parameters(), single.parameters(), strict=True):
        if p.grad is not None and not name.endswith("lin.bias"):
            assert relative_error(q.grad.double(), p.grad) < 1e-4, name


def test_a_batch_without_any_date_has_no_gradient() -> None:
    encoder, (pixels, mask) = build().eval(), draw_batch()
    mean, std = fused.pool_mean_std(pixels, mask, encoder.mlp1, [0] * B)
    (mean.sum() + std.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_accumulated_gradients() -> None:
    encoder = build().train()
    backward(run_fused(encoder, draw_batch()))
    once = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    backward(run_fused(encoder, draw_batch()))
    twice = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(relative_error(q, 2 * p) < EXACT for p, q in zip(once, twice, strict=True))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    encoder = build().train()
    mean, _ = run_fused(encoder, draw_batch())
    (gradient,) = torch.autograd.grad(mean.square().sum(), encoder.mlp1[0].lin.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------- in the encoder


def test_encoder_uses_it_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("models.pse.pool_mean_std", lambda *a: calls.append(a) or fused.pool_mean_std(*a))
    pixels, mask = draw_batch()
    encoder = build()
    encoder((pixels, mask))
    assert len(calls) == 1
    encoder((pixels.requires_grad_(), mask))  # a saliency map
    assert len(calls) == 1
    with torch.no_grad():
        encoder((pixels, mask))
    assert len(calls) == 2
    PixelSetEncoder(C, [C, 6], "max_min", [12, 5], with_extra=False).double()((pixels.detach(), mask))
    assert len(calls) == 2


def test_inference_mode_and_no_grad() -> None:
    encoder, batch = build().eval(), draw_batch()
    expected = encoder(batch)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(encoder(batch), expected)
    with torch.inference_mode():  # statistics of batches can be taken then, too
        encoder.train()(batch)
    assert encoder.mlp1[0].bn.num_batches_tracked == 1


def test_copies_and_pickles() -> None:
    encoder, batch = build().train(), draw_batch()
    backward(run_fused(encoder, batch))
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other.eval()(batch), encoder.eval()(batch))


def test_threads_do_not_meet() -> None:
    """Buffers belong to a call."""
    encoders, batch = [build(seed=seed).eval() for seed in range(4)], draw_batch(40)
    with torch.no_grad():
        expected = [encoder(batch) for encoder in encoders]

    def run(encoder: PixelSetEncoder) -> Tensor:
        with torch.no_grad():
            return [encoder(batch) for _ in range(20)][-1]

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, encoders), expected))


def test_a_third_of_the_memory_is_kept_for_the_backward_pass() -> None:
    """Bytes of all tensors that autograd keeps, each counted once."""

    def kept(run: object) -> int:
        storages = {}

        def remember(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            output = run(encoder, batch)
        assert output[0].requires_grad
        return sum(storages.values())

    encoder, batch = build((C, 32, 64)).train(), draw_batch(20, dates=24, slots=64)
    assert 3 * kept(run_fused) < kept(run_plain)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("per_date", [False, True])
def test_mean_and_deviation_by_hand_are_the_plain_ones(
    dtype: torch.dtype, error: float, per_date: bool
) -> None:
    """With a parcel of one pixel, one of equal pixels and a full one."""
    pixels, mask = draw_batch(per_date=per_date, sizes=None if per_date else (1, 3, S, 2, 5, 7, 9))
    x = pixels.to(dtype).permute(0, 3, 1, 2).contiguous()  # (B, S, L, C)
    x[1] = x[1, 0]
    weight = mask.to(dtype).transpose(1, 2).unsqueeze(3)
    weight = weight if per_date else weight[:, :, :1]
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, plain = (
        mean_std(found, weight),
        (pse.masked_mean(expected, weight), pse.masked_std(expected, weight)),
    )
    varies = (weight.sum(1) > 1).expand_as(ours[1]).clone()
    varies[1] = False  # nothing but rounding errors
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a[varies], b[varies], rtol=error, atol=error)
    assert (ours[1][~varies] < 1e-6).all()
    backward([ours[0], ours[1].where(varies, 0)])
    backward([plain[0], plain[1].where(varies, 0)])
    assert relative_error(found.grad, expected.grad) < error
    assert (found.grad * (1 - weight) == 0).all()


def test_what_does_not_vary_has_no_gradient_of_its_deviation() -> None:
    for x in (torch.full((1, 3, 1, 2), 0.7), torch.randn(1, 3, 1, 2)):
        x.requires_grad_()
        weight = torch.ones(1, 3, 1, 1) if (x == x[:, :1]).all() else torch.eye(3)[0].view(1, 3, 1, 1)
        mean_std(x, weight)[1].sum().backward()
        assert (x.grad == 0).all()


def test_the_encoder_with_it_is_the_plain_one() -> None:
    for per_date in (False, True):
        ours, batch = build(), draw_batch(per_date=per_date)
        plain = copy.deepcopy(ours)
        found, expected = list(ours._pool(*batch, fast=True)), run_plain(plain, batch)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < EXACT
        backward(found)
        backward(expected)
        for p, q in zip(ours.mlp1[1].parameters(), plain.mlp1[1].parameters()):
            assert (p.grad - q.grad).abs().max() < EXACT * plain.mlp1[1].bn.weight.grad.abs().max()
