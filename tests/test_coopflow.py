"""Checks of CoopFlow and of the baselines that take too long for their notebooks, and the chapter run as a user runs it.

Numbers of checks refer to section 7 of the chapter's fact sheet. Checks 1 and 2 are in test_flows.py; 3 to 9 are test cells of the notebook,
of which 2 and 3 come back here in other settings; 10 is here.
"""
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chapters import ROOT, claims_can_be_measured, ends_without_data, limit, papermill, trains_in_full
from ebmbook import coopflow as c
from ebmbook.coopflow import PRESETS
from ebmbook.core.nets import count
from ebmbook.core.runs import open_run
from ebmbook.core.train import Context, train
from ebmbook.data import DATASETS

TINY = replace(PRESETS['digits-pre'], ch=4, flow_width=8, n_mix=2, n_steps=3, batch=8, n_pre=3, n_iters=4, warm=2, lr_warm=1, save_every=2, log_every=1)

def gen(seed=0): return torch.Generator().manual_seed(seed)


# --- the paper's rows

def test_parameter_counts():
    with torch.device('meta'): nets = c.build(PRESETS['cifar10-pre'])
    assert (count(nets.energy), count(nets.flow))==(17_129_444, 28_784_792)
    assert round(count(nets)/1e6, 1)==45.9

TABLE = { # Table 4.4: epochs of the flow alone, of the energy alone, of both, updates, steps in training and in use; batch from section 4.5.2
    'cifar10-T30':   (0, 0, 100, 30, .03, .04, 28),     'svhn-T30':  (0, 0, 100, 30, .03, .035, 28),     'celeba32-T30':  (0, 0, 100, 30, .03, .035, 28),
    'cifar10-T200':  (0, 0, 100, 200, .01, .012, 32),   'svhn-T200': (0, 0, 100, 200, .011, .0125, 32),  'celeba32-T200': (0, 0, 100, 200, .011, .013, 32),
    'cifar10-pre':   (300, 25, 75, 30, .03, .04, 28),   'svhn-pre':  (200, 10, 90, 30, .03, .035, 28),   'celeba32-pre':  (80, 10, 90, 30, .03, .035, 28),
}
@pytest.mark.parametrize('row', TABLE)
def test_rows_of_table_4_4(row):
    cfg,(pre,warm,both,T,delta,delta_test,batch) = PRESETS[row],TABLE[row]
    epochs = lambda n: n*cfg.batch/DATASETS[cfg.data].n[0]
    assert (cfg.n_steps, cfg.delta, cfg.delta_test, cfg.batch)==(T, delta, delta_test, batch)
    for got,want in ((cfg.n_pre, pre), (cfg.warm, warm), (cfg.n_iters-cfg.warm, both)): assert abs(epochs(got)-want)<1e-3
    assert (cfg.lr, cfg.lr_flow, cfg.noise, cfg.method, cfg.exact, cfg.ema)==(1e-4, 1e-4, 'off', 'coopflow', True, 0.)
    assert cfg.flip==(cfg.data=='cifar10') and (cfg.ebm_clip==0)==(cfg.data=='cifar10') and cfg.flow_every==(5 if row=='celeba32-pre' else 1)

@pytest.mark.parametrize('row', PRESETS)
def test_weights_and_settings_come_back(row, tmp_path):
    torch.manual_seed(0)
    small = replace(PRESETS[row], ch=4, flow_steps=(1, 1, 1), deq=(1, 1, 4) if PRESETS[row].deq else (), flow_blocks=1, flow_width=8, n_mix=2)
    nets = c.build(small)
    nets.save_pretrained(tmp_path)
    again = c.Nets.from_pretrained(tmp_path)
    assert again.cfg==small and hash(again.cfg)==hash(small)
    assert all(torch.equal(a, b) for a,b in zip(nets.state_dict().values(), again.state_dict().values(), strict=True))


# --- check 2: contrast of what the flow gives back

@pytest.mark.parametrize('exact,slope', [(True, 1.), (False, .9*255/256)])
def test_slope_of_encode_and_decode(exact, slope):
    torch.manual_seed(0)
    cfg = replace(PRESETS['cifar10-T30'], shape=(3, 8, 8), data='folder:/x', flow_steps=(1, 1, 1), deq=(1, 1, 4), flow_blocks=1, flow_width=8, n_mix=2, blocks=1, ch=4, exact=exact)
    flow,x = c.flow_of(cfg).double().eval(),2*torch.rand(32, 3, 8, 8, generator=gen(), dtype=torch.float64)-1
    with torch.no_grad(): y = flow.init(x, gen(1)).decode(flow.encode(x, generator=gen(2))[0])
    assert (x*y).sum()/x.square().sum()==pytest.approx(slope, abs=1e-3)
    assert (y-slope*x).abs().max()<.009                                       # what is left is the noise inside one grey level


# --- check 3: the fixed points, by the chapter's own losses

class Stretch(nn.Module): # g(z) = s z
    def __init__(self): super().__init__(); self.log_s = nn.Parameter(torch.zeros(1))
    def decode(self, z): return self.log_s.exp()*z
    def log_prob(self, x, generator=None): return (-(x*(-self.log_s).exp())**2/2-self.log_s).sum(1)

class Bowl(nn.Module): # E = a x^2/2
    def __init__(self): super().__init__(); self.v = nn.Parameter(torch.tensor(.8))
    def forward(self, x): return self.v*x[:,0]**2/2

class Twist(nn.Module): # E = |x|^2/2 - theta x1 x2
    def __init__(self): super().__init__(); self.v = nn.Parameter(torch.tensor(.1))
    def forward(self, x): return x.square().sum(1)/2-self.v*x.prod(1)

def cooperate(energy, cfg, data, n_iters, rates): # learned parameter of the energy, and s^2
    nets,kept,ctx = nn.Module(),[],Context(1, 0., gen(3))
    nets.energy,nets.flow = energy,Stretch()
    opts = {k: torch.optim.Adam(getattr(nets, k).parameters(), r) for k,r in rates.items()}
    for i in range(n_iters):
        for name,loss,_ in c.losses(nets, dict(x=data(cfg.batch, ctx.generator)), cfg, ctx):
            for o in opts.values(): o.zero_grad()
            loss.backward()
            opts[name].param_groups[0]['lr'] = rates[name]*max(1-i/n_iters, .02)
            opts[name].step()
        if i>n_iters*2//3: kept.append((nets.energy.v.item(), (2*nets.flow.log_s).exp().item()))
    return np.mean(kept, 0)

LINE = c.Config(data='line', shape=(1,), batch=2_000, n_iters=0, clip=0., bound=0.)

@pytest.mark.parametrize('T,delta,v', [(1, .5, .6), (12, .3, 1.5)])
def test_noisy_fixed_point_does_not_depend_on_the_length(T, delta, v):
    a,s2 = cooperate(Bowl(), replace(LINE, noise='on', n_steps=T, delta=delta), lambda n,g: v**.5*torch.randn(n, 1, generator=g), 1_000, dict(energy=.02, flow=.02))
    want = (1-math.sqrt(1-delta**2/v))/(delta**2/2)                           # 1/(a(1-delta^2 a/4)) = v
    assert want*(1-delta**2*want/4)==pytest.approx(1/v)
    assert a==pytest.approx(want, rel=.06) and s2==pytest.approx(v, rel=.06)

def test_noise_free_fixed_point_is_a_flat_energy():
    a,s2 = cooperate(Bowl(), replace(LINE, n_steps=5, delta=.5), lambda n,g: 1.5**.5*torch.randn(n, 1, generator=g), 1_500, dict(energy=.05, flow=.02))
    assert abs(a)<.03 and s2==pytest.approx(1.5, rel=.05)

def test_moments_match_where_the_energy_has_no_density():
    C,eta,T = 1.2,.05,10
    def data(n, g):
        z = torch.randn(n, 2, generator=g)
        return torch.stack([z[:,0]*math.sqrt((2+C)/2)+z[:,1]*math.sqrt((2-C)/2), z[:,0]*math.sqrt((2+C)/2)-z[:,1]*math.sqrt((2-C)/2)], 1)
    theta,s2 = cooperate(Twist(), replace(LINE, shape=(2,), noise='on', delta=math.sqrt(2*eta), n_steps=T), data, 900, dict(energy=.03, flow=.015))
    r = (1-eta*np.array([1-theta, 1+theta]))**2                               # the end of the chain, exactly
    lam = r**T*s2+2*eta*(1-r**T)/(1-r)
    assert theta>1                                                            # exp(-E) has no integral
    assert (lam[0]-lam[1])/2==pytest.approx(C, rel=.08) and lam.mean()==pytest.approx(s2, rel=.05)


# --- training

def test_training_continues_to_the_last_bit(tmp_path):
    a = train(c, TINY, open_run('coopflow', 'digits-pre', TINY, out=tmp_path/'a', device='cpu'), progress=False)
    class Enough(Exception): pass
    def stop(step, nets):
        if stop.seen==5: raise Enough                                         # in the second stage, behind a checkpoint
        stop.seen += 1
    stop.seen = 0
    with pytest.raises(Enough): train(c, TINY, open_run('coopflow', 'digits-pre', TINY, out=tmp_path/'b', device='cpu'), progress=False, on_step=stop)
    b = train(c, TINY, open_run('coopflow', 'digits-pre', TINY, out=tmp_path/'b', device='cpu'), progress=False)
    assert all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.mark.parametrize('method', ['flow', 'shortrun', 'coopnets'])
def test_rivals_train_and_are_measured(method, tmp_path):
    cfg = replace(TINY, method=method, infer_steps=1)
    nets = train(c, cfg, open_run('coopflow', 'digits-pre', cfg, out=tmp_path, device='cpu'), progress=False)
    assert np.isfinite(c.evaluate(nets, cfg, n=200)['fid'][0])
    if method!='flow': assert np.isfinite(c.evaluate(nets, cfg, task='reconstruct', n=4, n_iters=3)['mse'][0])

def test_settings_can_be_sent_to_another_process(): # workers and launchers pickle them
    assert pickle.loads(pickle.dumps(PRESETS['cifar10-pre']))==PRESETS['cifar10-pre']

def test_every_claim_names_rows_and_metrics_that_exist(): claims_can_be_measured(c, dict(ch=4, flow_width=8, n_mix=2, n_steps=2))


# --- check 10: the spiral

@pytest.fixture(scope='module')
def spirals(): # what the shipped pairs of Figure 4.3 measure
    nets = {o: c.Nets.from_pretrained(ROOT/'results/weights'/f'coopflow-spiral-{o}').eval() for o in ('T100', 'long')}
    return {o: {k: v[0] for k,v in c.evaluate(n, n.cfg, n=4_000).items()} for o,n in nets.items()}

def test_with_long_chains_both_densities_fit(spirals):
    got = spirals['long']
    print(got)
    assert got['truth']-.1<got['loglik_energy']<got['truth']                 # the mean difference is the divergence KL(data || p)
    assert got['truth']-.15<got['loglik_flow']<got['truth']
    assert got['near_pair']>.85 and got['distance_pair']<.05

def test_with_short_chains_only_the_pair_fits(spirals):
    got = spirals['T100']
    print(got)
    assert got['loglik_energy']<got['truth']-.3 and got['loglik_flow']<got['truth']-.2
    assert got['near_pair']>got['near_start']+.1 and got['distance_pair']<got['distance_start']

@pytest.mark.slow
def test_the_pair_is_nearer_to_the_spiral_than_its_flow(tmp_path):
    cfg = replace(PRESETS['spiral-T100'], n_pre=60, n_iters=400)              # a flow that is not finished leaves the chain something to do
    nets = train(c, cfg, open_run('coopflow', 'spiral-T100', cfg, out=tmp_path, device='cpu'), progress=False)
    got = {k: v[0] for k,v in c.evaluate(nets, cfg, n=4_000).items()}
    print(got)
    assert got['near_pair']>got['near_start'] and got['distance_pair']<got['distance_start']
    assert got['loglik_flow']<got['truth'] and got['loglik_energy']<got['truth']


# --- the chapter as a user runs it

def write_pictures(folder, n=60):
    "Small photographs of nothing, as a user's own folder."
    from PIL import Image
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder/f'{i:02d}.png')

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('04_coopflow', tmp_path, 'cifar10', '-p', 'preset', 'cifar10-pre')

def test_wrong_names_end_the_chapter_in_seconds(tmp_path):
    code,said,seconds = papermill('04_coopflow', tmp_path, tmp_path, '-p', 'dataset', 'digits', '-p', 'preset', 'digits-prf')
    assert code!=0 and "did you mean 'digits-pre'" in said and seconds<limit(20)

def test_the_paper_row_says_its_cost_and_trains(tmp_path): # on pictures of one's own; the official files are checked by their sums
    write_pictures(tmp_path/'mine')
    over = ('n_pre: 2, n_iters: 2, warm: 1, batch: 4, ch: 4, flow_steps: [1, 1, 1], deq: [1, 1, 4], flow_blocks: 1, flow_width: 8, n_mix: 2, '
            'n_steps: 2, save_every: 1, log_every: 1, n_eval: 16')
    trains_in_full('04_coopflow', 'coopflow', 'cifar10-pre', tmp_path, over, '-p', 'dataset', f"folder:{tmp_path/'mine'}", '-p', 'preset', 'cifar10-pre',
                   says=('stage flow: 2 iterations, about', 'stage coopflow: 2 iterations, about'))
