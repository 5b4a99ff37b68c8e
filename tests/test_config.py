"""SparseConfig: defaults, the forms that vLLM's command line gives, and what errors say."""

from __future__ import annotations

import pytest

from vllm_sparse.config import SparseConfig


def parse(**settings) -> SparseConfig:
    return SparseConfig.from_additional_config({"sparse": settings})


@pytest.mark.parametrize("nothing", [None, {}, {"other": 1}, {"sparse": {}}, {"sparse": None}])
def test_defaults(nothing):
    config = SparseConfig.from_additional_config(nothing)
    assert config.model_dump() == {
        "coverage": 0.95,
        "break_even": None,
        "patterns": None,
        "decode": "dense",
        "softmax": "online",
        "linear": "vllm",
        "dense_layers": (),
        "shared_prefix": None,
        "mean_correction": False,
        "window": 1024,
        "sink": 16,
        "actors": 0,
        "ray": False,
        "rows": None,
        "sampler_options": (),
        "resident_layers": (0,),
        "host_gib": None,
        "host_dtype": "auto",
    }
    assert not config.offloads


def test_what_is_given_is_kept():
    config = parse(
        coverage=1, break_even=0, patterns="p.json", decode="dense", softmax="online",
        dense_layers=[3, 0, 3],
    )  # fmt: skip
    assert (config.coverage, config.break_even, config.patterns) == (1.0, 0, "p.json")
    assert config.dense_layers == (0, 3)


@pytest.mark.parametrize("softmax", ["online", "lazy", "unified"])
def test_every_softmax_mode_is_taken(softmax):
    assert parse(softmax=softmax).softmax == softmax


def test_it_cannot_be_changed():
    with pytest.raises(ValueError):
        parse().coverage = 0.5


# What `--additional-config.sparse.KEY VALUE` can leave as text, and numbers for lists.
@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("coverage", "0.9", 0.9),
        ("break_even", "2048", 2048),
        ("dense_layers", 3, (3,)),
        ("dense_layers", "0,3", (0, 3)),
        ("dense_layers", ["0", "3"], (0, 3)),
        ("resident_layers", "[]", ()),
        ("resident_layers", "", ()),
        ("resident_layers", [2, 0], (0, 2)),
        ("window", "256", 256),
        ("host_gib", "1.5", 1.5),
        ("ray", False, False),
        ("ray", "false", False),
        ("mean_correction", "true", True),
        ("shared_prefix", "false", False),
        ("shared_prefix", None, None),
    ],
)
def test_text_from_the_command_line(key, value, expected):
    assert getattr(parse(**{key: value}), key) == expected


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("coverage", 1.5, "a number from 0 to 1"),
        ("coverage", -0.1, "a number from 0 to 1"),
        ("coverage", float("nan"), "a number from 0 to 1"),
        ("coverage", True, "a number from 0 to 1"),
        ("coverage", None, "a number from 0 to 1"),
        ("break_even", -1, "a whole number of tokens from 0"),
        ("break_even", 0.5, "a whole number of tokens from 0"),
        ("break_even", True, "a whole number of tokens from 0"),
        ("break_even", "auto", "a whole number of tokens from 0"),
        ("patterns", 3, "the path of a pattern file"),
        ("dense_layers", [True], "layer numbers"),
        ("decode", "sparse", '"dense", "exact", "lsh", "vattention" or "topk"'),
        ("decode", "magicpig", '"dense", "exact", "lsh", "vattention" or "topk"'),
        ("rows", 15, "a whole number from 16"),
        ("rows", 99.5, "a whole number from 16"),
        ("rows", True, "a whole number from 16"),
        ("ray", "here", "true or false"),
        ("ray", None, "true or false"),
        ("mean_correction", "blocks", "true or false"),
        ("shared_prefix", 1024, "true or false"),
        ("mean_correction", None, "true or false"),
        ("sampler_options", 0.1, "an object with options of the sampler"),
        ("sampler_options", {"epsilon": True}, "an object with options of the sampler"),
        ("sampler_options", {"epsilon": "small"}, "an object with options of the sampler"),
        ("window", 15, "a whole number of tokens from 16"),
        ("window", True, "a whole number of tokens from 16"),
        ("sink", -1, "a whole number of tokens from 0"),
        ("host_gib", 0, "a number above 0"),
        ("actors", -1, "a whole number from 0"),
        ("actors", "node", '"numa": one for each NUMA node'),
        ("actors", True, "a whole number from 0"),
        ("host_gib", float("inf"), "a number above 0"),
        ("host_gib", True, "a number above 0"),
        ("host_dtype", "fp8", '"auto" (the model\'s) or "int8"'),
        ("host_dtype", None, '"auto" (the model\'s) or "int8"'),
        ("resident_layers", [-1], "a list of layer numbers from 0"),
        ("softmax", None, '"online", "lazy" or "unified"'),
        ("dense_layers", [-1], "a list of layer numbers from 0"),
        ("dense_layers", "last", "a list of layer numbers from 0"),
        ("dense_layers", {"0": 1}, "a list of layer numbers from 0"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError) as error:
        parse(**{key: value})
    text = str(error.value)
    assert text.startswith(f'additional_config["sparse"]["{key}"] is {value!r}: allowed is ')
    assert allowed in text


def test_an_unknown_key_suggests_the_known_one():
    with pytest.raises(ValueError) as error:
        parse(coverge=0.9)
    text = str(error.value)
    assert "unknown key 'coverge'" in text
    assert 'did you mean "coverage"?' in text
    assert "break_even" in text
    with pytest.raises(ValueError, match="unknown key '1'"):
        SparseConfig.from_additional_config({"sparse": {1: 2}})


def test_every_error_is_said_at_once():
    with pytest.raises(ValueError) as error:
        parse(budget=3, coverage=2, softmax="offline")
    assert [x.split(":")[0] for x in str(error.value).splitlines()] == [
        'additional_config["sparse"]["coverage"] is 2',
        'additional_config["sparse"]["softmax"] is \'offline\'',
        "additional_config[\"sparse\"] has the unknown key 'budget'",
    ]


@pytest.mark.parametrize("decode", ["lsh", "vattention", "topk"])
def test_sampled_decode(decode):
    config = parse(decode=decode, rows="512", sampler_options={"share": "0.05", "least": 64})
    assert config.samples and config.offloads
    assert (config.rows, dict(config.sampler_options)) == (512, {"share": 0.05, "least": 64})
    hash(config)  # it is a key of what a process settles once
    assert not parse(decode="exact").samples


@pytest.mark.parametrize("given, actors", [(2, 2), ("2", 2), ("numa", "numa")])
def test_actors_are_a_number_or_one_for_each_node(given, actors):
    config = parse(decode="exact", actors=given, ray=True)
    assert config.actors == actors
    hash(config)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"decode": "exact", "rows": 64}, '["rows"] is for decode that samples'),
        ({"rows": 64}, "[\"decode\"] is 'dense': set it to one of lsh, vattention, topk"),
        ({"decode": "exact", "sampler_options": {"share": 0.1}}, '["sampler_options"] is for'),
        ({"decode": "lsh", "ray": True}, '["actors"] is 0: set it to 1 or more'),
        ({"decode": "lsh", "ray": "true"}, '["ray"] makes the actors Ray actors'),
    ],
    ids=str,
)
def test_settings_that_say_nothing_beside_the_others(settings, says):
    with pytest.raises(ValueError) as error:
        parse(**settings)
    assert says in str(error.value)


def test_the_section_must_be_an_object():
    with pytest.raises(ValueError, match="is 5: allowed is an object with settings"):
        SparseConfig.from_additional_config({"sparse": 5})


def test_dense_layers_must_exist():
    config = parse(dense_layers=[0, 4])
    config.check_layers(5)
    with pytest.raises(ValueError, match=r"names \[4\]: the model has the layers 0 to 3"):
        config.check_layers(4)
    with pytest.raises(ValueError, match=r'"resident_layers"\] names \[9\]'):
        parse(resident_layers=[0, 9], decode="exact").check_layers(4)


def test_a_shared_prefix_is_of_pages_on_the_device():
    assert parse(shared_prefix=False, decode="exact").shared_prefix is False
    with pytest.raises(ValueError, match=r'"shared_prefix"\] is for decode "dense".* \'lsh\''):
        parse(shared_prefix=True, decode="lsh")
