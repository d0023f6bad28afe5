"""On a machine with a CUDA GPU: gsplat's kernels, called by us, draw what our CPU rasterizer draws,
and hand back the same gradients.

The judge of who may differ where is gsplat's reference in float64: a pixel on a cut (alpha near
1/255 or the clamp, T near 1e-4) may be decided either way and does not count. Values agree to 1e-4,
gradients to 1e-3: the CUDA kernel has a faster exponential and rebuilds T.
"""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip('needs a CUDA GPU', allow_module_level=True)
from conftest import ROOT
from gsplat_reference import reference
from scenes import KINDS, make

from spatialavatar0.splats.renderers import gsplat_max_alpha, rasterize

pytestmark = pytest.mark.cuda
MODES = ('RGB', 'D', 'ED', 'RGB+D', 'RGB+ED')


@dataclass
class Drawn:
    "What one renderer made, on the CPU in float64; `meta` stays as it is."

    colors: Tensor
    alphas: Tensor
    grads: dict
    meta: dict


def counted(scene):
    "(C,H,W,1) pixels that are not on a cut."
    margin = reference(*scene.to(torch.float64).arguments())[3]
    keep = (margin > 1e-3)[..., None]
    assert keep.double().mean() > 0.98
    return keep


def on_cpu(x):
    return torch.zeros(()) if x is None else x.detach().cpu().double()


def run(scene, backend, keep, **options):
    "Pictures, and the gradients of a random weighting of the pixels in keep."
    leaves = scene.leaves()
    options = dict(options, backgrounds=leaves.backgrounds, backend=backend)
    colors, alphas, meta = rasterize(*leaves.arguments(), **options)
    meta['means2d'].retain_grad()
    generator = torch.Generator().manual_seed(0)
    loss = 0
    for picture in (colors, alphas):
        weights = (torch.randn(picture.shape, generator=generator) * keep).to(picture)
        loss = loss + (picture * weights).sum()
    loss.backward()
    grads = {name: on_cpu(x.grad) for name, x in leaves.tensors().items()}
    return Drawn(on_cpu(colors), on_cpu(alphas), grads, meta)


def pair(kind, seed, C=1, D=3, **options):
    "The same scene on the GPU and on the CPU, and the pixels that count."
    scene = make(kind, seed, C=C, D=D)
    keep = counted(scene)
    there = run(scene.to('cuda'), 'gsplat', keep, **options)
    here = run(scene, 'cpu', keep, max_alpha=gsplat_max_alpha(), **options)
    return there, here, keep


def same_pictures(there, here, keep, tol=1e-4):
    for ours, truth in ((there.colors, here.colors), (there.alphas, here.alphas)):
        assert ours.shape == truth.shape
        error = ((ours - truth).abs() * keep).max()
        assert error <= tol * truth.abs().max().clamp(min=1)


def same_gradients(there, here):
    for name, truth in here.grads.items():
        error = (there.grads[name] - truth).norm()
        assert error <= 1e-3 * truth.norm() + 1e-6, f'{name}: {error / truth.norm():.1e}'


@pytest.mark.parametrize('kind', KINDS)
def test_pictures_and_gradients(kind):
    there, here, keep = pair(kind, 1, render_mode='RGB+D')
    same_pictures(there, here, keep)
    same_gradients(there, here)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('D', (1, 3, 9))
def test_modes_channels_cameras(mode, D):
    there, here, keep = pair('plain', 2, C=2, D=D, render_mode=mode)
    if 'ED' in mode:
        keep = keep & (here.alphas > 0.05)  # a depth divided by almost nothing
        same_pictures(there, here, keep, 2e-4)
    else:
        same_pictures(there, here, keep)
        same_gradients(there, here)


def same_radii(theirs, ours):
    "What is drawn, and its size; the drawn of ours (C,N)."
    seen = (ours > 0).all(-1)
    on_gpu = (theirs > 0).all(-1).cpu()
    assert (seen & ~on_gpu).sum() == 0
    # gsplat keeps what misses the picture by less than a pixel
    assert (seen != on_gpu).double().mean() <= 0.05
    assert ((theirs.cpu() - ours)[seen].abs() <= 1).all()
    return seen


@pytest.mark.parametrize('kind', ('plain', 'near', 'crowded'))
def test_meta_and_absgrad(kind):
    there, here, _ = pair(kind, 3, C=2, absgrad=True)
    theirs, ours = there.meta, here.meta
    seen = same_radii(theirs['radii'], ours['radii'])
    for name in ('means2d', 'depths', 'conics'):
        value, truth = [m[name].detach().cpu()[seen] for m in (theirs, ours)]
        assert torch.allclose(value, truth, rtol=1e-3, atol=1e-3), name
    for name in ('grad', 'absgrad'):
        value, truth = [getattr(m['means2d'], name).cpu() for m in (theirs, ours)]
        assert (value - truth).norm() <= 1e-3 * truth.norm(), name


def test_automatic_backend_is_gsplat():
    arguments = make().to('cuda').arguments()
    automatic, by_name = rasterize(*arguments), rasterize(*arguments, backend='gsplat')
    assert torch.equal(automatic.colors, by_name.colors)


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


def step_ms(backend, device, wait):
    "Milliseconds of a picture of size M with its gradients."
    from common import scene

    medium = scene('M').to(device)
    leaves = [x.requires_grad_() for x in medium.gaussians()]

    def draw():
        return rasterize(*leaves, *medium.camera(), backend=backend).colors

    return milliseconds(draw, leaves, wait)


def test_speed(monkeypatch):
    "10,000 Gaussians on 256 x 256: the GPU is faster, and this prints by how much (pytest -s)."
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    gpu_ms = step_ms('gsplat', 'cuda', torch.cuda.synchronize)
    cpu_ms = step_ms('cpu', 'cpu', lambda: None)
    print(f'\nM, forward and backward: gsplat {gpu_ms:.2f} ms, cpu {cpu_ms:.2f} ms, ', end='')
    print(f'{cpu_ms / gpu_ms:.1f} times')
    assert gpu_ms < cpu_ms
