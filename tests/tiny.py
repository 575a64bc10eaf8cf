"""Presets of all systems so small that a training of two steps takes a fraction of a second."""

import hashlib
import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ebmbook.data.catalogue import DATASETS
from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run

TINY = dict(batch=8, ema=0.0, log_every=1, save_every=1_000, n_iters=2, max_gap=1e30)
CHAINS = dict(prior_steps=2, post_steps=2)

# system -> name of a base -> preset, and what is changed in it
BASES = dict(
    foundations={
        '': ('digits', TINY | CHAINS | dict(width=8, prior_width=8, nz=3)),
    },
    nerf_lebm={
        '': (
            'cars-mcmc',
            TINY
            | CHAINS
            | dict(batch=4, nz=(3, 2), e_shape=(1, 8), e_colour=(1, 8), width=8, depth=2)
            | dict(freqs=(2, 1), rays=8, n_depths=4, n_neg=4),
        ),
    },
    coopflow={
        '': (
            'spiral-T30',
            TINY
            | dict(n_iters=3, n_steps=2, ch=8, flow_steps=(2,), flow_width=8, n_mix=2)
            | dict(lr_warm=1, cooldown=0.0),
        ),
        'images': (
            'digits-T30',
            TINY
            | dict(n_iters=3, n_steps=2, ch=4, flow_width=4, n_mix=2, lr_warm=1)
            | dict(cooldown=0.0, gen_ch=4, nz=3),
        ),
    },
    cdrl={
        '': (
            'checkerboard-claim',
            TINY | dict(n_levels=6, n_steps=2, ch=8, init_ch=8, warmup=0, cooldown=0.0),
        ),
        'images': (
            'digits-claim',
            TINY | dict(n_steps=1, ch=8, init_ch=8, warmup=0, head_start=0),
        ),
    },
    vaebm={
        '': (
            'gaussians25-penalty',
            TINY | dict(n_vae=1, batch_vae=8, n_steps=2, n_steps_test=2, first=8, latent=3),
        ),
        'images': (
            'digits',
            TINY
            | dict(n_vae=1, batch_vae=8, n_steps=2, ch=4, groups=(1,), latent=2)
            | dict(net='8/2 8', warm_vae=0),
        ),
    },
    ecvae={
        '': ('gaussians25', TINY | dict(n_steps=2)),
        'images': ('digits', TINY | dict(n_steps=2)),
        'colour': ('shapes', TINY | dict(n_steps=2)),
    },
    liebm={
        '': ('digits', TINY | dict(n_steps=2, n_enc=0, n_infer=0)),
        'colour': ('shapes', TINY | dict(n_steps=2, n_enc=0)),
        'wide': ('cifar10-small', TINY | dict(n_enc=0)),
    },
    selfsup={
        '': (
            'digits',
            TINY | dict(widths=(4,), hidden=8, emb=3, w=8, warm=0, drops=()),
        ),
        'colour': ('shapes', TINY | dict(widths=(4,), hidden=8, emb=3, warm=0)),
    },
)


def settings(system, base='', **changes):
    "A base with some settings changed, checked as a command would check it."
    preset, tiny = BASES[system.name][base]
    cfg = replace(system.presets[preset], **tiny | changes)
    return system.of(cfg).check(cfg)


def bare(system, cfg):
    "The system or rival of these settings, without what follows its stages."
    found = system.of(cfg)
    return replace(found, stages=[o._replace(finish=None) for o in found.stages], rivals={})


def digest(nets):
    "Name, shape and bits of every tensor."
    found = hashlib.sha256()
    for name, value in nets.state_dict().items():
        found.update(f'{name} {tuple(value.shape)}'.encode())
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def trained(system, cfg, folder, **options):
    "Networks after a short training, and the lines of its log without the clock."
    run = open_run(system.name, 'tiny', cfg, out=folder, device='cpu')
    nets = train(system, cfg, run, progress=False, **options)
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return nets, [{k: v for k, v in line.items() if k != 'seconds'} for line in lines]


def clock(out, at=None):
    """When the steps behind the newest checkpoint were done, or those up to `at`.

    A training that goes on keeps these times; one that begins anew has others.
    """
    if at is None:
        at = max((int(path.stem[11:]) for path in out.glob('checkpoint-*.pt')), default=0)
    text = (out / 'log.jsonl').read_text() if at else ''
    found = (json.loads(line) for line in text.split('\n')[:-1])
    lines = [line for line in found if isinstance(line, dict) and 'seconds' in line]
    return [line['seconds'] for line in lines if line['total'] <= at]


def went_on(out, kept):
    "Whether a training kept the times of the steps that it had done."
    return clock(out)[: len(kept)] == kept


def forget():
    "Empty every cache of the package."
    modules = [module for name, module in sys.modules.items() if name.startswith('ebmbook')]
    for module in modules:
        for value in list(vars(module).values()):
            if callable(getattr(value, 'cache_clear', None)):
                value.cache_clear()


@contextmanager
def few_cars():
    "Smaller sets of toy cars, since it takes time to draw them; and empty caches."
    sizes = dict(cars=(128, 128), cars_views=(100, 40), cars_masked=(100, 40))
    with pytest.MonkeyPatch.context() as patch:
        for name, n in sizes.items():
            patch.setitem(DATASETS, name, replace(DATASETS[name], n=n))
        forget()
        yield patch
    forget()
