"""What the figures were measured on."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import mylayers


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, what else keeps them busy, versions and build, ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mylayers": mylayers.__version__,
            "onnxruntime": _version("onnxruntime"),
        },
        "build": {key: value for key, value in mylayers.build_info().items() if key != "file"},
    }


def folder_name(machine: dict[str, Any], quick: bool) -> str:
    """A name for its results, from processor, cores and time."""
    cores = f"{machine['cores']} cores" if machine["gpu"] is None else ""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['gpu'] or machine['cpu']} {cores}".lower())
    minute = datetime.datetime.fromisoformat(machine["date"]).strftime("%Y-%m-%d-%H%M")
    return f"{slug.strip('-')}-{minute}" + ("-quick" if quick else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
