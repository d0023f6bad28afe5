"""The numba rasterizer against the dense float64 oracle, the oracle against finite differences, and
the call to gsplat against its signature."""

import inspect
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from scenes import H, Scene, W, off_centre_K, turn_about_y

from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.splats import renderers
from spatialavatar0.splats.projection import covs_to_conics, log_aspects, project_gaussians
from spatialavatar0.splats.rasterize import marble
from spatialavatar0.splats.renderers import rasterize, take_next

RUNGS = ('cpu', 'per_tile', 'per_pixel', 'torch')
KINDS = ('plain', 'behind', 'near', 'huge', 'needle', 'transparent', 'opaque', 'offscreen', 'gone')
NAMES = ('means', 'quats', 'scales', 'opacities', 'colors', 'backgrounds')

# --- scenes


def cameras(count, generator):
    "Cameras 4 m away that look at the origin from slightly different sides."
    viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    viewmats[:, 2, 3] = 4
    viewmats[:, 0, 3] = torch.rand(count, generator=generator) - 0.5
    for viewmat in viewmats:
        angle = float(torch.rand((), generator=generator)) - 0.5
        viewmat[:3, :3] = turn_about_y(angle, torch.float64)
    return viewmats.float().double(), off_centre_K(count, torch.float64)


def scene(kind, seed, N=150, C=1, D=3):
    "A fresh random scene, float64 on the float32 grid, so that both backends see the same numbers."
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    means = normal(N, 3) * torch.tensor([1.0, 0.8, 0.6])
    quats = normal(N, 4) * 2
    log_scales = normal(N, 3) * 0.5 - 2
    opacities = uniform(N) * 0.95 + 0.05
    if kind == 'behind':
        means[:, 2] -= 3.5
    if kind == 'near':
        means[:, 2] -= 3.0
    if kind == 'huge':
        log_scales[::10] += 3
    if kind == 'needle':
        thin = torch.rand(N, 1, generator=generator) < 0.5
        log_scales += torch.tensor([2.0, -2, -2]).double() * thin
    if kind == 'transparent':
        opacities = opacities * 0.02
    if kind == 'opaque':
        opacities = 0.97 + 0.03 * opacities
        log_scales += 0.7
    if kind == 'offscreen':
        means[:, 0] += 2.0
    if kind == 'gone':
        means[:, 0] += 100.0
    viewmats, Ks = cameras(C, generator)
    tensors = means, quats, log_scales.exp(), opacities, uniform(N, D), uniform(C, D)
    return Scene(*[x.float().double() for x in tensors], viewmats, Ks)


# --- every rung against the oracle


def weigh(pictures, dtype, seed, skip=None):
    "A random weighting of the pixels of some pictures; those in skip weigh nothing."
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for picture in pictures:
        weights = torch.randn(picture.shape, generator=generator, dtype=torch.float64).to(dtype)
        total = total + (picture * (weights if skip is None else weights * ~skip)).sum()
    return total


def run(inputs, backend, dtype, mode='RGB+D', seed=0, skip=None, **options):
    "Pictures, meta, and the gradients of a weighting of the pictures."
    leaves = inputs.leaves(dtype)
    colors, alphas, meta = rasterize(
        *leaves.arguments(),
        backgrounds=leaves.backgrounds,
        render_mode=mode,
        backend=backend,
        **options,
    )
    weigh((colors, alphas), dtype, seed, skip).backward()
    tensors = leaves.tensors().values()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]
    pictures = colors.detach().double(), alphas.detach().double()
    return *pictures, meta, [grad.double() for grad in grads]


def differing(pictures, truths):
    """Pixels in which two renderers differ. Where a splat fell on the other side of the 1/255 cut
    they may differ by up to 5e-3, in a few pixels."""
    flipped = False
    for picture, truth in zip(pictures, truths):
        assert picture.shape == truth.shape
        largest = truth.abs().amax().clamp(min=1)
        error = (picture - truth).abs().amax(-1, keepdim=True) / largest
        assert (error > 1e-4).double().mean() <= 1e-3
        assert error.max() <= 5e-3
        flipped = flipped | (error > 2e-5)
    assert flipped.double().mean() <= 2e-3
    return flipped


def compare(inputs, grad_tol=1e-4, rung='cpu', **options):
    """A rung in float32 (PyTorch in float64) against dense in float64. Pixels that differ do not
    count for gradients: these would be of different pictures."""
    dtype = torch.float64 if rung == 'torch' else torch.float32
    dense = run(inputs, 'dense', torch.float64, **options)
    ours = run(inputs, rung, dtype, **options)
    flipped = differing(ours[:2], dense[:2])
    if flipped.any():
        dense = run(inputs, 'dense', torch.float64, skip=flipped, **options)
        ours = run(inputs, rung, dtype, skip=flipped, **options)
    for name, grad, truth in zip(NAMES, ours[3], dense[3]):
        error = (grad - truth).norm()
        assert error <= grad_tol * truth.norm() + 1e-8, f'{name}: {error / truth.norm():.1e}'
    return ours


@pytest.mark.parametrize('seed', (0, 1))
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rung', RUNGS)
def test_rung_is_dense(rung, kind, seed):
    compare(scene(kind, seed), seed=seed, rung=rung)


@pytest.mark.parametrize('mode', ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED'))
@pytest.mark.parametrize('D', (1, 3, 9))
@pytest.mark.parametrize('rung', RUNGS)
def test_modes_channels_cameras(rung, mode, D):
    colors = compare(scene('plain', 5, C=2, D=D), mode=mode, rung=rung)[0]
    assert colors.shape == (2, H, W, (D if 'RGB' in mode else 0) + ('D' in mode))


def test_colors_per_camera_and_limits():
    inputs = scene('plain', 6, C=2)
    inputs.colors = torch.stack([inputs.colors, inputs.colors.flip(0)])
    compare(inputs, near_plane=3.5, far_plane=4.4, eps2d=0.1, max_alpha=0.9)


def test_meta_agrees():
    inputs = scene('near', 7)
    ours = run(inputs, 'cpu', torch.float32)[2]
    dense = run(inputs, 'dense', torch.float64)[2]
    drawn = (ours['radii'] > 0).all(-1)
    assert (drawn == (dense['radii'] > 0).all(-1)).double().mean() > 0.98
    for name in ('means2d', 'depths', 'conics'):
        value, truth = ours[name][drawn].double(), dense[name][drawn].detach()
        assert ((value - truth).abs() <= 1e-3 + 1e-4 * truth.abs()).all(), name


# --- gradients of means2d


def pulls(inputs, rung, dtype, weights):
    "Gradient and absgrad of means2d."
    leaves = inputs.leaves(dtype)
    options = dict(render_mode='RGB+D', backend=rung, absgrad=True)
    colors, _, meta = rasterize(*leaves.arguments(), **options)
    meta['means2d'].retain_grad()
    (colors * weights.to(dtype)).sum().backward()
    return meta['means2d'].grad.double(), meta['means2d'].absgrad.double()


def pulls_one_by_one(inputs, weights):
    "The oracle's absgrad, every fourth pixel of every fourth row by itself."
    leaves = inputs.leaves()
    colors, _, meta = rasterize(*leaves.arguments(), render_mode='RGB+D', backend='dense')
    total = 0
    for y in range(0, H, 4):
        for x in range(0, W, 4):
            pixel = (colors * weights)[:, y, x].sum()
            grad = torch.autograd.grad(pixel, meta['means2d'], retain_graph=True)[0]
            total = total + grad.abs()
    return total


def pull_scene():
    "Two cameras, and weights for their pixels."
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, H, W, 4, generator=generator).double()
    return scene('plain', 11, N=40, C=2), weights


def test_absgrad_of_the_oracle():
    inputs, weights = pull_scene()
    every_fourth = torch.zeros_like(weights)
    every_fourth[:, ::4, ::4] = 1
    weights = weights * every_fourth
    absgrad = pulls(inputs, 'dense', torch.float64, weights)[1]
    assert torch.allclose(absgrad, pulls_one_by_one(inputs, weights))


@pytest.mark.parametrize('rung', RUNGS)
def test_means2d_is_in_the_way_of_the_gradient(rung):
    "meta['means2d'] gets a .grad and an .absgrad."
    inputs, weights = pull_scene()
    dtype = torch.float64 if rung == 'torch' else torch.float32
    grad, absgrad = pulls(inputs, rung, dtype, weights)
    true_grad, true_absgrad = pulls(inputs, 'dense', torch.float64, weights)
    assert (grad - true_grad).norm() <= 1e-4 * true_grad.norm()
    assert (absgrad - true_absgrad).norm() <= 1e-4 * true_absgrad.norm()
    assert (absgrad >= grad.abs() * (1 - 1e-4) - 1e-6).all()


def test_nobody_asks_for_gradients():
    inputs = scene('plain', 12)
    with torch.no_grad():
        free = rasterize(*inputs.arguments()).colors
    wanted = replace(inputs, opacities=inputs.opacities.clone().requires_grad_())
    colors, _, meta = rasterize(*wanted.arguments())
    colors.sum().backward()
    assert torch.equal(free, colors)
    assert not meta['means2d'].requires_grad


# --- what must hold


@pytest.mark.parametrize('backend', ('dense', 'cpu', 'per_tile', 'torch', 'per_pixel'))
def test_empty_scene_shows_the_background(backend):
    nothing = [torch.zeros(*shape) for shape in ((0, 3), (0, 4), (0, 3), (0,), (0, 3))]
    camera = torch.eye(4)[None], torch.eye(3)[None], 9, 7
    blue = torch.tensor([[0.1, 0.2, 0.3]])
    colors, alphas, _ = rasterize(*nothing, *camera, backgrounds=blue, backend=backend)
    assert torch.allclose(colors, blue[0].expand(1, 7, 9, 3))
    assert (alphas == 0).all()


def test_names_of_what_is_returned():
    picture = rasterize(*scene('plain', 0).arguments())
    colors, alphas, meta = picture
    assert colors is picture.colors
    assert alphas is picture.alphas
    assert meta is picture.meta


def test_projection_is_gsplats():
    twin = pytest.importorskip('gsplat.cuda._torch_impl')
    inputs = scene('plain', 9)
    covs, _ = twin._quat_scale_to_covar_preci(inputs.quats, inputs.scales, True, False)
    theirs = twin._fully_fused_projection(inputs.means, covs, inputs.viewmats, inputs.Ks, W, H)
    _, means2d, depths, conics, _ = theirs
    camera = inputs.viewmats[0], inputs.Ks[0], W, H
    ours = project_gaussians(inputs.means, inputs.quats, inputs.scales, *camera)
    assert torch.allclose(ours[0], means2d[0])
    assert torch.allclose(ours[1], depths[0])
    assert torch.allclose(covs_to_conics(ours[2]), conics[0])


def few_gaussians(N=5):
    "Gaussians and a background, float64, ready for gradients."
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    tensors = [
        torch.randn(N, 3, generator=generator) * 0.3,
        torch.randn(N, 4, generator=generator),
        uniform(N, 3) * 0.2 + 0.2,
        uniform(N) * 0.5 + 0.3,
        uniform(N, 2),
        uniform(1, 2),
    ]
    return [x.double().requires_grad_() for x in tensors]


def test_finite_differences():
    viewmats = torch.eye(4, dtype=torch.float64)[None].clone()
    viewmats[0, 2, 3] = 3
    Ks = torch.tensor([[[12.0, 0, 6], [0, 12, 5], [0, 0, 1]]], dtype=torch.float64)
    camera = viewmats, Ks, 12, 10

    def draw(*tensors):
        *gaussians, backgrounds = tensors
        options = dict(backgrounds=backgrounds, render_mode='RGB+ED', backend='dense')
        return torch.cat(rasterize(*gaussians, *camera, **options)[:2], -1)

    assert torch.autograd.gradcheck(draw, few_gaussians(), eps=1e-6, atol=1e-5)


def test_gsplat_accepts_our_call(monkeypatch):
    gsplat = pytest.importorskip('gsplat')
    called = {}

    def fake(*args, **kw):
        called.update(inspect.signature(real).bind(*args, **kw).arguments)
        return 'colors', 'alphas', {}

    real = gsplat.rasterization
    monkeypatch.setattr(gsplat, 'rasterization', fake)
    monkeypatch.setattr(renderers, '_need_cuda', lambda means: None)
    inputs = scene('plain', 0)
    options = dict(backgrounds=inputs.backgrounds, render_mode='RGB+ED', backend='gsplat')
    assert rasterize(*inputs.arguments(), **options).colors == 'colors'
    assert called['packed'] is False
    assert called['render_mode'] == 'RGB+ED'
    assert called['width'] == W
    assert called['backgrounds'] is inputs.backgrounds


# --- bad input


def test_gsplat_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(InputError, match='use backend="cpu"'):
        rasterize(*scene('plain', 0).arguments(), backend='gsplat')


BAD = dict(
    means=lambda x: x[:, :2],
    quats=lambda x: x[:-1],
    scales=lambda x: x.log(),
    opacities=lambda x: x * 3 - 1,
    colors=lambda x: x[:3],
    viewmats=lambda x: x[0],
    Ks=lambda x: x * float('nan'),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(name):
    inputs = scene('plain', 0)
    good = getattr(inputs, name)
    spoiled = replace(inputs, **{name: BAD[name](good)})
    with pytest.raises(InputError, match=name):
        rasterize(*spoiled.arguments())
    infinite = good.clone()
    infinite.view(-1)[1] = float('inf')
    with pytest.raises(InputError, match=name + '.*finite'):
        rasterize(*replace(inputs, **{name: infinite}).arguments())


BAD_OPTIONS = dict(
    render_mode='rgb',
    backend='metal',
    backgrounds=torch.zeros(3),
    near_plane=0.0,
)


@pytest.mark.parametrize('name', BAD_OPTIONS)
def test_bad_options(name):
    with pytest.raises(InputError, match=name):
        rasterize(*scene('plain', 0).arguments(), **{name: BAD_OPTIONS[name]})


def marble_and_gradients():
    "A picture of many tiles, and the gradients of all that made it."
    leaves = [x.requires_grad_() for x in marble(4000)]
    camera = orbit(20, 15, 0.5)[None], intrinsics(450, 256, 256)[None], 256, 256
    colors, alphas, _ = rasterize(*leaves, *camera, render_mode='RGB+D')
    (colors.square().sum() + alphas.sum()).backward()
    return [colors.detach(), *[x.grad for x in leaves]]


def test_threads_agree():
    "To the last bit: sums are added up in an order that no number of threads changes."
    threads = numba.get_num_threads()
    if threads < 2:
        pytest.skip('one core')
    several = marble_and_gradients()
    try:
        numba.set_num_threads(1)
        one = marble_and_gradients()
    finally:
        numba.set_num_threads(threads)
    assert all(map(torch.equal, one, several))


def test_passes():
    "As few passes as fours need; every channel is in one of them."
    for channels in range(1, 30):
        each = renderers._three_or_four(channels)
        assert each in (3, 4)
        assert -(-channels // each) == -(-channels // 4)


@numba.njit(parallel=True)
def _taken(threads, count):
    "How often each number below count is taken."
    counter, times = np.zeros(1, np.int64), np.zeros((threads, count), np.int64)
    for thread in numba.prange(threads):
        turn = take_next(counter)
        while turn < count:
            times[thread, turn] += 1
            turn = take_next(counter)
    return times.sum(0), counter[0]


def test_no_two_threads_take_the_same_tile():
    for threads in (1, 2, 16):
        times, last = _taken(threads, 100_000)
        assert (times == 1).all() and last == 100_000 + threads  # each has met the end


@pytest.mark.parametrize('rung', ('cpu', 'per_tile', 'torch', 'dense'))
def test_aspects_come_with_the_picture(rung):
    "meta['log_aspects'] is what page 21 says, and its gradient joins that of the picture."
    dtype = torch.float64 if rung in ('torch', 'dense') else torch.float32
    inputs = scene('needle', 3, C=2)
    leaves = inputs.leaves(dtype)
    colors, _, meta = rasterize(*leaves.arguments(), backend=rung, aspects=True)
    assert 'log_aspects' in dict(meta)
    (colors.sum() + meta['log_aspects'].square().sum()).backward()
    truth = inputs.leaves(torch.float64)
    colors, _, plain = rasterize(*truth.arguments(), backend='dense')
    assert 'log_aspects' not in plain
    shapes = truth.means, truth.quats, truth.scales
    cameras = list(zip(truth.viewmats, truth.Ks))
    expected = torch.stack([log_aspects(*shapes, V, K, W, H) for V, K in cameras])
    (colors.sum() + expected.square().sum()).backward()
    assert (meta['log_aspects'] - expected).abs().max() < 2e-3
    for name in ('means', 'quats', 'scales'):
        grad, right = getattr(leaves, name).grad, getattr(truth, name).grad
        assert (grad - right).norm() < 2e-3 * right.norm(), name
