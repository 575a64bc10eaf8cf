"Networks of one's own in CDRL, VAEBM and EC-VAE: the examples of the book, trained and refused."

import inspect
import json
import os
from dataclasses import replace

import pytest
import torch
from test_parts import both, far, plain
from tiny import digest
from torch import nn

import ebmbook
from ebmbook.learn.blocks import count
from ebmbook.learn.loop import train as fit
from ebmbook.learn.runs import open_run
from ebmbook.shell import own_networks as page
from ebmbook.shell.systems import load_system

QUICK = dict(progress=False, device='cpu')
BRIEF = dict(batch=8, n_iters=4, n_steps=2, save_every=2, log_every=1)
OVER = dict(
    cdrl=BRIEF | dict(pretrain=2, head_start=0),
    vaebm=BRIEF | dict(n_vae=2, batch_vae=8, lr_vae=1e-3, warm_vae=0, n_steps_test=2),
    ecvae=BRIEF | dict(max_gap=1e30),
)
PRESET = dict(cdrl='digits-cond', vaebm='digits-claim', ecvae='digits-claim')
SYSTEMS = list(PRESET)


def own(system, seed=0):
    "The networks of the page."
    torch.manual_seed(seed)
    if system == 'cdrl':
        return dict(energy=page.NoisyEnergy(n_classes=10), init=page.NoisyInit())
    scale = 64.0 if system == 'vaebm' else 1.0
    energy = page.ImageEnergy(scale=scale)
    return dict(energy=energy, encoder=page.ImageEncoder(), decoder=page.ImageDecoder())


def train(system, out, nets=None, over=None, **options):
    how = QUICK | options
    over = OVER[system] | (over or {})
    nets = own(system) if nets is None else nets
    return ebmbook.train(system, 'digits', PRESET[system], over, nets=nets, out=out, **how)


def bits(nets):
    return {name: digest(net) for name, net in nets.items()}


def given(system, model):
    "The networks of a model that were given, by part."
    nets = model.nets
    vae = nets.vae if system == 'vaebm' else None
    parts = {name: vae or nets for name in ('encoder', 'decoder')}
    found = {name: getattr(parts.get(name, nets), name) for name in own(system)}
    return {
        name: net.net if vae is None or name == 'energy' else net
        for name, net in found.items()
    }


def test_examples_are_short():
    for name in page.__all__:
        assert len(inspect.getsource(getattr(page, name)).splitlines()) <= 30, name


@pytest.mark.parametrize('system', SYSTEMS)
def test_train_sample_measure_save_load(tmp_path, system):
    nets = own(system)
    before = bits(nets)
    model = train(system, tmp_path / 'a', nets)
    assert bits(nets) == before  # a copy was trained
    learned = bits(given(system, model))
    assert all(learned[name] != before[name] for name in before)
    x = model.sample(4, seed=0)
    assert x.shape == (4, 1, 8, 8) and model.energy(x).shape == (4,)
    task = 'inpaint' if system == 'cdrl' else 'sample'
    options = dict(n_steps=1) if system == 'cdrl' else {}
    assert model.evaluate(task, n=150, **options)
    model.save(tmp_path / 'saved')
    stored = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert stored['own'] == {name: type(net).__name__ for name, net in nets.items()}
    for folder in (tmp_path / 'saved', tmp_path / 'a'):
        again = ebmbook.load(folder, 'cpu', nets=own(system, seed=5))
        assert digest(again.nets) == digest(model.nets)
        assert torch.equal(again.sample(2, seed=1), model.sample(2, seed=1))
        with pytest.raises(ValueError, match="give them in Python") as error:
            ebmbook.load(folder, 'cpu')
        assert '\n' not in str(error.value)
    assert 'energy=' in model.card


@pytest.mark.parametrize('system', SYSTEMS)
def test_resume_is_exact(tmp_path, system):
    def stop(step, nets):
        stop.n += 1
        if stop.n == 5:
            raise RuntimeError('power failure')

    stop.n = 0
    whole = train(system, tmp_path / 'whole', over=dict(n_iters=6))
    with pytest.raises(RuntimeError, match='power failure'):
        train(system, tmp_path / 'cut', over=dict(n_iters=6), on_step=stop)
    with pytest.raises(ValueError, match="begun with networks of one's own"):
        ebmbook.train(
            system, 'digits', PRESET[system], OVER[system] | dict(n_iters=6),
            out=tmp_path / 'cut', **QUICK,
        )  # fmt: skip
    # the weights that are given now are replaced by those of the checkpoint
    again = train(system, tmp_path / 'cut', own(system, seed=9), over=dict(n_iters=6))
    assert digest(again.nets) == digest(whole.nets)


def settings(system, **changes):
    "Settings of the preset, brief."
    known = load_system(system)
    cfg = replace(known.presets[PRESET[system]], **OVER[system] | changes)
    return known, known.check(cfg)


@pytest.mark.parametrize('system', SYSTEMS)
def test_the_seed_does_not_change_them(system):
    known, cfg = settings(system)
    ready, found = known.owning(known.own(cfg, own(system))), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(digest(ready.build(cfg)))
    assert found[0] == found[1]


# --- several processes


def together(system, out):
    "A training by plain descent, in which every process was given other weights."
    rank = int(os.environ.get('RANK', 0))
    pretrain = dict(pretrain=0) if system == 'cdrl' else {}
    known, cfg = settings(system, n_iters=2, ema=0.5, **pretrain)
    ready = known.owning(known.own(cfg, own(system, rank)))
    run = open_run(system, 'tiny', cfg, out=out, device='cpu')
    nets = fit(plain(ready, cfg), cfg, run, progress=False)
    torch.save(nets.state_dict(), out / f'nets-{rank}.pt')
    torch.manual_seed(0)
    return ready.build(cfg).state_dict()


@pytest.mark.parametrize('system', SYSTEMS)
def test_two_processes_are_one(tmp_path, system):
    start = together(system, tmp_path / 'one')
    both(tmp_path / 'two', lambda: together(system, tmp_path / 'two'))
    one = torch.load(tmp_path / 'one' / 'nets-0.pt')
    first, second = (torch.load(tmp_path / 'two' / f'nets-{i}.pt') for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert far(one, first, start) == []
    assert any(not torch.equal(one[name], start[name]) for name in one)


# --- what else may be given


def test_one_part_alone(tmp_path):
    nets = own('cdrl')
    model = train('cdrl', tmp_path / 'a', dict(energy=nets['energy']), dict(init_ch=8))
    assert model.nets.own == dict(energy='NoisyEnergy')
    assert model.sample(2, seed=0).shape == (2, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r'NoisyEnergy\(\.\.\.\)\); got nets=dict\(energy.*init='
    ):
        ebmbook.load(tmp_path / 'a', 'cpu', nets=nets)


def test_a_function_of_the_settings(tmp_path):
    def nets(cfg):
        return dict(energy=page.NoisyEnergy(cfg.shape[0], 8, cfg.n_classes))

    model = train('cdrl', tmp_path / 'a', nets, dict(init_ch=8))
    assert count(model.nets.energy) < 2_000
    assert digest(ebmbook.load(tmp_path / 'a', 'cpu', nets=nets).nets) == digest(model.nets)


def test_networks_of_the_book_in_another_size(tmp_path):
    from ebmbook.cdrl.nets import EnergyNet, UNet

    nets = dict(energy=EnergyNet(8, (1, 2), 1, 1, 8, 10), init=UNet(8, (1,), 1, 1, 8, 10))
    model = train('cdrl', tmp_path / 'a', nets)
    assert model.sample(2, seed=0).shape == (2, 1, 8, 8)


def test_points(tmp_path):
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))

        def forward(self, x, *more):
            return self.dense(x).sum(1)

    for system, preset in (
        ('cdrl', 'checkerboard'),
        ('vaebm', 'gaussians25'),
        ('ecvae', 'gaussians25'),
    ):
        over = {name: value for name, value in OVER[system].items() if name != 'head_start'}
        how = dict(over=over, nets=dict(energy=Energy()), out=tmp_path / system) | QUICK
        model = ebmbook.train(system, preset=preset, **how)
        assert model.energy(model.sample(3, seed=0)).shape == (3,)


# --- what is refused


class Odd(nn.Module):
    "An energy that is wrong in one respect."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.dense = kind, nn.Linear(64, 1)

    def forward(self, x, log_snr, c):
        found = self.dense(x.flatten(1))
        if self.kind == 'nan':
            return found[:, 0] / 0
        if self.kind == 'batch':
            return found[:, 0] - found.mean()
        if self.kind == 'half':
            return found[:, 0].bfloat16()
        if self.kind == 'place':
            return x.mul_(2).sum((1, 2, 3)) * found[:, 0]
        if self.kind == 'cut':
            return found.detach()[:, 0]
        return found if self.kind == 'column' else found[:, 0]


class Two(nn.Module):
    def forward(self, x):
        return x


SHARED = page.NoisyEnergy(n_classes=10)


@pytest.mark.parametrize(
    ('nets', 'words'),
    [
        (dict(energie=SHARED), "did you mean 'energy'"),
        (dict(decoder=SHARED), "unknown part of nets 'decoder'"),
        (SHARED, 'nets=dict(energy=MyEnergy())'),
        ([SHARED], 'got a list of NoisyEnergy'),
        ('energy', 'got str'),
        (dict(energy=page.NoisyEnergy), 'is the class NoisyEnergy'),
        (dict(energy=None), 'must be a torch.nn.Module, got None'),
        (dict(energy=lambda x: x), 'must be a torch.nn.Module, got function'),
        (dict(energy=Two()), 'no parameter'),
        (dict(energy=page.NoisyEnergy(n_classes=10).requires_grad_(False)), 'no parameter'),
        (dict(energy=nn.LazyLinear(1)), 'lazy'),
        (dict(energy=page.NoisyEnergy(n_classes=3)), 'raised IndexError'),
        (dict(energy=page.NoisyEnergy(3)), 'energy(x, log_snr, c) was called with'),
        (dict(energy=page.ImageEnergy()), 'raised TypeError'),
        (dict(energy=page.NoisyInit()), 'must return (2,) float32'),
        (dict(init=SHARED), 'must return (2, 1, 8, 8) float32 for 2 examples, got (2,)'),
        (dict(energy=page.NoisyEnergy(n_classes=10).double()), 'raised RuntimeError'),
        (dict(energy=SHARED, init=SHARED), 'share parameters'),
        (dict(energy=Odd('nan')), 'not finite'),
        (dict(energy=Odd('batch')), 'asked alone'),
        (dict(energy=Odd('half')), 'got (2,) bfloat16; call .float()'),
        (dict(energy=Odd('place')), 'in-place'),
        (dict(energy=Odd('column')), 'got (2, 1) float32'),
        (dict(energy=Odd('cut')), 'no gradient'),
    ],
)
def test_wrong_networks(tmp_path, nets, words):
    with pytest.raises((KeyError, TypeError, ValueError)) as error:
        train('cdrl', tmp_path / 'a', nets)
    text = str(error.value.args[0])
    assert words in text and '\n' not in text, text
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize(
    ('system', 'parts', 'over', 'words'),
    [
        ('cdrl', ['energy'], dict(ch=8), 'ch only shapes'),
        ('cdrl', ['init'], '{attn: []}', 'attn only shapes'),
        ('vaebm', ['encoder'], {}, 'go together'),
        ('vaebm', ['energy'], dict(data_init=False), 'data_init only shapes'),
        ('vaebm', ['encoder', 'decoder'], dict(latent=3), 'latent only shapes'),
        ('vaebm', ['encoder', 'decoder'], dict(std='each'), 'over=dict(std=0.2)'),
        ('vaebm', ['energy'], dict(method='ebm'), 'with these settings takes no networks'),
        ('ecvae', ['encoder'], {}, 'each (2, 16) float32'),
        ('ecvae', ['decoder'], {}, 'called with (2, 16) float32'),
        ('ecvae', ['encoder', 'decoder'], dict(norm='none'), 'norm only shapes'),
        ('ecvae', ['energy'], dict(method='ecflow'), 'with these settings takes no net'),
        ('liebm', ['energy'], {}, 'liebm takes no networks of one'),
    ],
)
def test_wrong_combinations(tmp_path, system, parts, over, words):
    nets = own('vaebm' if system == 'liebm' else system)
    nets = {name: nets[name] for name in parts}
    how = dict(nets=nets, out=tmp_path / 'a', over=over) | QUICK
    with pytest.raises(ValueError) as error:
        ebmbook.train(system, preset=PRESET.get(system, 'digits'), **how)
    assert words in str(error.value)
    assert not (tmp_path / 'a').exists()


def test_a_run_goes_on_with_the_same_networks(tmp_path):
    nets = own('cdrl')
    train('cdrl', tmp_path / 'a', nets)
    for other, words in (
        (dict(energy=nets['energy']), 'begun with nets=dict(energy=..., init=...)'),
        (nets | dict(energy=page.NoisyEnergy(1, 16, 10)), 'energy is another NoisyEnergy'),
        (nets | dict(energy=Odd('right')), 'energy was NoisyEnergy and is Odd'),
    ):
        with pytest.raises(ValueError) as error:
            train('cdrl', tmp_path / 'a', other)
        assert words in str(error.value)
    how = dict(over=OVER['cdrl'], out=tmp_path / 'b') | QUICK
    ebmbook.train('cdrl', 'digits', PRESET['cdrl'], **how)
    with pytest.raises(ValueError, match="a run of the system's own networks"):
        train('cdrl', tmp_path / 'b', nets)
    with pytest.raises(ValueError, match="the system's own networks, without nets"):
        ebmbook.load(tmp_path / 'b', 'cpu', nets=nets)
    with pytest.raises(ValueError, match='energy is another|weights of other networks'):
        ebmbook.load(tmp_path / 'a', 'cpu', nets=nets | dict(init=page.NoisyInit(1, 16)))
