"""Energies of one's own: resume, processes, five kinds, composition, refusals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ebmbook
from ebmbook.data.catalogue import load
from ebmbook.data.procedural import draw_points
from ebmbook.learn.compose import Energy, tempered
from ebmbook.learn.fit import fit, load_fitted
from ebmbook.learn.fit_methods import METHODS
from ebmbook.mcmc import grid_log_z, langevin, ula

QUICK = dict(n_iters=6, batch=16, progress=False, device='cpu')
SHORT = dict(n_steps=2)


def options(method, **more):
    chains = SHORT if method in ('pcd', 'cd', 'drl') else {}
    return QUICK | chains | (dict(buffer=64) if method == 'pcd' else {}) | more


def mlp(dim=2, width=16):
    torch.manual_seed(3)
    layers = nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(0)
    return nn.Sequential(*layers)


def points(n=200):
    return draw_points('checkerboard', n, torch.Generator().manual_seed(0))[0]


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 3))

    def forward(self, x, y):
        return self.net(x).gather(1, y[:, None])[:, 0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(1, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1]).squeeze(1)


def conv():
    layers = nn.Conv2d(1, 8, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 1)
    return nn.Sequential(*layers, nn.Flatten(0))


def examples(kind):
    "An energy, its data and its labels."
    if kind == 'points':
        return mlp(), points(), None
    if kind == 'images':
        return conv(), load('digits').x[:200], None
    if kind == 'sequences':
        return Recurrent(), torch.randn(200, 12, 1).cumsum(1), None
    if kind == 'labels':
        return Labelled(), points(), torch.arange(200) % 3
    return Energy(mlp()) + 0.5 * Energy(mlp(width=8)), points(), None


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('kind', ['points', 'images', 'sequences', 'labels', 'sum'])
def test_five_energies_by_every_method(kind, method, tmp_path):
    energy, data, labels = examples(kind)
    before = [own.clone() for own in energy.parameters()]
    fitted = fit(energy, data, method, labels=labels, **options(method))
    assert all(torch.equal(a, b) for a, b in zip(before, energy.parameters()))
    after = list(fitted.nets.net.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    samples = fitted.sample(5, n_steps=3)
    assert samples.shape == (5, *data.shape[1:]) and samples.isfinite().all()
    own = None if labels is None else labels[:5]
    assert fitted.energy(samples, own).shape == (5,)
    again = load_fitted(fitted.save(tmp_path / 'kept'), energy)
    assert torch.equal(again.sample(5, n_steps=3), samples)


def weights(folder):
    return load_file(Path(folder) / 'weights' / 'model.safetensors')


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one | two)


@pytest.mark.parametrize('method', METHODS)
def test_it_resumes_to_the_last_bit(method, tmp_path):
    more = options(method, save_every=2)

    def stop(step, nets):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), points(), method, out=tmp_path / 'cut', on_step=stop, **more)
    for name in ('cut', 'whole'):
        fit(mlp(), points(), method, out=tmp_path / name, **more)
    assert equal(weights(tmp_path / 'cut'), weights(tmp_path / 'whole'))


SCRIPT = '''
import sys, torch
sys.path.insert(0, {tests!r})
from test_fit import fit, mlp, options, points

def slow(step, nets):
    if step == 5 and {kill}:
        import os
        os.kill(os.getpid(), 9)

more = options('pcd', save_every=2)
fit(mlp(), points(), 'pcd', out={out!r}, on_step=slow, **more)
'''


def run(tmp_path, out, kill=False, processes=1):
    "A training in processes of its own; the exit status."
    text = SCRIPT.format(
        tests=str(Path(__file__).parent), out=str(tmp_path / out), kill=kill
    )
    script = tmp_path / f'{out}.py'
    script.write_text(text)
    launch = [
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc-per-node={processes}',
    ]
    line = [sys.executable, *(launch if processes > 1 else []), str(script)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.run(line, env=env, cwd=tmp_path, capture_output=True).returncode


def test_a_killed_run_goes_on(tmp_path):
    assert run(tmp_path, 'cut', kill=True) == -signal.SIGKILL
    assert run(tmp_path, 'cut') == 0
    fit(mlp(), points(), 'pcd', out=tmp_path / 'whole', **options('pcd', save_every=2))
    assert equal(weights(tmp_path / 'cut'), weights(tmp_path / 'whole'))


def test_two_processes_equal_one(tmp_path):
    assert run(tmp_path, 'two', processes=2) == 0
    fit(mlp(), points(), 'pcd', out=tmp_path / 'one', **options('pcd', save_every=2))
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_a_folder_is_of_one_energy_and_one_data_set(tmp_path):
    fit(mlp(), points(), 'nce', out=tmp_path, **options('nce'))
    with pytest.raises(ValueError, match='differs in data'):
        fit(mlp(), points() + 1, 'nce', out=tmp_path, **options('nce'))
    with pytest.raises(ValueError, match='differs in'):
        fit(mlp(), points(), 'dsm', out=tmp_path, **options('dsm'))


def test_minutes_are_kept_and_remembered(tmp_path):
    brief = {key: value for key, value in options('nce').items() if key != 'n_iters'}
    fitted = fit(mlp(), points(), 'nce', minutes=0.01, out=tmp_path, **brief)
    assert 10 < fitted.cfg.n_iters < 100_000
    again = fit(mlp(), points(), 'nce', minutes=0.02, out=tmp_path, **brief)
    assert again.cfg.n_iters == fitted.cfg.n_iters


def test_nce_learns_the_normaliser():
    fitted = fit(mlp(), points(5_000), 'nce', n_iters=800, progress=False, device='cpu')
    log_z, _ = grid_log_z(fitted.nets.net, 12.0, 100)
    assert abs(log_z - fitted.log_z) < 0.4


def test_energies_compose_and_are_sampled():
    one, two = (fit(mlp(), points(), 'nce', **options('nce')) for _ in range(2))
    both = tempered(one + 2 * two, 4.0)
    x = points(8)
    torch.testing.assert_close(both(x), (one.energy(x) + 2 * two.energy(x)) / 4)
    moved = langevin(both, x, ula(0.01), 3)
    assert moved.shape == x.shape and not torch.equal(moved, x)


def test_loaded_models_compose():
    one, two = ebmbook.load('vaebm/digits'), ebmbook.load('coopflow/digits-pre')
    x = one.sample(3, seed=0)
    both = one + 0.5 * two
    torch.testing.assert_close(both(x), one.energy(x) + 0.5 * two.energy(x))
    assert not both(x).requires_grad  # a graph only where it is asked for
    moved = langevin(both, x, ula(1e-4), 2)
    assert moved.shape == x.shape and not torch.equal(moved, x)


def test_wrong_words_are_refused_at_once():
    for call, words in (
        (lambda: fit(mlp(), points(), 'sm'), 'unknown method'),
        (lambda: fit(mlp(), points(), batchs=3), "did you mean 'batch'"),
        (lambda: fit(mlp(), points(), 'dsm', n_steps=3), "no option 'n_steps'"),
        (lambda: fit(mlp(3), points()), 'was called as E'),
        (lambda: fit(Labelled(), points()), 'was called as E'),
    ):
        with pytest.raises((KeyError, TypeError, ValueError), match=words):
            call()
