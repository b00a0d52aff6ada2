"""Slices and nodes by the names that people, clouds and compilers give them."""

import pytest

from train.plan.topology import compiler_name, parse_topology, sold_names


def test_topologies():
    pod = parse_topology("v5p:4x4x4", slices=2)
    assert (pod.chips, pod.sold, str(pod)) == (128, "v5p-128", "2 x v5p:4x4x4 (128 chips, sold as 2 x v5p-128)")
    assert parse_topology("h100:8").chips == 8
    for name, words in {
        "v4-8": "does not know v4 chips",
        "v5litpod-16": "unknown chip .*did you mean v5litepod-16",
        "v5e:4x5": "did you mean v5e:4x",
        "h100:16": "1 to 8",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_topology(name)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-16", "v5e:4x4"),
        ("v5lite-16", "v5e:4x4"),
        ("V5E:4x4", "v5e:4x4"),
        ("v6e-8", "v6e:2x4"),
        ("v5p-8", "v5p:2x2x1"),  # cores, two per chip
        ("v4-8", "v4:2x2x1"),
        ("h100:8", "h100:8"),
        ("nonsense", "nonsense"),
    ],
)
def test_names_that_slices_are_sold_under(name, topology):
    assert compiler_name(name) == topology


def test_every_name_in_the_table_is_its_slice():
    names = sold_names()
    assert {sold: compiler_name(sold) for sold in names.values()} == {sold: name for name, sold in names.items()}
