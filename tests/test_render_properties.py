"""What must hold for every scene, whoever invented it: hypothesis tries tiny, huge, near, far, flat, faint and opaque Gaussians, odd
pictures and odd cameras. The run is the same every time; PROPERTY_EXAMPLES=2000 tries that many new ones."""

import functools
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scenes import Scene

from spatialavatar0.ground.core import InputError
from spatialavatar0.splats import renderers as render
from spatialavatar0.splats.projection import covs_to_conics, project_gaussians
from spatialavatar0.splats.renderers import rasterize

RUNGS = list(render._BACKENDS)
MODES = ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED')
asked = int(os.environ.get('PROPERTY_EXAMPLES', 0))
settings.register_profile(
    'steady',
    derandomize=not asked,
    database=None,
    deadline=None,
    max_examples=asked or 50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile('steady')
rungs = pytest.mark.parametrize('backend', RUNGS)

# --- scenes


def turned(g, amount):
    "A random rotation: the identity for amount 0, any for 1."
    q, r = torch.linalg.qr(torch.eye(3) + amount * torch.randn(3, 3, generator=g))
    q = q * r.diagonal().sign()
    return q * q.det()


def build(
    seed,
    N,
    C,
    D,
    width,
    height,
    log_size,
    spread,
    distance,
    opacity,
    quat_length,
    focal,
    centre,
    turn,
):
    "A scene from a few numbers."
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.randn(*s, generator=g)

    def u(*s):
        return torch.rand(*s, generator=g)

    lo, hi = log_size
    V = torch.eye(4).repeat(C, 1, 1)
    K = torch.eye(3).repeat(C, 1, 1)
    for v in V:
        v[:3, :3] = turned(g, turn)
        v[2, 3] = distance
    K[:, 0, 0] = focal[0] * max(width, height)
    K[:, 1, 1] = focal[1] * max(width, height)
    K[:, 0, 2] = centre[0] * width
    K[:, 1, 2] = centre[1] * height
    opacities = u(N) * (opacity[1] - opacity[0]) + opacity[0]
    opacities[::7] = opacity[1]
    opacities[3::7] = opacity[0]  # exactly 0 and exactly 1 where the range ends there
    return Scene(
        spread * r(N, 3),
        quat_length * r(N, 4),
        10 ** (lo + (hi - lo) * u(N, 3)),
        opacities,
        u(N, D),
        u(C, D),
        V,
        K,
        width,
        height,
    )


def numbers(lo, hi):
    return st.floats(lo, hi, allow_subnormal=False)


def pairs(lo, hi):
    return st.tuples(numbers(lo, hi), numbers(lo, hi)).map(sorted)


def scenes(sizes=(-3, 1), spreads=(0.1, 3), distances=(2, 6), most=60, channels=9, cameras=2):
    "Ordinary scenes by default; wider ranges make them extreme."
    return st.builds(
        build,
        seed=st.integers(0, 10**6),
        N=st.integers(0, most),
        C=st.integers(1, cameras),
        D=st.integers(1, channels),
        width=st.integers(1, 40),
        height=st.integers(1, 40),
        log_size=pairs(*sizes),
        spread=numbers(*spreads),
        distance=numbers(*distances),
        opacity=pairs(0, 1),
        quat_length=numbers(0.01, 100),
        focal=st.tuples(numbers(0.3, 4), numbers(0.3, 4)),
        centre=st.tuples(numbers(-0.5, 1.5), numbers(-0.5, 1.5)),
        turn=numbers(0, 1),
    )


modes = st.sampled_from(MODES)
limits = st.sampled_from([0.999, 0.99, 0.5, 0.9999])


def own(backend):
    """The float type a rung works in: the oracle and the PyTorch rung take float64, the kernels are
    float32."""
    return torch.float64 if backend in ('dense', 'torch') else torch.float32


def draw_it(s, backend, **kw):
    kw = dict(backgrounds=s.backgrounds) | kw
    return rasterize(
        s.means,
        s.quats,
        s.scales,
        s.opacities,
        s.colors,
        s.viewmats,
        s.Ks,
        s.width,
        s.height,
        backend=backend,
        **kw,
    )


def gradients(s, backend, keep=1.0, shake=0.0, **kw):
    """Pictures, and gradients of a random weighting of them; pixels outside keep weigh nothing.
    `shake` moves every weight by so much of itself."""
    x = s.tensors()
    g = torch.Generator().manual_seed(0)
    for t in x.values():
        t.requires_grad_()
        t.grad = None
    c, a, _ = draw_it(s, backend, **kw)
    w = [torch.randn(t.shape, generator=g).to(t) * keep for t in (c, a)]
    w = [t * (1 + shake * torch.randn(t.shape, generator=g)) for t in w]
    got = torch.autograd.grad(
        (c * w[0]).sum() + (a * w[1]).sum(), list(x.values()), allow_unused=True
    )
    return (
        c.detach(),
        a.detach(),
        {k: torch.zeros_like(t) if d is None else d for (k, t), d in zip(x.items(), got)},
    )


# --- agreement with the oracle


def coverage(s, V, K):
    "Of every splat in front of the camera, near to far, its alpha (n,H,W) before cut and clamp."
    z = s.means @ V[2, :3] + V[2, 3]
    seen = (z >= 0.01).nonzero()[:, 0]
    order = seen[z[seen].argsort(stable=True)]
    m, _, cov = project_gaussians(
        s.means[order], s.quats[order], s.scales[order], V, K, s.width, s.height
    )
    y, x = torch.meshgrid(torch.arange(s.height) + 0.5, torch.arange(s.width) + 0.5, indexing='ij')
    A, B, C = covs_to_conics(cov).T[..., None, None]
    dx = x - m[:, 0, None, None]
    dy = y - m[:, 1, None, None]
    return order, s.opacities[order, None, None] * torch.exp(
        -0.5 * (A * dx * dx + C * dy * dy) - B * dx * dy
    )


def decisions(s, V, K, max_alpha):
    """Everything that is compared with a limit: 255 alpha, alpha / max_alpha, and 10,000 times the
    light left over; (3,n,H,W) and the order."""
    order, full = coverage(s, V, K)
    alphas = torch.where(full >= 1 / 255, full.clamp(max=max_alpha), 0.0)
    return order, torch.stack([full * 255, full / max_alpha, (1 - alphas).cumprod(0) * 1e4])


def rounded(s, seed, amount=2e-7):
    "The scene with an error of about float32's rounding in every number."
    g = torch.Generator().manual_seed(seed)

    def shake(t, size=None):
        return t + amount * torch.randn(t.shape, generator=g).to(t) * (
            t.abs() if size is None else size
        )

    far = (
        s.means.abs().amax(1, keepdim=True) + s.viewmats[0, 2, 3].abs()
    )  # a sum is rounded to the digits of its largest term
    return replace(
        s,
        means=shake(s.means, far),
        quats=shake(s.quats),
        scales=shake(s.scales),
        opacities=s.opacities - amount * s.opacities,
        Ks=shake(s.Ks),
    )


@torch.no_grad()
def undecided(s, max_alpha, others):
    """(C,H,W) pixels in which rounding could turn a decision: a limit lies within ten times the
    change that rounding makes."""
    out = []
    for c, (V, K) in enumerate(zip(s.viewmats, s.Ks)):
        order, x = decisions(s, V, K, max_alpha)
        change = torch.full_like(x, 1e-6) * x
        for o in others:
            other, y = decisions(o, V, o.Ks[c], max_alpha)
            if not torch.equal(other, order):
                return torch.ones(len(s.Ks), s.height, s.width, dtype=torch.bool)
            change = torch.maximum(change, (y - x).abs())
        out.append(((x - 1).abs() <= 10 * change).any(0).any(0))
    return torch.stack(out)


@rungs
@given(s=scenes(), mode=st.sampled_from(('RGB', 'D', 'RGB+D')), max_alpha=limits)
def test_agrees_with_the_oracle(backend, s, mode, max_alpha):
    """Pictures and gradients, to 1e-5 plus ten times what float32's rounding of the scene's numbers (also of max_alpha, and of each pixel's
    share of a gradient, where these cancel) does to the float64 oracle."""
    kw = dict(render_mode=mode, max_alpha=max_alpha)
    s64 = s.to(torch.float64)
    others = [rounded(s64, k) for k in (1, 2, 3)]
    keep = ~undecided(s64, max_alpha, others)[..., None]
    c, a, g = gradients(s64, 'dense', keep, **kw)
    nearby = [
        gradients(o, 'dense', keep, shake=2e-7, render_mode=mode, max_alpha=max_alpha * (1 + d))
        for o, d in zip(others, (0, 1e-7, -1e-7))
    ]
    C, A, G = gradients(s.to(own(backend)), backend, keep, **kw)
    for x, y, near in ((C, c, [n[0] for n in nearby]), (A, a, [n[1] for n in nearby])):
        assert x.shape == y.shape and x.dtype == own(backend)
        slack = torch.stack([(n - y).abs() for n in near]).amax(0) if near else 0.0
        assert (((x - y).abs() <= 1e-5 * y.abs().clamp(min=1) + 10 * slack) | ~keep).all()
    for k in g:
        slack = max((n[2][k] - g[k]).norm() for n in nearby)
        assert (G[k] - g[k]).norm() <= 1e-5 * g[k].norm() + 10 * slack + 1e-6, k


# --- extremes

large = functools.partial(
    build,
    seed=0,
    C=1,
    D=1,
    width=1,
    height=1,
    spread=1.0,
    distance=0.0,
    opacity=[0.0, 1.0],
    quat_length=1.0,
    centre=(0.0, 0.0),
    turn=0.0,
)


@rungs
@example(
    s=large(N=49, log_size=[-3.0, 3.0], focal=(1.0, 1.0)), mode='RGB', max_alpha=0.999
)  # sigma rounded below zero, exp(-sigma) overflowed
@example(
    s=large(N=45, log_size=[-1.0, 4.0], focal=(3.0, 1.0)), mode='RGB', max_alpha=0.999
)  # the determinant of a covariance rounded to zero
@given(
    s=scenes(sizes=(-8, 4), spreads=(1e-6, 1e4), distances=(-1, 1e3)), mode=modes, max_alpha=limits
)
def test_extreme_scenes_stay_finite(backend, s, mode, max_alpha):
    """Sizes from 1e-8 to 1e4 m, centres up to tens of kilometres away, cameras inside the cloud:
    finite pictures, coverage in 0..1, finite gradients."""
    c, a, g = gradients(s, backend, render_mode=mode, max_alpha=max_alpha)
    assert c.isfinite().all()
    assert a.isfinite().all()
    assert (a >= -1e-6).all()
    assert (a <= 1).all()
    for k, x in g.items():
        assert x.isfinite().all(), k


# --- laws


def same(a, b, eps=1e-5):
    "Equal to float32 rounding (float64 rungs: far closer), relative to the largest number."
    return a.shape == b.shape and (
        not a.numel() or bool(((a - b).abs() <= eps * b.abs().max().clamp(min=1)).all())
    )


@rungs
@given(s=scenes(), mode=modes)
def test_expected_depth_is_depth_over_coverage(backend, s, mode):
    depth, alpha, _ = draw_it(s, backend, render_mode='D')
    expected, _, _ = draw_it(s, backend, render_mode='ED')
    assert torch.allclose(expected, depth / alpha.clamp(min=1e-10), rtol=1e-6)
    both, again, _ = draw_it(s, backend, render_mode=mode)
    rgb, _, _ = draw_it(s, backend)
    parts = ([rgb] if 'RGB' in mode else []) + (
        [expected] if 'ED' in mode else [depth] if 'D' in mode.split('+') else []
    )
    assert same(both, torch.cat(parts, -1))
    assert same(again, alpha)


@rungs
@given(s=scenes(), mode=modes, seed=st.integers(0, 10**6))
def test_order_does_not_matter(backend, s, mode, seed):
    "Shuffled Gaussians give the same picture, and every gradient follows its Gaussian."
    for V in s.viewmats:
        assume(len((s.means @ V[2, :3]).unique()) == len(s.means))
    p = torch.randperm(len(s.means), generator=torch.Generator().manual_seed(seed))
    t = replace(
        s,
        **{
            k: getattr(s, k).detach()[p]
            for k in ('means', 'quats', 'scales', 'opacities', 'colors')
        },
    )
    c, a, g = gradients(s, backend, render_mode=mode)
    C, A, G = gradients(t, backend, render_mode=mode)
    assert same(C, c) and same(A, a)
    for k in g:
        assert same(G[k], g[k] if k == 'backgrounds' else g[k][p]), k


@rungs
@given(s=scenes(), mode=st.sampled_from(('RGB', 'RGB+D', 'RGB+ED')), share=numbers(0, 1))
def test_channels_do_not_know_of_each_other(backend, s, mode, share):
    D = s.colors.shape[1]
    k = round(share * D)
    assume(0 < k < D)
    whole, alpha, _ = draw_it(s, backend, render_mode=mode)
    first, a, _ = draw_it(
        replace(s, colors=s.colors[:, :k], backgrounds=s.backgrounds[:, :k]), backend
    )
    rest, _, _ = draw_it(
        replace(s, colors=s.colors[:, k:], backgrounds=s.backgrounds[:, k:]),
        backend,
        render_mode=mode,
    )
    assert same(torch.cat([first, rest], -1), whole)
    assert same(a, alpha)


@rungs
@given(s=scenes(), mode=modes)
def test_background_shines_through_what_is_left(backend, s, mode):
    picture, alpha, _ = draw_it(s, backend, render_mode=mode)
    black, a, _ = draw_it(s, backend, render_mode=mode, backgrounds=None)
    light = torch.cat(
        [s.backgrounds] * ('RGB' in mode)
        + [
            s.backgrounds.new_zeros(len(s.backgrounds), int('D' in mode.split('+') or 'ED' in mode))
        ],
        1,
    )
    assert torch.equal(a, alpha)
    assert same(picture, black + (1 - alpha) * light[:, None, None])


@rungs
@given(s=scenes(), mode=modes)
def test_cameras_are_drawn_one_by_one(backend, s, mode):
    both, alphas, meta = draw_it(s, backend, render_mode=mode)
    for i in range(len(s.viewmats)):
        one, alpha, m = draw_it(
            replace(
                s,
                viewmats=s.viewmats[i : i + 1],
                Ks=s.Ks[i : i + 1],
                backgrounds=s.backgrounds[i : i + 1],
            ),
            backend,
            render_mode=mode,
        )
        assert torch.equal(one[0], both[i])
        assert torch.equal(alpha[0], alphas[i])
        for k in ('means2d', 'radii', 'depths', 'conics'):
            assert torch.equal(m[k][0], meta[k][i]), k


@rungs
@given(s=scenes(), behind=numbers(0.1, 100), size=numbers(-3, 2), seed=st.integers(0, 10**6))
def test_nothing_is_seen_through_a_wall(backend, s, behind, size, seed):
    """Two opaque Gaussians far wider than the picture, each of which lets a thousandth of the light through: whatever is in front, one of
    them would leave at most 1e-4, and every pixel stops before it. What stands behind changes no number and gets no gradient."""
    far = float(max((s.means @ V[2, :3]).max() if len(s.means) else 0.0 for V in s.viewmats))
    axis = s.viewmats[0, 2, :3]
    s = replace(s, viewmats=s.viewmats[:1], Ks=s.Ks[:1], backgrounds=s.backgrounds[:1])

    def place(d):
        return (d * axis)[None]

    def put(t, *places, scale, opacity):
        n = len(places)
        c = torch.rand(n, t.colors.shape[1], generator=torch.Generator().manual_seed(seed))
        x = dict(
            means=torch.cat(places),
            quats=torch.eye(4)[:1].expand(n, 4),
            scales=torch.full((n, 3), scale),
            opacities=torch.full((n,), opacity),
            colors=c,
        )
        return replace(t, **{k: torch.cat([getattr(t, k), v]) for k, v in x.items()})

    wall = put(s, place(far + 0.1), place(far + 0.2), scale=1e4, opacity=1.0)
    more = put(wall, place(far + 0.2 + behind), scale=10**size, opacity=0.9)
    a = draw_it(wall, backend, render_mode='RGB+D')
    b = gradients(more, backend, render_mode='RGB+D')
    assert same(a[0], b[0], 1e-6)
    assert same(a[1], b[1], 1e-6)
    assert (a[1] > 0.89).all()
    for k in ('means', 'quats', 'scales', 'opacities', 'colors'):
        assert (b[2][k][-1] == 0).all(), k


# --- bad numbers


@pytest.mark.parametrize('backend', [*RUNGS, 'gsplat'])
@pytest.mark.parametrize(
    'name', ('means', 'quats', 'scales', 'opacities', 'colors', 'viewmats', 'Ks', 'backgrounds')
)
@given(
    s=scenes(),
    bad=st.sampled_from((float('nan'), float('inf'), -float('inf'))),
    where=numbers(0, 0.999),
    mode=modes,
    more=st.booleans(),
)
@settings(max_examples=max(8, asked // 10))
def test_one_bad_number_is_one_clear_error(backend, name, s, bad, where, mode, more):
    """NaN or infinity anywhere: one sentence that names the tensor, and no other; the picture is
    never drawn."""
    x = getattr(s, name).clone()
    assume(x.numel())
    x.view(-1)[int(where * x.numel())] = bad
    if more:
        x.view(-1)[-1] = -bad  # two infinities whose sum is not even infinite
    with pytest.raises(InputError) as e:
        draw_it(replace(s, **{name: x}), backend, render_mode=mode)
    assert str(e.value).startswith(f'{name} should be finite')
    assert '\n' not in str(e.value)
    assert not [
        n
        for n in (*s.tensors(), 'viewmats', 'Ks')
        if n != name and n in str(e.value).replace(name, '')
    ]
