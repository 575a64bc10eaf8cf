"""Does this working tree still compute what another commit computed, bit for bit?

    python tests/same.py BASE              every embedded preset, every shipped folder, every task
    python tests/same.py BASE --quick      one preset of each system, in at most three minutes
    python tests/same.py BASE --docs       docments and docstrings of every public name
    python tests/same.py BASE --only cdrl  one system

BASE is checked out into a temporary worktree. The same recipe then runs on this machine under
both trees, each in a process of its own, and prints what differs. Exit status 1 if anything does.
Names that changed on purpose stand in `tests/same.yaml`.
"""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = [
    'foundations',
    'nerf_lebm',
    'coopflow',
    'cdrl',
    'vaebm',
    'ecvae',
    'selfsup',
    'liebm',
]
# the quick form trains these, three iterations a stage
QUICK = dict(
    foundations='digits',
    nerf_lebm='cars-claim',
    coopflow='digits-claim',
    cdrl='digits-cond',
    vaebm='digits-claim',
    ecvae='digits-claim',
    selfsup='digits',
    liebm='digits-claim',
)
FULL_STEPS, QUICK_STEPS, ARM_STEPS = 20, 3, 2
SAMPLES = 16
# a distance between samples and data needs 128 of them; other tasks do with less
DRAWN, MEASURED, CHAIN = 128, 40, 8
# metrics that read a clock
CLOCKS = {'seconds'}
HEALTH = re.compile(r'chain(\.\d+)?/|.*/age$')


# --- the recipe: runs under either tree, so it finds things by name wherever they live


def first(*places):
    "The first of several `module:name` that exists."
    for place in places:
        module, _, name = place.partition(':')
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"none of {', '.join(places)}")


def system_module(name):
    for place in (f'ebmbook.{name}', f'ebmbook.liebm.{name}'):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(place)
    raise ImportError(f"no system {name!r}")


def digest(tensors):
    "SHA-256 of a state dictionary or of a single tensor, names included."
    found = hashlib.sha256()
    named = tensors.items() if isinstance(tensors, dict) else [('', tensors)]
    for name, tensor in sorted(named):
        array = tensor.detach().cpu().contiguous().numpy()
        found.update(f'{name} {array.dtype} {array.shape}'.encode() + array.tobytes())
    return found.hexdigest()[:16]


def exact(value):
    "A number in a form that loses no bit."
    return float(value).hex()


def embedded(module):
    "Presets whose data ship with the package."
    sets = first('ebmbook.data:DATASETS')
    return [k for k, v in module.PRESETS.items() if sets[v.data].source == 'embedded']


def takes_cfg(function):
    return 'cfg' in inspect.signature(function).parameters


def of(module, cfg):
    "What trains and draws: the rival that the settings name, the system, or the module."
    system = getattr(module, 'SYSTEM', module)
    return system.of(cfg) if hasattr(system, 'of') else module


def shortened(module, cfg, short):
    found = of(module, cfg)
    if hasattr(found, 'stages'):
        return replace(found, stages=[short(o) for o in found.stages], rivals={})
    stages = [short(o) for o in found.STAGES]
    return SimpleNamespace(build=found.build, STAGES=stages, stages=stages)


def trained(module, name, preset, cfg, steps, folder):
    "Networks after a few iterations of each stage, and what their training logged."
    open_run = first('ebmbook.learn.runs:open_run', 'ebmbook.core.runs:open_run')
    train = first('ebmbook.learn.loop:train', 'ebmbook.core.train:train')

    def short(stage):
        return stage._replace(n_iters=lambda c: min(steps, stage.n_iters(c)))

    system = shortened(module, cfg, short)
    run = open_run(name, preset, cfg, out=folder, device='cpu')
    nets = train(system, cfg, run, progress=False)
    lines = [json.loads(o) for o in (run.folder / 'log.jsonl').read_text().splitlines()]
    # the clock, and what is logged of chains since the base had no such lines
    lines = [
        {k: v for k, v in o.items() if k != 'seconds' and not HEALTH.match(k)}
        for o in lines
    ]
    return nets, hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]


def drawn(module, nets):
    "Hash of a few samples."
    import torch

    sample = getattr(of(module, nets.cfg), 'sample', None)
    if sample is None:
        return 'draws nothing'
    settings = (nets.cfg,) if takes_cfg(sample) else ()
    generator = torch.Generator().manual_seed(1)
    return digest(sample(nets, SAMPLES, *settings, generator=generator))


def measurable(module, nets, at):
    "Names of the options of a measurement."
    if hasattr(module, 'SYSTEM'):
        return module.SYSTEM.task(nets, at.get('task', '')).options
    return inspect.signature(module.evaluate).parameters


def measured(module, nets, at):
    "One measurement in a comparable form, or the error that it ends in."
    options = dict(at)
    if 'n_steps' in options:
        options['n_steps'] = min(options['n_steps'], CHAIN)
    if 'n' in measurable(module, nets, at):
        few = MEASURED if 'task' in at else DRAWN
        options['n'] = min(options.get('n', few), few)
    settings = (nets.cfg,) if takes_cfg(module.evaluate) else ()
    try:
        got = module.evaluate(nets, *settings, seed=3, **options)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return {k: [exact(v[0]), v[1], v[2]] for k, v in got.items() if k not in CLOCKS}


def arms(system, path):
    "Distinct trainings of a system's claims, each with the distinct ways in which it is measured."
    import yaml

    found = {}
    for claim in yaml.safe_load(path.read_text(encoding='utf-8')):
        if claim['system'] != system:
            continue
        for arm in claim['arms'].values():
            preset = arm.get('preset', arm.get('row'))
            key = json.dumps([preset, arm.get('over') or {}], sort_keys=True)
            ways = found.setdefault(key, {})
            # one measurement for each set of options; their values do not make another path
            at = arm.get('at') or {}
            ways.setdefault((at.get('task', ''), *sorted(at)), at)
    return {k: list(v.values()) for k, v in found.items()}


def load_shipped(module, folder):
    load = first('ebmbook.shell.cli:load_nets', 'ebmbook.core.cli:load_nets')
    # a commit before systems were described by an object takes the module
    return load(getattr(module, 'SYSTEM', module), str(folder), device='cpu')


def shipped_folders(system):
    "Folders of the book's weights, which lay in `results` in the past."
    places = Path.cwd() / 'ebmbook' / 'weights', Path.cwd() / 'results' / 'weights'
    return sorted(path for place in places for path in place.glob(f'{system}-*'))


def recipe(system, quick, claims, report):
    "Everything that is compared for one system; `report(key, value)` takes each result."
    choose = first('ebmbook.learn.settings:choose', 'ebmbook.core.config:choose')
    module = system_module(system)
    defaults = getattr(module, 'DEFAULT_PRESET', None) or module.DEFAULT_ROW
    presets = [QUICK[system]] if quick else embedded(module)
    steps = QUICK_STEPS if quick else FULL_STEPS
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            nets, log = trained(
                module, system, preset, module.PRESETS[preset], steps, folder
            )
        report(f'{system} {preset} weights', digest(nets.state_dict()))
        report(f'{system} {preset} log', log)
        report(f'{system} {preset} samples', drawn(module, nets))
    for key, ways in ({} if quick else arms(system, claims)).items():
        preset, over = json.loads(key)
        data = module.PRESETS[preset].data
        _, cfg = choose(module.PRESETS, defaults, data, preset, over)
        with tempfile.TemporaryDirectory() as folder:
            nets, log = trained(module, system, preset, cfg, ARM_STEPS, folder)
        report(f'{system} {key} weights', digest(nets.state_dict()))
        report(f'{system} {key} log', log)
        for at in ways:
            report(f'{system} {key} at {json.dumps(at)}', measured(module, nets, at))
    folders = shipped_folders(system)
    for folder in folders[:1] if quick else folders:
        nets = load_shipped(module, folder)
        report(f'{folder.name} samples', drawn(module, nets))
        report(f'{folder.name} measured', measured(module, nets, {}))


# --- public names and their documentation


def params_of(value):
    "Docments of parameters and of the return value, or of the fields of a class."
    from fastcore.docments import docments

    try:
        found = docments(value, full=True, eval_str=False)
    except (TypeError, ValueError, OSError, IndexError, SyntaxError):
        return {}
    return {name: ' '.join((entry.docment or '').split()) for name, entry in found.items()}


def documented(value):
    "Docstring and docments of a public object, in a comparable form."
    own = value.__doc__
    params = params_of(value)
    if isinstance(value, type):
        own = vars(value).get('__doc__')
        # settings may stand in groups, from which the class inherits
        for base in value.__mro__[1:]:
            if base.__module__.startswith('ebmbook'):
                params |= {
                    k: v for k, v in params_of(base).items() if v and not params.get(k)
                }
    return dict(doc=' '.join((own or '').split()), params=params)


def documentation():
    "Public functions and classes of every module: name -> documentation, methods included."
    import ebmbook

    found = {}
    for info in pkgutil.walk_packages(ebmbook.__path__, 'ebmbook.'):
        if info.name.endswith('_modidx') or info.ispkg:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, '__all__', ()):
            value = getattr(module, name)
            if getattr(value, '__module__', None) != info.name or not callable(value):
                continue
            key = name
            while key in found:  # two systems may use one name
                key += "'"
            found[key] = documented(value) | dict(module=info.name)
            if isinstance(value, type):
                for part, method in vars(value).items():
                    if (
                        inspect.isfunction(method)
                        and method.__module__ == info.name
                        and not part.startswith('__')
                    ):
                        found[f'{key}.{part}'] = documented(method) | dict(module=info.name)
    return found


def likeness(old, new):
    "How surely two entries of one name are the same thing: room, parameters, docstring."
    room = old['module'].removeprefix('ebmbook.').removeprefix('core.')
    room = room.split('_')[0] if room != 'nerf_lebm' else room
    theirs = set(new['params'])
    shared = sum(name in theirs for name in old['params'])
    return (
        room in new['module'],
        shared - len(theirs - set(old['params'])),
        old['doc'] == new['doc'],
    )


def pair_up(old, new, renamed):
    "Pairs of documentation of the same thing; what has no partner is returned by name."
    pairs, left, free = [], [], dict(new)
    for key, value in old.items():
        name = key.replace("'", '')
        want = renamed.get(name, name)
        want = [want] if isinstance(want, str) else want
        mates = [k for k in free if k.replace("'", '') in want]
        if not mates:
            left.append(key)
            continue
        mates.sort(key=lambda k: likeness(value, free[k]), reverse=True)
        pairs.append((key, mates[0], value, free.pop(mates[0])))
    return pairs, left


def plain(text):
    "A text without case and punctuation, to find it again in another place."
    return ' '.join(re.sub(r'[^\w]+', ' ', text.lower()).split())


def kept(text, before, after):
    """Does a text that one parameter lost still stand where a reader looks for it?

    Either in the docstring, or at the result: the comment behind a function of one line counted
    for its last parameter.
    """
    if plain(text) in plain(after['doc']):
        return True
    taken = [name for name in before['params'] if name != 'return']
    of_last = bool(taken) and before['params'][taken[-1]] == text
    return of_last and after['params'].get('return') == text


def compare_params(key, mate, before, after, names, moved):
    "Sentences on the parameters of one function: what was lost, what was changed."
    bad, changed = [], []
    texts = {text: name for name, text in before['params'].items() if text}
    for name, text in before['params'].items():
        now = after['params'].get(names.get(f'{key}({name})', name))
        place = f'{mate}({name})'
        if now == text:
            continue
        if text and now is None:
            changed.append(f'{place}: parameter gone')
        elif text and not now:
            fine = place in moved or kept(text, before, after)
            (changed if fine else bad).append(f'{place}: docment lost: {text}')
        elif now and texts.get(now, name) != name and not kept(now, before, after):
            (changed if place in moved else bad).append(
                f'{place}: {now} (was of {texts[now]})'
            )
        else:
            changed.append(f'{place}: {now}')
    return bad, changed


def compare_docs(old, new, intended):
    """Sentences: what was lost or moved to a neighbour, and what was changed.

    `intended` has `renamed` (old name: new name or names, `name(param)` for a parameter) and
    `moved` (places whose text was reworded, or stood at a neighbour by mistake before).
    """
    names, moved = intended.get('renamed') or {}, intended.get('moved') or ()
    pairs, left = pair_up(old, new, names)
    bad, changed = [f'{o}: gone' for o in left], []
    for key, mate, before, after in pairs:
        if before['doc'] and not after['doc']:
            bad.append(f'{key}: docstring lost')
        elif before['doc'] != after['doc']:
            changed.append(f'{mate} docstring: {after["doc"]}')
        lost, other = compare_params(
            key.replace("'", ''), mate, before, after, names, moved
        )
        bad += lost
        changed += other
    return bad, changed


# --- two trees, side by side


@contextlib.contextmanager
def worktree(base):
    "A checkout of a commit that disappears afterwards."
    with tempfile.TemporaryDirectory(prefix='ebmbook-same-') as folder:
        tree = Path(folder) / 'tree'
        subprocess.run(
            ['git', '-C', ROOT, 'worktree', 'add', '--quiet', '--detach', tree, base],
            check=True,
        )
        try:
            yield tree
        finally:
            subprocess.run(
                ['git', '-C', ROOT, 'worktree', 'remove', '--force', tree], check=True
            )


def start(tree, out, arguments):
    "Run this file as a worker whose package is that of `tree`."
    env = os.environ | dict(
        PYTHONPATH=str(tree),
        OMP_NUM_THREADS='1',
        MKL_NUM_THREADS='1',
        OPENBLAS_NUM_THREADS='1',
        EBMBOOK_DEVICE='cpu',
        EBMBOOK_DATA=str(out.parent / 'no-data'),
        IN_TEST='1',
        HF_HUB_OFFLINE='1',
        PYTHONHASHSEED='0',
        PYTHONWARNINGS='ignore',
        MPLBACKEND='agg',
    )
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        '--worker',
        str(out),
        *arguments,
    ]
    return subprocess.Popen(command, cwd=tree, env=env)


def only_this_tree():
    """Forget an editable installation.

    Its finder would offer modules of the other tree where this one has none of their name.
    """
    sys.meta_path = [
        o for o in sys.meta_path if '__editable__' not in str(vars(o).get('__module__'))
    ]


def strangers():
    "Modules of the package that were imported from elsewhere."
    here = Path.cwd().resolve()
    files = {
        name: module.__file__
        for name, module in sys.modules.items()
        if name.split('.')[0] == 'ebmbook'
    }
    return [
        name for name, file in files.items() if here not in Path(file).resolve().parents
    ]


def work(out, base, chosen, quick, docs):
    "The worker: results go into a JSON file."
    only_this_tree()
    import ebmbook

    here = Path(ebmbook.__file__).resolve().parents[1]
    if here != Path.cwd().resolve():
        raise SystemExit(
            f"the package of {here} was imported instead of the one in {Path.cwd()}"
        )
    results, began = {}, time.monotonic()

    def report(key, value):
        results[key] = value
        out.write_text(json.dumps(results))
        print(f'{time.monotonic() - began:6.0f} s  {key}', file=sys.stderr, flush=True)

    if docs:
        out.write_text(json.dumps(documentation()))
        return
    for system in chosen:
        recipe(system, quick, Path(base), report)
    if strangers():
        raise SystemExit(f"imported from another tree: {', '.join(strangers())}")


def both(arguments, base):
    "Results under the base and under this tree."
    with worktree(base) as tree, tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / 'base.json', Path(folder) / 'here.json']
        said = [*arguments, str(tree / 'results' / 'claims.yaml')]
        jobs = [start(t, f, said) for t, f in zip((tree, ROOT), files)]
        if any([job.wait() for job in jobs]):
            raise SystemExit("the recipe failed, see above")
        return [json.loads(f.read_text()) for f in files]


def show_results(old, new):
    "Print what differs; the exit status."
    keys = list(dict.fromkeys([*old, *new]))
    differ = [k for k in keys if old.get(k) != new.get(k)]
    for key in differ:
        print(f'DIFFERS {key}\n   base {old.get(key)}\n   here {new.get(key)}')
    print(f'{len(keys) - len(differ)} of {len(keys)} results are equal bit for bit')
    return int(bool(differ))


def show_docs(old, new):
    import yaml

    path = ROOT / 'tests' / 'same.yaml'
    intended = yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else {}
    bad, changed = compare_docs(old, new, intended)
    gone = intended.get('gone') or {}
    for line in changed:
        print(f'changed {line}')
    bad = [o for o in bad if o.removesuffix(': gone').rstrip("'") not in gone]
    for line in bad:
        print(f'LOST {line}')
    print(
        f'{len(old)} public names before, {len(new)} now; {len(changed)} texts changed, '
        f'{len(gone)} names gone on purpose, {len(bad)} texts or names lost or moved'
    )
    return int(bool(bad))


def main():
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cli.add_argument('base', help="commit to compare with")
    cli.add_argument(
        '--quick', action='store_true', help="a small part, at most three minutes"
    )
    cli.add_argument('--docs', action='store_true', help="compare documentation instead")
    cli.add_argument('--only', nargs='*', choices=SYSTEMS, help="these systems alone")
    cli.add_argument('--worker', metavar='FILE', help=argparse.SUPPRESS)
    arg = cli.parse_args()
    chosen = arg.only or SYSTEMS
    if arg.worker:
        work(Path(arg.worker), arg.base, chosen, arg.quick, arg.docs)
        return 0
    flags = ['--quick'] * arg.quick + ['--docs'] * arg.docs + ['--only', *chosen, '--']
    old, new = both(flags, arg.base)
    return show_docs(old, new) if arg.docs else show_results(old, new)


if __name__ == '__main__':
    sys.exit(main())
