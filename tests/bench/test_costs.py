"""What the README says of the costs is what was measured."""

import json

import bench.bench_all as bench_all


def test_the_readme_says_what_was_measured():
    readme = bench_all.README.read_text(encoding="utf-8")
    results = json.loads(bench_all.RESULTS.read_text(encoding="utf-8"))
    assert bench_all.with_tables(readme, results) == readme
