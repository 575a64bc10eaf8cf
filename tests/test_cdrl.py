"""Checks of CDRL that take too long for its notebook, and the chapter run as a user runs it.

The other checks are test cells of the notebook.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from chapters import ROOT, limit, papermill
from torch import nn

from ebmbook import cdrl, mcmc
from ebmbook.cdrl import PRESETS, schedule
from ebmbook.data import edge, in_square
from ebmbook.learn.blocks import count, settle_norms
from ebmbook.learn.contract import Context
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.mcmc import normal, uniform

# --- networks: parameter counts of the paper's presets

COUNTS = {  # preset: energy, initialiser
    'cifar10': (34_833_152, 3_769_795),
    'cifar10-large': (139_265_536, 3_769_795),
    'imagenet32': (139_265_536, 3_769_795),
    'imagenet32-cond': (35_346_176, 3_181_443),
    # the count without labels, and the 7 x 512 + 512 numbers of the labels
    'celeba64-composition': (11_679_488 + 4_096, 4_913_859),
    'celeba64-inpainting': (45_327_104, 4_913_859),
    # four channels in, and out of the initialiser
    'celebahq256-latent': (34_833_152 + 1_152, 3_769_795 + 1_153),
}


def build_bare(preset, **changes):
    "Networks without memory for their weights; the norm adds buffers only, and time."
    with torch.device('meta'):
        return cdrl.build(replace(PRESETS[preset], **{'norm': False} | changes))


@pytest.mark.parametrize('preset', COUNTS)
def test_parameter_counts(preset):
    nets = build_bare(preset)
    assert (count(nets.energy), count(nets.init)) == COUNTS[preset]


def test_parameter_counts_of_unconditional_variants():
    assert count(build_bare('celeba64-composition', n_classes=0).energy) == 11_679_488
    assert count(build_bare('imagenet32-cond', n_classes=0).init) == 2_924_931


def test_the_norm_adds_no_parameters():
    normed, bare = (build_bare('cifar10', blocks=2, norm=norm) for norm in (True, False))
    assert count(normed.energy) == count(bare.energy)


@pytest.mark.parametrize('preset', PRESETS)
def test_weights_and_settings_come_back(preset, tmp_path):
    torch.manual_seed(0)
    small = replace(PRESETS[preset], ch=8, blocks=1, init_ch=8, init_blocks=1, attn=())
    nets = cdrl.build(small)
    nets.save_pretrained(tmp_path)
    again = cdrl.Nets.from_pretrained(tmp_path)
    # tuples come back as tuples
    assert again.cfg == small and hash(again.cfg) == hash(small)
    pairs = zip(nets.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(saved, loaded) for saved, loaded in pairs)


# --- the cooperative fixed point

V0, STAR = 0.25, (2.024, 2.908, 3.054, 2.989, 3.782, 1.023)
LADDER = schedule(PRESETS['cifar10'])


class Levels(nn.Module):
    "One number for each level, looked up by the log signal-to-noise ratio."

    def __init__(self, value, first):
        super().__init__()
        self.value = nn.Parameter(torch.full((6,), value))
        self.lam = LADDER.lam[first : first + 6]

    def level(self, lam):
        return (lam[:, None] - self.lam).abs().argmin(1)


class Precision(Levels):
    "f = -p y^2/2, times the squared step."

    def at(self, lam, c=None):
        t = self.level(lam)
        weight = (self.value[t] * LADDER.step2[t] / 2)[:, None]
        return lambda y: (weight * y**2)[:, 0]

    def forward(self, y, lam, c=None):
        return self.at(lam)(y)


class Slope(Levels):
    "g = c x."

    def forward(self, x, lam, c=None):
        return self.value[self.level(lam)][:, None] * x


@pytest.fixture
def paired_draws(monkeypatch):
    """Both halves of a batch share all draws but those of the chain, which are opposite.

    No law changes, only the noise of averages. At level 0 the 15 updates hardly move a sample,
    so what the two networks learn from is buried under the chain's own noise: with independent
    draws the precision found there scatters by 5 % even with 60,000 examples in a batch.
    """

    def same_uniform(n, like, generator):
        return uniform(n // 2, like, generator).repeat(2)

    def same_normal(like, generator):
        return normal(like[::2], generator).repeat(2, 1)

    def opposite_normal(like, generator):
        noise = normal(like[::2], generator)
        return torch.cat([noise, -noise])

    monkeypatch.setattr(cdrl.method, 'uniform', same_uniform)
    monkeypatch.setattr(cdrl.method, 'normal', same_normal)
    monkeypatch.setattr(mcmc, 'normal', opposite_normal)


def train_line(n_iters, generator):
    "Precision of the energies and slope of the initialisers, averaged over the last steps."
    cfg = replace(PRESETS['digits'], shape=(1,), n_steps=15)
    nets = nn.Module()
    nets.cfg = cfg
    nets.energy, nets.init = Precision(3.0, 0), Slope(0.5, 1)
    first_rates = dict(energy=0.03, init=0.02)
    optims = {
        name: torch.optim.Adam(net.parameters()) for name, net in nets.named_children()
    }
    ctx = Context(0, 0.0, generator)
    precisions, slopes = [], []
    for i in range(n_iters):
        x = V0**0.5 * torch.randn(3_000, 1, generator=generator).repeat(2, 1)
        for name, loss, _ in cdrl.losses(nets, dict(x=x), ctx):
            optims[name].zero_grad()
            loss.backward()
            rate = first_rates[name] * (1 - i / n_iters) ** 2 + 0.001
            optims[name].param_groups[0]['lr'] = rate
            optims[name].step()
        if i >= 0.4 * n_iters:
            precisions.append(nets.energy.value.detach().clone())
            slopes.append(nets.init.value.detach().clone())
    return torch.stack(precisions).mean(0), torch.stack(slopes).mean(0)


def test_cooperative_training_lands_on_its_fixed_point(paired_draws):
    precision, slope = train_line(600, torch.Generator().manual_seed(0))
    pull = 1 / LADDER.sigma**2 * (torch.arange(6) < 5)  # nothing pulls at the top
    ratio = precision / torch.tensor(STAR)
    slope_ratio = slope * (precision + pull) / pull
    print('p/p*', ratio.tolist(), 'c/c*', slope_ratio[:5].tolist())
    assert (ratio - 1).abs().max() < 0.05
    # the initialiser is the posterior mean of this p
    assert (slope_ratio - 1)[:5].abs().max() < 0.02 and slope[5].abs() < 0.02


# --- the weight of the energy's loss


@pytest.mark.parametrize('preset', ['checkerboard', 'digits'])
@pytest.mark.parametrize('weighted', [True, False])
def test_the_loss_of_the_energy_is_weighted_or_a_plain_mean(preset, weighted):
    torch.manual_seed(0)
    small = dict(ch=8, blocks=1, init_ch=8, init_blocks=1, n_steps=2)
    nets = cdrl.build(replace(PRESETS[preset], weighted=weighted, **small))
    seen = []
    nets.energy.register_forward_hook(
        lambda net, args, energies: seen.append((args[1], energies))
    )
    x = torch.rand(32, *nets.cfg.shape) * 2 - 1
    ctx = Context(0, 0.0, torch.Generator().manual_seed(0))
    name, loss, _ = next(cdrl.losses(nets, dict(x=x), ctx))
    (lam, real), (_, fake) = seen  # data, then where the chains ended
    t = (lam[:, None] - LADDER.lam[:-1]).abs().argmin(1)
    weights = LADDER.sigma[0] / LADDER.sigma[t] if weighted else torch.ones(32)
    assert name == 'energy' and len(t.unique()) > 2
    want = sum(weights[i] * (real[i] - fake[i]) for i in range(32)) / 32
    assert torch.allclose(loss, want, rtol=1e-5)
    if not weighted:
        assert torch.equal(loss, (real - fake).mean())


# --- the checkerboard at full width


@pytest.mark.slow
def test_checkerboard_at_full_width(tmp_path):
    paper = PRESETS['checkerboard-paper']
    small = dict(n_iters=1_500, batch=512, lr=1e-4, lr_init=3e-4, warmup=0, ema=0.999)
    cfg = replace(paper, **small, log_every=500, save_every=500)
    run = open_run('cdrl', 'checkerboard-paper', cfg, paper, out=tmp_path, device='cpu')
    flat = 16 * torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1)) - 8
    flat = flat[edge(flat).abs() > 0.4]  # the borders of squares belong to neither side
    seen = {}

    def measure(nets):
        "Share of samples inside, and how much higher the median of f is there."
        x = cdrl.sample(nets, 5_000, generator=torch.Generator().manual_seed(0))
        energies, within = cdrl.energy(nets, flat), in_square(flat)
        contrast = energies[~within].median() - energies[within].median()
        return in_square(x).float().mean().item(), contrast.item()

    def measure_checkpoint(step, nets):
        "With the averaged weights of the checkpoint just written."
        if step not in (501, 1_001):
            return
        average = load_checkpoint(tmp_path)['ema']
        average.pop('n_averaged')
        weights = {name.removeprefix('module.'): value for name, value in average.items()}
        nets = cdrl.build(cfg)
        nets.load_state_dict(weights)
        seen[step - 1] = measure(settle_norms(nets).eval())

    seen[1_500] = measure(
        train(cdrl.SYSTEM, cfg, run, progress=False, on_step=measure_checkpoint)
    )
    print(seen)
    for n, inside, contrast in ((500, 0.55, 2.5), (1_000, 0.72, 4.5), (1_500, 0.78, 5.0)):
        assert seen[n][0] >= inside and seen[n][1] >= contrast, seen


# --- the chapter as a user runs it


def write_imagenet32(root, n=8):
    "Data in the official format: ten batches, one for validation; rows of 3072, labels 1..1000."
    rng = np.random.default_rng(0)
    for name in (*(f'train_data_batch_{i}' for i in range(1, 11)), 'val_data'):
        path = root / 'imagenet32' / f'{name}.npz'
        path.parent.mkdir(parents=True, exist_ok=True)
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        np.savez(path, data=data, labels=rng.integers(1, 1001, n), mean=np.zeros(3072))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_missing_data_ends_the_chapter_in_seconds(tmp_path):
    nowhere = tmp_path / 'nowhere'
    code, logs, seconds = papermill(
        '05_cdrl', tmp_path, nowhere, '-p', 'dataset', 'imagenet32'
    )
    print(f'{seconds:.1f} s')
    assert code != 0 and 'FileNotFoundError' in logs
    for name in ('train_data_batch_1.npz', 'val_data.npz'):  # what is missing
        assert name in logs
    assert str(nowhere) in logs and 'EBMBOOK_DATA' in logs  # where it was looked for
    assert 'image-net.org' in logs  # how to get it
    assert seconds < limit(20)


def test_wrong_names_end_the_chapter_in_seconds(tmp_path):
    wrong = ('-p', 'dataset', 'digits', '-p', 'preset', 'digit')
    code, logs, seconds = papermill('05_cdrl', tmp_path, tmp_path, *wrong)
    assert code != 0 and "did you mean 'digits'" in logs and seconds < limit(20)


def test_the_chapter_trains_on_a_folder_in_the_official_format(tmp_path):
    write_imagenet32(tmp_path / 'data')
    run = tmp_path / 'run'
    over = (
        'over: {n_iters: 2, batch: 4, ch: 8, blocks: 1, init_ch: 8, init_blocks: 1, n_steps: 2, '
        'save_every: 1, log_every: 1, n_eval: 16}'
    )
    options = ('-p', 'dataset', 'imagenet32', '-p', 'out', str(run), '-y', over)
    code, logs, seconds = papermill('05_cdrl', tmp_path, tmp_path / 'data', *options)
    print(f'{seconds:.1f} s')
    assert code == 0, logs[-3000:]
    assert load_checkpoint(run)['step'] == 2
    assert (run / 'weights/model.safetensors').is_file()
    assert [line['total'] for line in read_lines(run / 'log.jsonl')] == [1, 2]
    record = read_lines(run / 'record.jsonl')
    assert record
    for line in record:
        assert (line['system'], line['preset']) == ('cdrl', 'imagenet32')
        assert line['over']['n_iters'] == 2 and np.isfinite(line['value'])
    cells = json.loads((tmp_path / 'out.ipynb').read_text())['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert not list((ROOT / 'runs').glob('cdrl/imagenet32*'))
    assert seconds < limit(180)
