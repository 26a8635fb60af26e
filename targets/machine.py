"""What the CPU at hand is, as Linux tells it; nothing where it does not."""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, empty if there is none."""
    try:
        text = CPUINFO.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(field)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def cpu_flags() -> set[str]:
    """Features of the CPU, such as ``avx2``."""
    return set(_cpuinfo("flags").split())


def cpu_model() -> str:
    """Vendor, family and model: ``AuthenticAMD-23-1``; ``unknown`` where they are not known."""
    parts = [_cpuinfo(field) for field in ("vendor_id", "cpu family", "model")]
    return "-".join(parts) if all(parts) else "unknown"


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where unknown."""
    sizes = [0]
    for path in CACHES.glob("index*/size"):
        text = path.read_text("ascii").strip()
        sizes.append(int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text))
    return max(sizes)
