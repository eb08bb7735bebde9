"""The layers around every request: its id, keys, other origins."""

from tests.support.serving import PNG, FakeDetector, Serving, assert_problem, detect, picture, serving


def test_a_request_id_is_taken_over_or_made(server: Serving) -> None:
    given = detect(server, content=picture(), headers=PNG | {"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "abc-1"
    for unfit in ("", "two words", "x" * 200):
        made = detect(server, content=picture(), headers=PNG | {"X-Request-ID": unfit})
        assert made.headers["x-request-id"] == made.json()["request_id"] != unfit


def test_with_keys_set_a_request_needs_one_but_a_probe_does_not() -> None:
    with serving(FakeDetector(), api_keys="first,second") as server:
        for headers in ({"Authorization": "Bearer second"}, {"X-API-Key": "first"}):
            assert detect(server, content=picture(), headers=PNG | headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}, {"X-API-Key": ""}, {"Authorization": "Basic first"}):
            response = detect(server, content=picture(), headers=PNG | headers)
            assert_problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/metrics").status_code == server.client.get("/model").status_code == 401
        assert server.client.get("/healthz").status_code == server.client.get("/readyz").status_code == 200
        assert server.metric("retinaserve_requests_total", outcome="invalid") == 4


def test_cors_is_off_unless_an_origin_is_set() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serving(FakeDetector(), cors_origins="https://a.example", api_keys="k") as server:
        response = server.client.options("/detect", headers=preflight)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        asked = preflight | {"Access-Control-Request-Headers": "traceparent,x-api-key"}
        response = server.client.options("/detect", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-headers"] == "traceparent,x-api-key"
        assert server.client.options("/detect", headers=preflight | {"Origin": "https://b.example"}).status_code == 400
    with serving(FakeDetector()) as server:
        assert "access-control-allow-origin" not in server.client.options("/detect", headers=preflight).headers
