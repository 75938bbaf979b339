"""How much memory something took: on a GPU what torch allocated there, elsewhere what the process held (Linux only)."""

from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        RESET.write_text("5")  # Linux then counts VmHWM, the most memory held, from here on
    except OSError:
        pass  # another system, or not allowed: the peak is that of all so far


def peak_bytes(device: torch.device) -> int:
    """Most memory held since then; 0 where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))  # it counts in KiB
