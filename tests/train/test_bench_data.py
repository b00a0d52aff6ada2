"""The benchmark of training data, at a small size."""

import json

from train.bench.data import DataBench, bench_data


def test_it_grows_a_file_and_measures(tiny_folder, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"question": "a 12?", "answer": "b 34\n#### 5"}) + "\n")
    config = DataBench(
        str(path),
        examples=30,
        folder=str(tmp_path),
        model=str(tiny_folder),
        batch_size=2,
        sequence_length=64,
        batches=3,
    )
    figures = bench_data(config)
    assert figures["examples"] == 30
    lines = (tmp_path / "few-30.jsonl").read_text().splitlines()
    assert len(lines) == 30
    assert len(set(lines)) > 10
    assert 0 < figures["tokens that are not padding, %"] <= 100
