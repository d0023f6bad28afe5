"""PSNR and SSIM against scikit-image, the fused SSIM against autograd in float64, masks and bad
input."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from spatialavatar0.ground.core import InputError
from spatialavatar0.pictures.fast_metrics import ssim
from spatialavatar0.pictures.metrics import l1, psnr


def pair(*shape, seed=0, noise=0.1):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(*shape, generator=g)
    return a, (a + noise * torch.randn(a.shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize('shape', ((40, 33, 3), (17, 50), (2, 24, 31, 3), (30, 30, 1), (19, 12, 7)))
@pytest.mark.parametrize('padding', ('same', 'valid'))
def test_fused_ssim_is_the_readable_one(shape, padding):
    a, b = pair(*shape)
    x = a.clone().requires_grad_()
    y = a.double().requires_grad_()
    fast = ssim(x, b, padding)
    slow = ssim(y, b.double(), padding)
    (3 * fast).backward()
    (3 * slow).backward()
    assert abs(fast.item() - slow.item()) < 1e-6
    assert (x.grad - y.grad).norm() <= 1e-5 * y.grad.norm()


def test_finite_differences_reach_both_pictures():
    a, b = [t.double().requires_grad_() for t in pair(13, 12, 2)]
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, 'valid'), (a, b))
    assert torch.autograd.gradcheck(ssim, (a, b))


def test_gradient_of_the_second_picture_in_float32():
    a, b = pair(20, 20, 3)
    b.requires_grad_()
    ssim(a, b).backward()
    g = b.grad
    c = b.detach().clone().requires_grad_()
    ssim(c, a).backward()  # SSIM is symmetric
    assert (g - c.grad).norm() <= 1e-4 * g.norm()


def test_scikit_image_agrees():
    a, b = pair(48, 40, 3, seed=1)
    ref = structural_similarity(
        a.numpy(),
        b.numpy(),
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert abs(ssim(a, b, 'valid').item() - ref) < 1e-5
    assert (
        abs(psnr(a, b).item() - peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1)) < 1e-4
    )
    assert abs(psnr(255 * a, 255 * b, data_range=255).item() - psnr(a, b).item()) < 1e-4


def test_masks_count_only_their_pixels():
    a, b = pair(20, 30, 3)
    mask = torch.zeros(20, 30)
    mask[5:10] = 1
    assert torch.allclose(l1(a, b, mask), l1(a[5:10], b[5:10]))
    assert torch.allclose(psnr(a, b, mask[..., None]), psnr(a[5:10], b[5:10]))
    assert torch.allclose(l1(a.mean(-1), b.mean(-1), mask), l1(a[5:10].mean(-1), b[5:10].mean(-1)))


def test_numpy_pictures():
    a, b = pair(16, 16, 3)
    assert torch.allclose(ssim(a.numpy(), b.numpy()), ssim(a, b))
    assert psnr(a.numpy(), a.numpy()) == float('inf')


@pytest.mark.parametrize(
    'call,words',
    (
        (lambda a: l1(a, a[:5]), 'one shape'),
        (lambda a: psnr((a * 255).byte(), a), 'divide bytes by 255'),
        (lambda a: ssim(a[:8], a[:8], 'valid'), 'at least 11'),
        (lambda a: ssim(a, a, 'reflect'), 'padding should be'),
        (lambda a: l1(a, a, torch.zeros(20, 20)), 'at least one pixel'),
        (lambda a: l1(a, a, torch.ones(3, 20)), 'one number per pixel'),
        (lambda a: l1(a[0, 0], a[0, 0]), 'pictures should be'),
    ),
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.rand(20, 20, 3))
