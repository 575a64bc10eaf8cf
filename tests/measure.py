"""Measures of the code, printed: `make measure`, or against another commit `make measure BASE=…`.

The limits that stand in `tests/test_repo.py` are tests; this program shows how far away they are.
Another commit is formatted first, so that both columns count the same kind of line.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import test_repo as repo  # noqa: E402

FREE = {'x', 'n', 'i', '_'}  # names of one letter that need no table
PASSAGE = 6  # lines that make a repeated passage


def sources(root):
    "Modules of the package as pairs (dotted name, text)."
    return [(m, p.read_text(encoding='utf-8')) for m, p in repo.modules(root)]


def line_lengths(texts):
    lengths = sorted(len(line) for _, text in texts for _, line in repo.own_lines(text))
    return lengths[int(0.95 * len(lengths))], lengths[-1]


def long_bodies(texts):
    "Functions whose body has more than 40 lines."
    found = []
    for module, text in texts:
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef)
                and repo.body_lines(node) > repo.BODY_LINES
            ):
                found.append(f'{module}.{node.name}')
    return found


def complexities(root):
    "Functions above complexity 12, by ruff."
    command = [
        sys.executable,
        '-m',
        'ruff',
        'check',
        '--isolated',
        '--select',
        'C901',
        '--config',
        'lint.mccabe.max-complexity=12',
        '--output-format',
        'concise',
        str(root / 'ebmbook'),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return re.findall(r'C901 `(\w+)`', done.stdout)


def room_of(module):
    return module.partition('.')[0]


def room_shares(texts):
    "Share of the lines that each room holds, largest first."
    lines = Counter()
    for module, text in texts:
        lines[room_of(module)] += len(text.splitlines())
    total = sum(lines.values())
    return [(room, n / total) for room, n in lines.most_common()]


def symbols(root):
    "Names of one letter in the tables of symbols, by chapter; notation.md counts everywhere."
    pages = {p: repo.markdown(nb) for p, nb in repo.notebooks(root)}
    pages[Path('notation.md')] = (root / 'nbs' / 'notation.md').read_text(encoding='utf-8')
    found = defaultdict(set)
    for path, text in pages.items():
        for row in re.findall(r'^\|[^|\n]*\|([^|\n]*)\|', text, re.M):
            found[chapter_of(path)] |= {
                name for name in re.findall(r'`(\w+)`', row) if len(name) == 1
            }
    return found


def chapter_of(path):
    "05_cdrl.ipynb, 05_cdrl/nets.ipynb and 05a_cdrl_nets.ipynb belong to one chapter."
    number = re.match(r'(\d+)', path.parts[0])
    return (
        number[1] if number else path.stem if path.stem == 'notation' else path.as_posix()
    )


def bound_names(text):
    "Names that are bound: arguments and targets of assignments."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def one_letter(root):
    "Share of bound names with one letter: all of them, and those that no table of symbols gives."
    tables, owner = symbols(root), notebook_of(root)
    every = short = strange = 0
    for module, text in sources(root):
        known = FREE | tables['notation'] | tables[chapter_of(owner[module])]
        for name in bound_names(text):
            every += 1
            short += len(name) == 1
            strange += len(name) == 1 and name not in known
    return short / every, strange / every


def notebook_of(root):
    "Path of the notebook that writes a module."
    found = {}
    for path, nb in repo.notebooks(root):
        for _, lines, _ in repo.code_cells(nb):
            for key, value in repo.directives(lines):
                if key == 'default_exp':
                    found[value] = path
    return found


def repeated(texts):
    "Passages that stand in two places; a run counts once for each pair of places."
    where = defaultdict(list)
    for module, text in texts:
        lines = [(n, o.strip()) for n, o in enumerate(text.splitlines()) if counts(o)]
        for i in range(len(lines) - PASSAGE + 1):
            where[tuple(o for _, o in lines[i : i + PASSAGE])].append((module, i))
    pairs = {(a, b) for places in where.values() for a in places for b in places if a < b}
    # a run goes on where both places move on by one line
    return sum(((m, i - 1), (k, j - 1)) not in pairs for (m, i), (k, j) in pairs)


def counts(line):
    "Lines that say something: no blank, comment, bracket or import."
    line = line.strip()
    return bool(re.search(r'\w', line)) and not line.startswith(('#', 'import ', 'from '))


def field_groups(texts):
    "Largest number of fields that one class of settings defines."
    most = (0, '')
    for module, text in texts:
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and re.search(
                r'Config|Fields|Loop|Switches', node.name
            ):
                most = max(
                    most,
                    (
                        sum(isinstance(o, ast.AnnAssign) for o in node.body),
                        f'{module}.{node.name}',
                    ),
                )
    return most


def measures(root):
    "Name of each measure -> what is printed."
    texts = sources(root)
    p95, longest = line_lengths(texts)
    bodies, shares = long_bodies(texts), room_shares(texts)
    lines = repo.exported_lines(root)
    many = sum(n > 600 for n in lines.values())
    short, strange = one_letter(root)
    fields, owner = field_groups(texts)
    return {
        'lines of the package': f'{sum(len(t.splitlines()) for _, t in texts):,}',
        'line length, 95 % and longest (88, 100)': f'{p95}, {longest}',
        'functions with a body above 40 lines (0)': f'{len(bodies)} {" ".join(bodies[:3])}',
        'functions above complexity 12 (0)': ' '.join(complexities(root)) or '0',
        'notebooks above 600 exported lines (0)': f'{many}, largest {max(lines.values())}',
        'largest room (20 %)': f'{shares[0][0]} {100 * shares[0][1]:.1f} %',
        'arrows up, circles (0, 0)': f'{len(repo.floors(root))}, {len(repo.circles(root))}',
        'largest group of settings (12)': f'{fields} {owner}',
        'names of one letter': f'{100 * short:.1f} %',
        'of them in no table of symbols (16.5 %)': f'{100 * strange:.1f} %',
        f'repeated passages of {PASSAGE} lines or more': str(repeated(texts)),
    }


def formatted_copy(base, folder):
    "Another commit, checked out and formatted as this one is."
    tree = Path(folder) / 'tree'
    subprocess.run(
        ['git', '-C', repo.ROOT, 'worktree', 'add', '--quiet', '--detach', tree, base],
        check=True,
    )
    command = [
        sys.executable,
        '-m',
        'ruff',
        'format',
        '--quiet',
        '--isolated',
        '--line-length',
        '92',
        '--config',
        'format.quote-style="preserve"',
        str(tree / 'ebmbook'),
        str(tree / 'nbs'),
    ]
    subprocess.run(command, check=True)
    return tree


def main():
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cli.add_argument('base', nargs='?', help="commit to compare with")
    cli.add_argument('--json', action='store_true', help="print an object")
    arg = cli.parse_args()
    columns = {'here': measures(repo.ROOT)}
    if arg.base:
        with tempfile.TemporaryDirectory() as folder:
            tree = formatted_copy(arg.base, folder)
            columns[arg.base] = measures(tree)
            subprocess.run(
                ['git', '-C', repo.ROOT, 'worktree', 'remove', '--force', tree], check=True
            )
    if arg.json:
        print(json.dumps(columns, indent=1))
        return
    for name in columns['here']:
        print(
            f'{name:46}'
            + ''.join(f'{column[name]:36}' for column in columns.values()).rstrip()
        )


if __name__ == '__main__':
    main()
