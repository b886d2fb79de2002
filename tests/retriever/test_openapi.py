"""Requests made from the service's own description, valid and not: no crash, and answers that the description allows."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.retriever.conftest import Running

ROUTES = [("/retrieve", "POST"), ("/ready", "GET"), ("/health", "GET"), ("/info", "GET"), ("/metrics", "GET")]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def description(service: Running) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{service.server.port}/openapi.json")


def test_every_route_is_described(description: Any) -> None:
    described = {(o.ok().path, o.ok().method.upper()) for o in description.get_all_operations()}
    assert described == set(ROUTES)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_every_answer_to_retrieve_is_one_that_the_description_allows(description: Any, mode: Any) -> None:
    strategy = description["/retrieve"]["POST"].as_strategy(generation_mode=mode)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response, excluded_checks=[not_a_server_error])
        hurried = isinstance(case.body, dict) and case.body.get("deadline_ms")
        assert response.status_code in (200, 422) or (response.status_code == 504 and hurried)

    check()


@pytest.mark.parametrize(("path", "method"), ROUTES[1:])
def test_every_other_route_answers_as_described(description: Any, path: str, method: str) -> None:
    description[path][method].Case().call_and_validate()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_get_an_answer(service: Running, body: bytes) -> None:
    assert service.client.post("/retrieve", content=body).status_code in (200, 422)
