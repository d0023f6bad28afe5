"""Judged by gsplat: its reference renderer and its torch functions agree with ours, its
`rasterization` takes our calls, and its densification strategies run on what our CPU rasterizer
reports."""

import functools
import inspect
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gsplat_reference import gsplat, on_cpu, reference, splat_alphas, tile_pixels, twins
from scenes import KINDS, Scene, make
from torch import Tensor

from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import quat_to_mat
from spatialavatar0.splats import renderers
from spatialavatar0.splats.kernels import project_splats
from spatialavatar0.splats.rasterize import near_to_far, tile_lists
from spatialavatar0.splats.renderers import rasterize

RUNGS = list(renderers._BACKENDS)
EXACT = [b for b in RUNGS if b in ('dense', 'torch')]  # these follow the float type of their input
MODES = ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED')


def weigh(pictures, keep, seed=0):
    "A random weighting of the pixels of some pictures; pixels outside keep (C,H,W) weigh nothing."
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for picture in pictures:
        weights = torch.randn(picture.shape, generator=generator).to(picture)
        total = total + (picture * weights * keep[..., None]).sum()
    return total


def differentiate(colors, alphas, scene, keep):
    "Gradients of a random weighting of all pictures, by name."
    tensors = scene.tensors()
    loss = weigh((colors, alphas), keep)
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(tensors.items(), grads)
    }


class Judgement(NamedTuple):
    "What gsplat's reference says of a scene, in float64."

    scene: Scene
    colors: Tensor
    alphas: Tensor
    keep: Tensor  # (C,H,W) pixels that count
    grads: dict


@functools.lru_cache(None)
def judged(kind, seed, C=1, D=3, mode='RGB+D', N=150):
    """gsplat's reference in float64. A pixel on a cut (alpha within 1e-4 of 1/255 or of the clamp,
    T within 1e-3 of 1e-4, relatively) may be decided either way in float32, so it weighs nothing
    for either side."""
    scene = make(kind, seed, N, C, D)
    leaves = scene.leaves(torch.float64)
    options = dict(backgrounds=leaves.backgrounds, render_mode=mode)
    colors, alphas, _, margin = reference(*leaves.arguments(), **options)
    keep = margin > 1e-4
    on_cut = (~keep).double().mean()
    assert on_cut <= 0.002, f'{on_cut:.2%} of the pixels are on a cut: choose another scene'
    grads = differentiate(colors, alphas, leaves, keep)
    return Judgement(scene, colors.detach(), alphas.detach(), keep, grads)


def compare(backend, dtype, limit, grad_limit, truth, mode='RGB+D'):
    "Largest difference of the pictures, relative L2 of every gradient."
    leaves = truth.scene.leaves(dtype)
    options = dict(backgrounds=leaves.backgrounds, render_mode=mode, backend=backend)
    colors, alphas, _ = rasterize(*leaves.arguments(), **options)
    for name, ours in (('colors', colors), ('alphas', alphas)):
        expected = getattr(truth, name)
        assert ours.shape == expected.shape
        assert colors.dtype == dtype
        error = ((ours - expected).abs() * truth.keep[..., None]).max().item()
        assert error <= limit * expected.abs().max().clamp(min=1), f'{name} differ by {error:.1e}'
    for name, grad in differentiate(colors, alphas, leaves, truth.keep).items():
        expected = truth.grads[name]
        error = ((grad - expected).norm() / expected.norm().clamp(min=1e-9)).item()
        assert error <= grad_limit, f'gradients of {name} differ by {error:.1e}'


# --- the reference renderer


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('backend', EXACT)
def test_float64_is_the_reference(backend, kind):
    compare(backend, torch.float64, 1e-9, 1e-8, judged(kind, 1))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('backend', RUNGS)
def test_float32_is_the_reference(backend, kind):
    """1e-5 of everything. With a conic in float32 (as gsplat has it) a needle keeps fewer digits:
    sigma is a small difference of large numbers."""
    limit = 2e-4 if kind == 'needle' and backend in EXACT else 1e-5
    compare(backend, torch.float32, limit, limit, judged(kind, 1))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('D', (1, 3, 9))
@pytest.mark.parametrize('backend', RUNGS)
def test_modes_channels_cameras(backend, D, mode):
    """The expected depth divides by alpha = 1-T, which has lost two digits at the faintest edge: so
    has its gradient."""
    limit = 5e-5 if 'ED' in mode else 1e-5
    truth = judged('plain', 2, C=2, D=D, mode=mode, N=60)
    compare(backend, torch.float32, limit, limit, truth, mode)


def test_reference_in_batches():
    """256 splats at a time instead of all at once: gsplat's reference forgets between two batches
    which pixels had stopped, and they may take a few more faint splats of the next; no more than
    that. (With its default of 100 x 256 every other test here has one batch.)"""
    scene = make('crowded', 3, N=700).to(torch.float64)
    options = dict(backgrounds=scene.backgrounds)
    with on_cpu() as draw:
        batches = draw(*scene.arguments(), **options, batch_per_iter=1)
        at_once = draw(*scene.arguments(), **options)
    assert (batches[1] >= at_once[1] - 1e-9).all()
    assert torch.allclose(batches[0], at_once[0], atol=1e-3)
    assert ((batches[1] - at_once[1]) < 1e-9).double().mean() > 0.8


def test_nothing_of_gsplat_stays_changed():
    modules = gsplat.rendering, gsplat.cuda._wrapper
    before = [vars(m).copy() for m in modules]
    reference(*make(N=3).arguments())
    assert before == [vars(m) for m in modules]


# --- piece by piece


class Projected(NamedTuple):
    "gsplat's projection."

    radii: Tensor  # (C,N,2)
    means2d: Tensor  # (C,N,2)
    depths: Tensor  # (C,N)
    conics: Tensor  # (C,N,3)

    def covs(self):
        "2D covariances (C,N,2,2)."
        xx, xy, yy = self.conics.unbind(-1)
        return torch.stack([xx, xy, xy, yy], -1).unflatten(-1, (2, 2)).inverse()


def projected(scene):
    "gsplat's projection of a float64 scene."
    covs, _ = twins._quat_scale_to_covar_preci(scene.quats, scene.scales, True, False)
    return Projected(*twins._fully_fused_projection(scene.means, covs, *scene.camera())[:4])


@pytest.mark.parametrize('kind', ('plain', 'near', 'offscreen', 'transparent'))
@pytest.mark.parametrize('backend', RUNGS)
def test_meta_is_gsplats_projection(backend, kind):
    scene = make(kind, 4, C=2)
    meta = rasterize(*scene.arguments(), backend=backend).meta
    theirs = projected(scene.to(torch.float64))
    drawn = (meta['radii'] > 0).all(-1)
    assert meta['radii'].dtype == torch.int32
    assert meta['means2d'].shape == (2, 150, 2)
    assert drawn.any()
    assert (drawn <= (theirs.radii > 0).all(-1)).all()
    for name in ('means2d', 'depths', 'conics'):
        value, truth = meta[name][drawn].double(), getattr(theirs, name)[drawn]
        assert torch.allclose(value, truth, rtol=1e-4, atol=1e-4), name


def exact_halves(scene, theirs):
    "Half sizes of the CUDA kernel's boxes: to the 1/255 cut, at most 3.33 sigma."
    reach = (2 * (255 * scene.opacities.double()).clamp(min=1).log()).sqrt()[:, None]
    return reach.clamp(max=3.33) * theirs.covs().diagonal(dim1=-2, dim2=-1).sqrt()


@pytest.mark.parametrize('kind', ('plain', 'near', 'offscreen', 'transparent'))
@pytest.mark.parametrize('backend', RUNGS)
def test_radii_are_gsplats(backend, kind):
    scene = make(kind, 4, C=2)
    radii = rasterize(*scene.arguments(), backend=backend).meta['radii']
    drawn = (radii > 0).all(-1)
    theirs = projected(scene.to(torch.float64))
    exact = exact_halves(scene, theirs)
    assert ((radii - exact)[drawn] > -1e-3).all()
    assert ((radii - exact)[drawn] < 1 + 1e-3).all()
    low, high = theirs.means2d - exact.ceil(), theirs.means2d + exact.ceil()
    inside = ((high > 0) & (low < torch.tensor([scene.width, scene.height]))).all(-1)
    inside = inside & (255 * scene.opacities > 1) & (theirs.depths > 0.01)
    # ours is left out at the edge itself, gsplat's up to a pixel later
    assert (inside & ~drawn).double().mean() <= 0.01


def test_covariances_are_gsplats():
    scene = make(seed=5).to(torch.float64)
    R = quat_to_mat(scene.quats)
    ours = R @ torch.diag_embed(scene.scales**2) @ R.mT
    theirs, _ = twins._quat_scale_to_covar_preci(scene.quats, scene.scales, True, False)
    assert torch.allclose(ours, theirs, rtol=1e-12)


def rows_of_tiles(order, offsets, ids):
    "A tile's splats, as rows of the input, near to far."
    return [order[ids[start:stop]].tolist() for start, stop in zip(offsets, offsets[1:])]


def lists_torch(scene, *arguments):
    "The lists of the PyTorch rung for camera 0."
    splats = renderers._project_readable(*arguments)
    means2d, depths, _, reach, half = [column[0] for column in splats]
    order = near_to_far(depths, reach)
    lists = tile_lists(means2d[order], half[order], scene.width, scene.height)
    return rows_of_tiles(order, *lists)


def lists_numba(scene, *arguments):
    "The lists of the numba rungs for camera 0."
    splats = project_splats(*arguments)
    means2d, depths, white, reach, half = [column[0].numpy() for column in splats]
    order = renderers.order_by_depth(depths, reach)
    black = np.zeros((len(depths), 4), np.float32)
    opacities = scene.opacities.numpy()
    packed = renderers.pack_splats(order, means2d, white, opacities, reach, half, black, 0)
    return rows_of_tiles(order, *renderers.exact_lists(packed, scene.width, scene.height))


def gsplats_lists(scene, theirs):
    "gsplat's, with tiles of 8 pixels, for camera 0."
    columns, rows = -(-scene.width // 8), -(-scene.height // 8)
    projection = theirs.means2d, theirs.radii, theirs.depths
    _, keys, ids = twins._isect_tiles(*projection, 8, columns, rows)
    starts = twins._isect_offset_encode(keys, 1, columns, rows).reshape(-1).tolist()
    stops = [*starts[1:], len(ids)]
    return [ids[start:stop].tolist() for start, stop in zip(starts, stops)]


def seen_in_tile(scene, theirs, tile, listed):
    "Which of the listed splats a pixel of the tile sees."
    row, column = divmod(tile, -(-scene.width // 8))
    pixels = tile_pixels(row, column, 8, scene.width, scene.height)[1]
    opacities = scene.opacities[listed].double()
    full, _ = splat_alphas(pixels, theirs.means2d[0, listed], theirs.conics[0, listed], opacities)
    seen = (full >= 1 / 255 * (1 + 1e-4)).any(0).tolist()
    return {splat for splat, is_seen in zip(listed, seen) if is_seen}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('lists', (lists_torch, lists_numba))
def test_tile_lists_lie_between_what_is_seen_and_gsplats(lists, kind):
    """Every splat that a pixel of the tile sees is in our list, everything in our list is in
    gsplat's (which takes whole rectangles of its rounded-up radii), and both are in the same
    order."""
    scene = make(kind, 7)
    ours = lists(scene, *scene.gaussians()[:4], *scene.camera(), 0.01, 1e10, 0.3)
    projection = projected(scene.to(torch.float64))
    theirs = gsplats_lists(scene, projection)
    assert len(ours) == len(theirs)
    for tile, (mine, listed) in enumerate(zip(ours, theirs)):
        assert mine == [splat for splat in listed if splat in set(mine)]
        assert seen_in_tile(scene, projection, tile, listed) <= set(mine)
    if lists is lists_numba:
        assert sum(map(len, ours)) <= sum(map(len, theirs))


# --- our call of the real thing


@pytest.fixture
def pretend(monkeypatch):
    """A machine with a GPU, as far as our code can see; gsplat's own reference does the work of its
    kernels, behind its true signature."""
    true = inspect.signature(gsplat.rasterization)
    knows = inspect.signature(gsplat.rendering._rasterization).parameters
    calls = []

    def rasterization(*args, **kw):
        call = true.bind(*args, **kw)
        calls.append(call.arguments)
        call.apply_defaults()
        return reference(**{k: v for k, v in call.arguments.items() if k in knows})[:3]

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True, raising=False)
    monkeypatch.setattr(gsplat, 'rasterization', rasterization)
    monkeypatch.setattr(renderers, 'missing_for_gsplat', str)  # nothing is
    return calls


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('per_camera', (False, True))
def test_our_call_of_gsplat_draws_the_same(pretend, mode, per_camera):
    scene = make('plain', 6, N=40, C=2)
    if per_camera:
        scene.colors = torch.stack([scene.colors, scene.colors.flip(0)])
    limits = dict(near_plane=3.4, far_plane=4.6, eps2d=0.2)
    options = dict(limits, backgrounds=scene.backgrounds, render_mode=mode)
    theirs = rasterize(*scene.arguments(), backend='gsplat', **options)
    ours = rasterize(*scene.arguments(), backend='cpu', **options)
    for picture, truth in zip(ours[:2], theirs[:2]):
        assert picture.shape == truth.shape
        assert ((picture - truth).abs() > 1e-4).double().mean() <= 0.002
    assert pretend[0]['packed'] is False
    assert pretend[0]['render_mode'] == mode
    assert not pretend[0]['absgrad']


def test_every_option_reaches_gsplat(pretend):
    scene = make(N=5)
    options = dict(
        near_plane=0.5,
        far_plane=9.0,
        eps2d=0.1,
        render_mode='D',
        absgrad=True,
        backgrounds=scene.backgrounds,
    )
    rasterize(*scene.arguments(), backend='gsplat', **options)
    assert {k: pretend[0][k] for k in options} == options


# --- densification: gsplat's strategies live on meta


def blend_by_hand(scene, theirs, camera, pixels):
    "Colours, alphas, the centres (n,P,2), one for every pixel, and the order of the splats."
    order = theirs.depths[camera].argsort()
    order = order[theirs.depths[camera, order] > 0.01]
    centres = theirs.means2d[camera, order][:, None].expand(-1, len(pixels), -1)
    centres = centres.clone().requires_grad_()
    xx, xy, yy = theirs.conics[camera, order].T[..., None]
    dx, dy = (pixels - centres).unbind(-1)
    sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    full = scene.opacities[order, None] * torch.exp(-sigma)
    alphas = torch.where(full >= 1 / 255, full.clamp(max=0.999), 0.0)
    alphas = torch.where((1 - alphas).cumprod(0) > 1e-4, alphas, 0.0)
    T = torch.cat([torch.ones_like(alphas[:1]), (1 - alphas).cumprod(0)])
    behind = T[-1][:, None] * scene.backgrounds[camera]
    colors = (alphas * T[:-1]).T @ scene.colors[order] + behind
    return colors, 1 - T[-1][:, None], centres, order


def pulls(scene, keep):
    """By hand, in float64: the gradient that every single pixel sends to the centre of every splat,
    (C,N,P,2), for the weighting of `weigh`. Its sum over pixels is what autograd calls the
    gradient of means2d; the sum of its absolute values is AbsGS's."""
    scene = scene.to(torch.float64)
    theirs = projected(scene)
    size = scene.height, scene.width
    pixels = tile_pixels(0, 0, max(size), scene.width, scene.height)[1]
    views = [blend_by_hand(scene, theirs, i, pixels) for i in range(len(scene.viewmats))]
    colors, alphas, centres, orders = zip(*views)
    pictures = [torch.stack(x).unflatten(1, size) for x in (colors, alphas)]
    grads = torch.autograd.grad(weigh(pictures, keep), centres)
    shape = len(grads), len(scene.means), len(pixels), 2
    found = torch.zeros(shape, dtype=torch.float64)
    for view, order, grad in zip(found, orders, grads):
        view[order] = grad
    return found


def backward(backend, scene, keep, **options):
    "Draw and send the gradient of `weigh` back, as a training loop would; means2d."
    options = dict(options, backgrounds=scene.backgrounds, backend=backend)
    colors, alphas, meta = rasterize(*scene.arguments(), **options)
    meta['means2d'].retain_grad()
    weigh((colors, alphas), keep).backward()
    return meta['means2d']


def relative_error(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize('kind', ('plain', 'near', 'needle', 'opaque', 'crowded'))
@pytest.mark.parametrize('backend', RUNGS)
def test_screen_gradients_and_absgrad(backend, kind):
    keep = judged(kind, 8, C=2, mode='RGB').keep
    hand = pulls(make(kind, 8, C=2), keep)
    leaves = make(kind, 8, C=2).leaves(torch.float64 if backend in EXACT else torch.float32)
    plain = backward(backend, leaves, keep)
    asked = backward(backend, leaves, keep, absgrad=True)
    assert relative_error(plain.grad, hand.sum(2)) < 1e-5
    assert relative_error(asked.grad, hand.sum(2)) < 1e-5
    assert relative_error(asked.absgrad, hand.abs().sum(2)) < 1e-5
    assert not hasattr(plain, 'absgrad')
    assert not asked.absgrad.requires_grad


class Training:
    "The raw parameters gsplat's strategies expect, with one optimizer each, and a strategy."

    def __init__(self, scene, strategy, rate=1e-3):
        raw = dict(
            means=scene.means,
            quats=scene.quats,
            scales=scene.scales.log(),
            opacities=scene.opacities.logit(),
            colors=scene.colors,
        )
        leaves = {k: torch.nn.Parameter(v.detach().clone()) for k, v in raw.items()}
        self.params = torch.nn.ParameterDict(leaves)
        self.optimizers = {k: torch.optim.Adam([v], lr=rate) for k, v in self.params.items()}
        self.scene, self.strategy = scene, strategy
        self.state = strategy.initialize_state()

    def draw(self, backend, **options):
        gaussians = dict(
            self.params,
            scales=self.params['scales'].exp(),
            opacities=self.params['opacities'].sigmoid(),
        )
        gaussians = [gaussians[k] for k in ('means', 'quats', 'scales', 'opacities', 'colors')]
        return rasterize(*gaussians, *self.scene.camera(), backend=backend, **options)

    def backward(self, step, info, loss):
        "The strategy looks at meta before and after."
        where = self.params, self.optimizers, self.state, step, info
        self.strategy.step_pre_backward(*where)
        loss.backward()
        return where

    def run(self, target, steps, backend, **options):
        """A training loop with a strategy, as gsplat's documentation writes it; the number of
        Gaussians after each step, and the loss."""
        counts, losses = [], []
        for step in range(steps):
            picture, _, info = self.draw(backend, **options)
            loss = (picture - target).abs().mean()
            where = self.backward(step, info, loss)
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            self.strategy.step_post_backward(*where)
            counts.append(len(self.params['means']))
            losses.append(loss.item())
        return counts, losses


@pytest.mark.parametrize('absgrad', (False, True))
@pytest.mark.parametrize('backend', RUNGS)
def test_statistics_of_gsplats_strategy(backend, absgrad):
    """Two steps of DefaultStrategy without refinement: the sums it keeps per Gaussian are those of
    a hand computation."""
    scene = make('plain', 9, N=60, C=2)
    training = Training(scene, gsplat.DefaultStrategy(absgrad=absgrad, verbose=False))
    training.strategy.check_sanity(training.params, training.optimizers)
    keep = torch.ones(2, scene.height, scene.width, dtype=torch.bool)
    hand = pulls(scene, keep).float()
    # to half pictures, times two cameras
    hand = (hand.abs() if absgrad else hand).sum(2)
    hand = hand * torch.tensor([scene.width, scene.height]) / 2 * 2
    wanted, count = torch.zeros(60), torch.zeros(60)
    for step in range(2):
        colors, alphas, info = training.draw(
            backend, absgrad=absgrad, backgrounds=scene.backgrounds
        )
        where = training.backward(step, info, weigh((colors, alphas), keep))
        training.strategy.step_post_backward(*where)
        seen = (info['radii'] > 0).all(-1)
        wanted += (hand.norm(dim=-1) * seen).sum(0)
        count += seen.sum(0)
    assert torch.equal(training.state['count'], count)
    assert relative_error(training.state['grad2d'], wanted) < 1e-3  # a pixel on a cut may differ


def few_for_many(rate=1e-3, **options):
    "Ten large Gaussians before the picture of 150, and a strategy in a hurry."
    target = rasterize(*make('plain', 10).arguments()).colors
    few = make('plain', 11, N=10)
    few.scales = few.scales * 0 + 0.3
    torch.manual_seed(0)
    hurry = dict(refine_start_iter=2, grow_grad2d=2e-4, grow_scale3d=0.1, verbose=False)
    return Training(few, gsplat.DefaultStrategy(**hurry, **options), rate), target


@pytest.mark.parametrize('absgrad', (False, True))
@pytest.mark.parametrize('backend', RUNGS)
def test_gsplats_strategy_densifies(backend, absgrad):
    """Three rounds of splitting, copying and pruning; parameters, optimizers and pictures stay in
    step."""
    training, target = few_for_many(refine_every=5, absgrad=absgrad)
    counts, losses = training.run(target, 16, backend, absgrad=absgrad)
    assert counts[4] == 10
    assert counts[5] > 10
    assert len(set(counts)) == 4
    assert all(len(p) == counts[-1] for p in training.params.values())
    assert np.isfinite(losses).all()


def test_densification_pays():
    """With gsplat's strategy ten Gaussians grow to what the picture needs and come closer to it
    than without."""
    final = {}
    for grow in (False, True):
        until = 100 if grow else 0
        training, target = few_for_many(
            rate=0.02, refine_every=20, refine_stop_iter=until, absgrad=True
        )
        counts, losses = training.run(target, 200, 'cpu', absgrad=True)
        final[grow] = losses[-1]
        assert counts[-1] > 40 if grow else counts[-1] == 10
    assert final[True] < 0.7 * final[False], final


def test_absgrad_has_a_limit_and_says_so():
    with pytest.raises(InputError, match='absgrad.*4 channels'):
        rasterize(*make(D=5, N=3).arguments(), absgrad=True)
