"""MS-SSIM, LPIPS, films and estimators against references that share no code with them."""

import math

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d, gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from spatialavatar0.ground import assets as manifest
from spatialavatar0.ground.core import InputError
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
    return torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()], -1)


def spoiled(x):
    g = torch.Generator().manual_seed(0)
    return dict(
        noise=(x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1),
        blur=torch.tensor(gaussian_filter(x.numpy(), (2, 2, 0))),
        dark=0.7 * x,
        moved=x.roll(2, 1),
        unclamped=x * 1.3 - 0.1,
    )


CASES = [
    (f.__name__, k) for f in (photo, drawn) for k in ('noise', 'blur', 'dark', 'moved', 'unclamped')
]


@pytest.fixture(params=CASES, ids='-'.join)
def pair(request):
    x = dict(photo=photo, drawn=drawn)[request.param[0]]()
    return spoiled(x)[request.param[1]], x


def test_references(pair):
    """scikit-image for PSNR and the valid SSIM; scipy's filters with zeros outside for the padded
    one."""
    a, b = pair
    x, y = a.numpy(), b.numpy()
    assert abs(psnr(a, b).item() - peak_signal_noise_ratio(y, x, data_range=1)) < 1e-4
    assert (
        abs(
            ssim(a, b, 'valid').item()
            - structural_similarity(
                x,
                y,
                channel_axis=2,
                data_range=1.0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
        < 1e-4
    )

    def w(z):
        return correlate1d(
            correlate1d(z.astype(float), SSIM_WINDOW, 0, mode='constant'),
            SSIM_WINDOW,
            1,
            mode='constant',
        )

    mx, my, xx, yy, xy = map(w, (x, y, x * x, y * y, x * y))
    full = (
        (2 * mx * my + 1e-4)
        * (2 * (xy - mx * my) + 9e-4)
        / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4))
    )
    assert abs(ssim(a, b, 'same').item() - full.mean()) < 1e-4
    assert abs(ssim(a, b, 'valid').item() - full[5:-5, 5:-5].mean()) < 1e-4


def test_ms_ssim_is_scipys(pair):
    a, b = pair
    x, y = a.double().numpy(), b.double().numpy()
    out = 1.0
    for s in (0.5, 1, 2, 4, 8):

        def g(z):
            return gaussian_filter(z, (s, s, 0), mode='constant', truncate=7.0)

        one = g(np.ones_like(x))
        mx, my, xx, yy, xy = (g(z) / one for z in (x, y, x * x, y * y, x * y))
        out = out * (2 * (xy - mx * my) + 9e-4) / (xx - mx * mx + yy - my * my + 9e-4)
    ref = (out * (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)).mean()
    assert abs(ms_ssim(a, b).item() - ref) < 1e-4
    assert abs(ms_ssim(a.double(), b.double()).item() - ref) < 1e-9


def test_ms_ssim_shapes_and_gradient():
    a = torch.rand(2, 12, 9, 3)
    b = torch.rand(2, 12, 9, 3)
    assert ms_ssim(a, b).shape == (2,)
    assert torch.allclose(ms_ssim(a, b)[1], ms_ssim(a[1], b[1]), atol=1e-6)
    assert ms_ssim(a[0, ..., 0], b[0, ..., 0]).shape == ()
    assert torch.allclose(ms_ssim(a, a), torch.ones(2), atol=1e-5)
    a, b = (t[:1, :6, :5].double().requires_grad_() for t in (a, b))
    assert torch.autograd.gradcheck(lambda a, b: ms_ssim(a, b, (1.0, 2.0)), (a, b))
    with pytest.raises(InputError, match='one shape'):
        ms_ssim(a, b[:, :4])


def test_ms_ssim_of_flat_pictures_by_hand():
    assert (
        abs(
            ms_ssim(torch.full((9, 9, 3), 0.6), torch.full((9, 9, 3), 0.3)).item()
            - (2 * 0.18 + 1e-4) / (0.45 + 1e-4)
        )
        < 2e-3
    )  # cs = 1 but for rounding


def test_psnr_of_films_by_hand():
    assert mean_psnr([0.01, 0.0001]) == pytest.approx(30)
    assert pooled_psnr([0.01, 0.0001]) == pytest.approx(-10 * math.log10(0.00505))
    a = torch.rand(4, 8, 8, 3)
    b = a + torch.tensor([0.1, 0.01, 0.2, 0.05])[:, None, None, None]
    each = torch.stack([mse(*x) for x in zip(a, b)])
    assert pooled_psnr(each) == pytest.approx(psnr(a, b).item(), abs=1e-4)
    assert mean_psnr(each) == pytest.approx(np.mean([psnr(*x).item() for x in zip(a, b)]), abs=1e-4)
    assert mean_psnr([0.0], floor=1e-8) == pytest.approx(160)
    assert mean_psnr([0.04], floor=1e-8) == pytest.approx(-20 * math.log10(0.2 + 1e-8))
    for _ in range(20):
        m = torch.rand(5)
        assert mean_psnr(m) >= pooled_psnr(m) - 1e-9  # Jensen
    for bad in ([], [-0.1], [math.nan]):
        with pytest.raises(InputError, match='squared error'):
            mean_psnr(bad)


def test_mse_of_a_mask():
    a = torch.zeros(4, 4, 3)
    b = a.clone()
    b[0, 0] = 0.5
    m = torch.zeros(4, 4)
    m[0, :2] = 1
    assert mse(a, b, m).item() == pytest.approx(0.125)
    assert l1(a, b, m).item() == pytest.approx(0.25)


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


@real
def test_lpips_by_hand(pair):
    "AlexNet and the heads written out once more, from the arrays of the file."
    from spatialavatar0.ground.pickles import read_arrays

    path = manifest.find_local(manifest.load_manifest()['lpips_alex'])
    if path is None:
        pytest.skip('weights from elsewhere')
    d = read_arrays(path)

    def t(x):
        return torch.from_numpy(np.array(x)).double()

    def features(x):
        x = (
            (x.movedim(-1, 0)[None].double() * 2 - 1)
            - torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
        ) / torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
        for i, (stride, pad, pool) in enumerate(
            [(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]
        ):
            if pool:
                x = F.max_pool2d(x, 3, 2)
            n = d['AlexNet_0'][f'Conv_{i}']
            x = F.relu(F.conv2d(x, t(n['kernel']).permute(3, 2, 0, 1), t(n['bias']), stride, pad))
            yield x

    a, b = pair
    total = 0.0
    for i, (x, y) in enumerate(zip(features(a), features(b))):
        x, y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        total += (
            ((x - y).square() * t(d[f'NetLinLayer_{i}']['Conv_0']['kernel']).reshape(1, -1, 1, 1))
            .sum(1)
            .mean()
        )
    assert abs(NET(a, b).item() - total.item()) < 1e-4


@real
def test_lpips_range_and_shapes():
    x = photo()
    y = spoiled(x)['noise']
    assert NET(x, x).abs().max() < 1e-6
    assert NET(torch.stack([x, y]), torch.stack([y, y])).shape == (2,)
    assert 'alex' in NET.name
    assert NET(x, y, normalize=False).item() != pytest.approx(
        NET(x, y).item(), rel=0.02
    )  # GaussianAvatars' way is another number

    assert NET(x, y).item() == pytest.approx(
        NET.net(x.movedim(-1, 0)[None] * 2 - 1, y.movedim(-1, 0)[None] * 2 - 1).item(), abs=1e-6
    )
    with pytest.raises(InputError, match='one shape'):
        NET(x, y[:50])


def test_lpips_is_never_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, 'find_local', lambda a: None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    assert open_lpips() is None
    with pytest.raises(InputError, match='lpips_alex is not here.*left out'):
        open_lpips(strict=True)
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/alexnet-owt-7be5be79.pth').write_bytes(b'something else')
    assert open_lpips() is None


@real
def test_torchvisions_file_gives_the_same_network(monkeypatch, tmp_path):
    "Its convolutions under torchvision's names, its hash believed for once."
    import types

    from spatialavatar0.pictures import fast_metrics

    convs = [m for m in NET.net.net.modules() if isinstance(m, torch.nn.Conv2d)]
    d = {}
    for k, m in zip((0, 3, 6, 8, 10), convs):
        d[f'features.{k}.weight'] = m.weight.detach()
        d[f'features.{k}.bias'] = m.bias.detach()
    (tmp_path / 'checkpoints').mkdir()
    torch.save(d, tmp_path / 'checkpoints/alexnet-owt-7be5be79.pth')
    monkeypatch.setattr(manifest, 'find_local', lambda a: None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(
        fast_metrics,
        'hashlib',
        types.SimpleNamespace(sha256=lambda x: types.SimpleNamespace(hexdigest=lambda: '7be5be79')),
    )
    x = photo()
    y = spoiled(x)['blur']
    other = open_lpips()
    assert 'torchvision' in other.name
    assert torch.equal(other(x, y), NET(x, y))


# ---- estimators
def test_ask_by_hand():
    a, b = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
    pairs = [(a, b)] * 2 + [(a, a)]

    def codes(x):
        return (
            None
            if x is a and codes.blind
            else torch.tensor([3.0, 4.0])
            if x.max() > 0
            else torch.tensor([4.0, 3.0])
        )

    codes.name, codes.blind = 'two numbers', False
    r = ask(codes, pairs, 'cosine')
    assert r['value'] == pytest.approx((0.96 + 0.96 + 1) / 3)
    assert r['frames'] == 3
    assert r['estimator'] == 'two numbers'
    r = ask(codes, pairs, 'l1')
    assert r['value'] == pytest.approx(2 / 3)
    assert r['std'] == pytest.approx(np.std([1, 1, 0]))

    def marks(x):
        return torch.zeros(5, 2) + torch.tensor([3.0, 4.0]) * x.max()

    assert ask(marks, pairs, 'pixels', name='m')['value'] == pytest.approx(10 / 3)
    codes.blind = True
    r = ask(codes, pairs, 'l1')
    assert r['lost'] == 3
    assert r['frames'] == 0
    assert math.isnan(r['value'])
    with pytest.raises(InputError, match="distance should be 'cosine'"):
        ask(codes, pairs, 'l2')
    with pytest.raises(InputError, match='numbers for one picture'):
        ask(lambda x: torch.zeros(1 + int(x.max())), pairs, 'l1')
