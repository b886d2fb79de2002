"""The service killed and started again under load: the rollout's own client sees late answers, never a wrong or an empty one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from services.contract.config import RolloutConfig, show_config
from services.retriever.build import build_index
from services.rollout.retrieval import Retriever
from tests.conftest import free_port
from tests.retriever.conftest import make_config, passage, query

KILLS, CLIENTS = 2, 16


async def test_killed_under_load_no_client_sees_a_wrong_answer(tmp_path: Path) -> None:
    config = make_config(tmp_path / "data", cache_size=0)
    build_index(config)
    path, port = tmp_path / "run.toml", free_port()
    path.write_text(show_config(config))
    command = [sys.executable, "-m", "services.retriever", "serve", "--config", str(path), "--port", str(port)]
    answered: Counter[str] = Counter()
    over = asyncio.Event()

    async def client(number: int, retriever: Retriever) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            row = (number * 7 + turn) % 100
            found = await retriever.retrieve(query(row), 1)
            assert found is not None
            assert found.contents == [passage(row)["contents"]]
            answered[era[0]] += 1

    async def enough(name: str) -> None:
        era[0] = name
        while answered[name] < 200:
            await asyncio.sleep(0.02)
            for task in clients:
                if task.done():
                    task.result()

    era = ["first"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    rollout = RolloutConfig(retrieval_retries=40, retrieval_timeout_s=10)
    try:
        async with Retriever(f"http://127.0.0.1:{port}", rollout) as retriever:
            clients = [asyncio.create_task(client(number, retriever)) for number in range(CLIENTS)]
            await enough("first")
            for kill in range(KILLS):
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                await enough(f"after kill {kill + 1}")
            over.set()
            await asyncio.gather(*clients)
    finally:
        process.kill()
        process.wait()
    assert len(answered) == KILLS + 1
