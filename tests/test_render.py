"""The numba rasterizer against the dense float64 oracle, the oracle against finite differences, and
the call to gsplat against its signature."""

import inspect
import math

import pytest
import torch

from spatialavatar0.ground.core import InputError
from spatialavatar0.splats import renderers as render
from spatialavatar0.splats.projection import covs_to_conics, project_gaussians
from spatialavatar0.splats.renderers import rasterize

W, H = 61, 45
NAMES = ('means', 'quats', 'scales', 'opacities', 'colors', 'backgrounds')


def cameras(n, g):
    "Cameras 4 m away that look at the origin from slightly different sides."
    views = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    views[:, 2, 3] = 4
    views[:, 0, 3] = torch.rand(n, generator=g) - 0.5
    for v in views:
        a = float(torch.rand((), generator=g)) - 0.5
        v[:3, :3] = torch.tensor(
            [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]],
            dtype=torch.float64,
        )
    return views, torch.tensor(
        [[70.0, 0, W / 2 + 1.5], [0, 75.0, H / 2 - 2], [0, 0, 1]], dtype=torch.float64
    ).repeat(n, 1, 1)


def scene(kind, seed, N=150, C=1, D=3):
    "A fresh random scene, float64 on the float32 grid, so that both backends see the same numbers."
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.randn(*s, generator=g, dtype=torch.float64)

    means = r(N, 3) * torch.tensor([1.0, 0.8, 0.6])
    quats = r(N, 4) * 2
    log_scales = r(N, 3) * 0.5 - 2
    opacities = torch.rand(N, generator=g, dtype=torch.float64) * 0.95 + 0.05
    if kind == 'behind':
        means[:, 2] -= 3.5
    if kind == 'near':
        means[:, 2] -= 3.0
    if kind == 'huge':
        log_scales[::10] += 3
    if kind == 'needle':
        log_scales += torch.tensor([2.0, -2, -2]).double() * (torch.rand(N, 1, generator=g) < 0.5)
    if kind == 'transparent':
        opacities = opacities * 0.02
    if kind == 'opaque':
        opacities = 0.97 + 0.03 * opacities
        log_scales += 0.7
    if kind == 'offscreen':
        means[:, 0] += 2.0
    if kind == 'gone':
        means[:, 0] += 100.0
    views, Ks = cameras(C, g)
    x = [
        means,
        quats,
        log_scales.exp(),
        opacities,
        torch.rand(N, D, generator=g, dtype=torch.float64),
        torch.rand(C, D, generator=g, dtype=torch.float64),
    ]
    return [t.float().double() for t in x], views.float().double(), Ks


def run(inputs, views, Ks, backend, dtype, mode='RGB+D', seed=0, skip=None, **kw):
    "Pictures, and gradients of a random weighting of them; pixels in skip weigh nothing."
    x = [t.to(dtype).clone().requires_grad_() for t in inputs]
    colors, alphas, meta = rasterize(
        *x[:5],
        views.to(dtype),
        Ks.to(dtype),
        W,
        H,
        backgrounds=x[5],
        render_mode=mode,
        backend=backend,
        **kw,
    )
    g = torch.Generator().manual_seed(seed)
    wc, wa = [
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in (colors, alphas)
    ]
    if skip is not None:
        wc, wa = wc * ~skip, wa * ~skip
    ((colors * wc).sum() + (alphas * wa).sum()).backward()
    return (
        colors.detach().double(),
        alphas.detach().double(),
        meta,
        [(torch.zeros_like(t) if t.grad is None else t.grad).double() for t in x],
    )


RUNGS = ('cpu', 'per_pixel', 'torch')


def compare(*s, grad_tol=1e-4, rung='cpu', **kw):
    """A rung in float32 (PyTorch in float64) against dense in float64. Where a splat fell on the other side of the 1/255 cut the two pictures may
    differ by up to 5e-3 in a few pixels, and their gradients are of different pictures: such pixels do not count for gradients."""
    dtype = torch.float64 if rung == 'torch' else torch.float32
    dense = run(*s, 'dense', torch.float64, **kw)
    cpu = run(*s, rung, dtype, **kw)
    flipped = False
    for a, b in zip(cpu[:2], dense[:2]):
        assert a.shape == b.shape
        err = (a - b).abs().amax(-1, keepdim=True) / b.abs().amax().clamp(min=1)
        assert (err > 1e-4).double().mean() <= 1e-3
        assert err.max() <= 5e-3
        flipped = flipped | (err > 2e-5)
    assert flipped.double().mean() <= 2e-3
    if flipped.any():
        dense = run(*s, 'dense', torch.float64, skip=flipped, **kw)
        cpu = run(*s, rung, dtype, skip=flipped, **kw)
    for name, a, b in zip(NAMES, cpu[3], dense[3]):
        assert (a - b).norm() <= grad_tol * b.norm() + 1e-8, (
            f'{name}: {(a - b).norm() / b.norm():.1e}'
        )
    return cpu


KINDS = ('plain', 'behind', 'near', 'huge', 'needle', 'transparent', 'opaque', 'offscreen', 'gone')


@pytest.mark.parametrize('seed', (0, 1))
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rung', RUNGS)
def test_rung_is_dense(rung, kind, seed):
    s = scene(kind, seed)
    compare(*s, seed=seed, rung=rung)


@pytest.mark.parametrize('mode', ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED'))
@pytest.mark.parametrize('D', (1, 3, 9))
@pytest.mark.parametrize('rung', RUNGS)
def test_modes_channels_cameras(rung, mode, D):
    s = scene('plain', 5, C=2, D=D)
    cpu = compare(*s, mode=mode, rung=rung)
    assert cpu[0].shape == (2, H, W, (D if 'RGB' in mode else 0) + ('D' in mode))


def test_colors_per_camera_and_limits():
    (m, q, s, o, c, b), views, Ks = scene('plain', 6, C=2)
    x = [m, q, s, o, torch.stack([c, c.flip(0)]), b]
    kw = dict(near_plane=3.5, far_plane=4.4, eps2d=0.1, max_alpha=0.9)
    compare(x, views, Ks, **kw)


def test_meta_agrees():
    s = scene('near', 7)
    a, b = [run(*s, k, d)[2] for k, d in (('cpu', torch.float32), ('dense', torch.float64))]
    drawn = (a['radii'] > 0).all(-1)
    assert (drawn == (b['radii'] > 0).all(-1)).double().mean() > 0.98
    for k in ('means2d', 'depths', 'conics'):
        x, y = a[k][drawn].double(), b[k][drawn].detach()
        assert ((x - y).abs() <= 1e-3 + 1e-4 * y.abs()).all(), k


@pytest.mark.parametrize('rung', (*RUNGS, 'dense'))
def test_means2d_is_in_the_way_of_the_gradient(rung):
    "meta['means2d'] gets a .grad and an .absgrad: the oracle takes every pixel's pull one by one."
    (m, q, s, o, c, b), views, Ks = scene('plain', 11, N=40, C=2)
    w = torch.randn(2, H, W, 4, generator=torch.Generator().manual_seed(1)).double()

    def pulls(rung, dtype):
        colors, _, meta = rasterize(
            *[x.to(dtype).requires_grad_() for x in (m, q, s, o, c)],
            views.to(dtype),
            Ks.to(dtype),
            W,
            H,
            render_mode='RGB+D',
            backend=rung,
            absgrad=True,
        )
        meta['means2d'].retain_grad()
        (colors * w.to(dtype)).sum().backward()
        return meta['means2d'].grad.double(), meta['means2d'].absgrad.double()

    def one_pixel_at_a_time():
        colors, _, meta = rasterize(
            *[x.clone().requires_grad_() for x in (m, q, s, o, c)],
            views,
            Ks,
            W,
            H,
            render_mode='RGB+D',
            backend='dense',
        )
        pull = 0
        for y in range(0, H, 4):
            for x in range(0, W, 4):
                pull = (
                    pull
                    + torch.autograd.grad(
                        (colors * w)[:, y, x].sum(), meta['means2d'], retain_graph=True
                    )[0].abs()
                )
        return pull

    grad, absgrad = pulls(rung, torch.float64 if rung in ('torch', 'dense') else torch.float32)
    if rung == 'dense':
        w = w * ((torch.arange(H) % 4 == 0)[:, None, None] & (torch.arange(W) % 4 == 0)[:, None])
        assert torch.allclose(pulls('dense', torch.float64)[1], one_pixel_at_a_time())
        return
    for a, b in zip((grad, absgrad), pulls('dense', torch.float64)):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert (absgrad >= grad.abs() * (1 - 1e-4) - 1e-6).all()


def test_nobody_asks_for_gradients():
    (m, q, s, o, c, b), views, Ks = scene('plain', 12)
    with torch.no_grad():
        free = rasterize(m, q, s, o, c, views, Ks, W, H)
    colors, _, meta = rasterize(m, q, s, o.clone().requires_grad_(), c, views, Ks, W, H)
    colors.sum().backward()
    assert torch.equal(free[0], colors)
    assert not meta['means2d'].requires_grad


@pytest.mark.parametrize('backend', ('dense', 'cpu', 'torch', 'per_pixel'))
def test_empty_scene_shows_the_background(backend):
    e = torch.zeros
    x = [e(0, 3), e(0, 4), e(0, 3), e(0), e(0, 3)]
    c, a, _ = rasterize(
        *x,
        torch.eye(4)[None],
        torch.eye(3)[None],
        9,
        7,
        backgrounds=torch.tensor([[0.1, 0.2, 0.3]]),
        backend=backend,
    )
    assert torch.allclose(c, torch.tensor([0.1, 0.2, 0.3]).expand(1, 7, 9, 3))
    assert (a == 0).all()


def test_projection_is_gsplats():
    twin = pytest.importorskip('gsplat.cuda._torch_impl')
    (m, q, s, *_), views, Ks = scene('plain', 9)
    covs, _ = twin._quat_scale_to_covar_preci(q, s, True, False)
    _, m2, d, conics, _ = twin._fully_fused_projection(m, covs, views, Ks, W, H)
    ours = project_gaussians(m, q, s, views[0], Ks[0], W, H)
    assert torch.allclose(ours[0], m2[0])
    assert torch.allclose(ours[1], d[0])
    assert torch.allclose(covs_to_conics(ours[2]), conics[0])


def test_finite_differences():
    g = torch.Generator().manual_seed(3)
    N = 5
    x = [
        torch.randn(N, 3, generator=g) * 0.3,
        torch.randn(N, 4, generator=g),
        torch.rand(N, 3, generator=g) * 0.2 + 0.2,
        torch.rand(N, generator=g) * 0.5 + 0.3,
        torch.rand(N, 2, generator=g),
        torch.rand(1, 2, generator=g),
    ]
    x = [t.double().requires_grad_() for t in x]
    views = torch.eye(4, dtype=torch.float64)[None].clone()
    views[0, 2, 3] = 3
    Ks = torch.tensor([[[12.0, 0, 6], [0, 12, 5], [0, 0, 1]]], dtype=torch.float64)

    def f(*x):
        return torch.cat(
            rasterize(
                *x[:5], views, Ks, 12, 10, backgrounds=x[5], render_mode='RGB+ED', backend='dense'
            )[:2],
            -1,
        )

    assert torch.autograd.gradcheck(f, x, eps=1e-6, atol=1e-5)


def test_gsplat_accepts_our_call(monkeypatch):
    gsplat = pytest.importorskip('gsplat')
    called = {}

    def fake(*a, **k):
        called.update(inspect.signature(real).bind(*a, **k).arguments)
        return 'colors', 'alphas', {}

    real = gsplat.rasterization
    monkeypatch.setattr(gsplat, 'rasterization', fake)
    monkeypatch.setattr(render, '_need_cuda', lambda means: None)
    (m, q, s, o, c, b), views, Ks = scene('plain', 0)
    assert (
        rasterize(
            m, q, s, o, c, views, Ks, W, H, backgrounds=b, render_mode='RGB+ED', backend='gsplat'
        )[0]
        == 'colors'
    )
    assert called['packed'] is False
    assert called['render_mode'] == 'RGB+ED'
    assert called['width'] == W
    assert called['backgrounds'] is b


def test_gsplat_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    (m, q, s, o, c, b), views, Ks = scene('plain', 0)
    with pytest.raises(InputError, match='use backend="cpu"'):
        rasterize(m, q, s, o, c, views, Ks, W, H, backend='gsplat')


BAD = dict(
    means=(0, lambda t: t[:, :2]),
    quats=(1, lambda t: t[:-1]),
    scales=(2, lambda t: t.log()),
    opacities=(3, lambda t: t * 3 - 1),
    colors=(4, lambda t: t[:3]),
    viewmats=(5, lambda t: t[0]),
    Ks=(6, lambda t: t * float('nan')),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(name):
    (m, q, s, o, c, b), views, Ks = scene('plain', 0)
    args = [m, q, s, o, c, views, Ks]
    i, spoil = BAD[name]
    args[i] = spoil(args[i])
    with pytest.raises(InputError, match=name):
        rasterize(*args, W, H)
    args = [m, q, s, o, c, views, Ks]
    args[i] = args[i].clone()
    args[i].view(-1)[1] = float('inf')
    with pytest.raises(InputError, match=name + '.*finite'):
        rasterize(*args, W, H)


@pytest.mark.parametrize(
    'kw',
    (
        dict(render_mode='rgb'),
        dict(backend='metal'),
        dict(backgrounds=torch.zeros(3)),
        dict(near_plane=0.0),
    ),
)
def test_bad_options(kw):
    (m, q, s, o, c, b), views, Ks = scene('plain', 0)
    with pytest.raises(InputError, match=next(iter(kw))):
        rasterize(m, q, s, o, c, views, Ks, W, H, **kw)


def test_threads_agree():
    import numba

    s = scene('plain', 8)
    n = numba.get_num_threads()
    if n < 2:
        pytest.skip('one core')
    two = run(*s, 'cpu', torch.float32)
    try:
        numba.set_num_threads(1)
        one = run(*s, 'cpu', torch.float32)
    finally:
        numba.set_num_threads(n)
    assert torch.equal(one[0], two[0])
    for a, b in zip(one[3], two[3]):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12
