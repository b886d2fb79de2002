"""`docker compose run forage …` works with what the Dockerfile of its image copies; here without Docker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from services.contract.config import Config
from services.contract.groups import GroupStore

DOCKERFILE = Path("services/reward/Dockerfile")


def test_the_image_has_all_the_code_that_the_command_imports(config: Config, store: GroupStore, tmp_path: Path) -> None:
    app = tmp_path / "app"
    copied = [line.split()[1:] for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY services/")]
    for source, target in copied:
        if Path(source).is_dir():
            shutil.copytree(source, app / target)
        elif source.endswith(".py"):
            (app / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, app / target)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"FORAGE_RUN__NAME": "test", "FORAGE_REDIS__URL": config.redis.url}
    shutil.copytree("configs", app / "configs")
    command = [sys.executable, "-m", "services.suite", "status", "--json", "--config", "configs/smoke.toml"]
    done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "test"
