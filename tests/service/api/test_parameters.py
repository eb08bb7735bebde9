"""The query's effects, and which source of a value overrides which."""

from tests.support.serving import PNG, FakeDetector, Serving, detect, picture, serving


def test_the_query_decides_what_is_kept(server: Serving) -> None:
    image = picture(colour=(51, 0, 0))  # scores 0.2

    def found(**query: object) -> int:
        return len(detect(server, content=image, headers=PNG, params=query).json()["detections"])

    assert found() == 1
    assert found(score_threshold=[0.1, 0.3]) == 0, "the last one counts"
    assert found(score_threshold=0.3) == 0
    assert found(score_threshold=0.1, label=["circle", "square"]) == 1
    assert found(label="square") == 0


def test_a_setting_wins_over_the_file_and_the_query_over_the_setting() -> None:
    image = picture(colour=(51, 0, 0))
    with serving(FakeDetector(), score_threshold=0.3) as server:
        assert server.client.get("/model").json()["defaults"]["score_threshold"] == 0.3
        assert detect(server, content=image, headers=PNG).json()["detections"] == []
        query = {"score_threshold": 0.1}
        assert len(detect(server, content=image, headers=PNG, params=query).json()["detections"]) == 1
