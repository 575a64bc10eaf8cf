"""Checks of NeRF-LEBM that take too long for its notebook, an iteration written out in plain PyTorch beside the chapter's, and the chapter run as a user runs it.

Numbers of checks refer to section 7 of the chapter's fact sheet. 1 to 3, 7 and 8 are of the page of the field, 4, 5, 6, 9, 10 and 11 are test cells of the chapter.
Here are 11 through the loop of the book, and what a training leaves behind.
"""
import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from chapters import ROOT, claims_can_be_measured, ends_without_data, trains_in_full
from ebmbook import nerf_lebm as l
from ebmbook.core.config import choose
from ebmbook.core.cost import seconds_per_iteration
from ebmbook.core.runs import load_checkpoint, open_run
from ebmbook.core.scenes import camera_to_world, rays
from ebmbook.core.train import Context, Diverged, gather_rows, new_table, read_log, train
from ebmbook.data import load
from ebmbook.mcmc import Slice
from ebmbook.nerf_lebm import PRESETS

TINY = replace(PRESETS['cars'], batch=4, n_iters=4, rays=12, n_depths=6, width=16, depth=2, mapping=0, prior_steps=2, post_steps=2, n_neg=5, save_every=2, log_every=1, focus=1.)
KINDS = dict(amortised={}, mcmc=dict(inference='mcmc', gen_steps=2), persistent=dict(inference='persistent', data='cars_masked', views=2), vmf=dict(pose='vmf', field='siren', mapping=8, anneal=(3., 3)), half=dict(pose='vmf', half=True, tilt=(10., 60.), warm=(1, 2)), plain=dict(prior='gaussian'), fine=dict(n_fine=3))

def gen(seed=0): return torch.Generator().manual_seed(seed)
def trained(cfg, folder, **how): return train(l, cfg, open_run('nerf_lebm', 'cars', cfg, out=folder, device='cpu'), progress=False, **how)
def built(cfg, seed=0):
    torch.manual_seed(seed)
    return l.build(cfg)
def context(step=0, seed=0): return Context(step, 0., gen(seed))


# --- rows

@pytest.mark.parametrize('row', PRESETS)
def test_a_row_can_be_chosen_checked_and_sent(row):
    cfg = choose(PRESETS, l.DEFAULT_ROW, PRESETS[row].data, row, 'sigma: 0.1')[1]
    assert l.check_config(cfg)==replace(PRESETS[row], sigma=.1) and pickle.loads(pickle.dumps(cfg))==cfg

def test_every_experiment_names_a_row():
    files = sorted((ROOT/'experiments').glob('nerf_lebm_*.yaml'))
    assert {o.stem.removeprefix('nerf_lebm_') for o in files}=={o for o in PRESETS if not o.endswith('-claim')}
    for o in files:
        said = yaml.safe_load(o.read_text())
        l.check_config(choose(PRESETS, l.DEFAULT_ROW, said['dataset'], said['preset'], said['over'])[1])

def test_every_claim_names_rows_and_metrics_that_exist():
    claims_can_be_measured(l, dict(n_depths=3, prior_steps=1, width=8, depth=1), n=260, quick=dict(views=dict(n=1), swap=dict(n=1), pose=dict(n=10)))

def test_the_cost_of_a_row_can_be_told():
    for change in (KINDS['amortised'], KINDS['mcmc'], KINDS['vmf']):
        cfg = replace(TINY, **change)
        took,n = seconds_per_iteration(l.STAGES[0], built(cfg), cfg, 'cpu', budget=.01)
        assert took>0 and n>=1


# --- one iteration, written out; the thesis's sign, where a likely code has a high value

def painted(nets, cfg, z, c2w, x, g): # log p(I|z) of the pixels that are looked at, with their number
    size = cfg.shape[1]
    at = torch.rand(len(x)*size*size, generator=g).view(len(x), -1).topk(cfg.rays, 1).indices
    origin,ray = rays(c2w, size, 30., at)
    want = torch.stack([(x[i].flatten(1)[:,at[i]].T+1)/2 for i in range(len(x))])
    def value(s, a):
        u = torch.rand(len(x)*cfg.rays*cfg.n_depths, generator=g).view(len(x), cfg.rays, -1)
        t = 3.2+2.6*(torch.arange(cfg.n_depths)+u)/cfg.n_depths
        density,rgb = nets.field((origin[:,:,None]+t[...,None]*ray[:,:,None]).flatten(1, 2), ray[:,:,None].expand(-1, -1, cfg.n_depths, -1).flatten(1, 2), s, a)
        density,rgb = density.view(t.shape),rgb.view(*t.shape, 3)
        steps = torch.cat([t[...,1:], torch.full_like(t[...,:1], 5.8)], 2)-t
        thick,left,colour = density*steps*ray.norm(dim=2)[...,None],torch.ones(t.shape[:2]),0.
        for k in range(cfg.n_depths): # front to back
            here = 1-torch.exp(-thick[...,k])
            colour,left = colour+(left*here)[...,None]*rgb[:,:,k],left*(1-here)
        colour = colour+left[...,None]
        return -((want-colour)**2).sum((1, 2))*size*size/cfg.rays/(2*cfg.sigma**2*cfg.temp)
    return value

def f(net, z): return -net(z) # the thesis's f

def prior_value(nets, s, a): return f(nets.e_shape, s)+f(nets.e_colour, a)-(s.square().sum(1)+a.square().sum(1))/2

def climb(value, z, s, w, n, g): # both codes at once
    for _ in range(n):
        z = [o.detach().requires_grad_() for o in z]
        slopes = torch.autograd.grad(value(*z).sum(), z)
        z = [(o+s**2/2*d).detach()+(w*s*torch.randn(o.shape, generator=g) if w else 0) for o,d in zip(z, slopes)]
    return z

def grads(nets, loss):
    nets.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k,p in nets.named_parameters() if p.grad is not None}

def agree(a, b): # gradients that one of them lacks are zero
    for k in a.keys() | b.keys():
        x,y = (o.get(k) for o in (a, b))
        x,y = (torch.zeros_like(y) if x is None else x),(torch.zeros_like(x) if y is None else y)
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4*max(1e-3, y.abs().max().item())), k

@pytest.mark.parametrize('noise', [0., .7])
def test_an_iteration_of_chains_written_out(noise): # Algorithm 1
    cfg = replace(TINY, inference='mcmc', post_noise=noise, prior_noise=.4, temp=40.)
    nets,g = built(cfg),gen(1)
    b = load('cars').batch(range(4))
    ours = [(name, grads(nets, loss)) for name,loss,_ in l.losses(nets, b, cfg, context(seed=1))]
    value = painted(nets, cfg, None, b['c2w'], b['x'], g)
    z = [torch.randn(4, k, generator=g) for k in cfg.nz]
    z = climb(lambda s, a: value(s, a)+prior_value(nets, s, a), z, cfg.post_step, noise, cfg.post_steps, g)
    field = grads(nets, -value(*z).mean())
    low = [torch.randn(cfg.n_neg, k, generator=g) for k in cfg.nz]
    low = climb(lambda s, a: prior_value(nets, s, a), low, cfg.prior_step, .4, cfg.prior_steps, g)
    prior = grads(nets, -sum(f(e, p).mean()-f(e, m).mean() for e,p,m in zip((nets.e_shape, nets.e_colour), z, low)))
    assert [o for o,_ in ours]==['field', 'prior']
    agree({k: v for k,v in ours[0][1].items() if k.startswith('field')}, {k: v for k,v in field.items() if k.startswith('field')})
    agree({k: v for k,v in ours[1][1].items() if k.startswith('e_')}, {k: v for k,v in prior.items() if k.startswith('e_')})

def test_an_iteration_of_the_encoder_written_out(): # Algorithm 2
    cfg = replace(TINY, temp=40.)
    nets,g = built(cfg),gen(1)
    b = load('cars').batch(range(4))
    (name,ours),*_ = [(name, grads(nets, loss)) for name,loss,_ in l.losses(nets, b, cfg, context(seed=1))]
    seen = nets.encoder(b['x'])
    q = [torch.distributions.Normal(m, (v/2).exp()) for m,v in zip(seen.mean, seen.log_var)]
    z = [o.loc+o.scale*torch.randn(o.loc.shape, generator=g) for o in q]
    kl = sum(torch.distributions.kl_divergence(o, torch.distributions.Normal(0., 1.)).sum(1) for o in q)
    value = painted(nets, cfg, None, b['c2w'], b['x'], g)(*z)
    elbo = value-kl+f(nets.e_shape, z[0])+f(nets.e_colour, z[1])
    agree({k: v for k,v in ours.items() if not k.startswith('e_')}, {k: v for k,v in grads(nets, -elbo.mean()).items() if not k.startswith('e_')})
    assert name=='field'

@pytest.mark.parametrize('change', [dict(inference='mcmc', post_steps=0), dict()], ids=str)
def test_sigma_is_wide_at_first(change): # four times at the start, so the misfit counts a sixteenth; the squared error that is told stays what it is
    cfg = replace(TINY, **change, anneal=(4., 10))
    nets,said = built(cfg),{}
    for step in (0, 5, 10):
        _,loss,logs = next(l.losses(nets, load('cars').batch(range(4)), cfg, context(step, 3)))
        said[step] = (loss-logs.get('cost', 0)).item(),logs['mse'].item()
    assert [said[10][0]/said[k][0] for k in (0, 5)]==pytest.approx([16, 6.25], rel=1e-3)
    assert said[0][1]==pytest.approx(said[10][1], rel=1e-3)

@pytest.mark.parametrize('n_fine', [0, 3])
def test_the_squared_error_that_is_told_is_of_one_field(n_fine):
    cfg = replace(TINY, inference='mcmc', n_fine=n_fine)
    _,loss,logs = next(l.losses(built(cfg), load('cars').batch(range(4)), cfg, context()))
    assert logs['mse'].item()==pytest.approx(loss.item()*2*cfg.sigma**2*cfg.temp/3072/(2 if n_fine else 1), rel=1e-5)

def test_rates_fall_by_ten_and_waiting_ones_do_not():
    for warm,heads in (((0, 0), .1), ((10, 20), 1.)):
        cfg = replace(TINY, **KINDS['vmf'] | dict(warm=warm), decay=1000.)
        assert l.optimisers(built(cfg), cfg)['field'].schedule(1000)==pytest.approx((.1, .1, heads))

@pytest.mark.parametrize('task', ['views', 'swap'])
def test_codes_are_sought_in_good_pixels(task, monkeypatch):
    nets,asked = built(replace(TINY, **KINDS['persistent'])),[]
    ours = l.codes_of
    monkeypatch.setattr(l, 'codes_of', lambda *args, mask=None, **kw: asked.append(mask) or ours(*args, mask=mask, **kw))
    for masked in (True, False): l.evaluate(nets, replace(nets.cfg, masked=masked), n=2, task=task, n_steps=1)
    good = load('cars_masked', split='test')
    rows = [0, 5, 10, 15] if task=='views' else [0, 10, 20, 30]
    assert torch.equal(asked[0].flatten(0, 1), good.batch(rows)['mask'].bool()) and asked[1] is None

def test_a_loss_does_not_see_spoiled_pixels(): # unless it is told to
    batch = load('cars_masked').batch(range(4))
    other = batch | dict(x=torch.where(batch['mask'].bool(), batch['x'], -batch['x']))
    for masked in (True, False):
        cfg = replace(TINY, data='cars_masked', inference='mcmc', rays=200, masked=masked)
        nets = built(cfg)
        one,two = (next(l.losses(nets, b, cfg, context(seed=3)))[1].item() for b in (batch, other))
        assert (one==two)==masked

def test_codes_that_persist_and_codes_that_are_sought_have_their_own_rates(): # Adam's first step has the length of its rate
    cfg = replace(TINY, **KINDS['persistent'], lr_code=.01, lr_find=.3)
    nets,c = built(cfg),context()
    c.state |= new_table(torch.zeros(256, 24))
    batch = load('cars_masked').batch(range(0, 40, 10))
    next(l.losses(nets, batch, cfg, c))
    assert torch.allclose(c.state['z'][:4].abs(), torch.full((4, 24), .01), rtol=1e-2)
    found = torch.cat(l.find_codes(nets, batch['x'][:,None], batch['c2w'][:,None], cfg, n_steps=1, generator=gen()), 1)
    assert torch.allclose((found-torch.cat(l.start_codes(4, cfg, found, gen()), 1)).abs(), torch.full((4, 24), .3), rtol=1e-2)

def test_prior_chains_are_divided_over_parts(monkeypatch):
    cfg,asked = replace(TINY, n_neg=6),[]
    monkeypatch.setattr(l, 'draw_prior', lambda nets, n, *args, **kw: asked.append(n) or l.start_codes(n, cfg, next(nets.parameters())))
    for g in (gen(), Slice(gen(), 1, 2)):
        for _ in l.losses(built(cfg), load('cars').batch(range(4)), cfg, Context(0, 0., g)): pass
    assert asked==[6, 3]

def test_the_camera_of_a_picture_learns(): # the gradient of the likelihood reaches the heads of the camera
    for kind in ('vmf', 'half'):
        cfg = replace(TINY, **KINDS[kind])
        nets = built(cfg)
        got = grads(nets, next(l.losses(nets, load('cars').batch(range(4)), cfg, context()))[1])
        for k in range(4): assert got[f'encoder.turn.{k}.weight'].abs().sum()>0

def test_half_a_turn_and_bounds_of_the_elevation_hold_everywhere(): # in the encoder's answer, in the camera that is drawn for it, in new cameras
    cfg = replace(TINY, pose='vmf', half=True, tilt=(20., 30.))
    nets = built(cfg)
    found = l.predicted_angles(nets, load('cars'), 300).rad2deg()
    assert found.shape==(300, 2) and found[:,0].abs().max()<=90 and 20<=found[:,1].min()<found[:,1].max()<=30
    seen = nets.encoder(load('cars').batch(range(300))['x'])
    for how in (dict(mode=True), dict(generator=gen())):
        up = l.turned(seen, cfg, **how)[:,2,2].asin().rad2deg()
        assert 19.99<=up.min()<up.max()<=30.01
    l.settle(nets, cfg, n=300)
    up = l.draw_cameras(nets, 200, cfg, gen())[:,2,2].asin().rad2deg()
    assert 18<=up.min()<up.max()<=32 # a cell of the histogram has 1.8 degrees

def test_codes_wait_until_cameras_had_their_time(tmp_path): # heads of the codes start at zero, and stay there before `warm` begins
    heads = [trained(replace(TINY, **KINDS['half'] | dict(warm=o, ema=0.)), tmp_path/str(i)).encoder.heads[0].weight.abs().sum() for i,o in enumerate(((9, 1), (0, 0)))]
    assert heads[0]==0<heads[1]

def test_depth_of_a_new_object_does_not_know_its_paint(): # check 3, through the chapter
    cfg = replace(TINY, inference='mcmc')
    nets = built(cfg)
    s,a = l.draw_prior(nets, 2, cfg, generator=gen())
    c2w = camera_to_world(torch.tensor([[.3, .4], [.3, .4]]))
    one,two = (l.draw_images(nets, (s[:1].expand(2, -1), o), c2w, cfg) for o in (a, a.flip(0)))
    assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])


# --- training

def same(a, b): # two checkpoints, to the last bit
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a if k not in ('seconds', 'python'))
    return all(map(same, a, b)) and len(a)==len(b) if isinstance(a, (list, tuple)) else a==b

def _process(rank, folder): # one of two that see objects 0 and 2, and 2 and 3
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.save(gather_rows(torch.tensor([[2, 0], [2, 3]][rank]), (rank+1)*torch.tensor([[1.], [2.]])), f'{folder}/{rank}')
    dist.destroy_process_group()

def test_what_two_processes_find_for_one_object_is_added(tmp_path):
    torch.multiprocessing.start_processes(_process, (str(tmp_path),), nprocs=2, start_method='spawn')
    a,b = (torch.load(tmp_path/str(o)) for o in (0, 1))
    assert same(a, b) and a[0].tolist()==[0, 2, 3] and a[1].flatten().tolist()==[2, 3, 4]

@pytest.mark.slow
def test_two_processes_keep_one_table(tmp_path): # the codes that persist, and the curves, are those of one process
    over = 'n_iters: 6, batch: 8, rays: 12, n_depths: 6, width: 16, depth: 2, prior_steps: 2, n_neg: 6, save_every: 6, log_every: 1, ema: 0.'
    def command(*how, out): return [sys.executable, '-m', *how, 'ebmbook.core.cli', 'train', 'nerf_lebm', '-p', 'preset', 'cars-twoshot', '-p', 'over', f'{{{over}}}', '-p', 'out', str(out)]
    two = ('torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m')
    for how,out in (((), 'one'), (two, 'two')):
        said = subprocess.run(command(*how, out=tmp_path/out), cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), capture_output=True, text=True)
        assert said.returncode==0, said.stderr[-2000:]
    a,b = (load_checkpoint(tmp_path/o) for o in ('one', 'two'))
    assert same(a['state']['t'], b['state']['t']) and torch.allclose(a['state']['z'], b['state']['z'], atol=2e-3)
    for k,v in a['nets'].items(): assert torch.allclose(v, b['nets'][k], atol=2e-3), k

class Enough(Exception): pass

@pytest.mark.parametrize('kind', KINDS)
def test_training_continues_to_the_last_bit(kind, tmp_path):
    cfg = replace(TINY, **KINDS[kind])
    a = trained(cfg, tmp_path/'a')
    def stop(step, nets):
        if step==3: raise Enough
    with pytest.raises(Enough): trained(cfg, tmp_path/'b', on_step=stop)
    assert load_checkpoint(tmp_path/'b')['step']==2
    b = trained(cfg, tmp_path/'b')
    assert same(a.state_dict(), b.state_dict()) and same(*(load_checkpoint(tmp_path/o) for o in 'ab'))

def test_codes_of_objects_are_in_the_checkpoint(tmp_path): # 256 objects, of which 16 at most were seen, one step each time
    cfg = replace(TINY, **KINDS['persistent'])
    trained(cfg, tmp_path)
    state = load_checkpoint(tmp_path)['state']
    assert state['z'].shape==(256, 24) and 4<=(state['t']>0).sum()<=16 and not state['m'][state['t']==0].any() and state['t'].sum()<=16

def test_without_energies_it_is_the_baseline(tmp_path): # check 11: energies that stay where they are, and say nothing, change nothing
    cfg = replace(TINY, **KINDS['plain'])
    plain = trained(cfg, tmp_path/'plain')
    tilted = built(replace(cfg, prior='ebm'))
    with torch.no_grad(): [p.zero_() for e in (tilted.e_shape, tilted.e_colour) for p in e.parameters()]
    base = built(cfg)
    for k,v in base.state_dict().items(): tilted.state_dict()[k].copy_(v)
    batch = load('cars').batch(range(4))
    one,two = (next(l.losses(o, batch, c, context(seed=4)))[1] for o,c in ((base, cfg), (tilted, replace(cfg, prior='ebm'))))
    assert torch.equal(one, two) and not any(k.startswith('e_') for k in plain.state_dict())

@pytest.mark.parametrize('change', [dict(reference='uniform', inference='mcmc'), dict(reference='free', inference='mcmc'), dict(alternate=True, inference='mcmc'), dict(last='endless'), dict(masked=False, data='cars_masked', inference='persistent'),
    dict(ramp=(1, 3), inference='mcmc'), dict(precision='bf16'), dict(focus=5.), dict(encoder='resnet34'), dict(views=2, data='cars_views')], ids=str)
def test_switches_train(change, tmp_path):
    cfg = replace(TINY, **change)
    nets = trained(cfg, tmp_path)
    mse = read_log(open_run('nerf_lebm', 'cars', cfg, out=tmp_path, device='cpu'), 'mse')[1]
    assert len(mse)==4 and all(0<o<1 for o in mse)
    assert torch.isfinite(l.sample(nets, 2, cfg, generator=gen())).all()

def test_a_training_that_leaves_its_bounds_is_stopped(tmp_path):
    with pytest.raises(Diverged, match='not finite|energy gap'): trained(replace(TINY, lr=float('inf')), tmp_path)

def test_averaged_weights_are_what_is_left(tmp_path):
    cfg = replace(TINY, ema=.5)
    raw = {}
    nets = trained(cfg, tmp_path, on_step=lambda step, nets: raw.update(copy.deepcopy(nets.state_dict())))
    mean = {k.removeprefix('module.'): o for k,o in load_checkpoint(tmp_path)['ema'].items()}
    for k,o in nets.named_parameters(): assert torch.equal(o, mean[k])
    assert not torch.equal(nets.state_dict()['field.density.weight'], raw['field.density.weight'])


# --- the chapter as a user runs it

def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('03_nerf_lebm', tmp_path, 'carla')

@pytest.mark.slow
@pytest.mark.parametrize('change', ['inference: mcmc', 'pose: vmf, field: siren, mapping: 8', 'prior: gaussian'])
def test_a_small_row_says_its_cost_and_trains(change, tmp_path):
    trains_in_full('03_nerf_lebm', 'nerf_lebm', 'cars', tmp_path, f'{change}, n_iters: 2, batch: 4, rays: 10, n_depths: 6, width: 16, depth: 2, post_steps: 2, save_every: 1, log_every: 1', says=('2 iterations', 'about'))
