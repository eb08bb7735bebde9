import pytest

from tests.client.driven import CLIENTS, MakeClient


@pytest.fixture(params=CLIENTS)
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    return CLIENTS[request.param]
