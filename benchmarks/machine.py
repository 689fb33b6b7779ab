"""What the figures were measured on."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mylayers

SYSTEM_CPUS = Path("/sys/devices/system/cpu")
# What is compiled into mylayers or measures it: where only other files differ, so do no figures.
CODE = (
    *("benchmarks/*.py", "benchmarks/*.cpp", "benchmarks/*.h"),
    *("build_support", "csrc", "mylayers", "setup.py"),
)


class Processor(NamedTuple):
    """A processor as ``/proc/cpuinfo`` tells of it.

    Attributes:
        vendor: as x86 spells it; for Arm the implementer's number, such as ``0x41``.
        family: for Arm the version of the architecture.
        model: for Arm the part.
        stepping: for Arm ``0x31`` is what Arm calls r3p1.
        features: its instruction sets, by Linux's names.
    """

    vendor: str
    family: int
    model: int
    stepping: int
    features: frozenset[str]


def read_processor(cpuinfo: str) -> Processor | None:
    """The first processor in the text of ``/proc/cpuinfo``; None if it does not say.

    Args:
        cpuinfo: the text.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = frozenset(fields.get("flags", fields.get("Features", "")).split())
    try:
        if "vendor_id" in fields:
            numbers = (int(fields[key]) for key in ("cpu family", "model", "stepping"))
            return Processor(fields["vendor_id"], *numbers, features)
        family, model, variant, revision = (
            int(fields[f"CPU {key}"], 0) for key in ("architecture", "part", "variant", "revision")
        )
        return Processor(
            fields["CPU implementer"], family, model, variant << 4 | revision, features
        )
    except (KeyError, ValueError):
        return None


# Ranges as Linux has them in arch/x86/kernel/cpu/amd.c.
_AMD = {
    23: (
        ("Zen", (range(0x30), range(0x50, 0x60))),
        ("Zen 2", (range(0x30, 0x50), range(0x60, 0x80), range(0x90, 0x92), range(0xA0, 0xB0))),
    ),
    25: (
        ("Zen 3", (range(0x10), range(0x20, 0x60))),
        ("Zen 4", (range(0x10, 0x20), range(0x60, 0xB0))),
    ),
    26: (("Zen 5", (range(0x30), range(0x40, 0x50), range(0x60, 0x80))),),
}

# Family 6; in brackets the microarchitecture where the product is better known.
_INTEL = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "Haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "Broadwell"),
    **dict.fromkeys((0x4E, 0x5E), "Skylake"),
    **dict.fromkeys((0x8E, 0x9E), "Kaby Lake or Coffee Lake (Skylake)"),
    **dict.fromkeys((0xA5, 0xA6), "Comet Lake (Skylake)"),
    **dict.fromkeys((0x6A, 0x6C), "Ice Lake server (Sunny Cove)"),
    **dict.fromkeys((0x7D, 0x7E), "Ice Lake (Sunny Cove)"),
    **dict.fromkeys((0x8C, 0x8D), "Tiger Lake (Willow Cove)"),
    0xA7: "Rocket Lake (Cypress Cove)",
    0x8F: "Sapphire Rapids (Golden Cove)",
    0xCF: "Emerald Rapids (Golden Cove)",
    **dict.fromkeys((0x97, 0x9A), "Alder Lake (Golden Cove)"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "Raptor Lake (Raptor Cove)"),
    **dict.fromkeys((0xAA, 0xAC), "Meteor Lake (Redwood Cove)"),
    **dict.fromkeys((0xAD, 0xAE), "Granite Rapids (Redwood Cove)"),
    0xAF: "Sierra Forest (Crestmont)",
}
_SKYLAKE_SERVER = 0x55  # three products, told apart by their stepping

_ARM = {
    ("0x41", 0xD03): "Cortex-A53",
    ("0x41", 0xD05): "Cortex-A55",
    ("0x41", 0xD07): "Cortex-A57",
    ("0x41", 0xD08): "Cortex-A72",
    ("0x41", 0xD0B): "Cortex-A76",
    ("0x41", 0xD41): "Cortex-A78",
    ("0x41", 0xD42): "Cortex-A78AE",
    ("0x41", 0xD0C): "Neoverse N1",
    ("0x41", 0xD49): "Neoverse N2",
    ("0x41", 0xD8E): "Neoverse N3",
    ("0x41", 0xD40): "Neoverse V1",
    ("0x41", 0xD4F): "Neoverse V2",
    ("0x41", 0xD84): "Neoverse V3",
    ("0x46", 0x001): "A64FX",
    ("0x48", 0xD01): "Kunpeng 920 (TaiShan v110)",
    ("0x4e", 0x004): "Carmel",
    ("0x6d", 0xD49): "Cobalt 100 (Neoverse N2)",
    ("0xc0", 0xAC3): "AmpereOne",
}


def microarchitecture(processor: Processor) -> str:
    """What its cores are called; its numbers, where this is not known.

    Args:
        processor: all but its features count.
    """
    vendor, family, model, stepping, _ = processor
    name = None
    if vendor == "AuthenticAMD":
        known = (name for name, models in _AMD.get(family, ()) if any(model in m for m in models))
        name = next(known, None)
    elif vendor == "HygonGenuine" and family == 24:
        name = "Dhyana (Zen)"
    elif vendor == "GenuineIntel" and family == 6:
        if model == _SKYLAKE_SERVER:
            products = ("Skylake", 5), ("Cascade Lake", 8), ("Cooper Lake", 16)
            name = next(f"{product} server" for product, end in products if stepping < end)
        else:
            name = _INTEL.get(model)
    else:
        name = _ARM.get((vendor, model))
    return name or f"{vendor} family {family} model {model} stepping {stepping}"


# By how much they change what kernels can do; the first that a processor has is named with it.
_UNITS = {
    "AMX": "amx_tile",
    "AVX-512": "avx512f",
    "AVX2": "avx2",
    "SVE2": "sve2",
    "SVE": "sve",
    "NEON": "asimd",
}
# Those that kernels, PyTorch's own included, choose by.
_TELLING = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme"),
)


def title(processor: Processor) -> str:
    """A microarchitecture with the widest units it shows: the same cores may hide some.

    Args:
        processor: such as ``Emerald Rapids (Golden Cove, AMX)`` is made of.
    """
    name = microarchitecture(processor)
    units = next((unit for unit, flag in _UNITS.items() if flag in processor.features), None)
    if units is None:
        return name
    return f"{name[:-1]}, {units})" if name.endswith(")") else f"{name} ({units})"


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, what else keeps them busy, versions, build and commit, ready for JSON."""
    cpuinfo = _read(Path("/proc/cpuinfo")) or ""
    processor = read_processor(cpuinfo)
    return {
        "microarchitecture": title(processor) if processor else platform.machine(),
        "cpu": _cpu_model(cpuinfo),
        "vendor": processor and processor.vendor,
        "family": processor and processor.family,
        "model": processor and processor.model,
        "stepping": processor and processor.stepping,
        "features": processor and [name for name in _TELLING if name in processor.features],
        "cores": _cores(),
        "caches": caches(SYSTEM_CPUS / "cpu0" / "cache"),
        "memory_gib": _memory_gib(),
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
        "commit": commit(Path(mylayers.build_info()["file"]).resolve().parents[1]),
        "build": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in mylayers.build_info().items()
            if key != "file"
        },
    }


def name(machine: dict[str, Any]) -> str:
    """What a claim about its figures must name.

    Args:
        machine: as ``describe`` gives it.
    """
    return str(machine["gpu"] or machine["microarchitecture"])


def folder_name(machine: dict[str, Any], quick: bool) -> str:
    """A name for its results, from processor, cores and time."""
    cores = f"{machine['cores']} cores" if machine["gpu"] is None else ""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name(machine)} {cores}".lower())
    minute = datetime.datetime.fromisoformat(machine["date"]).strftime("%Y-%m-%d-%H%M")
    return f"{slug.strip('-')}-{minute}" + ("-quick" if quick else "")


def caches(folder: Path) -> dict[str, str]:
    """The data caches of a core, one of each level, as Linux writes their sizes.

    Args:
        folder: with one folder for each of them; nothing is known without it.
    """
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (_read(index / field) for field in ("level", "type", "size"))
        if level and size and kind in ("Data", "Unified"):
            found[f"L{level}d" if kind == "Data" else f"L{level}"] = size
    return found


def commit(root: Path) -> str | None:
    """The commit that a checkout stands at, ``+changes`` added where its code has some.

    Args:
        root: of the checkout. None is known of what lies anywhere else, even inside another one:
            a package in a virtual environment was made at any time.
    """
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        ran = subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *CODE)
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or it trusts no folder of another user


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cpu_model(cpuinfo: str) -> str:
    lines = cpuinfo.splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
