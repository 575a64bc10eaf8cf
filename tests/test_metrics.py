"The checks of every metric on cases with known answers, and of everything that must be refused."

import importlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ebmbook import measure
from ebmbook.data import load
from ebmbook.mcmc import grid_log_z
from ebmbook.measure import images


def draw(*shape, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.fixture(scope='module')
def digits():
    return load('digits').tensor(1000), load('digits', split='test').tensor()


# FID


def test_fid_of_identical_sets_is_zero():
    a = draw(400, 6)
    assert abs(measure.fid_from_features(a, a)) < 1e-9
    assert abs(measure.evaluate_features(a, a, ('fid',))['fid']) < 1e-4


def test_fid_of_a_shift_is_its_squared_length():
    a, shift = draw(400, 6), draw(6, seed=1)
    squared = shift.square().sum().item()
    assert measure.fid_from_features(a, a + shift) == pytest.approx(squared, rel=1e-9)
    assert measure.evaluate_features(a, a + shift, ('fid',))['fid'] == pytest.approx(
        squared, rel=1e-3
    )


def test_fid_in_one_dimension_and_its_symmetry():
    a, b = 2 * draw(300, 1) + 1, draw(500, 1, seed=1)
    want = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert measure.fid_from_features(a, b) == pytest.approx(want.item(), rel=1e-9)
    a, b = draw(300, 5) @ draw(5, 5, seed=2), draw(500, 5, seed=1)
    assert measure.fid_from_features(a, b) == pytest.approx(
        measure.fid_from_features(b, a), rel=1e-9
    )


def test_both_fid_paths_agree(digits):
    train, test = digits
    noise = [
        torch.randn(train.shape, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    for x in (train, train + 0.3 * noise[0], noise[1]):
        got = measure.evaluate_images(x, test, 'digits', ('fid',))['fid']
        seen = [measure.features(part, 'digits') for part in (x, test)]
        assert got == pytest.approx(measure.fid_from_features(*seen), rel=1e-3)


# KID


def test_kid_of_one_distribution_is_zero_within_its_spread():
    got = measure.evaluate_features(draw(1000, 8), draw(1000, 8, seed=1), ('kid',))
    assert abs(got['kid']) < 2 * got['kid_std'] and got['kid_subset_size'] == 500
    assert (
        measure.evaluate_features(draw(1000, 8) + 1, draw(1000, 8, seed=1), ('kid',))['kid']
        > 0.5
    )


# Inception score


@pytest.mark.parametrize('classes', [2, 10])
def test_inception_score_of_uniform_and_of_sure_balanced_predictions(classes):
    sure = 80 * torch.eye(classes)[torch.arange(100 * classes) % classes]
    assert measure.evaluate_features(0 * sure, sure, ('is',))['is'] == pytest.approx(
        1, abs=1e-9
    )
    assert measure.evaluate_features(sure, sure, ('is',))['is'] == pytest.approx(
        classes, rel=1e-2
    )


def test_joint_classes_of_attributes_and_stacks():
    logits = torch.tensor([[0.0, 50.0, -50.0]])
    joint = images._joint(logits, True).softmax(1)[0]
    assert joint.shape == (8,)
    assert joint[0b010].item() == pytest.approx(0.5) and joint[
        0b110
    ].item() == pytest.approx(0.5)
    stack = torch.full((1, 3, 10), -50.0)
    stack[0, [0, 1, 2], [4, 0, 7]] = 50.0
    assert images._joint(stack, False).argmax(1).item() == 407


# Precision and recall


def test_precision_and_recall_ends_and_swap():
    a, b = draw(200, 4), draw(300, 4, seed=1) * 2 + 0.5

    def both(one, other):
        got = measure.evaluate_features(one, other, ('prc',))
        return got['precision'], got['recall']

    assert both(a, a) == (1, 1)
    assert both(a, b + 1000) == (0, 0)
    precision, recall = both(a, b)
    assert both(b, a) == pytest.approx((recall, precision))
    assert precision > recall  # the narrow set lies within the wide one, not the reverse


# AUROC


def test_auroc():
    a, b = draw(70).mul(3).round(), draw(50, seed=1).mul(3).round() - 1
    pairs = ((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean().item()
    assert measure.auroc(a, b) == pytest.approx(pairs, abs=1e-12)
    assert measure.auroc(a, a) == 0.5 and measure.auroc(a + 100, b) == 1
    assert measure.auroc(a.exp(), b.exp()) == pytest.approx(pairs, abs=1e-12)
    assert measure.auroc(1e5 * a + 1e6, 1e5 * b + 1e6) == pytest.approx(
        pairs, abs=1e-12
    )  # large energies must not saturate
    assert measure.auroc(-a, -b) == pytest.approx(1 - pairs, abs=1e-12)
    with pytest.raises(ValueError, match='NaN'):
        measure.auroc(a * math.nan, b)
    with pytest.raises(ValueError, match='one score'):
        measure.auroc(a[:0], b)


# Modes and KL


def test_modes_and_kl():
    every = torch.cartesian_prod(*[torch.arange(10)] * 3).repeat(26, 1)
    got = measure.count_modes(every)
    assert (
        got['modes'] == 1000
        and got['kl'] == pytest.approx(0, abs=1e-12)
        and got['floor'] == pytest.approx(0.0192, abs=1e-4)
    )
    got = measure.count_modes(torch.full((500,), 123))
    assert got['modes'] == 1 and got['kl'] == pytest.approx(6.9078, abs=1e-4)
    runs = [
        torch.randint(1000, (26_000,), generator=torch.Generator().manual_seed(seed))
        for seed in range(10)
    ]
    assert np.mean([measure.count_modes(kinds)['kl'] for kinds in runs]) == pytest.approx(
        0.0197, abs=0.001
    )
    for bad in (torch.tensor([-1]), torch.zeros(2, 4), torch.zeros(0)):
        with pytest.raises(ValueError):
            measure.count_modes(bad)


def test_modes_of_real_stacks():
    x = load('stacked_digits', split='test')
    got, truth = measure.modes_kl(x.tensor(2000), n=2000), measure.count_modes(x.y[:2000])
    assert abs(got['modes'] - truth['modes']) < 25 and abs(got['kl'] - truth['kl']) < 0.05
    assert got['extractor'] == measure.extractor_id('digits')
    with pytest.raises(ValueError, match='asks for 26000'):
        measure.modes_kl(x.tensor(10), n=26_000)


# PSNR and SSIM


def test_psnr_and_ssim():
    x = draw(4, 3, 16, 16).float().clamp(-1, 1)
    shift = torch.full_like(x, 0.2)  # MSE 0.01 where the range is 1
    assert measure.psnr(0 * x, shift) == pytest.approx(20, abs=1e-4)
    assert measure.psnr(x, x) == math.inf
    assert measure.ssim(x, x) == pytest.approx(1, abs=1e-6) and measure.ssim(x, -x) < 0.1
    assert measure.ssim(x, x + 0.1, each=True).shape == (4,)
    with pytest.raises(ValueError, match='6 pixels'):
        measure.ssim(x[..., :5, :5], x[..., :5, :5])


# Log Z on a grid


def test_log_z_on_a_grid():
    def energy(x):
        return x.double().square().sum(1) / 2

    log_z, _ = grid_log_z(energy, 12.0, 401)
    moved, _ = grid_log_z(lambda x: energy(x - torch.tensor([1.3, -0.7])), 12.0, 401)
    assert log_z == pytest.approx(
        math.log(2 * math.pi), abs=1e-6
    ) and moved == pytest.approx(log_z, abs=1e-6)
    x = draw(1000, 2)
    for constant in (-3.0, 5.0):
        lifted, _ = grid_log_z(lambda x: energy(x) + constant, 12.0, 401)
        assert lifted == pytest.approx(
            log_z - constant, abs=1e-9
        )  # p is exp(-E), so a constant lowers log Z
        log_p = (-energy(x) - constant).mean().item() - lifted
        assert log_p == pytest.approx((-energy(x)).mean().item() - log_z, abs=1e-9)


# IWAE


def test_iwae_is_exact_for_the_exact_posterior_and_monotone_otherwise():
    # x = W z + noise, z in three dimensions, x in four
    weight, var = draw(4, 3, seed=1), 0.5

    def normal(mean, cov):
        return torch.distributions.MultivariateNormal(mean, cov)

    x = draw(5, 4, seed=2) * 2
    prior = normal(torch.zeros(3).double(), torch.eye(3).double())
    cov = torch.linalg.inv(torch.eye(3).double() + weight.T @ weight / var)
    posterior = normal((x @ weight / var) @ cov, cov)
    torch.manual_seed(0)
    z = posterior.sample((17,))
    given = normal(z @ weight.T, var * torch.eye(4).double())
    log_w = prior.log_prob(z) + given.log_prob(x) - posterior.log_prob(z)
    marginal = normal(
        torch.zeros(4).double(), weight @ weight.T + var * torch.eye(4).double()
    )
    for k in (1, 5, 17):
        assert torch.allclose(
            measure.iwae(log_w[:k].T), marginal.log_prob(x), atol=1e-11, rtol=0
        )
    assert measure.iwae(log_w.T.float()).dtype == torch.float64


# Extractors

LEAST = dict(digits=0.98, digits16=0.98, shapes=0.98, mnist=0.99, cifar10=0.82)


@pytest.mark.parametrize('name,least', LEAST.items())
def test_committed_extractors(name, least):
    info, file = (
        measure.extractor_info(name),
        measure.extractor_folder() / f'{name}.safetensors',
    )
    assert info['accuracy'] >= least
    assert file.stat().st_size <= 400_000 and info['architecture']['dim'] == 64
    assert measure.load_extractor(name).training is False
    assert measure.extractor_id(name) == f"{name}-{info['sha256'][:8]}"


@pytest.mark.parametrize('name', ['digits', 'digits16', 'shapes'])
def test_recorded_accuracy_is_measured_again(name):
    test = load(name, split='test')
    seen = measure.classify(test.tensor(), name)
    right = (
        ((seen > 0.5) == (test.y > 0)) if test.y.ndim == 2 else (seen.argmax(1) == test.y)
    )
    assert right.double().mean().item() == pytest.approx(
        measure.extractor_info(name)['accuracy'], abs=0.006
    )


@pytest.mark.parametrize('name', ['digits', 'digits16', 'shapes'])
def test_bad_images_look_bad(name):
    train, test = load(name).tensor(1000), load(name, split='test').tensor()
    noise = torch.randn(train.shape, generator=torch.Generator().manual_seed(0))

    def compare(x):
        return measure.evaluate_images(x, test, name, ('fid', 'prc'))

    real, weak, strong, pure = map(
        compare, (train, train + 0.1 * noise, train + 0.4 * noise, noise)
    )
    assert real['fid'] < weak['fid'] < strong['fid'] and real['fid'] < 0.02 * pure['fid']
    assert (
        real['precision'] > 0.8
        and real['recall'] > 0.7
        and pure['precision'] == 0
        and pure['recall'] < 0.05
    )


@pytest.fixture
def copy(tmp_path):
    for end in ('safetensors', 'json'):
        shutil.copy(measure.extractor_folder() / f'digits.{end}', tmp_path)
    return tmp_path


def test_damaged_and_exchanged_files_are_refused(copy):
    assert measure.load_extractor('digits', copy).info['name'] == 'digits'
    file = copy / 'digits.safetensors'
    good = file.read_bytes()
    flipped = good[:3000] + bytes([good[3000] ^ 1]) + good[3001:]
    other = (measure.extractor_folder() / 'digits16.safetensors').read_bytes()
    for bad in (good[:-1], flipped, other, b''):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged or another file'):
            measure.load_extractor('digits', copy)
    info = json.loads((copy / 'digits.json').read_text())
    (copy / 'digits.json').write_text(json.dumps(info | dict(sha256='0' * 64)))
    file.write_bytes(good)
    with pytest.raises(ValueError, match='JSON says 00000000'):
        measure.load_extractor('digits', copy)


CHOSEN = dict(
    foundations='digits',
    cdrl='digits-cond',
    coopflow='digits-pre',
    ecvae='digits',
    vaebm='stacked_digits',
    nerf_lebm='cars',
    liebm='digits',
)


@pytest.mark.parametrize('system', CHOSEN)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(system, monkeypatch):
    package = importlib.import_module(f'ebmbook.{system}')
    evaluate, net, asked = package.SYSTEM.evaluate, torch.nn.Linear(1, 1), []
    net.cfg = package.PRESETS[CHOSEN[system]]

    def draw_nothing(nets, n, *_, **__):
        asked.append(n)
        raise KeyboardInterrupt

    def no_fidelity():
        raise ImportError('this needs torch-fidelity')

    monkeypatch.setattr(package.tasks, 'sample', draw_nothing)
    if system in ('vaebm', 'ecvae'):  # they ask the system who draws
        drawn = replace(package.tasks._drawn, sample=draw_nothing)
        monkeypatch.setattr(package.tasks, '_drawn', drawn)
    with pytest.raises(ValueError, match='100 are too few for FID'):
        evaluate(net, n=100)
    monkeypatch.setattr(images, 'fidelity', no_fidelity)
    with pytest.raises(ImportError, match='torch-fidelity'):
        evaluate(net)
    monkeypatch.setattr(images, 'fidelity', lambda: None)
    if system != 'foundations':  # the chapter of the basics has its own extractors alone
        with pytest.raises(ValueError, match="unknown extractor 'cats'"):
            evaluate(net, extractor='cats')
        with pytest.raises(ValueError, match='looks at images'):
            evaluate(net, extractor='mnist')
    assert not asked
    with pytest.raises(KeyboardInterrupt):
        evaluate(net)
    assert asked == [10_000 if system == 'vaebm' else 1_000]


def test_the_extractor_that_is_asked_for_looks(
    monkeypatch,
):  # with the count and images of its protocol
    from ebmbook import liebm

    net, seen = torch.nn.Linear(1, 1), []
    net.cfg = replace(liebm.PRESETS['cifar10'], data='textures')

    def evaluate(x, to, name, wanted):
        seen.append((name, len(x), len(to)))
        return dict.fromkeys((*wanted, 'precision', 'recall', 'extractor'))

    monkeypatch.setattr(
        liebm.tasks,
        'sample',
        lambda nets, n, **_: torch.zeros(n, 3, 32, 32),
    )
    monkeypatch.setattr(images, 'evaluate_images', evaluate)
    liebm.SYSTEM.evaluate(net, extractor='cifar10')
    assert seen == [('cifar10', 1_000, 300)]


def test_a_fresh_extractor_replaces_the_cached_one_in_its_folder(tmp_path):
    first = measure.train_extractor('digits', 1, tmp_path, epochs=1)
    assert measure.load_extractor('digits', tmp_path).info == first
    second = measure.train_extractor('digits', 2, tmp_path, epochs=1)
    assert measure.load_extractor('digits', tmp_path).info == second != first


# Refusals


def test_refusals(digits):
    x, ref = digits
    bad = x.clone()
    bad[7, 0, 3, 3] = math.nan
    for call in (measure.features, measure.classify):  # NaN, infinity, shape, type
        with pytest.raises(ValueError, match='1 of 1000 images hold NaN'):
            call(bad, 'digits')
        with pytest.raises(ValueError, match='looks at images'):
            call(x[..., :7], 'digits')
        with pytest.raises(ValueError, match='expected images'):
            call(x[:, 0], 'digits')
        with pytest.raises(ValueError, match='int64'):
            call(x.long(), 'digits')
        with pytest.raises(ValueError, match='unknown extractor'):
            call(x, 'cats')
    for samples, reference, word in (
        (bad, ref, 'samples: 1 of'),
        (x, bad, 'reference: 1 of'),
        (x[:127], ref, '127 are too few'),
        (x, ref[:100], 'reference: 100'),
        (x, ref[..., :7], 'differ in shape'),
    ):
        with pytest.raises(ValueError, match=word):
            measure.evaluate_images(samples, reference, 'digits')
    with pytest.raises(ValueError, match='asks for 50000 images, got 1000'):
        measure.evaluate_images(x, ref, 'digits', n=50_000)
    for unknown in (('fid', 'swd'), ()):
        with pytest.raises(ValueError, match='unknown metrics'):
            measure.evaluate_images(x, ref, 'digits', unknown)


# Inception, with random weights: the published ones need a download


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(inception, 'load_state_dict_from_url', lambda *_, **__: {})
        patch.setattr(torch.nn.Module, 'load_state_dict', lambda *_, **__: None)
        torch.manual_seed(0)
        net = inception.FeatureExtractorInceptionV3('inception-v3-compat', ['2048'])
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(net.state_dict(), path)
    return path


def test_inception_from_a_file_with_cache(weights, tmp_path):
    x, ref = load('digits').tensor(20), load('digits', split='test').tensor(20)
    got = measure.evaluate_images(
        x,
        ref,
        metrics=('kid', 'prc'),
        weights=weights,
        cache=tmp_path,
        batch=20,
        cuda=False,
    )
    assert got['extractor'] == measure.extractor_id('inception', weights)
    assert got['extractor'].startswith('inception-') and got['kid_subset_size'] == 10
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files and not any('digits' in file for file in files)
    with pytest.raises(ValueError, match='needs 4096'):
        measure.evaluate_images(x, ref, weights=weights)


def test_inception_without_weights_says_what_to_do(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    x = load('digits').tensor(20)
    with pytest.raises(FileNotFoundError) as error:
        measure.evaluate_images(x, x, metrics=('kid',))
    for word in (
        measure.INCEPTION_FILE,
        'no network',
        str(tmp_path),
        'weights=PATH',
        'https://',
    ):
        assert word in str(error.value)
    with pytest.raises(FileNotFoundError, match='nothing.pth'):
        measure.evaluate_images(x, x, metrics=('kid',), weights=tmp_path / 'nothing.pth')


def test_cache_follows_content_not_names(digits, tmp_path):
    x, ref = digits

    def fid(reference, **options):
        return measure.evaluate_images(x, reference, 'digits', ('fid',), **options)['fid']

    assert (
        fid(ref, cache=tmp_path)
        == fid(ref, cache=tmp_path)
        == pytest.approx(fid(ref), rel=1e-6)
    )
    assert (
        fid(ref.flip(3), cache=tmp_path)
        == pytest.approx(fid(ref.flip(3)), rel=1e-6)
        != fid(ref)
    )


# Sober imports


def test_heavy_packages_are_imported_when_used():
    code = '''
import sys, torch
from ebmbook import measure
from ebmbook.data import load
measure.features(torch.zeros(300, 1, 8, 8), 'digits')
heavy = {'torch_fidelity', 'sklearn', 'torchmetrics', 'fastcore', 'matplotlib'}
print(sorted(heavy & set(sys.modules)))
'''
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == '[]'


def test_without_torch_fidelity_the_message_names_the_other_path(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match='fid_from_features'):
        measure.evaluate_images(*digits, 'digits')
