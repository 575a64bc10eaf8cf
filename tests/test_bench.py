"""The bench: candidates do the same work, the fast options sample the same law, and the numbers
have a shape that can be trusted.

Timings on a shared machine say little, so the ordinary tests compare them loosely;
`ebmbook bench` states the verdicts.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ebmbook.mcmc import bf16, frozen, langevin, ula
from ebmbook.shell import bench as B
from ebmbook.shell.bench_report import verdicts

ROOT = Path(__file__).resolve().parents[1]


# --- half precision does not change what is sampled


@pytest.fixture(scope='module')
def gaussian():
    "A Gaussian energy whose gradient runs through a matrix product, which autocast rounds."
    gen = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(8, 8, generator=gen))
    precision = (axes * torch.linspace(0.5, 4, 8)) @ axes.T
    half = nn.Linear(8, 8)
    half.weight.data = torch.linalg.cholesky(precision).T.contiguous()
    half.bias.data = -half.weight.data @ torch.linspace(-1, 1, 8)  # the mean is not zero
    return half.requires_grad_(False), precision, torch.linspace(-1, 1, 8)


def moments(energy, eta, n=20_000, steps=150):
    gen = torch.Generator().manual_seed(1)
    x = langevin(energy, torch.randn(n, 8, generator=gen), ula(eta), steps, generator=gen)
    assert x.dtype == torch.float32
    return x.mean(0), x.T.cov()


def test_bf16_samples_the_same_gaussian(gaussian):
    """Mean and covariance of bfloat16 and of float32 chains.

    They lie within five standard errors of the exact discrete law, and of each other.
    """
    half, precision, mean = gaussian
    eta = 0.1
    n = 20_000

    def energy(x):
        return half(x).float().square().sum(1) / 2

    exact = torch.linalg.inv(
        precision @ (torch.eye(8) - eta * precision / 2)
    )  # stationary covariance at this step
    assert (
        0 < (bf16(energy)(mean[None] + 1) - energy(mean[None] + 1)).abs().item()
    )  # autocast does round
    results = [moments(one, eta, n) for one in (energy, bf16(energy))]
    var = exact.diagonal()
    mean_error = (var / n) ** 0.5
    cov_error = ((var[:, None] * var + exact**2) / n) ** 0.5
    for found_mean, found_cov in results:
        assert ((found_mean - mean).abs() < 5 * mean_error).all()
        assert ((found_cov - exact).abs() < 5 * cov_error).all()
    assert ((results[0][0] - results[1][0]).abs() < 5 * mean_error).all()
    assert ((results[0][1] - results[1][1]).abs() < 5 * cov_error).all()


def test_a_bf16_state_would_lose_the_update():
    """Why the state stays in float32.

    What a paper's step adds to a pixel is below half of a bfloat16's last digit.
    """
    x = torch.ones(1, dtype=torch.bfloat16)
    assert (x - 1e-4 * torch.tensor(3.0, dtype=torch.bfloat16)).item() == 1.0
    assert (
        langevin(bf16(lambda x: 3 * x.sum(1)), torch.ones(1, 1), ula(1e-4, 0.0), 1).item()
        < 1.0
    )


def test_bf16_keeps_the_direction_of_an_image_gradient():
    case = B.vaebm_case(1 / 8, 4)

    def pull(energy):
        x = case.x.clone().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0].flatten(1)

    with frozen(case.net):
        exact = pull(case.net)
        rounded = pull(bf16(case.net))
    assert torch.cosine_similarity(exact, rounded).min() > 0.99
    assert abs((rounded.norm() / exact.norm()).item() - 1) < 0.02


# --- candidates

TINY = [
    lambda: B.vaebm_case(1 / 32, 2),
    lambda: B.cdrl_case(2, ch=8, mult=(1, 2), n_blocks=1, size=8),
    lambda: B.points_case(16, 8),
]


@pytest.mark.parametrize('make', TINY, ids=['vaebm', 'cdrl', 'points'])
def test_torchebm_runs_the_same_chain(make):
    pytest.importorskip('torchebm')
    case = make()
    ends = {}
    for name in ('float32', 'torchebm', 'torchebm, frozen'):
        with B.ARMS[name](case)() as run_chain:
            torch.manual_seed(3)
            ends[name] = run_chain()
    assert torch.allclose(ends['float32'], ends['torchebm'], atol=2e-6)
    assert torch.allclose(ends['float32'], ends['torchebm, frozen'], atol=2e-6)


@pytest.mark.parametrize('make', TINY[:2], ids=['vaebm', 'cdrl'])
def test_weights_are_normalised_once_per_chain(make):
    "Within the timed chain no parametrization runs; the other candidates run them at every step."
    case = make()
    counts = {}
    for name in ('float32', 'norm at each step', 'textbook loop', 'floor'):
        calls = []
        old = parametrize.ParametrizationList.forward

        def counted(self):
            calls.append(1)
            return old(self)

        with B.ARMS[name](case)() as run_chain:
            parametrize.ParametrizationList.forward = counted
            try:
                run_chain()
            finally:
                parametrize.ParametrizationList.forward = old
        counts[name] = len(calls)
    n = sum(parametrize.is_parametrized(m) for m in case.net.modules())
    assert counts['float32'] == counts['floor'] == 0
    assert counts['textbook loop'] == n * case.steps
    assert 0 < counts['norm at each step'] <= n * case.steps


def test_candidates_leave_the_original_alone():
    case = TINY[1]()
    before = {k: v.clone() for k, v in case.net.state_dict().items()}
    B.measure(case, 0.0, 3)
    assert all(torch.equal(v, before[k]) for k, v in case.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in case.net.parameters())


def test_a_missing_package_becomes_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchebm', None)
    monkeypatch.setitem(sys.modules, 'torchebm.core', None)
    rows = {o['arm']: o for o in B.measure(TINY[2](), 0.0, 3)}
    assert 'rounds' not in rows['torchebm'] and 'Error' in rows['torchebm']['note']
    assert not any(
        'torchebm' in o['must'] for o in verdicts(dict(rows=list(rows.values()), memory=[]))
    )


# --- the command


def ebmbook(*args):
    return subprocess.run(
        [sys.executable, '-m', 'ebmbook.shell.cli', *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )


def test_quick_bench_prints_lines_and_stores_nothing():
    def stored():
        return B.bench_path().read_bytes() if B.bench_path().is_file() else None

    before = stored()
    res = ebmbook('bench', '--quick', '--json', '--device', 'cpu')
    assert res.returncode == 0, res.stderr
    lines = [json.loads(o) for o in res.stdout.splitlines()]
    rows = [o for o in lines if 'arm' in o]
    assert {'VAEBM, width 4, batch 2', 'CDRL, batch 2', 'points, batch 64'} <= {
        o['case'] for o in rows
    }
    timed = [o for o in rows if 'rounds' in o]
    assert all(
        o['seconds'] > 0
        and o['floor'] > 0
        and o['threads'] >= 1
        and o['torch'] == torch.__version__
        for o in timed
    )
    assert [o['samples'] for o in lines if 'samples' in o] == [4, 8, 4]
    assert stored() == before


def test_the_stored_result_can_be_read():
    if not B.bench_path().is_file():
        pytest.skip('make bench has not been run in this clone')
    result = json.loads(B.bench_path().read_text())
    assert {o['case'] for o in result['rows']} >= {
        'VAEBM, width 32, batch 128',
        'VAEBM, width 64, batch 128',
        'VAEBM, width 128, batch 64',
        'CDRL, batch 1',
        'CDRL, batch 32',
    }
    assert not result['machine']['quick'] and result['memory'] and verdicts(result)


# --- timings, loosely; by hand on a quiet machine: python -m pytest -m timing tests/test_bench.py


@pytest.mark.timing
def test_langevin_is_near_its_floor():
    rows = {o['arm']: o for o in B.measure(B.vaebm_case(1 / 4, 16, 2), 20.0)}
    assert rows['float32']['floor'] < 1.2 and rows['float32, channels last']['floor'] < 1.2
    assert B.ratio(rows['textbook loop'], rows['float32']) > 1.2


@pytest.mark.slow
def test_compiled_or_a_reason():
    rows = {
        o['arm']: o
        for o in B.measure(
            B.points_case(64, 16, arms=('floor', 'compiled', 'compiled, bfloat16')), 0.0, 3
        )
    }
    for name in ('compiled', 'compiled, bfloat16'):
        assert 'rounds' in rows[name] or rows[name]['note']


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists('/proc/self/clear_refs'),
    reason='peak memory can be reset on Linux only',
)
def test_memory_is_flat_beyond_a_chunk():
    """A sample of eight chunks needs no more than one of one chunk.

    Drawn at once it needs several times as much.
    """
    chunked = [o['mb'] for o in B.memory((32, 256), 32)]
    whole = B.memory((256,), 0)[0]['mb']
    assert chunked[1] < 1.3 * chunked[0] and whole > 3 * chunked[0]


def test_a_process_that_ends_is_an_error(capfd):  # of a candidate that runs elsewhere
    with B._as_it_comes(replace(B.points_case(4, 4), key='none'), 'float32')() as run_chain:
        with pytest.raises(RuntimeError, match='has ended'):
            run_chain()
    assert 'KeyError' in capfd.readouterr().err
