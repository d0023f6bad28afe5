"""Projection and opening, eight Gaussians at a time: groups that are not full, masks, threads, the
aspect ratios of the same pass, all against the readable forms in float64."""

import math

import numba as nb
import pytest
import torch

from spatialavatar0.avatar.avatar import open_splats
from spatialavatar0.ground.geometry import intrinsics, look_at, sh0_to_rgb
from spatialavatar0.splats import kernels
from spatialavatar0.splats.binding import TriangleFrames, place
from spatialavatar0.splats.kernels import (
    LongSplats,
    ScreenSplats,
    fast_log_aspects,
    fast_open,
    project_splats,
    whiteners_to_conics,
)
from spatialavatar0.splats.projection import covs_to_conics, log_aspects, project_gaussians

LENGTHS = (0, 1, 7, 8, 9, 4097)
SIZE = 128, 96
K = intrinsics(300.0, *SIZE)
VIEWS = torch.stack([look_at((0.1, 0.05, 0.5), (0, 0, 0)), look_at((-0.3, 0, 0.2), (0, 0.1, 0))])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cloud(n, seed=0, needles=True):
    """Means, quats, scales and opacities of n Gaussians around the origin; some are behind the
    cameras or beside the picture, some too faint, some needles."""
    g = seeded(seed)
    means = 0.25 * torch.randn(n, 3, generator=g)
    quats = 2 * torch.randn(n, 4, generator=g)
    scales = 0.01 * torch.rand(n, 3, generator=g) + 0.001
    scales[::11, 0] *= 20 if needles else 1
    opacities = torch.rand(n, generator=g)
    opacities[::13] = 0.003
    return means, quats, scales, opacities


def alike(found, true, eps):
    for one, other in zip(found, true, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= eps * other.norm() + 1e-12


def leaves_of(tensors, dtype=torch.float32):
    return [x.detach().to(dtype).clone().requires_grad_() for x in tensors]


def projected(gaussians, views=VIEWS, **options):
    *shape, opacities = gaussians
    Ks = K.expand(len(views), 3, 3)
    return project_splats(*shape, opacities, views, Ks, *SIZE, **options)


def everything(gaussians, aspects=True):
    "All that the projection gives, and gradients of a random weighting of it."
    g = seeded(3)
    leaves = leaves_of(gaussians[:3])
    found = projected((*leaves, gaussians[3]), aspects=aspects)
    asked = [*found[:3], *found[5:]]
    torch.autograd.backward(asked, [torch.randn(x.shape, generator=g) for x in asked])
    return [x.detach() for x in found] + [x.grad for x in leaves]


@pytest.mark.parametrize('n', LENGTHS)
def test_projection_against_float64(n):
    gaussians = cloud(n)
    screen = projected(gaussians)
    assert isinstance(screen, ScreenSplats)
    exact = [x.double() for x in gaussians[:3]]
    for c, view in enumerate(VIEWS):
        flat = project_gaussians(*exact, view.double(), K.double(), *SIZE)
        drawn = screen.reach[c] >= 0
        alike([screen.depths[c]], [flat.depths], 1e-6)
        centres = screen.means2d[c][drawn], flat.means2d[drawn].float()
        assert torch.allclose(*centres, rtol=1e-6, atol=1e-4)
        conics = whiteners_to_conics(screen.white[c][drawn])
        alike([conics], [covs_to_conics(flat.covs2d)[drawn]], 1e-5)
        for field in (screen.means2d, screen.white, screen.extents):
            assert not field[c][~drawn].any()


def test_who_is_drawn():
    "Reach and box by hand, for all four ways of not being drawn."
    gaussians = cloud(4097)
    screen = projected(gaussians, VIEWS[:1])
    exact = [x.double() for x in gaussians[:3]]
    flat = project_gaussians(*exact, VIEWS[0].double(), K.double(), *SIZE)
    reach = (255 * gaussians[3].double()).log()
    width, height = (2 * reach * flat.covs2d.diagonal(dim1=1, dim2=2).T).clamp_min(0).sqrt()
    x, y = flat.means2d.T
    inside = (x + width > 0) & (x - width < SIZE[0]) & (y + height > 0) & (y - height < SIZE[1])
    conditions = flat.depths >= 0.01, reach >= 0, inside
    drawn = torch.stack(conditions).all(0)
    assert torch.equal(screen.reach[0] >= 0, drawn)
    assert all(not x.all() for x in conditions)
    alike([screen.reach[0][drawn]], [reach[drawn]], 1e-6)
    alike([screen.extents[0][drawn]], [torch.stack([width, height], 1)[drawn]], 1e-5)
    nearest = float(flat.depths[drawn].quantile(0.5))
    fewer = projected(gaussians, VIEWS[:1], far_plane=nearest)
    assert torch.equal(fewer.reach[0] >= 0, drawn & (flat.depths <= nearest))


@pytest.mark.parametrize('n', LENGTHS)
def test_aspects_come_with_the_projection(n):
    "The five fields do not change by a bit; the sixth is Eq. 4."
    gaussians = cloud(n)
    short, long = projected(gaussians), projected(gaussians, aspects=True)
    assert isinstance(long, LongSplats)
    assert all(torch.equal(one, other) for one, other in zip(short, long))
    exact = [x.double() for x in gaussians[:3]]
    for c, view in enumerate(VIEWS):
        true = log_aspects(*exact, view.double(), K.double(), *SIZE).float()
        assert torch.allclose(long.log_aspects[c], true, atol=1e-4)
        alone = fast_log_aspects(*gaussians[:3], view, K, *SIZE)
        assert torch.equal(alone, long.log_aspects[c])


def losses(found, weights):
    "Two losses: where splats are drawn, and how much too long they are."
    where = (found.means2d * weights).sum() + found.depths[found.reach >= 0].sum()
    return where, (found.log_aspects - 1).relu().sum()


def losses_in_float64(leaves, reach, weights):
    drawn, where, long = reach >= 0, 0.0, 0.0
    for c, view in enumerate(VIEWS.double()):
        flat = project_gaussians(*leaves, view, K.double(), *SIZE)
        places = torch.where(drawn[c][:, None], flat.means2d, 0.0)
        where += (places * weights[c]).sum() + flat.depths[drawn[c]].sum()
        long += (log_aspects(*leaves, view, K.double(), *SIZE) - 1).relu().sum()
    return where, long


@pytest.mark.parametrize('needles,eps', ((False, 1e-5), (True, 3e-4)))
@pytest.mark.parametrize('n', LENGTHS)
def test_gradients_of_both_losses_in_one_pass(n, needles, eps):
    gaussians = cloud(n, needles=needles)
    weights = torch.randn(2, n, 2, generator=seeded(1))
    leaves, judge = leaves_of(gaussians[:3]), leaves_of(gaussians[:3], torch.float64)
    found = projected((*leaves, gaussians[3]), aspects=True)
    sum(losses(found, weights)).backward()
    sum(losses_in_float64(judge, found.reach, weights)).backward()
    alike([x.grad for x in leaves], [x.grad for x in judge], eps)


def test_each_loss_alone():
    "What only one of them asks for is the readable form's, too; the sum is the sum."
    gaussians = cloud(300, needles=False)
    weights = torch.randn(2, 300, 2, generator=seeded(1))
    alone = []
    for k in range(2):
        leaves, judge = leaves_of(gaussians[:3]), leaves_of(gaussians[:3], torch.float64)
        found = projected((*leaves, gaussians[3]), aspects=True)
        losses(found, weights)[k].backward()
        losses_in_float64(judge, found.reach, weights)[k].backward()
        exact = [torch.zeros_like(x) if x.grad is None else x.grad for x in judge]
        alike([x.grad for x in leaves], exact, 1e-5)
        alone.append([x.grad for x in leaves])
    leaves = leaves_of(gaussians[:3])
    sum(losses(projected((*leaves, gaussians[3]), aspects=True), weights)).backward()
    alike([x.grad for x in leaves], [a + b for a, b in zip(*alone)], 1e-6)


def test_nobody_behind_the_camera_pulls():
    "Gradients of what is not drawn are left out, whatever it asks; nothing becomes nan."
    gaussians = list(cloud(64))
    gaussians[0][:, 2] = 2.0  # behind the first camera
    gaussians[0][5] = VIEWS[0].inverse()[:3, 3]  # and one inside of it
    leaves = leaves_of(gaussians[:3])
    found = projected((*leaves, gaussians[3]), VIEWS[:1], aspects=True)
    assert (found.reach == -1).all()
    assert (found.log_aspects == -1).all()
    asked = [found.means2d, found.depths, found.white, found.log_aspects]
    torch.autograd.backward(asked, [torch.full_like(x, float('inf')) for x in asked])
    assert not any(x.grad.any() for x in leaves)


@pytest.mark.skipif(nb.config.NUMBA_NUM_THREADS < 2, reason='needs two threads')
@pytest.mark.parametrize('n', (9, 4097))
def test_threads_do_not_change_a_bit(n):
    found, before = [], nb.get_num_threads()
    try:
        for count in (1, 2, 2, 1):
            nb.set_num_threads(count)
            found.append(everything(cloud(n)) + opened(fast_open, n, torch.float32))
    finally:
        nb.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again))


def test_a_group_does_not_matter():
    "A Gaussian has the same bits whatever its neighbours and its lane."
    gaussians = cloud(41)
    whole = everything(gaussians)
    found = projected([x[3:30] for x in gaussians], aspects=True)
    for one, other in zip(found, whole):
        assert torch.equal(one, other[:, 3:30])


def test_a_nan_stays_with_its_own():
    gaussians = cloud(40)
    whole = projected(gaussians, aspects=True)
    for k, row in enumerate((3, 12, 21, 30)):
        gaussians[k][row] = float('nan')
    hurt = projected(gaussians, aspects=True)
    rest = torch.ones(40, dtype=torch.bool)
    rest[[3, 12, 21, 30]] = False
    for one, other in zip(hurt, whole):
        assert torch.equal(one[:, rest], other[:, rest])
    assert (hurt.reach[:, ~rest] == -1).all()
    assert hurt.log_aspects[:, [12, 21]].isnan().all()


def raw(n, dtype=torch.float32):
    "Raw attributes of n Gaussians, a third of their colours below 0, and frames."
    g = seeded(n)
    splats = dict(
        offsets=0.5 * torch.randn(n, 3, generator=g),
        quats=2 * torch.randn(n, 4, generator=g),
        log_scales=3 * torch.randn(n, 3, generator=g) - 6,
        logit_opacities=4 * torch.randn(n, generator=g),
        sh0=3 * torch.randn(n, 3, generator=g),
    )
    points, quats = torch.randn(n, 3, generator=g), torch.randn(n, 4, generator=g)
    sizes = torch.rand(n, generator=g) + 0.1
    frames = points, torch.nn.functional.normalize(quats, dim=-1), sizes
    made = {k: x.to(dtype).requires_grad_() for k, x in splats.items()}
    return made, TriangleFrames(*[x.to(dtype).requires_grad_() for x in frames])


def readable(splats, frames):
    "What `open_splats` does, in the lessons' words."
    colors = sh0_to_rgb(splats['sh0']).clamp_min(0)
    return (*place(splats, frames), splats['logit_opacities'].sigmoid(), colors)


def opened(form, n, dtype):
    "Results of a form of opening, and gradients of the splats and of the frames."
    g = seeded(7)
    splats, frames = raw(n, dtype)
    out = form(splats, frames)
    torch.autograd.backward(out, [torch.randn(x.shape, generator=g).to(dtype) for x in out])
    leaves = [*splats.values(), frames.points, frames.quats, frames.scales]
    return [x.detach() for x in out] + [x.grad for x in leaves]


@pytest.mark.parametrize('n', LENGTHS)
def test_opening_against_float64(n):
    fast, true = opened(fast_open, n, torch.float32), opened(readable, n, torch.float64)
    alike(fast[:5], true[:5], 1e-6)
    alike(fast[5:], true[5:], 1e-5)
    if n > 100:
        assert 0.2 < (fast[4] == 0).float().mean() < 0.6
        assert torch.equal(fast[4] == 0, true[4] == 0)
        assert not fast[9][fast[4] == 0].any()


def test_opening_in_float32():
    "Beside the form of before: each entry, and where nothing is asked of the frames."
    for one, other in zip(*[opened(form, 500, torch.float32) for form in (fast_open, readable)]):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_frozen_frames_cost_nothing(monkeypatch):
    monkeypatch.setattr(kernels, 'place_backward_frames', None)  # nobody asks for it
    splats, frames = raw(20)
    frozen = TriangleFrames(*[x.detach() for x in (frames.points, frames.quats, frames.scales)])
    sum(x.sum() for x in open_splats(splats, frozen)).backward()
    assert all(x.grad.any() for x in splats.values())


def test_extreme_attributes():
    "The ends of what a file of an avatar may hold."
    splats, frames = raw(8)
    logits = torch.tensor([-1e3, -90, -80, 0, 20, 90, 1e3, float('nan')])
    logs = torch.linspace(-50, 9, 8)[:, None].expand(8, 3)
    sh0 = torch.tensor([-100, 100, -0.5 / 0.28, 0, 0, 0, 0, float('nan')])[:, None].expand(8, 3)
    changed = dict(logit_opacities=logits, log_scales=logs, sh0=sh0)
    splats |= {k: x.clone().requires_grad_() for k, x in changed.items()}
    with torch.no_grad():
        found, true = open_splats(splats, frames), readable(splats, frames)
    for one, other in zip(found, true):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)
    grads = torch.autograd.grad(open_splats(splats, frames).opacities[:7].sum(), [*splats.values()])
    assert all(x[:7].isfinite().all() for x in grads)


def test_who_takes_the_readable_way():
    splats, frames = raw(9)
    assert fast_open(splats, frames) is not None
    exact, exact_frames = raw(9, torch.float64)
    assert fast_open(exact, exact_frames) is None
    assert open_splats(exact, exact_frames).colors.dtype == torch.float64
    half = {**splats, 'sh0': splats['sh0'].half()}
    assert fast_open(half, frames) is None
    assert open_splats(half, frames).colors.dtype == torch.float16
    many = TriangleFrames(*[torch.stack([x, 2 * x]) for x in vars(frames).values()])
    assert fast_open(splats, many) is None
    assert open_splats(splats, many).means.shape == (2, 9, 3)


def test_a_disc_in_the_one_pass():
    "Radii 3:1 from the front."
    disc = [torch.tensor([row]) for row in ((0.0, 0, 0), (1.0, 0, 0, 0), (0.03, 0.01, 0.001))]
    view = look_at((0, 0, 2.0), (0, 0, 0))[None]
    found = projected((*disc, torch.ones(1)), view, aspects=True)
    assert abs(float(found.log_aspects) - math.log(3)) < 1e-3
