"""The models against recorded values of the published method and against the textbook forms."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learning.focal_loss import FocalLoss
from models.competings import GRU, TempConv
from models.decoder import get_decoder
from models.ltae import LTAE
from models.pse import PixelSetEncoder
from models.stclassifier import PseGru, PseLTae, PseLTae_pretrained, PseTae, PseTempCNN
from models.tae import TemporalAttentionEncoder
from tests import golden_numbers as golden
from tests import textbook

EXACT = 1e-10  # float64, ours against the textbook
CLASSES = {
    "LTAE": PseLTae,
    "TAE": PseTae,
    "GRU": PseGru,
    "TempCNN": PseTempCNN,
}  # by the names of config_fig2.json
TABLE = "temporal_encoder.position_enc.weight"


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every trainable parameter by name; one that has none counts as zero."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


# ------------------------------------------------------------------------------------------ recorded values


def recorded_model(name: str) -> nn.Module:
    """One entry of config_fig2.json with derived weights and the recorded dates."""
    architecture = name.split("/")[0]
    arguments = dict(golden.configurations()[name], positions=golden.POSITIONS)
    if architecture in ("LTAE", "TAE"):
        arguments["return_att"] = True
    return golden.fill(CLASSES[architecture](**arguments))


def assert_evaluation_as_recorded(name: str, model: nn.Module, device: str = "cpu") -> None:
    pixels, mask, extra, _ = (tensor.to(device) for tensor in golden.batch())
    model.eval()
    with torch.no_grad():
        output = model(((pixels, mask), extra))
    if name.startswith(("LTAE", "TAE")):
        output, attention = output
        expected = golden.ARRAYS[f"{name}/eval_attention"]
        assert golden.relative_error(attention, expected) < golden.EVALUATION_TOLERANCE
    assert golden.relative_error(output, golden.ARRAYS[f"{name}/eval_logits"]) < golden.EVALUATION_TOLERANCE


def assert_training_as_recorded(name: str, model: nn.Module, device: str = "cpu") -> None:
    pixels, mask, extra, target = (tensor.to(device) for tensor in golden.batch())
    model = without_dropout(copy.deepcopy(model)).train()
    output = model(((pixels, mask), extra))
    logits = output[0] if name.startswith(("LTAE", "TAE")) else output
    loss = FocalLoss(gamma=1)(logits, target)
    loss.backward()
    assert golden.relative_error(logits, golden.ARRAYS[f"{name}/train_logits"]) < golden.TRAINING_TOLERANCE
    assert golden.relative_error(loss, golden.ARRAYS[f"{name}/train_loss"]) < golden.TRAINING_TOLERANCE

    found = gradients(model)
    norms, dots = golden.ARRAYS[f"{name}/grad_norm"], golden.ARRAYS[f"{name}/grad_dot"]
    assert len(found) == len(norms)
    for (key, gradient), norm, dot in zip(sorted(found.items()), norms, dots, strict=True):
        gradient = gradient.double().cpu()
        direction = golden.rs(golden.VALUES["salt"], "dot", key).standard_normal(tuple(gradient.shape))
        if norm < golden.ZERO_GRADIENT:
            assert gradient.norm() < golden.ZERO_GRADIENT, key
        else:
            tolerance = golden.GRADIENT_TOLERANCE * norm
            assert float(gradient.norm()) == pytest.approx(norm, abs=tolerance), key
            assert float((gradient.numpy() * direction).sum()) == pytest.approx(dot, abs=tolerance), key

    state = model.state_dict()
    statistics = sorted(key for key in state if key.endswith(("running_mean", "running_var")))
    sums = [float(state[key].double().sum()) for key in statistics]
    expected = golden.ARRAYS[f"{name}/running_sum"]
    assert sums == pytest.approx(expected, rel=golden.TRAINING_TOLERANCE, abs=golden.TRAINING_TOLERANCE)
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            assert value == 1, key


@pytest.fixture(scope="module", params=golden.PUBLISHED)
def recorded(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Each published configuration; built and filled once for the tests below, which must not change it."""
    return request.param, recorded_model(request.param)


def test_every_published_configuration_is_in_the_file():
    assert set(golden.configurations()) == {*golden.PUBLISHED, "TAE/133k"}


def test_keys_and_shapes(recorded: tuple[str, nn.Module]):
    name, model = recorded
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    width = model.state_dict()["spatial_encoder.mlp2.0.weight"].shape[0]
    if name.startswith("LTAE"):
        width = golden.configurations()[name]["d_model"] or width
    assert shapes.pop(TABLE) == [24, width]
    assert shapes == golden.VALUES["state_dict_shapes"][name]


def test_only_published_parameters_are_trained(recorded: tuple[str, nn.Module]):
    name, model = recorded
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert trained == {k for k in golden.VALUES["state_dict_shapes"][name] if not k.endswith(statistics)}


def assert_parameters(model: nn.Module, expected: dict[str, int], printed: Callable[[], str]) -> None:
    assert model.param_ratio() == expected["total"]
    text = printed()
    assert re.search(rf"\b{expected['total']}\b", text.replace(",", ""))
    for part in ("spatial", "temporal", "decoder"):
        assert f"{100 * expected[part] / expected['total']:.1f}%" in text


def test_param_ratio(recorded: tuple[str, nn.Module], capsys: pytest.CaptureFixture):
    name, model = recorded
    assert_parameters(model, golden.VALUES["params"][name], lambda: capsys.readouterr().out)


def test_param_ratio_of_the_configuration_of_the_figure_alone(capsys: pytest.CaptureFixture):
    expected = {"total": 164_116, "spatial": 19_936, "temporal": 132_992, "decoder": 11_188}
    assert_parameters(recorded_model("TAE/133k"), expected, lambda: capsys.readouterr().out)


def test_evaluation(recorded: tuple[str, nn.Module]):
    assert_evaluation_as_recorded(*recorded)


def test_training_step(recorded: tuple[str, nn.Module]):
    assert_training_as_recorded(*recorded)


def test_textbook_as_recorded(recorded: tuple[str, nn.Module]):
    """The second opinion rests on the recorded values too, not on the models it judges."""
    name, model = recorded
    pixels, mask, extra, _ = golden.batch()
    hyperparameters = {"n_head": golden.configurations()[name].get("n_head"), "positions": golden.POSITIONS}

    def run(training: bool) -> tuple[Tensor, Tensor | None]:
        state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        return textbook.classify(
            name.split("/")[0], state, pixels, mask, extra, training=training, **hyperparameters
        )

    logits, attention = run(training=False)
    assert golden.relative_error(logits, golden.ARRAYS[f"{name}/eval_logits"]) < golden.EVALUATION_TOLERANCE
    if attention is not None:
        expected = golden.ARRAYS[f"{name}/eval_attention"]
        assert golden.relative_error(attention, expected) < golden.EVALUATION_TOLERANCE
    logits, _ = run(training=True)
    assert golden.relative_error(logits, golden.ARRAYS[f"{name}/train_logits"]) < golden.TRAINING_TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LTAE/9k", "LTAE/112k", "TAE/195k", "GRU/15k", "TempCNN/14k"])
def test_recorded_values_on_the_gpu(name: str):
    model = recorded_model(name).to("cuda")
    # Convolutions in TF32 would keep three digits only.
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_evaluation_as_recorded(name, model, "cuda")
        assert_training_as_recorded(name, model, "cuda")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("order_no_extra", lambda: PseLTae(with_extra=False, mlp2=[128, 128])),
        ("GRU_order", PseGru),
        ("TempCNN_order", PseTempCNN),
    ],
)
def test_positions_none(name: str, build: Callable[[], nn.Module]):
    model = golden.fill(build()).eval()
    pixels, mask, extra, _ = golden.batch()
    with torch.no_grad():
        logits = model((pixels, mask) if name == "order_no_extra" else ((pixels, mask), extra))
    assert golden.relative_error(logits, golden.ARRAYS[f"{name}/eval_logits"]) < golden.EVALUATION_TOLERANCE


@pytest.mark.parametrize("pooling", [key[4:] for key in golden.ARRAYS.files if key.startswith("pse/")])
def test_poolings(pooling: str):
    encoder = PixelSetEncoder(10, pooling=pooling, mlp2=[64 * len(pooling.split("_")) + 4, 128])
    pixels, mask, extra, _ = golden.batch()
    with torch.no_grad():
        encoded = golden.fill(encoder).eval()(((pixels, mask), extra))
    assert golden.relative_error(encoded, golden.ARRAYS[f"pse/{pooling}"]) < golden.EVALUATION_TOLERANCE


# ------------------------------------------------------------------------------------- against the textbook

DAYS = [0, 3, 10, 40, 41, 99, 200]
# Sizes that are all different and mostly odd, so that no two axes can be mistaken for each other.
SMALL = dict(input_dim=5, mlp1=[5, 7, 6], mlp2=[15, 12], extra_size=3, mlp4=[9, 8, 4])
SMALL_LTAE = dict(SMALL, n_head=3, d_k=2, d_model=18, mlp3=[18, 9], len_max_seq=7, T=365)
SMALL_TAE = dict(SMALL, n_head=3, d_k=2, d_model=10, mlp3=[30, 9], len_max_seq=7, T=365)
SETTINGS = {
    "L-TAE": ("LTAE", dict(SMALL_LTAE, positions=DAYS)),
    "L-TAE, order of dates": ("LTAE", SMALL_LTAE),
    "L-TAE, no projection": ("LTAE", dict(SMALL_LTAE, d_model=None, mlp3=[12, 9], positions=DAYS)),
    "L-TAE, no projection, dates fewer than the table's": (
        "LTAE",
        dict(SMALL_LTAE, d_model=None, mlp3=[12, 9], len_max_seq=20),
    ),
    "L-TAE, no MLP3": ("LTAE", dict(SMALL_LTAE, mlp3=[18], mlp4=[18, 4], positions=DAYS)),
    "L-TAE, deep": (
        "LTAE",
        dict(
            SMALL_LTAE,
            mlp1=[5, 8, 7, 6],
            mlp2=[15, 13, 11, 12],
            mlp3=[18, 16, 14, 9],
            mlp4=[9, 8, 7, 6, 4],
            positions=DAYS,
        ),
    ),
    "L-TAE, shallow": (
        "LTAE",
        dict(SMALL_LTAE, mlp1=[5, 6], d_model=None, mlp3=[12], mlp4=[12, 4], positions=DAYS),
    ),
    "L-TAE, one head": ("LTAE", dict(SMALL_LTAE, n_head=1, d_k=4, positions=DAYS)),
    "L-TAE, no extra features": ("LTAE", dict(SMALL_LTAE, with_extra=False, mlp2=[12, 12], positions=DAYS)),
    "L-TAE, mean": ("LTAE", dict(SMALL_LTAE, pooling="mean", mlp2=[9, 12], positions=DAYS)),
    "L-TAE, std": ("LTAE", dict(SMALL_LTAE, pooling="std", mlp2=[9, 12], positions=DAYS)),
    "L-TAE, std_mean": ("LTAE", dict(SMALL_LTAE, pooling="std_mean", positions=DAYS)),
    "L-TAE, max_min": ("LTAE", dict(SMALL_LTAE, pooling="max_min", positions=DAYS)),
    "L-TAE, min_std_max_mean": (
        "LTAE",
        dict(SMALL_LTAE, pooling="min_std_max_mean", mlp2=[27, 12], positions=DAYS),
    ),
    "L-TAE, defaults": ("LTAE", dict(len_max_seq=7)),
    "TAE": ("TAE", dict(SMALL_TAE, positions=DAYS)),
    "TAE, order of dates": ("TAE", SMALL_TAE),
    "TAE, no projection": ("TAE", dict(SMALL_TAE, d_model=None, mlp3=[36, 9], positions=DAYS)),
    "TAE, no MLP3": ("TAE", dict(SMALL_TAE, mlp3=[30], mlp4=[30, 4], positions=DAYS)),
    "TAE, one head": ("TAE", dict(SMALL_TAE, n_head=1, mlp3=[10, 9], positions=DAYS)),
    "TAE, defaults": ("TAE", {}),
    "GRU": ("GRU", dict(SMALL, hidden_dim=9, positions=DAYS)),
    "GRU, no table": ("GRU", dict(SMALL, hidden_dim=9, with_extra=False, mlp2=[12, 12])),
    "TempCNN": ("TempCNN", dict(SMALL, nker=[11, 10], mlp3=[8, 9], seq_len=7, positions=DAYS)),
    "TempCNN, no table": ("TempCNN", dict(SMALL, nker=[11], mlp3=[9], seq_len=7, pooling="max_min")),
}


def build(architecture: str, arguments: dict, seed: int = 0) -> nn.Module:
    """A model in float64 without dropout, its weights and running statistics all drawn at random."""
    torch.manual_seed(seed)
    return golden.fill(without_dropout(CLASSES[architecture](**arguments).double()))


def draw_batch(arguments: dict, parcels: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pixels, mask and extra features in float64: 7 dates, 11 pixels.

    The mask differs between dates and parcels, has its ones anywhere, and a single one at some dates. Masked
    pixels are no copies, so that any use of them other than by BatchNorm, maximum and minimum would show.
    """
    r = torch.Generator().manual_seed(seed)
    input_dim = arguments.get("input_dim", 10)
    pixels = torch.randn(parcels, 7, input_dim, 11, generator=r, dtype=torch.float64)
    n = torch.randint(1, 12, (parcels, 7), generator=r)
    n[:, ::3] = 1
    ranks = torch.rand(parcels, 7, 11, generator=r).argsort(-1)
    mask = (ranks < n.unsqueeze(-1)).double()
    if not arguments.get("with_extra", True):
        return pixels, mask, None
    return (
        pixels,
        mask,
        torch.randn(parcels, 7, arguments.get("extra_size", 4), generator=r, dtype=torch.float64),
    )


def nest(pixels: Tensor, mask: Tensor, extra: Tensor | None):
    """The published layout of an input."""
    return (pixels, mask) if extra is None else ((pixels, mask), extra)


def textbook_arguments(arguments: dict, architecture: str) -> dict:
    default_heads = {"LTAE": 16, "TAE": 4}.get(architecture)
    return {
        "pooling": arguments.get("pooling", "mean_std"),
        "n_head": arguments.get("n_head", default_heads),
        "positions": arguments.get("positions"),
    }


def assert_like_textbook(architecture: str, arguments: dict, model: nn.Module, batch, training: bool) -> None:
    """Logits, attention, gradients and running statistics agree in float64.

    The textbook runs on the CPU; the model may be elsewhere.
    """
    device = next(model.parameters()).device
    model.train(training).zero_grad()
    state = {key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in names:
        state[name].requires_grad_()
    logits, attention = textbook.classify(
        architecture, state, *batch, training=training, **textbook_arguments(arguments, architecture)
    )
    probe = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view_as(logits)
    expected = torch.autograd.grad((logits * probe).sum(), [state[name] for name in names], allow_unused=True)

    moved = [None if tensor is None else tensor.to(device) for tensor in batch]
    output = model(nest(*moved))
    if arguments.get("return_att"):
        output, weights = output
        assert golden.relative_error(weights, attention) < EXACT
    assert golden.relative_error(output, logits) < EXACT

    (output * probe.to(device)).sum().backward()
    found = gradients(model)
    expected = {
        n: torch.zeros_like(state[n]) if g is None else g for n, g in zip(names, expected, strict=True)
    }
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in names:
        difference = (found[name].cpu() - expected[name]).abs().max()
        # Entries far below the largest one, the zero gradients among them, are judged by it.
        assert difference < EXACT * max(float(expected[name].abs().max()), 1e-3 * largest), name

    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            assert golden.relative_error(tensor, state[key]) < EXACT, key


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_like_textbook(setting: str, training: bool):
    architecture, arguments = SETTINGS[setting]
    if architecture in ("LTAE", "TAE"):
        arguments = dict(arguments, return_att=True)
    model = build(architecture, arguments)
    assert_like_textbook(architecture, arguments, model, draw_batch(arguments, parcels=5), training)


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("parcels", [2, 3, 17])
def test_batch_sizes_like_textbook(architecture: str, parcels: int):
    _, arguments = SETTINGS[{"LTAE": "L-TAE"}.get(architecture, architecture)]
    batch = draw_batch(arguments, parcels)
    assert_like_textbook(architecture, arguments, build(architecture, arguments), batch, training=False)
    assert_like_textbook(architecture, arguments, build(architecture, arguments), batch, training=True)


@pytest.mark.parametrize("setting", ["L-TAE", "L-TAE, max_min", "TAE", "GRU", "TempCNN"])
def test_batch_of_one_like_textbook(setting: str):
    architecture, arguments = SETTINGS[setting]
    batch = draw_batch(arguments, parcels=1)
    assert_like_textbook(architecture, arguments, build(architecture, arguments), batch, training=False)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("setting", ["L-TAE", "L-TAE, no projection", "TAE", "GRU", "TempCNN"])
def test_like_textbook_on_the_gpu(setting: str, training: bool):
    architecture, arguments = SETTINGS[setting]
    model = build(architecture, arguments).to("cuda")
    assert_like_textbook(architecture, arguments, model, draw_batch(arguments, parcels=5), training)


def collinear_batch(arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Bands that are almost the same signal, as those of bare soil are."""
    pixels, mask, extra = draw_batch(arguments, parcels=5)
    return pixels[:, :, :1] + 1e-3 * pixels, mask, extra


def contrast_bands(model: nn.Module) -> nn.Module:
    """Let the first layer look at differences of bands, whose variance is tiny beside that of the bands."""
    with torch.no_grad():
        weight = model.spatial_encoder.mlp1[0].lin.weight
        weight -= weight.mean(1, keepdim=True)
    return model


def test_near_collinear_bands_like_textbook():
    architecture, arguments = SETTINGS["L-TAE"]
    model = contrast_bands(build(architecture, arguments))
    assert_like_textbook(architecture, arguments, model, collinear_batch(arguments), training=True)


def test_near_collinear_bands_in_single_precision():
    """In float32 the method itself loses digits here; ours may lose a few times as many."""
    architecture, arguments = SETTINGS["L-TAE"]
    model = contrast_bands(build(architecture, arguments)).train()
    batch = collinear_batch(arguments)

    def run_textbook(dtype: torch.dtype) -> Tensor:
        state = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
        inputs = [tensor.to(dtype) for tensor in batch]
        return textbook.classify(
            architecture, state, *inputs, training=True, **textbook_arguments(arguments, architecture)
        )[0].double()

    exact = run_textbook(torch.float64)
    ours = copy.deepcopy(model).float()(nest(*(tensor.float() for tensor in batch))).double()
    own_error = golden.relative_error(run_textbook(torch.float32), exact)
    assert golden.relative_error(ours, exact) < 4 * own_error + 1e-5


def test_pixels_and_extra_features_get_gradients():
    """Saliency maps need the gradient of the logits with respect to the input."""
    architecture, arguments = SETTINGS["L-TAE"]
    model = build(architecture, arguments)
    for training in (False, True):
        pixels, mask, extra = draw_batch(arguments, parcels=5)
        inputs = [pixels.requires_grad_(), extra.requires_grad_()]
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        logits, _ = textbook.classify(
            architecture,
            state,
            pixels,
            mask,
            extra,
            training=training,
            **textbook_arguments(arguments, architecture),
        )
        expected = torch.autograd.grad(logits.square().sum(), inputs)
        found = torch.autograd.grad(model.train(training)(nest(pixels, mask, extra)).square().sum(), inputs)
        for ours, theirs in zip(found, expected, strict=True):
            assert golden.relative_error(ours, theirs) < EXACT


# ----------------------------------------------------------------------------------------- inputs and dates


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("with_extra", [True, False])
def test_two_parcels_are_read_as_two_parcels(container: type, with_extra: bool):
    """A nested pair and a tensor of length two look alike to `len`."""
    arguments = SMALL_LTAE if with_extra else dict(SMALL_LTAE, with_extra=False, mlp2=[12, 12])
    model = build("LTAE", arguments).eval()
    pixels, mask, extra = draw_batch(arguments, parcels=3)
    if with_extra:
        three = container([container([pixels, mask]), extra])
        two = container([container([pixels[:2], mask[:2]]), extra[:2]])
    else:
        three = container([pixels, mask])
        two = container([pixels[:2], mask[:2]])
    with torch.no_grad():
        assert golden.relative_error(model(two), model(three)[:2]) < EXACT


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_memory_layout_does_not_matter(training: bool):
    architecture, arguments = SETTINGS["L-TAE"]
    pixels, mask, extra = draw_batch(arguments, parcels=4)
    pixels = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # pixel-major behind
    mask = mask.transpose(1, 2).contiguous().transpose(1, 2)
    extra = extra[:, :1].expand(-1, 7, -1)
    assert not any(tensor.is_contiguous() for tensor in (pixels, mask, extra))
    model = build(architecture, arguments)
    assert_like_textbook(architecture, arguments, model, (pixels, mask, extra), training)


def test_the_input_is_left_alone():
    _, arguments = SETTINGS["L-TAE"]
    batch = draw_batch(arguments, parcels=4)
    before = [tensor.clone() for tensor in batch]
    model = build("LTAE", arguments)
    model.train()(nest(*batch)).sum().backward()
    model.eval()(nest(*batch))
    assert all(torch.equal(tensor, old) for tensor, old in zip(batch, before, strict=True))


@pytest.mark.parametrize("architecture", ["LTAE", "TAE"])
def test_attention_belongs_to_its_date(architecture: str):
    """Dates in another order, their positions with them: the same logits, the attention reordered."""
    base = dict(SMALL_LTAE if architecture == "LTAE" else SMALL_TAE, d_model=None, return_att=True)
    base["mlp3"] = [12, 9] if architecture == "LTAE" else [36, 9]
    order = [4, 0, 6, 2, 1, 5, 3]
    straight = build(architecture, dict(base, positions=DAYS)).eval()
    shuffled = build(architecture, dict(base, positions=[DAYS[t] for t in order])).eval()
    pixels, mask, extra = draw_batch(base, parcels=3)
    other_order = nest(pixels[:, order], mask[:, order], extra[:, order])
    with torch.no_grad():
        logits, attention = straight(nest(pixels, mask, extra))
        logits_shuffled, attention_shuffled = shuffled(other_order)
        logits_misdated, _ = straight(other_order)
    assert golden.relative_error(logits_shuffled, logits) < EXACT
    assert golden.relative_error(attention_shuffled, attention[:, :, order]) < EXACT
    assert golden.relative_error(logits_misdated, logits) > 1e-3
    assert torch.allclose(attention.sum(-1), torch.ones(3, 3, dtype=torch.float64))


def test_attention_is_returned_on_request_only():
    batch = nest(*draw_batch(SMALL_LTAE, parcels=3))
    plain = build("LTAE", SMALL_LTAE).eval()(batch)
    logits, attention = build("LTAE", dict(SMALL_LTAE, return_att=True)).eval()(batch)
    assert plain.shape == (3, 4)
    assert attention.shape == (3, 3, 7)
    assert golden.relative_error(logits, plain) < EXACT


@pytest.mark.parametrize("positions", [None, DAYS])
@pytest.mark.parametrize("period", [1000, 365])
def test_positional_table(positions: list[int] | None, period: int):
    rows = range(8) if positions is None else positions
    encoders = [
        (
            LTAE(
                in_channels=12,
                n_head=3,
                n_neurons=[18],
                d_model=18,
                T=period,
                len_max_seq=7,
                positions=positions,
            ),
            6,
            3,
        ),
        (
            LTAE(
                in_channels=12,
                n_head=2,
                n_neurons=[12],
                d_model=None,
                T=period,
                len_max_seq=7,
                positions=positions,
            ),
            6,
            2,
        ),
        (
            TemporalAttentionEncoder(
                in_channels=9,
                n_head=2,
                n_neurons=[12],
                d_model=6,
                T=period,
                len_max_seq=7,
                positions=positions,
            ),
            9,
            1,
        ),
    ]
    for encoder, width, repeat in encoders:
        expected = textbook.positional_table(rows, width, period, repeat)
        table = encoder.state_dict()["position_enc.weight"]
        assert table.dtype == torch.float32
        assert table.shape == expected.shape
        assert (table - expected).abs().max() < 1e-6


def test_positional_table_of_gru_and_tempcnn():
    expected = textbook.positional_table(DAYS, 12, 1000)
    for model in (
        PseGru(**SMALL, hidden_dim=9, positions=DAYS),
        PseTempCNN(**SMALL, nker=[11], mlp3=[9], seq_len=7, positions=DAYS),
    ):
        assert (model.state_dict()[TABLE] - expected).abs().max() < 1e-6
    assert TABLE not in PseGru(**SMALL, hidden_dim=9).state_dict()
    assert TABLE not in PseTempCNN(**SMALL, nker=[11], mlp3=[9], seq_len=7).state_dict()


# ------------------------------------------------------------------------- dropout, initial values, decoder


@pytest.mark.parametrize("build_encoder", [LTAE, TemporalAttentionEncoder])
def test_attention_dropout_is_a_tenth(build_encoder: type[nn.Module]):
    encoder = build_encoder(dropout=0.3)
    rates = [module.p for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert sorted(rates) == [0.1, 0.3]


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_both_dropouts_act_in_training_only(rate: float):
    """Dropping everything leaves the last LayerNorm nothing but its bias."""
    encoder = LTAE(in_channels=12, n_head=3, d_k=2, n_neurons=[18], d_model=18, len_max_seq=7, dropout=0.3)
    golden.fill(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0 if module.p == rate else 0.0
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(0))
    bias = encoder.outlayernorm.bias.expand(4, 18)
    assert torch.allclose(encoder.train()(x), bias)
    assert not torch.allclose(encoder.eval()(x), bias)


def test_attention_dropout_keeps_the_mean():
    """Dates that survive weigh more, so that the average over many draws is the undisturbed one."""
    encoder = LTAE(in_channels=12, n_head=3, d_k=2, n_neurons=[12], d_model=None, len_max_seq=7, dropout=0.0)
    golden.fill(encoder)
    encoder.outlayernorm = nn.Identity()  # what comes before it is linear in the attention
    torch.manual_seed(0)
    x = torch.randn(1, 7, 12).expand(20_000, 7, 12)
    with torch.no_grad():
        disturbed, plain = encoder.train()(x), encoder.eval()(x[:1])
    assert disturbed.std(0).min() > 0.01
    assert golden.relative_error(disturbed.mean(0, keepdim=True), plain) < 0.02


def test_initial_queries_and_keys():
    torch.manual_seed(0)
    encoder = LTAE(n_head=64, d_k=8, d_model=512, n_neurons=[512])
    heads = encoder.attention_heads
    for weights in (heads.Q, heads.fc1_k.weight):
        assert float(weights.detach().std()) == pytest.approx(0.5, rel=0.1)  # sqrt(2 / d_k)
        assert abs(float(weights.detach().mean())) < 0.1
    assert isinstance(heads.Q, nn.Parameter)


def test_decoder():
    layers = [type(layer) for layer in get_decoder([8, 6, 5, 3])]
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert layers == [*block, *block, nn.Linear]
    assert [type(layer) for layer in get_decoder([8, 3])] == [nn.Linear]


# ------------------------------------------------------------------------------------ constructor arguments

PSE_SIGNATURE = (
    "input_dim=10, mlp1=[10,32,64], pooling='mean_std', mlp2=[132,128], with_extra=True, extra_size=4"
)
SIGNATURES = {
    PixelSetEncoder: """
        input_dim, mlp1=[10,32,64], pooling='mean_std', mlp2=[64,128], with_extra=True, extra_size=4""",
    LTAE: """
        in_channels=128, n_head=16, d_k=8, n_neurons=[256,128], dropout=0.2, d_model=256, T=1000,
        len_max_seq=24, positions=None, return_att=False""",
    TemporalAttentionEncoder: """
        in_channels=128, n_head=4, d_k=32, d_model=None, n_neurons=[512,128,128], dropout=0.2, T=1000,
        len_max_seq=24, positions=None, return_att=False""",
    GRU: "in_channels=128, hidden_dim=128, positions=None",
    TempConv: "input_size, nker, seq_len, nfc, positions=None",
    get_decoder: "n_neurons",
    PseLTae: f"""
        {PSE_SIGNATURE}, n_head=16, d_k=8, d_model=256, mlp3=[256,128], dropout=0.2, T=1000, len_max_seq=24,
        positions=None, mlp4=[128,64,32,20], return_att=False""",
    PseTae: f"""
        {PSE_SIGNATURE}, n_head=4, d_k=32, d_model=None, mlp3=[512,128,128], dropout=0.2, T=1000,
        len_max_seq=24, positions=None, mlp4=[128,64,32,20], return_att=False""",
    PseGru: f"{PSE_SIGNATURE}, hidden_dim=128, mlp4=[128,64,32,20], positions=None",
    PseTempCNN: f"""
        {PSE_SIGNATURE}, nker=[32,32,128], mlp3=[128,128], seq_len=24, mlp4=[128,64,32,20], positions=None""",
    PseLTae_pretrained: "weight_folder, hyperparameters, device='cuda', fold='all'",
}


@pytest.mark.parametrize("public", SIGNATURES, ids=lambda public: public.__name__)
def test_signature(public: Callable):
    """Names, order and defaults are those of the published constructors; positional calls depend on them."""
    parameters = inspect.signature(public).parameters.values()
    parameters = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]  # ours alone
    found = [(p.name, list(p.default) if isinstance(p.default, tuple) else p.default) for p in parameters]
    namespace: dict = {}
    exec(f"def published({SIGNATURES[public]}): ...", namespace)
    expected = inspect.signature(namespace["published"]).parameters.values()
    assert found == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize(
    ("construct", "argument"),
    [
        (lambda: PseLTae(input_dim=4), "mlp1"),
        (lambda: PseLTae(mlp2=[128, 128]), "mlp2"),
        (lambda: PseLTae(with_extra=False), "mlp2"),
        (lambda: PseLTae(extra_size=5), "mlp2"),
        (lambda: PseLTae(pooling="mean"), "mlp2"),
        (lambda: PseLTae(pooling="mean_median"), "median"),
        (lambda: PseLTae(mlp3=[128]), "mlp3|n_neurons"),
        (lambda: PseLTae(n_head=24, mlp4=[128, 20]), "n_head"),
        (lambda: PseLTae(mlp4=[64, 20]), "mlp4"),
        (lambda: PseTae(mlp3=[256, 128]), "mlp3|n_neurons"),
        (lambda: PseTae(d_model=256), "mlp3|n_neurons"),
        (lambda: PseTae(mlp4=[64, 20]), "mlp4"),
        (lambda: PseGru(hidden_dim=64), "mlp4"),
        (lambda: PseTempCNN(mlp3=[64]), "mlp4"),
        (lambda: PseLTae(positions=DAYS), "len_max_seq"),
        (lambda: PseTae(positions=DAYS, d_model=128), "len_max_seq"),
        (lambda: PixelSetEncoder(4), "mlp1"),
        (lambda: PixelSetEncoder(10, with_extra=False, mlp2=[132, 128]), "mlp2"),
        (lambda: PixelSetEncoder(10, pooling="", with_extra=False, mlp2=[0, 128]), "pooling"),
        (lambda: LTAE(n_neurons=[128]), "n_neurons"),
        (lambda: LTAE(n_head=24, d_model=256), "n_head"),
        (lambda: LTAE(in_channels=100, n_head=16, d_model=None, n_neurons=[100]), "n_head"),
        (lambda: TemporalAttentionEncoder(n_neurons=[128]), "n_neurons"),
    ],
)
def test_sizes_that_do_not_fit(construct: Callable[[], nn.Module], argument: str):
    with pytest.raises(ValueError, match=argument):
        construct()


@pytest.mark.parametrize("build_model", CLASSES.values())
def test_lists_of_the_caller_are_left_alone(build_model: type[nn.Module]):
    widths = {"mlp1": [10, 32, 64], "mlp2": [132, 128], "mlp4": [128, 64, 32, 20]}
    before = copy.deepcopy(widths)
    shapes = [[tuple(p.shape) for p in build_model(**widths).parameters()] for _ in range(2)]
    assert widths == before
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------------------- ensemble of folds


def save_fold(folder: Path, fold: int, model: nn.Module) -> None:
    """Write a checkpoint as training does."""
    optimizer = torch.optim.Adam(model.parameters())
    path = folder / f"Fold_{fold}" / "model.pth.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def random_member(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = PseLTae(**SMALL_LTAE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, nn.Module]]:
    """A folder with folds 1, 2 and 10, and their models in evaluation mode."""
    folder = tmp_path_factory.mktemp("weights")
    members = {fold: random_member(fold) for fold in (1, 2, 10)}
    for fold, model in members.items():
        save_fold(folder, fold, model)
    (folder / "conf.json").write_text("{}")  # a results folder holds more than folds
    return folder, members


def single_batch(parcels: int = 4):
    return nest(*(tensor.float() for tensor in draw_batch(SMALL_LTAE, parcels)))


@pytest.mark.parametrize("parcels", [1, 2, 4])
def test_ensemble_averages_log_probabilities(weights: tuple[Path, dict[int, nn.Module]], parcels: int):
    folder, members = weights
    ensemble = PseLTae_pretrained(folder, SMALL_LTAE, device="cpu", fold="all")
    batch = single_batch(parcels)
    with torch.no_grad():
        each = [torch.log_softmax(model(batch), dim=-1) for model in members.values()]
        log_probabilities = ensemble(batch)
        classes = ensemble.predict_class(batch)
    expected = torch.stack(each).mean(0)
    assert golden.relative_error(log_probabilities, expected) < golden.EVALUATION_TOLERANCE
    assert torch.as_tensor(classes).tolist() == expected.argmax(-1).tolist()
    assert not torch.allclose(each[0], each[1], atol=0.1)


@pytest.mark.parametrize("fold", [1, 2, 10])
def test_one_fold_by_its_number(weights: tuple[Path, dict[int, nn.Module]], fold: int):
    folder, members = weights
    member = PseLTae_pretrained(str(folder), SMALL_LTAE, device="cpu", fold=fold)
    with torch.no_grad():
        expected = torch.log_softmax(members[fold](single_batch()), dim=-1)
        assert golden.relative_error(member(single_batch()), expected) < golden.EVALUATION_TOLERANCE


def test_ensemble_always_evaluates(weights: tuple[Path, dict[int, nn.Module]]):
    ensemble = PseLTae_pretrained(weights[0], SMALL_LTAE, device="cpu")
    first = ensemble(single_batch())
    assert torch.equal(ensemble(single_batch()), first)
    ensemble.train()
    assert torch.equal(ensemble(single_batch()), first)
    assert not any(
        module.training for module in ensemble.modules() if isinstance(module, (nn.Dropout, PseLTae))
    )


def test_missing_weights(tmp_path: Path, weights: tuple[Path, dict[int, nn.Module]]):
    missing = (FileNotFoundError, ValueError)
    with pytest.raises(missing, match="nowhere"):
        PseLTae_pretrained(tmp_path / "nowhere", SMALL_LTAE, device="cpu")
    with pytest.raises(missing, match="Fold_"):
        PseLTae_pretrained(tmp_path, SMALL_LTAE, device="cpu")
    with pytest.raises(missing, match="3"):
        PseLTae_pretrained(weights[0], SMALL_LTAE, device="cpu", fold=3)
    with pytest.raises(missing, match="0"):
        PseLTae_pretrained(weights[0], SMALL_LTAE, device="cpu", fold=0)
    with pytest.raises(missing, match="every"):
        PseLTae_pretrained(weights[0], SMALL_LTAE, device="cpu", fold="every")
    (tmp_path / "Fold_1").mkdir()
    with pytest.raises(missing, match="Fold_"):
        PseLTae_pretrained(tmp_path, SMALL_LTAE, device="cpu")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_state(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def save_other_values(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"decoder.0.weight": "not a tensor"}}, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        drop_state,
        save_other_values,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint at all"),
        lambda path: torch.save([1, 2, 3], path),
    ],
)
def test_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], None]):
    save_fold(tmp_path, 1, random_member(1))
    damage(tmp_path / "Fold_1" / "model.pth.tar")
    with pytest.raises(ValueError, match="Fold_1"):
        PseLTae_pretrained(tmp_path, SMALL_LTAE, device="cpu")


@pytest.mark.parametrize("other", ["TAE", "L-TAE, no projection", "L-TAE, max_min wider"])
def test_checkpoint_of_another_architecture(tmp_path: Path, other: str):
    models = {
        "TAE": lambda: PseTae(**SMALL_TAE),
        "L-TAE, no projection": lambda: PseLTae(**dict(SMALL_LTAE, d_model=None, mlp3=[12, 9])),
        "L-TAE, max_min wider": lambda: PseLTae(
            **dict(SMALL_LTAE, pooling="max_min", mlp1=[5, 7, 8], mlp2=[19, 12])
        ),
    }
    save_fold(tmp_path, 1, models[other]())
    with pytest.raises(ValueError, match="Fold_1"):
        PseLTae_pretrained(tmp_path, SMALL_LTAE, device="cpu")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_pickle(checkpoint: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(checkpoint, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
@pytest.mark.parametrize("hidden_in", ["state_dict", "optimizer"])
def test_malicious_checkpoint_runs_nothing(
    tmp_path: Path, write: Callable[[dict, Path], None], hidden_in: str
):
    target = tmp_path / "created"
    checkpoint = {"epoch": 3, "state_dict": random_member(1).state_dict(), "optimizer": {}}
    checkpoint[hidden_in] = Malicious(target)
    (tmp_path / "Fold_1").mkdir()
    write(checkpoint, tmp_path / "Fold_1" / "model.pth.tar")
    with pytest.raises(ValueError, match="Fold_1"):
        PseLTae_pretrained(tmp_path, SMALL_LTAE, device="cpu")
    assert not target.exists()


def test_the_malicious_checkpoint_would_work(tmp_path: Path):
    """The test above means something only if its file does act when it is unpickled freely."""
    target = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, m, e: x, ["(pixels, mask)", "Tensor"]),
        (lambda x, m, e: (x, m), ["extra features"]),
        (lambda x, m, e: ((x.transpose(1, 2), m), e), ["pixels", "10", "(2, 10, 24, 5)"]),
        (lambda x, m, e: ((x[0], m), e), ["pixels", "10", "(24, 10, 5)"]),
        (lambda x, m, e: ((x, m[:, 0]), e), ["mask", "(2, 24, 5)", "(2, 5)"]),
        (lambda x, m, e: ((x, m), e[:, 0]), ["extra", "(2, 24, 4)", "(2, 4)"]),
        (lambda x, m, e: ((x.double(), m), e), ["float64", "float32"]),
        (lambda x, m, e: ((x.to("meta"), m), e), ["meta", "cpu"]),
    ],
)
def test_a_wrong_input_is_told_in_one_sentence(name: str, change, words: list[str]):
    model = CLASSES[name]().eval()
    with pytest.raises(ValueError) as error:
        model(change(torch.randn(2, 24, 10, 5), torch.ones(2, 24, 5), torch.randn(2, 24, 4)))
    message = str(error.value)
    assert all(word in message for word in words) and message.count(".") >= 1 and "\n" not in message
