"""Tests of CoopFlow and of the baselines that take too long for their notebooks.

The last ones run the chapter as a user runs it.
"""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from chapters import (
    ROOT,
    claims_can_be_measured,
    ends_without_data,
    limit,
    papermill,
    trains_in_full,
)
from torch import nn

from ebmbook import coopflow
from ebmbook.coopflow import PRESETS
from ebmbook.data import DATASETS
from ebmbook.learn.blocks import count
from ebmbook.learn.contract import Context
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run

SMALL_NETS = dict(ch=4, flow_width=8, n_mix=2)
TINY = replace(
    PRESETS['digits-pre'],
    **SMALL_NETS,
    n_steps=3,
    batch=8,
    n_pre=3,
    n_iters=4,
    warm=2,
    lr_warm=1,
    save_every=2,
    log_every=1,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def train_in(folder, cfg, preset='digits-pre', **options):
    run = open_run('coopflow', preset, cfg, out=folder, device='cpu')
    return train(coopflow.SYSTEM, cfg, run, progress=False, **options)


# --- the paper's presets


def test_parameter_counts():
    with torch.device('meta'):
        nets = coopflow.build(PRESETS['cifar10-pre'])
    assert (count(nets.energy), count(nets.flow)) == (17_129_444, 28_784_792)
    assert round(count(nets) / 1e6, 1) == 45.9


# Table 4.4: epochs of the flow alone, of the energy alone, of both, updates, steps in training
# and in use; batch from section 4.5.2
# fmt: off
TABLE = {
    'cifar10-T30':   (0,   0,  100, 30,  .03,  .04,   28),
    'svhn-T30':      (0,   0,  100, 30,  .03,  .035,  28),
    'celeba32-T30':  (0,   0,  100, 30,  .03,  .035,  28),
    'cifar10-T200':  (0,   0,  100, 200, .01,  .012,  32),
    'svhn-T200':     (0,   0,  100, 200, .011, .0125, 32),
    'celeba32-T200': (0,   0,  100, 200, .011, .013,  32),
    'cifar10-pre':   (300, 25, 75,  30,  .03,  .04,   28),
    'svhn-pre':      (200, 10, 90,  30,  .03,  .035,  28),
    'celeba32-pre':  (80,  10, 90,  30,  .03,  .035,  28),
}
# fmt: on


@pytest.mark.parametrize('preset', TABLE)
def test_rows_of_table_4_4(preset):
    cfg = PRESETS[preset]
    pre, warm, both, T, delta, delta_test, batch = TABLE[preset]
    assert (cfg.n_steps, cfg.batch) == (T, batch)
    assert (cfg.delta, cfg.delta_test) == (delta, delta_test)
    for got, want in ((cfg.n_pre, pre), (cfg.warm, warm), (cfg.n_iters - cfg.warm, both)):
        epochs = got * cfg.batch / DATASETS[cfg.data].n[0]
        assert abs(epochs - want) < 1e-3
    assert (cfg.lr, cfg.lr_flow, cfg.noise, cfg.method) == (1e-4, 1e-4, 'off', 'coopflow')
    assert (cfg.exact, cfg.ema) == (True, 0.0)
    assert cfg.flip == (cfg.data == 'cifar10')
    assert (cfg.ebm_clip == 0) == (cfg.data == 'cifar10')
    assert cfg.flow_every == (5 if preset == 'celeba32-pre' else 1)


@pytest.mark.parametrize('preset', PRESETS)
def test_weights_and_settings_come_back(preset, tmp_path):
    torch.manual_seed(0)
    deq = (1, 1, 4) if PRESETS[preset].deq else ()
    sizes = dict(SMALL_NETS, flow_steps=(1, 1, 1), deq=deq, flow_blocks=1)
    small = replace(PRESETS[preset], **sizes)
    nets = coopflow.build(small)
    nets.save_pretrained(tmp_path)
    again = coopflow.Nets.from_pretrained(tmp_path)
    assert again.cfg == small and hash(again.cfg) == hash(small)
    pairs = zip(nets.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(saved, loaded) for saved, loaded in pairs)


# --- contrast of what the flow gives back


@pytest.mark.parametrize('exact,slope', [(True, 1.0), (False, 0.9 * 255 / 256)])
def test_slope_of_encode_and_decode(exact, slope):
    torch.manual_seed(0)
    sizes = dict(SMALL_NETS, flow_steps=(1, 1, 1), deq=(1, 1, 4), flow_blocks=1, blocks=1)
    other = dict(shape=(3, 8, 8), data='folder:/x', exact=exact)
    cfg = replace(PRESETS['cifar10-T30'], **sizes, **other)
    flow = coopflow.flow_of(cfg).double().eval()
    x = 2 * torch.rand(32, 3, 8, 8, generator=gen(), dtype=torch.float64) - 1
    with torch.no_grad():
        back = flow.init(x, gen(1)).decode(flow.encode(x, generator=gen(2))[0])
    assert (x * back).sum() / x.square().sum() == pytest.approx(slope, abs=1e-3)
    # what is left is the noise inside one grey level
    assert (back - slope * x).abs().max() < 0.009


# --- the fixed points, by the chapter's own losses


class Stretch(nn.Module):  # g(z) = s z
    def __init__(self):
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(1))

    def decode(self, z):
        return self.log_s.exp() * z

    def log_prob(self, x, generator=None):
        return (-((x * (-self.log_s).exp()) ** 2) / 2 - self.log_s).sum(1)


class Bowl(nn.Module):  # E = a x^2/2
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return self.value * x[:, 0] ** 2 / 2


class Twist(nn.Module):  # E = |x|^2/2 - theta x1 x2
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return x.square().sum(1) / 2 - self.value * x.prod(1)


class Pair(nn.Module):
    propose = coopflow.Nets.propose

    def __init__(self, cfg, energy):
        super().__init__()
        self.cfg, self.energy, self.flow = cfg, energy, Stretch()


def cooperate(energy, cfg, data, n_iters, rates):
    "Learned parameter of the energy, and s^2."
    nets, kept, ctx = Pair(cfg, energy), [], Context(1, 0.0, gen(3))
    opts = {
        name: torch.optim.Adam(getattr(nets, name).parameters(), rate)
        for name, rate in rates.items()
    }
    for i in range(n_iters):
        batch = dict(x=data(cfg.batch, ctx.generator))
        for name, loss, _ in coopflow.losses(nets, batch, ctx):
            for opt in opts.values():
                opt.zero_grad()
            loss.backward()
            opts[name].param_groups[0]['lr'] = rates[name] * max(1 - i / n_iters, 0.02)
            opts[name].step()
        if i > n_iters * 2 // 3:
            kept.append((nets.energy.value.item(), (2 * nets.flow.log_s).exp().item()))
    return np.mean(kept, 0)


def normal_data(var):
    return lambda n, g: var**0.5 * torch.randn(n, 1, generator=g)


LINE = coopflow.Config(data='line', shape=(1,), batch=2_000, n_iters=0, clip=0.0, bound=0.0)


@pytest.mark.parametrize('T,delta,v', [(1, 0.5, 0.6), (12, 0.3, 1.5)])
def test_noisy_fixed_point_does_not_depend_on_the_length(T, delta, v):
    cfg = replace(LINE, noise='on', n_steps=T, delta=delta)
    a, s2 = cooperate(Bowl(), cfg, normal_data(v), 1_000, dict(energy=0.02, flow=0.02))
    want = (1 - math.sqrt(1 - delta**2 / v)) / (delta**2 / 2)  # 1/(a(1-delta^2 a/4)) = v
    assert want * (1 - delta**2 * want / 4) == pytest.approx(1 / v)
    assert a == pytest.approx(want, rel=0.06) and s2 == pytest.approx(v, rel=0.06)


def test_noise_free_fixed_point_is_a_flat_energy():
    cfg = replace(LINE, n_steps=5, delta=0.5)
    a, s2 = cooperate(Bowl(), cfg, normal_data(1.5), 1_500, dict(energy=0.05, flow=0.02))
    assert abs(a) < 0.03 and s2 == pytest.approx(1.5, rel=0.05)


def test_moments_match_where_the_energy_has_no_density():
    C, eta, T = 1.2, 0.05, 10

    def data(n, g):
        z = torch.randn(n, 2, generator=g)
        along = z[:, 0] * math.sqrt((2 + C) / 2)
        across = z[:, 1] * math.sqrt((2 - C) / 2)
        return torch.stack([along + across, along - across], 1)

    cfg = replace(LINE, shape=(2,), noise='on', delta=math.sqrt(2 * eta), n_steps=T)
    theta, s2 = cooperate(Twist(), cfg, data, 900, dict(energy=0.03, flow=0.015))
    # the end of the chain, exactly
    factor = (1 - eta * np.array([1 - theta, 1 + theta])) ** 2
    lam = factor**T * s2 + 2 * eta * (1 - factor**T) / (1 - factor)
    assert theta > 1  # exp(-E) has no integral
    assert (lam[0] - lam[1]) / 2 == pytest.approx(C, rel=0.08)
    assert lam.mean() == pytest.approx(s2, rel=0.05)


# --- training


class Enough(Exception):
    "Stops a training from outside."


def test_training_continues_to_the_last_bit(tmp_path):
    whole = train_in(tmp_path / 'whole', TINY)
    seen = []

    def stop(step, nets):
        if len(seen) == 5:
            raise Enough  # in the second stage, behind a checkpoint
        seen.append(step)

    with pytest.raises(Enough):
        train_in(tmp_path / 'parts', TINY, on_step=stop)
    parts = train_in(tmp_path / 'parts', TINY)
    pairs = zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize('method', ['flow', 'shortrun', 'coopnets'])
def test_rivals_train_and_are_measured(method, tmp_path):
    cfg = replace(TINY, method=method, infer_steps=1)
    nets = train_in(tmp_path, cfg)
    assert np.isfinite(coopflow.evaluate(nets, n=200)['fid'][0])
    if method != 'flow':
        got = coopflow.evaluate(nets, task='reconstruct', n=4, n_iters=3)
        assert np.isfinite(got['mse'][0])


@pytest.mark.parametrize(
    'options,says',
    [
        (dict(task='bits', n_step=3), "'bits' of coopflow takes no option 'n_step'"),
        (dict(task='bits', n_steps=3), 'the networks were trained with it'),
        (dict(n_step=3), "did you mean 'n_steps'"),
        (dict(task='reconstruct', extractor='digits'), "takes no option 'extractor'"),
    ],
)
def test_what_a_task_does_not_read_is_refused(options, says):
    with pytest.raises(TypeError, match=says):
        coopflow.evaluate(coopflow.build(TINY), **options)


@pytest.mark.parametrize('method', ['flow', 'shortrun', 'coopnets'])
def test_networks_of_one_method_do_not_take_settings_of_another(method):
    rival = replace(TINY, method=method)
    with pytest.raises(ValueError, match='method must be one of coopflow, got'):
        coopflow.build(rival)
    with pytest.raises(ValueError, match=f'method must be one of {method}, got'):
        coopflow.SYSTEM.of(rival).build(TINY)
    with pytest.raises(ValueError, match='one of coopflow, flow, shortrun, coopnets'):
        coopflow.build(replace(TINY, method='gan'))


def test_a_finished_rival_is_not_trained_again(tmp_path):
    cfg = replace(TINY, method='shortrun')
    nets = train_in(tmp_path, cfg)
    again = train_in(tmp_path, cfg)
    pairs = zip(nets.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    # the place of the stage, as in checkpoints of earlier versions
    assert load_checkpoint(tmp_path)['stage'] == 1


@pytest.mark.parametrize('method', ['shortrun', 'coopnets'])
def test_without_a_flow_there_are_no_bits(method):
    cfg = replace(TINY, method=method)
    nets = coopflow.SYSTEM.of(cfg).build(cfg)
    with pytest.raises(ValueError, match='needs a flow'):
        coopflow.evaluate(nets, task='bits')


def test_settings_can_be_sent_to_another_process():  # workers and launchers pickle them
    assert pickle.loads(pickle.dumps(PRESETS['cifar10-pre'])) == PRESETS['cifar10-pre']


def test_every_claim_names_presets_and_metrics_that_exist():
    claims_can_be_measured(coopflow, dict(SMALL_NETS, n_steps=2))


# --- the spiral


def numbers(nets):
    got = coopflow.evaluate(nets, n=4_000)
    return {name: value for name, (value, *_) in got.items()}


@pytest.fixture(scope='module')
def spirals():  # what the shipped pairs of Figure 4.3 measure
    folder = ROOT / 'ebmbook/weights'
    load = coopflow.Nets.from_pretrained
    return {
        length: numbers(load(folder / f'coopflow-spiral-{length}').eval())
        for length in ('T100', 'long')
    }


def test_with_long_chains_both_densities_fit(spirals):
    got = spirals['long']
    print(got)
    # the mean difference is the divergence KL(data || p)
    assert got['truth'] - 0.1 < got['loglik_energy'] < got['truth']
    assert got['truth'] - 0.15 < got['loglik_flow'] < got['truth']
    assert got['near_pair'] > 0.85 and got['distance_pair'] < 0.05


def test_with_short_chains_only_the_pair_fits(spirals):
    got = spirals['T100']
    print(got)
    assert got['loglik_energy'] < got['truth'] - 0.3
    assert got['loglik_flow'] < got['truth'] - 0.2
    assert got['near_pair'] > got['near_start'] + 0.1
    assert got['distance_pair'] < got['distance_start']


@pytest.mark.slow
def test_the_pair_is_nearer_to_the_spiral_than_its_flow(tmp_path):
    # a flow that is not finished leaves the chain something to do
    cfg = replace(PRESETS['spiral-T100'], n_pre=60, n_iters=400)
    got = numbers(train_in(tmp_path, cfg, 'spiral-T100'))
    print(got)
    assert got['near_pair'] > got['near_start']
    assert got['distance_pair'] < got['distance_start']
    assert got['loglik_flow'] < got['truth'] and got['loglik_energy'] < got['truth']


# --- the chapter as a user runs it


def write_pictures(folder, n=60):
    "Small photographs of nothing, as a user's own folder."
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:02d}.png')


def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('04_coopflow', tmp_path, 'cifar10', '-p', 'preset', 'cifar10-pre')


def test_wrong_names_end_the_chapter_in_seconds(tmp_path):
    names = '-p', 'dataset', 'digits', '-p', 'preset', 'digits-prf'
    code, output, seconds = papermill('04_coopflow', tmp_path, tmp_path, *names)
    assert code != 0 and "did you mean 'digits-pre'" in output and seconds < limit(20)


# on pictures of one's own; the official files are checked by their sums
def test_the_paper_preset_says_its_cost_and_trains(tmp_path):
    write_pictures(tmp_path / 'mine')
    over = (
        'n_pre: 2, n_iters: 2, warm: 1, batch: 4, ch: 4, flow_steps: [1, 1, 1], '
        'deq: [1, 1, 4], flow_blocks: 1, flow_width: 8, n_mix: 2, '
        'n_steps: 2, save_every: 1, log_every: 1, n_eval: 16'
    )
    names = '-p', 'dataset', f"folder:{tmp_path / 'mine'}", '-p', 'preset', 'cifar10-pre'
    says = 'stage flow: 2 iterations, about', 'stage coopflow: 2 iterations, about'
    trains_in_full(
        '04_coopflow', 'coopflow', 'cifar10-pre', tmp_path, over, *names, says=says
    )
