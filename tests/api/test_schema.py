"""Whatever the OpenAPI schema allows, and some of what it does not, is answered without a 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from flexllm.config import EngineConfig
from flexllm.server.app import create_app
from flexllm.server.context import Settings
from tests.api.conftest import MODEL, Server

SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(EngineConfig())).openapi())
OPERATIONS = {operation.label: operation for result in SCHEMA.get_all_operations() for operation in [result.ok()]}
CASES = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
# Only what has a body or a query can be against the schema.
CASES += [(label, GenerationMode.NEGATIVE) for label, operation in OPERATIONS.items() if list(operation.body) or list(operation.query)]


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_no_server_error(server: Server, label: str, mode: GenerationMode) -> None:
    @given(OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # go deeper than "unknown model"
        response = case.call(base_url=server.url)
        case.validate_response(response, checks=[not_a_server_error])

    check()
