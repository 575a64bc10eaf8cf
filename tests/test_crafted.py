"Files that would run a command if they were trusted: weights, checkpoints, settings, claims."

import json
import shutil

import pytest
import tiny
import yaml
from crafted import KINDS, craft, trust

from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.learn.weights import load_weights
from ebmbook.shell.claims import read_claims
from ebmbook.shell.systems import load_nets, load_system


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'run'
    system = load_system('cdrl')
    cfg = tiny.settings(system, n_iters=2, save_every=1)
    train(tiny.bare(system, cfg), cfg, open_run('cdrl', 'tiny', cfg, out=out, device='cpu'))
    return system, cfg, out


@pytest.fixture
def copy(run, tmp_path):
    system, cfg, out = run
    shutil.copytree(out, tmp_path / 'run')
    return system, cfg, tmp_path / 'run'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_weights(kind, name, copy, tmp_path):
    "Also beside good ones, and alone under the name that older programs look for."
    system, _, out = copy
    ran, folder = tmp_path / 'ran', out / 'weights'
    craft(folder / name, ran, kind)
    if name != 'model.safetensors':
        load_nets(
            system, str(out), device='cpu'
        )  # the good ones are read, and nothing else
        (folder / 'model.safetensors').unlink()
    nets = tiny.bare(system, copy[1]).build(copy[1])
    calls = (
        lambda: load_nets(system, str(out), device='cpu'),
        lambda: type(nets).from_pretrained(folder),
        lambda: load_weights(nets, folder / 'model.safetensors'),
    )
    for call in calls:
        with pytest.raises((ValueError, OSError)) as error:
            call()
        assert 'model.safetensors' in str(error.value)
    assert not ran.exists()
    trust(folder / name, kind)
    assert ran.exists()  # what it would have done


@pytest.mark.parametrize('kind', KINDS)
def test_checkpoints(kind, copy, tmp_path):
    "The one before it is used; alone it is as if there were none."
    system, cfg, out = copy
    ran = tmp_path / 'ran'
    good = load_checkpoint(out)['step']
    bad = out / f'checkpoint-{good + 1:09d}.pt'
    craft(bad, ran, kind)
    kept = bad.read_bytes()
    with pytest.warns(UserWarning, match='using the checkpoint before it') as said:
        assert load_checkpoint(out)['step'] == good
    message = str(said[0].message)
    assert '\n' not in message and 'weights_only' not in message
    for path in out.glob('checkpoint-*.pt'):
        craft(path, ran, kind)
    with pytest.warns(UserWarning, match='no checkpoint is before it'):
        assert load_checkpoint(out) is None
    with pytest.warns(UserWarning, match='cannot be read'):
        run = open_run('cdrl', 'tiny', cfg, out=out, device='cpu')
        train(tiny.bare(system, cfg), cfg, run, progress=False)
    assert not ran.exists()
    bad.write_bytes(kept)
    trust(bad, kind)
    assert ran.exists()  # what it would have done


@pytest.mark.parametrize('where', ['config.json', 'weights/config.json'])
def test_settings(where, copy, tmp_path):
    "JSON has no objects to make; what looks like one is a value like another."
    system, cfg, out = copy
    path = out / where
    stored = json.loads(path.read_text())
    held = stored['config'] if 'config' in stored else stored
    (held.get('cfg', held))['data'] = {
        'py/object': 'os.mkdir',
        'args': [str(tmp_path / 'ran')],
    }
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError):
        if where == 'config.json':
            open_run('cdrl', 'tiny', cfg, out=out, device='cpu')
        else:
            load_nets(system, str(out), device='cpu')
    assert not (tmp_path / 'ran').exists()


def test_claims(tmp_path):
    ran, path = tmp_path / 'ran', tmp_path / 'claims.yaml'
    path.write_text(f'!!python/object/apply:os.mkdir ["{ran}"]\n')
    with pytest.raises(ValueError, match='claims.yaml'):
        read_claims(path)
    assert not ran.exists()
    yaml.unsafe_load(path.read_text())
    assert ran.exists()  # what it would have done
