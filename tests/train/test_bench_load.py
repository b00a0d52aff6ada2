"""The loading benchmark, which runs in processes of its own, and the bound on host memory that it shows."""

import pytest

from train.bench.load import LoadBench, bench_load


def test_each_of_two_processes_reads_half(tiny_folder):
    by_setting = bench_load(LoadBench(str(tiny_folder), dtype="float32", devices=(2,), processes=(2,)))
    both, one = by_setting["2 devices"], by_setting["1 of 2 processes"]
    norms = 4 * 32 * (2 * 3 + 1) / 1e9  # on every device; the file is fp32
    assert one["read, GB"] == pytest.approx((both["read, GB"] + norms) / 2)
    assert one["kept, GB"] == pytest.approx(one["read, GB"])
    assert both["kept, GB"] == pytest.approx(both["read, GB"] + norms)


@pytest.mark.slow
def test_the_host_holds_what_it_keeps_and_little_else(tmp_path):
    """Besides the weights kept, at most two of the largest shards and 200 MB; the whole model would be 1 GB."""
    by_setting = bench_load(LoadBench(gigabytes=1.0, folder=str(tmp_path), devices=(1, 8), processes=(4,)))
    for figures in by_setting.values():
        assert figures["beyond, GB"] < 2 * figures["largest shard, GB"] + 0.2
    assert by_setting["1 of 4 processes"]["peak, GB"] < by_setting["1 device"]["peak, GB"] / 2
    assert not list(tmp_path.iterdir())
