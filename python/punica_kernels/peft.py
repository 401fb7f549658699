"""PEFT's mixed batches through `add_lora`: one line for a PeftModel with several LoRA adapters.

    model = punica_kernels.peft.accelerate(model)
    model.generate(**inputs, adapter_names=["pirate", "__base__", "sql"])

Every LoRA layer is made an instance of a subclass that computes `adapter_names` in its own way and inherits the rest.
The weights stay PEFT's parameters: `add_lora` gets their addresses, in tables. Nothing is copied, so what changes in
place is seen; what moves is noticed, for every call compares where the weights lie with what its tables say.

What runs PEFT's own path is said in docs/peft.md, and once in a warning when it happens.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar

import peft.tuners.lora.model
import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear, LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn
from torch._C import is_grad_enabled

from ._dispatch import PLAIN, is_intercepted
from ._settings import has_cuda
from .lora import MAX_RANK, add_lora
from .lora_batch import LoraBatch

BASE = "__base__"  # PEFT's name for rows without an adapter
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OWN_PATH = "PEFT's own path is used where "
_MAX_BATCHES = 64  # kept, by names and tokens a sample; the oldest goes

# How PEFT hands adapter_names to the layers of a model.
_names_hook = getattr(peft.tuners.lora.model, "_adapter_names_pre_forward_hook", None)

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, cast_adapters: bool = False) -> Model:
    """Lets the mixed batches of a PEFT model run through this library's kernels, in place. Inference only.

    Calls without `adapter_names`, merged and disabled adapters, training, and whatever needs gradients run as before.
    Adapters may be loaded, changed, moved and deleted afterwards.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers in it.
        cast_adapters: gives LoRA weights of another type, now and when adapters are loaded later, the type of their
            base layer, for good (`restore` does not bring the lost digits back). PEFT loads adapters in float32 on a
            bfloat16 or float16 base, unless told `autocast_adapter_dtype=False`. Such layers are computed in float32,
            as PEFT does it, in more steps and from twice the memory.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("punica_kernels.peft.accelerate: the model has no LoRA layers of PEFT")
    shared = next((layer._mixed.shared for layer in layers if isinstance(layer, MixedLinear)), _Shared())
    shared.cast_adapters = cast_adapters
    module: Any
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = MixedLoraModel
            module._mixed_shared = shared
    _take(layers, shared)
    others = {type(layer).__name__ for layer in layers if not isinstance(layer, MixedLinear)}
    if others:
        shared.warn(f"layers of other kinds than lora.Linear ({', '.join(sorted(others))}) run PEFT's own path")
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in place; returns the same model."""
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.__class__ = Linear
            del module._mixed
        elif isinstance(module, MixedLoraModel):
            module.__class__ = LoraModel
            del module._mixed_shared
    return model


class MixedLoraModel(LoraModel):  # type: ignore[misc]
    """A LoraModel whose new layers are taken over as they come."""

    _mixed_shared: "_Shared"

    def _get_name(self) -> str:
        return "LoraModel"

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        _take(self.modules(), self._mixed_shared)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._mixed_shared.slots = _Slots(self.peft_config)  # or names would pile up where adapters come and go
        for module in self.modules():
            if isinstance(module, MixedLinear):  # lets go of the weights
                module._mixed.tables = module._mixed.tables._replace(seen=None)


class MixedLinear(Linear):  # type: ignore[misc]
    """A LoRA layer of PEFT, with this library's kernels for mixed batches."""

    _mixed: "_OfLayer"

    def _get_name(self) -> str:
        return "Linear"  # PEFT tells layers apart by what they print

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        # Kept beside the hooks: a module that has any takes the long way through its call.
        if type(hook) is partial and hook.func is _names_hook:
            return _Given(self._mixed.given, hook.keywords["adapter_names"])
        return super().register_forward_pre_hook(hook, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = self._mixed.given
        if given:
            kwargs["adapter_names"] = given[-1].names
        names = kwargs.get("adapter_names")
        if names is None or self.merged or self.disable_adapters or len(x) != len(names) or any(self.use_dora.values()):
            result: Tensor = super().forward(x, *args, **kwargs)  # which also says what is wrong
            return result
        return self._mixed_batch_forward(x, *args, **kwargs)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        ready = None if is_intercepted() or type(x) is not Tensor else self._mixed.prepare(self, x, adapter_names)
        result: Tensor
        if ready is None:
            result = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
            return result
        for name in VARIANT_KWARG_KEYS:
            kwargs.pop(name, None)
        result = self._modules["base_layer"](x, *args, **kwargs)
        if result.shape[-1] != self.out_features:  # the kernels know addresses only
            raise RuntimeError(f"punica_kernels.peft: the base layer gave {result.shape[-1]}, not {self.out_features}")
        y = result.reshape(-1, result.shape[-1])  # nearly always a view
        x = x.reshape(-1, x.shape[-1])
        batch, tables = ready
        for table in tables:
            if not table.names.isdisjoint(batch.names):
                _add(y, x, table, batch.rows)
        return y.view(result.shape)


class _Given:
    """Adapter names that a layer has been told, until they are removed; the last ones count, as with hooks."""

    def __init__(self, all_given: list["_Given"], names: list[str]):
        self.names, self._all = names, all_given
        all_given.append(self)

    def remove(self) -> None:
        if self in self._all:
            self._all.remove(self)


def _add(y: Tensor, x: Tensor, table: "_Table", rows: LoraBatch) -> None:
    """`add_lora`, in the type of the adapters, as PEFT does it."""
    target = y
    if y.dtype != table.dtype:
        wider = table.dtype == torch.float32 and y.dtype in DTYPES
        target = y.to(table.dtype) if wider else torch.zeros_like(y, dtype=table.dtype)
    add_lora(
        target, x.to(table.dtype), table.a_ptr, table.b_ptr, table.ranks, table.scales, rows, 0, max_rank=table.max_rank
    )
    if target is not y and wider:
        y.copy_(target)
    elif target is not y:
        y.add_(target)


def _take(modules: Iterable[nn.Module], shared: "_Shared") -> None:
    module: Any
    for module in modules:
        if type(module) is Linear:
            module.__class__ = MixedLinear
            module._mixed = _OfLayer(shared)
        if isinstance(module, MixedLinear):
            shared.know(module)
            if shared.cast_adapters:
                _cast(module)


def _cast(layer: MixedLinear) -> None:
    dtype = layer.get_base_layer().weight.dtype
    for module in (*layer.lora_A.values(), *layer.lora_B.values()):
        if dtype in DTYPES and module.weight.dtype in DTYPES and module.weight.dtype != dtype:
            module.weight.data = module.weight.data.to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What the layers of a model share: numbers for the adapters, and batches.


class _Batch(NamedTuple):
    rows: LoraBatch
    names: frozenset[str]
    stream: int  # on which it was filled; in the order of that stream it may be read, and freed


class _Slots:
    """A number for each adapter. It never changes; other adapters make another one, and then all tables anew."""

    def __init__(self, names: Iterable[str]):
        self.index = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self._batches: dict[tuple[Any, ...], _Batch] = {}

    def batch(self, names: Sequence[str], rows_each: int, device: torch.device, capturing: bool) -> _Batch:
        """The batch for these names, rows_each rows for each. Decoding asks for the same one at every step."""
        key = (rows_each, device, *names)
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        found = self._batches.get(key)
        if found is not None and (found.stream == stream or capturing):
            return found
        if capturing:
            raise _not_in_capture()
        # A name without a number is no adapter of any layer that uses these slots.
        indices = torch.tensor([self.index.get(name, -1) for name in names], dtype=torch.int32)
        if device.type == "cuda":
            indices = indices.pin_memory().to(device, non_blocking=True)
        rows = LoraBatch(indices[:, None].expand(-1, rows_each).reshape(-1), len(self.index))
        if len(self._batches) >= _MAX_BATCHES:
            self._batches.pop(next(iter(self._batches)), None)
        self._batches[key] = batch = _Batch(rows, frozenset(names), stream)
        return batch


class _Shared:
    def __init__(self, cast_adapters: bool = False):
        self.cast_adapters = cast_adapters
        self.slots = _Slots(())
        self.captured: dict[int, object] = {}  # what graphs read by address, for as long as the model lives
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # copies of the model find out for themselves
        return _Shared, (self.cast_adapters,)

    def know(self, layer: MixedLinear) -> None:
        if not self.slots.index.keys() >= layer.lora_A.keys():
            self.slots = _Slots((*self.slots.index, *layer.lora_A))

    def warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"punica_kernels.peft: {reason}", UserWarning, stacklevel=2)


def _not_in_capture() -> RuntimeError:
    return RuntimeError(
        "punica_kernels.peft: before a CUDA graph is captured, run the model once with the same adapter_names and sizes"
    )


# ----------------------------------------------------------------------------------------------------------------------
# What a layer knows of its adapters.


class _Table(NamedTuple):
    """The arguments of `add_lora` for the adapters of one data type."""

    dtype: torch.dtype
    names: frozenset[str]
    a_ptr: Tensor  # int64 [1, slots]
    b_ptr: Tensor
    ranks: Tensor  # int32 [slots]
    scales: Tensor  # float32 [slots]
    max_rank: int


class _Tables(NamedTuple):
    slots: _Slots
    seen: "_Seen | None"
    device: torch.device | None
    groups: tuple[_Table, ...]
    refused: dict[str, str]  # adapter -> why its rows run PEFT's path


class _OfLayer:
    def __init__(self, shared: _Shared):
        self.shared = shared
        self.tables = _Tables(shared.slots, None, None, (), {})
        self.given: list[_Given] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _OfLayer, (self.shared,)

    def prepare(self, layer: MixedLinear, x: Tensor, names: Sequence[str]) -> tuple[_Batch, tuple[_Table, ...]] | None:
        """The batch and the tables; None for PEFT's path."""
        device = x.device
        if is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
            self.shared.warn(_OWN_PATH + "gradients are required, and there is no backward; use torch.no_grad()")
            return None
        if device.type != "cpu" and not (device.type == "cuda" and has_cuda()):
            self.shared.warn(_OWN_PATH + f"there are no kernels for {device.type} in this build")
            return None
        if x.numel() == 0 or x.shape[-1] != layer.in_features:
            return None
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        tables = self.tables
        if tables.seen is None or tables.slots is not self.shared.slots or not tables.seen.is_current(layer):
            if capturing:
                raise _not_in_capture()
            tables = self._renew(layer)
        rows_each = x.numel() // (x.shape[-1] * len(names))
        batch = tables.slots.batch(names, rows_each, device, capturing)
        if tables.refused and not tables.refused.keys().isdisjoint(batch.names):
            why = next(why for name, why in tables.refused.items() if name in batch.names)
            self.shared.warn(_OWN_PATH + why)
            return None
        if tables.groups and tables.device != device:
            return None  # torch says what is wrong
        if capturing:
            self.shared.captured[id(batch)] = batch
            self.shared.captured[id(tables)] = tables
        return batch, tables.groups

    def _renew(self, layer: MixedLinear) -> _Tables:
        shared = self.shared
        if shared.cast_adapters:
            _cast(layer)
        shared.know(layer)
        slots, refused = shared.slots, {}
        device: torch.device | None = None
        by_dtype: dict[torch.dtype, dict[str, tuple[int, int, int, float]]] = {}
        for name, a in layer.lora_A.items():
            b = layer.lora_B._modules.get(name)
            why = _why_not(layer, name, a, b)
            if why is None and device not in (None, a.weight.device):
                why = "adapters of one layer are on different devices"
            if why is not None:
                refused[name] = why
                continue
            device = a.weight.device
            entry = (a.weight.data_ptr(), b.weight.data_ptr(), len(a.weight), layer.scaling[name])
            by_dtype.setdefault(a.weight.dtype, {})[name] = entry
        if device is not None and device.type == "cuda" and self.tables.groups:
            torch.cuda.synchronize(device)  # kernels on any stream may still read the old tables
        groups = tuple(_make_table(dtype, of, slots, device) for dtype, of in by_dtype.items())
        self.tables = _Tables(slots, _Seen(layer), device, groups, refused)
        return self.tables


class _Seen:
    """What the tables of a layer were made from: that the weights lie where they lay, in the same form.

    Contents are not in it: they are read where they are. `is_current` is asked once a layer and step, when all that it
    looks at has left the processor's caches: so it follows as few objects as it can, in loops that run in C, and no
    attribute of a module that would go through its __getattr__.
    """

    __slots__ = ("adapters", "facts", "parameters", "present", "training", "training_now", "weights")

    def __init__(self, layer: MixedLinear):
        modules = layer._modules
        a, b, dropouts = (modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
        self.adapters = [dict(of) for of in (a, b, dropouts, layer.scaling, layer.lora_bias, layer.lora_variant)]
        self.training_now = [module for module in dropouts.values() if type(module) is not nn.Identity]
        self.training = [module.training for module in self.training_now]
        self.parameters = [module._parameters for module in (*a.values(), *b.values())]
        self.weights = [parameters.get("weight") for parameters in self.parameters]
        self.present = [weight for weight in self.weights if weight is not None]
        self.facts = _facts(self.present)

    def is_current(self, layer: MixedLinear) -> bool:
        modules = layer._modules
        a, b, dropouts, scaling, biases, variants = self.adapters
        return (
            modules["lora_A"]._modules == a
            and modules["lora_B"]._modules == b
            and modules["lora_dropout"]._modules == dropouts
            and layer.scaling == scaling
            and layer.lora_bias == biases
            and layer.lora_variant == variants
            and all(map(is_, [parameters.get("weight") for parameters in self.parameters], self.weights))
            and [module.training for module in self.training_now] == self.training
            and _facts(self.present) == self.facts
        )


def _facts(weights: list[Any]) -> list[Any]:
    return [
        *map(Tensor.data_ptr, weights),
        *map(Tensor.is_contiguous, weights),
        *map(attrgetter("nbytes"), weights),
        *map(attrgetter("dtype"), weights),
    ]


def _why_not(layer: MixedLinear, name: str, a: Any, b: Any) -> str | None:
    """Why `y += scale * B (A x)`, from the addresses of A and B, is not all of this adapter."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"an adapter ({name}) is of a variant of LoRA ({type(variant).__name__})"
    if layer.lora_bias.get(name):
        return f"an adapter ({name}) has lora_bias"
    if getattr(layer.get_base_layer(), "_hf_device_mesh", None) is not None:
        return "the base layer is tensor-parallel"
    dropout = layer.lora_dropout._modules.get(name)
    if dropout is not None and dropout.training and type(dropout) is not nn.Identity:
        return f"the dropout of an adapter ({name}) is in training mode"
    if not isinstance(layer.scaling.get(name), (int, float)):
        return f"the scaling of an adapter ({name}) is not a number"
    module: Any
    for module in (a, b):
        if type(module) is not nn.Linear or "forward" in vars(module) or module._parameters.get("weight") is None:
            return f"A or B of an adapter ({name}) is not a plain Linear"
        if module._parameters.get("bias") is not None:
            return f"an adapter ({name}) has lora_bias"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"A or B of an adapter ({name}) has hooks"
        weight = module.weight
        if type(weight) not in PLAIN or weight.dtype not in DTYPES:
            return f"A or B of an adapter ({name}) is quantised or of another type than float16, bfloat16 or float32"
        if not weight.is_contiguous():
            return f"A or B of an adapter ({name}) is not contiguous"
        if weight.data_ptr() == 0:
            return f"A or B of an adapter ({name}) is not in memory (offloaded)"
    rank = len(a.weight)
    if a.weight.shape != (rank, layer.in_features) or b.weight.shape != (layer.out_features, rank):
        return f"A and B of an adapter ({name}) don't have the shapes for their layer"
    if a.weight.dtype != b.weight.dtype or a.weight.device != b.weight.device:
        return f"A and B of an adapter ({name}) differ in data type or device"
    if a.weight.is_cuda and rank > MAX_RANK:
        return f"an adapter ({name}) has a rank above {MAX_RANK}"
    return None


def _make_table(
    dtype: torch.dtype, adapters: dict[str, tuple[int, int, int, float]], slots: _Slots, device: torch.device | None
) -> _Table:
    count = len(slots.index)
    half = (count + 1) // 2
    host = torch.zeros(2 * (count + half), dtype=torch.int64)  # one block, one copy

    def views(memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranks, scales = memory[2 * count :].view(2, half)
        pointers = memory[: 2 * count].view(2, 1, count)
        return pointers[0], pointers[1], ranks.view(torch.int32)[:count], scales.view(torch.float32)[:count]

    a_ptr, b_ptr, ranks, scales = views(host)
    for name, entry in adapters.items():
        i = slots.index[name]
        a_ptr[0, i], b_ptr[0, i], ranks[i], scales[i] = entry
    max_rank = max(8, 1 << (max(entry[2] for entry in adapters.values()) - 1).bit_length())
    # The copy is over when `to` returns, so whatever stream reads the table comes later.
    return _Table(dtype, frozenset(adapters), *views(host.to(device)), max_rank)
