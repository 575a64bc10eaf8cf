"""Checks of CDRL that take too long for its notebook, and the chapter run as a user runs it.

Numbers of checks refer to the list in the chapter's fact sheet; the other checks are test cells of the notebook.
"""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chapters import ROOT, limit, papermill
from ebmbook import cdrl, mcmc
from ebmbook.cdrl import PRESETS, schedule
from ebmbook.core.nets import count, settle_norms
from ebmbook.core.runs import load_checkpoint, open_run
from ebmbook.core.train import Context, train
from ebmbook.data import edge, in_square
from ebmbook.mcmc import normal, uniform


# --- networks: parameter counts of the paper's rows

COUNTS = { # row: energy, initialiser
    'cifar10':               (34_833_152, 3_769_795),
    'cifar10-large':        (139_265_536, 3_769_795),
    'imagenet32':           (139_265_536, 3_769_795),
    'imagenet32-cond':       (35_346_176, 3_181_443),
    'celeba64-composition':  (11_679_488+4_096, 4_913_859),  # the sheet counts without the 7 x 512 + 512 of the labels
    'celeba64-inpainting':   (45_327_104, 4_913_859),
    'celebahq256-latent':    (34_833_152+1_152, 3_769_795+1_153), # four channels in, and out of the initialiser
}

@pytest.mark.parametrize('row', COUNTS)
def test_parameter_counts(row):
    with torch.device('meta'): nets = cdrl.build(replace(PRESETS[row], norm=False)) # the norm adds buffers only, and time
    assert (count(nets.energy), count(nets.init))==COUNTS[row]

def test_parameter_counts_of_unconditional_variants():
    with torch.device('meta'):
        a = cdrl.build(replace(PRESETS['celeba64-composition'], n_classes=0, norm=False))
        b = cdrl.build(replace(PRESETS['imagenet32-cond'], n_classes=0, norm=False))
        norm,bare = (cdrl.build(replace(PRESETS['cifar10'], blocks=2, norm=o)) for o in (True, False))
    assert count(a.energy)==11_679_488 and count(b.init)==2_924_931
    assert count(norm.energy)==count(bare.energy)


@pytest.mark.parametrize('row', PRESETS)
def test_weights_and_settings_come_back(row, tmp_path):
    torch.manual_seed(0)
    small = replace(PRESETS[row], ch=8, blocks=1, init_ch=8, init_blocks=1, attn=())
    nets = cdrl.build(small)
    nets.save_pretrained(tmp_path)
    again = cdrl.Nets.from_pretrained(tmp_path)
    assert again.cfg==small and hash(again.cfg)==hash(small)   # tuples come back as tuples
    assert all(torch.equal(a, b) for a,b in zip(nets.state_dict().values(), again.state_dict().values(), strict=True))


# --- check 5: the cooperative fixed point

V0,STAR = .25,(2.024, 2.908, 3.054, 2.989, 3.782, 1.023)
LADDER = schedule(PRESETS['cifar10'])

class Levels(nn.Module):
    "One number for each level, looked up by the log signal-to-noise ratio."
    def __init__(self, value, first):
        super().__init__()
        self.value,self.lam = nn.Parameter(torch.full((6,), value)),LADDER.lam[first:first+6]
    def of(self, lam): return self.value[(lam[:,None]-self.lam).abs().argmin(1)]

class Precision(Levels): # f = -p y^2/2, times the squared step
    def at(self, lam, c=None):
        weight = (self.of(lam)*LADDER.step2[(lam[:,None]-self.lam).abs().argmin(1)]/2)[:,None]
        return lambda y: (weight*y**2)[:,0]
    def forward(self, y, lam, c=None): return self.at(lam)(y)

class Slope(Levels): # g = c x
    def forward(self, x, lam, c=None): return self.of(lam)[:,None]*x

@pytest.fixture
def paired_draws(monkeypatch):
    """Both halves of a batch share all draws but those of the chain, which are opposite. No law changes, only the noise of averages.

    At level 0 the 15 updates hardly move a sample, so what the two networks learn from is buried under the chain's own noise:
    with independent draws the precision found there scatters by 5 % even with 60,000 examples in a batch.
    """
    monkeypatch.setattr(cdrl, 'uniform', lambda n, like, g: uniform(n//2, like, g).repeat(2))
    monkeypatch.setattr(cdrl, 'normal', lambda like, g: normal(like[::2], g).repeat(2, 1))
    def opposite(like, g):
        e = normal(like[::2], g)
        return torch.cat([e, -e])
    monkeypatch.setattr(mcmc, 'normal', opposite)

def test_cooperative_training_lands_on_its_fixed_point(paired_draws):
    n_iters,cfg = 600,replace(PRESETS['digits'], shape=(1,), n_steps=15)
    nets = nn.Module()
    nets.energy,nets.init = Precision(3., 0),Slope(.5, 1)
    rate = dict(energy=lambda left: .03*left**2+.001, init=lambda left: .02*left**2+.001)
    opts = {k:torch.optim.Adam(getattr(nets, k).parameters()) for k in rate}
    ctx,tail = Context(0, 0., torch.Generator().manual_seed(0)),[]
    for i in range(n_iters):
        x = V0**.5*torch.randn(3_000, 1, generator=ctx.generator).repeat(2, 1)
        for name,loss,_ in cdrl.losses(nets, dict(x=x), cfg, ctx):
            opts[name].zero_grad()
            loss.backward()
            opts[name].param_groups[0]['lr'] = rate[name](1-i/n_iters)
            opts[name].step()
        if i>=.4*n_iters: tail.append((nets.energy.value.detach().clone(), nets.init.value.detach().clone()))
    p,c = (torch.stack(o).mean(0) for o in zip(*tail))
    pull = 1/LADDER.sigma**2*(torch.arange(6)<5)  # nothing pulls at the top
    print('p/p*', (p/torch.tensor(STAR)).tolist(), 'c/c*', (c*(p+pull)/pull)[:5].tolist())
    assert (p/torch.tensor(STAR)-1).abs().max()<.05
    assert (c*(p+pull)/pull-1)[:5].abs().max()<.02 and c[5].abs()<.02   # the initialiser is the posterior mean of this p


# --- check 11: the checkerboard at full width

@pytest.mark.slow
def test_checkerboard_at_full_width(tmp_path):
    cfg = replace(PRESETS['checkerboard-paper'], n_iters=1_500, batch=512, lr=1e-4, lr_init=3e-4, warmup=0, ema=.999, log_every=500, save_every=500)
    run = open_run('cdrl', 'checkerboard-paper', cfg, PRESETS['checkerboard-paper'], out=tmp_path, device='cpu')
    flat = 16*torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1))-8
    flat,seen = flat[edge(flat).abs()>.4],{}   # the borders of squares belong to neither side
    def measure(nets): # share of samples inside, and how much higher the median of f is there
        x,e = cdrl.sample(nets, 5_000, cfg, generator=torch.Generator().manual_seed(0)),cdrl.energy(nets, flat, cfg)
        return in_square(x).float().mean().item(),(e[~in_square(flat)].median()-e[in_square(flat)].median()).item()
    def look(step, nets): # at the checkpoint just written, with averaged weights
        if step not in (501, 1_001): return
        nets = cdrl.build(cfg)
        nets.load_state_dict({k.removeprefix('module.'):v for k,v in load_checkpoint(tmp_path)['ema'].items() if k!='n_averaged'})
        seen[step-1] = measure(settle_norms(nets).eval())
    seen[1_500] = measure(train(cdrl, cfg, run, progress=False, on_step=look))
    print(seen)
    for n,inside,gap in ((500, .55, 2.5), (1_000, .72, 4.5), (1_500, .78, 5.)): assert seen[n][0]>=inside and seen[n][1]>=gap, seen


# --- the chapter as a user runs it

def write_imagenet32(root, n=8):
    "Data in the official format: ten batches and one for validation, uint8 rows of 3072, labels 1..1000."
    rng = np.random.default_rng(0)
    for name in (*(f'train_data_batch_{i}' for i in range(1, 11)), 'val_data'):
        path = root/'imagenet32'/f'{name}.npz'
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=rng.integers(1, 1001, n), mean=np.zeros(3072))

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    code,said,seconds = papermill('05_cdrl', tmp_path, tmp_path/'nowhere', '-p', 'dataset', 'imagenet32')
    print(f'{seconds:.1f} s')
    assert code!=0 and 'FileNotFoundError' in said
    for o in ('train_data_batch_1.npz', 'val_data.npz'): assert o in said                # what is missing
    assert str(tmp_path/'nowhere') in said and 'EBMBOOK_DATA' in said                     # where it was looked for
    assert 'image-net.org' in said                                                        # how to get it
    assert seconds<limit(20)

def test_wrong_names_end_the_chapter_in_seconds(tmp_path):
    code,said,seconds = papermill('05_cdrl', tmp_path, tmp_path, '-p', 'dataset', 'digits', '-p', 'preset', 'digit')
    assert code!=0 and "did you mean 'digits'" in said and seconds<limit(20)

def test_the_chapter_trains_on_a_folder_in_the_official_format(tmp_path):
    write_imagenet32(tmp_path/'data')
    over = 'over: {n_iters: 2, batch: 4, ch: 8, blocks: 1, init_ch: 8, init_blocks: 1, n_steps: 2, save_every: 1, log_every: 1, n_eval: 16}'
    code,said,seconds = papermill('05_cdrl', tmp_path, tmp_path/'data', '-p', 'dataset', 'imagenet32', '-p', 'out', str(tmp_path/'run'), '-y', over)
    print(f'{seconds:.1f} s')
    assert code==0, said[-3000:]
    run = tmp_path/'run'
    assert load_checkpoint(run)['step']==2 and (run/'weights/model.safetensors').is_file()
    assert [json.loads(o)['total'] for o in (run/'log.jsonl').read_text().splitlines()]==[1, 2]
    record = [json.loads(o) for o in (run/'record.jsonl').read_text().splitlines()]
    assert record and all(o['system']=='cdrl' and o['row']=='imagenet32' and o['over']['n_iters']==2 and np.isfinite(o['value']) for o in record)
    pictures = [o for c in json.loads((tmp_path/'out.ipynb').read_text())['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert pictures and not list((ROOT/'runs').glob('cdrl/imagenet32*'))
    assert seconds<limit(180)
