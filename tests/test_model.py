"The front door: what ships loads, draws, scores, measures, and is stored; the rest is refused."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ebmbook
from ebmbook.learn.runs import book_weights
from ebmbook.shell import model as shell_model

NAMES = list(ebmbook.models())
# the fewest numbers with which each task says something
FEW = {
    'cdrl': dict(compose=dict(n=8, n_steps=1), inpaint=dict(n=2, n_steps=1)),
    'coopflow': dict(reconstruct=dict(n=2, n_iters=2), bits=dict(n=16)),
    'ecvae': dict(posterior=dict(n=4), restore=dict(n=2, n_steps=2)),
    'liebm': dict(
        ood=dict(n=20),
        encoder=dict(n=20, n_epochs=1),
        features=dict(n=20),
        rebuild=dict(n=4),
        restore=dict(n=2),
    ),
    'nerf_lebm': dict(views=dict(n=2), swap=dict(n=2), pose=dict(n=4)),
    'vaebm': dict(ood=dict(n=20, k=1)),
}


@pytest.fixture(scope='module', params=NAMES)
def model(request):
    return ebmbook.load(request.param, 'cpu')


def data_of(model, n):
    from ebmbook.data.catalogue import load

    return load(model.cfg.data, split='test').tensor(n)


def test_what_ships_draws_and_scores(model):
    x = model.sample(4, seed=0)
    assert x.shape == (4, *model.cfg.shape) and x.isfinite().all()
    assert torch.equal(x, model.sample(4, seed=0))
    assert not torch.equal(x, model.sample(4, seed=1))
    for use in 'energy', 'anomaly':
        if use in model.system.uses(model.nets):
            found = getattr(model, use)(data_of(model, 4))
            assert found.shape == (4,) and found.isfinite().all()
        else:
            with pytest.raises(ValueError, match=f'has no {use}; it has: sample'):
                getattr(model, use)(data_of(model, 4))


def test_what_ships_restores(model):
    if 'restore' not in model.system.uses(model.nets):
        with pytest.raises(ValueError, match='has no restore.*; it has: sample'):
            model.restore(None, 'sr2')
        return
    from ebmbook.measure.restoration import operator

    op = operator('sr2', tuple(model.cfg.shape))
    y = op.A(data_of(model, 2))
    x = model.restore(y, 'sr2', seed=0, n_steps=2)
    assert x.shape == (2, *model.cfg.shape)
    assert torch.equal(x, model.restore(y, op, seed=0, n_steps=2))


def test_what_ships_is_stored_and_comes_back(model, tmp_path):
    again = ebmbook.load(model.save(tmp_path / 'a' / 'b'), 'cpu')
    assert (again.cfg, again.preset, again.card) == (model.cfg, model.preset, model.card)
    assert again.system.name == model.system.name
    assert torch.equal(again.sample(2, seed=3), model.sample(2, seed=3))
    assert not again.nets.training


def test_what_ships_says_what_it_is(model):
    said = repr(model)
    assert model.name in said and model.cfg.data in said and 'has: sample' in said
    assert len(said.splitlines()) == 3 and max(map(len, said.splitlines())) < 250
    assert model.name.partition('/')[2] == model.preset and model.card
    assert ebmbook.models()[model.name]


PAIRS = [(name, task) for name in NAMES for task in FEW[name.partition('/')[0]]]


@pytest.mark.parametrize(('name', 'task'), PAIRS, ids=map('-'.join, PAIRS))
def test_tasks(name, task):
    model = ebmbook.load(name, 'cpu')
    options = FEW[name.partition('/')[0]][task]
    if task not in model.system.measures(model.nets):
        with pytest.raises(ValueError, match=f'task {task!r} of'):
            model.evaluate(task, **options)
        return
    found = model.evaluate(task, **options)
    assert found and all(value == value for value, *_ in found.values())


def test_every_task_is_tried():
    for name in NAMES:
        model = ebmbook.load(name, 'cpu')
        tried = FEW[name.partition('/')[0]]
        assert set(model.system.measures(model.nets)) <= {'sample', *tried}, name


def test_the_cards_say_what_the_ledger_says():
    import yaml

    from ebmbook.shell.cards import card_of

    for name in NAMES:
        folder = book_weights(*name.split('/', 1))
        text = (folder / 'README.md').read_text(encoding='utf-8')
        assert text == card_of(folder), "make it again: ebmbook.shell.cards.write_cards()"
        head = yaml.safe_load(text.split('---')[1])
        assert head['license'] == 'apache-2.0' and name.split('/')[0] in head['tags']
        for part in ('Data:', 'Training:', 'Metrics', 'Use', 'Limits', 'citation'):
            assert part in text
        assert text.count('\n| sample |') + text.count('\n| compose') > 0
        assert ebmbook.load(name, 'cpu').card == text


# --- what is refused, and what a folder may be


@pytest.fixture
def stored(tmp_path):
    "A folder of weights."
    return ebmbook.load('cdrl/digits-cond', 'cpu').save(tmp_path / 'mine')


@pytest.mark.parametrize(
    ('ref', 'words'),
    [
        (
            'cdrl/digits-con',
            "unknown model 'cdrl/digits-con'; did you mean 'cdrl/digits-cond'",
        ),
        ('cdrl-digits-cond', "did you mean 'cdrl/digits-cond'"),
        ('CDRL/digits-cond', "did you mean 'cdrl/digits-cond'"),
        ('liebm/digit', "did you mean 'liebm/digits'"),
        ('', "unknown model ''"),
        ('mine', "A folder is written './mine'"),
    ],
)
def test_wrong_names(stored, monkeypatch, ref, words):
    monkeypatch.chdir(stored.parent)
    with pytest.raises(KeyError, match='unknown model') as error:
        ebmbook.load(ref)
    assert words in error.value.args[0]


def test_ways_to_name_a_folder(stored, monkeypatch):
    monkeypatch.chdir(stored.parent)
    monkeypatch.setenv('HOME', str(stored.parent))
    (stored.parent / 'below').mkdir()
    for ref in ('./mine', '~/mine', str(stored), stored, './below/../mine'):
        assert ebmbook.load(ref, 'cpu').preset == 'digits-cond'
    monkeypatch.chdir(stored.parent / 'below')
    assert ebmbook.load('../mine', 'cpu').system.name == 'cdrl'
    monkeypatch.chdir(stored)
    assert ebmbook.load('.', 'cpu').system.name == 'cdrl'


def spoilt(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda found: found.update(system='cdlr'), "did you mean 'cdrl'"),
        (lambda found: found.update(system='liebm'), 'holds no settings of liebm'),
        (lambda found: found['cfg'].update(ch=8), 'holds weights of other networks'),
        (lambda found: found['cfg'].update(chh=8), 'holds no settings of cdrl'),
        (lambda found: found['cfg'].update(ch='many'), 'ch'),
        (lambda found: found.pop('cfg'), 'holds no settings of cdrl'),
        (
            lambda found: (found.pop('system'), found.pop('cfg')),
            'does not say which system',
        ),
    ],
)
def test_settings_that_do_not_fit(stored, change, words):
    spoilt(stored / 'config.json', change)
    with pytest.raises(ValueError, match='config.json|model.safetensors') as error:
        ebmbook.load(stored, 'cpu')
    assert words in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[]', '[' * 100_000, '\0'])
def test_damaged_settings(stored, text):
    (stored / 'config.json').write_text(text)
    with pytest.raises(ValueError, match='config.json'):
        ebmbook.load(stored, 'cpu')


def test_weights_that_are_not_whole(stored):
    path = stored / 'model.safetensors'
    whole = path.read_bytes()
    for part in (whole[:100], whole[:-4], b'', b'\x80\x04pickle'):
        path.write_bytes(part)
        with pytest.raises(ValueError, match='damaged'):
            ebmbook.load(stored, 'cpu')
    path.rename(stored / 'pytorch_model.bin')  # safetensors only
    with pytest.raises(FileNotFoundError, match='model.safetensors is missing'):
        ebmbook.load(stored, 'cpu')


def test_folders_that_are_kept(stored):
    model = ebmbook.load(stored, 'cpu')
    with pytest.raises(FileExistsError, match='overwrite=True'):
        model.save(stored)
    assert model.save(stored, overwrite=True) == stored
    (stored / 'thesis.tex').write_text('mine')
    with pytest.raises(FileExistsError, match='holds other things .thesis.tex'):
        model.save(stored, overwrite=True)
    with pytest.raises(FileExistsError, match='is a file'):
        model.save(stored / 'thesis.tex')
    with pytest.raises(OSError, match='thesis.tex'):
        model.save(stored / 'thesis.tex' / 'below')


def test_a_wrong_device():
    with pytest.raises(ValueError, match="no device 'gpu'"):
        ebmbook.load('cdrl/digits-cond', 'gpu')


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda m: m.sample(4, steps=3), "no option 'steps'"),
        (lambda m: m.sample(4, n_step=3), "did you mean 'n_steps'"),
        (lambda m: m.sample(-1), 'n must be'),
        (lambda m: m.energy(torch.zeros(4, 1, 9, 9)), '(B, 1, 8, 8)'),
        (lambda m: m.energy(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)), 'torch.uint8'),
        (lambda m: m.energy([1, 2]), 'must be a tensor'),
        (lambda m: m.evaluate('smaple'), "did you mean 'sample'"),
        (lambda m: m.evaluate('sample', nn=3), "no option 'nn'"),
        (
            lambda m: m.anomaly(torch.zeros(1, 1, 8, 8)),
            'has no anomaly; it has: sample, energy',
        ),
        (lambda m: m.restore(torch.zeros(1, 1, 8, 8), 'sr2'), "evaluate(task='inpaint')"),
    ],
)
def test_wrong_questions(call, words):
    with pytest.raises((ValueError, TypeError, KeyError)) as error:
        call(ebmbook.load('cdrl/digits-cond', 'cpu'))
    assert words in str(error.value)


def test_operators_by_name():
    model = ebmbook.load('ecvae/digits', 'cpu')
    with pytest.raises(ValueError, match='unknown operator .sr3.; known: inpaint'):
        model.restore(torch.zeros(1, 1, 4, 4), 'sr3')


# --- the hub, which no test asks


def test_the_hub_is_not_asked_here():
    with pytest.raises(OSError, match='hf:nobody/nothing could not be fetched'):
        ebmbook.load('hf:nobody/nothing')


@pytest.mark.parametrize('ref', ['hf:', 'hf:one', 'hf:a/b/c', 'hf:a b/c', 'hf:/c'])
def test_wrong_names_of_the_hub(ref):
    with pytest.raises(ValueError, match='write hf:owner/name'):
        ebmbook.load(ref)


def test_the_hub_there_and_back(stored, monkeypatch):
    import shutil

    import huggingface_hub

    there = stored.parent / 'hub'

    class Api:
        def __init__(self, token=None):
            assert token == 'secret'

        def create_repo(self, repo, private, exist_ok):
            assert (repo, private, exist_ok) == ('me/digits', True, True)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, there)
            return f'address of {repo_id}'

    def fetch(repo, revision, allow_patterns):
        assert (repo, revision) == ('me/digits', 'v1')
        assert {path.name for path in there.iterdir()} == set(allow_patterns)
        return str(there)

    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    model = ebmbook.load(stored, 'cpu')
    said = model.push_to_hub('me/digits', private=True, token='secret')
    assert said == 'address of me/digits'
    again = ebmbook.load('hf:me/digits@v1', 'cpu')
    assert torch.equal(again.sample(2, seed=0), model.sample(2, seed=0))


def test_a_card_names_no_place_of_its_author(stored, tmp_path, monkeypatch):
    seen = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **options):
            pass

        def upload_folder(self, repo_id, folder_path):
            seen.append((Path(folder_path) / 'README.md').read_text(encoding='utf-8'))

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    model = ebmbook.load(stored, 'cpu')
    plain = replace(
        model, card=shell_model._plain_card(model.system, model.nets, model.name)
    )
    plain.push_to_hub('me/digits')
    assert str(stored) not in seen[0] and "load('hf:me/digits')" in seen[0]
    plain.save(tmp_path / 'other')
    text = (tmp_path / 'other' / 'README.md').read_text(encoding='utf-8')
    assert str(stored) not in text and str(tmp_path / 'other') in text


# what each has, as its chapter says
HAS = {
    'cdrl/checkerboard': 'sample energy',
    'cdrl/digits-cond': 'sample energy, inpaint',
    'cdrl/shapes-composition': 'sample energy, compose inpaint',
    'coopflow/digits-pre': 'sample energy, reconstruct bits',
    'coopflow/spiral-T100': 'sample energy, bits',
    'coopflow/spiral-T500': 'sample energy, bits',
    'coopflow/spiral-long': 'sample energy, bits',
    'ecvae/digits': 'sample energy restore, posterior restore',
    'ecvae/gaussians25': 'sample energy, posterior',
    'ecvae/shapes': 'sample energy restore, posterior restore',
    'liebm/digits': 'sample energy anomaly restore, ood encoder features rebuild restore',
    'liebm/digits-erm': 'sample energy anomaly restore, ood encoder features rebuild restore',
    'liebm/digits-plain': 'sample energy anomaly, ood features',
    'nerf_lebm/cars': 'sample, swap',
    'vaebm/digits': 'sample energy anomaly, ood',
    'vaebm/gaussians25': 'sample energy anomaly',
}


def test_what_ships_has_what_its_chapter_says():
    assert HAS.keys() == ebmbook.models().keys()
    for name, words in HAS.items():
        model = ebmbook.load(name, 'cpu')
        uses, _, tasks = words.partition(', ')
        assert model.system.uses(model.nets) == uses.split(), name
        assert model.system.measures(model.nets) == ['sample', *tasks.split()], name


# --- the package


def test_the_door_costs_nothing_until_it_is_used():
    code = (
        'import sys, ebmbook; assert "torch" not in sys.modules; '
        'assert {"load", "models"} <= set(dir(ebmbook)); ebmbook.load; '
        'assert "torch" in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ)
    with pytest.raises(AttributeError, match='no attribute .laod.'):
        ebmbook.laod


def test_the_seed_is_that_of_the_command_line(tmp_path):
    import numpy as np
    from test_cli import invoke

    out = tmp_path / 'x.npy'
    line = '-p preset spiral-T100 -n 3 --seed 5 --device cpu --out'.split()
    done = invoke("sample", "coopflow", *line, str(out))
    assert done.exit_code == 0, done.output
    x = ebmbook.load('coopflow/spiral-T100', 'cpu').sample(3, seed=5)
    assert np.array_equal(np.load(out), x.numpy())


def test_names_of_the_folders():
    for name in NAMES:
        system, _, preset = name.partition('/')
        assert book_weights(system, preset) is not None
