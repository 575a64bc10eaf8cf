"CDRL in the latent space of a real `AutoencoderKL` (extra `latent`), with random weights and made-up sizes."
from dataclasses import replace

import pytest
import torch

from ebmbook import cdrl

diffusers = pytest.importorskip('diffusers', reason="needs the extra `latent`")


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2,
        latent_channels=4, norm_num_groups=4)
    path = tmp_path_factory.mktemp('vae')
    net.save_pretrained(path)
    return path


def row(folder):
    return replace(cdrl.PRESETS['celebahq256-latent'], shape=(4, 8, 8), vae=str(folder), ch=8, blocks=1, mult=(1, 1), init_ch=8, init_blocks=1,
                   init_mult=(1, 1), attn=(), n_steps=2)


def test_latents_are_scaled_means_and_come_back(folder):
    cfg = row(folder)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2-1
    net = cdrl.autoencoder(cfg.vae)
    mean = net.encode(x).latent_dist.mean
    z = cdrl.encode(x, cfg)
    assert z.shape==(3, 4, 8, 8)
    torch.testing.assert_close(z, mean*net.config.scaling_factor)
    torch.testing.assert_close(cdrl.decode(z, cfg), net.decode(mean).sample, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_ladder_trains_and_draws_in_latents(folder):
    cfg = row(folder)
    torch.manual_seed(0)
    nets = cdrl.build(cfg)
    assert not any('vae' in k for k in nets.state_dict()) # the autoencoder is neither trained nor stored
    class ctx: step, frac, generator, state, ema = 0, 0., torch.Generator().manual_seed(0), {}, None
    x = torch.rand(3, 3, 16, 16)*2-1
    assert all(torch.isfinite(loss) for _,loss,_ in cdrl.losses(nets, dict(x=x), cfg, ctx))
    y = cdrl.sample(nets, 2, cfg, generator=torch.Generator().manual_seed(0))
    assert y.shape==(2, 3, 16, 16) and y.abs().max()<=1


def test_a_missing_autoencoder_says_what_to_do(folder, tmp_path):
    with pytest.raises(OSError, match='local folder'): cdrl.autoencoder(str(tmp_path/'none'))
    with pytest.raises(ValueError, match='autoencoder turns'): cdrl.encode(torch.zeros(1, 3, 16, 16), replace(row(folder), shape=(4, 4, 4)))
