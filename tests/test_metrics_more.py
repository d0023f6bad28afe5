"""MS-SSIM, LPIPS, films and estimators against references that share no code with them."""

import math
import types

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d, gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from spatialavatar0.ground import assets as manifest
from spatialavatar0.ground.core import InputError
from spatialavatar0.pictures import fast_metrics
from spatialavatar0.pictures.fast_metrics import open_lpips, ssim
from spatialavatar0.pictures.metrics import (
    SSIM_WINDOW,
    ask,
    l1,
    mean_psnr,
    ms_ssim,
    mse,
    pooled_psnr,
    psnr,
)


def photo():
    return torch.tensor(skimage.data.astronaut()[20:148, 130:258] / 255.0).float()


def drawn():
    y, x = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 70), indexing='ij')
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()
    return torch.stack([x, y, disc], -1)


def spoiled(image):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return dict(
        noise=(image + 0.1 * noise).clamp(0, 1),
        blur=torch.tensor(gaussian_filter(image.numpy(), (2, 2, 0))),
        dark=0.7 * image,
        moved=image.roll(2, 1),
        unclamped=image * 1.3 - 0.1,
    )


DAMAGES = ('noise', 'blur', 'dark', 'moved', 'unclamped')
CASES = [(make.__name__, damage) for make in (photo, drawn) for damage in DAMAGES]


@pytest.fixture(params=CASES, ids='-'.join)
def pair(request):
    name, damage = request.param
    truth = dict(photo=photo, drawn=drawn)[name]()
    return spoiled(truth)[damage], truth


def filtered(image):
    "scipy's filter with SSIM's window, zeros around the picture."
    down = correlate1d(image.astype(float), SSIM_WINDOW, 0, mode='constant')
    return correlate1d(down, SSIM_WINDOW, 1, mode='constant')


def ssim_by_hand(x, y):
    mx, my, xx, yy, xy = map(filtered, (x, y, x * x, y * y, x * y))
    above = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    below = (mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4)
    return above / below


def test_references(pair):
    """scikit-image for PSNR and the valid SSIM; scipy's filters with zeros outside for the padded
    one."""
    ours, truth = pair
    x, y = ours.numpy(), truth.numpy()
    assert abs(psnr(ours, truth).item() - peak_signal_noise_ratio(y, x, data_range=1)) < 1e-4
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    theirs = structural_similarity(x, y, channel_axis=2, data_range=1.0, **window)
    assert abs(ssim(ours, truth, 'valid').item() - theirs) < 1e-4
    full = ssim_by_hand(x, y)
    assert abs(ssim(ours, truth, 'same').item() - full.mean()) < 1e-4
    assert abs(ssim(ours, truth, 'valid').item() - full[5:-5, 5:-5].mean()) < 1e-4


def window_means(image, sigma):
    "scipy's Gaussian averages, cut at the border."

    def blurred(values):
        return gaussian_filter(values, (sigma, sigma, 0), mode='constant', truncate=7.0)

    return blurred(image) / blurred(np.ones_like(image))


def ms_by_hand(x, y):
    product = 1.0
    for sigma in (0.5, 1, 2, 4, 8):
        mx, my, xx, yy, xy = (window_means(z, sigma) for z in (x, y, x * x, y * y, x * y))
        spread = xx - mx * mx + yy - my * my
        product = product * (2 * (xy - mx * my) + 9e-4) / (spread + 9e-4)
    return (product * (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)).mean()


def test_ms_ssim_is_scipys(pair):
    ours, truth = pair
    reference = ms_by_hand(ours.double().numpy(), truth.double().numpy())
    assert abs(ms_ssim(ours, truth).item() - reference) < 1e-4
    assert abs(ms_ssim(ours.double(), truth.double()).item() - reference) < 1e-9


def test_ms_ssim_shapes_and_gradient():
    ours = torch.rand(2, 12, 9, 3)
    truth = torch.rand(2, 12, 9, 3)
    assert ms_ssim(ours, truth).shape == (2,)
    assert torch.allclose(ms_ssim(ours, truth)[1], ms_ssim(ours[1], truth[1]), atol=1e-6)
    assert ms_ssim(ours[0, ..., 0], truth[0, ..., 0]).shape == ()
    assert torch.allclose(ms_ssim(ours, ours), torch.ones(2), atol=1e-5)
    small = [batch[:1, :6, :5].double().requires_grad_() for batch in (ours, truth)]
    assert torch.autograd.gradcheck(lambda *both: ms_ssim(*both, (1.0, 2.0)), small)
    with pytest.raises(InputError, match='one shape'):
        ms_ssim(small[0], small[1][:, :4])


def test_ms_ssim_of_flat_pictures_by_hand():
    found = ms_ssim(torch.full((9, 9, 3), 0.6), torch.full((9, 9, 3), 0.3)).item()
    by_hand = (2 * 0.18 + 1e-4) / (0.45 + 1e-4)  # cs = 1 but for rounding
    assert abs(found - by_hand) < 2e-3


def test_psnr_of_films_by_hand():
    assert mean_psnr([0.01, 0.0001]) == pytest.approx(30)
    assert pooled_psnr([0.01, 0.0001]) == pytest.approx(-10 * math.log10(0.00505))
    assert mean_psnr([0.0], floor=1e-8) == pytest.approx(160)
    assert mean_psnr([0.04], floor=1e-8) == pytest.approx(-20 * math.log10(0.2 + 1e-8))
    for bad in ([], [-0.1], [math.nan]):
        with pytest.raises(InputError, match='squared error'):
            mean_psnr(bad)


def test_psnr_of_films_and_of_their_frames():
    film = torch.rand(4, 8, 8, 3)
    worse = film + torch.tensor([0.1, 0.01, 0.2, 0.05])[:, None, None, None]
    frames = list(zip(film, worse))
    each = torch.stack([mse(*frame) for frame in frames])
    decibels = [psnr(*frame).item() for frame in frames]
    assert pooled_psnr(each) == pytest.approx(psnr(film, worse).item(), abs=1e-4)
    assert mean_psnr(each) == pytest.approx(np.mean(decibels), abs=1e-4)
    for _ in range(20):
        errors = torch.rand(5)
        assert mean_psnr(errors) >= pooled_psnr(errors) - 1e-9  # Jensen


def test_mse_of_a_mask():
    black = torch.zeros(4, 4, 3)
    dotted = black.clone()
    dotted[0, 0] = 0.5
    mask = torch.zeros(4, 4)
    mask[0, :2] = 1
    assert mse(black, dotted, mask).item() == pytest.approx(0.125)
    assert l1(black, dotted, mask).item() == pytest.approx(0.25)


# ---- LPIPS
def here():
    try:
        return open_lpips()
    except InputError:
        return None


NET = here()
real = pytest.mark.skipif(
    NET is None,
    reason=(
        "AlexNet's weights or the package lpips are not here; spatialavatar0 assets says how "
        'to get them'
    ),
)


def double(array):
    return torch.from_numpy(np.array(array)).double()


def features(image, arrays):
    "Outputs of AlexNet's layers, written out once more."
    middle = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    spread = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    x = ((image.movedim(-1, 0)[None].double() * 2 - 1) - middle) / spread
    shapes = [(4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False)]
    for i, (stride, padding, pool) in enumerate(shapes):
        layer = arrays[f'Conv_{i}']
        if pool:
            x = F.max_pool2d(x, 3, 2)
        kernel = double(layer['kernel']).permute(3, 2, 0, 1)
        x = F.relu(F.conv2d(x, kernel, double(layer['bias']), stride, padding))
        yield x


def unit(x):
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


@real
def test_lpips_by_hand(pair):
    "AlexNet and the heads, from the arrays of the file."
    from spatialavatar0.ground.pickles import read_arrays

    path = manifest.find_local(manifest.load_manifest()['lpips_alex'])
    if path is None:
        pytest.skip('weights from elsewhere')
    arrays = read_arrays(path)
    layers = zip(*(features(picture, arrays['AlexNet_0']) for picture in pair))
    total = 0.0
    for i, (ours, truth) in enumerate(layers):
        weights = double(arrays[f'NetLinLayer_{i}']['Conv_0']['kernel']).reshape(1, -1, 1, 1)
        total += ((unit(ours) - unit(truth)).square() * weights).sum(1).mean()
    assert abs(NET(*pair).item() - total.item()) < 1e-4


@real
def test_lpips_range_and_shapes():
    truth = photo()
    noisy = spoiled(truth)['noise']
    assert NET(truth, truth).abs().max() < 1e-6
    assert NET(torch.stack([truth, noisy]), torch.stack([noisy, noisy])).shape == (2,)
    assert 'alex' in NET.name
    as_trained = NET(truth, noisy).item()
    raw = NET(truth, noisy, normalize=False).item()  # GaussianAvatars' way is another number
    assert raw != pytest.approx(as_trained, rel=0.02)
    scaled = [picture.movedim(-1, 0)[None] * 2 - 1 for picture in (truth, noisy)]
    assert as_trained == pytest.approx(NET.net(*scaled).item(), abs=1e-6)
    with pytest.raises(InputError, match='one shape'):
        NET(truth, noisy[:50])


def test_lpips_is_never_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, 'find_local', lambda asset: None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    assert open_lpips() is None
    with pytest.raises(InputError, match='lpips_alex is not here.*left out'):
        open_lpips(strict=True)
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/alexnet-owt-7be5be79.pth').write_bytes(b'something else')
    assert open_lpips() is None


def believed(content):
    "A hash that is the right one, whatever the file."
    return types.SimpleNamespace(hexdigest=lambda: '7be5be79')


@real
def test_torchvisions_file_gives_the_same_network(monkeypatch, tmp_path):
    "Its convolutions under torchvision's names, its hash believed for once."
    convs = [m for m in NET.net.net.modules() if isinstance(m, torch.nn.Conv2d)]
    arrays = {}
    for k, conv in zip((0, 3, 6, 8, 10), convs):
        arrays[f'features.{k}.weight'] = conv.weight.detach()
        arrays[f'features.{k}.bias'] = conv.bias.detach()
    (tmp_path / 'checkpoints').mkdir()
    torch.save(arrays, tmp_path / 'checkpoints/alexnet-owt-7be5be79.pth')
    monkeypatch.setattr(manifest, 'find_local', lambda asset: None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(fast_metrics, 'hashlib', types.SimpleNamespace(sha256=believed))
    truth = photo()
    blurred = spoiled(truth)['blur']
    other = open_lpips()
    assert 'torchvision' in other.name
    assert torch.equal(other(truth, blurred), NET(truth, blurred))


# ---- estimators
BLACK, WHITE = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
PAIRS = [(BLACK, WHITE)] * 2 + [(BLACK, BLACK)]


def two_codes(image):
    return torch.tensor([3.0, 4.0]) if image.max() > 0 else torch.tensor([4.0, 3.0])


def blind_to_black(image):
    return None if image is BLACK else two_codes(image)


def marks(image):
    return torch.zeros(5, 2) + torch.tensor([3.0, 4.0]) * image.max()


def test_ask_by_hand():
    said = ask(two_codes, PAIRS, 'cosine')
    assert said['value'] == pytest.approx((0.96 + 0.96 + 1) / 3)
    assert said['frames'] == 3
    assert said['estimator'] == 'two_codes'
    said = ask(two_codes, PAIRS, 'l1')
    assert said['value'] == pytest.approx(2 / 3)
    assert said['std'] == pytest.approx(np.std([1, 1, 0]))
    assert ask(marks, PAIRS, 'pixels', name='m')['value'] == pytest.approx(10 / 3)


def test_ask_says_who_was_asked():
    def estimator(image):
        return two_codes(image)

    estimator.name = 'two numbers'
    assert ask(estimator, PAIRS, 'l1')['estimator'] == 'two numbers'
    assert ask(estimator, PAIRS, 'l1', name='mine')['estimator'] == 'mine'


def test_ask_counts_lost_frames():
    said = ask(blind_to_black, PAIRS, 'l1')
    assert said['lost'] == 3
    assert said['frames'] == 0
    assert math.isnan(said['value'])


def test_ask_refuses():
    with pytest.raises(InputError, match="distance should be 'cosine'"):
        ask(two_codes, PAIRS, 'l2')
    with pytest.raises(InputError, match='numbers for one picture'):
        ask(lambda image: torch.zeros(1 + int(image.max())), PAIRS, 'l1')


def test_lpips_does_not_tell_how_many_threads_there_were():
    lpips = open_lpips()
    if lpips is None:
        pytest.skip('the weights of LPIPS are not here')
    torch.manual_seed(0)
    a, b = torch.rand(2, 64, 64, 3)
    before = torch.get_num_threads()
    values = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values.add(float(lpips(a, b)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(values) == 1
