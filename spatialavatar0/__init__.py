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

# name -> where it is made
DOOR = {
    'open_head': 'head.head.open_head',  # the head model anyone may use
    'load_flame': 'head.flame_files.load_flame',  # FLAME, for who has it
    'bind_uv': 'splats.binding.bind_uv',  # one Gaussian per texel, glued to its triangle
    'rasterize': 'splats.renderers.rasterize',  # Gaussians to pictures, on any device
    'Frame': 'pictures.clips.Frame',  # a picture with its camera and the head's pose
    'Clip': 'pictures.clips.Clip',  # frames of one person
    'crop': 'pictures.clips.crop',  # a square of a frame, its camera adjusted
    'inspect': 'inspection.inspect_path',  # what a file or folder is, and what comes next
    'load_clip': 'pictures.formats.load_clip',  # a clip in one of the field's formats
    'make_person': 'pictures.people.make_person',  # a painted person, whose truth is known
    'mono_clip': 'pictures.people.mono_clip',  # a clip of such a person
    'fit': 'capture.track.fit',  # a photo to a frame: who, which expression, seen from where
    'track': 'pipeline.track_clip',  # a film to a clip in a folder
    'track_video': 'capture.film.track_video',  # the same, without the command's words
    'Avatar': 'avatar.avatar.Avatar',  # render, save, load
    'head_square': 'avatar.portrait.head_square',  # where in a frame the head is
    'without_clothes': 'avatar.portrait.without_clothes',  # a frame whose matte ends at the neck
    'from_frame': 'avatar.portrait.from_frame',  # an avatar from one frame
    'Generator': 'stage1.generator.Generator',  # one to four frames to an avatar, in one pass
    'refine': 'stage2.loop.refine',  # an avatar sharpened on a clip
    'paper_config': 'stage2.refine.paper_config',  # the same as the paper has it
    'refine_photo': 'capture.photo.refine_photo',  # an avatar sharpened on one frame
    'evaluate': 'judge.results.evaluate',  # its numbers by a protocol
    'build': 'pipeline.build_avatar',  # photos to an avatar, films, numbers: all that `build` makes
    'animate': 'pipeline.animate_avatar',  # a film of a moving avatar
    'view': 'use.viewer.write_page',  # one file that shows it in any browser
    'write_splats': 'use.export.write_splats',  # a file for splat viewers
    'render_motion': 'use.animate.render_motion',  # pictures of a moving avatar
    'write_film': 'use.animate.write_film',  # pictures to .mp4 or .gif
    'InputError': 'ground.core.InputError',  # what every bad input raises
    'set_seed': 'ground.core.set_seed',  # the same numbers every time
    'show_images': 'ground.core.show_images',  # pictures side by side, in a notebook
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
    'inspection',  # what is in a file or folder
    'pipeline',  # what the commands do
)
__all__ = ['__version__', *DOOR]


def __getattr__(name):
    if name in DOOR:
        module, _, made_as = DOOR[name].rpartition('.')
        value = getattr(importlib.import_module(f'{__name__}.{module}'), made_as)
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
