"""Makes docs/configuration.md out of the settings: `make docs`, or python -m tests.support.configuration > FILE."""

import re

from service.config import ENV_PREFIX, Settings, flag, shown_default

HEAD = f"""# Configuration

Every setting of `python -m service` is a flag and an environment variable. The flag wins. An unknown flag or
`{ENV_PREFIX}` variable, or a value out of range, is one line on standard error and exit code 2. Sizes take units
(`20MiB`); lists are separated by commas. What Compose itself reads, such as `REPLICAS`, is in
[operations.md](operations.md#settings). `make docs` writes this page from `service/config.py`.

| flag | variable | default | what |
|---|---|---|---|
"""
NOTES = """
- `--model`: a changed file, or SIGHUP, reloads it without losing a request; a bad one changes nothing.
- `--device auto` falls back to the CPU loudly: in the log, in `/model` and by `retinaserve_provider_fallback`.
- `--runs-at-once`: on a CPU a request that is alone still gets every core. Concurrent runs share the cores through a
  second session, which holds a second copy of the weights.
- `--drain-delay-seconds`: after SIGTERM `/readyz` says 503 while requests are still served. Then what is in flight
  finishes, and the exit code is 0.
- Where you start the service yourself, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in its environment lets a CPU use large
  pages, as in the images.
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
