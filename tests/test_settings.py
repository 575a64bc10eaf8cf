"""Every field of every `Config` says what it takes, and nothing else comes in.

The bad values are derived from what is declared: below and above a limit, not finite, of another
type, a wrong word, a list of another length. Text is read as people write it in YAML.
"""

import math
import typing
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ebmbook.learn.contract import Loop
from ebmbook.learn.limits import LARGEST, Filled, Name, Range, kinds
from ebmbook.learn.settings import read_over
from ebmbook.shell import cli
from ebmbook.shell.systems import SYSTEMS, load_system
from ebmbook.shell.words import explain

UNIONS = (typing.Union, type(int | str))
FIELDS = [
    (name, field.name)
    for name in SYSTEMS
    for field in fields(load_system(name).config)
    if name == 'cdrl' or field.name not in kinds(Loop)  # those of the loop once
]


def config(name):
    return next(iter(load_system(name).presets.values()))


def limited(kind):
    "Whether a type hint says more than a bare number, text or list."
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return True
    if origin is tuple:
        return all(limited(part) for part in parts if part is not ...)
    if origin in UNIONS:
        return all(map(limited, parts))
    return origin is typing.Literal or kind is bool


def outside(limit, whole):
    "Numbers that a range refuses."
    step, bad = 1 if whole else 0.5, [math.nan, math.inf, -math.inf]
    if limit.least > -math.inf:
        bad += [limit.least - step] + [limit.least] * (limit.ends[0] == '(')
    if limit.most < math.inf:
        bad += [limit.most + step] + [limit.most] * (limit.ends[1] == ')')
    if whole:
        bad = [int(value) for value in bad if math.isfinite(value)]
        bad += [1.5, math.nan, math.inf, LARGEST + 1, 10**30, 2.0]
    return bad


def wrong(kind):
    "Values that a kind must refuse."
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        texts = [part for part in parts if typing.get_origin(part) is typing.Literal]
        free = any(typing.get_args(part)[:1] == (str,) for part in parts)
        found = [value for part in parts for value in wrong(part)]
        empty = (tuple[()], tuple[Name, ...])  # kinds that `()` is of
        if any(part in empty for part in parts):
            found = [value for value in found if value != ()]
        words = [word for part in texts for word in typing.get_args(part)]
        numbers = any(typing.get_args(part)[:1] == (float,) for part in parts)
        return [
            value
            for value in found
            if value not in words
            and not (free and isinstance(value, str) and value.strip())
            and not (numbers and value in (1, 5, 0.5))
        ]
    if origin is typing.Literal:
        return ['no such word', None, False, 5, 0.5, (parts[0],)]
    if kind is bool:
        return [0, 1, 'true', 'maybe', None, 0.5, ()]
    if origin is tuple:
        return wrong_lists(parts)
    base, *limits = parts
    if typing.get_origin(base) is tuple:
        return [(), *wrong(base)]
    bad = [None, True, 'abc', (1,), 1j]
    if base is str:
        return [None, True, 5, 0.5, (), '', ' ', 'a\x00b']
    return bad + [each for limit in limits for each in outside(limit, base is int)]


def wrong_lists(parts):
    if not parts:
        return ['', 3, None]
    first = [value for value in wrong(parts[0])]
    lists = [(value,) for value in first] if parts[-1] is ... else []
    if parts[-1] is not ...:
        good = [right(part) for part in parts]
        lists = [tuple(good[:-1]), (*good, good[0])]
        for i, part in enumerate(parts):
            lists += [(*good[:i], value, *good[i + 1 :]) for value in wrong(part)]
    return [*lists, 3, 'abc', None, {'a': 1}]


def right(kind):
    limits = [each for each in typing.get_args(kind)[1:] if isinstance(each, Range)]
    least, most = limits[0].least, limits[0].most
    if most < math.inf:
        return (least + most) / 2
    return max(least, 0) + 1


@pytest.mark.parametrize('name', [*SYSTEMS, 'loop'])
def test_every_field_has_a_limit(name):
    hints = kinds(Loop if name == 'loop' else load_system(name).config)
    free = [field for field, kind in hints.items() if not limited(kind)]
    assert not free, f"fields of {name} that do not say what they take: {free}"


@pytest.mark.parametrize('name', SYSTEMS)
def test_fields_of_the_loop_are_the_same_everywhere(name):
    own = kinds(load_system(name).config)
    assert {field: own[field] for field in kinds(Loop)} == kinds(Loop)


def test_a_field_without_a_limit_would_be_found():
    bare = (int, float, str, tuple, tuple[int, ...], int | None, tuple[Range, int])
    assert not any(map(limited, bare))
    assert Filled() == Filled()


@pytest.mark.parametrize('name, field', FIELDS)
def test_a_field_refuses(name, field):
    cfg = config(name)
    values = wrong(kinds(type(cfg))[field])
    assert len(values) >= 5
    for value in values:
        with pytest.raises(ValueError) as error:
            replace(cfg, **{field: value})
        assert str(error.value).startswith(f'{field} must be '), error.value
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, field', FIELDS)
def test_text_is_refused_too(name, field):
    "What a command line says: a word for a number, no number, nothing."
    cfg = config(name)
    kind = kinds(type(cfg))[field]
    texts = ['{a: 1}', '~', '', '[[1, 2]]']
    if str not in (kind, *typing.get_args(kind)) and 'str' not in str(kind):
        texts += ['abc', '.nan', '.inf', '-.inf', '-7.5', 'true and false', '2024-01-01']
    for text in texts:
        with pytest.raises(ValueError) as error:
            replace(cfg, **read_over(cfg, f'{{{field}: {text}}}'))
        assert str(error.value).startswith(f'{field} must be '), (text, error.value)


@pytest.mark.parametrize('name', SYSTEMS)
def test_presets_come_back_from_text(name):
    "Settings written as YAML are read as they were, every field of every preset."
    for cfg in load_system(name).presets.values():
        for field, value in vars(cfg).items():
            found = read_over(cfg, f'{{{field}: {written(value)}}}')
            assert replace(cfg, **found) == cfg
            assert type(found[field]) is type(value) or found[field] == value


def written(value):
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    return "''" if value == '' else str(value)


# --- YAML as people write it

WHOLE = [  # text, what a whole number is read as; None: refused
    ('1e3', 1000), ('1E3', 1000), ('1.0e+3', 1000), ('1000.0', 1000), ('1_000', 1000),
    ('+5', 5), ('"7"', 7), ("'1e3'", 1000), ('010', None), ('0o10', None), ('0x10', None),
    ('0b1', None), ('1:30', None), ('1.5', None), ('1e-3', None), ('true', None),
    ('yes', None), ('.inf', None), ('.nan', None), ('nan', None), ('1e400', None),
    ('9999999999', None), ('9' * 5_000, None), ("'1,5'", None), ('[5]', None),
    ('5 steps', None),
    ('１０', None), ('٣', None), ('½', None), ('−5', None), ('1 000', None), ('"5 "', None),
    ('1k', None), ('2^10', None), ('None', None), ('=5', None), ('&a 5', 5),
    ('5 # few\n', 5), ('!!str 5', 5), ('0_1', None), ('00', None),
    ('-0', 0), ('1__0', None), ('1e', None), ('!!int 5', 5), ('five', None),
]  # fmt: skip
NUMBER = [
    ('1e-4', 1e-4), ('1E-4', 1e-4), ('1', 1.0), ('.5', 0.5), ('5.', 5.0), ('"0.5"', 0.5),
    ('1_0.5', 10.5), ('010', None), ('00.5', None), ('.inf', None), ('-.inf', None),
    ('.NaN', None), ('inf', None), ('1/25', None), ('50%', None), ('1e400', None),
    ('no', None), ('1:30', None), ('2024-01-01', None), ('0.1 0.2', None),
    ('1e−4', None), ('–1', None), ('"0,1"', None), ('10^-4', None), ('1d-4', None),
    ('0x1p-3', None), ('1e-400', None), ('{a: 1}', None), ('[1]', None), ('+.5', 0.5),
]  # fmt: skip
SWITCH = [
    ('yes', True), ('Yes', True), ('on', True), ('true', True), ('TRUE', True),
    ('no', False), ('off', False), ('False', False), ('"true"', True),
    ('1', None), ('0', None), ('y', None), ('oui', None), ('“true”', None), ('1.0', None),
    ('maybe', None), ('[true]', None),
]  # fmt: skip
WORD = [
    ('no', 'no'), ('"no"', 'no'), ('bf16', 'bf16'), ('No', None), ('false', None),
    ('off', None), ('fp16', None), ('16', None), ('null', None), ('[no]', None),
    ('“no”', None), ('BF16', None), ('"bf16 "', None),
]  # fmt: skip
LISTS = [
    ('[1, 2]', (1, 2)), ('[1e1, 2.0]', (10, 2)), ('"[1, 2]"', (1, 2)), ('[1]', (1,)),
    ('[]', None), ('2', None), ('[1, a]', None), ('[0]', None), ('[[1]]', None),
    ('[1, .nan]', None), ('[1, 010]', None), ('[-1]', None), ('{a: 1}', None), ('1 2', None),
    ('{1, 2}', None), ('"1,2"', None), ('[1 2]', None), ('[1, true]', None),
    ('[1,]', (1,)), ('[1, ~]', None),
]  # fmt: skip
NAMES = [('no', 'no'), ('5', '5'), ('1e3', '1e3'), ("''", ''), ('~', None), ('[a]', None)]
CASES = [
    (field, text, value)
    for field, cases in dict(
        n_iters=WHOLE, lr=NUMBER, flip=SWITCH, precision=WORD, mult=LISTS, vae=NAMES
    ).items()
    for text, value in cases
]


@pytest.mark.parametrize('field, text, value', CASES)
def test_yaml(field, text, value):
    cfg = load_system('cdrl').presets['digits']
    if value is None:
        with pytest.raises(ValueError, match=f'^{field} must be .*got '):
            read_over(cfg, f'{{{field}: {text}}}')
        return
    found = read_over(cfg, f'{{{field}: {text}}}')[field]
    assert found == value and type(found) is type(value)
    assert getattr(replace(cfg, **{field: found}), field) == value


@pytest.mark.parametrize(
    'field, value, says',
    [
        ('precision', False, 'in quotes'),
        ('n_iters', '010', 'leading zeros'),
        ('n_iters', 2**40, 'no count is above'),
        ('lr', math.nan, 'above 0 and finite, got nan'),
        ('n_iters', None, 'got nothing'),
        ('predicts', 'x1', 'one of y, x0, eps'),
        ('mult', [1, 'a'], "got (1, 'a')"),
        ('lr', '1e−4', 'minus'),
        ('lr', '–1', 'minus'),
        ('lr', '0,1', 'decimal point'),
        ('n_iters', '1,000', 'decimal point'),
        ('lr', '10^-4', '1e-4'),
        ('n_iters', '2**10', '1e-4'),
        ('n_iters', '１０', 'digits 0 to 9'),
        ('n_iters', '½', 'digits 0 to 9'),
        ('precision', '“no”', 'straight quotes'),
        ('precision', '«no»', 'straight quotes'),
    ],
)
def test_the_error_says_what_to_do(field, value, says):
    cfg = load_system('cdrl').presets['digits']
    with pytest.raises(ValueError) as error:
        replace(cfg, **read_over(cfg, {field: value}))
    assert says in str(error.value)


MAPPINGS = [
    ('{n_iters: 1, n_iters: 2}', 'given twice'), ('[1, 2]', 'mapping'), ('n_iters', 'mapping'),
    ('n_iters=5', 'mapping'), ('{n_iters: [', 'cannot be read'), ('{[1]: 2}', 'no name'),
    ('{n_iters: *a}', 'cannot be read'), ('&a [*a]', 'lists within lists'),
    ('{n_iters: &a [*a]}', 'lists within lists'), ('[' * 5_000, 'cannot be read'),
    ('{a: 1}\n---\n{b: 2}', 'cannot be read'), ('{n_iters: \x00}', 'cannot be read'),
    ('{lr: 0,1}', 'with colons'), ('{n_iters: 1,000}', 'with colons'),
    ('{mult: 1, 2}', 'lists as [1, 2]'), ('{n_iters=5}', 'with colons'),
    ('{n_iters 5}', 'with colons'), ('{n_iters：5}', 'with colons'),
    ('{N_ITERS: 5}', "mean 'n_iters'"), ('{“n_iters”: 5}', "mean 'n_iters'"),
    ('{<<: {n_iters: 5}}', 'unknown field'), ('{n_iters:\t5}', 'cannot be read'),
    ('n_iters: 5, lr: 1', 'cannot be read'), ('{{n_iters: 5}}', 'no name'),
    ('null', 'mapping'), ('"n_iters: 5"', 'mapping'), ('- n_iters: 5', 'mapping'),
    ('{n_iters: 5; lr: 1}', 'cannot be read'), ('{"": 5}', 'unknown field'),
    ('{n_iters:5}', 'unknown field'), ('{1: 2}', 'unknown field'), ('5', 'mapping'),
    ('!!python/object/apply:os.system [exit]', 'mapping'),
]  # fmt: skip


@pytest.mark.parametrize('text, says', MAPPINGS)
def test_what_is_no_mapping(text, says):
    with pytest.raises((ValueError, KeyError)) as error:
        read_over(load_system('cdrl').presets['digits'], text)
    assert says in str(error.value) and len(str(error.value)) < 2_000


# --- a system of one's own


def test_own_fields_need_no_limit():
    @dataclass(frozen=True, kw_only=True)
    class Config(Loop):
        width: int = 3
        rate: float = 1
        note: object = None
        sizes: list = ()

    cfg = Config(batch=np.int64(4), sizes=[1, 2], note={'a': 1}, rate=math.inf, width=-5)
    assert type(cfg.batch) is int and cfg.sizes == (1, 2) and cfg.width == -5
    for wrong in (dict(batch=0), dict(ema=1.5), dict(micro=True), dict(save_every=0)):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be'):
            replace(cfg, **wrong)
    with pytest.raises(ValueError, match='width must be a whole number'):
        replace(cfg, width='wide')


# --- the command line: one line that says what is wrong, before anything is computed

CHECKERBOARD = ('-p', 'preset', 'checkerboard')
TRAIN = ('train', 'cdrl', *CHECKERBOARD)
AT = ('evaluate', 'cdrl', *CHECKERBOARD, '--at')
IMAGES_AT = ('evaluate', 'cdrl', '-p', 'preset', 'digits-cond', '--at')
SAMPLE = ('sample', 'cdrl', *CHECKERBOARD)
OVER = [  # one of each kind; every field is asked above
    ('{n_iters: -5}', 'n_iters must be at least 0, got -5'),
    ('{ema: 1.5}', 'ema must be at least 0 and below 1, got 1.5'),
    ('{lr: .inf}', 'lr must be above 0 and finite, got inf'),
    ('{lr: abc}', 'lr must be a number'),
    ('{mult: []}', 'mult must be not empty'),
    ('{mult: [1, a]}', 'mult must be a list'),
    ('{precision: off}', 'precision must be one of no, bf16'),
    ('{data: }', 'data must be'),
    ('{shape: 2}', 'shape must be'),
    ('{seed: 1}', "unknown field 'seed'"),
    ('{n_iters: 1, n_iters: 2}', 'given twice'),
    ('[1]', 'mapping'),
    ('{', 'cannot be read'),
]
REFUSED = [
    *(((*TRAIN, '-p', 'over', over), words) for over, words in OVER),
    ((*AT, '{n_steps: abc}'), 'n_steps must be'),
    ((*AT, '{n_steps: -1}'), 'n_steps must be'),
    ((*AT, '{n_steps: 010}'), 'leading zeros'),
    ((*AT, '{tweedie: .nan}'), 'tweedie must be'),
    ((*AT, '{propose: maybe}'), 'propose must be true or false'),
    ((*AT, '{generator: 5}'), "no option 'generator'"),
    ((*AT, '{nets: 5}'), "no option 'nets'"),
    ((*AT, '{self: 5}'), "no option 'self'"),
    ((*AT, '{seed: 3}'), '--seed'),
    ((*AT, '{concepts: foo}'), "no option 'concepts'"),
    ((*AT, '{task: 5}'), 'unknown task'),
    ((*AT, '{task: }'), 'task must be'),
    ((*AT, '{n_steps: 1, n_steps: 2}'), 'given twice'),
    ((*AT, '3'), 'takes a mapping'),
    ((*AT, '{n_steps: [}'), 'cannot be read'),
    ((*IMAGES_AT, '{n: 0}'), 'n must be at least 1'),
    ((*IMAGES_AT, '{n: abc}'), 'n must be'),
    ((*IMAGES_AT, '{n: 1.5}'), 'n must be'),
    ((*IMAGES_AT, '{n: 1e30}'), 'n must be'),
    ((*IMAGES_AT, '{w: abc}'), 'w must be'),
    ((*IMAGES_AT, '{w: .inf}'), 'w must be'),
    ((*IMAGES_AT, '{w: [1]}'), 'w must be'),
    ((*TRAIN, '-p', 'out', 'A', '--out', 'B'), 'given twice'),
    ((*TRAIN, '-p', 'seed', '1', '--seed', '1'), 'given twice'),
    ((*TRAIN, '-p', 'seed', 'abc'), '-p seed must be'),
    ((*TRAIN, '-p', 'seed', '-1'), '-p seed must be'),
    ((*TRAIN, '-p', 'seed', '9' * 30), '-p seed must be'),
    ((*TRAIN, '-p', 'over', '{n_iters: 0}'), 'nothing would be trained'),
    (('train', 'cdrl', '-p', 'preset', 'digits', '-p', 'dataset', 'folder:'), 'no folder'),
    (('train', 'cdrl', '-p', 'preset', 'digits', '-p', 'dataset', 'folder: @8'), 'no folder'),
    ((*TRAIN, '-p', 'over', "{data: 'folder:'}"), 'no folder'),
    ((*SAMPLE, '--out', 'x.txt'), 'ending'),
    ((*SAMPLE, '--out', 'x'), 'ending'),
    ((*SAMPLE, '--out', '.'), 'ending'),
    ((*SAMPLE, '--out', '/dev/null/x.npy'), '/dev/null'),
    (('bench', '--preset', 'digits'), '--preset belongs'),
    (('bench', '--batch', '64'), '--batch belongs'),
    (('bench', '--steps', '20', '--over', '{n_steps: 1}'), '--over and --steps belongs'),
    (('bench', 'cdrl', '--only', 'small'), '--only belongs'),
    (('bench', 'cdrl', '--quick'), '--quick belongs'),
    (('bench', 'cdrl', '--over', '{ch: -8}'), 'ch must be'),
    (('cost', 'cdrl', *CHECKERBOARD, '-p', 'over', '{ch: 0}'), 'ch must be'),
    (('claims', '--run', '--seeds=a'), '--seeds takes'),
    (('claims', '--run', '--seeds='), '--seeds takes'),
    (('run', 'cdrl', '-p', 'seed', 'abc'), '-p seed must be'),
    (('run', 'cdrl', '-p', 'weights', '/nosuch'), "must be 'book'"),
    (('run', 'cdrl', '-p', 'out', '/dev/null/x'), '/dev/null'),
    (('run', 'cdrl', '-p', 'over', '{lr: -1}'), 'lr must be'),
    (('run', 'cdrl', '-p', 'preset', 'nope'), 'unknown preset'),
    (('train', 'CDRL', *CHECKERBOARD), "mean 'cdrl'"),
    (('train', 'cdrl', '-p', 'preset', 'Digits'), "mean 'digits'"),
    (('train', 'cdrl', '-p', 'preset', 'digits '), "mean 'digits'"),
    (('train', 'cdrl', '-p', 'lr', '1'), '-p over'),
    ((*SAMPLE, '--labels', '1'), 'no --labels'),
    ((*SAMPLE, '-n', '1' + '0' * 12), 'no count is above'),
]  # fmt: skip


@pytest.mark.parametrize('args, words', REFUSED, ids=lambda value: ' '.join(value)[-60:])
def test_a_command_refuses(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, list(args))
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    assert found.exit_code == 2 and len(lines) == 1 and words in lines[0], found.output
    assert lines[0].startswith('ebmbook: ') and not list(tmp_path.iterdir())


DEVICES = ['CPU', 'gpu', 'GPU', '0', 'auto', 'meta', 'xpu', 'hpu', 'xla', 'cpu:1', 'cuda:',
           'cuda:-1', ' cpu', 'cpu\n', 'privateuseone', 'mkldnn']  # fmt: skip
NO_DEVICES = [  # both ways are read by one function
    *(('--device', name) for name in DEVICES),
    *(('EBMBOOK_DEVICE', name) for name in ('gpu', 'cpu:1')),
]


@pytest.mark.parametrize('given, name', NO_DEVICES)
def test_a_device_that_is_none(given, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = given == 'EBMBOOK_DEVICE'
    if by_name:
        monkeypatch.setenv(given, name)
    options = [] if by_name else ['--device', name]
    found = CliRunner().invoke(cli.app, [*SAMPLE, '-n', '2', *options])
    assert found.exit_code == 2 and 'take cpu, cuda, cuda:1 or mps' in found.stderr
    assert len(found.stderr.splitlines()) == 1 and (given in found.stderr) == by_name
    assert not list(tmp_path.iterdir())


OWN = {  # a file of EBMBOOK_SYSTEMS: its name and contents, and what is said of it
    'text': ('own.txt', 'x', 'no Python file'),
    'broken': ('own.py', 'def (', 'SyntaxError'),
    'zeros': ('own.py', 'x = 1\0', 'null bytes'),
    'raises': ('own.py', '1 / 0', 'ZeroDivisionError'),
    'imports': ('own.py', 'import no_such_module_here', 'no_such_module_here'),
    'leaves': ('own.py', 'raise SystemExit(0)', 'SystemExit'),
    'empty': ('own.py', '', 'has no System'),
}


@pytest.mark.parametrize('what', OWN)
def test_a_file_of_systems_that_is_none(what, tmp_path, monkeypatch):
    name, text, says = OWN[what]
    (tmp_path / name).write_text(text)
    monkeypatch.setenv('EBMBOOK_SYSTEMS', str(tmp_path / name))
    found = CliRunner().invoke(cli.app, ['presets'])
    assert found.exit_code == 2 and says in found.stderr and name in found.stderr
    assert len(found.stderr.splitlines()) == 1


HOMES = [  # commands with a path whose ~ no shell has replaced
    (*SAMPLE, '-n', '2', '--out', '{}/x.npy'), ('sample', 'cdrl', '--weights', '{}/w'),
    (*TRAIN, '-p', 'out={}/w', '-p', 'over', '{{n_iters: 1, batch: 4, pretrain: 0}}'),
    ('claims', '--file', '{}/c.yaml'), ('claims', '--ledger', '{}/l.jsonl'),
    ('datasets', '--root', '{}/d'),
]  # fmt: skip


@pytest.mark.parametrize('args', HOMES, ids=lambda args: ' '.join(args)[-30:])
def test_a_path_of_a_home(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, [arg.format('~no_such_user_here') for arg in args])
    assert found.exit_code == 2 and 'no home here' in found.stderr, found.output
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    found = CliRunner().invoke(cli.app, [arg.format('~') for arg in args])
    assert found.exit_code in (0, 2) and str(tmp_path / 'home') in found.output
    assert [path.name for path in tmp_path.iterdir()] == ['home']


def test_samples_in_capitals(tmp_path):
    x = torch.zeros(3, 2)
    assert cli.save_samples(x, str(tmp_path / 'X.NPY')) == tmp_path / 'X.NPY'
    assert np.load(tmp_path / 'X.NPY').shape == (3, 2)
    with pytest.raises(OSError, match='--out .*X.NPY/y.npy cannot be written'):
        cli.save_samples(x, str(tmp_path / 'X.NPY' / 'y.npy'))


TYPED = [  # numbers that the command line itself checks
    (*SAMPLE, '--w', 'nan'), (*SAMPLE, '--w', 'inf'), (*SAMPLE, '--w', 'abc'),
    (*SAMPLE, '-n', '0'),
    (*SAMPLE, '-n', '1e3'), (*SAMPLE, '--seed', '-1'), (*SAMPLE, '--seed', '9' * 30),
    ('cost', 'cdrl', *CHECKERBOARD, '--budget', 'nan'), ('bench', '--minutes', 'nan'),
    ('bench', '--minutes', 'inf'), ('bench', '--row', 'digits'),
    (*TRAIN, '--keep-every', '-1'),
]  # fmt: skip


@pytest.mark.parametrize('args', TYPED, ids=lambda value: ' '.join(value)[-40:])
def test_a_number_is_refused(args):
    found = CliRunner().invoke(cli.app, list(args))
    assert found.exit_code == 2 and 'Error' in found.stderr, found.output


def test_samples_that_are_no_numbers_are_not_written(tmp_path):
    x = torch.zeros(3, 1, 8, 8)
    x[1, 0, 0, 0] = math.nan
    for path in ('x.png', 'x.npy'):
        with pytest.raises(ValueError, match='1 of 3 samples are not finite'):
            cli.save_samples(x, str(tmp_path / path))
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_memory_is_a_sentence():
    for text in (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        'not enough memory',
    ):
        assert explain(RuntimeError(text))[0] == 2
    assert explain(RuntimeError('a bug')) is None
