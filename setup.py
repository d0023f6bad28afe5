"""Packaging. Version, requirements and description live in settings.ini only; this file hands
them to setuptools."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
USER_EXTRAS = 'track metrics viewer train lab data cluster'.split()


def settings():
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


cfg = settings()
package = cfg['lib_path']
extras = {name: cfg[f'{name}_requirements'].split() for name in [*USER_EXTRAS, 'dev']}
# all a user needs, without dev
extras['all'] = list(dict.fromkeys(req for name in USER_EXTRAS for req in extras[name]))


class BuildWithManifest(build_py):
    "Copy the one data_manifest.yaml into the package; an editable install reads it where it is."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / package
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / 'data_manifest.yaml', target / 'data_manifest.yaml')


readme = ROOT / 'README.md'
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    packages=find_packages(include=[package, f'{package}.*']),
    package_data={package: ['assets/*', 'assets/**/*']},
    include_package_data=False,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{package}={package}._modidx:d'],
    },
    cmdclass={'build_py': BuildWithManifest},
    zip_safe=False,
)
