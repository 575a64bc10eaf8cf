"Every system on a device that is not the processor, simulated: nothing is left behind."

import importlib
from dataclasses import replace

import pytest
import torch
from chapters import claims_can_be_measured
from far import FAR, Far, far_away, home
from test_nerf_lebm import KINDS

from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run

TINY = {  # enough to go through every line once
    'foundations': dict(batch=8, n_iters=4),
    'cdrl': dict(batch=8, n_iters=4, pretrain=2),
    'coopflow': dict(
        batch=8,
        n_iters=4,
        ch=4,
        flow_width=8,
        n_mix=2,
        n_steps=3,
        n_pre=3,
        warm=2,
        lr_warm=1,
    ),
    'ecvae': dict(batch=8, n_iters=4, n_steps=2, flow_depth=1, flow_width=8),
    'vaebm': dict(
        batch=8,
        n_iters=4,
        ch=4,
        groups=(1, 1),
        latent=2,
        net='4/2 4',
        first=4,
        n_steps=2,
        n_steps_test=2,
        batch_vae=8,
        n_vae=3,
        warm_vae=1,
    ),
    'nerf_lebm': dict(
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
        focus=1.0,
    ),
    'liebm': dict(batch=8, n_iters=4, n_steps=2, n_enc=2, n_infer=2),
}
RUNS = [
    ('foundations', 'digits', {}),
    ('cdrl', 'digits-cond', {}),
    ('cdrl', 'checkerboard', {}),
    ('cdrl', 'shapes-composition', {}),
    ('coopflow', 'digits-pre', {}),
    *(('ecvae', 'digits', dict(method=o)) for o in ('ecvae', 'wgan', 'ebm-vae', 'ecflow')),
    ('ecvae', 'digits', dict(prior='flow', posterior=True)),
    ('ecvae', 'gaussians25', {}),
    *(
        ('vaebm', 'digits', o)
        for o in (
            dict(micro=2),
            dict(method='wgan', micro=2),
            dict(method='ebm', buffer=16),
            dict(space='xz', decoder=True, micro=2),
        )
    ),
    *(('nerf_lebm', 'cars', o) for o in KINDS.values()),
    *(
        ('liebm', 'digits', o)
        for o in (
            {},
            dict(method='ejm'),
            dict(method='erm'),
            dict(encoder='joint'),
            dict(n_post=2, posterior='gaussian'),
        )
    ),
]


def test_the_pretence_refuses_what_a_gpu_would(monkeypatch):
    with far_away(monkeypatch):
        x, y, i = (
            torch.arange(6.0, device=FAR).view(2, 3),
            torch.ones(2, 3),
            torch.tensor([0]),
        )
        assert (
            type(x) is Far
            and x.device == FAR
            and type(x.cpu()) is torch.Tensor
            and x.sum().item() == 15
            and (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
        )
        assert x[i].tolist() == [[0, 1, 2]] and torch.tensor([7.0], device=FAR).item() == 7
        g = torch.Generator(FAR).manual_seed(0)
        assert torch.equal(
            torch.randn(5, generator=g, device=FAR).cpu(),
            torch.randn(5, generator=torch.Generator().manual_seed(0)),
        )
        for wrong in (
            lambda: x + y,
            lambda: torch.cat([x, y]),
            lambda: torch.stack([x.sum(), y.sum()]),
            lambda: y[i.to(FAR)],
            lambda: x.mm(y.T),
            lambda: y.copy_(x).add_(x),
            lambda: torch.randn(5, generator=g),
            lambda: torch.randn(5, device=FAR, generator=torch.Generator()),
            lambda: torch.nn.Linear(3, 3)(x),
        ):
            with pytest.raises(RuntimeError, match='the processor'):
                wrong()
        with pytest.raises(TypeError, match='numpy'):
            x.numpy()


@pytest.mark.parametrize('system,preset,change', RUNS, ids=str)
def test_a_training_on_another_device_is_that_of_the_processor(
    system, preset, change, tmp_path, monkeypatch
):
    module = importlib.import_module(f'ebmbook.{system}')
    cfg = replace(
        module.PRESETS[preset], **dict(save_every=2, log_every=1) | TINY[system] | change
    )

    def trained(folder, **how):
        return train(
            module.SYSTEM,
            cfg,
            open_run(system, preset, cfg, out=tmp_path / folder, device='cpu'),
            progress=False,
            **how,
        )

    want = {k: o.clone() for k, o in trained('here').state_dict().items()}

    def stop(step, nets):
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        type(module.SYSTEM.of(cfg).build(cfg)), 'save_pretrained', lambda *_: None
    )  # files are written from the processor
    with far_away(monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            trained('there', on_step=stop)
        nets = trained('there')
    assert all(type(o.data) is Far for o in nets.parameters())
    for k, o in home(nets.state_dict()).items():
        torch.testing.assert_close(
            o, want[k], rtol=1e-3, atol=1e-4, msg=lambda m: f"{k}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    'system,tiny,how',
    [
        ('cdrl', dict(n_steps=2), dict(n=140)),
        ('coopflow', dict(ch=4, flow_width=8, n_mix=2, n_steps=2), dict(n=140)),
        (
            'ecvae',
            dict(flow_depth=1, flow_width=8),
            dict(quick=dict(restore=dict(n_steps=1, tries=1))),
        ),
        (
            'vaebm',
            dict(
                ch=4,
                groups=(1, 1),
                latent=2,
                net='4/2 4',
                first=4,
                n_steps=2,
                n_steps_test=2,
                buffer=32,
            ),
            dict(n=400),
        ),
        (
            'nerf_lebm',
            dict(n_depths=3, prior_steps=1, width=8, depth=1),
            dict(n=260, quick=dict(views=dict(n=1), swap=dict(n=1), pose=dict(n=10))),
        ),
        (
            'liebm',
            dict(n_steps=1),
            dict(
                n=300,
                quick=dict(
                    encoder=dict(n=20, n_epochs=1),
                    ood=dict(n=20),
                    restore=dict(n=4, n_steps=1, n_steps_y=1),
                ),
            ),
        ),
    ],
    ids=str,
)
def test_every_claim_can_be_measured_on_another_device(system, tiny, how, monkeypatch):
    module = importlib.import_module(f'ebmbook.{system}')
    with far_away(monkeypatch):
        claims_can_be_measured(module, tiny, device=FAR, **how)
