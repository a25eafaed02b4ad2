"""Networks: shapes, conditions, initial values, gradients, and the formulas they promise."""

import math

import pytest
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

from sde_diffusion.networks import MLP, Fourier, PlainUNet, UNet
from sde_diffusion.networks.unet import Attention, Residual

SMALL = {"channels": (16, 24), "blocks": 1, "embedding": 16}


def shaken(network, seed=0):
    """The network in float64 with every parameter drawn anew: nothing is left at its initial 0."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double().eval()
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise / max(1, parameter[0].numel()) ** 0.5
    return network


def batch(*shape, size=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *shape, generator=generator, dtype=dtype)
    return x, torch.rand(size, generator=generator, dtype=dtype)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (27, 30), (9, 4), (1, 1)])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        {**SMALL, "in_channels": 3, "attention": ()},
        {**SMALL, "in_channels": 2, "patch": 1, "attention": (0, 1)},
        {"channels": (8,), "attention": (), "blocks": 1},
        {"channels": (8, 16, 24), "attention": (2,), "blocks": 2, "heads": 2},
    ],
)
def test_a_unet_keeps_the_shape_of_any_image_and_starts_at_zero(config, size):
    network = UNet(**config)
    x, c = batch(config.get("in_channels", 1), *size, dtype=torch.float32)
    out = network(x, c)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert (out == 0).all()


@pytest.mark.parametrize("fourier", [0, 8])
@pytest.mark.parametrize("shape", [(), (2,), (1, 28, 28)])
def test_an_mlp_keeps_the_shape_of_any_sample(shape, fourier):
    network = MLP(shape, width=16, depth=2, fourier=fourier)
    x, c = batch(*shape, dtype=torch.float32)
    out = network(x, c)
    assert out.shape == x.shape
    assert out.dtype == x.dtype


def test_padding_repeats_the_border_and_the_output_is_cropped():
    network = shaken(UNet(**SMALL))  # stride 2 * 2
    x, c = batch(1, 27, 30)
    right = torch.cat([x, x[..., -1:].expand(-1, -1, -1, 2)], dim=-1)
    padded = torch.cat([right, right[..., -1:, :]], dim=-2)
    assert padded.shape[-2:] == (28, 32)
    assert torch.equal(network(x, c), network(padded, c)[..., :27, :30])


CONDITIONAL = {
    "unet": (UNet(**SMALL, cond=5), UNet(**SMALL), (1, 8, 8)),
    "mlp": (MLP(cond=5), MLP(), (2,)),
    "mlp with features": (MLP(fourier=8, cond=5), MLP(fourier=8), (2,)),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_each_sample_is_treated_alone(name):
    """No batch statistics: a batch is its rows, up to the order of float64 sums."""
    network, _, shape = CONDITIONAL[name]
    network = shaken(network)
    x, c = batch(*shape)
    context = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = [network(x[k : k + 1], c[k : k + 1], context[k : k + 1]) for k in range(3)]
    assert_close(network(x, c, context), torch.cat(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_output_depends_on_every_input(name):
    network, _, shape = CONDITIONAL[name]
    network = shaken(network)
    x, c = batch(*shape)
    inputs = [x, c, torch.ones(3, 5, dtype=torch.float64)]
    out = network(*inputs)
    for position in range(3):
        changed = [v + 0.1 * (k == position) for k, v in enumerate(inputs)]
        assert ((network(*changed) - out).abs().flatten(1).amax(1) > 1e-6).all()


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_context_is_required_refused_or_of_another_width_by_name(name):
    conditional, unconditional, shape = CONDITIONAL[name]
    x, c = batch(*shape, dtype=next(conditional.parameters()).dtype)
    with pytest.raises(ValueError, match="cond must have width 5; got"):
        conditional(x, c)
    with pytest.raises(ValueError, match="cond must have width 5; got"):
        conditional(x, c, x.new_zeros(3, 4))
    x, c = batch(*shape, dtype=torch.float32)
    with pytest.raises(ValueError, match="cond must be None: the network has no condition"):
        unconditional(x, c, x.new_zeros(3, 5))


def test_samples_of_another_shape_are_refused():
    x, c = batch(3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"samples must have shape \(2,\); got \(3,\)"):
        MLP()(x, c)
    x, c = batch(3, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(B, 1, H, W\); got shape \(3, 3, 8, 8\)"):
        UNet(**SMALL)(x, c)


@pytest.mark.parametrize(
    ("network", "shape", "steps"),
    [
        # zero at first: the last layer, then the ends of the blocks; each takes one step to leave 0
        (UNet(**SMALL, cond=5, attention=(0, 1)), (1, 8, 8), 2),
        (MLP(fourier=8, cond=5), (2,), 0),
    ],
    ids=["unet", "mlp"],
)
def test_gradients_reach_every_parameter(network, shape, steps):
    x, c = batch(*shape, dtype=torch.float32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        (network(x, c, torch.ones(3, 5)) - x).square().mean().backward()
        missing = [name for name, p in network.named_parameters() if not p.grad.any()]
        optimizer.step()
    assert missing == []


def test_the_digits_network_is_small():
    """Issue A: at most 1.2 M parameters; 4 bytes each, so that the weights stay below 5 MB."""
    for network in (UNet(), UNet(channels=(32, 64), blocks=2)):
        assert sum(p.numel() for p in network.parameters()) <= 1.2e6


def test_attention_is_the_formula_head_by_head():
    """x + W softmax(q k / sqrt d) v over the pixels (Vaswani et al. 2017, eq. 1)."""
    attention = shaken(Attention(width := 16, heads := 4))
    x, _ = batch(width, 3, 5)
    qkv = attention.qkv(attention.norm(x)).flatten(2)  # (3, 3 * 16, 15)
    q, k, v = (part.split(width // heads, dim=1) for part in qkv.split(width, dim=1))
    mixed = []
    for head in range(heads):
        scores = q[head].transpose(1, 2) @ k[head] / (width // heads) ** 0.5
        mixed.append(v[head] @ scores.softmax(dim=2).transpose(1, 2))
    expected = x + attention.out(torch.cat(mixed, dim=1).reshape(x.shape))
    assert_close(attention(x, x), expected, rtol=1e-12, atol=1e-12)


def test_a_residual_block_is_the_formula():
    """skip(x) + conv2(silu((1 + scale) norm2(conv1(silu(norm1(x)))) + shift))."""
    block = shaken(Residual(16, 24, 8))
    x, _ = batch(16, 5, 4)
    e = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    linear = e @ block.modulate.weight.T + block.modulate.bias
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    h = (1 + linear[:, :24, None, None]) * h + linear[:, 24:, None, None]
    assert_close(block(x, e), block.skip(x) + block.conv2(silu(h)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [4, 10, 128])
def test_fourier_features_are_the_formula(width):
    """w_k = 1000^(k / (width / 2 - 1)), in float32: |c| w half-ulps, 1000 * 2^-24, of the angle."""
    c = torch.linspace(-1, 1, 7, dtype=torch.float64)
    w = torch.tensor([1000 ** (k / (width / 2 - 1)) for k in range(width // 2)]).double()
    expected = torch.cat([torch.sin(c[:, None] * w), torch.cos(c[:, None] * w)], dim=1)
    out = Fourier(width)(c)
    assert out.shape == (7, width)
    assert_close(out, expected, rtol=0, atol=2 * 1000 * 2**-24)


def test_fourier_features_are_those_of_the_transformer():
    """Ho et al.'s embedding of the step n: sin and cos of n 10000^(-k / (half - 1)), n = 1000 t.

    Ours at the frequencies that both have: w = 1000 (k = 0 there) and w = 1 (1000 = 10000^(3/4)).
    """
    t = torch.tensor([0.001, 0.25, 1.0], dtype=torch.float64)
    theirs = torch.stack([(1000 * t * 10_000 ** (-k / 4)).sin() for k in (3, 0)], dim=1)
    assert_close(Fourier(4)(t)[:, :2], theirs, rtol=0, atol=2 * 1000 * 2**-24)


def test_fourier_features_tell_neighbouring_steps_apart():
    t = torch.arange(1001) / 1000
    features = Fourier(128)(t)
    assert (features.diff(dim=0).norm(dim=1) > 0.5).all()


@pytest.mark.parametrize(
    ("made", "argument", "value"),
    [
        (UNet, "in_channels", 0),
        (UNet, "channels", ()),
        (UNet, "channels", (8, 12)),
        (UNet, "channels", (16, -8)),
        (UNet, "channels", (16, 0)),
        (UNet, "blocks", -1),
        (UNet, "attention", (2,)),
        (UNet, "attention", (-1,)),
        (UNet, "patch", 0),
        (UNet, "embedding", 7),
        (UNet, "cond", -1),
        (UNet, "heads", 0),
        (UNet, "heads", 5),
        (MLP, "shape", (2, 0)),
        (MLP, "shape", (-2, -2)),
        (MLP, "width", 0),
        (MLP, "depth", 0),
        (MLP, "fourier", 3),
        (MLP, "fourier", -2),
        (MLP, "cond", -1),
        (Fourier, "width", 5),
        (Fourier, "width", 2),
        (Fourier, "max_frequency", 0.0),
        (Fourier, "max_frequency", math.inf),
    ],
)
def test_a_bad_argument_is_refused_by_name(made, argument, value):
    defaults = {"width": 8} if made is Fourier else {}
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        made(**{**defaults, argument: value})


@pytest.mark.parametrize(
    ("made", "config"),
    [(UNet, {**SMALL, "cond": 3}), (MLP, {"shape": (2, 3), "width": 8, "fourier": 6})],
)
def test_the_config_of_a_network_makes_it_again(made, config):
    first = made(**config)
    second = made(**first.config)
    assert first.config == second.config
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (first, second)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP((3,), width=8), (3,)),
        (MLP((3,), width=8, fourier=8), (3,)),
        (UNet(**SMALL), (1, 28, 28)),
        (UNet(**SMALL), (1, 27, 30)),
        (PlainUNet(channels=(8, 8)), (1, 28, 28)),
    ],
)
def test_an_empty_batch_gives_an_empty_batch(network, shape):
    assert network(torch.zeros(0, *shape), torch.zeros(0)).shape == (0, *shape)


LARGE = {
    "width": lambda: MLP(width=10**9),
    "depth": lambda: MLP(depth=10**9),
    "fourier": lambda: MLP(fourier=10**9),
    "cond": lambda: UNet(cond=10**9),
    r"prod\(shape\)": lambda: MLP(shape=(2**16, 2**16)),
    r"len\(shape\)": lambda: MLP(shape=(1,) * 9),
    r"channels\[1\]": lambda: UNet(channels=(8, 2**30)),
    r"len\(channels\)": lambda: UNet(channels=(8,) * 100),
    r"len\(attention\)": lambda: UNet(attention=(0,) * 100),
    "blocks": lambda: UNet(blocks=10**9),
    "patch": lambda: UNet(patch=10**9),
    "embedding": lambda: UNet(embedding=10**9),
    "in_channels": lambda: PlainUNet(10**9),
}


@pytest.mark.parametrize("argument", LARGE)
def test_a_size_that_no_file_could_fill_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=rf"^{argument} must be at most"):
        LARGE[argument]()


@pytest.mark.parametrize("made", [lambda: UNet(**SMALL), lambda: MLP(fourier=8)])
def test_a_network_on_the_meta_device_has_its_constants(made):
    """So that it can be filled from a file: `load_state_dict(tensors, assign=True)`."""
    with torch.device("meta"):
        network = made()
    assert all(parameter.is_meta for parameter in network.parameters())
    constants = dict(network.named_buffers())
    for name, value in made().named_buffers():
        assert torch.equal(constants[name], value)


def test_a_fold_of_too_many_pixels_is_refused():
    """Images would be padded to it, whatever their size."""
    with pytest.raises(ValueError, match="at most 512"):
        UNet(channels=(8,) * 10, patch=2, attention=(), heads=1)
    UNet(channels=(8,) * 9, patch=2, blocks=1, attention=(), heads=1)


@pytest.mark.parametrize("value", [8, "ab", None, 2.5])
def test_a_size_in_the_place_of_a_sequence_is_refused_by_name(value):
    for made, argument in ((UNet, "channels"), (PlainUNet, "channels"), (MLP, "shape")):
        with pytest.raises(TypeError, match=rf"^{argument} must be a sequence; got"):
            made(**{argument: value})
