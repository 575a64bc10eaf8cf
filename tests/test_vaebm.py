"""Checks of VAEBM that take too long for its notebooks, and the chapter run as a user runs it.

Numbers of checks refer to section 8 of the chapter's fact sheet. 2 to 5, 9, 10 and 12 are test cells of the chapter; 6, 8 and 13 of its NVAE page; 7 and 13 of
the page of its networks; 1 is in test_mcmc.py, 15 in the page of metrics. 11, 14 and 16 are here.
"""
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from chapters import claims_can_be_measured, ends_without_data, trains_in_full
from ebmbook import vaebm as v
from ebmbook.core.nets import count
from ebmbook.core.runs import load_checkpoint, open_run
from ebmbook.core.train import Diverged, train
from ebmbook.data import DATASETS, load
from ebmbook.nvae import ROWS as NVAE_ROWS
from ebmbook.nvae import nvae
from ebmbook.vaebm import PRESETS

TINY = replace(PRESETS['digits'], ch=4, groups=(1, 1), latent=2, net='4/2 4', first=4, n_steps=2, n_steps_test=2, batch=8, batch_vae=8, n_vae=3, n_iters=4, warm_vae=1, save_every=2, log_every=1)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def trained(cfg, folder, row='digits', **how): return train(v, cfg, open_run('vaebm', row, cfg, out=folder, device='cpu'), progress=False, **how)


# --- the paper's rows

TABLE = { # fact sheet, section 4: epochs of the autoencoder, steps of the energy, K, eta, K when sampling, rate, batch; millions of parameters of the energy; parameters of the autoencoder
    'cifar10':            (400, 25_000, 10, 8e-5, 16, 4e-5, 32, 5.138, 130_744_004), 'cifar10-persistent': (400, 25_000, 6, 6e-5, 16, 4e-5, 32, 5.138, 130_744_004),
    'celeba64':           (50, 20_000, 10, 5e-6, 20, 5e-5, 32, 4.338, 65_005_372),   'lsun_church64':      (60, 20_000, 10, 4e-6, 20, 4e-5, 32, 5.814, 65_005_372),
    'celebahq256':        (200, 9_000, 6, 3e-6, 24, 4e-5, 16, 14.207, 365_372_032),
}
@pytest.mark.parametrize('row', TABLE)
def test_rows_of_the_paper(row):
    cfg,(epochs,n,K,eta,K_test,lr,batch,energy,vae) = PRESETS[row],TABLE[row]
    assert abs(cfg.n_vae*cfg.batch_vae/DATASETS[cfg.data].n[0]-epochs)<.01
    assert (cfg.n_iters, cfg.n_steps, cfg.eta, cfg.n_steps_test, cfg.lr, cfg.batch)==(n, K, eta, K_test, lr, batch)
    assert (cfg.p_max>0)==(row in ('cifar10-persistent', 'lsun_church64', 'celebahq256')) and (cfg.negative=='mean')==(cfg.data!='cifar10')
    assert (cfg.potential, cfg.method, cfg.penalty, cfg.n_jumps, cfg.spectral, cfg.weight_decay)==('paper', 'vaebm', 0., 0, .2, 3e-5)
    assert cfg.lr_vae*cfg.lr_last==pytest.approx(1e-4)                        # where the rate of the autoencoder ends, on every data set
    with torch.device('meta'): nets = v.build(cfg)
    assert round(count(nets.energy)/1e6, 3)==energy and count(nets.vae)==vae and cfg.std=='each'

@pytest.mark.parametrize('row', NVAE_ROWS)
def test_autoencoders_are_those_of_the_page_on_nvae(row):
    with torch.device('meta'): ours,theirs = v.build(PRESETS[row]).vae.state_dict(),nvae(row).state_dict()
    assert {k: o.shape for k,o in ours.items()}=={k: o.shape for k,o in theirs.items()}
    assert PRESETS[row].std==NVAE_ROWS[row].get('std', 'each')

@pytest.mark.parametrize('row,want', [('cifar10', .0358), ('celeba64', .0100), ('lsun_church64', .0089), ('celebahq256', .0085)])
def test_noise_budget(row, want): # check 14
    assert round(math.sqrt(PRESETS[row].eta*PRESETS[row].n_steps_test), 4)==want

@pytest.mark.parametrize('row', PRESETS)
def test_weights_and_settings_come_back(row, tmp_path):
    torch.manual_seed(0)
    one = dict(ch=4, groups=(1,)*len(PRESETS[row].groups), latent=2, cells=1, net='4/2 4', first=4)
    nets = v.build(replace(PRESETS[row], **one))
    nets.save_pretrained(tmp_path)
    again = v.Nets.from_pretrained(tmp_path)
    assert again.cfg==nets.cfg and hash(again.cfg)==hash(nets.cfg)
    assert all(torch.equal(a, b) for a,b in zip(nets.state_dict().values(), again.state_dict().values(), strict=True))

def test_settings_can_be_sent_to_another_process(): assert pickle.loads(pickle.dumps(PRESETS['cifar10']))==PRESETS['cifar10']


# --- training

def test_second_stage_leaves_the_autoencoder_alone(tmp_path): # check 11, running statistics included
    class Watch:
        seen,state = 0,None
        def __call__(self, step, nets):
            if self.seen==TINY.n_vae: self.state = {k: o.clone() for k,o in nets.vae.state_dict().items()}
            self.seen += 1
    watch = Watch()
    nets = trained(TINY, tmp_path, on_step=watch)
    assert watch.state is not None and all(torch.equal(o, watch.state[k]) for k,o in nets.vae.state_dict().items())

@pytest.mark.parametrize('change', [{}, dict(p_max=.6, p_rise=2, buffer=16)])
def test_training_continues_to_the_last_bit(change, tmp_path):
    cfg = replace(TINY, **change)
    a = trained(cfg, tmp_path/'a')
    class Enough(Exception): pass
    def stop(step, nets):
        if stop.seen==5: raise Enough                                         # in the second stage, behind a checkpoint
        stop.seen += 1
    stop.seen = 0
    with pytest.raises(Enough): trained(cfg, tmp_path/'b', on_step=stop)
    b = trained(cfg, tmp_path/'b')
    assert all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.mark.parametrize('change', [dict(method='vae'), dict(method='ebm', buffer=16), dict(method='ebm-vae'), dict(method='wgan'), dict(decoder=True), dict(space='xz'), dict(potential='official'),
    dict(micro=2), dict(micro=2, method='wgan'), dict(micro=2, decoder=True)])
def test_rivals_train_and_are_measured(change, tmp_path): # and a decoder changes after its own stage where it is to be trained on the energy, and only there
    cfg,old = replace(TINY, lr_decoder=1e-2, **change),{}
    def look(step, nets):
        if look.n==cfg.n_vae: old.update({k: o.clone() for k,o in nets.vae.named_parameters()})
        look.n += 1
    look.n = 0
    nets = trained(cfg, tmp_path, on_step=look)
    assert all(o.requires_grad for o in nets.parameters())                    # nothing stays frozen, in however many parts a batch came
    assert np.isfinite(v.evaluate(nets, cfg, n=200)['fid'][0])
    changed = {k.split('.')[0] for k,o in nets.vae.named_parameters() if old and not torch.equal(o, old[k])}
    assert changed==({'decoder'} if change.get('decoder') or change.get('method')=='wgan' else set())

def test_badly_scaled_energies_are_stopped(tmp_path): # chains from an energy far too steep, and the message that names cures
    cfg = replace(TINY, eta=50., n_iters=400, lr=.5, log_every=2, spectral=0., cautious=False)
    with pytest.raises(Diverged, match='lower learning rate') as e: trained(cfg, tmp_path)
    assert 'checkpoint' in str(e.value) and load_checkpoint(tmp_path) is not None

@pytest.mark.slow
def test_energy_of_data_falls_below_that_of_the_autoencoder(tmp_path): # check 16
    cfg = replace(PRESETS['gaussians25'], n_vae=1_000, n_iters=300)
    nets = trained(cfg, tmp_path, 'gaussians25')
    x,made = load('gaussians25', split='test').tensor(2_000),v.sample(nets, 2_000, replace(cfg, method='vae'), generator=gen())
    before,after = v.energy(nets, x).mean().item(),v.energy(nets, made).mean().item()
    refined = v.energy(nets, v.sample(nets, 2_000, cfg, n_steps=20, generator=gen())).mean().item()
    print(dict(data=before, autoencoder=after, chain=refined))
    assert before<after-.1 and refined<after-.1

def test_every_claim_names_rows_and_metrics_that_exist(): claims_can_be_measured(v, dict(ch=4, groups=(1, 1), latent=2, net='4/2 4', first=4, n_steps=2, n_steps_test=2, buffer=32))


# --- the chapter as a user runs it

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('06_vaebm', tmp_path)

def test_a_small_row_says_its_cost_and_trains(tmp_path):
    over = 'n_vae: 2, n_iters: 2, batch: 4, batch_vae: 4, ch: 4, groups: [1, 1], net: "4/2 4", first: 4, n_steps: 2, n_steps_test: 2, save_every: 1, log_every: 1'
    trains_in_full('06_vaebm', 'vaebm', 'digits', tmp_path, over, says=('stage vae: 2 iterations, about', 'stage energy: 2 iterations, about'))
