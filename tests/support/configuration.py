"""Make docs/configuration.md out of the settings: `make docs`, or python -m tests.support.configuration > FILE."""

import re

from service.config import ENV_PREFIX, Settings, flag, shown_default

HEAD = f"""# Configuration

Every setting of `python -m service` is a flag and an environment variable; the flag wins. An unknown flag or
`{ENV_PREFIX}` variable, or a value out of range, prints one line on standard error and exits with code 2. Sizes take
units (`20MiB`); lists are separated by commas. [operations.md](operations.md#settings) has the variables that Compose
itself reads, such as `REPLICAS`. `make docs` writes this page from `service/config.py`.

| flag | variable | default | what |
|---|---|---|---|
"""
NOTES = """
- `--model`: the service reloads a changed file, also on SIGHUP, without losing a request. A bad file changes nothing.
- `--device auto`: the log, `/model` and `retinaserve_provider_fallback` show when it falls back to the CPU.
- `--runs-at-once`: on a CPU a request that is alone still gets every core. Concurrent runs share the cores through a
  second session, which holds a second copy of the weights.
- `--drain-delay-seconds`: after SIGTERM `/readyz` is 503 for this time, while requests are still served. Then the
  requests in flight finish, and the exit code is 0.
- If you start the service yourself, set `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in its environment, as the images do:
  it lets a CPU use large pages.
"""
DEFAULT_IN_WORDS = re.compile(r" \[([^\]]*)\]$")


def page() -> str:
    return HEAD + "".join(_row(name) for name in Settings.model_fields) + NOTES


def _row(name: str) -> str:
    text = Settings.model_fields[name].description or ""
    in_words = DEFAULT_IN_WORDS.search(text)
    default = in_words[1] if in_words else f"`{shown_default(name)}`" if shown_default(name) else "none"
    what = DEFAULT_IN_WORDS.sub("", text)
    return f"| `{flag(name)}` | `{ENV_PREFIX}{name.upper()}` | {default} | {what} |\n"


if __name__ == "__main__":
    print(page(), end="")
