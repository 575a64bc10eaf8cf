"""Checks of EC-VAE that take too long for its notebooks, and the chapter run as a user runs it.

Numbers of checks refer to section 8 of the chapter's fact sheet. 1 to 7, 11 and 13 are test cells of the chapter; 9 and 14 of the page of its networks; 8 of the page
of restoration. 10, 12, 15, 16 and the second half of 7 are here; that the chain after the decoder does not help, 12, is a claim of the paper, and its verdict stands in the chapter.
"""
import math
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from chapters import ROOT, claims_can_be_measured, ends_without_data, trains_in_full
from ebmbook import ecvae as e
from ebmbook.core.config import choose
from ebmbook.core.nets import count, settle_norms
from ebmbook.core.runs import load_checkpoint, open_run
from ebmbook.core.train import Diverged, averaged, read_log, train
from ebmbook.data import load
from ebmbook.ecvae import PRESETS, ROWS
from ebmbook.ecvae_nets import EnergyNet
from ebmbook.mcmc import frozen

TINY = replace(PRESETS['digits'], batch=8, n_steps=2, n_iters=4, save_every=2, log_every=1, flow_depth=1, flow_width=8)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def run_of(cfg, folder): return open_run('ecvae', 'digits', cfg, out=folder, device='cpu')
def trained(cfg, folder, **how): return train(e, cfg, run_of(cfg, folder), progress=False, **how)


# --- the paper's rows

TABLE = { # fact sheet, sections 3 and 4: K, decay of the average, prior; millions of parameters of encoder and decoder, and of the energy, where the program has the networks
    'cifar10':       (30, .9999, 'normal', 77.44, 23.82), 'stl10':       (15, .9999, 'normal', 77.44, 23.82), 'imagenet32': (15, .9999, 'normal', 77.44, 23.82),
    'lsun_church64': (15, .999, 'normal', None, None),    'celeba64':    (15, .9999, 'normal', None, None),   'celebahq256': (15, .9999, 'flow', 34.07, None),
    'cifar10-flow':  (30, .9999, 'normal', None, 23.82),
}
@pytest.mark.parametrize('row', TABLE)
def test_rows_of_the_paper(row, monkeypatch):
    cfg,(K,ema,prior,vae,energy) = PRESETS[row],TABLE[row]
    assert (cfg.n_steps, cfg.n_steps_test, cfg.ema, cfg.prior, cfg.method)==(K, 0, ema, prior, 'ecflow' if row=='cifar10-flow' else 'ecvae')
    assert (cfg.lr_vae, cfg.lr, cfg.beta1, cfg.eta, cfg.tau, cfg.kl)==(2e-4, 1e-4, 0., 1e-6, 1e-5, .1)
    assert (cfg.lam0, cfg.lam_max, cfg.lr_dual, cfg.dual, cfg.distance, cfg.z_steps)==(30., 100., 1e-2, True, 'mse', 5) and (cfg.batch==128 or row=='celebahq256')
    monkeypatch.setitem(ROWS, cfg.net, ROWS[cfg.net] | dict(sn_decoder=False, sn_energy=False)) # the norm adds no parameters, and takes long to set up
    with torch.device('meta'): nets = e.Nets(cfg)
    if vae: assert round((count(nets.encoder)+count(nets.decoder))/1e6, 2)==vae and nets.decoder.latent==128
    if energy: assert round(count(nets.energy)/1e6, 2)==energy
    assert hasattr(nets, 'prior')==(prior=='flow')

@pytest.mark.parametrize('row,want', [('stl10', .0461), ('cifar10', .0922), ('celeba64', .1843), ('celebahq256', 2.949)])
def test_margin_of_a_row_is_just_above_its_noise(row, want): # check 2
    free = replace(PRESETS[row], tether='none')
    assert e.margin(free)/(1+free.slack)==pytest.approx(want, rel=1e-3)
    assert e.margin(PRESETS[row])<e.margin(free)                              # a tether takes noise back
    if row=='stl10': assert e.margin(free)==pytest.approx(.05, rel=.02)       # the number in the released program

@pytest.mark.parametrize('row', PRESETS)
def test_weights_and_settings_come_back(row, tmp_path, monkeypatch):
    torch.manual_seed(0)
    cfg = replace(PRESETS[row], flow_depth=1, flow_width=8)
    monkeypatch.setitem(ROWS, cfg.net, ROWS[cfg.net] | dict(width=1/64, blocks=1)) # the same list of layers, narrow
    nets = e.Nets(cfg)
    nets.save_pretrained(tmp_path)
    again = e.Nets.from_pretrained(tmp_path)
    assert again.cfg==nets.cfg and hash(again.cfg)==hash(nets.cfg)
    assert all(torch.equal(a, b) for a,b in zip(nets.state_dict().values(), again.state_dict().values(), strict=True))

def test_settings_can_be_sent_to_another_process(): assert pickle.loads(pickle.dumps(PRESETS['cifar10']))==PRESETS['cifar10']

def test_every_experiment_names_a_row():
    files = sorted((ROOT/'experiments').glob('ecvae_*.yaml'))
    assert {o.stem.removeprefix('ecvae_') for o in files}=={o for o in PRESETS if not o.endswith('-claim')}
    for o in files:
        said = yaml.safe_load(o.read_text())
        e.check_config(choose(PRESETS, e.DEFAULT_ROW, said['dataset'], said['preset'], said['over'])[1])

def test_every_claim_names_rows_and_metrics_that_exist(): claims_can_be_measured(e, dict(flow_depth=1, flow_width=8), quick=dict(restore=dict(n_steps=1, tries=1)))


# --- what each loss is worth

def outcomes(cfg, monkeypatch, target=None, seed=0): # networks and {name: (loss, logs)} of one iteration; `target` replaces the chains
    torch.manual_seed(seed)
    nets,x = e.build(cfg),load('digits').tensor(8)
    if target is not None: monkeypatch.setattr(e, '_mend', lambda nets, made, *_: target(made.detach()))
    seen = {}
    real = e.evidence
    monkeypatch.setattr(e, 'evidence', lambda *a: seen.setdefault('parts', real(*a)))
    ctx = SimpleNamespace(step=0, frac=0., generator=gen(), state={}, ema=None)
    out = {name: (loss, logs) for name,loss,logs in e.losses(nets, dict(x=x), cfg, ctx)}
    return nets, x, out, seen.get('parts'), ctx

def test_energy_learns_from_clamped_targets_and_the_decoder_is_pulled_to_them(monkeypatch): # targets far outside the range
    made,cfg = [],TINY
    def away(o): made.append(o); return o+5.
    nets,x,out,(near,div,*_),_ = outcomes(cfg, monkeypatch, away)
    with frozen(nets.energy): want = nets.energy(x).mean()-nets.energy(torch.ones_like(x)).mean()
    assert out['energy'][0].item()==pytest.approx(want.item(), abs=1e-4)
    pull = (made[0]-1).flatten(1).square().sum(1).mean()                      # to the clamped target, while the log has the chain's own distance
    assert out['model'][0].item()==pytest.approx((near.mean()+cfg.kl*div.mean()+cfg.lam0*pull).item(), rel=1e-4)
    assert out['model'][1]['distance'].item()==pytest.approx(25*64, rel=1e-4)
    free = outcomes(replace(cfg, bound=False), monkeypatch, away)[2]
    assert free['model'][0].item()>10*out['model'][0].item()                  # the demo's targets are not clamped

def test_critic_is_lowered_by_the_decoder(monkeypatch):
    cfg = replace(TINY, method='wgan')
    nets,x,out,(near,div,*_),ctx = outcomes(cfg, monkeypatch)
    torch.manual_seed(0)
    again = e.build(cfg)
    with torch.no_grad(): made = again.decode(again.draw(8, gen()))           # the first draw of the iteration
    with frozen(again.energy): score = again.energy(made).mean()
    assert out['model'][0].item()==pytest.approx((near.mean()+cfg.kl*div.mean()+cfg.lam0*score).item(), rel=1e-3)

def test_flows_and_priors_learn_by_likelihood(monkeypatch):
    torch.manual_seed(0)
    nets = e.build(replace(TINY, prior='flow'))
    monkeypatch.setattr(type(nets.prior), 'log_prob', lambda self, z, **_: -3+0*z.sum(1))
    assert outcomes(replace(TINY, prior='flow'), monkeypatch)[2]['prior'][0].item()==pytest.approx(3.)
    cfg = replace(TINY, method='flow', kl=.5)
    kind = type(e.build(cfg).flow)
    monkeypatch.setattr(kind, 'log_prob', lambda self, x, **_: -7+0*x.flatten(1).sum(1))
    _,_,out,*_ = outcomes(cfg, monkeypatch)
    assert (out['model'][0].item(), out['model'][1]['nll'].item())==(3.5, 7.)

def test_flips_reach_the_losses(monkeypatch):
    monkeypatch.setattr(e, 'random_flip', lambda x, u: 0*x)
    _,_,out,(near,*_),_ = outcomes(replace(TINY, method='vae', flip=True), monkeypatch)
    torch.manual_seed(0)
    nets = e.build(replace(TINY, method='vae'))
    want = e.evidence(nets.train(), torch.zeros(8, 1, 8, 8), TINY, gen())     # a generator one draw behind changes z, not the data
    assert abs(near.mean().item()-want[0].mean().item())<.5*want[0].mean().item() and near.mean()<load('digits').tensor(8).square().flatten(1).sum(1).mean()/2

def test_multiplier_of_the_encoder(monkeypatch): # its own rate, distance and margin
    cfg = replace(TINY, method='vae', posterior=True, z_lr_dual=3., z_lam=2.)
    monkeypatch.setattr(e, 'refine_latents', lambda nets, x, z, *a, **k: z.detach()+.5)
    _,_,out,(near,div,z,*_),ctx = outcomes(cfg, monkeypatch)
    far = .25*z.shape[1]
    floor = e.noise_floor(cfg.z_steps, cfg.z_eta, z.shape[1], cfg.z_pull)
    assert out['model'][1]['z_distance'].item()==pytest.approx(far, rel=1e-5) and out['model'][1]['z_lam'].item()==2.
    assert out['model'][0].item()==pytest.approx((near.mean()+cfg.kl*div.mean()+2*far).item(), rel=1e-5)
    assert ctx.state['lam'].tolist()==pytest.approx([cfg.lam0, 2+3*(far-(1+cfg.slack)*floor)], rel=1e-5)

def test_temperature_does_not_matter_to_adam(): # check 7, second half: the loss is in units of f, and f/tau would teach the same
    ends = []
    for scale in (1., 2.**17):
        torch.manual_seed(0)
        nets,x = e.build(TINY),load('digits').tensor(8)
        adam = e.optimisers(nets, TINY)['energy'].optimiser
        for group in adam.param_groups: group['eps'] = 1e-20                  # the number under the root is what a scale does change
        for i in range(3):
            adam.zero_grad()
            (scale*e.contrast(nets.energy, x, torch.rand(8, 1, 8, 8, generator=gen(i))*2-1)[0]).backward()
            adam.step()
        ends.append(torch.cat([o.detach().flatten() for o in nets.energy.parameters()]))
    torch.manual_seed(0)
    moved = (ends[0]-torch.cat([o.detach().flatten() for o in e.build(TINY).energy.parameters()])).abs().mean()
    assert (ends[0]-ends[1]).abs().mean()<1e-3*moved


# --- training

def same(a, b): # two checkpoints, to the last bit; Python's own generator serves libraries when they are first imported, and no part of a training
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a if k not in ('seconds', 'python'))
    return all(map(same, a, b)) and len(a)==len(b) if isinstance(a, (list, tuple)) else a==b

@pytest.mark.parametrize('change', [{}, dict(prior='flow'), dict(posterior=True), dict(method='ecflow'), dict(method='wgan'), dict(norm='batch')])
def test_training_continues_to_the_last_bit(change, tmp_path): # check 16: networks, both Adams, multipliers, averages, random states
    cfg = replace(TINY, lr_dual=100., **change)
    a = trained(cfg, tmp_path/'a')
    class Enough(Exception): pass
    def stop(step, nets):
        if step==3: raise Enough                                              # behind the checkpoint of step 2
    with pytest.raises(Enough): trained(cfg, tmp_path/'b', on_step=stop)
    assert load_checkpoint(tmp_path/'b')['step']==2
    b = trained(cfg, tmp_path/'b')
    assert all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    ends = [load_checkpoint(tmp_path/o) for o in 'ab']
    assert same(*ends) and set(ends[0]['optimisers'])=={'model', 'energy', *(['prior'] if 'prior' in change else [])}
    assert ends[0]['state']['lam'].tolist()!=[cfg.lam0, cfg.z_lam] or change.get('method')=='wgan'

def test_average(): # check 15: from a constant target the error is the product of the decays; statistics follow the networks
    nets = e.build(replace(TINY, norm='batch'))
    average = averaged(nets, .9)
    average.update_parameters(nets)                                           # the first one copies
    before = {k: o.clone() for k,o in nets.state_dict().items()}
    with torch.no_grad():
        for o in (*nets.parameters(), *(b for b in nets.buffers() if b.is_floating_point())): o.add_(1)
    for _ in range(200): average.update_parameters(nets)
    left,kept = math.prod(min(.9, (1+n)/(10+n)) for n in range(1, 201)),dict(average.module.named_parameters())
    assert left<1e-6 and all(torch.allclose(o, before[k]+1, atol=1e-5) for k,o in kept.items())
    again = averaged(nets, .9)
    again.update_parameters(nets)
    with torch.no_grad():
        for o in nets.parameters(): o.sub_(1)
    for n in range(1, 6): again.update_parameters(nets)
    left = math.prod((1+n)/(10+n) for n in range(1, 6))
    assert all(torch.allclose(o-before[k], torch.full_like(o, left), atol=1e-5) for k,o in again.module.named_parameters())
    assert all(torch.equal(o, dict(nets.named_buffers())[k]) for k,o in again.module.named_buffers())

@pytest.mark.parametrize('change', [{}, dict(flip=True), dict(posterior=True)])
def test_parts_equal_the_whole(change, tmp_path): # the multipliers climb once for each batch, however many parts it has
    logs = []
    for micro in (1, 2, 4):
        cfg = replace(TINY, n_iters=8, micro=micro, lr_dual=10., lr_vae=1e-4, lr=1e-4, **change)
        run = run_of(cfg, tmp_path/str(micro))
        train(e, cfg, run, progress=False)
        lam = load_checkpoint(run.folder)['state']['lam']-torch.tensor([cfg.lam0, cfg.z_lam])
        logs.append([read_log(run, 'recon')[1][-1], *lam.tolist()[:1+cfg.posterior]])
    assert abs(logs[0][1])>1e-3
    for other in logs[1:]: assert other==pytest.approx(logs[0], rel=2e-2)

@pytest.mark.parametrize('change', [dict(method=o) for o in ('vae', 'wgan', 'ebm', 'ebm-vae', 'ecflow', 'flow')] + [
    dict(prior='flow'), dict(tether='demo'), dict(reuse=True), dict(dual=False), dict(posterior=True, method='vae'), dict(norm='batch'), dict(precision='bf16')])
def test_rivals_train_and_are_measured(change, tmp_path):
    cfg = replace(TINY, n_iters=2, **change)
    nets = trained(cfg, tmp_path)
    assert np.isfinite(e.evaluate(nets, cfg, n=200)['fid'][0])
    if hasattr(nets, 'decoder'): assert np.isfinite(e.evaluate(nets, cfg, task='posterior', n=8)['elbo'][0])

def test_perceptual_distance_is_added_in_units_of_pixels(monkeypatch): # a stand-in for the package: the mean of the squared difference
    class LPIPS(torch.nn.Module):
        def __init__(self, **how): super().__init__()
        def forward(self, x, y): return (x-y).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, 'lpips', SimpleNamespace(LPIPS=LPIPS))
    e._lpips.cache_clear()
    plain,x = replace(PRESETS['shapes'], batch=8, n_steps=2),load('shapes').tensor(8)
    cfg = replace(plain, distance='lpips')
    assert torch.allclose(e.apart(x, 0*x, cfg), 2*e.apart(x, 0*x, plain))
    ctx = SimpleNamespace(step=0, frac=0., generator=gen(), state={}, ema=None)
    torch.manual_seed(0)
    for name,_,logs in e.losses(e.build(cfg), dict(x=x), cfg, ctx):
        if name=='model': got = logs['distance'].item()
    e._lpips.cache_clear()
    assert got<1.5*e.margin(cfg)                                              # fresh chains are noise: what the margin is compared with knows nothing of the added part

@pytest.mark.parametrize('row,change', [('gaussians25', dict(tau=1e-12)), ('digits', dict(eta=10., pull=0.)), ('digits', dict(tau=1e-12)), ('digits', dict(method='ecflow', lr_vae=.5))])
def test_badly_scaled_energies_are_stopped(row, change, tmp_path): # with the watchdog as the row has it, and the message that names cures
    cfg = replace(PRESETS[row], batch=8, n_steps=3, n_iters=60, save_every=1, log_every=2, flow_depth=1, flow_width=8, **change)
    with pytest.raises(Diverged, match='lower learning rate') as told: trained(cfg, tmp_path)
    assert 'checkpoint' in str(told.value)


# --- what calibration does

def measured(row, tmp_path_factory, **change): # the row's own settings but for its length: networks, settings, scores
    cfg = replace(PRESETS[row], **change)
    nets = trained(cfg, tmp_path_factory.mktemp(row))
    return nets, cfg, {k: v[0] for k,v in e.evaluate(nets, cfg).items()}

@pytest.fixture(scope='module')
def digits(tmp_path_factory): # plain, calibrated, and calibrated by an energy that does not learn
    return {k: measured('digits', tmp_path_factory, n_iters=100, **o) for k,o in dict(vae=dict(method='vae'), ecvae={}, blind=dict(lr=1e-12)).items()}

@pytest.mark.slow
def test_calibration_lowers_the_fid_of_digits(digits): # check 12; measured over three seeds: 48 to 49, 14 to 17, 53
    fid = {k: o[2]['fid'] for k,o in digits.items()}
    print(fid)
    assert fid['ecvae']<.5*fid['vae'] and fid['ecvae']<.5*fid['blind']

@pytest.mark.slow
def test_calibration_moves_points_to_the_modes(tmp_path_factory): # check 12; measured over three seeds: 0.19 to 0.20, 0.27 to 0.29
    plain,calibrated = (measured('gaussians25', tmp_path_factory, n_iters=500, method=o)[2] for o in ('vae', 'ecvae'))
    print(plain, calibrated)
    assert calibrated['near']>plain['near']+.03 and calibrated['modes']==25

def slope_to_noise(f, x, cfg):
    with frozen(f): return e.drift_to_noise(f, x, cfg)

def test_chains_of_a_fresh_energy_are_noise(): # check 10; measured: 0.9e-3 to 1.5e-3
    x = torch.nn.functional.interpolate(load('digits16').tensor(4), size=32, mode='bilinear').repeat(1, 3, 1, 1)
    for seed in range(2):
        torch.manual_seed(seed)
        net = settle_norms(EnergyNet())
        for o in (x.clone(), torch.rand(4, 3, 32, 32, generator=gen(seed))*2-1): assert 5e-4<slope_to_noise(net, o, PRESETS['stl10'])<3e-3

@pytest.mark.slow
def test_a_trained_energy_outweighs_the_noise(digits): # check 10, second half
    nets,cfg,_ = digits['ecvae']
    torch.manual_seed(0)
    before,after = (slope_to_noise(o.energy, load('digits').tensor(64), cfg) for o in (e.build(cfg), nets))
    print(dict(before=before, after=after))
    assert after>10*before


# --- the chapter as a user runs it

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('07_ecvae', tmp_path)

@pytest.mark.parametrize('change', ['method: ecvae', 'method: vae', 'method: ecflow'])
def test_a_small_row_says_its_cost_and_trains(change, tmp_path):
    trains_in_full('07_ecvae', 'ecvae', 'digits', tmp_path, f'{change}, n_iters: 2, batch: 4, n_steps: 2, save_every: 1, log_every: 1, flow_depth: 1, flow_width: 8', says=('2 iterations, about',))
