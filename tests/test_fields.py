"""Every field of every `Config` acts: turned to another value, it changes what is computed.

For each field a turn is declared: another value, and what has to be set beside it. A tiny
training is compared with the same training before the turn: networks, and every number of its
log. A field that acts later is looked at there: in samples, measurements, or the memory that
training takes. A turn that contradicts everything else must be refused by an error that names
the field. A field without a turn fails, and so does a turn that changes nothing.
"""

import multiprocessing
import sys
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import bare, digest, few_cars, settings, trained
from torch import nn

from ebmbook.learn.contract import Diverged, Loop
from ebmbook.measure import images
from ebmbook.shell.systems import SYSTEMS, load_system


class Turn(NamedTuple):
    "One field turned."

    to: object  # Its other value
    given: dict  # Settings of both sides, beside those of the base
    base: str = ''  # Which of the system's bases
    look: str = 'train'  # What is compared, a name in `LOOKS`
    refused: bool = False  # It must be refused instead


def turn(to, *, base='', look='train', **given):
    return [Turn(to, given, base, look)]


def words(*others, **options):
    "Each of several other values."
    return [turn(to, **options)[0] for to in others]


def refused(to, *, base='', **given):
    return [Turn(to, given, base, refused=True)]


# --- the turns; '@name' is a folder that the fixture `places` writes

GREY = '@grey8'  # images of this size
PICTURES = dict(data='@colour32', inference='amortised', pose='vmf')
POST = dict(posterior=True, z_steps=2)
FLOW = dict(base='images', method='ecflow', flow_levels=1, flow_depth=1, flow_width=4)
BUFFER = dict(p_max=1.0, p_rise=1, buffer=16)
ERM = dict(method='erm')
WMSE = dict(method='wmse', batch=16)

TURNS = dict(
    foundations=dict(
        data=turn('checkerboard', data='spiral', shape=(2,)),
        shape=refused((1, 8, 4)),
        prior=turn('gaussian'),
        nz=turn(4),
        width=turn(9),
        prior_width=turn(9),
        sigma=turn(0.3),
        prior_steps=turn(3),
        prior_delta=turn(0.5),
        post_steps=turn(3),
        post_delta=turn(0.2),
        n_iters=turn(3),
        lr=turn(1e-2),
        lr_prior=turn(1e-2),
    ),
    nerf_lebm=dict(
        prior=turn('gaussian'),
        inference=words('persistent', 'amortised'),
        pose=turn('vmf', **PICTURES | dict(data='cars', pose='known', n_iters=0)),
        reference=words('uniform', 'free'),
        field=turn('siren', mapping=8),
        encoder=turn('resnet34', inference='amortised', look='build'),
        half=turn(True, **PICTURES),
        alternate=turn(True),
        masked=turn(False, data='cars_masked'),
        last=turn('endless'),
        merge=turn('draws', inference='amortised', data='cars_masked', views=2),
        energies_first=turn(True, inference='amortised'),
        post_steps=turn(3),
        post_step=turn(0.02),
        post_noise=turn(1.0),
        prior_steps=turn(3),
        prior_step=turn(0.6),
        prior_noise=turn(0.5),
        n_neg=turn(5),
        gen_steps=turn(2),
        ramp=turn((0, 2)),
        data=turn('cars_masked'),
        shape=refused((3, 16, 16)),
        views=turn(2, data='cars_masked'),
        tilt=turn((10.0, 60.0), **PICTURES),
        n_eval=turn(7, look='count', **{'n_eval!': 5}),
        nz=turn((4, 2)),
        e_shape=turn((2, 8)),
        e_colour=turn((1, 9)),
        width=turn(9),
        depth=turn(3),
        freqs=turn((3, 1)),
        scale=turn(0.9),
        mapping=turn(8),
        plain=turn(1.0, field='siren', mapping=8),
        rays=turn(9),
        focus=turn(1.0),
        n_depths=turn(5),
        n_fine=turn(2),
        depths=turn('ends'),
        coarse=turn(True, look='sample', n_fine=2),
        band=turn((70.0, 80.0), look='sample'),
        sigma=turn(0.1),
        temp=turn(2.0),
        anneal=turn((4.0, 2)),
        n_iters=turn(3),
        lr=turn(1e-2),
        lr_enc=turn(1e-2, inference='amortised'),
        lr_code=turn(0.1, inference='persistent'),
        lr_find=turn(0.1, look='views', inference='persistent', data='cars_masked'),
        lr_heads=turn(1e-2, inference='amortised'),
        warm=turn((0, 10), inference='amortised'),
        lr_prior=turn(1e-2),
        decay=turn(2.0),
        decay_prior=turn(2.0),
    ),
    coopflow=dict(
        method=words('flow', 'shortrun', 'coopnets'),
        noise=words('on', 'decay', 'printed', noise='off', decay=5),
        decay=turn(7, noise='decay', **{'decay!': 5}),
        clip=turn(1e-4),
        bound=turn(0.2),
        exact=turn(False, base='images'),
        wet=turn(True, base='images', drop=0.5),
        quantise=turn(True, base='images'),
        flow_every=turn(2),
        data=turn('checkerboard'),
        shape=refused((3,)),
        flip=turn(True, base='images'),
        n_eval=turn(7, base='images', look='count', **{'n_eval!': 5}),
        n_iters=turn(4),
        warm=turn(2),
        n_pre=turn(2),
        n_steps=turn(3),
        delta=turn(0.05),
        delta_test=turn(0.05, look='sample'),
        lr=turn(1e-2),
        lr_flow=turn(1e-2),
        lr_pre=turn(1e-2, n_pre=2),
        lr_warm=turn(3),
        cooldown=turn(1.0),
        ebm_clip=turn(1e-3),
        flow_clip=turn(1e-3),
        clip_apart=turn(True, base='images', flow_clip=1e-2),
        ch=turn(9),
        blocks=turn(2, base='images'),
        flow_steps=turn((3,)),
        deq=turn((1, 1, 4), base='images'),
        flow_released=turn(True, base='images'),
        flow_blocks=turn(2, base='images'),
        flow_width=turn(9),
        n_mix=turn(3),
        drop=turn(0.5, base='images'),
        levels=turn(18, base='images'),
        save=turn(True, base='images', look='saved'),
        nz=turn(3, method='coopnets'),
        gen_ch=turn(8, base='images', method='coopnets'),
        sigma=turn(0.5, method='coopnets', infer_steps=1),
        infer_steps=turn(1, method='coopnets'),
        infer_delta=turn(0.2, method='coopnets', infer_steps=1),
        blur=turn(0.1, method='shortrun'),
    ),
    cdrl=dict(
        schedule=[*turn('drl-t6'), *turn('drl-t8', n_levels=8)],
        norm=turn(False),
        pretrain=turn(1),
        lr_pretrain=turn(1e-2, pretrain=1),
        rest=turn(True, pretrain=1),
        cooldown=turn(1.0),
        coop=turn(False),
        shared_noise=turn(False),
        predicts=words('x0', 'eps'),
        target=turn('data'),
        residual=turn('mean'),
        weighted=turn(False),
        tweedie=turn(2.0, look='sample'),
        data=turn('spiral'),
        shape=refused((3,)),
        flip=turn(True, base='images'),
        n_eval=turn(7, base='images', look='count', **{'n_eval!': 5}),
        vae=turn('ebmbook-test-half', base='images'),
        n_levels=turn(5),
        n_steps=turn(3),
        step=turn(4e-3),
        step_sbar=turn(True),
        stem=turn(2, base='images'),
        ch=turn(10),
        mult=turn((1, 1), base='images'),
        blocks=turn(2, base='images'),
        init_ch=turn(16),
        init_mult=turn((1, 2), base='images'),
        init_blocks=turn(2, base='images'),
        attn=turn((8,), base='images'),
        # the last layers of each block begin at zero, and let it pass after some steps
        dropout=turn(0.5, base='images', n_iters=4, lr_init=1e-2),
        n_iters=turn(3),
        lr=turn(1e-2),
        lr_init=turn(1e-2),
        warmup=turn(3),
        head_start=turn(1, warmup=5, **{'head_start!': 0}),
        clip=turn(1e-3),
        n_classes=turn(10, base='images'),
        init_cond=turn(False, base='images', n_classes=10),
        label_drop=turn(0.9, base='images', n_classes=10),
    ),
    vaebm=dict(
        method=words('vae', 'ebm', 'ebm-vae', 'wgan'),
        potential=turn('official', base='images', groups=(2,)),
        space=turn('xz'),
        sampler=turn('mala'),
        negative=turn('mean'),
        data_init=turn(False, base='images'),
        init_drawn=turn(True, base='images'),
        cautious=turn(True),
        penalty=turn(1.0),
        p_max=turn(1.0, p_rise=1, buffer=16),
        keep_x=turn(True, **BUFFER),
        queue=turn(True, **BUFFER, n_iters=3),
        decoder=turn(True),
        data=turn('spiral'),
        shape=refused((3,)),
        n_vae=turn(2),
        n_iters=turn(3),
        batch_vae=turn(9),
        ch=turn(8, base='images'),
        groups=turn((2,), base='images'),
        latent=turn(4),
        cells=turn(2, base='images'),
        flows=turn(1, base='images'),
        std=words('one', 'each', 0.5),
        lr_vae=turn(1e-2),
        lr_last=turn(1.0, n_vae=2),
        warm_vae=turn(3, n_vae=2),
        spectral_vae=turn(5.0, base='images'),
        spectral_start=turn(5.0, base='images', spectral_vae=0.1),
        bits=turn(2, base='images'),
        energy_bits=turn(2, base='images'),
        pad_to=turn(16, base='images'),
        flip=turn(True, base='images'),
        n_eval=turn(7, base='images', look='count', **{'n_eval!': 5}),
        net=turn('8', base='images'),
        width=turn(2.0, base='images'),
        first=turn(9),
        lr=turn(1e-2),
        weight_decay=turn(0.5),
        spectral=turn(5.0, base='images'),
        lr_decoder=turn(1e-2, decoder=True),
        n_steps=turn(3),
        n_steps_test=turn(3, look='sample'),
        n_jumps=turn(1),
        eta=turn(0.1),
        buffer=turn(17, **BUFFER),
        p_rise=turn(9, **BUFFER),
    ),
    ecvae=dict(
        method=words('vae', 'wgan', 'ebm', 'ebm-vae', 'ecflow', 'flow'),
        dual=turn(False),
        tether=words('demo', 'none'),
        prior=turn('flow'),
        distance=[*turn('lpips', base='colour'), *refused('lpips')],
        posterior=turn(True),
        reuse=turn(True),
        bound=turn(True, eta=1.0, tau=1.0),
        nats=turn(True),
        sn_chains=turn(True),
        collect=turn(False, base='images', look='end', norm='batch'),
        data=turn('spiral'),
        shape=refused((3,)),
        n_iters=turn(3),
        net=refused('digits'),
        norm=turn('batch', base='images'),
        flip=turn(True, base='images'),
        n_eval=turn(7, base='images', look='count', **{'n_eval!': 5}),
        n_steps=turn(3),
        n_steps_test=turn(2, look='sample'),
        eta=turn(1e-2),
        tau=turn(1e-2),
        pull=turn(1.0),
        slack=turn(0.5),
        lam0=turn(2.0),
        lam_max=turn(1.5, lr_dual=1e6, slack=-0.9),
        lr_dual=turn(1.0),
        kl=turn(0.1),
        lr_vae=turn(1e-2),
        lr=turn(1e-2),
        beta1=turn(0.5),
        lr_prior=turn(1e-2, prior='flow'),
        z_steps=turn(3, **POST),
        z_eta=turn(1e-2, **POST),
        z_pull=turn(0.5, **POST),
        z_lam=turn(2.0, **POST),
        z_lr_dual=turn(1.0, **POST),
        flow_levels=turn(2, **FLOW),
        flow_depth=turn(2, **FLOW),
        flow_width=turn(5, **FLOW),
        levels=turn(18, **FLOW),
    ),
    liebm=dict(
        method=words('ejm', 'erm'),
        encoder=words('joint', 'none'),
        posterior=words('gaussian', 'cebm'),
        view=turn('dequantise'),
        top=turn('square'),
        literal=turn(True),
        norm=turn(False),
        bias=turn(True),
        unit=turn(True),
        clamp=turn(True, noise=0.5),
        mirror=turn(True),
        data=turn(GREY),
        shape=refused((1, 8, 4)),
        n_iters=turn(3),
        n_eval=turn(7, look='count', **{'n_eval!': 5}),
        net=[*turn('cifar10', base='wide', look='build'), *refused('shapes')],
        enc=turn('shapes'),
        n_enc=turn(1),
        enc_weights=turn('@encoder1', **{'enc_weights!': '@encoder0', 'n_enc': -1}),
        n_post=turn(1),
        n_infer=turn(1),
        n_steps=turn(3),
        step=turn(4.0),
        noise=turn(0.1),
        clip=turn(1e-4),
        p_aug=turn(1.0),
        gamma=turn(1.0),
        gamma_ood=turn(1.0, look='ood'),
        tau2=turn(1.0),
        rho=turn(2.0, **ERM),
        w_match=turn(2.0, **ERM),
        w_data=turn(1.0, **ERM),
        reg=turn(1.0),
        lr=turn(1e-2),
        beta2=turn(0.5),
        lr_gen=turn(1e-2),
        lr_inf=turn(1e-2, **ERM),
        lr_post=turn(1e-2, n_post=1),
    ),
    selfsup=dict(
        scale=turn((0.9, 1.0)),
        ratio=turn((1.0, 1.0)),
        jitter=turn((0.0, 0.0, 0.0, 0.0)),
        p_jitter=turn(0.1),
        p_grey=turn(1.0, base='colour'),
        flip=turn(True),
        crop_first=turn(True),
        data=turn(GREY),
        shape=refused((1, 8, 4)),
        n_iters=turn(3),
        epoch=turn(2, method='byol', tau=0.5, **{'epoch!': 1}),
        widths=turn((5,)),
        hidden=turn(9),
        emb=turn(4),
        mean=turn((0.4,)),
        std=turn((0.4,)),
        method=words('byol', 'wmse'),
        n_views=turn(3),
        temp=turn(0.1),
        tau=turn(0.5, method='byol'),
        w=turn(16, **WMSE),
        w_iter=turn(2, **WMSE),
        eps=turn(0.1, **WMSE),
        lr=turn(1e-2),
        weight_decay=turn(0.5),
        warm=turn(3),
        drops=turn((1,)),
        micro=refused(2),
    ),
)

LOOP = [field.name for field in fields(Loop)]  # tested once, below
FIELDS = [
    (name, field.name)
    for name in SYSTEMS
    for field in fields(load_system(name).config)
    if field.name not in LOOP or field.name in TURNS[name]
]


# --- what is looked at


def look_train(system, cfg, folder, **options):
    nets, lines = trained(system, cfg, folder, **options)
    return digest(nets), lines


def look_build(system, cfg, folder):
    torch.manual_seed(0)
    return digest(system.build(cfg))


def look_end(system, cfg, folder):
    "Fresh networks after what follows the last stage."
    torch.manual_seed(0)
    nets = system.build(cfg)
    finish = load_system(system.name).of(cfg).stages[-1].finish
    finish(nets, torch.Generator().manual_seed(0))
    return digest(nets)


def look_sample(system, cfg, folder):
    nets, _ = trained(system, cfg, folder)
    return system.sample(nets, 4, generator=torch.Generator().manual_seed(0)).tolist()


def look_count(system, cfg, folder):
    "How many samples are drawn where Inception measures; of fresh networks."
    counts = []

    def count(samples, *args, **options):
        counts.append(len(samples))
        return dict.fromkeys(('fid', 'is', 'precision', 'recall'), 0.0) | dict(extractor='')

    with pytest.MonkeyPatch.context() as patch:
        for name in ('check_counts', 'inception_weights', 'fidelity', 'feature_count'):
            patch.setattr(images, name, lambda *args, **options: None)
        patch.setattr(images, 'evaluate_images', count)
        system.evaluate(system.build(cfg).eval(), extractor='inception')
    return counts


def measured(task, **options):
    def look(system, cfg, folder):
        nets, _ = trained(system, cfg, folder)
        found = system.evaluate(nets, task=task, **options)
        return {name: number.value for name, number in found.items() if name != 'seconds'}

    return look


def look_saved(system, cfg, folder):
    "How much a training keeps for its way back."
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained(system, cfg, folder)
    return sum(kept)


LOOKS = dict(
    train=look_train,
    build=look_build,
    end=look_end,
    sample=look_sample,
    count=look_count,
    saved=look_saved,
    views=measured('views', n=1, n_steps=2),
    ood=measured('ood', n=8),
)


# --- the test of every field


def write_images(folder, shape):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            folder / f'{i:02}.png'
        )
    return f'folder:{folder}'


class Mean(nn.Module):
    "In the place of the perceptual distance: that of the mean colours."

    def __init__(self, **options):
        super().__init__()

    def forward(self, x, y):
        return (x - y).mean((2, 3)).square().sum(1)


class Half(nn.Module):
    "In the place of an autoencoder: latents are images of half the contrast."

    config = SimpleNamespace(scaling_factor=0.5)

    @classmethod
    def from_pretrained(cls, name):
        assert name == 'ebmbook-test-half'
        return cls()

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x))


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "Folders by name, each written when it is first asked for."
    top, known = tmp_path_factory.mktemp('places'), {}
    sizes = dict(grey8=(8, 8), colour32=(32, 32, 3))

    def write(name):
        if name in sizes:
            return write_images(top / name, sizes[name])
        torch.manual_seed(int(name[-1]))
        cfg = load_system('selfsup').presets['digits']
        load_system('selfsup').build(cfg).save_pretrained(top / name)
        return str(top / name)

    def place(value):
        if not isinstance(value, str) or not value.startswith('@'):
            return value
        if value not in known:
            known[value] = write(value[1:])
        return known[value]

    with few_cars() as patch:
        patch.setitem(sys.modules, 'diffusers', SimpleNamespace(AutoencoderKL=Half))
        patch.setitem(sys.modules, 'lpips', SimpleNamespace(LPIPS=Mean))
        yield place


@pytest.fixture(scope='module')
def seen(places, tmp_path_factory):
    "seen(system, changes, base, look): what is seen of a training; each one is made once."
    known = {}

    def see(system, changes, base, look):
        key = (system.name, tuple(sorted(changes.items(), key=str)), base, look)
        if key not in known:
            given = {name: places(value) for name, value in changes.items()}
            cfg = settings(system, base, **given)
            folder = tmp_path_factory.mktemp('run')
            known[key] = LOOKS[look](bare(system, cfg), cfg, folder)
        return known[key]

    return see


def both(field, one):
    "Settings before and after a turn; a given value of the field itself is written `field!`."
    given = {name.removesuffix('!'): value for name, value in one.given.items()}
    return given, given | {field: one.to}


@pytest.mark.parametrize('name,field', FIELDS)
def test_the_field_acts(name, field, seen):
    turns = TURNS[name].get(field)
    assert turns, f"no turn is declared for {field!r} of {name}"
    for one in turns:
        before, after = both(field, one)
        was = seen(load_system(name), before, one.base, one.look)
        if one.refused:
            with pytest.raises(ValueError, match=field):
                seen(load_system(name), after, one.base, one.look)
            continue
        now = seen(load_system(name), after, one.base, one.look)
        assert was != now, f"{field}={one.to!r} of {name} changes nothing"


@pytest.mark.parametrize('name', SYSTEMS)
def test_every_declared_field_exists(name):
    known = [field.name for field in fields(load_system(name).config)]
    assert set(TURNS[name]) <= set(known)


def test_a_field_that_nothing_reads_would_be_found(tmp_path):
    base = load_system('cdrl')

    @dataclass(frozen=True, kw_only=True)
    class Idle(base.config):
        idle: int = 0

    cfg = Idle(**vars(settings(base)))
    system = bare(replace(base, config=Idle), cfg)
    was = look_train(system, cfg, tmp_path / 'was')
    assert was == look_train(system, replace(cfg, idle=1), tmp_path / 'now')


# --- the fields of the loop, which act in the same way on every system


@pytest.fixture
def run(tmp_path):
    "run(**changes): networks, lines of the log, and the folder of a training of CDRL."
    system = load_system('cdrl')

    def go(stage=lambda stage: stage, options=(), **changes):
        cfg = settings(system, **changes)
        own = bare(system, cfg)
        own = replace(own, stages=[stage(each) for each in own.stages])
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return *trained(own, cfg, folder, **dict(options)), folder

    return go


def check_weights(run, field, to):
    was, now = run(), run(**{field: to})
    assert digest(was[0]) != digest(now[0])


def check_batch(run):
    check_weights(run, 'batch', 4)


def check_ema(run):
    check_weights(run, 'ema', 0.5)


def check_precision(run):
    check_weights(run, 'precision', 'bf16')
    with pytest.raises(ValueError, match='precision'):
        run(precision='fp8')


def check_micro(run):
    "One step is divided, and the weights are the same but for the order of sums."
    seen = []

    def counted(stage):
        def losses(nets, batch, ctx):
            seen.append(len(batch['x']))
            yield from stage.losses(nets, batch, ctx)

        return stage._replace(losses=losses)

    whole, parts = (run(stage=counted, micro=n, lr=1e-4, lr_init=1e-4)[0] for n in (1, 2))
    assert seen == [8, 8, 4, 4, 4, 4]
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-4, atol=1e-5) for k in ours)
    with pytest.raises(ValueError, match='micro=3'):
        run(micro=3)


def check_workers(run):
    "So many processes read the data, and the numbers are the same."
    seen = []

    def note(step, nets):
        seen.append(len(multiprocessing.active_children()))

    alone, helped = (run(options=dict(on_step=note), workers=n) for n in (0, 1))
    assert seen == [0, 0, 1, 1]
    assert digest(alone[0]) == digest(helped[0]) and alone[1] == helped[1]


def check_save_every(run):
    rare, often = run(), run(save_every=1)
    assert [len(list(o[2].glob('checkpoint-*.pt'))) for o in (rare, often)] == [1, 2]
    assert digest(rare[0]) == digest(often[0])


def check_log_every(run):
    often, rare = run(), run(log_every=2)
    assert [[line['total'] for line in o[1]] for o in (often, rare)] == [[1, 2], [2]]
    assert digest(rare[0]) == digest(often[0])


def check_tracker(run):
    "Numbers are shown elsewhere too, and nothing else is different."
    plain, shown = run(), run(tracker='tensorboard')
    assert [len(list(o[2].glob('events.out.*'))) for o in (plain, shown)] == [0, 1]
    assert digest(plain[0]) == digest(shown[0])
    assert shown[0].cfg.tracker == ''


def check_max_gap(run):
    with pytest.raises(Diverged, match='gap'):
        run(max_gap=1e-9)


@pytest.mark.parametrize('field', LOOP)
def test_the_field_of_the_loop_acts(field, run):
    check = globals().get(f'check_{field}')
    assert check, f"no check is declared for {field!r} of the loop"
    check(run)
