"""Checks of the foundations that take too long for their notebook.

The gradient of the likelihood, the bias of short runs, the learned theta of a delta filter,
the filters, the adjoint and the conditional energies are test cells of the notebook. Here
are Langevin chains on Gaussians, what FRAME learns, latent models in which everything is
linear, and densities in the plane.
"""

import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ebmbook import foundations as f
from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run
from ebmbook.mcmc import (
    Rates,
    alternate,
    frozen,
    grid_log_z,
    langevin,
    mala,
    ula,
    variance_after,
)
from ebmbook.shell.claims import read_claims


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def within(
    got, want, errors, n=5
):  # a statistic agrees with its expectation to n standard errors
    assert (
        torch.as_tensor(got) - torch.as_tensor(want)
    ).abs().max() <= n * torch.as_tensor(errors).max(), (got, want)


# --- Langevin on Gaussians


@pytest.mark.parametrize('prec,delta', [(1.0, 0.5), (4.0, 0.3), (4.0, 0.8), (0.25, 1.0)])
def test_stationary_variance(prec, delta):
    n = 30_000
    v = 1 / (prec * (1 - delta**2 * prec / 4))
    assert variance_after(1.0, prec, ula(delta**2 / 2), math.inf) == pytest.approx(v)
    x = langevin(
        lambda x: prec * x[:, 0] ** 2 / 2,
        v**0.5 * torch.randn(n, 1, generator=gen()),
        ula(delta**2 / 2),
        8,
        generator=gen(1),
    )
    within(x.var(), v, v * (2 / n) ** 0.5)


@pytest.mark.parametrize('prec,stable', [(3.9, True), (4.1, False)])
def test_stable_only_below_four(prec, stable):
    x = langevin(
        lambda x: prec * x[:, 0] ** 2 / 2, torch.ones(10, 1), Rates(0.5, 0.0), 400
    )  # delta = 1, noise off
    assert (x.abs().max() < 1e-3) == stable and math.isfinite(
        variance_after(1.0, prec, ula(0.5), math.inf)
    ) == stable


def test_mala_removes_the_bias():
    n = 4_000
    prec = 4.0

    def energy(x):
        return 2 * x[:, 0] ** 2

    start = 0.5 * torch.randn(n, 1, generator=gen())
    rates = []
    for delta in (0.8, 0.2, 0.05):
        x, accept = mala(energy, start, delta**2 / 2, 30, generator=gen(1))
        within(x.var(), 1 / prec, 1 / prec * (2 / n) ** 0.5)
        rates.append(accept.mean().item())
    assert (
        variance_after(1.0, prec, ula(0.8**2 / 2), math.inf) > 1.5 / prec
    )  # without the test the first would be far off
    assert rates[0] < rates[1] < rates[2] and rates[2] > 0.998


# --- FRAME


def abs_moments(t):  # E|x| and Var|x| under exp(t|x| - x^2/2)
    ratio = math.exp(-t * t / 2) / (2 * math.pi) ** 0.5 / (0.5 * math.erfc(-t / 2**0.5))
    return t + ratio, 1 - ratio * (t + ratio)


def test_spread_of_a_learned_theta():
    t = 0.5
    n = 400
    runs = 1_500
    u = torch.linspace(0, 9, 20_001, dtype=torch.float64)
    cdf = torch.exp(t * u - u**2 / 2).cumsum(0)
    places = torch.searchsorted(
        cdf / cdf[-1], torch.rand(runs * n, generator=gen(), dtype=torch.float64)
    )
    x = u[places.clamp(max=20_000)].view(runs, n)
    within(x.mean(), abs_moments(t)[0], (abs_moments(t)[1] / x.numel()) ** 0.5)
    grid = np.linspace(-1, 2, 3_001)
    learned = np.interp(
        x.mean(1).numpy(), [abs_moments(theta)[0] for theta in grid], grid
    )  # where the statistics agree
    want = 1 / (n * abs_moments(t)[1])
    assert abs(learned.var() / want - 1) < 5 * (2 / runs) ** 0.5


def square_field(
    kernels, w, size
):  # exact statistics of the Gaussian field with precision 1 + sum w |H|^2
    placed = torch.zeros(len(kernels), size, size)
    for image, kernel in zip(placed, kernels):
        image[: len(kernel), : len(kernel)] = kernel
    power = torch.fft.fft2(placed).abs() ** 2
    return -0.5 * (power / (1 + (w[:, None, None] * power).sum(0))).mean((1, 2))[:, None]


def test_square_statistics():
    kernels = [f.gabor(4, 0.0), f.dog(1.4)]
    w = torch.tensor([1.0, 0.5])
    h = square_field(kernels, w, 32)
    kept = []
    errors = []
    model = f.Frame(kernels, 32, 'square')

    def watch(i, x):
        kept.append(model.phi.theta[:, 0].detach().clone())
        errors.append((f.statistics(model, x) - h).abs().sum().item())

    f.fit_texture(
        model,
        None,
        target=h,
        size=32,
        n_iters=150,
        n_steps=10,
        n_chains=6,
        delta=0.15,
        rate=0.8,
        generator=gen(),
        on_iter=watch,
    )
    got = torch.stack(kept[100:]).mean(0)
    assert (got / w - 1).abs().max() < 0.12, got
    assert np.mean(errors[:3]) > 4 * np.mean(errors[100:])  # the error falls


def test_two_starts_one_answer():  # the likelihood is concave in theta
    kernels = [f.gabor(4, 0.0), f.dog(1.4)]
    h = torch.tensor([[0.5], [1.2]])  # white noise has 0.8
    ends = []
    for seed, start in (
        (3, torch.tensor([[-1.0], [1.0]])),
        (5, torch.tensor([[0.8], [-0.6]])),
    ):
        model = f.Frame(kernels, 32)
        kept = []
        with torch.no_grad():
            model.phi.theta.copy_(start)
        f.fit_texture(
            model,
            None,
            target=h,
            size=32,
            n_iters=120,
            n_steps=8,
            n_chains=6,
            delta=0.2,
            rate=0.6,
            generator=gen(seed),
            on_iter=lambda i, x: kept.append(model.phi.theta[:, 0].detach().clone()),
        )  # noqa: B023 - used within this iteration only
        ends.append(torch.stack(kept[90:]).mean(0))
    assert (ends[0] - ends[1]).abs().max() < 0.03 and ends[0].abs().min() > 0.1, ends


# --- latent models in which everything is linear


def settings(**changes):
    line = dict(nz=2, sigma=0.5, prior_steps=30, prior_delta=0.6)
    line |= dict(post_steps=30, post_delta=0.3)
    return replace(f.PRESETS['digits'], **line | changes)


class Linear(nn.Module):
    def __init__(self, w, prec, **changes):
        super().__init__()
        self.cfg = settings(**changes)
        self.w = nn.Parameter(w.clone())
        self.prec = nn.Parameter(prec.clone())

    def tilt(self, z):
        return (z.square() * (self.prec - 1)).sum(1) / 2

    def decoder(self, z):
        return z @ self.w.T


def points(mean, cov):  # 2d points (B, 2d, d) with exactly this mean and covariance
    d = cov.shape[-1]
    s = (d**0.5 * torch.linalg.cholesky(cov)).mT
    return torch.cat([mean[:, None] + s, mean[:, None] - s], 1)


def test_gradient_of_the_marginal_likelihood():
    torch.manual_seed(0)
    nets = Linear(torch.randn(4, 2), torch.tensor([1.5, 0.6])).double()
    sigma = 0.7
    x = torch.randn(30, 4, dtype=torch.float64)
    cov = nets.w @ torch.diag(1 / nets.prec) @ nets.w.T + sigma**2 * torch.eye(
        4, dtype=torch.float64
    )
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=torch.float64), cov
    )
    exact = torch.autograd.grad(-marginal.log_prob(x).mean(), [nets.prec, nets.w])
    post = torch.diag(nets.prec) + nets.w.T @ nets.w / sigma**2
    mean = torch.linalg.solve(post, nets.w.T @ x.T / sigma**2).T.detach()
    seen = points(mean, torch.linalg.inv(post).detach())
    dreamt = points(
        torch.zeros(1, 2, dtype=torch.float64), torch.diag(1 / nets.prec).detach()
    )
    error = ((x[:, None] - nets.decoder(seen)).square().sum(2) / (2 * sigma**2)).mean()
    loss = f.cd_loss(nets.tilt, seen.flatten(0, 1), dreamt.flatten(0, 1)) + error
    for a, b in zip(torch.autograd.grad(loss, [nets.prec, nets.w]), exact):
        assert torch.allclose(a, b, atol=1e-10)


def test_learned_covariance():
    w = torch.tensor([[1.2, 0.0], [0.5, 0.8], [0.0, -0.6]])
    n = 20_000
    changes = dict(prior_delta=0.4, post_steps=60, post_delta=0.17)
    cfg = settings(**changes)
    x = torch.randn(n, 2, generator=gen()) * torch.tensor(
        [1.5, 0.7]
    ) @ w.T + cfg.sigma * torch.randn(n, 3, generator=gen(1))
    nets = Linear(0.5 * torch.randn(3, 2, generator=gen(2)), torch.ones(2), **changes)
    kept = []
    opts = dict(
        prior=torch.optim.SGD([nets.prec], 0.1), decoder=torch.optim.SGD([nets.w], 0.05)
    )
    ctx = types.SimpleNamespace(generator=gen(4))
    for i in range(200):
        some = x[torch.randint(n, (400,), generator=ctx.generator)]
        for name, loss, _ in f.losses(nets, dict(x=some), ctx):
            for opt in opts.values():
                opt.zero_grad()
            loss.backward()
            opts[name].param_groups[0]['lr'] *= 0.994
            opts[name].step()
        # learning matches the chain, so its variance counts and not 1/prec;
        # the two differ by a few per cent
        v = torch.tensor(
            [
                variance_after(1.0, p, ula(cfg.prior_delta**2 / 2), cfg.prior_steps)
                for p in nets.prec.tolist()
            ]
        )
        if i >= 90:
            kept.append(
                (nets.w @ torch.diag(v) @ nets.w.T).detach() + cfg.sigma**2 * torch.eye(3)
            )
    got = torch.stack(kept).mean(0)
    want = x.T.cov()
    assert (got - want).norm() / want.norm() < 0.1, (got, want)


def test_noise_weight_and_flat_tilt():
    "With f = 0 and s = 0.5 the variance is 1.0667, and a noise weight w multiplies it by w^2."
    n = 40_000
    flat = types.SimpleNamespace(tilt=lambda z: torch.zeros(len(z)))
    for w in (1.0, 0.5, 1.5):
        v = w**2 / (1 - 0.5**2 / 4)
        z = langevin(
            f.prior_energy(flat),
            v**0.5 * torch.randn(n, 1, generator=gen()),
            Rates(0.125, 0.5 * w),
            15,
            generator=gen(1),
        )
        within(z.var(), v, v * (2 / n) ** 0.5)
    assert 1 / (1 - 0.5**2 / 4) == pytest.approx(1.0667, abs=5e-5)


def two_blocks():
    "x = A z_a + B z_s + noise: joint energy of both latents, and the exact posterior."
    torch.manual_seed(1)
    a = torch.randn(5, 2) / 2
    b = torch.randn(5, 2) / 2
    sigma = 0.5
    x = torch.randn(5)
    w = torch.cat([a, b], 1)
    prec = torch.eye(4) + w.T @ w / sigma**2

    def energy(u, v):
        miss = (x - u @ a.T - v @ b.T).square().sum(1)
        return (u.square().sum(1) + v.square().sum(1)) / 2 + miss / (2 * sigma**2)

    return energy, prec, torch.linalg.solve(prec, w.T @ x / sigma**2)


@pytest.mark.parametrize('kernel', [langevin, alternate])
def test_posterior_of_two_blocks(kernel):
    energy, prec, mean = two_blocks()
    eta = (
        0.14 / torch.linalg.eigvalsh(prec)[-1].item()
    )  # time step of the other chapters, half a squared thesis step
    start = torch.randn(4_000, 4, generator=gen())
    z = torch.cat(
        kernel(energy, (start[:, :2], start[:, 2:]), ula(eta), 250, generator=gen(2)), 1
    )
    cov = torch.linalg.inv(prec)
    within(z.mean(0), mean, (cov.diagonal().max() / 4_000) ** 0.5)
    assert (
        (z.T.cov() - cov).norm() / cov.norm() < 0.09
    )  # 2 to 3 per cent of the step, the rest is the noise of 4,000 chains
    if kernel is langevin:
        near = torch.linalg.inv(prec @ (torch.eye(4) - eta / 2 * prec))
        assert (z.T.cov() - near).norm() / near.norm() < 0.07


@pytest.mark.parametrize('kernel', [langevin, alternate])
def test_noise_off_is_the_posterior_mean(kernel):
    energy, prec, mean = two_blocks()
    eta = 0.5 / torch.linalg.eigvalsh(prec)[-1].item()
    z = torch.cat(
        kernel(energy, (torch.randn(3, 2), torch.randn(3, 2)), Rates(eta, 0.0), 600), 1
    )
    assert torch.allclose(z, mean.expand(3, 4), atol=1e-4)


def test_batch_size_never_changes_a_chain():
    torch.manual_seed(0)
    nets = Linear(torch.randn(4, 2), torch.ones(2), post_steps=0)
    x = torch.randn(6, 4)
    z = torch.randn(6, 2)

    def chains(n):
        energy = f.posterior_energy(nets, x[:n], nets.cfg.sigma)
        return langevin(energy, z[:n], Rates(0.05, 0.0), 20)

    with frozen(nets):
        assert torch.allclose(chains(6)[:2], chains(2), atol=1e-6)
    whole = f.draw_posterior(nets, x, generator=gen())
    assert torch.equal(whole, torch.randn(6, 2, generator=gen()))


# --- densities in the plane

CENTRES = torch.tensor([[-2.0, 0.0], [1.2, 1.8], [1.2, -1.8]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.7


def mixture(n, g):
    return CENTRES[
        torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    ] + STD * torch.randn(n, 2, generator=g)


def log_mixture(x):
    return torch.logsumexp(
        WEIGHTS.log() - torch.cdist(x, CENTRES).square() / (2 * STD**2), 1
    ) - math.log(2 * math.pi * STD**2)


def learned_kl(start, n_steps, n_iters, delta):
    torch.manual_seed(0)
    g = gen()
    net = f.PlaneEnergy(32, 3.0, unit=2.0)
    opt = torch.optim.Adam(net.parameters(), 5e-3, betas=(0.8, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda i: min(1.0, 2.02 - 2 * i / n_iters)
    )

    def fresh(n):
        return 3 * torch.randn(n, 2, generator=g)

    f.learn(
        net,
        lambda n: mixture(n, g),
        opt,
        ula(delta**2 / 2),
        n_iters=n_iters,
        n_steps=n_steps,
        start=start,
        batch=300,
        fresh=fresh,
        buffer=fresh(2_000) if start == 'persistent' else None,
        restart=0.01,
        generator=g,
        on_iter=lambda *_: fall.step(),
    )
    log_z, _ = grid_log_z(net, 9.0, 150)
    x = mixture(20_000, gen(7))
    with torch.no_grad():
        return (log_mixture(x) + net(x) + log_z).mean().item()


def test_density_in_the_plane():
    long = learned_kl('persistent', 20, 400, 0.35)
    short = learned_kl('noise', 20, 100, 0.1)
    assert -0.01 < long < 0.05, long
    assert short > 0.2, short


# --- the system


def test_a_preset_trains_and_comes_back(tmp_path):
    cfg = replace(
        f.PRESETS['digits'],
        n_iters=6,
        width=16,
        prior_width=8,
        prior_steps=3,
        post_steps=3,
        log_every=2,
    )
    runs = [
        train(
            f.SYSTEM,
            cfg,
            open_run(
                'foundations',
                'digits',
                cfg,
                f.PRESETS['digits'],
                out=tmp_path / k,
                device='cpu',
            ),
            progress=False,
        )
        for k in 'ab'
    ]
    for a, b in zip(*(nets.state_dict().values() for nets in runs)):
        assert torch.equal(a, b)
    back = f.Nets.from_pretrained(tmp_path / 'a' / 'weights').eval()
    assert torch.equal(
        f.sample(back, 5, generator=gen()),
        f.sample(runs[0], 5, generator=gen()),
    )


@pytest.mark.parametrize('preset', f.PRESETS)
def test_presets_build(preset):
    cfg = f.PRESETS[preset]
    x = f.sample(f.build(cfg), 2, n_steps=1, generator=gen())
    assert x.shape == (2, *cfg.shape)


def test_claims_name_presets_that_exist():
    for claim in read_claims():
        if claim.system == 'foundations':
            assert all(arm.preset in f.PRESETS for arm in claim.arms.values())
