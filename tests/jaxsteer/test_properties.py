"""Properties that hold for all inputs: plans as text and JSON, splitting trees, token selection, packing."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import identical, sites_of

from jaxsteer import METHODS, ModelConfig, Params, Positions, combine, make_batch, parse_plan, partition
from jaxsteer.batches import pack, select, stack_rows
from jaxsteer.plans import plan_from_json, plan_to_json, validate_plan

settings.register_profile("quick", max_examples=30, derandomize=True, deadline=None, database=None)
settings.load_profile("quick")

CONFIG = ModelConfig(vocab_size=61, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_width=48)

# ---- plans

SITES_OF = {name: sites_of(method(), CONFIG) for name, method in METHODS.items()}


@st.composite
def slot_texts(draw, name="slot"):
    """A slot that fits CONFIG, as text."""
    method = draw(st.sampled_from(sorted(METHODS)))
    sites = draw(st.lists(st.sampled_from(SITES_OF[method]), min_size=1, unique=True))
    rank = draw(st.integers(1, 16))
    layers = draw(st.sampled_from(["all", "0", "1-3", "0,2-3", "first:2", "last:3"]))
    text = f"{method}(rank={rank})" if hasattr(METHODS[method](), "rank") else method
    space = draw(st.sampled_from(["", " ", "  "]))
    at = f"{space},{space}".join(sites)
    return f"{text}{space}@{space}{at} layers={layers} positions={draw(positions)} name={name}"


counts = st.integers(1, 9)
positions = st.one_of(
    st.sampled_from(["all", "prompt", "completion", "last"]),
    st.builds("first:{}".format, counts),
    st.builds("last:{}".format, counts),
    st.builds("first:{}+last:{}".format, counts, counts),
)


@given(st.integers(1, 3).flatmap(lambda count: st.tuples(*(slot_texts(f"s{i}") for i in range(count)))))
def test_plans_survive_text_and_json(texts):
    plan = parse_plan(texts, CONFIG)
    validate_plan(plan, CONFIG)
    assert [slot.name for slot in plan] == [f"s{i}" for i in range(len(texts))]
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@given(text=st.text("arkol0189 @,=:()+-._[]{}'\"\\²é\n\0", max_size=20), kept=st.integers(0, 60), slot=slot_texts())
def test_malformed_plans_raise_nothing_but_value_errors(text, kept, slot):
    """Anything at all, and a valid slot with something else in place of its tail, its middle or a setting."""
    for broken in (text, slot[:kept] + text, slot[:kept] + text + slot[kept:], f"lora(rank={text}) @ attn.q {text}"):
        try:
            validate_plan(parse_plan([broken], CONFIG), CONFIG)
        except ValueError as error:
            assert str(error)  # noqa: PT017  # there may be none: the text may be valid


@pytest.mark.parametrize(
    "text",
    [
        "fixed @ block layers=0-99999999999",
        "fixed @ block layers=7",
        "lora(rank={[]}) @ attn.q",
        f"lora(alpha=1{'0' * 400}) @ attn.q",
        f"lora(alpha={'-' * 20_000}1) @ attn.q",
        "fixed @ block positions=first:²",
    ],
)
def test_plans_that_would_overflow_are_refused(text):
    with pytest.raises(ValueError, match="plan '"):
        parse_plan([text], CONFIG)


# ---- trained and frozen leaves

labels = st.sampled_from(["weights", "activations", "frozen"])
trees = st.recursive(labels, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=12)


@given(st.dictionaries(st.sampled_from("ab"), trees), st.dictionaries(st.sampled_from("ab"), trees))
def test_combine_undoes_partition(base, steering):
    labels = Params(base, steering)
    leaves, structure = jax.tree.flatten(labels)
    params = jax.tree.unflatten(structure, [np.float32(i) for i in range(len(leaves))])
    trained, frozen = partition(params, labels)
    identical(combine(trained, frozen), params)
    assert len(jax.tree.leaves(trained)) == sum(label != "frozen" for label in leaves)
    assert len(jax.tree.leaves(frozen)) == sum(label == "frozen" for label in leaves)
    again = partition(combine(trained, frozen), labels)
    assert jax.tree.structure(again) == jax.tree.structure((trained, frozen))


# ---- rows of examples


@dataclass
class Example:
    """Tokens of an example, as `stack_rows` takes them."""

    completion: np.ndarray
    source: str = "a test"

    @property
    def ids(self):
        return np.arange(3, 3 + len(self.completion), dtype=np.int32)

    @property
    def weights(self):
        return self.completion.astype(np.float32)

    @property
    def prompt_length(self):
        return int(np.argmax(self.completion)) if self.completion.any() else len(self.completion)


ROWS, WIDTH = 6, 24
examples = st.lists(st.booleans(), max_size=11).map(lambda rest: Example(np.array([False, *rest])))
some_examples = st.lists(examples, min_size=1, max_size=ROWS)


def layouts(members):
    """(batch [ROWS, WIDTH], (row, first column) of each example): padded on either side, and packed."""
    alone = [[i] for i in range(len(members))]
    for rows, left in ((alone, False), (alone, True), (pack([len(m.ids) for m in members], WIDTH), False)):
        rows = rows + [[]] * (ROWS - len(rows))
        batch = stack_rows([[members[i] for i in row] for row in rows], WIDTH, left=left)
        at = {}
        for r, row in enumerate(rows):
            column = WIDTH - sum(len(members[i].ids) for i in row) if left else 0
            for i in row:
                at[i] = r, column
                column += len(members[i].ids)
        yield batch, at


@given(some_examples, positions)
def test_selection_does_not_depend_on_packing_or_padding(members, kind):
    seen = []
    for batch, at in layouts(members):
        mask = select(Positions.parse(kind), batch)
        mask = batch.segments > 0 if mask is None else np.asarray(mask)
        assert not np.any(mask & (batch.segments == 0))
        seen.append([mask[at[i][0], at[i][1] :][: len(member.ids)].tolist() for i, member in enumerate(members)])
    assert seen[0] == seen[1] == seen[2]


@given(some_examples, counts, counts)
def test_first_and_last_tokens_never_overlap(members, first, last):
    for batch, _ in layouts(members):
        at_start = np.asarray(select(Positions("ends", first, 0), batch))
        at_end = np.asarray(select(Positions("ends", 0, last), batch))
        assert not np.any(at_start & at_end)
        np.testing.assert_array_equal(at_start | at_end, select(Positions("ends", first, last), batch))


@given(some_examples)
def test_rows_of_examples_are_what_make_batch_builds(members):
    for batch, _ in layouts(members):
        identical(make_batch(batch.tokens, batch.segments, batch.weights, batch.completion), batch)


@given(st.integers(1, 40).flatmap(lambda width: st.tuples(st.just(width), st.lists(st.integers(1, width)))))
def test_packing_places_every_item_once_and_fills_no_row_over(problem):
    width, lengths = problem
    rows = pack(lengths, width)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in row) <= width for row in rows)
    assert all(row == sorted(row) for row in rows)
