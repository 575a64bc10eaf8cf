"""Checks of LIEBM's encoder.

Its losses against the package lightly, its presets at full size, and its training through
the loop of the book.
"""

import contextlib
import importlib.util
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ebmbook.data import load
from ebmbook.learn.blocks import count
from ebmbook.learn.contract import Context
from ebmbook.learn.log import read_log
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run, ship
from ebmbook.learn.settings import choose
from ebmbook.liebm import selfsup
from ebmbook.liebm.selfsup_presets import PRESETS
from ebmbook.mcmc import Rates, frozen, langevin

METHODS = ('simclr', 'byol', 'wmse')
TINY = replace(
    PRESETS['digits'],
    batch=32,
    w=32,
    widths=(4, 8),
    hidden=8,
    emb=4,
    n_iters=4,
    epoch=2,
    save_every=2,
    log_every=1,
)
needs_lightly = pytest.mark.skipif(
    importlib.util.find_spec('lightly') is None,
    reason='lightly is not installed; it serves as a cross-check only (pip install ebmbook[dev])',
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def views(n=64, d=8, seed=0):
    return torch.randn(2, n, d, generator=gen(seed))


def trained(cfg, folder, **options):
    run = open_run('selfsup', 'digits', cfg, out=folder, device='cpu')
    return train(selfsup.SYSTEM, cfg, run, progress=False, **options)


# --- against lightly


@needs_lightly
@pytest.mark.parametrize('temp', [0.1, 0.5, 1.0])
def test_nt_xent_is_lightlys(temp):
    from lightly.loss import NTXentLoss

    first, second = views()
    want = NTXentLoss(temperature=temp)(first, second).item()
    assert selfsup.nt_xent(first, second, temp).item() == pytest.approx(want, rel=1e-5)


@needs_lightly
def test_byol_is_lightlys():
    from lightly.loss import NegativeCosineSimilarity

    near = NegativeCosineSimilarity()
    guesses, targets = views(seed=1), views(seed=2)
    want = 2 + 2 * near(guesses[0], targets[0]).item()
    assert selfsup.norm_mse(guesses[0], targets[0]).item() == pytest.approx(want, rel=1e-5)
    want = 4 + 2 * (near(guesses[0], targets[1]) + near(guesses[1], targets[0])).item()
    loss = selfsup.byol_loss([*guesses], [*targets])
    assert loss.item() == pytest.approx(want, rel=1e-5)


@needs_lightly
def test_the_target_follows_as_lightlys():
    from lightly.models.utils import update_momentum

    online, theirs, mine = (torch.nn.Linear(3, 4) for _ in range(3))
    mine.load_state_dict(theirs.state_dict())
    update_momentum(online, theirs, m=0.9)
    selfsup.follow(mine, online, 0.9)
    for left, right in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-7)


@needs_lightly
def test_byol_schedule_is_lightlys():
    from lightly.utils.scheduler import cosine_schedule

    for k in range(11):
        want = cosine_schedule(k, 11, 0.99, 1.0)
        assert selfsup.momentum(k / 10) == pytest.approx(want, abs=1e-9)


@needs_lightly
@pytest.mark.parametrize('w', [64, 16])
def test_wmse_is_lightlys(w, monkeypatch):
    from lightly.loss.wmse_loss import Whitening2d, WMSELoss

    first, second = views()
    white = Whitening2d(8, eps=0.0, track_running_stats=False).train()
    assert torch.allclose(selfsup.whiten(first), white(first).view(64, 8), atol=1e-4)
    order = selfsup.uniform(64, first, gen()).argsort()
    monkeypatch.setattr(torch, 'randperm', lambda n: order)  # the same partition for both
    loss = WMSELoss(8, eps=0.0, w_size=w, track_running_stats=False).train()
    want = loss(torch.cat([first, second])).item()
    mine = selfsup.wmse_loss([first, second], w, generator=gen())
    assert mine.item() == pytest.approx(want, rel=1e-4)


@needs_lightly
def test_head_is_lightlys():
    from lightly.models.modules import SimCLRProjectionHead

    theirs, mine = SimCLRProjectionHead(512, 1024, 64), selfsup.Encoder((3, 32, 32))
    # lightly's linear layers have no bias where a batch norm follows
    assert count(theirs) == count(mine.head) + count(mine.last) - 1024 - 64


# --- presets

SIZES = {
    'cifar10': (64, 592_960),
    'imagenet32': (64, 592_960),
    'celeba64': (128, 658_560),
    'celebahq256': (128, 658_560),
}


@pytest.mark.parametrize('name', SIZES)
def test_presets_of_full_size(name):
    with torch.device('meta'):
        encoder = selfsup.Nets(PRESETS[name]).encoder
    emb, head = SIZES[name]
    assert PRESETS[name].emb == emb
    assert count(encoder.head) == head and count(encoder.last) == 2 * emb
    assert count(encoder.backbone) == (11_176_512 if name == 'celebahq256' else 11_168_832)


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_can_be_chosen_checked_and_sent(name):
    preset = PRESETS[name]
    cfg = choose(PRESETS, selfsup.DEFAULT_PRESET, preset.data, name, 'lr: 1e-3')[1]
    assert selfsup.check_config(cfg) == replace(preset, lr=1e-3)
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_full_network_learns_from_one_batch():
    "A ResNet-18 as it is, on images of 32 pixels."
    cfg = replace(PRESETS['cifar10'], batch=8)
    torch.manual_seed(0)
    nets, x = selfsup.build(cfg), 2 * torch.rand(8, 3, 32, 32, generator=gen()) - 1
    ctx = Context(step=0, frac=0.0, generator=gen())
    name, loss, logs = next(selfsup.losses(nets, dict(x=x), ctx))
    loss.backward()
    assert name == 'encoder' and math.isfinite(loss.item())
    assert loss.item() < math.log(15) + 2 and 0 <= logs['spread'] <= 1
    assert all(weight.grad is not None for weight in nets.parameters())


# --- training


def same(first, second):
    """Two checkpoints, to the last bit.

    Python's own generator serves libraries when they are first imported, and no part of a
    training.
    """
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = [key for key in first if key not in ('seconds', 'python')]
        return first.keys() == second.keys() and all(
            same(first[k], second[k]) for k in keys
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


class Enough(Exception):
    pass


def stop_behind_the_checkpoint(step, nets):
    if step == 3:
        raise Enough


CHANGES = [
    *(dict(method=method) for method in METHODS),
    dict(method='byol', n_views=3, ema=0.9),
    dict(method='wmse', w=16, w_iter=2),
]


@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_training_continues_to_the_last_bit(change, tmp_path):
    cfg = replace(TINY, **change)
    whole = trained(cfg, tmp_path / 'whole')
    with pytest.raises(Enough):
        trained(cfg, tmp_path / 'stopped', on_step=stop_behind_the_checkpoint)
    assert load_checkpoint(tmp_path / 'stopped')['step'] == 2
    stopped = trained(cfg, tmp_path / 'stopped')
    assert same(dict(whole.state_dict()), dict(stopped.state_dict()))
    assert same(*(load_checkpoint(tmp_path / run) for run in ('whole', 'stopped')))


def test_target_follows_by_epochs(tmp_path):
    "Within an epoch the momentum stays, between epochs it rises."
    seen, follow = [], selfsup.follow

    def watch(target, online, tau):
        seen.append(tau)
        follow(target, online, tau)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfsup, 'follow', watch)
        trained(replace(TINY, method='byol'), tmp_path)
    assert seen == [0.99, 0.99, pytest.approx(0.995), pytest.approx(0.995)]


@pytest.mark.parametrize('method', METHODS)
def test_weights_come_back_and_h_with_them(method, tmp_path):
    nets = trained(replace(TINY, method=method), tmp_path / 'run')
    x = load('digits', split='test').tensor(20)
    with contextlib.redirect_stdout(io.StringIO()):
        again = type(nets).from_pretrained(tmp_path / 'run/weights')
        half = type(nets).from_pretrained(ship(nets, tmp_path / 'book'))
    assert again.cfg == nets.cfg and same(dict(again.state_dict()), dict(nets.state_dict()))
    # another memory layout rounds otherwise
    places = selfsup.place(nets, x)
    assert torch.allclose(selfsup.place(again, x), places, atol=1e-5)
    assert F.cosine_similarity(selfsup.place(half, x), places).min() > 0.999
    run = open_run('selfsup', 'digits', nets.cfg, out=tmp_path / 'run')
    assert set(read_log(run, 'spread')[1])


def test_h_within_a_chain(tmp_path):
    "The gradient goes through the frozen encoder, and a chain finds a place on the sphere."
    nets = trained(replace(TINY, n_iters=20), tmp_path)
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    x = load('digits').tensor(40)
    aim = selfsup.place(nets, x[20:])

    def energy(x):
        return -(selfsup.latent(nets, x) * aim).sum(1)

    with frozen(nets):
        end = langevin(energy, x[:20], Rates(0.1, 0.0), 10)
    assert (energy(end) < energy(x[:20])).all()
    assert same(before, dict(nets.state_dict()))
    assert all(weight.grad is None for weight in nets.parameters())
    assert all(weight.requires_grad for weight in nets.encoder.parameters())


def test_training_beats_random_weights(tmp_path):
    cfg = replace(PRESETS['digits'], n_iters=60, drops=(12, 6))
    torch.manual_seed(0)
    random = selfsup.evaluate(selfsup.build(cfg), n_epochs=50)
    after = selfsup.evaluate(trained(cfg, tmp_path), n_epochs=50)
    assert after['knn'][0] > random['knn'][0]
    assert after['top1'][0] > random['top1'][0] + 0.05
