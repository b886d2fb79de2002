"""The provider's key: from the environment only, and nowhere to be seen."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from services.contract.config import ConfigError, dump_config, load_config
from tests.retriever.web_internet import (
    KEY,
    Internet,
    ask,  # noqa: F401 - a fixture
    cut,
    internet,  # noqa: F401 - a fixture
    json_answer,
    serper,
    slow,
)


@pytest.mark.parametrize("provider", ["serper", "google", "serpapi"])
@pytest.mark.parametrize("failure", ["echo", "garbage", "slow", "cut", "nobody"])
def test_the_key_is_nowhere(
    internet: Internet,  # noqa: F811
    ask: Any,  # noqa: F811
    provider: str,
    failure: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def echo(request: Any) -> Any:
        """Providers repeat what they were asked."""
        return await json_answer({"message": f"bad key {KEY} in {request.path_qs}"}, 401)(request)

    async def garbage(request: Any) -> Any:
        request.transport.write(b"HTTP/1.1 what\r\n\r\n")
        request.transport.close()
        return await serper()(request)

    internet.answer({"echo": echo, "garbage": garbage, "slow": slow(5, serper()), "cut": cut, "nobody": cut}[failure])
    where = {"url": "http://127.0.0.1:9/search"} if failure == "nobody" else {}
    with caplog.at_level(logging.DEBUG):
        running = ask(provider=provider, engine_id="cx", attempt_timeout_s=0.1 if failure == "slow" else 10, **where)
        answer = running.retrieve("who")
        texts = [
            answer.text,
            running.client.get("/info").text,
            running.client.get("/metrics").text,
            running.client.get("/ready").text,
        ]
        running.stop()
    assert answer.status_code == 502
    assert provider in answer.json()["detail"]
    everything = "\n".join([*texts, caplog.text, repr(running.server.service.config)])
    assert not any(spelling in everything for spelling in (KEY, quote(KEY), quote(KEY, safe=""), quote_plus(KEY)))
    assert provider in caplog.text


def test_without_a_key_the_service_does_not_start(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORAGE_")}
    environment |= {"FORAGE_RETRIEVER__BACKENDS": '["web"]', "FORAGE_RETRIEVER__PORT": "0", "FORAGE_DATA__DIRECTORY": str(tmp_path)}
    command = [sys.executable, "-m", "services.retriever", "serve"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "there is no key for serper: set FORAGE_RETRIEVER__WEB__API_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_key_comes_from_the_environment_only(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[retriever.web]\napi_key = "{KEY}"\n')
    with pytest.raises(ConfigError, match="FORAGE_RETRIEVER__WEB__API_KEY") as refused:
        load_config(file, {})
    assert KEY not in str(refused.value)
    config = load_config(None, {"FORAGE_RETRIEVER__WEB__API_KEY": "123456"})
    assert config.retriever.web.api_key is not None
    assert config.retriever.web.api_key.get_secret_value() == "123456"
    assert "123456" not in repr(dump_config(config))
