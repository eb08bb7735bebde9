"""Settings: flags, environment, errors in one line."""

from pathlib import Path

import pytest

from service.config import Settings, flag, parse_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"RETINASERVE_{name.upper()}", raising=False)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_settings(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_without_flags_the_defaults_hold() -> None:
    settings = parse_settings([])
    assert (settings.host, settings.port, settings.queue_capacity) == ("127.0.0.1", 8000, 32)
    assert settings.max_image_bytes == 20 * 2**20
    assert settings.score_threshold is None


def test_every_setting_is_a_flag_with_its_default_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_settings(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{flag(name)} " in text for name in Settings.model_fields)
    assert text.count("[") >= len(Settings.model_fields) - 1


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RETINASERVE_PORT", "9001")
    monkeypatch.setenv("RETINASERVE_MODEL", "/models/a.onnx")
    settings = parse_settings(["--port", "9002"])
    assert (settings.port, settings.model) == (9002, Path("/models/a.onnx"))


def test_a_folder_stands_for_the_one_onnx_file_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").touch()
    assert "exactly one .onnx file, and this holds 0" in error_of(capsys, "--model", str(tmp_path))
    (tmp_path / "a.onnx").touch()
    assert parse_settings(["--model", str(tmp_path)]).model_file == tmp_path / "a.onnx"
    (tmp_path / "b.onnx").touch()
    assert "this holds 2: a.onnx, b.onnx" in error_of(capsys, "--model", str(tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", "two words", "x" * 129])
def test_a_models_name_can_stand_in_a_path(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert parse_settings(["--model-name", "shapes.v2_1-b"]).model_name == "shapes.v2_1-b"
    assert "--model-name" in error_of(capsys, "--model-name", name)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_SCORE_THRESHOLD", "")
    assert parse_settings([]).score_threshold is None


def test_sizes_take_units_and_lists_take_commas() -> None:
    settings = parse_settings(["--max-image-bytes", "5MiB", "--api-keys", "a, b", "--cors-origins", "https://x"])
    assert settings.max_image_bytes == 5 * 2**20
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]
    assert settings.cors_origins == ("https://x",)


def test_origins_as_browsers_send_them_are_taken() -> None:
    origins = ("*", "http://localhost:3000", "https://xn--bcher-kva.example", "http://[::1]:80801")
    assert parse_settings(["--cors-origins", ",".join(origins)]).cors_origins == origins


def test_a_refused_key_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "geheim" not in error_of(capsys, "--api-keys", "geheim ü")


def test_keys_do_not_show_when_the_settings_are_logged() -> None:
    assert "geheim" not in str(parse_settings(["--api-keys", "geheim"]).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "99999"], "--port (RETINASERVE_PORT): input should be less than or equal to 65535, not '99999'"),
        (["--device", "tpu"], "'auto', 'cpu' or 'cuda', not 'tpu'"),
        (["--score-threshold", "nan"], "--score-threshold"),
        (["--queue-capacity", "0"], "--queue-capacity"),
        (["--model-sha256", "abc"], "--model-sha256"),
        (["--ssl-certfile", "a.pem"], "ssl_certfile and ssl_keyfile are needed together"),
        (["--prot", "1"], "unrecognized arguments: --prot 1"),
        (["--queue", "1"], "unrecognized arguments: --queue 1"),
        (["--port"], "expected one argument"),
        (["--api-keys", ","], "--api-keys (RETINASERVE_API_KEYS): it lists nothing"),
        (["--api-keys", ""], "it lists nothing"),
        (["--api-keys", "schlüssel"], "others arrive changed"),
        (["--api-keys", "good,two words"], "others arrive changed"),
        (["--api-keys", "tab\tin"], "others arrive changed"),
        (["--root-path", "detector"], "--root-path"),
        (["--root-path", "/detector/"], "--root-path"),
        (["--root-path", "/"], "--root-path"),
        (["--cors-origins", "https://a.example/"], "'https://a.example/' is no origin that a browser sends"),
        (["--cors-origins", "a.example"], "'a.example' is no origin"),
        (["--cors-origins", "https://ok.example,null"], "'null' is no origin"),
        (["--cors-origins", "https://*.example"], "is no origin"),
        (["--cors-origins", "https://A.example"], "is no origin"),
        (["--cors-origins", "https://a.example:443"], "is no origin"),
        (["--cors-origins", "https://bücher.example"], "is no origin"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in error_of(capsys, *arguments)


def test_a_wrong_or_unknown_variable_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINASERVE_PORT", "8000/tcp")
    assert "RETINASERVE_PORT" in error_of(capsys)
    monkeypatch.delenv("RETINASERVE_PORT")
    monkeypatch.setenv("RETINASERVE_QUEUE_CAPACTIY", "4")
    assert "unknown environment variable RETINASERVE_QUEUE_CAPACTIY" in error_of(capsys)


LINKS = {
    "RETINASERVE_PORT": "tcp://10.43.7.9:8000",
    "RETINASERVE_SERVICE_HOST": "10.43.7.9",
    "RETINASERVE_SERVICE_PORT": "8000",
    "RETINASERVE_SERVICE_PORT_HTTP": "8000",
    "RETINASERVE_PORT_8000_TCP": "tcp://10.43.7.9:8000",
    "RETINASERVE_PORT_8000_TCP_PROTO": "tcp",
    "RETINASERVE_PORT_8000_TCP_PORT": "8000",
    "RETINASERVE_PORT_8000_TCP_ADDR": "10.43.7.9",
}
"""Variables that the kubelet sets in a pod for a Service named retinaserve."""


def test_service_links_of_kubernetes_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RETINASERVE_QUEUE_CAPACITY", "4")
    settings = parse_settings([])
    assert (settings.port, settings.queue_capacity) == (8000, 4)
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert parse_settings(["--port", "9000"]).port == 9000


@pytest.mark.parametrize("name", ["RETINASERVE_SERVICE", "RETINASERVE_PORTS", "RETINASERVE_PORT_HTTP"])
def test_what_only_looks_like_a_service_link_is_unknown(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "tcp://10.43.7.9:8000")
    assert f"unknown environment variable {name}" in error_of(capsys)
