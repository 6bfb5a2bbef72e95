import pytest

from omni_convert.convert.source.hub_selection import REPO_FILE, REPO_ID, needed_files
from omni_convert.formats.errors import CheckpointError

PIPELINE = ["model_index.json", "README.md", "scheduler/scheduler_config.json", "transformer/config.json"]
SHARDS = ["transformer/a-00001-of-00002.safetensors", "transformer/a-00002-of-00002.safetensors"]
IN_GGUF = ["transformer/tiny-Q4_0.gguf", "transformer/tiny-Q8_0.gguf"]


def test_gguf_comes_only_where_nothing_else_is() -> None:
    assert needed_files("me/tiny", [*PIPELINE, *SHARDS, *IN_GGUF]) == {*PIPELINE, *SHARDS}
    assert needed_files("me/tiny", [*PIPELINE, IN_GGUF[0], "old/x.gguf", "x.gguf"]) == {*PIPELINE, IN_GGUF[0]}
    assert needed_files("me/tiny", ["README.md", "flux.gguf"]) == {"README.md", "flux.gguf"}


@pytest.mark.parametrize("names", [[*PIPELINE, *IN_GGUF], ["README.md", "a.gguf", "b.gguf"]])
def test_one_of_several_is_to_be_named(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"found 2 \.gguf files .*name the file that is meant, as me/tiny/\w"):
        needed_files("me/tiny", names)


def test_a_file_that_is_named_comes_alone_with_its_config() -> None:
    names = [*PIPELINE, *SHARDS, *IN_GGUF]
    assert needed_files("me/tiny", names, IN_GGUF[1]) == {IN_GGUF[1], "transformer/config.json"}
    assert needed_files("me/tiny", ["config.json", "x.gguf", "y.gguf"], "x.gguf") == {"config.json", "x.gguf"}
    with pytest.raises(CheckpointError, match=r"found no file 'transformer/tiny-Q8\.gguf'.*did you mean"):
        needed_files("me/tiny", names, "transformer/tiny-Q8.gguf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/tiny/transformer/a-Q8_0.gguf", ("me/tiny", "transformer/a-Q8_0.gguf")),
        ("me/tiny/flux1-dev.safetensors", ("me/tiny", "flux1-dev.safetensors")),
        ("me/tiny/transformer", None),
        ("/me/tiny/a.gguf", None),
        ("../tiny/a.gguf", None),
        ("me/a.gguf", None),
    ],
)
def test_what_names_a_file_of_a_repository(text: str, expected: tuple[str, str] | None) -> None:
    found = REPO_FILE.fullmatch(text)
    assert (found.groups() if found else None) == expected
    assert expected is None or REPO_ID.fullmatch(text) is None
