"Data sets through the public door: `load`, `require`, `download` and torch's DataLoader."

import gzip
import importlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ebmbook.data import (
    DATASETS,
    as_is,
    download,
    find_folder,
    load,
    picture_set,
    procedural,
    require,
)

EMBEDDED = [name for name, spec in DATASETS.items() if spec.source == 'embedded']


def idx(x):
    header = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, '>i4').tobytes()
    return header + x.astype(np.uint8).tobytes()


def write_mnist(root, kind='MNIST', packed=True):
    base = root / kind / 'raw'
    base.mkdir(parents=True)
    for part, n in (('train', 7), ('t10k', 4)):
        y = np.arange(n)
        x = y[:, None, None] * np.ones((1, 28, 28))
        for name, array in (
            (f'{part}-images-idx3-ubyte', x),
            (f'{part}-labels-idx1-ubyte', y),
        ):
            if packed:
                (base / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
            else:
                (base / name).write_bytes(idx(array))


def write_photos(root, n=40, size=(20, 30)):
    rng = np.random.default_rng(0)
    for i in range(n):
        path = root / ('cat', 'dog')[i % 2] / f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def test_import_is_light_and_offline():
    code = '''
import socket, sys
def refuse(*a, **k): raise RuntimeError("network")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
from ebmbook.data import DATASETS, load
heavy = {"torchvision", "sklearn", "skimage", "matplotlib", "scipy", "PIL"} & set(sys.modules)
assert not heavy, heavy
for name,spec in DATASETS.items():
    if spec.source == "embedded": load(name)
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


@pytest.mark.parametrize('name', EMBEDDED)
def test_embedded_sets_ignore_and_keep_the_global_random_state(name):
    torch.manual_seed(1)
    first, before = load(name, split='test').x[:50].clone(), torch.get_rng_state()
    torch.manual_seed(2)
    procedural._digits.cache_clear()
    assert torch.equal(load(name, split='test').x[:50], first)
    assert torch.equal(before, torch.manual_seed(1).get_state())


@pytest.mark.parametrize('name', EMBEDDED)
def test_train_and_test_share_nothing(name):
    train, test = (
        load(name, split=split).tensor().flatten(1) for split in ('train', 'test')
    )
    if name != 'stacked_digits':
        both = torch.cat([train, test])
        assert len(both.unique(dim=0)) == len(train.unique(dim=0)) + len(test.unique(dim=0))
    else:  # stacks of disjoint scans
        scans = load('digits', split='test').tensor().flatten(1)
        assert (torch.cdist(test[:50].view(-1, 64), scans).amin(1) < 1e-5).all()
        assert (torch.cdist(train[:50].view(-1, 64), scans).amin(1) > 1e-2).all()


def test_split_of_digits_is_the_same_everywhere():
    assert load('digits').y[:8].tolist() == [4, 0, 5, 2, 5, 6, 8, 3]
    assert load('digits', split='test').y[:8].tolist() == [5, 0, 9, 1, 6, 1, 2, 3]


@pytest.mark.parametrize(
    'kind,name', [('MNIST', 'mnist'), ('FashionMNIST', 'fashion_mnist')]
)
@pytest.mark.parametrize('packed', [True, False])
def test_idx_folder(tmp_path, kind, name, packed):
    write_mnist(tmp_path, kind, packed)
    before = sorted(tmp_path.rglob('*'))
    train, test = load(name, tmp_path), load(name, tmp_path, 'test')
    assert (len(train), len(test), train.shape) == (7, 4, (1, 28, 28))
    assert torch.equal(train.x[:, 0, 3, 3].long(), train.y)
    assert sorted(tmp_path.rglob('*')) == before  # nothing is unpacked beside the originals


def test_environment_chooses_the_root(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv('EBMBOOK_DATA', str(tmp_path))
    assert len(load('mnist')) == 7
    stacked = load('stacked_mnist')
    assert len(stacked) == 128_000 and stacked.batch([5, 3])['x'].shape == (2, 3, 28, 28)
    digits = stacked.x[range(20)][:, :, 0, 0].long()
    assert torch.equal(digits @ torch.tensor([100, 10, 1]), stacked.y[:20])


def test_real_mnist_if_present():
    try:
        require('mnist')
    except FileNotFoundError:
        pytest.skip('no MNIST below the data root')
    train, test = load('mnist'), load('mnist', split='test')
    assert (len(train), len(test)) == (60_000, 10_000)
    assert (
        train.y.bincount().min() > 5000
        and 0.1 < train.tensor(2000).add(1).div(2).mean() < 0.16
    )


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_lazy_photos_through_workers(tmp_path, context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(context)
    write_photos(tmp_path)
    packed = load(f'folder:{tmp_path}')
    files, y, spec = find_folder(f'folder:{tmp_path}', tmp_path, 'train')
    lazy = picture_set(files, y, spec.shape, in_memory=False)
    order = (
        torch.randperm(36, generator=torch.Generator().manual_seed(0)).view(6, 6).tolist()
    )
    loader = DataLoader(
        lazy,
        batch_sampler=order,
        num_workers=2,
        collate_fn=as_is,
        multiprocessing_context=context,
    )
    for chosen, batch in zip(order, loader, strict=True):
        assert batch['x'].dtype == torch.float32 and batch['x'].shape == (6, 3, 30, 20)
        assert torch.equal(batch['x'], packed.batch(chosen)['x'])
        assert torch.equal(batch['y'], packed.y[chosen])


def test_damaged_photo_is_named_by_the_worker(tmp_path):
    write_photos(tmp_path)
    files, y, spec = find_folder(f'folder:{tmp_path}', tmp_path, 'train')
    with open(files[3], 'r+b') as file:
        file.truncate(300)
    lazy = picture_set(files, y, spec.shape, in_memory=False)
    with pytest.raises(ValueError, match=files[3].rsplit('/', 1)[-1]):
        list(DataLoader(lazy, batch_sampler=[[3]], num_workers=1, collate_fn=as_is))


def test_imagenet32_official_format(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load('imagenet32', tmp_path)
    for word in ('train_data_batch_10.npz', 'val_data.npz', str(tmp_path), 'image-net.org'):
        assert word in str(error.value)
    (tmp_path / 'imagenet32').mkdir()
    rng = np.random.default_rng(0)
    for file in DATASETS['imagenet32'].files:
        pixels = rng.integers(0, 256, (5, 3072), dtype=np.uint8)
        np.savez(
            tmp_path / file,
            data=pixels,
            labels=rng.integers(1, 1001, 5),
            mean=np.zeros(3072),
        )
    train = load('imagenet32', tmp_path)
    first = np.load(tmp_path / 'imagenet32' / 'train_data_batch_1.npz')
    assert len(train) == 50 and train.y[2] == first['labels'][2] - 1
    assert np.array_equal(train.x[2].flatten().numpy(), first['data'][2])
    (tmp_path / DATASETS['imagenet32'].files[-1]).write_bytes(b'PK\3\4broken')
    with pytest.raises(ValueError, match='val_data.npz'):
        load('imagenet32', tmp_path, 'test')


def test_cifar_files(tmp_path, monkeypatch):
    import torchvision

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(
        cifar, '_check_integrity', lambda self: True
    )  # tiny files have other checksums
    monkeypatch.setattr(cifar, '_load_meta', lambda self: None)
    for name, key in (('cifar10', 'labels'), ('cifar100', 'fine_labels')):
        for i, file in enumerate(DATASETS[name].files):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            content = {'data': np.full((2, 3072), i, np.uint8), key: [i, 1]}
            (tmp_path / file).write_bytes(pickle.dumps(content))
    assert load('cifar10', tmp_path).y.tolist() == [1, 1, 2, 1, 3, 1, 4, 1, 5, 1]
    assert load('cifar100', tmp_path, 'test').x.shape == (2, 3, 32, 32)


def test_download_asks_torchvision(tmp_path, monkeypatch):
    import torchvision

    calls = []

    def fetch(root, *args, download):
        calls.append((root, *args, download))
        if not args:
            write_mnist(tmp_path)

    monkeypatch.setattr(torchvision.datasets, 'MNIST', fetch)
    assert download('stacked_mnist', tmp_path) == DATASETS['stacked_mnist']
    assert calls == [(str(tmp_path), True)]
    calls.clear()
    monkeypatch.setattr(torchvision.datasets, 'SVHN', fetch)
    with pytest.raises(
        FileNotFoundError, match='svhn/train_32x32.mat'
    ):  # fetched nothing: reported, not hidden
        download('svhn', tmp_path)
    assert calls == [(str(tmp_path / 'svhn'), split, True) for split in ('train', 'test')]


def test_every_set_says_how_to_get_it(tmp_path):
    for name, spec in DATASETS.items():
        if spec.source in ('embedded', 'rendered'):
            continue
        with pytest.raises(FileNotFoundError) as error:
            require(name, tmp_path)
        assert spec.get
        for word in (spec.get, spec.files[0], str(tmp_path)):
            assert word in str(error.value)


def test_every_public_name_of_the_parts_is_offered_by_the_room():
    import ebmbook.data

    parts = ('catalogue', 'examples', 'scenes', 'pictures', 'cameras', 'folders', 'files')
    for part in (*parts, 'procedural', 'outliers'):
        module = importlib.import_module(f'ebmbook.data.{part}')
        for name in module.__all__:
            assert getattr(ebmbook.data, name) is getattr(module, name), (part, name)
            assert name in dir(ebmbook.data)
    with pytest.raises(AttributeError, match='nothing'):
        ebmbook.data.nothing
