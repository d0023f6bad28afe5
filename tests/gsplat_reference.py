"""gsplat's own reference renderer, `gsplat.rendering._rasterization`, on the CPU.

It is written in PyTorch and differentiated by autograd, so it judges us with somebody else's code; but four small pieces of it live in
CUDA or in a package that needs CUDA. `on_cpu` puts stand-ins in their places and takes them away again:

| piece                                   | why it cannot run here | stand-in                                             |
|-----------------------------------------|------------------------|------------------------------------------------------|
| gsplat.rendering.isect_tiles            | CUDA kernel            | gsplat's own twin `_isect_tiles`                     |
| gsplat.rendering.isect_offset_encode    | CUDA kernel            | gsplat's own twin `_isect_offset_encode`             |
| nerfacc.render_weight_from_alpha, .accumulate_along_rays | CUDA package | six lines of PyTorch                          |
| gsplat.cuda._wrapper.rasterize_to_indices_in_range | CUDA kernel | `visible_pairs`: which splat is drawn in which pixel |

Only the last decides anything (the cuts at 1/255 and 1e-4); projection, tiles, weights, colours and every gradient are gsplat's."""

import contextlib
import sys
import types
from unittest import mock

import pytest
import torch

gsplat = pytest.importorskip('gsplat')
from gsplat import rendering
from gsplat.cuda import _torch_impl as twins
from gsplat.cuda import _wrapper

MAX_ALPHA = 0.999
MIN_ALPHA = 1 / 255
MIN_T = 1e-4

# --- stand-ins


def isect_tiles(means2d, radii, depths, tile_size, tile_width, tile_height, **unused):
    """gsplat's twin knows fewer options than its kernel; the reference path passes only their
    defaults."""
    return twins._isect_tiles(means2d, radii, depths, tile_size, tile_width, tile_height)


def render_weight_from_alpha(alphas, ray_indices, n_rays):
    """Weight of every sample: its alpha times the light that the samples before it on the same ray
    let through (samples sorted by ray)."""
    left = torch.log1p(-alphas.double())
    before = left.cumsum(0) - left  # of all rays in a row ...
    first = torch.searchsorted(
        ray_indices, ray_indices
    )  # ... so take off what was there at the first sample of the own ray
    T = (before - before[first]).exp().to(alphas)
    return alphas * T, T


def accumulate_along_rays(weights, values, ray_indices, n_rays):
    "Sum of weights (or of weighted values) per ray."
    x = weights[:, None] if values is None else weights[:, None] * values
    return x.new_zeros(n_rays, x.shape[1]).index_add(0, ray_indices, x)


def tile_pixels(ty, tx, size, width, height):
    "Pixel indices and centres of one tile, the part inside the picture."
    y, x = torch.meshgrid(
        torch.arange(ty * size, min((ty + 1) * size, height)),
        torch.arange(tx * size, min((tx + 1) * size, width)),
        indexing='ij',
    )
    return (y * width + x).reshape(-1), torch.stack([x, y], -1).reshape(-1, 2) + 0.5


def splat_alphas(centres, means2d, conics, opacities):
    """Uncut alpha of every splat in every pixel (P,n), and whether its exponent is sane (sigma >=
    0)."""
    dx, dy = (centres[:, None].to(means2d) - means2d).unbind(-1)
    sigma = 0.5 * (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) + conics[:, 1] * dx * dy
    return opacities * torch.exp(-sigma), sigma >= 0


def cut_margin(alphas, after, alive):
    """How far, relatively, the nearest decision of each pixel is from going the other way: at
    1/255, at T = 1e-4, and at the clamp."""
    d = torch.stack(
        [(alphas / MIN_ALPHA - 1).abs(), (after / MIN_T - 1).abs(), (alphas / MAX_ALPHA - 1).abs()]
    )
    return torch.where(alive, d, torch.inf).amin((0, 2))


@torch.no_grad()
def visible_pairs(
    start, stop, T, means2d, conics, opacities, width, height, size, offsets, ids, margin=None
):
    """(splat, pixel, image) of everything drawn, sorted by pixel, near to far: alpha >= 1/255, and a pixel stops before the splat that
    would leave it at most 1e-4 of its light. `start` and `stop` count batches of size^2 splats of a tile, as in the CUDA kernel."""
    offsets = offsets.reshape(-1, *offsets.shape[-2:])
    images, rows, cols = offsets.shape
    ends = torch.cat([offsets.reshape(-1)[1:], torch.tensor([len(ids)])]).reshape(offsets.shape)
    N = means2d.shape[-2]
    found = [torch.empty(3, 0, dtype=torch.long)]
    flat = means2d.reshape(-1, 2), conics.reshape(-1, 3), opacities.reshape(-1)
    for i, ty, tx in torch.cartesian_prod(
        torch.arange(images), torch.arange(rows), torch.arange(cols)
    ).tolist():
        lo, hi = [int(x[i, ty, tx]) for x in (offsets, ends)]
        g = ids[lo + start * size**2 : min(hi, lo + stop * size**2)].long()
        pixels, centres = tile_pixels(ty, tx, size, width, height)
        full, sane = splat_alphas(centres, *[x[g] for x in flat])
        alphas = torch.where(sane & (full >= MIN_ALPHA), full.clamp(max=MAX_ALPHA), 0.0)
        light = T.reshape(images, -1)[i, pixels, None]
        after = light * torch.cumprod(1 - alphas, 1)
        if margin is not None and len(g):
            alive = torch.cat([light, after[:, :-1]], 1) > MIN_T * 0.9
            margin.view(images, -1)[i, pixels] = torch.minimum(
                margin.view(images, -1)[i, pixels], cut_margin(full, after, alive)
            )
        p, k = ((alphas > 0) & (after > MIN_T)).nonzero(as_tuple=True)
        found.append(torch.stack([g[k] - i * N, pixels[p], torch.full_like(p, i)]))
    splats, pixels, image = torch.cat(found, 1)
    order = torch.argsort(image * height * width + pixels, stable=True)
    return splats[order], pixels[order], image[order]


# --- the reference


@contextlib.contextmanager
def on_cpu(margin=None):
    """gsplat's `_rasterization`, able to run here as long as the context lasts; nothing stays
    changed. `margin` (C,H,W) is filled if given."""
    nerfacc = types.ModuleType('nerfacc')
    nerfacc.render_weight_from_alpha = render_weight_from_alpha
    nerfacc.accumulate_along_rays = accumulate_along_rays

    def pairs(*args):
        return visible_pairs(*args, margin=margin)

    with (
        mock.patch.dict(sys.modules, nerfacc=nerfacc),
        mock.patch.object(rendering, 'isect_tiles', isect_tiles),
        mock.patch.object(rendering, 'isect_offset_encode', twins._isect_offset_encode),
        mock.patch.object(_wrapper, 'rasterize_to_indices_in_range', pairs),
    ):
        yield rendering._rasterization


def reference(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **kw):
    """colors (C,H,W,X), alphas (C,H,W,1), meta of gsplat's reference, and how near each pixel
    (C,H,W) is to a cut."""
    margin = means.new_full((len(viewmats), height, width), torch.inf)
    with on_cpu(margin) as rasterization:
        return *rasterization(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, **kw
        ), margin
