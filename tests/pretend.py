"""A GPU that is not there.

Its tensors say that they are on cuda:0, compute on the CPU with real numbers, and refuse what CUDA
refuses: tensors of two devices in one operation, `.numpy()`, a generator of the other side. Every
time the host would have to wait is counted, by kind and by file and line. `torch.autocast('cuda')`
follows the lists that torch publishes; gsplat is replaced by our rasterizer behind gsplat's own
signature. Kernels, their numerics and streams cannot be seen from here.

    with pretend_cuda() as gpu:
        x = torch.ones(3, device='cuda')
        with gpu.watch() as seen:
            x.sum().item()
    assert seen.waits == {('item', 'a_file.py:12 a_function'): 1}
"""

import contextlib
import functools
import inspect
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gsplat
import gsplat.cuda
import torch
import torch._dynamo  # some functions import it when first called; it must not see replaced ones
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device('cuda:0')
META = torch.device('meta')  # what torch's C++ side is told: it needs no driver
HERE = __file__


@dataclass
class Seen:
    "What happened while somebody watched."

    waits: Counter = field(default_factory=Counter)  # (kind, place) -> how often the host waited
    launches: Counter = field(default_factory=Counter)  # operation -> how often
    gsplat: Counter = field(default_factory=Counter)  # place -> calls; each waits once by itself

    def of(self, *files):
        "Waits whose place is in one of these files."
        return sum(n for (_, place), n in self.waits.items() if place.startswith(files))


_watching = [Seen()]
_silent = [False]


@contextlib.contextmanager
def watch():
    "Count what happens inside."
    _watching.append(Seen())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


@contextlib.contextmanager
def _unseen():
    "Our own work in gsplat's place is nobody's wait."
    _silent.append(True)
    try:
        yield
    finally:
        _silent.pop()


def place():
    "The nearest line of the package, of a page or of a test that led here."
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        ours = 'spatialavatar0' in name or '<ipython' in name or '/tests/' in name
        if ours and name != HERE and 'site-packages' not in name:
            return f'{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}'
        frame = frame.f_back
    return 'backward'


def _wait(kind):
    if not _silent[-1]:
        _watching[-1].waits[kind, place()] += 1


def _mixed(what):
    return RuntimeError(
        'Expected all tensors to be on the same device, but found at least two devices, cuda:0 '
        f'and cpu! [{what}] at {place()}'
    )


# ------------------------------------------------------------------------------------- the tensor


class OnGpu(torch.Tensor):
    "A CPU tensor that says it is on cuda:0."

    @staticmethod
    def __new__(cls, inner):
        assert type(inner) is not OnGpu and inner.device.type == 'cpu', inner.device
        how = dict(dtype=inner.dtype, layout=inner.layout, device=META, requires_grad=False)
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), 0, **how)
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f'OnGpu({self.inner!r})'

    def get_device(self):
        return 0

    def numpy(self, **_):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            f'tensor to host memory first. At {place()}'
        )

    def __array__(self, *_, **__):
        return self.numpy()

    def tolist(self):
        return self.cpu().tolist()

    def cpu(self):
        return self.to('cpu')

    def cuda(self, *_, **__):
        return self

    def pin_memory(self, *_):
        raise RuntimeError(f"cannot pin 'torch.cuda.FloatTensor' at {place()}")

    def is_pinned(self):
        return False

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = _torch_tensor(data, dtype=dtype or self.dtype)
        return made.to(device or 'cuda').requires_grad_(requires_grad)

    def __deepcopy__(self, memo):
        with torch.no_grad():
            copy = OnGpu(self.inner.detach().clone())
        return copy.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        raise RuntimeError('a tensor of a GPU that is not there cannot be pickled')


def _inner(x):
    return x.inner if isinstance(x, OnGpu) else x


def _outer(x):
    return OnGpu(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x


def _mapped(f, x):
    "f of every tensor in nested lists, tuples and dicts; torch's own takes twice as long."
    if isinstance(x, torch.Tensor):
        return f(x)
    if type(x) in (list, tuple):
        return type(x)(_mapped(f, item) for item in x)
    return {k: _mapped(f, item) for k, item in x.items()} if type(x) is dict else x


def _tensors(x, found):
    "All tensors in nested lists, tuples and dicts."
    if isinstance(x, torch.Tensor):
        found.append(x)
    elif type(x) in (list, tuple):
        for item in x:
            _tensors(item, found)
    elif type(x) is dict:
        _tensors(list(x.values()), found)
    return found


def _is_gpu(device):
    return device is not None and torch.device(device).type in ('cuda', 'meta')


# ------------------------------------------------------------------------- one operation of aten

_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
_WAITING = {  # operations whose answer, or whose size, the host must know
    aten._local_scalar_dense.default: 'item',
    aten.is_nonzero.default: 'item',
    aten.equal.default: 'equal',
    aten.nonzero.default: 'nonzero',
    aten.masked_select.default: 'mask',
    aten._unique2.default: 'unique',
    aten.unique_consecutive.default: 'unique',
    aten.unique_dim.default: 'unique',
    aten.repeat_interleave.Tensor: 'repeat_interleave',
    aten.bincount.default: 'bincount',
    aten._linalg_svd.default: 'svd',
    aten._linalg_eigh.default: 'eigh',
}


def _run(func, args, kwargs):
    "What CUDA would do with one operation."
    if func is aten._to_copy.default:
        return _copied(args[0], kwargs)
    if func is aten.copy_.default:
        return _copied_into(*args[:2], non_blocking=bool(args[2]) if len(args) > 2 else False)
    tensors = _tensors((args, kwargs), [])
    there = [x for x in tensors if isinstance(x, OnGpu)]
    device = kwargs.get('device')
    if not there and not _is_gpu(device):
        return func(*args, **kwargs)
    _need_own_generator(func, kwargs)
    if there:
        (_check_index if func in _INDEXING else _check_together)(func, args, tensors)
    if func in _WAITING:
        _wait(_WAITING[func])
    if not _silent[-1]:
        _watching[-1].launches[func.name()] += 1
    return _computed(func, args, kwargs, there, device)


def _computed(func, args, kwargs, there, device):
    "The CPU's answer, dressed as the GPU's; a tensor that was written into stays itself."
    kwargs = {k: v for k, v in kwargs.items() if k != 'pin_memory'}
    if _is_gpu(device):
        kwargs['device'] = torch.device('cpu')
    answer = func(*_mapped(_inner, args), **_mapped(_inner, kwargs))
    if device is not None and not _is_gpu(device):
        return answer
    known = {id(_inner(x)): x for x in there}
    return _mapped(lambda x: known.get(id(x)) if id(x) in known else _outer(x), answer)


def _copied(source, kwargs):
    "`.to(...)`: across devices, or to another type where it is."
    device = kwargs.get('device')
    apart = 'device', 'pin_memory', 'non_blocking'
    copy = aten._to_copy.default(
        _inner(source), **{k: v for k, v in kwargs.items() if k not in apart}
    )
    here = not isinstance(source, OnGpu)
    to_gpu = not here if device is None else _is_gpu(device)
    if to_gpu and here and not _flies(source, kwargs.get('non_blocking')):
        _wait('to the GPU')
    if not to_gpu and not here:
        _wait('from the GPU')
    return OnGpu(copy) if to_gpu else copy


def _copied_into(target, source, non_blocking):
    here, there = (not isinstance(x, OnGpu) for x in (source, target))
    if here and not there and not _flies(source, non_blocking):
        _wait('to the GPU')
    if there and not here:
        _wait('from the GPU')
    _inner(target).copy_(_inner(source))
    return target


def _flies(source, non_blocking):
    "A copy nobody waits for: out of pinned memory, and asked for."
    return bool(non_blocking) and getattr(source, 'pinned_', False)


def _need_own_generator(func, kwargs):
    generator = kwargs.get('generator')
    if generator is not None and generator.device.type != 'cuda':
        raise RuntimeError(
            "Expected a 'cuda' device type for generator but found 'cpu' "
            f'[{func.name()}] at {place()}'
        )


def _check_index(func, args, tensors):
    "x[i], x[i] = y: an index may come from the host, and is copied; a mask must be counted."
    target, indices = args[:2]
    indices = [i for i in indices if i is not None]
    if not isinstance(target, OnGpu) and any(isinstance(i, OnGpu) for i in indices):
        raise RuntimeError(
            'indices should be either on cpu or on the same device as the indexed tensor (cpu) '
            f'[{func.name()}] at {place()}'
        )
    for i in indices:
        if not isinstance(i, OnGpu):
            _wait('index to the GPU')
        if i.dtype in (torch.bool, torch.uint8):
            _wait('mask')
    values = args[2] if len(args) > 2 else None
    if isinstance(values, torch.Tensor) and not isinstance(values, OnGpu) and values.ndim:
        raise _mixed(func.name())


def _check_together(func, args, tensors):
    "All on one device; a number from the host may come along, but not into a fused kernel."
    strict = '_fused_' in func.name() or '_foreach_' in func.name()
    for x in tensors:
        if not isinstance(x, OnGpu) and (x.ndim or strict):
            raise _mixed(f'{func.name()} got {tuple(x.shape)} {x.dtype} on the cpu')


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


# ----------------------------------------------------------------------------------------- autocast

_TO_LOW = set(
    'conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul '
    '__matmul__ __rmatmul__ mm bmm addmm addbmm baddbmm mv einsum chain_matmul '
    'scaled_dot_product_attention multi_head_attention_forward'.split()
)
_TO_FULL = set(
    '__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin cosh cdist cosine_similarity cross_entropy '
    'cumprod cumsum dist erfinv exp expm1 group_norm kl_div l1_loss layer_norm log log10 '
    'log_softmax log1p log2 mse_loss nll_loss norm normalize pdist pow prod reciprocal rsqrt sinh '
    'smooth_l1_loss softmax softmin softplus sum renorm tan'.split()
)
_TO_WIDEST = set(
    'addcdiv addcmul atan2 bilinear cross dot grid_sample index_put scatter_add tensordot cat '
    'stack'.split()
)


class _Cast(TorchFunctionMode):
    "torch.autocast('cuda') by torch's published lists."

    def __init__(self, low):
        super().__init__()
        self.low = low

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = self._precision(getattr(func, '__name__', ''), _tensors((args, kwargs), []))
        if to is None:
            return func(*args, **kwargs)

        def cast(x):
            return x.to(to) if _is_castable(x) else x

        args, kwargs = _mapped(cast, args), _mapped(cast, kwargs)
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def _precision(self, name, tensors):
        if name in _TO_LOW:
            return self.low
        if name in _TO_FULL:
            return torch.float32
        wide = any(_is_castable(x) and x.dtype == torch.float32 for x in tensors)
        return torch.float32 if name in _TO_WIDEST and wide else None


def _is_castable(x):
    return isinstance(x, OnGpu) and x.is_floating_point() and x.dtype != torch.float64


_torch_autocast = torch.autocast


def _autocast(device_type, dtype=None, enabled=True, cache_enabled=None):
    if device_type != 'cuda':
        return _torch_autocast(device_type, dtype, enabled)
    return _Cast(dtype or torch.float16) if enabled else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------- gsplat

_gsplat_signature = inspect.signature(gsplat.rasterization)
_TENSORS = 'means', 'quats', 'scales', 'opacities', 'colors', 'viewmats', 'Ks', 'backgrounds'


class _Down(torch.autograd.Function):
    "From the GPU, unseen, forth and back."

    @staticmethod
    def forward(ctx, x):
        return x.inner.clone()

    @staticmethod
    def backward(ctx, grad):
        return OnGpu(grad)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner


def _gsplat_rasterization(*args, **kwargs):
    "gsplat's signature and its refusals; our rasterizer behind them."
    bound = _gsplat_signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tensors = {name: given[name] for name in _TENSORS}
    for name, x in tensors.items():
        _need_float32_there(name, x)
    if not _silent[-1]:
        _watching[-1].gsplat[place()] += 1
    from spatialavatar0.splats import renderers

    taken = 'width', 'height', 'near_plane', 'far_plane', 'eps2d', 'render_mode', 'absgrad'
    options = {name: given[name] for name in taken}
    with _unseen(), mock.patch.object(renderers, '_receipts', [], create=True):
        here = {name: x if x is None else _Down.apply(x) for name, x in tensors.items()}
        colors, alphas, meta = renderers.rasterize(**here, **options, backend='cpu')
        return _Up.apply(colors), _Up.apply(alphas), _meta_there(meta, options['absgrad'])


def _need_float32_there(name, x):
    if x is None:
        return
    if not isinstance(x, OnGpu):
        raise RuntimeError(f'{name} must be a CUDA tensor [gsplat.rasterization] at {place()}')
    if x.dtype != torch.float32:
        raise RuntimeError(
            f'expected scalar type Float but found {x.dtype} for {name} [gsplat.rasterization] '
            f'at {place()}'
        )


def _meta_there(meta, absgrad):
    "gsplat's notes; the gradient of means2d arrives there, as its users expect."
    here = meta['means2d']
    meta = {k: _Up.apply(x) if isinstance(x, torch.Tensor) else x for k, x in meta.items()}
    there = meta['means2d']
    if absgrad:
        there.absgrad = OnGpu(here.absgrad)
    if here.requires_grad:
        here.register_hook(lambda g: setattr(there, 'grad', OnGpu(g.detach().clone())))
    return meta


# ---------------------------------------------------------------------------- torch, as it is seen

_torch_tensor, _torch_as_tensor = torch.tensor, torch.as_tensor
_tensor_to = torch.Tensor.to


def _made_there(make):
    "torch.tensor and torch.as_tensor: their data come from the host."

    @functools.wraps(make)
    def made(data, *args, device=None, **kwargs):
        if isinstance(data, OnGpu) and make is _torch_as_tensor:
            return data.to(device=device or data.device, dtype=kwargs.get('dtype') or data.dtype)
        if not _is_gpu(device):
            return make(data, *args, device=device, **kwargs)
        wants = kwargs.pop('requires_grad', False)
        return make(data, *args, **kwargs).to('cuda').requires_grad_(wants)

    return made


def _to(self, *args, **kwargs):
    def known(x):
        return META if isinstance(x, (str, torch.device)) and _is_gpu(x) else x

    args = [known(x) for x in args]
    kwargs = {k: known(x) for k, x in kwargs.items()}
    return _tensor_to(self, *args, **kwargs)


def _pin_memory(self, *_):
    copy = self.clone()
    copy.pinned_ = True
    return copy


def _answer(value=None):
    return lambda *_, **__: value


GIB = 1 << 30
_CUDA_SAYS = dict(
    is_available=_answer(True),
    is_initialized=_answer(True),
    device_count=_answer(1),
    current_device=_answer(0),
    set_device=_answer(),
    get_device_name=_answer('a pretended GPU'),
    get_device_capability=_answer((9, 0)),
    mem_get_info=_answer((70 * GIB, 80 * GIB)),
    max_memory_allocated=_answer(GIB),
    reset_peak_memory_stats=_answer(),
    empty_cache=_answer(),
    is_bf16_supported=_answer(True),
    is_current_stream_capturing=_answer(False),
    manual_seed_all=_answer(),
    _lazy_init=_answer(),
)


_thread_run = threading.Thread.run


def _run_there(self):
    "A thread that begins while the GPU is there sees it, too: modes belong to one thread."
    with _Dispatch():
        _thread_run(self)


def _patches():
    "Everything that is replaced while the GPU is there."
    for name, value in _CUDA_SAYS.items():
        yield mock.patch.object(torch.cuda, name, value)
    yield mock.patch.object(torch.cuda, 'synchronize', lambda *_: _wait('synchronize'))
    yield mock.patch.object(threading.Thread, 'run', _run_there)
    yield mock.patch.object(torch.Tensor, 'to', _to)
    yield mock.patch.object(torch.Tensor, 'cuda', lambda self, *_, **__: _to(self, 'cuda'))
    yield mock.patch.object(torch.Tensor, 'pin_memory', _pin_memory)
    yield mock.patch.object(torch, 'tensor', _made_there(_torch_tensor))
    yield mock.patch.object(torch, 'as_tensor', _made_there(_torch_as_tensor))
    yield mock.patch.object(torch, 'autocast', _autocast)
    health = '_accelerator_graph_capture_health_check'
    yield mock.patch.object(torch.optim.Optimizer, health, lambda self: None)
    yield mock.patch.object(gsplat, 'rasterization', _gsplat_rasterization)


@contextlib.contextmanager
def _compiled_gsplat():
    "gsplat, compiled as far as anybody can tell: importing the real one compiles it, for minutes."
    name = 'gsplat.cuda._backend'
    before = sys.modules.get(name)
    sys.modules[name] = SimpleNamespace(_C=object())
    with mock.patch.object(gsplat.cuda, '_backend', sys.modules[name], create=True):
        yield
    del sys.modules[name]
    if before:
        sys.modules[name] = before


@contextlib.contextmanager
def _modules_move():
    "nn.Module.to puts new tensors in the place of its parameters."
    future = torch.__future__
    before = future.get_swap_module_params_on_conversion()
    overwrote = future.get_overwrite_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(False)
    future.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        future.set_swap_module_params_on_conversion(before)
        future.set_overwrite_module_params_on_conversion(overwrote)


@contextlib.contextmanager
def pretend_cuda():
    "A machine with one GPU, until the block ends."
    from spatialavatar0.splats.renderers import gsplat_max_alpha

    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(_compiled_gsplat())
        stack.enter_context(_modules_move())
        stack.callback(gsplat_max_alpha.cache_clear)
        stack.enter_context(_Dispatch())
        gsplat_max_alpha.cache_clear()
        yield sys.modules[__name__]
