"""Presets, protocols, judges and tables."""

import dataclasses
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
from spatialavatar0.judge.evaluate import (
    DlibJudge,
    MediaPipeJudge,
    all_scores,
    frames_of,
    load_protocols,
    reenactments,
)
from spatialavatar0.judge.results import (
    ARCFACE_POINTS,
    ArcFaceJudge,
    Deep3DJudge,
    Results,
    code_state,
    evaluate,
    five_points,
    line_of,
    protocol_of,
    result_table,
    row_of,
    similarity,
    warped,
)
from spatialavatar0.pictures.clips import Clip, Frame
from spatialavatar0.pictures.fast_metrics import open_lpips
from spatialavatar0.pictures.scores import PRESETS, film_scores, frame_scores, lay_on


def needs(*names):
    return pytest.mark.skipif(
        any(find_spec(n) is None for n in names), reason=f'needs {", ".join(names)}'
    )


PHOTO = torch.from_numpy(skimage.data.astronaut()[:300, 80:380] / 255).float()

# ---- presets


def psnr_by_scikit_image(ours, truth, preset):
    if not preset.per_channel:
        return peak_signal_noise_ratio(truth, ours, data_range=1)
    pairs = [(truth[..., k], ours[..., k]) for k in range(3)]
    return np.mean([peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs])


def ssim_by_scikit_image(ours, truth):
    "Of the windows that lie inside the picture."
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11)
    full = structural_similarity(truth, ours, full=True, data_range=1, channel_axis=-1, **window)[1]
    return full[5:-5, 5:-5].mean()


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('seed', range(3))
def test_numbers_of_scikit_image(name, seed):
    preset = PRESETS[name]
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(40, 48, 3, generator=g)
    noisy = truth + 0.2 * torch.randn(40, 48, 3, generator=g)
    scores = frame_scores(noisy, truth, preset)
    ours = noisy.clamp(0, 1) if preset.clamp else noisy
    pictures = ours.numpy(), truth.numpy()
    assert scores['psnr'] == pytest.approx(psnr_by_scikit_image(*pictures, preset), abs=1e-4)
    assert scores['mse'] == pytest.approx(float((ours - truth).square().mean()), rel=1e-5)
    if preset.ssim == 'valid':
        assert scores['ssim'] == pytest.approx(ssim_by_scikit_image(*pictures), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=8))
def test_pooled_is_never_above_the_mean(errors):
    truth = torch.full((12, 12, 3), 0.5)
    pairs = [(truth + error**0.5, truth, None) for error in errors]
    scores = film_scores(pairs, 'paper', None)
    assert scores['psnr'] == scores['psnr_pooled'] <= scores['psnr_mean'] + 1e-6
    assert scores['frames'] == len(errors)


def test_a_wall_is_no_person():
    "Without a matte a picture must lie on the protocol's background, or it is refused."
    bare = Clip([dataclasses.replace(frame, mask=torch.ones(24, 24)) for frame in noise_clip()])
    last = protocol_of('last:2')
    with pytest.raises(InputError, match='frame 0 has no matte'):
        all_scores(lambda frame, background: frame.image, bare, last, lpips=None)
    white = Clip([dataclasses.replace(frame, image=torch.ones(24, 24, 3)) for frame in bare])
    scores = all_scores(lambda frame, background: frame.image, white, last, lpips=None)
    assert scores['mse'] == 0


def test_background_and_matte():
    image, matte = torch.rand(8, 8, 3), torch.zeros(8, 8)
    assert (lay_on(image, matte, PRESETS['paper']) == 1).all()
    assert (lay_on(image, matte, PRESETS['gagavatar']) == 0).all()
    assert torch.equal(lay_on(image, None, PRESETS['paper']), image)


@needs('lpips')
def test_lpips_has_two_ways_of_use():
    lpips = open_lpips()
    if lpips is None:
        pytest.skip("AlexNet's weights are not here; spatialavatar0 assets says how to get them")
    moved = PHOTO.roll(3, 0)
    ours, theirs = (
        frame_scores(moved, PHOTO, PRESETS[name], lpips)['lpips']
        for name in ('paper', 'gaussianavatars')
    )
    assert theirs < ours < 0.5


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
    try:
        parts = frames_of(protocol_of(rule), n)
    except InputError:
        assert n < 10
        return
    used = sum(parts.values(), [])
    assert parts['test']
    assert len(set(used)) == len(used)
    assert max(used) < n
    if rule in ('last:7', 'share:.5'):
        assert sorted(used) == list(range(n))


def test_everybody_drives_once():
    pairs = reenactments(load_protocols()['vfhq_cross'], list('dacb'))
    assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list('abcd')
    assert all(a != b for a, b in pairs)
    for bad in ([], ['a', 'a'], ['a']):
        with pytest.raises(InputError):
            reenactments(load_protocols()['vfhq_cross'], bad)


def test_bad_protocol_files(tmp_path):
    file = tmp_path / 'p.yaml'
    good = dict(id='x', what='w', data='d', kind='subject', test=dict(last=3), preset='paper')
    for change in (
        dict(kind='?'),
        dict(test=dict(last=-1)),
        dict(test={}),
        dict(test=dict(last=3, odd=1)),
        dict(preset='?'),
        dict(colour='red'),
    ):
        file.write_text(yaml.safe_dump(dict(protocols=[good | change])))
        with pytest.raises(InputError):
            load_protocols(file)
    for text in ('', '[', 'protocols: 3', 'protocols: [3]'):
        file.write_text(text)
        with pytest.raises(InputError):
            load_protocols(file)
    file.write_text(yaml.safe_dump(dict(protocols=[good])))
    assert load_protocols(file)['x'].preset == 'paper'


# ---- judges


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 5), st.floats(-3, 3), st.floats(-90, 90))
def test_similarity_is_found_again(scale, turn, shift):
    c = scale * math.cos(turn)
    s = scale * math.sin(turn)
    A = torch.tensor([[c, -s, shift], [s, c, 2 * shift]]).double()
    points = 50 * torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(similarity(points, points @ A[:, :2].T + A[:, 2]), A, atol=1e-6)


class FakeNet:
    "Stands where ArcFace's weights would: says what it was given."

    def get_inputs(self):
        return [type('Input', (), dict(name='data'))]

    def run(self, _, x):
        self.seen = x['data']
        return [self.seen.mean((2, 3))]


def enlarged(image, times):
    planes = image.permute(2, 0, 1)[None]
    large = torch.nn.functional.interpolate(planes, scale_factor=times, mode='bicubic')
    return large[0].permute(1, 2, 0).clamp(0, 1)


@needs('mediapipe')
def test_arcface_gets_an_upright_face():
    net = FakeNet()
    goals = torch.tensor(ARCFACE_POINTS)
    with ArcFaceJudge(session=net) as judge, MediaPipeJudge() as points:
        tilted = warped(PHOTO, torch.tensor([[0.9, -0.35, 90.0], [0.35, 0.9, -30]]), 340)
        crop = judge.crop(tilted)
        assert crop.shape == (112, 112, 3)
        there = five_points(points(tilted)['landmarks'])
        here = five_points(points(enlarged(crop, 4))['landmarks'] / 4)
        A = similarity(there, goals)
        assert float((here - (there @ A[:, :2].T + A[:, 2])).norm(dim=-1).max()) < 1.5
        # where the fit says; a smile is wider than the standard face
        assert float((here - goals).norm(dim=-1).mean()) < 7
        assert set(judge(tilted)) == {'identity'}
        assert net.seen.shape == (1, 3, 112, 112)
        assert net.seen.dtype == np.float32
        assert -1 <= net.seen.min() < net.seen.max() <= 1
        assert judge(torch.full((64, 64, 3), 0.5)) is None


def test_arcface_says_who_has_it():
    with pytest.raises(InputError, match='insightface|onnxruntime'):
        ArcFaceJudge()


def mean_face():
    "68 landmarks, those that count in the places of a face."
    lm = np.random.default_rng(0).normal(size=(68, 3))
    lm[[36, 39]] = [-0.3, 0.3, 0]
    lm[[42, 45]] = [0.3, 0.3, 0]
    lm[30] = [0, 0, 0.3]
    lm[48] = [-0.25, -0.35, 0.1]
    lm[54] = [0.25, -0.35, 0.1]
    return lm


def random_checkpoint():
    "Weights in the form of Deep3DFaceRecon's."
    from torchvision.models import resnet50

    torch.manual_seed(0)
    backbone = resnet50().state_dict()
    heads = torch.nn.ModuleList(torch.nn.Conv2d(2048, n, 1) for n in Deep3DJudge.PARTS)
    weights = {f'backbone.{name}': value for name, value in backbone.items()}
    weights |= {f'final_layers.{name}': value for name, value in heads.state_dict().items()}
    return dict(net_recon=weights)


@needs('mediapipe', 'torchvision')
def test_deep3d_with_random_weights(tmp_path):
    "The network's shape, its file and its square; its true weights we do not have."
    import scipy.io

    with pytest.raises(InputError, match='lacks epoch_20.pth'):
        Deep3DJudge(tmp_path)
    scipy.io.savemat(tmp_path / 'similarity_Lm3D_all.mat', dict(lm=mean_face()))
    (tmp_path / 'epoch_20.pth').write_bytes(b'no')
    with pytest.raises(InputError, match='not the checkpoint'):
        Deep3DJudge(tmp_path)
    torch.save(random_checkpoint(), tmp_path / 'epoch_20.pth')
    judge = Deep3DJudge(tmp_path)
    said = judge(PHOTO)
    assert len(said['expression']) == 64
    assert len(said['pose']) == 3
    assert torch.isfinite(said['expression']).all()
    assert judge(torch.zeros(64, 64, 3)) is None
    judge.close()


@needs('dlib', 'face_recognition_models')
def test_dlib_knows_her_again():
    judge = DlibJudge()
    first = judge(PHOTO)['identity']
    again = judge((0.7 * PHOTO.flip(1) + 0.1).clamp(0, 1))['identity']
    assert len(first) == 128
    assert float((first - again).norm()) < 0.5
    assert judge(torch.zeros(80, 80, 3)) is None


@needs('mediapipe')
def test_pose_follows_a_tilt():
    with MediaPipeJudge() as judge:
        c, s = math.cos(0.2), math.sin(0.2)
        A = torch.tensor([[c, -s, 150 * (1 - c) + 150 * s], [s, c, 150 * (1 - c) - 150 * s]])
        turned = judge(warped(PHOTO, A, 300))['pose'] - judge(PHOTO)['pose']
        assert abs(abs(float(turned[2])) - 0.2) < 0.05
        assert float(turned[:2].abs().max()) < 0.12


# ---- lines and tables


def noise_clip(length=6):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(24, 24, 3, generator=g) for _ in range(length)]
    matte = torch.ones(24, 24)
    matte[0, 0] = 0.0
    still = dict(mask=matte, viewmat=torch.eye(4), K=torch.eye(3))
    return Clip([Frame(image, **still, time=i) for i, image in enumerate(images)])


def line(**more):
    def darker(frame, background):
        return frame.image * 0.9

    names = dict(method='dim', subject='s')
    return evaluate(darker, noise_clip(), 'splattingavatar', **names, lpips=None, **more)


def test_a_line_says_everything():
    made = line(seed=3, note='hello')
    row = row_of(made)
    wanted = (
        'method protocol data kind split subject driver background mask preset scores code seed '
        'device rendered torch seconds note'
    )
    assert list(row) == wanted.split()
    assert all(value is not None for value in row.values())
    assert row['scores']['lpips'] is None
    assert row['scores']['frames'] == 6
    assert line_of(json.loads(json.dumps(row))) == made
    assert code_state()


def test_results_resume_and_refuse(tmp_path, monkeypatch):
    book = Results(tmp_path / 'r.jsonl')
    book.add(line())
    book.add(line(seed=1))
    old = book.path.read_bytes()

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('json.dumps', stopped)
        with pytest.raises(KeyboardInterrupt):
            book.add(dataclasses.replace(book.lines[0], seed=2))
    assert book.path.read_bytes() == old
    assert len(Results(book.path).lines) == 2
    book.path.write_bytes(old[:-20])
    assert len(Results(book.path).lines) == 1
    book.path.write_bytes(b'x\n' + old)
    with pytest.raises(InputError, match='line 1'):
        Results(book.path)


def test_names_in_a_table_are_text():
    "A method or a data set is called what somebody called it: that is no Markdown and no HTML."
    odd = dict(method='a|b<img src=x>\n# c', protocol='\x1b[2J', data='`x`\u202e')
    text = result_table([dataclasses.replace(line(), **odd)])
    rows = text.split('\n')
    assert r'| a\|b\<img src=x>?# c |' in rows[2]
    assert rows[4].startswith(r'?[2J: \`x\`?, ')
    assert all(row.isprintable() for row in rows)


def test_tables_do_not_mix():
    one, other = line(), line(seed=1)
    text = result_table([one, other])
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
            result_table([one, dataclasses.replace(other, **change)])
    unseen = dict(value=math.nan, estimator='x', frames=0, lost=6)
    nothing = dataclasses.replace(one, scores=dict(CSIM=unseen, psnr=20.0))
    assert 'nan' not in result_table([nothing])


def test_another_driver_has_no_pixels():
    scores = line(driver='t', source=noise_clip()[0]).scores
    assert 'psnr' not in scores
    assert 'ssim' not in scores
    assert scores['frames'] == 6
    with pytest.raises(InputError, match='give source='):
        line(driver='t')
