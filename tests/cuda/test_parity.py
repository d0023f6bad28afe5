"""On a machine with a CUDA GPU: gsplat's kernels, called by us, draw what our CPU rasterizer draws, and hand back the same gradients.

The judge of who may differ where is gsplat's reference in float64: a pixel on a cut (alpha near 1/255 or the clamp, T near 1e-4) may be
decided either way and does not count. Values agree to 1e-4, gradients to 1e-3: the CUDA kernel has a faster exponential and rebuilds T."""

import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip('needs a CUDA GPU', allow_module_level=True)
from conftest import ROOT
from gsplat_reference import reference
from scenes import KINDS, make

from spatialavatar0.splats.renderers import gsplat_max_alpha, rasterize

pytestmark = pytest.mark.cuda
MODES = ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED')


def call(s):
    return s.means, s.quats, s.scales, s.opacities, s.colors, s.viewmats, s.Ks, s.width, s.height


def counted(s):
    "(C,H,W,1) pixels that are not on a cut."
    margin = reference(*call(s.to(torch.float64)))[3]
    keep = (margin > 1e-3)[..., None]
    assert keep.double().mean() > 0.98
    return keep


def run(s, backend, keep, **kw):
    """Colors, alphas, gradients by name, and meta['means2d'] with its own gradients; everything on
    the CPU, float64."""
    x = s.tensors()
    g = torch.Generator().manual_seed(0)
    for t in x.values():
        t.requires_grad_()
    c, a, meta = rasterize(*call(s), backgrounds=s.backgrounds, backend=backend, **kw)
    meta['means2d'].retain_grad()
    weights = [(torch.randn(t.shape, generator=g) * keep).to(t) for t in (c, a)]
    ((c * weights[0]).sum() + (a * weights[1]).sum()).backward()

    def back(t):
        return torch.zeros(()) if t is None else t.detach().cpu().double()

    return back(c), back(a), {k: back(t.grad) for k, t in x.items()}, meta


def pair(kind, seed, C=1, D=3, **kw):
    "The same scene on the GPU and on the CPU."
    keep = counted(make(kind, seed, C=C, D=D))
    there = run(make(kind, seed, C=C, D=D).to('cuda'), 'gsplat', keep, **kw)
    return (
        there,
        run(make(kind, seed, C=C, D=D), 'cpu', keep, max_alpha=gsplat_max_alpha(), **kw),
        keep,
    )


def agree(there, here, keep):
    for a, b in zip(there[:2], here[:2]):
        assert a.shape == b.shape
        assert ((a - b).abs() * keep).max() <= 1e-4 * b.abs().max().clamp(min=1)
    for name, g in here[2].items():
        assert (there[2][name] - g).norm() <= 1e-3 * g.norm() + 1e-6, (
            f'{name}: {(there[2][name] - g).norm() / g.norm():.1e}'
        )


@pytest.mark.parametrize('kind', KINDS)
def test_pictures_and_gradients(kind):
    agree(*pair(kind, 1, render_mode='RGB+D'))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('D', (1, 3, 9))
def test_modes_channels_cameras(mode, D):
    there, here, keep = pair('plain', 2, C=2, D=D, render_mode=mode)
    if 'ED' in mode:
        keep = keep & (here[1] > 0.05)  # a depth divided by almost nothing
    for a, b in zip(there[:2], here[:2]):
        assert a.shape == b.shape
        assert ((a - b).abs() * keep).max() <= 2e-4 * b.abs().max().clamp(min=1)
    if 'ED' not in mode:
        agree(there, here, keep)


@pytest.mark.parametrize('kind', ('plain', 'near', 'crowded'))
def test_meta_and_absgrad(kind):
    there, here, _ = pair(kind, 3, C=2, absgrad=True)
    a, b = there[3], here[3]
    seen = (b['radii'] > 0).all(-1)
    on_gpu = (a['radii'] > 0).all(-1).cpu()
    assert (seen & ~on_gpu).sum() == 0
    assert (
        seen != on_gpu
    ).double().mean() <= 0.05  # gsplat keeps what misses the picture by less than a pixel
    assert ((a['radii'].cpu() - b['radii'])[seen].abs() <= 1).all()
    for k in ('means2d', 'depths', 'conics'):
        assert torch.allclose(
            a[k].detach().cpu()[seen], b[k].detach()[seen], rtol=1e-3, atol=1e-3
        ), k
    for x, y in (
        (a['means2d'].grad, b['means2d'].grad),
        (a['means2d'].absgrad, b['means2d'].absgrad),
    ):
        assert (x.cpu() - y).norm() <= 1e-3 * y.norm()


def test_automatic_backend_is_gsplat():
    s = make().to('cuda')
    assert torch.equal(rasterize(*call(s))[0], rasterize(*call(s), backend='gsplat')[0])


def milliseconds(draw, inputs, wait, repeats=10):
    "Forward and backward, the best of several."
    best = float('inf')
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        torch.autograd.grad(draw().square().mean(), inputs)
        wait()
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


def test_speed(monkeypatch):
    "10,000 Gaussians on 256 x 256: the GPU is faster, and this prints by how much (pytest -s)."
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    from common import scene

    ms = {}
    for backend, device, wait in (
        ('gsplat', 'cuda', torch.cuda.synchronize),
        ('cpu', 'cpu', lambda: None),
    ):
        s = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in scene('M').items()}
        x = [s[k].requires_grad_() for k in ('means', 'quats', 'scales', 'opacities', 'colors')]
        ms[backend] = milliseconds(
            lambda: rasterize(*x, s['viewmat'][None], s['K'][None], 256, 256, backend=backend)[0],
            x,
            wait,
        )
    print(
        f'\nM, forward and backward: gsplat {ms["gsplat"]:.2f} ms, cpu {ms["cpu"]:.2f} ms, '
        f'{ms["cpu"] / ms["gsplat"]:.1f} times'
    )
    assert ms['gsplat'] < ms['cpu']
