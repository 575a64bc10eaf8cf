"""The built book as a reader meets it.

Skipped, with the reason, where no book is built or no Chromium is there.

`make book` writes the pages, then `pytest tests/test_book.py` reads them; `.ci/run` does both.
"""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / '_build/html'
CHROMIUM = next(
    (
        p
        for o in ('chromium', 'chromium-browser', 'google-chrome')
        if (p := shutil.which(o))
    ),
    None,
)


def pages():
    "Pages with text of ours; Sphinx's search page and index are not among them."
    return sorted((HTML / 'nbs').rglob('*.html'))


needs_book = pytest.mark.skipif(not pages(), reason="no built book: run make book first")
needs_chromium = pytest.mark.skipif(
    not CHROMIUM,
    reason="no Chromium on this machine: the browser's part is run by hand before a release",
)
each_page = pytest.mark.parametrize(
    'page', pages(), ids=lambda o: o.relative_to(HTML).as_posix()
)


# --- reading the files


class Reader(HTMLParser):
    "Collects text, addresses that load something, and formulas."

    loading = {
        'script': 'src',
        'img': 'src',
        'iframe': 'src',
        'source': 'src',
        'video': 'src',
        'audio': 'src',
        'embed': 'src',
        'object': 'data',
    }

    def __init__(self):
        super().__init__()
        self.text, self.loads, self.formulas, self.silent = [], [], 0, 0

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        if tag in ('script', 'style'):
            self.silent += 1
        if tag in self.loading and at.get(self.loading[tag]):
            self.loads.append(at[self.loading[tag]])
        if tag == 'link' and at.get('rel') in (
            'stylesheet',
            'preload',
            'icon',
            'shortcut icon',
            'modulepreload',
        ):
            self.loads.append(at['href'])
        self.formulas += 'math' in (at.get('class') or '').split()

    def handle_endtag(self, tag):
        self.silent -= tag in ('script', 'style')

    def handle_data(self, data):
        if not self.silent:
            self.text.append(data)


def read(text):
    "Parse a page."
    reader = Reader()
    reader.feed(text)
    return reader


def outside(loads):
    return [o for o in loads if re.match(r'(https?:)?//', o)]


def sources(page):
    "Formulas in the source of a page: blocks between double dollars, outside code."
    for suffix in ('.ipynb', '.md'):
        if not (src := ROOT / page.relative_to(HTML).with_suffix(suffix)).is_file():
            continue
        if suffix == '.md':
            text = src.read_text(encoding='utf-8')
        else:
            text = '\n\n'.join(
                ''.join(c['source'])
                for c in json.loads(src.read_text(encoding='utf-8'))['cells']
                if c['cell_type'] == 'markdown'
            )
        text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
        return len(re.findall(r'\$\$.+?\$\$', text, flags=re.S)), re.findall(
            r'\$\$ *\(([\w-]+)\)', text
        )
    return 0, []


def test_reader():
    "The reader sees what it is meant to find."
    got = read(
        '<script src="https://x/y.js">a</script><link rel="stylesheet" href="a.css">'
        '<p>#| export</p><div class="math notranslate">x</div>'
    )
    assert (
        outside(got.loads) == ['https://x/y.js']
        and '#|' in ''.join(got.text)
        and got.formulas == 1
    )
    assert outside(['a.css', '../b.js', '//cdn/x.js']) == ['//cdn/x.js']


@needs_book
@each_page
def test_page(page):
    html = page.read_text(encoding='utf-8')
    got, (blocks, labels) = read(html), sources(page)
    assert not re.search(
        r'#\s*\|\s*(export|hide|default_exp|eval|echo|slow|gpu)\b', ''.join(got.text)
    ), "a directive is shown"
    assert not outside(got.loads), "something is loaded from outside"
    assert not [
        o for o in got.loads if not (page.parent / o.split('?')[0].split('#')[0]).exists()
    ], "something that is loaded does not exist"
    assert got.formulas >= blocks
    for o in labels:
        assert f'id="equation-{o}"' in html
    number = re.match(r'(\d+)[a-z]?_', page.name)
    if number and labels:
        assert re.findall(r'class="eqno">\((\d+)\.', html) == [str(int(number[1]))] * len(
            labels
        )


@needs_book
def test_styles_load_nothing_from_outside():
    for p in HTML.rglob('*.css'):
        found = re.findall(
            r'(?:url\(|@import\s+)["\']?((?:https?:)?//[^"\')\s]+)',
            p.read_text(encoding='utf-8', errors='replace'),
        )
        assert not found, (p.name, found)


# --- numbers of chapters


def build_book(folder, *chapters):
    "Build a book of pages that are there, with the settings of this one."
    (folder / 'nbs/references.bib').touch()
    (folder / '_toc.yml').write_text(
        'format: jb-book\nroot: nbs/index\nparts:\n  - caption: Part\n    numbered: true\n'
        '    chapters:\n' + ''.join(chapters)
    )
    config = (ROOT / '_config.yml').read_text(encoding='utf-8')
    config = re.sub(r'(?m)^\s+(html_extra_path|mathjax_path):.*\n', '', config)
    (folder / '_config.yml').write_text(config)
    jupyter_book = Path(sys.executable).parent / 'jupyter-book'
    command = [jupyter_book, 'build', '.', '-W', '-n', '--keep-going']
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr


def test_chapter_numbers(tmp_path):
    "A book of chapters 01 and 05 numbers them 1 and 5, and formulas, figures, references too."
    jupyter_book = Path(sys.executable).parent / 'jupyter-book'
    if not jupyter_book.exists():
        pytest.skip("jupyter-book is not installed: pip install -e '.[book]'")
    (tmp_path / 'nbs/05_b').mkdir(parents=True)
    pages = ('01_a', '05_b', '05_b/c')
    for page in pages:
        label = page.replace('/', '-')
        text = f'# Page {page}\n\nSee {{eq}}`eq-05_b` and [](#eq-05_b).\n\n## Part\n\n'
        (tmp_path / f'nbs/{page}.md').write_text(f'{text}$$x$$ (eq-{label})\n')
    (tmp_path / 'nbs/index.md').write_text('# Start\n\nSee {eq}`eq-05_b`.\n')
    first = '      - file: nbs/01_a\n'
    second = '      - file: nbs/05_b\n        sections:\n          - file: nbs/05_b/c\n'
    build_book(tmp_path, first, second)
    html = {
        o: (tmp_path / f'_build/html/nbs/{o}.html').read_text(encoding='utf-8')
        for o in (*pages, 'index')
    }
    assert [re.findall(r'class="eqno">(\(.*?\))', html[o]) for o in pages] == [
        ['(1.1)'],
        ['(5.1)'],
        ['(5.2)'],
    ]
    assert re.findall(r'<h[12]><span class="section-number">([\d.]+) ', html['05_b']) == [
        '5.',
        '5.1.',
    ]
    assert all('(5.1)</a>' in html[o] for o in ('01_a', '05_b/c', 'index'))


# --- in the browser


class Browser:
    "Chromium without a window, spoken to over two pipes; it cannot resolve any host."

    def __enter__(self):
        self.home = tempfile.mkdtemp()
        here, theirs = os.pipe(), os.pipe()  # what the browser reads, what it writes
        flags = [
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-dev-shm-usage',
            '--hide-scrollbars',
            '--no-first-run',
            '--remote-debugging-pipe',
            '--disable-background-networking',
            '--disable-component-update',
            '--host-resolver-rules=MAP * ~NOTFOUND',
            f'--user-data-dir={self.home}',
            'about:blank',
        ]
        cmd = [
            'bash',
            '-c',
            f'exec "$0" "$@" 3<&{here[0]} 4>&{theirs[1]}',
            CHROMIUM,
            *flags,
        ]
        self.proc = subprocess.Popen(
            cmd,
            pass_fds=(here[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(theirs[1])
        self.to, self.of, self.rest, self.n, self.events, self.session = (
            here[1],
            theirs[0],
            b'',
            0,
            [],
            None,
        )
        return self

    def __exit__(self, *_):
        self.proc.kill()
        self.proc.wait()
        os.close(self.to)
        os.close(self.of)
        shutil.rmtree(self.home, ignore_errors=True)

    def hear(self, until):
        "The next message, or None when the time is over."
        while b'\0' not in self.rest:
            if not select.select([self.of], [], [], max(0, until - time.time()))[0]:
                return None
            if not (data := os.read(self.of, 1 << 16)):
                raise RuntimeError("Chromium closed its pipe")
            self.rest += data
        head, _, self.rest = self.rest.partition(b'\0')
        return json.loads(head)

    def ask(self, method, wait=60, **params):
        "Call a method of the DevTools protocol; events that come meanwhile are kept."
        self.n += 1
        os.write(
            self.to,
            json.dumps(
                dict(id=self.n, method=method, params=params)
                | ({'sessionId': self.session} if self.session else {})
            ).encode()
            + b'\0',
        )
        until = time.time() + wait
        while said := self.hear(until):
            if said.get('id') == self.n:
                if 'error' in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return said['result']
            self.events.append(said)
        raise TimeoutError(method)

    def value(self, expression):
        "Value of a JavaScript expression, which may be a promise."
        got = self.ask(
            'Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True
        )
        if 'exceptionDetails' in got:
            raise RuntimeError(str(got['exceptionDetails']))
        return got['result'].get('value')

    def visit(self, url, width, height=900):
        "Open a page in a fresh tab of that width and wait until its formulas are set."
        self.session = None
        tab = self.ask('Target.createTarget', url='about:blank')['targetId']
        self.session = self.ask('Target.attachToTarget', targetId=tab, flatten=True)[
            'sessionId'
        ]
        for o in ('Page', 'Network', 'Runtime', 'Log'):
            self.ask(f'{o}.enable')
        self.ask(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.events.clear()
        self.ask('Page.navigate', url=url)
        for _ in range(200):
            if self.value(
                "location.href!='about:blank' && document.readyState=='complete'"
            ):
                break
            time.sleep(0.05)
        self.value("window.MathJax?.startup?.promise ?? true")
        self.value("new Promise(done => setTimeout(done, 200))")

    def close(self):
        "Close the tab."
        self.ask('Page.close')
        self.session = None

    def complaints(self):
        "Errors of the console, exceptions, and requests that failed or left the folder."
        bad = []
        for o in self.events:
            kind, p = o.get('method'), o.get('params', {})
            if kind == 'Runtime.exceptionThrown':
                bad.append(
                    str(p['exceptionDetails'].get('exception', p['exceptionDetails']))[:300]
                )
            elif kind == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'):
                bad.append(str(p['args'])[:300])
            elif kind == 'Log.entryAdded' and p['entry']['level'] == 'error':
                bad.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
            elif kind == 'Network.loadingFailed':
                bad.append(f"request failed: {p['errorText']}")
            elif kind == 'Network.requestWillBeSent' and not p['request']['url'].startswith(
                ('file:', 'data:', 'blob:')
            ):
                bad.append(f"request to {p['request']['url']}")
        return bad


TOO_WIDE = """[...document.querySelectorAll('div.math')].filter(d => {
    const box = d.querySelector('mjx-container'), number = d.querySelector('.eqno')
    const sign = box?.querySelector('mjx-math')
    if (!sign) return false
    const free = number ? number.getBoundingClientRect().left : d.getBoundingClientRect().right
    return Math.max(box.scrollWidth-box.clientWidth, sign.getBoundingClientRect().right-free)>1
}).map(d => d.id || d.textContent.slice(0, 40))"""


@pytest.fixture(scope='module')
def browser():
    with Browser() as it:
        yield it


def shot(browser, name):
    "Keep a picture of the page, for people to look at."
    folder = ROOT / 'runs/book'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.png').write_bytes(
        base64.b64decode(
            browser.ask('Page.captureScreenshot', captureBeyondViewport=False)['data']
        )
    )


@needs_chromium
def test_browser_sees_faults(browser, tmp_path):
    "A missing script, an outside request and an error of its own must be complained about."
    (tmp_path / 'a.html').write_text(
        '<script src="gone.js"></script><img src="http://example.org/x.png">'
        '<script>console.error("no")</script><p style="width:900px">x'
        '<div class="math" id="e" style="width:99px"><mjx-container>'
        '<mjx-math style="display:inline-block;width:90px">x</mjx-math></mjx-container>'
        '<b class="eqno" style="position:absolute;left:60px">1</b></div>'
        '<div class="math" id="f" style="width:99px">'
        '<mjx-container><mjx-math>x</mjx-math></mjx-container></div>'
    )
    browser.visit((tmp_path / 'a.html').as_uri(), 390)
    said = ' '.join(browser.complaints())
    assert 'request failed' in said and 'example.org' in said and 'no' in said
    assert browser.value('document.documentElement.scrollWidth') > 390
    assert browser.value(TOO_WIDE) == ['e']
    browser.close()


@needs_book
@needs_chromium
@each_page
def test_in_browser(browser, page):
    "Formulas are set, nothing fails, nothing leaves the folder, a phone need not scroll."
    name = page.relative_to(HTML).with_suffix('').as_posix().replace('/', '-')
    formulas = read(page.read_text(encoding='utf-8')).formulas
    for width in (1280, 390):
        browser.visit(page.as_uri(), width)
        assert browser.value('innerWidth') == width, "the page forces the phone to zoom out"
        assert not browser.complaints(), browser.complaints()
        if formulas:
            assert (
                browser.value("document.querySelectorAll('mjx-container').length")
                >= formulas
            )
        assert not browser.value(
            "document.querySelectorAll('mjx-merror, mjx-container [data-mjx-error]').length"
        ), "a formula has an error"
        assert browser.value('document.documentElement.scrollWidth') <= width, (
            "the page scrolls sideways"
        )
        if width == 1280:
            assert not (wide := browser.value(TOO_WIDE)), (
                f"equations that are cut or run into their number: {wide}"
            )
        shot(browser, f'{name}-{width}')
        browser.close()
