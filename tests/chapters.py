"""Run a chapter as a user runs it."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from ebmbook.learn.runs import load_checkpoint
from ebmbook.learn.settings import choose
from ebmbook.shell.claims import read_claims

ROOT = Path(__file__).resolve().parents[1]


def limit(seconds):  # a busy machine is given more
    return seconds if os.getloadavg()[0] <= os.cpu_count() + 0.5 else 10 * seconds


def papermill(chapter, tmp_path, data, *args, timeout=900):
    "Run a notebook of `nbs` elsewhere; exit code, all that was said, seconds."
    # the network is off, so that no test depends on what a server sends
    nowhere = 'http://127.0.0.1:9'
    env, began = (
        os.environ
        | dict(
            EBMBOOK_DATA=str(data),
            TORCH_HOME=str(tmp_path),
            http_proxy=nowhere,
            https_proxy=nowhere,
        ),
        time.monotonic(),
    )
    env.pop('MPLBACKEND', None)  # figures go into the notebook
    line = [
        sys.executable,
        '-m',
        'papermill',
        str(ROOT / 'nbs' / f'{chapter}.ipynb'),
        str(tmp_path / 'out.ipynb'),
        '-k',
        'python3',
        '--no-progress-bar',
        *args,
    ]
    done = subprocess.run(
        line,
        env=env,
        cwd=tmp_path,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout, time.monotonic() - began


def ends_without_data(chapter, tmp_path, dataset='cifar10', *args, names=()):
    "A chapter on a set that is not there stops at once: what is missing, where, how to get it."
    code, said, seconds = papermill(
        chapter, tmp_path, tmp_path / 'nowhere', '-p', 'dataset', dataset, *args
    )
    assert code != 0 and 'FileNotFoundError' in said
    for o in (dataset, str(tmp_path / 'nowhere'), 'EBMBOOK_DATA', *names):
        assert o in said, o
    assert seconds < limit(20)


def trains_in_full(
    chapter, system, preset, tmp_path, over, *args, says=(), steps=2, seconds=240
):
    """A chapter on a preset made small.

    It says what the run will cost, and leaves a checkpoint, weights and finite numbers.
    """
    code, said, took = papermill(
        chapter,
        tmp_path,
        tmp_path,
        '-p',
        'out',
        str(tmp_path / 'run'),
        '-y',
        f'over: {{{over}}}',
        *args,
    )
    assert code == 0, said[-3000:]
    told = json.dumps(json.loads((tmp_path / 'out.ipynb').read_text())['cells'])
    for o in says:
        assert o in told, o
    assert (
        load_checkpoint(tmp_path / 'run')['step'] == steps
        and (tmp_path / 'run/weights/model.safetensors').is_file()
    )
    record = [
        json.loads(o) for o in (tmp_path / 'run/record.jsonl').read_text().splitlines()
    ]
    assert record and all(
        o['system'] == system and o['preset'] == preset and math.isfinite(o['value'])
        for o in record
    )
    assert took < limit(seconds)


def claims_can_be_measured(module, tiny, n=600, quick=None, device='cpu'):
    """Every arm of a system's claims names settings that exist and can be measured.

    `evaluate` measures on it, made small by `tiny`, all that the claim compares; `quick`
    holds settings by task.
    """
    system, seen = module.__name__.removeprefix('ebmbook.'), {}
    claims = [o for o in read_claims() if o.system == system]
    for claim in claims:
        for name, arm in claim.arms.items():
            cfg = choose(
                module.PRESETS,
                module.DEFAULT_PRESET,
                module.PRESETS[arm.preset].data,
                arm.preset,
                arm.over,
            )[1]
            module.check_config(cfg)
            key = json.dumps([arm.preset, arm.over, arm.at], sort_keys=True)
            if key not in seen:
                small = replace(cfg, **tiny)
                nets = module.SYSTEM.of(small).build(small).to(device).eval()
                task = arm.at.get('task', '')
                chosen = module.SYSTEM.task(nets, task)
                few = dict(n=n) if 'n' in chosen.options else {}
                options = arm.at | few | (quick or {}).get(arm.at.get('task'), {})
                for (option, value), idle in chosen.void.items():
                    if options.get(option) == value:
                        options = {k: v for k, v in options.items() if k not in idle}
                seen[key] = set(module.SYSTEM.evaluate(nets, **options))
            assert claim.metrics(name) <= seen[key], (claim.id, name)
    assert claims
