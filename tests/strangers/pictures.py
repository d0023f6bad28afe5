"""Photos, films and folders of pictures."""

import io
import struct
import subprocess
import zlib
from itertools import islice

import imageio_ffmpeg
import numpy as np
from PIL import Image

from spatialavatar0.capture.footage import film_pictures, open_film
from spatialavatar0.capture.landmarks import load_photo

from .make import ESCAPES, INSTEAD, chunk, file, instead, picture, png, samples, written
from .room import HARMLESS, SOUND, Case

# ---- photos


def saved(image, form, **how):
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def flat(size=(80, 80), mode='RGB', value=0):
    return Image.new(mode, size, value)


def floats(value):
    "A TIFF of floats, one of which is something."
    values = np.full((80, 80), 0.5, np.float32)
    values[3, 4] = value
    return saved(Image.fromarray(values), 'TIFF')


def text_bomb():
    "A PNG whose comment unfolds to 100 MB."
    data = b'Comment\0\0' + zlib.compress(bytes(10**8), 9)
    return png(80, 80, chunk(b'zTXt', data), body=zlib.compress(bytes(81 * 80 * 3)))


def profile_bomb():
    "A PNG whose colour profile unfolds to 200 MB."
    data = b'p\0\0' + zlib.compress(bytes(2 * 10**8), 9)
    return png(80, 80, chunk(b'iCCP', data), body=zlib.compress(bytes(80 * 241)))


def large(side):
    "A black PNG of so many pixels a side, in a few kilobytes."
    row = zlib.compressobj(9)
    body = row.compress(bytes((side + 1) * side // 1)) + row.flush()
    return png(side, side, colour=0, body=body)


def ppm(width, height, most=255, data=b'\0' * 100):
    return f'P6 {width} {height} {most}\n'.encode() + data


def bmp(width, height):
    head = b'BM' + struct.pack('<IHHI', 1000, 0, 0, 54)
    return (
        head + struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(900)
    )


def gif(width, height):
    start = b'GIF89a' + struct.pack('<HHBBB', width, height, 0x80, 0, 0) + bytes(6)
    frame = b',' + struct.pack('<HHHHB', 0, 0, width, height, 0)
    return start + frame + b'\x02\x02\x4c\x01\x00;'


def jpeg_of(width, height):
    "A sound JPEG whose header tells another size."
    data = bytearray(picture('JPEG', (80, 80)))
    at = data.index(b'\xff\xc0') + 5
    data[at : at + 4] = struct.pack('>HH', height, width)
    return bytes(data)


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return picture('JPEG', (90, 80), exif=exif)


def commented(text):
    exif = Image.Exif()
    exif[0x010E] = text
    return picture('JPEG', (80, 80), exif=exif)


def frames(count):
    "A GIF of very many frames."
    one = flat((64, 64), 'P')
    return saved(one, 'GIF', save_all=True, append_images=[one] * count, duration=20)


def webp_of(width, height):
    body = b'VP8X' + struct.pack('<I', 10) + bytes(4)
    body += struct.pack('<I', width - 1)[:3] + struct.pack('<I', height - 1)[:3]
    return b'RIFF' + struct.pack('<I', len(body) + 4) + b'WEBP' + body


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\n'
EPS += b'(touch ../CANARY) system\n%%EOF\n'
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PHOTOS = {
    'a PNG of 10^5 x 10^5': ('bomb', 'x.png', png(10**5, 10**5)),
    'a PNG of 2^31 x 2^31': ('bomb', 'x.png', png(2**31 - 1, 2**31 - 1)),
    'a PNG of 10^6 x 64': ('bomb', 'x.png', lambda: png(10**6, 64)),
    'a PNG of no pixels': ('number', 'x.png', png(0, 0)),
    'a PNG of 99 bits': ('number', 'x.png', png(80, 80, depth=99)),
    'a comment of 100 MB': ('bomb', 'x.png', text_bomb),
    'a colour profile of 200 MB': ('bomb', 'x.png', profile_bomb),
    'a PNG cut short': ('cut', 'x.png', picture(size=(80, 80))[:60]),
    'a JPEG cut short': ('cut', 'x.jpg', picture('JPEG', (80, 80))[:200]),
    'a JPEG of 65,500 x 65,500': ('bomb', 'x.jpg', lambda: jpeg_of(65500, 65500)),
    'a BMP of -80 x 80': ('number', 'x.bmp', bmp(-80, 80)),
    'a BMP of 2^31 x 2^31': ('bomb', 'x.bmp', bmp(2**31 - 1, 2**31 - 1)),
    'a GIF of 65,535 x 65,535': ('bomb', 'x.gif', gif(65535, 65535)),
    'a WebP of 16 million a side': ('bomb', 'x.webp', lambda: webp_of(2**24, 2**24)),
    'a PPM of 10^6 x 10^6': ('bomb', 'x.ppm', ppm(10**6, 10**6)),
    'a PPM of a million digits': ('number', 'x.ppm', lambda: b'P6 ' + b'9' * 10**6 + b' 1 255\n'),
    'a PPM whose white is 0': ('number', 'x.ppm', ppm(80, 80, 0, bytes(80 * 80 * 3))),
    'a TIFF of NaN': ('number', 'x.tif', lambda: floats(np.nan)),
    'a TIFF of infinity': ('number', 'x.tif', lambda: floats(np.inf)),
    'a TIFF of 1e38': ('number', 'x.tif', lambda: floats(1e38)),
    'one pixel': ('kind', 'x.png', picture(size=(1, 1))),
    'PostScript': ('code', 'x.eps', EPS),
    'PostScript called a photo': ('code', 'x.jpg', EPS),
    'SVG': ('code', 'x.svg', SVG),
    'a PDF': ('kind', 'x.pdf', b'%PDF-1.4\n%\xe2\xe3\n'),
    'a pickle called a photo': ('code', 'x.png', b'cos\nsystem\n(S"touch ../CANARY"\ntR.'),
    'a photo of 13,000 x 13,000': ('bomb', 'x.png', lambda: large(13_000)),
}
SOUND_PHOTOS = {
    'turned 99 times': ('number', 'x.jpg', lambda: turned(99)),
    'a comment of escapes': ('text', 'x.jpg', lambda: commented(ESCAPES)),
    'a GIF of 2,000 frames': ('bomb', 'x.gif', lambda: frames(2000)),
}


def photo_cases():
    found = [Case('photo', t, w, file(n, d), load_photo) for w, (t, n, d) in PHOTOS.items()]
    found += [
        Case('photo', t, w, file(n, d), load_photo, HARMLESS)
        for w, (t, n, d) in SOUND_PHOTOS.items()
    ]
    return found + [
        Case('photo', t, f'is {w}', instead(make, 'x.png'), load_photo)
        for w, (t, make) in INSTEAD.items()
    ]


# ---- films


def watch(path, most=5):
    "The first pictures of a film."
    return [picture.shape for picture in islice(film_pictures(open_film(path)), most)]


def watch_all(path):
    return [p.shape for p in film_pictures(open_film(path))]


def made(name, *words):
    "A film that ffmpeg makes, kept."

    def make(folder):
        path = samples() / name
        if not path.exists():
            call = [
                imageio_ffmpeg.get_ffmpeg_exe(),
                '-v',
                'error',
                '-y',
                '-f',
                'lavfi',
                *words,
                str(path),
            ]
            subprocess.run(call, check=True, stdin=subprocess.DEVNULL)
        return written(folder / name, path.read_bytes())

    return make


def test_film(folder):
    return made('good.mp4', '-i', 'testsrc=size=96x96:rate=10:duration=1')(folder)


def torn(share):
    def make(folder):
        path = test_film(folder)
        data = path.read_bytes()
        return written(path, data[: int(len(data) * share)])

    return make


def bent(folder):
    path = test_film(folder)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(100, len(data), 200):
        data[at] = rng.integers(256)
    return written(path, bytes(data))


def list_of(text):
    "A playlist that names a secret, under a film's name."

    def make(folder):
        secret = test_film(folder).rename(folder.parent / 'here' / 'secret.mp4')
        return written(folder / 'x.mp4', text.format(secret=secret))

    return make


def named(name):
    "A sound film under an odd name."

    def make(folder):
        import os

        data = test_film(folder).read_bytes()
        path = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode())
        with open(path, 'wb') as opened:
            opened.write(data)
        return os.fsdecode(path)

    return make


HLS = '#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n'
FILMS = {
    'cut in half': ('cut', torn(0.5)),
    'cut after 100 bytes': ('cut', torn(0.01)),
    'a playlist that names a secret file': ('path', list_of(HLS)),
    'a playlist that names the net': (
        'path',
        list_of('#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n'),
    ),
    'a list of files': ('path', list_of("ffconcat version 1.0\nfile '{secret}'\n")),
    'text': ('kind', file('x.mp4', 'hello ' * 100)),
    'sound alone': ('kind', made('sound.mp4', '-i', 'sine=duration=1')),
    '16 x 16 pixels': ('number', made('small.mp4', '-i', 'testsrc=size=16x16:rate=10:duration=1')),
    'Flash with a script': ('code', file('x.mp4', b'FWS\x05' + bytes(200))),
    'an SVG': ('code', file('x.mp4', SVG)),
    'PostScript': ('code', file('x.mp4', EPS)),
    'a picture of 10^5 x 10^5': ('bomb', file('x.mp4', png(10**5, 10**5))),
}
NAMES = {
    'named like an option': '-i.mp4',
    'named like a protocol': 'concat:a|b.mp4',
    'named like a pipe': 'pipe:0.mp4',
    'named with escapes': ESCAPES.replace('\n', '') + '.mp4',
    'named with a line break': 'a\nb.mp4',
    'named in no encoding': b'\xff\xfe.mp4',
    'named like a pattern': 'a%03d*?.mp4',
}


def film_cases():
    found = [Case('film', t, w, make, watch_all) for w, (t, make) in FILMS.items()]
    found += [Case('film', 'text', w, named(n), watch, HARMLESS) for w, n in NAMES.items()]
    found += [
        Case('film', t, f'is {w}', instead(make, 'x.mp4'), watch_all)
        for w, (t, make) in INSTEAD.items()
    ]
    fast = made('fast.mkv', '-i', 'testsrc=size=96x96:rate=100000:duration=0.002')
    return found + [
        Case('film', 'number', '10^5 pictures a second', fast, watch),
        Case(
            'film',
            'number',
            'one picture',
            made('one.mp4', '-i', 'testsrc=size=96x96:rate=1:duration=1'),
            watch,
            HARMLESS,
        ),
    ]


# ---- folders of pictures


def pictures(**odd):
    "A maker of a folder of sound pictures and one that is not."

    def make(folder):
        for i in range(3):
            written(folder / f'frame_{i}.png', picture(size=(96, 96)))
        for name, data in odd.items():
            path = folder / name.replace('__', '.')
            data(path) if callable(data) else written(path, data)
        return folder

    return make


def names_of_escapes(folder):
    pictures()(folder)
    written(folder / f'{ESCAPES}.png', b'no picture')
    return folder


FOLDERS = [
    Case(
        'pictures',
        'bomb',
        'one of 10^5 x 10^5',
        pictures(frame_1a__png=png(10**5, 10**5)),
        watch_all,
    ),
    Case(
        'pictures',
        'cut',
        'one cut short',
        pictures(frame_1a__png=picture(size=(96, 96))[:60]),
        watch_all,
    ),
    Case('pictures', 'text', 'a broken one named with escapes', names_of_escapes, watch_all),
    Case('pictures', 'kind', 'none', lambda folder: folder, watch_all),
    *(
        Case('pictures', t, f'one is {w}', pictures(frame_1a__png=make), watch_all)
        for w, (t, make) in INSTEAD.items()
        if w != 'a folder'  # is no picture, whatever its name
    ),
]


def prepare():
    "All films, before the first case."
    for name, make in {**FILMS, 'good': (None, test_film)}.items():
        folder = samples() / 'films' / name.replace('/', '')
        (folder / 'in').mkdir(parents=True)
        (folder / 'here').mkdir()
        make[1](folder / 'in')


CONTROLS = [
    Case(
        'photo', SOUND, 'a sound one', file('x.png', picture(size=(80, 80))), load_photo, HARMLESS
    ),
    Case('film', SOUND, 'a sound one', test_film, watch_all, HARMLESS),
    Case('pictures', SOUND, 'sound ones', pictures(), watch_all, HARMLESS),
]
CASES = CONTROLS + photo_cases() + film_cases() + FOLDERS
