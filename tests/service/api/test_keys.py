"""API keys out of a file: read, refused, read again while it serves; named in the log, and never shown."""

import logging
from pathlib import Path

import pytest

from service.api.keys import ApiKeys, InvalidKeys, read_keys
from tests.support.load import PNG
from tests.support.serving import FakeDetector, detect, picture, serving

ALICE, BOB, NEW = "alice-" * 4, "bob-" * 6, "alice-new-" * 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may\n\nalice:{ALICE}\nbob:{BOB}\n")
    return path


def replace(path: Path, text: str) -> None:
    """As secret managers do it: a new file under the old name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_a_line_is_a_name_and_its_key(path: Path) -> None:
    assert read_keys(path) == [("alice", ALICE.encode()), ("bob", BOB.encode())]


def test_a_key_may_hold_colons_and_a_name_several_keys(path: Path) -> None:
    path.write_text(f"alice:{ALICE}:{ALICE}\nalice:{NEW}\n")
    assert read_keys(path) == [("alice", f"{ALICE}:{ALICE}".encode()), ("alice", NEW.encode())]


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        f":{ALICE}",
        "alice:fifteenletters1",
        "alice:a key of several words",
        "alice:schlüsselschlüssel",
        f"a lice:{ALICE}",
        f'"alice":{ALICE}',
        ALICE,
    ],
)
def test_a_line_that_is_none_is_told_by_its_number_alone(path: Path, line: str) -> None:
    path.write_text(f"bob:{BOB}\n{line}\n")
    with pytest.raises(InvalidKeys, match=r"line 2 of .* is not NAME:KEY with a key of 16 characters") as error:
        read_keys(path)
    assert "alice" not in str(error.value)


@pytest.mark.parametrize("text", ["", "# nobody yet\n\n"])
def test_a_file_without_a_key_does_not_open_the_service(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidKeys, match="holds no API key"):
        ApiKeys((), path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidKeys, match="No such file"):
        ApiKeys((), tmp_path / "typo")


def test_a_changed_file_holds_without_a_restart(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = ApiKeys((), path, look_seconds=0)
    assert keys.name_of(ALICE) == "alice"
    replace(path, f"alice:{ALICE}\nalice:{NEW}\n")
    assert (keys.name_of(ALICE), keys.name_of(NEW), keys.name_of(BOB)) == ("alice", "alice", None)
    replace(path, f"alice:{NEW}\n")
    assert (keys.name_of(ALICE), keys.name_of(NEW)) == (None, "alice")
    assert caplog.messages == ["read 2 API keys again, of alice", "read 1 API keys again, of alice"]


@pytest.mark.parametrize("text", ["", "alice:short", None], ids=["half written", "bad", "gone"])
def test_while_the_file_is_not_good_the_old_keys_hold_and_it_is_said_once(
    path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys((), path, look_seconds=0)
    path.unlink() if text is None else path.write_text(text)
    assert [keys.name_of(ALICE), keys.name_of(ALICE), keys.name_of("")] == ["alice", "alice", None]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    replace(path, f"alice:{NEW}\n")
    assert (keys.name_of(ALICE), keys.name_of(NEW)) == (None, "alice")


def test_the_file_is_looked_at_once_a_second_however_many_requests_come(path: Path) -> None:
    keys = ApiKeys((), path, look_seconds=60)
    replace(path, f"alice:{NEW}\n")
    assert keys.name_of(ALICE) == "alice"


def test_keys_of_the_setting_hold_beside_those_of_the_file(path: Path) -> None:
    keys = ApiKeys(["from-the-setting"], path)
    assert (keys.name_of("from-the-setting"), keys.name_of(BOB)) == ("key-1", "bob")
    assert not ApiKeys((), None)


def test_the_log_says_whose_request_it_was_and_no_key(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(FakeDetector(), api_keys_file=path) as server:
        assert detect(server, content=picture(), headers=PNG).status_code == 401
        assert detect(server, content=picture(), headers=PNG | {"X-API-Key": BOB}).status_code == 200
        lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert [(line["status"], line.get("key")) for line in lines] == [(401, None), (200, "bob")]
    assert not [record for record in caplog.records if BOB in str(record.__dict__)]
