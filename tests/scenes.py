"""Small random scenes for tests of the rasterizer: every kind of trouble, on an odd picture with an
off-centre camera."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

W, H = 61, 45
KINDS = (
    'plain',
    'near',
    'behind',
    'huge',
    'needle',
    'transparent',
    'opaque',
    'offscreen',
    'tiny',
    'crowded',
)


@dataclass
class Scene:
    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    backgrounds: Tensor
    viewmats: Tensor
    Ks: Tensor
    width: int = W
    height: int = H

    def tensors(self):
        "What has gradients, by name."
        return {
            k: getattr(self, k)
            for k in ('means', 'quats', 'scales', 'opacities', 'colors', 'backgrounds')
        }

    def to(self, *a):
        "In another float type or on another device."
        return Scene(
            *[t.to(*a) for t in (*self.tensors().values(), self.viewmats, self.Ks)],
            self.width,
            self.height,
        )


def cameras(C, g):
    """Cameras 4 m from the origin, each turned and shifted a little; different focal lengths,
    principal point off the middle."""
    V = torch.eye(4).repeat(C, 1, 1)
    V[:, 2, 3] = 4
    V[:, 0, 3] = torch.rand(C, generator=g) - 0.5
    for v, a in zip(V, (torch.rand(C, generator=g) - 0.5).tolist()):
        v[:3, :3] = torch.tensor(
            [[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]
        )
    return V, torch.tensor([[70.0, 0, W / 2 + 1.5], [0, 75.0, H / 2 - 2], [0, 0, 1]]).repeat(
        C, 1, 1
    )


def make(kind='plain', seed=0, N=150, C=1, D=3):
    "A fresh scene in float32; `.to(torch.float64)` gives the same numbers to a float64 renderer."
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.randn(*s, generator=g)

    def u(*s):
        return torch.rand(*s, generator=g)

    means = r(N, 3) * torch.tensor([1.0, 0.8, 0.6])
    quats = r(N, 4) * 2
    log_scales = r(N, 3) * 0.5 - 2
    opacities = u(N) * 0.95 + 0.04
    if kind == 'near':
        means[:, 2] -= 3.0
    if kind == 'behind':
        means[:, 2] -= 3.5
    if kind == 'huge':
        log_scales[::10] += 3
    if kind == 'needle':
        log_scales += torch.tensor([2.0, -2, -2]) * (u(N, 1) < 0.5)
    if kind == 'transparent':
        opacities *= 0.02
    if kind == 'opaque':
        opacities = 0.9 + 0.08 * opacities
        log_scales = log_scales + 0.7
    if kind == 'offscreen':
        means[:, 0] += 2.0
    if kind == 'tiny':
        log_scales -= 4
    if kind == 'crowded':
        means *= 0.15
    V, K = cameras(C, g)
    return Scene(means, quats, log_scales.exp(), opacities, u(N, D), u(C, D), V, K)
