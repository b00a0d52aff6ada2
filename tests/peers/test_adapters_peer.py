"""What is exported for adapters, computed by adapters itself."""

import pytest
from asked import check_export

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("base", ["llama", "mistral"])
@pytest.mark.parametrize(
    "text",
    [
        "nonlinear(rank=5, alpha=2) @ block",
        "nonlinear(rank=7, alpha=0.5, activation=gelu) @ block layers=0,2",
        "nonlinear(rank=3, activation=relu) @ block layers=1",
        "nonlinear(rank=3, activation=tanh) @ block",
        "linear(rank=3, alpha=0.7) @ block",
    ],
)
def test_adapters_computes_what_we_compute(golden, tmp_path, base, text):
    check_export("adapters", golden, base, (text,), tmp_path)
