"""Checks of LIEBM that take too long for its notebooks, an iteration written out in plain PyTorch beside the chapter's, and the chapter run as a user runs it.

Numbers of checks refer to section 7 of the chapter's fact sheet. 1 to 8, 12, 13 and 16 are test cells of the chapter, as are 9 to 11 for a single loss; 14 is one of the page
of its networks, 15 of the page of metrics, and that codes have length one is one of the encoder's page.
Here are 9 to 11 through the loop of the book, 14 for whole rows, 15 for the scores of the chapter, and 17.
"""
import contextlib
import copy
import io
import itertools
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from chapters import ROOT, claims_can_be_measured, ends_without_data, trains_in_full
from ebmbook import liebm as l
from ebmbook.core.config import choose
from ebmbook.core.cost import seconds_per_iteration
from ebmbook.core.nets import count
from ebmbook.core.restoration import operator
from ebmbook.core.runs import load_checkpoint, open_run, ship
from ebmbook.core.train import Context, Diverged, _accelerator, optimiser_step, read_log, train
from ebmbook.data import foreign, load
from ebmbook.liebm import PRESETS, ROWS
from ebmbook.selfsup import Views, augment

TINY = replace(PRESETS['digits'], batch=8, n_steps=2, n_enc=4, n_iters=4, n_infer=4, save_every=2, log_every=1)
SHORT = replace(TINY, n_enc=0, n_infer=0)

@pytest.fixture(autouse=True)
def narrow(monkeypatch): # the digits row with few channels
    monkeypatch.setitem(ROWS, 'digits', ROWS['digits'] | dict(gen=(8, 8), blocks=(8, 16), convs=((3, 1, 8), (4, 2, 8)), features=16, hidden=8))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def run_of(cfg, folder): return open_run('liebm', 'digits', cfg, out=folder, device='cpu')
def trained(cfg, folder, **how): return train(l, cfg, run_of(cfg, folder), progress=False, **how)
def built(cfg, seed=0): # with an encoder whose batch norms have seen images, so that modes and ranges matter
    torch.manual_seed(seed)
    nets = l.build(cfg)
    if hasattr(nets, 'h'):
        with torch.no_grad(): [nets.h.encoder.train()(load('digits').tensor(64)*s) for s in (.3, .5, .8)]
    return nets


# --- the paper's rows

TABLE = { # Table 12, in its order, with the iterations that its epochs come to
    'cifar10':     dict(lr=1e-4, beta2=.999, lr_gen=2e-4, lr_inf=2e-4, ema=.9999, gamma=.01, gamma_ood=.1, batch=256, n_steps=15, step=25., w_match=1., w_data=.1, rho=1., unit=True, top='square', n_iters=97_500, method='em'),
    'imagenet32':  dict(lr=1e-4, beta2=.999, lr_gen=2e-4, lr_inf=2e-4, ema=.9999, gamma=.01, gamma_ood=.1, batch=256, n_steps=15, step=25., w_match=1., w_data=.1, rho=1., unit=False, top='square', n_iters=500_400, method='em'),
    'celeba64':    dict(lr=1e-4, beta2=.9, lr_gen=3e-4, lr_inf=1e-4, ema=.9999, gamma=.01, gamma_ood=.1, batch=256, n_steps=15, step=.1, w_match=70., w_data=1., rho=1., unit=False, top='linear', n_iters=190_500, method='erm'),
    'celebahq256': dict(lr=1e-4, beta2=.9, lr_gen=3e-4, lr_inf=1e-4, ema=.9999, gamma=.01, gamma_ood=1., batch=128, n_steps=15, step=.1, w_match=70., w_data=1., rho=50., unit=False, top='linear', n_iters=63_000, method='erm'),
}
OURS = dict(noise=1e-3, tau2=.5, p_aug=.1, clip=0., reg=0., posterior='cosine', view='augment', encoder='frozen', literal=False, norm=True, bias=False) # what the paper leaves open, as the sheet recommends
SIZES = { # parameters of generator, energy, inference model, and of the encoder without its head
    'cifar10': (4_276_739, 4_923_968, 15_208_064, 11_168_832), 'imagenet32': (16_024_579, 17_645_632, 15_208_064, 11_168_832),
    'celeba64': (12_220_675, 20_717_056, 15_210_752, 11_168_832), 'celebahq256': (34_276_995, 40_668_736, 8_064_512, 11_176_512),
}
@pytest.mark.parametrize('row', TABLE)
def test_rows_of_the_paper(row): # check 14
    cfg = PRESETS[row]
    assert {k: getattr(cfg, k) for k in TABLE[row] | OURS}==TABLE[row] | OURS
    assert (cfg.clamp, cfg.mirror)==(row=='cifar10', row.startswith('celeba'))
    other = PRESETS[row+('-em' if cfg.method=='erm' else '-erm')]
    assert replace(other, method=cfg.method)==cfg!=other
    with torch.device('meta'): nets = l.Nets(replace(cfg, method='erm', norm=False)) # the norm adds no parameters, and takes long to set up
    assert (count(nets.generator), count(nets.energy), count(nets.q), count(nets.h.encoder.backbone))==SIZES[row]
    assert nets.generator.unit==cfg.unit and nets.generator.latent==(256 if row=='celebahq256' else 128)
    with torch.device('meta'): assert not hasattr(l.Nets(replace(cfg, method='em', norm=False)), 'q')

def test_lengths_of_the_stages():
    lengths = lambda **o: [s.n_iters(replace(TINY, n_iters=6, **o)) for s in l.STAGES]
    assert lengths()==[4, 0, 6, 4] and lengths(method='erm')==[4, 0, 6, 0] and lengths(n_infer=0, n_post=5)==[4, 5, 6, 0]
    for o in ('joint', 'none'): assert lengths(encoder=o, n_infer=0)==[0, 0, 6, 0]
    assert [s.batch(TINY) for s in l.STAGES]==[256, 8, 8, 8] and [s.ema(TINY) for s in l.STAGES]==[0., .99, .99, .99]
    assert len({i if s.draws is None else s.draws for i,s in enumerate(l.STAGES)})==len(l.STAGES) # no two stages share their draws
    assert lengths(n_enc=-1)[0]==l.selfsup.PRESETS['digits'].n_iters

def test_rates_of_the_paper():
    for row,(b2,more) in dict(cifar10=(.999, 2e-4), celebahq256=(.9, 1e-4)).items():
        cfg = replace(PRESETS[row], method='erm', net='digits')
        groups = l.optimisers(built(replace(SHORT, method='erm')), cfg)
        assert [(k, g['lr'], g['betas'], g['weight_decay']) for k,o in groups.items() for g in o.optimiser.param_groups]==[
            ('generator', cfg.lr_gen, (0., .9), 0), ('generator', more, (0., .9), 0), ('energy', 1e-4, (0., b2), 0)]
        assert all(o.schedule(10**6)==1 and o.clip is None for o in groups.values())
    along = l.optimisers(built(replace(SHORT, encoder='joint')), replace(SHORT, encoder='joint'))['encoder'] # trained along, its rate neither rises nor falls
    assert [along.schedule(k) for k in (0, 10**6)]==[1, 1]

@pytest.mark.parametrize('row', PRESETS)
def test_a_row_can_be_chosen_checked_and_sent(row):
    cfg = choose(PRESETS, l.DEFAULT_ROW, PRESETS[row].data, row, 'gamma: 0.5')[1]
    assert l.check_config(cfg)==replace(PRESETS[row], gamma=.5) and pickle.loads(pickle.dumps(cfg))==cfg
    assert 0<=l.encoder_config(cfg).n_iters and l.encoder_config(cfg).shape==cfg.shape

def test_every_experiment_names_a_row():
    files = sorted((ROOT/'experiments').glob('liebm_*.yaml'))
    assert {o.stem.removeprefix('liebm_') for o in files}=={o for o in PRESETS if not o.endswith('-claim')}
    for o in files:
        said = yaml.safe_load(o.read_text())
        l.check_config(choose(PRESETS, l.DEFAULT_ROW, said['dataset'], said['preset'], said['over'])[1])

def test_every_claim_names_rows_and_metrics_that_exist():
    claims_can_be_measured(l, dict(n_steps=1), n=300, quick=dict(encoder=dict(n=20, n_epochs=1), ood=dict(n=20), restore=dict(n=4, n_steps=1, n_steps_y=1)))


# --- one iteration, written out; the paper's sign, where a likely image has a high value

LOOK = Views(scale=(.5, 1.), flip=False) # of the digits' encoder

def place(nets, x): # h, in evaluation mode; x in [-1, 1]
    h = copy.deepcopy(nets.h.encoder).eval().requires_grad_(False)
    z = h.last(h.head(h.backbone(((x+1)/2-h.mean)/h.std)))
    return z/z.norm(dim=1, keepdim=True)

def cosine(a, b): return (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1))

def likely(nets, u): # F(f(x)) and g(f(x)), modes as they are
    f = nets.energy.f(u)
    return (-f.square().sum(1)/2 if nets.energy.top is None else nets.energy.top(f)[:,0]), nets.energy.g(f)

def wide(u, cfg): return 2*u-1 if cfg.unit else u # to [-1, 1]

def climb(value, u, cfg, g, steps=None, clamp=None): # u uphill
    for _ in range(cfg.n_steps if steps is None else steps):
        u = u.detach().requires_grad_()
        slope, = torch.autograd.grad(value(u).sum(), u)
        u = (u+cfg.step/2*slope).detach()+cfg.noise*torch.randn(u.shape, generator=g)
        if cfg.clamp if clamp is None else clamp: u = u.clamp(0 if cfg.unit else -1, 1)
    return u.detach()

def seen(u, cfg, g): # v ~ V
    x = wide(u, cfg)
    if cfg.view=='augment': x = augment(x, LOOK, g)
    else: x = 2*(255/256*(x+1)/2+torch.rand(x.numel(), generator=g).view_as(x)/256)-1
    return (x+1)/2 if cfg.unit else x

def by_hand(nets, x, cfg, g): # one iteration: (group, loss), yielding like `losses`
    n = len(x)
    if cfg.mirror: x = torch.stack([o.flip(-1) if k else o for o,k in zip(x, torch.rand(n, generator=g)<.5)])
    u = (x+1)/2 if cfg.unit else x
    z = place(nets, wide(seen(u, cfg, g), cfg)).detach()
    m = torch.randn(n, nets.generator.latent, generator=g)
    nets.train()
    made = nets.generator(m)
    nets.energy.eval()
    def joint(o):
        s,r = likely(nets, o)
        return s+cfg.gamma*cosine(r, place(nets, wide(o, cfg)))
    aim = climb(joint if cfg.method=='ejm' else lambda o: likely(nets, o)[0], made, cfg, g)
    match = ((made-aim)**2).sum((1, 2, 3)).mean()/(2*cfg.tau2)
    if cfg.method=='erm':
        mu,lv = nets.q(u)
        again = nets.generator(mu+torch.exp(lv/2)*torch.randn(mu.shape, generator=g))
        kl = (mu**2+lv.exp()-1-lv).sum(1)/2
        elbo = -((again-u)**2).sum((1, 2, 3))/(2*cfg.tau2)+cfg.rho*cosine(z, place(nets, wide(again, cfg)))-kl
        match = cfg.w_match*match-cfg.w_data*elbo.mean()
    yield 'generator', match
    with torch.no_grad(): start = nets.generator(m)
    if cfg.p_aug:
        pick = torch.rand(n, generator=g)<cfg.p_aug
        start = torch.where(pick[:,None,None,None], seen(start, cfg, g), start)
    fake = climb(lambda o: likely(nets, o)[0], start, cfg, g)
    nets.energy.train()
    s,r = likely(nets, torch.cat([u, fake]))
    yield 'energy', -(s[:n]+cfg.gamma*cosine(r[:n], z)).mean()+s[n:].mean()+cfg.reg*((s[:n]**2).mean()+(s[n:]**2).mean())
    if cfg.encoder=='joint': # recognise the other view among all but oneself
        h = nets.h.encoder.train()
        z = h.last(h.head(torch.cat([h.backbone(((augment(o, LOOK, g)+1)/2-h.mean)/h.std) for o in (x, x, wide(fake, cfg))])))
        z = z/z.norm(dim=1, keepdim=True)
        alike = torch.exp(z[:2*n]@z.T/.5)*(1-torch.eye(3*n)[:2*n])
        yield 'encoder', -torch.log(alike[torch.arange(2*n), torch.arange(2*n).roll(n)]/alike.sum(1)).mean()

def ctx(seed=0): return Context(step=0, frac=0., generator=gen(seed))

STRONG = replace(SHORT, gamma=.7, rho=2., tau2=.2, w_match=3., w_data=.7, p_aug=.5, bias=True)
@pytest.mark.parametrize('change', [{}, dict(p_aug=0.), dict(top='square', unit=True, clamp=True, noise=.2), dict(method='ejm', step=40.), dict(method='ejm', unit=True, step=40.), dict(method='erm'),
    dict(method='erm', unit=True, view='dequantise', rho=50., tau2=5.), dict(encoder='joint', unit=True), dict(encoder='joint', mirror=True), dict(clamp=True, noise=.5, p_aug=1.), dict(view='dequantise', p_aug=1., reg=2.)], ids=str)
def test_an_iteration_is_the_one_written_out(change): # and 10: without augmentation the chains are those from the generator's images, under one seed
    cfg = replace(STRONG, **change)
    nets,x = built(cfg),load('digits').tensor(8)
    mine,g = copy.deepcopy(nets),gen()
    theirs,hand = (l.optimisers(n, cfg) for n in (nets, mine))
    c = ctx()
    for i in range(1 if cfg.encoder=='joint' else 2): # the second sees what the first has changed; Adam's first step turns the noise of biases without effect into steps, and h notices
        for (name,loss,_),(want,value) in itertools.zip_longest(l.losses(nets, dict(x=x), cfg, c), by_hand(mine, x, cfg, g)):
            assert name==want
            shift = l.log_z(16, cfg.gamma) if name=='energy' else 0.          # a constant of the book's loss, which has the whole density
            assert (loss-shift).item()==pytest.approx(value.item(), rel=1e-3 if i else 1e-5, abs=1e-3 if i else 1e-5), (i, name)
            slopes = []
            for groups,o in ((theirs, loss), (hand, value)):
                o.backward()
                slopes.append(torch.cat([p.grad.flatten() for s in groups[name].optimiser.param_groups for p in s['params'] if p.grad is not None]))
                groups[name].optimiser.step()
                for other in groups.values(): other.optimiser.zero_grad()
            assert (slopes[0]-slopes[1]).norm()<(.1 if i else 1e-3)*slopes[1].norm(), (i, name)
    assert torch.equal(c.generator.get_state(), g.get_state())                # as many draws, in the same order

def test_inference_model_of_a_finished_generator_written_out(): # appendix A.6
    cfg = replace(STRONG, n_infer=2, unit=True)
    nets,x,g = built(cfg),load('digits').tensor(8),gen()
    before = copy.deepcopy(nets.state_dict())
    for name,loss,_ in l.inference_losses(nets, dict(x=x), cfg, ctx()):
        u = (x+1)/2
        z = place(nets, wide(seen(u, cfg, g), cfg))
        mu,lv = nets.q(u)
        made = copy.deepcopy(nets.generator).eval()(mu+(lv/2).exp()*torch.randn(mu.shape, generator=g))
        want = ((mu**2+lv.exp()-1-lv).sum(1)/2-cfg.rho*cosine(z, place(nets, 2*made-1))).mean()
        assert name=='inference' and loss.item()==pytest.approx(want.item(), rel=1e-4)
        loss.backward()
    assert {k.split('.')[0] for k,p in nets.named_parameters() if p.grad is not None}=={'q'}
    assert all(p.requires_grad for p in nets.generator.parameters())
    assert all(torch.equal(o, before[k]) for k,o in nets.state_dict().items())

@pytest.mark.parametrize('top', ['linear', 'square'])
def test_samples_and_scores_written_out(top): # in [0, 1], where a forgotten conversion shows
    cfg = replace(STRONG, unit=True, clamp=True, top=top, noise=.1)
    nets,g = built(cfg).eval(),gen()
    with torch.no_grad(): start = nets.generator(torch.randn(6, 16, generator=g))
    want = 2*climb(lambda o: likely(nets, o)[0], start, cfg, g, steps=5)-1
    x = load('digits', split='test').tensor(10)
    with torch.no_grad(): s,r = likely(nets, (x+1)/2)
    before = copy.deepcopy(nets.train().state_dict())                         # whatever mode they are in, networks are used as they stand
    assert torch.allclose(l.sample(nets, 6, cfg, n_steps=5, generator=gen()), want, atol=1e-4)
    assert torch.allclose(-l.energy(nets, x, cfg), s, atol=1e-5) and torch.allclose(l.score(nets, x, cfg, alone=True), s, atol=1e-5)
    for gamma in (None, 0., 3.): assert torch.allclose(l.score(nets, x, cfg, gamma=gamma), s+(cfg.gamma_ood if gamma is None else gamma)*cosine(r, place(nets, x)), atol=1e-5)
    assert all(o.training for o in nets.modules()) and same(dict(nets.state_dict()), dict(before))

def test_area_of_the_chapters_scores(): # check 15: unseen test images against foreign ones, ties count half
    cfg = replace(STRONG, unit=True)
    nets = built(cfg).eval()
    inside,said = load('digits', split='test').tensor(40),l.evaluate(nets, cfg, task='ood', n=40)
    for k,x in foreign('digits', 40, gen()).items():
        a,b = (l.score(nets, o, cfg)[:,None] for o in (inside, x))
        assert said['auroc_'+k]==(pytest.approx(((a>b.T).double()+.5*(a==b.T)).mean().item(), abs=1e-9), 40, '')

def test_what_is_measured(): # the generator alone where that is asked for; the autoencoder on the scale from 0 to 1
    cfg = replace(STRONG, unit=True, method='erm', noise=.3)
    nets,x = built(cfg).eval(),load('digits', split='test').tensor(20)
    alone,refined = (l.evaluate(nets, cfg, n=200, **o) for o in (dict(n_steps=0), {}))
    assert alone==l.evaluate(nets, replace(cfg, n_steps=0), n=200) and alone['fid'][0]!=refined['fid'][0]
    with torch.no_grad(): want = (nets.generator(nets.q((x+1)/2)[0])-(x+1)/2).square().mean().item()
    assert l.evaluate(nets, cfg, task='rebuild', n=20)['mse'][0]==pytest.approx(want, rel=1e-4)

def test_sampling_a_class_written_out():
    cfg = replace(STRONG, unit=True, n_infer=1, noise=.1)
    nets,g = built(cfg).eval(),gen()
    code,start = place(nets, load('digits').tensor(3)),load('digits').tensor(6)[3:]
    u = (start+1)/2
    for _ in range(2):
        with torch.no_grad():
            mu,lv = nets.q(u)
            base = nets.generator(mu+(lv/2).exp()*torch.randn(mu.shape, generator=g))
        def value(Y):
            s,r = likely(nets, base+Y)
            return s+4*cosine(r, code)
        u = base+climb(value, torch.zeros_like(base), cfg, g, clamp=False)    # Y starts anew in each turn
    assert torch.allclose(l.conditional(nets.train(), code, start, cfg, gamma=4., rounds=2, generator=gen()), (2*u-1).clamp(-1, 1), atol=1e-4)

@pytest.mark.parametrize('unit', [False, True])
def test_restoration_written_out(unit):
    cfg = replace(STRONG, unit=unit, method='erm')
    nets,g,op,sigma = built(cfg).eval(),gen(),operator('sr2', (1, 8, 8)),.2
    x = load('digits', split='test').tensor(4)
    y = op.A(x)
    known = op.A_dagger(y)
    def value(u):
        s,r = likely(nets, u)
        o = wide(u, cfg)
        return s+cfg.gamma*cosine(r, place(nets, o))-((known-op.A_dagger(op.A(o)))**2).sum((1, 2, 3))/(2*sigma**2)
    with torch.no_grad(): first = nets.q((known+1)/2 if unit else known)[0]
    m = climb(lambda m: value(nets.generator(m))-(m**2).sum(1)/2, first, replace(cfg, step=.01, noise=.1), g, steps=3, clamp=False)
    with torch.no_grad(): base = nets.generator(m)
    half = .5 if unit else 1. # the step is said in units of images in [-1, 1]
    Y = climb(lambda Y: value(base+Y), torch.zeros_like(base), replace(cfg, step=.02*half**2, noise=.05*half), g, steps=3, clamp=False)
    got = l.restore(nets.train(), op, y, cfg, sigma=sigma, eta=.01, eta_y=.02, noise_y=.05, n_steps=3, n_steps_y=3, generator=gen())
    nets.eval()
    with torch.no_grad():
        for a,b in zip(got, (nets.generator(first), base, base+Y), strict=True): assert torch.allclose(a, wide(b, cfg).clamp(-1, 1), atol=1e-4)

def test_classes_have_their_own_codes(monkeypatch): # labels and images stay together, in either range
    cfg = replace(STRONG, unit=True)
    nets,d = built(cfg).eval(),load('digits')
    codes,means = l.class_codes(nets, cfg, n_views=30, n=50, generator=gen())
    x = [d.tensor()[d.y==c][:50] for c in range(10)]
    for c in range(10):
        z = place(nets, x[c]).mean(0)
        assert torch.allclose(codes[c], z/z.norm(), atol=1e-4)
        far = torch.stack([(means[c]-o.mean(0)).norm() for o in x])
        assert far.argmin()==c
    lacking = SimpleNamespace(y=torch.where(d.y==3, 4, d.y), batch=d.batch)
    monkeypatch.setattr(l, 'load', lambda *_, **__: lacking)
    with pytest.raises(ValueError, match="class 3 of 'digits' has no training image"): l.class_codes(nets, cfg, n_views=1, n=5)

@pytest.mark.parametrize('enc', ['digits', 'digits-byol', 'digits-wmse'])
def test_the_cost_of_every_encoder_can_be_told(enc): # losses that compare images need more than one
    cfg = replace(SHORT, enc=enc, n_enc=5)
    took,n = seconds_per_iteration(l.STAGES[0], l.build(cfg), cfg, 'cpu', budget=.01)
    assert took>0 and n>=(l.encoder_config(cfg).w if enc.endswith('wmse') else 2)


# --- training

def same(a, b): # two checkpoints, to the last bit; Python's own generator serves libraries when they are first imported, and no part of a training
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a if k not in ('seconds', 'python'))
    return all(map(same, a, b)) and len(a)==len(b) if isinstance(a, (list, tuple)) else a==b

class Enough(Exception): pass
def stopped(cfg, folder, n): # a training that ends by accident after n steps
    left = [n]
    def stop(step, nets):
        left[0] -= 1
        if not left[0]: raise Enough
    with pytest.raises(Enough): trained(cfg, folder, on_step=stop)

@pytest.mark.parametrize('change,stops', [({}, {3: (0, 2), 5: (0, 4), 7: (2, 2), 9: (2, 4), 11: (3, 2)}), (dict(method='erm', n_enc=0), {3: (2, 2)}), (dict(method='ejm', n_enc=0, n_infer=0), {3: (2, 2)}),
    (dict(encoder='joint', n_enc=0, n_infer=0), {3: (2, 2)}), (dict(encoder='none', n_infer=0), {3: (2, 2)}), (dict(n_enc=0, n_post=4, n_infer=0), {3: (1, 2), 5: (1, 4), 7: (2, 2)})], ids=str)
def test_training_continues_to_the_last_bit(change, stops, tmp_path): # check 17: in every stage and between two
    cfg = replace(TINY, **change)
    a = trained(cfg, tmp_path/'a')
    again = trained(cfg, tmp_path/'again')                                    # two runs of one seed
    assert same(a.state_dict(), again.state_dict())
    for n,(stage,step) in stops.items():
        stopped(cfg, tmp_path/str(n), n)
        left = load_checkpoint(tmp_path/str(n))
        assert (left['stage'], left['step'])==(stage, step) and (left['ema'] is None)==(stage==0) # no average of the encoder
        b = trained(cfg, tmp_path/str(n))
        assert same(a.state_dict(), b.state_dict()) and same(*(load_checkpoint(tmp_path/o) for o in ('a', str(n))))

def test_weights_kept_over_a_training(tmp_path): # finished as at the end of a stage, also by a run that went on; the training does not notice
    cfg = replace(TINY, n_infer=0)
    end = trained(cfg, tmp_path/'plain').state_dict()
    assert same(trained(cfg, tmp_path/'keeps', keep_every=2).state_dict(), end) and same(*(load_checkpoint(tmp_path/o) for o in ('plain', 'keeps')))
    stopped(cfg, tmp_path/'goes on', 5)
    trained(cfg, tmp_path/'goes on', keep_every=2)
    read = lambda run, step: l.Nets.from_pretrained(tmp_path/run/f'weights-{step:09d}').state_dict()
    assert [o.name for o in sorted((tmp_path/'keeps').glob('weights-*'))]==[f'weights-{o:09d}' for o in (2, 4, 6, 8)]
    settled = lambda nets: {k: o for k,o in nets.items() if not k.endswith(('_u', '_v'))} # the stage after the last one, of no steps, goes on with the power iterations
    assert same(settled(read('keeps', 8)), settled(end)) and same(read('goes on', 6), read('keeps', 6)) and not same(read('keeps', 6), end)

def test_a_posterior_that_learns_alone(tmp_path): # features and head move, nothing else does; mirrored where the row mirrors
    cfg,seen = replace(TINY, n_enc=0, n_post=4, n_infer=0),{}
    def look(step, nets): seen[len(seen)] = copy.deepcopy(nets.state_dict())
    trained(cfg, tmp_path, on_step=look)
    moved = {k.split('.')[1] if k.startswith('energy') else k.split('.')[0] for k,o in seen[3].items() if not k.endswith(('_u', '_v')) and not torch.equal(o, seen[0][k])}
    assert moved=={'f', 'g'} and sorted(seen)==[*range(8)]
    steps,match = read_log(SimpleNamespace(folder=tmp_path), 'match')
    assert steps==[*range(1, 9)] and all(-1<=o<=1 for o in match)
    nets,batch = built(replace(SHORT, mirror=True)),dict(x=load('digits').tensor(64))
    first = lambda cfg: next(l.posterior_losses(nets, batch, replace(cfg, view='dequantise'), ctx()))[1].item()
    assert first(SHORT)!=first(replace(SHORT, mirror=True))

def test_what_a_training_leaves(tmp_path): # averaged weights, settled norms, averages of the batch norms from samples alone, an encoder as it was, and a file that holds it all
    cfg = replace(TINY, n_infer=0, ema=.5)
    seen = {}
    def look(step, nets): seen[len(seen)] = copy.deepcopy(nets.state_dict())
    nets = trained(cfg, tmp_path, on_step=look)
    end,(before,after) = load_checkpoint(tmp_path),(seen[3],seen[7])          # last steps of both stages
    assert all(torch.equal(o, before['h.'+k]) for k,o in nets.h.state_dict().items())
    mean = {k.removeprefix('module.'): o for k,o in end['ema'].items()}
    for k,o in nets.named_parameters(): assert torch.equal(o, mean[k])
    assert not torch.equal(nets.state_dict()['generator.start.0.weight'], after['generator.start.0.weight'])
    norms = [o for o in nets.generator.modules() if isinstance(o, torch.nn.BatchNorm2d)]
    assert norms and all(o.num_batches_tracked==32 and o.momentum==.1 for o in norms) # 4,096 samples in parts of 128
    again = copy.deepcopy(nets)
    l.settle(again, cfg, gen())
    for (k,a),(_,b) in zip(nets.generator.named_buffers(), again.generator.named_buffers()): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), k
    with contextlib.redirect_stdout(io.StringIO()): back,half = l.Nets.from_pretrained(tmp_path/'weights'),l.Nets.from_pretrained(ship(nets, tmp_path/'book'))
    assert back.cfg==cfg and same(back.state_dict(), nets.state_dict())
    for o in (nets, back, half):
        for m in o.energy.modules():
            if hasattr(m, 'parametrizations'): assert torch.linalg.matrix_norm(m.eval().weight.flatten(1), 2).item()==pytest.approx(1, abs=.02)
    assert torch.allclose(l.sample(half.eval(), 5, cfg, generator=gen()), l.sample(nets, 5, cfg, generator=gen()), atol=.05)

def steps(cfg, nets, n=1, groups=None, seed=0): # through the loop's own step
    c,acc = ctx(seed),_accelerator(cfg, 'cpu')
    groups = groups or l.optimisers(nets, cfg)
    for g in (g for o in groups.values() for g in o.optimiser.param_groups): g.setdefault('initial_lr', g['lr'])
    return [optimiser_step(l.STAGES[2], nets, [dict(x=load('digits').tensor(cfg.batch))], cfg, [c], groups, acc) for _ in range(n)]

@pytest.mark.parametrize('change', [{}, dict(method='ejm'), dict(method='erm'), dict(encoder='joint')], ids=str)
def test_a_step_moves_its_own_group(change): # check 9
    cfg = replace(SHORT, **change)
    nets,moved = built(cfg),[]
    groups = l.optimisers(nets, cfg)
    own = dict(generator={'generator', *(['q'] if cfg.method=='erm' else [])}, energy={'energy'}, encoder={'h'})
    was = copy.deepcopy(nets.h.state_dict())
    def watch(name, step):
        def go(*a, **k):
            assert {o.split('.')[0] for o,p in nets.named_parameters() if p.grad is not None}==own[name]
            before = {o: p.detach().clone() for o,p in nets.named_parameters()}
            step(*a, **k)
            assert {o.split('.')[0] for o,p in nets.named_parameters() if not torch.equal(p, before[o])}==own[name]
            moved.append(name)
        return go
    for k,o in groups.items(): o.optimiser.step = watch(k, o.optimiser.step)
    steps(cfg, nets, 2, groups)
    assert moved==2*list(groups) and not any(p.grad is not None for p in nets.parameters())
    if cfg.encoder=='frozen': assert same(dict(nets.h.state_dict()), dict(was)) # not even an average

def test_without_concentration_it_is_a_plain_energy(monkeypatch, tmp_path): # check 11, a whole training; views draw numbers, so there are none
    monkeypatch.setattr(l, 'view', lambda u, *_: u)
    with_,plain = (trained(replace(SHORT, gamma=0., p_aug=0., **o), tmp_path/str(i)) for i,o in enumerate((dict(encoder='none'), {})))
    for k,o in plain.state_dict().items():
        if not k.startswith(('h.', 'energy.g.')): assert torch.equal(o, with_.state_dict()[k]), k

def test_every_choice_trains(): # and those that contradict each other are refused
    words,refused = itertools.product(*l._KINDS.values(), (False, True)),set()
    for n,(method,encoder,posterior,view,top,bias) in enumerate(words):
        cfg = replace(SHORT, method=method, encoder=encoder, posterior=posterior, view=view, top=top, bias=bias, unit=n%2==0, batch=4)
        try: l.check_config(cfg)
        except ValueError: refused.add((method, encoder, posterior)); continue
        if n%5 and bias: continue                                             # biases and views have little to do with the rest
        torch.manual_seed(n)
        logs = steps(cfg, l.build(cfg), 2)[-1]
        assert logs['ok'] and all(math.isfinite(v) for v in logs.values()), cfg
        assert {'gap', 'level', 'moved', 'spread'}<=set(logs) and ('match' in logs)==(encoder!='none') and ('kl' in logs)==(method=='erm')
    assert refused=={(m, 'none', p) for m in ('em', 'ejm', 'erm') for p in ('cosine', 'gaussian', 'cebm') if m=='ejm' or p!='cosine'}

@pytest.mark.parametrize('change', [dict(precision='bf16'), dict(mirror=True), dict(literal=True, step=.01), dict(clip=.5), dict(reg=.1), dict(norm=False), dict(n_steps=0), dict(micro=2), dict(micro=2, n_infer=4), dict(method='erm', encoder='none')], ids=str)
def test_switches_train(change, tmp_path): # an encoder that is trained here wants whole batches; one that is there already lets the batch come in parts
    cfg = replace(SHORT, **change)
    nets = trained(cfg, tmp_path)
    assert all(o.requires_grad for o in nets.generator.parameters())          # nothing stays frozen, in however many parts a batch came
    gap,moved = (read_log(run_of(cfg, tmp_path), k)[1] for k in ('gap', 'moved'))
    assert len(gap)==4 and all(map(math.isfinite, gap)) and (moved[-1]==0)==(cfg.n_steps==0)
    assert any(hasattr(o, 'parametrizations') for o in nets.energy.modules())==cfg.norm
    assert math.isfinite(l.evaluate(nets, cfg, n=200)['fid'][0])

@pytest.mark.parametrize('change', [dict(max_gap=1e-9), dict(lr=float('inf'))], ids=str)
def test_a_training_that_leaves_its_bounds_is_stopped(change, tmp_path):
    with pytest.raises(Diverged, match='energy gap' if 'max_gap' in change else 'not finite|energy gap') as told: trained(replace(SHORT, **change), tmp_path)
    assert 'joint' in str(told.value) and 'checkpoint' in str(told.value)

def test_contradictions_are_refused():
    for change,said in ((dict(encoder='none', posterior='cebm'), 'plain energy'), (dict(encoder='none', n_infer=1), 'plain energy'), (dict(net='shapes'), 'is for shape'),
                        (dict(net='nets'), 'net must'), (dict(enc='encs'), 'enc must'), (dict(method='eem'), 'method must'), (dict(tau2=0.), 'tau2'), (dict(rho=-1.), 'rho'), (dict(p_aug=1.1), 'p_aug'), (dict(n_infer=-1), 'n_infer')):
        with pytest.raises(ValueError, match=said): l.build(replace(SHORT, **change))


# --- the chapter as a user runs it

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('08_liebm', tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('change', ['n_infer: 2', 'method: erm', 'encoder: none, n_infer: 0'])
def test_a_small_row_says_its_cost_and_trains(change, tmp_path):
    trains_in_full('08_liebm', 'liebm', 'digits', tmp_path, f'{change}, n_enc: 2, n_iters: 2, batch: 4, n_steps: 2, save_every: 1, log_every: 1', says=('joint: 2 iterations', 'about'))
