"""What every system promises to whoever calls it, on tiny networks."""

import pytest
import torch
from tiny import bare, digest, few_cars, forget, settings, trained

from ebmbook.data.catalogue import load
from ebmbook.shell.systems import load_system

# --- `torch.inference_mode()`

KEPT = dict(inference='persistent')  # codes of objects, whose data are kept
CASES = {  # system, base, settings
    'foundations': ('foundations', '', {}),
    'nerf_lebm': ('nerf_lebm', '', dict(data='cars_masked', views=2, **KEPT)),
    'coopflow-points': ('coopflow', '', dict(method='coopflow')),
    'coopflow-images': ('coopflow', 'images', {}),
    'coopflow-coopnets': ('coopflow', 'images', dict(method='coopnets')),
    'cdrl-points': ('cdrl', '', {}),
    'cdrl-images': ('cdrl', 'images', dict(n_classes=10)),
    'vaebm-points': ('vaebm', '', dict(n_jumps=1)),
    'vaebm-images': ('vaebm', 'images', {}),
    'vaebm-ebm': ('vaebm', 'images', dict(method='ebm')),
    'ecvae-points': ('ecvae', '', dict(n_steps_test=2)),
    'ecvae-images': ('ecvae', 'images', dict(n_steps_test=2, prior='flow')),
    'ecvae-flow': ('ecvae', 'images', dict(n_steps_test=2, method='ecflow')),
    'liebm': ('liebm', '', {}),
    'liebm-clel': ('liebm', '', dict(encoder='joint')),
}


@pytest.fixture(scope='module', autouse=True)
def cars():
    with few_cars():
        yield


def asked(system, nets, x):
    "Samples, and energies where there are some; some energies start chains of their own."
    torch.manual_seed(0)
    found = [system.sample(nets, 3, generator=torch.Generator().manual_seed(0))]
    if system.energy is not None:
        found.append(system.energy(nets, x))
    return found


@pytest.mark.parametrize('case', CASES)
def test_inference_mode_changes_no_number_and_no_later_training(case, tmp_path):
    name, base, changes = CASES[case]
    whole = load_system(name)
    cfg = settings(whole, base, **changes)
    system = bare(whole, cfg)
    nets, lines = trained(system, cfg, tmp_path / 'before')
    x = load(cfg.data).tensor(4)
    want = asked(system, nets, x)
    weights = digest(nets)
    forget()  # what is kept is now made where no gradient passes
    with torch.inference_mode():
        found = asked(system, nets, x)
        again = asked(system, nets, x.clone())
    assert all(map(torch.equal, want, found)) and all(map(torch.equal, want, again))
    assert digest(nets) == weights
    assert all(map(torch.equal, want, asked(system, nets, x)))
    later, more = trained(system, cfg, tmp_path / 'after')
    assert digest(later) == weights and more == lines


# --- rivals

RIVALS = [
    (name, method)
    for name in ('coopflow', 'vaebm', 'ecvae', 'liebm')
    for method in load_system(name).rivals
]


@pytest.mark.parametrize('name, method', RIVALS)
def test_a_chapter_draws_from_a_rival_as_the_rival_does_or_refuses(name, method):
    system = load_system(name)
    cfg = settings(system, method=method)
    rival = system.of(cfg)
    nets = rival.build(cfg).eval()

    def drawn(sample):
        return sample(nets, 3, generator=torch.Generator().manual_seed(0))

    want = drawn(rival.sample)
    try:
        found = drawn(system.sample)
    except ValueError as error:
        assert 'method must be one of' in str(error)
        return
    assert torch.equal(found, want)


@pytest.mark.parametrize('name, method', RIVALS)
def test_a_chapter_builds_no_networks_of_a_rival(name, method):
    system = load_system(name)
    cfg = settings(system, method=method)
    with pytest.raises(ValueError, match=f"method must be one of .*, got '{method}'"):
        system.build(cfg)
    rival = system.of(cfg)
    if rival.energy is None:
        with pytest.raises(ValueError, match='have no energy'):
            system.energy(rival.build(cfg), torch.zeros(2, *cfg.shape))
