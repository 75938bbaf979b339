"""Several GPUs or machines: `torchrun --nproc_per_node=N -m crlhf ...`.

Data parallelism in its plainest form. Every process holds the whole models and works on every N-th row of each
batch; whatever is a sum over rows or tokens, gradients included, is added up over the processes. So a batch
means the same with one process as with N, and the losses agree to float error. The first process alone writes
files and speaks. With one process every function here does nothing.
"""

import os

import torch
import torch.distributed as dist

from .config import UserError


def start(device):
    """Join the other processes, if torchrun started us, and return the device of this one."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer():
    """Is this the one process that writes files and prints?"""
    return rank() == 0


def barrier():
    if n_processes() > 1:
        dist.barrier()


def mine(rows):
    """This process's share of a batch: every N-th row. The batch must divide evenly."""
    if len(rows) % n_processes():
        raise UserError(f"a batch of {len(rows)} rows can't be shared by {n_processes()} processes: choose batch sizes, and "
                        "a number of rows, that are multiples of it")
    return rows[rank()::n_processes()]


def my_part_of(rows):
    """Which rows of a minibatch are ours, as numbers within our share of the batch: (b,) -> (<= b,)."""
    return rows[rows % n_processes() == rank()] // n_processes()


def add_up(value):
    """Sum of a tensor over all processes. No gradient flows through it."""
    if n_processes() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
    return value


def gather(values):
    """Put the shares of a batch together again: (B / N, ...) on each process -> (B, ...) in the batch's order."""
    if n_processes() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(n_processes())]
    dist.all_gather(shares, values.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def gather_objects(items):
    """Lists of anything, one a process -> one list, in the order of the processes."""
    if n_processes() == 1:
        return items
    shares = [None] * n_processes()
    dist.all_gather_object(shares, items)
    return [item for share in shares for item in share]


def shared_map(work, items):
    """work(item) for each item, in order. Every process does its share and receives all results."""
    for first in range(0, len(items), n_processes()):
        yield from gather_objects([work(item) for item in items[first:first + n_processes()][rank():rank() + 1]])


def add_gradients(parameters):
    """Sum gradients over the processes, in one message. A process whose share was empty adds zeros."""
    if n_processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad.copy_(summed.view_as(parameter))
