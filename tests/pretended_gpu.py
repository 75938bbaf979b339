"""A GPU that isn't there: everything runs on the CPU, with tensors that claim to be on cuda.

To C++ they are CPU tensors, so autograd, autocast and all kernels are the real ones. To Python their class says cuda,
and a mode that sees every call of torch refuses what a GPU would refuse: tensors of two devices in one operation, a
generator of the CPU for draws on the GPU. It counts what makes a real GPU wait: results that the host reads (`reads`)
and tensors that go to the device (`copies`, also as an index), by line; `within` counts reads by every function of the
package that they happen in, directly or not.

What it can't know: memory, another rounding, and kernels that wait inside of themselves and aren't in WAITING.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

import crlhf
from crlhf.engine import recorded

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOTS = [Path(package.__file__).parent for package in (crlhf, transformers)]
PROPERTIES = {"device": CUDA, "is_cuda": True, "is_cpu": False}
READING = {"item", "tolist", "__int__", "__float__", "__bool__", "__index__", "__contains__", "__repr__"}
WAITING = READING | {"equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "masked_scatter"}
WAITING |= {"unique", "unique_consecutive", "bincount", "histc", "one_hot"}


class OnGPU(torch.Tensor):
    """A CPU tensor of this class claims to be on the GPU. The class is given and taken away; nothing is copied."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunction():
            return claim(self.detach().clone().requires_grad_(self.requires_grad), vars(self))

    def __reduce_ex__(self, protocol):  # `torch.save` asks for it
        with torch._C.DisableTorchFunction():
            return self.detach().as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else str(self), spec)


class GeneratorOnGPU(torch.Generator):
    device = CUDA

    def __new__(cls, device="cpu"):
        return super().__new__(cls if is_cuda(device) else torch._C.Generator, CPU)


def is_cuda(device):
    return torch.device(device).type == "cuda"


def is_here(value):
    return isinstance(value, OnGPU)


def claim(tensor, attributes=()):
    """From now on this very tensor claims to be on the GPU."""
    tensor.__class__ = OnGPU
    vars(tensor).update(attributes)
    return tensor


def tensors_in(value):
    """All tensors in nested lists, tuples, dicts and slices."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | slice):
        parts = (value.start, value.stop) if isinstance(value, slice) else value
        for part in parts.values() if isinstance(value, dict) else parts:
            yield from tensors_in(part)


class PretendedGPU(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.reads, self.copies, self.within = Counter(), Counter(), Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        tensors = list(tensors_in((args, kwargs)))
        here = any(map(is_here, tensors))
        if here and name in PROPERTIES:
            return PROPERTIES[name]
        if here and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in ("to", "cuda", "cpu"):
            return self.move(func, name, args, kwargs)
        stays = is_cuda(kwargs["device"]) if kwargs.get("device") is not None else here
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch._C.Generator) and isinstance(value, GeneratorOnGPU) != stays:
                raise RuntimeError(f"{name}: the generator is of {value.device}, but the tensor is not")
        if here or stays:
            kwargs |= {"device": CPU} if "device" in kwargs else {}
            self.check_mixing(name, args, tensors)
            self.count_waits(name, args, kwargs, tensors)
        result = func(*args, **kwargs)
        if stays and name not in ("copy_", *READING):  # copy_ returns its target, wherever that is
            for tensor in tensors_in(result):
                claim(tensor)
        return result

    def move(self, func, name, args, kwargs):
        """From one device to another a tensor is always copied."""
        tensor, target = args[0], {"to": is_here(args[0]), "cuda": True, "cpu": False}[name]
        for value in (*args[1:], *kwargs.values()) if name == "to" else ():
            if isinstance(value, str | torch.device | torch.Tensor):
                target = is_here(value) if isinstance(value, torch.Tensor) else is_cuda(value)
        args = [CPU if isinstance(value, str | torch.device) else value for value in args]
        kwargs |= {"device": CPU} if "device" in kwargs else {}
        result = func(*args, **kwargs) if name == "to" else tensor
        if target != is_here(tensor):
            if not (target and kwargs.get("non_blocking")):  # then the host goes on at once
                self.count(self.copies if target else self.reads, name)
            result = result.clone() if result is tensor else result
        return claim(result) if target else result

    def check_mixing(self, name, args, tensors):
        """A GPU takes single numbers from the host, and indices, which it copies; all else must be on one device."""
        strangers = [tensor for tensor in tensors if not is_here(tensor) and (tensor.dim() or name in ("stack", "cat"))]
        if name in ("__getitem__", "__setitem__"):
            strangers = [] if is_here(args[0]) else [index for index in tensors_in(args[1]) if is_here(index)]
        if strangers and name != "copy_" and any(map(is_here, tensors)):
            raise RuntimeError(f"{name}: expected all tensors on one device, but got cuda:0 and cpu")

    def count_waits(self, name, args, kwargs, tensors):
        """Count one call, if a GPU waits for it."""
        if name in WAITING or (name == "where" and len(tensors) == 1 and len(args) + len(kwargs) == 1):
            self.count(self.reads, name)
        elif name == "repeat_interleave" and len(tensors) > 1 and "output_size" not in kwargs:
            self.count(self.reads, name)
        elif name in ("tensor", "as_tensor") and not is_here(args[0]):
            is_empty = isinstance(args[0], list) and not args[0]
            self.count(Counter() if is_empty else self.reads if tensors else self.copies, name)
        elif name == "copy_" or (name == "__setitem__" and isinstance(args[2], torch.Tensor)):
            if is_here(args[0]) != is_here(args[-1]):
                self.count(self.copies if is_here(args[0]) else self.reads, name)
        if name in ("__getitem__", "__setitem__"):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                its = list(tensors_in(index))
                if any(is_here(tensor) and (tensor.dtype == torch.bool or tensor.dim() == 0) for tensor in its):
                    self.count(self.reads, name)  # which rows are wanted? how long is the slice?
                elif isinstance(index, list) or not all(map(is_here, its)):
                    self.count(self.copies, name)

    def count(self, counter, name):
        """One more, at the innermost line of this package or of transformers."""
        frame, places, functions = sys._getframe(), [], set()
        while frame:
            file, function = Path(frame.f_code.co_filename), frame.f_code.co_qualname
            for root in ROOTS:
                if file.is_relative_to(root):
                    places.append(f"{root.name}/{file.relative_to(root)}:{frame.f_lineno} {function}: {name}")
                    functions.add(function)
            frame = frame.f_back
        counter[places[0] if places else f"elsewhere: {name}"] += 1
        self.within.update(functions if counter is self.reads else ())


@contextmanager
def pretended_gpu():
    """Inside, there is a GPU. Yields the mode with its counters; in the end everything is as before."""
    gpu, move, run = PretendedGPU(), nn.Module.to, torch.autograd._engine_run_backward
    autocast, enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    group = torch._C._group_tensors_by_device_and_dtype

    def real(device):
        return "cpu" if is_cuda(device) else device

    def module_to(module, *args, **kwargs):
        """Parameters stay the same objects, as on a GPU, so those that are tied stay tied."""
        if not is_cuda(torch._C._nn._parse_to(*args, **kwargs)[0] or CPU):
            return move(module, *args, **kwargs)
        for tensor in (*module.parameters(), *module.buffers()):
            claim(tensor, {"_is_param": True} if isinstance(tensor, nn.Parameter) else {})
        return module

    def backward(*args, **kwargs):
        """The mode is off inside a call, but here activations may be computed again."""
        with gpu:
            return run(*args, **kwargs)

    def kind_of(tensor):
        """What has to be the same when activations are computed again; the device depends on who asks."""
        return tensor.shape, tensor.dtype

    def grouped(*args):
        """C++ sorts tensors by the device that it sees."""
        return {(lists[0][0].device, dtype): (lists, rest) for (_, dtype), (lists, rest) in group(*args).items()}

    def recorded_step(step, pool):
        """In place of a CUDA graph: the step itself, in which no read and no copy may happen."""

        def replay():
            before = gpu.reads.total() + gpu.copies.total()
            logits = step()
            if gpu.reads.total() + gpu.copies.total() != before:
                raise RuntimeError("operation not permitted when stream is capturing")
            return logits

        replay()
        return replay

    changes = [
        (nn.Module, "to", module_to),
        (torch.autograd, "_engine_run_backward", backward),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (torch, "Generator", GeneratorOnGPU),
        (torch, "autocast", lambda device_type, *args, **kwargs: autocast(real(device_type), *args, **kwargs)),
        (torch, "is_autocast_enabled", lambda device_type="cuda": enabled(real(device_type))),
        (torch, "get_autocast_dtype", lambda device_type: dtype_of(real(device_type))),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (recorded, "cuda_graph", recorded_step),
        (torch.cuda, "reset_peak_memory_stats", lambda: None),
        (torch.cuda, "max_memory_allocated", lambda: 0),
    ]
    with ExitStack() as stack:
        for owner, name, new in changes:
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(patch.object(torch.amp, "autocast", torch.autocast))
        stack.enter_context(patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=kind_of))
        yield stack.enter_context(gpu)
