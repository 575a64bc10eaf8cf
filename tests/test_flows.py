"""Tests of the two flows at full size and at their limits; others are cells of the notebooks."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import softplus
from torch.nn.utils import parametrize

from ebmbook.data import draw_points
from ebmbook.flows import flowpp, glow
from ebmbook.flows.flowpp import FlowPP, PointFlowPP, from_log_odds, log_odds
from ebmbook.flows.glow import Glow, PointGlow
from ebmbook.learn.blocks import count
from ebmbook.mcmc import Slice, frozen

# error of one coupling, and of all
DTYPES = [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-8, 1e-8)]


def small_flowpp(deq, **options):
    sizes = dict(steps=(2, 1, 1), deq=deq, blocks=1, width=8, n_mix=3, heads=2)
    return FlowPP((3, 4, 4), **sizes, **options)


SMALL = {
    'flowpp': lambda **options: small_flowpp((1, 1, 4), **options),
    'flowpp-released': lambda **options: small_flowpp((1, 1, 4), released=True, **options),
    'flowpp-uniform': lambda **options: small_flowpp((), **options),
    'glow': lambda **options: Glow((3, 4, 4), n_levels=2, depth=2, width=8, **options),
    'points-flowpp': lambda: PointFlowPP(4, 16, 3, 4),
    'points-glow': lambda: PointGlow(4, 16, 3),
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def data(flow, n=64, seed=0):
    dtype = next(flow.parameters()).dtype
    return 2 * torch.rand(n, *flow.shape, generator=gen(seed), dtype=dtype) - 1


def shaken(net, size=0.02):  # away from the initial values, where many parts do nothing
    with torch.no_grad():
        for i, value in enumerate(net.parameters()):
            value.add_(size * torch.randn(value.shape, generator=gen(i)).to(value))
    return net


def build(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    flow = SMALL[name](**options).to(dtype).eval()
    return shaken(flow.init(data(flow), gen(1)))


def fixed(flow):  # options under which `encode` repeats itself
    return {} if len(flow.shape) == 1 else dict(v=0.5)


def logdet_by_hand(fn, x):
    jac = torch.autograd.functional.jacobian(fn, x).reshape(x.numel(), -1)
    return torch.linalg.slogdet(jac)[1]


def log_normal(z):  # of each example
    return -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


# --- sizes


def test_parameter_counts():
    with torch.device('meta'):
        flow = FlowPP()
    sizes = count(flow), count(flow.deq), count(flow.body)
    assert sizes == (28_784_792, 3_154_088, 25_630_704)
    moves = flow.body.board[0].move, flow.body.small[0].move, flow.deq.steps[0].move
    assert tuple(map(count, moves)) == (2_762_034, 3_019_236, 770_994)
    assert sum(gain.numel() for gain in flowpp.gains(flow)) < 0.01 * count(flow)


# --- one coupling, and the transform inside it


@pytest.mark.parametrize('dtype,eps,_', DTYPES)
def test_full_size_coupling_inverts(dtype, eps, _):
    torch.manual_seed(0)
    coupling = flowpp.Coupling(flowpp.ImageNet(3), 3).to(dtype).eval()
    moving, resting = 10 * (2 * torch.rand(2, 2, 3, 8, 4, generator=gen(), dtype=dtype) - 1)
    with torch.no_grad():
        moved = coupling(moving, resting)[0]
        assert (coupling.inverse(moved, resting) - moving).abs().max() <= eps
        back = coupling.inverse(moving, resting)
        assert (coupling(back, resting)[0] - moving).abs().max() <= eps


def test_coupling_logdet_on_a_small_image():
    torch.manual_seed(0)
    coupling = flowpp.Coupling(flowpp.ImageNet(3, width=16, blocks=2), 3).eval()
    moving, resting = torch.randn(2, 1, 3, 4, 4, generator=gen())
    want = logdet_by_hand(lambda x: coupling(x, resting)[0], moving).item()
    assert abs(coupling(moving, resting)[1].item() - want) <= 1e-4


def test_one_component_is_affine():
    torch.manual_seed(0)
    net = flowpp.ImageNet(2, width=8, blocks=1, n_mix=1, heads=2)
    coupling = flowpp.Coupling(net, 2).double().eval()
    moving, resting = 5 * torch.randn(2, 3, 2, 4, 2, dtype=torch.float64)
    a, b, (_, mu, log_scale) = coupling.parts(resting, None)
    mu, log_scale = mu[..., 0], log_scale[..., 0]
    y, logdet = coupling(moving, resting)
    want = ((moving - mu) * torch.exp(-log_scale) + b) * a.exp()
    assert torch.allclose(y, want, atol=1e-10)
    assert torch.allclose(logdet, (a - log_scale).flatten(1).sum(1), atol=1e-10)


@pytest.mark.parametrize('scale', [-6.9, -3.0, 0.0, 2.0])
@pytest.mark.parametrize('spread', [0.1, 3.0, 30.0])
def test_search_ends_at_the_root(scale, spread):
    """Also where the components are far apart or very narrow.

    And where x itself cannot be had to full precision.
    """
    draws = [torch.randn(500, 6, generator=gen(i), dtype=torch.float64) for i in range(3)]
    mixture = draws[0], spread * draws[1], scale + 0.3 * draws[2]
    odds = 30 * torch.randn(500, generator=gen(5), dtype=torch.float64)
    x = from_log_odds(odds, *mixture)
    near = 1e-9 * (1 + x.abs())
    low, high = (log_odds(x + sign * near, *mixture)[0] for sign in (-1, 1))
    assert x.isfinite().all()
    assert (low <= odds + 1e-9).all() and (odds <= high + 1e-9).all()


def test_search_is_the_same_in_any_batch():
    mixture = [torch.randn(50, 6, generator=gen(i)) for i in range(3)]
    odds = 10 * torch.randn(50, generator=gen(5))
    alone = from_log_odds(odds[:7], *(part[:7] for part in mixture))
    assert torch.equal(from_log_odds(odds, *mixture)[:7], alone)


def test_no_clamp():
    """Log-odds beyond 11.5 in single precision.

    There a distribution function clamped to 1e-5 stops.
    """
    mixture = [torch.randn(9, 6, generator=gen(i)) for i in range(3)]
    odds = torch.tensor([-1e4, -80.0, -30.0, -12.0, 0.0, 12.0, 30.0, 80.0, 1e4])
    error = (log_odds(from_log_odds(odds, *mixture), *mixture)[0] - odds).abs()
    assert error.max() <= 1e-6 * 1e4
    assert error[1:-1].max() <= 1e-4


# --- the whole flow


@pytest.mark.parametrize('dtype,_,eps', DTYPES)
def test_full_stack_inverts(dtype, _, eps):
    "All 28,784,792 parameters, an image there and back, and noise back and there."
    torch.manual_seed(0)
    flow = FlowPP().eval()
    flow.init(2 * torch.rand(4, 3, 32, 32, generator=gen()) - 1, gen(1))
    flow = flow.to(dtype)
    x = 2 * torch.rand(1, 3, 32, 32, generator=gen(2)).to(dtype) - 1
    with torch.no_grad():
        z, _ = flow.encode(x, v=0.5)
        assert (flow.decode(z) - x).abs().max() <= eps
        assert (flow.encode(flow.decode(z), v=0.5)[0] - z).abs().max() <= eps
        z = torch.randn(1, 3, 32, 32, generator=gen(3)).to(dtype)
        assert (flow.body(flow.body.inverse(z))[0] - z).abs().max() <= eps


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('dtype,_,eps', DTYPES)
def test_round_trips(name, dtype, _, eps):
    flow = build(name, dtype)
    x, options = data(flow, 8, 2), fixed(flow)
    with torch.no_grad():
        z, _ = flow.encode(x, **options)
        assert (flow.decode(z) - x).abs().max() <= eps
        assert (flow.encode(flow.decode(z), **options)[0] - z).abs().max() <= eps


@pytest.mark.parametrize('name', SMALL)
def test_logdet(name):
    flow = build(name)
    x, options = data(flow, 2, 2), fixed(flow)
    logdet = flow.encode(x, **options)[1]
    for i in range(2):
        want = logdet_by_hand(lambda part: flow.encode(part, **options)[0], x[i : i + 1])
        assert abs(want - logdet[i]) <= 1e-6


@pytest.mark.parametrize('exact,slope', [(True, 1.0), (False, 0.8965)])
def test_slope_of_the_way_back(exact, slope):
    flow = build('flowpp', exact=exact)
    x = data(flow, 32, 2)
    with torch.no_grad():
        for options in (dict(generator=gen()), dict(v=0.5)):
            back = flow.decode(flow.encode(x, **options)[0])
            assert abs((x * back).sum() / x.square().sum() - slope) <= 1e-3
            assert (back - slope * x).abs().max() <= 0.9 / 255 + 1e-3


def test_pixels_logdet():
    """The softplus form, in units of u: softplus(h) + softplus(-h) + log 0.9 for each dimension.

    du/dx is 255/512.
    """
    flow = build('flowpp')
    x = data(flow, 4, 2)
    y = 0.9 * 255 / 256 * x
    h = torch.logit((y + 1) / 2)
    whole, inner = flow.encode(x, v=0.5)[1], flow.body(h)[1]
    want = (softplus(h) + softplus(-h) + math.log(0.9 * 255 / 512)).flatten(1).sum(1)
    assert torch.allclose(whole - inner, want, atol=1e-9)


@pytest.mark.parametrize('name', ['flowpp', 'flowpp-uniform', 'glow'])
def test_log_prob_is_that_of_levels(name):
    """The bound adds the cell: width 2/255 in each of 48 dimensions.

    Uniform noise adds nothing else.
    """
    flow = build(name)
    x = data(flow, 4, 2)
    z, logdet = flow.encode(x, generator=gen(7))
    got = flow.log_prob(x, gen(7)) - log_normal(z) - logdet - 48 * math.log(2 / 255)
    if name == 'flowpp':
        got = got + flow.noise(x, gen(7))[1]
    assert torch.allclose(got, torch.zeros(4, dtype=got.dtype), atol=1e-8)


def test_density_of_the_noise():
    "log r(v|x) is that of normal noise, less the log-determinant of the map that made v."
    flow = build('flowpp')
    x = data(flow, 1, 2)
    eps = torch.randn(1, 3, 4, 4, generator=gen(), dtype=torch.float64)
    want = log_normal(eps) - logdet_by_hand(lambda noise: flow.deq(x, noise)[0], eps)
    assert abs(flow.deq(x, eps)[1] - want).item() <= 1e-8


def test_dequantiser_without_couplings():
    """With the couplings switched off, the noise is a logistic-normal inside (0, 1).

    And the bound is finite.
    """
    torch.manual_seed(0)
    sizes = dict(steps=(1, 1, 1), deq=(2, 1, 4), blocks=1, width=8, n_mix=1, heads=2)
    flow = FlowPP((3, 4, 4), **sizes).double().eval()
    with torch.no_grad():
        for step in flow.deq.steps:
            last = step.move.net.leave
            for value in last.parameters():
                value.zero_()
            last.parametrizations.weight.original1.fill_(1)  # a zero direction has no norm
            step.mix.weight.copy_(torch.eye(6))
        x = data(flow, 400)
        v, log_r = flow.noise(x, gen())
    assert ((v > 0) & (v < 1)).all()
    logit = torch.logit(v)
    assert abs(v.mean() - 0.5) < 0.01 and abs(logit.std() - 1) < 0.02
    exact = log_normal(logit) - (v * (1 - v)).log().flatten(1).sum(1)
    assert torch.allclose(log_r, exact, atol=1e-8)
    assert flow.log_prob(x, gen()).isfinite().all()


# --- the arrangement of the released program


def test_released_squeeze_is_colour_then_pixel():
    "The half that goes on is all of red and the upper half of green."
    x = torch.arange(48.0).view(1, 3, 4, 4)
    kept, done = flowpp.squeeze(x, True).chunk(2, 1)
    red, green, blue = x[0]
    both_rows = [red[::2, ::2], red[::2, 1::2], red[1::2, ::2], red[1::2, 1::2]]
    assert torch.equal(
        kept[0], torch.stack([*both_rows, green[::2, ::2], green[::2, 1::2]])
    )
    assert sorted(done[0].flatten().tolist())[-16:] == blue.flatten().tolist()
    assert torch.equal(flowpp.unsqueeze(flowpp.squeeze(x, True), True), x)


def test_released_body_splits_by_colour():
    "What is done after the first group is the lower half of green, and blue."
    torch.manual_seed(0)
    sizes = dict(released=True, width=8, blocks=1, n_mix=2, heads=2)
    body = flowpp.ImageBody(3, (0, 1, 1), **sizes).double().eval()
    x = torch.randn(1, 3, 4, 4, generator=gen(), dtype=torch.float64)
    still = (body(x)[0] == x)[0]
    assert not still[0].any() and still[2].all()
    assert still[1, 1::2].all() and not still[1, ::2].any()


@pytest.mark.parametrize('released', [False, True])
def test_context_of_the_dequantiser(released):
    "As released, a convolution and three gated ones in a row; ours adds each to its input."
    torch.manual_seed(0)
    sizes = dict(width=8, n_mix=2, heads=2)
    deq = flowpp.Dequantiser(3, 1, 1, 4, released=released, **sizes).double().eval()
    x, eps = torch.randn(2, 2, 3, 4, 4, generator=gen(), dtype=torch.float64).tanh()
    seen = []
    deq.steps[0].register_forward_hook(lambda layer, args, out: seen.append(args[2]))
    deq(x, eps)
    hidden = deq.look[0](torch.cat(flowpp.checker(x / 2), 1))
    for block in deq.look[1:]:
        hidden = block(hidden) + (0 if released else hidden)
    assert torch.equal(seen[0], hidden)


def test_released_arrangement_has_the_same_parameters():
    with torch.device('meta'):
        ours, theirs = (FlowPP(released=k).state_dict() for k in (False, True))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# --- the conduct of all flows


def same_state(before, flow):
    after = flow.state_dict()
    return all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize('name', SMALL)
def test_init_sets_every_norm_once(name):
    torch.manual_seed(0)
    flow = SMALL[name]().double()
    seen = {}
    norms = [layer for layer in flow.modules() if hasattr(layer, 'watching')]

    def keep_first(layer, args, out):
        seen.setdefault(layer, out[0])

    hooks = [layer.register_forward_hook(keep_first) for layer in norms]
    flow.train().init(data(flow), gen(1))
    assert flow.training and len(seen) == len(norms) > 2
    assert all(layer.ready and not layer.watching for layer in norms)
    for out in seen.values():
        std, mean = torch.std_mean(out, (0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-8
        # a ReLU or a constant channel has no spread to set
        assert (std - 1).abs().amax() < 1e-5 or std.amin() < 1e-5
    for hook in hooks:
        hook.remove()
    before = copy.deepcopy(flow.state_dict())
    flow.init(3 * data(flow, seed=5) / 4, gen(2))
    assert same_state(before, flow)


@pytest.mark.parametrize('name', SMALL)
def test_gradients(name):
    """Finite for every parameter, through the density and through samples.

    Through samples they are equal to finite differences.
    """
    flow = build(name)
    flow.log_prob(data(flow, 8, 2), gen()).mean().neg().backward()
    assert all(finite_gradient(value) for value in flow.parameters())
    flow.zero_grad()
    z = torch.randn(2, *flow.shape, generator=gen(4), dtype=torch.float64)
    z.requires_grad_()
    flow.decode(z).square().sum().backward()
    used = [value for key, value in flow.named_parameters() if not key.startswith('deq.')]
    assert all(finite_gradient(value) for value in used)
    steepest = max(used, key=lambda value: value.grad.abs().max())
    for value in (z, steepest):
        place = value.grad.abs().argmax()
        want = value.grad.flatten()[place]
        got = slope_by_hand(lambda: flow.decode(z).square().sum(), value, place)
        assert abs(got - want) <= 1e-4 * (1 + want.abs())


def finite_gradient(value):
    return value.grad is not None and value.grad.isfinite().all()


def slope_by_hand(target, value, place, step=1e-6):
    with torch.no_grad():
        flat = value.view(-1)
        flat[place] += step
        up = target()
        flat[place] -= 2 * step
        down = target()
        flat[place] += step
    return (up - down) / (2 * step)


@pytest.mark.parametrize('name', SMALL)
def test_sampling(name):
    flow = build(name, torch.float32)
    first, again, other = (flow.sample(4, generator=gen(seed)) for seed in (0, 0, 1))
    assert first.shape == (4, *flow.shape) and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not flow.sample(1, generator=gen()).requires_grad
    still = flow.sample(3, temp=0.0, generator=gen())
    assert torch.allclose(still[0], still[2], atol=1e-5)
    halves = [flow.sample(2, generator=Slice(gen(0), i, 2)) for i in range(2)]
    assert torch.allclose(torch.cat(halves), first, atol=1e-4)


@pytest.mark.parametrize('name', ['flowpp', 'glow'])
def test_saving_memory_changes_nothing(name):
    plain, saving = build(name), build(name, save=True)
    for flow in (plain, saving):
        flow.log_prob(data(flow, 4, 2), gen()).mean().backward()
    for kept, again in zip(plain.parameters(), saving.parameters()):
        assert torch.allclose(kept.grad, again.grad, atol=1e-10)


def test_dropout_only_in_training():
    flow = build('flowpp')
    x = data(flow, 4)
    assert torch.equal(flow.encode(x, v=0.5)[0], flow.encode(x, v=0.5)[0])
    assert not torch.equal(flow.encode(x)[0], flow.encode(x)[0])  # the noise within a level
    flow.train()
    assert not torch.equal(flow.encode(x, v=0.5)[0], flow.encode(x, v=0.5)[0])


@pytest.mark.parametrize('name', SMALL)
def test_states_come_back(name, tmp_path):
    from safetensors.torch import load_file, save_file

    flow = build(name)
    save_file(flow.state_dict(), tmp_path / 'flow.safetensors')
    other = SMALL[name]().double().eval()
    other.load_state_dict(load_file(tmp_path / 'flow.safetensors'))
    z = torch.randn(2, *flow.shape, generator=gen(), dtype=torch.float64)
    assert torch.equal(flow.decode(z), other.decode(z))
    assert torch.equal(flow.decode(z), copy.deepcopy(flow).decode(z))
    before = other.decode(z)
    other.init(data(other, seed=9), gen())  # a loaded flow is ready
    assert torch.equal(before, other.decode(z))


def test_weights_are_computed_once_when_frozen():
    flow = build('flowpp')
    with frozen(flow):
        layer = flow.body.board[0].move.net.enter
        assert layer.weight is layer.weight
        assert not flow.sample(1, generator=gen()).requires_grad
    assert parametrize.is_parametrized(layer) and layer.weight is not layer.weight


@pytest.mark.parametrize('name', SMALL)
def test_refusals(name):
    flow = build(name, torch.float32)
    with pytest.raises(ValueError, match='expected a batch'):
        flow.log_prob(torch.zeros(2, 5))
    with pytest.raises(ValueError, match='expected a batch'):
        flow.decode(torch.zeros(flow.shape))
    with pytest.raises(TypeError, match='float32, got torch.float64'):
        flow.log_prob(torch.zeros(2, *flow.shape, dtype=torch.float64))
    if isinstance(flow, FlowPP):
        with pytest.raises(ValueError, match='pixels must lie in'):
            flow.log_prob(torch.full((1, 3, 4, 4), 1.2))


@pytest.mark.parametrize(
    'make,args',
    [
        (PointFlowPP, (3,)),
        (PointGlow, (5,)),
        (FlowPP, ((3, 5, 4),)),
        (Glow, ((3, 36, 36),)),
        (flowpp.GatedAttention, (9, 3)),
    ],
)
def test_impossible_sizes(make, args):
    with pytest.raises(ValueError):
        make(*args)


@pytest.mark.parametrize('points', [PointFlowPP, PointGlow])
def test_points_are_a_density(points):
    """The density of a fitted flow integrates to one.

    The mean of its logarithm over its own samples is that of the grid.
    """
    torch.manual_seed(0)
    x, _ = draw_points('spiral', 1000, gen())
    flow = points(2, 32, 4).double().init(x.double())
    line = torch.linspace(-15, 15, 301, dtype=torch.float64)
    log_density = flow.log_prob(torch.cartesian_prod(line, line)).detach()
    mass = log_density.exp() * (line[1] - line[0]) ** 2
    assert abs(mass.sum() - 1) <= 0.01
    own = flow.log_prob(flow.sample(20_000, generator=gen())).detach()
    error = abs(own.mean() - (mass * log_density).sum())
    assert error <= 5 * own.std() / len(own) ** 0.5 + 0.02


def test_released_glow_would_overflow():
    """Why the slopes are bounded.

    Far outside the data the inverse stays finite, and each line stretches by e^2 at most.
    """
    flow = shaken(build('points-glow', torch.float32), 0.3)
    x = flow.decode(50 * torch.randn(100, 4, generator=gen()))
    assert x.isfinite().all()
    for step in flow.modules():
        if isinstance(step, glow.Step):
            log_slope = step.line(1000 * torch.randn(50, 2, 1, 1, generator=gen()))[1]
            assert log_slope.abs().max() <= 2


def test_both_import_without_the_tools_of_authors():
    code = (
        'import sys, ebmbook.flows.flowpp, ebmbook.flows.glow; '
        'bad = {"fastcore", "nbdev", "matplotlib", "papermill"} & sys.modules.keys(); '
        'assert not bad, bad'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
