"""What a stranger meets: the wheel, installed outside the clone, without network.

`make wheel-test` builds the wheel, installs it without its dependencies into an environment
that finds those in the present one, and runs there what the README prints, the front door
and the commands. An argument is a folder with a wheel to test instead of building one.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 30 * 2**20  # bytes of the wheel

# no package of Python is imported before it; a socket to this machine's own files is none
CLOSED = '''
import socket


def _closed(self, address, *rest):
    if self.family == getattr(socket, 'AF_UNIX', None):
        return _connect(self, address, *rest)
    raise OSError(f"no network here, and something asked for {address}")


def _unknown(host, *rest, **options):
    raise OSError(f"no network here, and something asked for {host}")


_connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = _closed
socket.getaddrinfo = socket.gethostbyname = _unknown
'''

# what the first page of the design promises
DOOR = '''
import ebmbook
model = ebmbook.load("cdrl/digits-cond")
x = model.sample(16)
assert x.shape == (16, 1, 8, 8) and x.abs().max() <= 1
mine = ebmbook.train("ecvae", data="folder:my/images@32", preset="small", minutes=60)
assert ebmbook.load(mine.name).cfg == mine.cfg
e = ebmbook.fit(my_energy, my_tensor, method="pcd")
'''

# names that the printed lines take for granted, and pictures of one's own
BEFORE = '''
import pathlib
import torch
from PIL import Image

pathlib.Path('my/images').mkdir(parents=True, exist_ok=True)
for i in range(24):
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(f'my/images/{i}.png')
my_tensor = torch.randn(256, 2)
my_energy = torch.nn.Sequential(
    torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1), torch.nn.Flatten(0)
)
'''

REFUSED = 'needs a clone of the ebmbook repository'


def run(*line, where, wrong=False, **options):
    "Standard output of a command, or standard error of one that must refuse."
    done = subprocess.run(
        [str(word) for word in line],
        cwd=where,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | OFFLINE,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )
    said = done.stdout + done.stderr
    if (done.returncode != 0) is not wrong or 'Traceback' in done.stderr:
        words = ' '.join(map(str, line[:4]))
        sys.exit(f"wheel: {words} ended with {done.returncode}\n{said[-3000:]}")
    return done.stderr if wrong else done.stdout


OFFLINE = dict(OMP_NUM_THREADS='1', EBMBOOK_DEVICE='cpu', COLUMNS='200')


def tracked(to):
    "A copy of what a fresh clone holds, without what earlier builds left."
    names = run('git', 'ls-files', '-z', '-co', '--exclude-standard', where=ROOT)
    for name in filter(None, names.split('\0')):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def build(at):
    "The wheel, by way of the archive of sources that would be published beside it."
    clone, out = tracked(at / 'clone'), at / 'dist'
    code = 'import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))'
    name = run(sys.executable, '-c', code, out, where=clone).splitlines()[-1]
    pip = (sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-index')
    run(*pip, '--no-build-isolation', '-w', out, out / name, where=at)
    return out


def check_files(folder):
    "Size, evidence and description of what would be published."
    (wheel,) = folder.glob('*.whl')
    assert wheel.stat().st_size <= MOST, f"{wheel.stat().st_size:,} bytes"
    with zipfile.ZipFile(wheel) as file:
        for name in ('claims.yaml', 'ledger.jsonl'):
            inside = file.read(f'ebmbook/evidence/{name}')
            assert inside == (ROOT / 'results' / name).read_bytes(), name
        meta = [name for name in file.namelist() if name.endswith('/METADATA')][0]
        text = file.read(meta).decode()
    local = re.findall(r'(?:\]\(|src(?:set)?="|href=")(?!https?:|#|mailto:)[^)"]*', text)
    assert not local, f"the description names files of the clone: {local[:3]}"
    try:
        import twine  # noqa: F401
    except ImportError:
        print("wheel: twine is not installed, so its check is left out")
    else:
        run(
            sys.executable,
            '-m',
            'twine',
            'check',
            '--strict',
            *folder.iterdir(),
            where=ROOT,
        )
    return wheel


def environment(at, wheel):
    "An environment with the wheel, the present packages beside it, and closed sockets."
    venv.create(at, with_pip=False, symlinks=os.name != 'nt')
    paths = sysconfig.get_paths('venv', vars=dict(base=str(at), platbase=str(at)))
    site, scripts = Path(paths['purelib']), Path(paths['scripts'])
    python = scripts / ('python.exe' if os.name == 'nt' else 'python')
    # a line of a .pth adds a folder, and leaves out that folder's own .pth: no clone is found
    present = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    (site / 'present.pth').write_text('\n'.join(sorted(present)))
    (site / 'closed.pth').write_text('import _closed\n')
    (site / '_closed.py').write_text(CLOSED)
    options = ('--quiet', '--no-deps', '--no-index', '--ignore-installed')
    pip = (sys.executable, '-m', 'pip', '--python', python, 'install', *options)
    run(*pip, wheel, where=at)
    return python, scripts / 'ebmbook'


def readme_lines():
    "The Python blocks of the README, as printed."
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    return '\n'.join(re.findall(r'```python\n(.*?)```', text, re.S))


def shortened(code):
    "Lines as printed, with three steps instead of minutes, which would be used up."
    return re.sub(r'minutes=[\d.]+', 'over=dict(n_iters=3)', code)


def lines(python, at):
    "What is printed for Python."
    from_wheel = f'\nassert {str(ROOT)!r} not in ebmbook.__file__, ebmbook.__file__\n'
    for code in (DOOR + from_wheel, readme_lines()):
        run(python, '-c', BEFORE + shortened(code), where=at)


def commands(command, at):
    "What works outside a clone, and what says that it needs one."
    assert 'cdrl/digits-cond' in run(command, 'models', where=at)
    run(command, 'sample', 'cdrl', '-p', 'preset', 'checkerboard', '-n', 64, where=at)
    assert (at / 'samples.npy').is_file()
    task = ('--at', '{task: inpaint, n: 2, n_steps: 1}')
    found = run(command, 'evaluate', 'cdrl', '-p', 'preset', 'digits-cond', *task, where=at)
    assert 'variety' in found
    assert 'reproduced' in run(command, 'claims', where=at)
    over = '{ch: 8, init_ch: 8, n_steps: 2}'
    bench = ('bench', 'cdrl', '--preset', 'digits', '--over', over, '--batch', 4)
    assert 'floor' in run(command, *bench, '--steps', 2, '--minutes', 0.02, where=at)
    over = ('-p', 'preset', 'checkerboard', '-p', 'over', '{ch: 8, n_steps: 2, batch: 16}')
    run(command, 'train', 'cdrl', *over, '--minutes', 0.1, '--out', 'mine', where=at)
    assert (at / 'mine' / 'weights' / 'model.safetensors').is_file()
    said = run(command, 'run', 'cdrl', where=at, wrong=True)
    assert REFUSED in said and len(said.strip().splitlines()) == 1, said


def results(python, at):
    "What is measured goes to a folder here, and is read after the book's ledger."
    code = '''
from pathlib import Path
from ebmbook.learn.ledger import ledger, ledger_path, publish
from ebmbook.shell.bench import bench_path
from ebmbook.shell.claims import read_ledger
n = len(read_ledger())
publish([dict(ledger()[0], seed=12345)])
assert len(read_ledger()) == n + 1 and read_ledger()[-1]['seed'] == 12345
assert ledger_path() == Path.cwd() / 'ebmbook-results' / 'ledger.jsonl'
assert bench_path().parent == ledger_path().parent
'''
    run(python, '-c', code, where=at)


def main():
    "Run all parts; the time of each is printed."
    with tempfile.TemporaryDirectory(prefix='ebmbook-wheel-') as folder:
        at, start = Path(folder).resolve(), time.monotonic()
        for name in ('dist', 'work', 'shell', 'clone'):
            (at / name).mkdir()
        wheel = check_files(Path(sys.argv[1]) if sys.argv[1:] else build(at))
        python, command = environment(at / 'env', wheel)
        print(
            f"wheel: {wheel.stat().st_size / 2**20:.1f} MB, {time.monotonic() - start:.0f} s"
        )
        with ThreadPoolExecutor(2) as both:  # each runs processes of its own, elsewhere
            jobs = {
                'lines': both.submit(lines, python, at / 'work'),
                'commands': both.submit(commands, command, at / 'shell'),
            }
            for name, job in jobs.items():
                job.result()
                print(f"wheel: {name} work, {time.monotonic() - start:.0f} s")
        results(python, at / 'work')
        print(f"wheel: results work, {time.monotonic() - start:.0f} s")


if __name__ == '__main__':
    main()
