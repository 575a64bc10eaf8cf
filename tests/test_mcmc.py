"""Samplers against laws that are known by integration, and chains that survive a checkpoint."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ebmbook.learn.settings import choose
from ebmbook.learn.runs import open_run
from ebmbook.learn.contract import Group, Stage
from ebmbook.learn.loop import train
from ebmbook import cdrl
from ebmbook.mcmc import (
    Rates,
    Trace,
    ais,
    alternate,
    bf16,
    double_well,
    frozen,
    funnel,
    hmc,
    langevin,
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
    system = SimpleNamespace(build=cdrl.build, stages=(stage,))
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
