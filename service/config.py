"""The service's settings. Each has a flag, an environment variable RETINASERVE_<NAME> and a default; the flag wins.

`Settings` is their only list: the flags and `--help` are made from its fields. An unknown flag or RETINASERVE_
variable, or a value out of range, prints one line on standard error and exits with code 2. Sizes take units (`20MiB`);
lists are separated by commas.
"""

import argparse
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.detector import Device
from model.image import MAX_PIXELS
from model.pretrained import demo_model
from service.logs import error_line

ENV_PREFIX = "RETINASERVE_"
PROGRAM = "python -m service"
SERVICE_LINK = re.compile(
    rf"{ENV_PREFIX}(PORT=(tcp|udp|sctp)://.*|SERVICE_(HOST|PORT(_\w+)?)=.*|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*)"
)
"""Variables that Kubernetes sets in every pod for a Service named retinaserve; they are not settings."""

MIB = 1024 * 1024
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
CommaSeparated = NoDecode
ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")

SHOWN_FILES = 3
MAX_BATCH_IMAGES = 16
"""Most images of one request."""
DetectionCount = Annotated[int, Field(ge=1, le=5000)]
OPTION_TEXTS = {
    "score_threshold": "keep detections with a higher score",
    "nms_threshold": "of two boxes of one class with a larger IoU, drop the one with the lower score",
    "max_detections": "keep at most this many detections, the best",
}
"""Help texts of the settings, and of the query parameters that override them in the OpenAPI document."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    model: Path | None = Field(
        None,
        description="the .onnx file to serve, or a folder with exactly one [the demo model, in int8 on a CPU with VNNI "
        "or AMX]",
    )
    model_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="the model's name in answers, metrics and /v2 [the name in the model file]",
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface, :: for IPv6 too")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: Device = Field("auto", description="auto uses CUDA if it works, else the CPU; cuda fails without CUDA")
    threads: int | None = Field(None, ge=1, description="CPU threads of one inference [the cores available]")
    gpu_memory_limit_bytes: ByteSize | None = Field(
        None, gt=0, description="GPU memory for all sessions [0.8 of the free memory at start]"
    )

    score_threshold: Share | None = Field(None, description=f"{OPTION_TEXTS['score_threshold']} [the model file's]")
    nms_threshold: Share | None = Field(None, description=f"{OPTION_TEXTS['nms_threshold']} [the model file's]")
    max_detections: DetectionCount | None = Field(
        None, description=f"{OPTION_TEXTS['max_detections']} [the model file's]"
    )

    max_image_bytes: ByteSize = Field(ByteSize(20 * MIB), gt=0, description="largest encoded image, bytes")
    max_image_pixels: int = Field(MAX_PIXELS, gt=0, description="largest image, pixels (width times height)")
    max_upload_bytes_in_flight: ByteSize = Field(
        ByteSize(256 * MIB),
        gt=0,
        description="most bytes of all bodies being received or answered, and of one batch; the memory for requests "
        "may lower it, see docs/security.md",
    )
    upload_timeout_seconds: PositiveSeconds = Field(10, description="time for a request's body to arrive")
    write_timeout_seconds: PositiveSeconds = Field(
        30, description="time without a byte taken by the client, after which an answer is given up"
    )
    keep_alive_seconds: PositiveSeconds = Field(75, description="time that an idle connection stays open")

    max_tiles: int = Field(256, ge=1, description="most windows of a picture with tiles; more get 422")
    queue_capacity: int = Field(32, ge=1, description="images that may wait or run at once; more get 429")
    max_batch_size: int | None = Field(None, ge=1, le=64, description="images per inference [1 on the CPU, 8 on CUDA]")
    runs_at_once: int | None = Field(
        None,
        ge=1,
        le=8,
        description="batches on the device at once; on the CPU under concurrent load only [2; on the CPU with a model "
        "file over 64 MiB, 1]",
    )
    max_batch_delay_seconds: Seconds = Field(0, description="time to wait for a batch to fill while the device is free")
    request_timeout_seconds: PositiveSeconds = Field(
        30, description="time from a complete body to the answer; later is 504"
    )
    decode_threads: int | None = Field(None, ge=1, description="threads that decode and resize [the cores available]")

    drain_delay_seconds: Seconds = Field(
        5, description="time after SIGTERM in which the service is not ready but still serves"
    )
    model_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="hash that the model file must have [any]"
    )
    model_load_timeout_seconds: PositiveSeconds = Field(
        300, description="time to open and warm up a model file; later it is refused"
    )
    model_poll_seconds: Seconds = Field(5, description="time between looks for a changed model file; 0: only at SIGHUP")

    api_keys: Annotated[tuple[SecretStr, ...], CommaSeparated] = Field(
        (), description="keys, of which a client must send one; ASCII without spaces or commas [open]"
    )
    api_keys_file: Path | None = Field(
        None, description="file of more keys, one line NAME:KEY each, 16 characters at least; read again on a change"
    )
    cors_origins: Annotated[tuple[str, ...], CommaSeparated] = Field(
        (), description="web origins whose pages may call the service [none]"
    )
    root_path: str | None = Field(
        None,
        pattern=r"^(/[A-Za-z0-9._~-]+)+$",
        description="path prefix below which a proxy serves the API, such as /detector; for the OpenAPI document",
    )
    docs: bool = Field(True, description="serve /docs and /openapi.json: true or false")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto is text on a terminal, else JSON lines"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug logs probes too")
    ssl_certfile: Path | None = Field(None, description="TLS certificate chain, PEM [plain HTTP]")
    ssl_keyfile: Path | None = Field(None, description="private key of the certificate, PEM")

    @property
    def model_file(self) -> Path:
        """The file that `model` names, or the demo model's file that suits this machine best."""
        return self.model or demo_model(self.device)

    @field_validator("model")
    @classmethod
    def _folder_holds_one(cls, model: Path | None) -> Path | None:
        """Take the one file of a folder. A path that cannot be read fails later, when it is opened."""
        try:
            if model is None or not model.is_dir():
                return model
        except OSError:
            return model
        files = sorted(model.glob("*.onnx"))
        if len(files) != 1:
            names = f": {', '.join(file.name for file in files[:SHOWN_FILES])}" if files else ""
            raise ValueError(f"a folder must hold exactly one .onnx file, and this holds {len(files)}{names}")
        return files[0]

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if not parts:
            raise ValueError("it lists nothing: leave it out to mean none")
        return parts

    @field_validator("api_keys")
    @classmethod
    def _keys_can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(re.fullmatch("[!-~]+", key.get_secret_value()) for key in keys):
            raise ValueError("keys are of ASCII letters, digits and signs, without spaces: others arrive changed")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            default_port = {"http": ":80", "https": ":443"}.get(origin.partition(":")[0], " ")
            if origin != "*" and (not ORIGIN.fullmatch(origin) or origin.endswith(default_port)):
                raise ValueError(f"{origin!r} is no origin that a browser sends, such as https://app.example or *")
        return origins

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile are needed together")
        return self


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    program = PROGRAM
    """The name that its errors begin with."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, error_line(self.program, message, os.environ.get(f"{ENV_PREFIX}LOG_FORMAT", "auto")))


def add_setting_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(Settings.model_fields)) -> None:
    """Make a flag of each of these settings."""
    for name in names:
        default = f" [{shown_default(name)}]" if shown_default(name) else ""
        parser.add_argument(
            flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(name),
            help=f"{Settings.model_fields[name].description}{default}",
        )


def read_settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Settings:
    """Read the settings from these flags and the environment; if one is wrong, print one line and exit with code 2.

    Kubernetes' service links are removed from the environment.
    """
    flags = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in [name for name, value in os.environ.items() if SERVICE_LINK.fullmatch(f"{name}={value}")]:
        del os.environ[name]
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    if unknown:
        parser.error(f"unknown environment variable {', '.join(unknown)}: see --help for the settings")
    try:
        return Settings(**flags)
    except ValidationError as error:
        parser.error("; ".join(_explain(each["loc"], each["msg"], each["input"]) for each in error.errors()))


def parse_settings(arguments: Sequence[str]) -> Settings:
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--SETTING VALUE …]",
        allow_abbrev=False,
        description="Serve a detector over HTTP. Every flag is also an environment variable: "
        f"--max-image-bytes is {ENV_PREFIX}MAX_IMAGE_BYTES. Defaults are in [].",
        epilog=f"`{PROGRAM} detect` detects in files, without a server; see its --help.",
    )
    add_setting_flags(parser)
    return read_settings(parser, parser.parse_args(arguments))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(name: str) -> str:
    choices = {"device": "auto|cpu|cuda", "docs": "true|false", "log_format": "auto|json|text"}
    return choices.get(name, name.rsplit("_", 1)[-1].upper())


def shown_default(name: str) -> str:
    """Show the default of a setting in help texts; empty if there is none, or if the description has it."""
    default = Settings.model_fields[name].default
    if default is None or default == ():
        return ""
    if isinstance(default, ByteSize):
        return default.human_readable()
    if isinstance(default, Path):
        return default.name
    return str(default).lower() if isinstance(default, bool) else str(default)


def _explain(location: tuple[int | str, ...], message: str, value: object) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    name = str(location[0])
    came = "" if name == "api_keys" else f", not {value!r}"
    return f"{flag(name)} ({ENV_PREFIX}{name.upper()}): {message[0].lower()}{message[1:]}{came}"
