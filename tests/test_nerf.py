"Cameras, toy cars, radiance fields and angles, for inputs that nobody chose."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ebmbook.data import CAMERAS, DATASETS, load
from ebmbook.data.scenes import (
    Camera,
    camera_to_world,
    car_distances,
    draw_car_colours,
    draw_car_shapes,
    draw_cars,
    pairs,
    rays,
    render_cars,
)
from ebmbook.nerf_lebm.angles import kl_uniform, von_mises
from ebmbook.nerf_lebm.nerf import (
    NeRF,
    RaySampling,
    Siren,
    composite,
    image,
    pick_pixels,
    render,
    resample,
    stratified,
)

angle = st.floats(-math.pi, math.pi)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    angle,
    st.floats(-1.5, 1.5),
    st.floats(0.5, 20),
    st.sampled_from([5, 8, 33]),
    st.floats(10, 100),
)
@settings(max_examples=60, deadline=None)
def test_the_target_is_seen_in_the_middle(azimuth, elevation, radius, size, fov):
    camera = Camera(fov=fov, radius=radius, target=(0.3, -0.2, 0.1))
    c2w = camera_to_world(torch.tensor([[azimuth, elevation]], dtype=torch.float64), camera)
    axes = c2w[0, :, :3]
    assert torch.allclose(axes.T @ axes, torch.eye(3).double(), atol=1e-12)
    assert torch.linalg.det(axes) > 0
    focal = size / 2 / math.tan(math.radians(fov) / 2)
    _, ray = rays(c2w, size, fov)
    # the plane at the target's depth
    at = c2w[0, :, 3] + radius * ray[0].view(size, size, 3)
    away = torch.linalg.solve(axes, (at - torch.tensor(camera.target)).view(-1, 3).T)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    right = (column - size / 2) * radius / focal
    up = (size / 2 - row) * radius / focal
    want = torch.stack([right, up, torch.zeros(size, size)]).view(3, -1).double()
    assert torch.allclose(away, want, atol=1e-6 * radius)


@given(st.integers(0, 10_000), st.floats(0, 50), st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_light_is_neither_lost_nor_made(seed, scale, length):
    generator = gen(seed)
    t = (
        torch.rand(2, 3, 9, generator=generator, dtype=torch.float64).sort(-1).values * 4
        + 1
    )
    density = scale * torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    lengths = torch.full((2, 3), length, dtype=torch.float64)
    out = composite(density, torch.ones(2, 3, 9, 3).double(), t, lengths, 5.0)
    segment = torch.cat([t.diff(dim=-1), 5 - t[..., -1:]], -1)
    thick = (density * segment).sum(-1)
    assert torch.allclose(out.opacity, -torch.expm1(-thick * length), atol=1e-12)
    assert torch.allclose(out.weights.sum(-1), out.opacity, atol=1e-12)
    assert torch.allclose(
        out.rgb, torch.ones_like(out.rgb), atol=1e-12
    )  # white before white
    assert (out.depth >= t[..., 0] - 1e-9).all() and (out.depth <= 5 + 1e-9).all()
    # halving each segment changes no colour
    split = torch.cat([t, t + segment / 2], -1).sort(-1).values
    white = torch.ones(2, 3, 18, 3).double()
    half = composite(density.repeat_interleave(2, -1), white, split, lengths, 5.0)
    assert torch.allclose(half.opacity, out.opacity, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_resampled_depths_rise_and_stay_where_the_mass_is(seed, n_cells, n, jitter):
    generator = gen(seed)
    edges = torch.rand(3, 2, n_cells + 1, generator=generator).sort(-1).values
    weights = torch.rand(3, 2, n_cells, generator=generator)
    weights = weights * (torch.rand(3, 2, n_cells, generator=generator) < 0.6)
    t = resample(edges, weights, n, jitter=jitter, generator=generator)
    assert t.shape == (3, 2, n) and (t.diff(dim=-1) >= 0).all() and t.isfinite().all()
    assert (t >= edges[..., :1]).all() and (t <= edges[..., -1:]).all()
    every = zip(edges.flatten(0, 1), weights.flatten(0, 1), t.flatten(0, 1))
    for own_edges, mass, depths in every:
        if mass.sum() > 0.05:
            cell = (torch.searchsorted(own_edges, depths) - 1).clamp(0, n_cells - 1)
            on_edge = torch.isclose(depths[:, None], own_edges).any()
            assert mass[cell].min() > 0 or on_edge


@given(st.floats(0, 1e4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_angles_follow_their_distribution(kappa, seed):
    kappas = torch.full((4000,), kappa, dtype=torch.float64)
    angles = von_mises(torch.zeros(4000).double(), kappas, gen(seed)).numpy()
    law = stats.vonmises(kappa) if kappa > 1e-9 else stats.uniform(-math.pi, 2 * math.pi)
    assert stats.kstest(angles, law.cdf).pvalue > 1e-5
    one = torch.tensor(kappa, requires_grad=True)
    kl = kl_uniform(one)
    (slope,) = torch.autograd.grad(kl, one)
    assert kl >= -1e-6 and slope.isfinite() and slope >= -1e-6


@pytest.mark.parametrize('kappa', [0.0, 1e-3, 1.0, 90.0, 1e4, 1e6])
def test_angles_in_single_precision_have_finite_gradients(kappa):
    mean = torch.linspace(-3, 3, 200, requires_grad=True)
    kappas = torch.full((200,), kappa, requires_grad=True)
    for form in (mean, pairs(mean)):
        out = von_mises(form, kappas, gen())
        grads = torch.autograd.grad(out.square().sum(), (mean, kappas))
        assert out.dtype == torch.float32 and out.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
    one, two = pairs(von_mises(mean, kappas, gen())), von_mises(pairs(mean), kappas, gen())
    assert torch.allclose(one, two, atol=1e-5)


def small_nerf():
    return NeRF(6, 5, 32, 4, 2, (4, 2), mapping=16)


def small_siren():
    return Siren(6, 5, 32, 2, 2, 16, scale=0.3, plain_init=1.0)


@pytest.mark.parametrize('make', [small_nerf, small_siren])
def test_both_fields_offer_one_interface(make):
    torch.manual_seed(0)
    net, camera = make(), Camera()
    shape, colour = (
        torch.randn(3, 6, requires_grad=True),
        torch.randn(3, 5, requires_grad=True),
    )
    pose = torch.tensor([[0.1, 0.4], [2.0, 0.3], [-1.0, 0.8]], requires_grad=True)
    c2w = camera_to_world(pose, camera)
    sampling = RaySampling(n=10, n_fine=6)
    x, depth = image(net, c2w, 6, shape, colour, camera, sampling, chunk=200)
    assert x.shape == (3, 3, 6, 6) and depth.shape == (3, 1, 6, 6) and x.abs().max() <= 1
    assert camera.near <= depth.min() and depth.max() <= camera.far
    grads = torch.autograd.grad(x.square().sum(), (shape, colour, pose, *net.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert all(grad.abs().max() > 0 for grad in grads[:3])
    # geometry knows no colour
    depth = image(net, c2w, 6, shape, colour, camera, RaySampling(n=10))[1]
    assert torch.autograd.grad(depth.sum(), colour, allow_unused=True)[0] is None
    # the batch does not matter
    origin, ray = rays(c2w, 6, camera.fov)
    inputs = (origin, ray, shape, colour)
    options = dict(camera=camera, sampling=RaySampling(n=10), jitter=False)
    one = render(net, *(part[1:2] for part in inputs), **options).rgb
    assert torch.allclose(one, render(net, *inputs, **options).rgb[1:2], atol=1e-5)


def test_a_seed_fixes_a_picture():
    net, camera = NeRF(2, 2, 16, 2, 1, (2, 1)), Camera()
    c2w, z = camera_to_world(torch.tensor([[0.5, 0.5]]), camera), torch.zeros(1, 2)

    def drawn(seed):
        sampling = RaySampling(n=6, n_fine=4)
        return image(net, c2w, 4, z, z, camera, sampling, jitter=True, generator=gen(seed))[
            0
        ]

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    t = stratified((1, 2), 5, camera, torch.empty(0, dtype=torch.float64), generator=gen())
    assert t.dtype == torch.float64 and camera.near <= t.min() and t.max() <= camera.far
    pixels = pick_pixels(3, 5, 25, torch.empty(0), generator=gen())
    assert pixels.sort(1).values.tolist() == [list(range(25))] * 3


def test_cars_are_what_their_parameters_say():
    made = draw_cars(12, 1, 32, 7)
    camera, x = CAMERAS['cars'], made['x'].float() / 127.5 - 1
    view = render_cars(made['shape'], made['colour'], made['pose'], 32)
    assert (view.image - x).abs().max() < 0.01
    assert torch.equal(view.cover > 0, view.depth < camera.far)
    origin, ray = rays(camera_to_world(made['pose'], camera), 32, camera.fov)
    full = (view.cover == 1).flatten(1)
    at = (origin + view.depth.flatten(1)[..., None] * ray)[full]
    shape = made['shape'][:, None].expand(-1, 1024, -1)[full]
    gap = car_distances(at, shape).amin(0)
    assert gap.abs().median() < 0.01  # what is seen lies on the surface
    assert torch.equal(draw_car_shapes(5, gen()), draw_car_shapes(5, gen()))
    assert draw_car_colours(0, gen()).shape == (0, 6)


def test_sets_of_cars_hang_together():
    names = ('cars_views', 'cars_masked', 'cars')
    sets = {name: load(name, split='test') for name in names}
    views, masked, single = (sets[name].batch(range(40)) for name in names)
    assert views['object'].tolist() == [i // 10 for i in range(40)]
    assert single['object'].tolist() == list(range(40))
    good = masked['mask']
    assert (
        'mask' not in views and good.dtype == torch.bool and good.shape == (40, 1, 32, 32)
    )
    for name in ('pose', 'shape', 'colour', 'c2w', 'object'):
        assert torch.equal(views[name], masked[name])
    black = torch.zeros(())
    assert torch.equal(views['x'].where(good, black), masked['x'].where(good, black))
    # no car of the test set is in the training set
    trained, held = (
        load('cars_views', split=split).extra['shape'] for split in ('train', 'test')
    )
    assert not torch.isin(trained[:, 0], held[:, 0]).any()
    low, high = np.sin(np.radians([10, 60]))
    elevation = sets['cars'].extra['pose'][:, 1].sin().numpy()
    assert stats.kstest(elevation, stats.uniform(low, high - low).cdf).pvalue > 0.001
    seen = [
        name
        for name in DATASETS
        if name.startswith('cars') or name in ('carla', 'srn_cars')
    ]
    assert all(name in CAMERAS for name in seen)
