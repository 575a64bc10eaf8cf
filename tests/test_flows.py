"""Checks of the two flows at full size and at their limits; the other checks of the fact sheet are test cells of the notebooks.

Numbers of checks refer to section 7 of CoopFlow's fact sheet.
"""
import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import parametrize

from ebmbook.core import flowpp, glow
from ebmbook.core.flowpp import FlowPP, PointFlowPP, from_log_odds, log_odds
from ebmbook.core.glow import Glow, PointGlow
from ebmbook.core.nets import count
from ebmbook.data import draw_points
from ebmbook.mcmc import Slice, frozen

DTYPES = [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-8, 1e-8)]  # one coupling, the full stack
SMALL = {
    'flowpp': lambda **k: FlowPP((3, 4, 4), steps=(2, 1, 1), deq=(1, 1, 4), blocks=1, width=8, n_mix=3, heads=2, **k),
    'flowpp-uniform': lambda **k: FlowPP((3, 4, 4), steps=(2, 1, 1), deq=(), blocks=1, width=8, n_mix=3, heads=2, **k),
    'glow': lambda **k: Glow((3, 4, 4), n_levels=2, depth=2, width=8, **k),
    'points-flowpp': lambda: PointFlowPP(4, 16, 3, 4),
    'points-glow': lambda: PointGlow(4, 16, 3),
}

def gen(seed=0): return torch.Generator().manual_seed(seed)

def data(flow, n=64, seed=0):
    dtype = next(flow.parameters()).dtype
    return 2*torch.rand(n, *flow.shape, generator=gen(seed), dtype=dtype)-1

def shaken(net, size=.02): # away from the initial values, where many parts do nothing
    with torch.no_grad():
        for k,p in enumerate(net.parameters()): p.add_(size*torch.randn(p.shape, generator=gen(k)).to(p))
    return net

def build(name, dtype=torch.float64, **k):
    torch.manual_seed(0)
    flow = SMALL[name](**k).to(dtype).eval()
    return shaken(flow.init(data(flow), gen(1)))

def fixed(flow): return {} if len(flow.shape)==1 else dict(v=.5)

def logdet_by_hand(f, x):
    jac = torch.autograd.functional.jacobian(f, x).reshape(x.numel(), -1)
    return torch.linalg.slogdet(jac)[1]


# --- sizes

def test_parameter_counts():
    with torch.device('meta'): flow = FlowPP()
    assert (count(flow), count(flow.deq), count(flow.body))==(28_784_792, 3_154_088, 25_630_704)
    first,last = flow.body.board[0].move, flow.body.small[0].move
    assert (count(first), count(last), count(flow.deq.steps[0].move))==(2_762_034, 3_019_236, 770_994)
    assert sum(o.numel() for o in flowpp.gains(flow))<.01*count(flow)


# --- check 1: one coupling, and the transform inside it

@pytest.mark.parametrize('dtype,eps,_', DTYPES)
def test_full_size_coupling_inverts(dtype, eps, _):
    torch.manual_seed(0)
    c = flowpp.Coupling(flowpp.ImageNet(3), 3).to(dtype).eval()
    p,q = 10*(2*torch.rand(2, 2, 3, 8, 4, generator=gen(), dtype=dtype)-1)
    with torch.no_grad():
        assert (c.inverse(c(p, q)[0], q)-p).abs().max()<=eps
        assert (c(c.inverse(p, q), q)[0]-p).abs().max()<=eps

def test_coupling_logdet_on_a_small_image():
    torch.manual_seed(0)
    c = flowpp.Coupling(flowpp.ImageNet(3, width=16, blocks=2), 3).eval()
    p,q = torch.randn(2, 1, 3, 4, 4, generator=gen())
    assert abs(c(p, q)[1].item() - logdet_by_hand(lambda o: c(o, q)[0], p).item())<=1e-4

def test_one_component_is_affine():
    torch.manual_seed(0)
    c = flowpp.Coupling(flowpp.ImageNet(2, width=8, blocks=1, n_mix=1, heads=2), 2).double().eval()
    p,q = 5*torch.randn(2, 3, 2, 4, 2, dtype=torch.float64)
    a,b,(_,mu,log_scale) = c.parts(q, None)
    y,logdet = c(p, q)
    assert torch.allclose(y, ((p-mu[...,0])*torch.exp(-log_scale[...,0]) + b)*a.exp(), atol=1e-10)
    assert torch.allclose(logdet, (a-log_scale[...,0]).flatten(1).sum(1), atol=1e-10)

@pytest.mark.parametrize('scale', [-6.9, -3., 0., 2.])
@pytest.mark.parametrize('spread', [.1, 3., 30.])
def test_search_ends_at_the_root(scale, spread):
    "Also where the components are far apart or very narrow, and where x itself cannot be had to full precision."
    shape = 500, 6
    p = [torch.randn(shape, generator=gen(i), dtype=torch.float64) for i in range(3)]
    p = p[0], spread*p[1], scale + .3*p[2]
    v = 30*torch.randn(500, generator=gen(5), dtype=torch.float64)
    x = from_log_odds(v, *p)
    lo,hi = (log_odds(x + s*1e-9*(1+x.abs()), *p)[0] for s in (-1, 1))
    assert x.isfinite().all() and (lo<=v+1e-9).all() and (v<=hi+1e-9).all()

def test_search_is_the_same_in_any_batch():
    p = [torch.randn(50, 6, generator=gen(i)) for i in range(3)]
    v = 10*torch.randn(50, generator=gen(5))
    assert torch.equal(from_log_odds(v, *p)[:7], from_log_odds(v[:7], *(o[:7] for o in p)))

def test_no_clamp():
    "Where a distribution function clamped to 1e-5 stops at log-odds 11.5, ours goes on in single precision."
    p = [torch.randn(9, 6, generator=gen(i)) for i in range(3)]
    v = torch.tensor([-1e4, -80., -30., -12., 0., 12., 30., 80., 1e4])
    assert (log_odds(from_log_odds(v, *p), *p)[0]-v).abs().max()<=1e-6*1e4
    assert (log_odds(from_log_odds(v, *p), *p)[0]-v)[1:-1].abs().max()<=1e-4


# --- check 2: the whole flow

@pytest.mark.parametrize('dtype,_,eps', DTYPES)
def test_full_stack_inverts(dtype, _, eps):
    "All 28,784,792 parameters, an image there and back, and noise back and there."
    torch.manual_seed(0)
    flow = FlowPP().eval()
    flow.init(2*torch.rand(4, 3, 32, 32, generator=gen())-1, gen(1))
    flow,x = flow.to(dtype), 2*torch.rand(1, 3, 32, 32, generator=gen(2)).to(dtype)-1
    with torch.no_grad():
        z,_ = flow.encode(x, v=.5)
        assert (flow.decode(z)-x).abs().max()<=eps
        assert (flow.encode(flow.decode(z), v=.5)[0]-z).abs().max()<=eps
        z = torch.randn(1, 3, 32, 32, generator=gen(3)).to(dtype)
        assert (flow.body(flow.body.inverse(z))[0]-z).abs().max()<=eps

@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('dtype,_,eps', DTYPES)
def test_round_trips(name, dtype, _, eps):
    flow = build(name, dtype)
    x,k = data(flow, 8, 2), fixed(flow)
    with torch.no_grad():
        z,_ = flow.encode(x, **k)
        assert (flow.decode(z)-x).abs().max()<=eps
        assert (flow.encode(flow.decode(z), **k)[0]-z).abs().max()<=eps

@pytest.mark.parametrize('name', SMALL)
def test_logdet(name):
    flow = build(name)
    x,k = data(flow, 2, 2), fixed(flow)
    logdet = flow.encode(x, **k)[1]
    for i in range(2): assert abs(logdet_by_hand(lambda o: flow.encode(o, **k)[0], x[i:i+1])-logdet[i])<=1e-6

@pytest.mark.parametrize('exact,slope', [(True, 1.), (False, .8965)])
def test_slope_of_the_way_back(exact, slope):
    flow = build('flowpp', exact=exact)
    x = data(flow, 32, 2)
    with torch.no_grad():
        for y in (flow.decode(flow.encode(x, generator=gen())[0]), flow.decode(flow.encode(x, v=.5)[0])):
            assert abs((x*y).sum()/x.square().sum()-slope)<=1e-3
            assert (y-slope*x).abs().max()<=.9/255+1e-3

def test_pixels_logdet():
    "Softplus form of the sheet: softplus(h) + softplus(-h) + log 0.9 for each dimension, in units of u; du/dx is 255/512."
    flow = build('flowpp')
    x = data(flow, 4, 2)
    y = .9*255/256*x
    h = torch.logit((y+1)/2)
    sp = torch.nn.functional.softplus
    whole,inner = flow.encode(x, v=.5)[1], flow.body(h)[1]
    assert torch.allclose(whole-inner, (sp(h)+sp(-h)+math.log(.9*255/512)).flatten(1).sum(1), atol=1e-9)

@pytest.mark.parametrize('name', ['flowpp', 'flowpp-uniform', 'glow'])
def test_log_prob_is_that_of_levels(name):
    "The bound adds the cell: width 2/255 in each of 48 dimensions; uniform noise adds nothing else."
    flow = build(name)
    x = data(flow, 4, 2)
    z,logdet = flow.encode(x, generator=gen(7))
    normal = -(z.square()+math.log(2*math.pi)).flatten(1).sum(1)/2
    got = flow.log_prob(x, gen(7)) - normal - logdet - 48*math.log(2/255)
    if name=='flowpp': got = got + flow.noise(x, gen(7))[1]
    assert torch.allclose(got, torch.zeros(4, dtype=got.dtype), atol=1e-8)

def test_density_of_the_noise():
    "log r(v|x) is that of normal noise, less the log-determinant of the map that made v."
    flow = build('flowpp')
    x,eps = data(flow, 1, 2), torch.randn(1, 3, 4, 4, generator=gen(), dtype=torch.float64)
    want = -(eps.square()+math.log(2*math.pi)).sum()/2 - logdet_by_hand(lambda o: flow.deq(x, o)[0], eps)
    assert abs(flow.deq(x, eps)[1].item()-want)<=1e-8

def test_dequantiser_without_couplings():
    "Check 2: with the couplings switched off, the noise is a logistic-normal inside (0, 1) and the bound is finite."
    torch.manual_seed(0)
    flow = FlowPP((3, 4, 4), steps=(1, 1, 1), deq=(2, 1, 4), blocks=1, width=8, n_mix=1, heads=2).double().eval()
    with torch.no_grad():
        for s in flow.deq.steps:
            for p in s.move.net.leave.parameters(): p.zero_()
            s.move.net.leave.parametrizations.weight.original1.fill_(1)  # a direction of length zero has no norm
            s.mix.weight.copy_(torch.eye(6))
        x = data(flow, 400)
        v,log_r = flow.noise(x, gen())
    assert ((v>0) & (v<1)).all()
    assert abs(v.mean()-.5)<.01 and abs(torch.logit(v).std()-1)<.02
    l = torch.logit(v)
    exact = -(l.square()+math.log(2*math.pi)).flatten(1).sum(1)/2 - (v*(1-v)).log().flatten(1).sum(1)
    assert torch.allclose(log_r, exact, atol=1e-8)
    assert flow.log_prob(x, gen()).isfinite().all()


# --- check 6 and the conduct of all flows

@pytest.mark.parametrize('name', SMALL)
def test_init_sets_every_norm_once(name):
    torch.manual_seed(0)
    flow = SMALL[name]().double()
    seen = {}
    norms = [m for m in flow.modules() if hasattr(m, 'watching')]
    def look(m, args, out): seen.setdefault(m, out[0])
    hooks = [m.register_forward_hook(look) for m in norms]
    flow.train().init(data(flow), gen(1))
    assert flow.training and len(seen)==len(norms)>2 and all(m.ready and not m.watching for m in norms)
    for y in seen.values():
        std,mean = torch.std_mean(y, (0, 2, 3), correction=0)
        # a ReLU or a constant channel has no spread to set
        assert mean.abs().max()<1e-8 and ((std-1).abs().amax()<1e-5 or std.amin()<1e-5)
    for h in hooks: h.remove()
    before = copy.deepcopy(flow.state_dict())
    flow.init(3*data(flow, seed=5)/4, gen(2))
    assert all(torch.equal(before[k], o) for k,o in flow.state_dict().items())

@pytest.mark.parametrize('name', SMALL)
def test_gradients(name):
    "Finite for every parameter, through the density and through samples; through samples equal to finite differences."
    flow = build(name)
    flow.log_prob(data(flow, 8, 2), gen()).mean().neg().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    flow.zero_grad()
    z = torch.randn(2, *flow.shape, generator=gen(4), dtype=torch.float64, requires_grad=True)
    flow.decode(z).square().sum().backward()
    used = [p for k,p in flow.named_parameters() if not k.startswith('deq.')]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
    p = max(used, key=lambda p: p.grad.abs().max())
    for o in (z, p):
        i,step = o.grad.abs().argmax(), 1e-6
        with torch.no_grad():
            o.view(-1)[i] += step; up = flow.decode(z).square().sum()
            o.view(-1)[i] -= 2*step; down = flow.decode(z).square().sum()
            o.view(-1)[i] += step
        want = o.grad.flatten()[i]
        assert abs((up-down)/(2*step)-want)<=1e-4*(1+want.abs())

@pytest.mark.parametrize('name', SMALL)
def test_sampling(name):
    flow = build(name, torch.float32)
    a,b,c = (flow.sample(4, generator=gen(s)) for s in (0, 0, 1))
    assert a.shape==(4, *flow.shape) and a.isfinite().all() and torch.equal(a, b) and not torch.equal(a, c)
    assert not flow.sample(1, generator=gen()).requires_grad
    still = flow.sample(3, temp=0., generator=gen())
    assert torch.allclose(still[0], still[2], atol=1e-5)
    halves = [flow.sample(2, generator=Slice(gen(0), i, 2)) for i in range(2)]
    assert torch.allclose(torch.cat(halves), a, atol=1e-4)

@pytest.mark.parametrize('name', ['flowpp', 'glow'])
def test_saving_memory_changes_nothing(name):
    a,b = build(name), build(name, save=True)
    for f in (a, b): f.log_prob(data(f, 4, 2), gen()).mean().backward()
    for p,q in zip(a.parameters(), b.parameters()): assert torch.allclose(p.grad, q.grad, atol=1e-10)

def test_dropout_only_in_training():
    flow = build('flowpp')
    x = data(flow, 4)
    assert torch.equal(flow.encode(x, v=.5)[0], flow.encode(x, v=.5)[0])
    assert not torch.equal(flow.encode(x)[0], flow.encode(x)[0])          # the noise within a level
    flow.train()
    assert not torch.equal(flow.encode(x, v=.5)[0], flow.encode(x, v=.5)[0])

@pytest.mark.parametrize('name', SMALL)
def test_states_come_back(name, tmp_path):
    from safetensors.torch import load_file, save_file
    flow = build(name)
    save_file(flow.state_dict(), tmp_path/'flow.safetensors')
    other = SMALL[name]().double().eval()
    other.load_state_dict(load_file(tmp_path/'flow.safetensors'))
    z = torch.randn(2, *flow.shape, generator=gen(), dtype=torch.float64)
    assert torch.equal(flow.decode(z), other.decode(z))
    assert torch.equal(flow.decode(z), copy.deepcopy(flow).decode(z))
    before = other.decode(z)
    other.init(data(other, seed=9), gen())                                # a loaded flow is ready
    assert torch.equal(before, other.decode(z))

def test_weights_are_computed_once_when_frozen():
    flow = build('flowpp')
    with frozen(flow):
        layer = flow.body.board[0].move.net.enter
        assert layer.weight is layer.weight and not flow.sample(1, generator=gen()).requires_grad
    assert parametrize.is_parametrized(layer) and layer.weight is not layer.weight

@pytest.mark.parametrize('name', SMALL)
def test_refusals(name):
    flow = build(name, torch.float32)
    with pytest.raises(ValueError, match='expected a batch'): flow.log_prob(torch.zeros(2, 5))
    with pytest.raises(ValueError, match='expected a batch'): flow.decode(torch.zeros(flow.shape))
    with pytest.raises(TypeError, match='float32, got torch.float64'): flow.log_prob(torch.zeros(2, *flow.shape, dtype=torch.float64))
    if isinstance(flow, FlowPP):
        with pytest.raises(ValueError, match='pixels must lie in'): flow.log_prob(torch.full((1, 3, 4, 4), 1.2))
    for bad in (lambda: PointFlowPP(3), lambda: PointGlow(5), lambda: FlowPP((3, 5, 4)), lambda: Glow((3, 36, 36)), lambda: flowpp.GatedAttention(9, 3)):
        with pytest.raises(ValueError): bad()

@pytest.mark.parametrize('points', [PointFlowPP, PointGlow])
def test_points_are_a_density(points):
    "The density of a fitted flow integrates to one, and the mean of its logarithm over its own samples is that of the grid."
    torch.manual_seed(0)
    x,_ = draw_points('spiral', 1000, gen())
    flow = points(2, 32, 4).double().init(x.double())
    c = torch.linspace(-15, 15, 301, dtype=torch.float64)
    lp = flow.log_prob(torch.cartesian_prod(c, c)).detach()
    w = lp.exp()*(c[1]-c[0])**2
    assert abs(w.sum()-1)<=.01
    own = flow.log_prob(flow.sample(20_000, generator=gen())).detach()
    assert abs(own.mean()-(w*lp).sum())<=5*own.std()/len(own)**.5 + .02

def test_released_glow_would_overflow():
    "Why the slopes are bounded: far outside the data our inverse stays finite, and each line stretches by e^2 at most."
    flow = shaken(build('points-glow', torch.float32), .3)
    x = flow.decode(50*torch.randn(100, 4, generator=gen()))
    assert x.isfinite().all()
    for m in flow.modules():
        if isinstance(m, glow.Step):
            a = m.line(1000*torch.randn(50, 2, 1, 1, generator=gen()))[1]
            assert a.abs().max()<=2

def test_both_import_without_the_tools_of_authors():
    code = 'import sys, ebmbook.core.flowpp, ebmbook.core.glow; bad = {"fastcore", "nbdev", "matplotlib", "papermill"} & sys.modules.keys(); assert not bad, bad'
    subprocess.run([sys.executable, '-c', code], check=True)
