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

from ebmbook.core import metrics as m
from ebmbook.data import load
from ebmbook.mcmc import grid_log_z


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope='module')
def digits(): return load('digits').tensor(1000),load('digits', split='test').tensor()


# 1. FID

def test_fid_of_identical_sets_is_zero():
    a = draw(400, 6)
    assert abs(m.fid_from_features(a, a))<1e-9
    assert abs(m.evaluate_features(a, a, ('fid',))['fid'])<1e-4


def test_fid_of_a_shift_is_its_squared_length():
    a,d = draw(400, 6),draw(6, seed=1)
    assert m.fid_from_features(a, a+d)==pytest.approx(d.square().sum().item(), rel=1e-9)
    assert m.evaluate_features(a, a+d, ('fid',))['fid']==pytest.approx(d.square().sum().item(), rel=1e-3)


def test_fid_in_one_dimension_and_its_symmetry():
    a,b = 2*draw(300, 1)+1,draw(500, 1, seed=1)
    want = (a.mean()-b.mean())**2 + (a.std()-b.std())**2
    assert m.fid_from_features(a, b)==pytest.approx(want.item(), rel=1e-9)
    a,b = draw(300, 5)@draw(5, 5, seed=2),draw(500, 5, seed=1)
    assert m.fid_from_features(a, b)==pytest.approx(m.fid_from_features(b, a), rel=1e-9)


def test_both_fid_paths_agree(digits):
    a,b = digits
    for x in (a, a+.3*torch.randn(a.shape, generator=torch.Generator().manual_seed(0)), torch.randn(a.shape, generator=torch.Generator().manual_seed(1))):
        got = m.evaluate_images(x, b, 'digits', ('fid',))['fid']
        assert got==pytest.approx(m.fid_from_features(m.features(x, 'digits'), m.features(b, 'digits')), rel=1e-3)


# 2. KID

def test_kid_of_one_distribution_is_zero_within_its_spread():
    got = m.evaluate_features(draw(1000, 8), draw(1000, 8, seed=1), ('kid',))
    assert abs(got['kid'])<2*got['kid_std'] and got['kid_subset_size']==500
    assert m.evaluate_features(draw(1000, 8)+1, draw(1000, 8, seed=1), ('kid',))['kid']>.5


# 3. Inception score

@pytest.mark.parametrize('k', [2, 10])
def test_inception_score_of_uniform_and_of_sure_balanced_predictions(k):
    sure = 80*torch.eye(k)[torch.arange(100*k)%k]
    assert m.evaluate_features(0*sure, sure, ('is',))['is']==pytest.approx(1, abs=1e-9)
    assert m.evaluate_features(sure, sure, ('is',))['is']==pytest.approx(k, rel=1e-2)


def test_joint_classes_of_attributes_and_stacks():
    logits = torch.tensor([[0., 50., -50.]])
    p = m._joint(logits, True).softmax(1)[0]
    assert p.shape==(8,) and p[0b010].item()==pytest.approx(.5) and p[0b110].item()==pytest.approx(.5)
    stack = torch.full((1, 3, 10), -50.)
    stack[0, [0, 1, 2], [4, 0, 7]] = 50.
    assert m._joint(stack, False).argmax(1).item()==407


# 4. Precision and recall

def test_precision_and_recall_ends_and_swap():
    a,b = draw(200, 4),draw(300, 4, seed=1)*2+.5
    same,far = m.evaluate_features(a, a, ('prc',)),m.evaluate_features(a, b+1000, ('prc',))
    assert (same['precision'], same['recall'], far['precision'], far['recall'])==(1, 1, 0, 0)
    one,two = m.evaluate_features(a, b, ('prc',)),m.evaluate_features(b, a, ('prc',))
    assert one['precision']==pytest.approx(two['recall']) and one['recall']==pytest.approx(two['precision'])
    assert one['precision']>one['recall'] # the narrow set lies within the wide one, not the reverse


# 5. AUROC

def test_auroc():
    a,b = draw(70).mul(3).round(),draw(50, seed=1).mul(3).round()-1
    pairs = ((a[:, None]>b).double() + .5*(a[:, None]==b).double()).mean().item()
    assert m.auroc(a, b)==pytest.approx(pairs, abs=1e-12)
    assert m.auroc(a, a)==.5 and m.auroc(a+100, b)==1
    assert m.auroc(a.exp(), b.exp())==pytest.approx(pairs, abs=1e-12)
    assert m.auroc(1e5*a+1e6, 1e5*b+1e6)==pytest.approx(pairs, abs=1e-12) # large energies must not saturate
    assert m.auroc(-a, -b)==pytest.approx(1-pairs, abs=1e-12)
    with pytest.raises(ValueError, match='NaN'): m.auroc(a*math.nan, b)
    with pytest.raises(ValueError, match='one score'): m.auroc(a[:0], b)


# 6. Modes and KL

def test_modes_and_kl():
    every = torch.cartesian_prod(*[torch.arange(10)]*3).repeat(26, 1)
    got = m.count_modes(every)
    assert got['modes']==1000 and got['kl']==pytest.approx(0, abs=1e-12) and got['floor']==pytest.approx(.0192, abs=1e-4)
    got = m.count_modes(torch.full((500,), 123))
    assert got['modes']==1 and got['kl']==pytest.approx(6.9078, abs=1e-4)
    runs = [m.count_modes(torch.randint(1000, (26_000,), generator=torch.Generator().manual_seed(s)))['kl'] for s in range(10)]
    assert np.mean(runs)==pytest.approx(.0197, abs=.001)
    for bad in (torch.tensor([-1]), torch.zeros(2, 4), torch.zeros(0)):
        with pytest.raises(ValueError): m.count_modes(bad)


def test_modes_of_real_stacks():
    x = load('stacked_digits', split='test')
    got,truth = m.modes_kl(x.tensor(2000), n=2000),m.count_modes(x.y[:2000])
    assert abs(got['modes']-truth['modes'])<25 and abs(got['kl']-truth['kl'])<.05 and got['extractor']==m.extractor_id('digits')
    with pytest.raises(ValueError, match='asks for 26000'): m.modes_kl(x.tensor(10), n=26_000)


# 7. PSNR and SSIM

def test_psnr_and_ssim():
    x = draw(4, 3, 16, 16).float().clamp(-1, 1)
    shift = torch.full_like(x, .2) # MSE 0.01 where the range is 1
    assert m.psnr(0*x, shift)==pytest.approx(20, abs=1e-4)
    assert m.psnr(x, x)==math.inf
    assert m.ssim(x, x)==pytest.approx(1, abs=1e-6) and m.ssim(x, -x)<.1
    assert m.ssim(x, x+.1, each=True).shape==(4,)
    with pytest.raises(ValueError, match='6 pixels'): m.ssim(x[..., :5, :5], x[..., :5, :5])


# 8. Log Z on a grid

def test_log_z_on_a_grid():
    energy = lambda x: (x.double().square().sum(1)/2)
    log_z,_ = grid_log_z(energy, 12., 401)
    moved,_ = grid_log_z(lambda x: energy(x-torch.tensor([1.3, -.7])), 12., 401)
    assert log_z==pytest.approx(math.log(2*math.pi), abs=1e-6) and moved==pytest.approx(log_z, abs=1e-6)
    x = draw(1000, 2)
    for c in (-3., 5.):
        lifted,_ = grid_log_z(lambda x: energy(x)+c, 12., 401)
        assert lifted==pytest.approx(log_z-c, abs=1e-9) # our sign: p is exp(-E), so a constant lowers log Z
        assert (-energy(x)-c).mean().item()-lifted==pytest.approx((-energy(x)).mean().item()-log_z, abs=1e-9)


# IWAE

def test_iwae_is_exact_for_the_exact_posterior_and_monotone_otherwise():
    # x = W z + noise, z in three dimensions, x in four
    w,s2 = draw(4, 3, seed=1),.5
    normal = lambda mean,cov: torch.distributions.MultivariateNormal(mean, cov)
    x = draw(5, 4, seed=2)*2
    prior = normal(torch.zeros(3).double(), torch.eye(3).double())
    cov = torch.linalg.inv(torch.eye(3).double() + w.T@w/s2)
    q = normal((x@w/s2)@cov, cov)
    torch.manual_seed(0)
    z = q.sample((17,))
    log_w = prior.log_prob(z) + normal(z@w.T, s2*torch.eye(4).double()).log_prob(x) - q.log_prob(z)
    truth = normal(torch.zeros(4).double(), w@w.T + s2*torch.eye(4).double()).log_prob(x)
    for k in (1, 5, 17): assert torch.allclose(m.iwae(log_w[:k].T), truth, atol=1e-11, rtol=0)
    assert m.iwae(log_w.T.float()).dtype==torch.float64


# Extractors

@pytest.mark.parametrize('name,least', [('digits', .98), ('digits16', .98), ('shapes', .98), ('mnist', .99), ('cifar10', .82)])
def test_committed_extractors(name, least):
    info,file = m.extractor_info(name),m.extractor_folder()/f'{name}.safetensors'
    assert info['accuracy']>=least and file.stat().st_size<=400_000 and info['architecture']['dim']==64
    assert m.load_extractor(name).training is False
    assert m.extractor_id(name)==f"{name}-{info['sha256'][:8]}"


@pytest.mark.parametrize('name', ['digits', 'digits16', 'shapes'])
def test_recorded_accuracy_is_measured_again(name):
    test = load(name, split='test')
    p = m.classify(test.tensor(), name)
    right = ((p>.5)==(test.y>0)) if test.y.ndim==2 else (p.argmax(1)==test.y)
    assert right.double().mean().item()==pytest.approx(m.extractor_info(name)['accuracy'], abs=.006)


@pytest.mark.parametrize('name', ['digits', 'digits16', 'shapes'])
def test_bad_images_look_bad(name):
    train,test = load(name).tensor(1000),load(name, split='test').tensor()
    noise,at = torch.randn(train.shape, generator=torch.Generator().manual_seed(0)),lambda x: m.evaluate_images(x, test, name, ('fid', 'prc'))
    real,weak,strong,pure = at(train),at(train+.1*noise),at(train+.4*noise),at(noise)
    assert real['fid']<weak['fid']<strong['fid'] and real['fid']<.02*pure['fid']
    assert real['precision']>.8 and real['recall']>.7 and pure['precision']==0 and pure['recall']<.05


@pytest.fixture
def copy(tmp_path):
    for end in ('safetensors', 'json'): shutil.copy(m.extractor_folder()/f'digits.{end}', tmp_path)
    return tmp_path


def test_damaged_and_exchanged_files_are_refused(copy):
    assert m.load_extractor('digits', copy).info['name']=='digits'
    file = copy/'digits.safetensors'
    good = file.read_bytes()
    for bad in (good[:-1], good[:3000]+bytes([good[3000]^1])+good[3001:], (m.extractor_folder()/'digits16.safetensors').read_bytes(), b''):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged or another file'): m.load_extractor('digits', copy)
    info = json.loads((copy/'digits.json').read_text())
    (copy/'digits.json').write_text(json.dumps(info | dict(sha256='0'*64)))
    file.write_bytes(good)
    with pytest.raises(ValueError, match='JSON says 00000000'): m.load_extractor('digits', copy)


ROWS = dict(foundations='digits', cdrl='digits-cond', coopflow='digits-pre', ecvae='digits', vaebm='stacked_digits', nerf_lebm='cars', liebm='digits')

@pytest.mark.parametrize('system', ROWS)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(system, monkeypatch):
    module = importlib.import_module(f'ebmbook.{system}')
    cfg,net,asked = module.PRESETS[ROWS[system]],torch.nn.Linear(1, 1),[]
    def draw_nothing(nets, n, *_, **__): asked.append(n); raise KeyboardInterrupt
    monkeypatch.setattr(module, 'sample', draw_nothing)
    with pytest.raises(ValueError, match='100 are too few for FID'): module.evaluate(net, cfg, n=100)
    monkeypatch.setattr(m, '_fidelity', lambda: exec("raise ImportError('this needs torch-fidelity')"))
    with pytest.raises(ImportError, match='torch-fidelity'): module.evaluate(net, cfg)
    monkeypatch.setattr(m, '_fidelity', lambda: None)
    if system!='foundations': # the chapter of the basics has its own extractors alone
        with pytest.raises(ValueError, match="unknown extractor 'cats'"): module.evaluate(net, cfg, extractor='cats')
        with pytest.raises(ValueError, match='looks at images'): module.evaluate(net, cfg, extractor='mnist')
    assert not asked
    with pytest.raises(KeyboardInterrupt): module.evaluate(net, cfg)
    assert asked==[10_000 if system=='vaebm' else 1_000]

def test_the_extractor_that_is_asked_for_looks(monkeypatch): # with the count and the images of its protocol
    from ebmbook import liebm
    cfg,seen = replace(liebm.PRESETS['cifar10'], data='textures'),[]
    monkeypatch.setattr(liebm, 'sample', lambda nets, n, cfg, **_: torch.zeros(n, 3, 32, 32))
    monkeypatch.setattr(m, 'evaluate_images', lambda x, to, name, wanted: seen.append((name, len(x), len(to))) or dict.fromkeys((*wanted, 'precision', 'recall', 'extractor')))
    liebm.evaluate(torch.nn.Linear(1, 1), cfg, extractor='cifar10')
    assert seen==[('cifar10', 1_000, 300)]

def test_a_fresh_extractor_replaces_the_cached_one_in_its_folder(tmp_path):
    first = m.train_extractor('digits', 1, tmp_path, epochs=1)
    assert m.load_extractor('digits', tmp_path).info==first
    second = m.train_extractor('digits', 2, tmp_path, epochs=1)
    assert m.load_extractor('digits', tmp_path).info==second!=first


# Refusals

def test_refusals(digits):
    x,ref = digits
    bad = x.clone()
    bad[7, 0, 3, 3] = math.nan
    for call in (m.features, m.classify): # NaN, infinity, shape, type
        with pytest.raises(ValueError, match='1 of 1000 images hold NaN'): call(bad, 'digits')
        with pytest.raises(ValueError, match='looks at images'): call(x[..., :7], 'digits')
        with pytest.raises(ValueError, match='expected images'): call(x[:, 0], 'digits')
        with pytest.raises(ValueError, match='int64'): call(x.long(), 'digits')
        with pytest.raises(ValueError, match='unknown extractor'): call(x, 'cats')
    for a,b,word in ((bad, ref, 'samples: 1 of'), (x, bad, 'reference: 1 of'), (x[:127], ref, '127 are too few'), (x, ref[:100], 'reference: 100'),
                     (x, ref[..., :7], 'differ in shape')):
        with pytest.raises(ValueError, match=word): m.evaluate_images(a, b, 'digits')
    with pytest.raises(ValueError, match='asks for 50000 images, got 1000'): m.evaluate_images(x, ref, 'digits', n=50_000)
    with pytest.raises(ValueError, match='unknown metrics'): m.evaluate_images(x, ref, 'digits', ('fid', 'swd'))
    with pytest.raises(ValueError, match='unknown metrics'): m.evaluate_images(x, ref, 'digits', ())


# Inception, with random weights: the published ones need a download

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    from torch_fidelity import feature_extractor_inceptionv3 as f
    with pytest.MonkeyPatch.context() as p, torch.random.fork_rng():
        p.setattr(f, 'load_state_dict_from_url', lambda *a, **k: {})
        p.setattr(torch.nn.Module, 'load_state_dict', lambda *a, **k: None)
        torch.manual_seed(0)
        net = f.FeatureExtractorInceptionV3('inception-v3-compat', ['2048'])
    path = tmp_path_factory.mktemp('weights')/'random.pth'
    torch.save(net.state_dict(), path)
    return path


def test_inception_from_a_file_with_cache(weights, tmp_path):
    x,ref = load('digits').tensor(20),load('digits', split='test').tensor(20)
    got = m.evaluate_images(x, ref, metrics=('kid', 'prc'), weights=weights, cache=tmp_path, batch=20, cuda=False)
    assert got['extractor']==m.extractor_id('inception', weights) and got['extractor'].startswith('inception-') and got['kid_subset_size']==10
    files = sorted(o.name for o in tmp_path.iterdir())
    assert files and not any('digits' in o for o in files)
    with pytest.raises(ValueError, match='needs 4096'): m.evaluate_images(x, ref, weights=weights)


def test_inception_without_weights_says_what_to_do(monkeypatch, tmp_path):
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    x = load('digits').tensor(20)
    with pytest.raises(FileNotFoundError) as e: m.evaluate_images(x, x, metrics=('kid',))
    for word in (m.INCEPTION_FILE, 'no network', str(tmp_path), 'weights=PATH', 'https://'): assert word in str(e.value)
    with pytest.raises(FileNotFoundError, match='nothing.pth'): m.evaluate_images(x, x, metrics=('kid',), weights=tmp_path/'nothing.pth')


def test_cache_follows_content_not_names(digits, tmp_path):
    x,ref = digits
    value = lambda b,**k: m.evaluate_images(x, b, 'digits', ('fid',), **k)['fid']
    assert value(ref, cache=tmp_path)==value(ref, cache=tmp_path)==pytest.approx(value(ref), rel=1e-6)
    assert value(ref.flip(3), cache=tmp_path)==pytest.approx(value(ref.flip(3)), rel=1e-6)!=value(ref)


# Sober imports

def test_heavy_packages_are_imported_when_used():
    code = ("import sys, ebmbook.core.metrics as m, torch; from ebmbook.data import load; x = torch.zeros(300, 1, 8, 8); m.features(x, 'digits'); "
            "print([o for o in ('torch_fidelity', 'sklearn', 'torchmetrics', 'fastcore', 'matplotlib') if o in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip()=='[]'


def test_without_torch_fidelity_the_message_names_the_other_path(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match='fid_from_features'): m.evaluate_images(*digits, 'digits')
