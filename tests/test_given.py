"""What people give to trained networks, in all systems: right, or refused by name.

Shapes that would broadcast, other types and ranges, numbers that are none, masks and labels of
something else, options out of range. One message, of one line, that names the argument.
"""

import inspect
import math

import numpy as np
import pytest
import torch
from tiny import few_cars, settings

from ebmbook import cdrl, coopflow, ecvae, liebm, nerf_lebm, vaebm
from ebmbook.measure.restoration import operator
from ebmbook.shell.systems import load_system

NETS = {  # system, base, settings
    'foundations': ('foundations', '', {}),
    'coopflow': ('coopflow', 'images', {}),
    'coopflow, points': ('coopflow', '', {}),
    'cdrl': ('cdrl', 'images', {}),
    'cdrl, classes': ('cdrl', 'images', dict(n_classes=10)),
    'cdrl, points': ('cdrl', '', {}),
    'vaebm': ('vaebm', 'images', {}),
    'vaebm, points': ('vaebm', '', {}),
    'ecvae': ('ecvae', 'images', {}),
    'ecvae, colour': ('ecvae', 'colour', {}),
    'ecvae, points': ('ecvae', '', {}),
    'liebm': ('liebm', '', dict(method='erm')),
    'liebm, colour': ('liebm', 'colour', {}),
    'nerf_lebm': ('nerf_lebm', '', {}),
}


@pytest.fixture(scope='module')
def made():
    "Fresh networks, their system, and four examples, made once."
    kept = {}

    def get(name):
        if name not in kept:
            system_name, base, changes = NETS[name]
            whole = load_system(system_name)
            cfg = settings(whole, base, **changes)
            system = whole.of(cfg)
            source = torch.Generator().manual_seed(0)
            x = 2 * torch.rand(4, *cfg.shape, generator=source) - 1
            kept[name] = system, system.build(cfg).eval(), x
        return kept[name]

    with few_cars():
        yield get


def left(x):
    "A mask of the left half."
    half = torch.arange(x.shape[3]) < x.shape[3] // 2
    return half.expand(1, 1, *x.shape[2:])


CALLS = {name: {'energy': ('x', None)} for name in NETS if name != 'nerf_lebm'}
CALLS['vaebm']['log_score'] = 'x', lambda nets, x: vaebm.log_score(nets, x, k=2)
CALLS['vaebm, points']['log_score'] = CALLS['vaebm']['log_score']
CALLS['liebm']['anomaly'] = 'x', liebm.anomaly
CALLS['liebm, colour']['anomaly'] = 'x', liebm.anomaly
CALLS['coopflow']['explain'] = 'x', lambda nets, x: coopflow.explain(nets, x, n_iters=1)
CALLS['coopflow']['inpaint'] = (
    'x',
    lambda nets, x: coopflow.inpaint(nets, x, ~left(torch.zeros(1, 1, 8, 8)), n_iters=1),
)
CALLS['coopflow']['interpolate'] = (
    'first',
    lambda nets, x: coopflow.interpolate(nets, x, x, 3),
)
CALLS['cdrl']['sample'] = (
    'known.x',
    lambda nets, x: cdrl.sample(
        nets, 4, known=cdrl.Known(x, ~left(torch.zeros(1, 1, 8, 8)))
    ),
)
CALLS['liebm']['conditional'] = (
    'start',
    lambda nets, x: liebm.conditional(nets, torch.zeros(4, nets.h.cfg.emb), x),
)


def spoilt(x, value):
    "The last number of an example is another."
    x = x.clone()
    x[1].view(-1)[-1] = value
    return x


EXAMPLES = {  # what is given for the examples, and what the answer says
    'a list': (lambda x: x.tolist(), 'must be a tensor, got list'),
    'NumPy': (lambda x: x.numpy(), 'got ndarray'),
    'nothing': (lambda x: None, 'got NoneType'),
    'one': (lambda x: x[0], '[None] is a batch of one'),
    'flat': (lambda x: x.reshape(-1), 'must have shape (B, '),
    'an axis more': (lambda x: x[:, None], 'must have shape (B, '),
    'twice as wide': (lambda x: torch.cat([x, x], -1), 'must have shape (B, '),
    'one less': (lambda x: x[..., :-1], 'must have shape (B, '),
    'doubles': (lambda x: x.double(), 'to(torch.float32)'),
    'halves': (lambda x: x.half(), 'to(torch.float32)'),
    'bfloat16': (lambda x: x.bfloat16(), 'to(torch.float32)'),
    'integers': (lambda x: x.long(), 'torch.int64'),
    'bools': (lambda x: x > 0, 'torch.bool'),
    'bytes': (lambda x: (x * 127).byte(), 'torch.uint8'),
    'NaN': (lambda x: spoilt(x, math.nan), 'NaN or infinite values in 1 of 4'),
    'infinite': (lambda x: spoilt(x, -math.inf), 'NaN or infinite values in 1 of 4'),
    'elsewhere': (lambda x: x.to('meta'), "to('cpu')"),
}
PICTURES = {
    'other channels': (lambda x: torch.cat([x, x], 1), 'must have shape (B, '),
    'one pixel': (lambda x: x[..., :1, :1], 'must have shape (B, '),
    'channels last': (lambda x: x.permute(0, 2, 3, 1), 'must have shape (B, '),
    'to 255': (lambda x: (x + 1) * 127.5, '127.5'),
    'far off': (lambda x: 128 * x, 'scale pictures to [-1, 1]'),
}
# every change for one call with pictures and one with points: all ask one function
SOME = ('NumPy', 'one less', 'NaN')
WHOLE = {('cdrl', 'energy'): EXAMPLES | PICTURES, ('cdrl, points', 'energy'): EXAMPLES}
GIVEN = [
    (name, call, what)
    for name, calls in CALLS.items()
    for call in calls
    for what in WHOLE.get((name, call), SOME)
]


def asked(made, name, call):
    system, nets, x = made(name)
    word, fn = CALLS[name][call]
    return nets, x, word, fn or system.energy


@pytest.mark.parametrize('name, call, what', GIVEN)
def test_examples_are_refused_by_name(made, name, call, what):
    nets, x, word, fn = asked(made, name, call)
    change, says = (EXAMPLES | PICTURES)[what]
    with pytest.raises((TypeError, ValueError)) as error:
        fn(nets, change(x))
    message = str(error.value)
    assert message.startswith(word) and says in message and '\n' not in message, message


OF_PICTURES = [name for name in CALLS if name != 'foundations' and 'points' not in name]


@pytest.mark.parametrize('name', OF_PICTURES)
def test_examples_that_look_unscaled(made, name):
    "A warning and no more: a few pictures may be this bright."
    system, nets, x = made(name)
    with pytest.warns(UserWarning, match='look like images in .0, 1.'):
        found = system.energy(nets, (x - x.min()) / (x.max() - x.min()))
    assert found.isfinite().all()


@pytest.mark.parametrize('name', [name for name in CALLS if name != 'foundations'])
def test_examples_that_are_right_whatever_they_look_like(made, name):
    system, nets, x = made(name)
    want = system.energy(nets, x)
    assert want.isfinite().all()
    own = {
        'other strides': x.mT.contiguous().mT if x.ndim == 4 else x.T.contiguous().T,
        'with a gradient': x.clone().requires_grad_(),
        'a parameter': torch.nn.Parameter(x.clone()),
    }
    for value in own.values():
        found = system.energy(nets, value)
        assert torch.allclose(found, want, atol=1e-5)
        assert found.requires_grad == value.requires_grad  # a graph where it is asked for
        with torch.no_grad():
            assert not system.energy(nets, value).requires_grad
    assert system.energy(nets, x[:0]).shape == (0,)
    assert system.energy(nets, x[:1]).shape == (1,)
    assert system.energy(nets, 0 * x).isfinite().all()  # grey, as a constant picture may be


# --- masks

MASKS = {
    'floats': (lambda m: m.float(), TypeError, 'mask.bool()'),
    'bytes': (lambda m: m.byte(), TypeError, 'mask.bool()'),
    'NumPy': (lambda m: m.numpy(), TypeError, 'got ndarray'),
    'nothing': (lambda m: None, TypeError, 'got NoneType'),
    'no channel': (lambda m: m[:, 0], ValueError, 'must have shape (1 or 4, '),
    'narrow': (lambda m: m[..., 1:], ValueError, 'must have shape (1 or 4, '),
    'of three': (lambda m: m.repeat(3, 1, 1, 1), ValueError, 'must have shape (1 or 4, '),
    'two channels': (
        lambda m: m.repeat(1, 2, 1, 1),
        ValueError,
        'must have shape (1 or 4, ',
    ),
    'one pixel': (lambda m: m[..., :1, :1], ValueError, 'must have shape (1 or 4, '),
}
FILLS = {
    'cdrl': lambda nets, x, mask: cdrl.sample(nets, 4, known=cdrl.Known(x, mask)),
    'coopflow': lambda nets, x, mask: coopflow.inpaint(nets, x, mask, n_iters=1),
    'coopflow, explained': lambda nets, x, mask: (
        coopflow.explain(nets, x, mask=mask, n_iters=1).image
    ),
}


MASKED = [
    (name, what)
    for name in FILLS
    for what in MASKS
    if (name, what) != ('coopflow, explained', 'nothing')  # there all is known
]


@pytest.mark.parametrize('name, what', MASKED)
def test_masks_are_refused(made, name, what):
    _, nets, x = made(name.split(',')[0])
    change, kind, says = MASKS[what]
    with pytest.raises(kind, match='^mask') as error:
        FILLS[name](nets, x, change(left(x)))
    assert says in str(error.value)


@pytest.mark.parametrize('name', FILLS)
def test_what_a_mask_hides_is_not_looked_at(made, name):
    _, nets, x = made(name.split(',')[0])
    hidden = torch.where(left(x), x, math.nan)
    if name == 'coopflow, explained':
        hidden = hidden.nan_to_num()
    for mask in (left(x), left(x).repeat(4, 1, 1, 1)):
        found = FILLS[name](nets, hidden, mask)
        assert found.isfinite().all() and found.shape == x.shape
    with pytest.raises(ValueError, match='NaN'):
        FILLS[name](nets, torch.where(left(x), math.nan, x), left(x))


def test_a_mask_of_which_nothing_is_known(made):
    _, nets, x = made('coopflow')
    with pytest.raises(ValueError, match='mask is False everywhere'):
        coopflow.inpaint(nets, x, left(x) & ~left(x), n_iters=1)
    with pytest.raises(ValueError, match='x has shape'):
        coopflow.pixel_error(x, x[:, :, :1])


# --- labels and levels

LABELS = {
    'floats': (torch.ones(4), TypeError, 'labels.long()'),
    'bools': (torch.ones(4).bool(), TypeError, 'whole numbers from 0 to 10'),
    'a list': ([1, 2, 3, 4], TypeError, 'got list'),
    'a number': (3, TypeError, 'got int'),
    'NaN': (torch.full((4,), math.nan), TypeError, 'whole numbers'),
    '11': (torch.tensor([1, 2, 3, 11]), ValueError, 'from 0 to 10, got 11'),
    '-1': (torch.tensor([1, 2, 3, -1]), ValueError, 'from 0 to 10, got -1'),
    'too few': (torch.ones(3).long(), ValueError, '3 labels for 4'),
    'too many': (torch.ones(5).long(), ValueError, '5 labels for 4'),
    'three axes': (torch.ones(4, 1, 1).long(), ValueError, 'must have shape (4,)'),
    'no axis': (torch.tensor(3), ValueError, 'must have shape (4,)'),
}


@pytest.mark.parametrize('what', LABELS)
def test_labels_are_refused(made, what):
    system, nets, x = made('cdrl, classes')
    labels, kind, says = LABELS[what]
    for call in (
        lambda: system.energy(nets, x, labels=labels),
        lambda: system.sample(nets, 4, labels=labels),
    ):
        with pytest.raises(kind) as error:
            call()
        assert says in str(error.value)


def test_labels_of_other_whole_types_are_the_same(made):
    system, nets, x = made('cdrl, classes')
    labels = torch.tensor([0, 1, 5, 10])
    want = system.energy(nets, x, labels=labels)
    assert torch.equal(system.energy(nets, x, labels=labels.int()), want)
    with pytest.raises(ValueError, match=r'labels must have shape \(4,\)'):
        system.energy(nets, x, labels=labels[:, None].repeat(1, 2))
    plain, own, y = made('cdrl')
    with pytest.raises(ValueError, match='unconditional'):
        plain.energy(own, y, labels=labels)


@pytest.mark.parametrize('level', [-1, 99, 0.5, '0', True, None])
def test_a_level_that_is_not_there(made, level):
    system, nets, x = made('cdrl')
    with pytest.raises((TypeError, ValueError), match='^t must'):
        system.energy(nets, x, t=level)


# --- options

NUMBERS = {  # name -> what no function takes
    'n': [-1, 2.5, True, '3', None, math.nan],
    'chunk': [0, -1, 2.5, True, '3'],
    'n_steps': [-1, 2.5, True, '3', math.nan],
    'temp': [-1, math.nan, math.inf, 'x', True],
    'delta': [-1, 0, math.nan, math.inf, 'x'],
    'tweedie': [-1, math.nan, math.inf, 'x'],
    'gamma': [-1, math.nan, math.inf, 'x'],
    'w': [math.nan, math.inf, 'x'],
    'k': [0, -1, 2.5, '3'],
    'alone': [3, 'no', None],
    'propose': [3, 'no', None],
    'on_step': [3, 'x'],
    'on_level': [3],
    'generator': [0, np.random.default_rng(0), 'x'],
}
ASKED = [
    *((name, 'sample') for name in NETS),
    ('foundations', 'energy'),
    ('vaebm', 'log_score'),
    ('liebm', 'anomaly'),
]


def taken(name, call):
    system = load_system(NETS[name][0])
    return getattr(system, call, None) or getattr(globals()[NETS[name][0]], call)


def options():
    "All values where an option is met first, and one of each for the others."
    seen = set()
    for name, call in ASKED:
        for option in inspect.signature(taken(name, call)).parameters:
            values = NUMBERS.get(option, ())
            yield from (
                (name, call, option, value)
                for value in (values[:1] if option in seen else values)
            )
            seen.add(option)


@pytest.mark.parametrize('name, call, option, value', options())
def test_options_are_refused_by_name(made, name, call, option, value):
    _, nets, x = made(name)
    more = {} if option == 'n' else {option: value}
    first = x if call != 'sample' else value if option == 'n' else 2
    with pytest.raises((TypeError, ValueError), match=rf'\b{option}\b') as error:
        taken(name, call)(nets, first, **more)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', NETS)
def test_no_sample_and_numbers_of_libraries(made, name):
    system, nets, x = made(name)
    found = system.sample(nets, 0)
    assert found.shape == (0, *x.shape[1:])
    both = [system.sample(nets, n, generator=seeded()) for n in (2, np.int64(2))]
    assert torch.equal(*both)


def seeded():
    return torch.Generator().manual_seed(0)


# --- restoration

RESTORE = {
    'another operator': (dict(op='sr2', shape=(3, 8, 8)), 'op is made for pictures'),
    'a name': (dict(op='name'), "operator('sr4', shape), got str"),
    'pictures': (dict(y=lambda y: y.repeat(1, 1, 2, 2)), 'y must have shape (B, '),
    'doubles': (dict(y=lambda y: y.double()), 'y is torch.float64'),
    'NumPy': (dict(y=lambda y: y.numpy()), 'y must be a tensor'),
    'NaN': (dict(y=lambda y: spoilt(y, math.nan)), 'y holds NaN'),
    'sigma 0': (dict(sigma=0.0), 'sigma must be finite and above 0'),
    'sigma -1': (dict(sigma=-1.0), 'sigma must be at least 0'),
    'sigma NaN': (dict(sigma=math.nan), 'sigma must be at least 0 and finite'),
    'eta -1': (dict(eta=-1.0), 'eta must be above 0'),
    'n_steps -1': (dict(n_steps=-1), 'n_steps must be at least 0'),
    'n_steps 1.5': (dict(n_steps=1.5), 'n_steps must be'),
}


@pytest.mark.parametrize('what', RESTORE)
@pytest.mark.parametrize('name', ['ecvae', 'liebm'])
def test_restoration(made, name, what):
    _, nets, x = made(name)
    options, says = dict(RESTORE[what][0]), RESTORE[what][1]
    op = operator('sr2', x.shape[1:])
    y = options.pop('y', lambda y: y)(op.A(x))
    shape = options.pop('shape', x.shape[1:])
    asked_for = options.pop('op', '')
    if asked_for:
        op = asked_for if asked_for == 'name' else operator(asked_for, shape)
    restore = ecvae.restore if name == 'ecvae' else liebm.restore
    with pytest.raises((TypeError, ValueError)) as error:
        restore(nets, op, y, **options)
    assert says in str(error.value), error.value


@pytest.mark.parametrize('option, value', [('tries', 0), ('tries', 1.5), ('weight', -1.0)])
def test_restoration_of_ecvae(made, option, value):
    _, nets, x = made('ecvae')
    op = operator('sr2', x.shape[1:])
    with pytest.raises((TypeError, ValueError), match=f'{option} must'):
        ecvae.restore(nets, op, op.A(x), **{option: value})


def test_without_an_inference_model_nothing_is_restored(made):
    _, nets, x = made('liebm, colour')
    op = operator('sr2', x.shape[1:])
    with pytest.raises(ValueError, match='restore needs an inference model'):
        liebm.restore(nets, op, op.A(x))
    with pytest.raises(ValueError, match='conditional needs an inference model'):
        liebm.conditional(nets, x, x)


# --- codes, places and cameras


def test_places_on_the_sphere(made):
    _, nets, x = made('liebm')
    code = torch.zeros(4, nets.h.cfg.emb)
    for bad, says in (
        (code[:, :-1], 'code must have shape'),
        (code[:2], '2 places in code for 4 images'),
        (code.double(), 'code is torch.float64'),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            liebm.conditional(nets, bad, x)


CODES = {
    'short': (lambda z, c: ((z[0][:, 1:], z[1]), c), r'z\[0\] must have shape'),
    'long': (lambda z, c: ((z[0], z[1].repeat(1, 2)), c), r'z\[1\] must have shape'),
    'NaN': (lambda z, c: ((z[0], z[1] * math.nan), c), r'z\[1\] holds NaN'),
    'doubles': (lambda z, c: ((z[0].double(), z[1]), c), r'z\[0\] is torch.float64'),
    'unlike': (lambda z, c: ((z[0][:1], z[1]), c), '1 and 2 codes in z for 2'),
    'cameras': (lambda z, c: (z, c[:, :2]), 'c2w must have shape'),
    'one camera': (lambda z, c: (z, c[0]), 'c2w must have shape'),
    'too few': (lambda z, c: (z, c[:1]), '1 cameras in c2w'),
}


@pytest.mark.parametrize('what', CODES)
def test_codes_and_cameras(made, what):
    _, nets, _ = made('nerf_lebm')
    z = tuple(torch.zeros(2, n) for n in nets.cfg.nz)
    c2w = nerf_lebm.draw_cameras(nets, 2, seeded())
    assert nerf_lebm.draw_images(nets, z, c2w)[0].isfinite().all()
    change, says = CODES[what]
    with pytest.raises((TypeError, ValueError), match=says):
        nerf_lebm.draw_images(nets, *change(z, c2w))


VIEWS = {
    'one view': (lambda x, c: (x[:, 0], c), 'x must have shape'),
    'grey': (lambda x, c: (x[:, :, :1], c), 'x must have shape'),
    'bytes': (lambda x, c: (x.byte(), c), 'x is torch.uint8'),
    'to 255': (lambda x, c: ((x + 1) * 127.5, c), '127.5'),
    'NaN': (lambda x, c: (x * math.nan, c), 'x holds NaN'),
    'cameras': (lambda x, c: (x, c[:, :1]), 'c2w must have shape'),
    'too few': (lambda x, c: (x, c[:1]), '1 objects in c2w for 2 in x'),
    'no camera': (lambda x, c: (x, None), 'need the cameras'),
}


@pytest.mark.parametrize('what', VIEWS)
def test_views(made, what):
    _, nets, x = made('nerf_lebm')
    x = x.unflatten(0, (2, 2))
    c2w = nerf_lebm.draw_cameras(nets, 4, seeded()).unflatten(0, (2, 2))
    change, says = VIEWS[what]
    with pytest.raises((TypeError, ValueError), match=says):
        nerf_lebm.codes_of(nets, *change(x, c2w), n_steps=1)
    for mask in (x[:, :, :1, 1:] > 0, x[:, 0, :1] > 0):
        with pytest.raises(ValueError, match='mask must have shape'):
            nerf_lebm.codes_of(nets, x, c2w, mask=mask, n_steps=1)


# --- sizes of pictures that networks cannot have

SIZES = [  # system, base, settings, what the answer says
    ('coopflow', 'images', dict(shape=(1, 10, 10)), 'width 4 divides'),
    ('coopflow', 'images', dict(shape=(1, 6, 6)), 'width 4 divides'),
    ('coopflow', 'images', dict(shape=(1, 8, 1)), 'width 4 divides'),
    ('coopflow', 'images', dict(shape=(1, 8, 1), method='shortrun'), 'blocks=1 halve'),
    ('coopflow', 'images', dict(shape=(1, 8, 12), method='coopnets'), 'not square'),
    ('coopflow', 'images', dict(shape=(1, 12, 12), method='coopnets'), '4, 8, 16'),
    ('cdrl', 'images', dict(shape=(1, 8, 12)), 'not square'),
    ('cdrl', 'images', dict(shape=(1, 7, 7)), 'halved 1 times, as mult'),
    ('cdrl', 'images', dict(shape=(1, 1, 1)), 'halved 1 times, as mult'),
    ('vaebm', 'images', dict(shape=(1, 8, 12)), 'not square'),
]


@pytest.mark.parametrize('name, base, changes, says', SIZES)
def test_sizes_are_refused_with_the_settings(name, base, changes, says):
    size = 'x'.join(map(str, changes['shape']))
    with pytest.raises(ValueError) as error:
        settings(load_system(name), base, **changes, data=f'folder:/mine@{size}')
    assert says in str(error.value) and str(changes['shape']) in str(error.value)


@pytest.mark.parametrize('shape', [(1, 12, 8), (3, 8, 12), (1, 16, 8)])
@pytest.mark.parametrize('method', ['coopflow', 'flow', 'shortrun'])
def test_coopflow_of_other_pictures_than_squares(shape, method):
    system = load_system('coopflow')
    data = f"folder:/mine@{'x'.join(map(str, shape))}"
    cfg = settings(system, 'images', shape=shape, data=data, method=method)
    own = system.of(cfg)
    nets = own.build(cfg).eval()
    x = own.sample(nets, 2, generator=seeded())
    assert x.shape == (2, *shape) and x.isfinite().all()
    if own.energy is not None:
        assert own.energy(nets, x).shape == (2,)
