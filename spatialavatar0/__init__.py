"""From a portrait to a turning, talking 3D head: the front door of the kit.

    import spatialavatar0 as sa

    avatar = sa.from_frame(sa.fit('me.jpg'))

The names of `DOOR` are imported when they are first used; `help(sa.fit)` says what each takes. The
rest lies in the chapters, and needs no import either: `sa.splats.mesh.shade_mesh`.
"""

__version__ = '0.1.0'

import importlib
import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # waiting threads sleep, and do not spin

# name -> its module
DOOR = {
    'open_head': 'head.head',  # the head model anyone may use
    'load_flame': 'head.flame_files',  # FLAME, for who has it
    'bind_uv': 'splats.binding',  # one Gaussian per texel, glued to its triangle
    'rasterize': 'splats.renderers',  # Gaussians to pictures, on any device
    'Frame': 'pictures.clips',  # a picture with its camera and the head's pose
    'Clip': 'pictures.clips',  # frames of one person
    'crop': 'pictures.clips',  # a square of a frame, its camera adjusted
    'load_clip': 'pictures.formats',  # a clip in one of the field's formats
    'make_person': 'pictures.people',  # a painted person, whose truth is known
    'mono_clip': 'pictures.people',  # a clip of such a person
    'fit': 'capture.track',  # a photo to a frame: who, which expression, seen from where
    'track_video': 'capture.film',  # a film to a clip
    'Avatar': 'avatar.avatar',  # render, save, load
    'head_square': 'avatar.portrait',  # where in a frame the head is
    'without_clothes': 'avatar.portrait',  # a frame whose matte ends at the neck
    'from_frame': 'avatar.portrait',  # an avatar from one frame
    'Generator': 'stage1.generator',  # one to four frames to an avatar, in one pass
    'refine': 'stage2.loop',  # an avatar sharpened on a clip
    'paper_config': 'stage2.refine',  # the same as the paper has it
    'refine_photo': 'capture.photo',  # an avatar sharpened on one frame
    'evaluate': 'judge.results',  # its numbers by a protocol
    'write_splats': 'use.export',  # a file for splat viewers
    'render_motion': 'use.animate',  # pictures of a moving avatar
    'write_film': 'use.animate',  # pictures to .mp4 or .gif
    'InputError': 'ground.core',  # what every bad input raises
    'set_seed': 'ground.core',  # the same numbers every time
    'show_images': 'ground.core',  # pictures side by side, in a notebook
}
CHAPTERS = (
    'ground',
    'head',
    'splats',
    'pictures',
    'avatar',
    'stage1',
    'stage2',
    'capture',
    'use',
    'judge',
    'pipeline',  # what the commands do
)
__all__ = ['__version__', *DOOR]


def __getattr__(name):
    if name in DOOR:
        value = getattr(importlib.import_module(f'{__name__}.{DOOR[name]}'), name)
        globals()[name] = value
        return value
    if name in CHAPTERS:
        return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *DOOR, *CHAPTERS})


def lazily(package):
    "A `__getattr__` for a chapter, which imports its modules when they are first named."

    def find(name):
        try:
            return importlib.import_module(f'{package}.{name}')
        except ModuleNotFoundError as error:
            if error.name != f'{package}.{name}':
                raise
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    return find
