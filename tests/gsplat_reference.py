"""gsplat's own reference renderer, `gsplat.rendering._rasterization`, on the CPU.

It is written in PyTorch and differentiated by autograd, so it judges us with somebody else's code;
but four small pieces of it live in CUDA or in a package that needs CUDA. `on_cpu` puts stand-ins in
their places and takes them away again:

| piece | why it cannot run here | stand-in |
|---|---|---|
| rendering.isect_tiles | CUDA kernel | gsplat's own twin `_isect_tiles` |
| rendering.isect_offset_encode | CUDA kernel | gsplat's own twin `_isect_offset_encode` |
| nerfacc, two functions | CUDA package | six lines of PyTorch |
| cuda._wrapper.rasterize_to_indices_in_range | CUDA kernel | `visible_pairs`: what is drawn where |

Only the last decides anything (the cuts at 1/255 and 1e-4); projection, tiles, weights, colours and
every gradient are gsplat's.
"""

import contextlib
import sys
import types
from unittest import mock

import pytest
import torch

gsplat = pytest.importorskip('gsplat')
rendering = pytest.importorskip('gsplat.rendering')
twins = pytest.importorskip('gsplat.cuda._torch_impl')
_wrapper = pytest.importorskip('gsplat.cuda._wrapper')

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
    first = torch.searchsorted(ray_indices, ray_indices)
    T = (before - before[first]).exp().to(alphas)  # ... without those before the own ray
    return alphas * T, T


def accumulate_along_rays(weights, values, ray_indices, n_rays):
    "Sum of weights (or of weighted values) per ray."
    weighted = weights[:, None] if values is None else weights[:, None] * values
    return weighted.new_zeros(n_rays, weighted.shape[1]).index_add(0, ray_indices, weighted)


def tile_pixels(row, column, size, width, height):
    "Pixel indices and centres of one tile, the part inside the picture."
    y, x = torch.meshgrid(
        torch.arange(row * size, min((row + 1) * size, height)),
        torch.arange(column * size, min((column + 1) * size, width)),
        indexing='ij',
    )
    centres = torch.stack([x, y], -1).reshape(-1, 2) + 0.5
    return (y * width + x).reshape(-1), centres


def splat_alphas(centres, means2d, conics, opacities):
    """Uncut alpha of every splat in every pixel (P,n), and whether its exponent is sane (sigma >=
    0)."""
    dx, dy = (centres[:, None].to(means2d) - means2d).unbind(-1)
    xx, xy, yy = conics.unbind(-1)
    sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    return opacities * torch.exp(-sigma), sigma >= 0


def cut_margin(alphas, after, alive):
    """How far, relatively, the nearest decision of each pixel is from going the other way: at
    1/255, at T = 1e-4, and at the clamp."""
    limits = (alphas, MIN_ALPHA), (after, MIN_T), (alphas, MAX_ALPHA)
    distances = torch.stack([(value / limit - 1).abs() for value, limit in limits])
    return torch.where(alive, distances, torch.inf).amin((0, 2))


def drawn_in_tile(splats, pixels, centres, light, margin):
    """Which pixels draw which splats: alpha >= 1/255, and a pixel stops before the splat that would
    leave it at most 1e-4 of its light. `margin` (pixels of the image,) is lowered, if given."""
    full, sane = splat_alphas(centres, *splats)
    alphas = torch.where(sane & (full >= MIN_ALPHA), full.clamp(max=MAX_ALPHA), 0.0)
    after = light * torch.cumprod(1 - alphas, 1)
    if margin is not None and full.shape[1]:
        alive = torch.cat([light, after[:, :-1]], 1) > MIN_T * 0.9
        margin[pixels] = torch.minimum(margin[pixels], cut_margin(full, after, alive))
    return ((alphas > 0) & (after > MIN_T)).nonzero(as_tuple=True)


@torch.no_grad()
def visible_pairs(
    start, stop, T, means2d, conics, opacities, width, height, size, offsets, ids, margin=None
):
    """(splat, pixel, image) of everything drawn, sorted by pixel, near to far. `start` and `stop`
    count batches of size^2 splats of a tile, as in the CUDA kernel."""
    offsets = offsets.reshape(-1, *offsets.shape[-2:])
    images = len(offsets)
    starts = offsets.reshape(-1).tolist()
    ends = [*starts[1:], len(ids)]
    flat = means2d.reshape(-1, 2), conics.reshape(-1, 3), opacities.reshape(-1)
    tiles = torch.cartesian_prod(*[torch.arange(n) for n in offsets.shape]).tolist()
    found = [torch.empty(3, 0, dtype=torch.long)]
    for (image, row, column), lo, hi in zip(tiles, starts, ends):
        listed = ids[lo + start * size**2 : min(hi, lo + stop * size**2)].long()
        pixels, centres = tile_pixels(row, column, size, width, height)
        splats = [x[listed] for x in flat]
        light = T.reshape(images, -1)[image, pixels, None]
        of_image = None if margin is None else margin.view(images, -1)[image]
        pixel, place = drawn_in_tile(splats, pixels, centres, light, of_image)
        of_one = listed[place] - image * means2d.shape[-2]
        found.append(torch.stack([of_one, pixels[pixel], torch.full_like(pixel, image)]))
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


def reference(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
    """colors (C,H,W,X), alphas (C,H,W,1), meta of gsplat's reference, and how near each pixel
    (C,H,W) is to a cut."""
    margin = means.new_full((len(viewmats), height, width), torch.inf)
    scene = means, quats, scales, opacities, colors, viewmats, Ks, width, height
    with on_cpu(margin) as rasterization:
        return *rasterization(*scene, **options), margin
