"""Checks of LIEBM that take too long for its notebooks.

An iteration written out in plain PyTorch beside the chapter's, trainings through the loop
of the book, the presets at full size, and the chapter run as a user runs it.
"""

import contextlib
import copy
import io
import itertools
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import yaml
from chapters import ROOT, claims_can_be_measured, ends_without_data, trains_in_full

from ebmbook import liebm
from ebmbook.data import load, ood_sets
from ebmbook.learn.blocks import count
from ebmbook.learn.contract import Context, Diverged
from ebmbook.learn.limits import kinds
from ebmbook.learn.log import read_log
from ebmbook.learn.loop import make_accelerator, train
from ebmbook.learn.runs import load_checkpoint, open_run, ship
from ebmbook.learn.settings import choose
from ebmbook.learn.step import optimiser_step
from ebmbook.liebm import PRESETS, SIZES
from ebmbook.liebm.views import Views, augment
from ebmbook.measure.restoration import operator
from ebmbook.shell.cost import seconds_per_iteration

TINY = replace(
    PRESETS['digits'],
    batch=8,
    n_steps=2,
    n_enc=4,
    n_iters=4,
    n_infer=4,
    save_every=2,
    log_every=1,
)
SHORT = replace(TINY, n_enc=0, n_infer=0)
NARROW = dict(
    gen=(8, 8), blocks=(8, 16), convs=((3, 1, 8), (4, 2, 8)), features=16, hidden=8
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    "The digits preset with few channels."
    monkeypatch.setitem(SIZES, 'digits', SIZES['digits'] | NARROW)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def ctx(seed=0):
    return Context(step=0, frac=0.0, generator=gen(seed))


def run_of(cfg, folder):
    return open_run('liebm', 'digits', cfg, out=folder, device='cpu')


def trained(cfg, folder, **options):
    return train(liebm.SYSTEM, cfg, run_of(cfg, folder), progress=False, **options)


def built_for(cfg):
    "Fresh networks of the method that the settings name."
    return liebm.SYSTEM.of(cfg).build(cfg)


def built(cfg, seed=0):
    "Networks whose encoder's batch norms have seen images, so that modes and ranges matter."
    torch.manual_seed(seed)
    nets = built_for(cfg)
    if nets.h is not None:
        x = load('digits').tensor(64)
        with torch.no_grad():
            for contrast in (0.3, 0.5, 0.8):
                nets.h.encoder.train()(x * contrast)
    return nets


def under(nets, cfg):
    "The same networks under other settings."
    other = copy.copy(nets)
    other.cfg = cfg
    return other


# --- the paper's presets

SQUARE = dict(lr=1e-4, beta2=0.999, lr_gen=2e-4, lr_inf=2e-4, step=25.0, top='square')
SQUARE |= dict(w_match=1.0, w_data=0.1, rho=1.0, gamma_ood=0.1, batch=256, method='em')
LINEAR = dict(lr=1e-4, beta2=0.9, lr_gen=3e-4, lr_inf=1e-4, step=0.1, top='linear')
LINEAR |= dict(w_match=70.0, w_data=1.0, method='erm', unit=False)
TABLE = {  # Table 12, with the iterations that its epochs come to
    'cifar10': SQUARE | dict(unit=True, n_iters=97_500),
    'imagenet32': SQUARE | dict(unit=False, n_iters=500_400),
    'celeba64': LINEAR | dict(rho=1.0, gamma_ood=0.1, batch=256, n_iters=190_500),
    'celebahq256': LINEAR | dict(rho=50.0, gamma_ood=1.0, batch=128, n_iters=63_000),
}
ALL = dict(ema=0.9999, gamma=0.01, n_steps=15)
# what the paper leaves open
OURS = dict(noise=1e-3, tau2=0.5, p_aug=0.1, clip=0.0, reg=0.0, posterior='cosine')
OURS |= dict(view='augment', encoder='frozen', literal=False, norm=True, bias=False)
# parameters of generator, energy, inference model, and of the encoder without its head
COUNTS = {
    'cifar10': (4_276_739, 4_923_968, 15_208_064, 11_168_832),
    'imagenet32': (16_024_579, 17_645_632, 15_208_064, 11_168_832),
    'celeba64': (12_220_675, 20_717_056, 15_210_752, 11_168_832),
    'celebahq256': (34_276_995, 40_668_736, 8_064_512, 11_176_512),
}


@pytest.mark.parametrize('name', TABLE)
def test_presets_of_the_paper(name):
    cfg, want = PRESETS[name], TABLE[name] | ALL | OURS
    assert {field: getattr(cfg, field) for field in want} == want
    assert (cfg.clamp, cfg.mirror) == (name == 'cifar10', name.startswith('celeba'))
    other = PRESETS[name + ('-em' if cfg.method == 'erm' else '-erm')]
    assert replace(other, method=cfg.method) == cfg != other


@pytest.mark.parametrize('name', TABLE)
def test_networks_of_the_paper(name):
    cfg = replace(PRESETS[name], norm=False)  # the norm adds no parameters, and takes long
    with torch.device('meta'):
        nets = liebm.ERMNets(replace(cfg, method='erm'))
        assert liebm.Nets(replace(cfg, method='em')).q is None
    parts = (nets.generator, nets.energy, nets.q, nets.h.encoder.backbone)
    assert tuple(map(count, parts)) == COUNTS[name]
    assert nets.generator.unit == cfg.unit
    assert nets.generator.latent == (256 if name == 'celebahq256' else 128)


def test_lengths_of_the_stages():
    def lengths(**change):
        cfg = replace(TINY, n_iters=6, **change)
        return [stage.n_iters(cfg) for stage in liebm.SYSTEM.of(cfg).stages]

    assert lengths() == [4, 0, 6, 4] and lengths(method='erm') == [4, 0, 6, 0]
    assert lengths(n_infer=0, n_post=5) == [4, 5, 6, 0]
    for encoder in ('joint', 'none'):
        assert lengths(encoder=encoder, n_infer=0) == [0, 0, 6, 0]
    assert lengths(n_enc=-1)[0] == liebm.selfsup.PRESETS['digits'].n_iters
    for method in ('em', 'ejm', 'erm'):
        stages = liebm.SYSTEM.of(replace(TINY, method=method)).stages
        assert [stage.batch(TINY) for stage in stages] == [256, 8, 8, 8]
        assert [stage.ema(TINY) for stage in stages] == [0.0, 0.99, 0.99, 0.99]
        # no two stages share their draws
        draws = {
            i if stage.draws is None else stage.draws for i, stage in enumerate(stages)
        }
        assert len(draws) == len(stages)


def test_rates_of_the_paper():
    nets = built(replace(SHORT, method='erm'))
    for name, beta2, rate in (('cifar10', 0.999, 2e-4), ('celebahq256', 0.9, 1e-4)):
        cfg = replace(PRESETS[name], method='erm', net='digits')
        groups = liebm.erm_optimisers(under(nets, cfg))
        sets = [
            (name, adam['lr'], adam['betas'], adam['weight_decay'])
            for name, group in groups.items()
            for adam in group.optimiser.param_groups
        ]
        assert sets == [
            ('generator', cfg.lr_gen, (0.0, 0.9), 0),
            ('generator', rate, (0.0, 0.9), 0),
            ('energy', 1e-4, (0.0, beta2), 0),
        ]
        for group in groups.values():
            assert group.schedule(10**6) == 1 and group.clip is None
    # trained along, the encoder's rate neither rises nor falls
    along = liebm.optimisers(built(replace(SHORT, encoder='joint')))['encoder']
    assert [along.schedule(step) for step in (0, 10**6)] == [1, 1]


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_can_be_chosen_checked_and_sent(name):
    preset = PRESETS[name]
    cfg = choose(PRESETS, liebm.DEFAULT_PRESET, preset.data, name, 'gamma: 0.5')[1]
    assert liebm.check_config(cfg) == replace(preset, gamma=0.5)
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    enc = liebm.encoder_config(cfg)
    assert enc.n_iters >= 0 and enc.shape == cfg.shape


def test_every_experiment_names_a_preset():
    files = sorted((ROOT / 'experiments').glob('liebm_*.yaml'))
    names = {path.stem.removeprefix('liebm_') for path in files}
    ours = {name for name in PRESETS if name.endswith('-claim')} | {'small'}
    assert names == PRESETS.keys() - ours
    for path in files:
        given = yaml.safe_load(path.read_text())
        asked = given['dataset'], given['preset'], given['over']
        liebm.check_config(choose(PRESETS, liebm.DEFAULT_PRESET, *asked)[1])


def test_every_claim_names_presets_and_metrics_that_exist():
    quick = dict(
        encoder=dict(n=20, n_epochs=1),
        ood=dict(n=20),
        restore=dict(n=4, n_steps=1, n_steps_y=1),
    )
    claims_can_be_measured(liebm, dict(n_steps=1), n=300, quick=quick)


# --- one iteration, written out; the paper's sign, where a likely image has a high value

VIEWS = Views(scale=(0.5, 1.0), flip=False)  # of the digits' encoder


def features_of(encoder, x):
    "What the backbone makes of images in [-1, 1], in the mode that the encoder is in."
    return encoder.backbone(((x + 1) / 2 - encoder.mean) / encoder.std)


def place(nets, x):
    "h, in evaluation mode; x in [-1, 1]."
    encoder = copy.deepcopy(nets.h.encoder).eval().requires_grad_(False)
    z = encoder.last(encoder.head(features_of(encoder, x)))
    return z / z.norm(dim=1, keepdim=True)


def cosine(first, second):
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def likely(nets, u):
    "F(f(x)) and g(f(x)), modes as they are."
    f = nets.energy.f(u)
    value = -f.square().sum(1) / 2 if nets.energy.top is None else nets.energy.top(f)[:, 0]
    return value, nets.energy.g(f)


def wide(u, cfg):
    "To [-1, 1]."
    return 2 * u - 1 if cfg.unit else u


def ascend(value, u, cfg, generator, steps=None, clamp=None):
    "A chain that goes uphill."
    for _ in range(cfg.n_steps if steps is None else steps):
        u = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(u).sum(), u)
        noise = cfg.noise * torch.randn(u.shape, generator=generator)
        u = (u + cfg.step / 2 * slope).detach() + noise
        if cfg.clamp if clamp is None else clamp:
            u = u.clamp(0 if cfg.unit else -1, 1)
    return u.detach()


def viewed(u, cfg, generator):
    "v ~ V."
    x = wide(u, cfg)
    if cfg.view == 'augment':
        x = augment(x, VIEWS, generator)
    else:
        noise = torch.rand(x.numel(), generator=generator).view_as(x)
        x = 2 * (255 / 256 * (x + 1) / 2 + noise / 256) - 1
    return (x + 1) / 2 if cfg.unit else x


def generator_by_hand(nets, u, z, m, cfg, generator):
    made = nets.generator(m)
    nets.energy.eval()

    def marginal(u):
        return likely(nets, u)[0]

    def joint(u):
        value, head = likely(nets, u)
        return value + cfg.gamma * cosine(head, place(nets, wide(u, cfg)))

    aim = ascend(joint if cfg.method == 'ejm' else marginal, made, cfg, generator)
    match = ((made - aim) ** 2).sum((1, 2, 3)).mean() / (2 * cfg.tau2)
    if cfg.method != 'erm':
        return match
    mu, log_var = nets.q(u)
    draw = torch.randn(mu.shape, generator=generator)
    again = nets.generator(mu + torch.exp(log_var / 2) * draw)
    kl = (mu**2 + log_var.exp() - 1 - log_var).sum(1) / 2
    near = ((again - u) ** 2).sum((1, 2, 3)) / (2 * cfg.tau2)
    elbo = -near + cfg.rho * cosine(z, place(nets, wide(again, cfg))) - kl
    return cfg.w_match * match - cfg.w_data * elbo.mean()


def energy_by_hand(nets, u, z, start, cfg, generator):
    "Loss, and the ends of the chains."
    if cfg.p_aug:
        pick = torch.rand(len(u), generator=generator) < cfg.p_aug
        start = torch.where(pick[:, None, None, None], viewed(start, cfg, generator), start)
    fake = ascend(lambda u: likely(nets, u)[0], start, cfg, generator)
    nets.energy.train()
    n = len(u)
    value, head = likely(nets, torch.cat([u, fake]))
    squares = (value[:n] ** 2).mean() + (value[n:] ** 2).mean()
    data = (value[:n] + cfg.gamma * cosine(head[:n], z)).mean()
    return -data + value[n:].mean() + cfg.reg * squares, fake


def encoder_by_hand(nets, x, fake, generator):
    "Recognise the other view among all but oneself."
    n, encoder = len(x), nets.h.encoder.train()
    views = [augment(each, VIEWS, generator) for each in (x, x, fake)]
    features = torch.cat([features_of(encoder, view) for view in views])
    z = encoder.last(encoder.head(features))
    z = z / z.norm(dim=1, keepdim=True)
    alike = torch.exp(z[: 2 * n] @ z.T / 0.5) * (1 - torch.eye(3 * n)[: 2 * n])
    rows = torch.arange(2 * n)
    return -torch.log(alike[rows, rows.roll(n)] / alike.sum(1)).mean()


def iteration_by_hand(nets, x, cfg, generator):
    "Yields (group, loss), like `losses`."
    if cfg.mirror:
        turned = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(turned[:, None, None, None], x.flip(-1), x)
    u = (x + 1) / 2 if cfg.unit else x
    z = place(nets, wide(viewed(u, cfg, generator), cfg)).detach()
    m = torch.randn(len(x), nets.generator.latent, generator=generator)
    nets.train()
    yield 'generator', generator_by_hand(nets, u, z, m, cfg, generator)
    with torch.no_grad():
        start = nets.generator(m)
    loss, fake = energy_by_hand(nets, u, z, start, cfg, generator)
    yield 'energy', loss
    if cfg.encoder == 'joint':
        yield 'encoder', encoder_by_hand(nets, x, wide(fake, cfg), generator)


STRONG = replace(
    SHORT, gamma=0.7, rho=2.0, tau2=0.2, w_match=3.0, w_data=0.7, p_aug=0.5, bias=True
)
ITERATIONS = [
    {},
    dict(p_aug=0.0),  # the chains are those from the generator's images, under one seed
    dict(top='square', unit=True, clamp=True, noise=0.2),
    dict(method='ejm', step=40.0),
    dict(method='ejm', unit=True, step=40.0),
    dict(method='erm'),
    dict(method='erm', unit=True, view='dequantise', rho=50.0, tau2=5.0),
    dict(encoder='joint', unit=True),
    dict(encoder='joint', mirror=True),
    dict(clamp=True, noise=0.5, p_aug=1.0),
    dict(view='dequantise', p_aug=1.0, reg=2.0),
]


def slopes(group, loss, groups):
    "The gradient of a loss, after which its group has taken a step."
    loss.backward()
    weights = [w for one in group.optimiser.param_groups for w in one['params']]
    grads = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
    group.optimiser.step()
    for other in groups.values():
        other.optimiser.zero_grad()
    return grads


@pytest.mark.parametrize('change', ITERATIONS, ids=str)
def test_an_iteration_is_the_one_written_out(change):
    cfg = replace(STRONG, **change)
    nets, x = built(cfg), load('digits').tensor(8)
    hand, generator, here = copy.deepcopy(nets), gen(), ctx()
    joint = liebm.SYSTEM.of(cfg).stages[2]
    groups, by_hand = joint.optimisers(nets), joint.optimisers(hand)
    # the second iteration sees what the first has changed; with 'joint', Adam's first step
    # turns the noise of biases without effect into steps, and h notices
    for i in range(1 if cfg.encoder == 'joint' else 2):
        steps = joint.losses(nets, dict(x=x), here)
        wanted = iteration_by_hand(hand, x, cfg, generator)
        for (name, loss, _), (other, value) in itertools.zip_longest(steps, wanted):
            assert name == other
            # a constant of the book's loss, which has the whole density
            shift = liebm.log_z(16, cfg.gamma) if name == 'energy' else 0.0
            tolerance = 1e-3 if i else 1e-5
            want = pytest.approx(value.item(), rel=tolerance, abs=tolerance)
            assert (loss - shift).item() == want, (i, name)
            mine = slopes(groups[name], loss, groups)
            theirs = slopes(by_hand[name], value, by_hand)
            assert (mine - theirs).norm() < (0.1 if i else 1e-3) * theirs.norm(), (i, name)
    # as many draws, in the same order
    assert torch.equal(here.generator.get_state(), generator.get_state())


def test_inference_model_of_a_finished_generator_written_out():
    "Appendix A.6."
    cfg = replace(STRONG, n_infer=2, unit=True)
    nets, x, generator = built(cfg), load('digits').tensor(8), gen()
    before = copy.deepcopy(nets.state_dict())
    for name, loss, _ in liebm.inference_losses(nets, dict(x=x), ctx()):
        u = (x + 1) / 2
        z = place(nets, wide(viewed(u, cfg, generator), cfg))
        mu, log_var = nets.q(u)
        draw = torch.randn(mu.shape, generator=generator)
        still = copy.deepcopy(nets.generator).eval()
        made = still(mu + (log_var / 2).exp() * draw)
        kl = (mu**2 + log_var.exp() - 1 - log_var).sum(1) / 2
        want = (kl - cfg.rho * cosine(z, place(nets, 2 * made - 1))).mean()
        assert name == 'inference' and loss.item() == pytest.approx(want.item(), rel=1e-4)
        loss.backward()
    reached = {
        name.split('.')[0] for name, w in nets.named_parameters() if w.grad is not None
    }
    assert reached == {'q'}
    assert all(weight.requires_grad for weight in nets.generator.parameters())
    assert same(dict(nets.state_dict()), dict(before))


@pytest.mark.parametrize('top', ['linear', 'square'])
def test_samples_and_scores_written_out(top):
    "In [0, 1], where a forgotten conversion shows."
    cfg = replace(STRONG, unit=True, clamp=True, top=top, noise=0.1)
    nets, generator = built(cfg).eval(), gen()
    with torch.no_grad():
        start = nets.generator(torch.randn(6, 16, generator=generator))
    want = 2 * ascend(lambda u: likely(nets, u)[0], start, cfg, generator, steps=5) - 1
    x = load('digits', split='test').tensor(10)
    with torch.no_grad():
        value, head = likely(nets, (x + 1) / 2)
    # whatever mode they are in, networks are used as they stand
    before = copy.deepcopy(nets.train().state_dict())
    samples = liebm.sample(nets, 6, n_steps=5, generator=gen())
    assert torch.allclose(samples, want, atol=1e-4)
    assert torch.allclose(-liebm.energy(nets, x), value, atol=1e-5)
    assert torch.allclose(-liebm.anomaly(nets, x, alone=True), value, atol=1e-5)
    for gamma in (None, 0.0, 3.0):
        weight = cfg.gamma_ood if gamma is None else gamma
        want = value + weight * cosine(head, place(nets, x))
        assert torch.allclose(-liebm.anomaly(nets, x, gamma=gamma), want, atol=1e-5)
    assert all(net.training for net in nets.modules())
    assert same(dict(nets.state_dict()), dict(before))


def test_area_of_the_chapters_scores():
    "Unseen test images against out-of-distribution ones, ties count half."
    cfg = replace(STRONG, unit=True)
    nets, inside = built(cfg).eval(), load('digits', split='test').tensor(40)
    scores = liebm.evaluate(nets, task='ood', n=40)
    for name, x in ood_sets('digits', 40, gen()).items():
        own, other = (liebm.anomaly(nets, images)[:, None] for images in (inside, x))
        area = ((own < other.T).double() + 0.5 * (own == other.T)).mean().item()
        assert scores['auroc_' + name] == (pytest.approx(area, abs=1e-9), 40, '')


def test_what_is_measured():
    "The generator alone where that is asked for; the autoencoder on the scale from 0 to 1."
    cfg = replace(STRONG, unit=True, method='erm', noise=0.3)
    nets, x = built(cfg).eval(), load('digits', split='test').tensor(20)
    alone = liebm.evaluate(nets, n=200, n_steps=0)
    assert alone == liebm.evaluate(under(nets, replace(cfg, n_steps=0)), n=200)
    assert alone['fid'][0] != liebm.evaluate(nets, n=200)['fid'][0]
    u = (x + 1) / 2
    with torch.no_grad():
        want = (nets.generator(nets.q(u)[0]) - u).square().mean().item()
    error = liebm.evaluate(nets, task='rebuild', n=20)['mse'][0]
    assert error == pytest.approx(want, rel=1e-4)


def test_sampling_a_class_written_out():
    cfg = replace(STRONG, unit=True, n_infer=1, noise=0.1)
    nets, generator = built(cfg).eval(), gen()
    x = load('digits').tensor(6)
    code, start = place(nets, x[:3]), x[3:]
    u = (start + 1) / 2
    for _ in range(2):
        with torch.no_grad():
            mu, log_var = nets.q(u)
            draw = torch.randn(mu.shape, generator=generator)
            base = nets.generator(mu + (log_var / 2).exp() * draw)

        def value(Y):
            marginal, head = likely(nets, base + Y)
            return marginal + 4 * cosine(head, code)

        # Y starts anew in each turn
        u = base + ascend(value, torch.zeros_like(base), cfg, generator, clamp=False)
    options = dict(gamma=4.0, rounds=2, generator=gen())
    made = liebm.conditional(nets.train(), code, start, **options)
    assert torch.allclose(made, (2 * u - 1).clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize('unit', [False, True])
def test_restoration_written_out(unit):
    cfg = replace(STRONG, unit=unit, method='erm')
    nets, generator, sigma = built(cfg).eval(), gen(), 0.2
    op = operator('sr2', (1, 8, 8))
    y = op.A(load('digits', split='test').tensor(4))
    known = op.A_dagger(y)

    def value(u):
        marginal, head = likely(nets, u)
        x = wide(u, cfg)
        misfit = ((known - op.A_dagger(op.A(x))) ** 2).sum((1, 2, 3)) / (2 * sigma**2)
        return marginal + cfg.gamma * cosine(head, place(nets, x)) - misfit

    def value_of_m(m):
        return value(nets.generator(m)) - (m**2).sum(1) / 2

    options = dict(steps=3, clamp=False)
    with torch.no_grad():
        first = nets.q((known + 1) / 2 if unit else known)[0]
    slow = replace(cfg, step=0.01, noise=0.1)
    m = ascend(value_of_m, first, slow, generator, **options)
    with torch.no_grad():
        base = nets.generator(m)
    half = 0.5 if unit else 1.0  # the step is given in units of images in [-1, 1]
    slow = replace(cfg, step=0.02 * half**2, noise=0.05 * half)
    zero = torch.zeros_like(base)
    Y = ascend(lambda Y: value(base + Y), zero, slow, generator, **options)
    options = dict(sigma=sigma, eta=0.01, eta_y=0.02, noise_y=0.05, n_steps=3, n_steps_y=3)
    got = liebm.restore(nets.train(), op, y, **options, generator=gen())
    with torch.no_grad():
        want = (nets.eval().generator(first), base, base + Y)
    for mine, u in zip(got, want, strict=True):
        assert torch.allclose(mine, wide(u, cfg).clamp(-1, 1), atol=1e-4)


def test_classes_have_their_own_codes(monkeypatch):
    "Labels and images stay together, in either range."
    cfg = replace(STRONG, unit=True)
    nets, data = built(cfg).eval(), load('digits')
    codes, means = liebm.class_codes(nets, n_views=30, n=50, generator=gen())
    x = [data.tensor()[data.y == label][:50] for label in range(10)]
    for label in range(10):
        z = place(nets, x[label]).mean(0)
        assert torch.allclose(codes[label], z / z.norm(), atol=1e-4)
        far = torch.stack([(means[label] - images.mean(0)).norm() for images in x])
        assert far.argmin() == label
    lacking = SimpleNamespace(y=torch.where(data.y == 3, 4, data.y), batch=data.batch)
    monkeypatch.setattr('ebmbook.liebm.uses.load', lambda *_, **__: lacking)
    with pytest.raises(ValueError, match="class 3 of 'digits' has no training image"):
        liebm.class_codes(nets, n_views=1, n=5)


@pytest.mark.parametrize('enc', ['digits', 'digits-byol', 'digits-wmse'])
def test_the_cost_of_every_encoder_can_be_measured(enc):
    "Losses that compare images need more than one."
    cfg = replace(SHORT, enc=enc, n_enc=5)
    took, n = seconds_per_iteration(liebm.STAGES[0], liebm.build(cfg), 'cpu', budget=0.01)
    least = liebm.encoder_config(cfg).w if enc.endswith('wmse') else 2
    assert took > 0 and n >= least


# --- training


def same(first, second):
    """Two checkpoints, to the last bit.

    Python's own generator serves libraries when they are first imported, and no part of a
    training.
    """
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = [key for key in first if key not in ('seconds', 'python')]
        return first.keys() == second.keys() and all(
            same(first[k], second[k]) for k in keys
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def same_checkpoints(first, second):
    return same(load_checkpoint(first), load_checkpoint(second))


class Enough(Exception):
    pass


def stopped(cfg, folder, n):
    "A training that ends by accident after n steps."
    left = [n]

    def stop(step, nets):
        left[0] -= 1
        if not left[0]:
            raise Enough

    with pytest.raises(Enough):
        trained(cfg, folder, on_step=stop)


# steps after which a training is stopped, and the stage and step of its checkpoint
STOPS = [
    ({}, {3: (0, 2), 5: (0, 4), 7: (2, 2), 9: (2, 4), 11: (3, 2)}),
    (dict(method='erm', n_enc=0), {3: (2, 2)}),
    (dict(method='ejm', n_enc=0, n_infer=0), {3: (2, 2)}),
    (dict(encoder='joint', n_enc=0, n_infer=0), {3: (2, 2)}),
    (dict(encoder='none', n_infer=0), {3: (2, 2)}),
    (dict(n_enc=0, n_post=4, n_infer=0), {3: (1, 2), 5: (1, 4), 7: (2, 2)}),
]


@pytest.mark.parametrize('change,stops', STOPS, ids=str)
def test_training_continues_to_the_last_bit(change, stops, tmp_path):
    "In every stage and between two."
    cfg = replace(TINY, **change)
    whole = trained(cfg, tmp_path / 'whole').state_dict()
    again = trained(cfg, tmp_path / 'again').state_dict()  # two runs of one seed
    assert same(whole, again)
    for n, (stage, step) in stops.items():
        folder = tmp_path / str(n)
        stopped(cfg, folder, n)
        left = load_checkpoint(folder)
        assert (left['stage'], left['step']) == (stage, step)
        assert (left['ema'] is None) == (stage == 0)  # no average of the encoder
        assert same(whole, trained(cfg, folder).state_dict())
        assert same_checkpoints(tmp_path / 'whole', folder)


def test_weights_kept_over_a_training(tmp_path):
    """Finished as at the end of a stage, also by a run that went on.

    The training does not notice.
    """
    cfg = replace(TINY, n_infer=0)
    end = trained(cfg, tmp_path / 'plain').state_dict()
    keeps = trained(cfg, tmp_path / 'keeps', keep_every=2).state_dict()
    assert same(keeps, end) and same_checkpoints(tmp_path / 'plain', tmp_path / 'keeps')
    stopped(cfg, tmp_path / 'goes on', 5)
    trained(cfg, tmp_path / 'goes on', keep_every=2)

    def read(run, step):
        folder = tmp_path / run / f'weights-{step:09d}'
        return liebm.Nets.from_pretrained(folder).state_dict()

    def settled(weights):
        # the stage after the last one, of no steps, goes on with the power iterations
        return {k: value for k, value in weights.items() if not k.endswith(('_u', '_v'))}

    kept = [path.name for path in sorted((tmp_path / 'keeps').glob('weights-*'))]
    assert kept == [f'weights-{step:09d}' for step in (2, 4, 6, 8)]
    assert same(settled(read('keeps', 8)), settled(end))
    assert same(read('goes on', 6), read('keeps', 6))
    assert not same(read('keeps', 6), end)


def test_a_posterior_that_learns_alone(tmp_path):
    "Features and head move, nothing else does."
    cfg, seen = replace(TINY, n_enc=0, n_post=4, n_infer=0), []
    trained(cfg, tmp_path, on_step=lambda step, nets: seen.append(weights_of(nets)))
    assert len(seen) == 8
    moved = {
        name for name, value in seen[3].items() if not torch.equal(value, seen[0][name])
    }
    moved = {
        name.removeprefix('energy.') for name in moved if name[-2:] not in ('_u', '_v')
    }
    assert {name.split('.')[0] for name in moved} == {'f', 'g'}
    steps, match = read_log(SimpleNamespace(folder=tmp_path), 'match')
    assert steps == [*range(1, 9)] and all(-1 <= value <= 1 for value in match)


def weights_of(nets):
    return copy.deepcopy(nets.state_dict())


def test_a_posterior_sees_mirrored_images_where_the_preset_mirrors():
    nets, batch = built(replace(SHORT, mirror=True)), dict(x=load('digits').tensor(64))

    def first(cfg):
        other = under(nets, replace(cfg, view='dequantise'))
        return next(liebm.posterior_losses(other, batch, ctx()))[1].item()

    assert first(SHORT) != first(replace(SHORT, mirror=True))


@pytest.fixture
def half_averaged(tmp_path):
    "Settings, networks and the weights after each step of a training."
    cfg, seen = replace(TINY, n_infer=0, ema=0.5), []
    nets = trained(cfg, tmp_path, on_step=lambda step, nets: seen.append(weights_of(nets)))
    return cfg, nets, seen


def test_what_a_training_leaves(half_averaged, tmp_path):
    "Averaged weights, averages of the batch norms from samples alone, an encoder as it was."
    _, nets, seen = half_averaged
    for name, value in nets.h.state_dict().items():  # as the last step of its stage left it
        assert torch.equal(value, seen[3]['h.' + name])
    mean = load_checkpoint(tmp_path)['ema']
    mean = {name.removeprefix('module.'): value for name, value in mean.items()}
    for name, weight in nets.named_parameters():
        assert torch.equal(weight, mean[name])
    start = 'generator.start.0.weight'
    assert not torch.equal(nets.state_dict()[start], seen[7][start])
    norms = [m for m in nets.generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:  # 4,096 samples in parts of 128
        assert norm.num_batches_tracked == 32 and norm.momentum == 0.1
    again = copy.deepcopy(nets)
    liebm.settle(again, gen())
    for name, value in again.generator.named_buffers():
        own = nets.generator.get_buffer(name)
        assert torch.allclose(own, value, rtol=1e-4, atol=1e-5), name


def test_the_files_of_a_training(half_averaged, tmp_path):
    "They hold it all, with settled norms."
    cfg, nets, _ = half_averaged
    with contextlib.redirect_stdout(io.StringIO()):
        back = liebm.Nets.from_pretrained(tmp_path / 'weights')
        half = liebm.Nets.from_pretrained(ship(nets, tmp_path / 'book'))
    assert back.cfg == cfg and same(back.state_dict(), nets.state_dict())
    for read in (nets, back, half):
        for layer in read.energy.modules():
            if hasattr(layer, 'parametrizations'):
                top = torch.linalg.matrix_norm(layer.eval().weight.flatten(1), 2)
                assert top.item() == pytest.approx(1, abs=0.02)
    shipped = liebm.sample(half.eval(), 5, generator=gen())
    assert torch.allclose(shipped, liebm.sample(nets, 5, generator=gen()), atol=0.05)


def steps(nets, n=1, groups=None, seed=0):
    "Logs of steps through the loop's own step."
    context, accelerator = ctx(seed), make_accelerator(nets.cfg, 'cpu')
    joint = liebm.SYSTEM.of(nets.cfg).stages[2]
    groups = groups or joint.optimisers(nets)
    for group in groups.values():
        for adam in group.optimiser.param_groups:
            adam.setdefault('initial_lr', adam['lr'])
    logs = []
    for _ in range(n):
        batch = dict(x=load('digits').tensor(nets.cfg.batch))
        parts = ([batch], [context], groups, accelerator)
        logs.append(optimiser_step(joint, nets, *parts))
    return logs


CHOICES = [{}, dict(method='ejm'), dict(method='erm'), dict(encoder='joint')]


@pytest.mark.parametrize('change', CHOICES, ids=str)
def test_a_step_moves_its_own_group(change):
    cfg = replace(SHORT, **change)
    nets, moved = built(cfg), []
    groups = liebm.SYSTEM.of(cfg).stages[2].optimisers(nets)
    own = dict(generator={'generator'}, energy={'energy'}, encoder={'h'})
    if cfg.method == 'erm':
        own['generator'] = {'generator', 'q'}
    before_all = weights_of(nets.h)

    def parts(condition):
        named = nets.named_parameters()
        return {name.split('.')[0] for name, weight in named if condition(name, weight)}

    def watched(group, step):
        def watch(*args, **options):
            assert parts(lambda name, weight: weight.grad is not None) == own[group]
            before = {name: w.detach().clone() for name, w in nets.named_parameters()}
            step(*args, **options)
            changed = parts(lambda name, weight: not torch.equal(weight, before[name]))
            assert changed == own[group]
            moved.append(group)

        return watch

    for name, group in groups.items():
        group.optimiser.step = watched(name, group.optimiser.step)
    steps(nets, 2, groups)
    assert moved == 2 * list(groups)
    assert all(weight.grad is None for weight in nets.parameters())
    if cfg.encoder == 'frozen':  # not even an average
        assert same(dict(nets.h.state_dict()), dict(before_all))


def test_without_concentration_it_is_a_plain_energy(monkeypatch, tmp_path):
    "A whole training; views draw numbers, so there are none."
    monkeypatch.setattr('ebmbook.liebm.method.view', lambda u, *_: u)
    silent = replace(SHORT, gamma=0.0, p_aug=0.0)
    plain = trained(replace(silent, encoder='none'), tmp_path / 'plain').state_dict()
    for name, value in trained(silent, tmp_path / 'silent').state_dict().items():
        if not name.startswith(('h.', 'energy.g.')):
            assert torch.equal(value, plain[name]), name


def test_every_choice_trains():
    "And those that contradict each other are refused."
    names = 'method', 'encoder', 'posterior', 'view', 'top'
    words = [get_args(kinds(liebm.Config)[name]) for name in names]
    choices, refused = itertools.product(*words, (False, True)), set()
    for n, (*chosen, bias) in enumerate(choices):
        change = dict(zip(names, chosen))
        method, encoder, posterior, *_ = chosen
        cfg = replace(SHORT, bias=bias, unit=n % 2 == 0, batch=4, **change)
        try:
            liebm.SYSTEM.of(cfg).check(cfg)
        except ValueError:
            refused.add((method, encoder, posterior))
            continue
        if n % 5 and bias:
            continue  # biases and views have little to do with the rest
        torch.manual_seed(n)
        logs = steps(built_for(cfg), 2)[-1]
        assert logs['ok'] and all(math.isfinite(value) for value in logs.values()), cfg
        assert {'gap', 'level', 'moved', 'spread'} <= set(logs)
        assert ('match' in logs) == (encoder != 'none')
        assert ('kl' in logs) == (method == 'erm')
    methods, posteriors = ('em', 'ejm', 'erm'), ('cosine', 'gaussian', 'cebm')
    assert refused == {
        (method, 'none', posterior)
        for method in methods
        for posterior in posteriors
        if method == 'ejm' or posterior != 'cosine'
    }


SWITCHES = [
    dict(precision='bf16'),
    dict(mirror=True),
    dict(literal=True, step=0.01),
    dict(clip=0.5),
    dict(reg=0.1),
    dict(norm=False),
    dict(n_steps=0),
    # an encoder that is trained here wants whole batches; one that is there already lets
    # the batch come in parts
    dict(micro=2),
    dict(micro=2, n_infer=4),
    dict(method='erm', encoder='none'),
]


@pytest.mark.parametrize('change', SWITCHES, ids=str)
def test_switches_train(change, tmp_path):
    cfg = replace(SHORT, **change)
    nets = trained(cfg, tmp_path)
    # nothing stays frozen, in however many parts a batch came
    assert all(weight.requires_grad for weight in nets.generator.parameters())
    run = run_of(cfg, tmp_path)
    gap, moved = read_log(run, 'gap')[1], read_log(run, 'moved')[1]
    assert len(gap) == 4 and all(map(math.isfinite, gap))
    assert (moved[-1] == 0) == (cfg.n_steps == 0)
    normed = any(hasattr(layer, 'parametrizations') for layer in nets.energy.modules())
    assert normed == cfg.norm
    assert math.isfinite(liebm.evaluate(nets, n=200)['fid'][0])


@pytest.mark.parametrize('change', [dict(max_gap=1e-9), dict(lr=1e38)], ids=str)
def test_a_training_that_leaves_its_bounds_is_stopped(change, tmp_path):
    message = 'energy gap' if 'max_gap' in change else 'not finite|energy gap'
    with pytest.raises(Diverged, match=message) as error:
        trained(replace(SHORT, **change), tmp_path)
    assert 'joint' in str(error.value) and 'checkpoint' in str(error.value)


def test_contradictions_are_refused():
    for change, message in (
        (dict(encoder='none', posterior='cebm'), 'plain energy'),
        (dict(encoder='none', n_infer=1), 'plain energy'),
        (dict(net='shapes'), 'is for shape'),
        (dict(net='nets'), 'net must'),
        (dict(enc='encs'), 'enc must'),
        (dict(method='eem'), 'method must be one of em, ejm, erm'),
        (dict(method='erm'), 'method must be one of em, got'),  # built by `ERMNets`
        (dict(tau2=0.0), 'tau2'),
        (dict(rho=-1.0), 'rho'),
        (dict(p_aug=1.1), 'p_aug'),
        (dict(n_infer=-1), 'n_infer'),
    ):
        with pytest.raises(ValueError, match=message):
            liebm.build(replace(SHORT, **change))


# --- the chapter as a user runs it


def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('08_liebm', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'change', ['n_infer: 2', 'method: erm', 'encoder: none, n_infer: 0']
)
def test_a_small_preset_prints_its_cost_and_trains(change, tmp_path):
    over = (
        f'{change}, n_enc: 2, n_iters: 2, batch: 4, n_steps: 2, save_every: 1, log_every: 1'
    )
    says = ('joint: 2 iterations', 'about')
    trains_in_full('08_liebm', 'liebm', 'digits', tmp_path, over, says=says)
