"""The commands in README.md run, and the documents name files, names and links that exist."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from pydantic_core import to_jsonable_python

from preprocess.__main__ import cli as preprocess_cli
from shared.config import make_section
from shared.recipe import MOVED_KEYS, Recipe, load_recipe
from shared.streams import (
    AudioStream,
    Expectation,
    Kind,
    SensorStream,
    TextStream,
    ValueType,
    VideoStream,
)
from train.__main__ import cli as train_cli
from train.config import TrainConfig, load_train_config
from train.data.batch import array_forms
from train.loop.health import RULES
from train.shapes import WindowShapes, common_period_s

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIS = {"preprocess": preprocess_cli, "train": train_cli}
PACKAGES = ("shared", "preprocess", "train")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(prefix):
    found = re.findall(rf"^{prefix} [^\n`#]*", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert found, f"README names no {prefix} command"
    return [line.strip() for line in found]


@pytest.mark.parametrize("line", commands("python -m"))
def test_every_python_command_of_the_readme_is_one_of_ours(line):
    _, _, program, name, *arguments = shlex.split(line)
    command = CLIS[program].commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {a for a in arguments if a.startswith("--")} <= known


@pytest.mark.parametrize("line", commands("torchrun"))
def test_every_torchrun_line_of_the_readme_starts_a_training(line):
    _, _, rest = line.partition(" -m ")
    program, name, *arguments = shlex.split(rest)
    known = {option for p in CLIS[program].commands[name].params for option in p.opts}
    assert {a for a in arguments if a.startswith("--")} <= known
    parser = torch.distributed.run.get_args_parser()
    assert parser.parse_args(shlex.split(line)[1:]).training_script == "train"


@pytest.mark.parametrize("line", commands("make"))
def test_every_make_target_of_the_readme_is_in_the_makefile(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_streams_of_the_readme_are_a_recipe(tmp_path):
    block, _ = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert {spec.kind for spec in load_recipe(tmp_path / "recipe.yaml").streams.values()} == set(
        Kind
    )


def test_the_configuration_of_the_readme_is_valid():
    _, block = blocks("yaml")
    config = make_section(TrainConfig, yaml.safe_load(block))
    assert config.training.optimizer.lr == 3e-4


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_stock_reader_of_the_readme_joins_a_shard(tiny_set, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "demo").symlink_to(tiny_set)
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in blocks("python") if "webdataset" in b)
    names = {}
    exec(block, names)
    names["store"].close()
    assert {"audio.wav", "internal_text.json"} <= set().union(*names["samples"].values())
    assert names["proprio"].shape[0] >= len(names["samples"]) > 0


def test_the_python_run_of_the_readme_ends_and_blocks_no_other_run():
    (block,) = (b for b in blocks("python") if "trainer.train()" in b)
    names = {"yaml": yaml, "open": lambda path: (ROOT / path).read_text()}
    exec("".join(line for line in block.splitlines(True) if line.startswith("config")), names)
    training = make_section(TrainConfig, names["config"]).training
    assert training.log_interval <= 5 < training.max_steps <= 100
    shipped = [
        load_train_config(path)
        for path in (ROOT / "configs").glob("*.yaml")
        if "recipe" not in path.name and path.name != "any_session.yaml"
    ]
    folders = {config.training.checkpointing.save_dir for config in shipped}
    assert training.checkpointing.save_dir not in folders


# --- the map of the code -----------------------------------------------------------------------


def section(title):
    return ARCHITECTURE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def source_tree():
    """The files that the source tree of docs/architecture.md lists."""
    folders, files = [], set()
    for line in section("Source tree").split("```")[1].strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            files.add("/".join(folders))
    return files


def test_the_source_tree_lists_every_module_and_nothing_else():
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    listed = source_tree()
    assert {name for name in listed if name.endswith(".py")} == modules
    assert [name for name in sorted(listed) if not (ROOT / name).is_file()] == []


def defines(path, name):
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.search(rf"^ *(def|class) {name}\b|^{name}\b[^=\n]*= ", text, flags=re.MULTILINE)


def test_where_do_i_find_names_files_and_the_names_in_them():
    rows = [line.split(" | ") for line in section("Where do I find").splitlines() if ".py`" in line]
    assert len(rows) > 15
    for question, files, names in rows:
        paths = re.findall(r"`([\w/]+\.py)`", files)
        for name in re.findall(r"`(\w+)`", names):
            assert any(defines(path, name) for path in paths), (question, name)


def test_the_vocabulary_of_the_architecture_page_is_a_table_without_repeats():
    words = re.findall(r"^\| ([\w ,]+) \| ", section("Vocabulary"), flags=re.MULTILINE)
    assert len(words) == len(set(words)) > 20


# --- the page about streams ----------------------------------------------------------------------


STREAMS_PAGE = (ROOT / "docs" / "streams.md").read_text(encoding="utf-8")
STREAM_OF_KIND = {
    "video": VideoStream,
    "audio": AudioStream,
    "sensor": SensorStream,
    "text": TextStream,
}


STREAMS_RECIPE, GAZE_LINES, STREAMS_CONFIG = re.findall(
    r"```yaml\n(.*?)```", STREAMS_PAGE, flags=re.DOTALL
)


def read_recipe(folder, text):
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


def key_table(before):
    """The keys of the table that follows a line, with their defaults."""
    table = STREAMS_PAGE.split(f"\n{before}\n\n| key | default | meaning |\n")[1].split("\n\n")[0]
    cells = (line.strip("| ").split(" | ")[:2] for line in table.splitlines()[1:])
    return {name.strip("`"): yaml.safe_load(default) for name, default in cells}


def defaults_of(section):
    """The keys of a section with their defaults, as plain values."""
    return {
        name: "required" if field.is_required() else to_jsonable_python(field.default)
        for name, field in section.model_fields.items()
    }


def test_the_recipe_of_the_streams_page_is_valid_and_has_every_kind(tmp_path):
    recipe = read_recipe(tmp_path, STREAMS_RECIPE)
    assert {spec.kind for spec in recipe.streams.values()} == set(Kind)
    assert recipe.sensors["gaze"].gap_limit_s == 0.25
    assert all(spec.gap_limit_s * spec.rate_hz > 1 for spec in recipe.sensors.values())
    types = {group.type for spec in recipe.sensors.values() for group in spec.values}
    assert {"position", "quaternion", "direction", "scalar"} <= types


def test_five_lines_add_the_gaze_to_the_default_streams(tmp_path):
    default = (ROOT / "configs" / "recipe.yaml").read_text(encoding="utf-8")
    recipe = read_recipe(tmp_path, default.replace("streams:", "streams:\n" + GAZE_LINES, 1))
    assert len(GAZE_LINES.splitlines()) == 5
    assert recipe.streams.keys() - Recipe().streams.keys() == {"gaze"}


def test_the_training_configuration_of_the_streams_page_fits_its_recipe(tmp_path):
    config = make_section(TrainConfig, yaml.safe_load(STREAMS_CONFIG))
    shapes = WindowShapes.from_recipe(read_recipe(tmp_path, STREAMS_RECIPE), config)
    assert set(shapes.heads) == {"voice", "head", "gaze", "operator"}
    assert shapes.num_ticks == 80


def test_the_periods_that_the_streams_page_names_are_those_of_the_code():
    assert common_period_s([5, 30, 50, 10]) == Fraction("0.2")
    assert common_period_s([5, 30, 50, 10, 7]) == 1


@pytest.mark.parametrize("kind", STREAM_OF_KIND)
def test_the_keys_of_each_kind_on_the_streams_page_are_those_of_the_code(kind):
    common = key_table("Keys of every stream:")
    own = defaults_of(STREAM_OF_KIND[kind])
    assert common.keys() <= own.keys()
    expected = {name: default for name, default in own.items() if name not in common}
    assert key_table(f"**{kind}**") == expected


def test_the_expectations_of_the_streams_page_are_those_of_the_code():
    assert key_table("Keys of `expect`:") == defaults_of(Expectation)


def test_the_value_types_of_the_pages_are_those_of_the_code():
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for page in (STREAMS_PAGE, training.split("\n## Value types\n")[1]):
        table = re.split(r"\n\| type \|[^\n]*\n", page)[1].split("\n\n")[0]
        names = [name for line in table.splitlines() for name in re.findall(r"^\| (`[^|]*)", line)]
        assert sorted(re.findall(r"`(\w+)`", " ".join(names))) == sorted(ValueType)


def test_the_arrays_of_the_batch_page_are_those_of_the_default_recipe():
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    listed = re.findall(r'"(\w+)": +(\w+) \[B((?:, \d+)*)\]', block)
    forms = array_forms(
        1, shapes=WindowShapes.from_recipe(Recipe(), TrainConfig()), pixels="yuv420"
    )
    assert {name: (dtype, shape) for name, dtype, shape in listed} == {
        name: (str(form.dtype), "".join(f", {size}" for size in form.shape[1:]))
        for name, form in forms.items()
    }


# --- the table of health rules -----------------------------------------------------------------


def test_the_health_rules_of_the_training_page_are_those_of_the_code():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    head = "| rule | metric | good range | warns about | action |\n"
    table = text.split(head)[1].split("\n\n")[0]
    rows = [tuple(line.strip("| ").split(" | ")) for line in table.splitlines()[1:]]
    assert rows == [(r.name, f"`{r.metric}`", r.good, r.warning, r.advice) for r in RULES]


# --- paths, names and links ----------------------------------------------------------------------


def prose(page):
    """A page, without the old names in the first column of the renames."""
    text = (ROOT / page).read_text(encoding="utf-8")
    is_table = page == "docs/renames.md"
    return re.sub(r"^\| [^|]*", "", text, flags=re.MULTILINE) if is_table else text


def test_the_renamed_modules_are_gone():
    text = (ROOT / "docs" / "renames.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `(\w+\.[\w.]+)` \|", text, flags=re.MULTILINE)
    assert len(names) > 80
    # shared.media and shared.session were modules and are packages now
    assert {n for n in names if find_spec_or_none(n)} == {"shared.media", "shared.session"}


def test_every_recipe_key_that_moved_is_in_the_table_of_renames():
    text = (ROOT / "docs" / "renames.md").read_text(encoding="utf-8")
    keys = re.findall(
        r"^\| `([\w.]+)` \|", text.split("\n## Recipe keys\n")[1].split("\n## ")[0], re.MULTILINE
    )
    assert sorted(keys) == sorted(MOVED_KEYS)


def find_spec_or_none(name):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its package is gone
        return None


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    top = "|".join((*PACKAGES, "tests", "configs", "docs"))
    paths = set(re.findall(rf"(?<![\w/.])(?:{top})/[\w/]+\.(?:py|yaml|md)\b", prose(page)))
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_of_ours_that_a_page_mentions_can_be_imported(page):
    for name in set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)`", prose(page))):
        assert pkgutil.resolve_name(name) is not None


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve().relative_to(ROOT) if path else Path(page)
        assert (ROOT / target).exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_the_map_of_the_code():
    assert "docs/architecture.md#where-do-i-find" in README
    assert len(README.splitlines()) <= 150
