"""Presets, protocols, judges and tables."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import skimage.data
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from spatialavatar0.ground.core import InputError
from spatialavatar0.judge import evaluate as ev
from spatialavatar0.judge.evaluate import (
    ARCFACE_POINTS,
    ArcFaceJudge,
    Deep3DJudge,
    DlibJudge,
    MediaPipeJudge,
    Results,
    code_state,
    evaluate,
    frames_of,
    load_protocols,
    protocol_of,
    reenactments,
    result_table,
    similarity,
    warped,
)
from spatialavatar0.pictures.clips import Clip, Frame
from spatialavatar0.pictures.metrics import open_lpips
from spatialavatar0.pictures.scores import PRESETS, film_scores, frame_scores, lay_on


def needs(*names):
    return pytest.mark.skipif(
        any(find_spec(n) is None for n in names), reason=f'needs {", ".join(names)}'
    )


PHOTO = torch.from_numpy(skimage.data.astronaut()[:300, 80:380] / 255).float()

# ---- presets


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('seed', range(3))
def test_numbers_of_scikit_image(name, seed):
    p = PRESETS[name]
    g = torch.Generator().manual_seed(seed)
    b = torch.rand(40, 48, 3, generator=g)
    a = b + 0.2 * torch.randn(40, 48, 3, generator=g)
    s = frame_scores(a, b, p)
    x = a.clamp(0, 1) if p.clamp else a
    X, Y = x.numpy(), b.numpy()
    want = (
        np.mean([peak_signal_noise_ratio(Y[..., k], X[..., k], data_range=1) for k in range(3)])
        if p.per_channel
        else peak_signal_noise_ratio(Y, X, data_range=1)
    )
    assert s['psnr'] == pytest.approx(want, abs=1e-4)
    assert s['mse'] == pytest.approx(float((x - b).square().mean()), rel=1e-5)
    if p.ssim == 'valid':
        full = structural_similarity(
            Y,
            X,
            full=True,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            win_size=11,
        )[1]
        assert s['ssim'] == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=8))
def test_pooled_is_never_above_the_mean(errors):
    b = torch.full((12, 12, 3), 0.5)
    pairs = [(b + e**0.5, b, None) for e in errors]
    r = film_scores(pairs, 'paper', None)
    assert r['psnr'] == r['psnr_pooled'] <= r['psnr_mean'] + 1e-6
    assert r['frames'] == len(errors)


def test_background_and_matte():
    im, m = torch.rand(8, 8, 3), torch.zeros(8, 8)
    assert (lay_on(im, m, PRESETS['paper']) == 1).all()
    assert torch.equal(lay_on(im, m, PRESETS['gagavatar']), im)
    assert torch.equal(lay_on(im, None, PRESETS['paper']), im)


@needs('lpips')
def test_lpips_has_two_ways_of_use():
    lpips = open_lpips()
    if lpips is None:
        pytest.skip("AlexNet's weights are not here; spatialavatar0 assets says how to get them")
    a, b = PHOTO.roll(3, 0), PHOTO
    one, two = (
        frame_scores(a, b, PRESETS[k], lpips)['lpips'] for k in ('paper', 'gaussianavatars')
    )
    assert two < one < 0.5


# ---- protocols


def test_every_protocol_makes_sense():
    for p in load_protocols().values():
        parts = frames_of(p, 1200)
        assert parts['test'] and (parts['train'] or parts['source'])
        if p.kind != 'camera':
            assert not set(parts['test']) & set(parts['train'] + parts['source'])
        assert all(0 <= i < 1200 for v in parts.values() for i in v)
        assert all(sorted(v) == v for v in parts.values())
        assert p.what
        assert not p.names or len(set(p.names)) <= p.clips


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(['last:7', 'share:.5', 'first:6', 'uniform:9']), st.integers(0, 60))
def test_splits_are_partitions(rule, n):
    p = protocol_of(rule)
    try:
        parts = frames_of(p, n)
    except InputError:
        assert n < 10
        return
    assert parts['test']
    assert len(set(sum(parts.values(), []))) == sum(map(len, parts.values()))
    assert max(sum(parts.values(), [])) < n
    if rule in ('last:7', 'share:.5'):
        assert sorted(sum(parts.values(), [])) == list(range(n))


def test_everybody_drives_once():
    pairs = reenactments(load_protocols()['vfhq_cross'], list('dacb'))
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list('abcd')
    assert all(a != b for a, b in pairs)
    for bad in ([], ['a', 'a'], ['a']):
        with pytest.raises(InputError):
            reenactments(load_protocols()['vfhq_cross'], bad)


def test_bad_protocol_files(tmp_path):
    good = dict(id='x', what='w', data='d', kind='subject', test=dict(last=3), preset='paper')
    for change in (
        dict(kind='?'),
        dict(test=dict(last=-1)),
        dict(test={}),
        dict(test=dict(last=3, odd=1)),
        dict(preset='?'),
        dict(colour='red'),
    ):
        (tmp_path / 'p.yaml').write_text(yaml.safe_dump(dict(protocols=[good | change])))
        with pytest.raises(InputError):
            load_protocols(tmp_path / 'p.yaml')
    for text in ('', '[', 'protocols: 3', 'protocols: [3]'):
        (tmp_path / 'p.yaml').write_text(text)
        with pytest.raises(InputError):
            load_protocols(tmp_path / 'p.yaml')
    (tmp_path / 'p.yaml').write_text(yaml.safe_dump(dict(protocols=[good])))
    assert load_protocols(tmp_path / 'p.yaml')['x'].preset == 'paper'


# ---- judges


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 5), st.floats(-3, 3), st.floats(-90, 90))
def test_similarity_is_found_again(scale, turn, shift):
    c = scale * math.cos(turn)
    s = scale * math.sin(turn)
    A = torch.tensor([[c, -s, shift], [s, c, 2 * shift]]).double()
    pts = 50 * torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(similarity(pts, pts @ A[:, :2].T + A[:, 2]), A, atol=1e-6)


class FakeNet:
    "Stands where ArcFace's weights would: says what it was given."

    def get_inputs(self):
        return [type('Input', (), dict(name='data'))]

    def run(self, _, x):
        self.seen = x['data']
        return [self.seen.mean((2, 3))]


@needs('mediapipe')
def test_arcface_gets_an_upright_face():
    net = FakeNet()
    with ArcFaceJudge(session=net) as judge, MediaPipeJudge() as points:
        tilted = warped(PHOTO, torch.tensor([[0.9, -0.35, 90.0], [0.35, 0.9, -30]]), 340)
        crop = judge.crop(tilted)
        assert crop.shape == (112, 112, 3)

        def large(im, k):
            return (
                torch.nn.functional.interpolate(
                    im.permute(2, 0, 1)[None], scale_factor=k, mode='bicubic'
                )[0]
                .permute(1, 2, 0)
                .clamp(0, 1)
            )

        def five(l):
            return torch.stack([l[list(i)].mean(0) for i in ev._FIVE])

        there = five(points(tilted)['landmarks'])
        here = five(points(large(crop, 4))['landmarks'] / 4)
        A = similarity(there, torch.tensor(ARCFACE_POINTS))
        assert float((here - (there @ A[:, :2].T + A[:, 2])).norm(dim=-1).max()) < 1.5
        assert (
            float((here - torch.tensor(ARCFACE_POINTS)).norm(dim=-1).mean()) < 7
        )  # where the fit says; a smile is wider than the standard face
        assert set(judge(tilted)) == {'identity'}
        assert net.seen.shape == (1, 3, 112, 112)
        assert net.seen.dtype == np.float32
        assert -1 <= net.seen.min() < net.seen.max() <= 1
        assert judge(torch.full((64, 64, 3), 0.5)) is None


def test_arcface_says_who_has_it():
    with pytest.raises(InputError, match='insightface|onnxruntime'):
        ArcFaceJudge()


@needs('mediapipe', 'torchvision')
def test_deep3d_with_random_weights(tmp_path):
    "The network's shape, its file and its square; its true weights we do not have."
    import scipy.io
    from torchvision.models import resnet50

    torch.manual_seed(0)
    net = resnet50()
    heads = torch.nn.ModuleList(torch.nn.Conv2d(2048, n, 1) for n in Deep3DJudge.PARTS)
    with pytest.raises(InputError, match='lacks epoch_20.pth'):
        Deep3DJudge(tmp_path)
    lm = np.random.default_rng(0).normal(size=(68, 3))
    lm[[36, 39]] = [-0.3, 0.3, 0]
    lm[[42, 45]] = [0.3, 0.3, 0]
    lm[30] = [0, 0, 0.3]
    lm[48] = [-0.25, -0.35, 0.1]
    lm[54] = [0.25, -0.35, 0.1]
    scipy.io.savemat(tmp_path / 'similarity_Lm3D_all.mat', dict(lm=lm))
    (tmp_path / 'epoch_20.pth').write_bytes(b'no')
    with pytest.raises(InputError, match='not the checkpoint'):
        Deep3DJudge(tmp_path)
    torch.save(
        dict(
            net_recon={f'backbone.{k}': v for k, v in net.state_dict().items()}
            | {f'final_layers.{k}': v for k, v in heads.state_dict().items()}
        ),
        tmp_path / 'epoch_20.pth',
    )
    j = Deep3DJudge(tmp_path)
    out = j(PHOTO)
    assert len(out['expression']) == 64
    assert len(out['pose']) == 3
    assert torch.isfinite(out['expression']).all()
    assert j(torch.zeros(64, 64, 3)) is None
    j.close()


@needs('dlib', 'face_recognition_models')
def test_dlib_knows_her_again():
    j = DlibJudge()
    a = j(PHOTO)['identity']
    b = j((0.7 * PHOTO.flip(1) + 0.1).clamp(0, 1))['identity']
    assert len(a) == 128
    assert float((a - b).norm()) < 0.5
    assert j(torch.zeros(80, 80, 3)) is None


@needs('mediapipe')
def test_pose_follows_a_tilt():
    with MediaPipeJudge() as j:
        c, s = math.cos(0.2), math.sin(0.2)
        A = torch.tensor([[c, -s, 150 * (1 - c) + 150 * s], [s, c, 150 * (1 - c) - 150 * s]])
        a = j(PHOTO)['pose']
        b = j(warped(PHOTO, A, 300))['pose']
        assert abs(abs(float((b - a)[2])) - 0.2) < 0.05
        assert float((b - a)[:2].abs().max()) < 0.12


# ---- lines and tables


def clip(n=6):
    g = torch.Generator().manual_seed(0)
    return Clip(
        [
            Frame(
                torch.rand(24, 24, 3, generator=g),
                torch.ones(24, 24),
                torch.eye(4),
                torch.eye(3),
                time=i,
            )
            for i in range(n)
        ]
    )


def line(**more):
    return evaluate(
        lambda f, b: f.image * 0.9,
        clip(),
        'splattingavatar',
        method='dim',
        subject='s',
        lpips=None,
        **more,
    )


def test_a_line_says_everything():
    l = line(seed=3, note='hello')
    assert {
        'method',
        'protocol',
        'data',
        'split',
        'subject',
        'driver',
        'background',
        'mask',
        'preset',
        'scores',
        'code',
        'seed',
        'device',
        'torch',
        'note',
    } <= set(l)
    assert l['scores']['lpips'] is None
    assert l['scores']['frames'] == 6
    assert json.loads(json.dumps(l)) == l
    assert code_state()


def test_results_resume_and_refuse(tmp_path, monkeypatch):
    r = Results(tmp_path / 'r.jsonl')
    r.add(line())
    r.add(line(seed=1))
    old = (tmp_path / 'r.jsonl').read_bytes()
    with monkeypatch.context() as m:
        m.setattr('json.dumps', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            r.add(dict(r.lines[0], seed=2))
    assert (tmp_path / 'r.jsonl').read_bytes() == old
    assert len(Results(tmp_path / 'r.jsonl').lines) == 2
    (tmp_path / 'r.jsonl').write_bytes(old[:-20])
    assert len(Results(tmp_path / 'r.jsonl').lines) == 1
    (tmp_path / 'r.jsonl').write_bytes(b'x\n' + old)
    with pytest.raises(InputError, match='line 1'):
        Results(tmp_path / 'r.jsonl')


def test_tables_do_not_mix():
    a, b = line(), line(seed=1)
    text = result_table([a, b])
    assert text.count('\n|') == 2
    assert '±' in text
    assert 'preset paper' in text
    for change in (
        dict(protocol='x'),
        dict(split=dict(last=1)),
        dict(background=0.5),
        dict(preset={}),
    ):
        with pytest.raises(InputError, match='cannot stand in one table'):
            result_table([a, b | change])
    nothing = json.loads(json.dumps(a))
    nothing['scores'] = dict(CSIM=dict(value=math.nan, estimator='x', frames=0, lost=6), psnr=20.0)
    assert 'nan' not in result_table([nothing])


def test_another_driver_has_no_pixels():
    s = line(driver='t', source=clip()[0])['scores']
    assert 'psnr' not in s
    assert 'ssim' not in s
    assert s['frames'] == 6
    with pytest.raises(InputError, match='give source='):
        line(driver='t')
