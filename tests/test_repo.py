"""Rules of the repository, each a function that returns what breaks it, each tried on a bad example.

`make check` runs this file; it needs the standard library and pytest, no network and no PyTorch.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# DESIGN of the package: imports go strictly to lower floors. A module that is not listed is an error.
FLOORS = {
    0: 'core.config core.book core.plot core.scenes mcmc',
    1: 'data core.runs core.nets',
    2: 'core.metrics core.train core.claims core.glow core.flowpp core.restoration',
    3: 'foundations core.baselines core.cost',
    4: 'nerf cdrl_nets nvae vaebm_nets ecvae_nets selfsup liebm_nets',
    5: 'nerf_lebm coopflow cdrl vaebm ecvae liebm',
    6: 'scoreboard core.bench',
    7: 'core.cli',
}
FLOOR = {m: n for n, ms in FLOORS.items() for m in ms.split()}
PARTS = {
    'nerf': 'nerf_lebm',
    'cdrl_nets': 'cdrl',
    'nvae': 'vaebm',
    'vaebm_nets': 'vaebm',
    'ecvae_nets': 'ecvae',
    'selfsup': 'liebm',
    'liebm_nets': 'liebm',
}  # a system's own parts
MEASURES = {'core.bench'}  # takes the networks of any system to time them
PARAMETERS = [
    'dataset',
    'preset',
    'seed',
    'weights',
    'over',
    'out',
]  # of a system's chapter, in this order
DIRECTIVES = {'export', 'hide', 'default_exp', 'eval', 'echo', 'slow', 'gpu'}
CELL_LINES, FUNCTION_LINES, EXPORTED_LINES = 40, 45, 600
NOTEBOOK_BYTES, WEIGHT_BYTES = 1_500_000, 2_000_000


# --- what is there


def notebooks(root):
    "Notebooks below nbs/ as pairs (path relative to nbs/, content); names that start with _ or . are drafts."
    found = sorted(
        p
        for p in (root / 'nbs').rglob('*.ipynb')
        if not any(o.startswith(('_', '.')) for o in p.relative_to(root / 'nbs').parts)
    )
    return [
        (p.relative_to(root / 'nbs'), json.loads(p.read_text(encoding='utf-8')))
        for p in found
    ]


def code_cells(nb):
    "Code cells as triples (number, lines, tags)."
    return [
        (i, ''.join(c['source']).splitlines(), c['metadata'].get('tags', []))
        for i, c in enumerate(nb['cells'])
        if c['cell_type'] == 'code'
    ]


def directives(lines):
    "Leading directives of a cell as pairs (name, argument)."
    found = []
    for o in lines:
        if not (m := re.match(r'#\s*\|\s*([\w-]+):?\s*(.*)', o)):
            break
        found.append((m[1], m[2].strip()))
    return found


def exported(lines):
    return any(k == 'export' for k, _ in directives(lines))


def body(lines):
    return lines[len(directives(lines)) :]


def module_of(path):
    "The module that a notebook must write: nbs/core/plot -> core.plot, nbs/05a_cdrl_nets -> cdrl_nets."
    return '.'.join([*path.parts[:-1], re.sub(r'^\d+[a-z]?_', '', path.stem)])


def modules(root):
    "Modules of the package as pairs (dotted name without the package, path)."
    found = sorted(
        p
        for p in (root / 'ebmbook').rglob('*.py')
        if p.name not in ('__init__.py', '_modidx.py')
    )
    return [
        ('.'.join(p.relative_to(root / 'ebmbook').with_suffix('').parts), p) for p in found
    ]


def tracked(root):
    "Files that git tracks or would track; outside a repository, all but what is made."
    cmd = ['git', '-C', str(root), 'ls-files', '-co', '--exclude-standard', '-z']
    if (root / '.git').exists() and not (
        res := subprocess.run(cmd, capture_output=True, text=True)
    ).returncode:
        return [root / o for o in res.stdout.split('\0') if o and (root / o).is_file()]
    made = {
        '.git',
        '.venv',
        'runs',
        '_build',
        'data',
        'build',
        '__pycache__',
        '.ipynb_checkpoints',
        '.pytest_cache',
        '.ruff_cache',
        '.hypothesis',
    }
    return [
        p
        for p in root.rglob('*')
        if p.is_file()
        and not any(o in made or o.endswith('.egg-info') for o in p.relative_to(root).parts)
    ]


# --- the package


def imported(tree, module):
    "Modules of this package that a syntax tree imports, also within functions, as dotted names without the package."
    found = set()
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            names = [a.name for a in o.names]
        elif isinstance(o, ast.ImportFrom):
            base = ['ebmbook', *module.split('.')][: -o.level] if o.level else []
            start = '.'.join([*base, *([o.module] if o.module else [])])
            names = [start, *(f'{start}.{a.name}' for a in o.names)]
        else:
            continue
        found |= {n.removeprefix('ebmbook.') for n in names if n.startswith('ebmbook.')}
    return found


def floors(root):
    "Imports that do not go to a lower floor, parts borrowed by another system, modules that no floor holds."
    bad, known = [], {m for m, _ in modules(root)} | FLOOR.keys()
    for m, p in modules(root):
        if m not in FLOOR:
            bad.append(f'{m}: on no floor; add it to FLOORS and to CONTRIBUTING.md')
            continue
        for o in sorted(
            imported(ast.parse(p.read_text(encoding='utf-8')), m) & known - {m}
        ):
            if FLOOR.get(o, 99) >= FLOOR[m]:
                bad.append(
                    f'{m} (floor {FLOOR[m]}) imports {o} (floor {FLOOR.get(o, "none")})'
                )
            elif o in PARTS and PARTS[o] != m and m not in MEASURES:
                bad.append(f'{m} imports {o}, a part of {PARTS[o]} alone')
    return bad


def orphans(root):
    "Modules without notebook."
    bad = []
    for m, p in modules(root):
        said = re.search(
            r'^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+?\.ipynb)\.?$',
            p.read_text(encoding='utf-8'),
            re.M,
        )
        if not said:
            bad.append(f'{m}: not generated by a notebook')
        elif (
            not (p.parent / said[1]).is_file()
            and not (root / 'ebmbook' / said[1]).is_file()
        ):
            bad.append(f'{m}: its notebook {said[1]} is gone')
    return bad


def long_functions(root):
    "Functions of package and tests above the limit, docstring and signature included."
    bad = []
    for p in [*(p for _, p in modules(root)), *sorted((root / 'tests').glob('*.py'))]:
        for o in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if (
                isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))
                and (n := o.end_lineno - o.lineno + 1) > FUNCTION_LINES
            ):
                bad.append(
                    f'{p.relative_to(root)}: {o.name} has {n} lines, more than {FUNCTION_LINES}'
                )
    return bad


def open_blocks(root):
    "Losses that wait inside a `with`: a batch that comes in parts has several such generators, and each would find the block of another open."
    bad = []
    for m, p in modules(root):
        for f in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if not isinstance(f, ast.FunctionDef) or not f.name.endswith('losses'):
                continue
            waits = {
                y.lineno
                for w in ast.walk(f)
                if isinstance(w, ast.With)
                for y in ast.walk(w)
                if isinstance(y, (ast.Yield, ast.YieldFrom))
            }
            bad += [f'{m}: {f.name} yields inside a with, line {o}' for o in sorted(waits)]
    return bad


# --- the notebooks


def names(root):
    "Notebooks that do not write exactly the module of their name, and modules written twice."
    bad, owner = [], {}
    for path, nb in notebooks(root):
        said = [
            a
            for _, lines, _ in code_cells(nb)
            for k, a in directives(lines)
            if k == 'default_exp'
        ]
        if said != [module_of(path)]:
            bad.append(f'{path}: must say default_exp {module_of(path)} once, says {said}')
        if any(
            a
            for _, lines, _ in code_cells(nb)
            for k, a in directives(lines)
            if k == 'export'
        ):
            bad.append(f'{path}: exports into another module')
        for o in said:
            if o in owner:
                bad.append(f'{path}: writes {o}, as {owner[o]} does')
            owner[o] = path
    return bad


def parameters(root):
    "Systems without their parameters cell; parameters that are not the six literals; cells that papermill injected."
    bad = []
    for path, nb in notebooks(root):
        found = [(i, lines) for i, lines, tags in code_cells(nb) if 'parameters' in tags]
        if any('injected-parameters' in tags for *_, tags in code_cells(nb)):
            bad.append(f'{path}: an executed copy, with injected parameters')
        if FLOOR.get(module_of(path)) == 5 and len(found) != 1:
            bad.append(f'{path}: {len(found)} cells tagged parameters instead of one')
        for i, lines in found:
            said = ast.parse('\n'.join(lines)).body
            if not all(
                isinstance(o, ast.Assign) and len(o.targets) == 1 and is_literal(o.value)
                for o in said
            ):
                bad.append(f'{path} cell {i}: parameters are plain assignments of literals')
                continue
            given = [o.targets[0].id for o in said]
            if FLOOR.get(module_of(path)) == 5 and given != PARAMETERS:
                bad.append(f'{path} cell {i}: parameters are {PARAMETERS}, not {given}')
    return bad


def is_literal(node):
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def spelling(root):
    "Directives in another spelling, unknown ones, and ones that stand below code, where they do not count."
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            n = len(directives(lines))
            for o in lines[:n]:
                good = (
                    m := re.fullmatch(r'#\| ([a-z_]+)(: (true|false)| [\w.]+)?', o)
                ) and m[1] in DIRECTIVES
                if not good:
                    bad.append(f'{path} cell {i}: directive {o!r}')
            bad += [
                f'{path} cell {i}: directive {o!r} below the top of its cell'
                for o in lines[n:]
                if re.match(r'#\s*\|\s*[a-z_]+', o)
            ]
    return bad


def sizes(root):
    "Cells, exports and notebooks above their limits."
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            if (n := sum(bool(o.strip()) for o in body(lines))) > CELL_LINES:
                bad.append(f'{path} cell {i}: {n} lines, more than {CELL_LINES}')
        n = sum(
            bool(o.strip())
            for _, lines, _ in code_cells(nb)
            if exported(lines)
            for o in body(lines)
        )
        if n > EXPORTED_LINES:
            bad.append(f'{path}: {n} exported lines, more than {EXPORTED_LINES}')
        if (n := (root / 'nbs' / path).stat().st_size) > NOTEBOOK_BYTES:
            bad.append(f'{path}: {n} bytes, more than {NOTEBOOK_BYTES}')
    return bad


def imports(root):
    "Wildcard and relative imports, magics in exports, and cells that would export the package when papermill runs them."
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            src = '\n'.join(lines)
            if re.search(r'^\s*from\s+\S+\s+import\s+\*', src, re.M):
                bad.append(f'{path} cell {i}: wildcard import')
            if exported(lines) and re.search(r'^\s*from\s+\.', src, re.M):
                bad.append(f'{path} cell {i}: relative import')
            if exported(lines) and re.search(r'^\s*[%!]', src, re.M):
                bad.append(f'{path} cell {i}: magic in an exported cell')
            if re.search(r'\bnbdev_export\s*\(', src):
                bad.append(f'{path} cell {i}: exports the package; make sync does that')
    return bad


def errors(root):
    "Stored outputs of failed cells."
    return [
        f'{path} cell {i}: stored error {o.get("ename")}'
        for path, nb in notebooks(root)
        for i, c in enumerate(nb['cells'])
        for o in c.get('outputs', [])
        if o['output_type'] == 'error'
    ]


def untested(root):
    "Exported definitions that no code cell follows before the next export."
    bad = []
    for path, nb in notebooks(root):
        waiting = None
        for i, lines, _ in code_cells(nb):
            if exported(lines):
                if waiting is not None:
                    bad.append(
                        f'{path} cell {waiting}: no test before the next exported cell'
                    )
                waiting = (
                    i if re.search(r'^(def|class) [a-z]', '\n'.join(lines), re.M) else None
                )
            elif body(lines):
                waiting = None
        if waiting is not None:
            bad.append(f'{path} cell {waiting}: no test after it')
    return bad


# --- all files

# Written in pieces, so that this file does not contain what it forbids.
PLACES = re.compile(
    '|'.join(
        [
            r'(?<![\w.~$/-])/(?:' + 'root|work|Users|ho' + r'me)/\w',
            'site' + '-packages/',
            'dist' + '-packages/',
        ]
    )
)
HOSTS = re.compile(
    '|'.join(
        [
            'pypi' + r'\.org',
            'python' + r'hosted\.org',
            'registry' + r'\.npmjs',
            'extra' + '-index-url',
            'find' + '-links',
            r'file:' + '///',
        ]
    )
)


def places(root):
    "Folders of a machine and hosts of package registries in tracked text files; vendored files are left out."
    bad = []
    for p in tracked(root):
        if '_vendor' in p.parts:
            continue
        try:
            text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        for n, line in enumerate(text.splitlines(), 1):
            if m := PLACES.search(line) or HOSTS.search(line):
                bad.append(f'{p.relative_to(root)}:{n}: {m[0]}')
    return bad


SECRETS = re.compile(
    r'\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,})|-----BEGIN [A-Z ]*PRIVATE'
    + ' KEY'
)


def secrets(root):
    "Access tokens and private keys in tracked text files."
    text = lambda p: p.read_text(encoding='utf-8', errors='replace')
    return [
        f'{p.relative_to(root)}: what looks like a secret'
        for p in tracked(root)
        if p.suffix not in ('.png', '.woff', '.safetensors') and SECRETS.search(text(p))
    ]


def weights(root):
    "Folders of small trained weights above their limit."
    size = lambda d: sum(p.stat().st_size for p in d.rglob('*') if p.is_file())
    return [
        f'{d.relative_to(root)}: {size(d)} bytes, more than {WEIGHT_BYTES}'
        for d in sorted((root / 'results/weights').glob('*/'))
        if size(d) > WEIGHT_BYTES
    ]


def contents(root):
    "Pages named in _toc.yml that do not exist, and notebooks that no page of the book shows."
    said = re.findall(
        r'^\s*(?:- file|root): (\S+)', (root / '_toc.yml').read_text(encoding='utf-8'), re.M
    )
    bad = [
        f'_toc.yml: {o} does not exist'
        for o in said
        if not any((root / f'{o}{s}').is_file() for s in ('.md', '.ipynb'))
    ]
    return bad + [
        f'{p}: not in _toc.yml'
        for p, _ in notebooks(root)
        if f'nbs/{p.with_suffix("").as_posix()}' not in said
    ]


def citations(root):
    "Works cited on a page that references.bib does not hold, keys given twice, and lists of works outside references.md."
    keys = re.findall(
        r'^@\w+\{([\w-]+),', (root / 'nbs/references.bib').read_text(encoding='utf-8'), re.M
    )
    bad = [
        f'references.bib: {o} is given twice'
        for o in sorted(set(keys))
        if keys.count(o) > 1
    ]
    pages = {
        str(p): '\n'.join(
            ''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'
        )
        for p, nb in notebooks(root)
    }
    pages |= {
        p.name: p.read_text(encoding='utf-8') for p in sorted((root / 'nbs').glob('*.md'))
    }
    for page, text in pages.items():
        cited = {
            k.strip()
            for o in re.findall(r'\{cite(?::\w+)?\}`([^`]+)`', text)
            for k in o.split(',')
        }
        bad += [
            f'{page}: cites {o}, which is not in references.bib'
            for o in sorted(cited - set(keys))
        ]
        if '```{bibliography}' in text and page != 'references.md':
            bad.append(f'{page}: the list of works belongs to references.md')
    return bad


# --- the rules hold here

RULES = [
    floors,
    orphans,
    long_functions,
    open_blocks,
    names,
    parameters,
    spelling,
    sizes,
    imports,
    errors,
    untested,
    places,
    secrets,
    weights,
    contents,
    citations,
]


@pytest.mark.parametrize('rule', RULES, ids=lambda o: o.__name__)
def test_rule(rule):
    bad = rule(ROOT)
    assert not bad, '\n' + '\n'.join(bad)


def test_there_is_something_to_check():
    assert notebooks(ROOT) and modules(ROOT) and len(tracked(ROOT)) > 30


# --- and each of them can fail


def cell(src, tags=(), outputs=()):
    return dict(
        cell_type='code',
        source=src.splitlines(keepends=True),
        metadata={'tags': list(tags)} if tags else {},
        outputs=list(outputs),
    )


def write(root, name, *cells):
    "Write a notebook below nbs/ and return the root."
    p = root / 'nbs' / name
    p.parent.mkdir(parents=True, exist_ok=True)
    p.write_text(
        json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=list(cells))),
        encoding='utf-8',
    )
    return root


def module(root, name, src, book='../nbs/x.ipynb'):
    "Write a module with the header of a generated one and return the root."
    p = root / 'ebmbook' / f'{name.replace(".", "/")}.py'
    p.parent.mkdir(parents=True, exist_ok=True)
    p.write_text(
        f'# AUTOGENERATED! DO NOT EDIT! File to edit: {book}.\n{src}', encoding='utf-8'
    )
    return root


@pytest.mark.parametrize(
    'name,src,told',
    [
        ('core.plot', 'from ebmbook.cdrl import build', 'imports cdrl (floor 5)'),
        ('core.plot', 'from ..cdrl import build', 'imports cdrl (floor 5)'),
        ('core.plot', 'from .runs import root', 'imports core.runs (floor 1)'),
        ('core.plot', 'from .. import cdrl', 'imports cdrl (floor 5)'),
        ('mcmc', 'import ebmbook.core.runs as r', 'imports core.runs (floor 1)'),
        (
            'cdrl',
            'def f():\n    from ebmbook.vaebm import build',
            'imports vaebm (floor 5)',
        ),
        ('cdrl', 'from .nvae import NVAE', 'a part of vaebm alone'),
        ('novelty', 'x = 1', 'on no floor'),
    ],
)
def test_floors(tmp_path, name, src, told):
    bad = floors(module(tmp_path, name, src))
    assert len(bad) == 1 and told in bad[0]


def test_floors_allow(tmp_path):
    module(
        tmp_path,
        'cdrl',
        'import torch\nfrom .cdrl_nets import UNet\nfrom .core.train import train\nfrom ebmbook.mcmc import ula',
    )
    module(tmp_path, 'core.cli', 'from ..cdrl import PRESETS\nfrom .claims import verdict')
    module(tmp_path, 'core.bench', 'from ..vaebm_nets import energy_net')
    assert not floors(tmp_path)


def test_orphans(tmp_path):
    module(tmp_path, 'cdrl', '', '../nbs/gone.ipynb')
    module(tmp_path, 'core.plot', '', '../../nbs/core/plot.ipynb')
    write(tmp_path, 'core/plot.ipynb')
    assert orphans(tmp_path) == ['cdrl: its notebook ../nbs/gone.ipynb is gone']
    (tmp_path / 'ebmbook/own.py').write_text('x = 1\n')
    assert 'own: not generated by a notebook' in orphans(tmp_path)


def test_long_functions(tmp_path):
    module(tmp_path, 'cdrl', 'def f():\n' + '    x = 1\n' * FUNCTION_LINES)
    assert len(long_functions(tmp_path)) == 1
    assert not long_functions(
        module(tmp_path, 'cdrl', 'def f():\n' + '    x = 1\n' * (FUNCTION_LINES - 1))
    )


def test_open_blocks(tmp_path):
    module(tmp_path, 'vaebm', 'def losses(nets):\n    with frozen(nets): yield nets\n')
    assert open_blocks(tmp_path) == ['vaebm: losses yields inside a with, line 3']
    assert not open_blocks(
        module(
            tmp_path,
            'vaebm',
            'def losses(nets):\n    with frozen(nets): out = nets\n    yield out\n',
        )
    )


@pytest.mark.parametrize(
    'file,cells',
    [
        ('05_cdrl.ipynb', ['x = 1']),
        ('05_cdrl.ipynb', ['#| default_exp cdrl', '#| default_exp cdrl']),
        ('core/runs.ipynb', ['#| default_exp runs']),
        ('05_cdrl.ipynb', ['#| default_exp cdrl', '#| export core.nets\nx = 1']),
    ],
)
def test_names(tmp_path, file, cells):
    assert names(write(tmp_path, file, *map(cell, cells)))


def test_names_allow(tmp_path):
    write(
        tmp_path,
        'core/runs.ipynb',
        cell('#| default_exp core.runs'),
        cell('#| export\nx = 1'),
    )
    assert not names(
        write(tmp_path, '05a_cdrl_nets.ipynb', cell('#| default_exp cdrl_nets'))
    )
    assert names(
        write(tmp_path, '06a_cdrl_nets.ipynb', cell('#| default_exp cdrl_nets'))
    )  # written twice


SIX = 'dataset = "digits"\npreset = ""\nseed = 0\nweights = "book"\nover = {}\nout = ""'


@pytest.mark.parametrize(
    'cells',
    [
        [cell('x = 1')],
        [cell(SIX, ['parameters']), cell(SIX, ['parameters'])],
        [cell(SIX + '\nlr = 1', ['parameters'])],
        [cell('import os\n' + SIX, ['parameters'])],
        [cell(SIX.replace('0', 'int(0)'), ['parameters'])],
        [cell(SIX, ['parameters']), cell('seed = 1', ['injected-parameters'])],
    ],
)
def test_parameters(tmp_path, cells):
    assert parameters(write(tmp_path, '05_cdrl.ipynb', *cells))


def test_parameters_allow(tmp_path):
    write(tmp_path, '01_mcmc.ipynb', cell('x = 1'))
    assert not parameters(write(tmp_path, '05_cdrl.ipynb', cell(SIX, ['parameters'])))


@pytest.mark.parametrize(
    'src',
    [
        '#|export\nx = 1',
        '# | export\nx = 1',
        '#| eval:false\nx',
        '#| eval: False\nx',
        '#| exprot\nx',
        'x = 1\n#| export',
    ],
)
def test_spelling(tmp_path, src):
    assert spelling(write(tmp_path, '01_mcmc.ipynb', cell(src)))


def test_spelling_allow(tmp_path):
    assert not spelling(
        write(
            tmp_path,
            '01_mcmc.ipynb',
            *map(
                cell,
                [
                    '#| default_exp mcmc',
                    '#| export\nx = 1',
                    '#| hide\n#| eval: false\ny',
                    '#| slow\nx = 1 #| y',
                ],
            ),
        )
    )


def test_sizes(tmp_path):
    assert (
        len(sizes(write(tmp_path, '01_mcmc.ipynb', cell('x = 1\n' * (CELL_LINES + 1)))))
        == 1
    )
    assert (
        len(
            sizes(
                write(
                    tmp_path, '01_mcmc.ipynb', *[cell('#| export\n' + 'x = 1\n' * 40)] * 16
                )
            )
        )
        == 1
    )
    assert not sizes(
        write(tmp_path, '01_mcmc.ipynb', cell('#| export\n' + 'x = 1\n' * CELL_LINES))
    )
    assert (
        len(
            sizes(
                write(
                    tmp_path,
                    '01_mcmc.ipynb',
                    cell(
                        'x', outputs=[dict(output_type='stream', text='x' * NOTEBOOK_BYTES)]
                    ),
                )
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    'src',
    [
        'from os import *',
        '#| export\nfrom .runs import root',
        '#| export\n%matplotlib inline',
        'import nbdev; nbdev.nbdev_' + 'export()',
    ],
)
def test_imports(tmp_path, src):
    assert len(imports(write(tmp_path, '01_mcmc.ipynb', cell(src)))) == 1


def test_errors(tmp_path):
    assert errors(
        write(
            tmp_path,
            '01_mcmc.ipynb',
            cell('1/0', outputs=[dict(output_type='error', ename='ZeroDivisionError')]),
        )
    )
    assert not errors(
        write(
            tmp_path,
            '01_mcmc.ipynb',
            cell('1', outputs=[dict(output_type='stream', text='1')]),
        )
    )


def test_untested(tmp_path):
    one, two, test = (
        cell('#| export\ndef f(): return 1'),
        cell('#| export\nclass a: pass'),
        cell('assert f()'),
    )
    assert len(untested(write(tmp_path, '01_mcmc.ipynb', one, two))) == 2
    assert not untested(write(tmp_path, '01_mcmc.ipynb', one, test, two, test))


@pytest.mark.parametrize(
    'text',
    [
        'see /' + 'root/x',
        'in "/' + 'home/me/data"',
        'pip install --extra' + '-index-url x',
        'https://pypi' + '.org/simple',
        'lib/python3.11/site' + '-packages/torch',
    ],
)
def test_places(tmp_path, text):
    (tmp_path / 'a.md').write_text('fine\n' + text)
    assert len(places(tmp_path)) == 1 and places(tmp_path)[0].startswith('a.md:2')


def test_places_allow(tmp_path):
    (tmp_path / 'a.md').write_text(
        '~/.cache, results/work/x, https://github.com/ebmbook/ebmbook, runs/home/x'
    )
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\xff/' + b'root/x')
    assert not places(tmp_path)


@pytest.mark.parametrize(
    'text',
    [
        'hf_' + 'a1B2' * 8,
        'ghp_' + 'a1B2' * 9,
        'AKIA' + 'ABCD1234' * 2,
        '-----BEGIN RSA PRIVATE' + ' KEY-----',
    ],
)
def test_secrets(tmp_path, text):
    (tmp_path / 'a.py').write_text(f'key = "{text}"')
    assert len(secrets(tmp_path)) == 1
    (tmp_path / 'a.py').write_text('key = hf_hub_download')
    assert not secrets(tmp_path)


def test_weights(tmp_path):
    d = tmp_path / 'results/weights/cdrl-digits'
    d.mkdir(parents=True)
    (d / 'model.safetensors').write_bytes(bytes(WEIGHT_BYTES))
    assert not weights(tmp_path)
    (d / 'config.json').write_text('{}')
    assert len(weights(tmp_path)) == 1


def test_contents(tmp_path):
    (tmp_path / '_toc.yml').write_text(
        'root: nbs/index\nparts:\n  - chapters:\n      - file: nbs/05_cdrl\n'
    )
    write(tmp_path, '01_mcmc.ipynb')
    write(tmp_path, '05_cdrl.ipynb')
    assert contents(tmp_path) == [
        '_toc.yml: nbs/index does not exist',
        '01_mcmc.ipynb: not in _toc.yml',
    ]


def test_citations(tmp_path):
    write(
        tmp_path,
        '05_cdrl.ipynb',
        dict(cell_type='markdown', source=['{cite:p}`gao2021, ho2020`'], metadata={}),
    )
    (tmp_path / 'nbs/references.bib').write_text(
        '@misc{gao2021,\n}\n@misc{du2019,\n}\n@misc{du2019,\n}\n'
    )
    (tmp_path / 'nbs/index.md').write_text('```{bibliography}\n```')
    assert len(citations(tmp_path)) == 3
    (tmp_path / 'nbs/references.bib').write_text('@misc{gao2021,\n}\n@misc{ho2020,\n}\n')
    (tmp_path / 'nbs/index.md').write_text('{cite}`gao2021`')
    assert not citations(tmp_path)


def test_core_book_needs_no_torch():
    "The book builds without PyTorch: its reader must not import it, nor anything else that is heavy."
    code = 'import sys, ebmbook.core.book as b; bad = {"torch", "numpy", "papermill", "nbdev", "fastcore", "sphinx"} & sys.modules.keys(); assert not bad, bad'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
