"""What must hold for every scene, whoever invented it: hypothesis tries tiny, huge, near, far,
flat, faint and opaque Gaussians, odd pictures and odd cameras. The run is the same every time;
PROPERTY_EXAMPLES=2000 tries that many new ones."""

import functools
import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scenes import Scene
from torch import Tensor

from spatialavatar0.ground.core import InputError
from spatialavatar0.splats import renderers
from spatialavatar0.splats.projection import covs_to_conics, project_gaussians
from spatialavatar0.splats.rasterize import pixel_centres
from spatialavatar0.splats.renderers import rasterize

RUNGS = list(renderers._BACKENDS)
MODES = ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED')
GAUSSIANS = ('means', 'quats', 'scales', 'opacities', 'colors')
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


def turned(generator, amount):
    "A random rotation: the identity for amount 0, any for 1."
    q, r = torch.linalg.qr(torch.eye(3) + amount * torch.randn(3, 3, generator=generator))
    q = q * r.diagonal().sign()
    return q * q.det()


def odd_cameras(generator, count, width, height, distance, focal, centre, turn):
    "World-to-camera matrices and intrinsics."
    viewmats = torch.eye(4).repeat(count, 1, 1)
    for viewmat in viewmats:
        viewmat[:3, :3] = turned(generator, turn)
        viewmat[2, 3] = distance
    Ks = torch.eye(3).repeat(count, 1, 1)
    Ks[:, 0, 0] = focal[0] * max(width, height)
    Ks[:, 1, 1] = focal[1] * max(width, height)
    Ks[:, 0, 2] = centre[0] * width
    Ks[:, 1, 2] = centre[1] * height
    return viewmats, Ks


def odd_opacities(generator, N, opacity):
    "Between two limits, some exactly at them: exactly 0 and 1 where the range ends there."
    opacities = torch.rand(N, generator=generator) * (opacity[1] - opacity[0]) + opacity[0]
    opacities[::7] = opacity[1]
    opacities[3::7] = opacity[0]
    return opacities


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
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    size = width, height
    cameras = odd_cameras(generator, C, *size, distance, focal, centre, turn)
    opacities = odd_opacities(generator, N, opacity)
    means, quats = spread * normal(N, 3), quat_length * normal(N, 4)
    smallest, largest = log_size
    scales = 10 ** (smallest + (largest - smallest) * uniform(N, 3))
    colors, backgrounds = uniform(N, D), uniform(C, D)
    return Scene(means, quats, scales, opacities, colors, backgrounds, *cameras, *size)


def numbers(lo, hi):
    return st.floats(lo, hi, allow_subnormal=False)


def pairs(lo, hi):
    return st.tuples(numbers(lo, hi), numbers(lo, hi)).map(sorted)


def scenes(sizes=(-3, 1), spreads=(0.1, 3), distances=(2, 6)):
    "Ordinary scenes by default; wider ranges make them extreme."
    return st.builds(
        build,
        seed=st.integers(0, 10**6),
        N=st.integers(0, 60),
        C=st.integers(1, 2),
        D=st.integers(1, 9),
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


def draw_it(scene, backend, **options):
    options = dict(backgrounds=scene.backgrounds) | options
    return rasterize(*scene.arguments(), backend=backend, **options)


class Result(NamedTuple):
    "Pictures, and the gradients of a random weighting of them."

    colors: Tensor
    alphas: Tensor
    grads: dict

    def pictures(self):
        return self.colors, self.alphas


def gradients(scene, backend, keep=1.0, shake=0.0, **options):
    """Pixels outside keep weigh nothing for gradients. `shake` moves every weight by so much of
    itself."""
    tensors = scene.tensors()
    for x in tensors.values():
        x.requires_grad_()
        x.grad = None
    pictures = draw_it(scene, backend, **options)[:2]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(x) * keep for x in pictures]
    weights = [w * (1 + shake * torch.randn(w.shape, generator=generator)) for w in weights]
    loss = sum((x * w).sum() for x, w in zip(pictures, weights))
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(tensors.items(), found)
    }
    return Result(*[x.detach() for x in pictures], grads)


# --- agreement with the oracle


def coverage(scene, viewmat, K):
    """The order of the splats in front of the camera, near to far, and the alpha (n,H,W) of each
    before cut and clamp."""
    depths = scene.means @ viewmat[2, :3] + viewmat[2, 3]
    seen = (depths >= 0.01).nonzero()[:, 0]
    order = seen[depths[seen].argsort(stable=True)]
    gaussians = [x[order] for x in scene.gaussians()[:3]]
    size = scene.width, scene.height
    means2d, _, covs = project_gaussians(*gaussians, viewmat, K, *size)
    pixels = pixel_centres(*size).reshape(*size[::-1], 2)
    dx, dy = (pixels - means2d[:, None, None]).unbind(-1)
    xx, xy, yy = covs_to_conics(covs).T[..., None, None]
    sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    return order, scene.opacities[order, None, None] * torch.exp(-sigma)


def decisions(scene, viewmat, K, max_alpha):
    """Everything that is compared with a limit: 255 alpha, alpha / max_alpha, and 10,000 times the
    light left over; (3,n,H,W) and the order."""
    order, full = coverage(scene, viewmat, K)
    alphas = torch.where(full >= 1 / 255, full.clamp(max=max_alpha), 0.0)
    return order, torch.stack([full * 255, full / max_alpha, (1 - alphas).cumprod(0) * 1e4])


def rounded(scene, seed, amount=2e-7):
    "The scene with an error of about float32's rounding in every number."
    generator = torch.Generator().manual_seed(seed)

    def shake(x, size=None):
        size = x.abs() if size is None else size
        return x + amount * torch.randn(x.shape, generator=generator).to(x) * size

    # a sum is rounded to the digits of its largest term
    far = scene.means.abs().amax(1, keepdim=True) + scene.viewmats[0, 2, 3].abs()
    return replace(
        scene,
        means=shake(scene.means, far),
        quats=shake(scene.quats),
        scales=shake(scene.scales),
        opacities=scene.opacities - amount * scene.opacities,
        Ks=shake(scene.Ks),
    )


@torch.no_grad()
def undecided(scene, max_alpha, others):
    """(C,H,W) pixels in which rounding could turn a decision: a limit lies within ten times the
    change that rounding makes."""
    found = []
    for camera, (viewmat, K) in enumerate(zip(scene.viewmats, scene.Ks)):
        order, values = decisions(scene, viewmat, K, max_alpha)
        change = torch.full_like(values, 1e-6) * values
        for other in others:
            its_order, its_values = decisions(other, viewmat, other.Ks[camera], max_alpha)
            if not torch.equal(its_order, order):
                return torch.ones(len(scene.Ks), scene.height, scene.width, dtype=torch.bool)
            change = torch.maximum(change, (its_values - values).abs())
        found.append(((values - 1).abs() <= 10 * change).any(0).any(0))
    return torch.stack(found)


def rounding_errors(scene, others, keep, mode, max_alpha):
    "What rounding of the scene's numbers, of max_alpha and of the weights does to the oracle."
    nearby = []
    for other, error in zip(others, (0, 1e-7, -1e-7)):
        options = dict(render_mode=mode, max_alpha=max_alpha * (1 + error))
        nearby.append(gradients(other, 'dense', keep, shake=2e-7, **options))
    return nearby


@rungs
@given(s=scenes(), mode=st.sampled_from(('RGB', 'D', 'RGB+D')), max_alpha=limits)
def test_agrees_with_the_oracle(backend, s, mode, max_alpha):
    """Pictures and gradients, to 1e-5 plus ten times what float32's rounding of the scene's numbers
    (also of max_alpha, and of each pixel's share of a gradient, where these cancel) does to the
    float64 oracle."""
    exact = s.to(torch.float64)
    others = [rounded(exact, seed) for seed in (1, 2, 3)]
    keep = ~undecided(exact, max_alpha, others)[..., None]
    options = dict(render_mode=mode, max_alpha=max_alpha)
    truth = gradients(exact, 'dense', keep, **options)
    nearby = rounding_errors(exact, others, keep, mode, max_alpha)
    ours = gradients(s.to(own(backend)), backend, keep, **options)
    for i, (picture, expected) in enumerate(zip(ours.pictures(), truth.pictures())):
        assert picture.shape == expected.shape
        assert picture.dtype == own(backend)
        slack = torch.stack([(near[i] - expected).abs() for near in nearby]).amax(0)
        allowed = 1e-5 * expected.abs().clamp(min=1) + 10 * slack
        assert (((picture - expected).abs() <= allowed) | ~keep).all()
    for name, expected in truth.grads.items():
        slack = max((near.grads[name] - expected).norm() for near in nearby)
        allowed = 1e-5 * expected.norm() + 10 * slack + 1e-6
        assert (ours.grads[name] - expected).norm() <= allowed, name


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
below_zero = large(N=49, log_size=[-3.0, 3.0], focal=(1.0, 1.0))
flat = large(N=45, log_size=[-1.0, 4.0], focal=(3.0, 1.0))
extreme = scenes(sizes=(-8, 4), spreads=(1e-6, 1e4), distances=(-1, 1e3))


@rungs
@example(s=below_zero, mode='RGB', max_alpha=0.999)  # sigma below zero, exp(-sigma) overflowed
@example(s=flat, mode='RGB', max_alpha=0.999)  # a covariance's determinant rounded to zero
@given(s=extreme, mode=modes, max_alpha=limits)
def test_extreme_scenes_stay_finite(backend, s, mode, max_alpha):
    """Sizes from 1e-8 to 1e4 m, centres up to tens of kilometres away, cameras inside the cloud:
    finite pictures, coverage in 0..1, finite gradients."""
    found = gradients(s, backend, render_mode=mode, max_alpha=max_alpha)
    assert found.colors.isfinite().all()
    assert found.alphas.isfinite().all()
    assert (found.alphas >= -1e-6).all()
    assert (found.alphas <= 1).all()
    for name, grad in found.grads.items():
        assert grad.isfinite().all(), name


# --- laws


def same(value, truth, eps=1e-5):
    "Equal to float32 rounding (float64 rungs: far closer), relative to the largest number."
    if value.shape != truth.shape:
        return False
    if not value.numel():
        return True
    allowed = eps * truth.abs().max().clamp(min=1)
    return bool(((value - truth).abs() <= allowed).all())


@rungs
@given(s=scenes(), mode=modes)
def test_expected_depth_is_depth_over_coverage(backend, s, mode):
    depth, alpha, _ = draw_it(s, backend, render_mode='D')
    expected = draw_it(s, backend, render_mode='ED').colors
    assert torch.allclose(expected, depth / alpha.clamp(min=1e-10), rtol=1e-6)
    parts = [draw_it(s, backend).colors] if 'RGB' in mode else []
    if mode != 'RGB':
        parts.append(expected if 'ED' in mode else depth)
    together = draw_it(s, backend, render_mode=mode)
    assert same(together.colors, torch.cat(parts, -1))
    assert same(together.alphas, alpha)


@rungs
@given(s=scenes(), mode=modes, seed=st.integers(0, 10**6))
def test_order_does_not_matter(backend, s, mode, seed):
    "Shuffled Gaussians give the same picture, and every gradient follows its Gaussian."
    for viewmat in s.viewmats:
        assume(len((s.means @ viewmat[2, :3]).unique()) == len(s.means))
    order = torch.randperm(len(s.means), generator=torch.Generator().manual_seed(seed))
    columns = {name: getattr(s, name).detach()[order] for name in GAUSSIANS}
    straight = gradients(s, backend, render_mode=mode)
    shuffled = gradients(replace(s, **columns), backend, render_mode=mode)
    assert same(shuffled.colors, straight.colors)
    assert same(shuffled.alphas, straight.alphas)
    for name, grad in straight.grads.items():
        moved = grad if name == 'backgrounds' else grad[order]
        assert same(shuffled.grads[name], moved), name


def some_channels(scene, which):
    "The scene with some of its channels."
    return replace(scene, colors=scene.colors[:, which], backgrounds=scene.backgrounds[:, which])


@rungs
@given(s=scenes(), mode=st.sampled_from(('RGB', 'RGB+D', 'RGB+ED')), share=numbers(0, 1))
def test_channels_do_not_know_of_each_other(backend, s, mode, share):
    count = s.colors.shape[1]
    cut = round(share * count)
    assume(0 < cut < count)
    whole, alpha, _ = draw_it(s, backend, render_mode=mode)
    first, first_alpha, _ = draw_it(some_channels(s, slice(cut)), backend)
    rest = draw_it(some_channels(s, slice(cut, None)), backend, render_mode=mode).colors
    assert same(torch.cat([first, rest], -1), whole)
    assert same(first_alpha, alpha)


@rungs
@given(s=scenes(), mode=modes)
def test_background_shines_through_what_is_left(backend, s, mode):
    picture, alpha, _ = draw_it(s, backend, render_mode=mode)
    black, its_alpha, _ = draw_it(s, backend, render_mode=mode, backgrounds=None)
    light = [s.backgrounds] if 'RGB' in mode else []
    if mode != 'RGB':
        light.append(s.backgrounds.new_zeros(len(s.backgrounds), 1))  # depth has none
    light = torch.cat(light, 1)[:, None, None]
    assert torch.equal(its_alpha, alpha)
    assert same(picture, black + (1 - alpha) * light)


def one_camera(scene, i):
    "The scene with one of its cameras."
    which = slice(i, i + 1)
    return replace(
        scene,
        viewmats=scene.viewmats[which],
        Ks=scene.Ks[which],
        backgrounds=scene.backgrounds[which],
    )


@rungs
@given(s=scenes(), mode=modes)
def test_cameras_are_drawn_one_by_one(backend, s, mode):
    together = draw_it(s, backend, render_mode=mode)
    for i in range(len(s.viewmats)):
        alone = draw_it(one_camera(s, i), backend, render_mode=mode)
        assert torch.equal(alone.colors[0], together.colors[i])
        assert torch.equal(alone.alphas[0], together.alphas[i])
        for name in ('means2d', 'radii', 'depths', 'conics'):
            assert torch.equal(alone.meta[name][0], together.meta[name][i]), name


def with_round(scene, places, scale, opacity, seed):
    "The scene with round Gaussians of random colours at some places added."
    n, channels = len(places), scene.colors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    added = dict(
        means=torch.stack(places),
        quats=torch.eye(4)[:1].expand(n, 4),
        scales=torch.full((n, 3), scale),
        opacities=torch.full((n,), opacity),
        colors=torch.rand(n, channels, generator=generator),
    )
    columns = {name: torch.cat([getattr(scene, name), new]) for name, new in added.items()}
    return replace(scene, **columns)


@rungs
@given(s=scenes(), behind=numbers(0.1, 100), size=numbers(-3, 2), seed=st.integers(0, 10**6))
def test_nothing_is_seen_through_a_wall(backend, s, behind, size, seed):
    """Two opaque Gaussians far wider than the picture, each of which lets a thousandth of the light
    through: whatever is in front, one of them would leave at most 1e-4, and every pixel stops
    before it. What stands behind changes no number and gets no gradient."""
    forward = s.viewmats[:, 2, :3]
    # behind all Gaussians, and before every camera: all Gaussians may lie behind it
    depths = [*(s.means @ forward.T).flatten().tolist(), *(-s.viewmats[:, 2, 3]).tolist()]
    far = max(depths)
    axis = forward[0]
    places = [(far + distance) * axis for distance in (0.1, 0.2)]
    wall = with_round(one_camera(s, 0), places, 1e4, 1.0, seed)
    more = with_round(wall, [(far + 0.2 + behind) * axis], 10**size, 0.9, seed)
    without = draw_it(wall, backend, render_mode='RGB+D')
    found = gradients(more, backend, render_mode='RGB+D')
    assert same(without.colors, found.colors, 1e-6)
    assert same(without.alphas, found.alphas, 1e-6)
    assert (without.alphas > 0.89).all()
    for name in GAUSSIANS:
        assert (found.grads[name][-1] == 0).all(), name


# --- bad numbers

TENSORS = (*GAUSSIANS, 'viewmats', 'Ks', 'backgrounds')
BAD = float('nan'), float('inf'), -float('inf')


@pytest.mark.parametrize('backend', [*RUNGS, 'gsplat'])
@pytest.mark.parametrize('name', TENSORS)
@given(
    s=scenes(), bad=st.sampled_from(BAD), where=numbers(0, 0.999), mode=modes, more=st.booleans()
)
@settings(max_examples=max(8, asked // 10))
def test_one_bad_number_is_one_clear_error(backend, name, s, bad, where, mode, more):
    """NaN or infinity anywhere: one sentence that names the tensor, and no other; the picture is
    never drawn."""
    spoiled = getattr(s, name).clone()
    assume(spoiled.numel())
    spoiled.view(-1)[int(where * spoiled.numel())] = bad
    if more:
        spoiled.view(-1)[-1] = -bad  # two infinities whose sum is not even infinite
    with pytest.raises(InputError) as error:
        draw_it(replace(s, **{name: spoiled}), backend, render_mode=mode)
    said = str(error.value)
    assert said.startswith(f'{name} should be finite')
    assert '\n' not in said
    assert not [other for other in TENSORS if other != name and other in said.replace(name, '')]
