"""Pictures and films of strangers: their kind, their order, and the colours they mean."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from spatialavatar0 import cli
from spatialavatar0.capture import footage
from spatialavatar0.capture.footage import film_pictures, open_film
from spatialavatar0.capture.landmarks import load_photo
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.media import is_film, is_picture, natural_order
from spatialavatar0.pictures.clips import read_picture

PORTRAIT = skimage.data.astronaut()[:192, 128:320]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*words, source=None):
    command = [FFMPEG, '-y', '-v', 'error', *map(str, words)]
    return subprocess.run(command, check=True, input=source or b'')


def off(image, truth=PORTRAIT):
    "Mean difference, of 255."
    return np.abs(np.asarray(image, float) - np.asarray(truth, float)).mean()


# ---- what a camera writes, by the standards; nothing of the package in it

# CIE XYZ of the primaries' red, green and blue, from the tables of the standards
TO_XYZ = {
    'bt709': [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
    'smpte432': [[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0.0, 0.0451, 1.0439]],
    'bt2020': [[0.6370, 0.1446, 0.1689], [0.2627, 0.6780, 0.0593], [0.0, 0.0281, 1.0610]],
    'adobe': [[0.5767, 0.1856, 0.1882], [0.2973, 0.6274, 0.0753], [0.0270, 0.0707, 0.9911]],
}


def light_in(primaries):
    "(H,W,3) light of the portrait, white is 1, in other primaries."
    codes = PORTRAIT / 255
    light = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    way = np.linalg.solve(np.array(TO_XYZ[primaries]), np.array(TO_XYZ['bt709']))
    return (light @ way.T).clip(0)


def hlg(primaries, white=203.0):
    "ARIB STD-B67: display light of a 1,000 cd/m2 screen back to the scene, then the curve."
    shown = light_in(primaries) * white / 1000
    luminance = shown @ np.array(TO_XYZ[primaries])[1]
    scene = shown * luminance.clip(1e-9)[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    bright = a * np.log((12 * scene - b).clip(1e-9)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def pq(primaries, white=203.0):
    "SMPTE ST 2084."
    y = (light_in(primaries) * white / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def srgb(primaries, white=None):
    light = light_in(primaries).clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


CURVES = {'arib-std-b67': hlg, 'smpte2084': pq}
X265 = '-c:v libx265 -crf 6 -preset veryfast -x265-params log-level=0'
X264 = '-c:v libx264 -crf 6 -preset veryfast'
VP9 = '-c:v libvpx-vp9 -crf 8 -b:v 0 -cpu-used 5'
# name: primaries, transfer, matrix, range, form of pixels, white, encoder
FILMS = {
    'phone.mov': ('bt2020', 'arib-std-b67', 'bt2020nc', 'tv', 'yuv420p10le', 203, X265),
    'full.mkv': ('bt2020', 'arib-std-b67', 'bt2020nc', 'pc', 'yuv422p10le', 203, X264),
    'web.webm': ('bt2020', 'arib-std-b67', 'bt2020nc', 'tv', 'yuv420p10le', 203, VP9),
    'twelve.mp4': ('bt2020', 'arib-std-b67', 'bt2020nc', 'tv', 'yuv444p12le', 203, X265),
    'hdr10.mp4': ('bt2020', 'smpte2084', 'bt2020nc', 'tv', 'yuv420p10le', 203, X265),
    'hdr10.ts': ('bt2020', 'smpte2084', 'bt2020nc', 'tv', 'yuv420p10le', 203, X265),
    'peak.mkv': (
        'bt2020',
        'smpte2084',
        'bt2020nc',
        'tv',
        'yuv420p10le',
        203,
        X265 + ':max-cll=4000,400',
    ),
    'dim.mp4': (
        'bt2020',
        'smpte2084',
        'bt2020nc',
        'tv',
        'yuv420p10le',
        100,
        X265 + ':max-cll=100,50',
    ),
    'p3_pq.mov': ('smpte432', 'smpte2084', 'bt709', 'pc', 'yuv420p10le', 203, X264),
    'p3.mov': ('smpte432', 'bt709', 'bt709', 'tv', 'yuv420p', 0, X264),
    'p3_full.mp4': ('smpte432', 'iec61966-2-1', 'smpte170m', 'pc', 'yuv420p', 0, X265),
    'wide.mkv': ('bt2020', 'bt2020-10', 'bt2020nc', 'tv', 'yuv420p10le', 0, X265),
    'hd.mp4': ('bt709', 'bt709', 'bt709', 'tv', 'yuv420p', 0, X264),
    'hd_full.mp4': ('bt709', 'bt709', 'bt709', 'pc', 'yuv420p', 0, X264),
    'ntsc.mkv': ('bt709', 'smpte170m', 'smpte170m', 'tv', 'yuv420p', 0, X264),
    'camcorder.m2ts': ('bt709', 'bt709', 'bt709', 'tv', 'yuv420p10le', 0, X264),
}


def write_film(path, primaries, transfer, matrix, span, form, white, encoder):
    "Two pictures of the portrait, in a film that says what its numbers mean."
    codes = CURVES.get(transfer, srgb)(primaries, white)
    raw = (codes * 65535 + 0.5).astype('<u2').tobytes() * 2
    scale = f'scale=out_color_matrix={matrix}:out_range={span}:flags=accurate_rnd+full_chroma_int'
    params = f'range={span}:color_primaries={primaries}:color_trc={transfer}:colorspace={matrix}'
    source = '-f rawvideo -pix_fmt rgb48le -s 192x192 -r 25 -i -'.split()
    filters = ['-vf', f'{scale},format={form},setparams={params}']
    ffmpeg(*source, *filters, *encoder.split(), path, source=raw)


@pytest.mark.parametrize('name', FILMS)
def test_films_become_srgb_by_their_tags(tmp_path, name):
    write_film(tmp_path / name, *FILMS[name])
    film = open_film(tmp_path / name)
    pictures = list(film_pictures(film))
    assert len(pictures) == 2
    assert off(pictures[0]) < 3, film.colours


def test_pq_as_another_program_writes_it(tmp_path):
    Image.fromarray(PORTRAIT).save(tmp_path / 'a.png')
    way = (
        'format=gbrp16le,setparams=color_primaries=bt709:color_trc=iec61966-2-1:colorspace=gbr,'
        'zscale=t=linear:npl=203,format=gbrpf32le,'
        'zscale=p=bt2020:t=smpte2084:m=bt2020nc:r=limited:npl=203,format=yuv444p10le'
    )
    ffmpeg('-i', tmp_path / 'a.png', '-vf', way, *X265.split(), tmp_path / 'a.mp4')
    assert off(next(film_pictures(open_film(tmp_path / 'a.mp4')))) < 3


def test_highlights_are_bent_not_cut(tmp_path):
    "A lamp above white: brighter stays brighter, skin stays as it is."
    steps = np.linspace(0, 1, 192)
    raw = np.broadcast_to(steps[:, None, None], (192, 192, 3))
    raw = (raw * 65535 + 0.5).astype('<u2').tobytes()
    way = 'scale=out_color_matrix=bt2020nc:out_range=tv:flags=accurate_rnd,format=yuv444p10le'
    way += ',setparams=range=tv:color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc'
    source = '-f rawvideo -pix_fmt rgb48le -s 192x192 -r 25 -i -'.split()
    ffmpeg(*source, '-vf', way, '-c:v', 'ffv1', tmp_path / 'a.mkv', source=raw)
    shown = next(film_pictures(open_film(tmp_path / 'a.mkv'))).astype(int)[:, 96, 1]
    assert (np.diff(shown) >= 0).all() and shown[-1] == 255
    assert 245 <= shown[144] <= 253  # 75% of HLG is white
    assert shown[140] < shown[144] < shown[152]


def told(run):
    "The error of a call, one line."
    with pytest.raises(InputError) as error:
        run()
    text = str(error.value)
    assert text.isprintable() and '\n' not in text
    return text


STRANGE = {
    'log': 'color_trc=log100',
    'cinema': 'color_trc=smpte428',
    'ictcp': 'colorspace=ictcp:color_trc=smpte2084:color_primaries=bt2020',
}


@pytest.mark.parametrize('name', STRANGE)
def test_tags_that_nobody_can_follow_are_refused(tmp_path, name):
    source = f'testsrc2=s=192x192:d=0.1,format=yuv420p,setparams={STRANGE[name]}'
    ffmpeg('-f', 'lavfi', '-i', source, '-c:v', 'ffv1', tmp_path / 'a.mkv')
    assert 'its colours are' in told(lambda: open_film(tmp_path / 'a.mkv'))


@pytest.fixture
def other_ffmpeg(tmp_path, monkeypatch):
    "Sets a program that stands for ffmpeg; it may end in a call of the real one."

    def use(script):
        program = tmp_path / 'other_ffmpeg'
        program.write_text(f'#!/bin/sh\nREAL={FFMPEG}\n{script}')
        program.chmod(0o755)
        monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(program))

    return use


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a shell')
def test_another_build_of_ffmpeg(tmp_path, other_ffmpeg):
    "Without zscale, the same picture; without lut3d, one clear line and never a wrong picture."
    write_film(tmp_path / 'a.mov', *FILMS['phone.mov'])
    film = open_film(tmp_path / 'a.mov')
    lacks = 'case "$*" in *{0}*) echo "No such filter: \'{0}\'" >&2; exit 8;; esac; exec $REAL "$@"'
    other_ffmpeg(lacks.format('zscale'))
    assert off(next(film_pictures(film))) < 3
    other_ffmpeg(lacks.format('lut3d'))
    said = told(lambda: next(film_pictures(film)))
    assert 'lacks the filter lut3d' in said and 'imageio-ffmpeg' in said


# ---- films of all kinds, and films that are none


def test_program_that_is_slow_is_waited_for_and_called_slow(tmp_path, other_ffmpeg, monkeypatch):
    "A time-out is tried again, and is never called damage."
    write_film(tmp_path / 'a.mp4', *FILMS['hd.mp4'])
    film = open_film(tmp_path / 'a.mp4')
    monkeypatch.setattr(footage, '_PATIENCE', (0.5, 20.0))
    once = f'if [ ! -e {tmp_path}/slept ]; then touch {tmp_path}/slept; exec sleep 30; fi\n'
    other_ffmpeg(once + 'exec $REAL "$@"')
    assert len(list(film_pictures(film))) == 2
    (tmp_path / 'slept').unlink()
    assert open_film(tmp_path / 'a.mp4') == film
    monkeypatch.setattr(footage, '_PATIENCE', (0.3, 0.5))
    other_ffmpeg('exec sleep 30')
    for run in (lambda: open_film(tmp_path / 'a.mp4'), lambda: next(film_pictures(film))):
        said = told(run)
        assert 'did not answer' in said and 'call again' in said and 'damage' not in said


def test_program_that_stops_in_the_middle_goes_on_where_it_was(tmp_path, other_ffmpeg, monkeypatch):
    source = 'testsrc2=s=64x64:d=1:r=25'
    ffmpeg('-f', 'lavfi', '-i', source, '-c:v', 'ffv1', tmp_path / 'a.mkv')
    film = open_film(tmp_path / 'a.mkv')
    whole = list(film_pictures(film))
    monkeypatch.setattr(footage, '_PATIENCE', (1.0, 20.0))
    half = f'if [ ! -e {tmp_path}/cut ]; then touch {tmp_path}/cut; $REAL "$@" | head -c 100000; '
    other_ffmpeg(half + 'exec sleep 30; fi\nexec $REAL "$@"')
    again = list(film_pictures(film))
    assert len(again) == 25 and all(np.array_equal(a, b) for a, b in zip(whole, again))


def moving(path, *words, seconds=1, size='192x128', rate=25):
    "A moving picture in a file."
    source = f'testsrc2=s={size}:d={seconds}:r={rate}'
    ffmpeg('-f', 'lavfi', '-i', source, *words, path)
    return path


KINDS = {
    'a.mpg': '-c:v mpeg2video',
    'A.MPEG': '-c:v mpeg1video',
    'a.ts': '-c:v libx264 -pix_fmt yuv420p',
    'a.MTS': '-c:v libx264 -pix_fmt yuv420p -f mpegts',
    'a.m2ts': '-c:v libx264 -pix_fmt yuv420p',
    'a.3gp': '-c:v mpeg4',
    'a.wmv': '-c:v wmv2',
    'a.ogv': '-c:v libtheora',
    'a.flv': '-c:v flv',
    'a.vob': '-c:v mpeg2video',
    'a.mxf': '-c:v mpeg2video',
}


@pytest.mark.parametrize('name', KINDS)
def test_films_by_any_name(tmp_path, name, recwarn):
    path = moving(tmp_path / name, *KINDS[name].split())
    truth = list(film_pictures(open_film(moving(tmp_path / 'truth.mkv', '-c:v', 'ffv1'))))
    assert is_film(path) and not is_picture(path)
    shown = list(film_pictures(open_film(path)))
    assert abs(len(shown) - 25) <= 2  # programme streams may lose the last one
    assert off(shown[3], truth[3]) < 16
    assert not recwarn.list


def test_a_film_is_a_film_for_build_by_any_name(tmp_path, capfd):
    "It is tracked, and nobody is in it."
    path = moving(tmp_path / 'a.mpg', '-c:v', 'mpeg2video', seconds=0.2)
    assert cli.main(['build', str(path), '--out', str(tmp_path / 'out'), '--preset', 'tiny']) == 1
    assert 'expected one face in the film' in capfd.readouterr().err


def test_turned_films_are_upright_without_a_word(tmp_path, recwarn, caplog, capfd):
    path = moving(tmp_path / 'a.mp4', '-pix_fmt', 'yuv420p', size='192x128')
    for turn, k in ((90, 1), (180, 2), (270, 3)):
        turned = tmp_path / f'{turn}.mov'
        ffmpeg('-display_rotation', turn, '-i', path, '-c', 'copy', turned)
        upright = next(film_pictures(open_film(path)))
        assert off(np.rot90(upright, k), next(film_pictures(open_film(turned)))) < 2
    assert not recwarn.list and not caplog.records
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize(
    'name,words',
    [
        ('a.mpg', '-c:v mpeg2video -q:v 2 -flags +ildct+ilme'),
        ('a.ts', '-c:v libx264 -crf 10 -pix_fmt yuv420p -x264opts tff=1'),
        ('a.mov', '-c:v prores_ks -flags +ildct'),
    ],
)
def test_interlaced_films_have_no_combs(tmp_path, name, words):
    source = 'testsrc2=s=192x192:d=1:r=50,interlace=scan=tff:lowpass=off'
    ffmpeg('-f', 'lavfi', '-i', source, *words.split(), tmp_path / name)

    def combs(picture):  # lines that differ from both neighbours, which are alike
        lines = picture.astype(float).mean(-1)
        apart = np.abs(lines[1:-1] - (lines[:-2] + lines[2:]) / 2)
        return (apart > 30).mean()

    film = open_film(tmp_path / name)
    raw = footage.Film(film.path, film.fps, film.about, ('-fps_mode', 'passthrough'))
    whole = open_film(moving(tmp_path / 'whole.mkv', '-c:v', 'ffv1', size='192x192'))
    before, after, none = (
        np.mean([combs(p) for p in film_pictures(f)]) for f in (raw, film, whole)
    )
    assert before > 1.2 * none and after < none + 0.35 * (before - none), (before, after, none)


def test_uneven_films_keep_their_time(tmp_path):
    "Every other second runs at a fifth of the pace: what is shown at a time stays there."
    way = 'select=gte(mod(t\\,2)\\,1)+not(mod(n\\,5))'
    path = tmp_path / 'a.mkv'
    source = 'testsrc2=s=128x128:d=4:r=25'
    ffmpeg('-f', 'lavfi', '-i', source, '-vf', way, '-fps_mode', 'vfr', '-c:v', 'ffv1', path)
    whole = list(
        film_pictures(
            open_film(moving(tmp_path / 'b.mkv', '-c:v', 'ffv1', seconds=4, size='128x128'))
        )
    )
    film = open_film(path)
    shown = list(film_pictures(film))
    assert abs(len(shown) / film.fps - 4) < 0.3
    for second in (1.5, 3.5):
        here = shown[round(second * film.fps)]
        near = range(round(second * 25) - 2, round(second * 25) + 3)
        assert min(off(here, whole[i]) for i in near) < 1


def fast(path):
    moving(path, '-vf', 'settb=1/1000000,setpts=N', '-r', 1_000_000, '-frames:v', 20)


def clock(path):  # all pictures at one time
    ffmpeg('-f', 'lavfi', '-i', 'testsrc2=s=64x64:d=1', '-r', 10**6, '-frames:v', 20, path)


def empty(path):
    moving(path, '-frames:v', 0, '-c:v', 'ffv1')


def song(path):
    Image.new('RGB', (300, 300), 'red').save(path.with_suffix('.png'))
    ffmpeg(
        '-f',
        'lavfi',
        '-i',
        'sine=d=1',
        '-i',
        path.with_suffix('.png'),
        '-map',
        0,
        '-map',
        1,
        '-disposition:v',
        'attached_pic',
        path,
    )


def large(path):
    ffmpeg('-f', 'lavfi', '-i', 'color=s=13000x13000:r=1:d=1', '-c:v', 'mjpeg', path)


def torn(path):
    moving(path.with_suffix('.mov'), '-c:v', 'mpeg4')
    path.write_bytes(path.with_suffix('.mov').read_bytes()[:3000])


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(50_000))


def hollow(path):  # the frame is whole, what is in it is noise
    moving(path, '-c:v', 'libx264', '-pix_fmt', 'yuv420p', size='256x256')
    data = bytearray(path.read_bytes())
    at = data.find(b'mdat') + 8
    data[at : at + 30_000] = np.random.default_rng(0).bytes(min(30_000, len(data) - at))
    path.write_bytes(data)


HOSTILE = {
    'fast.mp4': (fast, 'more than 1000 a second'),
    'clock.mkv': (clock, 'more than 1000 a second'),
    'empty.mkv': (empty, 'is not a film that ffmpeg can read'),
    'empty.avi': (empty, 'holds no picture'),
    'song.mp3': (song, 'sound but no pictures'),
    'large.mov': (large, 'at most 40 million pixels'),
    'torn.mp4': (torn, 'moov atom not found'),
    'noise.mp4': (noise, 'is not a film that ffmpeg can read'),
    'hollow.mp4': (hollow, 'cannot be decoded'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_one_clear_line_in_time(tmp_path, name, capfd):
    import spatialavatar0.pipeline  # noqa: F401 the clock below is not for imports

    make, says = HOSTILE[name]
    make(tmp_path / name)
    began = time.monotonic()
    code = cli.main(['track', str(tmp_path / name), '--out', str(tmp_path / 'out')])
    assert time.monotonic() - began < 20
    lines = [x for x in capfd.readouterr().err.splitlines() if not x.startswith('note: ')]
    assert code == 1 and len(lines) == 1 and lines[0].isprintable()
    assert says in lines[0], lines


def test_a_film_that_changes_its_size_is_not_torn_apart(tmp_path):
    small = moving(tmp_path / 's.ts', '-c:v', 'mpeg2video', size='128x128')
    more = moving(tmp_path / 'm.ts', '-c:v', 'mpeg2video', size='256x192')
    (tmp_path / 'a.ts').write_bytes(small.read_bytes() + more.read_bytes())
    said = told(lambda: list(film_pictures(open_film(tmp_path / 'a.ts'))))
    assert 'changes its size to 256 x 192 pixels' in said


def test_damage_inside_a_film_is_told(tmp_path):
    "The rest is shown, with ffmpeg's own words."
    path = moving(tmp_path / 'a.ts', '-c:v', 'mpeg2video', size='256x256')
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='may be damaged: .*\\w'):
        assert len(list(film_pictures(open_film(path)))) > 15


# ---- order


def test_natural_order():
    names = [f'frame_{i}.png' for i in range(1, 13)]
    assert natural_order(sorted(names)) == names
    two = [f'cam{c}_t{t}.jpg' for c in (1, 2, 10) for t in (5, 40, 300)]
    assert natural_order(two[::-1]) == two
    mixed = ['a1.png', 'A2.JPG', 'a003.webp', 'a10.png', 'b.png', 'b1.png']
    assert natural_order(mixed[::-1]) == mixed
    assert natural_order(['9' * 40, '1' * 41, '2']) == ['2', '9' * 40, '1' * 41]
    folders = [Path(f'{d}/{f}.png') for d in ('2', '10') for f in ('9', '11')]
    assert natural_order(folders[::-1]) == folders


@pytest.fixture
def shots(tmp_path):
    "Twelve pictures without leading zeros, and what systems and people leave beside them."
    folder = tmp_path / 'shots'
    (folder / 'old.png').mkdir(parents=True)
    for i in range(1, 13):
        ending = ('png', 'JPG', 'webp')[i % 3]
        grey = np.full((64, 64, 3), 20 * i, np.uint8)
        Image.fromarray(grey).save(folder / f'frame_{i}.{ending}', quality=95)
    for name in ('._frame_1.png', '.DS_Store', 'Thumbs.db', 'notes.txt', '.hidden.jpg'):
        (folder / name).write_bytes(b'nothing')
    return folder


def test_a_folder_of_pictures_is_in_the_order_of_time(shots):
    film = open_film(shots)
    assert film.about == 12
    brightness = [picture.mean() for picture in film_pictures(film)]
    assert np.allclose(brightness, 20 * np.arange(1, 13), atol=2)
    assert abs(next(film_pictures(film, 9)).mean() - 200) < 2


@pytest.mark.parametrize('twin', ['frame_01.png', 'frame_1.png', 'frame_0012.jpeg'])
def test_one_instant_twice_is_asked_about(shots, twin, capfd):
    Image.new('RGB', (64, 64)).save(shots / twin)
    assert cli.main(['track', str(shots), '--out', str(shots.parent / 'out')]) == 1
    said = capfd.readouterr().err
    assert twin in said and 'the same picture' in said and 'keep one' in said


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / '.a.png').write_bytes(b'')
    assert 'the folder has none' in told(lambda: open_film(tmp_path))


# ---- photos


def profile(primaries, curve, space=b'RGB '):
    "An ICC profile (version 2) of primaries and a power; of grey, the power alone."

    def number(value):  # 16 bits, a point, 16 bits
        return struct.pack('>i', round(value * 65536))

    def xyz(values):
        return b'XYZ ' + bytes(4) + b''.join(map(number, values))

    bend = b'curv' + bytes(4) + struct.pack('>IH', 1, round(curve * 256)) + bytes(2)
    white = (0.9642, 1, 0.8249)
    tags = {b'wtpt': xyz(white), b'kTRC': bend}
    if space == b'RGB ':
        bradford = np.array(
            [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
        )
        columns = np.array(primaries)
        gain = bradford @ np.array(white) / (bradford @ columns.sum(1))
        columns = np.linalg.solve(bradford, gain[:, None] * (bradford @ columns))
        tags = {b'wtpt': xyz(white)}
        for i, name in enumerate((b'r', b'g', b'b')):
            tags |= {name + b'XYZ': xyz(columns[:, i]), name + b'TRC': bend}
    table, data = struct.pack('>I', len(tags)), b''
    for name, body in tags.items():
        table += name + struct.pack('>II', 132 + 12 * len(tags) + len(data), len(body))
        data += body
    head = struct.pack(
        '>I4x4s4s4s4s', 128 + len(table) + len(data), b'\2\x10\0\0', b'mntr', space, b'XYZ '
    )
    head = (head.ljust(36, b'\0') + b'acsp').ljust(68, b'\0') + b''.join(map(number, white))
    return head.ljust(128, b'\0') + table + data


# of the romm (ProPhoto) space with its own white, D50
TO_XYZ['romm'] = [[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]]


def coded(primaries, curve):
    "The portrait's numbers in other primaries and under a power."
    light = light_in(primaries) if primaries != 'romm' else light_in_romm()
    return (light.clip(0, 1) ** (1 / curve) * 255 + 0.5).astype(np.uint8)


def light_in_romm():
    codes = PORTRAIT / 255
    light = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    srgb_d50 = np.array(
        [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    )
    return (light @ np.linalg.solve(np.array(TO_XYZ['romm']), srgb_d50).T).clip(0)


def by_both(path):
    "A picture as a photo and as a frame of a data set: the same."
    photo = load_photo(path).numpy() * 255
    frame = read_picture(path)[..., :3]
    assert off(photo, frame) < 0.6
    return frame


SPACES = {
    'P3': ('smpte432', 2.2),
    'Adobe RGB': ('adobe', 2.2),
    'ProPhoto': ('romm', 1.8),
    'BT.2020': ('bt2020', 2.4),
}


@pytest.mark.parametrize('ending', ['.jpg', '.png', '.tif', '.webp', '.JPG'])
@pytest.mark.parametrize('space', SPACES)
def test_photos_become_srgb_by_their_profile(tmp_path, space, ending, recwarn):
    path = tmp_path / f'a{ending}'
    icc = profile(TO_XYZ[SPACES[space][0]], SPACES[space][1])
    how = dict(quality=98, subsampling=0) if ending.lower() == '.jpg' else {}
    how |= dict(lossless=True) if ending == '.webp' else {}
    Image.fromarray(coded(*SPACES[space])).save(path, icc_profile=icc, **how)
    assert off(by_both(path)) < 1.5
    assert not recwarn.list


def test_profiles_of_other_pictures(tmp_path):
    "Palettes, transparency and grey go through their profile, too."
    icc = profile(TO_XYZ['adobe'], 2.2)
    pixels = Image.fromarray(coded('adobe', 2.2))
    pixels.quantize(256).save(tmp_path / 'p.png', icc_profile=icc)
    assert off(by_both(tmp_path / 'p.png')) < 6
    clear = pixels.copy()
    clear.putalpha(Image.new('L', clear.size, 128))
    clear.save(tmp_path / 'a.png', icc_profile=icc)
    read = read_picture(tmp_path / 'a.png')
    assert off(read[..., :3]) < 1.5 and (read[..., 3] == 128).all()
    grey = profile(None, 1.0, b'GRAY')
    light = np.full((64, 64), 55, np.uint8)  # 21.6 % of the light, in a linear space
    Image.fromarray(light).save(tmp_path / 'g.png', icc_profile=grey)
    assert abs(load_photo(tmp_path / 'g.png').mean() * 255 - 128) < 2
    Image.fromarray(light.astype(np.uint16) * 257).save(tmp_path / 'g16.png', icc_profile=grey)
    assert abs(load_photo(tmp_path / 'g16.png').mean() * 255 - 128) < 2
    matte = read_picture(tmp_path / 'g.png', grey=True)  # amounts are no colours
    assert (matte[..., 0] == 55).all()


def test_a_profile_that_is_srgb_changes_no_byte(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    Image.fromarray(PORTRAIT).save(tmp_path / 'a.png', icc_profile=icc)
    assert np.array_equal(read_picture(tmp_path / 'a.png'), PORTRAIT)


def test_inks(tmp_path):
    Image.fromarray(PORTRAIT).convert('CMYK').save(tmp_path / 'a.jpg', quality=98, subsampling=0)
    with pytest.warns(UserWarning, match=r'inks \(CMYK\) without a profile'):
        assert off(read_picture(tmp_path / 'a.jpg')) < 3


def inks_profile():
    "An ICC profile of inks: nothing is white, black ink alone a middle grey, all else black."
    table = np.zeros((2, 2, 2, 2, 3), np.uint8) + np.array([0, 128, 128], np.uint8)
    table[0, 0, 0, 0] = 255, 128, 128  # Lab of white
    table[0, 0, 0, 1] = 128, 128, 128  # half the lightness
    straight = bytes(range(256))
    one = struct.pack('>9i', *[65536 if i % 4 == 0 else 0 for i in range(9)])
    look = b'mft1' + bytes(4) + bytes([4, 3, 2, 0]) + one + straight * 4
    look += table.tobytes() + straight * 3
    white = b'XYZ ' + bytes(4) + struct.pack('>3i', 63190, 65536, 54061)
    at = 132 + 24
    rows = b'wtpt' + struct.pack('>II', at, 20) + b'A2B0' + struct.pack('>II', at + 20, len(look))
    body = struct.pack('>I', 2) + rows + white + look
    head = struct.pack('>I4x4s4s4s4s', 128 + len(body), b'\2\x10\0\0', b'prtr', b'CMYK', b'Lab ')
    head = (head.ljust(36, b'\0') + b'acsp').ljust(68, b'\0')
    return (head + struct.pack('>3i', 63190, 65536, 54061)).ljust(128, b'\0') + body


def test_inks_by_their_profile(tmp_path, recwarn):
    ink = np.zeros((64, 128, 4), np.uint8)
    ink[:, 64:, 3] = 255
    picture = Image.frombytes('CMYK', (128, 64), ink.tobytes())
    for name in ('a.jpg', 'a.tif'):
        picture.save(tmp_path / name, icc_profile=inks_profile())
        shown = by_both(tmp_path / name).astype(int)
        assert shown[:, :60].min() > 250
        assert np.abs(shown[:, 70:] - 119).max() < 4  # L* = 50
    assert not [w for w in recwarn.list if 'CMYK' in str(w.message)]


BROKEN = {
    'noise': np.random.default_rng(0).bytes(600),
    'empty': b'x',
    'cut': profile(TO_XYZ['adobe'], 2.2)[:160],
    'of grey': profile(None, 2.2, b'GRAY'),
    'of inks': profile(None, 2.2, b'CMYK'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_profile_costs_a_word(tmp_path, name):
    path = tmp_path / 'a.jpg'
    Image.fromarray(PORTRAIT).save(path, icc_profile=BROKEN[name], quality=98, subsampling=0)
    with pytest.warns(UserWarning, match='its colour profile cannot be used'):
        assert off(read_picture(path)) < 1.5
    with pytest.warns(UserWarning, match='its colour profile cannot be used'):
        assert off(load_photo(path) * 255) < 1.5


def test_other_ways_to_say_the_colours(tmp_path):
    "Tags of films in PNG and AVIF, a gamma in PNG, Adobe RGB in Exif."
    tag = PngInfo()
    tag.add(b'cICP', bytes([9, 16, 0, 1]))  # BT.2020, PQ
    Image.fromarray((pq('bt2020') * 255 + 0.5).astype(np.uint8)).save(
        tmp_path / 'pq.png', pnginfo=tag
    )
    assert off(by_both(tmp_path / 'pq.png')) < 2
    tag = PngInfo()
    tag.add(b'gAMA', struct.pack('>I', 100_000))
    Image.fromarray((light_in('bt709') * 255 + 0.5).astype(np.uint8)).save(
        tmp_path / 'g.png', pnginfo=tag
    )
    assert off(by_both(tmp_path / 'g.png')) < 3
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: 'R03', 2: b'0100'}
    Image.fromarray(coded('adobe', 2.2)).save(
        tmp_path / 'a.jpg', exif=exif, quality=98, subsampling=0
    )
    assert off(by_both(tmp_path / 'a.jpg')) < 1.5
    codes = (srgb('smpte432') * 255 + 0.5).astype(np.uint8)
    way = 'scale=out_color_matrix=bt709:out_range=pc:flags=accurate_rnd,format=yuv444p,setparams='
    way += 'range=pc:color_primaries=smpte432:color_trc=iec61966-2-1:colorspace=bt709'
    source = '-f rawvideo -pix_fmt rgb24 -s 192x192 -i -'.split()
    how = '-frames:v 1 -c:v libaom-av1 -crf 4 -cpu-used 8 -still-picture 1'.split()
    ffmpeg(*source, '-vf', way, *how, tmp_path / 'a.avif', source=codes.tobytes())
    assert off(by_both(tmp_path / 'a.avif')) < 2


def test_heic(tmp_path, monkeypatch):
    "Read with its package; without it, one line that names it."
    heif = pytest.importorskip('pillow_heif')
    icc = profile(TO_XYZ['smpte432'], 2.2)
    heif.from_pillow(Image.fromarray(coded('smpte432', 2.2))).save(
        tmp_path / 'a.heic', quality=95, icc_profile=icc
    )
    assert off(by_both(tmp_path / 'a.heic')) < 3
    for known in (Image.OPEN, Image.EXTENSION):
        for name in [k for k in known if 'HEI' in str(k).upper() or k == 'HEIF']:
            monkeypatch.delitem(known, name)
    monkeypatch.setattr(Image, 'ID', [name for name in Image.ID if name != 'HEIF'])
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    said = told(lambda: load_photo(tmp_path / 'a.heic'))
    assert 'HEIC' in said and 'pip install pillow-heif' in said
    assert 'pip install pillow-heif' in told(lambda: read_picture(tmp_path / 'a.heic'))


def test_pictures_with_16_bits_and_turned_ones(tmp_path):
    deep = PORTRAIT.astype(np.uint16) * 257
    ffmpeg(
        *'-f rawvideo -pix_fmt rgb48le -s 192x192 -i -'.split(),
        '-frames:v',
        1,
        tmp_path / 'a.png',
        source=deep.tobytes(),
    )
    assert off(load_photo(tmp_path / 'a.png') * 255) < 1
    icc = profile(TO_XYZ['adobe'], 2.2)
    exif = Image.Exif()
    exif[274] = 6
    lying = np.rot90(coded('adobe', 2.2)).copy()
    Image.fromarray(lying).save(
        tmp_path / 'r.jpg', exif=exif, icc_profile=icc, quality=98, subsampling=0
    )
    assert off(load_photo(tmp_path / 'r.jpg') * 255) < 1.5


def test_why_there_is_no_face(tmp_path, capfd):
    clear = np.dstack([PORTRAIT, np.zeros((192, 192), np.uint8)])
    Image.fromarray(clear).save(tmp_path / 'clear.png')
    Image.new('RGB', (300, 300), 'grey').save(tmp_path / 'grey.png')
    Image.fromarray(PORTRAIT[:40, :40]).save(tmp_path / 'tiny.png')
    Image.fromarray(PORTRAIT[:70, :70]).save(tmp_path / 'corner.png')
    said = dict(clear='transparent everywhere', grey='all of one colour', tiny='40 x 40 pixels')
    for name, says in (said | dict(corner='only 70 x 70 pixels')).items():
        words = ['build', str(tmp_path / f'{name}.png'), '--out', str(tmp_path / name)]
        assert cli.main(words) == 1
        assert says in capfd.readouterr().err


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
@pytest.mark.parametrize('read', [load_photo, read_picture])
def test_pictures_of_too_many_pixels(tmp_path, name, read):
    "Refused before they are decoded: in no time, in no memory."
    Image.new('1', (13_000, 13_000)).save(tmp_path / name)
    began = time.monotonic()
    assert '13000 x 13000 pixels' in told(lambda: read(tmp_path / name))
    assert time.monotonic() - began < 2
