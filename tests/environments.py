"""Fresh virtual environments that see this one's packages, with plugins installed by pip as their users would."""

from __future__ import annotations

import importlib.util
import os
import site
import subprocess
import sysconfig
import venv
from pathlib import Path


class Environment:
    """One of them; `run` is what its user types."""

    def __init__(self, folder: Path) -> None:
        own = importlib.util.find_spec("pip") is None  # else this one's will do: a copy takes seconds
        venv.create(folder, with_pip=own, symlinks=True)
        self.folder = folder
        packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        seen = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
        (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in seen))
        for name in ("moefold", "pytest", "pip"):
            script = folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {name} "$@"\n')
            script.chmod(0o755)

    def install(self, source: Path) -> None:
        """`pip install`, with nothing fetched."""
        pip = [
            self.folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            source,
        ]
        subprocess.run(pip, check=True)

    def run(self, command: str, where: Path) -> str:
        """A shell command's output; raises CalledProcessError, with its output in the message's place."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = os.environ | {"PATH": path, "COLUMNS": "120", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
        variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
        done = subprocess.run(["bash", "-ec", command], cwd=where, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
