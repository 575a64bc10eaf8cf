"""What a reader downloads or opens in Colab.

Plain copies of all notebooks have no markup that only the book understands, and the numbers in
them are those of the built pages; a chapter installs the package where it is missing.
"""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from ebmbook.shell import copies

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / '_build' / 'html'
CHAPTERS = sorted((ROOT / 'nbs').glob('0?_*.ipynb'))
PAGES = [page for page in copies.book_pages(ROOT) if (ROOT / f'{page}.ipynb').exists()]
# roles, directives, targets, labels behind formulas, links that only the book resolves
RAW = {
    'a role': r'\{[a-z][\w:-]*\}`',
    'a directive': r'(?m)^[> ]*(`{3,}|:{3,})\{',
    'a target': r'(?m)^\([\w-]+\)=\s*$',
    'a label of a formula': r'\$\$[ \t]*\([\w]+-[\w-]+\)',
    'a link without a text': r'(?<!!)\[\]\(',
    'a link into the source': r'\]\((?!https?://)[^)]*\.(ipynb|md)',
    'an option of a directive': r'(?m)^[> ]*:(label|class|name|width):',
}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "All copies, by page."
    folder = tmp_path_factory.mktemp('html')
    paths = copies.write_copies(ROOT, folder)
    names = [
        path.relative_to(folder / '_sources').with_suffix('').as_posix() for path in paths
    ]
    return {name: json.loads(path.read_text('utf-8')) for name, path in zip(names, paths)}


def prose(nb):
    "The text of a notebook without code."
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown']
    text = re.sub(r'(?ms)^(> )?```(?!\{).*?^(> )?```$', '', '\n\n'.join(cells))
    span = r'(\{[a-z][\w:-]*\}`[^`]+`)|(`+)(?!`)[^\n]*?(?<!`)\2(?!`)'
    return re.sub(span, lambda match: match[1] or 'code', text)


def test_every_page_has_a_copy(written):
    assert sorted(written) == sorted(PAGES)


@pytest.mark.parametrize('page', PAGES)
def test_a_copy_can_be_read_anywhere(page, written):
    nb, source = written[page], json.loads((ROOT / f'{page}.ipynb').read_text('utf-8'))
    nbformat.validate(nbformat.from_dict(nb))
    text = prose(nb)
    left = {what: m[0] for what, rule in RAW.items() if (m := re.search(rule, text))}
    assert not left
    code = [
        ''.join(c['source'])
        for c in source['cells']
        if c['cell_type'] == 'code' and '| default_exp' not in ''.join(c['source'][:1])
    ]
    kept = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    assert [re.sub(r'\A(# ?\|.*\n?)+', '', o) for o in code if o.strip()] == kept
    assert f'{page}.html' in ''.join(nb['cells'][0]['source'])
    formulas = [o.count('$$') for o in (text, prose(source))]
    assert formulas[0] >= formulas[1]


def test_rules_find_what_they_are_for():
    text = (
        '{eq}`a`\n```{note}\n:label: x\n```\n(ch-x)=\n$$a$$ (eq-a)\n[](a.ipynb) [b](c.md)\n'
    )
    assert [what for what, rule in RAW.items() if not re.search(rule, text)] == []


def test_what_is_referred_to_exists():
    "A label without a target would become its bare name."
    index = copies.book_index(ROOT)
    assert all(target.text for target in index.targets.values())
    for page in PAGES:
        text = prose(json.loads((ROOT / f'{page}.ipynb').read_text('utf-8')))
        for role, said in re.findall(r'\{(ref|eq|numref)\}`([^`]+)`', text):
            label = re.sub(r'.*<(.+)>', r'\1', said)
            assert label in index.targets, f'{page}: {role} {label}'


@pytest.mark.skipif(
    not (HTML / 'nbs').exists(), reason="no built book: run make book first"
)
def test_numbers_are_those_of_the_book():
    seen = 0
    for target in copies.book_index(ROOT).targets.values():
        page = HTML / f'{target.page}.html'
        kinds = {'(': r'class="eqno">(\([\d.]+\))', 'F': r'caption-number">(Fig\. [\d.]+)'}
        numbered = re.match(r'\(|F(?=ig\. )', target.text)  # not every word with an F
        if not numbered or not target.anchor or not page.exists():
            continue
        rule = rf'id="{re.escape(target.anchor)}".*?' + kinds[numbered[0]]
        found = re.search(rule, page.read_text('utf-8'), re.DOTALL)
        assert found and found[1] == target.text, target
        seen += 1
    assert seen > 100


@pytest.mark.skipif(
    not (HTML / 'nbs').exists(), reason="no built book: run make book first"
)
def test_buttons_offer_the_copies():
    for page in PAGES:
        html = (HTML / f'{page}.html').read_text('utf-8')
        assert f'/blob/gh-pages/_sources/{page}.ipynb' in html
        assert f'/blob/main/{page}.ipynb" target' not in html
        offered = json.loads((HTML / '_sources' / f'{page}.ipynb').read_text('utf-8'))
        assert copies.raw_markup(offered) == []


def test_the_buttons_are_there():
    config = yaml.safe_load((ROOT / '_config.yml').read_text('utf-8'))
    assert config['launch_buttons']['colab_url'] == 'https://colab.research.google.com'
    assert config['repository']['url'].endswith('/ebmbook/ebmbook')
    assert 'ebmbook.shell.copies' in config['sphinx']['config']['extensions']
    assert '$(COPIES)' in (ROOT / 'Makefile').read_text('utf-8').partition('\nbook:')[2]


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda o: o.stem)
def test_a_chapter_installs_the_package_where_it_is_missing(path, monkeypatch):
    cells = json.loads(path.read_text('utf-8'))['cells']
    first = next(cell for cell in cells if cell['cell_type'] == 'code')
    source = ''.join(first['source'])
    assert set(first['metadata']['tags']) == {'hide-input', 'install'} and '|' not in source
    assert [c for c in cells if 'install' in c['metadata'].get('tags', [])] == [first]
    magic = '%pip install --quiet ebmbook'
    assert source.count('%') == 1 and magic in source
    called = []
    code = compile(source.replace(magic, 'called.append(1)'), path.name, 'exec')
    exec(code, dict(called=called))
    assert called == []
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    exec(code, dict(called=called))
    assert called == [1]


def test_chapters_are_there():
    assert [int(path.name[:2]) for path in CHAPTERS] == list(range(9))
