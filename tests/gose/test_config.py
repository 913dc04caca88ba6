import random
import re

import pytest
from pydantic import ValidationError

from gose import config
from gose.config import SystemConfig
from gose.recipes import RECIPES

DEFAULT = SystemConfig()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_toml(name):
    recipe = RECIPES[name]()
    assert config.parse(config.dump(recipe)) == recipe


@pytest.mark.parametrize(
    "path",
    [
        "/data",
        "with space",
        'quote " and \\ back',
        "tab\tnew\nline",
        "umläut ✓ 🙂",
        "del\x7f",
        "a,b",
    ],
)
def test_strings_survive_toml(path):
    changed = DEFAULT.model_copy(
        update={"data": DEFAULT.data.model_copy(update={"root": path}), "threads": 3}
    )
    assert config.parse(config.dump(changed)) == changed


def test_floats_survive_toml_to_the_last_bit():
    source = random.Random(0)
    for _ in range(200):
        lr = source.uniform(0.5, 1) * 10.0 ** source.randint(-300, 300)
        changed = config.override(DEFAULT, [f"teacher.lr={lr!r}"])
        assert changed.teacher.lr == lr
        assert config.parse(config.dump(changed)).teacher.lr == lr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["preserve=none"], {"preserve": {"method": "none"}}),
        (["preserve='none'"], {"preserve": {"method": "none"}}),
        (["preserve.fraction=0.5"], {"preserve": {"fraction": 0.5}}),
        (
            ["preserve.fraction=0.5", "preserve=random"],
            {"preserve": {"fraction": 0.5, "method": "random"}},
        ),
        (["preserve=random", "preserve=none"], {"preserve": {"method": "none"}}),
        (["route=uniform", "route.top_k = 2"], {"route": {"method": "uniform", "top_k": 2}}),
        (["codec=none"], {"codec": {"method": "none"}}),
        (["merge=none"], {"merge": {"method": "none"}}),
        (["sites.num_sites=4"], {"sites": {"num_sites": 4}}),
        (["data.root=/a=b,c d"], {"data": {"root": "/a=b,c d"}}),
        (["data.root=true story"], {"data": {"root": "true story"}}),
        (["seeds=7"], {"seeds": (7,)}),
        (["seeds=3,1"], {"seeds": (3, 1)}),
        (["seeds=[3, 1]"], {"seeds": (3, 1)}),
        (["arms="], {"arms": ()}),
        (["arms=codec=none,merge=none"], {"arms": ("codec=none", "merge=none")}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_override_changes_exactly_what_it_names(settings, expected):
    wanted = DEFAULT.model_dump()
    for key, value in expected.items():
        if isinstance(value, dict):
            wanted[key] |= value
        else:
            wanted[key] = value
    assert config.override(DEFAULT, settings).model_dump() == wanted


def test_a_bare_string_in_a_file_is_the_method():
    assert config.parse('preserve = "none"').preserve.method == "none"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("preserv=none", "preserv is not a key; did you mean preserve?"),
        (
            "preserve.fracton=1",
            "did you mean preserve.fraction? (keys of preserve: method, fraction",
        ),
        ("fraction=1", "fraction is not a key; did you mean preserve.fraction?"),
        ("preserve.fraction.x=1", "preserve.fraction.x is not a key"),
        (
            "preserve=nonee",
            "preserve.method must be one of fisher, random, none, got 'nonee'; did you mean none?",
        ),
        ("preserve=3", "preserve.method must be one of"),
        (
            "preserve.fraction=2",
            "preserve.fraction: input should be less than or equal to 1, got 2",
        ),
        ("teacher.lr=nan", "teacher.lr: input should be a finite number, got nan"),
        ("teacher.lr=0", "greater than 0"),
        ("teacher.width=2.5", "teacher.width: input should be a valid integer"),
        ("data=mnist", "data has no method; its keys: data.tasks"),
        ("seeds=1,1", "seeds must differ from each other, got [1, 1]"),
        ("seeds=", "seeds: tuple should have at least 1 item"),
        ("seeds=1,x", "seeds.1: input should be a valid integer"),
        (
            "arms=preserv=none",
            "arm 'preserv=none': --set preserv=none: preserv is not a key; did you mean preserve?",
        ),
        ("arms=teacher.epochs=2", "arm 'teacher.epochs=2' must change one of preserve, route"),
        ("arms=seeds=5", "arm 'seeds=5' must change one of preserve, route, sites, codec, merge"),
        ("distill.width=400", "distill.width must be at most teacher.width (256), got 400"),
        ("teacher.hidden=300", "distill.hidden must be at most teacher.hidden (300), got 384"),
        ("preserve", "--set wants key=value, got 'preserve'"),
        ("=none", "--set wants key=value, got '=none'"),
        ("seeds=1\narms=[]", "seeds"),
    ],
)
def test_override_refuses_with_the_reason(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config.override(DEFAULT, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preserv = 1", "run.toml: preserv is not a key; did you mean preserve?"),
        ("[preserve]\nmethd = 1", "preserve.methd is not a key; did you mean preserve.method?"),
        ("[preserve]\nmethod = 'fischer'", "got 'fischer'; did you mean fisher?"),
        ("[sites]\nnum_sites = 'x'\nlr = -1", "sites.num_sites: input should be a valid integer"),
        ("seeds = ", "run.toml: not valid TOML"),
        ("data = 'mnist'", "data has no method; its keys: tasks"),
        ("seeds = [1]\nseeds = [2]", "not valid TOML"),
    ],
)
def test_parse_refuses_with_the_reason(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config.parse(text, where="run.toml")


def test_parse_names_every_problem_at_once():
    with pytest.raises(ValueError) as caught:
        config.parse("[sites]\nnum_sites = 0\nfoo = 1\n[codec]\nmethod = 'zip'")
    for key in ("sites.num_sites", "sites.foo", "codec.method"):
        assert key in str(caught.value)


def test_load_says_why_a_file_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        config.load(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        config.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[data]\nroot = "\xe9"')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        config.load(tmp_path / "latin.toml")


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        DEFAULT.preserve.method = "none"
