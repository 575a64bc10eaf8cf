"""Checks of LIEBM's encoder: its losses against the package lightly, its rows at full size, and its training through the loop of the book.

Numbers of checks refer to section 8 of the fact sheet on self-supervised encoders; 1 to 5, 7 and 9 are test cells of the encoder's page.
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

from ebmbook import selfsup as s
from ebmbook.core.config import choose
from ebmbook.core.nets import count
from ebmbook.core.runs import load_checkpoint, open_run, ship
from ebmbook.core.train import read_log, train
from ebmbook.data import load
from ebmbook.mcmc import Rates, frozen, langevin
from ebmbook.selfsup import PRESETS

METHODS = ('simclr', 'byol', 'wmse')
TINY = replace(PRESETS['digits'], batch=32, w=32, widths=(4, 8), hidden=8, emb=4, n_iters=4, epoch=2, save_every=2, log_every=1)
needs_lightly = pytest.mark.skipif(importlib.util.find_spec('lightly') is None, reason='lightly is not installed; it serves as a cross-check only (pip install ebmbook[dev])')

def gen(seed=0): return torch.Generator().manual_seed(seed)
def views(n=64, d=8, seed=0): return torch.randn(2, n, d, generator=gen(seed))
def trained(cfg, folder, **how): return train(s, cfg, open_run('selfsup', 'digits', cfg, out=folder, device='cpu'), progress=False, **how)


# --- against lightly

@needs_lightly
@pytest.mark.parametrize('temp', [.1, .5, 1.])
def test_nt_xent_is_lightlys(temp): # check 1
    from lightly.loss import NTXentLoss
    a,b = views()
    assert s.nt_xent(a, b, temp).item()==pytest.approx(NTXentLoss(temperature=temp)(a, b).item(), rel=1e-5)

@needs_lightly
def test_byol_is_lightlys():
    from lightly.loss import NegativeCosineSimilarity
    (p,q),(t,u),near = views(seed=1),views(seed=2),NegativeCosineSimilarity()
    assert s.norm_mse(p, t).item()==pytest.approx(2+2*near(p, t).item(), rel=1e-5)
    assert s.byol_loss([p, q], [t, u]).item()==pytest.approx(4+2*(near(p, u)+near(q, t)).item(), rel=1e-5)
    from lightly.models.utils import update_momentum
    a,b = (torch.nn.Linear(3, 4) for _ in range(2))
    c = torch.nn.Linear(3, 4)
    c.load_state_dict(b.state_dict())
    update_momentum(a, b, m=.9)
    s.follow(c, a, .9)
    assert all(torch.allclose(x, y, atol=1e-7) for x,y in zip(b.parameters(), c.parameters(), strict=True))

@needs_lightly
def test_byol_schedule_is_lightlys():
    from lightly.utils.scheduler import cosine_schedule
    for k in range(11): assert s.momentum(k/10)==pytest.approx(cosine_schedule(k, 11, .99, 1.), abs=1e-9)

@needs_lightly
@pytest.mark.parametrize('w', [64, 16])
def test_wmse_is_lightlys(w, monkeypatch):
    from lightly.loss.wmse_loss import Whitening2d, WMSELoss
    a,b = views()
    white = Whitening2d(8, eps=0., track_running_stats=False).train()
    assert torch.allclose(s.whiten(a), white(a).view(64, 8), atol=1e-4)
    order = s.uniform(64, a, gen()).argsort()                                 # the same partition for both
    monkeypatch.setattr(torch, 'randperm', lambda n: order)
    loss = WMSELoss(8, eps=0., w_size=w, track_running_stats=False).train()
    assert s.wmse_loss([a, b], w, generator=gen()).item()==pytest.approx(loss(torch.cat([a, b])).item(), rel=1e-4)

@needs_lightly
def test_head_is_lightlys():
    from lightly.models.modules import SimCLRProjectionHead
    theirs,ours = SimCLRProjectionHead(512, 1024, 64),s.Encoder((3, 32, 32))
    assert count(theirs)==count(ours.head)+count(ours.last)-1024-64 # lightly's linear layers have no bias where a batch norm follows


# --- rows

SIZES = {'cifar10': (64, 592_960), 'imagenet32': (64, 592_960), 'celeba64': (128, 658_560), 'celebahq256': (128, 658_560)}
@pytest.mark.parametrize('row', SIZES)
def test_rows_of_full_size(row): # check 6
    with torch.device('meta'): nets = s.Nets(PRESETS[row])
    emb,head = SIZES[row]
    assert PRESETS[row].emb==emb and count(nets.encoder.head)==head and count(nets.encoder.last)==2*emb
    assert count(nets.encoder.backbone)==(11_176_512 if row=='celebahq256' else 11_168_832)

@pytest.mark.parametrize('row', PRESETS)
def test_a_row_can_be_chosen_checked_and_sent(row):
    cfg = choose(PRESETS, s.DEFAULT_ROW, PRESETS[row].data, row, 'lr: 1e-3')[1]
    assert s.check_config(cfg)==replace(PRESETS[row], lr=1e-3) and pickle.loads(pickle.dumps(cfg))==cfg

def test_full_network_learns_from_one_batch(): # a ResNet-18 as it is, on images of 32 pixels
    cfg = replace(PRESETS['cifar10'], batch=8)
    torch.manual_seed(0)
    nets,x = s.build(cfg),2*torch.rand(8, 3, 32, 32, generator=gen())-1
    from ebmbook.core.train import Context
    name,loss,logs = next(s.losses(nets, dict(x=x), cfg, Context(step=0, frac=0., generator=gen())))
    loss.backward()
    assert name=='encoder' and math.isfinite(loss.item()) and loss.item()<math.log(15)+2 and 0<=logs['spread']<=1
    assert all(p.grad is not None for p in nets.parameters())


# --- training

def same(a, b): # two checkpoints, to the last bit; Python's own generator serves libraries when they are first imported, and no part of a training
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a if k not in ('seconds', 'python'))
    return all(map(same, a, b)) and len(a)==len(b) if isinstance(a, (list, tuple)) else a==b

@pytest.mark.parametrize('change', [dict(method=o) for o in METHODS] + [dict(method='byol', n_views=3, ema=.9), dict(method='wmse', w=16, w_iter=2)], ids=str)
def test_training_continues_to_the_last_bit(change, tmp_path):
    cfg = replace(TINY, **change)
    a = trained(cfg, tmp_path/'a')
    class Enough(Exception): pass
    def stop(step, nets):
        if step==3: raise Enough                                              # behind the checkpoint of step 2
    with pytest.raises(Enough): trained(cfg, tmp_path/'b', on_step=stop)
    assert load_checkpoint(tmp_path/'b')['step']==2
    b = trained(cfg, tmp_path/'b')
    assert all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert same(*(load_checkpoint(tmp_path/o) for o in 'ab'))

def test_target_follows_by_epochs(tmp_path): # check 5: within an epoch the momentum stays, between epochs it rises
    seen = []
    follow = s.follow
    def watch(target, online, tau):
        seen.append(tau)
        follow(target, online, tau)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(s, 'follow', watch)
        trained(replace(TINY, method='byol'), tmp_path)
    assert seen==[.99, .99, pytest.approx(.995), pytest.approx(.995)]

@pytest.mark.parametrize('method', METHODS)
def test_weights_come_back_and_h_with_them(method, tmp_path):
    nets,x = trained(replace(TINY, method=method), tmp_path/'run'),load('digits', split='test').tensor(20)
    with contextlib.redirect_stdout(io.StringIO()):
        again = s.Nets.from_pretrained(tmp_path/'run/weights')
        half = s.Nets.from_pretrained(ship(nets, tmp_path/'book'))
    assert again.cfg==nets.cfg and all(torch.equal(a, b) for a,b in zip(again.state_dict().values(), nets.state_dict().values(), strict=True))
    assert torch.allclose(s.place(again, x), s.place(nets, x), atol=1e-5) # another memory layout rounds otherwise
    assert F.cosine_similarity(s.place(half, x), s.place(nets, x)).min()>.999
    assert set(read_log(open_run('selfsup', 'digits', nets.cfg, out=tmp_path/'run'), 'spread')[1])

def test_h_within_a_chain(tmp_path): # the gradient goes through the frozen encoder to the image, and a chain finds a place on the sphere
    nets = trained(replace(TINY, n_iters=20), tmp_path)
    before,x = {k: o.clone() for k,o in nets.state_dict().items()},load('digits').tensor(40)
    aim = s.place(nets, x[20:])
    energy = lambda o: -(s.latent(nets, o)*aim).sum(1)
    with frozen(nets): end = langevin(energy, x[:20], Rates(.1, 0.), 10)
    assert (energy(end)<energy(x[:20])).all()
    assert all(torch.equal(o, before[k]) for k,o in nets.state_dict().items()) and not any(p.grad is not None for p in nets.parameters())
    assert all(p.requires_grad for p in nets.encoder.parameters())

def test_training_beats_random_weights(tmp_path): # check 8
    cfg = replace(PRESETS['digits'], n_iters=60, drops=(12, 6))
    torch.manual_seed(0)
    random,after = s.evaluate(s.build(cfg), cfg, n_epochs=50),s.evaluate(trained(cfg, tmp_path), cfg, n_epochs=50)
    assert after['knn'][0]>random['knn'][0] and after['top1'][0]>random['top1'][0]+.05
