"Pictures as people have them: each becomes the right numbers, or a refusal that names it."

import errno
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from crafted import KINDS, craft, trust
from PIL import Image, ImageOps

from ebmbook import measure
from ebmbook.data import (
    check_shape,
    folders,
    image_files,
    load,
    pictures,
    read_picture,
    require,
)
from ebmbook.data.folders import find_folder
from ebmbook.data.pictures import picture_header

RAMP = np.array([[0, 21845, 43690, 65535]])
BYTES = RAMP // 257


def array(values, kind):
    return Image.fromarray(values.astype(kind))


def chunk(kind, data):
    check = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + check


def png(path, width, height):  # a header that promises much, and nothing behind it
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    blocks = (
        chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')
    )
    Path(path).write_bytes(b'\x89PNG\r\n\x1a\n' + blocks)


def paint(path, size=(6, 4), colour=0, mode='L'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


# One file: how it is made, its ending, and the grey levels of its first row


def palette(transparent=False):
    image = Image.new('P', (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    if transparent:
        image.info['transparency'] = 1
    return image


def levels(*values, mode='L'):
    image = Image.new(mode, (len(values), 1))
    image.putdata(list(values))
    return image


RED, BLUE = (255, 0, 0), (0, 0, 255)
FILES = {
    '8 bits': (levels(0, 85, 170, 255), 'png', 'L', [0, 85, 170, 255]),
    '16 bits': (array(RAMP, 'uint16'), 'png', 'L', [0, 85, 170, 255]),
    '16 bits, TIFF': (array(RAMP, 'uint16'), 'tif', 'L', [0, 85, 170, 255]),
    '16 bits, colour asked': (array(RAMP, 'uint16'), 'png', 'RGB', [0, 85, 170, 255]),
    'floats to 1': (array(RAMP / 65535, 'float32'), 'tiff', 'L', [0, 85, 170, 255]),
    'floats to 255': (array(BYTES, 'float32'), 'tiff', 'L', [0, 85, 170, 255]),
    '1 bit': (levels(0, 1, mode='1'), 'png', 'L', [0, 255]),
    'grey, transparent': (levels((9, 0), (9, 255), mode='LA'), 'png', 'L', [255, 9]),
    'colour, transparent': (
        levels((9, 9, 9, 0), (*RED, 255), mode='RGBA'), 'png', 'RGB', [(255,) * 3, RED],
    ),
    'half transparent': (levels((0, 0, 0, 128), mode='RGBA'), 'png', 'L', [127]),
    'palette': (palette(), 'png', 'RGB', [RED, BLUE]),
    'palette, GIF': (palette(), 'gif', 'RGB', [RED, BLUE]),
    'palette, transparent': (palette(True), 'png', 'RGB', [RED, (255,) * 3]),
    'CMYK': (levels((0, 255, 255, 0), mode='CMYK'), 'tif', 'RGB', [RED]),
    'CMYK as grey': (levels((0, 0, 0, 255), mode='CMYK'), 'tif', 'L', [0]),
    'colour as grey': (levels((7, 7, 7), mode='RGB'), 'bmp', 'L', [7]),
    'grey as colour': (levels(7), 'ppm', 'RGB', [(7,) * 3]),
    'WebP': (levels((7, 7, 7), mode='RGB'), 'webp', 'L', [7]),
    'TGA': (levels(7), 'tga', 'L', [7]),
}  # fmt: skip


@pytest.mark.parametrize('name', FILES)
def test_a_file_becomes_its_levels(name, tmp_path):
    image, ending, mode, want = FILES[name]
    path = tmp_path / f'x.{ending}'
    options = {'transparency': 1} if 'transparency' in image.info else {}
    image.save(path, **options, **({'lossless': True} if ending == 'webp' else {}))
    channels = len(mode)
    x = read_picture(path, (channels, image.height, image.width))
    want = torch.tensor(want, dtype=torch.uint8).view(len(want), -1).expand(-1, channels)
    assert x.dtype == torch.uint8 and torch.equal(x[:, 0].T, want)


def test_orientation_is_obeyed(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255  # bright on the left
    notes = Image.Exif()
    for turn, bright in ((1, 'left'), (3, 'right'), (6, 'top'), (8, 'bottom')):
        notes[0x0112] = turn
        for ending in ('jpg', 'png', 'webp'):
            path = tmp_path / f'{turn}.{ending}'
            Image.fromarray(pixels).convert('RGB').save(path, exif=notes)
            (width, height), _ = picture_header(path)
            assert (width, height) == ((16, 8) if turn in (1, 3) else (8, 16)), path
            x = read_picture(path, (1, height, width))[0].float()
            half = dict(
                left=x[:, : width // 2], right=x[:, width // 2 :],
                top=x[: height // 2], bottom=x[height // 2 :],
            )  # fmt: skip
            assert half[bright].mean() > 230, path
    path = tmp_path / 'a.tif'
    Image.fromarray(pixels).save(path, tiffinfo={0x0112: 6}, compression='tiff_lzw')
    assert picture_header(path)[0] == (8, 16)
    assert read_picture(path, (1, 16, 8))[0, 0].tolist() == [255] * 8
    Image.fromarray(pixels).save(path, tiffinfo={0x0112: 6})
    with pytest.raises(ValueError, match='a.tif.*on its side'):
        read_picture(path, (1, 16, 8))


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [levels(value) for value in (10, 200)]
    for ending in ('gif', 'png', 'tif'):
        path = tmp_path / f'x.{ending}'
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert read_picture(path, (1, 1, 1)).item() == 10


# What Pillow reads otherwise than it is meant, or not at all: files as their bytes


def raw_png(row, depth, kind, before=b'', after=b'', rows=1):
    width = len(row) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    header = struct.pack('>IIBBBBB', width, rows, depth, kind, 0, 0, 0)
    pixels = chunk(b'IDAT', zlib.compress((b'\0' + row) * rows))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        (chunk(b'IHDR', header), before, pixels, after, chunk(b'IEND', b''))
    )


def raw_tiff(data, width, bits, meaning=1, sign=1):
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: meaning, 277: 1, 278: 1, 339: sign}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 279: len(data)}
    entries = (struct.pack('<HHIHxx', tag, 3, 1, tags[tag]) for tag in sorted(tags))
    return b'II*\0\x08\0\0\0\x0a\0' + b''.join(entries) + bytes(4) + data


def shorts(*values, order='>'):
    return struct.pack(f'{order}{len(values)}H', *values)


def packed(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


CLEAR = chunk(b'tRNS', shorts(0))
DEEP = 0, 21845, 43690, 65535
NOISE = Image.effect_noise((64, 64), 50)
RAW = {  # bytes, ending, levels of the first row as grey
    'RGB of 16 bits': (
        raw_png(shorts(*np.repeat(DEEP, 3)), 16, 2), [0, 85, 170, 255],
    ),
    'grey and alpha of 16 bits': (
        raw_png(shorts(0, 0, 257, 65535), 16, 4), [255, 1],
    ),
    '16 bits, 0 is clear': (raw_png(shorts(*DEEP), 16, 0, CLEAR), [255, 85, 170, 255]),
    '8 bits, 0 is clear': (raw_png(bytes([0, 85]), 8, 0, CLEAR), [255, 85]),
    '2 bits': (raw_png(bytes([0b00011011]), 2, 0), [0, 85, 170, 255]),
    '4 bits': (raw_png(bytes([0x05, 0xAF]), 4, 0), [0, 85, 170, 255]),
    'gamma': (raw_png(bytes([0, 85]), 8, 0, chunk(b'gAMA', bytes([0, 1, 134, 160]))), [0, 85]),
    'white is 0': (raw_tiff(bytes([0, 100, 255]), 3, 8, 0), [255, 155, 0]),
    'white is 0, 16 bits': (raw_tiff(shorts(0, 25700, 65535, order='<'), 3, 16, 0), [255, 155, 0]),
    'white is 0, 1 bit': (raw_tiff(bytes([0b10101010]), 8, 1, 0), [0, 255] * 4),
    '12 bits': (raw_tiff(bytes([0, 0x0F, 0xFF, 0x80, 0x0F, 0xFF]), 4, 12), [0, 255, 128, 255]),
    'PGM to 4095': (b'P5 3 1 4095\n' + shorts(0, 2047, 4095), [0, 127, 255]),
    'PGM to 15': (b'P5 3 1 15\n' + bytes([0, 7, 15]), [0, 119, 255]),
    'PGM in words': (b'P2 3 1 255\n0 7 15\n', [0, 7, 15]),
    'a little above 1': (
        packed(array(RAMP / 65535 * 1.000001, 'float32'), format='TIFF'), [0, 85, 170, 255],
    ),
    'a little below 0': (
        packed(array(RAMP / 65535 - 1e-8, 'float32'), format='TIFF'), [0, 85, 170, 255],
    ),
    'ICO by another name': (packed(Image.new('L', (4, 4), 7), format='ICO'), [7] * 4),
}  # fmt: skip


@pytest.mark.parametrize('name', RAW)
def test_bytes_become_their_levels(name, tmp_path):
    data, want = RAW[name]
    path = tmp_path / 'x.png'
    path.write_bytes(data)
    (width, height), _ = picture_header(path)
    assert read_picture(path, (1, height, width))[0, 0].tolist() == want


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-'
    b'rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize('kind', ['eXIf', 'iTXt'])
@pytest.mark.parametrize('where', ['before', 'after'])
def test_notes_before_and_behind_the_pixels(kind, where, tmp_path):
    notes = Image.Exif()
    notes[0x0112] = 6
    data = notes.tobytes()[6:] if kind == 'eXIf' else b'XML:com.adobe.xmp' + bytes(5) + XMP
    row = bytes([255] * 8 + [0] * 8)
    path = tmp_path / 'x.png'
    path.write_bytes(raw_png(row, 8, 0, rows=8, **{where: chunk(kind.encode(), data)}))
    assert picture_header(path)[0] == (8, 16)
    x = read_picture(path, (1, 16, 8))[0]
    assert x[:8].unique().tolist() == [255] and x[8:].unique().tolist() == [0]


def spoiled(where, **options):
    data = bytearray(packed(NOISE, **options))
    data[where(len(data))] = bytes(len(data[where(len(data))]))
    return write(bytes(data))


def shortened(share, **options):
    data = packed(NOISE, **options)
    return write(data[: int(share * len(data))])


def half(n):
    return slice(n // 2, n)


def wrong_sum(path):
    data = bytearray(raw_png(bytes([0, 85, 170, 255]), 8, 0))
    data[data.index(b'IEND') - 6] ^= 1  # of the sum behind the pixels
    path.write_bytes(data)


def write(data):
    return lambda path: path.write_bytes(data)


BAD = {
    'PNG, cut': (shortened(0.1, format='PNG'), 'truncated'),
    'empty': (write(b''), 'identify'),
    'text': (write(b'<html>not found</html>'), 'it is a web page'),
    'words': (write(b'not found'), 'identify'),
    'a bomb': (lambda path: png(path, 60_000, 60_000), 'shrink'),
    'large': (lambda path: png(path, 10_000, 10_000), 'shrink'),
    'no pixels behind the header': (lambda path: png(path, 9, 9), ''),
    'floats below 0': (lambda path: array(-RAMP, 'f').save(path, 'TIFF'), 'floats reach'),
    'floats above 255': (lambda path: array(RAMP, 'f').save(path, 'TIFF'), 'floats reach'),
    'floats, NaN': (lambda path: array(RAMP * np.nan, 'f').save(path, 'TIFF'), 'nan'),
    'JPEG 2000, cut': (shortened(0.97, format='JPEG2000'), 'broken'),
    'JPEG, cut': (shortened(0.5, format='JPEG'), 'truncated'),
    'progressive JPEG, cut': (shortened(0.5, format='JPEG', progressive=True), 'truncated'),
    'WebP, cut': (shortened(0.9, format='WEBP'), ''),
    'JPEG, blank in its second half': (spoiled(half, format='JPEG'), 'its end is blank'),
    'PNG, blank in its second half': (spoiled(half, format='PNG'), ''),
    'PNG, a wrong sum': (wrong_sum, 'broken PNG'),
    'PGM, cut': (write(b'P5 3 1 255\n7'), 'truncated'),
    'SVG': (write(b'<?xml version="1.0"?><svg/>'), 'it is SVG'),
    'HEIC': (write(b'\0\0\0\x18ftypheic' + bytes(99)), 'it is HEIC; save it as PNG'),
    'PDF': (write(b'%PDF-1.7\n'), 'it is PDF'),
    'a pointer of Git LFS': (
        write(b'version https://git-lfs.github.com/spec/v1\n'),
        'git lfs pull',
    ),
    'floats to 1.5': (
        lambda path: array(RAMP / 43690, 'f').save(path, 'TIFF'),
        'reach from 0 to 1.5',
    ),
    'floats to infinity': (
        lambda path: array(np.array([[0, np.inf]]), 'f').save(path, 'TIFF'),
        'inf',
    ),
    '8 bits with a sign': (write(raw_tiff(b'\xfb\0', 2, 8, sign=2)), 'with a sign'),
    '32 bits': (lambda path: array(RAMP, 'int32').save(path, 'TIFF'), '32-bit'),
    'CIELAB': (lambda path: Image.new('LAB', (2, 2)).save(path, 'TIFF'), 'CIELAB'),
}


@pytest.mark.filterwarnings('ignore:Image size')
@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_refused_by_its_name(name, tmp_path):
    make, word = BAD[name]
    path = tmp_path / 'bad one.png'
    make(path)
    with pytest.raises(ValueError, match='bad one.png') as error:
        read_picture(path, (1, 4, 4))
    assert word in str(error.value)
    paint(tmp_path / 'good.png')
    with pytest.raises(ValueError, match='bad one.png'):
        load(f'folder:{tmp_path}')


# Folders


def kinds(root, each=6, names=('cat', 'dog')):
    for number, name in enumerate(names):
        for i in range(each):
            paint(root / name / f'{i}.png', colour=10 * number + 5)


def hide(root):
    for stray in ('.thumbnails/a.png', '.ipynb_checkpoints/b.png', '__MACOSX/cat/._c.png',
                  '@eaDir/d.png', 'cat/._0.png', '._x.png', '~$x.png', 'cat/desktop.ini', 'x.part',
                  'Thumbs.db', '.DS_Store'):  # fmt: skip
        path = root / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'\0\5\x16\7no picture')


STRAYS = {
    'hidden and foreign': hide,
    'a loose picture': lambda root: paint(root / 'cover.png'),
    'a note': lambda root: (root / 'notes.txt').write_text('x'),
    'an empty folder': lambda root: (root / 'aardvark').mkdir(),
    'a folder of notes': lambda root: write_notes(root),
    'a dangling link': lambda root: (root / 'cat' / 'z.png').symlink_to('/nowhere.png'),
    'a dangling folder': lambda root: (root / 'bird').symlink_to('/nowhere'),
    'a link in a circle': lambda root: (root / 'cat' / 'again').symlink_to(root),
    'a pipe': lambda root: os.mkfifo(root / 'cat' / 'pipe.png'),
}


def write_notes(root):
    (root / 'about').mkdir()
    (root / 'about' / 'notes.txt').write_text('x')


@pytest.mark.filterwarnings('ignore:.*left out')
@pytest.mark.parametrize('name', STRAYS)
def test_labels_and_splits_ignore_what_is_strayed(name, tmp_path):
    kinds(tmp_path)
    want = {split: load(f'folder:{tmp_path}', split=split) for split in ('train', 'test')}
    assert (len(want['train']), want['train'].y.unique().tolist()) == (11, [0, 1])
    STRAYS[name](tmp_path)
    for split, old in want.items():
        new = load(f'folder:{tmp_path}', split=split)
        assert torch.equal(new.x, old.x) and torch.equal(new.y, old.y)
    assert torch.equal(want['train'].x[:, 0, 0, 0], 10 * want['train'].y.byte() + 5)


@pytest.mark.parametrize('name', ['x\ny.png', b'\xff\xfe.png', 'x .png\r'])
def test_a_name_of_odd_characters_is_said_in_one_line(name, tmp_path):
    path = os.path.join(
        os.fsencode(tmp_path), name if type(name) is bytes else name.encode()
    )
    Path(os.fsdecode(path.removesuffix(b'\r'))).write_bytes(b'')
    with pytest.raises(ValueError, match='it is empty') as error:
        image_files(tmp_path) and [
            read_picture(p, (1, 2, 2)) for p in image_files(tmp_path)
        ]
    assert str(error.value).isprintable()
    with pytest.raises(FileNotFoundError) as error:
        require(f'folder:{tmp_path}\n')
    assert str(error.value).isprintable()


MIXED = {
    ('cat/train', 'cat/test', 'dog/train', 'dog/test'): 'splits within its classes',
    ('all/cat/Train', 'all/cat/val', 'all/dog/Train'): 'splits within its classes',
    ('train', 'Train', 'test'): 'holds Train and train',
    ('train', 'test', 'TEST'): 'holds TEST and test',
    ('train/cat', 'train/dog', 'test/Cat'): 'lacks',
    ('train/cat', 'train/dog', 'test'): 'lie in none',
    ('test',): 'no train',
    ('test', 'cat'): 'would be trained on.*in .*cat, into a folder train',
    ('Val', 'cat'): 'would be trained on',
    ('cat', 'dog', 'test/cat', 'test/dog'): 'would be trained on',
    ('cat', 'dog', 'valid/cat', 'valid/dog'): 'would be trained on',
    ('cat', 'dog', 'val/bird'): 'would be trained on',
    ('cat', 'dog', 'test', 'val'): 'would be trained on',
    ('all/cat', 'all/test'): 'would be trained on',
}


@pytest.mark.parametrize('names', MIXED, ids=', '.join)
def test_splits_that_would_be_mixed(names, tmp_path):
    kinds(tmp_path, names=names)
    with pytest.raises(ValueError, match=MIXED[names]):
        require(f'folder:{tmp_path}')


@pytest.mark.parametrize('ending', ['heic', 'HEIF', 'svg', 'psd', 'dng', 'ico', 'jxl'])
def test_pictures_that_are_not_read_are_said(ending, tmp_path):
    kinds(tmp_path)
    (tmp_path / 'cat' / f'9.{ending}').write_bytes(b'x')
    with pytest.warns(UserWarning, match=f'9.{ending}: save them as PNG'):
        assert require(f'folder:{tmp_path}').n == (11, 1)


def test_what_is_left_out_is_said(tmp_path):
    kinds(tmp_path)
    for stray, make in (
        ('cover.png', STRAYS['a loose picture']),
        ('z.png', STRAYS['a dangling link']),
    ):
        make(tmp_path)
        with pytest.warns(UserWarning, match=stray):
            require(f'folder:{tmp_path}')


def test_linked_folders_are_classes(tmp_path):
    kinds(tmp_path / 'all')
    for name in ('cat', 'dog'):
        (tmp_path / 'mine').mkdir(exist_ok=True)
        (tmp_path / 'mine' / name).symlink_to(tmp_path / 'all' / name)
    assert load(f'folder:{tmp_path / "mine"}').y.unique().tolist() == [0, 1]
    assert len(image_files(tmp_path / 'mine')) == 12


SPLITS = {  # folders below PATH -> classes, pictures to train on and to test on
    ('train', 'test'): (0, 6, 6),
    ('train', 'val'): (0, 6, 6),
    ('Train', 'Test'): (0, 6, 6),
    ('training', 'validation'): (0, 6, 6),
    ('train', 'test', 'val'): (0, 6, 6),
    ('all/train', 'all/test'): (0, 6, 6),
    ('train',): (0, 5, 1),
    ('all',): (0, 5, 1),
    ('train', 'bus', 'plane'): (3, 17, 1),
    ('test', 'bus', 'plane'): (3, 17, 1),
    ('bus', 'plane', 'val'): (3, 17, 1),
    ('train/cat', 'train/dog', 'val/cat', 'val/dog'): (2, 12, 12),
    ('train/cat', 'train/dog'): (2, 11, 1),
}


@pytest.mark.filterwarnings('ignore:.*taken for a class')
@pytest.mark.parametrize('names', SPLITS, ids=', '.join)
def test_names_of_splits(names, tmp_path):
    kinds(tmp_path, names=names)
    spec = require(f'folder:{tmp_path}')
    classes, *counts = SPLITS[names]
    assert (spec.n_classes, list(spec.n)) == (classes, counts)
    found = [len(load(f'folder:{tmp_path}', split=split)) for split in ('train', 'test')]
    assert found == counts
    files = [
        set(find_folder(f'folder:{tmp_path}', tmp_path, split)[0])
        for split in ('train', 'test')
    ]
    assert list(map(len, files)) == counts and not files[0] & files[1]


@pytest.mark.parametrize('name', ['test', 'Testing', 'val', 'valid', 'validation'])
def test_a_class_of_the_name_of_a_split_is_said(name, tmp_path):
    kinds(tmp_path, names=(name, 'bus', 'plane'))
    with pytest.warns(UserWarning, match=f'{name} is taken for a class'):
        assert require(f'folder:{tmp_path}').n_classes == 3


def test_the_rest_is_looked_through_to_its_first_picture(tmp_path, monkeypatch):
    kinds(tmp_path, each=9, names=('bus', 'plane'))
    steps = []

    def walk(folder, above=()):
        for pair in pictures_walk(folder, above):
            steps.append(pair)
            yield pair

    pictures_walk = pictures._walk
    monkeypatch.setattr(pictures, '_walk', walk)
    monkeypatch.setattr(folders, '_classed', lambda folder: ([], []))
    with pytest.raises(FileNotFoundError, match='no images'):
        find_folder(f'folder:{tmp_path}', tmp_path, 'train')
    assert len(steps) == 2


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    kinds(tmp_path, names=('bus', 'plane'))
    walked, headers = [], []

    def seen(calls, call):
        return lambda *args: calls.append(args) or call(*args)

    monkeypatch.setattr(folders, 'image_files', seen(walked, folders.image_files))
    monkeypatch.setattr(folders, 'picture_header', seen(headers, folders.picture_header))
    assert len(load(f'folder:{tmp_path}')) == 11
    assert (len(walked), len(headers)) == (1, 12)


def test_faces_of_a_known_shape_need_no_headers(tmp_path, monkeypatch):
    for i in range(3):
        paint(tmp_path / 'celebahq256' / f'{i}.png')
    monkeypatch.setattr(folders, 'picture_header', None)
    assert require('celebahq256', tmp_path).shape == (3, 256, 256)
    assert load('celebahq256', tmp_path).x.shape == (2, 3, 256, 256)


# A machine that is full


FULL = {
    'memory': MemoryError(),
    'files of the process': OSError(errno.EMFILE, 'Too many open files'),
    'files of the machine': OSError(errno.ENFILE, 'Too many open files in system'),
    'memory of the system': OSError(errno.ENOMEM, 'Cannot allocate memory'),
}


@pytest.mark.parametrize('name', FULL)
@pytest.mark.parametrize('where', ['open', 'exif', 'turn', 'scan', 'list'])
def test_a_full_machine_spoils_no_file(where, name, tmp_path, monkeypatch):
    def full(*args, **options):
        raise FULL[name]

    path = tmp_path / 'a.jpg'
    paint(path)
    calls = dict(
        open=(Image, 'open', lambda: read_picture(path, (1, 4, 6))),
        exif=(Image.Image, 'getexif', lambda: picture_header(path)),
        turn=(ImageOps, 'exif_transpose', lambda: read_picture(path, (1, 4, 6))),
        scan=(os, 'scandir', lambda: image_files(tmp_path)),
        list=(Path, 'iterdir', lambda: require(f'folder:{tmp_path}')),
    )
    owner, attribute, call = calls[where]
    monkeypatch.setattr(owner, attribute, full)
    with pytest.raises(type(FULL[name])) as error:
        call()
    assert error.value is FULL[name]


# What is read again


def test_a_picture_is_checked_once(tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    paint(path)
    os.utime(path, (0, 0))
    looked = []

    def verify(self):
        looked.append(self.filename)

    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.verify', verify)
    for _ in range(3):
        read_picture(path, (1, 4, 6))
    read_picture(str(path), (1, 4, 6))
    assert len(looked) == 1
    os.utime(path, (9, 9))  # another file may be there now
    read_picture(path, (1, 4, 6))
    assert len(looked) == 2
    os.utime(path)  # and what was just written may change within one tick
    for _ in range(2):
        read_picture(path, (1, 4, 6))
    assert len(looked) == 4


def test_a_file_that_is_spoilt_later_is_refused(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(raw_png(bytes([0, 85, 170, 255]), 8, 0))
    os.utime(path, (0, 0))
    read_picture(path, (1, 1, 4))
    wrong_sum(path)
    for _ in range(2):
        with pytest.raises(ValueError, match='broken PNG'):
            read_picture(path, (1, 1, 4))


FEW = {  # pictures of each class -> images to train on and to test on, or why not
    (0,): 'no images',
    (1,): '1 images are too few',
    (2,): (1, 1),
    (9,): (8, 1),
    (10,): (9, 1),
    (1,) * 12: '12 images are too few',
    (2,) * 6: (11, 1),
    (9, 1, 2): (11, 1),
    (9, 1, 1): (10, 1),
}


@pytest.mark.parametrize('counts', FEW, ids=str)
def test_require_and_load_agree_on_what_is_too_few(counts, tmp_path):
    for number, n in enumerate(counts):
        for i in range(n):
            folder = tmp_path / f'{number:02}' if len(counts) > 1 else tmp_path
            paint(folder / f'{i}.png')
    name, want = f'folder:{tmp_path}', FEW[counts]
    calls = (
        lambda: require(name),
        lambda: load(name),
        lambda: load(name, split='test'),
    )
    for call in calls:
        if isinstance(want, str):
            with pytest.raises((ValueError, FileNotFoundError), match=want):
                call()
        else:
            call()
    if not isinstance(want, str):
        assert require(name).n == want
        if len(counts) > 1:
            assert load(name).y.unique().tolist() == list(range(len(counts)))


PATHS = ['a b', 'ü/ß', 'me@home', 'x#1', "it's", '50%', 'a,b', '[1]', 'pic@32', '.hidden']


@pytest.mark.parametrize('path', PATHS)
def test_any_path(path, tmp_path):
    for i in range(3):
        paint(tmp_path / path / f'{i}.png')
    name = f'folder:{tmp_path / path}'
    assert load(name).shape == (1, 4, 6)
    assert load(f'{name}@8').shape == (1, 8, 8)


SIZES = {
    '@32': (1, 32, 32), '@8x8': (1, 8, 8), '@8x16': (1, 8, 16), '@3x8x8': (3, 8, 8),
    '@1': (1, 1, 1), '@0': 0, '@-4': 0, '@': 0, '@x': 0, '@8x': 0, '@2x8x8': 0, '@1e3': 0,
    '@99999': 0, '@big': 0, '@ 8': 0, '@0x8': 0,
}  # fmt: skip


@pytest.mark.parametrize('size', SIZES)
def test_sizes(size, tmp_path):
    for i in range(3):
        paint(tmp_path / f'{i}.png')
    name = f'folder:{tmp_path}{size}'
    if SIZES[size]:
        assert require(name).shape == load(name).shape == SIZES[size]
        return
    with pytest.raises(ValueError, match='is no size.*@32'):
        require(name)


def test_no_folder(tmp_path):
    (tmp_path / 'a.txt').touch()
    for name, word in (
        ('folder:', 'names no folder'),
        ('folder:@8', 'names no folder'),
        (f'folder:{tmp_path}/none', 'there is no folder .*none'),
        (f'folder:{tmp_path}/a.txt', 'a.txt is a file'),
        (f'folder:{tmp_path}', 'no images'),
        ('folder:~nobody_at_all/x', 'nobody_at_all'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            require(name)


def test_the_name_that_fits_a_preset(tmp_path):
    for i in range(3):
        paint(tmp_path / f'{i}.png', (12, 8), (200, 200, 200), 'RGB')
    name = f'folder:{tmp_path}'
    with pytest.raises(ValueError, match=r"as '(folder:.*@1x8x8)' its images") as error:
        check_shape(name, (1, 8, 8), require(name))
    works = str(error.value).split("as '")[1].split("'")[0]
    check_shape(works, (1, 8, 8), require(works))
    x = load(works).x
    assert x.shape == (2, 1, 8, 8) and x.unique().tolist() == [200]


# Inception: a file is read as tensors, and never run


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('where', ['weights', 'cache', 'tagged'])
def test_a_crafted_inception_file_runs_nothing(kind, where, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    name = 'mine.pth' if where == 'weights' else measure.INCEPTION_FILE
    path, ran = tmp_path / 'checkpoints' / name, tmp_path / 'ran'
    craft(path, ran, kind)
    x = torch.zeros(20, 3, 8, 8)
    with pytest.raises(ValueError, match=name):
        weights = None if where == 'cache' else path
        measure.evaluate_images(x, x, 'inception', ('kid',), weights=weights, cuda=False)
    with pytest.raises(ValueError, match=name):
        measure.extractors.inception_state(path)
    assert not ran.exists()
    trust(path, kind)
    assert ran.exists()  # what it would have done


def test_other_weights_are_refused(tmp_path):
    x = torch.zeros(20, 3, 8, 8)
    for state, word in (({'a': torch.ones(1)}, 'another network'), ([1], 'something else')):
        torch.save(state, tmp_path / 'mine.pth')
        with pytest.raises(ValueError, match=word):
            measure.evaluate_images(
                x, x, 'inception', ('kid',), weights=tmp_path / 'mine.pth', cuda=False
            )


def test_nothing_is_said_of_an_ordinary_folder(tmp_path):
    kinds(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(f'folder:{tmp_path}')
