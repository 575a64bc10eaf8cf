"Cameras, toy cars, radiance fields and angles, for inputs that nobody chose."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ebmbook.core.scenes import Camera, camera_to_world, car_distances, draw_car_colours, draw_car_shapes, draw_cars, pairs, rays, render_cars
from ebmbook.data import CAMERAS, DATASETS, load
from ebmbook.nerf import Look, NeRF, Siren, composite, image, kl_uniform, pick_pixels, render, resample, stratified, von_mises

angle = st.floats(-math.pi, math.pi)
gen = lambda seed=0: torch.Generator().manual_seed(seed)


@given(angle, st.floats(-1.5, 1.5), st.floats(.5, 20), st.sampled_from([5, 8, 33]), st.floats(10, 100))
@settings(max_examples=60, deadline=None)
def test_the_target_is_seen_in_the_middle(a, e, radius, size, fov):
    camera = Camera(fov=fov, radius=radius, target=(.3, -.2, .1))
    c2w = camera_to_world(torch.tensor([[a, e]], dtype=torch.float64), camera)
    axes = c2w[0,:,:3]
    assert torch.allclose(axes.T@axes, torch.eye(3).double(), atol=1e-12) and torch.linalg.det(axes)>0
    f = size/2/math.tan(math.radians(fov)/2)
    _,d = rays(c2w, size, fov)
    at = c2w[0,:,3]+radius*d[0].view(size, size, 3)             # the plane at the target's depth
    away = torch.linalg.solve(axes, (at-torch.tensor(camera.target)).view(-1, 3).T)
    j,i = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    want = torch.stack([(i-size/2)*radius/f, (size/2-j)*radius/f, torch.zeros(size, size)]).view(3, -1).double()
    assert torch.allclose(away, want, atol=1e-6*radius)


@given(st.integers(0, 10_000), st.floats(0, 50), st.floats(.1, 3))
@settings(max_examples=60, deadline=None)
def test_light_is_neither_lost_nor_made(seed, scale, length):
    g = gen(seed)
    t = torch.rand(2, 3, 9, generator=g, dtype=torch.float64).sort(-1).values*4+1
    density = scale*torch.rand(2, 3, 9, generator=g, dtype=torch.float64)
    one = torch.full((2, 3), length, dtype=torch.float64)
    r = composite(density, torch.ones(2, 3, 9, 3).double(), t, one, 5.)
    thick = (density[...,:-1]*t.diff(dim=-1)).sum(-1)+density[...,-1]*(5-t[...,-1])
    assert torch.allclose(r.opacity, -torch.expm1(-thick*length), atol=1e-12) and torch.allclose(r.weights.sum(-1), r.opacity, atol=1e-12)
    assert torch.allclose(r.rgb, torch.ones_like(r.rgb), atol=1e-12)        # white before white
    assert (r.depth>=t[...,0]-1e-9).all() and (r.depth<=5+1e-9).all()
    split = torch.cat([t, t+torch.cat([t.diff(dim=-1), 5-t[...,-1:]], -1)/2], -1).sort(-1).values # halving each segment changes no colour
    half = composite(density.repeat_interleave(2, -1), torch.ones(2, 3, 18, 3).double(), split, one, 5.)
    assert torch.allclose(half.opacity, r.opacity, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_resampled_depths_rise_and_stay_where_the_mass_is(seed, m, n, jitter):
    g = gen(seed)
    edges = torch.rand(3, 2, m+1, generator=g).sort(-1).values
    weights = torch.rand(3, 2, m, generator=g)*(torch.rand(3, 2, m, generator=g)<.6)
    t = resample(edges, weights, n, jitter=jitter, generator=g)
    assert t.shape==(3, 2, n) and (t.diff(dim=-1)>=0).all() and t.isfinite().all()
    assert (t>=edges[...,:1]).all() and (t<=edges[...,-1:]).all()
    for e,w,v in zip(edges.flatten(0, 1), weights.flatten(0, 1), t.flatten(0, 1)):
        if w.sum()>.05: assert w[(torch.searchsorted(e, v)-1).clamp(0, m-1)].min()>0 or torch.isclose(v[:,None], e).any()


@given(st.floats(0, 1e4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_angles_follow_their_distribution(kappa, seed):
    x = von_mises(torch.zeros(4000).double(), torch.full((4000,), kappa, dtype=torch.float64), gen(seed)).numpy()
    cdf = stats.vonmises(kappa).cdf if kappa>1e-9 else stats.uniform(-math.pi, 2*math.pi).cdf
    assert stats.kstest(x, cdf).pvalue>1e-5
    k = torch.tensor(kappa, requires_grad=True)
    kl = kl_uniform(k)
    slope, = torch.autograd.grad(kl, k)
    assert kl>=-1e-6 and slope.isfinite() and slope>=-1e-6


@pytest.mark.parametrize('kappa', [0., 1e-3, 1., 90., 1e4, 1e6])
def test_angles_in_single_precision_have_finite_gradients(kappa):
    mean,k = torch.linspace(-3, 3, 200, requires_grad=True),torch.full((200,), kappa, requires_grad=True)
    for m in (mean, pairs(mean)):
        x = von_mises(m, k, gen())
        grads = torch.autograd.grad(x.square().sum(), (mean, k))
        assert x.dtype==torch.float32 and x.isfinite().all() and all(o.isfinite().all() for o in grads)
    assert torch.allclose(pairs(von_mises(mean, k, gen())), von_mises(pairs(mean), k, gen()), atol=1e-5)


@pytest.mark.parametrize('make', [lambda: NeRF(6, 5, 32, 4, 2, (4, 2), mapping=16), lambda: Siren(6, 5, 32, 2, 2, 16, scale=.3, plain_init=1.)])
def test_both_fields_offer_one_interface(make):
    torch.manual_seed(0)
    net,camera = make(),Camera()
    zs,za = torch.randn(3, 6, requires_grad=True),torch.randn(3, 5, requires_grad=True)
    pose = torch.tensor([[.1, .4], [2., .3], [-1., .8]], requires_grad=True)
    c2w = camera_to_world(pose, camera)
    x,depth = image(net, c2w, 6, zs, za, camera, Look(n=10, n_fine=6), chunk=200)
    assert x.shape==(3, 3, 6, 6) and depth.shape==(3, 1, 6, 6) and x.abs().max()<=1 and camera.near<=depth.min() and depth.max()<=camera.far
    grads = torch.autograd.grad(x.square().sum(), (zs, za, pose, *net.parameters()))
    assert all(o.isfinite().all() for o in grads) and all(o.abs().max()>0 for o in grads[:3])
    assert torch.autograd.grad(image(net, c2w, 6, zs, za, camera, Look(n=10))[1].sum(), za, allow_unused=True)[0] is None # geometry knows no colour
    o,d = rays(c2w, 6, camera.fov)
    one = render(net, o[1:2], d[1:2], zs[1:2], za[1:2], camera, Look(n=10), jitter=False).rgb
    assert torch.allclose(one, render(net, o, d, zs, za, camera, Look(n=10), jitter=False).rgb[1:2], atol=1e-5)  # the batch does not matter


def test_a_seed_fixes_a_picture():
    net,camera = NeRF(2, 2, 16, 2, 1, (2, 1)),Camera()
    c2w,z = camera_to_world(torch.tensor([[.5, .5]]), camera),torch.zeros(1, 2)
    a,b,c = (image(net, c2w, 4, z, z, camera, Look(n=6, n_fine=4), jitter=True, generator=gen(s))[0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    t = stratified((1, 2), 5, camera, torch.empty(0, dtype=torch.float64), generator=gen())
    assert t.dtype==torch.float64 and camera.near<=t.min() and t.max()<=camera.far
    assert pick_pixels(3, 5, 25, torch.empty(0), generator=gen()).sort(1).values.tolist()==[list(range(25))]*3


def test_cars_are_what_their_parameters_say():
    made = draw_cars(12, 1, 32, 7)
    camera,x = CAMERAS['cars'],made['x'].float()/127.5-1
    v = render_cars(made['shape'], made['colour'], made['pose'], 32)
    assert (v.image-x).abs().max()<.01 and torch.equal(v.cover>0, v.depth<camera.far)
    o,d = rays(camera_to_world(made['pose'], camera), 32, camera.fov)
    full = (v.cover==1).flatten(1)
    at = (o+v.depth.flatten(1)[...,None]*d)[full]
    gap = car_distances(at, made['shape'][:,None].expand(-1, 1024, -1)[full]).amin(0)
    assert gap.abs().median()<.01                                # what is seen lies on the surface
    assert (draw_car_shapes(5, gen())==draw_car_shapes(5, gen())).all() and draw_car_colours(0, gen()).shape==(0, 6)


def test_sets_of_cars_hang_together():
    views,masked,one = (load(o, split='test') for o in ('cars_views', 'cars_masked', 'cars'))
    a,b,c = (o.batch(range(40)) for o in (views, masked, one))
    assert a['object'].tolist()==[i//10 for i in range(40)] and c['object'].tolist()==list(range(40))
    assert 'mask' not in a and b['mask'].dtype==torch.bool and b['mask'].shape==(40, 1, 32, 32)
    for k in ('pose', 'shape', 'colour', 'c2w', 'object'): assert torch.equal(a[k], b[k])
    assert torch.equal(a['x'].where(b['mask'], torch.zeros(())), b['x'].where(b['mask'], torch.zeros(())))
    assert not torch.isin(load('cars_views').extra['shape'][:,0], views.extra['shape'][:,0]).any()
    low,high = (np.sin(np.radians(o)) for o in (10, 60))
    assert stats.kstest(one.extra['pose'][:,1].sin().numpy(), stats.uniform(low, high-low).cdf).pvalue>.001
    assert all(k in CAMERAS for k in DATASETS if k.startswith('cars') or k in ('carla', 'srn_cars'))
