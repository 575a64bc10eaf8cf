"""Options that nothing reads, and settings that do not go together: refused, with the right name.

Each line is a mistake that people make: a letter too few, a neighbour's word, an option of
another task, a setting that training has fixed.
"""

import pytest
import torch
from tiny import few_cars, settings
from typer.testing import CliRunner

from ebmbook.learn.settings import WrongOption
from ebmbook.shell import cli
from ebmbook.shell.systems import load_system


@pytest.fixture(scope='module')
def nets():
    "Fresh networks of a system's base, made once."
    made = {}

    def get(name, base='', **changes):
        key = name, base, tuple(changes.items())
        if key not in made:
            system = load_system(name)
            cfg = settings(system, base, **changes)
            found = system.of(cfg)
            made[key] = found, found.build(cfg).eval()
        return made[key]

    with few_cars():
        yield get


SAMPLES = {  # what is asked of `sample`, and what the answer names
    'cdrl': [
        (dict(n_levels=3), 'trained with it'),
        (dict(label=3), "did you mean 'labels'?"),
        (dict(step=3), "did you mean 'n_steps'?"),
        (dict(guidance=2.0), 'it takes: '),
    ],
    'coopflow': [
        (dict(n_step=3), "did you mean 'n_steps'?"),
        (dict(deltas=0.1), "did you mean 'delta'?"),
        (dict(temp=0.7), 'it takes: '),
    ],
    'vaebm': [
        (dict(temperature=0.7), "did you mean 'temp'?"),
        (dict(eta=1e-3), 'trained with it'),
        (dict(allone=True), "did you mean 'alone'?"),
    ],
    'ecvae': [
        (dict(chunks=5), "did you mean 'chunk'?"),
        (dict(tau=1.0), 'trained with it'),
    ],
    'liebm': [(dict(nsteps=5), "did you mean 'n_steps'?"), (dict(w=2.0), 'it takes: ')],
    'foundations': [(dict(chunksize=5), "did you mean 'chunk'?")],
    'nerf_lebm': [(dict(cam=1), 'it takes: ')],
}


@pytest.mark.parametrize('name', SAMPLES)
def test_sample(nets, name):
    system, own = nets(name)
    for options, words in SAMPLES[name]:
        with pytest.raises(WrongOption) as error:
            system.sample(own, 2, **options)
        assert f"takes no option '{next(iter(options))}'" in str(error.value)
        assert words in str(error.value), error.value


TASKS = [  # system, base, options of `evaluate`, the kind of error, what it names
    ('cdrl', '', dict(n=50, w=3.0), TypeError, "no option 'w'"),
    ('cdrl', 'images', dict(task='inpait'), KeyError, "did you mean 'inpaint'?"),
    ('cdrl', '', dict(task='inpaint'), ValueError, 'needs images'),
    ('coopflow', 'images', dict(task='bits', n_step=3), TypeError, 'it takes: n'),
    ('coopflow', 'images', dict(task='reconstruct', clamp=True), TypeError, "'clamps'"),
    ('coopflow', 'images', dict(task='bit'), KeyError, "did you mean 'bits'?"),
    ('vaebm', 'images', dict(task='ood', K=5), TypeError, "takes no option 'K'"),
    ('vaebm', 'images', dict(temperature=0.7), TypeError, "did you mean 'temp'?"),
    ('vaebm', '', dict(task='ood'), ValueError, 'needs images'),
    ('ecvae', 'images', dict(task='restore', weigth=1.0), TypeError, "'weight'?"),
    ('ecvae', '', dict(task='restore'), ValueError, 'needs images'),
    ('liebm', '', dict(task='odd'), KeyError, "did you mean 'ood'?"),
    ('liebm', '', dict(n_samples=3), TypeError, "takes no option 'n_samples'"),
    ('cdrl', 'images', dict(w=2.0, n=128), ValueError, 'strengthens labels'),
    (
        'ecvae',
        'images',
        dict(task='restore', inverse=True, tries=2),
        TypeError,
        'tries would',
    ),
    (
        'vaebm',
        '',
        dict(alone=True, n_steps=5),
        TypeError,
        'n_steps would do nothing beside',
    ),
    (
        'liebm',
        '',
        dict(task='ood', alone=True, gamma=1.0),
        TypeError,
        'gamma would do nothing',
    ),
    ('foundations', '', dict(N=3), TypeError, "takes no option 'N'"),
    ('selfsup', '', dict(neighbours=3), TypeError, "takes no option 'neighbours'"),
    ('nerf_lebm', '', dict(extractr='inception'), TypeError, "did you mean 'extractor'?"),
]


@pytest.mark.parametrize('name, base, options, kind, words', TASKS)
def test_evaluate(nets, name, base, options, kind, words):
    system, own = nets(name, base)
    with pytest.raises(kind) as error:
        system.evaluate(own, **options)
    assert words in str(error.value), error.value


RIVALS = [  # what a rival has not, and the paper's method has
    ('coopflow', 'images', 'shortrun', dict(task='bits'), 'bits'),
    ('ecvae', 'images', 'ebm', dict(task='posterior'), 'posterior'),
    ('ecvae', 'images', 'flow', dict(task='restore'), 'restore'),
]


@pytest.mark.parametrize('name, base, method, options, words', RIVALS)
def test_rivals(nets, name, base, method, options, words):
    system, own = nets(name, base, method=method)
    with pytest.raises((KeyError, ValueError)) as error:
        system.evaluate(own, **options)
    assert words in str(error.value), error.value


def test_energy(nets):
    system, own = nets('cdrl')
    with pytest.raises(WrongOption, match="did you mean 'labels'"):
        system.energy(own, torch.zeros(2, 2), label=3)


OVER = ('-p', 'preset', 'checkerboard', '-p', 'over')
COMMANDS = [  # what is typed, and what the one line of the answer names
    (('train', 'cdrl', *OVER, '{n_iter: 5}'), "did you mean 'n_iters'?"),
    (('train', 'cdrl', *OVER, '{n_iters: many}'), 'n_iters must be a whole number (at least 0)'),
    (('train', 'cdrl', '-p', 'preset', 'checkerbord'), "did you mean 'checkerboard'?"),
    (('train', 'cdrl', '-p', 'datset', 'digits'), 'dataset'),
    (('train', 'cdlr', '-p', 'preset', 'digits'), "did you mean 'cdrl'?"),
    (('train', 'coopflow', '-p', 'preset', 'spiral-T30', '-p', 'over', '{method: flwo}'),
     'method must be one of coopflow, flow, shortrun, coopnets'),
    (('cost', 'vaebm', '-p', 'preset', 'digits', '-p', 'over', '{method: gan}'),
     'method must be one of'),
    (('sample', 'selfsup', '-p', 'preset', 'digits'), 'selfsup draws no samples'),
    (('sample', 'cdrl', '-p', 'preset', 'checkerboard', '--w', 2), '--labels'),
    (('sample', 'cdrl'), 'which weights?'),
    (('evaluate', 'coopflow', '-p', 'preset', 'digits-pre', '--at', '{task: bits, n_step: 3}'),
     "takes no option 'n_step'"),
    (('evaluate', 'cdrl', '-p', 'preset', 'checkerboard', '--at', '{n: 50, w: 3.}'),
     "no option 'w'"),
    (('bench', 'nerf_lebm', '--preset', 'cars'), 'no chain of one state'),
    (('bench', 'coopflow', '--preset', 'spiral-T30', '--over', '{method: flow}'), 'no chain'),
    (('claims', '--only', 'no-such-claim'), 'no-such-claim'),
]  # fmt: skip


@pytest.mark.parametrize(
    'args, words', COMMANDS, ids=lambda value: ' '.join(map(str, value))
)
def test_commands(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    assert found.exit_code and len(lines) == 1 and words in lines[0], found.output
    assert not list(tmp_path.iterdir())  # nothing was begun
