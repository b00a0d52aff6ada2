"""Published configs load, and only what changes a logit is refused."""

import pytest
from published_configs import BOOKKEEPING, EFFECTIVE, PUBLISHED

from jaxsteer.models.families import FAMILIES, config_from_hf

BY_FAMILY = {config_from_hf(raw, name)[0].name: raw for name, raw in PUBLISHED.items()}


def read(raw):
    return config_from_hf(raw, "config.json")[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name):
    transformers = pytest.importorskip("transformers")
    raw = PUBLISHED[name]
    theirs = transformers.CONFIG_MAPPING[raw["model_type"]](**raw).to_dict()
    assert read(raw) == read(theirs)


def test_every_family_is_among_them():
    assert set(BY_FAMILY) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_bookkeeping_changes_nothing(family):
    raw = BY_FAMILY[family]
    bare = {name: value for name, value in raw.items() if name not in BOOKKEEPING or name == "layer_types"}
    expected = read(bare)
    for name, value in BOOKKEEPING.items():
        if name in raw and name in ("layer_types", "max_window_layers"):
            continue
        assert read(bare | {name: value}) == expected, name
    assert read(bare | {name: value for name, value in BOOKKEEPING.items() if name not in raw}) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_transformers_base_config_are_known(family):
    transformers = pytest.importorskip("transformers")
    raw = BY_FAMILY[family]
    base = {name: value for name, value in transformers.PreTrainedConfig().to_dict().items() if name != "model_type"}
    assert read(base | raw) == read(raw)
    again = transformers.CONFIG_MAPPING[raw["model_type"]]().to_dict()
    assert again["model_type"] == config_from_hf(again, "defaults")[0].hf_type


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_a_logit_is_refused_by_name(family):
    raw = BY_FAMILY[family]
    own = {name for name, _ in FAMILIES[family].fields.values()}
    for name, value in EFFECTIVE.items():
        if name not in own:
            with pytest.raises(ValueError, match=rf"^config\.json: {name} is .*{family} family"):
                read(raw | {name: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "it must be empty: the weights are stored quantised"),
        ({"sliding_window": 1024}, "sliding_window is 1024"),
        ({"sliding_window": 1024, "use_sliding_window": True}, "sliding_window is 1024"),
        ({"layer_types": ["sliding_attention"] * 16}, "layer_types is"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "only 'silu' is supported"),
        ({"attention_multiplier": 0.5}, "the field is not known: if it does not change"),
    ],
)
def test_a_llama_is_refused_for(fields, words):
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read(PUBLISHED["unsloth/Llama-3.2-1B-Instruct"] | fields)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "neutral",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "linear", "factor": 1, "attention_factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1}},
        {"sliding_window": 2048},
        {"sliding_window": 512, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 22},
    ],
)
def test_neutral_values(neutral):
    raw = PUBLISHED["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    assert read(raw | neutral) == read(raw)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 1024},
        {"rope_type": "dynamic", "factor": 1.0},
        {"rope_type": "default", "unheard_of": 2},
    ],
)
def test_scaling_with_an_effect_is_refused(scaling):
    with pytest.raises(ValueError, match="rope_type"):
        read(PUBLISHED["TinyLlama/TinyLlama-1.1B-Chat-v1.0"] | {"rope_scaling": scaling})


def test_two_names_of_an_activation():
    raw = PUBLISHED["openai-community/gpt2"]
    assert read(raw | {"activation_function": "gelu_pytorch_tanh"}) == read(raw)
    with pytest.raises(ValueError, match="activation_function is 'gelu'"):
        read(raw | {"activation_function": "gelu"})
