"""slurm_rollout and what it needs, put into the virtual environment of a test cluster's user."""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import slurm_rollout


def fill(venv: Path, cache: Path) -> None:
    """Put this package as it is now, its commands and its dependencies into an empty virtual environment.

    The environment's Python is not run: it may be another system's. ``cache`` keeps dependencies for the next ones.
    Raises CalledProcessError, with what pip said.
    """
    package = Path(slurm_rollout.__file__).parent
    [site] = venv.glob("lib/python3.*/site-packages")
    # Compiled here, once, for environments of the same Python; another process may be compiling just now.
    compileall.compile_dir(package, quiet=2)
    shutil.copytree(package, site / "slurm_rollout", ignore=shutil.ignore_patterns("*.pyc.*"))
    # Where hatch puts them in a wheel.
    if (package.parent / "templates").is_dir():
        shutil.copytree(package.parent / "templates", site / "slurm_rollout/templates", dirs_exist_ok=True)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        metadata = importlib.metadata.distribution("slurm-rollout")
        info = site / f"slurm_rollout-{metadata.version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata.read_text("METADATA") or "")
    for scripts in (package.parent / "sbin", Path(sys.executable).parent):
        if (scripts / "slurm-rollout-agent").exists():
            shutil.copy(scripts / "slurm-rollout-agent", venv / "bin")
            break
    command = venv / "bin/slurm-rollout"
    command.write_text(f"#!{venv}/bin/python\nimport sys\nfrom slurm_rollout.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    (site / "dependencies.pth").write_text(f"{_dependencies(package.parent, venv, cache)}\n")


def _dependencies(source: Path, venv: Path, cache: Path) -> Path:
    """A directory with what the package needs, made by pip once for each set of requirements and Python version."""
    if (source / "pyproject.toml").exists():
        wanted = tomllib.loads((source / "pyproject.toml").read_text())["project"]["dependencies"]
    else:
        wanted = [line for line in importlib.metadata.requires("slurm-rollout") or [] if "extra ==" not in line]
    [library] = venv.glob("lib/python3.*")
    key = hashlib.sha256("\n".join([library.name, *sorted(wanted)]).encode()).hexdigest()[:12]
    target = cache / f"dependencies-{key}"
    if not target.exists():
        made = venv / "dependencies"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", f"--target={made}"]
        pip += [f"--python-version={library.name.removeprefix('python')}", "--only-binary=:all:", *wanted]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
        subprocess.run(["chmod", "-R", "a+rX", made], check=True, capture_output=True, text=True)
        # Another cluster may have been faster; theirs is as good.
        with contextlib.suppress(OSError):
            made.rename(target)
    return target
