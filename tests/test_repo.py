"""Rules of the repository: functions that return what breaks them, each tried on a bad example.

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

# The plan of the house: imports go strictly to lower floors. A room that is not listed is an error.
SYSTEMS = ['nerf_lebm', 'coopflow', 'cdrl', 'vaebm', 'ecvae', 'liebm']
FLOORS = {
    'checks': -1,
    'mcmc': 0,
    'plot': 0,
    'data': 1,
    'learn': 2,
    'measure': 2,
    'flows': 2,
    'foundations': 3,
    **dict.fromkeys(SYSTEMS, 4),
    'front': 5,
    'scoreboard': 6,
    'doctor': 6,
    'shell': 7,
}
# parts that stand lower than the rest of their room
LOW = {
    'learn.limits': -1,
    'learn.settings': 0,
    'learn.blocks': 1,
    'learn.files': 1,
    'learn.runs': 1,
    'learn.draws': 1,
    'learn.parts': 1,
    'learn.ledger': 1,
    'learn.trackers': 1,
}
# within a system: settings and networks below the method, rivals above it, tasks on top
INSIDE = {'method': 1, 'uses': 2, 'rivals': 2, 'tasks': 3}
# they ask documents and foreign objects, not modules and networks
ASKING = {'shell.book'}
PARAMETERS = [
    'dataset',
    'preset',
    'seed',
    'weights',
    'over',
    'out',
]  # of a system's chapter
DIRECTIVES = {'export', 'hide', 'default_exp', 'eval', 'echo', 'slow', 'gpu'}
CELL_LINES, BODY_LINES, EXPORTED_LINES, FIELDS = 40, 40, 600, 12
LINE_LENGTH = 100
NOTEBOOK_BYTES, WEIGHT_BYTES = 1_500_000, 2_000_000
# chapters that are no system; the others are called `method`, as their page tells the method
MODULES = {'00_data': 'data.catalogue', '01_mcmc': 'mcmc'}


# --- what is there


def notebooks(root):
    """Notebooks below nbs/ as pairs (path relative to nbs/, content).

    Names that start with _ or . are drafts.
    """
    nbs, found = root / 'nbs', []
    for path in sorted(nbs.rglob('*.ipynb')):
        name = path.relative_to(nbs)
        if not any(part.startswith(('_', '.')) for part in name.parts):
            found.append((name, json.loads(path.read_text(encoding='utf-8'))))
    return found


def code_cells(nb):
    "Code cells as triples (number, lines, tags)."
    cells = [(i, cell) for i, cell in enumerate(nb['cells']) if cell['cell_type'] == 'code']
    return [
        (i, ''.join(cell['source']).splitlines(), cell['metadata'].get('tags', []))
        for i, cell in cells
    ]


def markdown(nb):
    "The text of a notebook."
    cells = [cell for cell in nb['cells'] if cell['cell_type'] == 'markdown']
    return '\n'.join(''.join(cell['source']) for cell in cells)


def directives(lines):
    "Leading directives of a cell as pairs (name, argument)."
    found = []
    for line in lines:
        match = re.match(r'#\s*\|\s*([\w-]+):?\s*(.*)', line)
        if not match:
            break
        found.append((match[1], match[2].strip()))
    return found


def exported(lines):
    return any(name == 'export' for name, _ in directives(lines))


def body(lines):
    return lines[len(directives(lines)) :]


def said_lines(lines):
    return sum(bool(line.strip()) for line in lines)


def module_of(path):
    """The module that a notebook must write.

    nbs/plot -> plot, nbs/05_cdrl -> cdrl.method, nbs/05_cdrl/nets -> cdrl.nets.
    """
    if path.stem in MODULES and len(path.parts) == 1:
        return MODULES[path.stem]
    parts = [re.sub(r'^\d+_', '', part) for part in path.with_suffix('').parts]
    is_chapter = len(parts) == 1 and parts[0] != path.stem
    return '.'.join([*parts, 'method'] if is_chapter else parts)


def modules(root):
    "Modules of the package as pairs (dotted name without the package, path)."
    package, found = root / 'ebmbook', []
    for path in sorted(package.rglob('*.py')):
        if path.name not in ('__init__.py', '_modidx.py'):
            found.append(('.'.join(path.relative_to(package).with_suffix('').parts), path))
    return found


MADE = {
    '.git', '.venv', 'runs', '_build', 'data', 'build', '__pycache__', '.ipynb_checkpoints',
    '.pytest_cache', '.ruff_cache', '.mypy_cache', '.hypothesis',
}  # fmt: skip


def tracked(root):
    "Files that git tracks or would track; outside a repository, all but what is made."
    command = ['git', '-C', str(root), 'ls-files', '-co', '--exclude-standard', '-z']
    if (root / '.git').exists():
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            paths = [root / name for name in done.stdout.split('\0') if name]
            return [path for path in paths if path.is_file()]
    found = []
    for path in root.rglob('*'):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(o in MADE or o.endswith('.egg-info') for o in parts):
            found.append(path)
    return found


# --- the package


def imported(tree, module):
    "Modules of this package that a syntax tree imports, also within functions."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ['ebmbook', *module.split('.')][: -node.level] if node.level else []
            start = '.'.join([*base, *([node.module] if node.module else [])])
            names = [start, *(f'{start}.{alias.name}' for alias in node.names)]
        else:
            continue
        found |= {n.removeprefix('ebmbook.') for n in names if n.startswith('ebmbook.')}
    return found


def imports_of(root):
    "Module -> modules of this package that it imports; a package stands for itself."
    found = modules(root)
    known = {name for name, _ in found} | {name.rpartition('.')[0] for name, _ in found}
    known |= FLOORS.keys()
    trees = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in found}
    return {
        name: sorted(imported(tree, name) & known - {name}) for name, tree in trees.items()
    }


def room_of(module):
    return module.partition('.')[0]


def floor_of(module):
    return LOW.get(module, FLOORS.get(room_of(module)))


def rank(module):
    "Place of a part within its system; parts without a place of their own are lowest."
    return INSIDE.get(module.rpartition('.')[2], 0)


def wrong_way(module, other):
    "Why a module must not import another one; empty if it may."
    here, there = floor_of(module), floor_of(other)
    if there is None:
        return 'is in no room'
    if room_of(module) != room_of(other):
        return f'(floor {there})' if there >= here else ''
    if there > here:
        return f'(floor {there})'
    if room_of(module) in SYSTEMS and rank(other) > rank(module):
        return 'a higher part of the system'
    return ''


def floors(root):
    "Imports that do not go to a lower floor, rooms that no floor holds."
    bad = []
    for module, others in imports_of(root).items():
        if floor_of(module) is None:
            bad.append(
                f'{module}: on no floor; add its room to FLOORS and to CONTRIBUTING.md'
            )
            continue
        for other in others:
            why = wrong_way(module, other)
            # a package that is named beside its part adds nothing
            inside = any(o.startswith(f'{other}.') for o in others)
            if why and not inside:
                bad.append(f'{module} (floor {floor_of(module)}) imports {other} {why}')
    return bad


def circles(root):
    "Modules that import each other, directly or through others."
    graph, done, path, bad = imports_of(root), set(), [], []

    def visit(module):
        if module in path:
            bad.append(' -> '.join([*path[path.index(module) :], module]))
        elif module not in done:
            path.append(module)
            for other in graph.get(module, ()):
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)
    return bad


HEADER = re.compile(r'^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+?\.ipynb)\.?$', re.M)


def orphans(root):
    "Modules without notebook."
    bad = []
    for module, path in modules(root):
        match = HEADER.search(path.read_text(encoding='utf-8'))
        if not match:
            bad.append(f'{module}: not generated by a notebook')
            continue
        places = [path.parent / match[1], root / 'ebmbook' / match[1]]
        if not any(place.is_file() for place in places):
            bad.append(f'{module}: its notebook {match[1]} is gone')
    return bad


def body_lines(node):
    "Lines of a function's body; docstring and signature do not count."
    statements = node.body
    first = statements[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        statements = statements[1:] or statements
    return statements[-1].end_lineno - statements[0].lineno + 1


def long_functions(root):
    "Functions of package and tests whose body is above the limit."
    bad = []
    paths = [path for _, path in modules(root)] + sorted((root / 'tests').glob('*.py'))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n = body_lines(node)
                if n > BODY_LINES:
                    name = path.relative_to(root)
                    bad.append(
                        f'{name}: the body of {node.name} has {n} lines, not {BODY_LINES}'
                    )
    return bad


def own_lines(text):
    "Numbered lines of a module, without its docstring and list of names, which nbdev writes."
    tree, skipped = ast.parse(text), {1}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return [(n, line) for n, line in lines if n not in skipped]


def long_lines(root):
    "Lines of the package that do not fit the page."
    bad = []
    for module, path in modules(root):
        for n, line in own_lines(path.read_text(encoding='utf-8')):
            if len(line) > LINE_LENGTH:
                bad.append(f'{module}:{n}: {len(line)} columns, more than {LINE_LENGTH}')
    return bad


def field_groups(root):
    "Classes that define more settings than a reader takes in at once; a system is one list."
    bad = []
    for module, path in modules(root):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if not isinstance(node, ast.ClassDef):
                continue
            n = sum(isinstance(line, ast.AnnAssign) for line in node.body)
            if n > FIELDS and f'{module}.{node.name}' != 'learn.system.System':
                bad.append(
                    f'{module}.{node.name}: {n} fields in one group, more than {FIELDS}'
                )
    return bad


def crammed(root):
    "Assignments within literals, functions called where they are made, wildcard imports."
    bad = []
    for module, path in modules(root):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            literal = isinstance(node, (ast.Dict, ast.List, ast.Set, ast.Tuple))
            if literal and any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
                bad.append(f'{module}:{node.lineno}: an assignment within a literal')
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Lambda):
                bad.append(f'{module}:{node.lineno}: a lambda called in place')
            if isinstance(node, ast.ImportFrom) and node.names[0].name == '*':
                bad.append(f'{module}:{node.lineno}: a wildcard import')
    return bad


def stranded(root):
    """Comments that documentation gives to a neighbour or to nobody.

    Behind a bracket that closes a default, or within one that the formatter put around it.
    """
    behind = re.compile(r'[])}](?:,| =.*)  # |\]:  # ')
    opened = re.compile(r'\w+: .* = \($')
    bad = []
    for module, path in modules(root):
        lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
        for number, (line, after) in enumerate(zip(lines, [*lines[1:], '']), 1):
            if behind.match(line) or opened.match(line) and '  # ' in after:
                bad.append(f'{module}:{number}: shorten the documentation of {line}')
    return bad


def contract(root):
    """What would go round the description of a system (`learn.system`).

    Settings that travel beside the networks that hold them, questions to a module or a network
    about what it has, readings of the setting `method`, which `System.of` alone reads, and
    processes or parts of a batch counted outside the loop.
    """
    bad = []
    for module, path in modules(root):
        part, room = module.rpartition('.')[2], room_of(module)
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            where = f'{module}:{getattr(node, "lineno", 0)}'
            if isinstance(node, ast.FunctionDef):
                takes = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
                apart = {'nets', 'cfg'} <= takes and part not in ('presets', 'nets')
                if apart and node.name != 'build':
                    bad.append(f'{where}: {node.name} takes cfg beside nets')
            if isinstance(node, ast.Attribute) and node.attr == 'method':
                bad.append(f'{where}: {ast.unparse(node)} is read')
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == 'hasattr' and module not in ASKING:
                    bad.append(f'{where}: hasattr')
            if room in [*SYSTEMS, 'foundations']:
                text = ast.unparse(node) if isinstance(node, ast.stmt) else ''
                if text.startswith(('import torch.distributed', 'from torch.distributed')):
                    bad.append(f'{where}: {text}')
                if isinstance(node, ast.ImportFrom):
                    if 'Slice' in [alias.name for alias in node.names]:
                        bad.append(f'{where}: a system divides no batch')
    return bad


def open_blocks(root):
    """Losses that wait inside a `with`.

    A batch that comes in parts has several such generators, and each would find the block of
    another open.
    """
    bad = []
    for module, path in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith('losses'):
                continue
            blocks = [part for part in ast.walk(node) if isinstance(part, ast.With)]
            inner = [part for block in blocks for part in ast.walk(block)]
            waits = {o.lineno for o in inner if isinstance(o, (ast.Yield, ast.YieldFrom))}
            bad += [
                f'{module}: {node.name} yields inside a with, line {n}'
                for n in sorted(waits)
            ]
    return bad


# --- the notebooks


def names(root):
    "Notebooks that do not write exactly the module of their name, and modules written twice."
    bad, owner = [], {}
    for path, nb in notebooks(root):
        given = [o for _, lines, _ in code_cells(nb) for o in directives(lines)]
        written = [argument for name, argument in given if name == 'default_exp']
        if written != [module_of(path)]:
            bad.append(
                f'{path}: must say default_exp {module_of(path)} once, says {written}'
            )
        if any(name == 'export' and argument for name, argument in given):
            bad.append(f'{path}: exports into another module')
        for module in written:
            if module in owner:
                bad.append(f'{path}: writes {module}, as {owner[module]} does')
            owner[module] = path
    return bad


def is_literal(node):
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def is_plain(node):
    "An assignment of a literal to one name."
    return (
        isinstance(node, ast.Assign) and len(node.targets) == 1 and is_literal(node.value)
    )


def is_system(path):
    module = module_of(path)
    return room_of(module) in SYSTEMS and module.endswith('.method')


def parameters(root):
    """Systems without their parameters cell; parameters that are not the six literals.

    Also cells that papermill injected.
    """
    bad = []
    for path, nb in notebooks(root):
        cells = code_cells(nb)
        found = [(i, lines) for i, lines, tags in cells if 'parameters' in tags]
        if any('injected-parameters' in tags for *_, tags in cells):
            bad.append(f'{path}: an executed copy, with injected parameters')
        if is_system(path) and len(found) != 1:
            bad.append(f'{path}: {len(found)} cells tagged parameters instead of one')
        for i, lines in found:
            statements = ast.parse('\n'.join(lines)).body
            if not all(is_plain(node) for node in statements):
                bad.append(f'{path} cell {i}: parameters are plain assignments of literals')
                continue
            given = [node.targets[0].id for node in statements]
            if is_system(path) and given != PARAMETERS:
                bad.append(f'{path} cell {i}: parameters are {PARAMETERS}, not {given}')
    return bad


def good_directive(line):
    match = re.fullmatch(r'#\| ([a-z_]+)(: (true|false)| [\w.]+)?', line)
    return match and match[1] in DIRECTIVES


def spelling(root):
    "Directives in another spelling, unknown ones, and ones below code, where they do not count."
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            n = len(directives(lines))
            where = f'{path} cell {i}: directive'
            bad += [f'{where} {line!r}' for line in lines[:n] if not good_directive(line)]
            low = [line for line in lines[n:] if re.match(r'#\s*\|\s*[a-z_]+', line)]
            bad += [f'{where} {line!r} below the top of its cell' for line in low]
    return bad


def cell_lines(lines):
    "Lines of a cell that say something; signatures and docstrings do not count."
    text = '\n'.join(body(lines))
    n = said_lines(body(lines))
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return n
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            n -= said_lines(text.splitlines()[node.lineno - 1 : first_statement(node) - 1])
    return n


def first_statement(node):
    "Line of the first statement below the docstring."
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if documented and len(node.body) > 1:
        first = node.body[1]
    decorators = getattr(first, 'decorator_list', [])
    return min([first.lineno, *(o.lineno for o in decorators)])


def exported_lines(root):
    "Notebook -> lines that it exports."
    found = {}
    for path, nb in notebooks(root):
        cells = [lines for _, lines, _ in code_cells(nb) if exported(lines)]
        found[path] = sum(said_lines(body(lines)) for lines in cells)
    return found


def sizes(root):
    "Cells, exports and notebooks above their limits."
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            n = cell_lines(lines)
            if n > CELL_LINES:
                bad.append(f'{path} cell {i}: {n} lines, more than {CELL_LINES}')
        n = (root / 'nbs' / path).stat().st_size
        if n > NOTEBOOK_BYTES:
            bad.append(f'{path}: {n} bytes, more than {NOTEBOOK_BYTES}')
    for path, n in exported_lines(root).items():
        if n > EXPORTED_LINES:
            bad.append(f'{path}: {n} exported lines, more than {EXPORTED_LINES}')
    return bad


def imports(root):
    """Wildcard and relative imports, magics in exports.

    Also cells that would export the package when papermill runs them.
    """
    bad = []
    for path, nb in notebooks(root):
        for i, lines, _ in code_cells(nb):
            text, where = '\n'.join(lines), f'{path} cell {i}:'
            if re.search(r'^\s*from\s+\S+\s+import\s+\*', text, re.M):
                bad.append(f'{where} wildcard import')
            if exported(lines) and re.search(r'^\s*from\s+\.', text, re.M):
                bad.append(f'{where} relative import')
            if exported(lines) and re.search(r'^\s*[%!]', text, re.M):
                bad.append(f'{where} magic in an exported cell')
            if re.search(r'\bnbdev_export\s*\(', text):
                bad.append(f'{where} exports the package; make sync does that')
    return bad


def errors(root):
    "Stored outputs of failed cells."
    bad = []
    for path, nb in notebooks(root):
        for i, cell in enumerate(nb['cells']):
            for out in cell.get('outputs', []):
                if out['output_type'] == 'error':
                    bad.append(f'{path} cell {i}: stored error {out.get("ename")}')
    return bad


CHECK = re.compile(r'\bassert\b|\btest_(eq|ne|close|fail|is|sig|shuffled|stdout|warns)\b')


def defines(lines):
    "Whether an exported cell defines a function or a class that others may use."
    return any(re.match(r'(def|class) [A-Za-z]', line) for line in lines)


def untested(root):
    """Exported definitions that no test follows before the next one.

    Functions and classes alike; a cell that draws a figure is no test.
    """
    bad = []
    for path, nb in notebooks(root):
        waiting = None
        for i, lines, _ in code_cells(nb):
            if exported(lines):
                if waiting is not None and defines(lines):
                    bad.append(f'{path} cell {waiting}: no test before the next definition')
                waiting = i if defines(lines) else waiting
            elif CHECK.search('\n'.join(body(lines))):
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
    """Folders of a machine and hosts of package registries in tracked text files.

    Vendored files are left out.
    """
    bad = []
    for path in tracked(root):
        if '_vendor' in path.parts:
            continue
        try:
            text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        for n, line in enumerate(text.splitlines(), 1):
            match = PLACES.search(line) or HOSTS.search(line)
            if match:
                bad.append(f'{path.relative_to(root)}:{n}: {match[0]}')
    return bad


SECRETS = re.compile(
    r'\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{32,})'
    '|-----BEGIN [A-Z ]*PRIVATE' + ' KEY'
)
BINARY = ('.png', '.woff', '.safetensors')


def secrets(root):
    "Access tokens and private keys in tracked text files."
    bad = []
    for path in tracked(root):
        if path.suffix in BINARY:
            continue
        if SECRETS.search(path.read_text(encoding='utf-8', errors='replace')):
            bad.append(f'{path.relative_to(root)}: what looks like a secret')
    return bad


def weights(root):
    "Folders of small trained weights above their limit."
    bad = []
    for folder in sorted((root / 'ebmbook/weights').glob('*/')):
        n = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
        if n > WEIGHT_BYTES:
            bad.append(f'{folder.relative_to(root)}: {n} bytes, more than {WEIGHT_BYTES}')
    return bad


def contents(root):
    "Pages named in _toc.yml that do not exist, and notebooks that no page of the book shows."
    text = (root / '_toc.yml').read_text(encoding='utf-8')
    pages = re.findall(r'^\s*(?:- file|root): (\S+)', text, re.M)
    bad = []
    for page in pages:
        if not any((root / f'{page}{suffix}').is_file() for suffix in ('.md', '.ipynb')):
            bad.append(f'_toc.yml: {page} does not exist')
    for path, _ in notebooks(root):
        if f'nbs/{path.with_suffix("").as_posix()}' not in pages:
            bad.append(f'{path}: not in _toc.yml')
    return bad


def citations(root):
    """Works cited on a page that references.bib does not hold, keys given twice.

    Also lists of works outside references.md.
    """
    library = (root / 'nbs/references.bib').read_text(encoding='utf-8')
    keys = re.findall(r'^@\w+\{([\w-]+),', library, re.M)
    twice = sorted({key for key in keys if keys.count(key) > 1})
    bad = [f'references.bib: {key} is given twice' for key in twice]
    pages = {str(path): markdown(nb) for path, nb in notebooks(root)}
    for path in sorted((root / 'nbs').glob('*.md')):
        pages[path.name] = path.read_text(encoding='utf-8')
    for page, text in pages.items():
        groups = re.findall(r'\{cite(?::\w+)?\}`([^`]+)`', text)
        cited = {key.strip() for group in groups for key in group.split(',')}
        missing = sorted(cited - set(keys))
        bad += [f'{page}: cites {key}, which is not in references.bib' for key in missing]
        if '```{bibliography}' in text and page != 'references.md':
            bad.append(f'{page}: the list of works belongs to references.md')
    return bad


# --- the rules hold here

RULES = [
    floors, circles, orphans, long_functions, long_lines, field_groups, crammed, stranded,
    contract, open_blocks, names, parameters, spelling, sizes, imports, errors, untested,
    places, secrets, weights, contents, citations,
]  # fmt: skip


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    bad = rule(ROOT)
    assert not bad, '\n' + '\n'.join(bad)


def test_there_is_something_to_check():
    assert notebooks(ROOT) and modules(ROOT) and len(tracked(ROOT)) > 30


def test_rooms_are_balanced():
    "No room holds more than a fifth of the lines."
    lines = {}
    for module, path in modules(ROOT):
        n = len(path.read_text(encoding='utf-8').splitlines())
        lines[room_of(module)] = lines.get(room_of(module), 0) + n
    assert max(lines.values()) <= 0.2 * sum(lines.values()), lines


# --- and each of them can fail


def cell(source, tags=(), outputs=()):
    metadata = {'tags': list(tags)} if tags else {}
    lines = source.splitlines(keepends=True)
    return dict(cell_type='code', source=lines, metadata=metadata, outputs=list(outputs))


def write(root, name, *cells):
    "Write a notebook below nbs/ and return the root."
    path = root / 'nbs' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=list(cells))
    path.write_text(json.dumps(nb), encoding='utf-8')
    return root


def module(root, name, source, book='../nbs/x.ipynb'):
    "Write a module with the header of a generated one and return the root."
    path = root / 'ebmbook' / f'{name.replace(".", "/")}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f'# AUTOGENERATED! DO NOT EDIT! File to edit: {book}.\n'
    path.write_text(header + source, encoding='utf-8')
    return root


@pytest.mark.parametrize(
    'name,source,why',
    [
        ('plot', 'from ebmbook.cdrl import build', 'imports cdrl (floor 4)'),
        ('learn.loop', 'from ..cdrl.method import losses', 'imports cdrl.method (floor 4)'),
        ('learn.runs', 'from .loop import train', 'imports learn.loop (floor 2)'),
        ('plot', 'from . import cdrl', 'imports cdrl (floor 4)'),
        ('data.folders', 'import ebmbook.learn.runs as r', 'imports learn.runs (floor 1)'),
        (
            'measure.images',
            'from ebmbook.flows.glow import Glow',
            'imports flows.glow (floor 2)',
        ),
        (
            'cdrl.method',
            'def f():\n    from ebmbook.vaebm import build',
            'imports vaebm (floor 4)',
        ),
        (
            'cdrl.nets',
            'from ebmbook.cdrl.method import losses',
            'a higher part of the system',
        ),
        (
            'cdrl.method',
            'from ebmbook.cdrl.tasks import evaluate',
            'a higher part of the system',
        ),
        ('novelty.part', 'x = 1', 'on no floor'),
    ],
)
def test_floors(tmp_path, name, source, why):
    for other in ('cdrl.method', 'cdrl.tasks', 'learn.loop', 'learn.runs', 'flows.glow'):
        module(tmp_path, other, '')
    bad = floors(module(tmp_path, name, source))
    assert len(bad) == 1 and why in bad[0]


def test_floors_allow(tmp_path):
    module(tmp_path, 'cdrl.nets', '')
    source = (
        'import torch\nfrom .nets import UNet\nfrom ebmbook.learn.contract import Stage\n'
    )
    module(tmp_path, 'cdrl.method', source + 'from ebmbook.mcmc import ula')
    module(tmp_path, 'shell.cli', 'from ..cdrl import PRESETS\nfrom .claims import verdict')
    module(tmp_path, 'learn.loop', 'from .runs import Run\nfrom .settings import choose')
    assert not floors(tmp_path)


def test_circles(tmp_path):
    module(tmp_path, 'learn.loop', 'from .log import Log')
    module(tmp_path, 'learn.log', 'def f():\n    from ebmbook.learn.loop import train')
    assert circles(tmp_path) == ['learn.log -> learn.loop -> learn.log']
    module(tmp_path, 'learn.log', '')
    assert not circles(tmp_path)


def test_module_of():
    pages = ['plot', '05_cdrl', '05_cdrl/nets', '00_data', '01_mcmc', 'learn/runs']
    written = ['plot', 'cdrl.method', 'cdrl.nets', 'data.catalogue', 'mcmc', 'learn.runs']
    assert [module_of(Path(f'{page}.ipynb')) for page in pages] == written


def test_orphans(tmp_path):
    module(tmp_path, 'mcmc', '', '../nbs/gone.ipynb')
    module(tmp_path, 'learn.log', '', '../../nbs/learn/log.ipynb')
    write(tmp_path, 'learn/log.ipynb')
    assert orphans(tmp_path) == ['mcmc: its notebook ../nbs/gone.ipynb is gone']
    (tmp_path / 'ebmbook/own.py').write_text('x = 1\n')
    assert 'own: not generated by a notebook' in orphans(tmp_path)


def test_long_functions(tmp_path):
    start = 'def f(\n    x,\n):\n    """Text.\n\n    More.\n    """\n'
    module(tmp_path, 'mcmc', start + '    x = 1\n' * (BODY_LINES + 1))
    assert len(long_functions(tmp_path)) == 1
    assert not long_functions(module(tmp_path, 'mcmc', start + '    x = 1\n' * BODY_LINES))


def test_long_lines(tmp_path):
    module(tmp_path, 'mcmc', f'x = "{"y" * LINE_LENGTH}"\n')
    assert len(long_lines(tmp_path)) == 1
    assert not long_lines(module(tmp_path, 'mcmc', 'x = 1\n'))


def test_field_groups(tmp_path):
    start = 'class Config:\n'
    module(
        tmp_path, 'mcmc', start + ''.join(f'    x{i}: int = 1\n' for i in range(FIELDS + 1))
    )
    assert len(field_groups(tmp_path)) == 1
    module(tmp_path, 'mcmc', start + ''.join(f'    x{i}: int = 1\n' for i in range(FIELDS)))
    assert not field_groups(tmp_path)


@pytest.mark.parametrize(
    'source',
    ['x = dict([(1, (y := 2))])', 'x = {1: (y := 2)}', '(lambda: 1)()', 'from os import *'],
)
def test_crammed(tmp_path, source):
    assert crammed(module(tmp_path, 'mcmc', source))
    assert not crammed(module(tmp_path, 'mcmc', 'if (y := 2):\n    x = {1: y}'))


def test_stranded(tmp_path):
    "As the formatter leaves a documented parameter that is too long."
    wide = 'def f(\n    shape=(\n        3,\n        32,\n    ),  # Of one image\n    n=0,\n): ...'
    assert stranded(module(tmp_path, 'mcmc', wide))
    result = 'def f() -> list[\n    str\n]:  # Names\n    ...'
    assert stranded(module(tmp_path, 'mcmc', result))
    field = 'class A:\n    x: int = (\n        3  # Sides\n    )'
    assert stranded(module(tmp_path, 'mcmc', field))
    assert not stranded(module(tmp_path, 'mcmc', 'def f(\n    n=(3, 4),  # Sides\n): ...'))


@pytest.mark.parametrize(
    'source',
    [
        'def losses(nets, batch, cfg, ctx): ...',
        'def f(nets, *, cfg=None): ...',
        'def f(nets):\n    return hasattr(nets, "flow")',
        'import torch.distributed as dist',
        'from ebmbook.mcmc import Slice, normal',
    ],
)
def test_contract(tmp_path, source):
    assert contract(module(tmp_path, 'cdrl.method', source, '../../nbs/x.ipynb'))
    fine = 'from ebmbook.mcmc import normal\ndef build(cfg): ...\ndef f(nets, n): ...'
    assert not contract(module(tmp_path, 'cdrl.method', fine, '../../nbs/x.ipynb'))


def test_open_blocks(tmp_path):
    source = 'def losses(nets):\n    with frozen(nets): yield nets\n'
    module(tmp_path, 'mcmc', source)
    assert open_blocks(tmp_path) == ['mcmc: losses yields inside a with, line 3']
    source = 'def losses(nets):\n    with frozen(nets): out = nets\n    yield out\n'
    assert not open_blocks(module(tmp_path, 'mcmc', source))


@pytest.mark.parametrize(
    'file,cells',
    [
        ('05_cdrl.ipynb', ['x = 1']),
        ('05_cdrl.ipynb', ['#| default_exp cdrl.method', '#| default_exp cdrl.method']),
        ('05_cdrl.ipynb', ['#| default_exp cdrl']),
        ('learn/runs.ipynb', ['#| default_exp runs']),
        ('05_cdrl.ipynb', ['#| default_exp cdrl.method', '#| export core.nets\nx = 1']),
    ],
)
def test_names(tmp_path, file, cells):
    assert names(write(tmp_path, file, *map(cell, cells)))


def test_names_allow(tmp_path):
    write(
        tmp_path,
        'learn/runs.ipynb',
        cell('#| default_exp learn.runs'),
        cell('#| export\nx = 1'),
    )
    assert not names(
        write(tmp_path, '05_cdrl/nets.ipynb', cell('#| default_exp cdrl.nets'))
    )
    # written twice
    assert names(write(tmp_path, '06_cdrl/nets.ipynb', cell('#| default_exp cdrl.nets')))


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
    'source',
    [
        '#|export\nx = 1',
        '# | export\nx = 1',
        '#| eval:false\nx',
        '#| eval: False\nx',
        '#| exprot\nx',
        'x = 1\n#| export',
    ],
)
def test_spelling(tmp_path, source):
    assert spelling(write(tmp_path, '01_mcmc.ipynb', cell(source)))


def test_spelling_allow(tmp_path):
    sources = [
        '#| default_exp mcmc',
        '#| export\nx = 1',
        '#| hide\n#| eval: false\ny',
        '#| slow\nx = 1 #| y',
    ]
    assert not spelling(write(tmp_path, '01_mcmc.ipynb', *map(cell, sources)))


def test_sizes(tmp_path):
    page, line = '01_mcmc.ipynb', 'x = 1\n'
    assert len(sizes(write(tmp_path, page, cell(line * (CELL_LINES + 1))))) == 1
    assert len(sizes(write(tmp_path, page, *[cell('#| export\n' + line * 40)] * 16))) == 1
    assert not sizes(write(tmp_path, page, cell('#| export\n' + line * CELL_LINES)))
    text = dict(output_type='stream', text='x' * NOTEBOOK_BYTES)
    assert len(sizes(write(tmp_path, page, cell('x', outputs=[text])))) == 1


def test_cell_lines():
    source = 'def f(\n    x,\n):\n    """Text.\n\n    More."""\n    return x\n\n\ny = 1'
    assert cell_lines(source.splitlines()) == 2
    assert (
        cell_lines(['class A:', '    "Text."', '', '    def f(self):', '        return 1'])
        == 1
    )


@pytest.mark.parametrize(
    'source',
    [
        'from os import *',
        '#| export\nfrom .runs import root',
        '#| export\n%matplotlib inline',
        'import nbdev; nbdev.nbdev_' + 'export()',
    ],
)
def test_imports(tmp_path, source):
    assert len(imports(write(tmp_path, '01_mcmc.ipynb', cell(source)))) == 1


def test_errors(tmp_path):
    failed = dict(output_type='error', ename='ZeroDivisionError')
    printed = dict(output_type='stream', text='1')
    assert errors(write(tmp_path, '01_mcmc.ipynb', cell('1/0', outputs=[failed])))
    assert not errors(write(tmp_path, '01_mcmc.ipynb', cell('1', outputs=[printed])))


def test_untested(tmp_path):
    page, test, drawn = '01_mcmc.ipynb', cell('assert f()'), cell('plt.plot(f())')
    one, two = cell('#| export\ndef f(): return 1'), cell('#| export\nclass Kind: pass')
    assert len(untested(write(tmp_path, page, one, two))) == 2
    assert len(untested(write(tmp_path, page, one, drawn, two, drawn))) == 2
    assert not untested(write(tmp_path, page, one, test, two, drawn, test))


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
    text = '~/.cache, results/work/x, https://github.com/ebmbook/ebmbook, runs/home/x'
    (tmp_path / 'a.md').write_text(text)
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\xff/' + b'root/x')
    assert not places(tmp_path)


TOKENS = [
    'hf_' + 'a1B2' * 8,
    'ghp_' + 'a1B2' * 9,
    'AKIA' + 'ABCD1234' * 2,
    '-----BEGIN RSA PRIVATE' + ' KEY-----',
]


@pytest.mark.parametrize('text', TOKENS)
def test_secrets(tmp_path, text):
    (tmp_path / 'a.py').write_text(f'key = "{text}"')
    assert len(secrets(tmp_path)) == 1
    (tmp_path / 'a.py').write_text('key = hf_hub_download')
    assert not secrets(tmp_path)


def test_weights(tmp_path):
    folder = tmp_path / 'ebmbook/weights/cdrl-digits'
    folder.mkdir(parents=True)
    (folder / 'model.safetensors').write_bytes(bytes(WEIGHT_BYTES))
    assert not weights(tmp_path)
    (folder / 'config.json').write_text('{}')
    assert len(weights(tmp_path)) == 1


def test_contents(tmp_path):
    text = 'root: nbs/index\nparts:\n  - chapters:\n      - file: nbs/05_cdrl\n'
    (tmp_path / '_toc.yml').write_text(text)
    write(tmp_path, '01_mcmc.ipynb')
    write(tmp_path, '05_cdrl.ipynb')
    bad = ['_toc.yml: nbs/index does not exist', '01_mcmc.ipynb: not in _toc.yml']
    assert contents(tmp_path) == bad


def test_citations(tmp_path):
    text = dict(cell_type='markdown', source=['{cite:p}`gao2021, ho2020`'], metadata={})
    write(tmp_path, '05_cdrl.ipynb', text)
    library, index = tmp_path / 'nbs/references.bib', tmp_path / 'nbs/index.md'
    library.write_text('@misc{gao2021,\n}\n@misc{du2019,\n}\n@misc{du2019,\n}\n')
    index.write_text('```{bibliography}\n```')
    assert len(citations(tmp_path)) == 3
    library.write_text('@misc{gao2021,\n}\n@misc{ho2020,\n}\n')
    index.write_text('{cite}`gao2021`')
    assert not citations(tmp_path)


def test_the_book_needs_no_torch():
    "The book builds without PyTorch: its reader must not import it, nor anything heavy."
    heavy = {'torch', 'numpy', 'papermill', 'nbdev', 'fastcore', 'sphinx'}
    check = f'bad = {heavy} & sys.modules.keys(); assert not bad, bad'
    code = f'import sys, ebmbook.shell.book; {check}'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
