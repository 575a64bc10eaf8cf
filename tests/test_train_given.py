"`ebmbook.train`: the data that people have, the run of the command line, and what is refused."

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from tiny import BASES, digest
from torch.utils.data import Dataset, TensorDataset

import ebmbook
from ebmbook.data.catalogue import load, require
from ebmbook.data.examples import Examples
from ebmbook.data.held import held, hold
from ebmbook.shell.systems import load_system

QUICK = dict(progress=False, device='cpu')
TINY = dict(ch=8, init_ch=8, n_steps=2, n_iters=3, pretrain=2, head_start=0, batch=8)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cdrl(data, out, preset='digits-claim', **over):
    return ebmbook.train('cdrl', data, preset, over=TINY | over, out=out, **QUICK)


class Items(Dataset):
    "Items of any kind."

    def __init__(self, make, n=40):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


X = draw(40, 1, 8, 8)
Y = torch.arange(40) % 10


# --- every system


SYSTEMS = [
    (name, base)
    for name, bases in BASES.items()
    for base in bases
    if (name, base) not in {('liebm', 'wide'), ('nerf_lebm', '')}
]


@pytest.mark.parametrize(('name', 'base'), SYSTEMS, ids=map('-'.join, SYSTEMS))
def test_systems_learn_from_a_tensor(tmp_path, name, base):
    preset, over = BASES[name][base]
    cfg = load_system(name).presets[preset]
    spec = require(cfg.data)
    x = draw(40, *cfg.shape)
    y = None
    if spec.attributes:
        y = torch.arange(40)[:, None] % torch.arange(2, 2 + len(spec.attributes)) > 0
    elif spec.n_classes:
        y = torch.arange(40) % spec.n_classes
    data = x if y is None else (x, y.long())
    model = ebmbook.train(name, data, preset, over=over, out=tmp_path, **QUICK)
    assert model.cfg.data.startswith('given:') and not model.nets.training
    again = ebmbook.load(tmp_path, 'cpu')
    assert digest(again.nets) == digest(model.nets)
    assert (again.system.name, again.preset) == (name, preset)
    if model.system.sample is not None:
        assert model.sample(2, seed=0).shape == (2, *cfg.shape)


# --- kinds of data


def test_the_same_data_in_other_clothes(tmp_path):
    bytes_ = ((X + 1) * 127.5).round().byte()
    floats = bytes_.float() / 127.5 - 1
    kinds = {
        'bytes': bytes_,
        'floats': floats,
        'doubles': floats.double(),
        'pair': (bytes_, None),
        'examples': Examples(bytes_),
        'strided': torch.stack([floats, floats], -1)[..., 0],
        'tensors': TensorDataset(floats),
        'single': Items(lambda i: floats[i]),
        'dicts': Items(lambda i: dict(x=floats[i])),
    }
    found = {name: digest(cdrl(data, tmp_path / name).nets) for name, data in kinds.items()}
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize(
    'kind',
    ['pair', 'dataset', 'bytes', 'numbers', 'dicts', 'int32'],
)
def test_labels(tmp_path, kind):
    data = {
        'pair': (X, Y),
        'dataset': TensorDataset(X, Y),
        'bytes': TensorDataset(X, Y.byte()),
        'numbers': Items(lambda i: (X[i], i % 10)),
        'dicts': Items(lambda i: dict(x=X[i], y=Y[i])),
        'int32': (X, Y.int()),
    }[kind]
    whole = cdrl((X, Y), tmp_path / 'whole', 'digits-cond')
    assert digest(cdrl(data, tmp_path / 'a', 'digits-cond').nets) == digest(whole.nets)


def test_a_dataset_is_known_by_its_content(tmp_path):
    floats = X
    assert hold(TensorDataset(floats)) != hold(TensorDataset(-floats))
    drawn = Items(lambda i: floats[i] * torch.rand(()))
    assert hold(drawn) == hold(drawn)  # what is drawn anew has no content to go by
    cdrl(TensorDataset(floats), tmp_path / 'a')
    with pytest.raises(ValueError, match='differs in data'):
        cdrl(TensorDataset(-floats), tmp_path / 'a')
    attributes = Items(lambda i: (X[i], torch.tensor([i % 2, 1])))
    assert held(hold(attributes))[1].y.shape[1:] == (2,)


def test_labels_for_testing_are_like_the_others():
    three, five = torch.arange(len(X)) % 3, torch.arange(len(X)) % 5
    for test, words in (((X, five), 'reach 4'), (X, 'must have labels like')):
        with pytest.raises(ValueError, match=words):
            hold((X, three), test=test)


def test_examples_for_testing(tmp_path):
    model = cdrl(X, tmp_path / 'a')
    train, held_out = (load(model.cfg.data, split=split) for split in ('train', 'test'))
    assert torch.equal(held_out.tensor(), X[9::10]) and len(train) == 36
    how = dict(over=TINY, out=tmp_path / 'b', **QUICK)
    model = ebmbook.train('cdrl', X, 'digits-claim', test=-X[:7], **how)
    assert len(load(model.cfg.data)) == 40
    assert torch.equal(load(model.cfg.data, split='test').tensor(), -X[:7])
    found = model.evaluate('inpaint', n=3, n_steps=1)
    assert found['variety'].n == 3


def test_names_and_folders(tmp_path):
    from PIL import Image

    (tmp_path / 'images').mkdir()
    for i in range(20):
        Image.new('L', (8, 8), 10 * i).save(tmp_path / 'images' / f'{i}.png')
    model = cdrl(f'folder:{tmp_path / "images"}', tmp_path / 'a')
    assert model.cfg.data.startswith('folder:')
    how = dict(over=TINY, out=tmp_path / 'b', **QUICK)
    assert ebmbook.train('cdrl', 'digits', **how).preset == 'digits-cond'


def test_python_and_command_line_train_the_same(tmp_path):
    from test_cli import invoke

    over = str(TINY).replace("'", '')
    line = ('-p', 'preset', 'digits-cond', '-p', 'over', over, '--seed', '3')
    done = invoke('train', 'cdrl', *line, '--device', 'cpu', '--out', tmp_path / 'a')
    assert done.exit_code == 0, done.output
    how = dict(preset='digits-cond', over=TINY, seed=3, **QUICK)
    model = ebmbook.train('cdrl', out=tmp_path / 'b', **how)
    assert digest(model.nets) == digest(ebmbook.load(tmp_path / 'a', 'cpu').nets)
    assert (tmp_path / 'a' / 'config.json').read_text() == (
        tmp_path / 'b' / 'config.json'
    ).read_text()
    # and either goes on where the other stopped
    again = ebmbook.train('cdrl', out=tmp_path / 'a', **how)
    assert digest(again.nets) == digest(model.nets)


def test_an_interrupted_training_goes_on(tmp_path):
    def stop(step, nets):
        if step == 4:
            raise RuntimeError('power failure')

    over = TINY | dict(n_iters=6, save_every=2)
    how = dict(preset='digits-claim', over=over, **QUICK)
    whole = ebmbook.train('cdrl', X, out=tmp_path / 'whole', **how)
    with pytest.raises(RuntimeError, match='power failure'):
        ebmbook.train('cdrl', X, out=tmp_path / 'cut', on_step=stop, **how)
    steps = []
    again = ebmbook.train(
        'cdrl', X, out=tmp_path / 'cut', on_step=lambda step, _: steps.append(step), **how
    )
    assert digest(again.nets) == digest(whole.nets) and 0 < len(steps) < 6
    assert asdict(again.cfg) == asdict(whole.cfg)
    with pytest.raises(ValueError, match='differs in data'):
        ebmbook.train('cdrl', -X, out=tmp_path / 'cut', **how)


def test_another_process_has_not_the_data(tmp_path):
    cdrl(X, tmp_path)
    code = (
        f'import ebmbook; model = ebmbook.load({str(tmp_path)!r}, "cpu"); model.sample(2)\n'
        'try: model.evaluate("inpaint", n=2)\n'
        'except ValueError as error: print(error)'
    )
    run = [sys.executable, '-c', code]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ)
    assert 'another process was given; give them here too' in done.stdout, done.stderr


# --- what is refused


@pytest.mark.parametrize(
    ('data', 'words'),
    [
        ((X + 1) / 2, 'look like images in [0, 1], expected [-1, 1]'),
        ((X + 1) * 127.5, 'reach to 255'),
        (X * 1.5, 'scale them'),
        (X.masked_fill(X > 0.999, float('nan')), 'NaN or infinite'),
        (X[0], 'images (N, C, H, W) or points (N, d)'),
        (X[:, :, :4], 'the examples have shape (1, 4, 8)'),
        (X.permute(0, 2, 3, 1), 'the examples have shape (8, 8, 1)'),
        (X[:0], 'got (0, 1, 8, 8)'),
        (X[:1], 'too few'),
        (X > 0, 'bytes'),
        (((X + 1) * 1000).long(), 'bytes'),
        (X.to(torch.complex64), 'real numbers'),
        (X.flatten(1), 'the examples have shape (64,)'),
        (X.numpy(), 'got ndarray'),
        ([X], 'got list'),
        ((X, Y.numpy()), 'torch.as_tensor'),
        ((X, Y, Y), 'a pair of a tensor and labels'),
        ((X, Y[:5]), 'labels of 40 examples'),
        ((X, Y.float()), 'give y.long()'),
        ((X, Y - 1), 'count from 0'),
        ((X, torch.full((40, 2), 2)), '0 or 1'),
        ((X, torch.nn.functional.one_hot(Y)[None]), 'labels of 40 examples'),
        (Items(lambda i: X[i], n=0), 'no example'),
        (Items(lambda i: X[i].numpy()), 'gives ndarray for an example'),
        (Items(lambda i: (X[i] + 1) / 2), 'look like images in [0, 1]'),
        ('digit', "did you mean 'digits'"),
        ('folder:', 'names no folder'),
        ('folder:nowhere', 'nowhere'),
        ('given:123456789abc', 'another process'),
        ('cifar10', "preset 'digits-claim' belongs to"),
    ],
)
def test_wrong_data(tmp_path, data, words):
    with pytest.raises((ValueError, TypeError, KeyError, FileNotFoundError)) as error:
        cdrl(data, tmp_path / 'a')
    assert words in str(error.value)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(preset=''), '16 to 32 pixels'),
        (dict(preset='digit'), "did you mean 'digits'"),
        (dict(over=dict(n_iter=3)), "did you mean 'n_iters'"),
        (dict(over=dict(n_iters=0, pretrain=0)), 'nothing would be trained'),
        (dict(over='{n_iters: many}'), 'n_iters'),
        (dict(seed=-1), 'seed must be'),
        (dict(seed='3'), 'seed must be'),
        (dict(device='gpu'), "no device 'gpu'"),
        (dict(test=X[:, :, :4]), 'examples for testing have shape'),
        (dict(system='cdlr'), "did you mean 'cdrl'"),
        (dict(system='vaebm', preset='gaussians25'), 'the examples have shape'),
    ],
)
def test_wrong_options(tmp_path, options, words):
    how = dict(preset='digits-claim', over=TINY, out=tmp_path / 'a') | QUICK | options
    if 'system' in options:
        how.pop('over')
    with pytest.raises((ValueError, TypeError, KeyError)) as error:
        ebmbook.train(how.pop('system', 'cdrl'), X, **how)
    assert words in str(error.value)
    assert not (tmp_path / 'a').exists()


def test_folders_of_others_are_kept(tmp_path):
    (tmp_path / 'thesis.tex').write_text('mine')
    with pytest.raises(ValueError, match='not empty and holds no run'):
        cdrl(X, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']
