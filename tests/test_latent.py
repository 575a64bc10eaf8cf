"CDRL in the latent space of a real `AutoencoderKL` (extra `latent`), made up and small."

from dataclasses import replace

import pytest
import torch

from ebmbook import cdrl
from ebmbook.learn.contract import Context

diffusers = pytest.importorskip('diffusers', reason="needs the extra `latent`")


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A stored autoencoder with random weights and made-up sizes."
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    path = tmp_path_factory.mktemp('vae')
    net.save_pretrained(path)
    return path


def small_config(folder):
    return replace(
        cdrl.PRESETS['celebahq256-latent'],
        shape=(4, 8, 8),
        vae=str(folder),
        ch=8,
        blocks=1,
        mult=(1, 1),
        init_ch=8,
        init_blocks=1,
        init_mult=(1, 1),
        attn=(),
        n_steps=2,
    )


def test_latents_are_scaled_means_and_come_back(folder):
    cfg = small_config(folder)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    net = cdrl.autoencoder(cfg.vae)
    mean = net.encode(x).latent_dist.mean
    latents = cdrl.encode(x, cfg)
    assert latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(latents, mean * net.config.scaling_factor)
    images = net.decode(mean).sample
    torch.testing.assert_close(cdrl.decode(latents, cfg), images, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_ladder_trains_and_draws_in_latents(folder):
    cfg = small_config(folder)
    torch.manual_seed(0)
    nets = cdrl.build(cfg)
    # the autoencoder is neither trained nor stored
    assert not any('vae' in name for name in nets.state_dict())
    ctx = Context(0, 0.0, torch.Generator().manual_seed(0))
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    assert all(torch.isfinite(loss) for _, loss, _ in cdrl.losses(nets, dict(x=x), ctx))
    y = cdrl.sample(nets, 2, generator=torch.Generator().manual_seed(0))
    assert y.shape == (2, 3, 16, 16) and y.abs().max() <= 1


def test_a_missing_autoencoder_says_what_to_do(folder, tmp_path):
    with pytest.raises(OSError, match='local folder'):
        cdrl.autoencoder(str(tmp_path / 'none'))
    wrong = replace(small_config(folder), shape=(4, 4, 4))
    with pytest.raises(ValueError, match='autoencoder turns'):
        cdrl.encode(torch.zeros(1, 3, 16, 16), wrong)
