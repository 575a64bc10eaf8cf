"""Checks of VAEBM that take too long for its notebooks, and the chapter run as a user runs it."""

import json
import math
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chapters import claims_can_be_measured, ends_without_data, trains_in_full
from tiny import clock, went_on

from ebmbook import vaebm
from ebmbook.data import DATASETS, load
from ebmbook.learn.blocks import count
from ebmbook.learn.contract import Context, Diverged
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.vaebm.method import as_seen, prepared
from ebmbook.vaebm.nvae import NVAE_SIZES, nvae
from ebmbook.vaebm.presets import PRESETS

SMALL_NETS = dict(
    ch=4, groups=(1, 1), latent=2, net='4/2 4', first=4, n_steps=2, n_steps_test=2
)
SHORT = dict(
    batch=8, batch_vae=8, n_vae=3, n_iters=4, warm_vae=1, save_every=2, log_every=1
)
TINY = replace(PRESETS['digits'], **SMALL_NETS, **SHORT)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(cfg, folder, preset='digits', **options):
    run = open_run('vaebm', preset, cfg, out=folder, device='cpu')
    return train(vaebm.SYSTEM, cfg, run, progress=False, **options)


def copy_of(state):
    return {name: value.clone() for name, value in state}


# --- the paper's presets

# Epochs of the autoencoder, steps of the energy, K, eta, K when sampling, rate, batch; millions of
# parameters of the energy; parameters of the autoencoder.
# fmt: off
TABLE = {
    'cifar10':            (400, 25_000, 10, 8e-5, 16, 4e-5, 32, 5.138, 130_744_004),
    'cifar10-persistent': (400, 25_000,  6, 6e-5, 16, 4e-5, 32, 5.138, 130_744_004),
    'celeba64':           ( 50, 20_000, 10, 5e-6, 20, 5e-5, 32, 4.338, 65_005_372),
    'lsun_church64':      ( 60, 20_000, 10, 4e-6, 20, 4e-5, 32, 5.814, 65_005_372),
    'celebahq256':        (200,  9_000,  6, 3e-6, 24, 4e-5, 16, 14.207, 365_372_032),
}
# fmt: on
WITH_BUFFER = {'cifar10-persistent', 'lsun_church64', 'celebahq256'}


@pytest.mark.parametrize('preset', TABLE)
def test_presets_of_the_paper(preset):
    cfg, (epochs, *chain, millions, of_vae) = PRESETS[preset], TABLE[preset]
    assert abs(cfg.n_vae * cfg.batch_vae / DATASETS[cfg.data].n[0] - epochs) < 0.01
    assert [cfg.n_iters, cfg.n_steps, cfg.eta, cfg.n_steps_test, cfg.lr, cfg.batch] == chain
    assert (cfg.p_max > 0) == (preset in WITH_BUFFER)
    assert (cfg.negative == 'mean') == (cfg.data != 'cifar10')
    assert (cfg.potential, cfg.method) == ('paper', 'vaebm')
    assert (cfg.penalty, cfg.n_jumps, cfg.spectral, cfg.weight_decay) == (0.0, 0, 0.2, 3e-5)
    # where the rate of the autoencoder ends, on every data set
    assert cfg.lr_vae * cfg.lr_last == pytest.approx(1e-4)
    with torch.device('meta'):
        nets = vaebm.build(cfg)
    assert round(count(nets.energy) / 1e6, 3) == millions and count(nets.vae) == of_vae
    assert cfg.std == 'each'


@pytest.mark.parametrize('name', NVAE_SIZES)
def test_autoencoders_are_those_of_the_page_on_nvae(name):
    with torch.device('meta'):
        here = vaebm.build(PRESETS[name]).vae.state_dict()
        there = nvae(name).state_dict()
    shapes = [{key: value.shape for key, value in state.items()} for state in (here, there)]
    assert shapes[0] == shapes[1]
    assert PRESETS[name].std == NVAE_SIZES[name].get('std', 'each')


BUDGETS = dict(cifar10=0.0358, celeba64=0.0100, lsun_church64=0.0089, celebahq256=0.0085)


@pytest.mark.parametrize('preset,want', BUDGETS.items())
def test_noise_budget(preset, want):
    assert round(math.sqrt(PRESETS[preset].eta * PRESETS[preset].n_steps_test), 4) == want


def same_weights(nets, others):
    pairs = zip(nets.state_dict().values(), others.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize('preset', PRESETS)
def test_weights_and_settings_come_back(preset, tmp_path):
    torch.manual_seed(0)
    groups = (1,) * len(PRESETS[preset].groups)
    small = dict(ch=4, groups=groups, latent=2, cells=1, net='4/2 4', first=4)
    cfg = replace(PRESETS[preset], **small)
    nets = vaebm.SYSTEM.of(cfg).build(cfg)
    nets.save_pretrained(tmp_path)
    again = type(nets).from_pretrained(tmp_path)
    assert again.cfg == nets.cfg and hash(again.cfg) == hash(nets.cfg)
    assert same_weights(nets, again)


@pytest.mark.parametrize('method', vaebm.SYSTEM.rivals)
def test_settings_of_a_rival_make_networks_of_its_own(method):
    cfg = replace(TINY, method=method)
    with pytest.raises(ValueError, match='method must be one of vaebm, got'):
        vaebm.build(cfg)
    rival = vaebm.SYSTEM.of(cfg)
    nets = rival.build(rival.check(cfg))
    assert (nets.energy is None) == (rival.energy is None) == (method == 'vae')
    with pytest.raises(ValueError, match='method must be one of'):
        rival.build(TINY)
    # what differs is its own; the rest is the chapter's
    assert rival.tasks == vaebm.SYSTEM.tasks and rival.presets is PRESETS
    assert rival.sample is not vaebm.SYSTEM.sample and rival.about != vaebm.SYSTEM.about


@pytest.mark.parametrize('method', ['vae', 'ebm', 'wgan'])
def test_a_buffer_that_a_rival_does_not_read_is_refused(method):
    rival, cfg = vaebm.SYSTEM.of(replace(TINY, method=method)), replace(TINY, method=method)
    assert rival.check(cfg) == cfg
    for change in (dict(p_max=0.5), dict(queue=True), dict(keep_x=True)):
        ((name, value),) = change.items()
        for more in ({}, dict(p_max=0.5, p_rise=1)):
            first = 'p_max' if more else name
            with pytest.raises(ValueError, match=f"{first}=.* nothing: .*'{method}'"):
                rival.check(replace(cfg, **more | change))


@pytest.mark.parametrize('preset', ['cifar10', 'digits', 'gaussians25-penalty'])
@pytest.mark.parametrize('method', ['vaebm', 'ebm-vae'])
def test_a_kind_of_buffer_without_a_buffer_is_refused(preset, method):
    cfg = replace(PRESETS[preset], method=method)
    check = vaebm.SYSTEM.of(cfg).check
    for name in ('queue', 'keep_x'):
        with pytest.raises(ValueError, match=f'{name}=True would do nothing: .*p_max'):
            check(replace(cfg, **{name: True}))
    check(replace(cfg, queue=True, p_max=0.5))


@pytest.mark.parametrize('method', ['vaebm', 'ebm-vae'])
def test_a_run_may_change_its_kind_of_buffer(method, tmp_path):
    "Chains go on from no row that an earlier kind left empty."
    cfg = replace(TINY, **KEPT, method=method, n_iters=1, queue=True)
    nets = trained(cfg, tmp_path)
    state = load_checkpoint(tmp_path)['state']
    empty = (state['buffer'] == 0).all(1)
    assert empty.sum() == 16 and 'since' in state
    losses = vaebm.SYSTEM.of(cfg).stages[-1].losses
    nets.cfg, ctx = replace(cfg, queue=False), Context(1, 0.0, gen(), state)
    next(losses(nets, load('digits').batch(range(8)), ctx))
    assert 'since' not in state and len(state['buffer']) == 16
    assert (state['buffer'] != 0).any(1).all()


def test_settings_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(PRESETS['cifar10'])) == PRESETS['cifar10']


# --- training


def test_second_stage_leaves_the_autoencoder_alone(tmp_path):  # running statistics included
    class Watch:
        seen = 0
        state = None

        def __call__(self, step, nets):
            if self.seen == TINY.n_vae:
                self.state = copy_of(nets.vae.state_dict().items())
            self.seen += 1

    watch = Watch()
    nets = trained(TINY, tmp_path, on_step=watch)
    assert watch.state is not None
    assert all(
        torch.equal(value, watch.state[key]) for key, value in nets.vae.state_dict().items()
    )


KEPT = dict(p_max=0.6, p_rise=2, buffer=16)
KEEPING = [
    {},
    KEPT,
    KEPT | dict(keep_x=True),
    KEPT | dict(queue=True),
    KEPT | dict(method='ebm-vae'),
    KEPT | dict(method='ebm-vae', queue=True),
    dict(method='ebm', n_iters=7, buffer=16),
]


@pytest.mark.parametrize('change', KEEPING)
def test_training_continues_to_the_last_bit(change, tmp_path):
    cfg = replace(TINY, **change)
    whole = trained(cfg, tmp_path / 'whole')

    class Enough(Exception):
        pass

    def stop(step, nets):
        time.sleep(0.03)
        if stop.seen == 5:  # all saved in the second stage, whose buffer is no longer fresh
            raise Enough
        stop.seen += 1

    stop.seen = 0
    with pytest.raises(Enough):
        trained(cfg, tmp_path / 'broken', on_step=stop)
    kept = clock(tmp_path / 'broken')
    assert same_weights(whole, trained(cfg, tmp_path / 'broken'))
    assert len(kept) > 3 and went_on(tmp_path / 'broken', kept)


@pytest.mark.parametrize('change', [dict(), dict(queue=True), dict(method='ebm-vae')])
def test_a_buffer_is_the_same_in_parts_of_a_batch(change, tmp_path):
    # batch norm, which counts parts, has no stage here; a step of Adam is 1e-5 at most
    cfg = replace(TINY, **KEPT | change, n_vae=0, cautious=False, lr=1e-5)
    nets = [trained(replace(cfg, micro=n), tmp_path / str(n)) for n in (1, 2)]
    states = [load_checkpoint(tmp_path / str(n))['state'] for n in (1, 2)]
    assert torch.allclose(*(state['buffer'] for state in states), atol=1e-6)
    pairs = zip(*(each.energy.parameters() for each in nets))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
    logs = [(tmp_path / str(n) / 'log.jsonl').read_text().splitlines() for n in (1, 2)]
    for one, other in zip(*logs, strict=True):
        one, other = json.loads(one), json.loads(other)
        for key in ('loss/energy', 'grad/energy', 'gap'):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


def heads(cfg, folder):
    "Loss, gap and norms of the first step of the energy."
    trained(replace(cfg, n_iters=1), folder)
    return json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])


def test_the_released_command_is_two_settings(tmp_path):
    "Weight of the norms, and no gains from data; both reach the loss of the largest preset."
    paper = PRESETS['celebahq256']
    assert (paper.spectral, paper.data_init, paper.buffer) == (0.2, True, 8_000)
    vaebm.SYSTEM.check(replace(paper, spectral=0.3, data_init=False))
    theirs = replace(TINY, spectral=0.3)
    ours, theirs, plain = (
        heads(cfg, tmp_path / name)
        for name, cfg in dict(
            ours=TINY, theirs=theirs, plain=replace(theirs, data_init=False)
        ).items()
    )
    assert ours['gap'] == theirs['gap'] != plain['gap']
    more = theirs['loss/energy'] - ours['loss/energy']
    assert more == pytest.approx(0.1 * ours['spectral'], rel=1e-4)


def test_the_energy_of_faces_sees_eight_bits():
    "And five where a setting says so; the autoencoder sees five in either case."
    faces = replace(PRESETS['celebahq256'], flip=False)
    grey = torch.arange(256).float().view(1, 1, 16, 16) / 127.5 - 1
    batch, ctx = dict(x=grey.expand(2, 3, 16, 16)), Context(1, 0.0, gen())

    def levels(cfg):
        nets = SimpleNamespace(cfg=cfg, vae=torch.nn.Identity())
        return prepared(nets, batch, ctx).unique().numel()

    assert levels(faces) == 256 and levels(replace(faces, energy_bits=5)) == 32
    assert as_seen(batch['x'], faces).unique().numel() == 32


def test_gains_of_drawn_images(monkeypatch):
    "With `init_drawn`, drawn rows, half of them mirrored, and squares over n - 1."
    seen = []

    def note(net, x, **options):
        seen.append((x, options))

    monkeypatch.setattr(vaebm.method, 'data_init', note)
    data = load(TINY.data).tensor(len(load(TINY.data)))
    batch, ctx = dict(x=torch.zeros(2, 1, 8, 8)), Context(0, 0.0, gen())
    for change in (dict(), dict(init_drawn=True), dict(init_drawn=True, flip=False)):
        cfg = replace(TINY, **dict(flip=True, data_init=True) | change)
        nets = SimpleNamespace(cfg=cfg, vae=torch.nn.Identity(), energy=None)
        prepared(nets, batch, ctx)
    (first, _), (drawn, _), (plain, _) = seen
    assert [options['unbiased'] for _, options in seen] == [False, True, True]
    assert torch.equal(first, data[:160])  # as released: the first ones, never mirrored
    rows = torch.randperm(len(data), generator=gen())[:160]
    assert torch.equal(plain, data[rows])
    turned = (drawn != plain).flatten(1).any(1)
    assert torch.equal(drawn[turned], plain[turned].flip(-1)) and 40 < turned.sum() < 120


RIVALS = [
    dict(method='vae'),
    dict(method='ebm', buffer=16),
    dict(method='ebm-vae'),
    dict(method='ebm-vae', p_max=0.6, p_rise=1, buffer=16),
    dict(queue=True, p_max=0.6, p_rise=1, buffer=16),
    dict(method='wgan'),
    dict(decoder=True),
    dict(space='xz'),
    dict(potential='official'),
    dict(micro=2),
    dict(micro=2, method='wgan'),
    dict(micro=2, decoder=True),
]


@pytest.mark.parametrize('change', RIVALS)
def test_rivals_train_and_are_measured(change, tmp_path):
    "A decoder changes after its own stage where it is to be trained on the energy, and only there."
    cfg, old = replace(TINY, lr_decoder=1e-2, **change), {}

    def watch(step, nets):
        if watch.seen == cfg.n_vae:
            old.update(copy_of(nets.vae.named_parameters()))
        watch.seen += 1

    watch.seen = 0
    nets = trained(cfg, tmp_path, on_step=watch)
    # nothing stays frozen, in however many parts a batch came
    assert all(param.requires_grad for param in nets.parameters())
    assert np.isfinite(vaebm.evaluate(nets, n=200)['fid'].value)
    now = nets.vae.named_parameters()
    changed = {
        key.split('.')[0] for key, value in now if old and not torch.equal(value, old[key])
    }
    trains_decoder = change.get('decoder') or change.get('method') == 'wgan'
    assert changed == ({'decoder'} if trains_decoder else set())


def test_badly_scaled_energies_are_stopped(tmp_path):
    "Chains from an energy far too steep, and the message that names cures."
    cfg = replace(
        TINY, eta=50.0, n_iters=400, lr=0.5, log_every=2, spectral=0.0, cautious=False
    )
    with pytest.raises(Diverged, match='lower learning rate') as stopped:
        trained(cfg, tmp_path)
    assert 'checkpoint' in str(stopped.value) and load_checkpoint(tmp_path) is not None


@pytest.mark.slow
def test_energy_of_data_falls_below_that_of_the_autoencoder(tmp_path):
    cfg = replace(PRESETS['gaussians25'], n_vae=1_000, n_iters=300)
    nets = trained(cfg, tmp_path, 'gaussians25')
    samples = dict(
        data=load('gaussians25', split='test').tensor(2_000),
        autoencoder=vaebm.sample(nets, 2_000, alone=True, generator=gen()),
        chain=vaebm.sample(nets, 2_000, n_steps=20, generator=gen()),
    )
    heights = {name: vaebm.energy(nets, x).mean().item() for name, x in samples.items()}
    print(heights)
    assert heights['data'] < heights['autoencoder'] - 0.1
    assert heights['chain'] < heights['autoencoder'] - 0.1


def test_every_claim_names_presets_and_metrics_that_exist():
    claims_can_be_measured(vaebm, SMALL_NETS | dict(buffer=32))


# --- the chapter as a user runs it


def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('06_vaebm', tmp_path)


def test_a_small_preset_prints_its_cost_and_trains(tmp_path):
    over = (
        'n_vae: 2, n_iters: 2, batch: 4, batch_vae: 4, ch: 4, groups: [1, 1], net: "4/2 4", '
        'first: 4, n_steps: 2, n_steps_test: 2, save_every: 1, log_every: 1'
    )
    messages = ('stage vae: 2 iterations, about', 'stage energy: 2 iterations, about')
    trains_in_full('06_vaebm', 'vaebm', 'digits', tmp_path, over, says=messages)
