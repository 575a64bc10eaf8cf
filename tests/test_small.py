"The preset `small`: completed by the data, trained and drawn from, and chosen for one's own."

import json
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ebmbook
from ebmbook.data.catalogue import DATASETS
from ebmbook.data.held import hold
from ebmbook.learn.settings import base_of
from ebmbook.shell import cli
from ebmbook.shell.systems import load_system, select

STEP = dict(n_iters=1, batch=2, n_steps=1)
QUICK = dict(  # one step of each stage
    cdrl=STEP | dict(pretrain=1, n_levels=2),
    coopflow=STEP | dict(n_pre=1, warm=0),
    vaebm=STEP | dict(n_vae=1, batch_vae=2, n_steps_test=1),
    ecvae=STEP,
    liebm=STEP | dict(n_enc=1, n_infer=1),
)
NAMES = list(QUICK)
SQUARE = [(1, 16, 16), (1, 28, 28), (3, 32, 32)]
ODD = [(1, 17, 17), (3, 30, 30)]
WIDE = (1, 20, 24)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    "Batch norms of LIEBM's generator get their averages from fewer images."
    monkeypatch.setattr('ebmbook.liebm.method.settle.__defaults__', (None, 256, 128))


def pictures(n, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (256 * torch.rand(n, *shape, generator=generator)).byte()


def images(folder, n, shape):
    "A folder of pictures in two classes."
    for i, x in enumerate(pictures(n, shape)):
        place = folder / ('cat' if i % 2 else 'dog')
        place.mkdir(parents=True, exist_ok=True)
        pixels = x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / f'{i}.png')
    return f'folder:{folder}'


def trained(name, shape, out, **change):
    data = pictures(20, shape), torch.arange(20) % 3
    over = QUICK[name] | change
    return ebmbook.train(name, data, over=over, out=out, progress=False, device='cpu')


def check_trained(model, shape):
    assert model.preset == 'small' and tuple(model.cfg.shape) == shape
    x = model.sample(2)
    assert x.shape == (2, *shape) and x.dtype == torch.float32
    assert x.isfinite().all() and x.abs().max() <= 1
    energies = model.energy(x)
    assert energies.shape == (2,) and energies.isfinite().all()


# --- every system and shape


@pytest.mark.parametrize('shape', SQUARE, ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_small_trains_and_draws(tmp_path, name, shape):
    model = trained(name, shape, tmp_path)
    check_trained(model, shape)
    over = json.loads((tmp_path / 'config.json').read_text())['config']
    assert tuple(over['shape']) == shape
    check_trained(ebmbook.load(tmp_path, 'cpu'), shape)


@pytest.mark.parametrize('shape', ODD, ids=str)
@pytest.mark.parametrize('name', [name for name in NAMES if name != 'coopflow'])
def test_sides_are_padded(tmp_path, name, shape):
    change = dict(n_enc=0) if name == 'liebm' else {}  # its encoder takes any side
    check_trained(trained(name, shape, tmp_path, **change), shape)


@pytest.mark.parametrize('name', NAMES)
def test_sides_that_differ(tmp_path, name):
    if name == 'coopflow':
        return check_trained(trained(name, WIDE, tmp_path), WIDE)
    with pytest.raises(ValueError, match='are not square') as error:
        trained(name, WIDE, tmp_path / 'a')
    assert '(1, 20, 24)' in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('shape', ODD, ids=str)
def test_a_flow_refuses_sides_that_it_cannot_split(shape):
    with pytest.raises(ValueError, match='width 4 divides') as error:
        select(load_system('coopflow'), hold(pictures(20, shape)))
    assert "'folder:PATH@HxW'" in str(error.value)


@pytest.mark.parametrize('name', ['vaebm', 'ecvae', 'liebm'])
def test_padding_changes_nothing_where_sides_can_be_halved(name, monkeypatch):
    system = load_system(name)
    cfg = system.presets['small']
    x = pictures(2, cfg.shape).float() / 127.5 - 1

    def energies(cfg):
        torch.manual_seed(0)
        return system.energy(system.build(cfg).eval(), x)

    padded = energies(cfg)
    if name == 'vaebm':
        cfg = replace(cfg, pad_to=1)
    else:
        sizes = import_module(f'ebmbook.{name}.nets').SIZES
        assert sizes['small']['pad']
        monkeypatch.setitem(sizes, 'small', sizes['small'] | dict(pad=False))
    assert torch.equal(energies(cfg), padded)


# --- classes


def test_cdrl_learns_the_classes_that_there_are(tmp_path):
    system = load_system('cdrl')
    x, y = pictures(20, (1, 16, 16)), torch.arange(20) % 3
    of = {}
    for kind, data in dict(
        none=x,
        classes=(x, y),
        attributes=(x, torch.stack([y > 0, y > 1], 1).long()),
    ).items():
        of[kind] = select(system, hold(data))[1]
    found = {kind: (cfg.n_classes, cfg.init_cond) for kind, cfg in of.items()}
    assert found == dict(none=(0, True), classes=(3, True), attributes=(4, False))
    assert select(system, images(tmp_path, 20, (3, 20, 20)))[1].n_classes == 2
    assert select(system, 'cifar10', 'small')[1].n_classes == 10
    assert select(system, 'imagenet32', 'small')[1].n_classes == 1000
    torch.manual_seed(0)
    nets = system.build(of['classes']).eval()
    clean = x[:2].float() / 127.5 - 1
    energies = [system.energy(nets, clean, labels=torch.full((2,), c)) for c in (1, 2, 3)]
    assert not torch.equal(*energies[:2]) and not torch.equal(*energies[1:])


def test_proposals_rest_while_the_energy_learns(tmp_path):
    "They are what the stage before left, and the energy is not."
    over = QUICK['cdrl'] | dict(pretrain=2, ema=0.0, lr=1e-2, warmup=0)
    data = pictures(20, (1, 16, 16))
    found = [
        ebmbook.train(
            'cdrl', data, over=over | dict(n_iters=n), out=tmp_path / str(n), progress=False
        ).nets.cpu()
        for n in (0, 2)
    ]
    for part, same in dict(init=True, energy=False).items():
        before, after = (getattr(nets, part).state_dict() for nets in found)
        assert same == all(torch.equal(before[name], after[name]) for name in before)


def test_cdrl_draws_the_classes_it_is_asked_for(tmp_path):
    model = trained('cdrl', (1, 16, 16), tmp_path)
    x = model.sample(2, labels=torch.tensor([1, 3]), w=1.0)
    assert x.shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match='3, got 4'):
        model.sample(2, labels=torch.tensor([1, 4]))


# --- choice


@pytest.mark.parametrize('name', NAMES)
def test_small_is_chosen(tmp_path, name):
    system = load_system(name)
    mine = images(tmp_path, 20, (3, 28, 28))
    given = hold(pictures(20, (1, 24, 24)))
    for data in ('mnist', 'fashion_mnist', 'svhn', mine, given):
        preset, cfg = select(system, data)
        assert (preset, cfg.data) == ('small', data)
        if data in DATASETS:
            assert cfg.shape == DATASETS[data].shape
    assert select(system, 'cifar10')[0] != 'small'
    for data in ('cifar10', 'imagenet32'):
        assert select(system, data, 'small')[1].shape == (3, 32, 32)
    assert select(system, preset='small')[1] == system.presets['small']
    # fields that are replaced come last
    assert select(system, mine, over='{n_iters: 7}')[1].n_iters == 7
    sized = select(system, f'{mine}@1x16x16', over=dict(batch=3))[1]
    assert (sized.shape, sized.batch) == ((1, 16, 16), 3)


@pytest.mark.parametrize('name', NAMES)
def test_what_was_replaced(tmp_path, name):
    "A ledger line says the data and what was asked for, and the data say the rest."
    system = load_system(name)
    mine = images(tmp_path, 20, (3, 20, 20))
    for data, over, want in (
        ('mnist', {}, {}),
        ('svhn', {}, dict(data='svhn')),
        (mine, dict(n_iters=7), dict(data=mine, n_iters=7)),
    ):
        preset, cfg = select(system, data, 'small', over)
        base = asdict(base_of(system.presets, preset, cfg, system.fit_to))
        differs = {k: v for k, v in asdict(cfg).items() if v != base[k]}
        assert differs == want
        assert select(system, '', preset, differs)[1] == cfg  # the way back


@pytest.mark.parametrize('name', NAMES)
def test_small_is_listed(name):
    done = CliRunner().invoke(cli.app, ['presets', name])
    assert done.exit_code == 0
    line = next(o for o in done.output.splitlines() if 'small ' in f'{o} ' and 'yours' in o)
    assert '*' in line and 'mnist, yours' in line


def test_the_command_line_trains_a_folder(tmp_path):
    mine = images(tmp_path / 'mine', 20, (3, 18, 18))
    over = ', '.join(f'{key}: {value}' for key, value in QUICK['cdrl'].items())
    args = 'train', 'cdrl', '-p', 'dataset', mine, '-p', 'over', f'{{{over}}}'
    out = tmp_path / 'run'
    done = CliRunner().invoke(cli.app, [*args, '--out', str(out), '--device', 'cpu'])
    assert done.exit_code == 0, done.output
    config = json.loads((out / 'config.json').read_text())
    assert config['preset'] == 'small'
    assert (config['config']['shape'], config['config']['n_classes']) == ([3, 18, 18], 2)


# --- refusals


WRONG = [(1, 15, 15), (1, 8, 8), (3, 64, 64), (2, 16, 16), (4, 32, 32), (3, 16, 33)]


@pytest.mark.parametrize('shape', [*WRONG, (2,)], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_other_pictures_are_refused(name, shape):
    x = pictures(20, shape).float() / 255 - 1 if len(shape) == 1 else pictures(20, shape)
    with pytest.raises(ValueError, match='16 to 32 pixels') as error:
        select(load_system(name), hold(x))
    said = str(error.value)
    assert str(shape) in said and '\n' not in said
    assert ('folder:PATH@32' if len(shape) == 3 else 'other data') in said


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_of_other_sizes_is_told_how(tmp_path, name):
    mine = images(tmp_path, 20, (3, 48, 40))
    choose = partial(select, load_system(name))
    with pytest.raises(ValueError, match=f"'{mine}@32' converts them"):
        choose(mine)
    assert choose(f'{mine}@32')[1].shape == (3, 32, 32)
    with pytest.raises(ValueError, match='16 to 32 pixels'):
        choose(f'{mine}@64')
    with pytest.raises(FileNotFoundError, match='no folder'):
        choose(f'folder:{tmp_path}/nowhere')
    with pytest.raises(ValueError, match='choose another preset'):
        choose('celeba64', 'small')


def test_systems_without_small_ask_for_a_preset(tmp_path):
    mine = images(tmp_path, 20, (3, 32, 32))
    for name in ('foundations', 'nerf_lebm', 'selfsup'):
        with pytest.raises(ValueError, match='which preset.*name one'):
            select(load_system(name), mine)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_small_learns_from_a_tensor(tmp_path, name):
    few = dict.fromkeys(('n_iters', 'pretrain', 'n_pre', 'n_vae', 'n_enc', 'n_infer'), 3)
    over = {
        key: n for key, n in few.items() if hasattr(load_system(name).presets['small'], key)
    }
    x = pictures(64, (3, 32, 32))
    model = ebmbook.train(name, x, over=over, out=tmp_path, progress=False, device='cpu')
    check_trained(model, (3, 32, 32))
    assert model.cfg.batch == load_system(name).presets['small'].batch
