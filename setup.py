"Reads settings.ini; no list of Python versions that could fall out of date."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {
    k.removesuffix('_requirements'): v.split()
    for k, v in cfg.items()
    if k.endswith('_requirements')
}
home, branch = cfg['git_url'], cfg['branch']
raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{branch}"


def absolute(text):
    "A page whose pictures and links are found outside the clone too."

    def whole(match):
        before, path, after = match.groups()
        picture = before.startswith(('!', 'src'))
        return f'{before}{raw if picture else f"{home}/blob/{branch}"}/{path}{after}'

    own = r'(?!\w+:|#|/)([^)\s"]+)'  # neither an address nor a place on the page
    for before, after in (
        (r'!\[[^\]]*\]\(', r'[)\s]'),
        (r'(?<!!)\[(?:!\[[^\]]*\]\([^)]*\)|[^\]!])*\]\(', r'[)\s]'),
        (r'src(?:set)?="', r'["\s]'),
        (r'href="', '"'),
    ):
        text = re.sub(f'({before}){own}({after})', whole, text)
    return text


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=absolute((here / 'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    url=home,
    project_urls={
        'Documentation': cfg['doc_host'] + cfg['doc_baseurl'],
        'Source': home,
        'Changelog': f'{home}/blob/{branch}/CHANGELOG.md',
        'Issues': f'{home}/issues',
    },
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Education',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    keywords=cfg['keywords'],
    # results/ of the clone is ebmbook/evidence of an installed package
    packages=[*find_packages(include=['ebmbook', 'ebmbook.*']), 'ebmbook.evidence'],
    package_dir={'ebmbook.evidence': 'results'},
    python_requires='>=' + cfg['min_python'],
    package_data={
        'ebmbook': ['py.typed', 'extractors/*', 'weights/*/*'],
        'ebmbook.evidence': ['claims.yaml', 'ledger.jsonl'],
    },
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
