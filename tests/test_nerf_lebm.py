"""Checks of NeRF-LEBM that take too long for its notebook.

An iteration written out in plain PyTorch beside the chapter's, switches through the loop of
the book, what a training leaves behind, and the chapter run as a user runs it.
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

from ebmbook import nerf_lebm as lebm
from ebmbook.data import load
from ebmbook.data.scenes import camera_to_world, rays
from ebmbook.learn.contract import Context, Diverged
from ebmbook.learn.latents import gather_rows, new_table
from ebmbook.learn.log import read_log
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.learn.settings import choose
from ebmbook.mcmc import Slice
from ebmbook.nerf_lebm import PRESETS
from ebmbook.shell.cost import seconds_per_iteration

TINY = replace(
    PRESETS['cars'],
    batch=4,
    n_iters=4,
    rays=12,
    n_depths=6,
    width=16,
    depth=2,
    mapping=0,
    prior_steps=2,
    post_steps=2,
    n_neg=5,
    save_every=2,
    log_every=1,
    focus=1.0,
)
KINDS = {
    'amortised': {},
    'mcmc': dict(inference='mcmc', gen_steps=2),
    'persistent': dict(inference='persistent', data='cars_masked', views=2),
    'vmf': dict(pose='vmf', field='siren', mapping=8, anneal=(3.0, 3)),
    'half': dict(pose='vmf', half=True, tilt=(10.0, 60.0), warm=(1, 2)),
    'plain': dict(prior='gaussian'),
    'fine': dict(n_fine=3),
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(cfg, folder, **options):
    run = open_run('nerf_lebm', 'cars', cfg, out=folder, device='cpu')
    return train(lebm.SYSTEM, cfg, run, progress=False, **options)


def built(cfg, seed=0):
    torch.manual_seed(seed)
    return lebm.build(cfg)


def context(step=0, seed=0):
    return Context(step, 0.0, gen(seed))


def cars(n=4, data='cars'):
    return load(data).batch(range(n))


def first_loss(nets, batch, ctx):  # the loss of the first group, and its logs
    _, loss, logs = next(lebm.losses(nets, batch, ctx))
    return loss, logs


# --- presets


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_can_be_chosen_checked_and_sent(name):
    over = 'sigma: 0.1'
    cfg = choose(PRESETS, lebm.DEFAULT_PRESET, PRESETS[name].data, name, over)[1]
    assert lebm.check_config(cfg) == replace(PRESETS[name], sigma=0.1)
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_every_experiment_names_a_preset():
    files = sorted((ROOT / 'experiments').glob('nerf_lebm_*.yaml'))
    names = {path.stem.removeprefix('nerf_lebm_') for path in files}
    assert names == {name for name in PRESETS if not name.endswith('-claim')}
    for path in files:
        given = yaml.safe_load(path.read_text())
        selected = (given['dataset'], given['preset'], given['over'])
        lebm.check_config(choose(PRESETS, lebm.DEFAULT_PRESET, *selected)[1])


def test_every_claim_names_presets_and_metrics_that_exist():
    tiny = dict(n_depths=3, prior_steps=1, width=8, depth=1)
    quick = dict(views=dict(n=1), swap=dict(n=1), pose=dict(n=10))
    claims_can_be_measured(lebm, tiny, n=260, quick=quick)


@pytest.mark.parametrize('kind', ['amortised', 'mcmc', 'vmf'])
def test_the_cost_of_a_preset_can_be_estimated(kind):
    cfg = replace(TINY, **KINDS[kind])
    took, n = seconds_per_iteration(lebm.STAGES[0], built(cfg), 'cpu', budget=0.01)
    assert took > 0 and n >= 1


# --- one iteration, written out; the thesis's sign, where a likely code has a high value


def drawn(nets, cfg, origin, ray, codes, generator):  # colours of rays, front to back
    shape = (len(origin), cfg.rays, cfg.n_depths)
    jitter = torch.rand(len(origin) * cfg.rays * cfg.n_depths, generator=generator).view(
        shape
    )
    t = 3.2 + 2.6 * (torch.arange(cfg.n_depths) + jitter) / cfg.n_depths
    points = (origin[:, :, None] + t[..., None] * ray[:, :, None]).flatten(1, 2)
    directions = ray[:, :, None].expand(-1, -1, cfg.n_depths, -1).flatten(1, 2)
    density, rgb = nets.field(points, directions, *codes)
    density, rgb = density.view(shape), rgb.view(*shape, 3)
    segment = torch.cat([t[..., 1:], torch.full_like(t[..., :1], 5.8)], 2) - t
    thick = density * segment * ray.norm(dim=2)[..., None]
    left, colour = torch.ones(shape[:2]), 0.0
    for i in range(cfg.n_depths):
        here = 1 - torch.exp(-thick[..., i])
        colour = colour + (left * here)[..., None] * rgb[:, :, i]
        left = left * (1 - here)
    return colour + left[..., None]


def painted(nets, cfg, c2w, x, generator):  # log p(I|z), from the pixels that are looked at
    size = cfg.shape[1]
    drawing = torch.rand(len(x) * size * size, generator=generator).view(len(x), -1)
    at = drawing.topk(cfg.rays, 1).indices
    origin, ray = rays(c2w, size, 30.0, at)
    want = torch.stack([(x[i].flatten(1)[:, at[i]].T + 1) / 2 for i in range(len(x))])

    def value(*codes):
        error = want - drawn(nets, cfg, origin, ray, codes, generator)
        square = (error**2).sum((1, 2)) * size * size / cfg.rays
        return -square / (2 * cfg.sigma**2 * cfg.temp)

    return value


def thesis_f(net, z):
    return -net(z)


def prior_value(nets, shape, colour):
    normal = (shape.square().sum(1) + colour.square().sum(1)) / 2
    return thesis_f(nets.e_shape, shape) + thesis_f(nets.e_colour, colour) - normal


def chain(value, z, step, weight, n, generator):  # uphill, both codes at once
    for _ in range(n):
        z = [code.detach().requires_grad_() for code in z]
        slopes = torch.autograd.grad(value(*z).sum(), z)
        moved = []
        for code, slope in zip(z, slopes):
            noise = (
                weight * step * torch.randn(code.shape, generator=generator)
                if weight
                else 0
            )
            moved.append((code + step**2 / 2 * slope).detach() + noise)
        z = moved
    return z


def grads(nets, loss, start=''):  # of parameters whose name begins so
    nets.zero_grad()
    loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in nets.named_parameters()
        if weight.grad is not None and name.startswith(start)
    }


def agree(one, two):  # gradients that one of them lacks are zero
    for name in one.keys() | two.keys():
        got, want = one.get(name), two.get(name)
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
        least = 1e-4 * max(1e-3, want.abs().max().item())
        assert torch.allclose(got, want, rtol=1e-3, atol=least), name


@pytest.mark.parametrize('noise', [0.0, 0.7])
def test_an_iteration_of_chains_written_out(noise):  # Algorithm 1
    cfg = replace(TINY, inference='mcmc', post_noise=noise, prior_noise=0.4, temp=40.0)
    nets, generator, batch = built(cfg), gen(1), cars()
    start = dict(field='field', prior='e_')
    ours = {
        group: grads(nets, loss, start[group])
        for group, loss, _ in lebm.losses(nets, batch, context(seed=1))
    }
    assert list(ours) == ['field', 'prior']
    value = painted(nets, cfg, batch['c2w'], batch['x'], generator)

    def posterior(shape, colour):
        return value(shape, colour) + prior_value(nets, shape, colour)

    z = [torch.randn(4, dim, generator=generator) for dim in cfg.nz]
    z = chain(posterior, z, cfg.post_step, noise, cfg.post_steps, generator)
    agree(ours['field'], grads(nets, -value(*z).mean(), 'field'))

    def prior(shape, colour):
        return prior_value(nets, shape, colour)

    low = [torch.randn(cfg.n_neg, dim, generator=generator) for dim in cfg.nz]
    low = chain(prior, low, cfg.prior_step, 0.4, cfg.prior_steps, generator)
    energies = (nets.e_shape, nets.e_colour)
    gain = sum(
        thesis_f(net, found).mean() - thesis_f(net, made).mean()
        for net, found, made in zip(energies, z, low)
    )
    agree(ours['prior'], grads(nets, -gain, 'e_'))


def test_an_iteration_of_the_encoder_written_out():  # Algorithm 2
    cfg = replace(TINY, temp=40.0)
    nets, generator, batch = built(cfg), gen(1), cars()
    loss, _ = first_loss(nets, batch, context(seed=1))
    ours = grads(nets, loss)
    seen = nets.encoder(batch['x'])
    posterior = [
        torch.distributions.Normal(mean, (log_var / 2).exp())
        for mean, log_var in zip(seen.mean, seen.log_var)
    ]
    z = [q.loc + q.scale * torch.randn(q.loc.shape, generator=generator) for q in posterior]
    normal = torch.distributions.Normal(0.0, 1.0)
    kl = sum(torch.distributions.kl_divergence(q, normal).sum(1) for q in posterior)
    value = painted(nets, cfg, batch['c2w'], batch['x'], generator)(*z)
    elbo = value - kl + thesis_f(nets.e_shape, z[0]) + thesis_f(nets.e_colour, z[1])
    want = grads(nets, -elbo.mean())
    for name in list(want):  # the energies have a loss of their own
        if name.startswith('e_'):
            del want[name], ours[name]
    agree(ours, want)


@pytest.mark.parametrize('views', [1, 2, 3])
def test_what_is_charged_is_the_divergence_of_what_is_drawn(views):
    "Many draws of one object's codes have the mean and variance whose divergence is charged."
    cfg = replace(TINY, views=views, data='cars_views', prior='gaussian')
    nets = built(cfg)
    x = load('cars_views').batch(range(0, 10 * views, 10))['x']  # of any cars
    with torch.no_grad():
        seen = nets.eval().encoder(x)
        mean, spread = (
            torch.cat(part, 1).mean(0) for part in (seen.mean, seen.log_var)
        )  # fmt: skip
        batch = dict(x=x[None], c2w=torch.zeros(1, views, 3, 4))
        found = [lebm.amortised(nets, batch, gen(seed)) for seed in range(400)]
    z = torch.stack([torch.cat(codes, 1)[0] for codes, _, _ in found])
    q = torch.distributions.Normal(mean, (spread / 2).exp())
    normal = torch.distributions.Normal(0.0, 1.0)
    want = torch.distributions.kl_divergence(q, normal).sum().item()
    assert found[0][2].item() == pytest.approx(want, rel=1e-4)
    assert ((z.mean(0) - q.loc).abs() < 5 * q.scale / 20).all()
    assert ((z.var(0) / q.variance - 1).abs() < 5 * (2 / 399) ** 0.5).all()


def test_energies_that_learn_first_meet_the_encoder():
    "The loss of the encoder holds the energies after their step, and the same codes."
    cfg = replace(TINY, energies_first=True)
    nets, batch = built(cfg), cars()
    found = lebm.losses(nets, batch, context(seed=1))
    assert next(found)[0] == 'prior'
    with torch.no_grad():
        for net in (nets.e_shape, nets.e_colour):
            for value in net.parameters():
                value.mul_(2).add_(0.1)
    name, _, logs = next(found)
    z, _, cost = lebm.amortised(nets, {k: batch[k][:, None] for k in ('x', 'c2w')}, gen(1))
    assert name == 'field' and next(found, None) is None
    assert logs['cost'].item() == pytest.approx(cost.mean().item(), rel=1e-5)


def test_an_early_look_leaves_no_trace_in_the_norms():
    "An iteration counts a batch once in the running means, whatever its order."
    seen = []
    for first in (False, True):
        cfg = replace(TINY, energies_first=first, encoder='resnet34')
        nets = built(cfg)
        for _ in lebm.losses(nets, cars(), context(seed=1)):
            pass
        seen.append({k: v.clone() for k, v in nets.encoder.named_buffers()})
    assert seen[0] and all(torch.equal(seen[0][k], seen[1][k]) for k in seen[0])


@pytest.mark.parametrize('change', [dict(inference='mcmc', post_steps=0), dict()], ids=str)
def test_sigma_is_wide_at_first(change):
    # four times at the start, so the misfit counts a sixteenth; the squared error that is
    # logged stays what it is
    cfg = replace(TINY, **change, anneal=(4.0, 10))
    nets = built(cfg)
    misfit, logged = {}, {}
    for step in (0, 5, 10):
        loss, logs = first_loss(nets, cars(), context(step, 3))
        misfit[step] = (loss - logs.get('cost', 0)).item()
        logged[step] = logs['mse'].item()
    ratios = [misfit[10] / misfit[step] for step in (0, 5)]
    assert ratios == pytest.approx([16, 6.25], rel=1e-3)
    assert logged[0] == pytest.approx(logged[10], rel=1e-3)


@pytest.mark.parametrize('n_fine', [0, 3])
def test_the_squared_error_in_the_logs_is_of_one_field(n_fine):
    cfg = replace(TINY, inference='mcmc', n_fine=n_fine)
    loss, logs = first_loss(built(cfg), cars(), context())
    square = loss.item() * 2 * cfg.sigma**2 * cfg.temp / 3072
    assert logs['mse'].item() == pytest.approx(square / (2 if n_fine else 1), rel=1e-5)


@pytest.mark.parametrize('warm,heads', [((0, 0), 0.1), ((10, 20), 1.0)])
def test_rates_fall_by_ten_and_waiting_ones_do_not(warm, heads):
    cfg = replace(TINY, **KINDS['vmf'] | dict(warm=warm), decay=1000.0)
    factors = lebm.optimisers(built(cfg))['field'].schedule(1000)
    assert factors == pytest.approx((0.1, 0.1, heads))


@pytest.mark.parametrize('task', ['views', 'swap'])
def test_codes_are_sought_in_good_pixels(task, monkeypatch):
    nets, asked = built(replace(TINY, **KINDS['persistent'])), []
    ours = lebm.codes_of

    def noted(*args, mask=None, **options):
        asked.append(mask)
        return ours(*args, mask=mask, **options)

    monkeypatch.setattr(lebm.tasks, 'codes_of', noted)
    for masked in (True, False):
        nets.cfg = replace(nets.cfg, masked=masked)
        lebm.evaluate(nets, n=2, task=task, n_steps=1)
    good = load('cars_masked', split='test')
    at = [0, 5, 10, 15] if task == 'views' else [0, 10, 20, 30]
    assert torch.equal(asked[0].flatten(0, 1), good.batch(at)['mask'].bool())
    assert asked[1] is None


@pytest.mark.parametrize('masked', [True, False])
def test_a_loss_does_not_see_corrupted_pixels(masked):  # unless it is asked to
    batch = cars(data='cars_masked')
    other = batch | dict(x=torch.where(batch['mask'].bool(), batch['x'], -batch['x']))
    cfg = replace(TINY, data='cars_masked', inference='mcmc', rays=200, masked=masked)
    nets = built(cfg)
    one, two = (
        first_loss(nets, some, context(seed=3))[0].item() for some in (batch, other)
    )
    assert (one == two) == masked


def test_codes_that_persist_and_codes_that_are_sought_have_their_own_rates():
    # Adam's first step has the length of its rate
    cfg = replace(TINY, **KINDS['persistent'], lr_code=0.01, lr_find=0.3)
    nets, ctx = built(cfg), context()
    ctx.state |= new_table(torch.zeros(256, 24))
    batch = load('cars_masked').batch(range(0, 40, 10))
    first_loss(nets, batch, ctx)
    assert torch.allclose(ctx.state['z'][:4].abs(), torch.full((4, 24), 0.01), rtol=1e-2)
    x, c2w = batch['x'][:, None], batch['c2w'][:, None]
    found = torch.cat(lebm.find_codes(nets, x, c2w, n_steps=1, generator=gen()), 1)
    start = torch.cat(lebm.start_codes(4, cfg, found, gen()), 1)
    assert torch.allclose((found - start).abs(), torch.full((4, 24), 0.3), rtol=1e-2)


def test_prior_chains_are_divided_over_parts(monkeypatch):
    cfg, asked = replace(TINY, n_neg=6), []

    def noted(nets, n, *args, **options):
        asked.append(n)
        return lebm.start_codes(n, cfg, next(nets.parameters()))

    monkeypatch.setattr(lebm.method, 'draw_prior', noted)
    for generator in (gen(), Slice(gen(), 1, 2)):
        list(lebm.losses(built(cfg), cars(), Context(0, 0.0, generator)))
    assert asked == [6, 3]


@pytest.mark.parametrize('kind', ['vmf', 'half'])
def test_the_camera_of_a_picture_learns(kind):
    # the gradient of the likelihood reaches the heads of the camera
    cfg = replace(TINY, **KINDS[kind])
    nets = built(cfg)
    loss, _ = first_loss(nets, cars(), context())
    got = grads(nets, loss, 'encoder.turn')
    for head in range(4):
        assert got[f'encoder.turn.{head}.weight'].abs().sum() > 0


def test_half_a_turn_and_bounds_of_the_elevation_hold_everywhere():
    # in the encoder's answer, in the camera that is drawn for it, in new cameras
    cfg = replace(TINY, pose='vmf', half=True, tilt=(20.0, 30.0))
    nets = built(cfg)
    found = lebm.predicted_angles(nets, load('cars'), 300).rad2deg()
    assert found.shape == (300, 2) and found[:, 0].abs().max() <= 90
    assert 20 <= found[:, 1].min() < found[:, 1].max() <= 30
    seen = nets.encoder(cars(300)['x'])
    for options in (dict(mode=True), dict(generator=gen())):
        up = lebm.posterior_cameras(seen, cfg, **options)[:, 2, 2].asin().rad2deg()
        assert 19.99 <= up.min() < up.max() <= 30.01
    lebm.settle(nets, n=300)
    up = lebm.draw_cameras(nets, 200, gen())[:, 2, 2].asin().rad2deg()
    assert 18 <= up.min() < up.max() <= 32  # a cell of the histogram has 1.8 degrees


def test_codes_wait_until_cameras_had_their_time(tmp_path):
    # heads of the codes start at zero, and stay there before `warm` begins
    def moved(warm, folder):
        nets = trained(replace(TINY, **KINDS['half'] | dict(warm=warm, ema=0.0)), folder)
        return nets.encoder.heads[0].weight.abs().sum()

    assert moved((9, 1), tmp_path / 'late') == 0
    assert moved((0, 0), tmp_path / 'at once') > 0


def test_depth_of_a_new_object_does_not_know_its_paint():
    cfg = replace(TINY, inference='mcmc')
    nets = built(cfg)
    shape, colour = lebm.draw_prior(nets, 2, generator=gen())
    shape = shape[:1].expand(2, -1)
    c2w = camera_to_world(torch.tensor([[0.3, 0.4], [0.3, 0.4]]))
    one, two = (lebm.draw_images(nets, (shape, c), c2w) for c in (colour, colour.flip(0)))
    assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])


# --- training


def same(one, two):  # two checkpoints, to the last bit
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        names = [name for name in one if name not in ('seconds', 'python')]
        return one.keys() == two.keys() and all(
            same(one[name], two[name]) for name in names
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def _process(rank, folder):  # one of two that see objects 0 and 2, and 2 and 3
    import torch.distributed as dist

    meeting = f'file://{folder}/meet'
    dist.init_process_group('gloo', init_method=meeting, rank=rank, world_size=2)
    rows = torch.tensor([[2, 0], [2, 3]][rank])
    values = (rank + 1) * torch.tensor([[1.0], [2.0]])
    torch.save(gather_rows(rows, values), f'{folder}/{rank}')
    dist.destroy_process_group()


def test_what_two_processes_find_for_one_object_is_added(tmp_path):
    start = torch.multiprocessing.start_processes
    start(_process, (str(tmp_path),), nprocs=2, start_method='spawn')
    one, two = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    rows, values = one
    assert same(one, two)
    assert rows.tolist() == [0, 2, 3] and values.flatten().tolist() == [2, 3, 4]


@pytest.mark.slow
def test_two_processes_keep_one_table(tmp_path):
    # the codes that persist, and the curves, are those of one process
    small = 'batch: 8, rays: 12, n_depths: 6, width: 16, depth: 2, prior_steps: 2, n_neg: 6'
    over = f'{{n_iters: 6, {small}, save_every: 6, log_every: 1, ema: 0.}}'
    settings = ['-p', 'preset', 'cars-twoshot', '-p', 'over', over]
    alone = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    torchrun = ['torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m']
    for launcher, out in (([], 'one'), (torchrun, 'two')):
        program = [
            sys.executable,
            '-m',
            *launcher,
            'ebmbook.shell.cli',
            'train',
            'nerf_lebm',
        ]
        command = [*program, *settings, '-p', 'out', str(tmp_path / out)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_checkpoint(tmp_path / out) for out in ('one', 'two'))
    assert same(one['state']['t'], two['state']['t'])
    assert torch.allclose(one['state']['z'], two['state']['z'], atol=2e-3)
    for name, weight in one['nets'].items():
        assert torch.allclose(weight, two['nets'][name], atol=2e-3), name


class Enough(Exception):
    pass


@pytest.mark.parametrize('kind', KINDS)
def test_training_continues_to_the_last_bit(kind, tmp_path):
    cfg = replace(TINY, **KINDS[kind])
    whole = trained(cfg, tmp_path / 'whole')

    def stop(step, nets):
        if step == 3:
            raise Enough

    with pytest.raises(Enough):
        trained(cfg, tmp_path / 'parts', on_step=stop)
    assert load_checkpoint(tmp_path / 'parts')['step'] == 2
    parts = trained(cfg, tmp_path / 'parts')
    assert same(whole.state_dict(), parts.state_dict())
    assert same(*(load_checkpoint(tmp_path / folder) for folder in ('whole', 'parts')))


def test_codes_of_objects_are_in_the_checkpoint(tmp_path):
    # 256 objects, of which 16 at most were seen, one step each time
    cfg = replace(TINY, **KINDS['persistent'])
    trained(cfg, tmp_path)
    state = load_checkpoint(tmp_path)['state']
    assert state['z'].shape == (256, 24)
    assert 4 <= (state['t'] > 0).sum() <= 16 and state['t'].sum() <= 16
    assert not state['m'][state['t'] == 0].any()


def test_without_energies_it_is_the_baseline(tmp_path):
    # energies that are zero everywhere change nothing
    cfg = replace(TINY, **KINDS['plain'])
    plain = trained(cfg, tmp_path / 'plain')
    assert not any(name.startswith('e_') for name in plain.state_dict())
    with_energies = replace(cfg, prior='ebm')
    tilted, base = built(with_energies), built(cfg)
    with torch.no_grad():
        for net in (tilted.e_shape, tilted.e_colour):
            for weight in net.parameters():
                weight.zero_()
    for name, value in base.state_dict().items():
        tilted.state_dict()[name].copy_(value)
    one, _ = first_loss(base, cars(), context(seed=4))
    two, _ = first_loss(tilted, cars(), context(seed=4))
    assert torch.equal(one, two)


SWITCHES = [
    dict(reference='uniform', inference='mcmc'),
    dict(reference='free', inference='mcmc'),
    dict(alternate=True, inference='mcmc'),
    dict(last='endless'),
    dict(masked=False, data='cars_masked', inference='persistent'),
    dict(ramp=(1, 3), inference='mcmc'),
    dict(precision='bf16'),
    dict(focus=5.0),
    dict(encoder='resnet34'),
    dict(views=2, data='cars_views'),
    dict(views=2, data='cars_views', merge='draws'),
    dict(energies_first=True),
    dict(energies_first=True, encoder='resnet34'),
    dict(energies_first=True, inference='persistent', data='cars_views'),
    dict(depths='ends', n_fine=3, coarse=True, band=(5.0, 90.0)),
]


@pytest.mark.parametrize('change', SWITCHES, ids=str)
def test_switches_train(change, tmp_path):
    cfg = replace(TINY, **change)
    nets = trained(cfg, tmp_path)
    run = open_run('nerf_lebm', 'cars', cfg, out=tmp_path, device='cpu')
    mse = read_log(run, 'mse')[1]
    assert len(mse) == 4 and all(0 < value < 1 for value in mse)
    assert torch.isfinite(lebm.sample(nets, 2, generator=gen())).all()


def test_a_training_that_leaves_its_bounds_is_stopped(tmp_path):
    with pytest.raises(Diverged, match='not finite|energy gap'):
        trained(replace(TINY, lr=1e38), tmp_path)


def test_averaged_weights_are_what_is_left(tmp_path):
    cfg = replace(TINY, ema=0.5)
    raw = {}

    def keep(step, nets):
        raw.update(copy.deepcopy(nets.state_dict()))

    nets = trained(cfg, tmp_path, on_step=keep)
    saved = load_checkpoint(tmp_path)['ema']
    mean = {name.removeprefix('module.'): weight for name, weight in saved.items()}
    for name, weight in nets.named_parameters():
        assert torch.equal(weight, mean[name])
    last = 'field.density.weight'
    assert not torch.equal(nets.state_dict()[last], raw[last])


# --- the chapter as a user runs it


def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    ends_without_data('03_nerf_lebm', tmp_path, 'carla')


USES = ['inference: mcmc', 'pose: vmf, field: siren, mapping: 8', 'prior: gaussian']


@pytest.mark.slow
@pytest.mark.parametrize('change', USES)
def test_a_small_preset_says_its_cost_and_trains(change, tmp_path):
    small = (
        'n_iters: 2, batch: 4, rays: 10, n_depths: 6, width: 16, depth: 2, post_steps: 2'
    )
    over = f'{change}, {small}, save_every: 1, log_every: 1'
    says = ('2 iterations', 'about')
    trains_in_full('03_nerf_lebm', 'nerf_lebm', 'cars', tmp_path, over, says=says)
