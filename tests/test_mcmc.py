"""Samplers against laws that are known by integration, and chains that survive a checkpoint."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ebmbook import cdrl
from ebmbook.learn.contract import Group, Stage
from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run
from ebmbook.learn.settings import choose
from ebmbook.mcmc import (
    Rates,
    Slice,
    Trace,
    adapt,
    ais,
    alternate,
    bf16,
    double_well,
    frozen,
    funnel,
    grid_log_z,
    hmc,
    in_chunks,
    langevin,
    langevin_step,
    leapfrog,
    log_mean_exp,
    mala,
    normal,
    recall,
    ring,
    ula,
    variance_after,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def law(log_density, low, high, n=20_001):
    "Distribution function and exact draws of one coordinate, by integration."
    grid = np.linspace(low, high, n)
    cdf = integrate.cumulative_trapezoid(np.exp(log_density(grid)), grid, initial=0)
    cdf /= cdf[-1]

    def draw(size, seed):
        uniform = np.random.default_rng(seed).random(size)
        return torch.tensor(np.interp(uniform, cdf, grid), dtype=torch.float32)

    return (lambda values: np.interp(values, grid, cdf)), draw


N = 4_000
well_cdf, well_draw = law(lambda a: -((a**2 - 2.25) ** 2) * 0.6 - 0.3 * a, -4, 4)
ring_cdf, ring_draw = law(lambda r: np.log(np.maximum(r, 1e-9)) - (r - 2) ** 2 / 0.02, 1, 3)


def well_start():
    return well_draw(N, 1)[:, None]


def ring_start():
    r = ring_draw(N, 2)
    angle = torch.rand(N, generator=gen(3)) * 2 * math.pi
    return torch.stack([r * angle.cos(), r * angle.sin()], 1)


def funnel_start():
    v = 1.5 * torch.randn(N, generator=gen(4))
    return torch.stack([v, (v / 2).exp() * torch.randn(N, generator=gen(5))], 1)


# statistics of each target with their distribution functions
WELL_LAW = [(lambda x: x[:, 0], well_cdf)]
RING_LAW = [
    (lambda x: x.norm(dim=1), ring_cdf),
    (lambda x: torch.atan2(x[:, 1], x[:, 0]), stats.uniform(-math.pi, 2 * math.pi).cdf),
]
FUNNEL_LAW = [
    (lambda x: x[:, 0], stats.norm(0, 1.5).cdf),
    (lambda x: x[:, 1] * (-x[:, 0] / 2).exp(), stats.norm.cdf),
]

TARGETS = {  # energy, exact start, law, MALA's step, HMC's step
    'double well': (double_well, well_start, WELL_LAW, 0.06, 0.3),
    'ring': (ring, ring_start, RING_LAW, 0.006, 0.12),
    'funnel': (funnel, funnel_start, FUNNEL_LAW, 0.15, 0.4),
}


def pvalues(name, x):
    return [
        stats.kstest(statistic(x).numpy(), cdf).pvalue
        for statistic, cdf in TARGETS[name][2]
    ]


@pytest.mark.parametrize('name', TARGETS)
def test_metropolis_keeps_the_law(name):
    "Detailed balance: exact draws stay exact draws, and a chain that lacks the test loses them."
    energy, start, _, eta, h = TARGETS[name]
    x = start()
    assert min(pvalues(name, x)) > 1e-3
    y, accept = mala(energy, x, eta, 40, generator=gen(6))
    z, accept_hmc = hmc(energy, x, h, 12, n_leap=6, generator=gen(7))
    assert (
        0.3 < accept.mean() < 0.98 and 0.3 < accept_hmc.mean() < 0.98
    )  # the test had something to refuse
    assert not torch.equal(x, y) and not torch.equal(x, z)
    assert min(pvalues(name, y)) > 1e-3
    assert min(pvalues(name, z)) > 1e-3
    unadjusted = langevin(energy, x, ula(eta), 40, generator=gen(6))
    bad = ~unadjusted.isfinite().all(1)
    assert bad.any() or min(pvalues(name, unadjusted)) < 1e-4


@pytest.mark.parametrize('name', ['double well', 'ring'])
def test_metropolis_finds_the_law(name):
    "From a start that is not the target."
    energy, _, _, eta, h = TARGETS[name]
    x = 2 * torch.randn(N, 1 if name == 'double well' else 2, generator=gen(8))
    x, _ = hmc(energy, x, h / 3, 60, n_leap=8, generator=gen(9))
    x, _ = hmc(energy, x, h, 150, n_leap=8, generator=gen(9))
    assert min(pvalues(name, x)) > 1e-3


def test_stationary_variance_of_the_unadjusted_chain():
    P = torch.tensor([0.5, 1.0, 4.0])
    for eta in (0.1, 0.3):
        exact = 1 / (P * (1 - eta * P / 2))
        x = torch.randn(40_000, 3, generator=gen()) * exact.sqrt()
        x = langevin(
            lambda x: (P * x.square()).sum(1) / 2, x, ula(eta), 25, generator=gen(1)
        )
        assert ((x.var(0) / exact - 1).abs() < 5 * (2 / 40_000) ** 0.5).all()
    # stable exactly below eta P = 2
    below, above = (
        langevin(lambda x: x.square().sum(1) / 2, torch.ones(1, 1), Rates(a, 0.0), 200)
        for a in (1.99, 2.01)
    )
    assert below.abs() < 1 < above.abs()
    assert variance_after(0.0, 2.0, ula(0.2), 10**4) == pytest.approx(1 / (2 * (1 - 0.2)))


def test_mala_removes_the_bias_and_accepts_all_small_steps():
    x = torch.randn(40_000, 1, generator=gen())

    def E(x):
        return 2 * x.square().sum(1)

    y, _ = mala(E, x, 0.3, 60, generator=gen(1))
    unadjusted = langevin(E, x, ula(0.3), 60, generator=gen(1))
    assert abs(y.var().item() - 0.25) < 0.01 and abs(unadjusted.var().item() - 0.25) > 0.1
    accepts = [
        mala(E, y, eta, 5, generator=gen(2))[1].mean().item()
        for eta in (0.5, 0.1, 0.01, 0.0001)
    ]
    assert accepts == sorted(accepts) and accepts[-1] > 0.999


def test_leapfrog_runs_backwards_and_keeps_volume():
    x = torch.randn(6, 2, generator=gen()).double()
    p = torch.randn(6, 2, generator=gen(1)).double()
    y, q, _ = leapfrog(funnel, x, p, 0.1, 25)
    back, r, _ = leapfrog(funnel, y, -q, 0.1, 25)
    assert torch.allclose(back, x, atol=1e-9) and torch.allclose(-r, p, atol=1e-9)

    def flow(s):
        return torch.cat(leapfrog_graph(s[:2], s[2:], 0.1, 5))

    at = torch.tensor([0.3, -0.4, 0.5, 0.2], dtype=torch.float64)
    assert (
        abs(torch.linalg.det(torch.autograd.functional.jacobian(flow, at)).item() - 1)
        < 1e-9
    )


def leapfrog_graph(x, p, h, n):  # the same motion with its graph kept, for the Jacobian
    def grad(x):
        return torch.autograd.grad(funnel(x[None]).sum(), x, create_graph=True)[0]

    p = p - h / 2 * grad(x)
    for k in range(n):
        x = x + h * p
        p = p - h * grad(x) * (0.5 if k == n - 1 else 1)
    return x, p


def halves(E, x, g):  # the first of two blocks
    return alternate(
        lambda a, b: E(torch.cat([a, b], 1)),
        tuple(x.chunk(2, 1)),
        ula(0.05),
        3,
        generator=g,
    )[0]


SAMPLERS = {
    'langevin': lambda E, x, g: langevin(E, x, ula(0.05), 5, generator=g),
    'mala': lambda E, x, g: mala(E, x, 0.05, 5, generator=g)[0],
    'hmc': lambda E, x, g: hmc(E, x, 0.1, 3, n_leap=3, generator=g)[0],
    'alternate': halves,
}


@pytest.mark.parametrize('name', SAMPLERS)
def test_every_sampler(name):
    run = SAMPLERS[name]
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))

    def E(x):
        return net(x)[:, 0] + x.square().sum(1)

    x = torch.randn(6, 4, generator=gen())
    keep = x.clone()
    a = run(E, x, gen(1))
    b = run(E, x, gen(1))
    assert torch.equal(a, b) and torch.equal(x, keep) and not a.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    with frozen(net):
        assert torch.equal(run(E, x, gen(1)), a)
    with pytest.raises(ValueError, match='one value per chain'):
        run(lambda x: E(x).mean(), x, gen(1))
    with pytest.raises(ValueError, match='one value per chain'):
        run(lambda x: E(x)[:, None], x, gen(1))


@pytest.mark.parametrize(
    'sampler',
    [
        lambda E, x: langevin(E, x, Rates(0.05, 0.0), 8),
        lambda E, x: leapfrog(E, x, torch.ones_like(x), 0.1, 8)[0],
    ],
)
def test_the_batch_size_changes_no_chain(sampler):
    x = torch.randn(16, 2, generator=gen()).double()
    whole = sampler(ring, x)
    for n in (1, 3, 16):
        assert torch.allclose(sampler(ring, x[:n]), whole[:n], atol=1e-12)


def test_a_chain_sees_its_own_noise_whatever_the_batch_does():
    "Chain i draws row i of the noise: the others' states do not matter."
    x = torch.randn(8, 2, generator=gen())
    other = x.clone()
    other[4:] += 5
    for run in (
        lambda x: langevin(ring, x, ula(0.002), 6, generator=gen(2)),
        lambda x: hmc(ring, x, 0.05, 4, generator=gen(2))[0],
    ):
        assert torch.equal(run(x)[:4], run(other)[:4])


def test_latent_energy_prior_and_the_tempered_chain():
    "Gaussian prior through exp(-E) p0, and the weight w of the noise."

    def base(z):
        return z.square().sum(1) / 2

    s = 0.5
    start = torch.randn(60_000, 1, generator=gen())
    x = langevin(base, start, Rates(s * s / 2, s), 80, generator=gen(1))
    assert (
        abs(x.var().item() - 1 / (1 - s * s / 4)) < 5 * 1.07 * (2 / 60_000) ** 0.5
    )  # 1.0667
    w = 0.3
    y = langevin(base, w * start, Rates(s * s / 2, w * s), 80, generator=gen(1))
    assert y.var().item() == pytest.approx(w * w / (1 - s * s / 4), rel=0.04)
    L = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)

    def tilt(z):
        return (
            torch.einsum('bi,ij,bj->b', z, L - torch.eye(2), z) / 2
        )  # -f(z), with base N(0, I)

    start = torch.randn(60_000, 2, generator=gen(), dtype=torch.float64)
    z = langevin(lambda z: tilt(z) + base(z), start, ula(0.1), 120, generator=gen(1))
    exact = torch.linalg.inv(L) @ torch.linalg.inv(torch.eye(2) - 0.1 * L / 2)
    assert (torch.cov(z.T) - exact).abs().max() < 0.02


def test_bf16_gradients_do_not_change_the_moments():
    lin = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.orthogonal_(lin.weight)

    def E(x):
        return lin(x).square().sum(1) / 2

    runs = [
        langevin(
            energy,
            torch.randn(20_000, 8, generator=gen()),
            ula(0.05),
            100,
            generator=gen(1),
        )
        for energy in (E, bf16(E))
    ]
    error = (2 / (20_000 * 8)) ** 0.5
    for x in runs:
        assert x.dtype == torch.float32
        assert (
            abs(x.var().item() - 1 / (1 - 0.025)) < 5 * error
            and abs(x.mean().item()) < 5 / (160_000) ** 0.5
        )
    assert 0 < (runs[0] - runs[1]).abs().max() < 0.2  # other numbers, the same law


def test_annealed_importance_sampling_bounds_a_known_constant():
    g = gen(3)

    def base(x):
        return x.square().sum(1) / (2 * 4.0)

    def move(energy, x):
        return hmc(energy, x, 0.15, 1, n_leap=4, generator=g)[0]

    z = integrate.quad(lambda a: math.exp(-((a * a - 2.25) ** 2) * 0.6 - 0.3 * a), -4, 4)[0]
    truth = math.log(z) - 0.5 * math.log(2 * math.pi * 4)
    path = torch.linspace(0, 1, 41)
    up = ais(double_well, base, 2 * torch.randn(N, 1, generator=gen()), path, move)[1]
    down = ais(double_well, base, well_start(), path.flip(0), move)[1]
    assert up.mean() < truth < -down.mean()
    assert log_mean_exp(up) == pytest.approx(truth, abs=0.05) and -log_mean_exp(
        down
    ) == pytest.approx(truth, abs=0.05)


def test_trace_sees_every_sampler():
    for sampler, rates in ((langevin, ula(0.01)), (hmc, 0.1)):
        trace = Trace(every=2, keep_states=True)
        sampler(ring, torch.ones(3, 2), rates, 6, on_step=trace)
        assert len(trace.energies) == len(trace.moved) == len(trace.states) == 3
        assert trace.energies[0].shape == (3,) and trace.moved[0].abs().max() == 0


# --- the public step


def bowl(*blocks):
    return sum(block.flatten(1).square().sum(1) for block in blocks) / 2


def test_the_step_is_the_equation():
    x = torch.tensor([[1.0, -2.0], [4.0, 0.0]])
    eps = normal(x, gen(3))
    a, b = 0.25, 0.5
    moved = langevin_step(bowl, x, Rates(a, b), generator=gen(3))
    assert torch.equal(moved, x + (-a * x + b * eps))
    per_chain = Rates(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))
    moved = langevin_step(bowl, x, per_chain, generator=gen(3))
    assert torch.equal(moved[0], x[0]) and torch.equal(
        moved[1], x[1] + (-0.5 * x[1] + eps[1])
    )
    moved = langevin_step(bowl, x, Rates(0.25, 0.0))
    assert moved.tolist() == [[0.75, -1.5], [3.0, 0.0]] and x[0].tolist() == [1.0, -2.0]
    moved = langevin_step(bowl, x, Rates(0.25, 0.0), clip=0.5, on_grad=torch.neg)
    assert moved.tolist() == [[1.25, -2.5], [4.5, 0.0]]
    moved = langevin_step(bowl, x, Rates(0.25, 0.0), constrain=lambda own: own.clamp(-1, 1))
    assert moved.tolist() == [[0.75, -1.0], [1.0, 0.0]]


LOOPS = {
    'plain': {},
    'clip': dict(clip=0.05),
    'walls': dict(constrain=lambda own: own.clamp(-1, 1)),
    'sign': dict(on_grad=torch.sign),
    'graph': dict(differentiable=True),
}


@pytest.mark.parametrize('name', LOOPS)
@pytest.mark.parametrize('n_blocks', [1, 2])
def test_the_chain_is_a_loop_of_steps(name, n_blocks):
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))

    def E(*blocks):
        return net(sum(blocks))[:, 0].square() + bowl(*blocks)

    x = tuple(torch.randn(5, 3, generator=gen(i)) for i in range(n_blocks))
    x = x[0] if n_blocks == 1 else x
    rates = Rates(torch.linspace(0.01, 0.1, 5), 0.1)
    by_hand, heights, seen = x, [], []
    stream = gen(7)
    for _ in range(4):
        by_hand = langevin_step(
            E, by_hand, rates, generator=stream, on_energy=heights.append, **LOOPS[name]
        )
    end = langevin(
        E,
        x,
        rates,
        4,
        generator=gen(7),
        on_step=lambda i, state, energies: seen.append(energies),
        **LOOPS[name],
    )
    assert type(end) is type(x)
    pairs = [(end, by_hand)] if n_blocks == 1 else zip(end, by_hand)
    for one, other in pairs:
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad == (name == 'graph')
    assert torch.equal(torch.stack(heights), torch.stack(seen))


def test_the_graph_leads_back_to_every_start():
    "Also to one block of two, and through a chain that a caller without gradients asks for."
    x, z = torch.ones(2, 1), torch.ones(2, 1, requires_grad=True)
    end = langevin(bowl, (x, z), Rates(0.5, 0.0), 2, differentiable=True)
    assert torch.autograd.grad(end[1].sum(), z)[0].flatten().tolist() == [0.25, 0.25]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            end = langevin(bowl, z, Rates(0.5, 0.0), 2, differentiable=True)
        assert torch.autograd.grad(end.sum(), z)[0].flatten().tolist() == [0.25, 0.25]


# --- what is refused


X = torch.zeros(4, 2)
STATES = {  # a state, the error, what the message says
    'list': ([X, X], TypeError, 'x must be a tensor or a tuple of tensors, got list'),
    'array': (np.zeros((4, 2)), TypeError, 'a tensor or a tuple of tensors, got ndarray'),
    'number': (1.0, TypeError, 'a tensor or a tuple of tensors, got float'),
    'tuple of numbers': ((1.0, 2.0), TypeError, 'a tuple of tensors, got float'),
    'nothing': ((), ValueError, 'x is an empty tuple'),
    'integers': (X.long(), TypeError, r'floating-point dtype, got torch.int64; convert'),
    'integer block': ((X, X.int()), TypeError, r'floating-point dtype, got torch.int32'),
    'complex': (X * 1j, TypeError, 'floating-point dtype, got torch.complex64'),
    'batches': ((X, X[:3]), ValueError, r'number the chains.*got \(4, 2\), \(3, 2\)'),
    'no chains': (torch.tensor(1.0), ValueError, 'first axis of x must number the chains'),
}
RUNS = {  # samplers of a state, with everything else right
    'langevin': lambda E, x: langevin(E, x, ula(0.1), 1),
    'langevin_step': lambda E, x: langevin_step(E, x, ula(0.1)),
    'mala': lambda E, x: mala(E, x, 0.1, 1),
    'hmc': lambda E, x: hmc(E, x, 0.1, 1),
    'leapfrog': lambda E, x: leapfrog(E, x, x, 0.1, 1),
    'adapt': lambda E, x: adapt(mala, E, x, 0.1, 1),
    'ais': lambda E, x: ais(E, E, x, [0, 1], lambda energy, x: x),
}
LISTED = dict(RUNS, alternate=lambda E, x: alternate(E, x, ula(0.1), 1))


@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize('run', RUNS)
def test_states_that_no_chain_can_move(run, state):
    x, kind, words = STATES[state]
    with pytest.raises(kind, match=words):
        RUNS[run](bowl, x)
    if isinstance(x, (tuple, list)):
        with pytest.raises(kind, match=words):
            alternate(bowl, x, ula(0.1), 1)


ENERGIES = {  # an energy of two blocks, what the message says
    'no_grad': (torch.no_grad()(bowl), 'the energy has no gradient'),
    'inference_mode': (torch.inference_mode()(bowl), 'the energy has no gradient'),
    'detached': (lambda x, z: bowl(x, z).detach(), 'the energy has no gradient'),
    'constant': (lambda x, z: torch.ones(4), 'the energy has no gradient'),
    'integers': (lambda x, z: bowl(x, z).long(), 'the energy has no gradient'),
    'first': (lambda x, z: bowl(x), 'does not depend on block 1 of x: use it'),
    'second': (lambda x, z: bowl(z), 'does not depend on block 0 of x: use it'),
    'mean': (lambda x, z: bowl(x, z).mean(), r'one value per chain, shape \(4,\), got'),
    'column': (lambda x, z: bowl(x, z)[:, None], r'one value per chain.*got \(4, 1\)'),
    'number': (lambda x, z: bowl(x, z).sum().item(), 'one value per chain'),
}


@pytest.mark.parametrize('energy', ENERGIES)
@pytest.mark.parametrize('run', [name for name in LISTED if name != 'ais'])
def test_energies_that_lead_nowhere(run, energy):
    E, words = ENERGIES[energy]
    if run == 'alternate' and 'depend' in words:  # for which the other block is a constant
        words = 'the energy has no gradient'
    with pytest.raises(ValueError, match=words):
        LISTED[run](E, (X, X))


def test_an_energy_of_parameters_alone():
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match='the energy does not depend on x: use it'):
        langevin(lambda x: 2 * weight, X, ula(0.1), 1)


def test_errors_of_the_energy_stay_its_own():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        langevin(lambda x: bowl(x @ torch.ones(3, 3)), X, ula(0.1), 1)


NAN = math.nan
NUMBERS = [  # a call, the error, what the message says
    (
        lambda: langevin(bowl, X, 0.1, 10),
        TypeError,
        r'rates takes Rates.*ula\(0.1\), got float',
    ),
    (lambda: langevin(bowl, X, (0.1, 0.1), 1), TypeError, 'rates takes Rates.*got tuple'),
    (lambda: langevin_step(bowl, X, 0.1), TypeError, 'rates takes Rates'),
    (lambda: alternate(bowl, (X, X), 0.1, 1), TypeError, 'rates takes Rates'),
    (lambda: variance_after(1.0, 1.0, 0.1, 5), TypeError, 'rates takes Rates'),
    (lambda: langevin(bowl, X, Rates(-0.1, 0.0), 1), ValueError, 'drift must be finite'),
    (lambda: langevin(bowl, X, Rates(0.1, NAN), 1), ValueError, 'noise must be finite'),
    (lambda: langevin(bowl, X, Rates(0.1, 1j), 1), TypeError, 'noise must be a number'),
    (lambda: langevin(bowl, X, Rates('a', 0.0), 1), TypeError, 'drift must be a number'),
    (
        lambda: langevin(bowl, X, Rates((0.1,) * 2, 0.0), 1),
        ValueError,
        '2 values for 1 blocks',
    ),
    (lambda: langevin(bowl, X, Rates(X[0], 0.0), 1), ValueError, 'one value per chain'),
    (lambda: langevin_step(bowl, X, Rates(-X[:, 0] - 1, 0.0)), ValueError, 'got -1.0'),
    (lambda: ula(-1.0), ValueError, 'eta must be finite and at least 0, got -1.0'),
    (lambda: ula(math.inf), ValueError, 'eta must be finite'),
    (
        lambda: ula(torch.tensor([0.1, -0.1])),
        ValueError,
        'eta must be finite and at least 0',
    ),
    (
        lambda: ula(torch.tensor([0.1, NAN])),
        ValueError,
        'eta must be finite and at least 0',
    ),
    (lambda: ula((0.1, -0.1)), ValueError, 'eta must be finite and at least 0, got -0.1'),
    (lambda: ula(0.1, -1.0), ValueError, 'temp must be finite and at least 0, got -1.0'),
    (lambda: ula('small'), TypeError, 'eta must be a number or a tensor, got str'),
    (lambda: mala(bowl, X, -0.1, 1), ValueError, 'eta must be finite and at least 0'),
    (lambda: mala(bowl, X, (0.1, 0.1), 1), ValueError, 'eta has 2 values for 1 blocks'),
    (lambda: mala(bowl, X, X[0], 1), ValueError, 'eta has shape.*one value per chain'),
    (lambda: mala(bowl, X, 0.1, 1, temp=0), ValueError, 'temp must be finite and above 0'),
    (lambda: hmc(bowl, X, -0.1, 1), ValueError, 'step must be finite and at least 0'),
    (
        lambda: hmc(bowl, X, ula(0.1), 1, temp=-1.0),
        ValueError,
        'temp must be finite and above',
    ),
    (lambda: hmc(bowl, X, 0.1, 1, n_leap=0), ValueError, 'n_leap must be at least 1'),
    (lambda: hmc(bowl, X, 0.1, 1, n_leap=1.5), TypeError, 'n_leap must be an integer'),
    (
        lambda: leapfrog(bowl, X, X, -0.1, 1),
        ValueError,
        'step must be finite and at least 0',
    ),
    (lambda: leapfrog(bowl, X, X, 0.1, 0), ValueError, 'n_leap must be at least 1'),
    (
        lambda: leapfrog(bowl, X, X[:, :1], 0.1, 1),
        ValueError,
        'momenta must have the shapes',
    ),
    (lambda: leapfrog(bowl, (X, X), X, 0.1, 1), ValueError, 'momenta must have the shapes'),
    (
        lambda: leapfrog(bowl, X, 1.0, 0.1, 1),
        TypeError,
        'momenta must be a tensor or a tuple',
    ),
    (
        lambda: langevin(bowl, X, ula(0.1), 1, clip=-0.1),
        ValueError,
        'clip must be at least 0',
    ),
    (lambda: langevin(bowl, X, ula(0.1), 1, generator=0), TypeError, 'torch.Generator'),
    (lambda: adapt(mala, bowl, X, 0.0, 1), ValueError, 'step must be finite and above 0'),
    (
        lambda: adapt(mala, bowl, X, (0.1,), 1),
        TypeError,
        'step must be a number, got tuple',
    ),
    (lambda: adapt(mala, bowl, X, 0.1, 0), ValueError, 'n_steps must be at least 1'),
    (lambda: recall(X, X, 1.5), ValueError, 'rate must lie between 0 and 1, got 1.5'),
    (lambda: recall(X, X, NAN), ValueError, 'rate must lie between 0 and 1'),
    (lambda: recall(X, X, None), TypeError, 'rate must be a number'),
    (lambda: recall([X], X, 0.1), TypeError, 'buffer must be a tensor'),
    (lambda: recall(X, 0.0, 0.1), TypeError, 'fresh must be a tensor'),
    (lambda: ais(bowl, bowl, X, [], None), ValueError, 'betas must rise from 0 to 1'),
    (lambda: grid_log_z(bowl, -1.0), ValueError, 'lim must be finite and above 0'),
    (lambda: grid_log_z(bowl, 1.0, 2.5), TypeError, 'n must be an integer'),
    (
        lambda: grid_log_z(lambda x: bowl(x).mean(), 1.0, 4),
        ValueError,
        'one value per chain',
    ),
    (lambda: Trace(every=0), ValueError, 'every must be at least 1'),
    (lambda: in_chunks(torch.zeros, -1), ValueError, 'n must be at least 0'),
    (lambda: in_chunks(torch.zeros, 4, 1.5), TypeError, 'chunk must be an integer'),
    (lambda: Slice(gen(), 3, 3), ValueError, 'part must lie in'),
]


@pytest.mark.parametrize('case', range(len(NUMBERS)))
def test_numbers_that_no_chain_can_use(case):
    call, kind, words = NUMBERS[case]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize('n_steps', [2.0, True, '3', None, -1])
def test_numbers_of_steps(n_steps):
    kind, words = (ValueError, 'at least 0') if n_steps == -1 else (TypeError, 'an integer')
    for run in (langevin, mala, hmc, alternate):
        rates = ula(0.1) if run in (langevin, alternate) else 0.1
        x = (X, X) if run is alternate else X
        with pytest.raises(kind, match=f'n_steps must be {words}'):
            run(bowl, x, rates, n_steps)


def test_what_can_be_used_is_used():
    "Integers of NumPy, no noise, no drift, numbers as states, no chains at all."
    assert langevin(bowl, X, Rates(0, 0), np.int64(2)).equal(X)
    assert langevin(bowl, X, ula(np.float32(0.1)), 1).shape == X.shape
    line = torch.linspace(-1, 1, 5)
    trace = Trace()
    for run in (lambda x: langevin(lambda x: x**2, x, ula(0.1), 2, on_step=trace),):
        assert run(line).shape == (5,) and trace.moved[1].shape == (5,)
    assert hmc(lambda x: x**2, line, 0.1, 2)[0].shape == (5,)
    assert langevin(bowl, X[:0], ula(torch.ones(0)), 2).shape == (0, 2)


# --- inference mode


def everything(E, x):
    "Ends of all samplers from one start."
    pair = (x, x + 1)

    def E2(x, z):
        return E(x) + E(z) + (x * z).sum(1)

    rates = Rates(torch.linspace(0.01, 0.1, len(x)), 0.1)
    energies = []
    ends = {
        'langevin': langevin(E, x, rates, 4, generator=gen(1)),
        'options': langevin(
            E,
            x,
            rates,
            4,
            generator=gen(1),
            clip=0.05,
            on_grad=torch.sign,
            constrain=lambda own: own.clamp(-1, 1),
            on_step=lambda i, state, energy: energies.append(energy),
        ),
        'graph': langevin(E, x, rates, 4, generator=gen(1), differentiable=True),
        'step': langevin_step(E, x, rates, generator=gen(1)),
        'blocks': langevin(E2, pair, rates, 4, generator=gen(1)),
        'mala': mala(E, x, 0.05, 4, generator=gen(1)),
        'hmc': hmc(E, x, 0.1, 3, temp=0.5, generator=gen(1)),
        'leapfrog': leapfrog(E, x, normal(x, gen(2)), 0.1, 3)[:2],
        'alternate': alternate(E2, pair, ula(0.05), 2, generator=gen(1)),
        'adapt': adapt(mala, E, x, 0.1, 3, generator=gen(1))[0],
        'ais': ais(
            E, bowl, x, [0, 0.5, 1], lambda e, x: hmc(e, x, 0.1, 1, generator=gen(3))[0]
        ),
    }
    return dict(ends, energies=tuple(energies))


def flat(ends):
    "All numbers in a row, none of them bound to inference mode."
    found = [own if isinstance(own, tuple) else (own,) for own in ends.values()]
    parts = [part for own in found for part in own]
    assert not any(part.is_inference() for part in parts)
    with torch.inference_mode(False):
        return torch.cat([part.detach().double().flatten() for part in parts])


def normalised_net():
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.spectral_norm
    layers = [norm(torch.nn.Linear(4, 8)), torch.nn.SiLU(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).eval()


def test_inference_mode_of_what_takes_no_gradient():
    start = torch.randn(5, 2, generator=gen())
    buffer, rows = recall(start, start[:2], 0.5, gen(4))
    log_z, table = grid_log_z(ring, 3.0, 8)
    with torch.inference_mode():
        other = recall(start.clone(), start[:2].clone(), 0.5, gen(4))
        assert torch.equal(other[0], buffer) and torch.equal(other[1], rows)
        assert grid_log_z(ring, 3.0, 8)[0] == log_z


@pytest.mark.parametrize('froze', ['not', 'inside', 'outside'])
def test_inference_mode_changes_no_number(froze):
    net = normalised_net()

    def E(x):
        return net(x)[:, 0].square() + bowl(x)

    start = torch.randn(5, 4, generator=gen())
    if froze == 'not':
        outside = flat(everything(E, start))
        with torch.inference_mode():
            within = flat(everything(E, start.clone()))  # a start that inference mode made
    elif froze == 'inside':
        with frozen(net):
            outside = flat(everything(E, start))
        with torch.inference_mode(), frozen(net):
            net(start)  # leaves no weights in the cache that would spoil the chains
            within = flat(everything(E, start.clone()))
    else:
        with frozen(net):
            outside = flat(everything(E, start))
            with torch.inference_mode():
                within = flat(everything(E, start.clone()))
    assert torch.equal(outside, within)
    assert all(weight.requires_grad for weight in net.parameters())
    # afterwards the network can be trained on what came out
    end = langevin(E, start, ula(0.1), 1)
    E(end).sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())


def test_normalised_weights_that_inference_mode_made():
    "Inside `frozen` they stay; who enters the mode first has others."
    net = normalised_net()
    with frozen(net), torch.inference_mode():
        net(torch.ones(3, 4))
        with pytest.raises(ValueError, match='enter it before `frozen`'):
            langevin(lambda x: net(x)[:, 0], torch.ones(3, 4), ula(0.1), 1)


def test_weights_that_inference_mode_made():
    with torch.inference_mode():
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)
        )
        x = torch.ones(3, 4)
        with (
            frozen(net),
            pytest.raises(ValueError, match='made under torch.inference_mode'),
        ):
            langevin(lambda x: net(x)[:, 0], x, ula(0.1), 1)
    with frozen(net), pytest.raises(ValueError, match='make or load them outside'):
        hmc(lambda x: net(x)[:, 0], x, 0.1, 1)
    assert all(weight.requires_grad for weight in net.parameters())


# --- persistent chains in a checkpoint


def persistent_losses(nets, batch, ctx):
    "Contrastive learning of points with a replay buffer."
    x = batch['x']
    if 'buffer' not in ctx.state:
        ctx.state['buffer'] = torch.randn(64, 2, generator=ctx.generator)
    start, rows = recall(ctx.state['buffer'], normal(x, ctx.generator), 0.05, ctx.generator)
    lam = torch.zeros(len(x))
    with frozen(nets):
        end = langevin(
            lambda y: nets.energy(y, lam), start, ula(0.01), 3, generator=ctx.generator
        )
    ctx.state['buffer'][rows] = end
    yield 'energy', (nets.energy(x, lam) - nets.energy(end, lam)).mean(), {}


def test_persistent_chains_survive_a_stop(tmp_path):
    def optimisers(nets):
        return dict(energy=Group(torch.optim.Adam(nets.energy.parameters(), 1e-3)))

    stage = Stage('persistent', persistent_losses, optimisers, lambda cfg: cfg.n_iters)
    system = replace(cdrl.SYSTEM, stages=(stage,))
    over = dict(ch=8, init_ch=8, batch=16, n_iters=20, save_every=5, log_every=1, warmup=0)
    preset, cfg = choose(cdrl.PRESETS, cdrl.DEFAULT_PRESET, 'checkerboard', over=over)

    def go(out, stop=None):
        run = open_run('cdrl', preset, cfg, cdrl.PRESETS[preset], out=out, device='cpu')

        def on_step(step, nets):
            if step == stop:
                raise InterruptedError

        return train(system, cfg, run, progress=False, on_step=on_step)

    whole = go(tmp_path / 'whole').state_dict()
    with pytest.raises(InterruptedError):
        go(tmp_path / 'cut', stop=13)
    assert not (tmp_path / 'cut/weights').exists()
    parts = go(tmp_path / 'cut').state_dict()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
