"""A CUDA device that is not there: tensors that say they are on cuda:0 and keep their values in ordinary memory.

Python takes the branches that it takes on a GPU; every operator is looked at, then computed on the CPU. What a GPU
refuses is an error here too: operators that mix devices, `.numpy()` of a CUDA tensor, pinning a tensor whose elements
share memory, waiting for the device while a CUDA graph is captured. Kernels, and the places where the host waits, are
counted.

    with pretend_cuda() as log:
        ...  # torch.device("cuda") works
    log.kernels, log.waits

Where only deterministic algorithms are allowed, an operator that has none is an error, as are products without the
setting of cuBLAS that makes them so.

Not imitated: cuDNN, NCCL, rounding, speed, kernels that run beside each other, and whatever C++ decides by `is_cuda`:
to C++ the tensors are on "meta".
"""

import linecache
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
ROOM = 80 * 2**30  # bytes free on the device, unless told otherwise
ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
_GROUP = torch._C._group_tensors_by_device_and_dtype

# Operators of which the host has to know the shape or value of the result.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.repeat_interleave,
    aten.bincount,
}
# Kernels that an operator is on CUDA where it is not one, read from PyTorch's sources; what only makes a view has none.
KERNELS = {
    "_native_batch_norm_legit": 3,
    "native_batch_norm": 3,
    "native_batch_norm_backward": 3,
    "native_layer_norm_backward": 3,
    "convolution_backward": 3,
    "nonzero": 4,
    "sort": 4,
    "_unique2": 8,
    **dict.fromkeys(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"), 0),
    **dict.fromkeys(("detach", "alias", "lift_fresh", "is_same_size", "set_"), 0),
}
# Of what may be used here, what has no deterministic algorithm on CUDA (torch.use_deterministic_algorithms); `cumsum` of
# floating-point numbers alone.
VARIES = {
    aten.cumsum,
    aten.put_,
    aten.histc,
    aten.kthvalue,
    aten.nll_loss2d_forward,
    aten.upsample_linear1d_backward,
    aten._embedding_bag,
    aten.scatter_reduce,
}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# What takes a number in the host's memory neither, as most operators do.
NO_NUMBERS = {
    aten.cat,
    aten.stack,
    aten.addmm,
    aten.mm,
    aten.bmm,
    aten.index_select,
    aten.gather,
    aten.scatter,
    aten.scatter_add_,
    aten.index_add_,
}


@dataclass
class Log:
    """What the device was asked for.

    Attributes:
        kernels: how many were launched, by operator.
        waits: how often the host waited for the device, by the repository's line of code and the reason.
        replays: of CUDA graphs.
        sent: bytes that went to the device, by type.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    sent: Counter[torch.dtype] = field(default_factory=Counter)

    def clear(self) -> None:
        """Forgets all."""
        self.kernels.clear()
        self.waits.clear()
        self.sent.clear()
        self.replays = 0


@contextmanager
def pretend_cuda(free: int = ROOM, kept: int = 0) -> Iterator[Log]:
    """Makes `torch.device("cuda")` work, with so many bytes free, and more that PyTorch keeps for tensors to come."""
    global _device
    log = Log()
    settings = _settings()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    replaced = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda device=None: "pretended",
            "mem_get_info": lambda device=None: (free, free),
            "memory_reserved": lambda device=None: kept,
            "memory_allocated": lambda device=None: 0,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: None,
            "_lazy_init": lambda: None,
            "CUDAGraph": PretendGraph,
            "graph": _capture,
            "is_current_stream_capturing": lambda: _device.graph is not None,
            "Stream": lambda *args, **kwargs: mock.MagicMock(),
            "current_stream": lambda device=None: mock.MagicMock(),
            "stream": lambda stream: nullcontext(),
        },
        torch.accelerator: {
            "is_available": lambda: True,
            "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
            "current_device_index": lambda: 0,
            "set_device_index": lambda index: None,
        },
        torch.optim.Optimizer: dict.fromkeys(  # the name differs between versions
            ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"), _check_capturable
        ),
        torch.backends.cudnn: {"is_acceptable": lambda tensor: False},
        torch._C: {"_group_tensors_by_device_and_dtype": _group},
        Tensor: {"pin_memory": _pin},
    }
    with ExitStack() as stack:
        for owner, values in replaced.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.callback(_set, settings)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_HideCuda())
        _device = stack.enter_context(_Device(log))
        try:
            yield log
        finally:
            _device = _Device(Log())  # for tensors that live on


def _settings() -> tuple[bool, ...]:
    """What a script may set for the whole process."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


def _set(settings: tuple[bool, ...]) -> None:
    torch.use_deterministic_algorithms(settings[0])
    torch.utils.deterministic.fill_uninitialized_memory = settings[1]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = settings[2:]


class PretendTensor(Tensor):
    """A tensor on cuda:0, whose values are those of `values`, in the host's memory."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=META,
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _device.run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: int) -> Any:
        """A file gets the values, as those of a CUDA tensor that is read with map_location="cpu"."""
        return self.values.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> "PretendTensor":
        return PretendTensor(self.values.clone())

    def __repr__(self) -> str:
        return f"{self.values!r} on {CUDA}"

    def tolist(self) -> Any:
        return self.to(CPU).tolist()

    def cpu(self) -> Tensor:
        return self.to(CPU)

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy


class PretendGraph:
    """`torch.cuda.CUDAGraph`: a capture carries nothing out; `replay` does, with the same memory and numbers."""

    def __init__(self) -> None:
        self.tape: list[tuple[OpOverload, tuple, dict[str, Any], Any]] = []
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: set[int] = set()
        self._random = torch.get_rng_state()

    def save(self, written: Sequence[Tensor]) -> None:
        """Keeps what stands, before the capture, in memory that an operator is going to write to."""
        for storage in (x.untyped_storage() for x in written):
            key = storage.data_ptr()
            if key not in self._made and key not in self._saved:
                self._saved[key] = storage, storage.clone()

    def record(self, func: OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Notes an operator with its plain arguments and result, which thereby keep their memory."""
        self.tape.append((func, args, kwargs, out))
        if _makes_new(func):
            self._made |= {x.untyped_storage().data_ptr() for x in _tensors(out)}

    def end(self) -> None:
        """Undoes what computing the results during the capture has written, and drawn."""
        torch.set_rng_state(self._random)
        for storage, before in self._saved.values():
            storage.copy_(before)
        self._saved.clear()

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes():
            for func, args, kwargs, out in self.tape:
                again = func(*args, **kwargs)
                if _makes_new(func) and "empty" not in _name(func):
                    for x, new in zip(_tensors(out), _tensors(again), strict=True):
                        x.copy_(new)
        _device.log.replays += 1

    def reset(self) -> None:
        self.tape.clear()


@contextmanager
def _capture(graph: PretendGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    _device.graph, graph._random = graph, torch.get_rng_state()
    try:
        yield
    finally:
        _device.graph = None
        graph.end()


class _HideCuda(TorchFunctionMode):
    """Says "meta" to C++, which may be built without CUDA, wherever Python says "cuda"."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.new_tensor and isinstance(args[0], PretendTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(META)
        if func is torch._VF.gru and any(isinstance(x, PretendTensor) for x in args):
            return _gru(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):
                del kwargs["device"]
                return func(*args, **kwargs).to(META)
            kwargs["device"] = META
        return func(*(META if _is_cuda(x) else x for x in args), **kwargs)


class _Device(TorchDispatchMode):
    """Computes operators on `PretendTensor`s, after a look at what they mean for a GPU."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log, self.graph = log, None

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Checks, counts and computes an operator."""
        device = kwargs.get("device")
        onto = device is not None and torch.device(device).type in ("cuda", "meta")
        if not onto and not any(isinstance(x, PretendTensor) for x in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        self._check(func, args, kwargs, onto)
        written = _written(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(PretendTensor, _plain, (args, kwargs))
        if onto:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if self.graph is not None:
            self.graph.save([_plain(x) for x in written])
        out = func(*args, **kwargs)
        kernels = KERNELS.get(_name(func), 1)
        self.log.kernels[_name(func)] += kernels if _makes_new(func) or func._schema.is_mutable else 0
        if self.graph is not None:
            self.graph.record(func, args, kwargs, out)
        if func._schema.is_mutable and func._schema.returns:  # in place, or out=
            same = [next(x for x in written if _is_same(_plain(x), result)) for result in _tensors(out)]
            if any(x.shape != _plain(x).shape for x in written):
                raise NotImplementedError(f"{func} resized a tensor")
            return type(out)(same) if isinstance(out, (tuple, list)) else same[0]
        if func.overloadpacket is aten._pack_padded_sequence:  # whose second result is in the host's memory
            return PretendTensor(out[0]), out[1]
        if onto or device is None:
            return pytree.tree_map_only(Tensor, PretendTensor, out)
        return out

    def _wait(self, why: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why} in {_place()}")
        self.log.waits[f"{_place()} ({why})"] += 1

    def _check(self, func: OpOverload, args: tuple, kwargs: dict[str, Any], onto: bool) -> None:
        """Raises what a GPU would, and notes where the host waits."""
        packet = func.overloadpacket
        if torch.are_deterministic_algorithms_enabled():
            floats = packet is not aten.cumsum or args[0].is_floating_point()
            if packet in VARIES and floats:
                raise RuntimeError(f"{func} does not have a deterministic implementation: {_place()}")
            if packet in PRODUCTS and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                raise RuntimeError(f"Deterministic behavior was enabled, but {func} uses CuBLAS: {_place()}")
        if packet is aten.copy_:
            self._check_copy(args[1], isinstance(args[0], PretendTensor), len(args) > 2 and args[2])
        elif packet is aten._to_copy:
            goes = onto if kwargs.get("device") is not None else isinstance(args[0], PretendTensor)
            self._check_copy(args[0], goes, kwargs.get("non_blocking", False))
        elif packet in INDEXING and isinstance(args[0], PretendTensor):
            self._check_index(func, args)
        elif packet is aten._pack_padded_sequence:
            if isinstance(args[1], PretendTensor):
                raise RuntimeError(f"'lengths' argument should be a 1D CPU int64 tensor, but is on {CUDA}")
        else:
            if packet in WAITS:
                self._wait(packet.__name__)
            written = {id(x) for x in _written(func, args, kwargs)}
            for x in _tensors((args, kwargs)):
                mixed = x.dim() > 0 or id(x) in written or packet in NO_NUMBERS
                if mixed and not isinstance(x, PretendTensor):
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but found {CUDA} and cpu: {func} in {_place()}"
                    )

    def _check_copy(self, source: Tensor, onto: bool, non_blocking: bool) -> None:
        if isinstance(source, PretendTensor) and not onto:
            self._wait("copy to the host")
        elif onto and not isinstance(source, PretendTensor):
            self.log.sent[source.dtype] += source.numel() * source.element_size()
            if not non_blocking:
                self._wait("blocking copy to the device")
            elif not getattr(source, "pretends_pinned", False):
                self._wait("copy of pageable memory to the device")

    def _check_index(self, func: OpOverload, args: tuple) -> None:
        indices = [x for x in args[1] if x is not None]
        writes = func.overloadpacket is not aten.index
        fills = writes and args[2].numel() == 1  # with one number, which needs no list of places
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not fills:
            self._wait("boolean index")
        if not all(isinstance(x, PretendTensor) for x in indices):
            self._wait("index in the host's memory")
        if writes and not isinstance(args[2], PretendTensor) and args[2].dim() > 0:
            raise RuntimeError(f"{func}: values on the cpu, self on {CUDA} in {_place()}")


_device = _Device(Log())


def _pin(x: Tensor, device: Any = None) -> Tensor:
    """`Tensor.pin_memory`, which copies into memory with the same strides; here into ordinary memory."""
    if isinstance(x, PretendTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    n = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    storage = torch.UntypedStorage(n * x.element_size())
    pinned = torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
    pinned.copy_(x)
    pinned.pretends_pinned = True
    return pinned


def _group(lists: list[list[Tensor]], with_indices: bool = False) -> dict[tuple, Any]:
    """Tensors by device and type. Optimisers and means of weights choose by it what they do to many tensors at once."""
    groups = _GROUP(lists, with_indices)
    return {
        (CUDA if isinstance(found[0][0], PretendTensor) else device, dtype): (found, indices)
        for (device, dtype), (found, indices) in groups.items()
    }


def _check_capturable(optimizer: torch.optim.Optimizer) -> None:
    if _device.graph is not None and not all(group["capturable"] for group in optimizer.param_groups):
        raise RuntimeError("Attempting CUDA graph capture of step() but the optimizer is not capturable")


def _gru(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """A layer in one direction, of (x, hx, weights, ...) or, if packed, (x, batch_sizes, hx, weights, ...)."""
    packed = isinstance(args[1], Tensor)
    sizes, hx, (w_ih, w_hh, b_ih, b_hh) = args[:3] if packed else (None, *args[:2])
    dates = linear(x, w_ih, b_ih)
    dates = dates.split(sizes.tolist()) if packed else dates.unbind(1)
    state, outputs = hx[0], []
    for date in dates:
        earlier = state[: len(date)]
        r_x, z_x, n_x = date.chunk(3, 1)
        r_h, z_h, n_h = linear(earlier, w_hh, b_hh).chunk(3, 1)
        z = torch.sigmoid(z_x + z_h)
        new = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * earlier
        state = torch.cat([new, state[len(date) :]])
        outputs.append(new)
    return torch.cat(outputs) if packed else torch.stack(outputs, 1), state.unsqueeze(0)


def _is_cuda(x: Any) -> bool:
    return isinstance(x, (str, torch.device)) and str(x).split(":")[0] == "cuda"


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _plain(x: Tensor) -> Tensor:
    return x.values if isinstance(x, PretendTensor) else x


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def _name(func: OpOverload) -> str:
    return func.overloadpacket.__name__


def _makes_new(func: OpOverload) -> bool:
    """Whether results are in memory of their own: neither written in place nor views."""
    return not func._schema.is_mutable and all(x.alias_info is None for x in func._schema.returns)


def _written(func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that an operator writes to."""
    if _name(func) == "native_batch_norm":  # whose schema does not say so: running mean and variance
        return _tensors(args[3:5])
    by_name = dict(zip((x.name for x in func._schema.arguments), args)) | kwargs
    writes = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    return _tensors([by_name.get(name) for name in writes])


def _place() -> str:
    """The innermost line of the repository's own code, with its function: "dataset.py batch: items = ..."."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and "site-packages" not in name and name != __file__:
            line = linecache.getline(name, frame.f_lineno).strip()
            return f"{Path(name).relative_to(ROOT)} {frame.f_code.co_qualname}: {line}"
        frame = frame.f_back
    return "code of others"
