"""Are the functions that `__all__` exports annotated completely? Runs mypy over the package.

Of mypy's findings those count that a caller meets: missing annotations of exported functions and
of the methods of exported classes, unknown names, calls that cannot work.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODES = {
    'no-untyped-def',
    'name-defined',
    'call-arg',
    'return',
    'valid-type',
    'syntax',
    'import',
}


def is_public(name):
    return not name.startswith('_') or name in ('__init__', '__call__')


def exported(path):
    "Lines of the definitions of a module that its `__all__` exports, methods included."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            names = set(ast.literal_eval(node.value))
    lines = set()
    for node in tree.body:
        if getattr(node, 'name', None) not in names:
            continue
        parts = [node, *node.body] if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            if isinstance(part, ast.FunctionDef) and is_public(part.name):
                lines |= {part.lineno, *(deco.lineno for deco in part.decorator_list)}
    return lines


def findings(root):
    "What mypy says about the public surface."
    command = [
        sys.executable,
        '-m',
        'mypy',
        '--no-error-summary',
        '--no-color-output',
        'ebmbook',
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        return [done.stdout + done.stderr]
    public, bad = {}, []
    for line in done.stdout.splitlines():
        match = re.match(r'(.+?\.py):(\d+): error: .*\[([\w-]+)\]$', line)
        if not match or match[3] not in CODES:
            continue
        path, number = root / match[1], int(match[2])
        if match[3] == 'no-untyped-def':
            public.setdefault(path, exported(path))
            if number not in public[path]:
                continue
        bad.append(line)
    return bad


if __name__ == '__main__':
    found = findings(ROOT)
    print('\n'.join(found))
    sys.exit(bool(found))
