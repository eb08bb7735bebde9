"""The service with a leak put into it, for the soak test. python -m tests.support.leaking_service WHAT,… [FLAG…]"""

import os
import sys
import threading
from collections.abc import Callable

from starlette.datastructures import Headers

from service import __main__ as program
from service.api import uploads

kept: list[bytes] = []
LEAKS: dict[str, Callable[[], object]] = {
    "memory": lambda: kept.append(bytes(1500)),
    "descriptors": lambda: os.dup(2),
    "threads": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
}


class LeakingUploads(uploads.Uploads):
    """Leaves something behind: memory for each request, anything else for one in a hundred."""

    count = 0

    async def receive_form(
        self, form: uploads.Form[uploads.Content], max_body_bytes: int, headers: Headers, receive: uploads.Receive
    ) -> tuple[uploads.Content, int]:
        self.count += 1
        for what in sys.argv[1].split(","):
            if self.count % (1 if what == "memory" else 100) == 0:
                LEAKS[what]()
        return await super().receive_form(form, max_body_bytes, headers, receive)


if __name__ == "__main__":
    program.Uploads = LeakingUploads  # type: ignore[misc]
    sys.exit(program.main(sys.argv[2:]))
