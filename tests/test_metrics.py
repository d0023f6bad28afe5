"""PSNR and SSIM against scikit-image, the fused SSIM against the readable one in float64, masks and
bad input."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from spatialavatar0.ground.core import InputError
from spatialavatar0.pictures.fast_metrics import ssim
from spatialavatar0.pictures.metrics import l1, plain_ssim, psnr


def pair(*shape, seed=0, noise=0.1):
    "A random picture with noise, and without."
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(*shape, generator=generator)
    noisy = truth + noise * torch.randn(truth.shape, generator=generator)
    return truth, noisy.clamp(0, 1)


@pytest.mark.parametrize('shape', ((40, 33, 3), (17, 50), (2, 24, 31, 3), (30, 30, 1), (19, 12, 7)))
@pytest.mark.parametrize('padding', ('same', 'valid'))
def test_fused_ssim_is_the_readable_one(shape, padding):
    ours, truth = pair(*shape)
    single = ours.clone().requires_grad_()
    double = ours.double().requires_grad_()
    fast = ssim(single, truth, padding)
    slow = plain_ssim(double, truth.double(), padding)
    (3 * fast).backward()
    (3 * slow).backward()
    assert abs(fast.item() - slow.item()) < 1e-6
    assert (single.grad - double.grad).norm() <= 1e-5 * double.grad.norm()


def test_float64_takes_the_readable_way():
    ours, truth = (picture.double() for picture in pair(20, 20, 3))
    assert torch.equal(ssim(ours, truth), plain_ssim(ours, truth))


def test_finite_differences_reach_both_pictures():
    both = [picture.double().requires_grad_() for picture in pair(13, 12, 2)]
    assert torch.autograd.gradcheck(lambda ours, truth: ssim(ours, truth, 'valid'), both)
    assert torch.autograd.gradcheck(ssim, both)


def test_gradient_of_the_second_picture_in_float32():
    ours, truth = pair(20, 20, 3)
    truth.requires_grad_()
    ssim(ours, truth).backward()
    first = truth.detach().clone().requires_grad_()
    ssim(first, ours).backward()  # SSIM is symmetric
    assert (truth.grad - first.grad).norm() <= 1e-4 * truth.grad.norm()


def test_scikit_image_agrees():
    ours, truth = pair(48, 40, 3, seed=1)
    both = ours.numpy(), truth.numpy()
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    similar = structural_similarity(*both, channel_axis=2, data_range=1.0, **window)
    decibels = peak_signal_noise_ratio(*both, data_range=1)
    assert abs(ssim(ours, truth, 'valid').item() - similar) < 1e-5
    assert abs(psnr(ours, truth).item() - decibels) < 1e-4
    in_bytes = psnr(255 * ours, 255 * truth, data_range=255)
    assert abs(in_bytes.item() - psnr(ours, truth).item()) < 1e-4


def test_masks_count_only_their_pixels():
    ours, truth = pair(20, 30, 3)
    grey = ours.mean(-1), truth.mean(-1)
    rows = slice(5, 10)
    mask = torch.zeros(20, 30)
    mask[rows] = 1
    assert torch.allclose(l1(ours, truth, mask), l1(ours[rows], truth[rows]))
    assert torch.allclose(psnr(ours, truth, mask[..., None]), psnr(ours[rows], truth[rows]))
    assert torch.allclose(l1(*grey, mask), l1(grey[0][rows], grey[1][rows]))


def test_numpy_pictures():
    ours, truth = pair(16, 16, 3)
    assert torch.allclose(ssim(ours.numpy(), truth.numpy()), ssim(ours, truth))
    assert psnr(ours.numpy(), ours.numpy()) == float('inf')


@pytest.mark.parametrize(
    'call,words',
    (
        (lambda image: l1(image, image[:5]), 'one shape'),
        (lambda image: psnr((image * 255).byte(), image), 'divide bytes by 255'),
        (lambda image: ssim(image[:8], image[:8], 'valid'), 'at least 11'),
        (lambda image: ssim(image, image, 'reflect'), 'padding should be'),
        (lambda image: l1(image, image, torch.zeros(20, 20)), 'at least one pixel'),
        (lambda image: l1(image, image, torch.ones(3, 20)), 'one number per pixel'),
        (lambda image: l1(image[0, 0], image[0, 0]), 'pictures should be'),
    ),
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.rand(20, 20, 3))
