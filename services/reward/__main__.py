"""`python -m services.reward --config run.toml`: a grading worker."""

from __future__ import annotations

import os
import tempfile


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="forage-reward-") as folder:
        # Before anything imports prometheus_client: there and then it reads whether several processes count together.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from services.reward.worker import run

        run()


if __name__ == "__main__":
    main()
