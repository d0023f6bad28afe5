"""Bytes that no program would write, and sound files to damage; made once, copied for each case."""

import functools
import io
import json
import os
import shutil
import socket
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .room import CANARY

ESCAPES = '\x1b[2J\x1b]0;owned\x07\nerror: all is well\r\u202e\x9b31m'  # what a terminal obeys
MARKUP = '</script><script>alert(1)</script>{{7*7}}${7*7}<img src=x onerror=alert(1)>'
GIGABYTE = 10**9


def samples():
    "A folder for sound files, kept until the process ends."
    return _samples()


@functools.cache
def _samples():
    import atexit

    folder = Path(tempfile.mkdtemp(prefix='sound-'))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def written(path, data):
    "Bytes or text in a file; the file."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, str):
        data = data.encode('utf-8', 'surrogatepass')
    path.write_bytes(data)
    return path


def file(name, data):
    "A maker of one file."
    return lambda folder: written(folder / name, data() if callable(data) else data)


def sparse(path, size=10 * GIGABYTE, start=b''):
    "A file that is large and takes no room."
    with open(path, 'wb') as opened:
        opened.write(start)
        opened.truncate(size)
    return path


# ---- places that are no files


def a_folder(path):
    path.mkdir(parents=True)


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as door:
        here = os.getcwd()
        os.chdir(path.parent)
        door.bind(path.name)
        os.chdir(here)


def a_circle(path):
    path.symlink_to(path.with_name('other'))
    path.with_name('other').symlink_to(path)


def to_zero(path):
    path.symlink_to('/dev/zero')


def to_random(path):
    path.symlink_to('/dev/urandom')


def to_nowhere(path):
    path.symlink_to(path.with_name('gone'))


def ten_gigabytes(path):
    sparse(path)


def nothing(path):
    path.write_bytes(b'')


def a_web_page(path):
    path.write_bytes(b'<!doctype html><title>Log in</title>' + b' ' * 2000)


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(4000))


def utf16(path):
    path.write_bytes('{"frames": []}'.encode('utf-16'))


INSTEAD = {  # what lies where a file is meant
    'a folder': ('kind', a_folder),
    'a pipe nobody writes to': ('path', a_pipe),
    'a socket': ('path', a_socket),
    'a link to itself': ('path', a_circle),
    'a link to /dev/zero': ('path', to_zero),
    'a link to nothing': ('path', to_nowhere),
    '10 GB of nothing': ('bomb', ten_gigabytes),
    'an empty file': ('cut', nothing),
    'a web page': ('kind', a_web_page),
    'noise': ('kind', noise),
}


def instead(make, name):
    "A maker of something that is no file, under the name of one."

    def made(folder):
        folder.mkdir(parents=True, exist_ok=True)
        make(folder / name)
        return folder / name

    return made


# ---- JSON


DEEP = 100_000
JSON = {  # texts that are, or pretend to be, JSON
    'nested 100,000 deep': ('bomb', '[' * DEEP + ']' * DEEP),
    'objects 100,000 deep': ('bomb', '{"a":' * DEEP + '1' + '}' * DEEP),
    'a number of a million digits': ('number', '{"frames": [], "w": ' + '9' * 10**6 + '}'),
    'a number, nothing else': ('kind', '7'),
    'null': ('kind', 'null'),
    'text': ('kind', '"frames"'),
    'breaks off': ('cut', '{"frames": [{"file_path": "im'),
    'UTF-16': ('text', '{"frames": []}'.encode('utf-16')),
    'no UTF-8': ('text', b'{"frames": ["\xff\xfe\xc0"]}'),
    'escape sequences': ('text', '{"' + ESCAPES.replace('\n', '') + '": ' + ESCAPES),
}


def jsons(file_type, name, read, skip=()):
    "Cases of a JSON file by itself."
    from .room import Case

    return [
        Case(file_type, threat, what, file(name, text), read)
        for what, (threat, text) in JSON.items()
        if what not in skip
    ]


def edited(path, change):
    "A JSON file, changed in place."
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))
    return path


# ---- pickles, zips


class Order:
    "Pickles as a call."

    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


def canary(folder):
    "Where a payload would sing."
    return folder.parent / CANARY


def touch(folder):
    "An order to make the canary."
    return Order(os.system, f'touch {canary(folder)}')


def zipped(members, how=zipfile.ZIP_DEFLATED):
    "A zip of names and bytes."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', how) as package:
        for name, data in members:
            package.writestr(name, data)
    return buffer.getvalue()


def npy(shape, data=b'', descr="'<f8'", version=b'\x01\x00'):
    "numpy's format, with whatever header."
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b' ' * (-(len(header) + 11) % 64) + b'\n'
    size = struct.pack('<H', len(header)) if version < b'\x02' else struct.pack('<I', len(header))
    return b'\x93NUMPY' + version + size + header + data


@functools.cache
def zeros_zip(name, size=10 * GIGABYTE):
    "A small zip whose member unfolds to many zeros."
    head = npy(f'({(size - 128) // 8},)')
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    chunk = bytes(10**7)
    # every block of so many zeros packs to the same bytes once the window is full
    first = packer.compress(head + chunk) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(chunk) + packer.flush(zlib.Z_FULL_FLUSH)
    count = size // len(chunk) - 1
    body = first + block * count + packer.flush()
    total = len(head) + len(chunk) * (count + 1)
    return raw_zip(name, body, total)


def raw_zip(name, body, total, method=8, crc=0, flags=0):
    "A zip with one member, every number as told."
    sizes = struct.pack('<III', crc, len(body) & 0xFFFFFFFF, min(total, 0xFFFFFFFE))
    about = struct.pack('<HHHHH', 20, flags, method, 0, 33) + sizes
    local = b'PK\x03\x04' + about + struct.pack('<HH', len(name), 0) + name.encode() + body
    rest = struct.pack('<HHHHHII', len(name), 0, 0, 0, 0, 0, 0)
    central = b'PK\x01\x02' + struct.pack('<H', 20) + about + rest + name.encode()
    ends = struct.pack('<HHHHIIH', 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + b'PK\x05\x06' + ends


# ---- pictures


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def png(width, height, *more, depth=8, colour=2, body=None):
    "A PNG that says it is so large, whatever is in it."
    about = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(bytes(1000)) if body is None else body
    chunks = [chunk(b'IHDR', about), *more, chunk(b'IDAT', body), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def picture(form='PNG', size=(80, 60), mode='RGB', **how):
    "A sound picture's bytes."
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, 0).save(buffer, form, **how)
    return buffer.getvalue()


# ---- safetensors


CODES = {
    'float32': 'F32',
    'float64': 'F64',
    'int64': 'I64',
    'int32': 'I32',
    'bool': 'BOOL',
    'uint8': 'U8',
    'float16': 'F16',
}


def safetensors(tensors, metadata, header=None):
    "The format by hand: name -> array; metadata as it comes; header: the whole JSON, if given."
    about, body = {}, b''
    for name, values in tensors.items():
        values = np.ascontiguousarray(values)
        data = values.tobytes()
        places = [len(body), len(body) + len(data)]
        code = CODES.get(str(values.dtype), str(values.dtype).upper())
        about[name] = dict(dtype=code, shape=list(values.shape), data_offsets=places)
        body += data
    if metadata is not None:
        about['__metadata__'] = metadata
    text = json.dumps(about).encode() if header is None else header
    return struct.pack('<Q', len(text)) + text + body
