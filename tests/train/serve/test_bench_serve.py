"""The serving benchmark: against a server that it starts, and against one that runs."""

import pytest
from tiny_server import serving

from train.bench.serve import ServeBench, bench_serve

FIGURES = {
    "requests/s",
    "tokens/s",
    "tokens in an answer, mean",
    "first token, ms, median",
    "first token, ms, 95 % below",
    "further token, ms, median",
}
AGAINST = {"generate_all, tokens/s", "server / generate_all"}


@pytest.mark.slow
def test_a_server_of_its_own(served_folder):
    config = ServeBench(str(served_folder / "steered.safetensors"), clients=(1, 3), prompts=6, new_tokens=8)
    figures = bench_serve(config)
    assert list(figures) == ["1 client", "3 clients"]
    for each in figures.values():
        assert set(each) == FIGURES | AGAINST
        assert 0 < each["tokens in an answer, mean"] <= 8
        assert each["server / generate_all"] == pytest.approx(each["tokens/s"] / each["generate_all, tokens/s"])


@pytest.fixture
def short(tmp_path):
    """Prompts that the tiny server reads."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"question": "{i}?"}}\n' for i in range(20)))
    return str(path)


def test_a_server_that_runs(url, engine, served_folder, short):
    before = engine.stats()
    asks = {"data": short, "clients": (2,), "new_tokens": 4, "compare": False}
    figures = bench_serve(ServeBench(str(served_folder / "steered.safetensors"), url=f"{url}/v1", **asks))
    assert set(figures["2 clients"]) == FIGURES
    assert engine.stats().finished == before.finished + 16
    with pytest.raises(ValueError, match="20 prompts, but 32 are needed"):
        bench_serve(ServeBench(str(served_folder / "steered.safetensors"), url=url, **(asks | {"clients": (2, 2)})))


def test_a_server_that_is_not_there(served_folder, short, app):
    with serving(app) as url:
        pass
    config = ServeBench(model=str(served_folder / "tiny"), url=url, data=short, clients=(1,), compare=False)
    with pytest.raises(ValueError, match=url):
        bench_serve(config)


def test_what_a_server_refuses(url, served_folder, short):
    steering = str(served_folder / "steered.safetensors")
    asks = {"url": url, "data": short, "clients": (2,), "compare": False}
    with pytest.raises(ValueError, match=r"has no model 'mine', only tiny, steered; .*NAME=PATH"):
        bench_serve(ServeBench(f"mine={steering}", **asks))
    with pytest.raises(ValueError, match=r"answered with status 400: .*max_tokens"):
        bench_serve(ServeBench(steering, new_tokens=17, **asks))
