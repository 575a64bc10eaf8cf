"""A campaign of accidents over all systems: kills, signals, damage, full disks.

    python tests/reliability.py [--kills 20] [--signals 10] [--seed 0]

Every run that had an accident goes on from its newest checkpoint, as the times in its log tell,
and must end as one that had none, bit for bit. Prints a table of each part; the exit status is 1
if anything differs. It takes some minutes; the slow tests run a part of it.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

os.environ.update(EBMBOOK_DEVICE='cpu', IN_TEST='1', OMP_NUM_THREADS='1')

import tiny
import torch

from ebmbook.learn import loop, runs
from ebmbook.learn.runs import open_run
from ebmbook.learn.weights import store_weights
from ebmbook.shell.systems import SYSTEMS, load_system

NAMES = list(SYSTEMS)
STEPS, TIMEOUT = 8, 300


def settings(name, workers):
    system = load_system(name)
    return system, tiny.settings(
        system, n_iters=STEPS, save_every=1, ema=0.9, workers=workers
    )


def work(name, workers, out, before=None):
    "What a child does: train a tiny preset in a folder, its end in `digest`."
    if before is not None:
        before(out)
    system, cfg = settings(name, workers)
    system = tiny.bare(system, cfg)
    run = open_run(name, 'tiny', cfg, out=out, device='cpu')
    nets = loop.train(system, cfg, run, progress=False)
    (out / 'digest').write_text(tiny.digest(nets))


def fork(folder, *args):
    "Start a child in a process group of its own; its process id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for kind in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.SIG_DFL)
        file = os.open(folder / 'said', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work(*args)
        code = 0
    except KeyboardInterrupt as error:
        code = 130
        os.write(2, f'{error}\n'.encode())
    except BaseException as error:
        os.write(2, f'{type(error).__name__}: {error}\n'.encode())
        if not isinstance(error, (OSError, ValueError)):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(pid, seconds=TIMEOUT):
    "Exit code of a child; None after so many seconds, in which it goes on."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def finish(folder, name, workers, before=None):
    "Train to the end; the digest, or why there is none."
    out = folder / 'run'
    out.mkdir(exist_ok=True)
    code = wait(fork(folder, name, workers, out, before))
    said = (folder / 'said').read_text()
    if code == 0:
        digest = (out / 'digest').read_text()
        (out / 'digest').unlink()
        return digest, said
    return f"exit {code}: {said.strip().splitlines()[-1:]}", said


def new():
    return Path(tempfile.mkdtemp(prefix='ebmbook-reliability-'))


KNOWN: dict[str, str] = {}


def whole(name):
    "Digest of a training without accidents."
    if name not in KNOWN:
        digest, said = finish(new(), name, 0)
        KNOWN[name] = digest
        if digest.startswith('exit'):
            print(said)
    return KNOWN[name]


def steps(out):
    "Steps whose checkpoints are there."
    return sorted(int(path.stem[11:]) for path in out.glob('checkpoint-*.pt'))


def begun(out, n=1):
    "Wait for a checkpoint."
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and len(list(out.glob('checkpoint-*.pt'))) < n:
        time.sleep(0.005)


def reached(out, step, pid):
    "Wait for the checkpoint of a step; whether the child still trains."
    code, found = None, -1
    while code is None and found < step:
        code = wait(pid, 0.01)
        found = max(steps(out), default=0)
    return code is None


def kill(name, workers, rng):
    "Kill a training at a random moment, perhaps again; whether it ends as it should."
    folder, want = new(), whole(name)
    out = folder / 'run'
    out.mkdir()
    at, kept, lost = [], [], False
    for _ in range(rng.randint(1, 2)):
        pid = fork(folder, name, workers, out, slow)
        step = rng.randrange(STEPS - 1)  # 0: perhaps before the first step
        # two slow steps are left after the last of these
        if reached(out, step, pid) and wait(pid, rng.uniform(0, 0.1)) is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            at.append(step)
        lost = lost or not tiny.went_on(out, kept)
        kept = tiny.clock(out)
    got, _ = finish(folder, name, workers)
    lost = lost or not tiny.went_on(out, kept)
    how = f"killed after step {at}, {len(kept)} steps kept" + ', BEGUN ANEW' * lost
    return got == want and len(at) > 0 and not lost, how, got


def slow(out):
    real = loop._step

    def step(job, batch):
        time.sleep(0.1)
        return real(job, batch)

    loop._step = step


def group(name, workers, kind):
    "Send a signal to the group; whether there are checkpoint and message, and the same end."
    folder, want = new(), whole(name)
    out = folder / 'run'
    out.mkdir()
    pid = fork(folder, name, workers, out, slow)
    begun(out)
    with suppress(ProcessLookupError):
        os.killpg(pid, kind)
    code, said = wait(pid), (folder / 'said').read_text()
    kept = len(list(out.glob('checkpoint-*.pt')))
    fine = code == 130 and kept and f'stopped by {kind.name} at step' in said
    times = tiny.clock(out)
    got, _ = finish(folder, name, workers)
    fine = fine and got == want and times and tiny.went_on(out, times)
    return bool(fine), f"exit {code}, {kept} checkpoints, {len(times)} steps kept", got


# --- damage: a name, what is done to the newest checkpoint or another file


def newest(out):
    return out / f'checkpoint-{steps(out)[-1]:09d}.pt'


def cut(share):
    def spoil(out):
        path = newest(out)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return spoil


def flip(out):
    path = newest(out)
    raw = bytearray(path.read_bytes())
    for i in range(len(raw) // 3, len(raw) // 3 + 64):
        raw[i] ^= 255
    path.write_bytes(raw)


def zero(out):
    newest(out).write_bytes(bytes(newest(out).stat().st_size))


def foreign(out):
    state = torch.load(newest(out))
    state['identity']['seed'] = 7
    runs.save_checkpoint(out, 999, state, keep=9)


def write(name, raw, mode='wb'):
    def spoil(out):
        with open(out / name, mode) as file:
            file.write(raw)

    return spoil


DAMAGE = {
    'half a checkpoint': (cut(0.5), 'cannot be read'),
    'an empty checkpoint': (cut(0.0), 'cannot be read'),
    'a checkpoint of zeros': (zero, 'cannot be read'),
    '64 flipped bytes': (flip, 'its checksum is wrong'),
    'a checkpoint of another seed': (foreign, 'its seed is 7, not 0'),
    'garbage in the log': (write('log.jsonl', b'\0\xffx\n', 'ab'), 'log.jsonl: a damaged'),
    'half a line in the log': (write('log.jsonl', b'{"total": 1', 'ab'), ''),
    'a stale lock': (write('run.lock', b'{"pid": 1'), ''),
    'an empty config.json': (write('config.json', b''), 'config.json is damaged'),
}


def damaged(name, spoil, why):
    "Stop, damage, go on; whether the file was named, and steps and end are the same."
    folder, want = new(), whole(name)
    out = folder / 'run'
    out.mkdir()
    pid = fork(folder, name, 0, out, slow)
    begun(out, 2)
    os.kill(pid, signal.SIGTERM)
    wait(pid)
    kept = tiny.clock(out, steps(out)[-2])  # the newest may be the one that is damaged
    spoil(out)
    got, said = finish(folder, name, 0)
    if got.startswith('exit') and why in said and 'Traceback' not in said:
        (out / 'config.json').unlink()  # as the message says
        got, _ = finish(folder, name, 0)
    fine = why in said and got == want and len(kept) > 0 and tiny.went_on(out, kept)
    said = f"said {why!r}" if why else 'nothing to say'
    return fine, f"{said}, {len(kept)} steps kept", got


def full(what):
    "A disk that is full: /dev/full stands where a file is written."

    def before(out):
        if what == 'checkpoint':
            real = loop.save_checkpoint

            def save(folder, step, state):
                if step == 4:
                    tmp = out / f'checkpoint-{step:09d}.tmp{os.getpid()}'
                    tmp.symlink_to('/dev/full')
                return real(folder, step, state)

            loop.save_checkpoint = save
            return

        if what == 'log':
            slot = loop.Log.__call__

            def call(self, total, line):
                if total == 4:
                    self.path = Path('/dev/full')
                slot(self, total, line)

            loop.Log.__call__ = call
            return

        def fail(nets, folder):
            def refuse(place):
                raise OSError(28, 'No space left on device')

            nets.save_pretrained = refuse
            return store_weights(nets, folder)

        loop.store_weights = fail

    return before


def disk(name, what):
    "A full disk, then free space; whether a message says so, and steps and end are the same."
    folder, want = new(), whole(name)
    out = folder / 'run'
    got, said = finish(folder, name, 0, full(what))
    told = 'could not write' in said and 'Traceback' not in said
    for old in out.glob('*.tmp*'):
        old.unlink()
    kept = tiny.clock(out)
    ended, _ = finish(folder, name, 0)
    fine = told and got.startswith('exit') and ended == want
    fine = fine and len(kept) > 0 and tiny.went_on(out, kept)
    return fine, f"{len(kept)} steps kept, {said.strip()[-70:]}", ended


def report(title, rows):
    "Print a part of the campaign; how many failed."
    print(f'\n{title}')
    bad = 0
    for what, (fine, how, got) in rows:
        print(f"  {'as it should' if fine else 'WRONG':12}  {what:45}  {how}", flush=True)
        if not fine:
            bad += 1
            print(f'      {got}')
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--signals', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    asked = parser.parse_args()
    warnings.simplefilter('ignore', DeprecationWarning)
    rng, began, bad = random.Random(asked.seed), time.monotonic(), 0
    # every other with data workers, and the other ones in the next round
    each = len(NAMES)
    cases = [(NAMES[i % each], 2 * ((i + i // each) % 2)) for i in range(asked.kills)]

    with tiny.few_cars():
        kills = ((f'{n}, workers {w}', kill(n, w, rng)) for n, w in cases)
        bad += report('kill -9 at a random moment', kills)
        kinds = [signal.SIGTERM] * asked.signals + [signal.SIGINT, signal.SIGHUP]
        sent = (
            (f'{kind.name} to {NAMES[i % each]}', group(NAMES[i % each], 2, kind))
            for i, kind in enumerate(kinds)
        )
        bad += report('a signal to the group, two data workers', sent)
        harm = ((what, damaged('cdrl', *how)) for what, how in DAMAGE.items())
        bad += report('damage', harm)
        if Path('/dev/full').exists():
            disks = ((o, disk('cdrl', o)) for o in ('checkpoint', 'log', 'weights'))
            bad += report('a full disk', disks)
    seconds = time.monotonic() - began
    print(f"\n{'all as it should' if not bad else f'{bad} WRONG'}, {seconds:.0f} s")
    return min(bad, 1)


if __name__ == '__main__':
    sys.exit(main())
