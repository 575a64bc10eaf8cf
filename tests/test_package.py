"""What `pip install .` gives: light imports, a wheel with the package alone, plain words.

What the wheel does outside a clone is tried by `tests/wheel.py`.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_repo import ROOT, modules, tracked

HEAVY = (
    'torch_fidelity papermill tensorboard torch.utils.tensorboard fastcore nbdev nbformat '
    'nbclient ipykernel diffusers lpips matplotlib sklearn skimage'
).split()


def python(code, cwd, **env):
    "Run code in a fresh interpreter; what it printed."
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=cwd,
        env=os.environ | env,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_light(tmp_path):
    code = f'''
import importlib, sys
for name in "mcmc data learn.runs learn.loop cdrl measure.images shell.claims shell.cli".split():
    importlib.import_module("ebmbook."+name)
    found = [m for m in {HEAVY!r} if m in sys.modules]
    if found: sys.exit(f"ebmbook.{{name}} imports {{found}}")
'''
    python(code, tmp_path)


def clean_copy(to):
    "What a fresh clone holds, without what earlier builds left."
    for p in tracked(ROOT):
        (to / p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to / p.relative_to(ROOT))
    return to


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The package as a wheel, built without network in a copy of the clone."
    pytest.importorskip('setuptools')
    clone, out = (
        clean_copy(tmp_path_factory.mktemp('clone')),
        tmp_path_factory.mktemp('wheel'),
    )
    line = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '--no-index',
        '-w',
        str(out),
        str(clone),
    ]
    done = subprocess.run(line, cwd=out, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory):
    to = tmp_path_factory.mktemp('unpacked')
    with zipfile.ZipFile(wheel) as f:
        f.extractall(to)
    return to


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as f:
        held = {o for o in f.namelist() if '.dist-info/' not in o}
    package = {
        p.relative_to(ROOT).as_posix()
        for p in tracked(ROOT)
        if p.is_relative_to(ROOT / 'ebmbook')
    }
    evidence = {f'ebmbook/evidence/{name}' for name in ('claims.yaml', 'ledger.jsonl')}
    assert held == package | evidence
    assert {f"ebmbook/{m.replace('.', '/')}.py" for m, _ in modules(ROOT)} < held
    assert sum(o.startswith('ebmbook/extractors/') for o in held) >= 2
    assert sum(o.startswith('ebmbook/weights/') for o in held) >= 30
    assert wheel.stat().st_size <= 30 * 2**20


def test_the_wheel_says_what_it_needs_and_brings_the_command(wheel):
    with zipfile.ZipFile(wheel) as f:
        read = lambda name: next(
            f.read(o).decode() for o in f.namelist() if o.endswith('.dist-info/' + name)
        )
        meta, points = read('METADATA'), read('entry_points.txt')
    assert 'ebmbook = ebmbook.shell.cli:main' in points
    assert 'Requires-Python: >=3.11' in meta and 'License: Apache-2.0' in meta
    always = [
        re.match(r'Requires-Dist: ([\w-]+)', o)[1]
        for o in meta.splitlines()
        if o.startswith('Requires-Dist:') and 'extra' not in o
    ]
    assert {'torch', 'accelerate', 'safetensors', 'torch-fidelity', 'papermill'} <= set(
        always
    ) and not {'nbdev', 'diffusers', 'tensorboard', 'lpips'} & set(always)
    assert {
        'Classifier: Typing :: Typed',
        'Classifier: License :: OSI Approved :: Apache Software License',
    } < set(meta.splitlines())
    assert {'Documentation', 'Source', 'Changelog', 'Issues'} == set(
        re.findall(r'Project-URL: (\w+), https://', meta)
    )
    assert {
        f'Provides-Extra: {o}'
        for o in ('book', 'dev', 'diagnostics', 'latent', 'lpips', 'trackers')
    } <= set(meta.splitlines())


def test_the_installed_package_works_outside_a_clone(unpacked, tmp_path):
    env = dict(PYTHONPATH=str(unpacked))
    code = '''
from dataclasses import replace
import torch, ebmbook
from ebmbook.cdrl import PRESETS, Nets, build, sample
cfg = replace(PRESETS['digits'], ch=8, blocks=1, init_ch=8, init_blocks=1, n_steps=2)
nets = build(cfg)
draw = lambda nets: sample(nets, 3, generator=torch.Generator().manual_seed(0))
assert draw(nets).shape==(3, 1, 8, 8) and torch.isfinite(draw(nets)).all()
nets.save_pretrained("weights")
again = Nets.from_pretrained("weights")
assert again.cfg==cfg and torch.equal(draw(again), draw(nets))
from ebmbook.measure.extractors import EXTRACTORS, load_extractor
for name in EXTRACTORS: load_extractor(name)
print(ebmbook.__file__)
'''
    assert Path(python(code, tmp_path, **env).splitlines()[-1]).is_relative_to(unpacked)
    code = '''
from ebmbook.learn.runs import book_weights, evidence, results_folder, root
assert evidence('ledger.jsonl').is_file() and results_folder().name == 'ebmbook-results'
assert book_weights('cdrl', 'digits') is None
try: root()
except FileNotFoundError as e: print(e)
'''
    said = python(code, tmp_path, **env)
    assert 'needs a clone of the ebmbook repository' in said and str(tmp_path) in said
