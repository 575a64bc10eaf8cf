"""A second device, simulated, for machines that have none.

Its tensors are computed on the processor, but say that they lie elsewhere, and refuse to meet
the processor's own as on a GPU.
"""

from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from ebmbook.learn import loop as train
from ebmbook.learn import runs

FAR = torch.device(
    'meta'
)  # lends its name: autograd knows it, and nothing here uses it otherwise
_MOVES = {'aten::copy_', 'aten::_to_copy'}
_INDEXED = {
    'aten::index',
    'aten::_unsafe_index',
    'aten::index_put',
    'aten::index_put_',
    'aten::_index_put_impl_',
    'aten::_unsafe_index_put',
}  # indices may come from the processor
_STRICT = {'aten::cat', 'aten::stack'}  # not even single numbers may


def _is_far(device):
    return device is not None and torch.device(device).type == FAR.type


class Far(torch.Tensor):
    "A tensor on the simulated device; `near` holds its numbers."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=FAR,
        )

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f'Far({self.near})'

    def tolist(self):
        return self.near.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor that lies on another device to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _carry(func, args, kwargs or {})


class _Generator(torch.Generator):  # knows its device
    def __new__(cls, device='cpu'):
        self = super().__new__(cls, 'cpu')
        self.where = torch.device(device)
        return self

    @property
    def device(self):
        return self.where


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__('cpu' if _is_far(device_type) else device_type, *args, **kwargs)


def _refuse(name, args, far, near):  # what a GPU would not do
    alone = [o for o in near if o.ndim or name in _STRICT]
    if far and name in _INDEXED:
        if not isinstance(args[0], Far):
            raise RuntimeError(
                f"{name}: the tensor is on the processor, its indices or values are not"
            )
        alone = [
            o
            for o in args[2:3]
            if isinstance(o, torch.Tensor) and o.ndim and not isinstance(o, Far)
        ]
    if far and alone and name not in _MOVES:
        raise RuntimeError(
            f"{name}: {[tuple(o.shape) for o in alone]} on the processor, "
            f"{[tuple(o.shape) for o in far]} on the other device"
        )


def _carry(func, args, kwargs):  # an operation, its numbers computed on the processor
    flat, name, to = (
        tree_flatten((args, kwargs))[0],
        func._schema.name,
        kwargs.get('device'),
    )
    far, near = (
        [o for o in flat if isinstance(o, Far)],
        [o for o in flat if isinstance(o, torch.Tensor) and not isinstance(o, Far)],
    )
    ends_far = (
        _is_far(to)
        if to is not None
        else isinstance(args[0], Far)
        if name == 'aten::copy_'
        else bool(far)
    )
    _refuse(name, args, far, near)
    a, k = tree_map_only(
        Far,
        lambda o: o.near,
        (args, kwargs | ({} if to is None else dict(device=torch.device('cpu')))),
    )
    if lost := [
        tuple(o.shape)
        for o in tree_flatten((a, k))[0]
        if isinstance(o, torch.Tensor) and o.is_meta
    ]:
        raise AssertionError(
            f"{name}: tensors {lost} without numbers, which the simulation overlooked"
        )
    out = func(*a, **k)
    if name == 'aten::_to_copy' and out is a[0]:
        out = out.clone()
    if not ends_far:
        return out
    out = tree_map_only(torch.Tensor, Far, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out


class _Carried(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _carry(func, args, kwargs or {})


class _Called(TorchFunctionMode):
    # generators, which know their device here alone; and plain numbers, which PyTorch would
    # forget for the device that lends its name
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and _is_far(kwargs.get('device'))
            and not isinstance(args[0], Far)
        ):
            return func(*args, **kwargs | dict(device='cpu')).to(FAR)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Far):
            return torch.tensor(*args[1:], **dict(dtype=args[0].dtype) | kwargs).to(FAR)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(
            args[0], Far
        ):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (
                args[0],
                tuple(torch.tensor(o) if isinstance(o, list) else o for o in at),
                *args[2:],
            )
        out, g = func(*args, **kwargs), kwargs.get('generator')
        if g is not None and _is_far(g.device) != isinstance(out, Far):
            raise RuntimeError(
                f"{func.__name__}: a generator for {g.device} draws "
                f"{'on the processor' if _is_far(g.device) else 'where the processor is not'}"
            )
        return out


class _Accelerator(Accelerator):
    device = property(lambda self: FAR)


def make_accelerator(cfg, device):
    train.AcceleratorState._reset_state(reset_partial_state=True)
    return _Accelerator(cpu=True)


def home(o):  # a nest of tensors, on the processor
    return tree_map_only(Far, lambda t: t.near.clone(), o)


@contextmanager
def far_away(monkeypatch):
    "While it holds, the device exists, and `train` uses it. Files hold what lies on the processor."
    save = train.save_checkpoint
    with monkeypatch.context() as m, _Called(), _Carried():
        m.setattr(torch, 'Generator', _Generator)
        m.setattr(torch, 'autocast', _Autocast)
        m.setattr(train, 'make_accelerator', make_accelerator)
        m.setattr(
            train,
            'save_checkpoint',
            lambda folder, step, state: save(folder, step, home(state)),
        )
        m.setattr(
            train,
            'load_checkpoint',
            lambda folder, where, *_: tree_map_only(
                torch.Tensor, lambda o: o.to(FAR), runs.load_checkpoint(folder)
            ),
        )
        yield
