"Arrays as people pass them: each gives the right number, or a refusal that says what to do."

import math
import types
import warnings

import numpy as np
import pytest
import torch

from ebmbook import checks, measure
from ebmbook.data import Examples, as_examples, log_density
from ebmbook.mcmc import (
    Rates,
    Trace,
    adapt,
    ais,
    alternate,
    ess,
    grid_log_z,
    hmc,
    in_chunks,
    langevin,
    langevin_step,
    leapfrog,
    log_mean_exp,
    mala,
    recall,
    rhat,
    tempered,
    ula,
    uniform,
    variance_after,
)
from ebmbook.measure import restoration

BYTES = (
    torch.arange(768).view(1, 3, 16, 16).remainder(256).to(torch.uint8).repeat(24, 1, 1, 1)
)
OTHER = BYTES.roll(1, -1)
FLOATS, OTHER_FLOATS = (x / 127.5 - 1 for x in (BYTES, OTHER))
WANT = 10 * math.log10(255**2 / (BYTES.double() - OTHER.double()).square().mean().item())

# Images: name -> what is given for the bytes, and why not if it is refused
IMAGES = {
    'uint8': (BYTES, ''),
    'int64': (BYTES.long(), ''),
    'int16': (BYTES.short(), ''),
    'int32, numpy': (BYTES.int().numpy(), ''),
    'uint8, numpy': (BYTES.numpy(), ''),
    'float32': (FLOATS, ''),
    'float64': (FLOATS.double(), ''),
    'float32, numpy': (FLOATS.numpy(), ''),
    'not contiguous': (FLOATS.mT.contiguous().mT, ''),
    'with a gradient': (FLOATS.clone().requires_grad_(), ''),
    'reversed, numpy': (FLOATS.numpy()[::-1], ''),
    'in [0, 1]': (BYTES / 255, '2 [*] x - 1'),
    'bright': (BYTES / 255 * 0.92, '2 [*] x - 1'),
    'floats to 255': (BYTES.float(), '127.5'),
    'int16, scaled': (BYTES.short() * 128, 'neither bytes'),
    'below zero': (BYTES.long() - 128, 'neither bytes'),
    'bool': (BYTES > 9, 'bool'),
    'complex': (FLOATS * 1j, 'complex'),
    'NaN': (FLOATS.masked_fill(BYTES == 7, math.nan), 'NaN'),
    'infinite': (FLOATS.masked_fill(BYTES == 7, math.inf), 'NaN or infinite'),
    'a list': (FLOATS.tolist(), 'list'),
    'one image': (FLOATS[0], 'images'),
    'none': (FLOATS[:0], 'images'),
    'channels last': (FLOATS.permute(0, 2, 3, 1), 'images'),
}


BRIGHT = ('in [0, 1]', 'bright')  # which pictures of [-1, 1] may be
LOOKED_AT = [
    *((name, call) for name in IMAGES for call in ('to_uint8', 'psnr', 'ssim')),
    # `to_uint8` is all that it does with those that are right
    *((name, 'evaluate_images') for name, (_, why) in IMAGES.items() if why),
]


@pytest.mark.parametrize('name, call', LOOKED_AT)
def test_images(name, call):
    x, why = IMAGES[name]
    if call == 'evaluate_images':
        pytest.importorskip('torch_fidelity')

    def run():
        if call == 'to_uint8':
            return measure.to_uint8(x)
        if call == 'evaluate_images':
            return measure.evaluate_images(x, BYTES, 'digits')
        return getattr(measure, call)(x, OTHER)

    if name in BRIGHT and call in ('psnr', 'ssim'):
        with pytest.warns(UserWarning, match=f'x: .*{why}'):
            found = run()
        same = (x + 1) * 127.5  # the right number of what is given, to half a level
        assert found == pytest.approx(getattr(measure, call)(same.byte(), OTHER), rel=0.01)
        return
    if why:
        with pytest.raises(ValueError, match=why):
            run()
        return
    want = dict(
        to_uint8=lambda: BYTES,
        psnr=lambda: pytest.approx(WANT, abs=1e-3),
        ssim=lambda: pytest.approx(measure.ssim(FLOATS, OTHER_FLOATS), abs=1e-5),
    )[call]()
    found = run()
    assert torch.equal(found, want) if isinstance(want, torch.Tensor) else found == want


@pytest.mark.parametrize('name', ['uint8', 'int64', 'int16', 'float32', 'float64'])
def test_examples(name):
    assert torch.allclose(Examples(IMAGES[name][0]).tensor(), FLOATS)
    as_examples(IMAGES[name][0], (3, 16, 16))


@pytest.mark.parametrize('name', ['int16, scaled', 'below zero', 'bool', 'floats to 255'])
def test_examples_refused(name):
    with pytest.raises(ValueError, match='give uint8'):
        as_examples(IMAGES[name][0])


# Starts of chains


def bowl(x):
    return x.square().sum(1) / 2


X = torch.linspace(-1, 1, 12).view(4, 3)
STARTS = {
    'numpy': (X.numpy(), TypeError, 'must be a tensor'),
    'a list': (X.tolist(), TypeError, 'must be a tensor'),
    'integers': (X.long(), TypeError, 'floating-point'),
    'NaN': (
        X.masked_fill(X > 0.9, math.nan),
        ValueError,
        'NaN or infinite values in 1 of 4',
    ),
    'infinite': (X * math.inf, ValueError, 'NaN or infinite values in 4 of 4'),
    'no axis': (X.sum(), ValueError, 'must number the chains'),
}
SAMPLERS = {
    'langevin': lambda x: langevin(bowl, x, ula(0.1), 2),
    'hmc': lambda x: hmc(bowl, x, 0.1, 2),
    'mala': lambda x: mala(bowl, x, 0.1, 2),
    'adapt': lambda x: adapt(mala, bowl, x, 0.1, 2),
}


@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_start_is_refused(sampler, start):
    x, kind, why = STARTS[start]
    with pytest.raises(kind, match=why):
        SAMPLERS[sampler](x)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_any_layout_and_no_chain(sampler):
    def end(x):
        torch.manual_seed(0)
        return SAMPLERS[sampler](x)

    def first(found):
        return found[0] if isinstance(found, tuple) else found

    assert torch.equal(first(end(X)), first(end(X.T.contiguous().T)))
    if sampler != 'adapt':
        assert first(end(X[:0])).shape == (0, 3)


def test_chains_that_some_loop_watches_are_its_own_affair():
    with checks.watching():
        assert langevin(bowl, X * math.nan, ula(0.1), 2).isnan().all()


def nothing(x):
    return bowl(x) * math.nan


CALLS = {
    'hmc, no energy': (lambda: hmc(nothing, X, 0.1, 2), 'NaN in 4 of 4 chains'),
    'adapt, no energy': (lambda: adapt(mala, nothing, X, 0.1, 2), 'NaN in 4 of 4 chains'),
    'adapt, nothing accepted': (
        lambda: adapt(lambda e, x, *a, **k: (x, torch.zeros(4)), bowl, X, 0.1, 5),
        'none of 5 proposals',
    ),
    'half precision': (
        lambda: langevin(bowl, X.bfloat16() + 8, Rates(1e-4, 0.0), 9), 'rounds it away',
    ),
    'half precision, one step': (
        lambda: langevin_step(bowl, X.bfloat16() + 8, Rates(1e-4, 0.0)), 'rounds it away',
    ),
    'half precision, one step of blocks': (
        lambda: langevin_step(
            lambda x, z: bowl(x) + bowl(z), (X.half() + 99, X.half() + 99), ula(1e-6),
        ),
        'rounds it away',
    ),
    'one step to fewer': (
        lambda: langevin_step(bowl, X, ula(0.1), constrain=lambda x: x[:2]), 'what constrain',
    ),
    'half precision with noise': (
        lambda: langevin(bowl, X.half() + 99, ula(1e-6), 9), 'rounds it away',
    ),
    'half precision, hmc': (lambda: hmc(bowl, X.half() + 99, 1e-5, 2), 'rounds it away'),
    'recall': (lambda: recall(X, X[:, :2], 0.1), 'differ'),
    'log_mean_exp of nothing': (lambda: log_mean_exp(X[0, :0]), 'B >= 1'),
    'log_mean_exp of NaN': (lambda: log_mean_exp(X[0] * math.nan), 'NaN'),
    'log_mean_exp of a table': (lambda: log_mean_exp(X), r'\(B,\)'),
    'iwae of nothing': (lambda: measure.iwae(X[:, :0]), 'K >= 1'),
    'iwae of NaN': (lambda: measure.iwae(X * math.nan), 'NaN'),
    'pool -2': (lambda: restoration.pool((1, 8, 8), -2), 's must be at least 1'),
    'pool 0': (lambda: restoration.pool((1, 8, 8), 0), 's must be at least 1'),
    'bicubic 0': (lambda: restoration.bicubic_matrix(8, 0), 's must be at least 1'),
    'gaussian 0': (lambda: restoration.gaussian(5, 0), 'sigma must be finite and above 0'),
    'gaussian NaN': (lambda: restoration.gaussian(5, math.nan), 'sigma must be'),
    'no taps': (lambda: restoration.gaussian(0, 1.0), 'n must be at least 1'),
    'mask 2': (lambda: restoration.mask('random', (4, 4), keep=2), 'between 0 and 1'),
    'mask -1': (lambda: restoration.mask('random', (4, 4), keep=-1), 'between 0 and 1'),
    'integers to an operator': (
        lambda: restoration.operator('sr2', (1, 8, 8)).A(torch.ones(1, 1, 8, 8).long()),
        'expected floats',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', CALLS)
def test_a_call_is_refused(name):
    call, why = CALLS[name]
    with pytest.raises(ValueError, match=why):
        call()


LABELS = {'99': 99, '-1': -1, '10': 10, 'a half': 0.5, 'NaN': math.nan}


@pytest.mark.parametrize('name', LABELS)
def test_a_label_that_no_class_has(name):
    x = torch.zeros(5, 1, 8, 8)
    with pytest.raises(ValueError, match='whole numbers 0..9'):
        measure.class_accuracy(x, torch.full((5,), LABELS[name]), 'digits')
    assert 0 <= measure.class_accuracy(x, [9] * 5, 'digits') <= 1


def test_half_precision_moves_where_it_can():
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    assert (langevin(bowl, x, Rates(0.1, 0.0), 1) < x).all()
    at_rest = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert torch.equal(langevin(bowl, at_rest, Rates(0.1, 0.0), 3), at_rest)
    walls = dict(constrain=lambda x: x.clamp(-1, 1))
    assert torch.equal(langevin(lambda x: -bowl(x), x, Rates(0.1, 0.0), 3, **walls), x)
    assert torch.equal(langevin_step(lambda x: -bowl(x), x, Rates(0.1, 0.0), **walls), x)
    assert torch.equal(langevin_step(bowl, at_rest, Rates(0.1, 0.0)), at_rest)
    with checks.watching():  # a loop of somebody's training has its own watchdog
        assert torch.equal(langevin_step(bowl, x + 8, Rates(1e-5, 0.0)), x + 8)


def test_a_record_of_two_runs_measures_each_from_its_start():
    trace = Trace()
    for start in (X, X + 5):
        langevin(bowl, start, Rates(0.0, 0.0), 3, on_step=trace)
    assert torch.stack(trace.moved).eq(0).all() and len(trace.moved) == 6


# Devices without float64


class Elsewhere(torch.Tensor):
    "Numbers that say they lie on a device without float64."

    @property
    def device(self):
        return types.SimpleNamespace(type='mps')

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("MPS has no float64")


def elsewhere(x):
    return x.as_subclass(Elsewhere)


def test_runs_are_judged_on_every_device():
    bad = elsewhere(X.masked_fill(X > 0.9, math.nan))
    with pytest.warns(UserWarning, match='1 of 4 chains ended'):
        checks.tell_lost(elsewhere(X), bad)
    with pytest.warns(UserWarning, match='none of 20 proposals'):
        checks.tell_idle(elsewhere(torch.zeros(4)), 20, (0.1,))
    with pytest.warns(UserWarning, match='the step is 0'):
        checks.tell_idle(elsewhere(torch.ones(4)), 2, (0.0,))
    assert checks.finite_start((bad,)) == (bad,)  # before a chain nothing waits


ROWS = {  # shape -> where something that is no number lies
    (4,): (1,), (4, 3): (2, 0), (4, 3, 2, 2): (3, 1, 1, 0), (1, 5): (0, 4),
}  # fmt: skip


@pytest.mark.parametrize('shape', ROWS, ids=str)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_rows_that_hold_no_numbers(value, shape):
    x = torch.zeros(shape)
    assert not checks.infinite_rows(x).any() and len(checks.infinite_rows(x[:0])) == 0
    x[ROWS[shape]] = value
    assert checks.infinite_rows(x).nonzero().tolist() == [[ROWS[shape][0]]]


def test_float64_is_asked_where_it_is():
    log_w = torch.tensor([0.0, math.log(3)])
    with pytest.raises(TypeError, match='float64'):
        elsewhere(log_w).double()
    assert checks.in_double(elsewhere(log_w)).dtype == torch.float64
    assert log_mean_exp(elsewhere(log_w)) == pytest.approx(math.log(2))
    assert measure.iwae(elsewhere(log_w)).item() == pytest.approx(math.log(2))

    def away(x):
        return elsewhere(bowl(x))

    assert grid_log_z(away, 9.0, 90)[0] == pytest.approx(math.log(2 * math.pi), abs=1e-4)
    log_w = ais(away, away, X, [0, 0.5, 1], lambda e, x: x)[1]
    assert log_w.dtype == torch.float64 and log_w.abs().max() == 0
    x = torch.zeros(3, 2)
    want = log_density('gaussians25', x)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            'ebmbook.data.procedural.in_double', lambda x: asked.append(x) or x.double()
        )
        assert torch.equal(log_density('gaussians25', x), want) and asked
    pytest.importorskip('arviz')
    draws = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert ess(elsewhere(draws).detach()) == ess(draws)


def test_numbers_are_what_they_were():
    x = torch.from_numpy(np.linspace(-1, 1, 12)).view(4, 3)
    assert log_mean_exp(x[0]) == (torch.logsumexp(x[0], 0) - math.log(3)).item()


# Runs that return nothing of use

WEIRD = {  # calls that must be refused
    'a sampler of NaN weights': (
        lambda: ais(nothing, bowl, X, [0, 0.5, 1], lambda e, x: x), 'log weights are NaN in 4 of 4',
    ),
    'ais from NaN': (
        lambda: ais(bowl, bowl, X * math.nan, [0, 1], lambda e, x: x), 'NaN or infinite',
    ),
    'ais along NaN': (
        lambda: ais(bowl, bowl, X, [0, math.nan, 1], lambda e, x: x), 'betas must rise',
    ),
    'ais beyond 1': (lambda: ais(bowl, bowl, X, [0, 2, 1], lambda e, x: x), 'betas must rise'),
    'ais of fewer': (
        lambda: ais(bowl, bowl, X, [0, 0.5, 1], lambda e, x: x[:2]), 'what kernel returns',
    ),
    'constrain to fewer': (
        lambda: langevin(bowl, X, ula(0.1), 2, constrain=lambda x: x[:2]), 'what constrain returns',
    ),
    'tempered -1': (lambda: tempered(bowl, -1.0), 'beta must be finite and at least 0'),
    'tempered NaN': (lambda: tempered(bowl, math.nan), 'beta must be'),
    'leapfrog from NaN': (lambda: leapfrog(bowl, X * math.nan, X, 0.1, 2), 'NaN or infinite'),
    'variance of NaN': (lambda: variance_after(math.nan, 1.0, ula(0.1), 2), 'v0 must be'),
    'negative variance': (lambda: variance_after(-1.0, 1.0, ula(0.1), 2), 'v0 must be'),
    'negative precision': (lambda: variance_after(1.0, -1.0, ula(0.1), 2), 'precision must be'),
    'negative updates': (lambda: variance_after(1.0, 1.0, ula(0.1), -2), 'n_steps must be'),
    'NaN updates': (lambda: variance_after(1.0, 1.0, ula(0.1), math.nan), 'n_steps must be'),
    'ess of NaN': (lambda: ess(torch.zeros(9, 3) * math.nan), 'NaN or infinite'),
    'ess at rest': (lambda: ess(torch.ones(9, 3)), 'no chain in draws moves'),
    'ess of chains at rest': (lambda: ess(torch.randn(1, 3).expand(9, 3)), 'no chain in draws'),
    'ess of none': (lambda: ess(torch.ones(9, 0)), 'chains >= 1'),
    'rhat of one': (lambda: rhat(torch.randn(9, 1)), 'chains >= 2'),
    'rhat at rest': (lambda: rhat(torch.ones(9, 3)), 'no chain in draws moves'),
    'rhat of infinite': (lambda: rhat(torch.full((9, 3), math.inf)), 'NaN or infinite'),
    'log Z of NaN': (lambda: grid_log_z(nothing, 3.0, 9), 'log Z is nan'),
    'log Z of nothing': (lambda: grid_log_z(lambda x: bowl(x) + math.inf, 3.0, 9), 'log Z is -inf'),
    'chunks of another size': (lambda: in_chunks(lambda n: X[:1], 5, 2), r'draw\(2\) returned 1'),
    'fewer than no draws': (lambda: uniform(-1, X), 'n must be at least 0'),
    'alternate from NaN': (
        lambda: alternate(lambda a, b: bowl(a) + bowl(b), (X, X * math.nan), ula(0.1), 2),
        'NaN or inf',
    ),
    'alternate back': (
        lambda: alternate(lambda a, b: bowl(a) + bowl(b), (X, X), ula(0.1), -1), 'n_steps must be',
    ),
    'adapt no step': (lambda: adapt(mala, bowl, X, 0.1, 0), 'n_steps must be at least 1'),
    'adapt to NaN': (lambda: adapt(mala, bowl, X, 0.1, 3, target=math.nan), r'target must lie in'),
    'adapt from 0': (lambda: adapt(mala, bowl, X, 0.0, 3), 'step must be finite and above 0'),
    'adapt on infinity': (
        lambda: adapt(mala, lambda x: bowl(x) * 0 + math.inf, X, 0.1, 3), 'none of 3',
    ),
    'hmc at 0 degrees': (lambda: hmc(bowl, X, 0.1, 3, temp=0), 'temp must be finite and above 0'),
    'mala below 0 degrees': (lambda: mala(bowl, X, 0.1, 3, temp=-1), 'temp must be'),
    'mala of NaN': (lambda: mala(bowl, X, math.nan, 3), 'eta must be'),
    'a record of no update': (lambda: Trace(every=0), 'every must be at least 1'),
}  # fmt: skip


@pytest.mark.parametrize('name', WEIRD)
def test_a_run_is_refused(name):
    call, why = WEIRD[name]
    if name.split()[0] in ('ess', 'rhat'):
        pytest.importorskip('arviz')
    with pytest.raises(ValueError, match=why):
        call()


IDLE = {  # calls that return, and what they must say
    'langevin lost': (lambda: langevin(bowl, X, ula(3.0), 999), '4 of 4 chains ended'),
    'langevin without energy': (lambda: langevin(nothing, X, ula(0.1), 2), '4 of 4 chains'),
    'langevin of blocks': (
        lambda: langevin(lambda a, b: bowl(a) - bowl(b) ** 3, (X, X), ula(9.0), 99),
        'of 4 chains ended',
    ),
    'hmc of step 0': (lambda: hmc(bowl, X, 0.0, 3), 'the step is 0'),
    'mala of step 0': (lambda: mala(bowl, X, 0.0, 3), 'the step is 0'),
    'hmc of steps 0': (lambda: hmc(bowl, X, torch.zeros(4), 3), 'the step is 0'),
    'hmc too far': (lambda: hmc(bowl, X, 1e6, 20), 'none of 20 proposals was accepted'),
    'hmc at infinity': (
        lambda: hmc(lambda x: bowl(x) * 0 + math.inf, X, 0.1, 20),
        'none of 20 proposals was accepted',
    ),
}


@pytest.mark.parametrize('name', IDLE)
def test_a_run_says_that_it_was_for_nothing(name):
    call, says = IDLE[name]
    with pytest.warns(UserWarning, match=says) as said:
        call()
    assert {warning.filename for warning in said} == {__file__}  # where it was called
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with checks.watching():  # a loop asks by itself
            call()


def test_a_run_that_works_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n_steps in (0, 1, 30):
            langevin(bowl, X, ula(0.1), n_steps)
            hmc(bowl, X, 0.3, n_steps)
            mala(bowl, X, 0.1, n_steps)
        langevin(bowl, X, Rates(0.0, 0.0), 3)
        adapt(mala, bowl, X, 100.0, 30)
