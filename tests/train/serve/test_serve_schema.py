"""schemathesis against the OpenAPI description: requests by the hundred, right and wrong, and what comes back."""

import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_server import SETTINGS, serving

from train.serve.app import make_app

NOT_CHECKED = "positive_data_acceptance"
"""A body that is right as such may still be too long for the server, or name a file that there is not."""


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "secret"])
def test_what_comes_back_is_what_is_described(engine, tmp_path, key):
    app = make_app(engine, replace(SETTINGS, max_body=1 << 22, api_key=key))  # long lists are refused for their length
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--checks", "all", "--exclude-checks", NOT_CHECKED]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "100", "--seed", "1", "--no-color"]
    command += ["--generation-database", "none", "--output-truncate", "true", "--request-timeout", "120"]
    command += ["--header", f"Authorization: Bearer {key}"] if key else []
    with serving(app) as url:
        done = subprocess.run(
            [*command, f"{url}/openapi.json"], cwd=tmp_path, text=True, capture_output=True, timeout=1200
        )
    assert done.returncode == 0, "\n".join(line[:500] for line in (done.stdout + done.stderr).splitlines())
    answered = [sample.labels for metric in app.state.service.metrics.registry.collect() for sample in metric.samples]
    routes = {labels["route"] for labels in answered if labels.get("status") == "200"}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/effects"} <= routes  # the model was reached
