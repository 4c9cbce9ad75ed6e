"""Programs that talk to the stand-in for the Hub, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import TOKEN, HubStandIn

ROOT = Path(__file__).parents[2]


class Client:
    """Runs programs whose Hub is `hub`; `home` keeps their caches."""

    def __init__(self, hub: HubStandIn, home: Path, token: str | None = TOKEN):
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.home, self.env = home, {**outside, "PYTHONPATH": paths, **hub.client_env(str(home / "cache"), token)}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.home, env=self.env, capture_output=True, text=True, timeout=600)

    def script(self, *argv: str, program: str = "hub_run.py") -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, str(ROOT / "tests" / "support" / program), *argv)
