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
        return dict(
            means=self.means,
            quats=self.quats,
            scales=self.scales,
            opacities=self.opacities,
            colors=self.colors,
            backgrounds=self.backgrounds,
        )

    def gaussians(self):
        "The first five arguments of `rasterize`."
        return self.means, self.quats, self.scales, self.opacities, self.colors

    def camera(self):
        "The next four."
        return self.viewmats, self.Ks, self.width, self.height

    def arguments(self):
        "All nine that have no default."
        return *self.gaussians(), *self.camera()

    def to(self, *where):
        "In another float type or on another device."
        tensors = *self.tensors().values(), self.viewmats, self.Ks
        return Scene(*[x.to(*where) for x in tensors], self.width, self.height)

    def leaves(self, *where):
        "A copy, its tensors ready for gradients."
        scene = self.to(*where)
        for name, x in scene.tensors().items():
            setattr(scene, name, x.detach().clone().requires_grad_())
        return scene


def turn_about_y(angle, dtype=torch.float32):
    "A rotation (3,3) about the axis that points down."
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=dtype)


def off_centre_K(count, dtype=torch.float32):
    "Two focal lengths, and a principal point off the middle: (count,3,3)."
    K = [[70.0, 0, W / 2 + 1.5], [0, 75.0, H / 2 - 2], [0, 0, 1]]
    return torch.tensor(K, dtype=dtype).repeat(count, 1, 1)


def cameras(count, generator):
    "Cameras 4 m from the origin, each turned and shifted a little."
    viewmats = torch.eye(4).repeat(count, 1, 1)
    viewmats[:, 2, 3] = 4
    viewmats[:, 0, 3] = torch.rand(count, generator=generator) - 0.5
    angles = (torch.rand(count, generator=generator) - 0.5).tolist()
    for viewmat, angle in zip(viewmats, angles):
        viewmat[:3, :3] = turn_about_y(angle)
    return viewmats, off_centre_K(count)


def make(kind='plain', seed=0, N=150, C=1, D=3):
    "A fresh scene in float32; `.to(torch.float64)` gives the same numbers to a float64 renderer."
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    means = normal(N, 3) * torch.tensor([1.0, 0.8, 0.6])
    quats = normal(N, 4) * 2
    log_scales = normal(N, 3) * 0.5 - 2
    opacities = uniform(N) * 0.95 + 0.04
    if kind == 'near':
        means[:, 2] -= 3.0
    if kind == 'behind':
        means[:, 2] -= 3.5
    if kind == 'huge':
        log_scales[::10] += 3
    if kind == 'needle':
        log_scales += torch.tensor([2.0, -2, -2]) * (uniform(N, 1) < 0.5)
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
    views = cameras(C, generator)
    colors, backgrounds = uniform(N, D), uniform(C, D)
    return Scene(means, quats, log_scales.exp(), opacities, colors, backgrounds, *views)
